"""Explanations of a region by its weights: quantised, low-rank, pruned, or as components with gates."""
