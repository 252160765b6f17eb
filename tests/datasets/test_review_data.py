"""What a review of the data sets and the evaluation found by trying to break them; each test failed once."""

import json
import multiprocessing
import shutil
from pathlib import Path

import archives
import numpy as np
import pytest

from macosnet_hf.commands.main import main
from macosnet_hf.datasets import Problems, iter_records, open_records
from macosnet_hf.datasets.prepare import prepare
from macosnet_hf.errors import DataError, InputError, OutputError
from macosnet_hf.evaluation.baselines import make_baseline
from macosnet_hf.evaluation.protocols import PROTOCOLS, evaluate


def _edit_class(path: Path, number: int, value: str) -> None:
    lines = path.read_text().splitlines()
    cells = lines[number].split(",")
    lines[number] = ",".join([*cells[:2], value, *cells[3:]])
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1.7", "0", "11", "cow"])
def test_a_class_that_is_no_whole_number_of_the_list_is_unknown(tmp_path, value):
    root = archives.pf_willow(tmp_path)
    _edit_class(root / "test_pairs.csv", 2, value)
    with pytest.raises(DataError, match=r"test_pairs\.csv, line 3: unknown class"):
        list(iter_records("pf-willow", root))


def test_a_row_of_more_columns_than_the_header_is_named(tmp_path):
    root = archives.pf_willow(tmp_path)
    path = root / "test_pairs.csv"
    path.write_text(path.read_text().replace(";", ",", 1))  # a decimal comma, or the wrong separator
    with pytest.raises(DataError, match=r"test_pairs\.csv, line 2: the row has more columns than the header"):
        list(iter_records("pf-willow", root))


def _without_mat_images(root: Path) -> None:
    (root / "test_pairs.csv").unlink()
    for path in (root / "PF-dataset" / "duck(S)").glob("*.png"):
        path.unlink()


def _without_cars(root: Path) -> None:
    for path in (root / "Data" / "Car100").glob("*.jpg"):
        path.unlink()


