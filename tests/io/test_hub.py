"""Uploads and downloads with the real Hub client, against a small server that speaks the Hub's calls."""

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import httpx
import pytest
from hub_server import TOKEN, HubServer
from PIL import Image
from small_models import save_small_checkpoint, small_model, small_processor

from macosnet_hf import DEFAULT_CHECKPOINT, CheckpointError, InputError, MaCoSNetForKeypointMatching
from macosnet_hf.commands.main import main
from macosnet_hf.io.hub import plan

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "small"
    save_small_checkpoint(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A card\n")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "state.bin").write_bytes(b"x" * 1000)
    (folder / "log.jsonl").write_text("{}\n")
    (folder / ".secret").write_text("not for others")
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for kind in ("cat", "dog"):
        (root / "photos" / kind).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40 + number, 30), (90 * number, 60, 30)).save(root / "photos" / kind / f"{number}.png")
    assert main(["prepare", "coseg", str(root / "photos"), str(root / "prepared")]) == 0
    return root / "prepared"


def environment(hub, tmp_path, **more):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **inherited,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",  # the server speaks the older protocol, which the client falls back to
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        **more,
    }


def macosnet(hub, tmp_path, *arguments, **more):
    """Runs the command line in a process of its own, since the client reads HF_ENDPOINT when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", "macosnet_hf", *map(str, arguments)],
        env=environment(hub, tmp_path, **more),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


def python(hub, tmp_path, code, *arguments, **more):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment(hub, tmp_path, **more),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---- what would be uploaded ------------------------------------------------------------------------------------------


def test_a_dry_run_lists_files_and_sizes_and_uploads_nothing(hub, checkpoint, tmp_path):
    done = macosnet(hub, tmp_path, "push", "model", checkpoint, "me/small", "--dry_run", HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    assert "Nothing was uploaded to me/small" in done.stdout
    listed = {line.split()[2] for line in done.stdout.splitlines() if len(line.split()) == 3}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "pipeline_macosnet.py"} <= listed
    assert not [name for name in listed if "checkpoint" in name or "log" in name or "secret" in name]
    size = (checkpoint / "model.safetensors").stat().st_size
    assert f"{size / 1000:.1f} kB  model.safetensors" in done.stdout
    assert hub.requests == []


def test_what_operating_systems_leave_in_folders_is_not_uploaded(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    before = {upload.name for upload in plan("model", folder)}
    (folder / "__MACOSX").mkdir()
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._config.json", "__MACOSX/._config.json"):
        (folder / name).write_bytes(b"of the system")
    assert {upload.name for upload in plan("model", folder)} == before


def test_the_embedded_checkpoint_is_uploaded_with_its_code():
    uploads = {upload.name: upload for upload in plan("model", DEFAULT_CHECKPOINT)}
    assert uploads["modeling_macosnet.py"].size == (ROOT / "macosnet_hf" / "modeling_macosnet.py").stat().st_size
    config = json.loads(uploads["config.json"].path.read_text())
    named = [*config["auto_map"].values(), *(entry["impl"] for entry in config["custom_pipelines"].values())]
    assert {f"{name.split('.')[0]}.py" for name in named} <= set(uploads)


def test_the_space_is_the_app_and_the_package():
    names = {upload.name for upload in plan("space", ROOT)}
    assert {"app.py", "README.md", "requirements.txt", "macosnet_hf/commands/main.py"} <= names
    assert "macosnet_hf/pretrained/macosnet-lite/model.safetensors" in names
    assert not [name for name in names if name.startswith((".", "tests", "training")) or "__pycache__" in name]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("model", "has no config.json"), ("dataset", "not a prepared data set"), ("space", "holds no app.py")],
)
def test_a_folder_of_another_kind_is_refused(kind, words, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    with pytest.raises((CheckpointError, InputError), match=words):
        plan(kind, tmp_path / "folder")
    assert main(["push", kind, str(tmp_path / "folder"), "me/x", "--dry-run"]) == 2
    assert words in capsys.readouterr().err
    with pytest.raises(InputError, match="no folder"):
        plan(kind, tmp_path / "nothing")


def test_a_space_needs_its_settings(tmp_path):
    for name in ("app.py", "model_card.md", "requirements.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "README.md").write_text("# No settings\n")
    with pytest.raises(InputError, match="sdk: gradio"):
        plan("space", tmp_path)


def test_a_file_with_a_token_is_refused(checkpoint, tmp_path):
    folder = tmp_path / "leaky"
    shutil.copytree(checkpoint, folder)
    (folder / "notes.txt").write_text("token = 'hf" + "_" + "a1B2" * 9 + "'")
    with pytest.raises(InputError, match=r"notes\.txt holds something that looks like a token"):
        plan("model", folder)


# ---- uploads ---------------------------------------------------------------------------------------------------------


def test_model_goes_up_and_comes_down(hub, checkpoint, tmp_path):
    done = macosnet(hub, tmp_path, "push", "model", checkpoint, "me/small", "--private", "--message", "Trained")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/me/small"
    assert TOKEN not in done.stdout + done.stderr
    repository = ("model", "me/small")
    assert len(hub.commits) == 1  # all or nothing
    assert hub.settings[repository]["visibility"] == "private"
    files = hub.files[repository]
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert set(files) == {upload.name for upload in plan("model", checkpoint)}

    # Our own loader, and where the package is not installed, the auto classes with the code from the Hub.
    photos = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    for path, size in zip(photos, [(90, 60), (50, 80)], strict=True):
        Image.effect_noise(size, 80).convert("RGB").save(path)
    matched = macosnet(hub, tmp_path, "match", *photos, "--model", "me/small", "--output-dir", "out", HF_TOKEN="")
    assert matched.returncode == 0, matched.stderr
    assert json.loads((tmp_path / "out" / "matches.json").read_text())["model"] == "me/small"
    code = """
        import sys
        sys.modules["macosnet_hf"] = None
        from transformers import pipeline
        matcher = pipeline("keypoint-matching", model="me/small", trust_remote_code=True)
        print(type(matcher).__name__, type(matcher.model).__name__, isinstance(matcher(sys.argv[1:]), list))
    """
    said = python(hub, tmp_path, code, *photos, PYTHONPATH="", HF_HOME=str(tmp_path / "other"))
    assert said.split() == ["MaCoSNetKeypointMatchingPipeline", "MaCoSNetForKeypointMatching", "True"]


def test_weights_in_several_files_come_down(hub, tmp_path):
    model = small_model(MaCoSNetForKeypointMatching)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    small_processor().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert macosnet(hub, tmp_path, "push", "model", tmp_path / "sharded", "me/sharded").returncode == 0
    code = """
        from macosnet_hf.io.checkpoints import load_model_and_processor
        model, _ = load_model_and_processor("me/sharded", "cpu")
        print(float(sum(weight.double().abs().sum() for weight in model.state_dict().values())))
    """
    total = sum(weight.double().abs().sum() for weight in model.state_dict().values())
    assert float(python(hub, tmp_path, code)) == pytest.approx(float(total), rel=1e-9)


def test_push_to_hub_of_model_and_processor(hub, checkpoint, tmp_path):
    code = """
        import sys
        from macosnet_hf import MaCoSNetForKeypointMatching, MaCoSNetImageProcessor
        for kind in (MaCoSNetForKeypointMatching, MaCoSNetImageProcessor):
            kind.from_pretrained(sys.argv[1]).push_to_hub("me/by-method")
        again = MaCoSNetForKeypointMatching.from_pretrained("me/by-method")
        print(type(again).__name__)
    """
    assert python(hub, tmp_path, code, checkpoint).split() == ["MaCoSNetForKeypointMatching"]
    files = hub.files["model", "me/by-method"]
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "modeling_macosnet.py"} <= set(files)
    assert {"pipeline_macosnet.py", "image_processing_macosnet.py", "README.md"} <= set(files)
    assert "custom_pipelines" in json.loads(files["config.json"])


def test_data_set_goes_up_and_comes_down(hub, prepared, tmp_path):
    done = macosnet(hub, tmp_path, "push", "dataset", prepared, "me/images")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/datasets/me/images"
    code = """
        from datasets import load_dataset
        for streaming in (False, True):
            rows = list(load_dataset("me/images", split="train", streaming=streaming))
            print(len(rows), sorted({row["class_name"] for row in rows}))
    """
    assert python(hub, tmp_path, code).splitlines() == ["4 ['cat', 'dog']"] * 2


def test_the_results_of_a_bulk_run_go_up_once_all_are_there(hub, checkpoint, prepared, tmp_path):
    """Masks of a data set that comes from the Hub as a stream go back to it."""
    assert macosnet(hub, tmp_path, "push", "dataset", prepared, "me/images").returncode == 0
    words = ["segment", "--dataset", "me/images", "--image_column", "source_image", "--group_column", "class_name"]
    words += ["--model", checkpoint, "--refine", "none", "--output_dir", "masks"]
    done = macosnet(hub, tmp_path, *words, "--push_to_hub", "me/masks", HF_TOKEN="")
    assert (done.returncode, (tmp_path / "masks").exists()) == (2, False)
    assert "Nobody is logged in to the Hub" in done.stderr
    done = macosnet(hub, tmp_path, *words, "--push_to_hub", "me/masks")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/datasets/me/masks"
    code = """
        from datasets import load_dataset
        rows = list(load_dataset("me/masks", split="train", streaming=True))
        print(len(rows), {row["error"] for row in rows}, {row["mask"].mode for row in rows})
        print(len(load_dataset("me/masks", "index", split="train")))
    """
    assert python(hub, tmp_path, code).splitlines() == ["4 {None} {'L'}", "4"]


def test_ten_steps_of_training_from_a_stream(hub, checkpoint, prepared, tmp_path):
    """From archive to `macosnet prepare --push-to-hub`, to a training on the stream with two workers."""
    for package in ("accelerate", "yaml"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra `train`)")
    photos = prepared.parent / "photos"
    done = macosnet(hub, tmp_path, "prepare", "coseg", photos, tmp_path / "again", "--push-to-hub", "me/streamed")
    assert done.returncode == 0, done.stderr
    command = [
        sys.executable,
        ROOT / "training" / "pretrain_synthetic.py",
        "--dataset_name",
        "me/streamed",
        "--streaming",
    ]
    command += ["--model_name_or_path", checkpoint, "--output_dir", tmp_path / "out", "--max_train_steps", 10]
    command += ["--per_device_train_batch_size", 2, "--photo_size", 96, "--dataloader_num_workers", 2]
    command += ["--logging_steps", 1]
    variables = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), env=environment(hub, tmp_path, **variables), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 10
    MaCoSNetForKeypointMatching.from_pretrained(tmp_path / "out")


def test_a_training_script_pushes_its_model_and_no_checkpoint(hub, checkpoint, tmp_path):
    for package in ("accelerate", "yaml"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra `train`)")
    (tmp_path / "photos").mkdir()
    for number in range(2):
        Image.effect_noise((120, 100), 60 + number).convert("RGB").save(tmp_path / "photos" / f"{number}.png")
    command = [sys.executable, ROOT / "training" / "pretrain_synthetic.py", "--dataset_name", tmp_path / "photos"]
    command += ["--model_name_or_path", checkpoint, "--output_dir", tmp_path / "out", "--max_train_steps", 2]
    command += ["--per_device_train_batch_size", 2, "--photo_size", 96, "--checkpointing_steps", 1]
    command += ["--push_to_hub", "--hub_model_id", "me/trained"]
    variables = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)],
        env=environment(hub, tmp_path, **variables),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    assert TOKEN not in done.stdout + done.stderr + (tmp_path / "out" / "log.jsonl").read_text()
    files = hub.files["model", "me/trained"]
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert {"config.json", "preprocessor_config.json", "pipeline_macosnet.py"} <= set(files)
    assert not [name for name in files if name.startswith("checkpoint-") or name == "log.jsonl"]


def test_prepare_pushes_too(hub, tmp_path, prepared):
    photos = prepared.parent / "photos"
    done = macosnet(hub, tmp_path, "prepare", "coseg", photos, tmp_path / "again", "--push-to-hub", "me/again")
    assert done.returncode == 0, done.stderr
    assert any(name.endswith(".parquet") for name in hub.files["dataset", "me/again"])
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("way", ["push", "prepare"])
def test_no_way_uploads_a_token(way, hub, prepared, tmp_path):
    """A class folder's name stands in the card of a prepared data set, and so would a token in it."""
    token = "hf" + "_" + "a1B2" * 9
    Image.new("RGB", (40, 30), "red").save(prepared.parent / "one.png")
    for name in ("cat", token):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            shutil.copy(prepared.parent / "one.png", tmp_path / "photos" / name / f"{number}.png")
    arguments = ["prepare", "coseg", tmp_path / "photos", tmp_path / "leaky"]
    if way == "prepare":
        done = macosnet(hub, tmp_path, *arguments, "--push-to-hub", "me/leaky")
    else:
        assert macosnet(hub, tmp_path, *arguments).returncode == 0
        (tmp_path / "leaky" / "notes.txt").write_text(token)
        done = macosnet(hub, tmp_path, "push", "dataset", tmp_path / "leaky", "me/leaky")
    assert done.returncode == 2, done.stdout
    assert "looks like a token" in done.stderr
    assert not hub.files


