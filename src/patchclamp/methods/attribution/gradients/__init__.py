"""Maps made of gradients."""
