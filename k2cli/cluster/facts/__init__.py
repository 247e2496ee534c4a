"""Facts about machines: commands that are run on them, and parsers of their output."""
