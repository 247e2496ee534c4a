"""Models on this machine: verification of their files."""
