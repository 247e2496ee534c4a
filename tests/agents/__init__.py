"""Coding agents that others wrote, each against a run whose ranks are scripted."""
