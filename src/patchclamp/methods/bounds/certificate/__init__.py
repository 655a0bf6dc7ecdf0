"""Proofs as data, and a checker that shares nothing with the search that found them."""
