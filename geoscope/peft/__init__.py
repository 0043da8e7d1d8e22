"""Adapters as PEFT writes them, read from their factors."""
