"""Validation during training: PCK, P and J as `macosnet evaluate` measures them, a criterion that needs no labels, and
sample images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..datasets.images import image_size, open_image
from ..datasets.masks import read_mask
from ..datasets.prepare import open_records
from ..datasets.schema import Record
from ..drawing import overlay_mask
from ..errors import DataError, InputError
from ..evaluation.predictors import EncodedImage, ModelPredictor
from ..evaluation.protocols import PROTOCOLS, Options
from ..evaluation.runner import evaluate
from ..geometry import Transform, inside, sample_at, warp
from ..image_processing_macosnet import MaCoSNetImageProcessor
from ..modeling_macosnet import MaCoSNetModelOutput, ordered_pairs
from .checkpoints import writing
from .joint import JointObjective, pearson, watch
from .losses import cycle_loss, pooled_features
from .pseudo_masks import centre_weight
from .reports import Validation

# Forward-backward error, in normalised coordinates, at which the consistency falls to 1/e.
CONSISTENCY_SCALE = 0.2


def match_rank(outputs: MaCoSNetModelOutput, transforms: Transform) -> Tensor:
    """How well the transforms pair similar features: `(B, P)` in [0, 1], about 0.5 by chance.

    For each position of view j, the share of view i's positions that are less similar to it than the place where T_ij
    maps it; 0 where that lies outside. Positions in the middle of the image count more. Unlike the soft-inlier count,
    this does not depend on the scale of the features and does not favour the identity.
    """
    batch, views = outputs.features.shape[:2]
    pairs = ordered_pairs(views)
    features = outputs.features.float()
    source = features[:, [i for i, _ in pairs]].flatten(0, 1)
    target = features[:, [j for _, j in pairs]].flatten(0, 1)
    size = source.shape[-2:]
    places = transforms.flatten(0, 1).grid(size).flatten(1, 2)
    descriptors = F.normalize(target.flatten(2), dim=1)  # (N, C, q)
    everywhere = F.normalize(source.flatten(2), dim=1)
    there = F.normalize(sample_at(source, places), dim=-1)  # (N, q, C)
    similarity = torch.einsum("nqc,ncq->nq", there, descriptors)
    rank = (torch.bmm(everywhere.transpose(1, 2), descriptors) < similarity.unsqueeze(1)).float().mean(dim=1)
    rank = rank * inside(places)
    weight = centre_weight(size[-1], 0.6).to(rank.device).flatten()
    return ((rank * weight).sum(-1) / weight.sum()).unflatten(0, (batch, len(pairs)))


def mask_agreement(outputs: MaCoSNetModelOutput, transforms: Transform) -> Tensor:
    """Correlation of each mask with that of its partner, warped onto it: `(B, P)` in [-1, 1], 0 for constant masks."""
    masks = _mask_logits(outputs).sigmoid()
    grid = transforms.flatten(0, 1).grid(masks.shape[-2:])
    warped = warp(masks.flatten(0, 1).unsqueeze(1), grid).squeeze(1)
    own = masks.unflatten(1, (-1, 2)).flip(2).flatten(1, 2).flatten(0, 1)
    return pearson(own, warped).unflatten(0, masks.shape[:2])


def _mask_logits(outputs: MaCoSNetModelOutput) -> Tensor:
    """`(B, P, H, W)` float32, which these outputs must hold."""
    if outputs.mask_logits is None:
        raise InputError("The outputs hold no masks.")
    return outputs.mask_logits.float()


def mask_separation(outputs: MaCoSNetModelOutput, statistics: tuple[Tensor, Tensor] | None) -> Tensor:
    """Similarity of an object to its partner's object, minus that to its own background: `(B, P / 2)` in [-1, 1]."""
    objects, backgrounds = pooled_features(outputs.features.float(), _mask_logits(outputs), statistics)
    between = (objects[:, 0::2] * objects[:, 1::2]).sum(-1)
    within = (objects * backgrounds).sum(-1)
    return (between - (within[:, 0::2] + within[:, 1::2]) / 2) / 2


