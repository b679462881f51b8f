"""Circuits: nodes and edges of a transformer, found, loaded and saved."""
