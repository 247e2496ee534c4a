"""``k2 doctor``: what a cluster's machines are and whether they are fit to run a model."""
