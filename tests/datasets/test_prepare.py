"""`prepare`: Parquet that plain `datasets` loads, whole or not there at all."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from archives import coseg, internet, pf_pascal, pf_willow, spair, tss

from macosnet_hf.datasets.benchmarks import Problems, iter_records
from macosnet_hf.datasets.images import open_image
from macosnet_hf.datasets.masks import mask_from_image
from macosnet_hf.datasets.prepare import is_prepared, open_records, prepare
from macosnet_hf.datasets.schema import COLUMNS, IMAGE_COLUMNS, flow_array
from macosnet_hf.errors import DataError, InputError, OutputError
from macosnet_hf.io.hub import push

ARCHIVES = {
    "pf-willow": pf_willow,
    "pf-pascal": pf_pascal,
    "spair-71k": spair,
    "tss": tss,
    "internet": internet,
    "coseg": coseg,
}


@pytest.mark.parametrize("benchmark", ARCHIVES)
def test_what_comes_back_is_what_went_in(tmp_path, benchmark):
    root = ARCHIVES[benchmark](tmp_path / "in")
    counts = prepare(benchmark, root, tmp_path / "out")
    expected = list(iter_records(benchmark, root, "test"))
    assert counts["test"] == len(expected)
    records, _ = open_records(benchmark, tmp_path / "out", "test")
    found = {record["id"]: record for record in records}
    assert found.keys() == {record["id"] for record in expected}
    for record in expected:
        other = found[record["id"]]
        for column in COLUMNS:
            if column in IMAGE_COLUMNS:
                assert (record[column] is None) == (other[column] is None)
                if record[column] is not None:
                    assert other[column]["bytes"] == Path(record[column]["path"]).read_bytes()
            elif column == "flow":
                np.testing.assert_array_equal(flow_array(record), flow_array(other))
            else:
                assert other[column] == record[column], column


READER = """
import sys
sys.modules["macosnet_hf"] = None  # importing it would fail
from datasets import load_dataset
folder, streaming = sys.argv[1], sys.argv[2] == "True"
data = load_dataset(folder, streaming=streaming)
print(sorted(data))
row = next(iter(data["test"]))
print(row["source_image"].size, row["target_image"].mode, len(row["source_keypoints"]), row["class_name"])
print(sum(1 for _ in data["test"]))
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_datasets_loads_it_without_this_package(tmp_path, streaming):
    prepare("spair-71k", spair(tmp_path / "in"), tmp_path / "out")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "out"), str(streaming)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    assert run.stdout.splitlines() == ["['test', 'train']", "(70, 50) RGB 4 cat", "2"]


KILLED = """
import os, sys
from macosnet_hf.datasets.prepare import prepare
seen = 0
def progress(count):
    global seen
    seen += count
    if seen == 4:
        os._exit(9)  # as if killed: no clean-up runs
prepare("pf-willow", sys.argv[1], sys.argv[2], row_group_bytes=1, progress=progress)
"""


def test_a_killed_run_leaves_nothing_that_looks_whole_and_the_next_one_works(tmp_path):
    root, output = pf_willow(tmp_path / "in"), tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", KILLED, str(root), str(output)], check=False)
    assert run.returncode == 9
    assert not output.exists()
    left = [path for path in tmp_path.iterdir() if path.name not in ("in", "out")]
    assert len(left) == 1  # the unfinished folder, under another name
    assert any(left[0].rglob("*.parquet"))
    assert not is_prepared(left[0])
    with pytest.raises(DataError):
        list(open_records("pf-willow", left[0])[0])
    assert prepare("pf-willow", root, output) == {"test": 6}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_run_cut_off_before_the_renaming_is_repeated_and_a_strangers_folder_is_left_alone(tmp_path):
    root, hidden = coseg(tmp_path / "in"), tmp_path / ".out.partial"
    prepare("coseg", root, hidden)
    assert prepare("coseg", root, tmp_path / "out") == {"test": 6}
    assert not hidden.exists()
    hidden.mkdir()
    (hidden / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="in the way"):
        prepare("coseg", root, tmp_path / "out", overwrite=True)
    assert (hidden / "mine.txt").exists()
    assert is_prepared(tmp_path / "out")


