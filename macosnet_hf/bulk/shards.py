"""The output folder of a bulk run: Parquet shards, each whole or not there, settings, and at the end index and card.

OUT/data/masks-00000-000000.parquet   part, shard; the rows (of pairs: matches-...)
OUT/index.parquet                     the same rows without images, and the file of each
OUT/README.md                         the data set card; it is there once all shards are
OUT/.bulk/settings.json               what decided the rows
OUT/.bulk/part-00000.json             how many shards the part has, once that is known
"""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..datasets.schema import as_text
from ..errors import InputError, OutputError, printable
from ..io.output_folder import output_folder, write_file
from ..io.system_files import parquet_files
from .blocks import Shard
from .settings import BulkSettings, ShardSettings

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

_MEANINGS = {
    "id": "name of the image: the id column, the path in the data set, or the number of its row",
    "part": "part of the data set",
    "row": "number of the row in its part, from 0 on",
    "group": "what the image shows, if the data set says it",
    "height": "pixels of the upright image",
    "width": "pixels of the upright image",
    "mask": "255 where the object is, else 0; a PNG of the image's own size",
    "alpha": "soft alpha of the object, 0 to 255; a PNG of the image's own size",
    "object_share": "share of the image that the object covers",
    "agreement": "mean cosine similarity of the object to the four most similar ones of its block",
    "common": "whether the image has an object in common with its partners; if not, the mask is what stands out in it",
    "orientation": "identity or mirror, compared with the other images of its block; null if not asked for",
    "partners": "ids of the images that it was compared with; empty if it was alone",
    "error": "why there is no mask; else null",
}
_DIGEST = b"macosnet_rows"


class ShardKind(NamedTuple):
    """What a run writes.

    Attributes:
        name: of the files.
        features: the columns, by the settings.
        images: columns that the index leaves out.
        card: the text of `README.md`, by settings, numbers of rows and errors, and number of shards.
    """

    name: str
    features: Callable[[Any], Features]
    images: Sequence[str]
    card: Callable[[Any, dict[str, int], int], str]


