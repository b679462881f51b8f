"""Small real circuits, trained here: induction, modular addition, balanced brackets; their textbook circuits in bits."""
