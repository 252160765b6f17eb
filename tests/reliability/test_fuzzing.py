"""Damaged and hostile input for everything that reads, and a test for each fault that the fuzzer has found.

The fuzzer itself is tests/reliability/fuzz.py; its long form and the figures are in docs/reliability.md.
"""

import io
import json
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from archives import pf_willow, spair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_models import small_model, small_processor
from training_runs import environment

from macosnet_hf import DataError, ImageError, InputError, MaCoSNetError, load_image
from macosnet_hf.datasets.benchmarks import Problems, iter_records
from macosnet_hf.datasets.benchmarks.mat import read_matrix
from macosnet_hf.datasets.benchmarks.tss import read_flow
from macosnet_hf.datasets.masks import mask_from_image
from macosnet_hf.evaluation.predictions import FORMAT, PredictionReader, record_stamp
from macosnet_hf.images import reads_heif
from macosnet_hf.inference.pair import check_points
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching
from macosnet_hf.pipeline_macosnet import MaCoSNetCosegmentationPipeline, MaCoSNetKeypointMatchingPipeline

RELIABILITY = Path(__file__).resolve().parents[2] / "tests" / "reliability"
FUZZ = RELIABILITY / "fuzz.py"
KINDS = 24 + reads_heif()


def fuzz(folder: Path, *arguments: object) -> dict:
    """Runs the fuzzer in a process of its own and returns its report."""
    done = subprocess.run(
        [sys.executable, str(FUZZ), *map(str, arguments), "--report", str(folder / "report.json")],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=folder,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    report = json.loads((folder / "report.json").read_text())
    report["code"] = done.returncode
    return report


def test_five_hundred_damaged_inputs_are_handled_or_refused(tmp_path):
    report = fuzz(tmp_path, "--count", 520)
    faults = [(kind, fault) for kind, tally in report["kinds"].items() for fault in tally["faults"]]
    assert faults == []
    assert report["code"] == 0
    assert len(report["kinds"]) == KINDS
    counts = [tally["counts"] for tally in report["kinds"].values()]
    assert sum(sum(count.values()) for count in counts) >= 500
    # The damage is neither so small that all is read, nor so large that all is refused.
    assert sum(count["handled"] for count in counts) > 50
    assert sum(count["typed error"] for count in counts) > 250
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


# ---------------------------------------------------------------------------------------------------------------------
# The fuzzer notices what it is there for
# ---------------------------------------------------------------------------------------------------------------------

BAD_READERS = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import sandbox
from macosnet_hf import InputError

def refuse():
    raise InputError("no")

def hang():
    while True:
        pass

def allocate():
    return bytearray(2 << 30)

def leave(folder):
    (folder / "left").write_text("x")

def place(number, folder):
    reads = [lambda: 1, refuse, lambda: 1 / 0, lambda: os.kill(os.getpid(), signal.SIGSEGV), hang, allocate]
    reads += [lambda: leave(folder), lambda: Path("here").write_text("x"), lambda: 2]
    return reads[number]

sandbox.SECONDS = 1
tally = sandbox.run_numbers(place, range(9), Path(sys.argv[2]), (InputError,))
print(tally.counts)
print([(fault["number"], fault["outcome"]) for fault in tally.faults])
"""


def test_the_sandbox_counts_crashes_hangs_memory_and_files(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BAD_READERS, str(RELIABILITY), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    counts, faults = done.stdout.splitlines()
    expected = {"handled": 2, "typed error": 1, "other error": 2, "crash": 1, "too slow": 1, "left files": 2}
    assert eval(counts) == expected
    assert eval(faults) == [
        (2, "other error"),
        (3, "crash"),
        (4, "too slow"),
        (5, "other error"),  # MemoryError
        (6, "left files"),
        (7, "left files"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Properties
# ---------------------------------------------------------------------------------------------------------------------

EXAMPLES = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@EXAMPLES
@given(st.binary(max_size=400), st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0"]))
def test_no_bytes_but_images_become_images(data, start):
    with pytest.raises(ImageError):
        load_image(start + data)


@EXAMPLES
@given(
    st.integers(2, 40),
    st.integers(2, 40),
    st.sampled_from(["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F", "LAB", "HSV", "YCbCr"]),
    st.randoms(use_true_random=False),
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_every_image_of_pil_becomes_rgb_of_its_size(width, height, mode, rng):
    size = len(Image.new(mode, (width, height)).tobytes())
    image = Image.frombytes(mode, (width, height), rng.randbytes(size))
    loaded = load_image(image)
    assert (loaded.mode, loaded.size) == ("RGB", (width, height))


numbers = st.one_of(st.integers(-10, 100), st.floats(), st.text(max_size=3), st.none(), st.booleans())


@EXAMPLES
@given(st.recursive(numbers, lambda inner: st.lists(inner, max_size=4), max_leaves=12))
def test_points_are_pairs_of_numbers_within_the_image_or_refused(value):
    try:
        points = check_points(value, (50, 40))
    except InputError:
        return
    assert points.shape == (len(points), 2)
    assert ((points >= 0) & (points <= [49, 39])).all()


cells = st.text(st.characters(codec="utf-8", exclude_characters='",\r\n'), max_size=12)


@EXAMPLES
@given(st.lists(st.lists(cells, min_size=1, max_size=9), max_size=4))
def test_pair_lists_of_any_text_are_refused_by_line(tmp_path, rows):
    listing = tmp_path / "pairs.csv"
    header = "source_image,target_image,class,XA,YA,XB,YB\n"
    listing.write_text(header + "".join(",".join(row) + "\n" for row in rows), encoding="utf-8", newline="")
    with pytest.raises(DataError, match=r"line \d|no record"):
        list(iter_records("pairs", tmp_path, pairs=listing))


@EXAMPLES
@given(st.binary(max_size=200))
def test_bytes_after_the_tag_of_a_flow_are_a_flow_of_their_size_or_refused(tmp_path, data):
    path = tmp_path / "a.flo"
    path.write_bytes(struct.pack("<f", 202021.25) + data)
    try:
        flow = read_flow(path)
    except DataError:
        return
    assert 8 + 8 * flow.shape[0] * flow.shape[1] == len(data)


@EXAMPLES
@given(st.integers(0, 6), st.integers(0, 6), st.booleans(), st.sampled_from(["f8", "f4", "i4", "u1", "i8"]))
def test_matlab_files_are_read_as_scipy_reads_them(rows, columns, compressed, kind):
    savemat = pytest.importorskip("scipy.io", reason="SciPy is not installed").savemat
    values = (np.arange(rows * columns).reshape(rows, columns) * 3 - 7).astype(kind)
    stream = io.BytesIO()
    others = {"a": "text", "b": {"c": 1}, "pts_coord_2": np.ones(3), "complex": np.ones(2) * 1j}
    savemat(stream, {**others, "pts_coord": values, "z": 1}, do_compression=compressed)
    np.testing.assert_array_equal(read_matrix(stream.getvalue(), "pts_coord"), values)
    for name in ("a", "b", "complex", "nothing"):
        with pytest.raises(ValueError, match=name):
            read_matrix(stream.getvalue(), name)


# ---------------------------------------------------------------------------------------------------------------------
# Faults that were found
# ---------------------------------------------------------------------------------------------------------------------


def test_a_damaged_matlab_file_cannot_crash_the_process(tmp_path):
    """SciPy's reader died of SIGSEGV on one of these; ours is pure Python and sees every length."""
    savemat = pytest.importorskip("scipy.io", reason="SciPy is not installed").savemat
    stream = io.BytesIO()
    savemat(stream, {"pts_coord": np.arange(20.0).reshape(2, 10)}, do_compression=False)
    sound, rng, refused = stream.getvalue(), random.Random(0), 0
    for _ in range(1500):
        damaged = bytearray(sound)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(124, len(damaged))] = rng.choice((0, 1, 14, 15, 127, 128, 255))
        try:
            assert (
                read_matrix(bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))]), "pts_coord").ndim
                == 2
            )
        except ValueError:
            refused += 1
    assert 700 < refused < 1500
    root = pf_willow(tmp_path, images=2, classes=("car(G)",))
    (root / "test_pairs.csv").unlink()
    (root / "PF-dataset" / "car(G)" / "photo_000.mat").write_bytes(sound[:-9])
    with pytest.raises(
        DataError, match=r"photo_000\.mat: the keypoints \(pts_coord\) cannot be read \(it is cut off\)"
    ):
        list(iter_records("pf-willow", root))


