"""Bad input of `macosnet segment --dataset`: every kind ends in one typed sentence, and nothing half written."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra `train`)")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from bulk_runs import OPTIONS, macosnet, settings_of, table  # noqa: E402
from image_bytes import odd_files  # noqa: E402

from macosnet_hf.bulk.image_folder import find_image_files  # noqa: E402
from macosnet_hf.bulk.run import segment_dataset  # noqa: E402
from macosnet_hf.bulk.shards import ShardFolder  # noqa: E402
from macosnet_hf.commands.main import main  # noqa: E402
from macosnet_hf.errors import DataError, InputError, OutputError  # noqa: E402
from macosnet_hf.io.image_files import load_image  # noqa: E402
from macosnet_hf.io.weights import weights_digest  # noqa: E402


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
    assert row["error"] == "The image's file lies outside of the data set, or is a link out of it."


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
        (["a.jpg", "b.jpg", "--push_to_hub", "me/x"], "--push_to_hub needs --dataset."),
        (["--dataset", "x/y", "--push_to_hub", "a b"], "'a b' cannot be the name of a repository"),
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


@pytest.mark.parametrize("name", ["README.md", "index.parquet"])
def test_files_of_others_are_not_replaced(images, network, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("notes")
    with pytest.raises(OutputError, match=f"holds another {name} already; choose another folder"):
        segment_dataset(settings_of(images), tmp_path / "out", **network)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == "notes"


def test_an_output_folder_without_a_name_is_refused(images, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["segment", "--dataset", str(images), "--output_dir", ""]) == 2
    assert "--output_dir needs the name of a folder" in capsys.readouterr().err
    with pytest.raises(OutputError, match="has no name"):
        ShardFolder("", settings_of(images))
    assert not any(tmp_path.iterdir())


def test_of_two_runs_with_other_settings_in_one_new_folder_one_is_refused(images, tmp_path):
    barrier = threading.Barrier(2)

    def begin(folder, size):
        settings = settings_of(images, block_size=size)
        barrier.wait()
        try:
            ShardFolder(folder, settings)
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        for number in range(30):
            passed = list(pool.map(begin, [tmp_path / str(number)] * 2, (10, 11)))
            assert sum(not text for text in passed) == 1
            assert "holds no shards yet, but is for other settings" in "".join(passed)
            assert [path.name for path in (tmp_path / str(number) / ".bulk").iterdir()] == ["settings.json"]


def test_every_image_of_a_folder_is_a_row_whatever_its_name(images, network, tmp_path, monkeypatch):
    """Words that `datasets` takes for splits, suffixes that it does not know, a line break; and links to the folder."""
    names = ["train 3.png", "test-3.png", "a\nb.png", "val/photo.png", "c.heic", "[x] *.png"]
    for name in names:
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "cup" / "0.png", tmp_path / "all" / name)
    (tmp_path / "all" / ".cache").mkdir()
    (tmp_path / "all" / ".cache" / "state.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "all")
    monkeypatch.chdir(tmp_path / "all")
    for number, data in enumerate((tmp_path / "all", tmp_path / "link", ".")):
        segment_dataset(settings_of(data, group_column=None, block_size=8), tmp_path / str(number), **network)
        rows = table(tmp_path / str(number))
        assert sorted(row["id"] for row in rows) == sorted(names)
        assert not [row["error"] for row in rows if row["error"]]


def test_folders_that_are_all_named_after_splits_are_splits(images, network, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "data" / split / "cup").mkdir(parents=True)
        shutil.copy(images / "cup" / "0.png", tmp_path / "data" / split / "cup" / f"{split}.png")
    segment_dataset(settings_of(tmp_path / "data", split="test"), tmp_path / "out", **network)
    assert [(row["id"], row["group"]) for row in table(tmp_path / "out")] == [("test/cup/test.png", "cup")]


def test_what_operating_systems_leave_beside_splits_is_no_split(images, tmp_path):
    """A Mac's zip file of the folders `train` and `test` unpacks to these and `__MACOSX`."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        shutil.copy(images / "cup" / "0.png", tmp_path / split / "0.png")
        (tmp_path / "__MACOSX" / split).mkdir(parents=True)
        (tmp_path / "__MACOSX" / split / "._0.png").write_bytes(b"resource fork")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"of a system")
    for split in ("train", "test"):
        assert [file.path for file in find_image_files(str(tmp_path), split)] == [f"{split}/0.png"]


