"""Writes a checkpoint whose encoder is an ONNX graph as well, in float32 or with 8-bit integers.

See `io/encoder_graph.py` for how it is used.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, OutputError
from .export import OPSET, need

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching

_TOLERANCE = 1e-3  # of float32 maps, relative to their largest value
_LEAST_COSINE = 0.9  # of int8 features beside float32 ones, mean over the positions of the calibration images
LEAST_IMAGES, MOST_IMAGES = 8, 64


@dataclass
class EncoderExport:
    """What was written.

    Attributes:
        path: the graph.
        cosine: mean cosine similarity of its features to torch's, over all positions of some images.
    """

    path: Path
    cosine: float


def export_encoder(
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    folder: str | os.PathLike[str],
    images: Sequence[Image.Image] = (),
    progress: Callable[[float, str], None] | None = None,
) -> EncoderExport:
    """Writes a checkpoint folder of a model with `encoder.onnx` beside its weights.

    Args:
        images: photos like those that the model will see, 8 to 64 of them: the graph then computes with integers of 8
            bits (static quantisation, a scale for each channel of the weights), whose ranges these images decide.
            None: a graph in float32, with the values that torch computes.
        progress: called with the share that is done and the current step.

    Raises:
        InputError: if a package is missing, or there are too few images.
        OutputError: if the folder cannot be written, or the graph differs too much from the encoder.
    """
    import torch

    from ..io.checkpoints import quiet_transformers
    from ..io.encoder_graph import ENCODER_GRAPH, open_graph, use_encoder_graph
    from ..io.output_folder import output_folder

    need("onnx", "onnxscript", "onnxruntime")
    if images and len(images) < LEAST_IMAGES:
        raise InputError(f"The ranges of 8-bit integers need {LEAST_IMAGES} images or more; got {len(images)}.")
    report = progress or (lambda share, text: None)
    plain = copy.deepcopy(model).float().cpu().eval()
    size = plain.config.image_size
    seen = [_pixels(processor, image) for image in images[:MOST_IMAGES]] or list(_patterns(size))
    with output_folder(folder) as partial, torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about their internals
        with quiet_transformers():
            plain.save_pretrained(partial)
            processor.save_pretrained(partial)
        path = partial / ENCODER_GRAPH
        report(0.1, "Writing the graph")
        _write_graph(plain, path, size)
        if images:
            report(0.4, "Choosing the ranges of the integers")
            _quantize(path, open_graph(path).get_inputs()[0].name, seen)
        _describe(path, plain, "int8" if images else "float32")
        report(0.9, "Comparing with PyTorch")
        fast = copy.deepcopy(plain)
        use_encoder_graph(fast.macosnet, partial)
        cosine = _compare(plain, fast, seen[:LEAST_IMAGES], exact=not images)
    return EncoderExport(Path(folder) / ENCODER_GRAPH, cosine)


def _pixels(processor: MaCoSNetImageProcessor, image: Image.Image) -> Tensor:
    """`(1, 3, S, S)`."""
    found: Tensor = processor([[image, image]], return_tensors="pt")["pixel_values"][0, :1]
    return found


def _patterns(size: int) -> Iterator[Tensor]:
    import torch

    generator = torch.Generator().manual_seed(0)
    for cells in (3, 8, 20, 60):
        coarse = torch.randn(1, 3, cells, cells, generator=generator)
        yield torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def _write_graph(model: MaCoSNetForKeypointMatching, path: Path, size: int) -> None:
    import torch

    backbone: Any = model.macosnet.encoder.backbone

    class Maps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.backbone(pixel_values).feature_maps)

    program: Any = torch.onnx.export(
        Maps().eval(),
        (torch.zeros(2, 3, size, size),),
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        input_names=["pixel_values"],
        opset_version=OPSET,
        verbose=False,
    )
    program.save(path, external_data=False)


def _quantize(path: Path, name: str, seen: Sequence[Tensor]) -> None:
    """Replaces a graph by one with 8-bit integers."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(seen)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {name: image.numpy()}

    prepared = path.with_name("prepared.onnx")
    try:
        quant_pre_process(str(path), str(prepared))
        quantize_static(
            str(prepared),
            str(path),
            Images(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        prepared.unlink(missing_ok=True)


def _describe(path: Path, model: MaCoSNetForKeypointMatching, precision: str) -> None:
    """Says in the graph's metadata whose it is."""
    import onnx

    from ..io.encoder_graph import FINGERPRINT, PRECISION
    from ..io.weights import weights_digest

    graph = onnx.load(path)
    facts = {FINGERPRINT: weights_digest(model.macosnet.encoder), PRECISION: precision}
    onnx.helper.set_model_props(graph, facts)
    onnx.save(graph, path)


def _compare(
    plain: MaCoSNetForKeypointMatching, fast: MaCoSNetForKeypointMatching, seen: Sequence[Tensor], exact: bool
) -> float:
    """Mean cosine similarity of the features.

    Raises:
        OutputError: if they differ too much.
    """
    cosines = []
    for pixels in seen:
        expected, found = plain.macosnet.encoder(pixels), fast.macosnet.encoder(pixels)
        cosines.append((expected.normalized * found.normalized).sum(dim=1).mean().item())
        largest = expected.last.abs().max()
        if exact and (expected.last - found.last).abs().max() > _TOLERANCE * largest:
            raise OutputError("The graph of the encoder does not compute what the encoder does; nothing was written.")
    mean = sum(cosines) / len(cosines)
    if not mean >= _LEAST_COSINE:
        raise OutputError(f"With 8-bit integers the features are too far off (cosine {mean:.2f}); nothing was written.")
    return mean
