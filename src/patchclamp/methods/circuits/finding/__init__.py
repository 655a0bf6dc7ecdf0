"""Finding circuits: to first order, exactly, by pruning, along paths; and the whole way."""
