"""The two directions in which points of a pair are transferred, and the orientations in which its object may be looked
for.

Without torch: commands and the demo's page read this before anything heavy is imported.

The module travels with the model to the Hub.
"""

from __future__ import annotations

from collections.abc import Sequence

from .errors import InputError

DIRECTIONS = ("source_to_target", "target_to_source")

ORIENTATIONS = ("none", "mirror", "all")
"""How the source may face: as it is; also as its mirror image; in all eight symmetries of the square."""

COLLECTION_ORIENTATIONS = ORIENTATIONS[:2]
"""Those that a collection knows."""


def check_orientations(orientations: str, known: Sequence[str] = ORIENTATIONS) -> None:
    """Raises `InputError` for none of the known orientations."""
    if orientations not in known:
        raise InputError(f"orientations must be {', '.join(map(repr, known))}; got {orientations!r}.")


def start_of(direction: str) -> int:
    """The image that points start on: 0 the source, 1 the target. Raises `InputError` for an unknown direction."""
    if direction not in DIRECTIONS:
        raise InputError(f"direction must be {' or '.join(map(repr, DIRECTIONS))}; got {direction!r}.")
    return DIRECTIONS.index(direction)


_IN_WORDS = {
    "turn_90": "matched turned by 90 degrees",
    "turn_180": "matched turned by 180 degrees",
    "turn_270": "matched turned by 270 degrees",
    "mirror": "matched as a mirror image",
    "flip": "matched as a mirror image turned by 180 degrees",
    "transpose": "matched as a mirror image turned by 270 degrees",
    "anti_transpose": "matched as a mirror image turned by 90 degrees",
}


def orientation_in_words(orientation: str) -> str:
    """How a source was matched: in words, or "" if it faces as the target does. Turns are clockwise.

    Args:
        orientation: one of `SYMMETRIES` (`geometry.py`) by name.
    """
    return _IN_WORDS.get(orientation, "")
