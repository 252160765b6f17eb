"""The benchmarks: one module each, with the layout of the archive and its reader; here is the registry.

Reading is lazy: a reader yields records (see [`macosnet_hf.datasets.schema`]) with the paths of images; only flows are
loaded. What is wrong with a file or a row ends in a [`DataError`] that names both, or, with `Problems(skip=True)`, in
a list of what was left out. A new benchmark is a module with a `Benchmark`, and a line in `BENCHMARKS`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ...errors import DataError, InputError
from ..schema import Record
from . import coseg, internet, pair_list, pf_pascal, pf_willow, spair_71k, tss
from .common import Benchmark, Problems

BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (pf_willow, pf_pascal, spair_71k, tss, internet, coseg, pair_list)
}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        InputError: if there is none.
    """
    if name not in BENCHMARKS:
        raise InputError(f"There is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def iter_records(
    benchmark: str,
    source: str | os.PathLike[str],
    split: str = "test",
    *,
    problems: Problems | None = None,
    pairs: str | os.PathLike[str] | None = None,
) -> Iterator[Record]:
    """Records of one split of an original archive, one after the other.

    Args:
        benchmark: a name of [`BENCHMARKS`].
        source: folder of the archive.
        split: `train`, `validation` or `test`.
        problems: what to do with invalid records; default: raise.
        pairs: another list of pairs (`pf-willow`, `pf-pascal`, `pairs`: CSV; `spair-71k`: names of annotations).

    Raises:
        DataError: for what is wrong with a file or a row, and when no record is left.
        InputError: for an unknown benchmark or split.
    """
    entry = get_benchmark(benchmark)
    if split not in entry.splits:
        raise InputError(f"{entry.title} has no split {split!r}; it has {', '.join(entry.splits)}.")
    folder = Path(source)
    if not folder.exists():
        raise DataError(f"{folder}: the data folder is missing.")
    count = 0
    for record in entry.read(folder, split, problems or Problems(), Path(pairs) if pairs is not None else None):
        count += 1
        yield record
    if count == 0:
        raise DataError(f"{folder}: no record of {entry.title}, split {split!r}, was found.")


def available_splits(benchmark: str, source: str | os.PathLike[str]) -> list[str]:
    """Splits of which the archive holds the files."""
    entry = get_benchmark(benchmark)
    return entry.find_splits(Path(source)) if entry.find_splits else list(entry.splits)


__all__ = ["BENCHMARKS", "Benchmark", "Problems", "available_splits", "get_benchmark", "iter_records"]
