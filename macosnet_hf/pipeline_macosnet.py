"""Pipelines of MaCoSNet: matches of pairs, and masks of the object that two or more images have in common.

Both come with every saved model: `pipeline("keypoint-matching", model=FOLDER_OR_ID, trust_remote_code=True)`. After
`import macosnet_hf`, where the package is installed, `trust_remote_code` is not needed.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.pipelines.base import Pipeline
from transformers.pipelines.keypoint_matching import KeypointMatchingPipeline

from .collection import check_options, hard_mask, segment_collection
from .directions import check_orientations
from .errors import InputError
from .image_processing_macosnet import read_image


class MaCoSNetKeypointMatchingPipeline(KeypointMatchingPipeline):
    """Task `"keypoint-matching"`: matching points of two images of the same kind of object.

    The pipeline of transformers passes (width, height) where post-processing expects (height, width), which misplaces
    the points of images that are not square. This one does not, and it accepts `batch_size`.

    ```python
    >>> matcher = pipeline("keypoint-matching", model=FOLDER_OR_ID, trust_remote_code=True)
    >>> matcher(["cat1.jpg", "cat2.jpg"], threshold=0.2)[0]
    {'keypoint_image_0': {'x': 100.4, 'y': 81.9}, 'keypoint_image_1': {'x': 97.2, 'y': 104.6}, 'score': 0.81}
    ```

    Points are (x, y) in pixels of the given images, best match first. A list of pairs gives a list of such lists.
    """

    _load_video_processor = False  # transformers would take the image processor's code for one

    def _sanitize_parameters(self, orientations: str | None = None, **kwargs: Any) -> tuple[dict[str, Any], ...]:
        if orientations is not None:
            check_orientations(orientations)
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        return preprocess, {**forward, **_given(orientations=orientations)}, postprocess

    def __call__(self, inputs: Any, threshold: float | None = None, **kwargs: Any) -> Any:
        """Matches of a pair of images (paths, URLs, PIL images), or of each pair in a list.

        Args:
            inputs: a pair, or a list of pairs; a list gives a list, also of one pair.
            threshold: matches with this score or less are left out; by default what `pipeline` was given, else 0.
            kwargs: `timeout` (seconds to wait for an image from the web), `batch_size`, and `orientations` (`"none"`,
                `"mirror"` or `"all"`: how the first image may face, compared with the second; by default what the
                model's configuration says).

        Raises:
            InputError: for anything else.
            ImageError: for an image that cannot be read.
        """
        inputs = _with_strings(inputs)
        if not _is_pair(inputs) and not (_is_list(inputs) and len(inputs) > 0 and all(map(_is_pair, inputs))):
            raise InputError("Keypoint matching takes a pair of images (paths, URLs or PIL images), or several.")
        if threshold is not None and not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
            raise InputError(f"threshold must be a number between 0 and 1; got {threshold!r}.")
        # Not the parent's, which gives the bare matches for a list of one pair.
        results = Pipeline.__call__(self, [inputs] if _is_pair(inputs) else inputs, threshold=threshold, **kwargs)
        return results[0] if _is_pair(inputs) else results

    def preprocess(self, images: Any, timeout: float | None = None) -> dict[str, torch.Tensor]:
        """`pixel_values` `(1, 2, 3, H, W)` of a pair and `target_sizes` `(1, 2, 2)` as (height, width)."""
        opened = [read_image(image, timeout) for image in images]
        pixel_values = self.image_processor(opened, return_tensors="pt")["pixel_values"]
        sizes = torch.tensor([[[each.height, each.width] for each in opened]])
        return {"pixel_values": pixel_values, "target_sizes": sizes}

    def _forward(
        self, preprocess_outputs: dict[str, torch.Tensor], orientations: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Outputs of a batch of pairs as plain tensors, which transformers can split again."""
        outputs = self.model(preprocess_outputs["pixel_values"], orientations=orientations)
        fields = ("keypoints", "matches", "matching_scores")
        return {**{name: outputs[name] for name in fields}, "target_sizes": preprocess_outputs["target_sizes"]}

    def postprocess(self, forward_outputs: dict[str, torch.Tensor], threshold: float = 0.0) -> list[dict[str, Any]]:
        """A pair's matches with a score above `threshold`, best first."""
        outputs, sizes = SimpleNamespace(**forward_outputs), forward_outputs["target_sizes"]
        found = self.image_processor.post_process_keypoint_matching(outputs, sizes, threshold)[0]
        order = found["matching_scores"].argsort(descending=True, stable=True)
        columns = (found[name][order].tolist() for name in ("keypoints0", "keypoints1", "matching_scores"))
        return [
            {"keypoint_image_0": {"x": x0, "y": y0}, "keypoint_image_1": {"x": x1, "y": y1}, "score": score}
            for (x0, y0), (x1, y1), score in zip(*columns, strict=True)
        ]


class MaCoSNetCosegmentationPipeline(Pipeline):
    """Task `"image-co-segmentation"`: masks of the object that two or more images have in common.

    ```python
    >>> segmenter = pipeline("image-co-segmentation", model=FOLDER_OR_ID, trust_remote_code=True)
    >>> results = segmenter(["horse1.jpg", "horse2.jpg", "horse3.jpg"])
    >>> results[0]["mask"].save("horse1_mask.png")
    ```

    One dict an image, in their order: `mask`, a PIL image of mode "L" in the image's own size, 255 on the object;
    `score`, the mean probability within the mask (0 if it is empty); `agreement`, the cosine similarity to the most
    similar images (the odd one out has the smallest); `label`, always "object".
    """

    _load_processor = False
    _load_image_processor = True
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(
        self, partners: int | None = None, refine: str | None = None, timeout: float | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return _given(timeout=timeout), _given(partners=partners, refine=refine), {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Masks of a collection of images (paths, URLs, PIL images), or of each collection in a list.

        Args:
            inputs: a list of images, or a list of such lists, which gives a list of results.
            kwargs: `partners` (defaults to 2), how many others each image is compared with; `refine` (defaults to
                `"grabcut"`), one of `refinement.REFINEMENT_METHODS`; `timeout`, seconds to wait for an image from the
                web.

        Raises:
            InputError: for anything else, or fewer than two images.
            ImageError: for an image that cannot be read.
        """
        inputs = _with_strings(inputs)
        several = _is_list(inputs) and len(inputs) > 0 and all(_is_list(item) for item in inputs)
        collections = list(inputs) if several else [inputs]
        for images in collections:
            if not _is_list(images) or not all(map(_is_image, images)):
                raise InputError("Co-segmentation takes a list of images: paths, URLs or PIL images.")
            check_options(len(images), **_given(partners=kwargs.get("partners"), refine=kwargs.get("refine")))
        # A collection's images go through the network one after another, whatever their number.
        results = super().__call__(collections, **{**kwargs, "batch_size": 1})
        return results if several else results[0]

    def preprocess(self, images: Any, timeout: float | None = None) -> dict[str, Any]:
        """Upright RGB images; the collection resizes them."""
        return {"images": [read_image(image, timeout) for image in images]}

    def _forward(self, model_inputs: dict[str, Any], partners: int = 2, refine: str = "grabcut") -> dict[str, Any]:
        images = model_inputs["images"]
        result = segment_collection(
            images, model=self.model, processor=self.image_processor, partners=partners, refine=refine
        )
        return {"images": images, "probabilities": result.probabilities, "agreement": result.agreement}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Hard masks in the images' own sizes."""
        results = []
        for image, probability, agreement in zip(*model_outputs.values(), strict=True):
            mask = hard_mask(probability, (image.height, image.width))
            inside = np.asarray(Image.fromarray(mask).resize(probability.shape[::-1], Image.Resampling.NEAREST))
            results.append(
                {
                    "label": "object",
                    "score": float(probability[inside].mean()) if inside.any() else 0.0,
                    "agreement": float(agreement),
                    "mask": Image.fromarray(mask.astype("uint8") * 255),
                }
            )
        return results


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _with_strings(value: Any) -> Any:
    """The same with lists for tuples, which transformers would take apart, and strings for paths."""
    if _is_list(value):
        return [_with_strings(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _is_image(value: Any) -> bool:
    return isinstance(value, (str, Image.Image))


def _is_pair(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and all(map(_is_image, value))


# Saved in the configuration, so that `pipeline` finds these classes in the model's folder.
CUSTOM_PIPELINES = {
    task: {"impl": f"pipeline_macosnet.{name}", "pt": ["AutoModelForKeypointMatching"], "type": "image"}
    for task, name in (
        ("keypoint-matching", "MaCoSNetKeypointMatchingPipeline"),
        ("image-co-segmentation", "MaCoSNetCosegmentationPipeline"),
    )
}

__all__ = ["CUSTOM_PIPELINES", "MaCoSNetCosegmentationPipeline", "MaCoSNetKeypointMatchingPipeline"]
