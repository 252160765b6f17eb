"""Facts about the installed package: its version and the checkpoints that come with it."""

from pathlib import Path

VERSION = "0.2.0"

DEFAULT_CHECKPOINT: str = str(Path(__file__).resolve().parents[1] / "pretrained" / "macosnet-lite")
"""Folder of the checkpoint that is installed with the package; `from_pretrained` takes it as it is."""


def checkpoint_name(checkpoint: str) -> str:
    """The name of a checkpoint in result files: that of the Hub or a folder; without its path for the embedded one."""
    return Path(checkpoint).name if checkpoint == DEFAULT_CHECKPOINT else str(checkpoint)