@pytest.mark.parametrize("name", ["._masks-00000-000000.parquet", ".DS_Store"])
def test_what_operating_systems_leave_does_not_make_an_output_folder_a_stranger_s(images, tmp_path, name):
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / name).write_bytes(b"of a system")
    assert ShardFolder(tmp_path / "out", settings_of(images)).shards() is None


def test_files_of_every_kind_have_the_masks_of_their_upright_pixels(network, tmp_path):
    """Inside of Parquet files and in a folder, an image has the mask and alpha of the plain file of its pixels."""
    files = odd_files()
    for kind in ("odd", "plain", "rows"):
        (tmp_path / kind).mkdir()
    rows = []
    for name, content in files.items():
        (tmp_path / "odd" / name).write_bytes(content)
        load_image(content).save(tmp_path / "plain" / f"{name}.png")
        rows.append({"image": content, "name": name})
    datasets.Dataset.from_list(sorted(rows, key=lambda row: row["name"])).to_parquet(tmp_path / "rows" / "r.parquet")
    found = {}
    for kind in ("odd", "plain", "rows"):
        settings = settings_of(tmp_path / kind, group_column=None, block_size=4, alpha=True)
        segment_dataset(settings, tmp_path / f"of {kind}", **network)
        found[kind] = table(tmp_path / f"of {kind}")
    for odd, plain, row in zip(found["odd"], found["plain"], found["rows"], strict=True):
        assert plain["id"] == f"{odd['id']}.png"
        assert (odd["width"], odd["height"], odd["error"]) == (90, 61, None)
        assert (odd["mask"], odd["alpha"]) == (plain["mask"], plain["alpha"]) == (row["mask"], row["alpha"])
        assert Image.open(io.BytesIO(odd["mask"]["bytes"])).size == (90, 61)


@pytest.mark.parametrize("path", ["nul\0l.png", "", 3, None])
def test_a_row_with_a_path_that_is_none_is_a_row_with_an_error(images, network, tmp_path, path):
    (tmp_path / "rows").mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.int64() if path == 3 else pa.string())])
    shutil.copy(images / "cup" / "0.png", tmp_path / "rows" / "good.png")
    good = {"bytes": (images / "cup" / "0.png").read_bytes(), "path": None}
    rows = pa.table({"image": pa.array([good, {"bytes": None, "path": path}], kind)})
    pq.write_table(rows, tmp_path / "rows" / "rows.parquet")
    segment_dataset(settings_of(tmp_path / "rows", group_column=None), tmp_path / "out", **network)
    assert [row["error"] is None for row in table(tmp_path / "out")] == [True, False]


def test_a_table_names_the_files_beside_it(images, network, tmp_path):
    (tmp_path / "rows").mkdir()
    shutil.copy(images / "cup" / "0.png", tmp_path / "rows" / "good.png")
    (tmp_path / "rows" / "rows.csv").write_text("image,kind\ngood.png,cup\n../outside.png,cup\n")
    segment_dataset(settings_of(tmp_path / "rows", group_column="kind"), tmp_path / "out", **network)
    first, second = table(tmp_path / "out")
    assert (first["id"], first["error"]) == ("good.png", None)
    assert "outside of the data set" in second["error"]


def test_a_data_set_of_which_no_image_can_be_read_is_an_error(tmp_path, model, capsys):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.csv").write_text("image\nmissing.png\n")
    words = ["--dataset", str(tmp_path / "rows"), "--output_dir", str(tmp_path / "out"), "--model", str(model)]
    assert main(["segment", *words, "--device", "cpu"]) == 2
    assert "None of the 1 images could be read" in capsys.readouterr().err