def test_a_repository_is_created_before_there_is_anything_to_upload(hub, tmp_path):
    code = """
        from macosnet_hf.io.hub import create_repository
        print(create_repository("model", "fresh"), create_repository("model", "tester/fresh", private=True))
    """
    assert python(hub, tmp_path, code).split() == ["tester/fresh", "tester/fresh"]
    assert hub.files == {("model", "tester/fresh"): {}}
    assert not hub.commits


def test_space_goes_up_and_starts_from_what_is_there(hub, tmp_path):
    done = macosnet(hub, tmp_path, "push", "space", ROOT, "me/demo")
    assert done.returncode == 0, done.stderr
    assert hub.settings["space", "me/demo"]["sdk"] == "gradio"
    files = hub.files["space", "me/demo"]
    assert files["app.py"] == (ROOT / "app.py").read_bytes()
    weights = "macosnet_hf/pretrained/macosnet-lite/model.safetensors"
    assert files[weights] == (ROOT / weights).read_bytes()

    space = tmp_path / "space"
    for name, content in files.items():
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        (space / name).write_bytes(content)
    pytest.importorskip("gradio", reason="the Space needs gradio")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "app.py", "--port", str(port)],
        cwd=space,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(tmp_path / "served")},
    )
    try:
        assert process.stdout.readline().startswith("Open http"), process.communicate()[0]
        page = httpx.get(f"http://127.0.0.1:{port}/config")
        assert "Model card of the embedded checkpoint" in page.text
    finally:
        process.kill()
        process.communicate()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_nobody_is_logged_in(hub, checkpoint, tmp_path):
    done = macosnet(hub, tmp_path, "push", "model", checkpoint, "me/small", HF_TOKEN="")
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
    assert hub.requests == []