def label_free_validation(batches: Sequence[dict[str, Tensor]]) -> Validation:
    """Figures that need no label, on fixed groups, and a criterion to choose a step by.

    `criterion` is the geometric mean of four figures in [0, 1], higher is better (of the first two where no loss uses
    masks):

    * `match_rank`, see [`match_rank`];
    * `consistency`: exp(-e / 0.2), e the mean forward-backward error in normalised coordinates;
    * [`mask_agreement`] and [`mask_separation`]; constant masks score 0, which counts as 0.01.

    The criterion ranks the steps of a run and shows a collapse. It does not say how good a model is: compare it only
    between models with the same encoder, on the same images.

    Args:
        batches: of [`fixed_groups`](groups.py).
    """

    @torch.no_grad()
    def validate(objective: Any, step: int) -> dict[str, float]:
        sums: dict[str, float] = {}
        count = 0
        for batch in batches:
            moved = {name: value.to(objective.mean.device) for name, value in batch.items()}
            pixels, _ = objective.prepare_images(moved)
            outputs = objective.run_model(pixels, with_masks=objective.uses_masks)
            transforms = objective.model.transforms(outputs)
            error = cycle_loss(transforms, unit="normalized", reduction="none") / 2
            figures = {
                "match_rank": match_rank(outputs, transforms).mean(),
                "consistency": torch.exp(-error / CONSISTENCY_SCALE).mean(),
                "cycle_error": error.mean(),
            }
            if outputs.mask_logits is not None:
                figures["mask_agreement"] = mask_agreement(outputs, transforms).mean()
                figures["mask_separation"] = mask_separation(outputs, objective.feature_statistics()).mean()
            figures |= watch(outputs, transforms)
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(pixels)
            count += len(pixels)
        means = {f"held_out_{name}": value / count for name, value in sums.items()}
        judged = [
            means[f"held_out_{name}"]
            for name in ("match_rank", "consistency", "mask_agreement", "mask_separation")
            if name in sums
        ]
        means["criterion"] = math.prod(min(1.0, max(0.01, value)) for value in judged) ** (1 / len(judged))
        return means

    return validate


def _readable(option: str, path: str, records: Iterable[Record], sides: Sequence[str]) -> list[Record]:
    """The records, with every image and mask decoded once, so that a damaged file ends a run before its first step.

    Raises:
        DataError: naming the option, if a record, an image or a mask cannot be used.
    """
    checked: set[str] = set()
    try:
        found = list(records)
        for record in found:
            for side in sides:
                if record[f"{side}_id"] not in checked:
                    open_image(record[f"{side}_image"], record["id"])
                    checked.add(record[f"{side}_id"])
    except DataError as error:
        raise DataError(f"{option} {path} cannot be used: {error}") from error
    return found


def keypoint_validation(
    csv_path: str, processor: MaCoSNetImageProcessor, figures: Sequence[str] = ("affine", "cascade")
) -> Validation:
    """PCK `image` at 0.05, 0.1 and 0.15, as `macosnet evaluate pairs` measures it, as `pck_<figure>@<alpha>`.

    Args:
        csv_path: list of pairs with keypoints in PF-WILLOW's columns.
        processor: of the model.
        figures: ways to transfer a point: `affine`, `cascade` (affine and TPS), `transform` (the same, fitted where
            the configuration has `mutual_fit`), `local` (local matching around `transform`).

    Raises:
        DataError: if the list, one of its numbers or one of its images cannot be used.
    """
    protocol = PROTOCOLS["pairs"]
    try:
        listed, _ = open_records("pairs", None, pairs=csv_path)
    except DataError as error:
        raise DataError(f"--validation_pairs {csv_path} cannot be used: {error}") from error
    records = _readable("--validation_pairs", csv_path, listed, ("source", "target"))

    def validate(objective: Any, step: int) -> dict[str, float]:
        predictor = ModelPredictor(objective.model, processor, masks=False, orientations="none")
        smooth = "fitted" if "fitted" in predictor.variants else "transform"
        variants = {name: {"cascade": "transform", "transform": smooth}.get(name, name) for name in figures}
        predictor.variants = tuple(dict.fromkeys(variants.values()))
        result = evaluate(records, protocol, predictor)
        return {
            f"pck_{name}@{alpha}": result.variants[variant].overall()[f"pck.image.{alpha:g}"]
            for name, variant in variants.items()
            for alpha in protocol.alphas
        }

    return validate


class _AreaPredictor(ModelPredictor):
    """The model, and the share of each image that its masks cover, which shows a collapse to nothing or everything."""

    def __init__(self, model: Any, processor: MaCoSNetImageProcessor):
        super().__init__(model, processor)
        self.gives_points = False
        self.areas: list[float] = []

    def predict_masks(self, images: list[EncodedImage], partners: list[EncodedImage]) -> np.ndarray:
        masks = super().predict_masks(images, partners)
        self.areas += (masks >= 0.5).mean(axis=(1, 2)).tolist()
        return masks


