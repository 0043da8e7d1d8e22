"""Bytes on disk become tensors, and tensors bytes; nothing here knows what a path means."""