EMPTY = {
    "pf-willow": (archives.pf_willow, _without_mat_images, "no image in the class 'duck(S)'", 3),
    "internet": (archives.internet, _without_cars, "no image of the class 'Car'", 6),
    "internet-gone": (
        archives.internet,
        lambda root: shutil.rmtree(root / "Data" / "Car100"),
        "no image of the class 'Car'",
        6,
    ),
    "tss": (
        archives.tss,
        lambda root: shutil.rmtree(root / "TSS_CVPR2016" / "JODS" / "car_01_02"),
        "no pair in the group 'JODS'",
        4,
    ),
    "coseg": (archives.coseg, lambda root: shutil.rmtree(root / "images" / "Cat"), "no image of the class 'Cat'", 3),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_class_is_named_or_counted_in_every_archive(tmp_path, name):
    make, empty, text, left = EMPTY[name]
    root, benchmark = make(tmp_path), name.removesuffix("-gone")
    empty(root)
    with pytest.raises(DataError) as caught:
        list(iter_records(benchmark, root))
    assert text in str(caught.value)
    problems = Problems(skip=True)
    assert len(list(iter_records(benchmark, root, problems=problems))) == left
    assert any(text in message for message in problems.messages)


def test_images_where_none_is_looked_for_are_named(tmp_path):
    root = archives.coseg(tmp_path / "coseg")
    archives.write_image(root / "images" / "loose.jpg")
    archives.write_image(root / "images" / "Cat" / "more" / "photo.jpg")
    problems = Problems(skip=True)
    assert len(list(iter_records("coseg", root, problems=problems))) == 6
    assert len(problems.messages) == 2
    assert "loose.jpg: this image is in no class folder" in problems.messages[0]
    assert "more: folders inside a class folder are not read" in problems.messages[1]

    internet = archives.internet(tmp_path / "internet")
    (internet / "Data" / "Car100" / "0001.jpg").unlink()
    with pytest.raises(DataError, match=r"GroundTruth/0001\.png: this mask has no image"):
        list(iter_records("internet", internet))


@pytest.mark.parametrize(
    ("field", "value"),
    [("viewpoint_variation", 400), ("scale_variation", -1), ("kps_ids", ["0", "1", "4", "99999999999"])],
)
def test_numbers_that_do_not_fit_their_column_are_named_by_file(tmp_path, field, value):
    root = archives.spair(tmp_path / "spair")
    path = next((root / "PairAnnotation" / "test").glob("000001*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(DataError, match=r"000001-.*\.json: "):
        prepare("spair-71k", root, tmp_path / "out")
    assert not any(entry.name != "spair" for entry in tmp_path.iterdir())


def test_overwriting_spares_whatever_prepare_has_not_made(tmp_path):
    root, out = archives.coseg(tmp_path / "coseg"), tmp_path / "out"
    prepare("coseg", root, out)
    prepare("coseg", root, out, overwrite=True)
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="holds what was not made by prepare"):
        prepare("coseg", root, out, overwrite=True)
    (out / "thesis.txt").unlink()
    (out / "README.md").write_text("# A data set of my own, with Parquet in data/\n")
    with pytest.raises(OutputError, match="holds what was not made by prepare"):
        prepare("coseg", root, out, overwrite=True)
    assert (out / "README.md").read_text().startswith("# A data set of my own")


def _prepare_when_told(root: Path, out: Path, started: object, told: object) -> None:
    def progress(count: int) -> None:
        started.set()
        assert told.wait(60)

    prepare("coseg", root, out, progress=progress)


def test_two_runs_into_one_output_do_not_meet(tmp_path):
    root, out = archives.coseg(tmp_path / "coseg"), tmp_path / "out"
    context = multiprocessing.get_context("spawn")
    started, told = context.Event(), context.Event()
    process = context.Process(target=_prepare_when_told, args=(root, out, started, told))
    process.start()
    try:
        assert started.wait(60)
        with pytest.raises(OutputError, match="Another run is writing this output"):
            prepare("coseg", root, out)
    finally:
        told.set()
        process.join(60)
    assert process.exitcode == 0
    assert len(list(open_records("coseg", out)[0])) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coseg", "out"]


def test_one_list_cannot_become_two_splits(tmp_path):
    root = archives.coseg(tmp_path / "coseg")
    with pytest.raises(InputError, match="only one"):
        prepare("coseg", root, tmp_path / "out", splits=["test", "train"])
    assert prepare("coseg", root, tmp_path / "out", splits=["test", "test"]) == {"test": 6}


@pytest.mark.parametrize(
    ("made", "asked", "text"),
    [
        ("pf_pascal", "pf-willow", "unknown class"),
        ("pf_willow", "spair-71k", "unknown class"),
        ("pf_pascal", "spair-71k", "annotated box|unknown class"),
        ("tss", "coseg", "this is a pair"),
        ("coseg", "pairs", "this is a single image"),
        ("coseg", "internet", "unknown class"),
    ],
)
def test_prepared_data_of_another_benchmark_is_not_scored_under_its_name(tmp_path, capsys, made, asked, text):
    root = getattr(archives, made)(tmp_path / "archive")
    prepare(made.replace("_", "-"), root, tmp_path / "out", splits=["test"])
    baseline = "centre-grabcut" if asked in ("coseg", "internet") else "identity"
    with pytest.raises(DataError, match=text):
        evaluate(open_records(asked, tmp_path / "out")[0], PROTOCOLS[asked], make_baseline(baseline))
    assert main(["evaluate", asked, "--data", str(tmp_path / "out"), "--baseline", baseline]) == 2
    assert "paper" not in capsys.readouterr().out


def test_spair_takes_no_box_of_keypoints_for_an_annotated_one(tmp_path):
    records = list(iter_records("spair-71k", archives.spair(tmp_path)))
    records[0]["target_box"] = None
    with pytest.raises(DataError, match="no annotated box of the target"):
        evaluate(records, PROTOCOLS["spair-71k"], make_baseline("identity"))


def test_stored_predictions_of_another_image_of_the_same_name_are_refused(tmp_path, capsys):
    first, second = archives.coseg(tmp_path / "first"), archives.coseg(tmp_path / "second")
    archives.write_image(second / "images" / "Cat" / "p1.jpg", (44, 56), seed=99)
    arguments = ["--baseline", "identity", "--predictions", str(tmp_path / "stored")]
    assert main(["evaluate", "coseg", "--data", str(first), *arguments]) == 0
    prepare("coseg", first, tmp_path / "prepared")
    assert main(["evaluate", "coseg", "--data", str(tmp_path / "prepared"), *arguments]) == 0
    capsys.readouterr()
    assert main(["evaluate", "coseg", "--data", str(second), *arguments]) == 2
    assert "'Cat/p1.jpg' was made for other images" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    if not Path("/proc/self").is_dir():
        pytest.skip("needs a folder in which nobody, root included, can make a file: Linux's /proc")
    root = archives.coseg(tmp_path)
    assert main(["evaluate", "coseg", "--data", str(root), "--baseline", "identity", "--json", "/proc/a.json"]) == 2
    said = capsys.readouterr()
    assert "/proc/a.json cannot be written" in said.err
    assert "label transfer" not in said.out


def test_a_mask_that_is_a_bomb_ends_in_one_sentence(tmp_path):
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    root = archives.coseg(tmp_path / "coseg")
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )
    (root / "masks" / "Cat" / "p1.png").write_bytes(bomb)
    with pytest.raises(DataError, match=r"p1\.png cannot be read as a mask"):
        prepare("coseg", root, tmp_path / "out")


def test_any_cut_through_a_file_of_an_archive_ends_in_our_own_error(tmp_path):
    """Cuts and flipped bytes at seeded places: a `DataError`, or a file that can still be read; nothing else."""
    root = archives.pf_willow(tmp_path / "willow", images=2, classes=("car(G)",))
    (root / "test_pairs.csv").unlink()
    path = root / "PF-dataset" / "car(G)" / "photo_000.mat"
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    messages = []
    for number in range(150):
        content = bytearray(whole)
        place = int(generator.integers(len(content)))
        if number % 2:
            content[place] = int(generator.integers(256))
        else:
            del content[place:]
        path.write_bytes(bytes(content))
        try:
            list(iter_records("pf-willow", root))
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all("photo_0" in message for message in messages)


def test_every_public_name_is_what_it_says_whatever_was_imported_before():
    import macosnet_hf.datasets as package

    assert {type(getattr(package, name)).__name__ for name in package.__all__} == {"function", "type", "dict"}
