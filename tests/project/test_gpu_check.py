"""`benchmarks/gpu_check.py` on a CPU, and what becomes of a check that breaks, hangs or comes too late."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("accelerate", reason="the checks train (extra `train`)")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
sys.path.append(str(SCRIPT.parent))
from gpu_checks.report import Check, Figures, Report, Skipped, run_checks  # noqa: E402

# What a GPU machine may lack must not be needed.
WITHOUT = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("datasets", "gradio", "pymatting"):
            raise ImportError(f"{name} is absent")

sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ONLY_ON_A_GPU = {"synchronisation", "memory", "two_processes"}
NOT_WHEN_SMALL = {"training_speed"}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[dict, str]:
    folder = tmp_path_factory.mktemp("gpu check")
    command = [sys.executable, "-c", WITHOUT, str(SCRIPT), "--device", "cpu", "--small", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=_environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "gpu_check.json").read_text()), (folder / "gpu_check.md").read_text()


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def test_every_check_passes_on_a_cpu_or_says_why_not(results):
    checks = {check["name"]: check for check in results[0]["checks"]}
    skipped = {name for name, check in checks.items() if check["status"] == "skipped"}
    assert skipped == ONLY_ON_A_GPU | NOT_WHEN_SMALL
    assert all(checks[name]["reason"] for name in skipped)
    assert {check["status"] for name, check in checks.items() if name not in skipped} == {"passed"}
    assert all(check["figures"] for name, check in checks.items() if name not in skipped)


def test_the_checks_compare_something(results):
    checks = {check["name"]: check["figures"] for check in results[0]["checks"]}
    # Float64 and another layout of the memory are no copies of what they are compared with.
    assert checks["outputs_exact"]["tps"]["value"] > 0
    assert checks["gradients_fast"]["gradient of encoder"]["value"] > 0
    assert checks["half_precision"]["bfloat16 masks"]["value"] > checks["half_precision"]["float16 masks"]["value"] > 0
    assert set(checks["orientations"]["mirror: chosen"]["value"]) & set("1234567")


def test_the_table_has_a_row_a_check(results):
    found, table = results
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row.split(":")[0].removeprefix("| ") for row in rows] == [check["name"] for check in found["checks"]]
    assert {row.count("|") for row in rows} == {5}


def test_a_check_that_breaks_hangs_or_comes_too_late_leaves_the_others(tmp_path, capsys):
    def breaks(bench: object, figures: Figures) -> None:
        figures.add("before", 1.0)
        raise ValueError("a reason")

    def hangs(bench: object, figures: Figures) -> None:
        time.sleep(60)

    def cannot(bench: object, figures: Figures) -> None:
        raise Skipped("no second device")

    def too_far(bench: object, figures: Figures) -> None:
        figures.at_most("error", 2.0, 1.0)
        figures.at_least("ratio", float("nan"), 3.0)

    def good(bench: object, figures: Figures) -> None:
        figures.at_most("error", 1.0, 1.0)

    several = {"breaks": breaks, "hangs": hangs, "cannot": cannot, "too_far": too_far, "good": good}
    checks = [Check(name, function, "", "", seconds=0.5) for name, function in several.items()]
    report = Report({}, tmp_path)
    bench = SimpleNamespace(cuda=True)
    run_checks(checks, bench, report, 30, time.monotonic())
    run_checks([Check("late", good, "", "")], bench, report, 0, time.monotonic())
    found = {each["name"]: each for each in json.loads((tmp_path / "gpu_check.json").read_text())["checks"]}
    assert [found[name]["status"] for name in (*several, "late")] == [
        "failed",
        "failed",
        "skipped",
        "failed",
        "passed",
        "skipped",
    ]
    assert "ValueError: a reason" in found["breaks"]["reason"]
    assert found["breaks"]["figures"]["before"]["value"] == 1
    assert "stopped after" in found["hangs"]["reason"]
    assert "error is 2, not at most 1" in found["too_far"]["reason"]
    assert "ratio is nan" in found["too_far"]["reason"]
    assert "time" in found["late"]["reason"]
    assert report.failed
    assert "too_far" in capsys.readouterr().out
