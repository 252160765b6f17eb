"""Matches of a list of pairs: those of each pair by itself, rows with errors, runs that end early."""

import io
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from bulk_runs import table
from PIL import Image

from macosnet_hf.bulk.pairs import PairSettings, match_list, read_pairs
from macosnet_hf.commands.main import main
from macosnet_hf.errors import DataError, InputError, OutputError
from macosnet_hf.inference.files import match_copies
from macosnet_hf.io.working_copy import open_working_copy

LIST = """\
Source, target,points,id
cup/0.png,cup/1.png,"10,20;30.5,4",first
cup/0.png,cup/2.png,,damaged
,,,
cup/0.png,dog/0.png,,
dog/1.png,dog/0.png,"1,2,3",three numbers
dog/1.png,dog/0.png,"900,2",outside
dog/1.png,,,no target
dog/1.png,no.png,,missing
dog/1.png,dog/2.png,,last
"""


@pytest.fixture
def pairs(images, tmp_path):
    shutil.copytree(images, tmp_path / "animals")
    path = tmp_path / "animals" / "pairs.csv"
    path.write_text(LIST)
    return path


def settings_of(path, **options):
    return PairSettings(str(path), refine="none", shard_size=3, **options)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_are_the_pairs_by_themselves(pairs, network, tmp_path):
    seen = []
    report = match_list(settings_of(pairs), tmp_path / "out", **network, progress=seen.append)
    assert report == (8, 0, (8, 5))
    assert seen == [1] * 8
    rows = table(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(8))
    assert [row["id"] for row in rows][:3] == ["first", "damaged", "000000002"]
    errors = {row["id"]: row["error"] for row in rows if row["error"]}
    assert list(errors) == ["damaged", "three numbers", "outside", "no target", "missing"]
    words = ("2.png", "two numbers", "outside of the image", "names no target", "does not exist")
    assert all(word in error for word, error in zip(words, errors.values(), strict=True))
    copies = [open_working_copy(str(pairs.parent / "cup" / name), side=None) for name in ("0.png", "1.png")]
    pair = match_copies(tuple(copies), refine="none", **network)
    first = rows[0]
    for view, name in enumerate(("source_keypoints", "target_keypoints")):
        np.testing.assert_allclose(np.reshape(first[name], (-1, 2)), pair.keypoints[:, view], atol=1e-3)
    np.testing.assert_allclose(first["scores"], pair.result.scores, atol=1e-6)
    np.testing.assert_allclose(first["points_in_target"], pair.transfer([(10, 20), (30.5, 4)]), atol=1e-3)
    assert first["points"] == [[10, 20], [30.5, 4]]
    for view, name in enumerate(("source_mask", "target_mask")):
        mask = np.asarray(Image.open(io.BytesIO(first[name]["bytes"]))) > 0
        np.testing.assert_array_equal(mask, pair.original_mask(view))
    index = pq.read_table(tmp_path / "out" / "index.parquet")
    assert index.num_rows == 8
    assert "source_mask" not in index.column_names
    assert "8 pairs in 3 shards, 5 of them with an error" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_that_ended_early_goes_on(pairs, network, tmp_path):
    match_list(settings_of(pairs), tmp_path / "whole", **network)
    done = []

    def stop(count):
        done.append(count)
        if len(done) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        match_list(settings_of(pairs), tmp_path / "out", **network, progress=stop)
    assert [path.name for path in (tmp_path / "out" / "data").iterdir()] == ["matches-00000-000000.parquet"]
    assert match_list(settings_of(pairs), tmp_path / "out", **network) == (5, 3, (8, 5))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert match_list(settings_of(pairs), tmp_path / "out", **network) == (0, 8, (8, 5))


def test_two_processes_share_the_shards(pairs, network, tmp_path):
    match_list(settings_of(pairs), tmp_path / "whole", **network)
    reports = [match_list(settings_of(pairs), tmp_path / "out", **network, rank=rank, processes=2) for rank in (1, 0)]
    assert reports == [(3, 0, None), (5, 0, (8, 5))]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_settings_or_another_list_are_refused(pairs, network, tmp_path):
    match_list(settings_of(pairs), tmp_path / "out", **network)
    with pytest.raises(InputError, match=r"other settings \(now threshold 0.5, not 0.0\)"):
        match_list(settings_of(pairs, threshold=0.5), tmp_path / "out", **network)
    pairs.write_text(LIST.replace("first", "1st"))
    with pytest.raises(OutputError, match="holds other rows"):
        match_list(settings_of(pairs), tmp_path / "out", **network)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no column 'source' in its first line; its columns are none"),
        (b"source,end\n1,2\n", "has no column 'target' in its first line; its columns are 'source', 'end'"),
        (b"source,target\n", "holds no pairs"),
        (b"source,target\n\xff,a\n", "no table in UTF-8"),
    ],
)
def test_lists_that_are_none(network, tmp_path, content, message):
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        match_list(settings_of(tmp_path / "pairs.csv"), tmp_path / "out", **network)
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be_used(tmp_path, network):
    for options in ({"threshold": 2}, {"shard_size": 0}, {"refine": "magic"}, {"orientations": "up"}):
        with pytest.raises(InputError):
            PairSettings("pairs.csv", **options)
    with pytest.raises(InputError, match="rank"):
        match_list(settings_of("pairs.csv"), tmp_path, **network, rank=1)
    with pytest.raises(DataError, match="cannot be read"):
        list(read_pairs(str(tmp_path)))


def test_the_command(pairs, model, tmp_path, capfd):
    options = ["--model", str(model), "--refine", "none", "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["match", "--pairs", str(pairs), *options, "--shard_size", "3"]) == 0
    assert "8 rows, 5 of them with an error" in capfd.readouterr().out
    assert len(table(tmp_path / "out")) == 8
    pairs.write_text("source,target\nno.png,cup/0.png\n")
    assert main(["match", "--pairs", str(pairs), *options[:-3], str(tmp_path / "none")]) == 2
    assert "None of the 1 pairs could be matched" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.png"], "Name two images, or a list of pairs"),
        (["a.png", "b.png", "--shard_size", "3"], "--shard_size needs --pairs"),
        (["a.png", "--pairs", "pairs.csv"], "not both"),
        (["--pairs", "no.csv"], "There is no list no.csv"),
        (["--pairs", "pairs.csv", "--points", "1,2"], "--points is for one pair"),
        (["--pairs", "pairs.csv", "--points-file", "a.csv"], "--points-file is for one pair"),
        (["--pairs", "pairs.csv", "--zip"], "--zip is for one pair"),
        (["--pairs", "pairs.csv", "--include", "a:1,2"], "--include is for one pair"),
    ],
)
def test_options_that_do_not_fit(tmp_path, words, message, capfd):
    assert main(["match", *words, "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
