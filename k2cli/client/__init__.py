"""HTTP client of the API."""
