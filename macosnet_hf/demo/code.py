"""Python code that makes what the page shows, from the visitor's own files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..inference import VIEWS
from ..io.package import DEFAULT_CHECKPOINT, EMBEDDED

if TYPE_CHECKING:
    from ..hints import PlacedHint
    from ..inference.files import MatchedPair, SegmentedCollection


def _checkpoint(result: MatchedPair | SegmentedCollection) -> str | None:
    """What names the model of a result in code: for an embedded one its short name; None for the default."""
    if result.checkpoint in ("", DEFAULT_CHECKPOINT):
        return None
    return {folder: name for name, folder in EMBEDDED.items()}.get(result.checkpoint, result.checkpoint)


def _hint(hint: PlacedHint, size: tuple[int, int]) -> str:
    """A hint of points in pixels of an original of (width, height)."""
    points = {
        name: [
            tuple(round(share * side - 0.5, 1) + 0.0 for share, side in zip(point, size, strict=True)) for point in of
        ]
        for name, of in (("include", hint.include), ("exclude", hint.exclude))
    }
    return f"Hint({', '.join(f'{name}={of}' for name, of in points.items() if of)})"


def pair_code(pair: MatchedPair, threshold: float, count: int) -> str:
    """Code for a pair as it is drawn."""
    options: dict[str, object] = {"refine": pair.refine, "threshold": threshold, "orientations": pair.orientations}
    options["checkpoint"] = _checkpoint(pair)
    files = ", ".join(repr(copy.name) for copy in pair.copies)
    given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
    hints = [f"{VIEWS[view]!r}: {_hint(hint, pair.copies[view].size)}" for view, hint in pair.hints.items()]
    if hints:
        given += f", hints={{{', '.join(hints)}}}"
    return (
        "from macosnet_hf import match_pair\n" + "from macosnet_hf.hints import Hint\n" * bool(hints) + "\n"
        f"result = match_pair({files}{given})\n"
        "print(result.reason, result.matches)\n"
        f'result.draw_matches({count}).save("matches.png")\n'
    )


def collection_code(collection: SegmentedCollection) -> str:
    """Code for a collection."""
    checkpoint = _checkpoint(collection)
    chosen = "" if checkpoint is None else repr(checkpoint)
    given = f", refine={collection.refine!r}"
    if collection.searched != "none":
        given += f", orientations={collection.searched!r}"
    hints = [f"{number}: {_hint(hint, collection.copies[number].size)}" for number, hint in collection.hints.items()]
    if hints:
        given += f", hints={{{', '.join(hints)}}}"
    names = [os.path.basename(copy.path) for copy in collection.copies]
    same = "  # some have the same name: write their folders too" if len(set(names)) < len(names) else ""
    files = ", ".join(map(repr, names))
    return (
        "from macosnet_hf.hints import Hint\n" * bool(hints) + "from macosnet_hf.inference.files import segment_files\n"
        "from macosnet_hf.io.checkpoints import load_model_and_processor\n\n"
        f"model, processor = load_model_and_processor({chosen})\n"
        f"files = [{files}]{same}\n"
        f"result = segment_files(files, files, model=model, processor=processor{given})\n"
        'result.sheet().save("overview.png")\n'
    )
