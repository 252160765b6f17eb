"""The scripts outside of the package start: benchmarks and the long tools of tests/reliability."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    # verdict_pairs.py draws pairs for verdicts.py and is no script.
    "benchmarks": sorted(path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()),
    "reliability": [ROOT / "tests" / "reliability" / f"{name}.py" for name in ("faults", "fuzz", "load", "mutants")],
}
# One process for all, so that torch is imported once.
HELP = """
import contextlib, io, runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    path = list(sys.path)
    sys.path.insert(0, script.rpartition("/")[0])
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
    assert "usage:" in said.getvalue(), script
    sys.path[:] = path
"""


@pytest.mark.parametrize("kind", SCRIPTS)
def test_every_script_explains_itself(kind):
    pytest.importorskip("gradio", reason="some scripts drive the demo")
    scripts = [path.as_posix() for path in SCRIPTS[kind]]
    assert len(scripts) >= 4
    done = subprocess.run([sys.executable, "-c", HELP, *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
