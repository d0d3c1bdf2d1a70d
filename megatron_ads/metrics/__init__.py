"""How well predictions do: pure functions on lists of predictions and truths."""
