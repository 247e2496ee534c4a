"""Metrics and status of a run, and a line of the log per request; never contents."""
