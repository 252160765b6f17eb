"""Predictors turn records into predictions. Each image is encoded once and cached for all of its pairs.

A *prediction* is a dictionary of NumPy arrays, what scoring needs:

| key | shape | meaning |
|---|---|---|
| `sizes` | (2, 2) int | (height, width) of source and target |
| `points/<variant>` | (N, 2) float32 | transferred keypoints, pixels of the image they were transferred to |
| `field/<variant>` | (40, 40, 2) float32 | relative place in the source of a grid over the target, from edge to edge |
| `mask/target` | (240, 240) float32 | probability of object in the target (or in the single image) |
| `refined/target` | (240, 240) float32 | with `--masks collection`: the same after refinement in the collection |
| `partner` | () string | single images: id of the record that the field leads to |

A *variant* is a way to transfer a point. The model has `transform` (the bare geometric transform), `fitted` (fitted to
the matches on which both directions agree, where the configuration has `mutual_fit`) and `local` (the best feature
match near it); each baseline has its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Transpose

from ..datasets.images import open_image
from ..datasets.schema import Record, keypoint_array
from ..errors import InputError
from ..geometry import (
    SYMMETRIES,
    Transform,
    compose_symmetries,
    denormalize_points,
    inverse_symmetry,
    make_grid,
    normalize_points,
    normalize_relative,
    relative_points,
    relative_to_pixels,
    seen_through,
)
from ..inference import COLLECTION_SIDE, start_of
from ..matching import correlate, fit_mutually, match_locally
from ..modeling_macosnet import MaCoSNetFeatures
from ..orientation import HYPOTHESES, choose, mirrors, orientation_scores

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Prediction = dict[str, np.ndarray]

FIELD_SIDE = 40
"""Side of the stored grid of a dense transfer, which is interpolated bilinearly."""

Symmetries = tuple[str, str]
"""By which of `SYMMETRIES` source and target are moved before they are matched."""

# Pillow's names of the moves; its turns are counter-clockwise.
_MOVES = {
    "turn_90": "ROTATE_270",
    "turn_180": "ROTATE_180",
    "turn_270": "ROTATE_90",
    "mirror": "FLIP_LEFT_RIGHT",
    "flip": "FLIP_TOP_BOTTOM",
    "transpose": "TRANSPOSE",
    "anti_transpose": "TRANSVERSE",
}

MASK_SIDE = 240
"""Side of the network's input and of a stored mask where no model sets it."""

CACHE_BYTES = 768 * 2**20
"""Size of the cache of encoded images; the least recently used one is removed first."""


