"""The bound engine: captured networks lowered to rules, and bounds propagated through them."""
