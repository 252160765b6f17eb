"""Nothing of a stranger's file is run, no name leads out of its folder, no secret is written down.

docs/reliability.md has the threat model. Pickles for `convert` are in test_convert.py, files of the server that a
request names in test_app.py, tokens of `push` in test_hub.py.
"""

import csv
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import HEADER, coseg, pf_willow, spair
from PIL import Image
from small_models import save_small_checkpoint
from training_runs import Runs, environment, image_folder

import macosnet_hf
from macosnet_hf import CheckpointError, DataError, ImageError, InputError, OutputError
from macosnet_hf.commands.main import main
from macosnet_hf.commands.segment import print_remarks
from macosnet_hf.conversion.published import read_state_dict
from macosnet_hf.datasets.benchmarks import Problems, iter_records
from macosnet_hf.datasets.masks import mask_from_image
from macosnet_hf.datasets.prepare import open_records, prepare
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.io.image_files import image_size, load_image
from macosnet_hf.io.output_folder import output_folder, write_file
from macosnet_hf.io.working_copy import distinct_names
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching
from macosnet_hf.pipeline_macosnet import MaCoSNetKeypointMatchingPipeline

TOKEN = "hf" + "_" + "s3cr3T" * 6  # in two parts, so that this file itself holds nothing like a token


class Payload:
    """A pickle that, when it is loaded, makes the file `witness`."""

    def __init__(self, witness: Path):
        self.command = f"echo ran > '{witness}'"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def witness(tmp_path):
    path = tmp_path / "witness"
    yield path
    assert not path.exists(), "code out of a file was run"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return save_small_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def checkpoint(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is run
# ---------------------------------------------------------------------------------------------------------------------


def test_the_payload_runs_where_nobody_is_careful(tmp_path):
    with open(tmp_path / "evil.bin", "wb") as file:
        pickle.dump(Payload(tmp_path / "witness"), file)
    with open(tmp_path / "evil.bin", "rb") as file:
        pickle.load(file)
    assert (tmp_path / "witness").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pth", "training_args.bin"])
def test_pickles_in_a_checkpoint_folder(checkpoint, witness, name):
    """Instead of the weights, and beside sound ones."""
    torch.save({"macosnet.x": Payload(witness)}, checkpoint / name)
    if name == "model.safetensors":
        with pytest.raises(CheckpointError, match="is a pickle"):
            load_model_and_processor(checkpoint, "cpu")
        return
    load_model_and_processor(checkpoint, "cpu")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        load_model_and_processor(checkpoint, "cpu")
    with pytest.raises(Exception, match=r"(?s)."):  # the library's own door: whatever it says, it does not run it
        MaCoSNetForKeypointMatching.from_pretrained(checkpoint)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_dtype_with_forged_flags_is_no_way_in(tmp_path, legacy):
    """numpy's dtypes are let through for `best_test_loss` of the published files; one that says of eight bytes that
    they are a pointer to an object would be a way to the memory of the process."""

    class Forged:
        def __init__(self, kind):
            self.kind = kind

        def __reduce__(self):
            return np.dtype, (self.kind, False, True), (3, "|", None, None, None, -1, -1, 0)

    class Number:
        def __init__(self, kind):
            self.kind = kind

        def __reduce__(self):
            return np._core.multiarray.scalar, (Forged(self.kind), b"\x41" * 8)

    for kind in ("O8", "V8"):
        path = tmp_path / f"{kind}.pth.tar"
        content = {"best_test_loss": Number(kind), "state_dict": {"a": torch.ones(2)}}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match="refused"):
            read_state_dict(path)


