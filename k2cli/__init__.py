"""k2: run trillion-parameter open models on a few Apple Silicon machines."""

__all__ = ["__version__"]

__version__ = "0.1.0"
