"""Pairs and collections from files to results, and the files that results become."""

from ..directions import DIRECTIONS, start_of

# Longer side of the images of a collection on the command line and in evaluation. The crop of a small object has 0.4 of
# it, a little more than the network's input.
COLLECTION_SIDE = 640

SMALLEST_COLLECTION, LARGEST_COLLECTION = 2, 30  # images of a collection that is averaged, as in the demo

VIEWS = ("source", "target")
ROLES = ("Source", "Target")  # what errors call them

__all__ = ["COLLECTION_SIDE", "DIRECTIONS", "LARGEST_COLLECTION", "ROLES", "SMALLEST_COLLECTION", "VIEWS", "start_of"]
