"""Breaks one function of the library at a time and checks that a test fails: who tests the tests?

    python tests/reliability/mutants.py [--only NAME ...] [--list] [--report FILE]

A mutant is one change (an axis exchanged, a limit forgotten, a sum for a mean) in a copy of the checkout, never in the
checkout itself. It names a function and a pattern of code in it (`rewriting.py`), so it survives moved lines and
renamed variables. Against it run the properties and the other tests that it names, up to the first that fails. Before
the mutants the same tests must pass on the unchanged copy. Exit code 1 if a mutant survives all of its tests: then
these have a hole. docs/reliability.md has the figures, tests/reliability/test_mutants.py is the quick form.
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
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from rewriting import rewrite

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = (".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "runs", "*.log")
# Importing these takes longer than most tests, so it is done once.
HEAVY = ("torchvision", "transformers.pipelines", "transformers.modeling_utils", "timm", "hypothesis", "cv2", "skimage")
PATIENCE = 900  # seconds after which a test run counts as hanging, which is noticed as well


@dataclass(frozen=True)
class Mutant:
    """One change of one function of the package.

    Attributes:
        name: what is wrong, in words.
        function: module and qualified name below `macosnet_hf`, such as `"geometry:apply_affine"`.
        old: pattern that matches once in the function; see [`rewriting.rewrite`].
        new: what replaces it.
        properties: which of tests/reliability/test_properties.py are run (an expression of `pytest -k`); none if empty.
        tests: further arguments of pytest: files, or files and a `-k` of theirs.
    """

    name: str
    function: str
    old: str
    new: str
    properties: str = ""
    tests: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """The module's file, relative to the checkout."""
        return Path("macosnet_hf", *self.function.partition(":")[0].split(".")).with_suffix(".py")

    def apply(self, source: str) -> str:
        """The module's text with the change; comments are gone.

        Raises:
            LookupError: if the function or the pattern is not there, or the pattern not once.
        """
        return rewrite(source, self.function.partition(":")[2], self.old, self.new)


PROPERTIES = "tests/reliability/test_properties.py"
GEOMETRY: dict[str, Any] = {
    "properties": "mirror or identity or spline or warp or folds or affine or pixels or inverse",
    "tests": ("tests/test_geometry.py",),
}
LOSSES: dict[str, Any] = {"properties": "losses", "tests": ("tests/training/test_losses.py",)}
METRICS: dict[str, Any] = {
    "properties": "pck or mask or labels or flow",
    "tests": ("tests/evaluation/test_evaluation_metrics.py",),
}
MEANS: dict[str, Any] = {
    "properties": "means",
    "tests": ("tests/evaluation/test_evaluation.py", "-k", "means_over or merge"),
}
NETWORK: dict[str, Any] = {"properties": "network", "tests": ("tests/test_modeling.py",)}
IMAGES: dict[str, Any] = {"tests": ("tests/test_image_processing.py",)}

