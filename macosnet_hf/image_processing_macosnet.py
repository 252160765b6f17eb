"""Image processor of MaCoSNet: images to network input, network output to matches, masks and flow in pixels."""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack

from .configuration_macosnet import MaCoSNetConfig
from .drawing import draw_matches
from .errors import ImageError, InputError
from .geometry import Transform, denormalize_points, normalize_points, relative_to_pixels, resize_masks
from .images import MAX_PIXELS, as_upright_rgb, open_image, upright_rgb, white_level
from .refinement import check_method, refine_mask

_VIEWS = (2, 3)  # pairs and triplets
# Presets whose encoders were trained on images with ImageNet's mean and deviation, not with 0.5.
_IMAGENET_STATISTICS = ("paper", "vgg16", "dinov2-small", "dinov3-small")
_POINTS_PER_CHUNK = 1 << 16  # bounds the memory of the spline, some 200 bytes a point


class MaCoSNetImageProcessor(PilBackend):
    r"""Prepares pairs or triplets of images, and converts the network's outputs to pixels of the original images.

    Every image is resized to `size` whatever its aspect ratio (bilinear, antialiased), scaled to [0, 1] and normalised.
    The defaults belong to the `lite` preset; the `paper` preset has ImageNet's mean and standard deviation.

    Args:
        do_resize (`bool`, defaults to `True`): whether to resize to `size`.
        size (`dict[str, int]`, defaults to `{"height": 240, "width": 240}`): size of the network's input.
        resample (`PILImageResampling`, defaults to `BILINEAR`): filter of the resizing.
        do_rescale (`bool`, defaults to `True`): whether to multiply by `rescale_factor`.
        rescale_factor (`float`, defaults to `1 / 255`).
        do_normalize (`bool`, defaults to `True`): whether to subtract `image_mean` and divide by `image_std`.
        image_mean (`list[float]`, defaults to `[0.5, 0.5, 0.5]`), image_std (`list[float]`, defaults to `[0.5, 0.5,
        0.5]`).

    An image is a PIL image of any mode (turned upright by its EXIF orientation, transparency laid on white), a numpy
    array `(H, W)`, `(H, W, C)` or `(C, H, W)`, a torch tensor `(C, H, W)`, or a path. Arrays of integers hold 0..255.
    Floating-point arrays hold 0..1 or 0..255; values a little beyond, as a cubic filter leaves them, are clipped, and
    other ranges are refused. With `do_rescale=False` they are taken as they are.

    ```python
    >>> inputs = processor([source, target], return_tensors="pt")
    >>> outputs = model(**inputs)
    >>> sizes = [[(source.height, source.width), (target.height, target.width)]]
    >>> matches = processor.post_process_keypoint_matching(outputs, sizes)[0]
    >>> source_mask, target_mask = processor.post_process_cosegmentation(outputs, images=[source, target])[0]
    ```
    """

    valid_kwargs = ImagesKwargs
    model_input_names = ["pixel_values"]  # noqa: RUF012 (the library's own attribute)
    resample = PILImageResampling.BILINEAR
    size = {"height": 240, "width": 240}  # noqa: RUF012
    default_to_square = True
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]  # noqa: RUF012
    image_std = [0.5, 0.5, 0.5]  # noqa: RUF012
    _auto_class = "AutoImageProcessor"  # so that save_pretrained writes the code and its auto_map beside the settings

    @classmethod
    def from_preset(cls, name: str) -> MaCoSNetImageProcessor:
        """The processor for `MaCoSNetConfig.from_preset(name)`, with the statistics that its encoder was trained with.

        Raises:
            InputError: if there is no such preset.
        """
        side = MaCoSNetConfig.from_preset(name).image_size
        imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        return cls(size={"height": side, "width": side}, **(imagenet if name in _IMAGENET_STATISTICS else {}))

    def preprocess(self, images: Any, **kwargs: Unpack[ImagesKwargs]) -> BatchFeature:
        """Pairs or triplets of images to `pixel_values` `(B, V, 3, H, W)`, float32, V = 2 or 3.

        Args:
            images: one pair `[a, b]`, one triplet `[a, b, c]`, or a list of pairs or of triplets.
            **kwargs: settings that differ from the processor's for this call, and `return_tensors` ("pt" or "np"; numpy
                if not given).

        Raises:
            InputError: not pairs or triplets, arrays that are no images, or settings that cannot be used.
            ImageError: a path that cannot be read.
        """
        return self._prepared(_as_groups(images), kwargs)

    def preprocess_views(self, images: Any, **kwargs: Unpack[ImagesKwargs]) -> BatchFeature:
        """N single images to `pixel_values` `(N, 3, H, W)`, for encoding each image of a collection once.

        `preprocess_views([a, b])["pixel_values"]` equals `preprocess([a, b])["pixel_values"][0]`.

        Args:
            images: one image or a list of images.
            **kwargs: as in [`preprocess`].

        Raises:
            InputError, ImageError: as [`preprocess`].
        """
        views = [images] if _is_image(images) else _as_list(images)
        if not views or not all(_is_image(view) for view in views):
            raise InputError("An image or a list of images is expected.")
        features = self._prepared([[view] for view in views], kwargs)
        features["pixel_values"] = features["pixel_values"][:, 0]
        return features

    def _prepared(self, groups: list[list[Any]], settings: Any) -> BatchFeature:
        try:
            return super().preprocess(groups, **settings)
        except StrictDataclassError as error:  # a setting of another type than transformers takes
            raise InputError(str(error.__cause__ or error)) from error

    def _prepare_images_structure(self, images: Any, **kwargs: Any) -> list[list[Any]]:
        """The groups of `preprocess` with paths replaced by images."""
        return self.fetch_images(images)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """As in transformers, but an image that cannot be read raises [`ImageError`]."""
        if not isinstance(image_url_or_urls, str):
            return super().fetch_images(image_url_or_urls)
        return read_image(image_url_or_urls)

    def process_image(
        self,
        image: Any,
        do_rescale: bool | None = True,
        rescale_factor: float | None = 1 / 255,
        input_data_format: Any = None,
        **kwargs: Any,
    ) -> Image.Image | np.ndarray:
        """One image to PIL RGB (8-bit sources) or to a float32 array `(H, W, 3)` in the unit of `rescale_factor`."""
        if isinstance(image, Image.Image):
            return _decoded(image)
        array = _channels_last(image, input_data_format)
        if not np.issubdtype(array.dtype, np.floating):
            return _eight_bit_rgb(array)
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise InputError("An image contains values that are not finite numbers.")
        if not do_rescale or not rescale_factor:
            return _on_three_channels(array, 1.0)
        white = _white_level(array)
        _check_alpha(array, white)
        array = _on_three_channels(array.clip(0, white), white)
        return array / np.float32(rescale_factor) if white == 1 else array

    def _preprocess(
        self,
        images: list[list[Image.Image | np.ndarray]],
        do_resize: bool,
        size: Any,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Sequence[float] | float | None,
        image_std: Sequence[float] | float | None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Groups of images to one array `(B, V, 3, H, W)`."""
        if kwargs.get("do_center_crop") or kwargs.get("do_pad"):
            raise InputError("MaCoSNet resizes the whole image: do_center_crop and do_pad cannot be used.")
        if str(getattr(kwargs.get("data_format"), "value", kwargs.get("data_format"))) == "channels_last":
            raise InputError("pixel_values are always channels first; data_format='channels_last' cannot be used.")
        if do_rescale and not 0 < rescale_factor < float("inf"):
            raise InputError(f"rescale_factor must be a positive number, not {rescale_factor}.")
        statistics = _statistics(image_mean, image_std) if do_normalize else None
        groups = []
        for group in images:
            arrays = [
                self._resized(image, size, resample) if do_resize else np.asarray(image, dtype=np.float32)
                for image in group
            ]
            if do_rescale:
                arrays = [array * np.float32(rescale_factor) for array in arrays]
            if statistics is not None:
                mean, std = statistics
                arrays = [(array - mean) / std for array in arrays]
            groups.append([array.transpose(2, 0, 1) for array in arrays])
        shapes = {array.shape for group in groups for array in group}
        if len(shapes) > 1:
            raise InputError("Images of different sizes cannot be put into one batch without do_resize.")
        features = BatchFeature(data={"pixel_values": np.array(groups, dtype=np.float32)}, tensor_type=return_tensors)
        device = kwargs.get("device")
        return features.to(device) if device is not None and isinstance(features["pixel_values"], Tensor) else features

    @staticmethod
    def _resized(image: Image.Image | np.ndarray, size: Any, resample: Any) -> np.ndarray:
        """`(H, W, 3)` float32 at `size`; 8-bit images stay 8-bit in between, as in any PIL pipeline."""
        height, width = getattr(size, "height", None), getattr(size, "width", None)
        if not height or not width:
            raise InputError(
                f"size must give 'height' and 'width', such as {{'height': 240, 'width': 240}}; got {size}."
            )
        try:
            resample = PILImageResampling(resample)
        except (TypeError, ValueError) as error:
            raise InputError(f"resample must be one of PIL's filters, not {resample!r}.") from error
        if isinstance(image, Image.Image):
            return np.asarray(image.resize((width, height), resample), dtype=np.float32)
        channels = [np.ascontiguousarray(image[..., channel]) for channel in range(3)]
        resized = [np.asarray(Image.fromarray(channel).resize((width, height), resample)) for channel in channels]
        return np.stack(resized, axis=-1)

    def post_process_keypoint_matching(
        self, outputs: Any, target_sizes: Any, threshold: float = 0.0
    ) -> list[dict[str, Tensor]]:
        """Matches of every pair in pixels of the original images.

        The network's keypoints are (x, y) in [0, 1] with 0 and 1 the outer *edges* of the image, so a pixel is
        `x * width - 0.5`: 0 is the centre of the first pixel, `width - 1` that of the last.

        Args:
            outputs: of [`MaCoSNetForKeypointMatching`].
            target_sizes: `(B, 2, 2)`, a tensor or nested lists: (height, width) of both original images of each pair.
            threshold: matches with this score or less are left out.

        Returns:
            For each pair a dict of `keypoints0` and `keypoints1`, `(M, 2)` float32 (x, y) in pixels of the first and of
            the second image, partners row by row, and `matching_scores` `(M,)`.

        Raises:
            InputError: outputs without matches, or sizes that do not fit.
        """
        keypoints, matches, scores = (_field(outputs, n) for n in ("keypoints", "matches", "matching_scores"))
        sizes = _as_sizes(target_sizes, keypoints.shape[0], keypoints.device)
        pixels = [relative_to_pixels(keypoints[:, view].float(), sizes[:, view]) for view in range(2)]
        results = []
        for row in range(keypoints.shape[0]):
            partner = matches[row, 0]
            matched = (partner >= 0) & (partner < keypoints.shape[2]) & (scores[row, 0] > threshold)
            results.append(
                {
                    "keypoints0": pixels[0][row][matched],
                    "keypoints1": pixels[1][row][partner[matched]],
                    "matching_scores": scores[row, 0][matched],
                }
            )
        return results

    def post_process_cosegmentation(
        self,
        outputs: Any,
        target_sizes: Any = None,
        images: Any = None,
        refine: str = "none",
        threshold: float = 0.5,
        **refine_options: Any,
    ) -> list[list[Tensor]]:
        """Hard masks of both images of every pair, each in its own image's size.

        The soft masks (sigmoid of the logits) are enlarged bilinearly, with half-pixel centres as the images were
        resized, before the threshold or refinement.

        Args:
            outputs: of either model, for pairs; `mask_logits` `(B, 2, h, w)`.
            target_sizes: `(B, 2, 2)` as (height, width) of the original images. Taken from `images` if not given;
                without both, masks have the network's size.
            images: one pair or a list of pairs, as given to [`preprocess`]; needed by every `refine` but `"none"`.
            refine: `"none"`, `"grabcut"`, `"otsu"` or `"crf"`, see [`refinement.refine_mask`].
            threshold: soft mask value at which the object begins.
            **refine_options: further arguments of `refine_mask`, such as `working_size`.

        Returns:
            For each pair a list of two bool tensors `(height, width)`.

        Raises:
            InputError: sizes or images that do not fit, or a refinement without images.
        """
        check_method(refine)
        soft = self.post_process_soft_masks(outputs, target_sizes, images)
        if refine == "none":
            return [[mask >= threshold for mask in pair] for pair in soft]
        if images is None:
            raise InputError(f"The refinement '{refine}' needs the images: pass images=.")
        rgb_pairs = [[self._rgb_array(image) for image in self.fetch_images(pair)] for pair in _as_groups(images, (2,))]
        return [
            [
                torch.from_numpy(refine_mask(rgb, mask, refine, threshold=threshold, **refine_options)).to(mask.device)
                for rgb, mask in zip(*pair, strict=True)
            ]
            for pair in zip(rgb_pairs, soft, strict=True)
        ]

    def post_process_semantic_segmentation(self, outputs: Any, target_sizes: Any = None) -> list[list[Tensor]]:
        """Label maps of both images of every pair, int64 `(height, width)`: 1 on the object, 0 on the background.

        The masks of [`post_process_cosegmentation`] at 0.5, in the form of transformers' segmentation models.
        """
        return [[mask.long() for mask in pair] for pair in self.post_process_cosegmentation(outputs, target_sizes)]

    def post_process_soft_masks(self, outputs: Any, target_sizes: Any = None, images: Any = None) -> list[list[Tensor]]:
        """Soft masks in [0, 1], float32 `(height, width)`; arguments and errors as [`post_process_cosegmentation`]."""
        logits = _field(outputs, "mask_logits")
        if logits.shape[1] != 2:
            raise InputError(f"Masks of pairs are expected, (B, 2, H, W); got {tuple(logits.shape)}.")
        sizes = None if target_sizes is None else _as_sizes(target_sizes, logits.shape[0], logits.device)
        if images is not None:
            groups = _as_groups(images, (2,))
            found = [[self._rgb_array(image).shape[:2] for image in self.fetch_images(pair)] for pair in groups]
            image_sizes = _as_sizes(found, logits.shape[0], logits.device)
            if sizes is not None and not torch.equal(sizes, image_sizes):
                raise InputError("target_sizes and images disagree; target_sizes are (height, width) of each image.")
            sizes = image_sizes
        soft = logits.float().sigmoid()
        if sizes is None:
            return [list(pair.unbind(0)) for pair in soft]
        return [
            [resize_masks(mask[None], size)[0].clamp(0, 1) for mask, size in zip(pair, pair_sizes, strict=True)]
            for pair, pair_sizes in zip(soft, sizes.tolist(), strict=True)
        ]

    def post_process_dense_flow(self, transforms: Transform, target_sizes: Any) -> list[dict[str, Tensor]]:
        """Where every pixel of one image lies in the other, as a displacement in pixels of the original images.

        Evaluated at every pixel from the transforms themselves (affine after TPS), not enlarged from a coarse field.

        Args:
            transforms: of pairs, `(B, 2)`: `model.transforms(outputs)`.
            target_sizes: `(B, 2, 2)` as (height, width) of the original images.

        Returns:
            For each pair a dict of `source_to_target` `(H_source, W_source, 2)` and `target_to_source`
            `(H_target, W_target, 2)`, float32 (x, y): pixel (x, y) of the first-named image lies at
            `(x, y) + flow[y, x]` of the other.

        Raises:
            InputError: outputs of triplets, or sizes that do not fit.
        """
        if not hasattr(transforms, "apply"):
            raise InputError("Outputs alone do not say how affine and tps are meant; pass model.transforms(outputs).")
        if len(transforms.shape) != 2 or transforms.shape[1] != 2:
            raise InputError(f"Transforms of pairs are expected, (B, 2); got {tuple(transforms.shape)}.")
        sizes = _as_sizes(target_sizes, transforms.shape[0], transforms.device)
        results = []
        for row, (source_size, target_size) in enumerate(sizes.tolist()):
            # The transform of ordered pair (i, j) maps points of view j into view i: index 0 takes the target's
            # points to the source, index 1 the source's to the target.
            to_source, to_target = (
                _dense_flow(transforms[row, index : index + 1], *ends, self.size["height"])
                for index, ends in enumerate(((target_size, source_size), (source_size, target_size)))
            )
            results.append({"source_to_target": to_target, "target_to_source": to_source})
        return results

    def visualize_keypoint_matching(
        self,
        images: Any,
        keypoint_matching_output: list[dict[str, Tensor]],
        max_matches: int | None = 40,
    ) -> list[Image.Image]:
        """Drawings of each pair side by side, with coloured lines between the matches.

        Args:
            images: one pair or a list of pairs, as given to [`preprocess`].
            keypoint_matching_output: what [`post_process_keypoint_matching`] returned for them.
            max_matches: draw at most so many of each pair, spread over the image; `None` for all.

        Raises:
            InputError: not as many results as pairs.
        """
        groups = _as_groups(images, (2,))
        if len(groups) != len(keypoint_matching_output):
            raise InputError(
                f"{len(groups)} pairs of images need as many results; got {len(keypoint_matching_output)}."
            )
        drawings = []
        for pair, result in zip(groups, keypoint_matching_output, strict=True):
            source, target = (self._rgb_array(image) for image in self.fetch_images(pair))
            points0, points1, scores = (
                torch.as_tensor(result[name]).detach().cpu().float().numpy()
                for name in ("keypoints0", "keypoints1", "matching_scores")
            )
            drawings.append(draw_matches(source, target, points0, points1, scores, max_matches=max_matches))
        return drawings

    def _rgb_array(self, image: Any) -> np.ndarray:
        """Any accepted image as upright uint8 `(H, W, 3)` in its own size."""
        processed = self.process_image(image)
        if isinstance(processed, Image.Image):
            return np.asarray(processed)
        return np.clip(np.round(processed), 0, 255).astype(np.uint8)


def read_image(image: str | Image.Image, timeout: float | None = None) -> Image.Image:
    """The upright RGB image at a path or URL, in base64, or of a PIL image.

    transformers' `load_image` takes the same, but opens any format, and loses colour profiles of palettes,
    transparency and 16-bit greyscale.

    Args:
        image: path, URL, base64 or PIL image.
        timeout: seconds to wait for an image from the web.

    Raises:
        ImageError: if it cannot be read, or a file has more than [`MAX_PIXELS`] pixels; its header is read first.
    """
    if isinstance(image, Image.Image):
        return _decoded(image)
    name = f"The image '{image[:200]}'"
    try:
        with open_image(image if os.path.isfile(image) else io.BytesIO(_fetched(image, timeout))) as opened:
            pixels = opened.width * opened.height
            if pixels > MAX_PIXELS:
                raise ImageError(f"{name} has {pixels / 1e6:.6g} megapixels, more than {MAX_PIXELS / 1e6:.6g}.")
            return upright_rgb(opened)
    except ImageError:
        raise
    except Exception as error:  # PIL and the web raise many kinds
        if not os.path.isfile(image) and not image.startswith(("http:", "https:", "data:")):
            raise ImageError(f"{name} does not exist: it is no file, no web address and no base64.") from error
        raise ImageError(f"{name} cannot be read ({error}).") from error


def _fetched(source: str, timeout: float | None) -> bytes:
    """The bytes at a web address, or in base64 with or without `data:image/...,` before it."""
    if source.startswith(("http://", "https://")):
        return httpx.get(source, timeout=timeout, follow_redirects=True).raise_for_status().content
    return base64.decodebytes(source.rpartition(",")[2].encode())


def _decoded(image: Image.Image) -> Image.Image:
    """Upright RGB of an image, whose file may be read only now; the image itself if it is upright RGB already."""
    try:
        return as_upright_rgb(image)
    except Exception as error:  # PIL raises many kinds on damaged bytes
        name = getattr(image, "filename", "") or "An image"
        raise ImageError(f"{name} is damaged or cut off and cannot be read ({error}).") from error


def _is_image(value: Any) -> bool:
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim in (2, 3)
    return isinstance(value, (Image.Image, str))


def _as_list(value: Any) -> list[Any]:
    """A list, a tuple, or an array of images, as a list."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim > 3:
        return list(value)
    return []


def _as_groups(images: Any, views: tuple[int, ...] = _VIEWS) -> list[list[Any]]:
    """One pair or triplet, or a list of them, as a list of lists of images, all of the same length."""
    outer = _as_list(images)
    groups = [outer] if outer and all(_is_image(item) for item in outer) else [_as_list(item) for item in outer]
    lengths = {len(group) for group in groups}
    if len(lengths) != 1 or not lengths <= set(views) or not all(_is_image(p) for group in groups for p in group):
        kinds = "pairs" if views == (2,) else "pairs [a, b] or triplets [a, b, c]"
        raise InputError(f"Images are expected in {kinds}: one of them, or a list of them, all of the same length.")
    return groups


def _channels_last(image: Any, input_data_format: Any) -> np.ndarray:
    """A numpy or torch image as `(H, W, C)` of its own dtype, C = 1, 3 or 4."""
    is_tensor = isinstance(image, Tensor)
    if is_tensor:
        image = image.detach().cpu()
        array = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise InputError(f"An image must be a PIL image, a numpy array or a torch tensor, not {type(image).__name__}.")
    layout = getattr(input_data_format, "value", input_data_format)
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim == 3:
        first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 3, 4)
        # Where both ends could be channels, torch's habit is channels first and numpy's channels last.
        if layout == "channels_first" or (layout is None and first and (is_tensor or not last)):
            array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(f"An array of shape {tuple(image.shape)} is not an image of 1, 3 or 4 channels.")
    return array


