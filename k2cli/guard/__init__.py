"""The guard: the parent process of a rank; the leader's serves the API."""
