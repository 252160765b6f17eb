"""Installs the built package with the lowest or the newest versions that it allows, and runs the tests on them.

    python tests/reliability/versions.py lowest|newest [--reuse-torch] [--folder FOLDER] [tests ...]

Builds sdist and wheel, installs the wheel with its extras `demo`, `train` and `export` into a new environment
(`lowest`: every direct dependency at its lower bound; `newest`: whatever the index has), asks pip whether all of it
agrees, and runs the tests of the checkout there (by default those of the library and the app). `--reuse-torch` links
torch and what belongs to it from the environment that runs this script, for these are gigabytes. Needs Python 3.11.
`tests/test_packaging.py` is the quick form; docs/reliability.md has the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("demo", "train", "export")
TOOLS = ("hypothesis", "psutil", "pytest", "pytest-timeout", "scikit-image", "setuptools", "packaging")
TORCH = re.compile(r"(torch|torchvision|triton|nvidia|cuda)\b", re.IGNORECASE)
# What runs without a browser, without git and without the tools that check style.
LEFT_OUT = ("test_browser.py", "test_package.py", "test_packaging.py", "test_docs.py", "test_load.py")


def run(*command: object, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def lower_bounds(project: dict) -> list[str]:
    """`name==version` of every direct dependency at its lower bound (where that names no patch, at its last one)."""
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in (*EXTRAS, "dev") for line in extras[extra])]
    bounds: dict[str, str] = {}
    for each in map(Requirement, lines):
        bound = str(each.specifier).removeprefix(">=")
        if bound:  # an extra may ask for more than the package itself
            bounds[each.name] = max(bound, bounds.get(each.name, bound), key=Version)
    bounds.pop("torchvision", None)  # each goes with one torch, and the extras ask for a newer one
    return [f"{name}=={bound}{'' if bound.count('.') > 1 else '.*'}" for name, bound in bounds.items()]


def link_torch(folder: Path) -> list[str]:
    """Links torch and what belongs to it into a folder; returns their versions as constraints."""
    folder.mkdir()
    pins = []
    for each in metadata.distributions(path=[sysconfig.get_path("purelib")]):
        name = each.metadata["Name"]
        if not TORCH.match(name.replace("-", " ").replace("_", " ")):
            continue
        pins.append(f"{name}=={each.version}")
        for top in {Path(str(file)).parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            with contextlib.suppress(FileExistsError):  # several share the folder nvidia/
                (folder / top).symlink_to(Path(str(each.locate_file(top))))
    return pins


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", choices=["lowest", "newest"])
    parser.add_argument("--reuse-torch", action="store_true", help="link the torch of this environment")
    parser.add_argument("--folder", type=Path, help="where to work; it stays afterwards (default: a temporary folder)")
    parser.add_argument("tests", nargs="*", help="test files or options of pytest")
    args = parser.parse_intermixed_args()
    tests = args.tests or sorted(str(path) for path in (ROOT / "tests").glob("test_*.py") if path.name not in LEFT_OUT)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder / "dist", ROOT)
        (wheel,) = (folder / "dist").glob("*.whl")
        run(sys.executable, "-m", "venv", folder / "environment")
        python = folder / "environment" / "bin" / "python"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        pins = lower_bounds(project) if args.versions == "lowest" else []
        if args.reuse_torch:
            linked = link_torch(folder / "torch")
            (packages,) = (folder / "environment" / "lib").glob("python*/site-packages")
            (packages / "linked_torch.pth").write_text(f"{folder / 'torch'}\n")
            pins = [pin for pin in pins if not TORCH.match(pin)] + linked
        (folder / "versions.txt").write_text("\n".join(pins) + "\n")
        tools = [tool for tool in TOOLS if tool != "setuptools"] + ["setuptools>=77.0.3"]
        run(python, "-m", "pip", "install", "-q", "-c", folder / "versions.txt", f"{wheel}[{','.join(EXTRAS)}]", *tools)
        run(python, "-m", "pip", "check")
        run(python, "-m", "pip", "freeze")
        completed = subprocess.run(
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
    return completed.returncode


if __name__ == "__main__":
    sys.exit(main())
