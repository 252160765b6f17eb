"""Streams that are closed, full or not read, signals, little memory, names that are no text: real processes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from archives import coseg
from PIL import Image
from small_models import save_small_checkpoint
from training_runs import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses /dev/full, bash and signals")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        Image.effect_noise((60, 48), 50 + number).convert("RGB").save(tmp_path / "in" / f"{number}.png")
    return tmp_path / "in"


def shell(command: str, *words: object, **options) -> subprocess.CompletedProcess:
    """`command` in bash, in which `macosnet` is ours and `"$1"` and so on are the words."""
    own = f'macosnet() {{ "{sys.executable}" -m macosnet_hf "$@"; }}; set -o pipefail; {command}'
    return subprocess.run(
        ["bash", "-c", own, "bash", *map(str, words)],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(),
        check=False,
        **options,
    )


SEGMENT = 'macosnet segment "$1" --output-dir "$2" --refine none --device cpu --model "$3"'
EVALUATE = 'macosnet evaluate coseg --data "$1" --json "$2/f.json" --refine none --device cpu --model "$3" --partners 1'


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- 2>&-", "2>/dev/full"])
def test_a_run_without_standard_error_writes_its_results(photos, tmp_path, model, closed):
    """Its first file took the number of the closed stream, and the run wrote nothing."""
    done = shell(f"{SEGMENT} {closed}", photos, tmp_path / "out", model)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "summary.json").is_file()
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == 3


def test_a_sentence_for_a_closed_stream_gets_into_no_file(photos, tmp_path, model):
    os.truncate(photos / "0.png", 40)
    os.truncate(photos / "1.png", 40)
    done = shell(f"{SEGMENT} 2>&-", photos, tmp_path / "out", model)
    assert (done.returncode, done.stdout) == (2, "")


def test_what_nobody_reads_any_more_ends_quietly(tmp_path, model):
    archive = coseg(tmp_path / "archive", images=2)
    done = shell(f"{EVALUATE} 2>/dev/null | true", archive, tmp_path, model)
    assert done.returncode == 128 + signal.SIGPIPE
    assert (tmp_path / "f.json").is_file()
    done = shell(f"{EVALUATE} | true", archive, tmp_path, model)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    done = shell("macosnet segment --help | true")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_standard_output_is_reported_in_a_sentence(tmp_path, model):
    archive = coseg(tmp_path / "archive", images=2)
    done = shell(f"{EVALUATE} > /dev/full", archive, tmp_path, model)
    assert done.returncode == 2
    assert done.stderr.endswith(
        "macosnet: The standard output cannot be written (No space left on device); files that the command has "
        "written are whole.\n"
    )
    assert "Traceback" not in done.stderr
    assert (tmp_path / "f.json").is_file()


@pytest.mark.parametrize("megabytes", [300, 600, 1000, 1800])
def test_too_little_address_space_is_reported_in_a_sentence(photos, tmp_path, model, megabytes):
    """It was an ImportError of one of many libraries, or an error of torch's allocator."""
    done = shell(f"ulimit -v {megabytes * 1024}; {SEGMENT}", photos, tmp_path / "out", model)
    if done.returncode < 0 or done.returncode > 128:
        pytest.skip("a library ends the process itself at this limit")
    assert done.returncode == 2, done.stderr
    assert "There is not enough memory for this; try smaller images." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------

# A real run that waits, in the middle of its work, with its temporary folder on the disk.
WAITING = """
import sys, time
from pathlib import Path
from macosnet_hf.commands import main, segment
def wait(args):
    print("waiting", flush=True)
    time.sleep(600)
segment.load_network = wait
sys.exit(main.main(sys.argv[1:]))
"""


# The suite itself may have been started with nohup, which its children inherit.
HEARS_HANG_UP = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"


