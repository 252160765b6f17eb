"""What each benchmark measures, and the loop that measures it.

Two steps: a predictor answers each sample (see [`macosnet_hf.evaluation.predictors`]), then the answers are scored.
Scores go into running sums by class, so memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..datasets.benchmarks import Problems
from ..datasets.images import mask_from_image, open_image
from ..datasets.schema import Record, flow_array, keypoint_array
from ..errors import DataError, InputError
from . import metrics
from .predictions import (
    PredictionReader,
    PredictionWriter,
    abandon_predictions,
    finish_predictions,
    has_predictions,
    start_predictions,
)
from .predictors import DIRECTIONS, Prediction, Predictor, field_to_places

GROUP_SIZE = 64
MASKS = ("pairs", "collection")
"""Single images of a class that are paired among themselves; a longer class is cut into such groups."""

REFINEMENTS = ("grabcut", "otsu", "crf", "none")


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is scored.

    Attributes:
        benchmark: its name.
        kind: `"pairs"` or `"images"`.
        direction: in which keypoints are transferred; the error is measured where they arrive. `None`: no keypoints.
        pck: protocols of PCK, the one of the paper's table first.
        alphas: thresholds of PCK or flow PCK.
        flow, masks, label_transfer: what else is measured.
        annotated_box: PCK `bbox` needs the annotated box; the box of the keypoints is no substitute.
        text: one sentence that names the protocol under a table.
    """

    benchmark: str
    kind: str
    text: str
    direction: str | None = None
    pck: tuple[str, ...] = ()
    alphas: tuple[float, ...] = (0.05, 0.1, 0.15)
    flow: bool = False
    masks: bool = False
    label_transfer: bool = False
    annotated_box: bool = False