def test_an_archive_of_images_is_named(images, network, tmp_path):
    (tmp_path / "rows").mkdir()
    shutil.make_archive(str(tmp_path / "rows" / "all"), "zip", images)
    with pytest.raises(DataError, match="is an archive of images; unpack it first"):
        segment_dataset(settings_of(tmp_path / "rows", group_column=None), tmp_path / "out", **network)


def test_ids_of_parts_differ(parquet, network, tmp_path):
    columns = {"image_column": "photo", "group_column": "kind"}
    segment_dataset(settings_of(parquet, parts=3, **columns), tmp_path / "out", **network)
    ids = [row["id"] for row in table(tmp_path / "out")]
    assert len(set(ids)) == len(ids) > 3


def test_a_junk_index_is_named(whole, images, network, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "index.parquet").write_bytes(b"junk")
    settings = settings_of(images, model="small", weights=weights_digest(network["model"]))
    with pytest.raises(OutputError, match=r"index\.parquet is damaged; remove it and start again\."):
        segment_dataset(settings, tmp_path / "out", **network)


def test_a_pipe_is_a_row_with_an_error_and_nothing_waits_for_it(images, network, tmp_path):
    (tmp_path / "rows").mkdir()
    os.mkfifo(tmp_path / "rows" / "pipe.png")
    shutil.copy(images / "cup" / "0.png", tmp_path / "rows" / "good.png")
    (tmp_path / "rows" / "rows.csv").write_text("image\npipe.png\ngood.png\n")
    segment_dataset(settings_of(tmp_path / "rows", group_column=None), tmp_path / "out", **network)
    assert [row["error"] for row in table(tmp_path / "out")] == ["the image is not a regular file.", None]


