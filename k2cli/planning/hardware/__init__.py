"""Machines, for planning."""
