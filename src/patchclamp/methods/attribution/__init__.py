"""What a score is laid to: maps over inputs, layers, channels, units and heads."""
