"""Facts about the installed package: its version and the checkpoints that come with it."""

from pathlib import Path

VERSION = "0.2.0"

_PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"

EMBEDDED: dict[str, str] = {name: str(_PRETRAINED / f"macosnet-{name}") for name in ("lite", "base")}
"""Folders of the checkpoints that are installed with the package, by the names that `--model` takes."""

DEFAULT_CHECKPOINT: str = EMBEDDED["lite"]
"""Folder of the checkpoint that is used where none is named; `from_pretrained` takes it as it is."""


def checkpoint_name(checkpoint: str) -> str:
    """The name of a checkpoint in result files: that of the Hub or a folder; without its path for an embedded one."""
    folder = EMBEDDED.get(checkpoint, checkpoint)
    return Path(folder).name if folder in EMBEDDED.values() else str(checkpoint)