def waiting(photos: Path, out: Path, model: Path, before: str = HEARS_HANG_UP) -> subprocess.Popen:
    words = ["segment", photos, "--output-dir", out, "--model", model]
    process = subprocess.Popen(
        [sys.executable, "-c", before + WAITING, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout.readline() == "waiting\n", process.stderr.read()
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("older", [False, True])
def test_a_run_that_is_told_to_end_leaves_nothing(photos, tmp_path, model, name, older):
    out = tmp_path / "out"
    if older:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    process = waiting(photos, out, model)
    assert [path.name for path in out.iterdir() if path.name.startswith(".macosnet-")]
    process.send_signal(getattr(signal, name))
    _, words = process.communicate()
    assert process.returncode == 128 + getattr(signal, name)
    assert words == f"macosnet: ended by {name}; nothing half-written is left.\n"
    assert (sorted(path.name for path in out.iterdir()) if older else out.exists()) == (
        ["notes.txt"] if older else False
    )


def test_nohup_goes_on(photos, tmp_path, model):
    process = waiting(photos, tmp_path / "out", model, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    process.communicate()


FORKED = """
import os, signal, sys, time
from pathlib import Path
from macosnet_hf.io.ends import ended_by_signals
from macosnet_hf.io.output_folder import output_folder
with ended_by_signals(), output_folder(sys.argv[1]) as folder:
    child = os.fork()
    if child == 0:
        time.sleep(600)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM, status
    assert folder.is_dir()
    (folder / "a.txt").write_text("a")
"""


def test_a_fork_that_is_told_to_end_does_not_remove_what_its_parent_writes(tmp_path):
    subprocess.run([sys.executable, "-c", FORKED, str(tmp_path / "out")], env=environment(), check=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.txt"]


def test_what_killed_runs_left_is_removed_by_a_run_of_any_kind(photos, tmp_path, model):
    """Results, figures and tables in one folder: each removed what runs of its own kind, or of the same file, left."""
    out = tmp_path / "out"
    process = waiting(photos, out, model)
    process.kill()
    process.communicate()
    left = next(out.glob(".macosnet-*"))
    shutil.copytree(left, out / ".macosnet-abcdefg_")
    (out / ".macosnet-12345678").write_text("half a file")
    (out / ".macosnet-partial").write_text("a marker of version 0.1")
    (out / ".macosnet-link1234").symlink_to(photos)
    from macosnet_hf.io.output_folder import write_file

    write_file(out / "table.md", "a table")
    assert sorted(path.name for path in out.iterdir()) == [".macosnet-link1234", ".macosnet-partial", "table.md"]


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def odd_archive(tmp_path):
    """Classes of images of which one has a name that is no UTF-8, with its mask."""
    archive = coseg(tmp_path / "archive", images=2)
    for part in ("images", "masks"):
        folder = sorted((archive / part).iterdir())[0]
        for number, path in enumerate(sorted(folder.iterdir())):
            os.rename(path, os.fsencode(folder) + b"/a\xff%d" % number + os.fsencode(path.suffix))
    return archive


def test_names_that_are_no_utf_8_are_prepared_and_evaluated(odd_archive, tmp_path, model):
    done = shell('macosnet prepare coseg "$1" "$2"', odd_archive, tmp_path / "prepared")
    assert done.returncode == 0, done.stderr
    figures = []
    for data in (odd_archive, tmp_path / "prepared"):
        done = shell(f'{EVALUATE} --predictions "$2/p"', data, tmp_path, model)
        assert done.returncode == 0, done.stderr
        figures.append([line for line in done.stdout.splitlines() if " s" not in line])
        shutil.rmtree(tmp_path / "p")
    assert figures[0] == figures[1]
    from macosnet_hf.datasets.prepare import open_records

    ids = [[row["id"] for row in open_records("coseg", data)[0]] for data in (odd_archive, tmp_path / "prepared")]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 4
    assert sum(r"/a\udcff" in name for name in ids[0]) == 2


def test_names_that_are_no_utf_8_are_segmented(photos, tmp_path, model):
    for number in range(3):
        os.rename(photos / f"{number}.png", os.fsencode(photos) + b"/\xe9%d.png" % number)
    done = shell(SEGMENT, photos, tmp_path / "out", model)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == 3


def test_names_that_are_no_utf_8_are_trained_on(photos):
    from macosnet_hf.training.images import TrainingImages

    os.rename(photos / "0.png", os.fsencode(photos) + b"/\xff.png")
    assert TrainingImages([str(photos)], 32).fingerprint().startswith("3 photographs, ")
