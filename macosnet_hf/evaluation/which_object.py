"""The protocol `which-object`: does a mask show what its partners show, or whatever stands out?

Composites with objects of two or three classes are asked for each of them by images of its class. Whole images are
asked with partners of their class, with partners of other classes, and with themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..collection import hard_mask, segment_collection
from ..datasets.benchmarks import Problems
from ..datasets.composites import Composites, Sample, in_a_row, pasted, scattered, side_by_side
from ..datasets.images import image_size, open_image
from ..datasets.masks import ObjectMask
from ..datasets.schema import Record
from ..errors import DataError
from ..geometry import resize_masks
from ..inference import COLLECTION_SIDE
from ..io.checkpoints import load_model_and_processor
from ..io.package import DEFAULT_CHECKPOINT
from . import metrics
from .predictors import Predictor
from .protocols import Options
from .scoring import Evaluation, Scores, Tally, true_mask

SIDE = 480
"""Side of a composite in pixels, however large its images are; whole images are scored at this size too."""

COMPANY_PER_CLASS = 8
"""So many images of each class are asked with other company."""

_SMALLEST = 0.007  # share of a composite that each of its objects must cover
_TRIES = 50

_Make = Callable[[Sequence[Sample], Tensor, torch.Generator], Composites]

# By the row of the table: the number of objects, of classes that are needed (a background shows one more), and how they
# are composed.
_KINDS: dict[str, tuple[int, int, _Make]] = {
    "two side by side": (2, 2, lambda objects, background, generator: side_by_side(objects[0], objects[1], generator)),
    "two, pasted": (2, 3, lambda objects, background, generator: pasted(objects[0], objects[1], background, generator)),
    "three side by side": (3, 3, lambda objects, background, generator: in_a_row(objects, generator)),
    "three, pasted": (3, 4, scattered),
}


@dataclass
class _Member:
    """An image of a class; `mask` is `(S, S)` float32, 1 on the object, where its record has none."""

    record: Record
    mask: np.ndarray | None = None

    def image(self) -> Image.Image:
        """The image, at most as large as in a collection."""
        image = open_image(self.record["source_image"], f"{self.record['id']}, source_image").copy()
        image.thumbnail((COLLECTION_SIDE, COLLECTION_SIDE))
        return image

    def truth(self) -> ObjectMask:
        """The mask at `(SIDE, SIDE)`."""
        if self.mask is not None:
            return ObjectMask(hard_mask(self.mask, (SIDE, SIDE)))
        where = f"{self.record['id']}, source_image"
        found = true_mask(self.record, "source", image_size(self.record["source_image"], where))
        counted = None if found.counted is None else _square(found.counted)
        return ObjectMask(_square(found.object), counted)

    def sample(self) -> Sample:
        """`(1, 3, SIDE, SIDE)` pixels in [0, 1] and the mask `(1, SIDE, SIDE)`."""
        pixels = np.array(self.image().resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1)[None], torch.from_numpy(self.truth().object)[None].float()


def _square(mask: np.ndarray) -> np.ndarray:
    image = Image.fromarray(mask).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return np.array(image, dtype=bool)


def ask_for_objects(
    groups: Iterable[list[Record]],
    predictor: Predictor,
    options: Options,
    problems: Problems,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """One process's share of the questions: `composites` by kind, and `company` by class.

    Args:
        groups: single images grouped by class; of each class the first group is used.
        predictor: the model.
        options: `composites`, `partners`, `seed`, `masks` and `refine` count.
        problems, rank, world_size, progress: as in [`~.runner.evaluate`].

    Raises:
        DataError: for invalid data, unless it is left out, and for fewer than two classes of two or more images.
        InputError: if the predictor looks at no partner.
    """
    result = Evaluation({"composites": Tally(), "company": Tally()}, {})
    classes = _read(groups, predictor, problems, result)
    kinds = [kind for kind, (_, needed, _) in _KINDS.items() if needed <= len(classes)]
    if not kinds:
        raise DataError("which-object needs two or more classes of two or more images each.")
    refine = options.refine if options.masks == "collection" else None
    for number in range(rank, options.composites, world_size):
        kind = kinds[number % len(kinds)]
        scores = _ask_composite(
            classes, kind, np.random.default_rng((options.seed, number)), predictor, options, refine
        )
        result.variants["composites"].add(kind, {"samples": (1, 1), **scores})
        if progress is not None:
            progress(1)
    for number, name in enumerate(sorted(classes)):
        draw = np.random.default_rng((options.seed, options.composites + number))
        for place, member in enumerate(draw.permutation(len(classes[name]))[:COMPANY_PER_CLASS]):
            company = _draw_company(classes, name, int(member), draw, options.partners)
            if place % world_size == rank:
                scores = _ask_with_company(classes[name][member], company, predictor, refine)
                result.variants["company"].add(name, {"samples": (1, 1), **scores})
                if progress is not None:
                    progress(1)
    result.problems = list(problems.messages)
    return result


def _read(
    groups: Iterable[list[Record]], predictor: Predictor, problems: Problems, result: Evaluation
) -> dict[str, list[_Member]]:
    """The usable images of each class that has two or more."""
    classes: dict[str, list[_Member]] = {}
    unmasked = []
    for group in groups:
        name = group[0]["class_name"]
        if name in classes:
            continue
        members = []
        without = all(record.get("source_mask") is None for record in group)
        for record in group:
            try:
                member = _Member(record)
                if without:
                    member.image()
                else:
                    member.truth()
            except DataError as error:
                problems.report(error)
            else:
                members.append(member)
        if len(members) < 2:
            problems.report(
                DataError(f"{group[0]['id']}: the class {name!r} has one image; its partner would be missing.")
            )
            continue
        classes[name] = members
        if without:
            unmasked.append(name)
    if unmasked:
        _add_pseudo_masks([classes[name] for name in unmasked], predictor.device)
        result.notes.append(
            f"{len(unmasked)} of {len(classes)} classes have no masks: theirs are pseudo-masks, made by the checkpoint "
            f"{DEFAULT_CHECKPOINT}, each class as one collection, so that J says how far two models agree."
        )
    return classes


def _add_pseudo_masks(classes: Sequence[list[_Member]], device: Any) -> None:
    """Masks by the embedded checkpoint, whichever model is measured: figures of two models can be compared."""
    model, processor = load_model_and_processor(DEFAULT_CHECKPOINT, device)
    for members in classes:
        images = [member.image() for member in members]
        found = segment_collection(images, model=model, processor=processor, refine="grabcut").probabilities
        for member, mask in zip(members, found, strict=True):
            member.mask = (mask >= 0.5).astype(np.float32)


def _draw_members(draw: np.random.Generator, count: int, wanted: int, without: int) -> list[int]:
    others = np.delete(np.arange(count), without)
    return [int(other) for other in draw.permutation(others)[:wanted]]


def _ask_composite(
    classes: dict[str, list[_Member]],
    kind: str,
    draw: np.random.Generator,
    predictor: Predictor,
    options: Options,
    refine: str | None,
) -> Scores:
    """Scores of one composite, the mean over its questions."""
    objects, needed, make = _KINDS[kind]
    for _ in range(_TRIES):
        names = [str(name) for name in draw.choice(sorted(classes), needed, replace=False)]
        shown = [int(draw.integers(len(classes[name]))) for name in names]
        samples = [classes[name][index].sample() for name, index in zip(names, shown, strict=True)]
        generator = torch.Generator().manual_seed(int(draw.integers(2**62)))
        made = make(samples[:objects], samples[-1][0], generator)
        masks = made.masks[0].numpy() >= 0.5
        if masks.mean(axis=(1, 2)).min() >= _SMALLEST:
            break
    else:
        raise DataError(f"No composite of the kind {kind!r} shows all its objects: the masks are empty or tiny.")
    image = Image.fromarray((made.images[0].permute(1, 2, 0).clamp(0, 1).numpy() * 255).round().astype(np.uint8))
    companies = [
        [classes[name][other] for other in _draw_members(draw, len(classes[name]), options.partners, index)]
        for name, index in zip(names[:objects], shown[:objects], strict=True)
    ]
    answers = _answers(predictor, image, companies, refine)
    found: dict[str, list[float | None]] = {name: [] for name in ("right", "jaccard.asked", "jaccard.others")}
    for asked, soft in enumerate(answers):
        others = np.delete(masks, asked, axis=0)
        found["right"].append(float(soft[masks[asked]].mean() > max(soft[other].mean() for other in others)))
        found["jaccard.asked"].append(metrics.jaccard(soft >= 0.5, masks[asked]))
        found["jaccard.others"].append(metrics.jaccard(soft >= 0.5, masks.any(axis=0) & ~masks[asked]))
    found["answers_iou"] = [metrics.jaccard(one >= 0.5, other >= 0.5) for one, other in combinations(answers, 2)]
    scores: Scores = {}
    for name, values in found.items():
        known = [value for value in values if value is not None]  # the overlap of two empty masks is undefined
        scores[name] = (float(np.mean(known)), 1) if known else (0.0, 0)
    return scores


def _draw_company(
    classes: dict[str, list[_Member]], name: str, index: int, draw: np.random.Generator, count: int
) -> dict[str, list[_Member]]:
    """Partners of one's own class, of other classes (each of another one where there are enough), and oneself."""
    members, others = classes[name], sorted(set(classes) - {name})
    strangers = draw.choice(others, count, replace=len(others) < count)
    return {
        "same": [members[other] for other in _draw_members(draw, len(members), count, index)],
        "strangers": [classes[str(other)][int(draw.integers(len(classes[str(other)])))] for other in strangers],
        "itself": [members[index]],
    }


def _ask_with_company(
    member: _Member, company: dict[str, list[_Member]], predictor: Predictor, refine: str | None
) -> Scores:
    truth = member.truth()
    answers = _answers(predictor, member.image(), list(company.values()), refine)
    found = [metrics.jaccard(soft >= 0.5, truth.object, truth.counted) for soft in answers]
    return {
        f"jaccard.{name}": (0.0, 0) if value is None else (value, 1) for name, value in zip(company, found, strict=True)
    }


def _answers(
    predictor: Predictor, image: Image.Image, companies: Sequence[list[_Member]], refine: str | None
) -> list[np.ndarray]:
    """Soft masks `(SIDE, SIDE)` of an image, one for each company of partners."""
    shown = [[member.image() for member in company] for company in companies]
    masks = torch.from_numpy(np.stack(predictor.answer(image, shown, refine)))
    return list(resize_masks(masks, (SIDE, SIDE)).numpy())
