"""Commands ``k2 keys ...``."""
