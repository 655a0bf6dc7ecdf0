"""Faithfulness: whether a score changes where, and as much as, a map says it should."""
