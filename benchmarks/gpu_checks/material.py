"""What the checks are made on: networks, images of `examples/`, batches of groups."""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ResNetConfig

from macosnet_hf import MaCoSNetConfig, MaCoSNetForKeypointMatching, MaCoSNetImageProcessor
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.io.image_files import load_image

from .report import Skipped

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_NAMES = ("cat.jpg", "tabby.jpg", "dog.jpg", "company/dog-mirrored.jpg", "company/dog-and-cup.jpg", "cup.jpg")


class Bench:
    """A device, and what is compared on it.

    On CUDA the reference is the CPU in float32. On a CPU it is the same network in float64, or another order of
    computation.

    Args:
        device: what is checked.
        small: a network of random weights that runs in milliseconds, instead of the embedded checkpoint.
    """

    def __init__(self, device: torch.device, small: bool = False):
        self.device, self.small, self.seconds_left = device, small, 0.0

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def need_cuda(self, why: str) -> None:
        """Raises `Skipped` on a CPU."""
        if not self.cuda:
            raise Skipped(f"needs a CUDA device: {why}")

    @functools.cached_property
    def _loaded(self) -> tuple[MaCoSNetForKeypointMatching, MaCoSNetImageProcessor]:
        return _small_network() if self.small else load_model_and_processor("lite", "cpu")

    @property
    def processor(self) -> MaCoSNetImageProcessor:
        """The network's image processor."""
        return self._loaded[1]

    def network(self, device: torch.device | str = "cpu", **settings: Any) -> MaCoSNetForKeypointMatching:
        """A copy of the network on a device, in evaluation mode, with changed settings of its configuration."""
        model = copy.deepcopy(self._loaded[0])
        for name, value in settings.items():
            setattr(model.config, name, value)
        return model.to(device).eval()

    def reference(self, **settings: Any) -> MaCoSNetForKeypointMatching:
        """The network that outputs are compared with, on the CPU."""
        model = self.network(**settings)
        return model if self.cuda else model.double()

    @functools.cached_property
    def images(self) -> list[Image.Image]:
        """Upright RGB images: two cats, a dog, its mirror image, a dog beside a cup, a cup."""
        return [load_image(str(EXAMPLES / name)) for name in _NAMES]

    def pairs(self, *numbers: tuple[int, int]) -> Tensor:
        """Pairs `(B, 2, 3, S, S)` of images by their numbers, on the CPU."""
        pairs = [[self.images[first], self.images[second]] for first, second in numbers]
        pixels: Tensor = self.processor(pairs, return_tensors="pt")["pixel_values"]
        return pixels

    def many_pairs(self, count: int) -> Tensor:
        """`count` pairs `(count, 2, 3, S, S)` on the device."""
        return self.pairs((0, 1), (2, 3)).repeat(-(-count // 2), 1, 1, 1, 1)[:count].to(self.device)

    def squares(self, side: int) -> Tensor:
        """The images resized to uint8 `(6, 3, side, side)`."""
        small = [image.resize((side, side)) for image in self.images]
        return (
            torch.stack([torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8) for each in small])
            .view(len(small), side, side, 3)
            .permute(0, 3, 1, 2)
            .contiguous()
        )

    def groups(self, count: int) -> dict[str, Tensor]:
        """A batch of `count` groups of three for the joint training: images, views and masks, on the CPU."""
        side = self.processor.size["height"]
        images = self.squares(side + 16)
        generator = torch.Generator().manual_seed(0)
        order = torch.stack([torch.randperm(len(images), generator=generator)[:3] for _ in range(count)])
        views = torch.tensor([0.9, 0, 0.05, 0, 0.9, -0.05]).expand(count, 3, 6).clone()
        views[1::2, :, 0] *= -1  # a mirrored group
        axis = torch.linspace(-1, 1, side + 16)
        ellipse = (axis[:, None] / 0.6) ** 2 + (axis[None] / 0.5) ** 2 < 1
        return {"images": images[order], "views": views, "masks": ellipse.expand(count, 3, -1, -1).clone()}

    def wait(self) -> None:
        """Waits until the device has done what it was asked to."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, call: Callable[[], Any], rounds: int = 10, warm_up: int = 3) -> float:
        """Median time of a call, the device's work included."""
        found = []
        for number in range(warm_up + rounds):
            start = time.perf_counter()
            call()
            self.wait()
            if number >= warm_up:
                found.append(time.perf_counter() - start)
        return 1000 * statistics.median(found)


def _small_network() -> tuple[MaCoSNetForKeypointMatching, MaCoSNetImageProcessor]:
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3"],
    )
    config = MaCoSNetConfig(
        backbone_config=backbone,
        image_size=96,
        predictor_channels=[16, 12],
        predictor_kernel_sizes=[3, 3],
        decoder_widths=[12, 10, 8, 8],
        mutual_fit=True,
    )
    torch.manual_seed(0)
    model = MaCoSNetForKeypointMatching(config)
    with torch.no_grad():  # a fresh head hardly departs from the identity
        for head in (model.macosnet.affine_head, model.macosnet.tps_head):
            head.linear.weight.normal_(std=0.05)
    return model.eval(), MaCoSNetImageProcessor(size={"height": 96, "width": 96})


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 as it is written: neither TF32 nor a search for the fastest algorithm."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = False, False, False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before
