"""Named keys of a run's API: making them, the file that keeps them, and what each one may do."""
