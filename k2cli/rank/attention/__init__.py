"""Attention of k2 itself, in place of mlx-lm's where that is slow or takes much memory."""
