"""A network as writers and readers, and what can be done with an edge."""
