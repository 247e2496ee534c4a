"""Machines: the catalog, this machine, and the value of ``--hardware``."""
