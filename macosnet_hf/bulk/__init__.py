"""Masks of data sets of any size: block by block, in Parquet shards, by one process or many. See `docs/scale.md`."""
