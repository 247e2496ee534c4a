"""Requests to the operating system that several parts make, and that differ between systems."""
