"""How many zeros each layer gets: curves of the output, costs, budgets."""
