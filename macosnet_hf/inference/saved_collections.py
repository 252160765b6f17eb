"""Collections in a folder: features in half precision and images, in safetensors and JSON, mapped into memory.

FOLDER/collection.json                 which model, which shards, the content key and the size of each image
FOLDER/features-DIGEST.safetensors     of up to 128 images: maps `(n, C, h, w)` float16, pooled `(n, C)` float32
FOLDER/images-DIGEST.safetensors       their PNG files, one after another, where each ends, and its CRC-32

A shard is named after its content and never changes. `collection.json` is written last and names the shards that count,
so that a run which is killed leaves the older collection or the new one.

`Collection` itself travels with the model to the Hub, where there is no `io` that writes files whole; so these are
functions.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..collection import Collection, Progress
from ..directions import COLLECTION_ORIENTATIONS
from ..encoded_images import EncodedImage
from ..errors import DataError, ImageError, OutputError
from ..io.image_files import load_image
from ..io.output_folder import make_folder, write_file
from ..io.package import VERSION
from ..io.weights import weights_digest

if TYPE_CHECKING:
    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching

_FORMAT = 1
_INDEX = "collection.json"
_SHARD = 128  # images: 20 MB of features with the lite model
_FILE = re.compile(r"(features|images)-[0-9a-f]{32}\.safetensors")
# The mean cosine similarity of the cells of a stored map and of the same image encoded again. Half precision and other
# processors leave 0.9999; another model gives features that are not similar at all.
_LEAST_AGREEMENT = 0.99
_COMPRESSION = 1  # of PNG files, from 0 to 9; higher levels take longer to write and save little


@dataclass(frozen=True)
class _ImageInFile:
    """An image of a shard, see [`~macosnet_hf.encoded_images.StoredImage`]."""

    size: tuple[int, int]
    content: Tensor  # uint8, a part of the mapped file
    checksum: int
    name: str

    def read(self) -> Image.Image:
        """The image.

        Raises:
            DataError: if it is damaged.
        """
        content = self.content.numpy().tobytes()
        try:
            if zlib.crc32(content) != self.checksum:  # Pillow decodes some damaged files
                raise ImageError("The checksum differs.")
            image = load_image(content, min_side=1)
            if image.size != self.size:
                raise ImageError("The size differs.")
        except ImageError as error:
            raise DataError(f"{self.name} is damaged; save the collection again.") from error
        return image


def save_collection(
    collection: Collection, folder: str | Path, *, release: bool = False, progress: Progress | None = None
) -> None:
    """Saves the images of a collection and their features, or those that are not in the folder yet.

    A folder that holds the first images of the collection already gets the others; what is there stays as it is. The
    collection is saved whole or, if that fails, as it was before.

    Args:
        collection: with one image or more.
        folder: created if need be.
        release: whether the collection then reads features and images from the folder, so that they take no memory.
            The folder must stay as long as the collection.
        progress: called with (done, total) images.

    Raises:
        OutputError: if the folder cannot be written, or holds another collection.
        DataError: if a collection in the folder is damaged.
    """
    folder = Path(folder)
    make_folder(folder)
    index = _new_index(collection)
    if (folder / _INDEX).exists():
        older = _read_index(folder)
        keys = [key for shard in older["shards"] for key in shard["keys"]]
        if (older["weights"], keys) != (index["weights"], collection.keys[: len(keys)]):
            raise OutputError(f"{folder} holds another collection; choose another folder.")
        index["shards"] = older["shards"]
    done = sum(len(shard["keys"]) for shard in index["shards"])
    for start in range(done, len(collection), _SHARD):
        numbers = range(start, min(start + _SHARD, len(collection)))
        index["shards"].append(_write_shard(collection, numbers, folder))
        if progress is not None:
            progress(numbers.stop, len(collection))
    write_file(folder / _INDEX, json.dumps(index) + "\n")
    if release:
        _hold_stored(collection, folder, index)


def load_collection(
    folder: str | Path,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    **options: Any,
) -> Collection:
    """A saved collection, whose features and images are mapped into memory: what is not asked for is not read.

    Further images may be added, and [`Collection.segment_some`] gives their masks with the saved ones as partners.

    Args:
        folder: as [`save_collection`] wrote it; it must stay as long as the collection.
        model, processor: those that the collection was made with.
        options: `batch_size` and `skip_memory` of [`Collection`].

    Raises:
        DataError: if the folder holds no collection, one of another model or of another version, or a damaged one.
    """
    folder = Path(folder)
    index = _read_index(folder)
    if index["weights"] != weights_digest(model):
        raise DataError(f"{folder} was saved with another model; load that one, or encode the images again.")
    collection = Collection(model, processor, orientations=index["orientations"], **options)
    for shard in index["shards"]:
        _check_digest(folder / shard["features"])
    _hold_stored(collection, folder, index)
    if len(collection):
        _check_features(collection, folder)
    return collection


# ---------------------------------------------------------------------------------------------------------------------


def _new_index(collection: Collection) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "package": VERSION,
        "weights": weights_digest(collection.model),
        "orientations": COLLECTION_ORIENTATIONS[int(collection.find_mirrored)],
        "shards": [],
    }


def _write_shard(collection: Collection, numbers: range, folder: Path) -> dict[str, Any]:
    """Writes both files of a shard; returns its entry in the index."""
    encoded = [collection.encoded[collection.keys[number]] for number in numbers]
    features = {
        "maps": _in_half_precision(torch.stack([image.last.cpu() for image in encoded])),
        "pooled": torch.stack([image.pooled.cpu() for image in encoded]).float(),
    }
    images = [collection.images[number] for number in numbers]
    files = [_as_png(image) for image in images]
    content = {
        "png": torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8),
        "ends": torch.tensor([len(file) for file in files]).cumsum(0),
        "crc32": torch.tensor([zlib.crc32(file) for file in files]),
    }
    return {
        "features": _write_tensors(folder, "features", features),
        "images": _write_tensors(folder, "images", content),
        "keys": [collection.keys[number] for number in numbers],
        "sizes": [list(image.size) for image in images],
    }


def _in_half_precision(maps: Tensor) -> Tensor:
    """Maps in half precision, or in single where that has not the range for them."""
    half = maps.half()
    error = (half.float() - maps.float()).norm() / maps.float().norm().clamp(min=1e-30)
    return half if bool(error < 1e-3) else maps.float()


def _as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=_COMPRESSION)
    return file.getvalue()


def _write_tensors(folder: Path, kind: str, tensors: dict[str, Tensor]) -> str:
    """Writes tensors into a file that is named after its content, unless it is there; returns the name."""
    from safetensors.torch import save

    content = save(tensors)
    name = f"{kind}-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    if not _has_digest(folder / name):
        write_file(folder / name, content)
    return name


def _has_digest(path: Path) -> bool:
    """Whether a file is there and has the content that its name says."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError:
        return False
    return path.stem.endswith(digest.hexdigest()[:32])