_KEYPOINT_TEXT = (
    "Keypoints of the target are transferred to the source. PCK `image`: both images scaled to 224x224, reference "
    "224. PCK `bbox`: reference is the longer side of the box of the source's keypoints. "
    "Mean over pairs; per point in the JSON."
)
_MASK_TEXT = (
    "P: share of correctly labelled pixels, J: intersection over union of the object, at the original size, mean over "
    "images of a class, then over classes."
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.benchmark: protocol
    for protocol in (
        Protocol("pf-willow", "pairs", _KEYPOINT_TEXT, "target_to_source", ("image", "bbox")),
        Protocol("pf-pascal", "pairs", _KEYPOINT_TEXT, "target_to_source", ("image", "bbox")),
        Protocol("pairs", "pairs", _KEYPOINT_TEXT, "target_to_source", ("image", "bbox")),
        Protocol(
            "spair-71k",
            "pairs",
            "Keypoints of the source are transferred to the target. PCK `bbox`: reference is the longer side of the "
            "target's annotated box. Mean over pairs; per point and by difficulty in the JSON.",
            "source_to_target",
            ("bbox",),
            annotated_box=True,
        ),
        Protocol(
            "tss",
            "pairs",
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
            "images",
            _MASK_TEXT + " Images without the object are left out of J.",
            masks=True,
            label_transfer=True,
        ),
        Protocol("coseg", "images", _MASK_TEXT, masks=True, label_transfer=True),
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
    """

    refine: str = "grabcut"
    refine_size: int = 320
    partners: int = 3
    seed: int = 0
    masks: str = "pairs"
    alphas: tuple[float, ...] | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.masks not in MASKS:
            raise InputError(f"masks must be one of {', '.join(MASKS)}; got {self.masks!r}.")
        if self.refine not in REFINEMENTS:
            raise InputError(f"refine must be one of {', '.join(REFINEMENTS)}; got {self.refine!r}.")
        if self.partners < 1 or self.batch_size < 1 or self.refine_size < 0:
            raise InputError("partners and batch_size must be at least 1, refine_size at least 0.")
        if self.alphas is not None and (not self.alphas or min(self.alphas) <= 0):
            raise InputError("alphas must be positive numbers.")


Scores = dict[str, tuple[float, float]]
"""Metric to (sum, count) of one sample."""


@dataclass
class Tally:
    """Running sums by class and metric. A metric is a dotted name such as `pck.image.0.1`."""

    sums: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, class_name: str, scores: Scores) -> None:
        """Adds the scores of one sample."""
        row = self.sums.setdefault(class_name, {})
        for name, (value, count) in scores.items():
            cell = row.setdefault(name, [0.0, 0.0])
            cell[0] += value
            cell[1] += count

    def merge(self, other: Tally) -> None:
        """Adds another process's sums."""
        for class_name, row in other.sums.items():
            self.add(class_name, {name: (cell[0], cell[1]) for name, cell in row.items()})

    def class_means(self) -> dict[str, dict[str, float]]:
        """Mean of each metric in each class, without metrics of which no sample had one."""
        return {
            class_name: {name: value / count for name, (value, count) in row.items() if count}
            for class_name, row in sorted(self.sums.items())
        }

    def overall(self) -> dict[str, float]:
        """Means over everything: PCK over all samples (or points), all other metrics over class means."""
        names = list(dict.fromkeys(name for row in self.sums.values() for name in row))
        result = {}
        for name in names:
            cells = [row[name] for _, row in sorted(self.sums.items()) if name in row and row[name][1]]
            if not cells:
                continue
            if name.startswith(("pck.", "pck_per_point.")):
                result[name] = sum(value for value, _ in cells) / sum(count for _, count in cells)
            else:
                result[name] = sum(value / count for value, count in cells) / len(cells)
        return result

    def count(self, name: str = "samples") -> int:
        """How many samples a metric was taken of."""
        return int(sum(row[name][1] for row in self.sums.values() if name in row))


@dataclass
class Evaluation:
    """What an evaluation found, mergeable over processes.

    Attributes:
        variants: by variant the sums of all classes.
        difficulty: by variant the sums by difficulty, such as `viewpoint 2` (SPair-71k).
        problems: what was left out.
        seconds: wall clock time.
        index: where each prediction was written.
    """

    variants: dict[str, Tally]
    difficulty: dict[str, Tally]
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    index: dict[str, tuple[str, str]] = field(default_factory=dict)

    def merge(self, other: Evaluation) -> None:
        """Adds what another process found."""
        for own, others in ((self.variants, other.variants), (self.difficulty, other.difficulty)):
            for variant, tally in others.items():
                own.setdefault(variant, Tally()).merge(tally)
        self.problems += [message for message in other.problems if message not in self.problems]
        self.seconds = max(self.seconds, other.seconds)
        self.index.update(other.index)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring one sample
# ---------------------------------------------------------------------------------------------------------------------


def _sizes(prediction: Prediction) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of source and target."""
    (source_height, source_width), (target_height, target_width) = prediction["sizes"].tolist()
    return (source_height, source_width), (target_height, target_width)


def _alphas(protocol: Protocol, options: Options) -> tuple[float, ...]:
    return options.alphas or protocol.alphas


def keypoint_scores(
    record: Record, prediction: Prediction, protocol: Protocol, options: Options, variant: str
) -> Scores:
    """PCK of one pair, per sample and per point.

    Raises:
        DataError: if the record has no keypoints, or no reference length.
        InputError: if the prediction does not fit the record.
    """
    if protocol.direction not in DIRECTIONS:
        raise InputError(f"{protocol.benchmark} has no keypoints.")
    arrives = "source" if protocol.direction == "target_to_source" else "target"
    truth = keypoint_array(record, arrives)
    if len(truth) == 0:
        raise DataError(f"{record['id']}: there is no keypoint to score.")
    if protocol.annotated_box and record.get(f"{arrives}_box") is None:
        raise DataError(f"{record['id']}: there is no annotated box of the {arrives}.")
    key = f"points/{variant}"
    if key not in prediction:
        raise InputError(f"The prediction of {record['id']!r} has no points of the variant {variant!r}.")
    size = _sizes(prediction)[0 if arrives == "source" else 1]
    scores: Scores = {}
    for name in protocol.pck:
        try:
            found = metrics.keypoint_errors(
                prediction[key],
                truth,
                name,
                size=size,
                box=record.get(f"{arrives}_box"),
                valid=np.ones(len(truth), dtype=bool),
            )
        except DataError as error:
            raise DataError(f"{record['id']}: {error}") from error
        for alpha in _alphas(protocol, options):
            scores[f"pck.{name}.{alpha:g}"] = (found.pck(alpha), 1)
            scores[f"pck_per_point.{name}.{alpha:g}"] = (found.correct(alpha), len(found.errors))
    return scores


def mask_scores(record: Record, side: str, prediction: Prediction, options: Options) -> Scores:
    """P and J of one mask, before and after refinement, at the image's original size.

    Raises:
        DataError: if the annotated mask is missing, damaged, or of another size.
    """
    size = _sizes(prediction)[1]
    truth = _true_mask(record, side, size)
    probability = prediction["mask/target"]
    soft = resize_probability(probability, size) >= 0.5
    scores: Scores = {"before_refinement.precision": (metrics.precision(soft, truth), 1)}
    _add_jaccard(scores, "before_refinement.jaccard", soft, truth)
    hard = soft
    if "refined/target" in prediction:
        hard = resize_probability(prediction["refined/target"], size) >= 0.5
    elif options.refine != "none":
        image = open_image(record[f"{side}_image"], f"{record['id']}, {side}_image")
        hard = refined_mask(image, probability, options)
    scores["precision"] = (metrics.precision(hard, truth), 1)
    _add_jaccard(scores, "jaccard", hard, truth)
    return scores


def _add_jaccard(scores: Scores, name: str, predicted: np.ndarray, truth: np.ndarray) -> None:
    value = metrics.jaccard(predicted, truth)
    scores[name] = (0.0, 0) if value is None else (value, 1)


def _true_mask(record: Record, side: str, size: tuple[int, int]) -> np.ndarray:
    if record.get(f"{side}_mask") is None:
        raise DataError(f"{record['id']}: there is no mask of the {side}.")
    return mask_from_image(record[f"{side}_mask"], f"{record['id']}, {side}_mask", size)


def resize_probability(probability: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A stored mask (uint8) as probability float32 of the given (height, width), bilinear. 127.5/255 is 0.5, so that
    the threshold 0.5 falls between the stored 127 and 128, exactly where it fell before storing."""
    import cv2

    height, width = size
    return cv2.resize(probability.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) / np.float32(255)


def refined_mask(image: Any, probability: np.ndarray, options: Options) -> np.ndarray:
    """The hard mask, bool of the image's own size, as `macosnet segment` would make it."""
    from ..refinement import refine_mask

    size = (image.height, image.width)
    return refine_mask(
        np.asarray(image),
        resize_probability(probability, size),
        method=options.refine,
        working_size=options.refine_size or max(size),
    )


def dense_scores(
    record: Record,
    prediction: Prediction,
    protocol: Protocol,
    options: Options,
    variant: str,
    source_mask: np.ndarray | None,
    target_side: str = "target",
) -> Scores:
    """Flow PCK and label transfer of one pair.

    Raises:
        DataError: if an annotation is missing or of another size.
    """
    source_size, target_size = _sizes(prediction)
    places = field_to_places(prediction[f"field/{variant}"], source_size, target_size)
    target_mask = _true_mask(record, target_side, target_size)
    scores: Scores = {}
    if protocol.flow:
        flow = flow_array(record)
        if flow is None:
            raise DataError(f"{record['id']}: there is no flow.")
        if flow.shape[:2] != target_size:
            raise DataError(
                f"{record['id']}: the flow is {flow.shape[1]}x{flow.shape[0]} pixels, "
                f"its image {target_size[1]}x{target_size[0]}."
            )
        try:
            found = metrics.flow_errors(places, flow, target_mask, source_size)
        except DataError as error:
            raise DataError(f"{record['id']}: {error}") from error
        for alpha in _alphas(protocol, options):
            scores[f"flow_pck.{alpha:g}"] = (found.pck(alpha), 1)
    if protocol.label_transfer and source_mask is not None:
        accuracy, iou = metrics.label_transfer(source_mask, target_mask, places)
        scores["label_transfer.accuracy"] = (accuracy, 1)
        scores["label_transfer.iou"] = (0.0, 0) if iou is None else (iou, 1)
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Consecutive records, `size` at a time."""
    part: list[Record] = []
    for record in records:
        part.append(record)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def class_groups(records: Iterable[Record], size: int = GROUP_SIZE) -> Iterator[list[Record]]:
    """Single images grouped by class, at most `size + 1` at a time and at least two wherever the class has two.

    Works on a stream in any order; what waits is at most `size + 1` records of each class.
    """
    waiting: dict[str, list[Record]] = {}
    for record in records:
        group = waiting.setdefault(record["class_name"], [])
        # One more than `size` waits, so that the last group of a class never is a single image.
        if len(group) == size + 1:
            yield group[:size]
            del group[:size]
        group.append(record)
    yield from (group for group in waiting.values() if group)


def choose_partners(ids: Sequence[str], count: int, seed: int) -> list[list[int]]:
    """For each of N >= 2 images `min(count, N - 1)` others, drawn without replacement. Depends on the ids and the
    seed only."""
    text = "\n".join([str(seed), *ids])
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))
    result = []
    for index in range(len(ids)):
        others = np.delete(np.arange(len(ids)), index)
        result.append([int(other) for other in generator.permutation(others)[:count]])
    return result


def predictions_manifest(protocol: Protocol, predictor: Predictor, options: Options, split: str) -> dict[str, Any]:
    """What predictions depend on: benchmark, split, predictor, and for single images the choice of partners."""
    manifest: dict[str, Any] = {
        "benchmark": protocol.benchmark,
        "split": split,
        "model or configuration": predictor.fingerprint(),
    }
    if protocol.kind == "images":
        manifest["choice of partners"] = [options.partners, options.seed]
        if options.masks != "pairs":
            manifest["masks"] = [options.masks, options.refine]
    return manifest


def evaluate(
    records: Iterable[Record],
    protocol: Protocol,
    predictor: Predictor,
    options: Options | None = None,
    *,
    split: str = "test",
    problems: Problems | None = None,
    predictions: str | os.PathLike[str] | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] | None = None,
    barrier: Callable[[], None] | None = None,
) -> Evaluation:
    """Predicts and scores this process's share of the records.

    Args:
        records: pairs or single images, as the protocol wants them; may be a stream of any length.
        protocol: what to measure.
        predictor: the model or a baseline.
        options: see [`Options`].
        split: only noted with the predictions.
        problems: whether to leave invalid records out; default: raise.
        predictions: folder of predictions; read (and not predicted again) if it is complete, else written.
        rank, world_size: this process and how many there are; batch number k is treated by process k mod world_size.
        progress: called with the number of samples done.
        barrier: waits for all processes.

    Returns:
        Running sums. With several processes, merge them, then call [`finish`] once.

    Raises:
        DataError: for invalid data, unless it is left out.
        InputError: for predictions made with another model or configuration.
    """
    options = options or Options()
    problems = problems if problems is not None else Problems()
    variants = predictor.variants if predictor.gives_points else ()
    result = Evaluation(
        {variant: Tally() for variant in (variants or ("masks",))}, {variant: Tally() for variant in variants}
    )
    if not (predictor.gives_points and (protocol.direction or protocol.label_transfer)) and not (
        predictor.gives_masks and protocol.masks
    ):
        raise InputError(f"{predictor.name} answers nothing that {protocol.benchmark} asks.")
    reader = writer = None
    if predictions is not None and has_predictions(predictions):
        reader = PredictionReader(predictions, predictions_manifest(protocol, predictor, options, split))
    elif predictions is not None:
        try:
            if rank == 0:
                start_predictions(predictions)
        finally:  # whatever happened, the other processes must not wait here for ever
            if barrier is not None:
                barrier()
        writer = PredictionWriter(predictions, rank)
    start = time.monotonic()
    parts = class_groups(records) if protocol.kind == "images" else batches(records, options.batch_size)
    try:
        for number, part in enumerate(parts):
            if number % world_size != rank:
                continue
            if protocol.kind == "images":
                _treat_images(part, protocol, predictor, options, problems, reader, writer, result)
            else:
                _treat_pairs(part, protocol, predictor, options, problems, reader, writer, result)
            if progress is not None:
                progress(len(part))
        if writer is not None:
            writer.flush()
            result.index = writer.index
    except BaseException:
        if predictions is not None and writer is not None and world_size == 1:  # others may still be writing
            abandon_predictions(predictions)
        raise
    result.problems = list(problems.messages)
    result.seconds = time.monotonic() - start
    return result


def finish(
    result: Evaluation,
    protocol: Protocol,
    predictor: Predictor,
    options: Options,
    *,
    split: str = "test",
    predictions: str | os.PathLike[str] | None = None,
) -> None:
    """Completes the predictions on disk, once for all processes, and refuses an evaluation of nothing.

    Raises:
        DataError: if no sample was scored.
    """
    if not any(tally.count() for tally in result.variants.values()):
        raise DataError("No sample could be scored.")
    if predictions is not None and not has_predictions(predictions):
        finish_predictions(predictions, predictions_manifest(protocol, predictor, options, split), result.index)


def _usable(records: list[Record], sides: tuple[str, ...], predictor: Predictor, problems: Problems) -> list[Record]:
    """The records whose images can be opened and encoded; the others are reported."""
    good = []
    for record in records:
        try:
            for side in sides:
                if record.get(f"{side}_image") is None:
                    raise DataError(f"{record['id']}: there is no image of the {side}.")
                predictor.image(record, side, mirrored=side == "source" and bool(record.get("mirror_source")))
        except DataError as error:
            problems.report(error)
        else:
            good.append(record)
    return good


def _treat_pairs(
    records: list[Record],
    protocol: Protocol,
    predictor: Predictor,
    options: Options,
    problems: Problems,
    reader: PredictionReader | None,
    writer: PredictionWriter | None,
    result: Evaluation,
) -> None:
    if reader is not None:
        # A sample that was left out when the predictions were written is left out again, with the same complaint.
        records = [
            record
            for record in records
            if record["id"] in reader.index or _usable([record], ("source", "target"), predictor, problems)
        ]
        predictions = [reader.get(record) for record in records]
    else:
        records = _usable(records, ("source", "target"), predictor, problems)
        if not records:
            return
        predictions = predictor.predict_pairs(
            records,
            direction=protocol.direction,
            dense=protocol.flow or protocol.label_transfer,
            masks=protocol.masks,
        )
    masked = _all_mask_scores(records, "target", predictions, protocol, options)
    for record, prediction, mask_result in zip(records, predictions, masked, strict=True):
        if writer is not None:
            writer.add(record, prediction)
        try:
            if isinstance(mask_result, DataError):
                raise mask_result
            common: Scores = {"samples": (1, 1), **mask_result}
            source_mask = None
            if protocol.label_transfer:
                source_mask = _true_mask(record, "source", _sizes(prediction)[0])
            scored = {}
            for variant in result.variants:
                scores = dict(common)
                if protocol.direction and f"points/{variant}" in prediction:
                    scores.update(keypoint_scores(record, prediction, protocol, options, variant))
                if f"field/{variant}" in prediction:
                    scores.update(dense_scores(record, prediction, protocol, options, variant, source_mask))
                scored[variant] = scores
        except DataError as error:
            problems.report(error)
            continue
        _count(record, scored, result)


def _treat_images(
    records: list[Record],
    protocol: Protocol,
    predictor: Predictor,
    options: Options,
    problems: Problems,
    reader: PredictionReader | None,
    writer: PredictionWriter | None,
    result: Evaluation,
) -> None:
    records = _with_masks(_usable(records, ("source",), _NoEncoding() if reader else predictor, problems), problems)
    if not records:
        return
    class_name = records[0]["class_name"]
    if len(records) < 2:
        problems.report(
            DataError(
                f"{records[0]['id']}: co-segmentation needs two images of the class {class_name!r}; there is one."
            )
        )
        return
    if reader is not None:
        predictions = [reader.get(record) for record in records]
    else:
        partners = choose_partners([record["id"] for record in records], options.partners, options.seed)
        predictions = predictor.predict_images(
            records,
            partners,
            batch_size=options.batch_size,
            dense=protocol.label_transfer,
            collection=options.refine if options.masks == "collection" else None,
        )
    by_id = {record["id"]: record for record in records}
    masked = _all_mask_scores(records, "source", predictions, protocol, options)
    for record, prediction, mask_result in zip(records, predictions, masked, strict=True):
        if writer is not None:
            writer.add(record, prediction)
        if isinstance(mask_result, DataError):
            raise mask_result
        common: Scores = {"samples": (1, 1), **mask_result}
        partner = by_id.get(str(prediction["partner"]))
        if partner is None:
            raise InputError(f"The prediction of {record['id']!r} was made with a partner that is not in its group.")
        scored = {}
        for variant in result.variants:
            scores = dict(common)
            if f"field/{variant}" in prediction:
                source_mask = _true_mask(partner, "source", _sizes(prediction)[0])
                scores.update(
                    dense_scores(record, prediction, protocol, options, variant, source_mask, target_side="source")
                )
            scored[variant] = scores
        _count(record, scored, result)


def _all_mask_scores(
    records: list[Record], side: str, predictions: list[Prediction], protocol: Protocol, options: Options
) -> list[Scores | DataError]:
    """P and J of each record, or why not. GrabCut takes most of an evaluation's time and runs beside Python, so threads
    help; each mask is refined by itself, so their number changes nothing."""

    def score(record: Record, prediction: Prediction) -> Scores | DataError:
        if not protocol.masks or "mask/target" not in prediction:
            return {}
        try:
            return mask_scores(record, side, prediction, options)
        except DataError as error:
            return error

    with ThreadPoolExecutor(max_workers=max(1, min(8, os.cpu_count() or 1))) as pool:
        return list(pool.map(score, records, predictions))


class _NoEncoding(Predictor):
    """Opens images without encoding them, to find the damaged ones when predictions are there already."""


def _with_masks(records: list[Record], problems: Problems) -> list[Record]:
    """The records with a mask of the image's own size; the others are reported, before they are anyone's partner."""
    from ..datasets.images import image_size

    good = []
    for record in records:
        try:
            _true_mask(record, "source", image_size(record["source_image"], f"{record['id']}, source_image"))
        except DataError as error:
            problems.report(error)
        else:
            good.append(record)
    return good


def _count(record: Record, scored: dict[str, Scores], result: Evaluation) -> None:
    for variant, scores in scored.items():
        result.variants[variant].add(record["class_name"], scores)
        difficulty = record.get("difficulty")
        if difficulty and variant in result.difficulty:
            for name, level in difficulty.items():
                if level is not None:
                    result.difficulty[variant].add(f"{name} {level}", scores)
