"""Pairs and collections from files to results, and the files that results become."""
