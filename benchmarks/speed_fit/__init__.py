"""Fits the constants of the speed model to public measurements: scripts/fit-speed-model."""
