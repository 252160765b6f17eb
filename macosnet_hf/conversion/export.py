"""Exports a model as one graph file, ONNX or torch.export's `.pt2`, and compares it with PyTorch.

The graph holds the network alone; preprocessor_config.json beside it says how images are resized and normalised.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, OutputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching

FORMATS = ("onnx", "pt2")
OUTPUTS = ("affine", "tps", "mask_logits", "keypoints", "matching_scores")
OPSET = 18
_TOLERANCE = 1e-4
_TIMED_RUNS = 5


@dataclass
class Export:
    """An exported graph, compared with the model in PyTorch on pairs of random images.

    Attributes:
        path: the graph file.
        difference: largest absolute difference of each output, batches of 1 and of 3 pairs.
        seconds: median time of one pair in the exported graph; torch_seconds: in PyTorch, with as many threads.
    """

    path: Path
    difference: dict[str, float]
    seconds: float
    torch_seconds: float


def export(
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    folder: str | os.PathLike[str],
    format: str = "onnx",
    progress: Callable[[float, str], None] | None = None,
) -> Export:
    """Writes `model.onnx` or `model.pt2`, config.json and preprocessor_config.json, if the graph agrees with the model.

    Input `pixel_values` `(B, 2, 3, S, S)`, B free; outputs as in [`MaCoSNetKeypointMatchingOutput`]: `affine`
    `(B, 2, 6)`, `tps` `(B, 2, 18)`, `mask_logits` `(B, 2, S, S)`, `keypoints` `(B, 2, N, 2)` and `matching_scores`
    `(B, 2, N)`, 0 for unmatched. `progress` is called with the share that is done and the current step.

    Raises:
        InputError: for an unknown format, or if the packages that it needs are not installed.
        OutputError: if the folder cannot be written, or the graph differs from the model.
    """
    import torch

    from ..io.output_folder import output_folder

    if format not in FORMATS:
        raise InputError(f"There is no export format {format!r}; choose one of {', '.join(FORMATS)}.")
    if format == "onnx":
        need("onnx", "onnxscript", "onnxruntime")
    report = progress or (lambda share, text: None)
    # Float32 on the CPU, whatever the model has: tools of the graph's format move and quantise it.
    network = _graph_module(copy.deepcopy(model).float().cpu().eval())
    with output_folder(folder) as partial, torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about their internals
        example = _random_pairs(2, model.config.image_size, seed=0)
        path = partial / f"model.{format}"
        report(0.1, f"Writing the graph, {format}")
        if format == "onnx":
            _write_onnx(network, example, path, processor)
            run = _onnx_session(path)
        else:
            shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
            torch.export.save(torch.export.export(network, (), {"pixel_values": example}, dynamic_shapes=shapes), path)
            loaded = torch.export.load(path).module()
            run = lambda pixels: loaded(pixel_values=pixels)  # noqa: E731
        report(0.7, "Comparing with PyTorch")
        difference = _compare(network, run, model.config.image_size)
        report(0.8, "Measuring the time")
        seconds, torch_seconds = _time(network, run, model.config.image_size)
        model.config.to_json_file(partial / "config.json")
        processor.to_json_file(partial / "preprocessor_config.json")
    return Export(Path(folder) / path.name, difference, seconds, torch_seconds)


def need(*modules: str) -> None:
    """Raises `InputError` naming the modules that are not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"Exporting to ONNX needs {', '.join(missing)}: pip install 'macosnet-hf[export]'.")


def _graph_module(model: MaCoSNetForKeypointMatching) -> torch.nn.Module:
    """The model with a tuple of tensors as output, in the order of `OUTPUTS`."""
    import torch

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
            outputs = self.model(pixel_values, orientations="none", return_dict=True)  # a graph cannot choose
            return tuple(getattr(outputs, name) for name in OUTPUTS)

    return Graph().eval()


def _random_pairs(count: int, size: int, seed: int) -> Tensor:
    """`(count, 2, 3, size, size)` images with structure at several scales; those of a pair are similar."""
    import torch
    from torch.nn.functional import interpolate

    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count * 2, 3, size, size)
    for cells in (4, 12, 40):
        first = torch.randn(count, 1, 3, cells, cells, generator=generator)
        both = first + 0.2 * torch.randn(count, 2, 3, cells, cells, generator=generator)
        total = total + interpolate(both.flatten(0, 1), size=(size, size), mode="bilinear") / 2
    return total.unflatten(0, (count, 2))


def _write_onnx(network: torch.nn.Module, example: Tensor, path: Path, processor: MaCoSNetImageProcessor) -> None:
    import torch

    program: Any = torch.onnx.export(
        network,
        (),
        kwargs={"pixel_values": example},
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        input_names=["pixel_values"],
        output_names=list(OUTPUTS),
        opset_version=OPSET,
        verbose=False,
    )
    program.model.metadata_props.update(
        image_size=str(example.shape[-1]),
        image_mean=str(list(processor.image_mean)),
        image_std=str(list(processor.image_std)),
    )
    program.save(path, external_data=False)


def _onnx_session(path: Path) -> Callable[[Tensor], Sequence[Any]]:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(list(OUTPUTS), {"pixel_values": pixels.numpy()})


def _compare(network: Any, run: Callable[[Tensor], Sequence[Any]], size: int) -> dict[str, float]:
    """Largest absolute difference of each output.

    Raises:
        OutputError: if one is larger than 1e-4.
    """
    import torch

    difference = dict.fromkeys(OUTPUTS, 0.0)
    for count in (1, 3):
        pixels = _random_pairs(count, size, seed=count)
        for name, ours, theirs in zip(OUTPUTS, network(pixels), run(pixels), strict=True):
            found = (torch.as_tensor(theirs) - ours).abs().max()
            difference[name] = max(difference[name], float(found))
    wrong = {name: value for name, value in difference.items() if not value <= _TOLERANCE}
    if wrong:
        raise OutputError(
            f"The exported graph differs from the model, in {', '.join(f'{n} by {v:.2g}' for n, v in wrong.items())}."
        )
    return difference


def _time(network: Any, run: Callable[[Tensor], Sequence[Any]], size: int) -> tuple[float, float]:
    """Median seconds for one pair, of the graph and of PyTorch, measured in turns."""
    pixels = _random_pairs(1, size, seed=9)
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(_TIMED_RUNS):
        for times, function in zip(taken, (run, network), strict=True):
            start = time.perf_counter()
            function(pixels)
            times.append(time.perf_counter() - start)
    return statistics.median(taken[0]), statistics.median(taken[1])


__all__ = ["Export", "export"]
