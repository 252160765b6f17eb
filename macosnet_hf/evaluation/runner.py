"""The loop of an evaluation: a predictor answers each sample (see [`predictors`](predictors.py)), then the answers are
scored (see [`scoring`](scoring.py))."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..datasets.benchmarks import Problems
from ..datasets.images import image_size
from ..datasets.schema import Record
from ..errors import DataError, InputError
from .predictions import (
    PredictionReader,
    PredictionWriter,
    abandon_predictions,
    finish_predictions,
    has_predictions,
    start_predictions,
)
from .predictors import Prediction, Predictor, source_symmetry
from .protocols import Options, Protocol
from .scoring import Evaluation, Scores, Tally, all_mask_scores, dense_scores, keypoint_scores, true_mask
from .which_object import ask_for_objects

GROUP_SIZE = 64
"""Single images of a class that are paired among themselves; a longer class is cut into such groups."""


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
    """Single images grouped by class, at most `size + 1` in a group and at least two where the class has two.

    Takes a stream in any order, and holds at most `size + 1` records of each class.
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
    """`min(count, N - 1)` others for each of N >= 2 images, drawn without replacement; a function of ids and seed."""
    text = "\n".join([str(seed), *ids])
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))
    result = []
    for index in range(len(ids)):
        others = np.delete(np.arange(len(ids)), index)
        result.append([int(other) for other in generator.permutation(others)[:count]])
    return result


