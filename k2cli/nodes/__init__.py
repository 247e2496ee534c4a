"""Nodes: how a machine is asked."""
