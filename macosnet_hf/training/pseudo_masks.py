"""First masks without a single label: what differs from the image's border, near its middle, made sharp by colours.

Four steps, each on what the one before it gave:

1. *Border contrast*: one minus a cell's similarity to the most similar cells of the image's border, times a centre
prior. 2. *GrabCut* turns it into a hard mask that follows colour edges.
3. *Discriminants*: ridge regressions from stride-16 features to those masks, one over all images and one a
   class. A single mask is often wrong, but what the masks of a class have in common is mostly the object, and a
   linear map of the features cannot learn the rest. This is where the class label (the only supervision there is)
   comes in.
4. *GrabCut* again, on the discriminants' mean.

A model that was trained on such masks makes better ones itself: [`teacher_masks`].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..collection import Collection
from ..errors import DataError
from ..geometry import on_device, resize_masks
from ..image_processing_macosnet import MaCoSNetImageProcessor
from ..io.checkpoints import load_model_and_processor
from ..modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel
from ..refinement import otsu_threshold, refine_mask
from .features import encode_all
from .groups import check_classes
from .images import TrainingImages, by_class

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .settings import DecoderSettings, JointSettings

_LEAST_OVERLAP = 0.5  # of the masks of several teachers, intersection over union, for an image to teach anything
_AREAS = (0.02, 0.9)  # share of the image that an object of several teachers has


def centre_weight(side: int, sigma: float) -> Tensor:
    """`(side, side)` Gaussian around the middle, 1 at the middle; sigma in normalised coordinates."""
    axis = torch.linspace(-1, 1, side)
    return torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * sigma**2))


def border_contrast(features: Tensor, neighbours: int = 6) -> Tensor:
    """How little each cell resembles the border of its own image: `(N, C, h, w)` to `(N, h, w)` in [0, 1]."""
    height, width = features.shape[-2:]
    unit = F.normalize(features, dim=1)
    border = [
        row * width + column
        for row in range(height)
        for column in range(width)
        if row in (0, height - 1) or column in (0, width - 1)
    ]
    similarity = torch.einsum("nchw,nck->nhwk", unit, unit.flatten(2)[:, :, on_device(border, unit.device)])
    return stretch(1 - similarity.float().topk(neighbours, dim=-1).values.mean(-1))


def explain_masks(features: Tensor | Sequence[Tensor], masks: Tensor, *, ridge: float = 0.01) -> Tensor:
    """Masks as far as a linear function of the features can explain them.

    A ridge regression from the features of all cells of all images to the masks' values there, then stretched so that
    the 5th percentile of each image is 0 and the 95th is 1. Images are taken one by one, which bounds the memory.

    Args:
        features: N maps `(C, h, w)`.
        masks: `(N, h, w)` in [0, 1].
        ridge: weight of the penalty, a cell.

    Returns:
        `(N, h, w)` in [0, 1].
    """
    count = masks.numel()
    maps = [feature.flatten(1).t() for feature in features]  # (h*w, C) each
    mean = torch.stack([cells.double().sum(0) for cells in maps]).sum(0) / count
    squares = torch.stack([(cells.double() - mean).square().sum(0) for cells in maps]).sum(0)
    mean, spread = mean.float(), (squares / (count - 1)).sqrt().float() + 1e-5

    def standard(cells: Tensor) -> Tensor:
        return torch.cat(((cells.float() - mean) / spread, torch.ones_like(cells[:, :1], dtype=torch.float32)), dim=1)

    channels = len(mean) + 1
    system = ridge * count * torch.eye(channels, device=mean.device)
    target = torch.zeros(channels, device=mean.device)
    for cells, mask in zip(maps, masks, strict=True):
        rows = standard(cells)
        system += rows.t() @ rows
        target += rows.t() @ mask.float().flatten()
    weights = torch.linalg.solve(system, target)
    return stretch(torch.stack([standard(cells) @ weights for cells in maps]).view(masks.shape))


def stretch(maps: Tensor) -> Tensor:
    """Each map of `(N, h, w)` from its 5th to its 95th percentile to [0, 1]."""
    flat = maps.flatten(1)
    low, high = (torch.quantile(flat, q, dim=1).view(-1, 1, 1) for q in (0.05, 0.95))
    return ((maps - low) / (high - low + 1e-6)).clamp(0, 1)


def discriminants(features: Tensor, masks: Tensor, class_ids: Tensor, ridge: float = 0.01) -> Tensor:
    """Masks as far as features can explain them: `(N, C, h, w)` and `(N, h, w)` to `(N, h, w)` in [0, 1].

    The mean of two ridge regressions, one over all images and one over those of the same class.
    """
    overall = explain_masks(features, masks, ridge=ridge)
    within = torch.empty_like(overall)
    for class_id in class_ids.unique():
        rows = torch.nonzero(class_ids == class_id).squeeze(1)
        within[rows] = explain_masks(features[rows], masks[rows], ridge=ridge)
    return (overall + within) / 2


def sharpen(
    images: Tensor,
    maps: Tensor,
    *,
    working_size: int,
    workers: int = 2,
    quiet: bool = False,
) -> Tensor:
    """GrabCut from coarse maps: uint8 `(N, 3, S, S)` and `(N, h, w)` to bool `(N, S, S)`.

    Each map is split by Otsu's method.
    """
    size = tuple(images.shape[-2:])

    def one(index: int) -> np.ndarray:
        # The maps are those of the network's cells, whose corner centres are those of its input.
        soft = F.interpolate(maps[index][None, None], size=size, mode="bilinear", align_corners=True)[0, 0].numpy()
        soft = soft.clip(0, 1)
        split = otsu_threshold(soft) or 0.5
        centred = np.where(soft < split, soft / split / 2, 0.5 + (soft - split) / (1 - split + 1e-6) / 2)
        image = images[index].permute(1, 2, 0).contiguous().numpy()
        return refine_mask(image, centred.clip(0, 1), "grabcut", working_size=working_size)

    with ThreadPoolExecutor(workers) as pool:
        masks = tqdm(pool.map(one, range(len(images))), total=len(images), desc="GrabCut", disable=quiet)
        return torch.from_numpy(np.stack(list(masks)))


def pseudo_masks(images: Tensor, features: Tensor, class_names: Sequence[str], *, quiet: bool = False) -> Tensor:
    """Masks of images from their features and class names alone.

    Args:
        images: uint8 `(N, 3, S, S)`.
        features: stride-16 features `(N, C, h, w)`.
        class_names: N names.

    Returns:
        bool `(N, S, S)`.
    """
    features = features.float()
    names = sorted(set(class_names))
    class_ids = torch.tensor([names.index(name) for name in class_names])
    side = features.shape[-1]
    contrast = border_contrast(features) * centre_weight(side, 0.6)
    first = sharpen(images, contrast, working_size=128, quiet=quiet)  # only its mean over 16 pixels is looked at
    coarse = F.interpolate(first[:, None].float(), size=features.shape[-2:], mode="area")[:, 0]
    learnt = discriminants(features, coarse, class_ids) * centre_weight(side, 0.8)
    return sharpen(images, learnt, working_size=192, quiet=quiet)


def teacher_masks(
    teachers: Sequence[tuple[MaCoSNetForKeypointMatching, MaCoSNetImageProcessor]],
    images: Callable[[list[int]], Tensor],
    class_names: Sequence[str],
    *,
    quiet: bool = False,
) -> Tensor:
    """Masks of images by models that can segment already: each class is a collection, refined by GrabCut, see
    [`~macosnet_hf.collection.Collection.segment`].

    Of several teachers it is the mean. The mask of an image on which they disagree, or whose object is nearly nothing
    or nearly everything, is empty: it teaches more errors than it is worth.

    Args:
        teachers: models in evaluation mode with their image processors.
        images: uint8 `(n, 3, S, S)` of the images with these n numbers.
        class_names: N names.

    Returns:
        bool `(N, S, S)`.

    Raises:
        DataError: if a class has a single image.
    """
    check_classes(class_names, 2)
    masks: dict[int, Tensor] = {}
    with tqdm(total=len(class_names), desc="teacher's masks", disable=quiet) as progress:
        for members in by_class(class_names).values():
            squares = images(members).cpu()
            pixels = [Image.fromarray(square.permute(1, 2, 0).numpy()) for square in squares]
            answers = []
            for model, processor in teachers:
                collection = Collection(model, processor)
                collection.add(pixels)
                found = torch.from_numpy(collection.segment(refine="grabcut").probabilities)
                answers.append(resize_masks(found, squares.shape[-2:]))
            masks |= zip(members, _agreed(torch.stack(answers)), strict=True)
            progress.update(len(members))
    return torch.stack([masks[index] for index in range(len(class_names))])


def _agreed(answers: Tensor) -> Tensor:
    """Soft masks `(T, n, S, S)` of T teachers to bool `(n, S, S)`."""
    mean = answers.mean(0) >= 0.5
    if len(answers) == 1:
        return mean
    hard = answers >= 0.5
    overlap = hard.all(0).sum(dim=(1, 2)) / hard.any(0).sum(dim=(1, 2)).clamp(min=1)
    area = mean.float().mean(dim=(1, 2))
    useful = (overlap >= _LEAST_OVERLAP) & (area >= _AREAS[0]) & (area <= _AREAS[1])
    return mean & useful[:, None, None]


def make_masks(model: MaCoSNetModel, processor: MaCoSNetImageProcessor, images: TrainingImages) -> Tensor:
    """[`pseudo_masks`] `(N, S, S)` of all images, from the encoder's features."""
    pixels = images.batch(range(len(images))).cpu()
    return pseudo_masks(pixels, encode_all(model, processor, images), images.class_names)


