"""A forward pass on a GPU asks for nothing that a GPU must be waited for. Tensors without values stand for a GPU here:
torch knows their devices, refuses to mix them, and cannot answer a question about a value."""

import traceback
from pathlib import Path

import pytest
import torch
from small_models import FUSED, IMAGE_SIZE, small_config, small_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from macosnet_hf.geometry import on_device
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel
from macosnet_hf.training.joint import JointObjective
from macosnet_hf.training.losses import MaCoSNetLossWeights, MaCoSNetObjective

GPU = torch.device("cuda:0")


class BlockingCopies(TorchDispatchMode):
    """Notes where tensors are copied between main memory and a GPU by a call that waits for the GPU."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = str(function)
        if name.startswith(("aten._to_copy", "aten.copy_")):
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if waits and len({tensor.device.type for tensor in tensors}) > 1:
                frames = [frame for frame in traceback.extract_stack() if "macosnet_hf" in frame.filename]
                self.places += [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-1:]] or ["elsewhere"]
        return out


@pytest.fixture
def gpu(monkeypatch):
    """Tensors of `GPU` without values; cuDNN would ask the driver."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    with FakeTensorMode():
        yield


def on_gpu(model_class: type, **settings: object) -> torch.nn.Module:
    return move(model_class(small_config(**settings)).eval())


def move(model: torch.nn.Module) -> torch.nn.Module:
    """`.to(GPU)`, which torch refuses for tensors without values."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(value.detach().to(GPU), value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = value.to(GPU)
    return model


@pytest.mark.parametrize(("cascade", "decoder"), [("exact", "paper"), ("features", "common")])
def test_a_forward_pass_waits_for_nothing(gpu, cascade, decoder):
    model = on_gpu(MaCoSNetForKeypointMatching, cascade=cascade, decoder_inputs=decoder, mutual_fit=True, **FUSED)
    pixels = torch.rand(2, 2, 3, IMAGE_SIZE, IMAGE_SIZE, device=GPU)
    sizes = torch.randint(50, 90, (2, 2, 2), device=GPU)
    with BlockingCopies() as copies, torch.no_grad():
        outputs = model(pixels, output_flow=True, image_sizes=sizes)
    assert outputs.keypoints.device == outputs.flow.device == outputs.mask_logits.device == GPU
    assert copies.places == []


def test_the_losses_wait_for_nothing(gpu):
    model = on_gpu(MaCoSNetModel)
    weights = MaCoSNetLossWeights.from_benchmark("pf-pascal")
    objective = JointObjective(
        model,
        [0.5] * 3,
        [0.25] * 3,
        MaCoSNetObjective(weights),
        cascade="exact",
        prior_weight=1.0,
        local_weight=1.0,
        paste_share=0.5,
        change_colours=True,
    )
    move(objective).train()
    side = IMAGE_SIZE + 16
    batch = {
        "images": torch.zeros(4, 3, 3, side, side, dtype=torch.uint8, device=GPU),
        "views": torch.rand(4, 3, 6, device=GPU),
        "masks": torch.zeros(4, 3, side, side, dtype=torch.bool, device=GPU),
    }
    with BlockingCopies() as copies:
        losses = objective(batch, torch.Generator())
    assert {value.device for value in losses.values()} == {GPU}
    assert copies.places == []


def test_the_copies_that_wait_are_seen(gpu):
    with BlockingCopies() as copies:
        torch.zeros(3, device=GPU)[[0, 2]]
        torch.ones(2).to(GPU)
        torch.ones(2, device=GPU).cpu()
        on_device([1.0, 2.0], GPU)
    assert len(copies.places) == 3


def test_constants_are_those_that_were_given():
    values = torch.tensor([[1, 2], [3, 4]])
    assert on_device(values) is values
    assert torch.equal(on_device([[1, 2], [3, 4]]), values)
    assert on_device([1, 2], "cpu", torch.float64).dtype == torch.float64
    assert small_model(MaCoSNetModel).device == torch.device("cpu")
