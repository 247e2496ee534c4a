"""Full-width layers of K2 on one or two GPUs: checkpoint, measurements, agreement."""
