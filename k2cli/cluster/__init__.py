"""Clusters: descriptions of machines and links, their discovery and measurement."""
