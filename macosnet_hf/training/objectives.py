"""What the objectives of the three stages share: which parts of the network learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..modeling_macosnet import MaCoSNetModel

PARTS = ("encoder", "predictor", "decoder")


class Objective(nn.Module):
    """A loss that trains some parts of a model in place.

    The others keep their weights and batch-norm statistics. The encoder's statistics, those of ImageNet, stay in any
    case.

    Args:
        mean, std: statistics that the processor normalises images with.
        trained: which of `"encoder"`, `"predictor"` (both heads) and `"decoder"` learn.
        frozen_statistics: parts that keep their statistics while they learn.

    Raises:
        InputError: if nothing is to be trained, or a part is unknown.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: MaCoSNetModel,
        mean: Sequence[float],
        std: Sequence[float],
        trained: Sequence[str],
        frozen_statistics: Sequence[str] = (),
    ):
        super().__init__()
        if not trained:
            raise InputError("Nothing is to be trained: encoder, predictor and decoder are all frozen.")
        if not set(trained) <= set(PARTS):
            raise InputError(f"trained names some of {', '.join(PARTS)}.")
        self.model, self.trained, self.frozen_statistics = model, tuple(trained), tuple(frozen_statistics)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        model.requires_grad_(False)
        for name in trained:
            for part in self.parts(name):
                part.requires_grad_(True)

    def parts(self, name: str) -> list[nn.Module]:
        """The sub-networks of a part."""
        model = self.model
        parts: dict[str, list[nn.Module]] = {
            "encoder": [model.encoder],
            "predictor": [model.affine_head, model.tps_head],
            "decoder": [model.decoder],
        }
        return parts[name]

    def train(self, mode: bool = True) -> Objective:
        """As in `nn.Module`, but what keeps its statistics stays in evaluation mode."""
        super().train(mode)
        for name in PARTS:
            if name == "encoder" or name not in self.trained or name in self.frozen_statistics:
                for part in self.parts(name):
                    part.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """Images `(N, 3, H, W)` in [0, 1] as the network takes them."""
        return (images - self.mean) / self.std


class Apart:
    """Holds a module out of its owner's parameters, buffers, state and copies: what is neither trained nor saved."""

    def __init__(self, module: Any):
        self.module = module

    def on(self, device: torch.device) -> Any:
        """The module, moved to a device if it has anything there."""
        tensor = next((t for t in (*self.module.parameters(), *self.module.buffers())), None)
        if tensor is not None and tensor.device != device:
            self.module.to(device)
        return self.module

    def __deepcopy__(self, memo: dict[int, Any]) -> Apart:
        return self
