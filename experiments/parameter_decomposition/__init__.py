"""Parameter decompositions trained here, beside the published figures."""