def _check_digest(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; the collection is damaged.")
    if not _has_digest(path):
        raise DataError(f"{path} is damaged; save the collection again.")


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a saved collection.

    Raises:
        DataError: if there is none, or it is of another version or damaged.
    """
    path = folder / _INDEX
    if not path.is_file():
        raise DataError(f"{folder} holds no saved collection: it has no {_INDEX}.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if (found := index["format"]) != _FORMAT:
            raise DataError(f"{folder} was saved by another version of this package (format {found}, not {_FORMAT}).")
        fine = isinstance(index["weights"], str) and index["orientations"] in COLLECTION_ORIENTATIONS
        fine = fine and all(map(_is_shard, index["shards"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged.") from error
    if not fine:
        raise DataError(f"{path} is damaged.")
    checked: dict[str, Any] = index
    return checked


def _is_shard(entry: Any) -> bool:
    """Whether an entry of the index is one of a shard, whose files lie in the folder."""
    keys, sizes = entry["keys"], entry["sizes"]
    names = all(isinstance(entry[kind], str) and _FILE.fullmatch(entry[kind]) for kind in ("features", "images"))
    lists = isinstance(keys, list) and isinstance(sizes, list) and 0 < len(keys) == len(sizes)
    return names and lists and all(isinstance(key, str) for key in keys) and all(map(_is_size, sizes))


def _is_size(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)


def _hold_stored(collection: Collection, folder: Path, index: dict[str, Any]) -> None:
    """Lets a collection read its images and features from the shards.

    Raises:
        DataError: if one is damaged.
    """
    images: list[_ImageInFile] = []
    keys: list[str] = []
    encoded: list[EncodedImage] = []
    for shard in index["shards"]:
        count = len(shard["keys"])
        maps, pooled = _read_tensors(folder / shard["features"], "maps", "pooled")
        content, ends, checksums = _read_tensors(folder / shard["images"], "png", "ends", "crc32")
        bounds = [0, *ends.flatten().tolist()]
        if not (
            maps.dim() == 4
            and pooled.shape == (count, maps.shape[1])
            and len(maps) == count == len(bounds) - 1 == checksums.numel()
            and bounds[-1] == len(content)
            and sorted(bounds) == bounds
        ):
            raise DataError(f"{folder / shard['features']} or its images are damaged; save the collection again.")
        for row in range(count):
            width, height = shard["sizes"][row]
            file, name = content[bounds[row] : bounds[row + 1]], f"Image {len(images)} of {folder}"
            images.append(_ImageInFile((width, height), file, int(checksums[row]), name))
            encoded.append(EncodedImage(maps[row], pooled[row].double(), None))
        keys += shard["keys"]
    collection.hold_stored(images, keys, encoded)


def _read_tensors(path: Path, *names: str) -> list[Tensor]:
    """Tensors of a file, mapped into memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is missing or damaged; save the collection again.") from error


@torch.inference_mode()
def _check_features(collection: Collection, folder: Path) -> None:
    """Checks that the first image has its stored features still: the processor, and the code, have their part in them.

    Raises:
        DataError: if it has others.
    """
    expected = collection.features([0]).last
    found = collection.model.macosnet.get_image_features(collection.pixel_values([0])).last
    of_cells = partial(F.cosine_similarity, dim=1)
    if found.shape != expected.shape or of_cells(found.float(), expected.float()).mean() < _LEAST_AGREEMENT:
        raise DataError(
            f"{folder} holds features that this model and image processor do not give; encode the images again."
        )
