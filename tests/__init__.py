"""Tests of hybridflow."""