def _eight_bit_rgb(array: np.ndarray) -> Image.Image:
    """An integer array `(H, W, C)` of 0..255 as PIL RGB."""
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() > 255:
            raise InputError(f"An array image must hold 0..255 as uint8, or floating-point numbers, not {array.dtype}.")
        array = array.astype(np.uint8)
    array = array[:, :, 0] if array.shape[2] == 1 else array
    return upright_rgb(Image.fromarray(np.ascontiguousarray(array)))


def _white_level(array: np.ndarray) -> float:
    """[`white_level`] of a floating-point array.

    Raises:
        InputError: if its values have another range.
    """
    low, high = float(array.min()), float(array.max())
    white = white_level(array)
    if white is None and low >= -0.25 and high <= 2:
        warnings.warn(
            f"A floating-point image holds values from {low:g} to {high:g}; it is taken as 0..1 and clipped.",
            stacklevel=2,
        )
        return 1.0
    if white is None:
        raise InputError(
            f"A floating-point image must hold 0..1 or 0..255, but its values go from {low:g} to {high:g}. Give it as "
            "uint8, or scaled to 0..1 before normalisation, or as it is with do_rescale=False."
        )
    return white


def _check_alpha(array: np.ndarray, white: float) -> None:
    """Refuses colours and an alpha of different ranges, which one white level would turn black or white.

    Raises:
        InputError: for such an array `(H, W, 4)`.
    """
    if array.shape[2] != 4 or white == 1:
        return
    colours, alpha = array[:, :, :3], array[:, :, 3]
    fine = 0 < colours.max() <= 1.25 and bool((colours != np.rint(colours)).any())
    if fine or 0 < alpha.max() <= 1.25:
        raise InputError(
            f"A floating-point image holds colours up to {colours.max():g} and an alpha up to {alpha.max():g}; give "
            "both as 0..1 or both as 0..255."
        )


