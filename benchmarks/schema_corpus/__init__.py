"""JSON schemas of public packages, compiled as the server compiles those of its clients."""
