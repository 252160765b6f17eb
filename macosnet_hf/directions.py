"""The two directions in which points of a pair are transferred, and the orientations in which its object may be looked
for.

Without torch: commands and the demo's page read this before anything heavy is imported.

The module travels with the model to the Hub.
"""

from __future__ import annotations

from .errors import InputError

DIRECTIONS = ("source_to_target", "target_to_source")

ORIENTATIONS = ("none", "mirror", "all")
"""How the source may face: as it is; also as its mirror image; in all eight symmetries of the square."""


def check_orientations(orientations: str) -> None:
    """Raises `InputError` for none of `ORIENTATIONS`."""
    if orientations not in ORIENTATIONS:
        raise InputError(f"orientations must be {', '.join(map(repr, ORIENTATIONS))}; got {orientations!r}.")


def start_of(direction: str) -> int:
    """The image that points start on: 0 the source, 1 the target. Raises `InputError` for an unknown direction."""
    if direction not in DIRECTIONS:
        raise InputError(f"direction must be {' or '.join(map(repr, DIRECTIONS))}; got {direction!r}.")
    return DIRECTIONS.index(direction)
