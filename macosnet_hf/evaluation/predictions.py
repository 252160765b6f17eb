"""Predictions on disk, so that other metrics need no new inference.

A folder holds shards `samples-<process>-<number>.npz` and `manifest.json`. The manifest is written last and the folder
is renamed last, so incomplete predictions are never read. The manifest holds the fingerprint of the predictor, the
benchmark, the split and the options that change predictions, so that predictions of another model are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.schema import Record
from ..errors import DataError, InputError, OutputError
from ..io.output_folder import release_folder, start_folder
from ..io.system_files import is_of_system
from .predictors import Prediction

FORMAT = 3
SAMPLES_PER_SHARD = 64

_held: dict[str, int | None] = {}  # partial folders that this process is writing


def record_stamp(record: Record) -> str:
    """A short hash of what a prediction depends on: images (ids and bytes) and keypoints.

    Raises:
        DataError: if an image is missing.
    """
    parts = [record.get(key) for key in ("source_id", "target_id", "source_keypoints", "target_keypoints")]
    parts += [_image_hash(record, side) for side in ("source", "target")]
    plain = json.dumps(parts, default=lambda value: np.asarray(value).tolist())
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def _image_hash(record: Record, side: str) -> str | None:
    """Hash of the file's bytes, which are the same in an archive and in the Parquet made of it."""
    image = record.get(f"{side}_image")
    if image is None:
        return None
    try:
        content = image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes()
    except OSError as error:
        raise DataError(f"{record['id']}, {side}_image: {image['path']} cannot be read.") from error
    return hashlib.sha256(content).hexdigest()


class PredictionWriter:
    """Writes predictions of one process.

    Args:
        folder: the final folder; until [`finish_predictions`] the files are in `<folder>.partial`.
        rank: number of this process.
    """

    def __init__(self, folder: str | os.PathLike[str], rank: int = 0):
        self.partial = partial_folder(folder)
        self.rank = rank
        self.index: dict[str, tuple[str, str]] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._pending = 0
        self._shards = 0

    def add(self, record: Record, prediction: Prediction) -> None:
        """Adds the prediction of a record.

        Raises:
            InputError: if there is a prediction of this id already.
            OutputError: if the shard cannot be written.
        """
        if record["id"] in self.index:
            raise InputError(f"Two samples have the id {record['id']!r}.")
        name = f"samples-{self.rank:03d}-{self._shards:05d}.npz"
        self.index[record["id"]] = (name, f"{self._pending}|{record_stamp(record)}")
        for key, array in prediction.items():
            self._arrays[f"{self._pending}|{key}"] = array
        self._pending += 1
        if self._pending == SAMPLES_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Writes the pending samples.

        Raises:
            OutputError: if it cannot be written.
        """
        if not self._pending:
            return
        path = self.partial / f"samples-{self.rank:03d}-{self._shards:05d}.npz"
        try:
            np.savez_compressed(path, allow_pickle=False, **self._arrays)
        except OSError as error:
            raise OutputError(f"The predictions cannot be written to {path}: {error}.") from error
        self._arrays, self._pending = {}, 0
        self._shards += 1


def partial_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder of predictions that are not complete."""
    folder = Path(folder)
    return folder.with_name(folder.name + ".partial")


def start_predictions(folder: str | os.PathLike[str]) -> None:
    """Makes an empty partial folder, without what a killed run left.

    Raises:
        OutputError: if the folder cannot be made, other files are in it, or another run is writing it.
    """
    partial = partial_folder(folder)
    release_folder(_held.pop(os.path.abspath(partial), None))  # of a run in this process that ended in an error
    if Path(folder).exists():
        raise OutputError(
            f"{folder} exists and is not a complete set of predictions; remove it or choose another name."
        )
    held = start_folder(partial, _holds_predictions, f"the predictions {folder}")
    _held[os.path.abspath(partial)] = held


def _holds_predictions(partial: Path) -> bool:
    return all(
        path.name.startswith("samples-") or path.name == "manifest.json" or is_of_system(path)
        for path in partial.iterdir()
    )


def abandon_predictions(folder: str | os.PathLike[str]) -> None:
    """Removes predictions that will not be completed."""
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    release_folder(_held.pop(os.path.abspath(partial), None))


def finish_predictions(
    folder: str | os.PathLike[str], manifest: dict[str, Any], index: dict[str, tuple[str, str]]
) -> None:
    """Writes the manifest and gives the folder its name.

    Raises:
        OutputError: if that fails.
    """
    partial = partial_folder(folder)
    try:
        text = json.dumps({**manifest, "format": FORMAT, "samples": index}, indent=0, default=str)
        (partial / "manifest.json").write_text(text, encoding="utf-8")
        os.replace(partial, folder)
        release_folder(_held.pop(os.path.abspath(partial), None))
    except OSError as error:
        abandon_predictions(folder)
        raise OutputError(f"The predictions cannot be completed in {folder}: {error}.") from error


def has_predictions(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder is a complete set of predictions."""
    return (Path(folder) / "manifest.json").is_file()


def _entry(value: Any) -> tuple[str, str]:
    """`(file, "number|stamp")` of a sample in a manifest; raises `ValueError` or `TypeError` for anything else."""
    file, place = value
    if os.path.basename(file) != file or place.count("|") != 1:
        raise ValueError(f"{value} is no place of a prediction")
    return file, place


class PredictionReader:
    """Reads predictions.

    Args:
        folder: a complete set of predictions.
        manifest: as given to [`finish_predictions`].

    Raises:
        InputError: if they were made with another model, configuration, benchmark, split or options, or are damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: dict[str, Any]):
        self.folder = Path(folder)
        try:
            stored = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            self.index = {name: _entry(place) for name, place in stored.pop("samples").items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"The predictions in {folder} are incomplete or damaged.") from error
        expected = json.loads(json.dumps({**manifest, "format": FORMAT}, default=str))
        for key in {**expected, **stored}:  # one side alone has a key whose option is set there only
            if stored.get(key) != expected.get(key):
                raise InputError(
                    f"The predictions in {folder} were made with another {key}; remove the folder or name another one."
                )
        self._name: str | None = None
        self._shard: dict[str, np.ndarray] = {}

    def get(self, record: Record) -> Prediction:
        """The prediction of a record.

        Raises:
            InputError: if there is none, or it was made for other images or keypoints.
        """
        entry = self.index.get(record["id"])
        if entry is None:
            raise InputError(f"The predictions in {self.folder} do not hold the sample {record['id']!r}.")
        name, place = entry
        number, stamp = place.split("|")
        if stamp != record_stamp(record):
            raise InputError(f"The prediction of {record['id']!r} was made for other images or keypoints.")
        if name != self._name:
            try:
                with np.load(self.folder / name, allow_pickle=False) as shard:
                    self._shard = {key: shard[key] for key in shard.files}
            except Exception as error:  # numpy, zipfile and zlib fail in many ways on a damaged file
                raise InputError(f"The predictions in {self.folder / name} are missing or damaged.") from error
            self._name = name
        prefix = f"{number}|"
        return {key[len(prefix) :]: array for key, array in self._shard.items() if key.startswith(prefix)}
