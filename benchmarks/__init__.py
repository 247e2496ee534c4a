"""k2 against mlx-lm, measured side by side: started by ``scripts/benchmark-peers``."""