@dataclass
class EncodedImage:
    """What a predictor knows of one image before it is paired.

    Attributes:
        size: (height, width) of the original.
        features: encoder's features of this image alone (N = 1); predictors without an encoder have and ask for none.
        pixel_values: `(1, 3, H, W)`, for the exact cascade.
    """

    size: tuple[int, int]
    features: MaCoSNetFeatures = None  # type: ignore[assignment]
    pixel_values: Tensor | None = None

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [] if self.pixel_values is None else [self.pixel_values]
        if self.features is not None:
            tensors += [self.features.last, self.features.normalized, *(self.features.skips or ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None) + 256


class ImageCache:
    """Least-recently-used cache of encoded images, bounded in bytes.

    Attributes:
        encoded: how many images were encoded.
    """

    def __init__(self, limit: int = CACHE_BYTES):
        self.limit = limit
        self.encoded = 0
        self._entries: OrderedDict[str, EncodedImage] = OrderedDict()
        self._bytes = 0

    def get(self, key: str, make: Callable[[], EncodedImage]) -> EncodedImage:
        """The entry of that key, made if it is not there."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        entry = make()
        self.encoded += 1
        self._entries[key] = entry
        self._bytes += entry.nbytes()
        while self._bytes > self.limit and len(self._entries) > 1:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.nbytes()
        return entry


class Predictor:
    """Base class of the model and the baselines.

    Attributes:
        name: for tables and the JSON.
        variants: ways to transfer a point, the default one first.
        gives_points, gives_masks: whether it transfers points, and predicts masks.
        device: of the tensors that `map_points` takes.
        side: S of the network in whose normalised coordinates they are.
        max_side: images of pairs whose longer side is longer are reduced to it, in pixels; `None` for none.
    """

    name = "predictor"
    variants: tuple[str, ...] = ()
    gives_points = False
    gives_masks = False
    device: Any = "cpu"
    side = MASK_SIDE
    max_side: int | None = None

    def __init__(self) -> None:
        self.cache = ImageCache()

    def describe(self) -> dict[str, object]:
        """What the predictions depend on; two predictors with equal descriptions predict the same."""
        raise TypeError(f"{type(self).__name__} must describe itself.")

    def fingerprint(self) -> str:
        """SHA-256 of the description."""
        text = json.dumps(self.describe(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, image: Image.Image) -> EncodedImage:
        """Encodes an image. The base class needs its size only."""
        return EncodedImage(size=(image.height, image.width))

    def map_points(self, start: EncodedImage, end: EncodedImage, points: Tensor) -> dict[str, Tensor]:
        """Transfers normalised points `(B, N, 2)` of the images `start` (batched) to the images `end`, by variant."""
        return {}

    def predict_masks(self, images: list[EncodedImage], partners: list[EncodedImage]) -> np.ndarray:
        """Probabilities `(B, H, W)` of the object in each image, given its partner."""
        raise InputError(f"{self.name} gives no masks.")

    def batch(self, images: list[EncodedImage]) -> EncodedImage:
        """Joins images along the batch dimension. The base class has nothing to join."""
        return images[0]

    # -- from records ---------------------------------------------------------------------------------------------

    def image(self, record: Record, side: str, symmetry: str = "identity") -> EncodedImage:
        """The encoded image of one side of a record, moved by one of `SYMMETRIES`, cached. Its size is that of the
        stored image.

        Raises:
            DataError: if the image is missing or damaged.
        """
        key = record.get(f"{side}_id") or f"{record['id']}/{side}"

        def encode() -> EncodedImage:
            image = open_image(record[f"{side}_image"], f"{record['id']}, {side}_image")
            size = (image.height, image.width)
            if self.max_side is not None:
                image.thumbnail((self.max_side, self.max_side))
            if symmetry != "identity":
                image = image.transpose(Transpose[_MOVES[symmetry]])
            return replace(self.encode(image), size=size)

        shown = [symmetry] * (symmetry != "identity") + [f"{self.max_side} pixels"] * (self.max_side is not None)
        return self.cache.get(" ".join([key, *shown]), encode)

    def orient(self, records: Sequence[Record], symmetries: Sequence[Symmetries]) -> Sequence[Symmetries]:
        """How the images of pairs are best shown to this predictor, given that the images are moved by `symmetries`."""
        return symmetries

    def predict_pairs(
        self,
        records: Sequence[Record],
        *,
        direction: str | None,
        dense: bool,
        masks: bool,
        moved: str = "identity",
        flips: bool = True,
    ) -> list[Prediction]:
        """Predictions of a batch of pair records.

        Args:
            records: pairs whose images can be opened.
            direction: in which keypoints are transferred, `None` for no keypoints.
            dense: whether to add the fields.
            masks: whether to add the target's mask, given the source.
            moved, flips: as in [`source_symmetry`].

        Predictions are always in the coordinates of the stored images.
        """
        if direction is not None:
            start_of(direction)
        symmetries = self.orient(
            records,
            [(source_symmetry(record, moved, flips), "identity") for record in records],
        )
        sources, targets = (
            [self.image(record, side, names[view]) for record, names in zip(records, symmetries, strict=True)]
            for view, side in enumerate(("source", "target"))
        )
        predictions: list[Prediction] = [
            {"sizes": np.asarray([source.size, target.size], dtype=np.int32)}
            for source, target in zip(sources, targets, strict=True)
        ]
        if self.gives_points and direction is not None:
            self._add_points(predictions, records, sources, targets, symmetries, direction)
        if self.gives_points and dense:
            self._add_fields(predictions, sources, targets, symmetries)
        if self.gives_masks and masks:
            found = self.predict_masks(targets, sources)
            for prediction, probability, (_, name) in zip(predictions, found, symmetries, strict=True):
                # The mask of the moved target, which shows at R p what belongs to p.
                prediction["mask/target"] = seen_through(torch.from_numpy(probability), name).numpy()
        return predictions

    def predict_images(
        self,
        records: Sequence[Record],
        partners: Sequence[Sequence[int]],
        *,
        batch_size: int,
        dense: bool,
        collection: str | None = None,
    ) -> list[Prediction]:
        """Predictions of a group of single images of one class, segmented in pairs.

        Args:
            records: the group; its images can be opened.
            partners: for each image the indices of its partners; its mask is the mean probability over them.
            batch_size: pairs at a time.
            dense: whether to add the field that leads from each image to its first partner.
            collection: refinement of the group as one collection; `None` to segment pairs.

        Raises:
            InputError: if the predictor cannot segment collections.
        """
        images = [self.image(record, "source") for record in records]
        predictions: list[Prediction] = []
        for index, others in enumerate(partners):
            sizes = np.asarray([images[others[0]].size, images[index].size], dtype=np.int32)
            predictions.append({"sizes": sizes, "partner": np.asarray(records[others[0]]["id"])})
        pairs = [(index, other) for index, others in enumerate(partners) for other in others]
        if self.gives_masks and collection is not None:
            found = self.predict_collection(records, refine=collection)
            for prediction, soft, refined in zip(predictions, *found, strict=True):
                prediction |= {"mask/target": soft, "refined/target": refined}
        elif self.gives_masks:
            sums: list[Any] = [0.0] * len(records)
            for start in range(0, len(pairs), batch_size):
                part = pairs[start : start + batch_size]
                masks = self.predict_masks([images[i] for i, _ in part], [images[j] for _, j in part])
                for (index, _), mask in zip(part, masks, strict=True):
                    sums[index] = sums[index] + mask.astype(np.float64)
            for index, prediction in enumerate(predictions):
                prediction["mask/target"] = (sums[index] / len(partners[index])).astype(np.float32)
        if self.gives_points and dense:
            for start in range(0, len(records), batch_size):
                end = start + batch_size
                self._add_fields(
                    predictions[start:end],
                    [images[others[0]] for others in partners[start:end]],
                    images[start:end],
                    [("identity", "identity")] * len(predictions[start:end]),
                )
        return predictions

    def predict_collection(self, records: Sequence[Record], *, refine: str) -> tuple[np.ndarray, np.ndarray]:
        """Soft masks `(N, S, S)` of a group of images as one collection, before and after refinement.

        Raises:
            InputError: if the predictor cannot segment collections.
        """
        raise InputError(f"{self.name} segments single pairs only: leave out --masks collection.")

    def answer(
        self, image: Image.Image, companies: Sequence[Sequence[Image.Image]], refine: str | None = None
    ) -> list[np.ndarray]:
        """Soft masks `(S, S)` of what an image has in common with the partners of each company.

        Args:
            image: upright RGB, as all others.
            companies: one or more partners each.
            refine: refinement of the image and its partners as one collection; `None`: the decoder's own mask.

        Raises:
            InputError: if the predictor looks at no partner.
        """
        raise InputError(f"{self.name} looks at no partner, so it cannot be asked for one object or the other.")

    def _add_points(
        self,
        predictions: list[Prediction],
        records: Sequence[Record],
        sources: list[EncodedImage],
        targets: list[EncodedImage],
        symmetries: Sequence[Symmetries],
        direction: str,
    ) -> None:
        forward = direction == "source_to_target"
        start, end = (sources, targets) if forward else (targets, sources)
        side = "source" if forward else "target"
        first, last = (0, 1) if forward else (1, 0)
        points = [
            _move(
                normalize_points(torch.from_numpy(keypoint_array(record, side)), image.size, self.side).numpy(),
                names[first],
            )
            for record, image, names in zip(records, start, symmetries, strict=True)
        ]
        longest = max(map(len, points))
        if longest == 0:
            return
        padded = np.zeros((len(points), longest, 2), dtype=np.float32)
        for index, array in enumerate(points):
            padded[index, : len(array)] = array
        with torch.inference_mode():
            tensor = torch.from_numpy(padded).to(self.device)
            mapped = self.map_points(self.batch(start), self.batch(end), tensor)
        for variant, tensor in mapped.items():
            for index, prediction in enumerate(predictions):
                own = tensor[index, : len(points[index])].cpu().double().numpy()
                moved = torch.from_numpy(_move(own, inverse_symmetry(symmetries[index][last])))
                prediction[f"points/{variant}"] = denormalize_points(moved, end[index].size, self.side).float().numpy()

    def _add_fields(
        self,
        predictions: list[Prediction],
        sources: list[EncodedImage],
        targets: list[EncodedImage],
        symmetries: Sequence[Symmetries],
    ) -> None:
        edges = (make_grid(FIELD_SIDE, FIELD_SIDE) + 1) / 2
        places = normalize_relative(edges, self.side).reshape(-1, 2).numpy()
        grid = torch.from_numpy(np.stack([_move(places, name) for _, name in symmetries])).to(self.device)
        with torch.inference_mode():
            mapped = self.map_points(self.batch(targets), self.batch(sources), grid)
        for variant, tensor in mapped.items():
            fields = tensor.float().cpu().numpy().reshape(-1, FIELD_SIDE, FIELD_SIDE, 2)
            for index, prediction in enumerate(predictions):
                own = _move(fields[index], inverse_symmetry(symmetries[index][0]))
                prediction[f"field/{variant}"] = relative_points(torch.from_numpy(own), self.side).numpy()


class FeaturePredictor(Predictor):
    """A predictor that uses the encoder of a MaCoSNet model.

    Args:
        model: [`MaCoSNetModel`] or [`MaCoSNetForKeypointMatching`].
        processor: its image processor.
    """

    def __init__(self, model: Any, processor: Any):
        super().__init__()
        self.model = getattr(model, "macosnet", model).eval()
        self.processor = processor
        self.device, self.side = self.model.device, self.model.config.image_size
        self.keep_skips = False
        self.keep_pixels = False
        self._weights: str | None = None

    def describe(self) -> dict[str, object]:
        if self._weights is None:
            self._weights = weights_hash(self.model)
        config = self.model.config.to_dict()
        for key in ("transformers_version", "_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype"):
            config.pop(key, None)
        processor = self.processor.to_dict()
        for key in ("auto_map", "_name_or_path", "_processor_class", "transformers_version"):
            processor.pop(key, None)
        return {"weights": self._weights, "config": config, "processor": processor}

    def encode(self, image: Image.Image) -> EncodedImage:
        pixel_values = self.processor.preprocess_views(image, return_tensors="pt")["pixel_values"].to(self.device)
        # One image at a time: on a CPU a batch is no faster, and features must not depend on which images were
        # encoded together, or several processes would not give the same figures.
        with torch.inference_mode():
            features = self.model.get_image_features(pixel_values)
        if not self.keep_skips:
            features = MaCoSNetFeatures(last=features.last, normalized=features.normalized, skips=())
        return EncodedImage(
            size=(image.height, image.width),
            features=features,
            pixel_values=pixel_values if self.keep_pixels else None,
        )

    def batch(self, images: list[EncodedImage]) -> EncodedImage:
        features = [image.features for image in images]
        pixels = [image.pixel_values for image in images if image.pixel_values is not None]
        skips = tuple(
            torch.cat([feature.skips[level] for feature in features]) for level in range(len(features[0].skips or ()))
        )
        return EncodedImage(
            size=images[0].size,
            features=MaCoSNetFeatures(
                last=torch.cat([feature.last for feature in features]),
                normalized=torch.cat([feature.normalized for feature in features]),
                skips=skips,
            ),
            pixel_values=torch.cat(pixels) if pixels else None,
        )


class ModelPredictor(FeaturePredictor):
    """The model itself. Variants: `local`, with the configuration's `mutual_fit` also `fitted`, and `transform`, the
    configuration's own choice first. `variants` may be set to some of them, and to `affine`, the affine part alone.

    Args:
        model, processor: as in [`FeaturePredictor`].
        name: for tables.
        masks: whether to predict masks, for which each image's finer features are cached too.
        orientations: how sources may face, compared with their targets; by default what the configuration says.
    """

    gives_points = True
    gives_masks = True

    def __init__(
        self, model: Any, processor: Any, *, name: str = "model", masks: bool = True, orientations: str | None = None
    ):
        super().__init__(model, processor)
        self.orientations = self.model.config.orientations if orientations is None else orientations
        self.whole = model
        self.name = name
        self.keep_skips = masks
        self.gives_masks = masks
        self.keep_pixels = self.model.config.cascade == "exact"
        smooth = ("fitted", "transform") if self.model.config.mutual_fit else ("transform",)
        self.variants = ("local", *smooth) if self.model.config.local_matching else (*smooth, "local")

    def describe(self) -> dict[str, object]:
        description = super().describe()
        config = {**description["config"], "orientations": self.orientations}  # type: ignore[dict-item]
        return {**description, "config": config}

    def orient(self, records: Sequence[Record], symmetries: Sequence[Symmetries]) -> Sequence[Symmetries]:
        """As `orientation.orient` does: the hypothesis that fits best for each pair."""
        if self.orientations == "none":
            return symmetries
        hypotheses = list(itertools.product(*HYPOTHESES[self.orientations]))
        pairs = torch.arange(len(hypotheses), device=self.device)
        best = []
        for record, moved in zip(records, symmetries, strict=True):
            # x = R x_seen: the image is seen as if it were moved by R^-1 besides.
            seen = [
                [compose_symmetries(inverse_symmetry(name), moved[view]) for view, name in enumerate(names)]
                for names in hypotheses
            ]
            sides = enumerate(("source", "target"))
            images = [self.image(record, side, names[view]) for view, side in sides for names in seen]
            features = self.batch(images).features.without_skips()
            with torch.inference_mode():
                scores = orientation_scores(self.model, features, pairs, pairs + len(hypotheses))
            number = int(choose(scores[:, None], mirrors(self.orientations)))
            best.append((seen[number][0], seen[number][1]))
        return best

    def map_points(self, start: EncodedImage, end: EncodedImage, points: Tensor) -> dict[str, Tensor]:
        config = self.model.config
        own, other = start.features.normalized, end.features.normalized
        # T_ij maps points of j into i: the image where the points end is the transform's source.
        whole = self.model.predict_transforms(end.features, start.features, end.pixel_values)
        transforms = {"affine": whole.without_spline(), "transform": whole}
        around = whole
        if config.mutual_fit and {"local", "fitted"} & set(self.variants):
            back = self.model.predict_transforms(start.features, end.features, start.pixel_values)
            both = Transform.stack((whole, back), dim=1)
            features = torch.stack((other, own), dim=1)
            fitted = fit_mutually(features, both, temperature=config.local_matching_temperature)
            around = transforms["fitted"] = fitted[:, 0]
        return {
            variant: match_locally(own, other, points, around, **config.local_matching_options)
            if variant == "local"
            else transforms[variant].apply(points)
            for variant in self.variants
        }

    def predict_masks(self, images: list[EncodedImage], partners: list[EncodedImage]) -> np.ndarray:
        with torch.inference_mode():
            if self.model.config.decoder_inputs == "paper":
                own, other = self.batch(images).features, self.batch(partners).features
                # A mask is decoded from S_BA: the layout of the segmented image A, one channel per position of B.
                logits = self.model.predict_masks(own, correlate(other.normalized, own.normalized))
            else:
                features = self.batch([*images, *partners]).features
                # Every pair is followed by its reverse.
                rows = torch.arange(2 * len(images), device=features.last.device).view(2, -1)
                source, target = rows.t().flatten(), rows.flip(0).t().flatten()
                logits = self.model.predict_masks_of_pairs(features, source, target)[::2]
        return logits.float().sigmoid().cpu().numpy()

    def predict_collection(self, records: Sequence[Record], *, refine: str) -> tuple[np.ndarray, np.ndarray]:
        from ..collection import Collection

        collection = Collection(self.whole, self.processor)
        for record in records:
            # As `macosnet segment` reads it.
            where = f"{record['id']}, source_image"
            image = open_image(record["source_image"], where, reduced_to=COLLECTION_SIDE)
            image.thumbnail((COLLECTION_SIDE, COLLECTION_SIDE))
            collection.add([image])
        return collection.segment().probabilities, collection.segment(refine=refine).probabilities

    def answer(
        self, image: Image.Image, companies: Sequence[Sequence[Image.Image]], refine: str | None = None
    ) -> list[np.ndarray]:
        from ..collection import Collection

        whole, masks = Collection(self.whole, self.processor), []
        (first,) = whole.add([image])
        for company in companies:
            part = whole.subset([first, *whole.add(company)])
            if refine is not None:
                masks.append(part.segment(refine=refine).probabilities[0])
                continue
            others = [[other for other in range(len(part)) if other != number] for number in range(len(part))]
            masks.append(part.decoder_masks(others)[0].cpu().numpy())
        return masks


def weights_hash(model: Any) -> str:
    """SHA-256 over the names, types, shapes and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def source_symmetry(record: Record, moved: str = "identity", flips: bool = True) -> str:
    """By which of `SYMMETRIES` a record's source is moved before it is matched.

    Args:
        record: a pair.
        moved: by which every source is moved.
        flips: whether a source with `mirror_source` is mirrored before that.
    """
    return compose_symmetries(moved, "mirror" if flips and record.get("mirror_source") else "identity")


def _move(points: np.ndarray, symmetry: str) -> np.ndarray:
    """R p of normalised points `(..., 2)`."""
    return points @ np.asarray(SYMMETRIES[symmetry], dtype=points.dtype).T


def field_to_places(field: np.ndarray, source_size: Sequence[int], target_size: Sequence[int]) -> np.ndarray:
    """A stored field `(g, g', 2)` (relative, from edge to edge), interpolated bilinearly: the place in pixels of the
    source `(h, w, 2)` of each pixel of the target."""
    rows = _interpolation(field.shape[0], int(target_size[0]))
    columns = _interpolation(field.shape[1], int(target_size[1]))
    full = np.stack([rows @ field[..., axis].astype(np.float64) @ columns.T for axis in (0, 1)], axis=-1)
    return relative_to_pixels(torch.from_numpy(full), (int(source_size[0]), int(source_size[1]))).numpy()


def _interpolation(count: int, length: int) -> np.ndarray:
    """`(length, count)` weights of linear interpolation, from `count` points on an interval with both its ends to the
    centres of `length` pixels that cover it."""
    position = (np.arange(length) + 0.5) / length * (count - 1)
    lower = np.clip(np.floor(position).astype(int), 0, max(count - 2, 0))
    weights = np.zeros((length, count))
    fraction = position - lower
    weights[np.arange(length), lower] = 1 - fraction
    weights[np.arange(length), np.minimum(lower + 1, count - 1)] += fraction
    return weights
