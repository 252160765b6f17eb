"""Readers: each on an archive in the exact layout, and what is said about files and rows that cannot be used."""

import json

import numpy as np
import pytest
from archives import (
    HEADER,
    SHARED_DATA,
    coseg,
    csv_line,
    disc,
    internet,
    mask,
    pf_pascal,
    pf_willow,
    points,
    spair,
    tss,
    write_flow,
    write_image,
)

from macosnet_hf.datasets.benchmarks import BENCHMARKS, Problems, iter_records
from macosnet_hf.datasets.benchmarks.common import VOC_CLASSES
from macosnet_hf.datasets.benchmarks.pf_willow import read_mat_files
from macosnet_hf.datasets.benchmarks.tss import read_flow
from macosnet_hf.datasets.images import open_image
from macosnet_hf.datasets.masks import mask_from_image
from macosnet_hf.datasets.schema import COLUMNS, features, flow_array, keypoint_array, make_record
from macosnet_hf.errors import DataError, InputError


def read(benchmark, root, split="test", **kwargs):
    return list(iter_records(benchmark, root, split, **kwargs))


def test_the_schema_declares_every_column_in_order():
    assert tuple(features()) == COLUMNS


def test_pf_willow_from_the_list(tmp_path):
    records = read("pf-willow", pf_willow(tmp_path))
    assert len(records) == 6
    first = records[0]
    assert first["class_name"] == "car(G)"
    assert records[3]["class_name"] == "duck(S)"
    assert first["source_id"] == "PF-dataset/car(G)/photo_000.png"
    np.testing.assert_allclose(keypoint_array(first, "source"), points(10, (48, 64), 0), atol=1e-4)
    np.testing.assert_allclose(keypoint_array(first, "target"), points(10, (52, 60), 1), atol=1e-4)
    opened = open_image(first["target_image"], "here")
    assert (opened.height, opened.width) == (52, 60)
    assert len({record["id"] for record in records}) == 6


def test_pf_willow_from_mat_files_is_the_same(tmp_path):
    root = pf_willow(tmp_path)
    from_list = read("pf-willow", root)
    (root / "test_pairs.csv").unlink()
    from_mat = read("pf-willow", root)

    def answers(records):
        return {
            (record["source_id"], record["target_id"]): np.round(
                np.concatenate([keypoint_array(record, "source"), keypoint_array(record, "target")]), 4
            ).tolist()
            for record in records
        }

    assert answers(from_mat) == answers(from_list)


def test_pf_pascal_classes_flips_and_uneven_numbers_of_points(tmp_path):
    root = pf_pascal(tmp_path)
    test = read("pf-pascal", root)
    assert [record["class_name"] for record in test] == ["aeroplane", "tvmonitor", "aeroplane"]
    assert [len(record["source_keypoints"]) for record in test] == [6, 4, 5]
    train = read("pf-pascal", root, "train")
    assert [record["flip_both"] for record in train] == [False, True]
    assert [record["mirror_source"] for record in train] == [False, False]
    assert train[0]["class_name"] == VOC_CLASSES[7] == "cat"
    assert train[0]["source_keypoints"] is None
    assert len(read("pf-pascal", root, "validation")) == 1
    assert read("pf-pascal", root / "PF-dataset-PASCAL") == test


def test_spair_boxes_difficulty_and_order_of_the_layout(tmp_path):
    root = spair(tmp_path)
    records = read("spair-71k", root)
    assert [record["id"][:6] for record in records] == ["000001", "000002"]
    record = records[1]
    assert record["source_id"] == "cat/2008_000002.jpg"
    assert record["target_box"] == [4.0, 8.0, 44.0, 28.0]
    assert record["difficulty"] == {"viewpoint": 2, "scale": 1, "truncation": 0, "occlusion": 3, "mirror": 0}
    assert record["keypoint_ids"] == [0, 1, 4, 7]
    assert mask_from_image(record["source_mask"], "here", (50, 60)).sum() == disc((50, 60)).sum()
    listing = root / "Layout" / "large" / "test.txt"
    listing.write_text("\n".join(reversed(listing.read_text().split())) + "\n")
    assert [record["id"][:6] for record in read("spair-71k", root)] == ["000002", "000001"]
    assert len(read("spair-71k", root, "train")) == 1


