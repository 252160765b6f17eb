"""Loads a model and its processor from a checkpoint (folder or Hub id); errors are one sentence each."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError, OutputError
from .memory import collector_paused
from .package import DEFAULT_CHECKPOINT, EMBEDDED

if TYPE_CHECKING:
    import torch

    from ..configuration_macosnet import MaCoSNetConfig
    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Of a repository, what a model is loaded from; not its checkpoints or other formats.
_HUB_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors", _INDEX]
_PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "model.pth.tar", "model.bin", "model.ckpt")
_FLOATS = ("F16", "BF16", "F32", "F64")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save is a zip of pickles


def pick_device(device: str = "auto") -> torch.device:
    """`"auto"` is CUDA where there is one, else the CPU.

    Raises:
        InputError: if the device is unknown or not there.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"There is no device called {device!r}; use auto, cpu or cuda.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError("This machine has no CUDA device that can be used; use cpu or auto.")
    return chosen


def check_model_folder(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder from which a model could not be loaded again: safetensors opens names in UTF-8 only.

    Raises:
        OutputError: if the folder, or one above it, has another name.
    """
    try:
        os.path.abspath(folder).encode("utf-8")
    except UnicodeEncodeError:
        raise OutputError(
            f"{os.fspath(folder)} has a name that is not UTF-8, and a model could not be loaded from there; "
            "choose another one."
        ) from None


def check_checkpoint(checkpoint: str | os.PathLike[str]) -> None:
    """Checks a checkpoint folder without importing torch; a name that can only be the id of a Hub repository passes.

    The names in `EMBEDDED` stand for the checkpoints of the package; write `./lite` for a folder of such a name.

    Raises:
        CheckpointError: if there is no such folder, one of its files is missing or damaged, its weights are a pickle,
            or it holds another kind of model.
    """
    name = os.fspath(checkpoint)
    name = EMBEDDED.get(name, name)
    if os.path.isdir(name):
        _check_folder(Path(name), f"The checkpoint folder {name}")
    elif os.path.exists(name):
        raise CheckpointError(f"{name} is a file; a checkpoint is a folder or the id of a Hub repository.")
    elif not name or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise CheckpointError(f"There is no checkpoint folder {name!r}.")
    elif close := difflib.get_close_matches(name, EMBEDDED, n=1, cutoff=0.75):
        raise CheckpointError(f"There is no checkpoint {name!r}; is {close[0]!r} meant, which is in the package?")


def fetch_checkpoint(checkpoint: str | os.PathLike[str]) -> str:
    """The folder of a checkpoint, whose files are fetched from the Hub unless it is a folder or embedded.

    Raises:
        CheckpointError: as [`check_checkpoint`], and if the files cannot be had.
    """
    name = os.fspath(checkpoint)
    name = EMBEDDED.get(name, name)
    check_checkpoint(name)
    return name if os.path.isdir(name) else _from_hub(name)


@collector_paused()
def load_model_and_processor(
    checkpoint: str | os.PathLike[str] = DEFAULT_CHECKPOINT, device: str | torch.device = "auto"
) -> tuple[MaCoSNetForKeypointMatching, MaCoSNetImageProcessor]:
    """Loads a model, in evaluation mode on a device, and its processor.

    Reads safetensors weights only and runs this package's classes only: a checkpoint's Python files are ignored. Where
    a folder holds a graph of its encoder (`macosnet export --encoder`) and onnxruntime is installed, that computes the
    features on a CPU; graphs are not fetched from the Hub.

    Args:
        checkpoint: a folder, the id of a Hub repository, or the name of an embedded checkpoint (`"lite"`, `"base"`).
        device: `"auto"`, `"cpu"`, `"cuda"`, or a `torch.device`.

    Raises:
        CheckpointError: if a file is missing or damaged, the weights are a pickle, or the architecture is another.
        InputError: if the device is not there.
    """
    name = os.fspath(checkpoint)
    name = EMBEDDED.get(name, name)
    folder = fetch_checkpoint(name)  # before torch is imported, for a quick answer
    target = pick_device(device) if isinstance(device, str) else device

    from ..configuration_macosnet import MaCoSNetConfig
    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching
    from .encoder_graph import use_encoder_graph
    from .folding import fold_batch_norms

    try:
        with quiet_transformers():
            _check_header(name, Path(folder), MaCoSNetConfig.from_pretrained(folder))
            model = MaCoSNetForKeypointMatching.from_pretrained(folder, use_safetensors=True)
            processor = MaCoSNetImageProcessor.from_pretrained(folder)
    except CheckpointError:
        raise
    except Exception as error:
        # transformers, safetensors and timm raise many kinds for a damaged checkpoint.
        raise CheckpointError(f"The checkpoint in {name} cannot be used ({_first_line(error)}).") from error
    for key, weight in model.state_dict().items():
        if fault := fault_of_values(key, weight):
            raise CheckpointError(f"The weights of {name} are damaged: {key} {fault}.")
    _check_processor(name, model, processor)
    if target.type == "cpu":
        fold_batch_norms(model.macosnet)
        use_encoder_graph(model.macosnet, folder)
    return model.to(target).eval(), processor


def _from_hub(name: str) -> str:
    """The folder, in the Hub client's cache, with the files of a repository that a model is loaded from.

    Only these files are fetched. Without a network the cache is used, and nothing is retried: transformers alone takes
    half a minute to say that a mistyped folder name is no folder.

    Raises:
        CheckpointError: naming the file that is missing, and a remedy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    lead = f"{name!r} is no folder here, and could not be had from the Hub"
    remedy = (
        "To go on without a network, pass the folder of a checkpoint, or run `hf download "
        f"{name}` once where there is one"
    )
    with quiet_transformers():
        online = _hub_answers(name)
        try:
            folder = snapshot_download(name, allow_patterns=_HUB_FILES, etag_timeout=5, local_files_only=not online)
        except HFValidationError as error:
            raise CheckpointError(f"{lead}: it cannot be the name of a repository.") from error
        except GatedRepoError as error:
            raise CheckpointError(f"{lead}: ask for access on its page, then run `hf auth login`.") from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{lead}: there is no repository of that name, or it is private and needs `hf auth login`."
            ) from error
        except LocalEntryNotFoundError as error:
            raise CheckpointError(
                f"{lead}: there is no connection, and config.json is not in the cache. {remedy}."
            ) from error
        except Exception as error:  # the client and its transport raise many kinds
            raise CheckpointError(f"{lead} ({_first_line(error)}).") from error
    _check_folder(Path(folder), f"The repository {name} on the Hub" if online else f"The cached copy of {name}")
    return folder


