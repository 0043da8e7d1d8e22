"""Where geoscope works inside of other tools: loggers of runs, callbacks of trainers.

Nothing here is imported by the rest of the library; the tools are imported when they are used.
"""