def test_spair_drops_points_that_one_side_lacks(tmp_path):
    root = spair(tmp_path)
    path = next((root / "PairAnnotation" / "test").glob("000001*"))
    annotation = json.loads(path.read_text())
    annotation["trg_kps"][1] = None
    path.write_text(json.dumps(annotation))
    record = read("spair-71k", root)[0]
    assert record["keypoint_ids"] == [0, 4, 7]
    assert record["source_keypoints"] == [annotation["src_kps"][index] for index in (0, 2, 3)]


def test_tss_has_both_directions_and_flow_on_the_targets_grid(tmp_path):
    records = read("tss", tss(tmp_path))
    assert [record["id"] for record in records][:2] == ["FG3DCar/car_01_02/1", "FG3DCar/car_01_02/2"]
    for record, size in zip(records, [(48, 64), (40, 80)] * 3, strict=True):
        target = open_image(record["target_image"], "here")
        assert (target.height, target.width) == size
        # (height, width), not (width, height): the .flo header has it the other way round.
        assert flow_array(record).shape == (*size, 2)
        assert mask_from_image(record["target_mask"], "here", size).any()
    assert [record["mirror_source"] for record in records] == [False] * 4 + [True] * 2
    assert records[0]["source_id"] == records[1]["target_id"]


def test_flow_layout_against_plain_bytes(tmp_path):
    flow = np.arange(2 * 3 * 2, dtype=np.float32).reshape(2, 3, 2)
    write_flow(tmp_path / "a.flo", flow)
    data = (tmp_path / "a.flo").read_bytes()
    assert int.from_bytes(data[4:8], "little") == 3  # width first
    np.testing.assert_array_equal(read_flow(tmp_path / "a.flo"), flow)


def test_internet_has_images_without_an_object(tmp_path):
    records = read("internet", internet(tmp_path))
    assert [record["class_name"] for record in records] == ["Airplane"] * 3 + ["Car"] * 3 + ["Horse"] * 3
    masks = [mask_from_image(record["source_mask"], "here", (40, 56)) for record in records]
    assert [bool(array.any()) for array in masks] == [True, True, False] * 3
    assert all(record["target_image"] is None for record in records)


def test_folders_of_ones_own(tmp_path):
    root = coseg(tmp_path / "both")
    records = read("coseg", root)
    assert [record["id"] for record in records][:2] == ["Bird/p0.jpg", "Bird/p1.jpg"]
    assert all(record["source_mask"] is not None for record in records)
    plain = read("coseg", root / "images", "train")
    assert [record["id"] for record in plain] == [record["id"] for record in records]
    assert all(record["source_mask"] is None for record in plain)
    no_masks = read("coseg", coseg(tmp_path / "no", masks=False), "train")
    assert len(no_masks) == 6


