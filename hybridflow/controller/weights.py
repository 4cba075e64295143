"""Keeping the rollout engine's weights equal to the actor's."""

from __future__ import annotations

from hybridflow.controller.launch import Launched
from hybridflow.metrics import Metrics