def test_a_wrong_token_is_not_printed(hub, checkpoint, tmp_path):
    wrong = "hf_" + "Wrong" * 3
    done = macosnet(hub, tmp_path, "push", "model", checkpoint, "me/small", HF_TOKEN=wrong)
    assert done.returncode == 2
    assert done.stderr.startswith("macosnet: The model cannot be pushed to me/small")
    assert done.stderr.count("\n") == 1
    assert wrong not in done.stdout + done.stderr
    assert not hub.files


@pytest.mark.parametrize(("refuse", "arguments"), [("/commit/", []), ("objects/batch", []), ("repos/create", [])])
def test_a_hub_that_refuses_is_one_sentence(refuse, arguments, hub, checkpoint, tmp_path):
    hub.refuse = refuse
    done = macosnet(hub, tmp_path, "push", "model", checkpoint, "me/small", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("macosnet: The model cannot be pushed to me/small")
    assert done.stderr.count("\n") == 1
    assert not hub.commits


def test_a_hub_that_is_not_there_is_one_sentence(prepared, checkpoint, tmp_path):
    with HubServer() as gone:
        pass
    for arguments in (("push", "model", checkpoint, "me/small"), ("push", "dataset", prepared, "me/images")):
        done = macosnet(gone, tmp_path, *arguments)
        assert done.returncode == 2
        assert f"cannot be pushed to {arguments[-1]}: " in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize("name", ["me/small/again", "bad name!!", "", "me/"])
def test_a_bad_name_is_one_sentence(options, name, hub, checkpoint, tmp_path):
    done = macosnet(hub, tmp_path, "push", "model", checkpoint, name, *options)
    assert done.returncode == 2
    assert done.stderr.startswith(f"macosnet: {name!r} cannot be the name of a repository")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert hub.requests == []


# ---- loading by id ---------------------------------------------------------------------------------------------------


def test_a_file_that_a_repository_lacks_is_named(hub, checkpoint, tmp_path):
    assert macosnet(hub, tmp_path, "push", "model", checkpoint, "me/small").returncode == 0
    Image.new("RGB", (50, 50), "red").save(tmp_path / "a.png")
    arguments = ("match", "a.png", "a.png", "--output-dir", "out", "--model")
    del hub.files["model", "me/small"]["model.safetensors"]
    done = macosnet(hub, tmp_path, *arguments, "me/small")
    assert done.returncode == 2
    assert "has no model.safetensors" in done.stderr
    done = macosnet(hub, tmp_path, *arguments, "me/never-made")
    assert done.returncode == 2
    assert "no repository" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_network_the_answer_comes_at_once(tmp_path):
    """A mistyped folder name looks like a Hub id; nobody listens at the Hub's address."""
    Image.new("RGB", (50, 50), "red").save(tmp_path / "a.png")
    with HubServer() as gone:
        pass
    seconds = []
    for more in ({"HF_HUB_OFFLINE": "1"}, {}):  # the first cannot wait for anything: what a busy machine takes
        start = time.monotonic()
        done = macosnet(gone, tmp_path, "match", "a.png", "a.png", "--output-dir", "out", "--model", "my-modle", **more)
        seconds.append(time.monotonic() - start)
        assert done.returncode == 2
    assert "'my-modle' is no folder here" in done.stderr
    assert "config.json" in done.stderr
    assert "hf download my-modle" in done.stderr
    assert done.stderr.count("\n") == 1
    assert seconds[1] < 2 * seconds[0] + 15
    assert not (tmp_path / "out").exists()


def test_what_is_in_the_cache_loads_without_a_network(hub, checkpoint, tmp_path):
    assert macosnet(hub, tmp_path, "push", "model", checkpoint, "me/small").returncode == 0
    Image.effect_noise((60, 60), 80).convert("RGB").save(tmp_path / "a.png")
    arguments = ("match", "a.png", "a.png", "--output-dir", "out", "--model", "me/small")
    assert macosnet(hub, tmp_path, *arguments).returncode == 0
    with HubServer() as gone:
        pass
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = macosnet(gone, tmp_path, *arguments, **more)
        assert done.returncode == 0, done.stderr
