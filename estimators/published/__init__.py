"""Other people's formulas for the same explanations, beside ours: one file a formula, `figures` for the table.

They are estimates of ours (`how = "estimate"`), worked out from the symbols that were decoded, and never enter a total.
"""
