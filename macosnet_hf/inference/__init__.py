"""Pairs and collections from files to results, and the files that results become."""

from ..directions import DIRECTIONS, start_of

# Longer side of the images of a collection on the command line and in evaluation. The crop of a small object has 0.4 of
# it, a little more than the network's input.
COLLECTION_SIDE = 640

VIEWS = ("source", "target")

__all__ = ["COLLECTION_SIDE", "DIRECTIONS", "VIEWS", "start_of"]
