"""Captured operators by rule: the table, and how each call is taken apart."""
