"""Masked forward passes a second, here and in torch."""
