"""An encoder whose backbone is an ONNX graph: onnxruntime computes it faster on a CPU than torch.

`macosnet export OUT --encoder` writes a checkpoint folder with such a graph beside the weights
(`conversion/encoder_export.py`). Where onnxruntime is not installed, and wherever the graph cannot serve (on a GPU, in
half precision, in training), torch computes what it always did.
"""

from __future__ import annotations

import copy
import importlib.util
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .weights import weights_digest

if TYPE_CHECKING:
    from ..modeling_macosnet import MaCoSNetModel

ENCODER_GRAPH = "encoder.onnx"
# Of the metadata: the encoder whose graph it is, and the precision.
FINGERPRINT, PRECISION = "encoder", "precision"
_LARGEST_FILE = 2_000_000_000  # bytes; what protobuf can hold


def use_encoder_graph(model: MaCoSNetModel, folder: str | Path) -> bool:
    """Lets a model's encoder be computed by the graph in a checkpoint folder, if there is one; returns whether it is.

    Raises:
        CheckpointError: if the graph is damaged, or that of another encoder.
    """
    path = Path(folder) / ENCODER_GRAPH
    if not path.is_file() or importlib.util.find_spec("onnxruntime") is None:
        return False
    session = open_graph(path)
    found = session.get_modelmeta().custom_metadata_map.get(FINGERPRINT)
    if found != weights_digest(model.encoder):
        raise CheckpointError(
            f"{path} is not the graph of this model's encoder: make it again with `macosnet export --encoder`, "
            "or remove it."
        )
    backbone: Any = model.encoder.backbone
    backbone.forward = _GraphOrTorch(session, backbone.forward)
    return True


def open_graph(path: Path) -> Any:
    """An `onnxruntime.InferenceSession` of a graph that brings all its weights.

    Raises:
        CheckpointError: if it cannot be read.
    """
    import onnxruntime

    if path.stat().st_size > _LARGEST_FILE:
        raise CheckpointError(f"{path} is larger than an ONNX graph can be.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    # Its threads would take the cores from torch's for a while after each call.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        # Of the bytes, not of the path: a graph cannot name other files then.
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises kinds of its own
        raise CheckpointError(f"{path} is damaged, or no ONNX graph.") from error


class _GraphOrTorch:
    """The `forward` of a backbone: its graph where that gives the same, else torch's."""

    def __init__(self, session: Any, plain: Any):
        self.session, self.plain = session, plain
        self.input = session.get_inputs()[0]

    def __call__(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not self._serves(pixel_values):
            return self.plain(pixel_values, *args, **kwargs)
        maps = self.session.run(None, {self.input.name: pixel_values.contiguous().numpy()})
        # The memory layout that convolutions on a CPU are fastest in.
        tensors = [torch.from_numpy(each).contiguous(memory_format=torch.channels_last) for each in maps]
        return types.SimpleNamespace(feature_maps=tuple(tensors))

    def _serves(self, pixel_values: Tensor) -> bool:
        return (
            pixel_values.device.type == "cpu"
            and pixel_values.dtype == torch.float32
            and list(pixel_values.shape[1:]) == self.input.shape[1:]
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _GraphOrTorch:
        return _GraphOrTorch(self.session, copy.deepcopy(self.plain, memo))
