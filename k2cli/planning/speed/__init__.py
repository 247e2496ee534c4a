"""The speed model."""
