"""`training/evaluate.py` under accelerate on two CPU processes gives the figures of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from archives import coseg, pf_willow, tss
from small_models import save_small_checkpoint
from training_runs import ROOT, environment

pytest.importorskip("accelerate", reason="accelerate is not installed (extra `train`)")

SCRIPT = ROOT / "training" / "evaluate.py"

# Several evaluations in one launch: starting two processes takes longer than the evaluations.
DRIVER = """
import json, runpy, sys
script = runpy.run_path(sys.argv[1])
status = max(script["main"](arguments) for arguments in json.loads(sys.argv[2]))
script["close"]()
sys.exit(status)
"""


def launch(processes: int, script: Path, *arguments: str) -> subprocess.CompletedProcess:
    # With `--cpu` accelerate starts a single process; with `--multi_gpu` several, on CPUs where there is no GPU.
    options = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    port = str(20000 + os.getpid() % 20000)
    return subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), *options),
            *("--main_process_port", port, str(script), *arguments),
        ],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )


def same(first, second, path=""):
    """Equal trees, numbers to 1e-6."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            if key != "seconds":
                same(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, float):
        assert first == pytest.approx(second, abs=1e-6), path
    else:
        assert first == second, path


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path):
    model = save_small_checkpoint(tmp_path / "model")
    willow = pf_willow(tmp_path / "willow")
    damaged = willow / "PF-dataset" / "car(G)" / "photo_001.png"
    damaged.write_bytes(b"x")
    runs = [
        ["pf-willow", "--data", str(willow), "--skip-invalid", "--predictions", "PREDICTIONS"],
        ["tss", "--data", str(tss(tmp_path / "tss"))],
        ["coseg", "--data", str(coseg(tmp_path / "coseg", classes=("Bird", "Cat", "Dog")))],
    ]

    def arguments(kind: str) -> list[list[str]]:
        options = ["--model", str(model), "--device", "cpu", "--refine", "otsu", "--batch-size", "1"]
        return [
            [str(tmp_path / f"p-{kind}") if word == "PREDICTIONS" else word for word in run]
            + [*options, "--json", str(tmp_path / f"{kind}-{run[0]}.json")]
            for run in runs
        ]

    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    two = launch(2, driver, str(SCRIPT), json.dumps(arguments("two")))
    assert two.returncode == 0, two.stderr[-3000:]
    one = subprocess.run(
        [sys.executable, str(driver), str(SCRIPT), json.dumps(arguments("one"))],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert one.returncode == 0, one.stderr[-3000:]
    for name in ("pf-willow", "tss", "coseg"):
        first, second = (json.loads((tmp_path / f"{kind}-{name}.json").read_text()) for kind in ("one", "two"))
        assert first["samples"] == {"pf-willow": 4, "tss": 6, "coseg": 9}[name]
        same(first, second)
    assert first["metrics"]["jaccard"] > 0
    # Both processes had something to do: each wrote shards of predictions.
    shards = sorted(path.name for path in (tmp_path / "p-two").glob("*.npz"))
    assert {name.split("-")[1] for name in shards} == {"000", "001"}


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_of_them_with_one_sentence(tmp_path):
    root = pf_willow(tmp_path)
    # The fourth batch goes to the second process.
    (root / "PF-dataset" / "duck(S)" / "photo_002.png").write_bytes(b"x")
    found = launch(
        2, SCRIPT, "pf-willow", "--data", str(root), "--baseline", "identity", "--batch-size", "4", "--device", "cpu"
    )
    assert found.returncode != 0
    assert found.stderr.count("error: ") == 1
    assert "photo_002.png" in found.stderr
