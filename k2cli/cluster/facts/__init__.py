"""Facts about machines: probes, and the parsers of what they print."""
