"""Pairs and collections from files to results, and the files that results become."""

DIRECTIONS = ("source_to_target", "target_to_source")
