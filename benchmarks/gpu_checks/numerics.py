"""Whether the device computes what the CPU computes: outputs, transforms, orientations, half precision, collections."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from macosnet_hf.collection import Collection
from macosnet_hf.hints import Hint
from macosnet_hf.inference.collection_transforms import match_collection
from macosnet_hf.inference.pair import match_pair
from macosnet_hf.matching import fit_mutually
from macosnet_hf.modeling_macosnet import MaCoSNetKeypointMatchingOutput

from .material import EXAMPLES, Bench, exact_float32
from .report import Figures

# Largest differences in float32, by the field of an output: transforms in normalised coordinates (0.001 is 0.12 pixels
# of the network's input), the others in their own units.
LIMITS = {"affine": 1e-3, "tps": 1e-3, "correlation": 1e-3, "features": 1e-4, "masks": 1e-2, "keypoints": 1e-3}
# In half precision: means (of keypoints in shares of the side), and the overlap of the hard masks. On a CPU bf16 has
# 0.0007, 0.0017, 0.0017 and 0.997, fp16 0.0001, 0.0002, 0.0002 and 1.
HALF_LIMITS = {
    torch.bfloat16: {"keypoints": 0.005, "masks": 0.01, "features": 0.005, "overlap": 0.97},
    torch.float16: {"keypoints": 0.001, "masks": 0.002, "features": 0.001, "overlap": 0.99},
}


@torch.no_grad()
def run(model: Any, pixels: Tensor, **options: Any) -> MaCoSNetKeypointMatchingOutput:
    """The outputs of a model for pairs, wherever and in whatever precision the model is."""
    outputs: MaCoSNetKeypointMatchingOutput = model(pixels.to(model.device, model.dtype), **options)
    return outputs


def differences(found: Any, wanted: Any) -> dict[str, Tensor]:
    """Absolute differences of the fields of two outputs, on the CPU in float64; of masks after the sigmoid."""

    def of(outputs: Any, name: str) -> Tensor:
        values = outputs.mask_logits.double().sigmoid() if name == "masks" else outputs[name].double()
        return values.cpu()

    return {name: (of(found, name) - of(wanted, name)).abs() for name in LIMITS}


def compare(figures: Figures, found: Any, wanted: Any, prefix: str = "") -> None:
    """Takes down the largest differences in float32, with their limits."""
    for name, values in differences(found, wanted).items():
        figures.at_most(prefix + name, float(values.max()), LIMITS[name])


def outputs_of_cascade(cascade: str, bench: Bench, figures: Figures) -> None:
    """Outputs of two pairs, transforms fitted to both directions included."""
    pixels = bench.pairs((0, 1), (2, 4))
    settings = {"cascade": cascade, "mutual_fit": True}
    with exact_float32():
        found = run(bench.network(bench.device, **settings), pixels)
        wanted = run(bench.reference(**settings), pixels)
    compare(figures, found, wanted)
    same = (found.matches.cpu() == wanted.matches).double().mean()
    figures.at_least("equal matches", float(same), 0.98)


def outputs_exact(bench: Bench, figures: Figures) -> None:
    """The exact cascade."""
    outputs_of_cascade("exact", bench, figures)


def outputs_fast(bench: Bench, figures: Figures) -> None:
    """The cascade that warps features."""
    outputs_of_cascade("features", bench, figures)


def mutual_fit(bench: Bench, figures: Figures) -> None:
    """The fit alone, from the same features and transforms; points, and the dense flow, are carried on."""
    model = bench.network(mutual_fit=False)
    pixels = bench.pairs((0, 1), (2, 3))
    sizes = torch.tensor([[[240, 300], [200, 180]]] * 2)
    points = torch.tensor([[[60.0, 50.0], [120.5, 80.25], [150.0, 150.0]]] * 2)
    with exact_float32():
        outputs = run(model, pixels)
        moved = {name: value.to(bench.device) for name, value in outputs.items() if isinstance(value, Tensor)}
        there = MaCoSNetKeypointMatchingOutput(**moved)
        wanted = fit_mutually(outputs.features, model.transforms(outputs))
        found = fit_mutually(there.features, model.transforms(there))
        figures.at_most("affine", float((found.affine.cpu() - wanted.affine).abs().max()), 1e-4)
        figures.at_most("tps", float((found.tps.cpu() - wanted.tps).abs().max()), 1e-3)
        with torch.no_grad():
            mine, theirs = (model.transfer_points(each, points, sizes) for each in (outputs, there))
            flows = [model.macosnet.dense_flow(each, sizes) for each in (outputs, there)]
    figures.at_most("points", float((theirs.cpu() - mine).abs().max()), 0.1, " px")
    figures.at_most("flow", float((flows[1].cpu() - flows[0]).abs().max()), 0.1, " px")


def orientations(bench: Bench, figures: Figures) -> None:
    """A mirrored pair and a turned one, under both sets of hypotheses: the same choice and the same outputs."""
    turned = bench.pairs((2, 3), (2, 2))
    turned[1, 0] = turned[1, 0].rot90(1, (-2, -1))
    model, reference = bench.network(bench.device), bench.network()
    with exact_float32():
        for kind in ("mirror", "all"):
            found, wanted = (run(each, turned, orientations=kind) for each in (model, reference))
            differ = int((found.orientation.cpu() != wanted.orientation).sum())
            figures.at_most(f"{kind}: other choices", differ, 0)
            figures.add(f"{kind}: chosen", " ".join(map(str, found.orientation.tolist())))
            if not differ:
                compare(figures, found, wanted, f"{kind}: ")


def half_precision(bench: Bench, figures: Figures) -> None:
    """bf16 and fp16 beside float32: mean differences, and the overlap of the hard masks."""
    pixels = bench.pairs((0, 1), (2, 3), (2, 4))
    with exact_float32():
        wanted = run(bench.network(), pixels)
        for dtype, limits in HALF_LIMITS.items():
            found = run(bench.network(bench.device).to(dtype), pixels)
            name = str(dtype).removeprefix("torch.")
            means = {field: float(values.mean()) for field, values in differences(found, wanted).items()}
            for field in ("keypoints", "masks", "features"):
                figures.at_most(f"{name} {field}", means[field], limits[field])
            hard, other = (each.mask_logits.float().cpu() > 0 for each in (found, wanted))
            overlap = float((hard & other).sum() / (hard | other).sum().clamp(min=1))
            figures.at_least(f"{name} mask overlap", overlap, limits["overlap"])


def pair_of_files(bench: Bench, figures: Figures) -> None:
    """`match_pair` from files to refined masks, points and verdict: a dog and its mirror image, with a hint; then a cat
    and a cup, which have no object in common."""
    dogs, strangers = ("dog.jpg", "company/dog-mirrored.jpg"), ("cat.jpg", "cup.jpg")
    middle = (bench.images[2].width / 2, bench.images[2].height / 2)
    options = {"orientations": "mirror", "hints": {"source": Hint(include=[middle])}}
    _compare_pair(bench, figures, "", dogs, options)
    _compare_pair(bench, figures, "strangers: ", strangers, {})


def _compare_pair(bench: Bench, figures: Figures, prefix: str, names: tuple[str, str], options: dict[str, Any]) -> None:
    files = [str(EXAMPLES / name) for name in names]
    with exact_float32():
        wanted, found = (
            match_pair(*files, model=bench.network(place), processor=bench.processor, **options)
            for place in ("cpu", bench.device)
        )
        points = [(wanted.source.width * 0.4, wanted.source.height * 0.5)]
        moved = [each.transfer(points) for each in (wanted, found)]
    same = np.mean(found.source_mask == wanted.source_mask)
    figures.at_least(f"{prefix}equal mask pixels", float(same), 0.995)
    figures.at_most(f"{prefix}soft masks", float(np.abs(found.soft_masks - wanted.soft_masks).mean()), 0.005)
    figures.at_most(f"{prefix}point", float(np.abs(moved[1] - moved[0]).max()), 1.0, " px")
    figures.at_most(f"{prefix}agreement", abs(found.agreement - wanted.agreement), 0.01)
    figures.at_most(f"{prefix}other verdicts", int(found.quality != wanted.quality), 0)
    figures.at_most(f"{prefix}otherwise in common", int(found.common != wanted.common), 0)
    figures.add(f"{prefix}in common", "yes" if wanted.common else "no")


def collection(bench: Bench, figures: Figures) -> None:
    """`Collection.segment` with GrabCut, the second pass, hints, mirror images and instances; then all transforms."""
    found = {}
    with exact_float32():
        for place in ("cpu", bench.device):
            gathered = Collection(bench.network(place), bench.processor, orientations="mirror", batch_size=4)
            gathered.add(bench.images)
            plain = gathered.segment()
            refined = gathered.segment(refine="grabcut", instances=True, hints={2: Hint(include=[(100, 100)])})
            fast = match_collection(gathered)
            exact = match_collection(gathered, graph="star", cascade="exact")
            points = fast.transfer_points(np.array([[60.0, 60.0]]), 0)
            found[str(place)] = (gathered.orientations, plain, refined, fast, exact, points, fast.repaired())
    (sides, plain, refined, fast, exact, points, repaired), theirs = found["cpu"], found[str(bench.device)]
    figures.at_most("other sides", int((sides != theirs[0]).sum()), 0)
    figures.at_most("soft masks", float(np.abs(plain.probabilities - theirs[1].probabilities).max()), 0.02)
    refinement = np.abs(refined.probabilities - theirs[2].probabilities).mean()
    figures.at_most("refined masks, mean", float(refinement), 0.01)
    figures.at_most("other partners", int(plain.partners != theirs[1].partners), 0)
    figures.at_most("agreement", float(np.abs(plain.agreement - theirs[1].agreement).max()), 0.01)
    transforms = {"fast": (fast, theirs[3]), "exact": (exact, theirs[4]), "repaired": (repaired, theirs[6])}
    for name, (mine, other) in transforms.items():
        figures.at_most(f"{name} tps", float((mine.tps - other.tps).abs().nan_to_num().max()), 5e-3)
    figures.at_most("points", float(np.abs(points - theirs[5]).max()), 1.0, " px")
