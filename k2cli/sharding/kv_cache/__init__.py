"""KV caches of k2 beside those of mlx-lm: quantized ones."""
