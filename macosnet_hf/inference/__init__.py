"""Pairs and collections from files to results, and the files that results become."""

from ..errors import InputError

# Longer side of the images of a collection on the command line and in evaluation. The crop of a small object has 0.4 of
# it, a little more than the network's input.
COLLECTION_SIDE = 640
DIRECTIONS = ("source_to_target", "target_to_source")


def start_of(direction: str) -> int:
    """The image that points start on: 0 the source, 1 the target. Raises `InputError` for an unknown direction."""
    if direction not in DIRECTIONS:
        raise InputError(f"direction must be {' or '.join(map(repr, DIRECTIONS))}; got {direction!r}.")
    return DIRECTIONS.index(direction)
