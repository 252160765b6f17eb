"""Batch norms folded into the convolutions before them, for inference on a CPU.

In evaluation mode a batch norm is a factor and a summand for each channel. Folded into the convolution before it, it
costs nothing; by itself it reads and writes every map once more, which on a CPU takes almost as long as the small
convolutions of a mobile encoder. Values change by rounding alone. The model keeps its own modules and weights: a folded
copy computes wherever the result is the same.
"""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

if TYPE_CHECKING:
    from ..modeling_macosnet import MaCoSNetModel

# Of a folded backbone's maps, relative to their largest value; what is further off does not run in the order of its
# children, and is left as it is.
_TOLERANCE = 1e-3


def fold_batch_norms(model: MaCoSNetModel) -> None:
    """Lets the parts of a model compute with folded batch norms on a CPU, in float32 and without gradients.

    Copies follow weights that change in place, as those of a training do, but not changes through `weight.data`.
    """
    parts: list[Any] = [model.encoder.backbone, model.decoder, model.affine_head, model.tps_head]
    for part in parts:
        if not isinstance(part.forward, _FoldedOrPlain):
            part.forward = _FoldedOrPlain(part)


def folded_copy(module: nn.Module) -> nn.Module:
    """A copy in which each batch norm behind a convolution is part of it; what else a batch norm did stays."""
    result = copy.deepcopy(module)
    for parent in list(result.modules()):
        for (name, first), (norm_name, second) in itertools.pairwise(list(parent.named_children())):
            if not (isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d)):
                continue
            if first.out_channels == second.num_features:
                setattr(parent, name, fuse_conv_bn_eval(first, second))
                # timm's batch norms have an activation.
                rest = [each for each in (getattr(second, "drop", None), getattr(second, "act", None)) if each]
                setattr(parent, norm_name, nn.Sequential(*rest))
    return result


class _FoldedOrPlain:
    """The `forward` of a module: that of a folded copy where it gives the same, else the module's own."""

    def __init__(self, module: Any):
        self.module = module
        self._made: tuple[Any, nn.Module | None] = (None, None)  # of which weights, and the copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = type(self.module).forward
        if torch.is_grad_enabled() or self.module.training or torch.compiler.is_compiling():
            return plain(self.module, *args, **kwargs)
        weights = list(itertools.chain(self.module.parameters(), self.module.buffers()))
        if torch.is_autocast_enabled("cpu") or not all(_plain_values(weight) for weight in weights):
            return plain(self.module, *args, **kwargs)
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        before, made = self._made
        if before != state:
            made = self._fold(args, kwargs)
            self._made = (state, made)
        return plain(self.module if made is None else made, *args, **kwargs)

    def _fold(self, args: Any, kwargs: Any) -> nn.Module | None:
        """A folded copy; None where it does not compute the same."""
        with torch.inference_mode(False), torch.no_grad():
            # The memory layout that convolutions on a CPU are fastest in.
            made = folded_copy(self.module).to(memory_format=torch.channels_last)
        plain = type(self.module).forward
        found, expected = (_tensors(plain(each, *args, **kwargs)) for each in (made, self.module))
        near = (
            (a - b).abs().max() <= _TOLERANCE * b.abs().max() for a, b in zip(found, expected, strict=True) if b.numel()
        )
        return made if all(near) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> _FoldedOrPlain:
        return _FoldedOrPlain(copy.deepcopy(self.module, memo))

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "_made": (None, None)}


def _plain_values(weight: Tensor) -> bool:
    """Whether a weight is on the CPU, in float32 if it is no counter, and its changes are counted."""
    precise = weight.dtype == torch.float32 or not weight.is_floating_point()
    return weight.device.type == "cpu" and precise and not weight.is_inference()


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of an output: of a module with one, or of a backbone."""
    if isinstance(output, Tensor):
        return [output]
    return list(output.feature_maps)
