"""What a run does step by step: increment Grams, statistics, rank-1 paths, extrapolators, backtest.

Tensors in, numbers out; no files. Every statistic stands beside its value for a random walk with
the same step norms (docs/methods.md#increments).
"""
