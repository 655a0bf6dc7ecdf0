"""patchclamp."""