def test_a_small_matlab_file_that_inflates_to_gigabytes_is_refused():
    import zlib

    packer = zlib.compressobj()
    bomb = b"".join([packer.compress(bytes(1 << 24)) for _ in range(64)] + [packer.flush()])
    assert len(bomb) < 2_000_000
    with pytest.raises(ValueError, match="too large"):
        read_matrix(b"x".ljust(126) + b"IM" + struct.pack("<II", 15, len(bomb)) + bomb, "pts_coord")


NAMES = {"too long": "x" * 300, "null byte": "a\0b", "no text": "\ud800"}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_file_can_have(tmp_path, name):
    (tmp_path / "pairs.csv").write_text(
        f"source_image,target_image,class,XA,YA,XB,YB\n{NAMES[name]},b.png,1,1,1,1,1\n", errors="surrogatepass"
    )
    with pytest.raises(DataError, match=r"pairs\.csv"):
        list(iter_records("pairs", tmp_path, pairs=tmp_path / "pairs.csv"))
    root = spair(tmp_path / "spair")
    path = next((root / "PairAnnotation" / "test").iterdir())
    annotation = json.loads(path.read_text())
    for key in ("src_imname", "category"):
        path.write_text(json.dumps({**annotation, key: NAMES[name]}))
        problems = Problems(skip=True)
        assert len(list(iter_records("spair-71k", root, problems=problems))) == 1
        assert path.name in problems.messages[0]
    path.write_text(json.dumps(annotation))
    with open(root / "Layout" / "large" / "test.txt", "a", encoding="utf-8", errors="replace") as listing:
        listing.write(NAMES[name] + "\n")
    with pytest.raises(DataError):
        list(iter_records("spair-71k", root))


