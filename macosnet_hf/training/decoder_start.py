"""Second stage: the decoder gets a sensible start from masks that nobody drew (see `pseudo_masks.py`).

Encoder and predictor stay as they are; the decoder learns the pseudo-masks by cross-entropy, each image together
with a partner of its class.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Transform, warp
from ..matching import correlate
from ..modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel
from .groups import check_classes
from .images import TrainingData, TrainingImages
from .objectives import Objective
from .synthetic import paste_on_others, photometric, random_view


def class_pairs(images: TrainingImages, partners: int, seed: int) -> list[tuple[int, int]]:
    """Each image beside up to `partners` others of its class, chosen once by the seed.

    Raises:
        DataError: if a class has a single image.
    """
    generator = torch.Generator().manual_seed(seed)
    check_classes(images.class_names, 2)
    pairs: list[tuple[int, int]] = []
    for members in images.classes().values():
        for index in members:
            others = [member for member in members if member != index]
            chosen = torch.randperm(len(others), generator=generator)[:partners].tolist()
            pairs += [(index, others[k]) for k in chosen]
    return pairs


def with_fresh_decoder(model: MaCoSNetForKeypointMatching, inputs: str, rounds: int = 1) -> MaCoSNetForKeypointMatching:
    """The same model with an untrained decoder of another kind, see `decoder_inputs` of the configuration."""
    config = copy.deepcopy(model.config)
    config.decoder_inputs, config.decoder_rounds = inputs, rounds
    fresh = MaCoSNetForKeypointMatching(config)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("macosnet.decoder.")}
    fresh.load_state_dict({**fresh.state_dict(), **state})
    return fresh.eval()


class MaskedPairs(TrainingData):
    """Pairs of images with their pseudo-masks."""

    def __init__(self, images: TrainingImages, masks: Tensor, pairs: list[tuple[int, int]]):
        self.images, self.masks, self.pairs = images, masks, pairs

    def fingerprint(self) -> str:
        """Of images and masks; the pairs follow from the images and the settings."""
        masks = hashlib.sha256(np.packbits(self.masks.cpu().numpy()).tobytes()).hexdigest()[:16]
        return f"{self.images.fingerprint()}, masks {masks}"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """uint8 images `(2, 3, S, S)` and masks `(2, S, S)`."""
        pair = list(self.pairs[number])
        return self.images.batch(pair), self.masks[pair]


class DecoderObjective(Objective):
    """Cross-entropy of the decoder against pseudo-masks, under random crops, flips and photometric changes."""

    def __init__(self, model: MaCoSNetModel, mean: Sequence[float], std: Sequence[float], paste_share: float = 0.4):
        super().__init__(model, mean, std, ("decoder",))
        self.paste_share = paste_share

    def forward(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """uint8 `(B, 2, 3, S, S)` images and bool `(B, 2, S, S)` masks to the loss."""
        size = self.model.config.image_size
        with torch.no_grad():
            images, masks = batch[0].flatten(0, 1).float() / 255, batch[1].flatten(0, 1).float()
            grid = Transform(random_view(len(images), generator, images.device)).grid((size, size))
            images = warp(images, grid, padding_mode="reflection")
            labels = warp(masks[:, None], grid, padding_mode="reflection")[:, 0].clamp(0, 1)
            images, labels = paste_on_others(images, labels, self.paste_share, generator)
            pixels = photometric(images, generator)
            labels = labels.clamp(0, 1)
            features = self.model.encoder(self.normalize(pixels).to(memory_format=torch.channels_last))
            partner = features.normalized.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
            correlation = correlate(partner, features.normalized)
        logits = self.model.predict_masks(features, correlation).float()
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        return {"total": loss, "area": logits.detach().sigmoid().mean()}
