"""Examination of a cluster: checks of facts that were read from the machines or a recording."""
