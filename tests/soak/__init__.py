"""The long tier, run by hand through ``scripts/soak``: nothing here is collected by pytest."""
