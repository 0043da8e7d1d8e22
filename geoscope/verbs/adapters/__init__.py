"""Initial adapters: written, converted, checked."""
