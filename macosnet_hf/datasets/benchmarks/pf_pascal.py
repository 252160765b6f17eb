"""PF-PASCAL (Ham et al., "Proposal Flow", TPAMI 2018) in the split of SCNet: pairs; keypoints in validation and test.

Layout: `PF-dataset-PASCAL/JPEGImages/*.jpg` and `{train,val,test}_pairs.csv`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..schema import Record
from .common import VOC_CLASSES, Benchmark, Problems
from .pair_list import read_pair_list

_LISTS = {"train": "train_pairs.csv", "validation": "val_pairs.csv", "test": "test_pairs.csv"}


def _root(source: Path) -> Path:
    return source.parent if source.name == "PF-dataset-PASCAL" else source


def read(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """The pairs of the split's list beside `PF-dataset-PASCAL`, or of the list given."""
    listing = pairs or _root(source) / _LISTS[split]
    yield from read_pair_list(_root(source), listing, split, problems, VOC_CLASSES, with_keypoints=split != "train")


BENCHMARK = Benchmark(
    "pf-pascal",
    "PF-PASCAL",
    "pairs",
    tuple(_LISTS),
    read,
    find_splits=lambda source: [split for split, name in _LISTS.items() if (_root(source) / name).is_file()],
    classes=VOC_CLASSES,
    citation="@article{ham2018proposal, title={Proposal Flow: Semantic Correspondences from Object Proposals}, "
    "author={Ham, Bumsub and Cho, Minsu and Schmid, Cordelia and Ponce, Jean}, journal={TPAMI}, year={2018}}",
    homepage="https://www.di.ens.fr/willow/research/proposalflow/",
)
