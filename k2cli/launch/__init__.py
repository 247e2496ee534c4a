"""Launches: from a request to a run whose folder is written."""
