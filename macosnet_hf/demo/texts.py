"""What the page says to its visitors."""

from __future__ import annotations

import contextlib
import html
import logging
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import gradio as gr
import numpy as np

from ..directions import orientation_in_words
from ..errors import MaCoSNetError
from . import limits
from .viewer import data_address, reduced

if TYPE_CHECKING:
    from ..inference.files import MatchedPair, SegmentedCollection

logger = logging.getLogger("macosnet_hf.demo")

TITLE = "Show, Match and Segment"
SUMMARY = "Two photos of the same kind of object: see which points match, and the object cut out of both."
LIMITS = (
    "Best with one main object in each photo, the same kind of thing seen from a similar side; thin parts are "
    f"easily missed. Files up to {limits.MAX_FILE_MEGABYTES} MB and {limits.MAX_PIXELS // 1_000_000} megapixels. "
    "Nothing is stored longer than two hours."
)
PAPER = "https://arxiv.org/abs/1906.05857"
PRESS_MATCH = "Press Match when both photos are there."
GONE = (
    f"Your last result is no longer on the server: results stay for {limits.RESULT_SECONDS // 60} minutes. "
    "Choose photos or an example."
)
OPPOSITE = "If they face opposite ways, say so under Options."
TRY = "Try photos that show the same kind of thing from a similar side, each with one main object."
PRESS_FIND = "Press the button above to find what these photos have in common."
PHOTOS = ("Photo A", "Photo B")  # source and target
FACING_EACH = [("as they are", "none"), ("mirrored, some of them", "mirror")]
FACING = [("as photo A", "none"), ("mirrored", "mirror"), ("mirrored or turned", "all")]
REFINEMENTS = [("sharp", "grabcut"), ("soft", "otsu"), ("raw", "none")]
MODELS = "Lite is quick; base takes longer and matches more precisely."
EDGES = "Sharp follows the photo (GrabCut), soft a threshold (Otsu), raw is what the network says."


@contextlib.contextmanager
def errors_for_visitors() -> Iterator[None]:
    """Turns whatever goes wrong inside into a message on the page; the log has the details.

    Raises:
        gr.Error: with one sentence.
    """
    try:
        yield
    except gr.Error:
        raise
    except MaCoSNetError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Exception as error:
        logger.exception("A request failed")
        raise gr.Error("Something went wrong on our side. Please try other photos.", print_exception=False) from error


def without_detail(sentence: str) -> str:
    """A sentence about a file without the words of a library in brackets at its end."""
    return re.sub(r"(cannot be read) \(.*\)\.$", r"\1.", sentence, flags=re.DOTALL)


def pair_verdict(pair: MatchedPair) -> str:
    """One sentence: how far a pair can be trusted, why, and how it was matched. A poor one says what to try."""
    from ..inference.verdict import REASONS  # it imports torch, which the page does without until it has a result

    reason, count = pair.result.reason, len(pair.result.matches)
    alone = "" if pair.result.common else " Each mask is what stands out in its photo, not what both show."
    unsure = pair.result.common and reason in map(REASONS.get, ("fair", "poor", "turned"))
    may_face_away = unsure and pair.orientations not in ("mirror", "all")
    facing = f" {OPPOSITE}" if may_face_away else ""
    if pair.result.quality == "poor":
        return f"{reason} {TRY}{facing}{alone}"  # a number of matches would contradict it
    if pair.same_image:
        return "This is the same photo twice, so every point should find itself."
    words = f"{reason[:-1]}: {count} matching {'point' if count == 1 else 'points'} on the object"
    turned = orientation_in_words(pair.result.orientation)
    words += (f", {turned}" if turned else "") + "."
    return words + facing + alone


def collection_verdict(collection: SegmentedCollection) -> str:
    """HTML: which photos of a collection do not belong."""
    odd = [collection.copies[number].name for number in collection.odd]
    rest = len(collection.copies) - len(odd)
    if not any(collection.has_common_object(number) for number in range(len(collection.copies))):
        words = "These photos seem to have nothing in common: each mask is what stands out in its photo."
        return marked("nothing shared", "poor", words)
    if odd:
        thumbnails = "".join(_thumbnail(collection, number) for number in collection.odd)
        words = f"{_listed(odd)} {'does' if len(odd) == 1 else 'do'} not seem to belong; the other {rest} agree."
        return marked("odd one out", "fair", words, thumbnails)
    alone = [copy.name for number, copy in enumerate(collection.copies) if not collection.has_common_object(number)]
    if alone:
        words = f"{_listed(alone)} {'shares' if len(alone) == 1 else 'share'} no object with the others."
        return marked("shared in part", "fair", f"{words} There the mask is what stands out in the photo.")
    words = f"All {rest} photos seem to show the same kind of object."
    if rest < 4:
        words = f"{rest} photos are too few to tell whether one does not belong; four will do."
    return marked("all agree", "good", words)


def missing_models(names: Sequence[str]) -> str:
    """One sentence for visitors: which models cannot be had."""
    word, without = ("model", "it") if len(names) == 1 else ("models", "them")
    return f"The {word} {_listed(list(names))} cannot be had at the moment; the page works without {without}."


def _listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"


# HTML with names of files is made here, not by a template of `gr.HTML`: gradio runs what a template gives as a
# JavaScript template string, hence also a name with `${...}` in it.


def marked(mark: str, kind: str, words: str, images: str = "") -> str:
    """HTML: words behind a mark in the colour of its kind, "good", "fair" or "poor"; HTML of images stands between."""
    mark = f'<b class="mark {kind}">{html.escape(mark)}</b>'
    return f'<div class="verdict">{mark}{images}<span>{html.escape(words)}</span></div>'


def _thumbnail(collection: SegmentedCollection, number: int) -> str:
    return f'<img class="thumbnail" alt="" src="{data_address(reduced(collection.copies[number].image, 64))}">'


def agreement(collection: SegmentedCollection) -> str:
    """HTML: a bar for each photo of a collection, the best first."""
    values = np.asarray(collection.result.agreement, dtype=float)
    shares = 100 * np.clip(values / max(values.max(), 1e-6), 0.02, 1.0)
    rows = []
    for number in np.argsort(-values, kind="stable").tolist():
        name = html.escape(collection.copies[number].name)
        odd, said = ("odd", "odd one out") if number in collection.odd else ("", f"{values[number]:.2f}")
        if collection.orientations[number] == "mirror":
            said += ", mirrored"
        rows.append(
            f'<span class="{odd} name" title="{name}">{_thumbnail(collection, number)}{name}</span>'
            f'<span class="{odd} bar"><i style="width: {shares[number]:.0f}%"></i></span>'
            f'<span class="{odd} said">{said}</span>'
        )
    return f'<div class="agreement">{"".join(rows)}</div>'
