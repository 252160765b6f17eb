"""Bad input of `macosnet segment --dataset`: every kind ends in one typed sentence, and nothing half written."""

import json
import os
import shutil
import sys

import pytest

datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra `train`)")

import pyarrow.parquet as pq  # noqa: E402
from bulk_runs import OPTIONS, macosnet, settings_of, table  # noqa: E402

from macosnet_hf.bulk.run import segment_dataset  # noqa: E402
from macosnet_hf.bulk.settings import weights_digest  # noqa: E402
from macosnet_hf.commands.main import main  # noqa: E402
from macosnet_hf.errors import DataError, InputError, OutputError  # noqa: E402


def test_a_folder_with_shards_of_other_settings_is_refused_with_the_difference(whole, images, network, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    digest = weights_digest(network["model"])
    other = settings_of(images, model="small", weights=digest, block_size=4, refine="grabcut")
    with pytest.raises(InputError) as error:
        segment_dataset(other, tmp_path / "out", **network)
    assert "shards of other settings (now block_size 4, not 3; refine 'grabcut', not 'none'); choose" in str(
        error.value
    )
    assert table(tmp_path / "out") == table(whole)


def test_a_data_set_that_has_changed_is_refused(whole, images, network, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    shutil.copytree(images, tmp_path / "animals")
    stored = json.loads((tmp_path / "out" / ".bulk" / "settings.json").read_text())
    shutil.copy(images / "cup" / "0.png", tmp_path / "animals" / "cup" / "new.png")
    stored["dataset"] = str(tmp_path / "animals")
    (tmp_path / "out" / ".bulk" / "settings.json").write_text(json.dumps(stored))
    settings = settings_of(tmp_path / "animals", model="small", weights=weights_digest(network["model"]))
    with pytest.raises(OutputError, match="holds other rows than the data set has now"):
        segment_dataset(settings, tmp_path / "out", **network)


def test_a_damaged_shard_is_named(whole, images, network, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    shard = tmp_path / "out" / "data" / "masks-00000-000001.parquet"
    os.truncate(shard, 100)
    settings = settings_of(images, model="small", weights=weights_digest(network["model"]))
    with pytest.raises(OutputError, match=r"masks-00000-000001.parquet is damaged; remove it and start again\."):
        segment_dataset(settings, tmp_path / "out", **network)


def test_a_folder_of_other_parquet_files_is_refused(parquet, images, network, tmp_path):
    shutil.copytree(parquet, tmp_path / "out")
    with pytest.raises(OutputError, match="holds Parquet files of another kind"):
        segment_dataset(settings_of(images), tmp_path / "out", **network)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_column": "imag"}, "has no column 'imag' (nearest: 'image'); its columns are 'image', 'label'."),
        ({"group_column": "colour"}, "has no column 'colour'; its columns are 'image', 'label'."),
        ({"id_column": "labels"}, "has no column 'labels' (nearest: 'label'); its columns are 'image', 'label'."),
        ({"image_column": "label"}, "the column 'label' holds no images."),
        ({"split": "tset"}, "the split 'tset' cannot be loaded"),
    ],
)
def test_a_column_or_split_that_is_not_there_is_named(images, network, tmp_path, columns, message):
    with pytest.raises(DataError) as error:
        segment_dataset(settings_of(images, **columns), tmp_path / "out", **network)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_data_set_without_rows_is_said_to_be_empty(images, network, tmp_path, monkeypatch):
    monkeypatch.setattr("macosnet_hf.bulk.rows.RowSource.rows", lambda self, part: iter(()))
    with pytest.raises(DataError, match="the split 'train' is empty"):
        segment_dataset(settings_of(images), tmp_path / "out", **network)


def test_an_empty_folder_is_no_data_set(network, tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(DataError, match="the split 'train' cannot be loaded"):
        segment_dataset(settings_of(tmp_path / "rows"), tmp_path / "out", **network)


def test_a_row_cannot_name_a_file_outside_of_the_data_set(images, network, tmp_path):
    (tmp_path / "rows").mkdir()
    kinds = datasets.Features({"image": datasets.Image()})
    paths = [str(images / "cup" / "0.png"), "https://127.0.0.1:1/a.png", "../secret.png"]
    rows = datasets.Dataset.from_list([{"image": {"bytes": None, "path": path}} for path in paths], features=kinds)
    pq.write_table(rows.data.table, tmp_path / "rows" / "train.parquet")
    segment_dataset(settings_of(tmp_path / "rows", group_column=None), tmp_path / "out", **network)
    found = table(tmp_path / "out")
    assert len(found) == 3
    assert all(row["error"] and row["mask"] is None for row in found)


def test_a_link_out_of_the_folder_is_a_row_with_an_error(images, network, tmp_path):
    shutil.copytree(images / "cup", tmp_path / "animals")
    (tmp_path / "animals" / "link.png").symlink_to(images / "dog" / "0.png")
    segment_dataset(settings_of(tmp_path / "animals", group_column=None), tmp_path / "out", **network)
    row = next(row for row in table(tmp_path / "out") if row["id"] == "link.png")
    assert row["error"] == "The image is a link out of the data set; put the file in its place."


@pytest.mark.skipif(sys.platform == "win32", reason="uses limits of files")
def test_a_full_disk_is_one_sentence_and_leaves_whole_shards_only(images, model, tmp_path):
    out = tmp_path / "out"
    # No file may grow beyond this: as on a full disk, a write fails in the middle.
    limit = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))"
    )
    done = macosnet("--dataset", images, "--model", model, "--output_dir", out, *OPTIONS, code=limit)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("cannot be written (File too large).")
    assert "Traceback" not in done.stderr
    assert list((out / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name images, one folder of them, or a data set with --dataset."),
        (["a.png", "--dataset", "x"], "Name either images or --dataset, not both."),
        (["a.png", "b.png", "--group_column", "label"], "--group_column needs --dataset."),
        (["--dataset", "x", "--zip"], "--zip is for images in files; with --dataset, --alpha adds"),
        (["--dataset", "x", "--trim"], "--trim is for images in files"),
        (["--dataset", "x", "--instances"], "--instances is for images in files, not for --dataset"),
        (["--dataset", "no/such/folder"], "no/such/folder: there is no such folder"),
        (["--dataset", __file__], "is a file; a folder is needed."),
        (["--dataset", "x/y", "--block_size", "1"], "block_size must be a whole number of at least 2; got 1."),
        (["--dataset", "x/y", "--parts", "0"], "parts must be a whole number of at least 1; got 0."),
        (["--dataset", "x/y", "--model", "/no/model"], "/no/model"),
    ],
)
def test_options_that_cannot_be_used_are_named_at_once(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["segment", *words, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["", "masks", "cup/masks"])
def test_the_output_folder_is_outside_of_the_data_set(images, inside, capsys):
    assert main(["segment", "--dataset", str(images), "--output_dir", str(images / inside)]) == 2
    assert "would take masks for images" in capsys.readouterr().err
    assert not (images / "masks").exists()


def test_a_missing_package_is_named(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["segment", "--dataset", str(images), "--output_dir", str(tmp_path / "out")]) == 2
    assert "needs the package datasets; install macosnet-hf[train]." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_place_among_processes_that_is_no_number_is_named(images, name, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(name, "two")
    assert main(["segment", "--dataset", str(images), "--output_dir", str(tmp_path / "out")]) == 2
    assert "RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers" in capsys.readouterr().err


def test_a_rank_is_below_the_number_of_processes(images, network, tmp_path):
    with pytest.raises(InputError, match=r"less than processes \(2\); got 2"):
        segment_dataset(settings_of(images), tmp_path / "out", **network, rank=2, processes=2)
