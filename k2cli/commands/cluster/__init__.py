"""The commands of ``k2 cluster``."""
