"""Warm-up and checks: the work of a rank between loading and *ready*."""
