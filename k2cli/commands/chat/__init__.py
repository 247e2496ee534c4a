"""The command ``k2 chat``."""