def test_code_beside_data_does_not_run(tmp_path, witness, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    prepare("coseg", coseg(tmp_path / "in"), tmp_path / "prepared")
    code = f"open({str(witness)!r}, 'w').close()\n"
    for name in ("dataset.py", "__init__.py"):
        (tmp_path / "prepared" / name).write_text(code)
    assert len(list(open_records("coseg", tmp_path / "prepared")[0])) == 6
    (tmp_path / "prepared" / "prepared.py").write_text(code)  # the name under which scripts were once run
    with pytest.raises(DataError, match="scripts are no longer supported"):
        list(open_records("coseg", tmp_path / "prepared")[0])


def test_stored_predictions_hold_numbers_only(tmp_path, witness):
    from macosnet_hf.evaluation.predictions import FORMAT, PredictionReader, record_stamp

    array = np.empty(1, dtype=object)
    array[0] = Payload(witness)
    np.savez(tmp_path / "samples.npz", **{"0|points": array})
    samples = {"a": ["samples.npz", f"0|{record_stamp({'id': 'a'})}"]}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT, "samples": samples}))
    with pytest.raises(InputError, match="missing or damaged"):
        PredictionReader(tmp_path, {}).get({"id": "a"})


EVIL = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sound) -> tuple[Runs, Runs]:
    """A short training run with a token in its environment, and then runs with evil checkpoints and settings."""
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra `train`)")
    root = tmp_path_factory.mktemp("trained")
    first, second = Runs(root), Runs(root)
    base = ("--dataset_name", image_folder(root / "photos", 4), "--model_name_or_path", sound, "--photo_size", 96)
    base += ("--per_device_train_batch_size", 2, "--num_warmup_steps", 0, "--logging_steps", 1, "--max_train_steps", 3)
    base += ("--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
    first.add("whole", "pretrain", *base, "--output_dir", root / "whole")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
            patch.setenv(name, TOKEN)
        first.start()
    for name in EVIL:
        shutil.copytree(root / "whole", root / name)
        torch.save({"state": Payload(root / f"{name}.witness")}, root / name / "checkpoint-2" / name)
        second.add(name, "pretrain", *base, "--output_dir", root / name)
    (root / "evil.yaml").write_text(f"seed: !!python/object/apply:os.system ['echo ran > {root / 'yaml.witness'}']\n")
    second.add("yaml", "pretrain", *base, "--output_dir", root / "yaml", "--config", root / "evil.yaml")
    second.start()
    return first, second


def test_pickles_in_the_checkpoint_of_a_run_that_is_resumed(trained):
    _, runs = trained
    for name in EVIL:
        assert not (runs.folder / f"{name}.witness").exists()
        if not name.startswith("random"):  # without these accelerate goes on: every step here has its own
            assert runs.statuses[name] != 0, runs.text(name)
    runs.refused("yaml", "evil.yaml cannot be read")
    assert not (runs.folder / "yaml.witness").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------------------------------------------------


def test_a_token_is_in_no_checkpoint_and_in_no_log(trained):
    runs, _ = trained
    runs.succeeded("whole")
    files = [path for path in (runs.folder / "whole").rglob("*") if path.is_file()]
    assert {"run.json", "config.json", "log.jsonl", "model.safetensors"} <= {path.name for path in files}
    for path in [*files, runs.text_file("whole")]:
        content = path.read_bytes()
        assert TOKEN.encode() not in content, path
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                assert not any(TOKEN.encode() in archive.read(name) for name in archive.namelist()), path


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "coseg", "--data", "someone/private-set", "--baseline", "identity"],
        ["match", "PHOTO", "PHOTO", "--output-dir", "out", "--model", "someone/private-model"],
        ["push", "model", "CHECKPOINT", "someone/else"],
    ],
)
def test_a_token_is_not_said_when_the_hub_cannot_be_had(arguments, tmp_path, sound):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "photo.png")
    words = [{"PHOTO": str(tmp_path / "photo.png"), "CHECKPOINT": str(sound)}.get(word, word) for word in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "macosnet_hf", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment(), "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")},
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

OUTWARD = ("../private.png", "p/../../private.png", "ABSOLUTE", "./../private.png", "p/./../../private.png")


@pytest.fixture
def private(tmp_path) -> Path:
    """An image that is not part of any data set."""
    path = tmp_path / "private.png"
    Image.effect_noise((64, 48), 60).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("name", OUTWARD)
