"""Scores of one sample, and running sums of them, whose memory does not grow with the data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..collection import hard_mask
from ..datasets.images import open_image
from ..datasets.masks import ObjectMask, read_mask
from ..datasets.schema import Record, flow_array, keypoint_array
from ..errors import DataError, InputError
from ..geometry import resize_masks
from ..inference import DIRECTIONS
from . import metrics
from .predictors import Prediction, field_to_places
from .protocols import Options, Protocol

if TYPE_CHECKING:
    from PIL import Image

SIDES = ("source", "target")

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
        """Mean of each metric in each class, without metrics that no sample has."""
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
        """Number of samples of a metric."""
        return int(sum(row[name][1] for row in self.sums.values() if name in row))


@dataclass
class Evaluation:
    """Result of an evaluation, or of one process's share.

    Attributes:
        variants: by variant the sums of all classes.
        difficulty: by variant the sums by difficulty, such as `viewpoint 2` (SPair-71k).
        problems: what was left out.
        index: where each prediction was written.
        notes: sentences for the table and the JSON, about the data.
    """

    variants: dict[str, Tally]
    difficulty: dict[str, Tally]
    problems: list[str] = field(default_factory=list)
    index: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, record: Record, scored: dict[str, Scores]) -> None:
        """Adds the scores of one sample by variant."""
        for variant, scores in scored.items():
            self.variants[variant].add(record["class_name"], scores)
            for name, level in (record.get("difficulty") or {}).items():
                if level is not None and variant in self.difficulty:
                    self.difficulty[variant].add(f"{name} {level}", scores)

    def merge(self, other: Evaluation) -> None:
        """Adds another process's result."""
        for own, others in ((self.variants, other.variants), (self.difficulty, other.difficulty)):
            for variant, tally in others.items():
                own.setdefault(variant, Tally()).merge(tally)
        self.problems += [message for message in other.problems if message not in self.problems]
        self.notes += [note for note in other.notes if note not in self.notes]
        self.index.update(other.index)


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
    scores: Scores = {}
    box = record.get(f"{arrives}_box")
    for name in protocol.pck:
        if name == "bbox" and box is None and (truth == truth[0]).all():
            # Points at one place span no box, so this protocol alone leaves the pair out.
            scores |= {f"pck.{name}.{alpha:g}": _where_defined(None) for alpha in options.alphas or protocol.alphas}
            continue
        with _of_record(record):
            found = metrics.keypoint_errors(
                prediction[key],
                truth,
                name,
                size=_sizes(prediction)[arrives],
                box=box,
                valid=np.ones(len(truth), dtype=bool),
            )
        for alpha in options.alphas or protocol.alphas:
            scores[f"pck.{name}.{alpha:g}"] = (found.pck(alpha), 1)
            scores[f"pck_per_point.{name}.{alpha:g}"] = (found.correct(alpha), len(found.errors))
    return scores


def mask_scores(record: Record, side: str, prediction: Prediction, options: Options) -> Scores:
    """P, J and boundary F of one mask, before and after refinement, at the image's original size.

    Raises:
        DataError: if the annotated mask is missing, damaged, or of another size.
    """
    size = _sizes(prediction)["target"]
    truth = true_mask(record, side, size)
    probability = prediction["mask/target"]
    soft = hard = hard_mask(probability, size)
    if "refined/target" in prediction:
        hard = hard_mask(prediction["refined/target"], size)
    elif options.refine != "none":
        image = open_image(record[f"{side}_image"], f"{record['id']}, {side}_image")
        hard = refined_mask(image, probability, options)
    measures = {"precision": metrics.precision, "jaccard": metrics.jaccard, "boundary_f": metrics.boundary_f}
    return {
        f"{prefix}{name}": _where_defined(measure(mask, truth.object, truth.counted))
        for prefix, mask in (("before_refinement.", soft), ("", hard))
        for name, measure in measures.items()
    }


def all_mask_scores(
    records: list[Record], side: str, predictions: list[Prediction], protocol: Protocol, options: Options
) -> list[Scores | DataError]:
    """P, J and boundary F of each record, or the error; `{}` where masks are not measured or not predicted.

    GrabCut takes most of an evaluation's time and runs beside Python, so threads help; each mask is refined by itself,
    so their number changes nothing.
    """

    def score(record: Record, prediction: Prediction) -> Scores | DataError:
        if not protocol.masks or "mask/target" not in prediction:
            return {}
        try:
            return mask_scores(record, side, prediction, options)
        except DataError as error:
            return error

    with ThreadPoolExecutor(max_workers=max(1, min(8, os.cpu_count() or 1))) as pool:
        return list(pool.map(score, records, predictions))


def dense_scores(
    record: Record,
    prediction: Prediction,
    protocol: Protocol,
    options: Options,
    variant: str,
    source_mask: ObjectMask | None,
    target_side: str = "target",
) -> Scores:
    """Flow PCK and label transfer of one pair.

    Raises:
        DataError: if an annotation is missing or of another size.
    """
    size = _sizes(prediction)
    places = field_to_places(prediction[f"field/{variant}"], size["source"], size["target"])
    target_mask = true_mask(record, target_side, size["target"])
    scores: Scores = {}
    if protocol.flow:
        flow = flow_array(record)
        if flow is None:
            raise DataError(f"{record['id']}: there is no flow.")
        if flow.shape[:2] != size["target"]:
            raise DataError(
                f"{record['id']}: the flow is {flow.shape[1]}x{flow.shape[0]} pixels, "
                f"its image {size['target'][1]}x{size['target'][0]}."
            )
        with _of_record(record):
            found = metrics.flow_errors(places, flow, target_mask.object, size["source"])
        for alpha in options.alphas or protocol.alphas:
            scores[f"flow_pck.{alpha:g}"] = (found.pck(alpha), 1)
    if protocol.label_transfer and source_mask is not None:
        accuracy, iou = metrics.label_transfer(source_mask.object, target_mask.object, places, target_mask.counted)
        scores["label_transfer.accuracy"] = (accuracy, 1)
        scores["label_transfer.iou"] = _where_defined(iou)
    return scores


def true_mask(record: Record, side: str, size: tuple[int, int]) -> ObjectMask:
    """The annotated mask of the given (height, width).

    Raises:
        DataError: if it is missing, damaged, or of another size.
    """
    if record.get(f"{side}_mask") is None:
        raise DataError(f"{record['id']}: there is no mask of the {side}.")
    return read_mask(record[f"{side}_mask"], f"{record['id']}, {side}_mask", size)


def refined_mask(image: Image.Image, probability: np.ndarray, options: Options) -> np.ndarray:
    """The hard mask, bool of the image's own size, as `post_process_cosegmentation` of the processor makes it."""
    from ..refinement import refine_mask

    size = (image.height, image.width)
    soft = resize_masks(torch.from_numpy(probability)[None], size)[0]
    return refine_mask(np.asarray(image), soft, method=options.refine, working_size=options.refine_size or max(size))


def _sizes(prediction: Prediction) -> dict[str, tuple[int, int]]:
    """(height, width) of `source` and `target`."""
    return {side: (int(height), int(width)) for side, (height, width) in zip(SIDES, prediction["sizes"], strict=True)}


def _where_defined(value: float | None) -> tuple[float, float]:
    """A score that counts where it is not `None`."""
    return (0.0, 0) if value is None else (value, 1)


@contextmanager
def _of_record(record: Record) -> Iterator[None]:
    """Adds the record's id to an error of a metric."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{record['id']}: {error}") from error
