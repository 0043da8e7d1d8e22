"""Folders are written so that they are complete or cannot be loaded."""
