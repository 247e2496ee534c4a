"""Views of a plan: table, bars, explanation, plots, and the list of machines to buy."""
