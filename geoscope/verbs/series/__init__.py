"""A run step by step, and what it may come to."""
