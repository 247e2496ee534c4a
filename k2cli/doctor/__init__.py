"""The examination of a cluster: checks over recorded facts."""
