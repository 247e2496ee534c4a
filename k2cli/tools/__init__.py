"""Tools over MCP servers: their settings, and the process that runs them beside a chat."""
