"""Prompts and responses from Parquet files, batches of them, and dividing batches by tokens."""
