"""Other packages on the same folders, each in a virtual environment of its own (run.py)."""