def test_a_pair_list_of_ones_own(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", seed=1)
    listing = tmp_path / "mine.csv"
    listing.write_text("\n".join([HEADER, csv_line("a.png", "b.png", "dog", points(3), points(3, seed=1))]))
    for record in (read("pairs", tmp_path, pairs=listing)[0], read("pairs", listing)[0]):
        assert record["class_name"] == "dog"
        assert record["source_keypoints"] == points(3).tolist()


def test_minus_one_padding_of_a_list_is_not_a_keypoint(tmp_path):
    write_image(tmp_path / "a.png")
    first, second = points(3), points(3, seed=1)
    padded = [np.concatenate([array, np.full((2, 2), -1.0)]) for array in (first, second)]
    (tmp_path / "l.csv").write_text("\n".join([HEADER, csv_line("a.png", "a.png", "dog", *padded)]))
    record = read("pairs", tmp_path, pairs=tmp_path / "l.csv")[0]
    assert record["source_keypoints"] == first.tolist()
    assert record["target_keypoints"] == second.tolist()


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_masks_of_every_mode_mean_the_same(tmp_path, mode):
    truth = disc((30, 40), (12, 15), 8)
    mask(tmp_path / "m.png", truth, mode)
    np.testing.assert_array_equal(mask_from_image(tmp_path / "m.png", "here", (30, 40)), truth)


def test_a_dataset_decodes_and_has_the_declared_features(tmp_path):
    from datasets import Dataset

    dataset = Dataset.from_list(list(iter_records("spair-71k", spair(tmp_path))), features=features())
    assert dataset.features == features()
    row = dataset[1]
    assert row["source_image"].size == (60, 50)
    assert row["source_mask"].size == (60, 50)
    assert row["difficulty"]["viewpoint"] == 2
    assert row["flow"] is None


def test_names_of_version_0_1():
    import macosnet_hf.datasets as public

    assert public.mask_from_picture is mask_from_image
    assert public.open_picture is open_image
    for name in public.__all__:
        assert getattr(public, name) is not None
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = public.nothing_such


def leave_what_systems_leave(root) -> None:
    """What macOS and Windows add to folders and archives."""
    for folder in [root, *(path for path in sorted(root.rglob("*")) if path.is_dir())]:
        for path in [path for path in folder.iterdir() if path.is_file()]:
            (folder / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07" + bytes(78))
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "Icon\r"):
            (folder / name).write_bytes(b"\x00\x00\x00\x01Bud1")
        for name in (".hidden", "__MACOSX", "@eaDir"):
            (folder / name).mkdir()
            (folder / name / "._photo.jpg").write_bytes(b"\x00\x05\x16\x07" + bytes(78))
        (folder / "@eaDir" / "SYNOPHOTO_THUMB_S.jpg").write_bytes(b"a small one")


@pytest.mark.parametrize(
    ("benchmark", "make"),
    [
        ("pf-willow", pf_willow),
        ("pf-willow without a list", pf_willow),
        ("pf-pascal", pf_pascal),
        ("spair-71k", spair),
        ("spair-71k without a list", spair),
        ("tss", tss),
        ("internet", internet),
        ("coseg", coseg),
    ],
)
def test_what_operating_systems_leave_in_folders_is_ignored(tmp_path, benchmark, make):
    root = make(tmp_path / "archive")
    if benchmark.endswith("without a list"):
        (root / "test_pairs.csv").unlink(missing_ok=True)
        for path in root.glob("Layout/large/*.txt"):
            path.unlink()
        benchmark = benchmark.split()[0]
    before = [record["id"] for record in read(benchmark, root)]
    leave_what_systems_leave(root)
    assert [record["id"] for record in read(benchmark, root)] == before


def wide_list(lines: list[str]) -> str:
    """A list in PF's columns with one column a number, as other code reads it; without the class."""
    header = ["imageA", "imageB", *(f"{name}{number}" for name in ("XA", "YA", "XB", "YB") for number in range(1, 11))]
    rows = [line.split(",") for line in lines[1:]]
    return "\n".join([",".join(header), *(",".join([*row[:2], *";".join(row[3:]).split(";")]) for row in rows)]) + "\n"


def test_a_list_with_one_column_a_number_is_the_same(tmp_path):
    root = pf_willow(tmp_path / "willow")
    expected = read("pf-willow", root)
    listing = root / "test_pairs.csv"
    listing.write_text(wide_list(listing.read_text().splitlines()))
    assert len(listing.read_text().splitlines()[0].split(",")) == 42
    assert read("pf-willow", root) == expected
    own = read("pairs", root, pairs=listing)
    assert [record["source_keypoints"] for record in own] == [record["source_keypoints"] for record in expected]
    assert own[0]["class_name"] == "car(G)"


def test_the_columns_that_are_expected_are_named(tmp_path):
    root = pf_willow(tmp_path)
    (root / "test_pairs.csv").write_text("left,right\na.png,b.png\n")
    with pytest.raises(DataError, match=r"test_pairs.csv: the columns must be source_image,.*; they are left,right"):
        read("pf-willow", root)


# -- bad data ---


def break_csv(root, line):
    path = root / "test_pairs.csv"
    lines = path.read_text().split("\n")
    lines[2] = line(lines[2])
    path.write_text("\n".join(lines))
    return "test_pairs.csv, line 3"


CSV_FAULTS = {
    "too few numbers": lambda line: ",".join([*line.split(",")[:3], "1;2", *line.split(",")[4:]]),
    "no number": lambda line: line.replace(line.split(",")[3].split(";")[0], "x", 1),
    "empty column": lambda line: ",".join([*line.split(",")[:6], ""]),
    "missing columns": lambda line: ",".join(line.split(",")[:4]),
    "unknown class": lambda line: ",".join([*line.split(",")[:2], "11", *line.split(",")[3:]]),
    "nan": lambda line: line.replace(line.split(",")[3].split(";")[0], "nan", 1),
    "infinite": lambda line: line.replace(line.split(",")[5].split(";")[0], "inf", 1),
    "missing image": lambda line: line.replace("photo_000", "photo_999", 1),
    "no image named": lambda line: "," + ",".join(line.split(",")[1:]),
}


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_a_bad_row_is_named_or_counted(tmp_path, fault):
    root = pf_willow(tmp_path)
    where = break_csv(root, CSV_FAULTS[fault])
    with pytest.raises(DataError, match=where):
        read("pf-willow", root)
    problems = Problems(skip=True)
    assert len(read("pf-willow", root, problems=problems)) == 5
    assert len(problems.messages) == 1
    assert where in problems.messages[0]


def remove(path):
    path.unlink()
    return path.name


def overwrite(path, data):
    path.write_bytes(data)
    return path.name


FOLDER_FAULTS = {
    "missing mask": ("coseg", coseg, lambda root: remove(root / "masks" / "Cat" / "p1.png")),
    "missing image": ("coseg", coseg, lambda root: remove(root / "images" / "Cat" / "p1.jpg").replace("jpg", "png")),
    "missing ground truth": (
        "internet",
        internet,
        lambda root: remove(root / "Data" / "Car100" / "GroundTruth" / "0002.png"),
    ),
    "missing flow": ("tss", tss, lambda root: remove(root / "TSS_CVPR2016" / "JODS" / "car_01_02" / "flow2.flo")),
    "cut flow": (
        "tss",
        tss,
        lambda root: overwrite(
            (path := root / "TSS_CVPR2016" / "JODS" / "car_01_02" / "flow2.flo"), path.read_bytes()[:-5]
        ),
    ),
    "flip of words": (
        "tss",
        tss,
        lambda root: overwrite(root / "TSS_CVPR2016" / "FG3DCar" / "car_01_02" / "flip_gt.txt", b"yes"),
    ),
    "broken json": (
        "spair-71k",
        spair,
        lambda root: overwrite(next((root / "PairAnnotation" / "test").glob("000002*")), b"{"),
    ),
    "missing json": (
        "spair-71k",
        spair,
        lambda root: remove(next((root / "PairAnnotation" / "test").glob("000002*"))),
    ),
    "incomplete json": (
        "spair-71k",
        spair,
        lambda root: overwrite(next((root / "PairAnnotation" / "test").glob("000002*")), b'{"category": "cat"}'),
    ),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_a_bad_file_is_named_or_counted(tmp_path, fault):
    benchmark, make, damage = FOLDER_FAULTS[fault]
    root = make(tmp_path)
    before = len(read(benchmark, root))
    name = damage(root)
    with pytest.raises(DataError, match=name):
        read(benchmark, root)
    problems = Problems(skip=True)
    after = read(benchmark, root, problems=problems)
    assert problems.messages
    assert all(name in message for message in problems.messages)
    # A pair's flip file serves two records; a mask without its image is a complaint about a record that never was.
    assert before - len(after) == len(problems.messages)


def test_an_empty_class_an_unknown_class_and_an_absent_folder(tmp_path):
    root = coseg(tmp_path / "a")
    (root / "images" / "Dog").mkdir()
    with pytest.raises(DataError, match="Dog"):
        read("coseg", root)
    willow = pf_willow(tmp_path / "b")
    (willow / "test_pairs.csv").unlink()
    (willow / "PF-dataset" / "duck(S)").rename(willow / "PF-dataset" / "goose")
    with pytest.raises(DataError, match="goose"):
        read("pf-willow", willow)
    with pytest.raises(DataError, match="missing"):
        read("pf-willow", tmp_path / "nowhere")
    with pytest.raises(DataError, match="pair list is missing"):
        read("pf-pascal", tmp_path)


def test_a_file_that_is_no_image_and_two_images_of_one_name(tmp_path):
    root = coseg(tmp_path)
    (root / "images" / "Cat" / "p7.heic").write_bytes(b"x")
    (root / "images" / "Cat" / ".DS_Store").write_bytes(b"x")
    with pytest.raises(DataError, match=r"p7\.heic"):
        read("coseg", root)
    (root / "images" / "Cat" / "p7.heic").unlink()
    assert len(read("coseg", root)) == 6
    write_image(root / "images" / "Cat" / "p1.png")
    with pytest.raises(DataError, match=r"p1\.jpg.*same name"):
        read("coseg", root)
    assert len(read("coseg", root / "images", "train")) == 7


def test_an_unknown_benchmark_or_split(tmp_path):
    with pytest.raises(InputError, match="caltech"):
        read("caltech", tmp_path)
    with pytest.raises(InputError, match="validation"):
        read("tss", tss(tmp_path), "validation")


def test_a_header_alone_is_no_data_set(tmp_path):
    (tmp_path / "test_pairs.csv").write_text(HEADER + "\n")
    with pytest.raises(DataError, match="no record"):
        read("pf-willow", tmp_path)


def test_a_damaged_or_wrongly_sized_mask_or_image_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"row 7.*bad\.png"):
        mask_from_image(tmp_path / "bad.png", "row 7")
    with pytest.raises(DataError, match=r"row 7.*bad\.png"):
        open_image({"path": str(tmp_path / "bad.png"), "bytes": None}, "row 7")
    mask(tmp_path / "m.png", disc((30, 40)))
    with pytest.raises(DataError, match="40x30"):
        mask_from_image(tmp_path / "m.png", "row 7", (40, 30))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"source_keypoints": [[1.0, 2.0]], "target_keypoints": []}, "1 keypoints"),
        ({"source_keypoints": [[1.0, 2.0]]}, "one image only"),
        ({"source_keypoints": [[1.0]], "target_keypoints": [[1.0, 2.0]]}, "two numbers"),
        ({"source_box": [5.0, 1.0, 5.0, 9.0]}, "no extent"),
        ({"flow": [0.0] * 5, "flow_size": [1, 2]}, "flow"),
        ({"colour": 1}, "colour"),
        ({"source_image": None}, "an image"),
    ],
)
def test_a_record_that_cannot_be(values, text):
    given = {"id": "x", "source_image": {"path": "a"}, "target_image": {"path": "b"}, **values}
    with pytest.raises(DataError, match=f"here.*{text}"):
        make_record("here", **given)


