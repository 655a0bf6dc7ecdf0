"""Looking at attention heads: what they attend to, write and need."""