def masks_of_run(
    accelerator: Accelerator,
    settings: DecoderSettings | JointSettings,
    images: TrainingImages,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
) -> Tensor:
    """Pseudo-masks `(N, S, S)` of a run: from the file of `pseudo_masks`, of `mask_teacher`, or made without a trained
    model.

    Those that are made are made once, on the first process, and stored in the output folder: they must not change
    between a run and its continuation.

    Raises:
        DataError: if the file was made of other images.
    """
    fingerprint = images.fingerprint()
    if settings.pseudo_masks is not None:
        masks = load_masks(Path(settings.pseudo_masks), fingerprint)
        if masks is None:
            raise DataError(f"{settings.pseudo_masks} was made of other images; leave --pseudo_masks out to make some.")
        return masks
    path = Path(settings.output_dir) / "pseudo_masks.npz"
    with accelerator.main_process_first():
        made_before = settings.resume_from_checkpoint or not accelerator.is_main_process
        masks = load_masks(path, fingerprint) if made_before else None
        if masks is None:
            if not settings.teachers:
                masks = make_masks(model.macosnet, processor, images)
            else:
                teachers = [load_model_and_processor(name, accelerator.device) for name in settings.teachers]
                masks = teacher_masks(teachers, images.batch, images.class_names)
            if accelerator.is_main_process:
                save_masks(path, masks, fingerprint)
    return masks


def save_masks(path: Path, masks: Tensor, fingerprint: str) -> None:
    """Packs bool masks `(N, S, S)` into a file that is there as a whole or not at all."""
    partial = path.with_name(f"partial-{path.name}")
    np.savez_compressed(partial, masks=np.packbits(masks.numpy()), shape=masks.shape, images=fingerprint)
    partial.rename(path)


def load_masks(path: Path, fingerprint: str) -> Tensor | None:
    """What [`save_masks`] wrote; `None` if there is nothing, or it is of other images.

    Raises:
        DataError: if the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path) as saved:
            # Version 0.1 wrote the fingerprint of the images as `photographs`.
            if str(saved["images" if "images" in saved else "photographs"]) != fingerprint:
                return None
            shape = tuple(saved["shape"].tolist())
            bits = np.unpackbits(saved["masks"], count=int(np.prod(shape)))
            return torch.from_numpy(bits.reshape(shape).astype(bool))
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{path} is damaged; remove it, or leave --pseudo_masks out to make some.") from error
