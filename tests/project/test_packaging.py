"""The sdist and the wheel, as pip makes and installs them, and the installed package away from the repository."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from gradio.media import get_image
from packaging.requirements import Requirement

import macosnet_hf
from macosnet_hf.io.package import EMBEDDED

pytest.importorskip("setuptools", minversion="77.0.3", reason="building needs setuptools 77.0.3 or newer")

ROOT = Path(__file__).resolve().parents[2]
NAME = f"macosnet_hf-{macosnet_hf.__version__}"
PHOTOS = [get_image(name) for name in ("cheetah1.jpg", "lion.jpg")]


def call(*command: object, cwd: Path, **environment: str) -> str:
    """What a program prints; the test fails with its errors where it fails."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    completed = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built from a copy of the repository, in which there are things that do not belong into it."""
    sources = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "app.py", "model_card.md"):
        shutil.copy(ROOT / name, sources)
    for folder in ("macosnet_hf", "tests", "training", "benchmarks", "docs"):
        shutil.copytree(
            ROOT / folder, sources / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    (sources / "runs").mkdir()
    (sources / "runs" / "photo.jpg").write_bytes(b"not an image of ours")
    built = call(
        sys.executable, "-c", "from setuptools import build_meta; print(build_meta.build_sdist('dist'))", cwd=sources
    )
    return sources / "dist" / built.split()[-1]


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    """Built by pip from the sdist alone, as for somebody who installs from source."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    call(sys.executable, "-m", "pip", "wheel", *options, "-w", "from-sdist", sdist, cwd=sdist.parent)
    (built,) = (sdist.parent / "from-sdist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` folder of an environment with the wheel; its dependencies are those of this environment, linked."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    # After its own packages, so that the wheel comes first whatever is installed here.
    paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    own = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (own / "dependencies.pth").write_text("\n".join(paths) + "\n")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--ignore-installed", "--quiet")
    call(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    return folder / "bin"


# ---- contents --------------------------------------------------------------------------------------------------------


def package_files() -> set[str]:
    """What the package consists of: its modules, the checkpoints with copies of those that travel with it, the demo's
    JavaScript, CSS and HTML, and the settings of `macosnet adapt`."""
    package = ROOT / "macosnet_hf"
    folders = (*map(Path, EMBEDDED.values()), package / "demo" / "assets")
    files = [*package.rglob("*.py"), *(path for folder in folders for path in folder.iterdir() if path.is_file())]
    own = {path.relative_to(ROOT).as_posix() for path in files}
    return own | {"macosnet_hf/py.typed", "macosnet_hf/training/adapt.yaml"}


def test_sdist_holds_the_sources_of_the_package_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)  # a link would break where there are none
    files = {member.name.removeprefix(f"{NAME}/") for member in members if member.isfile()}
    own = {name for name in files if not name.startswith("macosnet_hf.egg-info/")}
    assert own == package_files() | {
        *("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"),
        *("PKG-INFO", "setup.cfg"),  # written by setuptools
    }


def test_wheel_from_the_sdist_holds_the_package_byte_for_byte(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        written = {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
    about = {name for name in written if name.startswith(f"{NAME}.dist-info/")}
    assert set(written) - about == package_files()
    assert not [name for name in written if name.endswith((".pyc", ".bin", ".pt", ".pth", ".pkl"))]
    for name in package_files():
        assert written[name] == hashlib.sha256((ROOT / name).read_bytes()).hexdigest(), name


def test_licences_of_code_and_weights_are_inside(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(f"{NAME}.dist-info/licenses/{name}").decode() for name in ("LICENSE", "NOTICE")}
        metadata = archive.read(f"{NAME}.dist-info/METADATA").decode()
    assert "Apache License" in texts["LICENSE"]
    assert "EfficientNet-Lite0" in texts["NOTICE"]
    assert "ML Illustrated" in texts["NOTICE"]
    assert re.search(r"^License-Expression: Apache-2\.0$", metadata, re.MULTILINE)
    card = (Path(macosnet_hf.DEFAULT_CHECKPOINT) / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card


# ---- the installed package -------------------------------------------------------------------------------------------


def test_the_installed_package_is_the_wheel_s_and_light(installed, tmp_path):
    code = (
        "import json, sys, time; start = time.process_time(); import macosnet_hf; "
        "seconds = time.process_time() - start; "
        "print(json.dumps([macosnet_hf.__file__, seconds, 'torch' in sys.modules or 'transformers' in sys.modules]))"
    )
    runs = [json.loads(call(installed / "python", "-c", code, cwd=tmp_path)) for _ in range(3)]
    assert Path(runs[0][0]).is_relative_to(installed.parent)
    assert min(seconds for _, seconds, _ in runs) < 1  # the machine may be busy
    assert not any(heavy for *_, heavy in runs)


def test_the_installed_command_matches_two_images_with_the_embedded_checkpoint(installed, tmp_path):
    call(installed / "macosnet", "match", *PHOTOS, "--output-dir", "result", cwd=tmp_path)
    document = json.loads((tmp_path / "result" / "matches.json").read_text())
    assert document["matches"]
    assert {path.name for path in (tmp_path / "result").iterdir()} >= {"matches.png", "source_mask.png"}


def test_the_installed_checkpoint_s_own_code_is_that_of_the_package(installed, tmp_path):
    """`trust_remote_code` on the installed folder: the copies that travel with the weights work by themselves."""
    code = """
import importlib.util
from pathlib import Path
# Found, not imported: the package would register its own classes.
folder = Path(importlib.util.find_spec("macosnet_hf").origin).parent / "pretrained" / "macosnet-lite"
from transformers import AutoModelForKeypointMatching
model = AutoModelForKeypointMatching.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
print(sum(parameter.numel() for parameter in model.parameters()))
"""
    printed = call(installed / "python", "-c", code, cwd=tmp_path, HF_HOME=str(tmp_path / "cache"))
    assert int(printed.split()[-1]) > 4_000_000


def test_a_user_s_type_checker_sees_the_types(installed, tmp_path):
    """`py.typed` is shipped, and lazy names have their types all the same."""
    pytest.importorskip("mypy", reason="mypy is not installed (extra `dev`)")
    (tmp_path / "user.py").write_text(
        "from macosnet_hf import InputError, load_image, match_pair\n"
        "from macosnet_hf.evaluation.metrics import jaccard\n"
        "reveal_type(match_pair)\n"
        "reveal_type(load_image)\n"
        "reveal_type(jaccard)\n"
        "reveal_type(InputError('x'))\n"
    )
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\ncheck_untyped_defs = True\nstrict = True\n"
        # What is asked is whether this package is typed; that of its dependencies takes minutes to read.
        "[mypy-torch.*,transformers.*,numpy.*,PIL.*]\nfollow_imports = skip\nfollow_imports_for_stubs = True\n"
    )
    printed = call(
        sys.executable,
        *("-m", "mypy", "--python-executable", installed / "python", "--cache-dir", tmp_path / "cache", "user.py"),
        cwd=tmp_path,
    )
    revealed = re.findall(r'Revealed type is "(.*)"', printed)
    assert len(revealed) == 4
    assert not [kind for kind in revealed if kind == "Any"]
    assert "macosnet_hf.inference.pair.PairResult" in revealed[0]
    assert "float" in revealed[2]
    assert revealed[3].removesuffix("?") == "macosnet_hf.errors.InputError"


# ---- versions --------------------------------------------------------------------------------------------------------


def test_every_lower_bound_is_one_that_was_tried():
    """`docs/reliability.md` names, for each dependency, the lowest version that the tests passed with."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or newer")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["demo"], *extras["train"], *extras["export"]]
    declared = [Requirement(line) for line in lines]
    bounds = {(each.name, str(each.specifier).removeprefix(">=")) for each in declared}
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    section = page.split("\n## Packaging\n")[1].split("\n## ")[0]
    tried = set(re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \|", section, re.MULTILINE))
    assert bounds == tried
