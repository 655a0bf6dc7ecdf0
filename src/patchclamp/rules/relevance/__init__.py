"""What every rule does with relevance on its way back: one dispatch over the rules a method."""
