"""Views of a chat: line editing, the streamed answer, and its styling."""
