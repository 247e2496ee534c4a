"""The memory model."""
