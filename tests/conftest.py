"""Set-up that all tests share: no network, Ctrl+C, one temporary folder, and models that several files use."""

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

# A shell starts background jobs with SIGINT ignored, and child processes inherit that: the programs that the tests
# interrupt would never receive it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The fixtures import inside: torch takes seconds, and not every test needs it.


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory) -> Iterator[None]:
    """Gives the run a temporary folder of its own, removed at its end: libraries leave files there (gradio's client at
    each call)."""
    before = tempfile.tempdir
    tempfile.tempdir = str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = before


@pytest.fixture(scope="session")
def start_model(tmp_path_factory) -> Path:
    """Folder with the small network and its processor; read only."""
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


@pytest.fixture(scope="session")
def tall_cheetah(tmp_path_factory) -> str:
    """The path of an image that is taller than wide."""
    from PIL import Image
    from real_photos import CHEETAH

    path = tmp_path_factory.mktemp("photos") / "tall cheetah.jpg"
    with Image.open(CHEETAH) as photo:
        photo.convert("RGB").resize((377, 600)).save(path, quality=95)
    return str(path)


@pytest.fixture(scope="module")
def pair(network, tall_cheetah, large_lion) -> Any:
    """Two image files, matched: neither square nor of the same size, and one processed as a smaller copy."""
    from macosnet_hf.inference.files import match_files

    return match_files(tall_cheetah, large_lion, **network, refine="none")
