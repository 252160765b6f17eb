"""Training away from home: images and encoders in a few files for a machine that has a GPU and nothing else.

`training/packed.py` is the script. A packed folder holds `images.zip` (class folders of WebP images at one size),
`validation.zip` (a list of pairs with keypoints, and its images) and an encoder in float16 for each preset. What comes
back are the heads of the transformation predictor, the configuration and the log.
"""

from __future__ import annotations

import io
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..configuration_macosnet import MaCoSNetConfig
from ..datasets.benchmarks import Problems
from ..datasets.benchmarks.pair_list import read_pair_list
from ..errors import InputError
from ..image_processing_macosnet import MaCoSNetImageProcessor
from ..io.checkpoints import fault_of_values
from ..io.image_files import load_image
from ..modeling_macosnet import MaCoSNetForKeypointMatching
from .encoder_weights import load_imagenet_encoder
from .images import TrainingImages

HEADS = ("affine_head", "tps_head")
_VALIDATION_QUALITY = 85
_MOST_UNPACKED = 64 << 20  # bytes, beside four times the size of the archive


def pack(
    folder: str | Path,
    images: TrainingImages,
    presets: Sequence[str],
    validation_pairs: str | None = None,
    *,
    quality: int = 40,
) -> int:
    """Writes a packed folder; returns its size in bytes.

    Args:
        images: at the size that they are stored with. (WebP, which takes 30 % less than JPEG of the same quality.)
        presets: whose encoders to bring, with ImageNet weights.
        validation_pairs: list of pairs with keypoints in PF-WILLOW's columns.
        quality: of WebP; at 40 an image of 256 pixels takes 4.5 KB.

    Raises:
        DataError: if an image or the list cannot be read.
        CheckpointError: if the weights of an encoder cannot be had.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number, name in enumerate(images.class_names):
            pixels = Image.fromarray(images[number].permute(1, 2, 0).numpy())
            archive.writestr(f"{name}/{number:06d}.webp", _webp(pixels, quality))
    if validation_pairs is not None:
        _pack_pairs(Path(validation_pairs), folder / "validation.zip")
    for preset in presets:
        model = MaCoSNetForKeypointMatching(MaCoSNetConfig.from_preset(preset))
        load_imagenet_encoder(model)
        halves = {name: value.half() for name, value in model.macosnet.encoder.state_dict().items()}
        save_file(halves, folder / f"{preset}.safetensors")
    return sum(path.stat().st_size for path in folder.iterdir())


def _webp(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def _pack_pairs(table: Path, path: Path) -> None:
    """Images keep their size, since keypoints are in their pixels, and their names, since the list has these."""
    records = list(read_pair_list(table.parent, table, "validation", Problems(), None))
    names = {record[f"{side}_id"] for record in records for side in ("source", "target")}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pairs.csv", table.read_bytes())
        for name in sorted(names):
            archive.writestr(name, _webp(load_image(table.parent / name), _VALIDATION_QUALITY))


def unpack(folder: str | Path, preset: str, into: str | Path) -> dict[str, str]:
    """Arguments of `pretrain_synthetic.py` for what a packed folder holds, unpacked below another folder.

    Raises:
        InputError: if the folder was not packed, or not for this preset; for archives and weights that are damaged, or
            that unpack to many times their size.
    """
    folder, into = Path(folder), Path(into)
    encoder = folder / f"{preset}.safetensors"
    if not (folder / "images.zip").is_file() or not encoder.is_file():
        raise InputError(f"{folder} holds no images.zip and {encoder.name}: make it with `training/packed.py pack`.")
    arguments = {"dataset_name": str(into / "images"), "model_name_or_path": str(into / "start")}
    model = MaCoSNetForKeypointMatching(MaCoSNetConfig.from_preset(preset))
    _load_part(model.macosnet.encoder, encoder, f"that encoder of the preset {preset}")
    for name in ("images", "validation"):
        if (folder / f"{name}.zip").is_file():
            _extract(folder / f"{name}.zip", into / name)
    if (into / "validation").is_dir():
        pairs = into / "validation" / "pairs.csv"
        if not pairs.is_file():
            raise InputError(f"{folder / 'validation.zip'} holds no pairs.csv.")
        arguments["validation_pairs"] = str(pairs)
    model.save_pretrained(into / "start")
    MaCoSNetImageProcessor.from_preset(preset).save_pretrained(into / "start")
    return arguments


def _extract(path: Path, into: Path) -> None:
    """Unpacks an archive of [`pack`]; `zipfile` itself leaves out what would lead out of the folder.

    Raises:
        InputError: if it is damaged, or unpacks to much more than it is: images do not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > _MOST_UNPACKED + 4 * path.stat().st_size:
                raise InputError(f"{path} is refused: it is an archive of images, but unpacks to many times its size.")
            archive.extractall(into)
    # Each way of being damaged raises another kind, an encrypted member a RuntimeError.
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged and cannot be unpacked ({error}).") from error


def _load_part(part: nn.Module, path: Path, what: str) -> None:
    """Fills a part of a model with the weights in a file, in place.

    Raises:
        InputError: if they are not those of the part, or no finite numbers.
    """
    wanted = part.state_dict()
    try:
        state = load_file(path)
        if unlike := sorted(
            name
            for name in {*state, *wanted}
            if name not in state
            or name not in wanted
            or state[name].shape != wanted[name].shape
            or state[name].is_floating_point() < wanted[name].is_floating_point()  # `pack` halves counters too
        ):
            raise ValueError(f"{unlike[0]} is another one, or missing")
        state = {name: value.to(wanted[name].dtype) for name, value in state.items()}
        for name, value in state.items():
            if fault := fault_of_values(name, value):
                raise ValueError(f"{name} {fault}")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} does not hold {what} ({error}).") from error
    part.load_state_dict(state)


def write_results(trained: str | Path, folder: str | Path) -> None:
    """Writes what has changed: each head `<head>.safetensors` in float32, `config.json` and `log.jsonl`."""
    trained, folder = Path(trained), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = load_file(trained / "model.safetensors")
    for head in HEADS:
        prefix = f"macosnet.{head}."
        part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        save_file(part, folder / f"{head}.safetensors")
    for name in ("config.json", "log.jsonl"):
        shutil.copy(trained / name, folder / name)


def join_results(results: str | Path, preset: str) -> tuple[MaCoSNetForKeypointMatching, MaCoSNetImageProcessor]:
    """The trained model and its processor: the preset's encoder from ImageNet, and the heads that came back.

    Raises:
        InputError: if the heads are missing, or are not those of the preset.
        CheckpointError: if the weights of the encoder cannot be had.
    """
    model = MaCoSNetForKeypointMatching(MaCoSNetConfig.from_preset(preset)).eval()
    load_imagenet_encoder(model)
    for head in HEADS:
        part = getattr(model.macosnet, head)
        _load_part(part, Path(results) / f"{head}.safetensors", f"that head of the preset {preset}")
    return model, MaCoSNetImageProcessor.from_preset(preset)
