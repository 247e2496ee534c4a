"""A small checkpoint of the ``kimi_k2`` architecture, for tests and trials."""
