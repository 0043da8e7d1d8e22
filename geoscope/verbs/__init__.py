"""What the commands do with pairs of models, series of checkpoints, and adapters."""
