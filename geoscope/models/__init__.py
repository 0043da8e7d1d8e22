"""A checkpoint as the rest sees it: named tensors, their roles, and which correspond."""
