"""Evaluation on the benchmarks of the paper: predictors, protocols, metrics, tables. See `docs/evaluation.md`."""

BASELINES = ("identity", "nearest-neighbour", "nearest-neighbour-prior", "centre-grabcut")
"""Names of the predictors that need no training; here, where a command line reads them without loading torch."""
