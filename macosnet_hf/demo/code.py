"""Python code that makes what the page shows, from the visitor's own files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..io.package import DEFAULT_CHECKPOINT

if TYPE_CHECKING:
    from ..inference.files import MatchedPair, SegmentedCollection


def pair_code(pair: MatchedPair, threshold: float, count: int, checkpoint: str) -> str:
    """Code for a pair as it is drawn."""
    options = {"refine": pair.refine, "threshold": threshold, "orientations": pair.orientations}
    if checkpoint != DEFAULT_CHECKPOINT:
        options["checkpoint"] = checkpoint
    files = ", ".join(repr(copy.name) for copy in pair.copies)
    given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
    return (
        "from macosnet_hf import match_pair\n\n"
        f"result = match_pair({files}{given})\n"
        "print(result.reason, result.matches)\n"
        f'result.draw_matches({count}).save("matches.png")\n'
    )


def collection_code(collection: SegmentedCollection, checkpoint: str) -> str:
    """Code for a collection."""
    chosen = "" if checkpoint == DEFAULT_CHECKPOINT else repr(checkpoint)
    files = ", ".join(repr(copy.name) for copy in collection.copies)
    return (
        "from macosnet_hf.inference.files import segment_files\n"
        "from macosnet_hf.io.checkpoints import load_model_and_processor\n\n"
        f"model, processor = load_model_and_processor({chosen})\n"
        f"files = [{files}]\n"
        f"result = segment_files(files, files, model=model, processor=processor, refine={collection.refine!r})\n"
        'result.sheet().save("overview.png")\n'
    )
