"""Breaks the library in one line at a time and asks whether a test notices: who tests the tests?

    python tests/reliability/mutants.py [--only NAME ...] [--list] [--report FILE]

A mutant is one change (an axis exchanged, a limit forgotten, a sum for a mean) in a copy of the checkout, never in the
checkout itself. Against it run the properties and the other tests that it names, up to the first that fails. Before
the mutants the same tests must pass on the unchanged copy. Exit code 1 if a mutant survives all of its tests: then
these have a hole. docs/reliability.md has the figures, tests/test_mutants.py is the quick form.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = (".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "runs", "*.log")
# Importing these takes longer than most tests, so it is done once.
HEAVY = ("torchvision", "transformers.pipelines", "transformers.modeling_utils", "timm", "hypothesis", "cv2", "skimage")
PATIENCE = 900  # seconds after which a test run counts as hanging, which is noticed as well


@dataclass(frozen=True)
class Mutant:
    """One change of one file of the package.

    Attributes:
        name: what is wrong, in words.
        module: file below `macosnet_hf/`.
        old: text that stands in the file once.
        new: what comes into its place.
        properties: which of tests/test_properties.py are asked (an expression of `pytest -k`); none if empty.
        tests: further arguments of pytest: files, or files and a `-k` of theirs.
    """

    name: str
    module: str
    old: str
    new: str
    properties: str = ""
    tests: tuple[str, ...] = ()


GEOMETRY = {
    "properties": "mirror or identity or spline or warp or folds or affine or pixels or inverse",
    "tests": ("tests/test_geometry.py",),
}
LOSSES = {"properties": "losses", "tests": ("tests/test_losses.py",)}
METRICS = {"properties": "pck or mask or labels or flow", "tests": ("tests/test_evaluation_metrics.py",)}
MEANS = {"properties": "means", "tests": ("tests/test_evaluation.py", "-k", "means_over or merge")}
NETWORK = {"properties": "network", "tests": ("tests/test_modeling.py",)}

MUTANTS = (
    Mutant(
        "affine matrix transposed",
        "geometry.py",
        "    return points @ matrix[..., :2].transpose(-1, -2) + matrix",
        "    return points @ matrix[..., :2] + matrix",
        **GEOMETRY,
    ),
    Mutant(
        "affine maps composed in the other order",
        "geometry.py",
        "    a, b = _affine_matrix(outer), _affine_matrix(inner)",
        "    b, a = _affine_matrix(outer), _affine_matrix(inner)",
        **GEOMETRY,
    ),
    Mutant(
        "sign in the inverse of an affine map",
        "geometry.py",
        "rows = (d, -b, b * ty - d * tx,",
        "rows = (d, -b, b * ty + d * tx,",
        **GEOMETRY,
    ),
    Mutant(
        "pixels half a pixel off",
        "geometry.py",
        "    return (points + 1) * _half_extent(size, points)",
        "    return (points + 1) * (_half_extent(size, points) + 0.5) - 0.5",
        **GEOMETRY,
    ),
    Mutant(
        "control points with y varying slowest",
        "geometry.py",
        'x, y = torch.meshgrid(axis, axis, indexing="ij")\n    return torch.stack((x.flatten(), y',
        'y, x = torch.meshgrid(axis, axis, indexing="ij")\n    return torch.stack((x.flatten(), y',
        **GEOMETRY,
    ),
    Mutant(
        "images sampled with other corners",
        "geometry.py",
        "mode=mode, padding_mode=padding_mode, align_corners=True",
        "mode=mode, padding_mode=padding_mode, align_corners=False",
        **GEOMETRY,
    ),
    Mutant(
        "spline's radius from x alone",
        "geometry.py",
        "radial = distance2 * distance2.clamp",
        "radial = (points.unsqueeze(-2) - centres)[..., 0].square() * distance2.clamp",
        **GEOMETRY,
    ),
    Mutant(
        "area of a cell without its second product",
        "geometry.py",
        "area = right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0]",
        "area = right[..., 0] * down[..., 1]",
        **GEOMETRY,
    ),
    Mutant(
        "norm whose gradient at zero is not a number",
        "losses.py",
        "torch.linalg.vector_norm(difference, dim=-1)",
        "difference.square().sum(-1).sqrt()",
        **LOSSES,
    ),
    Mutant(
        "mean over no pixel at all",
        "losses.py",
        "valid.sum(dim=(-2, -1)).clamp(min=1)",
        "valid.sum(dim=(-2, -1))",
        **LOSSES,
    ),
    Mutant(
        "points that fly to infinity between transforms",
        "losses.py",
        "points.clamp(-_FARTHEST, _FARTHEST)",
        "points",
        **LOSSES,
    ),
    Mutant(
        "only the first pair of a triplet",
        "losses.py",
        "    return 2 * values.mean(dim=1)",
        "    return 2 * values[:, :2].mean(dim=1)",
        **LOSSES,
    ),
    Mutant(
        "sum over the batch for its mean",
        "losses.py",
        "    return values.mean() if",
        "    return values.sum() if",
        **LOSSES,
    ),
    Mutant(
        "cross-entropy of probabilities that rounding takes beyond 1",
        "losses.py",
        "F.binary_cross_entropy_with_logits(\n        _reverse(logits).flatten(0, 1), warped.clamp(0, 1),",
        "F.binary_cross_entropy(\n        _reverse(logits).flatten(0, 1).sigmoid() * 1.00001, warped.clamp(0, 1),",
        **LOSSES,
    ),
    Mutant(
        "precision of the foreground for that of all pixels",
        "evaluation/metrics.py",
        "    return float((predicted == truth).mean())",
        "    return float((predicted & truth).sum() / max(1, predicted.sum()))",
        **METRICS,
    ),
    Mutant(
        "errors of keypoints along x alone",
        "evaluation/metrics.py",
        "        return KeypointErrors(np.hypot(difference[:, 0], difference[:, 1]), length)",
        "        return KeypointErrors(np.abs(difference[:, 0]), length)",
        **METRICS,
    ),
    Mutant(
        "annotated keypoints at infinity",
        "evaluation/metrics.py",
        "    if not np.isfinite(truth).all():\n",
        "    if False:\n",
        **METRICS,
    ),
    Mutant(
        "a box without end",
        "evaluation/metrics.py",
        "if not 0 < length < math.inf",
        "if not 0 < length",
        **METRICS,
    ),
    Mutant(
        "x and y of a transferred label exchanged",
        "evaluation/metrics.py",
        "nearest = np.floor(np.where(finite[..., None], places, -1.0) + 0.5)",
        "nearest = np.floor(np.where(finite[..., None], places, -1.0) + 0.5)[..., ::-1]",
        **METRICS,
    ),
    Mutant(
        "a class that forgets its earlier samples",
        "evaluation/protocols.py",
        "            cell[1] += count",
        "            cell[1] = count",
        **MEANS,
    ),
    Mutant(
        "similarities scaled by the whole batch",
        "modeling_macosnet.py",
        "    return torch.bmm(source.flatten(2).transpose(1, 2), target.flatten(2)).unflatten(-1, target.shape[-2:])",
        "    target = target / target.std()\n"
        "    return torch.bmm(source.flatten(2).transpose(1, 2), target.flatten(2)).unflatten(-1, target.shape[-2:])",
        **NETWORK,
    ),
    Mutant(
        "unit length that depends on the largest value of the batch",
        "modeling_macosnet.py",
        "    return tensor * torch.rsqrt(",
        "    return tensor / tensor.abs().max() * torch.rsqrt(",
        **NETWORK,
    ),
    Mutant(
        "matches whose partners are those of another",
        "image_processing_macosnet.py",
        '"keypoints1": pixels[1][row][partner[kept]],',
        '"keypoints1": pixels[1][row][kept],',
        tests=("tests/test_image_processing.py",),
    ),
    Mutant(
        "matches of a score of zero kept",
        "image_processing_macosnet.py",
        "(scores[row, 0] > threshold)",
        "(scores[row, 0] >= threshold)",
        tests=("tests/test_image_processing.py",),
    ),
    Mutant(
        "masks enlarged with other corners",
        "image_processing_macosnet.py",
        'mode="bilinear", align_corners=True)[0, 0].clamp(0, 1)',
        'mode="bilinear", align_corners=False)[0, 0].clamp(0, 1)',
        tests=("tests/test_image_processing.py",),
    ),
    Mutant(
        "flow in the other direction",
        "image_processing_macosnet.py",
        '{"source_to_target": to_target, "target_to_source": to_source}',
        '{"source_to_target": to_source, "target_to_source": to_target}',
        tests=("tests/test_image_processing.py",),
    ),
    Mutant(
        "features warped without their lengths",
        "modeling_macosnet.py",
        "scaled = weights * lengths.to(weights)[maps].gather(1, index.flatten(1)).view_as(index)",
        "scaled = weights",
        tests=("tests/test_modeling.py",),
    ),
    Mutant(
        "fit that starts where it should end",
        "modeling_macosnet.py",
        "end, start = features.flatten(0, 1), features.flip(1).flatten(0, 1)",
        "start, end = features.flatten(0, 1), features.flip(1).flatten(0, 1)",
        tests=("tests/test_mutual_fit.py",),
    ),
    Mutant(
        "matches of the other direction with the weights of this one",
        "modeling_macosnet.py",
        "shares = torch.cat((weights, reverse(weights),",
        "shares = torch.cat((weights, weights,",
        tests=("tests/test_mutual_fit.py",),
    ),
    Mutant(
        "product of two images not turned for the second",
        "agreement.py",
        "product = product.t()",
        "product = product.clone()",
        tests=("tests/test_collection.py",),
    ),
    Mutant(
        "boxes of small objects without a margin",
        "collection.py",
        "(1 + 2 * _MARGIN)",
        "(1 + 0 * _MARGIN)",
        tests=("tests/test_collection.py",),
    ),
    Mutant(
        "images cut by the height for the width",
        "collection.py",
        "round(value * image.width / side)",
        "round(value * image.height / side)",
        tests=("tests/test_collection.py",),
    ),
    Mutant(
        "background drawn near instead of pushed away",
        "losses.py",
        "F.relu(margin - within)",
        "F.relu(within - margin)",
        tests=("tests/test_losses.py",),
    ),
    Mutant(
        "masks of the other view guide the matching",
        "losses.py",
        "masks = _reverse(_mask_on_grid(",
        "masks = (_mask_on_grid(",
        tests=("tests/test_losses.py",),
    ),
    Mutant(
        "groups that hold an image twice",
        "datasets/sampling.py",
        "generator.choice(self._members[name], size=self.group_size, replace=False)",
        "generator.choice(self._members[name], size=self.group_size, replace=True)",
        tests=("tests/test_sampling.py",),
    ),
    Mutant(
        "images on their side taken for upright",
        "image_io.py",
        "exif_orientation(image) >= 5",
        "exif_orientation(image) > 8",
        tests=("tests/test_image_io.py",),
    ),
    Mutant(
        "an image's size looked at after it was decoded",
        "image_io.py",
        "    if width * height > max_pixels:\n",
        "    if width > max_pixels:\n",
        tests=("tests/test_image_io.py",),
    ),
    Mutant(
        "channels of a published checkpoint not reordered",
        "convert.py",
        "weight.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2).contiguous()",
        "weight.contiguous()",
        tests=("tests/test_convert.py",),
    ),
)


def make_copy(folder: Path) -> Path:
    """The checkout without what is made in it, in a new folder."""
    copy = folder / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return copy


def run_tests(copy: Path, arguments: Sequence[str]) -> str | None:
    """The first test that fails in the copy, `None` if all pass.

    A fork of this process, which has imported what takes long and nothing of the package.

    Raises:
        RuntimeError: if pytest could not run them, or found none.
    """
    says = copy.parent / "says.txt"
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            with says.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
            sys.dont_write_bytecode = True
            sys.path.insert(0, str(copy))
            os.chdir(copy)
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))
            sys.stdout.flush()
        finally:
            os._exit(code)
    end = time.monotonic() + PATIENCE
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "(hangs)"
        time.sleep(0.05)
    said = says.read_text(errors="replace")
    failed = re.search(r"^FAILED \S+::(\w+)", said, re.MULTILINE)
    if failed:
        return failed[1]
    if not re.search(r"^\d+ passed", said, re.MULTILINE):
        raise RuntimeError(f"pytest {' '.join(arguments)} did not run:\n{said[-3000:]}")
    return None


def commands(mutant: Mutant) -> tuple[list[str] | None, list[str] | None]:
    """Arguments of pytest for the properties and for the other tests of a mutant."""
    properties = ["tests/test_properties.py", "-k", mutant.properties] if mutant.properties else None
    return properties, list(mutant.tests) or None


def try_mutant(copy: Path, mutant: Mutant) -> tuple[str | None, str | None]:
    """The property and the other test that notice a mutant; the copy is as before afterwards."""
    file = copy / "macosnet_hf" / mutant.module
    sound = file.read_text(encoding="utf-8")
    if sound.count(mutant.old) != 1:
        raise RuntimeError(f"{mutant.module} holds {sound.count(mutant.old)} times: {mutant.old}")
    try:
        file.write_text(sound.replace(mutant.old, mutant.new), encoding="utf-8")
        first, second = (run_tests(copy, command) if command else None for command in commands(mutant))
    finally:
        file.write_text(sound, encoding="utf-8")
    return first, second


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="mutants whose name holds one of these")
    parser.add_argument("--list", action="store_true", help="name the mutants and do nothing")
    parser.add_argument("--report", type=Path, help="write the table to this file, too")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not args.only or any(word in mutant.name for word in args.only)]
    if args.list or not chosen:
        print("\n".join(f"{mutant.module}: {mutant.name}" for mutant in MUTANTS))
        return 0 if args.list else 2
    lines = ["| file | mutant | property that fails | other test that fails |", "|---|---|---|---|"]
    survived = []
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = make_copy(Path(folder))
        for command in dict.fromkeys(tuple(each) for mutant in chosen for each in commands(mutant) if each):
            failed = run_tests(copy, command)
            if failed:
                print(f"error: {failed} fails without any mutant", file=sys.stderr)
                return 2
        print("\n".join(lines), flush=True)
        for mutant in chosen:
            start = time.monotonic()
            found = try_mutant(copy, mutant)
            if found == (None, None):
                survived.append(mutant.name)
            names = [f"`{name}`" if name else "-" for name in found]
            lines.append(f"| `{mutant.module}` | {mutant.name} | {' | '.join(names)} |")
            print(f"{lines[-1]} {time.monotonic() - start:.0f} s", flush=True)
    if args.report:
        args.report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutants noticed", *survived, sep="\nsurvived: ")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
