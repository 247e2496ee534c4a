"""The rank: the process that loads its part of the model and computes."""
