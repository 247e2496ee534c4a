"""The guard: the parent process of one rank. The leader's guard also serves the API."""
