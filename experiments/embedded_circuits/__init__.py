"""Circuits of two behaviours of the embedded model, beside every other family."""
