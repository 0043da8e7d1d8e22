"""Models and adapters on the Hub."""