MUTANTS = (
    Mutant(
        "affine matrix transposed",
        "geometry:apply_affine",
        "$matrix[..., :2].transpose(-1, -2)",
        "$matrix[..., :2]",
        **GEOMETRY,
    ),
    Mutant(
        "affine maps composed in the other order",
        "geometry:compose_affine",
        "$a, $b = _affine_matrix(outer), _affine_matrix(inner)",
        "$b, $a = _affine_matrix(outer), _affine_matrix(inner)",
        **GEOMETRY,
    ),
    Mutant(
        "sign in the inverse of an affine map",
        "geometry:invert_affine",
        "($d, -$b, $b * $ty - $d * $tx, -$c, $a, $c * $tx - $a * $ty)",
        "($d, -$b, $b * $ty + $d * $tx, -$c, $a, $c * $tx - $a * $ty)",
        **GEOMETRY,
    ),
    Mutant(
        "pixels half a pixel off",
        "geometry:relative_to_pixels",
        "$points * _extent(size, $points) - 0.5",
        "$points * _extent(size, $points)",
        **GEOMETRY,
    ),
    Mutant(
        "the edges of an image taken for the centres of its corner pixels",
        "geometry:normalize_relative",
        "side / (side - 1)",
        "side / side",
        **GEOMETRY,
    ),
    Mutant(
        "control points with y varying slowest",
        "geometry:control_points",
        "$x, $y = torch.meshgrid(...)",
        "$y, $x = torch.meshgrid(...)",
        **GEOMETRY,
    ),
    Mutant(
        "images sampled with other corners",
        "geometry:warp",
        "F.grid_sample(..., align_corners=side is None)",
        "F.grid_sample(..., align_corners=side is not None)",
        **GEOMETRY,
    ),
    Mutant(
        "spline's radius from x alone",
        "geometry:tps_basis",
        "($points - $centres).square().sum(-1)",
        "($points - $centres)[..., 0].square()",
        **GEOMETRY,
    ),
    Mutant(
        "area of a cell without its second product",
        "geometry:folded",
        "$right[..., 0] * $down[..., 1] - $right[..., 1] * $down[..., 0]",
        "$right[..., 0] * $down[..., 1]",
        **GEOMETRY,
    ),
    Mutant(
        "control points of a moved target permuted the wrong way round",
        "geometry:Transform.compose_symmetry",
        "control_points($side, device=self.device, dtype=self.dtype) @ $turn",
        "control_points($side, device=self.device, dtype=self.dtype) @ $turn.transpose(-1, -2)",
        tests=("tests/test_geometry.py", "-k", "symmetry"),
    ),
    Mutant(
        "spline applied without its regularisation",
        "geometry:Transform.apply",
        "self.regularization or 0.0",
        "0.0",
        tests=("tests/test_geometry.py", "-k", "transform or regularisation"),
    ),
    Mutant(
        "norm whose gradient at zero is not a number",
        "training.losses:_round_trip_error",
        "torch.linalg.vector_norm($difference, dim=-1)",
        "$difference.square().sum(-1).sqrt()",
        **LOSSES,
    ),
    Mutant(
        "mean over no pixel at all",
        "training.losses:consistency_loss",
        "$valid.sum(dim=(-2, -1)).clamp(min=1)",
        "$valid.sum(dim=(-2, -1))",
        **LOSSES,
    ),
    Mutant(
        "points that fly to infinity between transforms",
        "training.losses:_round_trip_error",
        "$points.clamp(-_FARTHEST, _FARTHEST)",
        "$points",
        **LOSSES,
    ),
    Mutant(
        "only the first pair of a triplet",
        "training.losses:_over_directions",
        "$values.mean(dim=1)",
        "$values[:, :2].mean(dim=1)",
        **LOSSES,
    ),
    Mutant(
        "sum over the batch for its mean",
        "training.losses:_reduce",
        "$values.mean()",
        "$values.sum()",
        **LOSSES,
    ),
    Mutant(
        "cross-entropy of probabilities that rounding takes beyond 1",
        "training.losses:consistency_loss",
        "F.binary_cross_entropy_with_logits($logits, ...)",
        "F.binary_cross_entropy($logits.sigmoid() * 1.00001, ...)",
        **LOSSES,
    ),
    Mutant(
        "precision of the foreground for that of all pixels",
        "evaluation.metrics:precision",
        "($predicted == $truth).mean()",
        "($predicted & $truth).sum() / max(1, $predicted.sum())",
        **METRICS,
    ),
    Mutant(
        "errors of keypoints along x alone",
        "evaluation.metrics:keypoint_errors",
        "np.hypot($difference[:, 0], $difference[:, 1])",
        "np.abs($difference[:, 0])",
        **METRICS,
    ),
    Mutant(
        "annotated keypoints at infinity",
        "evaluation.metrics:keypoint_errors",
        "not np.isfinite(truth).all()",
        "False",
        **METRICS,
    ),
    Mutant(
        "a box without end",
        "evaluation.metrics:box_length",
        "0 < $length < math.inf",
        "0 < $length",
        **METRICS,
    ),
    Mutant(
        "x and y of a transferred label exchanged",
        "evaluation.metrics:transfer_mask",
        "np.floor($places + 0.5)",
        "np.floor($places + 0.5)[..., ::-1]",
        **METRICS,
    ),
    Mutant(
        "a class that forgets its earlier samples",
        "evaluation.scoring:Tally.add",
        "$cell[1] += $count",
        "$cell[1] = $count",
        **MEANS,
    ),
    Mutant(
        "similarities scaled by the whole batch",
        "matching:cell_similarity",
        "torch.bmm($source, $target.flatten(2))",
        "torch.bmm($source, ($target / $target.std()).flatten(2))",
        **NETWORK,
    ),
    Mutant(
        "unit length that depends on the largest value of the batch",
        "matching:l2_normalize",
        "$tensor * torch.rsqrt($squares).to(...)",
        "$tensor / $tensor.abs().max() * torch.rsqrt($squares).to(...)",
        **NETWORK,
    ),
    Mutant(
        "matches whose partners are those of another",
        "image_processing_macosnet:MaCoSNetImageProcessor.post_process_keypoint_matching",
        "$points[partner[$matched]]",
        "$points[$matched]",
        **IMAGES,
    ),
    Mutant(
        "matches of a score of zero accepted",
        "image_processing_macosnet:MaCoSNetImageProcessor.post_process_keypoint_matching",
        "$scores > threshold",
        "$scores >= threshold",
        **IMAGES,
    ),
    Mutant(
        "masks enlarged with other corners",
        "geometry:resize_masks",
        "F.interpolate(..., align_corners=False)",
        "F.interpolate(..., align_corners=True)",
        **IMAGES,
    ),
    Mutant(
        "flow in the other direction",
        "image_processing_macosnet:MaCoSNetImageProcessor.post_process_dense_flow",
        "{'source_to_target': $forward, 'target_to_source': $backward}",
        "{'source_to_target': $backward, 'target_to_source': $forward}",
        **IMAGES,
    ),
    Mutant(
        "features warped without their lengths",
        "matching:warp_similarity",
        "$weights * lengths.to(...)[$maps].gather(...).view_as(...)",
        "$weights",
        tests=("tests/test_modeling.py",),
    ),
    Mutant(
        "fit that starts where it should end",
        "matching:_fit_mutually",
        "$end, $start = $features.flatten(0, 1), $features.flip(1).flatten(0, 1)",
        "$start, $end = $features.flatten(0, 1), $features.flip(1).flatten(0, 1)",
        tests=("tests/test_mutual_fit.py",),
    ),
    Mutant(
        "matches of the other direction with the weights of this one",
        "matching:_fit_mutually",
        "torch.cat(($weights, reverse($weights), $ridge), dim=1)",
        "torch.cat(($weights, $weights, $ridge), dim=1)",
        tests=("tests/test_mutual_fit.py",),
    ),
    Mutant(
        "product of two images not transposed for the second",
        "mask_sharing:similar_cells",
        "product.t()",
        "product.clone()",
        tests=("tests/test_collection.py",),
    ),
    Mutant(
        "boxes of small objects without a margin",
        "crops:object_boxes",
        "1 + 2 * _MARGIN",
        "1 + 0 * _MARGIN",
        tests=("tests/test_collection.py",),
    ),
    Mutant(
        "images cropped by the height for the width",
        "crops:crop_to_box",
        "$value * $image.width / $side",
        "$value * $image.height / $side",
        tests=("tests/test_collection.py",),
    ),
    Mutant(
        "background drawn near instead of pushed away",
        "training.losses:contrastive_loss",
        "F.relu($margin - $within)",
        "F.relu($within - $margin)",
        tests=("tests/training/test_losses.py",),
    ),
    Mutant(
        "masks of the other view guide the matching",
        "training.losses:matching_loss",
        "_reverse(_mask_on_grid(...))",
        "_mask_on_grid(...)",
        tests=("tests/training/test_losses.py",),
    ),
    Mutant(
        "groups that hold an image twice",
        "datasets.sampling:GroupSampler.__getitem__",
        "$generator.choice(..., replace=False)",
        "$generator.choice(..., replace=True)",
        tests=("tests/datasets/test_sampling.py",),
    ),
    Mutant(
        "images on their side taken for upright",
        "io.image_files:upright_size",
        "_stored_orientation($image) >= 5",
        "_stored_orientation($image) > 8",
        tests=("tests/io/test_image_files.py",),
    ),
    Mutant(
        "an image's size looked at after it was decoded",
        "io.image_files:_check_size",
        "$width * $height > max_pixels",
        "$width > max_pixels",
        tests=("tests/io/test_image_files.py",),
    ),
    Mutant(
        "channels of a published checkpoint not reordered",
        "conversion.published:_transpose_channels",
        "weight.unflatten(...).transpose(1, 2).flatten(1, 2)",
        "weight",
        tests=("tests/conversion/test_convert.py",),
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
    properties = [PROPERTIES, "-k", mutant.properties] if mutant.properties else None
    return properties, list(mutant.tests) or None


def try_mutant(copy: Path, mutant: Mutant) -> tuple[str | None, str | None]:
    """The property and the other test that notice a mutant; the copy is as before afterwards."""
    file = copy / mutant.file
    sound = file.read_text(encoding="utf-8")
    changed = mutant.apply(sound)
    try:
        file.write_text(changed, encoding="utf-8")
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
        print("\n".join(f"{mutant.function}: {mutant.name}" for mutant in MUTANTS))
        return 0 if args.list else 2
    lines = ["| function | mutant | property that fails | other test that fails |", "|---|---|---|---|"]
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
            lines.append(f"| `{mutant.function}` | {mutant.name} | {' | '.join(names)} |")
            print(f"{lines[-1]} {time.monotonic() - start:.0f} s", flush=True)
    if args.report:
        args.report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutants noticed", *survived, sep="\nsurvived: ")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