def test_an_annotation_nested_too_deep(tmp_path):
    root = spair(tmp_path)
    path = next((root / "PairAnnotation" / "test").iterdir())
    path.write_text('{"a":' * 100_000)
    with pytest.raises(DataError, match="cannot be read"):
        list(iter_records("spair-71k", root))


def test_damaged_predictions_are_said_to_be(tmp_path):
    stamp = record_stamp({"id": "a"})
    np.savez(tmp_path / "samples.npz", **{"0|points": np.ones((3, 2))})
    sound = {"model": "m", "format": FORMAT, "samples": {"a": ["samples.npz", f"0|{stamp}"]}}

    def read(document):
        (tmp_path / "manifest.json").write_text(document if isinstance(document, str) else json.dumps(document))
        return PredictionReader(tmp_path, {"model": "m"}).get({"id": "a"})

    np.testing.assert_array_equal(read(sound)["points"], np.ones((3, 2)))
    entries = ([], ["samples.npz"], ["samples.npz", 0], [3, "0|x"], [["a"], "0|x"], None, 7, ["samples.npz", "0"])
    for entry in (*entries, ["../samples.npz", f"0|{stamp}"]):
        with pytest.raises(InputError, match="incomplete or damaged"):
            read({**sound, "samples": {"a": entry}})
    for document in ("3", "[]", "null", "{", '{"a":' * 100_000, {**sound, "samples": [1]}, {**sound, "samples": None}):
        with pytest.raises(InputError, match="incomplete or damaged"):
            read(document)
    # A shard whose header numpy cannot even split into words.
    with zipfile.ZipFile(tmp_path / "samples.npz", "w") as archive:
        archive.writestr("0|points.npy", b"\x93NUMPY\x01\0\x12\0{'descr': (((\0\n\n\n\n")
    with pytest.raises(InputError, match=r"samples\.npz are missing or damaged"):
        read(sound)


@pytest.fixture(scope="module")
def pipelines():
    model = small_model(MaCoSNetForKeypointMatching)
    processor = small_processor()
    kinds = (MaCoSNetKeypointMatchingPipeline, MaCoSNetCosegmentationPipeline)
    return [kind(model=model, image_processor=processor) for kind in kinds], processor


@pytest.mark.parametrize(
    "inputs", [[], (), None, "photo", ["a.jpg"], [["a.jpg"]], [1, 2], [[]], {"a": 1}, [None, None]]
)
def test_inputs_of_pipelines_that_are_no_images(pipelines, inputs):
    for pipeline in pipelines[0]:
        with pytest.raises(InputError, match="images"):
            pipeline(inputs)


def test_damaged_images_for_pipelines_and_processor(pipelines, tmp_path):
    sound = Image.effect_noise((40, 30), 50).convert("RGB")
    stream = io.BytesIO()
    sound.save(stream, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(stream.getvalue()[:400])
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("1", (10_001, 10_000)).save(tmp_path / "huge.png")
    lazy = Image.open(io.BytesIO(stream.getvalue()[:-100]))
    for bad in (*(str(tmp_path / name) for name in ("cut.jpg", "text.jpg", "huge.png", "none.jpg")), lazy):
        for call in (*pipelines[0], lambda pair: pipelines[1](pair, return_tensors="pt")):
            with pytest.raises(ImageError, match=r"cannot be read|megapixels|does not exist") as caught:
                call([sound, bad])
            assert isinstance(caught.value, MaCoSNetError)


def test_masks_are_read_with_the_care_of_images(tmp_path):
    """They went through PIL's own `open`, which tries every format and knows no limit of ours."""
    Image.new("1", (10_001, 10_000)).save(tmp_path / "huge.png")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\nshowpage\n%%EOF\n"
    (tmp_path / "mask.png").write_bytes(postscript)
    assert Image.open(tmp_path / "mask.png").format == "EPS"
    for name in ("huge.png", "mask.png"):
        with pytest.raises(DataError, match=rf"here: .*{name} cannot be read as a mask") as caught:
            mask_from_image({"path": str(tmp_path / name), "bytes": None}, "here")
        assert isinstance(caught.value.__cause__, ImageError)


def test_points_with_numbers_that_no_float_can_hold():
    with pytest.raises(InputError, match="pairs of numbers"):
        check_points([[10**400, 1]], (50, 40))
