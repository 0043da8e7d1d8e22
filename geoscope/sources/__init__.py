"""From what the user names to an open checkpoint: this disk, the Hub, runs and their steps."""
