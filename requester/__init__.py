"""The requester: opens a paid job for a batch of prompts and fetches its results."""
