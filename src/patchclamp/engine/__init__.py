"""Engines: one protocol, several ways to run a network, each checked against the others."""
