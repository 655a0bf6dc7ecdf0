"""Proving what a network does when its input, its activations or its weights move."""
