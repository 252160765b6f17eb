"""The five losses of MaCoSNet and their weighted sum (Chen, Lin, Yang, Huang, "Show, Match and Segment").

Equation numbers are the paper's. Every loss reads the output of [`MaCoSNetModel`] for pairs (V = 2 views) or triplets
(V = 3), P = V (V - 1) ordered pairs in the order of `ordered_pairs`; index p is the ordered pair (i, j) and p ^ 1 is
its reverse:

* `affine[:, p]`, `tps[:, p]`: T_ij, maps points of view j into view i (see `geometry.py`). The losses take them as
  `model.transforms(outputs)`, which knows the spline's regularisation;
* `correlation[:, p]`: S_ij, one channel per position of view i, spatial layout of view j;
* `mask_logits[:, p]`: mask of view i given partner j.

The paper writes its losses for one unordered pair {A, B}, as a sum over both directions. A batch is averaged over its
samples (`reduction="none"`: one value per sample, `(B,)`), and a triplet over its three unordered pairs, so that pairs
and triplets keep the same weights. Everything is computed in float32, whatever the precision of the outputs. All losses
raise [`InputError`] if a field of the outputs is missing, shapes do not fit or an option is unknown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, InputError
from ..geometry import Transform, inside, make_grid, on_device, warp
from ..modeling_macosnet import MaCoSNetKeypointMatchingOutput, MaCoSNetModelOutput, ordered_pairs
from .encoder_weights import imagenet_state_dict

Outputs: TypeAlias = MaCoSNetModelOutput | MaCoSNetKeypointMatchingOutput
Size: TypeAlias = int | tuple[int, int]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

REDUCTIONS = ("mean", "none")
UNITS = ("pixel", "normalized")
STAGES = ("affine", "cascade")
CONTRASTIVE_FORMS = ("features", "pixels")

# Keeps a quotient finite where a mask or a feature vanishes; far below any value that carries information.
_EPSILON = 1e-6
# How far a point may go, in halves of the image, before the next transform takes it on: a spline carries a far point
# on to more than the square of its distance, and a few of these in a row leave float32.
_FARTHEST = 1e3


# ---------------------------------------------------------------------------------------------------------------------
# Reading the outputs
# ---------------------------------------------------------------------------------------------------------------------


def _field(outputs: Outputs, name: str) -> Tensor:
    """A field of the outputs in at least float32."""
    tensor = getattr(outputs, name, None)
    if tensor is None:
        hint = " (the model ran with output_masks=False)" if name == "mask_logits" else ""
        raise InputError(f"This loss needs `{name}`, which the outputs do not hold{hint}.")
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _check_pairs(count: int) -> None:
    """Refuses what is neither a pair (2 ordered pairs) nor a triplet (6)."""
    if count not in (2, 6):
        raise InputError(f"Outputs of pairs (2 ordered pairs) or triplets (6) are expected; these hold {count}.")


def _reverse(values: Tensor) -> Tensor:
    """`(B, P, ...)` with every ordered pair in the place of its reverse: index p holds what index p ^ 1 held."""
    return values.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def _source_view(values: Tensor, views: int) -> Tensor:
    """`(B, V, ...)` of views to `(B, P, ...)` of ordered pairs (i, j): the entry of view i."""
    return values[:, on_device([i for i, _ in ordered_pairs(views)], values.device)]


def _over_directions(values: Tensor) -> Tensor:
    """`(B, P)` of ordered pairs to `(B,)`: sum of both directions, mean over the unordered pairs."""
    return 2 * values.mean(dim=1)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def _reduce(values: Tensor, reduction: str) -> Tensor:
    """`(B,)` to a scalar (`"mean"`) or as it is (`"none"`)."""
    _check_choice("reduction", reduction, REDUCTIONS)
    return values.mean() if reduction == "mean" else values


def _mask_on_grid(masks: Tensor, size: Sequence[int]) -> Tensor:
    """`(B, P, H, W)` to the feature grid `(B, P, h, w)` by area averaging, so that every pixel counts."""
    return F.interpolate(masks, size=tuple(size), mode="area")


# ---------------------------------------------------------------------------------------------------------------------
# Foreground-guided matching, equations 2 to 4
# ---------------------------------------------------------------------------------------------------------------------


def inlier_mask(transform: Transform, grid_size: Size = 15, radius: float = 1.0) -> Tensor:
    """Correspondence mask m (eq. 2), differentiable in the transform.

    m(p, q) says whether position q of the target, sent into the source by T, lands within `radius` cells of position p.
    As in Rocco et al., "End-to-end weakly-supervised semantic alignment", the mask of the identity transform (for each
    p the indicator |x - p| <= radius over the source's positions x) is sampled bilinearly at T(q), so that the step of
    eq. 2 becomes a ramp one cell wide and lets a gradient through.

    Args:
        transform: `(N)`, T, target to source.
        grid_size: side, or (height, width), of both feature grids in cells.
        radius: the threshold phi, in cells, Euclidean. 1 (the paper) counts a cell and its four neighbours; anything
            from 1.42 to 1.99 adds the four diagonal ones.

    Returns:
        `(N, h*w, h, w)` in [0, 1]: channels are the positions p of the source (row by row), spatial layout the
        positions q of the target. A q that is sent outside the source has no inliers.
    """
    height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    grid = transform.grid((height, width))
    rows, columns = torch.meshgrid(
        torch.arange(height, device=grid.device), torch.arange(width, device=grid.device), indexing="ij"
    )
    cells = torch.stack((rows, columns), dim=-1).reshape(-1, 2)
    distance2 = (cells[:, None] - cells[None]).square().sum(-1)
    # A whisker above the radius, so that a radius of sqrt(2) holds the diagonal neighbours whatever the rounding.
    identity = (distance2 <= radius**2 + 1e-4).to(grid.dtype).unflatten(-1, (height, width))
    return warp(identity.expand(len(grid), -1, -1, -1), grid)


def matching_loss(
    outputs: Outputs,
    transforms: Transform,
    *,
    mask_guided: bool = True,
    detach_masks: bool = False,
    stages: Sequence[str] = STAGES,
    radius: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Foreground-guided matching loss (eq. 3 and 4): minus the soft-inlier count, weighted by the masks.

    The score of a position q of view j is s(q) = sum over p of m(p, q) S_ij(p, q) (eq. 3), and the loss is minus the
    sum of s(q) M(q) over both views of a pair (eq. 4), where M is the mask of view j given its partner i, area-averaged
    to the feature grid. In the paper's words for A: T_BA carries A's points to B, S_BA holds A's positions in its
    spatial layout, and s_A is weighted by M_A. The sum over positions is plain, as in the paper: at most about 2 h w
    times the largest score, that is several hundred for 240 pixels.

    Args:
        outputs: of the model; `correlation` and (if guided) `mask_logits` are read.
        transforms: `(B, P)`, those of the outputs.
        mask_guided: `False` weights every position equally (the paper's ablation, separate streams).
        detach_masks: `True` keeps this loss from training the decoder. In the paper D is among its arguments.
        stages: which transforms are counted: `"affine"` (the affine alone), `"cascade"` (affine and TPS). With both,
            the mean of the two counts, so that the scale stays that of eq. 4.
        radius: phi of eq. 2, in feature cells.
    """
    pairs = transforms.shape[1]
    _check_pairs(pairs)
    if not stages or not set(stages) <= set(STAGES):
        raise InputError(f"stages must name at least one of {', '.join(STAGES)}; got {stages!r}.")
    correlation = _field(outputs, "correlation").flatten(0, 1)
    cascade = transforms.flatten(0, 1)
    height, width = correlation.shape[-2:]
    scores = correlation.new_zeros(len(correlation), height, width)
    for stage in stages:
        transform = cascade if stage == "cascade" else cascade.without_spline()
        inliers = inlier_mask(transform, (height, width), radius)
        scores = scores + torch.einsum("npyx,npyx->nyx", inliers, correlation.to(inliers.dtype)) / len(stages)
    scores = scores.unflatten(0, (-1, pairs))
    if mask_guided:
        masks = _field(outputs, "mask_logits").sigmoid()
        masks = _reverse(_mask_on_grid(masks.detach() if detach_masks else masks, (height, width)))
        scores = scores * masks
    return _reduce(-_over_directions(scores.sum(dim=(-2, -1))), reduction)


# ---------------------------------------------------------------------------------------------------------------------
# Cycle consistency, equations 5 and 6
# ---------------------------------------------------------------------------------------------------------------------


def _round_trip_error(
    transforms: Transform, paths: Sequence[Sequence[int]], grid_size: int, unit: str, image_size: Size, squared: bool
) -> Tensor:
    """How far points end from where they began: `(B, L)` means over a regular grid, for L paths of ordered pairs."""
    _check_choice("unit", unit, UNITS)
    batch = len(transforms.affine)
    start = make_grid(grid_size, grid_size, device=transforms.device, dtype=transforms.dtype).reshape(1, -1, 2)
    points = start.expand(batch * len(paths), -1, -1)
    for step in zip(*paths, strict=True):
        points = (
            transforms[:, on_device(step, transforms.device)].flatten(0, 1).apply(points.clamp(-_FARTHEST, _FARTHEST))
        )
    difference = points - start
    if unit == "pixel":
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        difference = difference * on_device([(width - 1) / 2, (height - 1) / 2], difference.device, difference.dtype)
    # vector_norm has a zero subgradient at zero, so a perfect round trip trains nothing instead of giving NaN.
    error = difference.square().sum(-1) if squared else torch.linalg.vector_norm(difference, dim=-1)
    return error.mean(dim=-1).unflatten(0, (batch, len(paths)))


def cycle_loss(
    transforms: Transform,
    *,
    grid_size: int = 10,
    unit: str = "pixel",
    image_size: Size = 240,
    squared: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Forward-backward consistency loss (eq. 5): how far a point comes back from where it left, there and back again.

    The mean of |T_BA(T_AB(p)) - p| over a regular grid that spans the image, summed over both directions. A point of
    view j goes to view i by T_ij and returns by T_ji, through the whole cascade.

    Args:
        transforms: `(B, P)`, those of the model's outputs.
        grid_size: points a side.
        unit: `"pixel"` (the paper: pixels of the network's input, a normalised distance times (image_size - 1) / 2) or
            `"normalized"` (the image is 2 wide).
        image_size: side, or (height, width), of the network's input; used with `"pixel"`.
        squared: `False` is the paper's plain norm; `True` squares it, as the authors' published code does.
    """
    pairs = transforms.shape[1]
    _check_pairs(pairs)
    paths = [(p, p ^ 1) for p in range(pairs)]
    error = _round_trip_error(transforms, paths, grid_size, unit, image_size, squared)
    return _reduce(_over_directions(error), reduction)


def transitivity_loss(
    transforms: Transform,
    *,
    grid_size: int = 10,
    unit: str = "pixel",
    image_size: Size = 240,
    squared: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Transitivity consistency loss (eq. 6): how far a point comes back from where it left, by way of both other views.

    A point of view a goes to view b by T_ba, from there to view c by T_cb and home by T_ac (a transform T_ij maps
    points of j into i, so this is the paper's chain A to B to C to A read in that direction). The three starting views
    and the two ways round give six cyclic orders; each is used once, and the loss is their mean, on the scale of eq. 6.

    Args: as [`cycle_loss`], with transforms of triplets.

    Raises:
        InputError: if the transforms are of pairs, or an option is unknown.
    """
    _check_pairs(transforms.shape[1])
    if transforms.shape[1] != 6:
        raise InputError("The transitivity loss needs three images at a time; these outputs are of pairs.")
    index = {pair: p for p, pair in enumerate(ordered_pairs(3))}
    paths = [(index[b, a], index[c, b], index[a, c]) for a, b, c in itertools.permutations(range(3))]
    error = _round_trip_error(transforms, paths, grid_size, unit, image_size, squared)
    return _reduce(error.mean(dim=1), reduction)


# ---------------------------------------------------------------------------------------------------------------------
# Perceptual contrastive loss, equations 7 to 10
# ---------------------------------------------------------------------------------------------------------------------


def masked_images(pixel_values: Tensor, mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Object and background images (eq. 7): `M * I` and `(1 - M) * I`.

    `pixel_values` are processor-normalised, so what is masked out takes the mean colour of the processor's statistics
    rather than black: the value that says least to F.

    Args:
        pixel_values: `(B, V, 3, H, W)`.
        mask_logits: `(B, P, H, W)`.

    Returns:
        Two tensors `(B, P, 3, H, W)`, entry p about view i of the ordered pair (i, j).
    """
    views = pixel_values.shape[1] if pixel_values.dim() == 5 else 0
    expected = (len(pixel_values), views * (views - 1), *pixel_values.shape[-2:])
    if pixel_values.dim() != 5 or tuple(mask_logits.shape) != expected:
        raise InputError(
            f"pixel_values {tuple(pixel_values.shape)} and mask_logits {tuple(mask_logits.shape)} do not fit together."
        )
    images = _source_view(pixel_values, views).to(mask_logits.dtype)
    logits = mask_logits.unsqueeze(2)
    return images * logits.sigmoid(), images * (-logits).sigmoid()


def pooled_features(
    features: Tensor, mask_logits: Tensor, statistics: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Foreground and background vectors of the unmasked images: the stable stand-in for F of masked images.

    Foreground `sum(M phi) / sum(M)` and background `sum((1 - M) phi) / sum(1 - M)`, each scaled to unit length, so that
    two independent vectors are a squared distance of 2 apart and the paper's margin of 2 keeps its meaning. phi is the
    feature map, standardised per channel; it is detached: as F in the paper, it judges the masks and is not trained by
    them.

    Args:
        features: `(B, V, C, h, w)`.
        mask_logits: `(B, P, H, W)`; masks are area-averaged to the feature grid.
        statistics: mean and standard deviation `(C,)` per channel, such as those of a data set; by default those of
            this batch. (With statistics of one image alone, foreground and background would be opposite whatever the
            mask.)

    Returns:
        Two tensors `(B, P, C)`, entry p about view i of the ordered pair (i, j).
    """
    views = features.shape[1] if features.dim() == 5 else 0
    if features.dim() != 5 or tuple(mask_logits.shape[:2]) != (len(features), views * (views - 1)):
        raise InputError(
            f"features {tuple(features.shape)} and mask_logits {tuple(mask_logits.shape)} do not fit together."
        )
    features = features.detach().to(mask_logits.dtype)
    if statistics is None:
        mean = features.mean(dim=(0, 1, 3, 4))
        std = features.std(dim=(0, 1, 3, 4), correction=0)
    else:
        mean, std = (value.detach().to(features) for value in statistics)
    features = (features - mean[:, None, None]) / std[:, None, None].clamp(min=_EPSILON)
    features = _source_view(features, views)

    def pool(masks: Tensor) -> Tensor:
        weights = _mask_on_grid(masks, features.shape[-2:])
        total = weights.sum(dim=(-2, -1)).unsqueeze(-1)
        pooled = torch.einsum("bpyx,bpcyx->bpc", weights, features) / (total + _EPSILON)
        return F.normalize(pooled, dim=-1, eps=_EPSILON)

    return pool(mask_logits.sigmoid()), pool((-mask_logits).sigmoid())


def contrastive_loss(
    outputs: Outputs,
    pixel_values: Tensor | None = None,
    perceptual: Callable[[Tensor], Tensor] | None = None,
    *,
    form: str = "features",
    margin: float = 2.0,
    features: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Perceptual contrastive loss (eq. 8): similar objects in both images, dissimilar backgrounds within each.

        d+ = |F(o_A) - F(o_B)|^2 / c                                                   (eq. 9)
        d- = max(0, m - (|F(o_A) - F(b_A)|^2 + |F(o_B) - F(b_B)|^2) / 2c)              (eq. 10)

    Args:
        outputs: of the model; `mask_logits` and (form `"features"`) `features` are read.
        pixel_values: `(B, V, 3, H, W)`, the model's input; form `"pixels"` needs it.
        perceptual: F, a frozen network in eval mode from `(N, 3, H, W)` to `(N, c)`, such as [`PerceptualNetwork`];
            form `"pixels"` needs it. It is called once, with all object and background images of the step.
        form: `"pixels"` is the paper: F sees masked images, and c is the number of its features. `"features"`
            compares pooled stride-16 features of the unmasked images, unit vectors, c = 1: the pixel form collapses
            to empty masks when alone, this one holds (see [`pooled_features`]).
        margin: m.
        features: `(B, V, C, h, w)`, replaces the outputs' own features in form `"features"`.
        statistics: per-channel mean and standard deviation, see [`pooled_features`].
    """
    mask_logits = _field(outputs, "mask_logits")
    _check_pairs(mask_logits.shape[1])
    _check_choice("form", form, CONTRASTIVE_FORMS)
    if form == "pixels":
        if pixel_values is None or perceptual is None:
            raise InputError("The contrastive loss of masked pixels needs pixel_values and a perceptual network.")
        images = torch.stack(masked_images(pixel_values, mask_logits))
        vectors = perceptual(images.flatten(0, 2)).flatten(1).to(mask_logits.dtype)
        objects, backgrounds = vectors.unflatten(0, images.shape[:3])
        scale = vectors.shape[-1]
    else:
        features = _field(outputs, "features") if features is None else features
        objects, backgrounds = pooled_features(features, mask_logits, statistics)
        scale = 1
    between = (objects[:, 0::2] - objects[:, 1::2]).square().sum(-1) / scale
    within = (objects - backgrounds).square().sum(-1) / scale
    within = (within[:, 0::2] + within[:, 1::2]) / 2
    return _reduce((between + F.relu(margin - within)).mean(dim=1), reduction)


# ---------------------------------------------------------------------------------------------------------------------
# Cross-network consistency, equations 11 and 12
# ---------------------------------------------------------------------------------------------------------------------


def consistency_loss(outputs: Outputs, transforms: Transform, *, reduction: str = "mean") -> Tensor:
    """Cross-network consistency loss (eq. 11 and 12): one image's mask, warped to the other, is the other's mask.

    For T_ij, the mask of view i is warped into the layout of view j by the whole cascade and stands as the (soft) label
    of a binary cross-entropy; the mask of view j is the prediction (eq. 12), summed over both directions (eq. 11). The
    gradient flows through both sides: through the label it reaches the transform and the other mask. The prediction
    enters by its logits, so that a saturated mask gives a large but finite loss.

    Pixels that the transform sends outside view i say nothing about its mask and are left out; the mean is over the
    others (eq. 12 divides by all pixels: the same where nothing falls outside, and elsewhere it would reward a
    transform for sending the image away). A pair without any such pixel counts 0.

    Args:
        outputs: of the model; `mask_logits` is read.
        transforms: `(B, P)`, those of the outputs.
    """
    _check_pairs(transforms.shape[1])
    logits = _field(outputs, "mask_logits")
    grid = transforms.flatten(0, 1).grid(logits.shape[-2:])
    warped = warp(logits.sigmoid().flatten(0, 1).unsqueeze(1), grid).squeeze(1)
    valid = inside(grid).to(logits.dtype)
    # Rounding of the bilinear weights may leave [0, 1] by an ulp.
    entropy = F.binary_cross_entropy_with_logits(
        _reverse(logits).flatten(0, 1), warped.clamp(0, 1), weight=valid, reduction="none"
    )
    entropy = entropy.sum(dim=(-2, -1)) / valid.sum(dim=(-2, -1)).clamp(min=1)
    return _reduce(_over_directions(entropy.unflatten(0, logits.shape[:2])), reduction)


# ---------------------------------------------------------------------------------------------------------------------
# Objective, equation 1
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaCoSNetLossWeights:
    """Weights (lambdas) and options of the objective, eq. 1. A term of weight zero is not computed.

    Args:
        matching: weight of the matching loss, 1 in the paper.
        cycle: lambda_cycle.
        trans: lambda_trans; needs triplets.
        contrast: lambda_contrast.
        task: lambda_task, of the cross-network consistency loss.
        margin: m of eq. 10.
        contrastive_form: `"features"` or `"pixels"` (the paper), see [`contrastive_loss`].
        unit: `"pixel"` (the paper) or `"normalized"`, see [`cycle_loss`].
        squared: squares the norms of eq. 5 and 6, as the authors' published code does.
        inlier_radius: phi of eq. 2, in feature cells.

    Raises:
        InputError: for a negative or non-finite number or an unknown option.
    """

    matching: float = 1.0
    cycle: float = 0.0
    trans: float = 0.0
    contrast: float = 0.0
    task: float = 0.0
    margin: float = 2.0
    contrastive_form: str = "features"
    unit: str = "pixel"
    squared: bool = False
    inlier_radius: float = 1.0

    def __post_init__(self) -> None:
        for name in ("matching", "cycle", "trans", "contrast", "task", "margin", "inlier_radius"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise InputError(f"{name} must be a finite number, zero or more; got {value}.")
        _check_choice("contrastive_form", self.contrastive_form, CONTRASTIVE_FORMS)
        _check_choice("unit", self.unit, UNITS)

    @classmethod
    def from_benchmark(cls, name: str, **options: Any) -> MaCoSNetLossWeights:
        """The paper's weights for a benchmark: `tss`, `internet`, `pf-pascal` (also for `pf-willow`) or `spair-71k`.

        Args:
            name: the benchmark, in either case.
            options: fields to set differently, e.g. `trans=0` for training on pairs.

        Raises:
            InputError: if there is no such benchmark.
        """
        weights = BENCHMARK_WEIGHTS.get(name.lower())
        if weights is None:
            known = ", ".join(sorted(BENCHMARK_WEIGHTS))
            raise InputError(f"There are no loss weights for {name!r}; choose one of {known}.")
        return cls(**{**dict(zip(("cycle", "trans", "contrast", "task"), weights, strict=True)), **options})


# Section 3.4: lambda_cycle, lambda_trans, lambda_contrast, lambda_task.
BENCHMARK_WEIGHTS = {
    "tss": (5.0, 5.0, 10.0, 10.0),
    "internet": (5.0, 5.0, 20.0, 10.0),
    "pf-pascal": (20.0, 10.0, 2.5, 2.5),
    "pf-willow": (20.0, 10.0, 2.5, 2.5),
    "spair-71k": (20.0, 20.0, 1.0, 1.0),
}


class PerceptualNetwork(nn.Module):
    """F: a frozen ImageNet network, pooled features. For training only; it is no part of the model or its checkpoint.

    Weights are random until [`load_imagenet_weights`](PerceptualNetwork.load_imagenet_weights) is called. The network
    stays in eval mode and its parameters take no gradient, but a gradient passes through it to its input.

    Args:
        architecture: any timm classifier; the paper uses ResNet-50 (2048 features).
        image_mean, image_std: statistics that the images were normalised with (the processor's). They are normalised
            anew with those that the network was trained with.

    Attributes:
        num_features: c of eq. 9 and 10, 2048 for ResNet-50.

    Raises:
        InputError: if timm does not know the architecture.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        architecture: str = "resnet50",
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
    ):
        super().__init__()
        import timm

        if not timm.is_model(architecture):
            raise InputError(f"timm has no architecture {architecture!r}.")
        self.architecture = architecture
        network: Any = timm.create_model(architecture, pretrained=False, num_classes=0)
        self.network = network
        self.num_features = int(network.num_features)
        classifier = network.default_cfg["classifier"]
        self._classifier_prefixes = tuple(
            f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier)
        )
        own = (network.default_cfg["mean"], network.default_cfg["std"])
        mean, std, own_mean, own_std = (torch.tensor(v).view(1, 3, 1, 1) for v in (image_mean, image_std, *own))
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> PerceptualNetwork:
        """Stays in eval mode whatever is asked: the batch statistics of masked images must not move F."""
        return super().train(False)

    def load_imagenet_weights(self, state_dict: Mapping[str, Tensor] | None = None) -> PerceptualNetwork:
        """Loads ImageNet weights and returns the network.

        Args:
            state_dict: in timm's names (for ResNet these are torchvision's); a classifier's entries are ignored. By
                default they come from an installed package or from the Hub (`resnet50.tv_in1k`).

        Raises:
            CheckpointError: if the weights cannot be had or do not fit; the network is then as before.
        """
        if state_dict is None:
            state_dict = imagenet_state_dict(self.architecture)
        own = self.network.state_dict()
        given = {name: value for name, value in state_dict.items() if not name.startswith(self._classifier_prefixes)}
        faults = [name for name in own if name not in given or given[name].shape != own[name].shape]
        faults += [name for name in given if name not in own]
        if faults:
            raise CheckpointError(
                f"These weights do not fit {self.architecture}: {len(faults)} entries are missing, unknown or of "
                f"another shape; the first is {faults[0]}."
            )
        self.network.load_state_dict(given)
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`(N, 3, H, W)` processor-normalised images to `(N, c)` pooled features."""
        pixel_values = pixel_values.to(self.scale.dtype) * self.scale + self.shift
        return self.network(pixel_values)


class MaCoSNetObjective(nn.Module):
    """The training objective (eq. 1): the matching loss plus the weighted cycle, transitivity, contrast and task terms.

    It stands apart from the model, so that the perceptual network never gets into a checkpoint.

    Args:
        weights: see [`MaCoSNetLossWeights`].
        perceptual: F, needed for the contrastive form `"pixels"`. It is frozen and stays in eval mode.
        coupled: `False` trains the two streams apart (the paper's ablation): matching is not guided by the masks, and
            there is no consistency term.
        detach_masks: keeps the matching loss from training the decoder.

    ```python
    >>> objective = MaCoSNetObjective(MaCoSNetLossWeights.from_benchmark("pf-pascal"))
    >>> outputs = model(pixel_values)  # triplets (B, 3, 3, H, W)
    >>> losses = objective(outputs, model.transforms(outputs), pixel_values)
    >>> losses["total"].backward()
    ```
    """

    def __init__(
        self,
        weights: MaCoSNetLossWeights,
        perceptual: nn.Module | None = None,
        *,
        coupled: bool = True,
        detach_masks: bool = False,
    ):
        super().__init__()
        if weights.contrast > 0 and weights.contrastive_form == "pixels" and perceptual is None:
            raise InputError("The contrastive loss of masked pixels needs a perceptual network.")
        self.weights, self.perceptual = weights, perceptual
        self.coupled, self.detach_masks = coupled, detach_masks
        if perceptual is not None:
            perceptual.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MaCoSNetObjective:
        """As in `nn.Module`, but the perceptual network stays in eval mode."""
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()
        return self

    def forward(
        self,
        outputs: Outputs,
        transforms: Transform,
        pixel_values: Tensor | None = None,
        feature_statistics: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """All terms of the objective.

        Args:
            outputs: of the model for pairs or triplets.
            transforms: `(B, P)`, those of the outputs (`model.transforms(outputs)`).
            pixel_values: `(B, V, 3, H, W)`, the model's input. Gives the unit of the cycle terms, and the images of
                the contrastive form `"pixels"`. Without it the size is that of the masks.
            feature_statistics: per-channel statistics for the contrastive form `"features"`, see [`pooled_features`].

        Returns:
            Scalars: `total`, and unweighted those of `matching`, `cycle`, `transitivity`, `contrast`, `consistency`
            whose weight is not zero.

        Raises:
            InputError: if the outputs lack what a term needs; in particular `trans` needs triplets.
        """
        weights = self.weights
        round_trip: dict[str, Any] = {"unit": weights.unit, "squared": weights.squared}
        if weights.cycle or weights.trans:
            round_trip["image_size"] = self._image_size(outputs, pixel_values)
        terms: dict[str, tuple[float, Callable[[], Tensor]]] = {
            "matching": (
                weights.matching,
                lambda: matching_loss(
                    outputs,
                    transforms,
                    mask_guided=self.coupled,
                    detach_masks=self.detach_masks,
                    radius=weights.inlier_radius,
                ),
            ),
            "cycle": (weights.cycle, lambda: cycle_loss(transforms, **round_trip)),
            "transitivity": (weights.trans, lambda: transitivity_loss(transforms, **round_trip)),
            "contrast": (
                weights.contrast,
                lambda: contrastive_loss(
                    outputs,
                    pixel_values,
                    self.perceptual,
                    form=weights.contrastive_form,
                    margin=weights.margin,
                    statistics=feature_statistics,
                ),
            ),
            "consistency": (weights.task if self.coupled else 0, lambda: consistency_loss(outputs, transforms)),
        }
        losses = {name: loss() for name, (weight, loss) in terms.items() if weight}
        if not losses:
            raise InputError("Every term of the objective has weight zero.")
        return {"total": torch.stack([terms[name][0] * loss for name, loss in losses.items()]).sum(), **losses}

    def _image_size(self, outputs: Outputs, pixel_values: Tensor | None) -> tuple[int, int]:
        """(height, width) of the network's input, from the images or from the masks."""
        if pixel_values is not None:
            height, width = pixel_values.shape[-2:]
        elif self.weights.unit == "pixel":
            height, width = _field(outputs, "mask_logits").shape[-2:]
        else:
            height, width = 1, 1  # normalised coordinates do not depend on it
        return int(height), int(width)