def _on_three_channels(array: np.ndarray, white: float) -> np.ndarray:
    """A float32 array `(H, W, C)` as `(H, W, 3)`; alpha is laid on white."""
    if array.shape[2] == 1:
        return array.repeat(3, axis=2)
    if array.shape[2] == 4:
        alpha = array[:, :, 3:] / np.float32(white)
        return array[:, :, :3] * alpha + np.float32(white) * (1 - alpha)
    return array


def _statistics(image_mean: Any, image_std: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation as float32 arrays, one number or one a channel, checked."""
    try:
        mean, std = (np.asarray(value, dtype=np.float32) for value in (image_mean, image_std))
    except (TypeError, ValueError) as error:
        raise InputError(f"image_mean and image_std must be numbers; got {image_mean} and {image_std}.") from error
    for name, value in (("image_mean", mean), ("image_std", std)):
        if value.shape not in ((), (1,), (3,)) or not np.isfinite(value).all():
            raise InputError(f"{name} must be one finite number or three, one a channel; got {value.tolist()}.")
    if (std <= 0).any():
        raise InputError(f"image_std must be above 0; got {std.tolist()}.")
    return mean, std


def _field(outputs: Any, name: str) -> Tensor:
    value = getattr(outputs, name, None)
    if value is None:
        raise InputError(f"The outputs hold no {name}; pass what the model returned.")
    return value.detach()


def _as_sizes(target_sizes: Any, batch: int, device: torch.device) -> Tensor:
    """`(B, 2, 2)` int64 (height, width), checked."""
    expected = f"target_sizes must be ({batch}, 2, 2): for each pair the (height, width) of both images"
    try:
        sizes = torch.as_tensor(np.asarray(target_sizes.tolist() if isinstance(target_sizes, Tensor) else target_sizes))
    except (TypeError, ValueError) as error:
        raise InputError(f"{expected}.") from error
    if tuple(sizes.shape) != (batch, 2, 2):
        raise InputError(f"{expected}; got the shape {tuple(sizes.shape)}.")
    whole = sizes.long()
    if not bool((whole == sizes).all()) or bool((whole < 1).any()):
        raise InputError(f"{expected}, whole numbers of at least 1; got {sizes.tolist()}.")
    return whole.to(device)


def _dense_flow(transform: Transform, size: Sequence[int], other_size: Sequence[int], side: int) -> Tensor:
    """Displacement `(H, W, 2)` of every pixel of an image of `size` into one of `other_size`, in strips of rows.

    In float32: against float64 the difference on an image 4000 pixels wide stays below a hundredth of a pixel.
    """
    height, width = size
    transform = transform.to(torch.float32)
    columns = torch.arange(width, device=transform.device, dtype=torch.float32)
    flow = torch.empty(height, width, 2, device=transform.device, dtype=torch.float32)
    step = max(1, _POINTS_PER_CHUNK // width)
    for top in range(0, height, step):
        rows = torch.arange(top, min(top + step, height), device=transform.device, dtype=torch.float32)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        pixels = torch.stack((x, y), dim=-1).reshape(1, -1, 2)
        moved = transform.apply(normalize_points(pixels, size, side))
        moved = denormalize_points(moved, other_size, side) - pixels
        flow[top : top + step] = moved.reshape(len(rows), width, 2)
    return flow


__all__ = ["MaCoSNetImageProcessor"]