def test_an_error_leaves_nothing_behind(tmp_path):
    root = coseg(tmp_path / "in")
    (root / "images" / "Cat" / "p2.jpg").write_bytes((root / "images" / "Cat" / "p2.jpg").read_bytes()[:300])
    with pytest.raises(DataError, match=r"p2\.jpg"):
        prepare("coseg", root, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    problems = Problems(skip=True)
    assert prepare("coseg", root, tmp_path / "out", problems=problems) == {"test": 5}
    assert len(problems.messages) == 1
    assert "p2" in problems.messages[0]


def test_a_mask_of_another_size_is_refused(tmp_path):
    root = coseg(tmp_path / "in")
    (root / "masks" / "Cat" / "p1.png").write_bytes((root / "masks" / "Cat" / "p0.png").read_bytes())
    with pytest.raises(DataError, match=r"p1\.png is 56x40 pixels, its image 56x44"):
        prepare("coseg", root, tmp_path / "out")


def test_an_existing_folder_is_not_touched_unless_asked(tmp_path):
    root, output = coseg(tmp_path / "in"), tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not made by prepare"):
            prepare("coseg", root, output, overwrite=overwrite)
    assert (output / "mine.txt").read_text() == "keep"
    prepare("coseg", root, tmp_path / "new")
    with pytest.raises(OutputError, match="exists already"):
        prepare("coseg", root, tmp_path / "new")
    (root / "images" / "Cat" / "p1.jpg").unlink()
    (root / "masks" / "Cat" / "p1.png").unlink()
    assert prepare("coseg", root, tmp_path / "new", overwrite=True) == {"test": 5}


def test_what_operating_systems_leave_does_not_make_a_folder_a_stranger_s(tmp_path):
    """A folder that was looked into on a Mac or under Windows can be read and overwritten."""
    root, output = coseg(tmp_path / "in"), tmp_path / "out"
    count = prepare("coseg", root, output)
    for name in (".DS_Store", "._README.md", "data/.DS_Store", "data/desktop.ini"):
        (output / name).write_bytes(b"of the system")
    for shard in list((output / "data").glob("*.parquet")):
        shard.with_name(f"._{shard.name}").write_bytes(b"of the system")
    assert len(list(open_records("coseg", output)[0])) == count["test"]
    assert prepare("coseg", root, output, overwrite=True) == count
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "data"]


def test_images_are_stored_once_a_row_group_and_without_folders(tmp_path):
    root = pf_willow(tmp_path / "in", images=8, classes=("car(G)",))
    prepare("pf-willow", root, tmp_path / "out")
    files = sorted((tmp_path / "out" / "data").iterdir())
    assert [path.name for path in files] == ["test-00000-of-00001.parquet"]
    images = sum(path.stat().st_size for path in root.rglob("*.png"))
    in_columns = 0
    group = pq.ParquetFile(files[0]).metadata.row_group(0)
    for index in range(group.num_columns):
        if group.column(index).path_in_schema.endswith("image.bytes"):
            in_columns += group.column(index).total_compressed_size
    # 28 pairs hold 56 images; each column needs its own copy of the 8 (the source column of 7) and no more.
    assert in_columns < 2.1 * images
    assert str(tmp_path).encode() not in files[0].read_bytes()
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_shards_and_row_groups_are_bounded(tmp_path):
    root = coseg(tmp_path / "in", images=6)
    assert prepare("coseg", root, tmp_path / "out", shard_bytes=1, row_group_bytes=1) == {"test": 12}
    names = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    assert names[0] == "test-00000-of-00012.parquet"
    assert len(names) == 12
    records = list(open_records("coseg", tmp_path / "out")[0])
    assert len({record["id"] for record in records}) == 12
    for record in records:
        opened = open_image(record["source_image"], "here")
        assert mask_from_image(record["source_mask"], "here", (opened.height, opened.width)).any()


def test_the_card_names_licence_citation_and_splits(tmp_path):
    prepare("pf-pascal", pf_pascal(tmp_path / "in"), tmp_path / "out")
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "unknown"
    splits = [entry["split"] for entry in card.data.to_dict()["configs"][0]["data_files"]]
    assert splits == ["train", "validation", "test"]
    assert "@article{ham2018proposal" in card.text
    assert "`mirror_source`" in card.text


def test_a_damaged_shard_ends_in_one_sentence(tmp_path):
    prepare("coseg", coseg(tmp_path / "in"), tmp_path / "out")
    shard = next((tmp_path / "out" / "data").iterdir())
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(DataError, match="out"):
        list(open_records("coseg", tmp_path / "out")[0])


def test_data_of_another_schema_or_from_nowhere(tmp_path):
    from datasets import Dataset

    folder = tmp_path / "other"
    (folder / "data").mkdir(parents=True)
    Dataset.from_dict({"text": ["a"]}).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n")
    with pytest.raises(DataError):
        list(open_records("coseg", folder)[0])
    with pytest.raises(DataError, match="no such folder"):
        open_records("coseg", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="cannot be loaded"):
        list(open_records("coseg", "nobody/nothing")[0])  # a Hub id, and the Hub is off in tests
    with pytest.raises(InputError, match="not a prepared"):
        push("dataset", tmp_path, "someone/something")


def test_pushing_without_a_network_ends_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "T" * 10)
    prepare("coseg", coseg(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(OutputError, match="someone/something"):
        push("dataset", tmp_path / "out", "someone/something")


def test_another_data_set_in_a_folder_of_the_same_name_is_not_taken_from_the_cache(tmp_path):
    from datasets import load_dataset

    for number, classes in enumerate((("car(G)", "duck(S)"), ("car(G)",))):
        archive = pf_willow(tmp_path / f"archive{number}", images=3, classes=classes)
        prepare("pf-willow", archive, tmp_path / str(number) / "prepared")
        loaded = load_dataset(str(tmp_path / str(number) / "prepared"), split="test")
        assert len(loaded) == 3 * len(classes)
        assert set(loaded["class_name"]) == set(classes)
