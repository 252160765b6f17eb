"""The package as such: light import, public names, auto classes, and what no file may hold."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import macosnet_hf

ROOT = Path(__file__).resolve().parents[2]
HEAVY_MODULES = {"torch", "torchvision", "transformers", "timm", "cv2", "datasets", "gradio", "accelerate", "scipy"}


def run_python(code: str, *, cwd: Path = ROOT, **environment: str) -> str:
    """What a fresh interpreter prints for `code`."""
    completed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


# ---- import ----------------------------------------------------------------------------------------------------------


def test_import_is_light_and_quick():
    code = (
        "import json, sys, time; start = time.process_time(); import macosnet_hf; "
        "print(json.dumps([time.process_time() - start, sorted(sys.modules)]))"
    )
    runs = [json.loads(run_python(code)) for _ in range(3)]
    seconds = min(run[0] for run in runs)  # of the processor: the machine may be busy
    assert seconds < 0.5
    assert not HEAVY_MODULES & set(runs[0][1])


def test_names_without_heavy_imports():
    """The checkpoint's folder, the errors and the version are there before torch is."""
    code = (
        "import sys, macosnet_hf as m; m.DEFAULT_CHECKPOINT; m.MaCoSNetError; m.__version__; dir(m); "
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert run_python(code).strip() == "False"


def test_every_public_name_resolves():
    listed = dir(macosnet_hf)
    for name in macosnet_hf.__all__:
        value = getattr(macosnet_hf, name)
        assert name in listed
        if hasattr(value, "__name__"):
            assert value.__name__ == name


def test_star_import_gives_the_public_names():
    namespace: dict[str, object] = {}
    exec("from macosnet_hf import *", namespace)
    assert set(macosnet_hf.__all__) <= set(namespace)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'macosnet_hf' has no attribute 'MaCoSNetForPoetry'"):
        macosnet_hf.MaCoSNetForPoetry  # noqa: B018
    with pytest.raises(ImportError):
        exec("from macosnet_hf import MaCoSNetForPoetry")


def test_all_errors_share_the_base():
    for name in ("CheckpointError", "DataError", "ImageError", "InputError", "OutputError"):
        assert issubclass(getattr(macosnet_hf, name), macosnet_hf.MaCoSNetError)


# ---- auto classes ----------------------------------------------------------------------------------------------------


def test_auto_classes_load_the_embedded_checkpoint():
    from transformers import AutoConfig, AutoModel, AutoModelForKeypointMatching, AutoProcessor

    assert type(AutoConfig.from_pretrained(macosnet_hf.DEFAULT_CHECKPOINT)) is macosnet_hf.MaCoSNetConfig
    matcher = AutoModelForKeypointMatching.from_pretrained(macosnet_hf.DEFAULT_CHECKPOINT)
    assert type(matcher) is macosnet_hf.MaCoSNetForKeypointMatching
    assert type(AutoModel.from_pretrained(macosnet_hf.DEFAULT_CHECKPOINT)) is macosnet_hf.MaCoSNetModel
    config = pickle.loads(pickle.dumps(AutoConfig.from_pretrained(macosnet_hf.DEFAULT_CHECKPOINT)))
    assert type(AutoModel.from_config(config)) is macosnet_hf.MaCoSNetModel
    assert type(AutoProcessor.from_pretrained(macosnet_hf.DEFAULT_CHECKPOINT)) is macosnet_hf.MaCoSNetImageProcessor


LOADS_BY_NAME = """
config = AutoConfig.from_pretrained(DEFAULT_CHECKPOINT)
pipelines = [pipeline(task, model=DEFAULT_CHECKPOINT) for task in ("keypoint-matching", "image-co-segmentation")]
loaded = [
    config,
    AutoModel.from_pretrained(DEFAULT_CHECKPOINT),
    AutoModelForKeypointMatching.from_pretrained(DEFAULT_CHECKPOINT),
    AutoImageProcessor.from_pretrained(DEFAULT_CHECKPOINT),
    *pipelines,
]
print([type(each).__module__ for each in loaded])
"""
AUTO_CLASSES = (
    "from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForKeypointMatching, pipeline"
)


@pytest.mark.parametrize(
    "imports",
    [
        ("from macosnet_hf import DEFAULT_CHECKPOINT", AUTO_CLASSES),
        (AUTO_CLASSES, "from macosnet_hf import DEFAULT_CHECKPOINT"),
        ("from macosnet_hf.modeling_macosnet import *; from macosnet_hf import DEFAULT_CHECKPOINT", AUTO_CLASSES),
        ("from macosnet_hf.pipeline_macosnet import *; from macosnet_hf import DEFAULT_CHECKPOINT", AUTO_CLASSES),
    ],
)
def test_importing_the_package_registers_all_classes_in_any_order(imports):
    """No class of the package is named, which a linter would call unused; and no `trust_remote_code`."""
    modules = ["configuration", "modeling", "modeling", "image_processing", "pipeline", "pipeline"]
    expected = [f"macosnet_hf.{name}_macosnet" for name in modules]
    assert run_python("\n".join((*imports, LOADS_BY_NAME))).strip().endswith(str(expected))


def test_registering_imports_nothing_before_transformers_does():
    code = (
        "import sys, macosnet_hf, transformers; print([name for name in sys.modules if name.startswith('macosnet_hf.')"
        " and name.endswith('_macosnet')], 'torch' in sys.modules); from transformers import AutoConfig; "
        "print('macosnet_hf.configuration_macosnet' in sys.modules, 'macosnet_hf.modeling_macosnet' in sys.modules)"
    )
    assert run_python(code).split("\n")[:2] == ["[] False", "True False"]


def test_a_class_that_cannot_be_registered_does_not_stop_an_import_of_transformers():
    code = """
import sys, warnings
import macosnet_hf

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "macosnet_hf.configuration_macosnet":
            raise ImportError("blocked by the test")

sys.meta_path.insert(0, Blocked())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers import AutoConfig
print([str(warning.message).startswith("macosnet_hf cannot register") for warning in caught][-1])
"""
    assert run_python(code).strip().endswith("True")


def test_registering_twice_changes_nothing():
    from macosnet_hf.io.registration import register_lazily

    before = list(sys.meta_path)
    register_lazily()
    assert sys.meta_path == before


# ---- embedded checkpoint ---------------------------------------------------------------------------------------------


def test_embedded_checkpoint_is_small_and_safe():
    paths = (path for path in Path(macosnet_hf.DEFAULT_CHECKPOINT).iterdir() if path.is_file())
    files = {path.name: path.stat().st_size for path in paths}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)
    assert sum(files.values()) <= 25_000_000