def predictions_manifest(protocol: Protocol, predictor: Predictor, options: Options, split: str) -> dict[str, Any]:
    """What predictions depend on: benchmark, split, predictor, and for single images the partners."""
    manifest: dict[str, Any] = {
        "benchmark": protocol.benchmark,
        "split": split,
        "model or configuration": predictor.fingerprint(),
    }
    if protocol.kind == "images":
        manifest["choice of partners"] = [options.partners, options.seed]
        if options.masks != "pairs":
            manifest["masks"] = [options.masks, options.refine]
    if options.source_symmetry != "identity":
        manifest["symmetry of the sources"] = options.source_symmetry
    if not options.flip_annotation:
        manifest["flip annotation"] = "ignored"
    if options.max_side is not None:
        manifest["longer side of the images"] = options.max_side
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
        split: stored with the predictions.
        problems: whether to leave invalid records out; default: raise.
        predictions: folder of predictions, which is read if it is complete, else written.
        rank, world_size: this process and the number of processes; process k mod world_size treats batch number k.
        progress: called with the number of samples done.
        barrier: waits for all processes.

    Returns:
        Running sums. With several processes, merge them, then call [`finish`] once.

    Raises:
        DataError: for invalid data, unless it is left out.
        InputError: for predictions made with another model or configuration.
    """
    options = options or Options()
    predictor.max_side = options.max_side
    problems = problems if problems is not None else Problems()
    if protocol.composites:
        if predictions is not None:
            raise InputError(f"{protocol.benchmark} stores no predictions.")
        groups = class_groups(records)
        return ask_for_objects(
            groups, predictor, options, problems, rank=rank, world_size=world_size, progress=progress
        )
    variants = predictor.variants if predictor.gives_points else ()
    result = Evaluation(
        {variant: Tally() for variant in (variants or ("masks",))}, {variant: Tally() for variant in variants}
    )
    if not (predictor.gives_points and (protocol.direction or protocol.label_transfer)) and not (
        predictor.gives_masks and protocol.masks
    ):
        raise InputError(f"{predictor.name} answers nothing that {protocol.benchmark} asks.")
    run = _Run(protocol, predictor, options, problems, result)
    if predictions is not None and has_predictions(predictions):
        run.reader = PredictionReader(predictions, predictions_manifest(protocol, predictor, options, split))
    elif predictions is not None:
        try:
            if rank == 0:
                start_predictions(predictions)
        finally:  # whatever happened, the other processes must not wait here for ever
            if barrier is not None:
                barrier()
        run.writer = PredictionWriter(predictions, rank)
    parts = class_groups(records) if protocol.kind == "images" else batches(records, options.batch_size)
    treat = run.images if protocol.kind == "images" else run.pairs
    try:
        for number, part in enumerate(parts):
            if number % world_size != rank:
                continue
            treat(part)
            if progress is not None:
                progress(len(part))
        if run.writer is not None:
            run.writer.flush()
            result.index = run.writer.index
    except BaseException:
        if predictions is not None and run.writer is not None and world_size == 1:  # others may still be writing
            abandon_predictions(predictions)
        raise
    result.problems = list(problems.messages)
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


@dataclass
class _Run:
    """One process's part of an evaluation. Predictions are read from `reader`, or made and written to `writer`."""

    protocol: Protocol
    predictor: Predictor
    options: Options
    problems: Problems
    result: Evaluation
    reader: PredictionReader | None = None
    writer: PredictionWriter | None = None

    def pairs(self, records: list[Record]) -> None:
        """Predicts and scores a batch of pairs."""
        protocol, sides = self.protocol, ("source", "target")
        if self.reader is not None:
            # A sample that was left out when the predictions were written is left out again, for the same reason.
            reader = self.reader
            records = [record for record in records if record["id"] in reader.index or self._usable([record], sides)]
            predictions = [reader.get(record) for record in records]
        else:
            records = self._usable(records, sides)
            if not records:
                return
            predictions = self.predictor.predict_pairs(
                records,
                direction=protocol.direction,
                dense=protocol.flow or protocol.label_transfer,
                masks=protocol.masks,
                moved=self.options.source_symmetry,
                flips=self.options.flip_annotation,
            )
        self._score(records, predictions, "target", lambda record, prediction: record)

    def images(self, records: list[Record]) -> None:
        """Predicts and scores a group of single images of one class."""
        records = self._with_masks(self._usable(records, ("source",)))
        if not records:
            return
        if len(records) < 2:
            name, first = records[0]["class_name"], records[0]["id"]
            self.problems.report(
                DataError(f"{first}: co-segmentation needs two images of the class {name!r}; there is one.")
            )
            return
        options = self.options
        if self.reader is not None:
            predictions = [self.reader.get(record) for record in records]
        else:
            predictions = self.predictor.predict_images(
                records,
                choose_partners([record["id"] for record in records], options.partners, options.seed),
                batch_size=options.batch_size,
                dense=self.protocol.label_transfer,
                collection=options.refine if options.masks == "collection" else None,
            )
        by_id = {record["id"]: record for record in records}

        def partner(record: Record, prediction: Prediction) -> Record:
            found = by_id.get(str(prediction["partner"]))
            if found is None:
                raise InputError(
                    f"The prediction of {record['id']!r} was made with a partner that is not in its group."
                )
            return found

        self._score(records, predictions, "source", partner)

    def _moved(self, record: Record) -> str:
        return source_symmetry(record, self.options.source_symmetry, self.options.flip_annotation)

    def _usable(self, records: list[Record], sides: tuple[str, ...]) -> list[Record]:
        """The records whose images can be opened and encoded; the others are reported."""
        # Single images with predictions are opened without being encoded, to find the damaged ones.
        predictor = Predictor() if self.reader is not None and self.protocol.kind == "images" else self.predictor
        good = []
        for record in records:
            try:
                for side in sides:
                    if record.get(f"{side}_image") is None:
                        raise DataError(f"{record['id']}: there is no image of the {side}.")
                    predictor.image(record, side, self._moved(record) if side == "source" else "identity")
            except DataError as error:
                self.problems.report(error)
            else:
                good.append(record)
        return good

    def _with_masks(self, records: list[Record]) -> list[Record]:
        """The records with a mask of the image's own size; the others are reported, before one is paired with them."""
        good = []
        for record in records:
            try:
                true_mask(record, "source", image_size(record["source_image"], f"{record['id']}, source_image"))
            except DataError as error:
                self.problems.report(error)
            else:
                good.append(record)
        return good

    def _score(
        self,
        records: list[Record],
        predictions: list[Prediction],
        side: str,
        source_of: Callable[[Record, Prediction], Record],
    ) -> None:
        """Scores predictions and adds them to the sums.

        Args:
            side: of the image whose mask was predicted: `target`, or `source` of single images.
            source_of: the record that holds the image which a field leads to, as its source.
        """
        protocol, options = self.protocol, self.options
        masked = all_mask_scores(records, side, predictions, protocol, options)
        for record, prediction, masks in zip(records, predictions, masked, strict=True):
            if self.writer is not None:
                self.writer.add(record, prediction)
            source = source_of(record, prediction)
            try:
                if isinstance(masks, DataError):
                    raise masks
                source_mask = None
                if protocol.label_transfer:
                    source_mask = true_mask(source, "source", tuple(prediction["sizes"][0].tolist()))
                scored = {}
                for variant in self.result.variants:
                    scores: Scores = {"samples": (1, 1), **masks}
                    if protocol.direction and f"points/{variant}" in prediction:
                        scores |= keypoint_scores(record, prediction, protocol, options, variant)
                    if f"field/{variant}" in prediction:
                        scores |= dense_scores(record, prediction, protocol, options, variant, source_mask, side)
                    scored[variant] = scores
            except DataError as error:
                self.problems.report(error)
            else:
                self.result.add(record, scored)
