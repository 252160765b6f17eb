"""PF-WILLOW (Ham et al., "Proposal Flow", CVPR 2016): pairs with 10 keypoints, test only.

Layout: `PF-dataset/<class>/*.png` with `*.mat`, and `test_pairs.csv`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import DataError
from ..schema import Record
from .common import Benchmark, Problems, each, images_in, pair_record, required_folder, subfolders
from .mat import read_matrix
from .pair_list import read_pair_list

CLASSES = (
    "car(G)", "car(M)", "car(S)", "duck(S)", "motorbike(G)", "motorbike(M)", "motorbike(S)", "winebottle(M)",
    "winebottle(wC)", "winebottle(woC)",
)  # fmt: skip


def read(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """The 450 pairs of `test_pairs.csv`, or, without a list, all pairs within each class from the `.mat` files
    (`pts_coord`, 2x10), which are the same 450 unordered pairs."""
    root = source.parent if source.name == "PF-dataset" else source
    listing = pairs or root / "test_pairs.csv"
    if pairs is not None or listing.is_file():
        yield from read_pair_list(root, listing, split, problems, CLASSES)
    else:
        yield from read_mat_files(root, split, problems)


def read_mat_files(root: Path, split: str, problems: Problems) -> Iterator[Record]:
    """All pairs within each class, in the order of the file names."""

    def build(item: tuple[str, Path, Path]) -> Record:
        class_name, source, target = item
        return pair_record(
            f"{class_name}, {source.name} and {target.name}",
            root,
            source,
            target,
            id=f"{class_name}/{source.stem}-{target.stem}",
            split=split,
            class_name=class_name,
            source_keypoints=_keypoints(source.with_suffix(".mat")),
            target_keypoints=_keypoints(target.with_suffix(".mat")),
        )

    yield from each(_pairs(root, problems), build, problems)


def _pairs(root: Path, problems: Problems) -> Iterator[tuple[str, Path, Path]]:
    folder = required_folder(root / "PF-dataset", "the folder of PF-WILLOW")
    for class_folder in subfolders(folder):
        name = class_folder.name
        if name not in CLASSES:
            problems.report(DataError(f"{class_folder}: unknown class {name!r}."))
            continue
        images = images_in(class_folder)
        if not images:
            problems.report(DataError(f"{class_folder}: there is no image in the class {name!r}."))
        for index, first in enumerate(images):
            for second in images[index + 1 :]:
                yield name, first, second


def _keypoints(path: Path) -> list[list[float]]:
    try:
        points = read_matrix(path.read_bytes(), "pts_coord")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the keypoints (pts_coord) cannot be read ({error}).") from error
    if points.shape[0] != 2:
        raise DataError(f"{path}: pts_coord must be 2xN; it is {'x'.join(map(str, points.shape))}.")
    return points.T.tolist()


BENCHMARK = Benchmark(
    "pf-willow",
    "PF-WILLOW",
    "pairs",
    ("test",),
    read,
    classes=CLASSES,
    citation="@inproceedings{ham2016proposal, title={Proposal Flow}, author={Ham, Bumsub and Cho, Minsu and "
    "Schmid, Cordelia and Ponce, Jean}, booktitle={CVPR}, year={2016}}",
    homepage="https://www.di.ens.fr/willow/research/proposalflow/",
)
