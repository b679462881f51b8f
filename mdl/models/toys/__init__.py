"""Toy models whose parts are known: superposition, residual MLPs, modular addition, gated functions.

Each is an architecture (a `Network`), weights (trained, or set by hand), and inputs to score on. What is known of their
parts is in `decompositions.weights.truths`.
"""
