"""Class activation maps: where in a layer the evidence for a score lies."""
