"""Access to a run's API: named keys, the file that keeps them, what each may do, and TLS."""
