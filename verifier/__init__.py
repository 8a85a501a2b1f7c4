"""The judge's arithmetic and byte formats: pure, no network, no clock, no environment."""
