"""N photographs of the same kind of object at once: each is encoded once, whatever is then asked of the collection.

The module travels with the model to the Hub. What relates photographs by transforms is in `collection_matching.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import InputError
from .modeling_macosnet import MaCoSNetFeatures, correlate, l2_normalize
from .refinement import REFINEMENT_METHODS, refine_mask

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
# How masks are carried from photograph to photograph, chosen on every second photograph of msrc-coseg: each cell looks
# at the cells that resemble it most in the photographs most alike, and what they say has this share in the mask (less
# of a pair, where one wrong mask is all that can be asked).
_TRANSFER_PARTNERS = 16
_TRANSFER_CELLS = 20
_TRANSFER_TEMPERATURE = 0.1
_KEPT_PRODUCTS = 100_000_000  # bytes
_TRANSFER_SHARE = 1 / 2
_TRANSFER_SHARE_OF_TWO = 0.3
# Of refined masks: shares of the decoder's own, of what is carried over, and of the refined one itself.
_REFINED_SHARES = (0.3, 0.4, 0.3)
# Refinement looks at pictures of at most so many pixels a side, as `refine_mask` does.
_REFINED_SIDE = 320


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
    def segment(
        self,
        *,
        partners: int = 2,
        common: bool = True,
        refine: str = "none",
        workers: int = 2,
        progress: Progress | None = None,
    ) -> CollectionResult:
        """Soft masks of the object that the photographs have in common.

        Three steps, none of which encodes a photograph again:

        1. The decoder sees each photograph with each of its partners; the mean of these masks is its first mask.
        2. Masks travel ([`transfer_masks`]): each cell asks the cells that resemble it most in other photographs, and
           what these say is half of the new mask. A part that is taken for the object in one photograph only finds no
           support.
        3. With `refine`, these masks are refined by each picture's own colours, the refined masks travel in the same
           way, and the result is the mean of the first mask (0.3), of what travelled (0.4) and of the refined mask
           itself (0.3). The object is where it is 0.5 or more: refine it no further.

        Args:
            partners: how many others the decoder compares each photograph with.
            common: whether masks travel.
            refine: one of `refinement.REFINEMENT_METHODS`, for the third step; `"none"` leaves it out.
            workers: threads that refine.
            progress: called with (done, total) after each photograph of the first step, and of the third.

        Raises:
            InputError: for fewer than two photographs, no partner, or an unknown refinement.
        """
        if len(self) < 2:
            raise InputError("Co-segmentation needs two or more photographs.")
        if partners < 1:
            raise InputError(f"partners must be at least 1, not {partners}.")
        if refine not in REFINEMENT_METHODS:
            raise InputError(f"Unknown refinement '{refine}'; choose one of {', '.join(REFINEMENT_METHODS)}.")
        total = len(self) * (1 if refine == "none" else 2)
        last = torch.stack([self._encoded[key].last for key in self.keys])
        others, similarity = choose_partners(last, len(self))
        agreement = similarity[:, :_AGREEMENT_PARTNERS].mean(dim=1)
        chosen = others[:, spread_ranks(others.shape[1], partners)]
        first = []
        for number in range(len(self)):
            first.append(self.mean_mask(number, chosen[number].tolist()))
            if progress is not None:
                progress(number + 1, total)
        masks = own = torch.stack(first)
        cells = similar_cells(last, others) if common else None
        if cells is not None:
            masks = share_masks(own, cells)
        if refine != "none":

            def tell(done: int) -> None:
                if progress is not None:
                    progress(len(self) + done, total)

            sharp = refine_small(self.photos, masks, refine, workers=workers, tell=tell)
            masks = sharp if cells is None else mix_refined(own, sharp, cells)
        return CollectionResult(
            probabilities=masks.cpu().numpy(),
            partners=chosen.tolist(),
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
    refine: str = "none",
    batch_size: int | None = None,
    skip_memory: int = _SKIP_MEMORY,
    progress: Progress | None = None,
) -> CollectionResult:
    """Soft masks of the object that N photographs have in common: a [`Collection`] in one call.

    Args:
        photos: two or more upright RGB pictures.
        partners, refine, progress: as in [`Collection.segment`].
        batch_size, skip_memory: as in [`Collection`].

    Raises:
        InputError: for fewer than two photographs, or options that cannot be used.
    """
    if len(photos) < 2:
        raise InputError("Co-segmentation needs two or more photographs.")
    if partners < 1:
        raise InputError(f"partners must be at least 1, not {partners}.")
    collection = Collection(model, processor, batch_size=batch_size, skip_memory=skip_memory)
    collection.add(photos)
    return collection.segment(partners=partners, refine=refine, progress=progress)


class SimilarCells(NamedTuple):
    """For each cell of N pictures the K cells of other pictures that resemble it most.

    Attributes:
        places: `(N, h*w, K)` into the `N*h*w` cells of all pictures.
        weights: `(N, h*w, K)`, softmax(s / 0.1) of the cosine similarities s of the features.
        size: (h, w).
    """

    places: Tensor
    weights: Tensor
    size: tuple[int, int]


def similar_cells(features: Tensor, others: Tensor) -> SimilarCells:
    """The 20 most similar cells, for each cell, in the 16 pictures most alike.

    Args:
        features: `(N, C, h, w)`.
        others: `(N, K)` for each picture the numbers of others, most alike first.
    """
    height, width = features.shape[-2:]
    count = height * width
    cells = F.normalize(features.float(), dim=1).flatten(2)  # (N, C, h*w)
    chosen = others[:, :_TRANSFER_PARTNERS].tolist()
    kept: dict[tuple[int, int], Tensor] = {}
    room = _KEPT_PRODUCTS // (4 * count**2)
    indices, weights = [], []
    for number, partners in enumerate(chosen):
        products = []
        for partner in partners:
            # Of two that chose each other, one product is the other's transpose.
            product = kept.pop((partner, number), None)
            if product is not None:
                product = product.t()
            else:
                product = cells[number].t() @ cells[partner]
                if partner > number and len(kept) < room and number in chosen[partner]:
                    kept[number, partner] = product
            products.append(product)
        similarity = torch.cat(products, dim=1)
        best = similarity.topk(min(_TRANSFER_CELLS, similarity.shape[1]), dim=1)
        starts = torch.tensor(partners, device=features.device) * count
        indices.append(starts[best.indices // count] + best.indices % count)
        weights.append((best.values / _TRANSFER_TEMPERATURE).softmax(dim=1))
    return SimilarCells(torch.stack(indices), torch.stack(weights), (height, width))


def transfer_masks(masks: Tensor, cells: SimilarCells) -> Tensor:
    """What the photographs of a collection say of each other's masks: in each cell the weighted mean of the masks where
    the cells lie that resemble it most.

    Args:
        masks: `(N, S, S)` in [0, 1].
        cells: of the same pictures.

    Returns:
        `(N, S, S)` in [0, 1], as smooth as a map of `(h, w)` cells is.
    """
    small = F.interpolate(masks[:, None], size=cells.size, mode="area").flatten()
    found = (cells.weights * small[cells.places]).sum(dim=-1).view(len(masks), 1, *cells.size)
    return F.interpolate(found, size=masks.shape[-2:], mode="bilinear", align_corners=True)[:, 0]


def share_masks(own: Tensor, cells: SimilarCells) -> Tensor:
    """The second step of [`Collection.segment`]: masks `(N, S, S)`, half of which (of two: 0.3) the others say."""
    share = _TRANSFER_SHARE if len(own) > 2 else _TRANSFER_SHARE_OF_TWO
    return (1 - share) * own + share * transfer_masks(own, cells)


def mix_refined(own: Tensor, refined: Tensor, cells: SimilarCells) -> Tensor:
    """The third step of [`Collection.segment`]: 0.3 own, 0.4 what the refined masks of the others say, 0.3 refined.

    Args:
        own, refined: `(N, S, S)` masks of the decoder, and refined ones of the same photographs.
        cells: of the same photographs.
    """
    shares = _REFINED_SHARES
    return shares[0] * own + shares[1] * transfer_masks(refined, cells) + shares[2] * refined


def refine_small(
    photos: Sequence[Image.Image],
    masks: Tensor,
    method: str,
    *,
    workers: int = 2,
    tell: Callable[[int], None] | None = None,
) -> Tensor:
    """Refined masks as shares of the object, `(N, S, S)` in [0, 1].

    Args:
        photos: N upright RGB pictures; copies of 320 pixels are looked at.
        masks: `(N, S, S)` in [0, 1].
        method: one of `refinement.REFINEMENT_METHODS`.
        workers: threads.
        tell: called with the number that are done; may raise to stop the work.
    """
    size = tuple(masks.shape[-2:])

    def one(photo: Image.Image, probability: np.ndarray) -> Tensor:
        scale = min(1.0, _REFINED_SIDE / max(photo.size))
        width, height = (max(1, round(side * scale)) for side in photo.size)
        small = photo.resize((width, height), Image.Resampling.BOX) if scale < 1 else photo
        soft = torch.from_numpy(probability)[None, None]
        soft = F.interpolate(soft, size=(height, width), mode="bilinear", align_corners=True)
        hard = torch.from_numpy(refine_mask(small, soft[0, 0].clamp(0, 1).numpy(), method))
        return F.interpolate(hard[None, None].float(), size=size, mode="bilinear", align_corners=True)[0, 0]

    found: list[Tensor] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting = [pool.submit(one, *both) for both in zip(photos, masks.cpu().numpy(), strict=True)]
        try:
            for refined in waiting:
                found.append(refined.result())
                if tell is not None:
                    tell(len(found))
        except BaseException:  # Ctrl+C, or a visitor who stops: what has not begun is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return torch.stack(found).to(masks.device)


def spread_ranks(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` places in a row, evenly spread from the first on; all if there are fewer.

    The most alike often share the background too, and then confirm it: on msrc-coseg the first and the middle one
    together make better masks than the first two, the last two, or two in between.
    """
    wanted = min(wanted, count)
    return [number * count // wanted for number in range(wanted)]


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
    pixels = np.asarray(photo if photo.mode == "RGB" else photo.convert("RGB"))
    del photo  # nothing of this size is held longer than it is needed: two photographs are refined at a time
    soft = F.interpolate(
        torch.from_numpy(probability)[None, None], size=pixels.shape[:2], mode="bilinear", align_corners=True
    )
    mask = refine_mask(pixels, soft[0, 0].clamp_(0, 1).numpy(), refine)
    if scale >= 1:
        return mask
    del pixels, soft
    return np.asarray(Image.fromarray(mask * np.uint8(255)).resize(full_size, Image.Resampling.BILINEAR)) >= 128
