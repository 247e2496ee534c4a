"""What is done on a machine: answered in process, or over ssh as ``python -m k2cli.agent.main``."""
