"""One file a version, in the order of their numbers. What was published is never edited."""
