"""Random warps and photometric changes: the strong supervision of the first stage, made on the fly from single
images.

Everything is batched tensor code that runs on the device of its input, and all randomness comes from the generator
that is passed in, so that a run can be resumed at any step with the same images. Numbers are drawn on the generator's
device: one of the CPU gives a CPU and a GPU the same warps, one of the GPU is many times faster there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Transform, compose_affine, identity_tps, on_device, warp


@dataclass
class WarpRange:
    """How far random warps go. Angles in radians, lengths in normalised coordinates (the image is 2 wide).

    It is also a group of options of the first stage (`settings.py`), whose help is in the metadata.
    """

    _argument_group_name = "random warps"

    rotation: float = field(default=0.30, metadata={"help": "largest angle, in radians"})
    log_scale: float = field(default=0.45, metadata={"help": "largest logarithm of the scale"})
    log_aspect: float = field(default=0.20, metadata={"help": "largest logarithm of the aspect"})
    shear: float = field(default=0.25, metadata={"help": "largest shear"})
    translation: float = field(default=0.35, metadata={"help": "largest shift; the image is 2 wide"})
    tps_jitter: float = field(default=0.20, metadata={"help": "largest shift of a control point of the spline"})


def _uniform(generator: torch.Generator, *shape: int, device: torch.device) -> Tensor:
    """Uniform numbers in [-1, 1)."""
    return on_device(torch.rand(*shape, generator=generator, device=generator.device) * 2 - 1, device)


def random_affine(batch: int, limits: WarpRange, generator: torch.Generator, device: torch.device) -> Tensor:
    """`(B, 6)` random affine parameters: rotation, scale, aspect, shear and translation."""
    draw = _uniform(generator, batch, 6, device=device)
    angle, shear = draw[:, 0] * limits.rotation, draw[:, 1] * limits.shear
    scale, aspect = (draw[:, 2] * limits.log_scale).exp(), (draw[:, 3] * limits.log_aspect).exp()
    scale_x, scale_y = scale * aspect, scale / aspect
    cos, sin = angle.cos(), angle.sin()
    # rotation @ shear @ scale
    rows = (
        cos * scale_x,
        (cos * shear - sin) * scale_y,
        draw[:, 4] * limits.translation,
        sin * scale_x,
        (sin * shear + cos) * scale_y,
        draw[:, 5] * limits.translation,
    )
    return torch.stack(rows, dim=1)


def random_tps(batch: int, limits: WarpRange, generator: torch.Generator, device: torch.device) -> Tensor:
    """`(B, 18)` interpolating thin-plate splines whose control points are moved by up to `tps_jitter`."""
    identity = identity_tps(batch, device=device)
    strength = (_uniform(generator, batch, 1, device=device) + 1) / 2
    return identity + strength * _uniform(generator, batch, identity.shape[1], device=device) * limits.tps_jitter


def random_view(batch: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """`(B, 6)` random crops of up to a quarter, half of them mirrored: which part of the image is image A."""
    draw = _uniform(generator, batch, 4, device=device)
    scale = 0.9 + 0.15 * draw[:, 0]
    flip = torch.where(draw[:, 1] < 0, -1.0, 1.0)
    zero = torch.zeros_like(scale)
    return torch.stack((scale * flip, zero, 0.1 * draw[:, 2], zero, scale, 0.1 * draw[:, 3]), dim=1)


def photometric(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random brightness, contrast, saturation, cast, gamma, greyscale, blur and noise for `(B, 3, H, W)` in [0, 1]."""
    batch, device = images.shape[0], images.device
    draw = _uniform(generator, batch, 10, device=device).view(batch, 10, 1, 1, 1)
    images = images.clamp(0, 1) ** (draw[:, 0] * 0.35).exp()
    images = images * (draw[:, 1] * 0.35).exp()
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * (draw[:, 2] * 0.4).exp()
    grey = images.mean(dim=1, keepdim=True)
    saturation = torch.where(draw[:, 3] > 0.7, torch.zeros_like(draw[:, 3]), (draw[:, 4] * 0.6).exp())
    images = grey + (images - grey) * saturation
    images = images * (draw[:, 5:8].squeeze(2) * 0.15).exp()
    blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    images = torch.where(draw[:, 8] > 0.6, blurred, images)
    noise = on_device(torch.randn(images.shape, generator=generator, device=generator.device), device)
    return (images + noise * 0.03 * (draw[:, 9] + 1) / 2).clamp(0, 1)


def soft_ellipse(batch: int, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """`(B, 1, size, size)` soft ellipses near the centre, 1 inside: stand-ins for objects in front of a background."""
    draw = _uniform(generator, batch, 4, device=device).view(batch, 4, 1, 1)
    axis = torch.linspace(-1, 1, size, device=device)
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)
    radius_x, radius_y = 0.7 + 0.25 * draw[:, 0], 0.7 + 0.25 * draw[:, 1]
    distance = ((x - 0.15 * draw[:, 2]) / radius_x) ** 2 + ((y - 0.15 * draw[:, 3]) / radius_y) ** 2
    return torch.sigmoid((1 - distance) * 12).unsqueeze(1)


@dataclass
class SyntheticPairs:
    """A batch of pairs with known transforms.

    Args:
        source, target: `(B, 3, H, W)` images in [0, 1].
        transform: `(B)`, the true T_AB, target points to source points. Its splines interpolate (regularisation 0),
            whatever regularisation a model has: it is a map to be found, not its parameters.
    """

    source: Tensor
    target: Tensor
    transform: Transform


