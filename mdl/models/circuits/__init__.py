"""Circuits of a transformer: its graph of nodes and edges, and the model with some of them ablated."""
