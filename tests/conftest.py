"""Shared test set-up: no network, single-threaded numerics are not forced; models that several files use."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

# A shell that starts something in the background has it ignore Ctrl+C, and what ignores a signal hands that on to every
# program it starts; those that the tests interrupt would never hear of it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Imports of the fixtures stand inside: torch takes seconds, and not every test needs it.


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory) -> Iterator[None]:
    """What libraries leave in the temporary folder goes with the run's own (gradio's client: a folder at each call)."""
    before = tempfile.tempdir
    tempfile.tempdir = str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = before


@pytest.fixture(scope="session")
def start_model(tmp_path_factory) -> Path:
    """A folder with the small network and its processor, to read only."""
    from small_models import save_small_checkpoint

    return save_small_checkpoint(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def network() -> dict[str, Any]:
    """The embedded checkpoint as the arguments `model` and `processor`."""
    from macosnet_hf.io.checkpoints import load_model_and_processor

    model, processor = load_model_and_processor(device="cpu")
    return {"model": model, "processor": processor}


@pytest.fixture(scope="session")
def large_lion(tmp_path_factory) -> str:
    """The path of an image that is larger than a working copy."""
    from PIL import Image
    from real_photos import LION

    path = tmp_path_factory.mktemp("photos") / "large lion.jpg"
    with Image.open(LION) as photo:
        photo.resize((2001, 1501)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def pair(network, large_lion) -> Any:
    """Two image files, matched: neither square nor of the same size, and one processed as a smaller copy."""
    from real_photos import TOWER

    from macosnet_hf.inference.files import match_files

    return match_files(TOWER, large_lion, **network, refine="none")
