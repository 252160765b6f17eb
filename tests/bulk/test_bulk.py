"""`macosnet segment --dataset`: real folders, Parquet files and a Hub; killed and restarted; two processes."""

import io
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from hub_server import TOKEN, HubServer
from PIL import Image
from training_runs import environment

datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra `train`)")

from bulk_runs import COLUMNS, OPTIONS, macosnet, settings_of, table  # noqa: E402

from macosnet_hf.bulk.run import segment_dataset  # noqa: E402
from macosnet_hf.collection import hard_mask, segment_collection  # noqa: E402
from macosnet_hf.errors import InputError  # noqa: E402
from macosnet_hf.io.hub import plan  # noqa: E402
from macosnet_hf.io.image_files import load_image  # noqa: E402
from macosnet_hf.io.weights import weights_digest  # noqa: E402


def test_rows_say_what_a_collection_says(whole, images, network):
    rows = {row["id"]: row for row in table(whole)}
    assert len(rows) == 13
    ids = ["cup/3.png", "cup/4.png", "cup/5.png"]
    expected = segment_collection([load_image(images / name) for name in ids], **network)
    for number, name in enumerate(ids):
        row = rows[name]
        size = (row["height"], row["width"])
        assert size == load_image(images / name).size[::-1]
        mask = hard_mask(expected.probabilities[number], size)
        found = np.asarray(Image.open(io.BytesIO(row["mask"]["bytes"])))
        assert (found == 255 * mask).all()
        assert row["object_share"] == pytest.approx(mask.mean())
        assert row["agreement"] == pytest.approx(expected.agreement[number], abs=1e-5)
        assert row["partners"] == [ids[other] for other in expected.partners[number]]
        assert (row["group"], row["error"], row["orientation"]) == ("cup", None, None)


def test_a_bad_image_is_a_row_with_its_error_and_its_neighbours_have_masks(whole):
    rows = {row["id"]: row for row in table(whole)}
    assert sorted(name for name, row in rows.items() if row["error"]) == ["cup/2.png", "dog/4.png"]
    for name in ("cup/2.png", "dog/4.png"):
        assert rows[name]["mask"] is None
        assert rows[name]["partners"] == []
        assert rows[name]["error"].endswith(".")
        assert "\n" not in rows[name]["error"]
    assert set(rows["cup/0.png"]["partners"]) == {"cup/1.png"}
    assert rows["cup/1.png"]["mask"]["bytes"]


def test_a_group_of_one_image_gets_a_mask_of_what_stands_out(whole):
    alone = next(row for row in table(whole) if row["id"] == "ant/0.png")
    assert alone["mask"]["bytes"]
    assert (alone["partners"], alone["common"], alone["error"]) == ([], False, None)


def test_the_last_of_a_group_is_compared_with_the_block_before_it(whole):
    last = next(row for row in table(whole) if row["id"] == "cup/6.png")
    assert len(last["partners"]) == 2
    assert {name.split("/")[0] for name in last["partners"]} == {"cup"}


def test_datasets_loads_results_and_index(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "of-a-test")
    cache = str(tmp_path / "cache")
    rows = datasets.load_dataset(str(tmp_path / "of-a-test"), split="train", cache_dir=cache)
    assert len(rows) == 13
    with_mask = next(row for row in rows if row["mask"] is not None)
    assert with_mask["mask"].size == (with_mask["width"], with_mask["height"])
    index = datasets.load_dataset(str(tmp_path / "of-a-test"), "index", split="train", cache_dir=cache)
    assert [row["id"] for row in index] == [row["id"] for row in rows]
    assert all((whole / name).is_file() for name in index["file"])
    assert "mask" not in index.column_names
    card = (whole / "README.md").read_text()
    assert "13 rows in 3 shards, 2 of them with an error" in card
    assert "/" not in card.split("| `dataset` | ")[1].splitlines()[0], "a folder of this machine is not published"


