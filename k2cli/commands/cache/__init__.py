"""Commands ``k2 cache ...``."""
