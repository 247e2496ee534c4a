"""Commands ``k2 models``."""
