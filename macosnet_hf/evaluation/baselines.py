"""Predictors that need no training, with the interface of [`ModelPredictor`].

* `identity`: a point stays where it is, in normalised coordinates.
* `nearest-neighbour`: the cell of most similar encoder features, with a soft-argmax over its 3x3 neighbourhood.
* `nearest-neighbour-prior`: the same with a Gaussian prior around the identity position.
* `centre-grabcut`: the mask is an ellipse in the middle of the image, which `--refine grabcut` turns into an object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import InputError
from ..geometry import make_grid, sample_at
from . import BASELINES
from .predictors import MASK_SIDE, EncodedImage, FeaturePredictor, Predictor

if TYPE_CHECKING:
    from torch import Tensor

PRIOR_SIGMA = 0.3
"""Width of the prior around the identity position, normalised coordinates (the image is 2 wide)."""

TEMPERATURE = 10.0
"""Factor on the cosine similarity before any exponential."""


class IdentityPredictor(Predictor):
    """Leaves points at their normalised coordinates."""

    name = "identity"
    variants = ("identity",)
    gives_points = True

    def describe(self) -> dict[str, object]:
        return {"baseline": self.name}

    def map_points(self, start: EncodedImage, end: EncodedImage, points: Tensor) -> dict[str, Tensor]:
        return {"identity": points}


class NearestNeighbourPredictor(FeaturePredictor):
    """Most similar stride-16 feature of the other image, with a soft-argmax over the 3x3 cells around it.

    Args:
        model, processor: the encoder is the model's.
        prior: whether to add a Gaussian prior around the identity position to the similarity.
    """

    variants = ("nearest-neighbour",)
    gives_points = True

    def __init__(self, model: Any, processor: Any, *, prior: bool = False):
        super().__init__(model, processor)
        self.prior = prior
        self.name = "nearest-neighbour-prior" if prior else "nearest-neighbour"

    def describe(self) -> dict[str, object]:
        return {"baseline": self.name, **super().describe()}

    def map_points(self, start: EncodedImage, end: EncodedImage, points: Tensor) -> dict[str, Tensor]:
        descriptors = F.normalize(sample_at(start.features.normalized.float(), points), dim=-1)
        target = end.features.normalized.float()
        height, width = target.shape[-2:]
        score = TEMPERATURE * torch.bmm(descriptors, target.flatten(2))
        grid = make_grid(height, width, device=score.device, dtype=score.dtype).reshape(-1, 2)
        if self.prior:
            score = score - torch.cdist(points, grid[None]).square() / (2 * PRIOR_SIGMA**2)
        best = score.argmax(dim=-1, keepdim=True)
        cell = torch.arange(height * width, device=score.device)
        near = ((cell // width - best // width).abs() <= 1) & ((cell % width - best % width).abs() <= 1)
        weights = torch.softmax(score.masked_fill(~near, -torch.inf), dim=-1)
        return {"nearest-neighbour": weights @ grid}


class CentreGrabCutPredictor(Predictor):
    """Predicts the same ellipse in the middle of every image; the probability falls from the centre outwards."""

    name = "centre-grabcut"
    gives_masks = True

    def describe(self) -> dict[str, object]:
        return {"baseline": self.name}

    def predict_masks(self, images: list[EncodedImage], partners: list[EncodedImage]) -> np.ndarray:
        return np.repeat(centre_ellipse(MASK_SIDE, MASK_SIDE)[None], len(images), axis=0)


def centre_ellipse(height: int, width: int, radius: float = 0.7) -> np.ndarray:
    """Probability `(height, width)` of an ellipse in the middle of the image: 0.5 at `radius`, where the half sides
    of the image are 1, up to 0.7 inside, down to 0.2 outside, and 0 in the corners; float32.

    The bounds leave GrabCut free everywhere but in the corners, which are taken for background. On a part of msrc-coseg
    (6 images a class) free corners cost 0.016 in J.
    """
    y, x = ((2 * np.arange(count) + 1) / count - 1 for count in (height, width))
    distance = np.hypot(x[None], y[:, None]) / radius
    probability = 1 / (1 + np.exp(8 * (distance - 1)))
    return np.where(probability < 0.05, 0, probability.clip(0.2, 0.7)).astype(np.float32)


def make_baseline(name: str, model: Any = None, processor: Any = None) -> Predictor:
    """The baseline of that name; the two with nearest neighbours need a model, whose encoder they use.

    Raises:
        InputError: if there is no such baseline, or no model where one is needed.
    """
    if name == "identity":
        return IdentityPredictor()
    if name == "centre-grabcut":
        return CentreGrabCutPredictor()
    if name in ("nearest-neighbour", "nearest-neighbour-prior"):
        if model is None or processor is None:
            raise InputError(f"The baseline {name} needs a model for its encoder.")
        return NearestNeighbourPredictor(model, processor, prior=name.endswith("prior"))
    raise InputError(f"There is no baseline {name!r}; choose one of {', '.join(BASELINES)}.")
