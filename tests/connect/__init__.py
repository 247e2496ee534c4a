"""Settings of coding agents: made, written and used."""
