"""Adapters, tensors in and tensors out: how they start, how they are laid out and converted."""