def test_every_benchmark_states_its_source():
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name
        if name not in ("coseg", "pairs"):
            assert benchmark.citation.startswith("@")
            assert benchmark.homepage.startswith("https://")


# -- the real archives, where they are --------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED_DATA / "pf-willow").is_dir(), reason="the PF-WILLOW archive is not here")
def test_the_real_pf_willow_list_agrees_with_its_mat_files():
    root = SHARED_DATA / "pf-willow"
    records = read("pf-willow", root)
    assert len(records) == 450
    listed = {(record["source_id"], record["target_id"]): record for record in records}
    found = 0
    for record in read_mat_files(root, "test", Problems()):
        key = (record["source_id"], record["target_id"])
        turned = key not in listed
        other = listed[key[::-1] if turned else key]
        np.testing.assert_allclose(
            keypoint_array(record, "source"), keypoint_array(other, "target" if turned else "source"), atol=1e-3
        )
        found += 1
    assert found == 450


@pytest.mark.skipif(not (SHARED_DATA / "tss-sample").is_dir(), reason="the TSS sample is not here")
def test_the_real_flow_of_a_mirrored_pair_is_in_stored_coordinates():
    """A pixel on the object must land on the other image's object; after mirroring fewer do."""
    mirrored = [record for record in read("tss", SHARED_DATA / "tss-sample") if record["mirror_source"]]
    assert len(mirrored) == 2
    for record in mirrored:
        flow = flow_array(record)
        target = mask_from_image(record["target_mask"], "target", flow.shape[:2])
        source = mask_from_image(record["source_mask"], "source")
        valid = target & (np.abs(flow) < 1e9).all(-1)
        rows, columns = np.nonzero(valid)
        places = np.stack((columns, rows), -1) + flow[rows, columns]
        x = np.clip(places[:, 0].round().astype(int), 0, source.shape[1] - 1)
        y = np.clip(places[:, 1].round().astype(int), 0, source.shape[0] - 1)
        assert source[y, x].mean() > source[y, source.shape[1] - 1 - x].mean()
        assert np.polyfit(columns, places[:, 0], 1)[0] < 0  # left and right change places
