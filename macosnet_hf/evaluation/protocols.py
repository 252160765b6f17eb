"""What each benchmark measures: the table `PROTOCOLS`, and the options of an evaluation.

[`evaluate`](runner.py) measures a predictor by a protocol; [`scoring`](scoring.py) holds the scores of one sample.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from ..datasets.benchmarks import BENCHMARKS
from ..errors import InputError
from ..refinement import REFINEMENT_METHODS

MASKS = ("pairs", "collection")


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is scored.

    Attributes:
        benchmark: its name.
        text: one or a few sentences that name the protocol under a table.
        direction: in which keypoints are transferred; the error is measured where they arrive. `None`: no keypoints.
        pck: protocols of PCK, the one of the paper's table first.
        alphas: thresholds of PCK or flow PCK.
        flow, masks, label_transfer: what else is measured.
        annotated_box: PCK `bbox` needs the annotated box; the box of the keypoints is no substitute.
        layout: name of the benchmark whose folders it reads, where it is not the protocol's own.
        composites: masks of composites are measured, see [`which_object`](which_object.py).
    """

    benchmark: str
    text: str
    direction: str | None = None
    pck: tuple[str, ...] = ()
    alphas: tuple[float, ...] = (0.05, 0.1, 0.15)
    flow: bool = False
    masks: bool = False
    label_transfer: bool = False
    annotated_box: bool = False
    layout: str = ""
    composites: bool = False

    @property
    def data(self) -> str:
        """The benchmark whose records it reads."""
        return self.layout or self.benchmark

    @property
    def kind(self) -> str:
        """`"pairs"`, or `"images"` that are paired within their class."""
        return BENCHMARKS[self.data].kind


_KEYPOINT_TEXT = (
    "Keypoints of the target are transferred to the source. PCK `image`: both images scaled to 224x224, reference "
    "224. PCK `bbox`: reference is the longer side of the box of the source's keypoints. "
    "Mean over pairs; per point in the JSON."
)
_MASK_TEXT = (
    "P: share of correctly labelled pixels, J: intersection over union of the object, F: boundary F within 0.75 % of "
    "the diagonal; at the original size, mean over images of a class, then over classes."
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.benchmark: protocol
    for protocol in (
        Protocol("pf-willow", _KEYPOINT_TEXT, "target_to_source", ("image", "bbox")),
        Protocol("pf-pascal", _KEYPOINT_TEXT, "target_to_source", ("image", "bbox")),
        Protocol("pairs", _KEYPOINT_TEXT, "target_to_source", ("image", "bbox")),
        Protocol(
            "spair-71k",
            "Keypoints of the source are transferred to the target. PCK `bbox`: reference is the longer side of the "
            "target's annotated box. Mean over pairs; per point and by difficulty in the JSON.",
            "source_to_target",
            ("bbox",),
            annotated_box=True,
        ),
        Protocol(
            "tss",
            "Flow PCK: pixels of the target's foreground with valid flow whose place in the source is off by at most "
            "alpha times the source's longer side, in pixels; both directions of each pair, mirrored pairs mirrored; "
            "mean over pairs of a group, then over groups. " + _MASK_TEXT,
            alphas=(0.05, 0.1),
            flow=True,
            masks=True,
            label_transfer=True,
        ),
        Protocol(
            "internet",
            _MASK_TEXT + " Images without the object are left out of J.",
            masks=True,
            label_transfer=True,
        ),
        Protocol("coseg", _MASK_TEXT, masks=True, label_transfer=True),
        Protocol(
            "which-object",
            "Composites of objects of two or three classes, asked for each of them by partners of its class. right: "
            "share of questions in which the asked object has more mask than every other. J asked, J others: of the "
            "answer with the asked object, and with all others together, where less is better. IoU of answers: of two "
            "answers about one composite, where less is better. Below: J of the masks of whole images, given partners "
            "of their class, of other classes, or the image itself. Means over the questions of a row, then over rows.",
            layout="coseg",
            composites=True,
        ),
    )
}


@dataclass(frozen=True)
class Options:
    """What can be chosen in an evaluation.

    Attributes:
        refine: how soft masks become hard ones: `grabcut`, `otsu`, `crf`, or `none` (threshold 0.5).
        refine_size: longer side, in pixels, at which masks are refined, 0 is the original size. Scores are always taken
            at the original size.
        partners: how many images of its class each single image is paired with.
        seed: of the choice of partners.
        masks: `pairs`, or `collection`: each group of a class (at most 65 images) is segmented as one collection.
        alphas: thresholds instead of the protocol's own.
        batch_size: pairs at a time.
        composites: `which-object`: how many.
        source_symmetry: by which of `SYMMETRIES` (`geometry.py`) the source of every pair is moved before matching;
            figures are those of the stored images.
        flip_annotation: whether the pairs that a data set annotates as mirrored (TSS) are mirrored before matching.
        max_side: images of pairs are reduced so that the longer side is at most this many pixels before the model sees
            them; figures are those of the stored images. The paper's last rows of Table 1 are with 100.
    """

    refine: str = "grabcut"
    refine_size: int = 320
    partners: int = 3
    seed: int = 0
    masks: str = "pairs"
    alphas: tuple[float, ...] | None = None
    batch_size: int = 8
    composites: int = 100
    source_symmetry: str = "identity"
    flip_annotation: bool = True
    max_side: int | None = None

    def __post_init__(self) -> None:
        if self.masks not in MASKS:
            raise InputError(f"masks must be one of {', '.join(MASKS)}; got {self.masks!r}.")
        if self.refine not in REFINEMENT_METHODS:
            raise InputError(f"refine must be one of {', '.join(REFINEMENT_METHODS)}; got {self.refine!r}.")
        if min(self.partners, self.batch_size, self.composites) < 1 or self.refine_size < 0:
            raise InputError("partners, batch_size and composites must be at least 1, refine_size at least 0.")
        if self.max_side is not None and self.max_side < 1:
            raise InputError(f"max_side must be at least 1; got {self.max_side}.")
        if self.alphas is not None and (not self.alphas or min(self.alphas) <= 0):
            raise InputError("alphas must be positive numbers.")


def __getattr__(name: str) -> object:
    """What stood here in version 0.1."""
    if name not in ("evaluate", "finish"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(importlib.import_module(".runner", __package__), name)
    return found
