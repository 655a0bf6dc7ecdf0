"""Maps made by taking parts of the value away and looking at the score."""
