"""How little it takes to change an answer, and how much leaves it as it is."""
