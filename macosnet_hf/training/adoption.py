"""A start for another encoder: heads and decoder of a trained model, without training.

The heads of G compare correlation maps, whose meaning hardly depends on the encoder, and are taken over as they are
(`predictor_grid` of the configuration gives them the maps that they know). The decoder D reads the encoder's maps
through 1x1 convolutions. These are fitted by ridge regression, so that for the same images they give what those of the
trained model give; all behind them is taken over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..modeling_macosnet import MaCoSNetFeatures, MaCoSNetForKeypointMatching, MaCoSNetModel

_RIDGE = 1e-4  # of the mean square of an input channel
_CELLS_A_SIDE = 30  # of each map that are looked at, at most


@torch.no_grad()
def adopt(
    teacher: MaCoSNetForKeypointMatching,
    student: MaCoSNetForKeypointMatching,
    images: Iterable[Tensor],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Gives a model with another encoder the heads and the decoder of a trained one, in place.

    Args:
        teacher: the trained model, with `decoder_inputs="common"`.
        student: its encoder is ready; settings of heads and decoder are those of the teacher.
        images: batches `(N, 3, H, W)` of uint8; each model sees them at its own size.
        mean, std: of the processor.

    Raises:
        InputError: if heads or decoders differ, or there is no image.
    """
    theirs, own = teacher.macosnet.eval(), student.macosnet.eval()
    if "common" not in (theirs.config.decoder_inputs, own.config.decoder_inputs):
        raise InputError("Only a decoder with decoder_inputs='common' fits another encoder.")
    fitted = _readers(own)
    state = {
        name: value
        for name, value in theirs.state_dict().items()
        if not name.startswith("encoder.") and not any(name.startswith(f"{reader}.") for reader in fitted)
    }
    shapes = {name: value.shape for name, value in own.state_dict().items()}
    unlike = sorted(name for name, value in state.items() if shapes.get(name) != value.shape)
    if unlike or _readers(theirs).keys() != fitted.keys():
        raise InputError(f"Heads and decoder must have the same settings; {unlike[0] if unlike else 'skips'} differ.")
    own.load_state_dict({**own.state_dict(), **state})

    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in images:
        known, new = (_seen(model, batch, mean, std) for model in (theirs, own))
        answers, inputs = _inputs(theirs, known), _inputs(own, new)
        for name, reader in _readers(theirs).items():
            goal = reader(answers[name])
            given = F.interpolate(
                inputs[name], size=goal.shape[-2:], mode="bilinear", align_corners=name == "decoder.reduce"
            )
            step = -(-goal.shape[-1] // _CELLS_A_SIDE)
            x, y = (maps[:, :, ::step, ::step].movedim(1, -1).flatten(0, 2).double() for maps in (given, goal))
            x = F.pad(x, (0, 1), value=1.0)
            before = sums.get(name, (0, 0))
            sums[name] = before[0] + x.t() @ x, before[1] + x.t() @ y
    if not sums:
        raise InputError("There is no image to fit the decoder on.")
    for name, reader in fitted.items():
        squares, products = sums[name]
        ridge = torch.full((len(squares),), _RIDGE * float(squares.diagonal()[:-1].mean()), dtype=torch.double)
        ridge[-1] = 0  # of the bias
        solved = torch.linalg.solve(squares + torch.diag(ridge), products)
        reader.weight.copy_(solved[:-1].t()[:, :, None, None])
        assert reader.bias is not None
        reader.bias.copy_(solved[-1])


def _readers(model: MaCoSNetModel) -> dict[str, nn.Conv2d]:
    """The convolutions of the decoder that read the encoder's maps, by name within the model."""
    decoder = model.decoder
    blocks = {f"decoder.blocks.{number}.skip": block.skip for number, block in enumerate(decoder.blocks)}
    found = {"decoder.reduce": decoder.reduce, **blocks}
    return {name: layer for name, layer in found.items() if isinstance(layer, nn.Conv2d)}


def _inputs(model: MaCoSNetModel, features: MaCoSNetFeatures) -> dict[str, Tensor]:
    """What each of [`_readers`] reads."""
    skips = dict(zip(model.decoder.strides, features.skips, strict=True))
    maps = {f"decoder.blocks.{number}.skip": skips.get(8 >> number) for number in range(len(model.decoder.blocks))}
    unit = features.normalized
    return {
        "decoder.reduce": unit * unit.shape[1] ** 0.5,
        **{name: each for name, each in maps.items() if each is not None},
    }


def _seen(model: MaCoSNetModel, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> MaCoSNetFeatures:
    side = model.config.image_size
    pixels = F.interpolate(images.float() / 255, size=(side, side), mode="bilinear", antialias=True)
    centre, spread = (pixels.new_tensor(each).view(-1, 1, 1) for each in (mean, std))
    return model.get_image_features((pixels - centre) / spread)


__all__ = ["adopt"]
