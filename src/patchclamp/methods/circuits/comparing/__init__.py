"""Comparing circuits: with each other, between checkpoints, by repair, with other tools."""