def mask_validation(folder: str, processor: MaCoSNetImageProcessor, per_class: int) -> Validation:
    """`jaccard` and `precision` of soft masks, as `macosnet evaluate coseg --refine none` measures them, and `area`.

    Args:
        folder: `images/<class>/*` with `masks/<class>/*.png`.
        processor: of the model.
        per_class: the first images of each class; at least two of each are needed.

    Raises:
        DataError: if the folder or one of its files cannot be used.
    """
    try:
        listed, _ = open_records("coseg", folder)
        classes: dict[str, list[Record]] = {}
        for record in listed:
            classes.setdefault(record["class_name"], []).append(record)
        records = [record for members in classes.values() for record in members[:per_class]]
        for name, members in classes.items():
            if len(members[:per_class]) < 2:
                raise DataError(f"two images of the class {name!r} are needed.")
        for record in records:
            if record["source_mask"] is None:
                raise DataError("there is no folder masks.")
            size = image_size(record["source_image"], record["id"])
            read_mask(record["source_mask"], record["id"], size)
    except DataError as error:
        raise DataError(f"--validation_masks {folder} cannot be used: {error}") from error
    records = _readable("--validation_masks", folder, records, ("source",))

    def validate(objective: Any, step: int) -> dict[str, float]:
        predictor = _AreaPredictor(objective.model, processor)
        result = evaluate(records, PROTOCOLS["coseg"], predictor, Options(refine="none"))
        figures = result.variants["masks"].overall()
        return {
            "jaccard": figures["jaccard"],
            "precision": figures["precision"],
            "area": float(np.mean(predictor.areas)),
        }

    return validate


def labelled_validation(validations: Sequence[tuple[Validation, str]]) -> Validation:
    """Several validations with labels; `criterion` is the mean of one figure of each.

    Args:
        validations: with the name of the figure of each that counts.
    """

    def validate(objective: nn.Module, step: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        chosen = []
        for validation, name in validations:
            found = validation(objective, step)
            chosen.append(found[name])
            figures |= found
        return {**figures, "criterion": sum(chosen) / len(chosen)}

    return validate


class SampleImages:
    """Draws a contact sheet of a few groups into `OUTPUT_DIR/samples/step-<number>.png`.

    A row is a group: each image with its mask (given its first partner), then the first image warped onto the
    second.

    Args:
        output_dir: of the run.
        batches: of [`fixed_groups`](groups.py).
    """

    def __init__(self, output_dir: str, batches: Sequence[dict[str, Tensor]]):
        self.folder = Path(output_dir) / "samples"
        self.batches = batches

    @torch.no_grad()
    def __call__(self, objective: Any, step: int) -> np.ndarray:
        """The sheet, `(H, W, 3)` uint8.

        Raises:
            OutputError: if it cannot be written.
        """
        rows = []
        for batch in self.batches:
            moved = {name: value.to(objective.mean.device) for name, value in batch.items()}
            pixels, _ = objective.prepare_images(moved)
            outputs = objective.run_model(pixels)
            rows += sheet_rows(objective, pixels, outputs)
        sheet = np.concatenate(rows)
        partial = self.folder / "partial.png"
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            Image.fromarray(sheet).save(partial)
            partial.replace(self.folder / f"step-{step:06d}.png")
        return sheet


def sheet_rows(objective: JointObjective, pixels: Tensor, outputs: MaCoSNetModelOutput) -> list[np.ndarray]:
    """A row `(H, (V + 1) W, 3)` uint8 of each group, see [`SampleImages`]."""
    pairs = ordered_pairs(pixels.shape[1])
    images = (pixels * objective.std + objective.mean).clamp(0, 1)
    warped = warp(images[:, 0], objective.model.transforms(outputs)[:, 0].grid(pixels.shape[-2:]))
    first_pair = [next(p for p, (i, _) in enumerate(pairs) if i == view) for view in range(pixels.shape[1])]
    masks = (_mask_logits(outputs)[:, first_pair] > 0).cpu().numpy()

    def as_image(image: Tensor) -> np.ndarray:
        return (image.float().permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()

    rows = []
    for group in range(len(pixels)):
        cells = [
            np.asarray(overlay_mask(as_image(image), mask))
            for image, mask in zip(images[group], masks[group], strict=True)
        ]
        rows.append(np.concatenate([*cells, as_image(warped[group])], axis=1))
    return rows
