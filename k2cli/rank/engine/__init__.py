"""The scheduler of the leader rank: requests, steps and sampling."""
