"""Work on one machine: called in process, or over ssh as ``python -m k2cli.agent.main``."""
