"""Attacks: the worst point that can be found near an input, and whether a search can be believed.

An attack that fails proves nothing: every accuracy under attack is an upper bound of the
robust accuracy. `masking` says where it is not even a useful one.
"""
