"""What each operator does to intervals and to linear bounds: one table, one file per family."""