def _hub_answers(name: str) -> bool:
    """Whether the Hub answers, asked once; the client itself asks six times, over 23 seconds."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=5)
    except HfHubHTTPError:  # no such repository, for instance: an answer
        return True
    except Exception:  # the transport raises kinds of its own; offline mode is another
        return False
    return True


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences progress bars, load report and retry lines; our own error says what is wrong."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".:")


# ---------------------------------------------------------------------------------------------------------------------
# Before torch is imported
# ---------------------------------------------------------------------------------------------------------------------


def _check_folder(folder: Path, what: str) -> None:
    for required in ("config.json", "preprocessor_config.json"):
        if not (folder / required).is_file():
            raise CheckpointError(f"{what} has no {required}.")
        settings = _read_json(folder / required)
        if required == "config.json" and settings.get("model_type") != "macosnet":
            raise CheckpointError(
                f"{folder} holds a {settings.get('model_type') or 'nameless'} model, not a MaCoSNet checkpoint."
            )
    if (folder / _WEIGHTS).is_file():
        _check_safetensors(folder / _WEIGHTS)
    elif (folder / _INDEX).is_file():
        for shard in _shards(folder / _INDEX):
            if not os.path.isfile(folder / shard):  # pathlib raises for a name that is too long
                raise CheckpointError(f"{what} has no {shard}.")
            _check_safetensors(folder / shard)
    else:
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        if pickles:
            raise _pickle_error(folder / pickles[0])
        raise CheckpointError(f"{what} has no {_WEIGHTS}.")


def _shards(index: Path) -> list[str]:
    """Names of the files that an index of weights lists; they lie beside it."""
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{index} is damaged: it names no weights.")
    for shard in shards.values():
        if os.path.basename(shard) != shard:
            raise CheckpointError(f"{index} is damaged: {shard!r} is no file beside it.")
    return sorted(set(shards.values()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}.") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is damaged: it holds no settings.")
    return settings


def _check_safetensors(path: Path) -> None:
    """Checks the header, which safetensors compares with the length of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start.startswith(PICKLE_STARTS):
            raise _pickle_error(path)
        with safe_open(path, framework="numpy"):
            pass
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut off ({_first_line(error)}).") from error


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle, which can run code when it is loaded; only weights in the safetensors format are read."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def _check_header(name: str, folder: Path, config: MaCoSNetConfig) -> None:
    """Compares the weights that the files announce with those of the architecture, before memory is taken for either.

    transformers would take it for every weight that config.json asks for, and fill with random numbers what the files
    lack. A model without memory takes 0.06 s.

    Raises:
        CheckpointError: naming the weights that are missing, of another shape or no floating-point numbers.
    """
    import torch
    from safetensors import safe_open

    from ..modeling_macosnet import MaCoSNetForKeypointMatching

    with torch.device("meta"):
        model = MaCoSNetForKeypointMatching(config)
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    single = (folder / _WEIGHTS).is_file()
    for file in [_WEIGHTS] if single else _shards(folder / _INDEX):
        with safe_open(folder / file, framework="numpy") as weights:
            for key in weights.keys():  # noqa: SIM118 (it is no dict)
                announced = weights.get_slice(key)
                found[key] = tuple(announced.get_shape()), announced.get_dtype()
    faults: dict[str, list[str]] = {"lack": [], "have another shape for": [], "hold no floating-point numbers in": []}
    lack, reshaped, typed = faults.values()
    prefix = f"{model.base_model_prefix}."
    for key, wanted in model.state_dict().items():
        # The weights of `MaCoSNetModel` alone have names without the prefix.
        shape, dtype = found.get(key) or found.get(key.removeprefix(prefix)) or (None, "")
        if shape is None:
            lack.append(key)
        elif shape != tuple(wanted.shape):
            reshaped.append(key)
        elif wanted.is_floating_point() and dtype not in _FLOATS:
            typed.append(key)
    for fault, names in faults.items():
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(
                f"The weights of {name} {fault} {shown}: they do not fit the architecture in its config.json."
            )


