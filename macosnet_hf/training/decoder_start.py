"""Second stage: the decoder gets a sensible start from masks that nobody drew (see `pseudo_masks.py`).

Encoder and predictor stay as they are; the decoder learns the pseudo-masks by cross-entropy, each image together
with a partner of its class.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import DataError, InputError
from ..geometry import sampling_grid, warp
from ..matching import correlate
from ..modeling_macosnet import MaCoSNetModel
from .images import TrainingImages
from .pseudo_masks import pseudo_masks
from .synthetic import paste_on_others, photometric, random_view


def class_pairs(images: TrainingImages, partners: int, seed: int) -> list[tuple[int, int]]:
    """Each image beside up to `partners` others of its class, chosen once by the seed.

    Raises:
        DataError: if a class has a single image.
        InputError: if `partners` is not positive.
    """
    generator = torch.Generator().manual_seed(seed)
    if partners < 1:
        raise InputError("--partners must be at least 1.")
    pairs: list[tuple[int, int]] = []
    for name, members in images.classes().items():
        if len(members) < 2:
            raise DataError(
                f"The class {name!r} has one image, and a pair takes two: add some, or pass --exclude_classes."
            )
        for index in members:
            others = [member for member in members if member != index]
            chosen = torch.randperm(len(others), generator=generator)[:partners].tolist()
            pairs += [(index, others[k]) for k in chosen]
    return pairs


class MaskedPairs(Dataset):
    """Pairs of images with their pseudo-masks."""

    def __init__(self, images: TrainingImages, masks: Tensor, pairs: list[tuple[int, int]]):
        self.images, self.masks, self.pairs = images, masks, pairs

    def fingerprint(self) -> str:
        """Of images and masks; the pairs follow from the images and the settings."""
        masks = hashlib.sha256(np.packbits(self.masks.numpy()).tobytes()).hexdigest()[:16]
        return f"{self.images.fingerprint()}, masks {masks}"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """uint8 images `(2, 3, S, S)` and masks `(2, S, S)`."""
        pair = list(self.pairs[number])
        return torch.stack([self.images[index] for index in pair]), self.masks[pair]


class DecoderObjective(nn.Module):
    """Cross-entropy of the decoder against pseudo-masks, under random crops, flips and photometric changes."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: MaCoSNetModel, mean: list[float], std: list[float], paste_share: float = 0.4):
        super().__init__()
        self.model, self.paste_share = model, paste_share
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        model.requires_grad_(False)
        model.decoder.requires_grad_(True)

    def train(self, mode: bool = True) -> DecoderObjective:
        """Encoder and predictor keep their statistics."""
        super().train(mode)
        for part in (self.model.encoder, self.model.affine_head, self.model.tps_head):
            part.eval()
        return self

    def forward(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """uint8 `(B, 2, 3, S, S)` images and bool `(B, 2, S, S)` masks to the loss."""
        size = self.model.config.image_size
        with torch.no_grad():
            images, masks = batch[0].flatten(0, 1).float() / 255, batch[1].flatten(0, 1).float()
            grid = sampling_grid(random_view(len(images), generator, images.device), size=(size, size))
            images = warp(images, grid, padding_mode="reflection")
            labels = warp(masks[:, None], grid, padding_mode="reflection")[:, 0].clamp(0, 1)
            images, labels = paste_on_others(images, labels, self.paste_share, generator)
            pixels = photometric(images, generator)
            labels = labels.clamp(0, 1)
            features = self.model.encoder(((pixels - self.mean) / self.std).to(memory_format=torch.channels_last))
            partner = features.normalized.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
            correlation = correlate(partner, features.normalized)
        logits = self.model.predict_masks(features, correlation).float()
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        return {"total": loss, "area": logits.detach().sigmoid().mean()}


def encode_all(model: MaCoSNetModel, images: TrainingImages, mean: list[float], std: list[float]) -> Tensor:
    """Stride-16 features of all images, `(N, C, h, w)` float32 on the CPU."""
    size = model.config.image_size
    centre, spread = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), 16):
            stop = min(start + 16, len(images))
            pixels = torch.stack([images[index] for index in range(start, stop)]).float() / 255
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=True)
            parts.append(model.get_image_features(((pixels - centre) / spread).to(model.device)).last.float().cpu())
    return torch.cat(parts).clone()


def make_masks(model: MaCoSNetModel, images: TrainingImages, mean: list[float], std: list[float]) -> Tensor:
    """Pseudo-masks `(N, S, S)` that need no trained model, from the encoder's features."""
    pixels = torch.stack([images[index] for index in range(len(images))])
    return pseudo_masks(pixels, encode_all(model, images, mean, std), images.class_names)


def kept_masks(
    accelerator: Accelerator, args: argparse.Namespace, images: TrainingImages, make: Callable[[], Tensor]
) -> Tensor:
    """What `make` gives, made once on the first process and kept in the output folder: it must not change between a
    run and its resumption."""
    path = Path(args.output_dir) / "pseudo_masks.npz"
    with accelerator.main_process_first():
        made_before = args.resume_from_checkpoint or not accelerator.is_main_process
        masks = load_masks(path, images.fingerprint()) if made_before else None
        if masks is None:
            masks = make()
            if accelerator.is_main_process:
                save_masks(path, masks, images.fingerprint())
    return masks


def save_masks(path: Path, masks: Tensor, fingerprint: str) -> None:
    """Packs bool masks `(N, S, S)` into a file that is there as a whole or not at all."""
    partial = path.with_name(f"partial-{path.name}")
    np.savez_compressed(partial, masks=np.packbits(masks.numpy()), shape=masks.shape, images=fingerprint)
    partial.rename(path)


def load_masks(path: Path, fingerprint: str) -> Tensor | None:
    """What [`save_masks`] wrote; `None` if there is nothing, or it is of other images."""
    if not path.is_file():
        return None
    with np.load(path) as saved:
        # Version 0.1 wrote the fingerprint of the images as `photographs`.
        if str(saved["images" if "images" in saved else "photographs"]) != fingerprint:
            return None
        shape = tuple(saved["shape"].tolist())
        return torch.from_numpy(np.unpackbits(saved["masks"], count=int(np.prod(shape))).reshape(shape).astype(bool))