# ---- project files ---------------------------------------------------------------------------------------------------


def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or newer")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_requirements(name: str) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_requirements_of_the_space_are_those_of_the_package():
    declared = project()
    expected = {*declared["dependencies"], *declared["optional-dependencies"]["demo"]}
    assert {str(line) for line in read_requirements("requirements.txt")} == {
        str(Requirement(line)) for line in expected
    }


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_direct_dependency_has_one_fitting_pin(python):
    declared = project()
    pins: dict[str, list[str]] = {}
    for pin in read_requirements("constraints.txt"):
        if pin.marker is None or pin.marker.evaluate({"python_version": python, "python_full_version": f"{python}.0"}):
            pins.setdefault(canonical(pin.name), []).append(str(pin.specifier).removeprefix("=="))
    extras = declared["optional-dependencies"]
    for line in [
        *declared["dependencies"],
        *(line for extra in ("demo", "train", "dev", "browser") for line in extras[extra]),
    ]:
        wanted = Requirement(line)
        if canonical(wanted.name) == "macosnet-hf":
            continue
        versions = pins.get(canonical(wanted.name), [])
        assert len(versions) == 1, f"{wanted.name}: {versions}"
        assert SpecifierSet(str(wanted.specifier)).contains(versions[0]), f"{wanted} is pinned to {versions[0]}"


def project_files() -> list[Path]:
    """Tracked files, and those that would be tracked."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in files if path.is_file()]


FORBIDDEN = {
    "a path of one machine": rb"(?:^|[^\w.~-])/(?:work|root|home/\w+|Users/\w+|opt/pypi[\w-]*|tmp/\w+_jobs[\w.]*)/",
    "the host of a package index": rb"\b(?:test\.)?pypi\.(?:org|python)|python[h]osted\.|registry\.npm[j]s",
    "a secret": rb"\bhf_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY",
}


def test_forbidden_patterns_find_what_they_are_for():
    separator = b"/"
    for place in (b"work", b"root", b"home/someone", b"opt/pypi-more"):
        assert re.search(FORBIDDEN["a path of one machine"], b"x = '" + separator + place + b"/x'")
    assert not re.search(FORBIDDEN["a path of one machine"], b"docs/work/x ./work/x https://example.org/work/x")
    assert re.search(FORBIDDEN["the host of a package index"], b"https://pypi" + b".org/simple")
    assert re.search(FORBIDDEN["a secret"], b"hf" + b"_" + b"a" * 34)


def test_no_file_names_this_machine_or_a_secret():
    files = project_files()
    assert ROOT / "pyproject.toml" in files
    text_files = [
        path for path in files if path.suffix not in {".png", ".jpg", ".jpeg", ".webp", ".gif", ".safetensors", ".pdf"}
    ]
    found = [
        f"{path.relative_to(ROOT)} holds {what}: {match[0]!r}"
        for path in text_files
        for what, pattern in FORBIDDEN.items()
        if (match := re.search(pattern, path.read_bytes(), re.MULTILINE))
    ]
    assert not found


def test_no_unsafe_weights_or_large_files_are_tracked():
    files = project_files()
    assert not [path for path in files if path.suffix in {".pth", ".pt", ".ckpt", ".pkl", ".bin", ".tar"}]
    assert not [path for path in files if path.stat().st_size > 30_000_000]


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert "make test" in script.read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_without_a_target_lists_the_targets():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    for target in ("demo", "test", "lint", "benchmark", "clean"):
        assert re.search(rf"^ +make {target} +\S", shown, re.MULTILINE)