def test_a_second_run_segments_nothing_again(whole, images, network, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr("macosnet_hf.bulk.run.segment_block", None)
    digest = weights_digest(network["model"])
    report = segment_dataset(settings_of(images, model="small", weights=digest), tmp_path / "out", **network)
    assert report == (0, 13, (13, 2))


# ---- killed, and several processes -----------------------------------------------------------------------------------

# Only chooses the moment of the kill: before a block, or in the middle of a shard's file.
KILL_AT_BLOCK = """
import os, signal
from macosnet_hf.bulk import run
work, count = run.segment_block, [0]
def killed(*args, **kwargs):
    count[0] += 1
    if count[0] == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*args, **kwargs)
run.segment_block = killed
"""
KILL_IN_WRITE = """
import os, signal
from macosnet_hf.io import output_folder
replace = os.replace
def killed(source, target):
    if str(target).endswith("masks-00000-000002.parquet"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed
"""
KILL_IN_MERGE = """
import os, signal
replace = os.replace
def killed(source, target):
    replace(source, target)
    if str(target).endswith("README.md"):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = killed
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="uses SIGKILL")
def test_a_run_that_was_killed_again_and_again_ends_with_the_same_rows(images, model, whole, tmp_path):
    out = tmp_path / "out"
    command = ["--dataset", images, "--model", model, "--output_dir", out, *OPTIONS]
    found = []
    for code in (KILL_AT_BLOCK.format(number=4), KILL_IN_WRITE, KILL_AT_BLOCK.format(number=2), KILL_IN_MERGE):
        done = macosnet(*command, code=code)
        assert done.returncode == -signal.SIGKILL, done.stderr
        found.append(sorted(path.name for path in (out / "data").glob("*.parquet")))
    assert [len(names) for names in found] == [1, 2, 2, 3]
    assert not (out / "index.parquet").exists()
    before = {path: path.stat().st_mtime_ns for path in (out / "data").glob("*.parquet")}
    done = macosnet(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "0 images segmented, 13 were there already",
        f"13 rows, 2 of them with an error; see {out / 'README.md'}",
    ]
    assert {path: path.stat().st_mtime_ns for path in (out / "data").glob("*.parquet")} == before
    assert table(out) == table(whole)
    assert not [path for path in (out / "data").iterdir() if path.suffix != ".parquet"], "what the kill left is gone"


@pytest.mark.slow
def test_two_processes_write_the_rows_of_one(images, model, whole, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra `train`)")
    # With `--cpu` accelerate starts a single process; with `--multi_gpu` several, on CPUs where there is no GPU.
    options = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    start = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *options]
    port = ["--main_process_port", str(20000 + os.getpid() % 20000)]
    command = ["--dataset", images, "--model", model, "--output_dir", tmp_path / "out", *OPTIONS]
    done = subprocess.run(
        [*start, *port, "-m", "macosnet_hf.commands.segment", *map(str, command)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 1 of 2: " in done.stdout
    assert "process 2 of 2: " in done.stdout
    assert "13 rows, 2 of them with an error" in done.stdout
    assert table(tmp_path / "out") == table(whole)
    index = [(folder / "index.parquet").read_bytes() for folder in (tmp_path / "out", whole)]
    assert index[0] == index[1]


def test_processes_need_not_run_at_the_same_time(images, network, whole, tmp_path):
    settings = settings_of(images, model="small", weights=weights_digest(network["model"]))
    reports = [segment_dataset(settings, tmp_path / "out", **network, rank=rank, processes=3) for rank in (2, 0, 1)]
    assert [report.complete for report in reports] == [None, None, (13, 2)]
    assert sum(report.written for report in reports) == 13
    assert table(tmp_path / "out") == table(whole)


def test_a_dead_process_leaves_its_shards_to_the_restart(images, network, whole, tmp_path):
    settings = settings_of(images, model="small", weights=weights_digest(network["model"]))
    first = segment_dataset(settings, tmp_path / "out", **network, rank=0, processes=2)
    assert not (tmp_path / "out" / "README.md").exists()
    rest = segment_dataset(settings, tmp_path / "out", **network)  # in one process this time
    assert (rest.found, rest.written, rest.complete) == (first.written, 13 - first.written, (13, 2))
    assert table(tmp_path / "out") == table(whole)


# ---- other kinds of data sets ----------------------------------------------------------------------------------------


def test_images_inside_of_parquet_files_have_the_same_masks(parquet, network, whole, tmp_path):
    segment_dataset(settings_of(parquet, **COLUMNS), tmp_path / "out", **network)
    rows, expected = table(tmp_path / "out"), table(whole)
    assert [row["mask"] for row in rows[:-1]] == [row["mask"] for row in expected]
    assert [row["id"] for row in rows[:2]] == ["000000001", "000000002"]
    assert (rows[-1]["error"], rows[-1]["group"]) == ("The row has no image.", None)


def test_a_column_of_bytes_serves_as_well(images, network, whole, tmp_path):
    (tmp_path / "rows").mkdir()
    rows = [{"image": path.read_bytes(), "label": path.parent.name} for path in sorted(images.glob("*/*.png"))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "train.parquet")
    segment_dataset(settings_of(tmp_path / "rows"), tmp_path / "out", **network)
    assert [row["mask"] for row in table(tmp_path / "out")] == [row["mask"] for row in table(whole)]


def test_alpha_orientations_and_names_are_there_if_asked_for(parquet, network, tmp_path):
    settings = settings_of(parquet, **COLUMNS, id_column="name", alpha=True, orientations="mirror")
    segment_dataset(settings, tmp_path / "out", **network)
    row = next(row for row in table(tmp_path / "out") if row["group"] == "dog")
    alpha = Image.open(io.BytesIO(row["alpha"]["bytes"]))
    assert (row["id"], alpha.mode, alpha.size) == ("0", "L", (row["width"], row["height"]))
    assert {row["orientation"] for row in table(tmp_path / "out")} <= {"identity", "mirror", None}
    assert row["orientation"] is not None


def test_parts_are_read_on_their_own_by_any_number_of_processes(parquet, network, tmp_path):
    settings = settings_of(parquet, **COLUMNS, parts=3)
    for processes in (1, 2, 3):
        for rank in range(processes):
            report = segment_dataset(settings, tmp_path / str(processes), **network, rank=rank, processes=processes)
        assert report.complete == (14, 3)
    assert table(tmp_path / "1") == table(tmp_path / "2") == table(tmp_path / "3")
    assert {row["part"] for row in table(tmp_path / "1")} == {0, 1, 2}
    with pytest.raises(InputError, match="parts must be at most 3"):
        segment_dataset(settings_of(parquet, **COLUMNS, parts=4), tmp_path / "4", **network)


def test_without_groups_all_images_are_one(parquet, network, tmp_path):
    segment_dataset(settings_of(parquet, image_column="photo", group_column=None), tmp_path / "out", **network)
    rows = table(tmp_path / "out")
    assert {row["group"] for row in rows} == {None}
    assert len(rows) == 14


def test_the_results_can_be_pushed_without_what_is_of_this_machine(whole):
    uploads = plan("dataset", whole)
    names = {upload.name for upload in uploads}
    assert {"README.md", "index.parquet", "data/masks-00000-000000.parquet"} <= names
    assert not [name for name in names if ".bulk" in name]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "images"])
def test_a_data_set_on_the_hub_is_streamed(request, kind, model, network, tmp_path):
    folder = request.getfixturevalue(kind)
    columns = ["--image_column", "photo", "--group_column", "kind"] if kind == "parquet" else []
    settings = settings_of(folder, **COLUMNS) if kind == "parquet" else settings_of(folder)
    segment_dataset(settings, tmp_path / "local", **network)
    with HubServer() as hub:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.p*")}
        hub.files["dataset", "me/animals"] = {name: data for name, data in files.items() if data}
        done = macosnet(
            *("--dataset", "me/animals", "--model", model, "--output_dir", tmp_path / "out", *OPTIONS, *columns),
            HF_ENDPOINT=hub.url,
            HF_TOKEN=TOKEN,
            HF_HOME=str(tmp_path / "hf"),
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert table(tmp_path / "out") == table(tmp_path / "local")
    assert "| `dataset` | me/animals |" in (tmp_path / "out" / "README.md").read_text()