class ShardFolder:
    """An output folder of shards with the same settings.

    Args:
        folder: made if need be.
        settings: those of its shards.
        kind: what they hold; masks by default.

    Raises:
        InputError: if it holds shards of other settings; the text says which.
        OutputError: if it cannot be written, or holds other Parquet files.
    """

    def __init__(self, folder: str | Path, settings: ShardSettings, kind: ShardKind | None = None):
        if not os.fspath(folder):
            raise OutputError("The folder of the results has no name.")
        self.folder, self.settings, self.kind = Path(folder), settings, kind or MASKS
        self._state = self.folder / ".bulk"
        self._data = self.folder / "data"
        path = self._state / "settings.json"
        if not os.path.exists(path):
            self._check_new()
            self._make_folders()
            self._write_settings(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            difference = settings.difference(found)
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise OutputError(f"{path} cannot be read; choose another folder.") from error
        if difference:
            holds = "holds shards of" if parquet_files(self._data) else "holds no shards yet, but is for"
            raise InputError(
                f"{self.folder} {holds} other settings (now {'; '.join(difference)}); choose another folder."
            )

    def _check_new(self) -> None:
        """Raises [`OutputError`] for a folder whose files the results would replace, or be taken for."""
        if parquet_files(self._data):
            raise OutputError(f"{self._data} holds Parquet files of another kind; choose another folder.")
        for name in ("README.md", "index.parquet"):
            if os.path.lexists(self.folder / name):
                raise OutputError(f"{self.folder} holds another {name} already; choose another folder.")

    def _write_settings(self, path: Path) -> None:
        """Writes them as a whole, unless another process has written its own meanwhile."""
        own = path.with_name(f"settings-{os.getpid()}-{secrets.token_hex(4)}.json")
        write_file(own, json.dumps(self.settings.as_dict(), indent=1) + "\n")
        try:
            os.link(own, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                os.replace(own, path)
        finally:
            own.unlink(missing_ok=True)

    def _make_folders(self) -> None:
        try:
            for folder in (self._state, self._data):
                folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"The folder {self.folder} cannot be made ({reason}).") from error

    def path(self, part: int, number: int) -> Path:
        """The file of a shard."""
        return self._data / f"{self.kind.name}-{part:05d}-{number:06d}.parquet"

    def has(self, part: int, shard: Shard) -> bool:
        """Whether a shard is written.

        Raises:
            OutputError: if its rows are not those of the data set now.
        """
        import pyarrow.parquet as pq

        path = self.path(part, shard.number)
        if not path.exists():
            return False
        try:
            found = pq.read_metadata(path)
            schema = found.schema.to_arrow_schema()
        except (OSError, ValueError) as error:
            raise _damaged(path) from error
        stored = (schema.metadata or {}).get(_DIGEST)
        if stored != shard.digest.encode():
            raise OutputError(f"{path} holds other rows than the data set has now; choose another folder.")
        if found.num_rows != shard.rows or not schema.equals(self.kind.features(self.settings).arrow_schema):
            raise _damaged(path)
        return True

    def write(self, part: int, shard: Shard, rows: Sequence[dict[str, Any]]) -> None:
        """Writes a shard as a whole or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = self.kind.features(self.settings).arrow_schema
        schema = schema.with_metadata({**schema.metadata, _DIGEST: shard.digest.encode()})
        content = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), content, compression="zstd")
        write_file(self.path(part, shard.number), content.getvalue())

    def end_part(self, part: int, shards: int) -> None:
        """Notes how many shards a part has.

        Raises:
            OutputError: if it had another number before: the data set has changed.
        """
        path = self._state / f"part-{part:05d}.json"
        if (before := self._shards_of(part)) is None:
            write_file(path, json.dumps({"shards": shards}) + "\n")
        elif before != shards:
            raise OutputError(
                f"{self.folder} holds {before} shards of a data set that gives {shards} now; choose another folder."
            )

    def _shards_of(self, part: int) -> int | None:
        try:
            found = json.loads((self._state / f"part-{part:05d}.json").read_text(encoding="utf-8"))
            return int(found["shards"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def shards(self) -> list[Path] | None:
        """All shards in the order of the data set; None as long as one is missing."""
        paths: list[Path] = []
        for part in range(self.settings.parts):
            count = self._shards_of(part)
            if count is None:
                return None
            paths += [self.path(part, number) for number in range(count)]
        return paths if all(path.exists() for path in paths) else None

    @property
    def is_complete(self) -> bool:
        """Whether index and card are there."""
        return (self.folder / "README.md").is_file() and (self.folder / "index.parquet").is_file()

    def merge(self, shards: Sequence[Path]) -> None:
        """Writes the index and the card of all shards.

        Raises:
            OutputError: if they cannot be written.
        """
        import pyarrow.parquet as pq

        counts = {"rows": 0, "errors": 0}
        with output_folder(self.folder) as folder:
            schema = self._index_schema()
            with pq.ParquetWriter(folder / "index.parquet", schema, compression="zstd") as writer:
                for table in _index_tables(shards, schema):
                    writer.write_table(table)
                    counts["rows"] += table.num_rows
                    counts["errors"] += table.num_rows - table.column("error").null_count
            (folder / "README.md").write_text(self.kind.card(self.settings, counts, len(shards)), encoding="utf-8")

    def _index_schema(self) -> pa.Schema:
        from datasets import Features, Value

        columns = self.kind.features(self.settings).items()
        without_images = {name: kind for name, kind in columns if name not in self.kind.images}
        return Features({**without_images, "file": Value("string")}).arrow_schema

    def counts(self) -> tuple[int, int]:
        """Rows of a complete folder, and how many of them have an error.

        Raises:
            OutputError: if the index is damaged.
        """
        import pyarrow.parquet as pq

        rows, errors, path = 0, 0, self.folder / "index.parquet"
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=["error"]):
                    rows, errors = rows + batch.num_rows, errors + batch.num_rows - batch.column(0).null_count
        except (OSError, ValueError, IndexError) as error:
            raise _damaged(path) from error
        if rows != sum(_rows_of(shard) for shard in self.shards() or ()):
            raise _damaged(path)
        return rows, errors


def _damaged(path: Path) -> OutputError:
    return OutputError(f"{path} is damaged; remove it and start again.")


def _rows_of(shard: Path) -> int:
    import pyarrow.parquet as pq

    try:
        rows: int = pq.read_metadata(shard).num_rows
    except (OSError, ValueError) as error:
        raise _damaged(shard) from error
    return rows


def features(settings: BulkSettings) -> Features:
    """Columns of the shards."""
    from datasets import Features, Image, List, Value

    kinds = {
        "part": Value("int32"),
        "row": Value("int64"),
        "height": Value("int32"),
        "width": Value("int32"),
        "mask": Image(),
        "alpha": Image(),
        "object_share": Value("float32"),
        "agreement": Value("float32"),
        "common": Value("bool"),
        "partners": List(Value("string")),
    }
    return Features({name: kinds.get(name, Value("string")) for name in _MEANINGS if settings.alpha or name != "alpha"})


def _index_tables(shards: Sequence[Path], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of each shard without images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in shards:
        try:
            table = pq.read_table(path, columns=[name for name in schema.names if name != "file"])
            table = table.append_column("file", pa.array([f"data/{path.name}"] * table.num_rows, pa.string()))
            table = table.select(schema.names).cast(schema)
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(path) from error
        yield table


def card_text(title: str, text: str, files: str, split: str, meanings: dict[str, str], settings: dict[str, Any]) -> str:
    """The `README.md` of results: metadata that the Hub and `datasets` read, columns, settings.

    Args:
        title: what the results are.
        text: how they were made.
        files: of the shards, in the folder.
        split: name of the only split.
        meanings: of the columns.
        settings: by name.
    """
    from huggingface_hub import DatasetCardData

    metadata = DatasetCardData(
        pretty_name=_in_card(title),
        task_categories=["image-segmentation"],
        tags=["object-co-segmentation", "macosnet"],
        configs=[
            {"config_name": "default", "data_files": [{"split": split, "path": files}]},
            {"config_name": "index", "data_files": [{"split": split, "path": "index.parquet"}]},
        ],
    )
    lines = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {_in_card(title)}\n",
        f"{text} `index.parquet` holds the same rows without images.\n",
        "## Columns\n",
        "| column | meaning |\n|---|---|",
        *(f"| `{name}` | {meaning} |" for name, meaning in meanings.items()),
        "\n## Settings\n",
        "| setting | value |\n|---|---|",
        *(f"| `{name}` | {_in_card(value)} |" for name, value in settings.items()),
        "",
    ]
    return "\n".join(lines)


def _card(settings: BulkSettings, counts: dict[str, int], shards: int) -> str:
    """The `README.md` of masks."""
    # The folder of the data set is one of this machine, which is not published.
    shown = {**settings.as_dict(), "dataset": Path(settings.dataset).name, "model": Path(settings.model).name}
    if not Path(settings.dataset).is_dir():
        shown["dataset"] = settings.dataset
    return card_text(
        f"Masks of {shown['dataset']}",
        f"Made by `macosnet segment --dataset`: {counts['rows']} rows in {shards} shards, {counts['errors']} of them "
        "with an error instead of a mask.",
        "data/*.parquet",
        settings.split,
        {name: text for name, text in _MEANINGS.items() if settings.alpha or name != "alpha"},
        shown,
    )


MASKS = ShardKind("masks", features, ("mask", "alpha"), _card)


def _in_card(value: Any) -> str:
    """A value in one line of a card, whatever a folder or column is called."""
    return " ".join(printable(as_text(str(value))).split()).replace("|", "\\|").replace("<", "&lt;")
