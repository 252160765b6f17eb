"""Collections: N images of the same kind of object, each encoded once for masks and transforms of all pairs.

The module travels with the model to the Hub. `inference/collection_transforms.py` holds the transforms of a collection.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .common_object import LEAST_STRUCTURE, feature_structure, object_weights
from .crops import Box, Crops, crop_to_box, crop_to_objects, refine_crops, shares_of
from .directions import COLLECTION_ORIENTATIONS, check_orientations
from .encoded_images import EncodedImage, EncodedImages, FeatureMaps, ImageList, StoredImage
from .encoder import MaCoSNetFeatures
from .errors import InputError
from .geometry import SYMMETRIES, resize_masks
from .hints import Hint, HintedCells, PlacedHint, Rectangle, place_hints
from .images import as_upright_rgb
from .instances import split_instances
from .mask_sharing import (
    LEAST_SIMILARITY,
    SIMILAR_PARTNERS,
    NetworkMasks,
    fix_hints,
    object_means,
    similar_cells,
    soft_masks,
)
from .matching import correlate
from .neighbours import (
    LEAST_COMPANY,
    choose_company,
    choose_partners,
    rank_others,
    similar_blocks,
    similarity_rows,
    spread_ranks,
    unit_pooled,
)
from .orientation import facing_sides
from .refinement import check_method

if TYPE_CHECKING:
    from .image_processing_macosnet import MaCoSNetImageProcessor
    from .modeling_macosnet import MaCoSNetForKeypointMatching

Progress = Callable[[int, int], None]

# Bytes for the maps of the decoder's skip connections: 500 images with the lite model. Maps of further images are
# computed again when they are needed, by another encoder pass. The crops of the second pass may take as much again
# while it lasts.
_SKIP_MEMORY = 1 << 30
# Images that are segmented together where a collection is segmented in blocks; as in bulk runs.
_BLOCK_SIZE = 32
_ENLARGED_PIXELS = 4_000_000
# The number of most similar images whose similarity is an image's agreement.
_AGREEMENT_PARTNERS = 4
# An image has an object in common with its partners if their objects' mean similarity is so large. Chosen on seven
# classes of msrc-coseg with the checkpoint `common`, three partners or one: of images with partners of their class 96 %
# are above, of those with partners of other classes 24 %; of the other six classes 100 % and 17 %. A larger value would
# miss the small objects of composites, of which 88 % are above.
COMMON_SIMILARITY = 0.4
# An image is asked about the side that it faces by so many others, the most similar ones.
_FACING_PARTNERS = 32
_MIRROR = list(SYMMETRIES).index("mirror")

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _accept_old_keywords(**renamed: str) -> Callable[[_Function], _Function]:
    """Lets a function accept keyword arguments by their names of version 0.1, with a warning."""

    def decorate(function: _Function) -> _Function:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in renamed.keys() & kwargs.keys():
                warnings.warn(f"The argument {old} is now {renamed[old]}.", DeprecationWarning, stacklevel=2)
                kwargs[renamed[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


@dataclass
class CollectionResult:
    """Masks of a collection, in the order of the images.

    Attributes:
        probabilities: `(N, S, S)` float32 soft masks at the network's resolution.
        partners: the indices of each image's partners, most similar first. (Of whole images: crops may have others.)
        agreement: `(N,)` mean cosine similarity of each image's object to the four most similar ones, in [-1, 1]; the
            odd one out has the smallest.
        collection: the encoded images.
        common: `(N,)` bool, whether an image has an object in common with its partners. Where it has not, the mask is
            that of what stands out in it; an image of nothing, such as a plain surface, has none, whatever its mask is.
        instances: `(N, S, S)` int32 labels of the single objects, 0 for background and 1 for the largest; None unless
            they were asked for.
        numbers: of the images in the collection, where only some of them were segmented; then N is their number, and
            `partners` are numbers in the collection.
    """

    probabilities: np.ndarray
    partners: list[list[int]]
    agreement: np.ndarray
    collection: Collection | None = field(default=None, repr=False, compare=False)
    common: np.ndarray | None = None
    instances: np.ndarray | None = None
    numbers: list[int] | None = None


class FirstPass(NamedTuple):
    """What the first two steps of [`Collection.segment`] give.

    Attributes:
        masks: of N images.
        partners: the numbers of each image's partners, most similar first.
        agreement: `(N,)`, see [`CollectionResult`].
        common: `(N,)` bool, see [`CollectionResult`].
        hinted: what hints say; None without any.
    """

    masks: NetworkMasks
    partners: list[list[int]]
    agreement: Tensor
    common: Tensor
    hinted: HintedCells | None = None


class Collection:
    """Images of the same kind of object, each encoded once (see [`segment`] for the one exception).

    Images may be added at any time; one with the content of another costs no encoder pass. Results do not depend on the
    order of the images.

    ```python
    >>> collection = Collection(model, processor)
    >>> collection.add(images)
    >>> result = collection.segment()           # masks
    >>> matches = match_collection(collection)  # transforms of all pairs
    ```

    Args:
        model: a [`MaCoSNetForKeypointMatching`], in evaluation mode.
        processor: its image processor.
        batch_size: images in one encoder pass; by default one on the CPU, where more are no faster, else 16.
        skip_memory: bytes for the maps of the skip connections.
        orientations: `"none"` takes all images as they are; `"mirror"` finds out which of them face the other way
            ([`facing_sides`](orientation.py)), at the cost of one more encoder pass an image, of its mirror image.
            Masks and transforms are then found with all images facing one way, and given for the images as they are.

    Raises:
        InputError: if `batch_size` is not positive, or for unknown orientations.
    """

    def __init__(
        self,
        model: MaCoSNetForKeypointMatching,
        processor: MaCoSNetImageProcessor,
        *,
        batch_size: int | None = None,
        skip_memory: int = _SKIP_MEMORY,
        orientations: str = "none",
    ):
        check_orientations(orientations, COLLECTION_ORIENTATIONS)
        if batch_size is None:
            batch_size = 1 if model.device.type == "cpu" else 16
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}.")
        self.model, self.processor = model, processor
        self.images = ImageList()
        self.keys: list[str] = []
        self._batch_size = batch_size
        self.encoded = EncodedImages(skip_memory)
        self.find_mirrored = orientations == "mirror"
        self._orientations: Tensor | None = None
        self._mirror_keys: dict[str, str] = {}  # of each image's mirror image, where that is encoded

    def __len__(self) -> int:
        return len(self.images)

    def add(self, images: Sequence[Image.Image], *, progress: Progress | None = None) -> list[int]:
        """Adds images and returns their numbers.

        Args:
            images: of any mode, also with EXIF. Copies a few times larger than the network's input serve as well.
            progress: called with (done, total) after each batch.
        """
        numbers = list(range(len(self), len(self) + len(images)))
        for start in range(0, len(images), self._batch_size):
            some = [as_upright_rgb(image) for image in images[start : start + self._batch_size]]
            pixels = self._pixels(some)
            keys = [content_key(image) for image in pixels]
            new = {key: row for row, key in enumerate(keys) if key not in self.encoded}
            if new:
                self._encode(pixels[list(new.values())], list(new))
            self.images.extend(some)
            self.keys += keys
            if progress is not None:
                progress(start + len(some), len(images))
        return numbers

    def hold_stored(self, images: Sequence[StoredImage], keys: Sequence[str], encoded: Sequence[EncodedImage]) -> None:
        """Replaces the images, if there are any, by images in files and what the encoder says of them.

        Args:
            images, keys, encoded: of the same images in one order, if there are any; `keys` as of [`content_key`].
        """
        self.images, self.keys = ImageList(images), list(keys)
        self.encoded = self.encoded.replaced(dict(zip(keys, encoded, strict=True)))
        self._mirror_keys, self._orientations = {}, None

    def subset(self, numbers: Sequence[int]) -> Collection:
        """A collection of some of the images; none is encoded again."""
        part = Collection(self.model, self.processor, batch_size=self._batch_size)
        part.images, part.keys = self.images.select(numbers), [self.keys[number] for number in numbers]
        part.encoded = self.encoded
        part.find_mirrored, part._mirror_keys = self.find_mirrored, dict(self._mirror_keys)
        if self._orientations is not None and len(self._orientations) == len(self):
            part._orientations = self._orientations[list(numbers)]
        return part

    @property
    def orientations(self) -> Tensor:
        """Numbers `(N,)` in [`SYMMETRIES`](geometry.py) of the symmetries that the images show the object moved by.

        0 (identity) or 4 (mirror), relative to the other images; see [`facing_sides`](orientation.py).
        """
        if self._orientations is None or len(self._orientations) != len(self):
            mirrored = torch.zeros(len(self), dtype=torch.bool)
            if self.find_mirrored and len(self) > 1:
                own, other = self._maps_of_both()
                sides = facing_sides(own, other, choose_partners(own, _FACING_PARTNERS)[0])
                # The side of most images counts as the right one; of equally many, that of an image which the order
                # of the images does not choose.
                first = min(range(len(self)), key=lambda number: (sides[number] == 0, self.keys[number]))
                mirrored = sides * (sides.sum() or sides[first]) < 0
            self._orientations = mirrored * _MIRROR
        return self._orientations

    def oriented(self) -> Collection:
        """The same with all images facing one way: mirror images in place of those that face the other way."""
        part = self.subset(range(len(self)))
        part.find_mirrored, part._orientations = False, None
        for number in self.orientations.nonzero().flatten().tolist():
            part.images[number] = ImageOps.mirror(self.images[number])
            part.keys[number] = self._mirror_keys[self.keys[number]]
        return part

    def _maps_of_both(self) -> tuple[FeatureMaps, FeatureMaps]:
        """Stride-16 maps of the images, and of their mirror images, which are encoded where needed."""
        for start in range(0, len(self), self._batch_size):
            numbers = range(start, min(start + self._batch_size, len(self)))
            new = {self.keys[number]: number for number in numbers if self.keys[number] not in self._mirror_keys}
            if new:
                pixels = self._pixels([self.images[number] for number in new.values()]).flip(-1)
                keys = [content_key(image) for image in pixels]
                self._mirror_keys |= zip(new, keys, strict=True)
                unknown = {key: row for row, key in enumerate(keys) if key not in self.encoded}
                if unknown:
                    self._encode(pixels[list(unknown.values())], list(unknown))
        mirrors = [self._mirror_keys[key] for key in self.keys]
        return self._maps(self.keys), self._maps(mirrors)

    def _maps(self, keys: Sequence[str]) -> FeatureMaps:
        return self.encoded.maps(keys, self.model.dtype, self.model.device)

    @property
    def maps(self) -> FeatureMaps:
        """Stride-16 maps `(N, C, h, w)` of all images, of which a few at a time are in memory."""
        return self._maps(self.keys)

    def features(self, numbers: Sequence[int]) -> MaCoSNetFeatures:
        """Stride-16 features of some of the images, without skips."""
        (last,) = self._maps([self.keys[number] for number in numbers]).split(len(numbers))
        return MaCoSNetFeatures.from_map(last)

    def pixel_values(self, numbers: Sequence[int]) -> Tensor:
        """`(n, 3, S, S)` input of the encoder, on the model's device."""
        return self._pixels([self.images[number] for number in numbers]).to(self.model.device)

    @_accept_old_keywords(common="propagate", closer="second_pass")
    @torch.inference_mode()
    def segment(
        self,
        *,
        partners: int = 2,
        propagate: bool = True,
        refine: str = "none",
        second_pass: bool = True,
        workers: int = 2,
        progress: Progress | None = None,
        hints: Mapping[int, Hint | PlacedHint] | None = None,
        instances: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> CollectionResult:
        """Soft masks of the object that the images have in common.

        1. The decoder sees each image with each of its partners; the mean of these masks is its first mask. A decoder
           of common objects sees all partners at once; an image that shares no object with them becomes its own
           partner, and the next steps leave it alone.
        2. Mask propagation ([`~.mask_sharing.NetworkMasks`]): half of each mask comes from the cells of other images
           that resemble its own cells most. A part that is object in one image only finds no support there.
        3. With `refine`, a second pass on crops: images with a small object are cropped to it and encoded, and both
           steps are repeated. (Nothing else encodes an image twice.) An image in whose crop no object is found stays
           whole.
        4. With `refine`, these masks are refined by each image's own colours and propagated once more
           ([`~.mask_sharing.propagate_refined`]); small components are dropped. The object is where the result is 0.5
           or more: refine it no further.

        Args:
            partners: how many others the decoder compares each image with.
            propagate: whether to do the second step (`common` in version 0.1).
            refine: one of `refinement.REFINEMENT_METHODS`, for the last two steps; `"none"` leaves them out.
            second_pass: whether to do the third step (`closer` in version 0.1).
            workers: threads that refine.
            progress: called with (done, total) after each image of the first step, of the third if there is one,
                and of the fourth; may raise to stop the work.
            hints: what a person says of the object, by the number of the image ([`~.hints.Hint`]). It changes the
                first masks of all images through their features ([`~.hints.HintedCells`]); the masks of the hinted
                images also have the points and the box as they are given.
            instances: whether to tell the objects of each image apart ([`~.instances.split_instances`]).

        Raises:
            InputError: for fewer than two images, no partner, an unknown refinement, or a hint that cannot be used.
        """
        check_options(len(self), partners, refine)
        placed = place_hints(hints or {}, self.images.sizes)
        mirrored = self.orientations.numpy() > 0
        turned = {number: hint.mirrored() if mirrored[number] else hint for number, hint in placed.items()}
        facing = self.oriented() if mirrored.any() else self
        found = facing._segment(turned, partners, propagate, refine, second_pass, workers, progress)
        found.probabilities[mirrored] = found.probabilities[mirrored, :, ::-1]
        if instances:
            found.instances = split_instances(torch.from_numpy(found.probabilities), self.maps)
        return replace(found, collection=self)

    def segment_some(
        self,
        numbers: Sequence[int],
        *,
        company: int | None = None,
        hints: Mapping[int, Hint | PlacedHint] | None = None,
        **options: Any,
    ) -> CollectionResult:
        """[`segment`] for some of the images, such as those that were added last: the others serve as partners.

        They are segmented together with the four others that are most similar to each, eight in all at least, and with
        the hinted images. So it takes the time and memory of these images alone.

        Args:
            numbers: of the images whose masks are wanted.
            company: how many others, at most.
            hints, options: as in [`segment`].

        Raises:
            InputError: as in [`segment`], and for a number that is none of an image, or no number.
        """
        check_options(len(self), options.get("partners", 2), options.get("refine", "none"))
        wanted = list(dict.fromkeys(numbers))
        if not wanted or not all(0 <= number < len(self) for number in wanted):
            raise InputError(f"numbers must be some of 0 to {len(self) - 1}; got {list(numbers)!r:.80}.")
        placed = place_hints(hints or {}, self.images.sizes)
        others = choose_company(unit_pooled(self.maps), wanted, company)
        seen = list(dict.fromkeys((*wanted, *placed, *others)))
        places = {number: place for place, number in enumerate(seen)}
        asked = {places[number]: hint for number, hint in placed.items()}
        part = self.subset(seen)
        part.encoded = self.encoded.more()  # what is computed again for these images does not stay
        found = part.segment(hints=asked, **options)
        count = len(wanted)
        return CollectionResult(
            probabilities=found.probabilities[:count],
            partners=[[seen[place] for place in several] for several in found.partners[:count]],
            agreement=found.agreement[:count],
            collection=self,
            common=None if found.common is None else found.common[:count],
            instances=None if found.instances is None else found.instances[:count],
            numbers=wanted,
        )

    def segment_blocks(
        self, numbers: Sequence[int] | None = None, *, block_size: int = _BLOCK_SIZE, **options: Any
    ) -> Iterator[CollectionResult]:
        """[`segment_some`] for blocks of similar images with eight others each; memory does not grow with their number.

        Args:
            numbers: of the images whose masks are wanted, each of which is in one block; all by default.
            block_size: images of a block, at most.
            options: as in [`segment`].

        Raises:
            InputError: as in [`segment_some`], or for a block of no image.
        """
        if block_size < 1:
            raise InputError(f"block_size must be at least 1, not {block_size}.")
        wanted = range(len(self)) if numbers is None else numbers
        if not all(0 <= number < len(self) for number in wanted):
            raise InputError(f"numbers must be some of 0 to {len(self) - 1}; got {list(wanted)!r:.80}.")
        for block in similar_blocks(unit_pooled(self.maps), wanted, block_size):
            yield self.segment_some(block, company=LEAST_COMPANY, **options)

    def _segment(
        self,
        hints: Mapping[int, PlacedHint],
        partners: int,
        propagate: bool,
        refine: str,
        second_pass: bool,
        workers: int,
        progress: Progress | None,
    ) -> CollectionResult:
        """[`segment`] for images that face one way."""
        steps = 1 if refine == "none" else 2 + second_pass

        def report(step: int, done: int) -> None:
            if progress is not None:
                progress(step * len(self) + done, steps * len(self))

        first = self.first_pass(partners, propagate, partial(report, 0), hints=hints)
        masks = fix_hints(first.masks.propagated, hints)
        if refine != "none":
            crops = Crops(self.images, [None] * len(self), first.masks, hints)
            if second_pass:

                def look_at(boxes: Sequence[Box | None]) -> tuple[Sequence[Image.Image], NetworkMasks]:
                    cropped = self._cropped(boxes, partial(report, 1, 0))
                    places = [box and shares_of(box, masks.shape[-1]) for box in boxes]
                    found = cropped.first_pass(
                        partners,
                        propagate,
                        partial(report, 1),
                        common=first.common,
                        hinted=first.hinted,
                        boxes=places,
                    )
                    return cropped.images, found.masks

                crops = crop_to_objects(crops, look_at)
            masks = refine_crops(crops, refine, workers=workers, progress=partial(report, steps - 1), hints=hints)
        return CollectionResult(
            probabilities=masks.cpu().numpy(),
            partners=first.partners,
            agreement=first.agreement.cpu().numpy(),
            collection=self,
            common=(first.common & self._show_something()).cpu().numpy(),
        )

    def _show_something(self) -> Tensor:
        """`(N,)` bool, whether there is anything to see in an image."""
        side = self.model.config.predictor_grid
        parts = [MaCoSNetFeatures.from_map(part).on_grid(side).last for part in self.maps.split(16)]
        return torch.cat([feature_structure(part) for part in parts]) >= LEAST_STRUCTURE

    @torch.inference_mode()
    def first_pass(
        self,
        partners: int = 2,
        propagate: bool = True,
        progress: Callable[[int], None] | None = None,
        *,
        common: Tensor | None = None,
        hints: Mapping[int, PlacedHint] | None = None,
        hinted: HintedCells | None = None,
        boxes: Sequence[Rectangle | None] | None = None,
    ) -> FirstPass:
        """Masks by the first two steps of [`segment`].

        Args:
            partners, propagate: as in [`segment`].
            progress: called with the number of images that are done.
            common: `(N,)` bool, which images have an object in common with their partners, where it is known already.
            hints: by the number of the image.
            hinted, boxes: for crops, what the hints say of the whole images, and the crops' boxes in shares of them.
        """
        last = self.maps
        nearest = range(min(SIMILAR_PARTNERS, len(self) - 1))
        ranks = spread_ranks(len(self) - 1, partners)
        others, _ = rank_others(unit_pooled(last), [*nearest, *ranks])
        others, chosen = others[:, : len(nearest)], others[:, len(nearest) :]
        asked = list(hinted.hints if hinted else hints or {})
        own = self.decoder_masks(chosen.tolist(), progress)
        if asked:
            hinted = hinted or HintedCells.of(last, own, hints or {})
            own = hinted.apply(own, hinted.about(last, boxes))
        agreement, to_chosen = _object_agreement(object_means(last, own), chosen)
        if common is None:
            common = to_chosen >= COMMON_SIMILARITY
        common = common.to(agreement.device)
        listens = self.model.config.decoder_inputs == "common"
        cells = similar_cells(last, others, LEAST_SIMILARITY if listens else None) if propagate else None
        if listens and not common.all():
            for number in torch.nonzero(~common).flatten().tolist():
                if number not in asked:
                    own[number] = self.salient_mask(number)
            cells = cells and cells.without(~common)
        return FirstPass(NetworkMasks.of(own, cells), chosen.tolist(), agreement, common, hinted)

    def salient_mask(self, number: int) -> Tensor:
        """`(S, S)` soft mask of what stands out in an image: it is its own partner."""
        return self.subset([number]).decoder_masks([[0]])[0]

    def _cropped(self, boxes: Sequence[Box | None], progress: Callable[[], None]) -> Collection:
        """The same images, cropped where there is a box; whole ones are not encoded again."""
        cropped = self.subset([])
        cropped.encoded = self.encoded.more()  # the crops may hold as many maps as the images do
        side = self.model.config.image_size
        crops = [crop_to_box(image, box, side) for image, box in zip(self.images, boxes, strict=True)]
        cropped.add(crops, progress=lambda *_: progress())
        return cropped

    @torch.inference_mode()
    def decoder_masks(self, chosen: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None) -> Tensor:
        """The decoder's soft masks `(N, S, S)` of all images, each given the partners whose numbers are listed."""
        config = self.model.config
        rounds = 1 if config.decoder_inputs == "paper" else config.decoder_rounds
        weights = None
        found = torch.empty(len(chosen), config.image_size, config.image_size, device=self.model.device)
        for step in range(rounds):
            for number, several in enumerate(chosen):
                if config.decoder_inputs == "paper":
                    found[number] = self.mean_mask(number, several)
                else:
                    found[number] = self.common_mask(number, several, weights)
                if progress is not None:
                    progress((step * len(self) + number + 1) // rounds)
            weights = object_weights(found)
        return found

    def common_mask(self, number: int, partners: Sequence[int], weights: Tensor | None = None) -> Tensor:
        """`(S, S)` soft mask of what an image has in common with its partners together, all given by their numbers.

        Args:
            weights: `(N, h, w)`, where the object of each image is assumed; the middle of the images if not given.
        """
        seen = [number, *partners]
        others = torch.arange(1, len(seen), device=self.model.device).unsqueeze(0)
        logits = self.model.macosnet.predict_common_masks(
            self.features(seen),
            others,
            index=torch.zeros(1, dtype=torch.long, device=self.model.device),
            own_weights=None if weights is None else weights[seen[:1]],
            partner_weights=None if weights is None else weights[seen[1:]].unsqueeze(0),
            projected=self._skips(number),
        )
        return soft_masks(logits[0])

    def _skips(self, number: int) -> tuple[Tensor, ...]:
        """Projected maps `(1, c, H/s, W/s)` of an image; made again where there was no room for them."""
        key = self.keys[number]
        skips = self.encoded[key].skips
        if skips is None:
            skips = self._project(self.pixel_values([number]))[1][0]
            self.encoded.keep_skips(key, skips)
        return tuple(skip.to(self.model.dtype).unsqueeze(0) for skip in skips)

    def mean_mask(self, number: int, partners: Sequence[int]) -> Tensor:
        """`(S, S)` soft mask of an image: the mean over its K partners, all given by their numbers."""
        own, source = self.features([number]), self.features(partners).normalized
        correlation = correlate(source, own.normalized.expand_as(source))
        index = torch.zeros(len(partners), dtype=torch.long, device=correlation.device)
        logits: Tensor = self.model.macosnet.decoder(own, correlation, index, self._skips(number))
        return soft_masks(logits).mean(dim=0)

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        pixels: Tensor = self.processor.preprocess_views(images, return_tensors="pt")["pixel_values"]
        return pixels

    @torch.inference_mode()
    def _project(self, pixels: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Stride-16 maps `(n, C, h, w)` of n images, and the projected skips of each."""
        features = self.model.macosnet.get_image_features(pixels.to(self.model.device))
        projected = self.model.macosnet.decoder.project_skips(features.skips)
        return features.last, [tuple(level[row].clone() for level in projected) for row in range(len(pixels))]

    def _encode(self, pixels: Tensor, keys: list[str]) -> None:
        last, skips = self._project(pixels)
        for row, key in enumerate(keys):
            self.encoded.add(key, last[row].clone(), skips[row])


def content_key(image: Tensor) -> str:
    """Text that is equal for equal pixels only."""
    return hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()


@_accept_old_keywords(closer="second_pass")
def segment_collection(
    images: Sequence[Image.Image],
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    partners: int = 2,
    refine: str = "none",
    second_pass: bool = True,
    batch_size: int | None = None,
    skip_memory: int = _SKIP_MEMORY,
    orientations: str = "none",
    progress: Progress | None = None,
    hints: Mapping[int, Hint | PlacedHint] | None = None,
    instances: bool = False,
) -> CollectionResult:
    """Soft masks of the object that N images have in common: a [`Collection`] in one call.

    Args:
        images: two or more, as in [`Collection.add`].
        partners, refine, second_pass, progress, hints, instances: as in [`Collection.segment`].
        batch_size, skip_memory, orientations: as in [`Collection`].

    Raises:
        InputError: for fewer than two images, or options that cannot be used.
    """
    check_options(len(images), partners, refine)
    images = [as_upright_rgb(image) for image in images]
    place_hints(hints or {}, [image.size for image in images])
    collection = Collection(model, processor, batch_size=batch_size, skip_memory=skip_memory, orientations=orientations)
    collection.add(images)
    return collection.segment(
        partners=partners,
        refine=refine,
        second_pass=second_pass,
        progress=progress,
        hints=hints,
        instances=instances,
    )


def check_options(count: int, partners: int = 2, refine: str = "none") -> None:
    """Raises `InputError` for fewer than two images, no partner, or an unknown refinement."""
    if count < 2:
        raise InputError("Co-segmentation needs two or more images.")
    if not isinstance(partners, int) or partners < 1:
        raise InputError(f"partners must be a whole number of at least 1; got {partners!r}.")
    check_method(refine)


def _object_agreement(unit: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of N images, mean cosine similarities of the object: to those of the four most similar ones `(N,)`, and to those
    of the partners `(N,)`.

    Args:
        unit: `(N, C)`, see [`~.mask_sharing.object_means`].
        chosen: `(N, K)` numbers of the partners.
    """
    count = min(_AGREEMENT_PARTNERS, len(unit) - 1)
    rows = [
        (similarity.topk(count, dim=1).values.mean(dim=1), similarity.gather(1, chosen[some]).mean(dim=1))
        for some, similarity in similarity_rows(unit)
    ]
    agreement, to_chosen = zip(*rows, strict=True)
    return torch.cat(agreement), torch.cat(to_chosen)


def odd_ones_out(agreement: np.ndarray) -> list[int]:
    """The numbers of images that agree much less than the others, the oddest first; none of fewer than four images.

    An image is odd if its agreement lies below the median of the *others* by more than 0.15 and by more than three
    times their spread (median absolute deviation, scaled to a standard deviation). In 11 of 12 collections of
    msrc-coseg, seven images of one class and one of another, the embedded checkpoint names the other one first.

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


def hard_mask(probability: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Hard mask `(H, W)` bool of an image of `size` (height, width), from its soft mask `(S, S)` in [0, 1].

    As `post_process_cosegmentation` of the image processor, which enlarges the soft mask as a whole; in strips of
    columns the memory is bounded.
    """
    height, width = size
    wide = resize_masks(torch.from_numpy(probability)[None], (probability.shape[0], width))
    strips = wide.split(max(1, _ENLARGED_PIXELS // height), dim=-1)
    hard = [resize_masks(strip, (height, strip.shape[-1]))[0] >= 0.5 for strip in strips]
    mask: np.ndarray = torch.cat(hard, dim=-1).numpy()
    return mask
