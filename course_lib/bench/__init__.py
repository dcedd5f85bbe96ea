"""Benchmarks: ratios within one run, with repeats, written down as ledgers."""
