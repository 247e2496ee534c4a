"""Weights between machines: what a node has, sending its files, and receiving files of another."""
