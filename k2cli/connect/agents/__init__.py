"""One adapter per agent: from a run to the settings that the agent needs."""
