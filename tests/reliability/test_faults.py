"""Kills, full disks, two runs at a time: the quick form of tests/reliability/faults.py, and the faults it found.

Kills at chosen places of training are in test_training.py, of `prepare` in test_prepare.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from archives import coseg
from small_models import small_model, small_processor
from training_runs import environment, equal

from macosnet_hf import CheckpointError, MaCoSNetForKeypointMatching, OutputError
from macosnet_hf.datasets.prepare import MARKER, is_prepared, open_records, prepare
from macosnet_hf.evaluation import predictions
from macosnet_hf.evaluation.predictions import finish_predictions, has_predictions, start_predictions
from macosnet_hf.io.checkpoints import check_checkpoint
from macosnet_hf.io.output_folder import hold_folder, output_folder, release_folder, write_file

FAULTS = Path(__file__).resolve().parents[2] / "tests" / "reliability" / "faults.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
needs_training = pytest.mark.skipif(
    any(__import__("importlib.util").util.find_spec(name) is None for name in ("accelerate", "yaml")),
    reason="accelerate or PyYAML is not installed (extra `train`)",
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@needs_training
def test_kills_disks_workers_clocks_and_two_runs_at_a_time(tmp_path):
    """One kill of each command, and the rest with two of them; a minute of work on one core."""
    commands = ("segment", "prepare", "evaluate", "save", "train")
    scenarios = [f"kill-{name}" for name in commands] + ["disk", "read-only", "worker", "clock", "end-segment"]
    scenarios += [f"together-{name}" for name in ("segment", "prepare", "evaluate")]
    options = ["--moments", "1", "--only", ",".join(scenarios), "--commands", "prepare,evaluate"]
    done = subprocess.run(
        [sys.executable, FAULTS, *options, "--report", tmp_path / "report.json"],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
        check=False,
    )
    assert (tmp_path / "report.json").exists(), done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["faults"] == []
    assert done.returncode == 0
    counts = report["counts"]
    for name in (*(f"kill-{name}" for name in commands), "end-segment"):
        figures = counts[name]
        killed = figures.get("killed", 0) + figures.get("killed over an older output", 0)
        assert killed == 1
        assert figures["restarted and ended as if undisturbed"] == killed + figures.get("was through already", 0)
    assert counts["disk"]["refused in one sentence"] + counts["disk"].get("fitted", 0) == 2
    assert counts["disk"]["made good with room"] == 2
    assert counts["clock"]["same result"] == 2
    assert counts["worker"]["restarted and ended as if undisturbed"] == 1
    for name in ("segment", "prepare", "evaluate"):
        assert counts[f"together-{name}"]["ended well"] >= 1


# ---------------------------------------------------------------------------------------------------------------------
# Faults that were found
# ---------------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from macosnet_hf.io.output_folder import output_folder
with output_folder(sys.argv[1]) as folder:
    (folder / "half.txt").write_text("half")
    print(folder.name, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def running(tmp_path):
    """A run that is in the middle of writing into `tmp_path / "out"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, env=environment()
    )
    process.folder = process.stdout.readline().strip()
    yield process
    process.kill()
    process.wait()


def test_what_a_killed_run_left_is_removed_and_a_living_one_is_left_alone(tmp_path, running):
    """The temporary folders of killed runs stayed in the output folder for ever."""
    out = tmp_path / "out"
    with output_folder(out) as folder:
        (folder / "a.txt").write_text("a")
    assert names(out) == [running.folder, "a.txt"]
    assert names(out / running.folder) == ["half.txt"]
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert names(out) == [running.folder, "a.txt"]
    with output_folder(out) as folder:
        (folder / "b.txt").write_text("b")
    assert names(out) == ["a.txt", "b.txt"]


KILLED_BEFORE_THE_NAME = """
import os, signal, sys
from macosnet_hf import output_folder
output_folder.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
output_folder.write_file(sys.argv[1], "half")
"""


def test_what_a_killed_writer_left_of_a_file_is_removed(tmp_path):
    path = tmp_path / "figures [1].json"
    write_file(path, "old")
    (tmp_path / ".other.json.abc.partial").write_text("of another program")
    command = [sys.executable, "-c", KILLED_BEFORE_THE_NAME, str(path)]
    assert subprocess.run(command, env=environment(), check=False).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 3
    assert path.read_text() == "old"
    write_file(path, "new")
    assert names(tmp_path) == [".other.json.abc.partial", path.name]
    assert path.read_text() == "new"


KILLED_AT_A_MOVE = """
import os, signal, sys
from pathlib import Path
from macosnet_hf import output_folder
move, count = os.replace, 0
def replace(source, target):
    global count
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    move(source, target)
output_folder.os.replace = replace
with output_folder.output_folder(sys.argv[1]) as folder:
    for name in ("b_mask.png", "summary.json", "a_mask.png", "zebra_mask.png"):
        (folder / name).write_text("new")
"""


@pytest.mark.parametrize("moment", range(4))
def test_a_summary_never_stands_beside_files_of_another_run(tmp_path, moment):
    """Files took their names in the order of the alphabet, the summary before some of those that it is about."""
    out = tmp_path / "out"
    with output_folder(out) as folder:
        for name in ("b_mask.png", "summary.json", "a_mask.png", "zebra_mask.png"):
            (folder / name).write_text("old")
    command = [sys.executable, "-c", KILLED_AT_A_MOVE, str(out), str(moment)]
    assert subprocess.run(command, env=environment(), check=False).returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists()


SAVES_KILLED_AT_EVERY_MOVE = """
import functools, os, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
from small_models import small_model, small_processor
from macosnet_hf import modeling_macosnet, saving
model = small_model(modeling_macosnet.MaCoSNetForKeypointMatching)
replace_model, moment, status = saving._replace_model, 0, signal.SIGKILL

def killed_at(left, partial, folder):
    def or_die(action):
        def act(*arguments):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return action(*arguments)
        return act
    os.replace, os.remove = or_die(os.replace), or_die(os.remove)
    replace_model(partial, folder)

while status == signal.SIGKILL:
    folder = shutil.copytree(sys.argv[2], os.path.join(sys.argv[3], str(moment)))
    child = os.fork()
    if child == 0:
        try:
            saving._replace_model = functools.partial(killed_at, moment)
            model.save_pretrained(folder)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    moment += 1
sys.exit(status)
"""


def test_a_model_that_is_saved_over_another_is_never_a_mixture_of_both(tmp_path):
    old = small_model(MaCoSNetForKeypointMatching, seed=1, local_matching_temperature=30.0)
    new = small_model(MaCoSNetForKeypointMatching)
    for part in (old, small_processor()):
        part.save_pretrained(tmp_path / "old")
    command = [sys.executable, "-c", SAVES_KILLED_AT_EVERY_MOVE, str(Path(__file__).parents[1]), str(tmp_path / "old")]
    subprocess.run([*command, str(tmp_path / "killed")], env=environment(), check=True)
    folders = sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name))
    found = []
    for folder in folders:
        try:
            check_checkpoint(folder)
        except CheckpointError:
            # nor does transformers load it, with its defaults
            with pytest.raises(OSError, match=r"model\.safetensors"):
                MaCoSNetForKeypointMatching.from_pretrained(folder)
            found.append(None)
        else:
            model = MaCoSNetForKeypointMatching.from_pretrained(folder)
            expected = {30.0: old}.get(model.config.local_matching_temperature, new)
            assert equal(model.state_dict(), expected.state_dict())
            found.append(expected)
    assert (found[0], found[-1]) == (old, new)
    assert len(found) > 10
    for folder in folders[1::6]:  # the same again ends as if nobody had been killed
        new.save_pretrained(folder)
        assert names(folder) == names(folders[-1])
        assert equal(MaCoSNetForKeypointMatching.from_pretrained(folder).state_dict(), new.state_dict())


KILLED_WHILE_REPLACING = """
import os, shutil, signal, sys
from macosnet_hf.datasets import prepare
removed = 0
def die(path, *rest, **options):
    global removed
    removed += 1
    if removed > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return unlink(path, *rest, **options)
unlink, os.unlink = os.unlink, die
prepare.prepare("coseg", sys.argv[1], sys.argv[2], overwrite=True, shard_bytes=1, row_group_bytes=1)
"""


@pytest.mark.parametrize("moment", [0, 1, 2, 4, 7])
def test_an_older_prepared_set_is_never_there_in_part(tmp_path, moment):
    """It was removed shard by shard under its own name: after a kill, `datasets` loaded what was left of it."""
    out = tmp_path / "out"
    prepare("coseg", coseg(tmp_path / "old", images=5), out, shard_bytes=1, row_group_bytes=1)
    new = coseg(tmp_path / "new", images=3)
    command = [sys.executable, "-c", KILLED_WHILE_REPLACING, str(new), str(out), str(moment)]
    assert subprocess.run(command, env=environment(), check=False).returncode == -signal.SIGKILL
    if is_prepared(out):
        assert len(list(open_records("coseg", out)[0])) in (6, 10)
    assert prepare("coseg", new, out, overwrite=True) == {"test": 6}
    assert len(list(open_records("coseg", out)[0])) == 6
    assert names(tmp_path) == ["new", "old", "out"]


def test_a_removal_that_was_cut_off_is_reported_and_repeated(tmp_path):
    """A partial folder that had lost its marker first was `in the way` for ever."""
    archive, partial = coseg(tmp_path / "in"), tmp_path / ".out.partial"
    partial.mkdir()  # cut off before the marker was there
    assert prepare("coseg", archive, tmp_path / "out") == {"test": 6}
    partial.mkdir()
    (partial / MARKER).touch()  # cut off within a removal: the marker is the last to go
    (partial / "README.md").write_text("the rest")
    assert prepare("coseg", archive, tmp_path / "out", overwrite=True) == {"test": 6}
    assert names(tmp_path) == ["in", "out"]


def test_two_evaluations_do_not_write_the_same_predictions(tmp_path):
    """The second removed what the first had written, and the first completed its set with shards of the second."""
    folder, partial = tmp_path / "p", tmp_path / "p.partial"
    partial.mkdir()
    (partial / "samples-000-00000.npz").write_bytes(b"of another run")
    held = hold_folder(partial)  # a mark of its own, as that of another process would be
    with pytest.raises(OutputError, match="Another run is writing the predictions"):
        start_predictions(folder)
    assert names(partial) == ["samples-000-00000.npz"]
    release_folder(held)
    (partial / ".DS_Store").touch()
    start_predictions(folder)
    start_predictions(folder)  # a run in this process that ended in an error does not shut out the next one
    np.savez(partial / "samples-000-00000.npz", **{"0|x": np.ones(1)})
    finish_predictions(folder, {}, {"a": ("samples-000-00000.npz", "0|x")})
    assert has_predictions(folder)
    assert not predictions._held
    assert names(tmp_path) == ["p"]


def test_marks_end_with_their_process(tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from macosnet_hf.io.output_folder import hold_folder\n"
            "hold_folder(Path(sys.argv[1])); print(flush=True); time.sleep(600)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    process.stdout.readline()
    with pytest.raises(BlockingIOError):
        hold_folder(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while True:
        try:
            release_folder(hold_folder(tmp_path))
            break
        except BlockingIOError:
            time.sleep(0.01)
