"""MLX's kernels on a device: those that are wrong or read too far, and where compiled ones last."""