def test_rows_of_a_pair_list_stay_in_the_data_folder(tmp_path, private, name):
    data = tmp_path / "data"
    (data / "p").mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(data / "p" / "a.png")
    name = str(private) if name == "ABSOLUTE" else name
    for row in ([name, "p/a.png"], ["p/a.png", name]):
        with open(data / "pairs.csv", "w", newline="") as stream:
            csv.writer(stream).writerows([HEADER.split(","), [*row, "x", 1, 1, 1, 1]])
        with pytest.raises(DataError, match=r"pairs\.csv, line 2: .* leads out of the data folder"):
            list(iter_records("pairs", data, pairs=data / "pairs.csv"))
        with pytest.raises(DataError):
            prepare("pairs", data, tmp_path / "out", pairs=data / "pairs.csv")
        assert not (tmp_path / "out").exists()


def test_rows_may_name_their_images_in_any_way_that_stays_inside(tmp_path):
    data = tmp_path / "data"
    (data / "p").mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(data / "p" / "..a.png")
    names = ("p/..a.png", "p/../p/..a.png", str(data / "p" / "..a.png"), "./p//..a.png")
    with open(data / "pairs.csv", "w", newline="") as stream:
        rows = [[name, "p/..a.png", "x", 1, 1, 1, 1] for name in names]
        csv.writer(stream).writerows([HEADER.split(","), *rows])
    assert len(list(iter_records("pairs", data, pairs=data / "pairs.csv"))) == len(names)


def test_annotations_and_lists_of_spair_stay_in_their_folders(tmp_path, private):
    root = spair(tmp_path / "spair")
    path = sorted((root / "PairAnnotation" / "test").iterdir())[0]
    annotation = json.loads(path.read_text())
    for name in ("../../../private.png", str(private), "../dog/x.jpg"):
        path.write_text(json.dumps({**annotation, "trg_imname": name}))
        with pytest.raises(DataError, match=r"leads out of the data folder"):
            list(iter_records("spair-71k", root))
    path.write_text(json.dumps(annotation))
    with open(root / "Layout" / "large" / "test.txt", "a") as listing:
        listing.write(f"../../../{path.stem}\n")
    with pytest.raises(DataError, match=r"test\.txt, line 3: .* leads out"):
        list(iter_records("spair-71k", root))