def peak_of(work):
    """What a piece of work adds to the memory of the process at its peak, in bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_a_file_with_gigabytes_behind_its_image_is_not_read_as_a_whole(images, network, tmp_path):
    (tmp_path / "rows").mkdir()
    shutil.copy(images / "cup" / "0.png", tmp_path / "rows" / "large.png")
    os.truncate(tmp_path / "rows" / "large.png", 2 << 30)
    (tmp_path / "rows" / "rows.csv").write_text("image\nlarge.png\n")
    settings = settings_of(tmp_path / "rows", group_column=None)
    assert peak_of(lambda: segment_dataset(settings, tmp_path / "out", **network)) < 500e6
    assert [row["error"] for row in table(tmp_path / "out")] == [None]


def test_rows_that_all_have_one_large_value_are_not_all_in_memory(network, tmp_path):
    """A file of half a kilobyte."""
    (tmp_path / "rows").mkdir()
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array([bytes(4_000_000)]))
    pq.write_table(pa.table({"image": value}), tmp_path / "rows" / "rows.parquet", compression="zstd")
    settings = settings_of(tmp_path / "rows", group_column=None)
    assert peak_of(lambda: segment_dataset(settings, tmp_path / "out", **network)) < 500e6
    assert [bool(row["error"]) for row in table(tmp_path / "out")] == [True] * 200


def test_a_parquet_file_that_unpacks_to_gigabytes_is_refused(network, tmp_path):
    (tmp_path / "rows").mkdir()
    rows = pa.table({"image": pa.array([bytes(300_000_000)])})
    pq.write_table(rows, tmp_path / "rows" / "rows.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=r"rows\.parquet is refused: a part of it is 300 MB, unpacked"):
        segment_dataset(settings_of(tmp_path / "rows", group_column=None), tmp_path / "out", **network)


@pytest.mark.parametrize("suffix", [".csv.gz", ".jsonl.bz2", ".csv.xz"])
def test_a_compressed_table_whose_line_unpacks_to_gigabytes_is_refused(network, tmp_path, suffix):
    (tmp_path / "rows").mkdir()
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[os.path.splitext(suffix)[1]]
    with opened(tmp_path / "rows" / f"rows{suffix}", "wb") as file:
        file.write(b"image\n")
        for _ in range(65):
            file.write(bytes(1_000_000))
    with pytest.raises(DataError, match="is refused: a line of it has more than 64 MB, unpacked"):
        segment_dataset(settings_of(tmp_path / "rows", group_column=None), tmp_path / "out", **network)


def test_an_archive_that_unpacks_to_gigabytes_is_refused(network, tmp_path):
    (tmp_path / "rows").mkdir()
    with zipfile.ZipFile(tmp_path / "rows" / "rows.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.csv", bytes(270_000_000))
    with pytest.raises(DataError, match=r"rows\.zip is refused: a file in it is 270 MB, unpacked"):
        segment_dataset(settings_of(tmp_path / "rows", group_column=None), tmp_path / "out", **network)


def test_a_compressed_table_is_read(images, network, tmp_path):
    (tmp_path / "rows").mkdir()
    shutil.copy(images / "cup" / "0.png", tmp_path / "rows" / "good.png")
    with gzip.open(tmp_path / "rows" / "rows.csv.gz", "wb") as file:
        file.write(b"image,kind\ngood.png,cup\n")
    segment_dataset(settings_of(tmp_path / "rows", group_column="kind"), tmp_path / "out", **network)
    assert [(row["id"], row["error"]) for row in table(tmp_path / "out")] == [("good.png", None)]


def test_very_long_names_of_rows_and_groups_are_shortened_and_stay_apart(images, network, tmp_path):
    (tmp_path / "rows").mkdir()
    image = (images / "cup" / "0.png").read_bytes()
    names = ["x" * 1_000_000 + end for end in "ab"]
    pq.write_table(pa.table({"image": [image] * 2, "name": names}), tmp_path / "rows" / "rows.parquet")
    settings = settings_of(tmp_path / "rows", group_column="name", id_column="name")
    segment_dataset(settings, tmp_path / "out", **network)
    found = table(tmp_path / "out")
    assert all(len(row["id"]) == len(row["group"]) <= 4096 for row in found)
    assert len({row["group"] for row in found}) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("README.md", "---\nconfigs:\n- config_name: default\n  data_files: ../private/rows.csv\n---\n", "outside of"),
        ("README.md", "---\nconfigs:\n- config_name: default\n  data_dir: ../private\n---\n", "outside of"),
        ("README.md", "---\nconfigs:\n- data_files: http://127.0.0.1:1/rows.csv\n---\n", "outside of"),
        (".huggingface.yaml", "configs:\n- data_files:\n  - path: /etc/*.csv\n", "outside of"),
        ("README.md", "---\nx: !!python/object/apply:os.system ['true']\n---\n", "is damaged"),
        ("README.md", "---\nconfigs: 3\n---\n", "cannot be loaded"),
        ("README.md", '---\nconfigs: !!int ""\n---\n', "cannot be loaded"),
    ],
)
def test_a_card_cannot_name_files_outside_of_the_data_set(network, tmp_path, name, content, message):
    for folder in ("private", "rows"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.csv").write_text("image,kind\na.png,secret\n")
    (tmp_path / "rows" / name).write_text(content)
    with pytest.raises(DataError, match=message):
        segment_dataset(settings_of(tmp_path / "rows", group_column="kind"), tmp_path / "out", **network)
    assert not (tmp_path / "out").exists()


def test_a_link_to_a_table_outside_of_the_data_set_is_refused(network, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "private.csv").write_text("image,kind\na.png,secret\n")
    (tmp_path / "rows" / "rows.csv").symlink_to(tmp_path / "private.csv")
    with pytest.raises(DataError, match=r"rows\.csv lies outside of the data set, or is a link out of it"):
        segment_dataset(settings_of(tmp_path / "rows", group_column="kind"), tmp_path / "out", **network)


def test_a_time_zone_that_there_is_not_is_said_in_a_sentence(images, network, tmp_path):
    (tmp_path / "rows").mkdir()
    times = pa.array([0], pa.timestamp("us", tz="Nowhere/Bad"))
    rows = pa.table({"image": [(images / "cup" / "0.png").read_bytes()], "time": times})
    pq.write_table(rows, tmp_path / "rows" / "rows.parquet")
    with pytest.raises(DataError, match=r"the split 'train' (is damaged|cannot be loaded).*Nowhere/Bad"):
        segment_dataset(settings_of(tmp_path / "rows", group_column="time"), tmp_path / "out", **network)


def rewritten(change, path="data/masks-00000-000000.parquet"):
    """Replaces a table of results by what a function makes of it, with the same metadata of its schema."""

    def rewrite(folder):
        found = pq.read_table(folder / path)
        changed = change(found)
        pq.write_table(changed.replace_schema_metadata(found.schema.metadata), folder / path)

    return rewrite


TAMPERED = {
    "a shard without columns": rewritten(lambda rows: rows.select(["id"])),
    "a shard with rows of texts": rewritten(
        lambda rows: rows.set_column(rows.schema.names.index("row"), "row", pa.array(["x"] * len(rows)))
    ),
    "a shard with more rows": rewritten(lambda rows: pa.concat_tables([rows] * 2)),
    "an index without errors": rewritten(lambda rows: rows.select(["id"]), "index.parquet"),
    "an index with fewer rows": rewritten(lambda rows: rows.slice(0, 1), "index.parquet"),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_results_that_were_changed_are_named(whole, images, network, tmp_path, kind):
    shutil.copytree(whole, tmp_path / "out")
    TAMPERED[kind](tmp_path / "out")
    settings = settings_of(images, model="small", weights=weights_digest(network["model"]))
    with pytest.raises(OutputError, match=r"\.parquet is damaged; remove it and start again\."):
        segment_dataset(settings, tmp_path / "out", **network)


def test_a_shard_of_another_process_that_is_damaged_is_named(whole, images, network, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "README.md").unlink()
    (tmp_path / "out" / "data" / "masks-00000-000001.parquet").write_bytes(b"PAR1 junk PAR1")
    settings = settings_of(images, model="small", weights=weights_digest(network["model"]))
    with pytest.raises(OutputError, match=r"masks-00000-000001\.parquet is damaged; remove it and start again\."):
        segment_dataset(settings, tmp_path / "out", **network, rank=0, processes=2)


def test_state_that_is_nested_too_deeply_is_read_as_none(whole, images, network, tmp_path):
    settings = settings_of(images, model="small", weights=weights_digest(network["model"]))
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / ".bulk" / "part-00000.json").write_text("[" * 100_000)
    assert segment_dataset(settings, tmp_path / "out", **network).complete == (13, 2)
    (tmp_path / "out" / ".bulk" / "settings.json").write_text("[" * 100_000)
    with pytest.raises(OutputError, match=r"settings\.json cannot be read; choose another folder"):
        segment_dataset(settings, tmp_path / "out", **network)


def test_a_data_set_whose_name_is_no_text_has_a_card(images, network, tmp_path):
    for number, name in enumerate((b"na\xffme", b"na|me\n\x1b[31m<b>")):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        with open(os.path.join(folder, b"a\xfe.png"), "wb") as file:
            file.write((images / "cup" / "0.png").read_bytes())
        settings = settings_of(os.fsdecode(folder), group_column=None)
        assert segment_dataset(settings, tmp_path / f"out{number}", **network).complete == (1, 0)
        card = (tmp_path / f"out{number}" / "README.md").read_text(encoding="utf-8")
        assert [line for line in card.splitlines() if line.startswith("# Masks of na")]
        assert "\x1b" not in card
        assert "<b>" not in card.split("---\n")[-1]
