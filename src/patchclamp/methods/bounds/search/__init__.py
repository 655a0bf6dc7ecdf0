"""Branch and bound: attack first, then divide inputs or neurons until everything is decided."""
