"""Small real circuits, trained here: induction, modular addition, balanced brackets; textbook circuits in bits."""
