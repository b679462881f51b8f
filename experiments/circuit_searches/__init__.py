"""How far each search for circuits is from the optimum."""