def make_pairs(
    images: Tensor,
    size: int,
    limits: WarpRange,
    generator: torch.Generator,
    *,
    background_swap: float = 0.5,
    change_colours: bool = True,
) -> SyntheticPairs:
    """Makes pairs from single images `(B, 3, S, S)` in [0, 1].

    A is a random view of the image and B is A warped by a known transform. What lies outside the image is
    filled by reflection, so that no border gives the transform away. In a share of the pairs everything of B but a soft
    ellipse around the middle of A is replaced by another image of the batch: in real pairs the background does
    not match either. `change_colours=False` leaves out the photometric changes.
    """
    batch, device = images.shape[0], images.device
    view = random_view(batch, generator, device)
    affine, tps = random_affine(batch, limits, generator, device), random_tps(batch, limits, generator, device)
    transform = Transform(affine, tps, regularization=0.0)
    source = warp(images, Transform(view).grid((size, size)), padding_mode="reflection")
    from_image = replace(transform, affine=compose_affine(view, affine))
    target = warp(images, from_image.grid((size, size)), padding_mode="reflection")

    other_view = random_view(batch, generator, device)
    other = warp(images.roll(1, dims=0), Transform(other_view).grid((size, size)), padding_mode="reflection")
    ellipse = soft_ellipse(batch, size, generator, device)
    inside = warp(ellipse, transform.grid((size, size)))
    chances = on_device(torch.rand(batch, 1, 1, 1, generator=generator, device=generator.device), device)
    swap = (chances < background_swap).float()
    inside = 1 - swap * (1 - inside)
    target = inside * target + (1 - inside) * other

    if change_colours:
        source, target = photometric(source, generator), photometric(target, generator)
    return SyntheticPairs(source, target, transform)


def clean_cutouts(masks: Tensor) -> Tensor:
    """Which masks `(N, H, W)` look like one whole object: `(N,)` bool.

    Neither tiny nor nearly the whole image, and not cut by the image's frame on more than a tenth of it.
    """
    area = masks.mean(dim=(1, 2))
    frame = torch.cat((masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]), dim=1).mean(dim=1)
    return (area > 0.03) & (area < 0.6) & (frame < 0.1)


def paste_on_others(
    images: Tensor, masks: Tensor, share: float, generator: torch.Generator, *, group_size: int = 2
) -> tuple[Tensor, Tensor]:
    """Cuts objects out by their masks and pastes them, moved and resized, onto images of other groups.

    The result has exact masks, objects that are small or off centre, and, as distractors, the objects of the other
    images. The members of a group get their backgrounds from different groups, so that the pasted object alone
    is what they have in common.

    Args:
        images: `(G * group_size, 3, H, W)` in [0, 1], the members of a group side by side.
        masks: `(G * group_size, H, W)` in [0, 1].
        share: of the groups whose members are pasted (where the masks look clean, see [`clean_cutouts`]).

    Returns:
        Images and masks of the same shapes. With too few groups for that they are what was given.
    """
    count, device, size = len(images), images.device, tuple(images.shape[-2:])
    groups = count // group_size
    draw = _uniform(generator, count, 4, device=device)
    chosen = on_device(torch.rand(groups, generator=generator, device=generator.device), device) < share
    chosen = chosen.repeat_interleave(group_size)
    if groups <= group_size or share <= 0:
        return images, masks
    area = masks.mean(dim=(1, 2)).clamp(min=0.01)
    # Objects end up covering from a fiftieth to a third of the image, whatever they covered before.
    wanted = (0.02 * (0.33 / 0.02) ** ((draw[:, 0] + 1) / 2)).clamp(max=0.95)
    zoom = (area / wanted).sqrt().clamp(0.6, 4.0)
    ys, xs = (torch.linspace(-1, 1, side, device=device) for side in size)
    centre_x = (masks.mean(dim=1) * xs).mean(dim=1) / area
    centre_y = (masks.mean(dim=2) * ys).mean(dim=1) / area
    reach = (1 - wanted.sqrt()).clamp(min=0)
    flip = torch.where(draw[:, 3] < 0, -1.0, 1.0)
    flip = flip.view(groups, group_size)[:, :1].expand(-1, group_size).reshape(-1)
    zero = torch.zeros_like(zoom)
    # Backward warping: where a point of the new image lies in the old one; the object's centre goes to `goal`.
    goal_x, goal_y = draw[:, 1] * reach, draw[:, 2] * reach
    affine = torch.stack(
        (zoom * flip, zero, centre_x - zoom * flip * goal_x, zero, zoom, centre_y - zoom * goal_y), dim=1
    )
    grid = Transform(affine).grid(size)
    moved = warp(masks.unsqueeze(1), grid)
    soft = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)  # no razor-sharp seam
    objects = warp(images, grid)
    member = torch.arange(count, device=device) % group_size
    own = torch.arange(count, device=device)
    others = (own + group_size * (member + 1)) % count
    use = (chosen & clean_cutouts(masks)).float().view(-1, 1, 1, 1)
    pasted = soft * objects + (1 - soft) * images[others]
    return use * pasted + (1 - use) * images, (use * moved).squeeze(1) + (1 - use.squeeze(1)) * masks
