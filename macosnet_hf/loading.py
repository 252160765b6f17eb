"""From a checkpoint (folder or Hub id) to a model and its processor; every fault of it is said in one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from . import DEFAULT_CHECKPOINT
from .errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

    from .image_processing_macosnet import MaCoSNetImageProcessor
    from .modeling_macosnet import MaCoSNetForKeypointMatching

_PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "model.pth.tar", "model.bin", "model.ckpt")


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
        raise InputError("This machine has no CUDA device; use --device cpu or auto.")
    return chosen


def load_model_and_processor(
    checkpoint: str | os.PathLike[str] = DEFAULT_CHECKPOINT, device: str | torch.device = "auto"
) -> tuple[MaCoSNetForKeypointMatching, MaCoSNetImageProcessor]:
    """Loads a model, in evaluation mode on a device, and its processor.

    Only safetensors weights are read, and only this package's own classes run: a checkpoint's Python files are ignored.

    Args:
        checkpoint: a folder, or the id of a Hub repository.
        device: `"auto"`, `"cpu"`, `"cuda"`, or a `torch.device`.

    Raises:
        CheckpointError: if a file is missing or damaged, the weights are a pickle, or the architecture is another.
        InputError: if the device is not there.
    """
    target = pick_device(device) if isinstance(device, str) else device
    name = os.fspath(checkpoint)
    if os.path.isdir(name):
        _check_folder(Path(name))
    elif os.path.exists(name):
        raise CheckpointError(f"{name} is a file; a checkpoint is a folder or the id of a Hub repository.")
    elif name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or not name:
        raise CheckpointError(f"There is no checkpoint folder {name!r}.")

    from transformers.utils import logging

    from .image_processing_macosnet import MaCoSNetImageProcessor
    from .modeling_macosnet import MaCoSNetForKeypointMatching

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = MaCoSNetForKeypointMatching.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, weights_only=True
        )
        processor = MaCoSNetImageProcessor.from_pretrained(name)
    except CheckpointError:
        raise
    except Exception as error:
        # transformers, safetensors and the Hub client raise many kinds for a damaged or absent checkpoint.
        if os.path.isdir(name):
            raise CheckpointError(f"The checkpoint in {name} cannot be used: {_first_line(error)}") from error
        raise CheckpointError(
            f"{name!r} is no folder here, and could not be had from the Hub ({_first_line(error)}). Without a network, "
            "pass the folder of a checkpoint that is on this machine."
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if wrong:
        kind, names = next(iter(wrong.items()))
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        fault = "lack" if kind == "missing_keys" else "have another shape for"
        raise CheckpointError(f"The weights of {name} {fault} {shown}: this is not a checkpoint of this architecture.")
    return model.to(target).eval(), processor


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")


def _check_folder(folder: Path) -> None:
    """Finds what a person would have to mend, before the libraries fail in their own words."""
    for required in ("config.json", "preprocessor_config.json"):
        path = folder / required
        if not path.is_file():
            raise CheckpointError(f"The checkpoint folder {folder} has no {required}.")
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {_first_line(error)}.") from error
        if not isinstance(settings, dict):
            raise CheckpointError(f"{path} is damaged: it holds no settings.")
        if required == "config.json" and settings.get("model_type") != "macosnet":
            raise CheckpointError(
                f"{folder} holds a {settings.get('model_type') or 'nameless'} model, not a MaCoSNet checkpoint."
            )
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        return
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]} is a pickle, which can run code when it is loaded; only model.safetensors is read."
        )
    raise CheckpointError(f"The checkpoint folder {folder} has no model.safetensors.")
