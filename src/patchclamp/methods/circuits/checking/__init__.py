"""Checking circuits: is the behaviour there, is the circuit faithful, is it the planted one."""
