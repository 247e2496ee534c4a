"""Runs: their records, logs and ends."""
