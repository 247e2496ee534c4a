"""Reading and conversion of GGUF files."""
