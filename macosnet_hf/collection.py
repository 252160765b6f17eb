"""N photographs of the same kind of object at once: each is encoded once, whatever is then asked of the collection.

The module travels with the model to the Hub. What relates photographs by transforms is in `collection_matching.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import InputError
from .modeling_macosnet import MaCoSNetFeatures, correlate, l2_normalize
from .refinement import refine_mask

if TYPE_CHECKING:
    from .image_processing_macosnet import MaCoSNetImageProcessor
    from .modeling_macosnet import MaCoSNetForKeypointMatching

Progress = Callable[[int, int], None]

# What the maps for the decoder's skip connections may take, in bytes: 1,300 photographs with the lite model, 330 with
# ResNet-101. Those of further photographs are made again when they are needed, by a second pass of the encoder.
_SKIP_MEMORY = 1 << 30
_REFINED_PIXELS = 4_000_000
# How many of the most alike say whether a photograph belongs.
_AGREEMENT_PARTNERS = 4
# From so many photographs on, what their masks have in common is learnt, and has this share in each mask.
_COMMON_FROM = 6
_COMMON_SHARE = 1 / 3


@dataclass
class CollectionResult:
    """Masks of a collection, in the order of the photographs.

    Attributes:
        probabilities: `(N, S, S)` float32 soft masks at the network's resolution.
        partners: the indices of each photograph's partners, most alike first.
        agreement: `(N,)` mean cosine similarity of each photograph's pooled feature to those of the four most alike, in
            [-1, 1]; the odd one out has the smallest.
        collection: the encoded photographs, for further questions.
    """

    probabilities: np.ndarray
    partners: list[list[int]]
    agreement: np.ndarray
    collection: Collection | None = field(default=None, repr=False, compare=False)


@dataclass
class _Encoded:
    """What is kept of a photograph: its stride-16 map `(C, h, w)`, and the projected skips `(c, H/s, W/s)` if kept."""

    last: Tensor
    skips: tuple[Tensor, ...] | None


class Collection:
    """Photographs of the same kind of object, each encoded once.

    Photographs may be added at any time; one whose content is there already costs no encoder pass. Answers about a
    photograph do not depend on the order in which they were added.

    ```python
    >>> collection = Collection(model, processor)
    >>> collection.add(photos)
    >>> result = collection.segment()           # masks
    >>> matches = match_collection(collection)  # transforms of all pairs, see `collection_matching.py`
    ```

    Args:
        model: a [`MaCoSNetForKeypointMatching`], in evaluation mode.
        processor: its image processor.
        batch_size: photographs in one pass of the encoder; one on the CPU, where more are no faster, else 16.
        skip_memory: bytes that the maps for the skip connections may take altogether.

    Raises:
        InputError: if `batch_size` is not positive.
    """

    def __init__(
        self,
        model: MaCoSNetForKeypointMatching,
        processor: MaCoSNetImageProcessor,
        *,
        batch_size: int | None = None,
        skip_memory: int = _SKIP_MEMORY,
    ):
        if batch_size is None:
            batch_size = 1 if model.device.type == "cpu" else 16
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}.")
        self.model, self.processor = model, processor
        self.photos: list[Image.Image] = []
        self.keys: list[str] = []
        self._batch_size, self._skip_memory, self._skip_bytes = batch_size, skip_memory, 0
        self._encoded: dict[str, _Encoded] = {}

    def __len__(self) -> int:
        return len(self.photos)

    def add(self, photos: Sequence[Image.Image], *, progress: Progress | None = None) -> list[int]:
        """Takes in photographs; returns their numbers.

        Args:
            photos: upright RGB pictures. The network sees them at its own resolution, so copies that are a few times
                larger than that do as well as the originals.
            progress: called with (done, total) after each.
        """
        numbers = list(range(len(self), len(self) + len(photos)))
        for start in range(0, len(photos), self._batch_size):
            some = list(photos[start : start + self._batch_size])
            pixels = self._pixels(some)
            keys = [hashlib.sha256(picture.numpy().tobytes()).hexdigest() for picture in pixels]
            new = {key: row for row, key in enumerate(keys) if key not in self._encoded}
            if new:
                self._encode(pixels[list(new.values())], list(new))
            self.photos += some
            self.keys += keys
            if progress is not None:
                progress(start + len(some), len(photos))
        return numbers

    def subset(self, numbers: Sequence[int]) -> Collection:
        """Some of the photographs as a collection of their own; nothing is encoded again."""
        part = Collection(self.model, self.processor, batch_size=self._batch_size, skip_memory=self._skip_memory)
        part.photos, part.keys = [self.photos[number] for number in numbers], [self.keys[number] for number in numbers]
        part._encoded, part._skip_bytes = dict(self._encoded), self._skip_bytes
        return part

    def features(self, numbers: Sequence[int]) -> MaCoSNetFeatures:
        """Stride-16 features of some of the photographs, without skips."""
        last = torch.stack([self._encoded[self.keys[number]].last for number in numbers])
        return MaCoSNetFeatures(last=last, normalized=l2_normalize(last), skips=())

    def pixel_values(self, numbers: Sequence[int]) -> Tensor:
        """`(n, 3, S, S)` as the encoder sees them, on the model's device."""
        return self._pixels([self.photos[number] for number in numbers]).to(self.model.device)

    @torch.inference_mode()
    def segment(self, *, partners: int = 2, common: bool = True, progress: Progress | None = None) -> CollectionResult:
        """Soft masks of the object that the photographs have in common.

        A photograph's mask is the mean of the masks that the decoder gives it together with each of its partners. Of
        six photographs or more, a third of it is what the stride-16 features explain of *all* these masks (a ridge
        regression): a part that is taken for the object in one photograph only is not confirmed by the others.

        Args:
            partners: how many others each photograph is compared with.
            common: whether to learn what the masks have in common.
            progress: called with (done, total) after each photograph.

        Raises:
            InputError: for fewer than two photographs, or no partner.
        """
        if len(self) < 2:
            raise InputError("Co-segmentation needs two or more photographs.")
        if partners < 1:
            raise InputError(f"partners must be at least 1, not {partners}.")
        last = torch.stack([self._encoded[key].last for key in self.keys])
        indices, similarity = choose_partners(last, max(partners, _AGREEMENT_PARTNERS))
        agreement, indices = similarity[:, :_AGREEMENT_PARTNERS].mean(dim=1), indices[:, :partners]
        probabilities = []
        for number in range(len(self)):
            probabilities.append(self.mean_mask(number, indices[number].tolist()))
            if progress is not None:
                progress(number + 1, len(self))
        masks = torch.stack(probabilities)
        if common and len(self) >= _COMMON_FROM:
            # In an order that the content gives, so that sums do not depend on that of the photographs.
            order = sorted(range(len(self)), key=lambda number: self.keys[number])
            small = F.interpolate(masks[order, None], size=last.shape[-2:], mode="area")[:, 0]
            explained = torch.empty_like(small)
            explained[order] = explain_masks([last[number] for number in order], small)
            learnt = F.interpolate(explained[:, None], size=masks.shape[-2:], mode="bilinear", align_corners=True)[:, 0]
            masks = (1 - _COMMON_SHARE) * masks + _COMMON_SHARE * learnt
        return CollectionResult(
            probabilities=masks.cpu().numpy(),
            partners=indices.tolist(),
            agreement=agreement.cpu().numpy(),
            collection=self,
        )

    def mean_mask(self, number: int, partners: Sequence[int]) -> Tensor:
        """`(S, S)` soft mask of one photograph: the mean over its K partners, all given by their numbers."""
        own, source = self.features([number]), self.features(partners).normalized
        correlation = correlate(source, own.normalized.expand_as(source))
        index = torch.zeros(len(partners), dtype=torch.long, device=correlation.device)
        skips = self._encoded[self.keys[number]].skips
        if skips is None:
            skips = self._project(self.pixel_values([number]))[1][0]
        decoder = self.model.macosnet.decoder
        logits: Tensor = decoder(own, correlation, index, tuple(skip.unsqueeze(0) for skip in skips))
        return logits.float().sigmoid().mean(dim=0)

    def _pixels(self, photos: list[Image.Image]) -> Tensor:
        pixels: Tensor = self.processor.preprocess_views(photos, return_tensors="pt")["pixel_values"]
        return pixels

    @torch.inference_mode()
    def _project(self, pixels: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Stride-16 maps `(n, C, h, w)` of n pictures, and the projected skips of each."""
        features = self.model.macosnet.get_image_features(pixels.to(self.model.device))
        projected = self.model.macosnet.decoder.project_skips(features.skips)
        return features.last, [tuple(level[row].clone() for level in projected) for row in range(len(pixels))]

    def _encode(self, pixels: Tensor, keys: list[str]) -> None:
        last, skips = self._project(pixels)
        for row, key in enumerate(keys):
            size = sum(skip.numel() * skip.element_size() for skip in skips[row])
            keep = self._skip_bytes + size <= self._skip_memory
            self._skip_bytes += size if keep else 0
            self._encoded[key] = _Encoded(last=last[row].clone(), skips=skips[row] if keep else None)


def segment_collection(
    photos: Sequence[Image.Image],
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    partners: int = 2,
    batch_size: int | None = None,
    skip_memory: int = _SKIP_MEMORY,
    progress: Progress | None = None,
) -> CollectionResult:
    """Soft masks of the object that N photographs have in common: a [`Collection`] in one call.

    Args:
        photos: two or more upright RGB pictures.
        partners, progress: as in [`Collection.segment`].
        batch_size, skip_memory: as in [`Collection`].

    Raises:
        InputError: for fewer than two photographs, or options that are not positive.
    """
    if len(photos) < 2:
        raise InputError("Co-segmentation needs two or more photographs.")
    if partners < 1:
        raise InputError(f"partners must be at least 1, not {partners}.")
    collection = Collection(model, processor, batch_size=batch_size, skip_memory=skip_memory)
    collection.add(photos)
    return collection.segment(partners=partners, progress=progress)


def explain_masks(features: Tensor | Sequence[Tensor], masks: Tensor, *, ridge: float = 0.01) -> Tensor:
    """Masks as far as a linear function of the features can explain them.

    A ridge regression from the features of all cells of all pictures to the masks' values there, then stretched so that
    the 5th percentile of each picture is 0 and the 95th is 1. Pictures are taken one by one, which bounds the memory.

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


def odd_ones_out(agreement: np.ndarray) -> list[int]:
    """The photographs that agree much less than the rest, the oddest first; none of fewer than four.

    Each is compared with the median of the *others*, and is odd if it lies below that by more than 0.15 and by more
    than three times their spread (their median distance from it, as a standard deviation): of 12 collections of
    msrc-coseg, seven photographs of one class and one of another, with the embedded checkpoint, the other one was
    named first in 11.

    Args:
        agreement: `(N,)`, as of a [`CollectionResult`].
    """
    values = np.asarray(agreement, dtype=np.float64)
    if len(values) < 4:
        return []
    odd = []
    for number in np.argsort(values, kind="stable").tolist():
        others = np.delete(values, number)
        middle = float(np.median(others))
        spread = 1.4826 * float(np.median(np.abs(others - middle)))
        if values[number] < middle - max(0.15, 3 * spread):
            odd.append(number)
    return odd


def choose_partners(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each of N pictures the `count` others that are most alike in their pooled features.

    Args:
        features: `(N, C, h, w)`.
        count: partners of each, at least 1; with fewer others than that, all of them.

    Returns:
        indices `(N, min(count, N - 1))`, most alike first, and cosine similarities of the same shape.
    """
    # In double precision the similarity of two pictures hardly depends on where they stand among the others.
    pooled = F.normalize(features.double().mean(dim=(2, 3)), dim=1)
    similarity = pooled @ pooled.t()
    similarity.fill_diagonal_(-2)
    best = similarity.topk(min(count, len(pooled) - 1), dim=1)
    return best.indices, best.values


def refined_mask(photo: Image.Image, probability: np.ndarray, refine: str = "grabcut") -> np.ndarray:
    """Hard mask `(H, W)` bool of a photograph in its own size, from its soft mask `(S, S)` in [0, 1].

    As the image processor's `post_process_cosegmentation`; only that a photograph of more than 4 megapixels is
    refined at that size, which bounds the memory. (GrabCut itself works at 320 pixels a side.)

    Raises:
        InputError: as [`refine_mask`].
    """
    full_size = photo.size
    scale = (_REFINED_PIXELS / (photo.width * photo.height)) ** 0.5
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in full_size)
        photo = photo.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    soft = F.interpolate(
        torch.from_numpy(probability)[None, None],
        size=(photo.height, photo.width),
        mode="bilinear",
        align_corners=True,
    )
    mask = refine_mask(photo, soft[0, 0].clamp(0, 1).numpy(), refine)
    if scale >= 1:
        return mask
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(full_size, Image.Resampling.BILINEAR)) >= 128