def fault_of_values(name: str, weight: torch.Tensor) -> str:
    """What is wrong with the numbers of a weight, after its name in a sentence; empty if nothing is."""
    if not weight.isfinite().all():
        return "holds values that are not finite numbers"
    if name.endswith("running_var") and (weight < 0).any():
        return "holds negative variances"
    return ""


def _check_processor(name: str, model: MaCoSNetForKeypointMatching, processor: MaCoSNetImageProcessor) -> None:
    """Processes one tiny image: nothing else checks the settings before the first image."""
    import numpy as np
    from PIL import Image

    size = model.config.image_size
    try:
        asked = (processor.size["height"], processor.size["width"])
        if max(asked) > 10 * size:  # an image of the size that a damaged or hostile file asks for may not fit anywhere
            raise ValueError(f"images of {asked[1]}x{asked[0]} pixels, but the model takes {size}x{size}")
        with np.errstate(all="ignore"):
            pixels = processor.preprocess_views([Image.new("RGB", (4, 4))], return_tensors="pt")["pixel_values"]
    except Exception as error:
        # Settings of any type and value reach numpy and PIL from here.
        raise CheckpointError(
            f"The preprocessor_config.json of {name} cannot be used ({_first_line(error)})."
        ) from error
    if tuple(pixels.shape) != (1, 3, size, size):
        raise CheckpointError(
            f"The preprocessor_config.json of {name} makes images of {pixels.shape[-1]}x{pixels.shape[-2]} pixels, "
            f"but its model takes {size}x{size}."
        )
    if not pixels.isfinite().all():
        raise CheckpointError(
            f"The preprocessor_config.json of {name} is damaged: it turns pixels into numbers that are not finite."
        )
