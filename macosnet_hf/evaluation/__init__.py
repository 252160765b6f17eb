"""Metrics, protocols, baselines and tables for the benchmarks of the paper. See `docs/evaluation.md`."""
