"""One stage of a pipeline: serves its layers, commits to what it served, defends it on chain."""
