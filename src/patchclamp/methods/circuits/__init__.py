"""Circuits: which parts of a network a behaviour is made of, and how far that can be trusted."""
