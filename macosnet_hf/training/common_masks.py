"""Second stage for `decoder_inputs="common"`: the decoder learns to cut out what a group of images has in common.

The only label is the class of an image. Most groups hold images of one class; many of these are composites with an
object of another class, which is background then: the partners say whose pseudo-mask is the answer. In some groups one
image does not belong, and some have nothing in common; the answer to those is an empty mask.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common_object import centre_prior, object_weights
from ..datasets.composites import compose, uniform
from ..encoder import MaCoSNetEncoder
from ..errors import DataError, InputError
from ..geometry import Transform, identity_affine, warp
from ..modeling_macosnet import MaCoSNetFeatures, MaCoSNetModel
from .images import TrainingData, TrainingImages
from .objectives import Apart, Objective
from .synthetic import photometric, random_view

_UNRELATED_SHARE = 0.15  # of the groups
_ODD_SHARE = 0.15
_DICE_WEIGHT = 0.4
_SMALLEST_OBJECT = 60  # pixels at half the network's resolution; smaller ones have no overlap to speak of
_RIVALS = 6  # classes that look most like a class
_DROPPED_PARTNERS = 0.8  # at most so large is the share of partners that a group goes without


def composable_classes(images: TrainingImages) -> list[list[int]]:
    """The numbers of the images of each class.

    Raises:
        DataError: for fewer than two classes.
    """
    members = list(images.classes().values())
    if len(members) < 2:
        raise DataError("Composites need images of two or more classes, each in a folder of its own.")
    return members


class CompositeGroups(TrainingData):
    """Groups of images with their pseudo-masks, and as many images of other classes to compose them with.

    A pure function of seed and number. Item: uint8 images `(2 n, 3, H, W)` and bool masks `(2 n, H, W)`, the n members
    first; bool `(n,)`, which members share their class with the group.

    Args:
        masks: bool `(N, H, W)`, the pseudo-masks.
        alike: `(C, C)`, how much the classes look alike, in the order in which they first appear.
        rival_share: of the images beside the members that are of one of the classes that look most like the group's.

    Raises:
        DataError: for fewer than two classes.
        InputError: for groups of fewer than two images; rivals without `alike`.
    """

    fresh_epochs = True

    def __init__(
        self,
        images: TrainingImages,
        masks: Tensor,
        *,
        group_size: int = 4,
        length: int | None = None,
        seed: int = 0,
        alike: Tensor | None = None,
        rival_share: float = 0.0,
    ):
        self.images, self.masks, self.group_size, self.seed = images, masks, group_size, seed
        has_object = masks.flatten(1).any(dim=1).tolist()
        members = composable_classes(images)
        # An image without a pseudo-mask teaches nothing; a class of such images has to do.
        self.members = [[row for row in rows if has_object[row]] or rows for rows in members]
        if group_size < 2:
            raise InputError(f"A group has two or more images; got {group_size}.")
        if rival_share and alike is None:
            raise InputError("To draw rivals, say how much the classes look alike.")
        # Each class's others, the most alike first.
        itself = torch.eye(len(self.members), dtype=torch.bool)
        self.rivals = None if alike is None else alike.masked_fill(itself, -torch.inf).argsort(descending=True)[:, :-1]
        self.rival_share = rival_share
        self.length = length or len(images)
        # Between the same chance for each image and the same for each class.
        shares = np.sqrt([len(rows) for rows in self.members])
        self.shares = shares / shares.sum()

    def fingerprint(self) -> str:
        """Of images and masks; the groups follow from the settings."""
        masks = hashlib.sha256(np.packbits(self.masks.cpu().numpy() > 0).tobytes()).hexdigest()[:16]
        return f"{self.images.fingerprint()}, masks {masks}"

    def __len__(self) -> int:
        return self.length

    def rows(self, number: int) -> tuple[list[int], list[int], list[bool]]:
        """Indices of the members of a group and of the images beside them, and which members belong."""
        draw = np.random.default_rng((self.seed, number))
        count, size = len(self.members), self.group_size
        chosen = int(draw.choice(count, p=self.shares))

        def other_class(than: int) -> int:
            return int((than + 1 + draw.integers(count - 1)) % count)

        classes, common = [chosen] * size, [True] * size
        chance = draw.random()
        if chance < _UNRELATED_SHARE:
            if count >= size:  # else two of them would have something in common
                classes = [int(k) for k in draw.choice(count, size, replace=False)]
                common = [False] * size
        elif chance < _UNRELATED_SHARE + _ODD_SHARE and size > 2 and count > 2:
            classes[-1], common[-1] = other_class(chosen), False
        # No object of the group's classes stands beside a member, or it would be in common after all.
        strangers = [k for k in range(count) if k not in classes] or [k for k in range(count) if k != chosen]
        own: list[int] = []
        for k in range(size):
            pool = [row for row in self.members[classes[k]] if row not in own] or self.members[classes[k]]
            own.append(int(draw.choice(pool)))
        rivals = self._rivals_of(classes[0], strangers)
        beside: list[int] = []
        for _ in classes:
            pool = rivals if rivals and draw.random() < self.rival_share else strangers
            beside.append(int(draw.choice(self.members[int(draw.choice(pool))])))
        return own, beside, common

    def _rivals_of(self, chosen: int, strangers: list[int]) -> list[int]:
        """The classes among the strangers that look most like one, where rivals are wanted."""
        if not self.rival_share or self.rivals is None:
            return []
        allowed = set(strangers)
        return [k for k in self.rivals[chosen].tolist() if k in allowed][:_RIVALS]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        own, beside, common = self.rows(number)
        seen = [*own, *beside]
        return torch.stack([self.images[row] for row in seen]), self.masks[seen], torch.tensor(common)


class CommonObjective(Objective):
    """Cross-entropy and Dice loss of the masks of all members of a group, each given some of the others.

    Args:
        model: with `decoder_inputs="common"`; all but its decoder stays as it is.
        mean, std: of the processor.
        composite_share: of the members that are composed with an object of another class.
        second_round_share: of the groups whose partners' objects are where the model's own masks say, as in the second
            round of a model with `decoder_rounds=2`; for the others they are assumed in the middle.
        draw_on_device: as in [`~.pretraining.SyntheticObjective`].
        trained: `"decoder"`, and `"encoder"` where it learns too.
        feature_weight: of the distance, one minus the cosine, between the features of a position and those of the
            encoder as it was at the start, which matching was learnt with. Of use where the encoder learns.
        freeze_fine_stages: where the encoder learns, what its stages of stride 8 and less are made of stays as it is.
    """

    first_encoder: Apart

    def __init__(
        self,
        model: MaCoSNetModel,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        composite_share: float = 0.45,
        second_round_share: float = 0.5,
        draw_on_device: bool = False,
        trained: Sequence[str] = ("decoder",),
        feature_weight: float = 0.0,
        freeze_fine_stages: bool = False,
    ):
        super().__init__(model, mean, std, trained)
        if model.config.decoder_inputs != "common":
            raise InputError("Composites teach a decoder with decoder_inputs='common'; this model has 'paper'.")
        self.composite_share, self.second_round_share = composite_share, second_round_share
        self.draw_on_device = draw_on_device
        if freeze_fine_stages and "encoder" in trained:
            for parameter in fine_parameters(model.encoder):
                parameter.requires_grad_(False)
        self.feature_weight = feature_weight if "encoder" in trained else 0.0
        encoder = copy.deepcopy(model.encoder).eval().requires_grad_(False) if self.feature_weight else None
        self.first_encoder = Apart(encoder)

    def forward(self, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Items of [`CompositeGroups`], batched, to the loss and the share of the object."""
        groups = len(batch[2])
        if self.draw_on_device:
            generator = torch.Generator(batch[0].device).manual_seed(generator.initial_seed())
        with torch.no_grad():
            images, labels = self.make_images(batch, generator)
            partners, present = self._choose_partners(batch[2].to(images.device), generator)
            pixels = self.normalize(images).to(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "encoder" in self.trained):
            features = self.model.encoder(pixels)
        with torch.no_grad():
            own_weights, partner_weights = self._weights(features, partners, present, groups, generator)
        logits = self.model.predict_common_masks(
            features, partners, own_weights=own_weights, partner_weights=partner_weights, present=present
        ).float()
        # At half resolution: the pseudo-masks are no sharper than that.
        labels, logits = (F.avg_pool2d(maps.unsqueeze(1), 2).squeeze(1) for maps in (labels, logits))
        loss = F.binary_cross_entropy_with_logits(logits, labels) + _DICE_WEIGHT * dice_loss(logits, labels)
        losses = {"total": loss, "area": logits.detach().sigmoid().mean()}
        if self.feature_weight:
            losses["moved"] = self._moved(features, pixels, every=batch[2].shape[1])
            losses["total"] = loss + self.feature_weight * losses["moved"]
        return losses

    def _moved(self, features: MaCoSNetFeatures, pixels: Tensor, every: int) -> Tensor:
        """How far the features have moved from those of the first encoder: the mean of one minus the cosine, over one
        image in `every`."""
        with torch.no_grad():
            before = self.first_encoder.on(pixels.device)(pixels[::every]).normalized.float()
        return 1 - (features.normalized[::every].float() * before).sum(dim=1).mean()

    def make_images(self, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`(B n, 3, S, S)` images in [0, 1], some of them composites, and the masks `(B n, S, S)` to be found."""
        size = (self.model.config.image_size,) * 2
        own = batch[0].shape[1] // 2
        pixels, masks = batch[0].float() / 255, batch[1].float()
        first, second = (
            (pixels[:, part].flatten(0, 1), masks[:, part].flatten(0, 1)) for part in (slice(own), slice(own, None))
        )
        count, device = len(first[0]), pixels.device
        whole = identity_affine(count, device=device)
        single = _viewed(*first, random_view(count, generator, device), size)
        first, second = _viewed(*first, whole, size), _viewed(*second, whole, size)
        made = compose(first, second, second[0].roll(own, dims=0), generator)
        composed = uniform(generator, count, (0, 1), device) < self.composite_share
        rows = composed[:, None, None]
        images = torch.where(rows.unsqueeze(1), made.images, single[0])
        labels = torch.where(rows, made.masks[:, 0], single[1]) * batch[2].flatten().to(device)[:, None, None]
        return photometric(images, generator), labels

    @staticmethod
    def _choose_partners(common: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Numbers `(B n, n - 1)` of the others of each member's group, and which of them count.

        One counts at least, and one that belongs to the group where there is one.

        Args:
            common: `(B, n)` bool, which members belong.
        """
        (groups, members), device = common.shape, common.device
        order = torch.arange(members)
        others = torch.stack([order[order != k] for k in range(members)])
        partners = (torch.arange(groups).view(-1, 1, 1) * members + others).flatten(0, 1).to(device)
        count = groups * members
        dropped = uniform(generator, groups, (0, _DROPPED_PARTNERS), device).repeat_interleave(members).unsqueeze(1)
        chance = uniform(generator, count * (members - 1), (0, 1), device).view(count, -1)
        first = chance + common.flatten()[partners]
        return partners, (chance >= dropped) | (first == first.amax(dim=1, keepdim=True))

    def _weights(
        self, features: MaCoSNetFeatures, partners: Tensor, present: Tensor, groups: int, generator: torch.Generator
    ) -> tuple[Tensor | None, Tensor | None]:
        """Where objects are assumed: in the middle, or where the masks of the first round are."""
        if not self.second_round_share:
            return None, None
        count, device = len(partners), features.last.device
        again = uniform(generator, groups, (0, 1), device) < self.second_round_share
        rows = torch.nonzero(again.repeat_interleave(count // groups)).squeeze(1)
        weights = centre_prior(*features.last.shape[-2:], device=device).repeat(count, 1, 1)
        if len(rows):
            decoder, training = self.model.decoder, self.model.decoder.training
            decoder.eval()
            logits = self.model.predict_common_masks(features, partners[rows], rows, present=present[rows])
            decoder.train(training)
            weights[rows] = object_weights(logits.float().sigmoid()).to(weights.dtype)
        return weights, weights[partners]


def fine_parameters(encoder: MaCoSNetEncoder) -> list[nn.Parameter]:
    """The parameters of an encoder that its maps of stride 8 and less, the decoder's skip connections, depend on."""
    if not encoder.skip_channels:
        return []
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    was_training = encoder.training
    encoder.eval()  # its batch-norm statistics must not see this
    with torch.enable_grad():
        skips = encoder(torch.zeros(1, 3, 64, 64, device=parameters[0].device)).skips
        total = torch.stack([skip.float().sum() for skip in skips]).sum()
    encoder.train(was_training)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return [parameter for parameter, one in zip(parameters, found, strict=True) if one is not None]


def _viewed(images: Tensor, masks: Tensor, affine: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    grid = Transform(affine).grid(size)
    moved = warp(masks.unsqueeze(1), grid, padding_mode="reflection")
    return warp(images, grid, padding_mode="reflection"), moved.squeeze(1).clamp(0, 1)


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of `1 - (2 |p m| + 1) / (|p| + |m| + 1)` over the masks `(N, h, w)` that have an object.

    The soft Dice coefficient of Milletari et al., "V-Net" (2016).
    """
    chances = logits.sigmoid()
    both, total = (chances * labels).sum(dim=(1, 2)), (chances + labels).sum(dim=(1, 2))
    has_object = (labels.sum(dim=(1, 2)) > _SMALLEST_OBJECT).float()
    return (has_object * (1 - (2 * both + 1) / (total + 1))).sum() / has_object.sum().clamp(min=1)


__all__ = ["CommonObjective", "CompositeGroups", "composable_classes", "dice_loss", "fine_parameters"]