@pytest.mark.parametrize("kind", ["image", "mask", "folder"])
def test_links_out_of_an_archive_do_not_get_into_what_is_prepared(tmp_path, private, kind):
    """An archive may hold links; what they lead to on this machine must not be published with the data set."""
    root = coseg(tmp_path / "in")
    if kind == "folder":
        shutil.move(root / "images" / "Cat", tmp_path / "elsewhere")
        (root / "images" / "Cat").symlink_to(tmp_path / "elsewhere")
    else:
        path = root / ("images" if kind == "image" else "masks") / "Cat" / ("p1.jpg" if kind == "image" else "p1.png")
        path.unlink()
        target = private
        if kind == "mask":
            target = tmp_path / "private_mask.png"
            Image.new("1", (56, 44), 1).save(target)
        path.symlink_to(target)
    with pytest.raises(DataError, match=r"is a link out of the data folder"):
        prepare("coseg", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    problems = Problems(skip=True)
    counts = prepare("coseg", root, tmp_path / "out", problems=problems)
    assert counts == {"test": 3 if kind == "folder" else 5}
    shards = b"".join(path.read_bytes() for path in (tmp_path / "out" / "data").iterdir())
    assert private.read_bytes()[40:200] not in shards


def test_a_data_folder_that_is_a_link_itself_and_links_inside_it_are_fine(tmp_path):
    root = coseg(tmp_path / "in")
    shutil.move(root / "images" / "Cat" / "p1.jpg", root / "stored.jpg")
    (root / "images" / "Cat" / "p1.jpg").symlink_to(root / "stored.jpg")
    (tmp_path / "link").symlink_to(root)
    assert prepare("coseg", tmp_path / "link", tmp_path / "out") == {"test": 6}
    willow = pf_willow(tmp_path / "willow", images=2, classes=("car(G)",))
    assert prepare("pf-willow", willow / "PF-dataset", tmp_path / "out2") == {"test": 1}


def test_names_of_uploads_cannot_lead_out_of_a_zip():
    names = [
        "../../evil.jpg",
        "/etc/passwd.jpg",
        "C:\\x.jpg",
        "..",
        ".hidden.png",
        "a\0b.png",
        "",
        "../../evil.png",
        "é 猫.jpg",
    ]
    distinct = distinct_names(names)
    assert len({name.lower() for name in distinct}) == len(names)
    for name in distinct:
        assert name
        assert not name.startswith(".")
        assert os.path.basename(name) == name
        assert not set(name) & set('/\\:*?"<>|\0')


def test_results_replace_links_and_do_not_write_through_them(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.txt", "b.json"):
        (out / name).symlink_to(own)
    with output_folder(out) as folder:
        for name in ("a.txt", "b.json"):
            (folder / name).write_text("result")
    write_file(out / "c.json", "x")
    (out / "d.json").symlink_to(own)
    write_file(out / "d.json", "x")
    assert own.read_text() == "mine"
    assert not any(path.is_symlink() for path in out.iterdir())


def test_what_others_left_under_our_temporary_names_is_not_followed(tmp_path):
    """A link called like a leftover of ours must not make the clean-up delete what it leads to."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.txt").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".macosnet-link0001").symlink_to(own)
    (out / ".macosnet-file").write_text("a file")
    (out / ".macosnet-left0001").mkdir()
    (out / ".macosnet-left0001" / "inner").symlink_to(own)
    with output_folder(out) as folder:
        (folder / "a.txt").write_text("a")
    assert (own / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == [".macosnet-file", ".macosnet-link0001", "a.txt"]
    (tmp_path / ".prepared.partial").symlink_to(own)
    with pytest.raises(OutputError, match="in the way"):
        prepare("coseg", coseg(tmp_path / "in"), tmp_path / "prepared")
    assert (own / "mine.txt").read_text() == "mine"


def test_uploads_stay_in_their_folder_and_no_other_file_is_served(tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="gradio is not installed (extra `demo`)")
    import httpx
    from demo_server import free_port

    import app

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "served"))
    demo = app.build_demo()
    address = app.serve(demo, port=free_port()).rstrip("/")
    try:
        image = io.BytesIO()
        Image.new("RGB", (9, 9)).save(image, "PNG")
        for name in ("../../../evil.png", "/tmp/evil.png", "..\\..\\evil.png", "....//evil.png"):
            files = {"files": (name, image.getvalue(), "image/png")}
            (path,) = httpx.post(f"{address}/gradio_api/upload", files=files).json()
            assert Path(os.path.realpath(path)).is_relative_to(os.path.realpath(tmp_path / "served"))
        found = [path for path in tmp_path.rglob("*evil*") if path.is_file()]
        assert found
        assert all(path.is_relative_to(tmp_path / "served") for path in found)
        assert httpx.get(f"{address}/gradio_api/file={found[0]}").status_code == 200
        for path in ("/etc/passwd", app.__file__, "../../etc/passwd", f"{tmp_path}/served/../../etc/passwd"):
            assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404)
    finally:
        demo.close()


def test_text_of_a_stranger_cannot_steer_the_terminal(tmp_path, capsys):
    (tmp_path / "pairs.csv").write_text(
        "source_image,target_image,class,XA,YA,XB,YB\n\x1b]0;owned\x07\x1b[2J\u202egnp.exe,b.png,1,1,1,1,1\n",
        encoding="utf-8",
    )
    assert main(["prepare", "pairs", str(tmp_path), str(tmp_path / "out"), "--pairs", str(tmp_path / "pairs.csv")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "gnp.exe" in said
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", said)
    assert str(InputError("half a character: \ud83d")).encode("utf-8")
    assert str(InputError("Zwei Zeilen:\n\t猫, é und 👩‍🚀")) == "Zwei Zeilen:\n\t猫, é und 👩‍🚀"


def test_names_of_images_cannot_steer_the_terminal_nor_make_up_a_line(capsys):
    name = "c\x1b[2J.png\nmacosnet: all is well"
    print_remarks(
        {
            "odd_ones_out": [name],
            "alone": False,
            "photos": [{"file": name, "common": False}, {"file": name, "common": True}],
        }
    )
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" all is well ")[0] for line in said] == ["c\ufffd[2J.png macosnet:"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_no_model_goes_where_it_could_not_be_loaded_from(tmp_path, sound, capfd):
    """`adapt` trained for minutes and ended in a traceback of safetensors."""
    out = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"out\xff"))
    (tmp_path / "images").mkdir()
    for words in (
        ["adapt", str(tmp_path / "images"), "--output-dir", out, "--model", str(sound)],
        ["convert", str(tmp_path / "nowhere.pth.tar"), out],
    ):
        assert main(words) == 2
        assert "has a name that is not UTF-8" in capfd.readouterr().err
    assert not os.path.exists(out)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_names_that_the_terminal_cannot_show_do_not_end_a_finished_run(tmp_path, sound, encoding):
    names = (b"a\xff.png", "b \u732b.png".encode(), b"c\x1b[2J.png")
    photos = [os.path.join(os.fsencode(tmp_path), name) for name in names]
    for number, photo in enumerate(photos):
        with open(photo, "wb") as file:
            Image.effect_noise((40, 30), 30 + number).convert("RGB").save(file, "PNG")
    out = os.path.join(os.fsencode(tmp_path), b"out\xff")
    options = ["--output-dir", out, "--model", str(sound), "--device", "cpu", "--refine", "none"]
    done = subprocess.run(
        [sys.executable, "-m", "macosnet_hf", "segment", *photos, *options],
        capture_output=True,
        env={**environment(), "PYTHONIOENCODING": encoding},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"out\\udcff" in done.stdout
    assert b"summary.json" in os.listdir(out)
    assert len(os.listdir(out)) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


def large_png(width: int, height: int) -> bytes:
    """A header of that size, and nothing behind it that could be decoded."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"no deflate") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_001, 10_000), (60_000, 60_000), (2, 50_000_001)])
def test_oversized_images_are_refused_by_their_header(tmp_path, sound, size):
    """They would end in another sentence if a single byte of their pixels were looked at."""
    data = large_png(*size)
    path = tmp_path / "large.png"
    path.write_bytes(data)
    for source in (data, path, io.BytesIO(data)):
        for read in (load_image, image_size, lambda source: load_image(source, reduced_to=100)):
            with pytest.raises(ImageError, match="megapixels"):
                read(source)
    with pytest.raises(DataError) as caught:
        mask_from_image({"path": str(path), "bytes": None}, "here")
    assert "megapixels" in str(caught.value.__cause__)
    model, processor = load_model_and_processor(sound, "cpu")
    matcher = MaCoSNetKeypointMatchingPipeline(model=model, image_processor=processor)
    with pytest.raises(ImageError, match=r"megapixels|bomb"):
        matcher([str(path), str(path)])
    with pytest.raises(ImageError, match=r"damaged"):  # this one is small enough to be looked at
        load_image(large_png(100, 100))


def test_the_versions_below_the_bounds_have_known_holes():
    """Each bound is the first version without a hole that this package would open; docs/reliability.md says which."""
    text = (Path(macosnet_hf.__file__).parents[1] / "pyproject.toml").read_text()
    bounds = re.findall(r'"([a-z-]+)>=([\d.]+)"', text)  # an extra may name a package again
    for name, version in {"torch": "2.10", "pillow": "12.3", "gradio": "6.20"}.items():
        declared = [tuple(map(int, bound.split("."))) for other, bound in bounds if other == name]
        assert min(declared) >= tuple(map(int, version.split("."))), name
