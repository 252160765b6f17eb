"""The models that a server offers."""

import dataclasses
import pickle
import shutil
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

gr = pytest.importorskip("gradio", reason="the demo needs gradio")
from demo_server import CHEETAH, LION, ROOT, free_port, start_app  # noqa: E402
from small_models import save_small_checkpoint  # noqa: E402

import app  # noqa: E402
import macosnet_hf  # noqa: E402
from macosnet_hf.demo import matcher as module  # noqa: E402
from macosnet_hf.demo.code import collection_code, pair_code  # noqa: E402
from macosnet_hf.demo.components import refinement_choice  # noqa: E402
from macosnet_hf.demo.settings import Settings  # noqa: E402
from macosnet_hf.demo.zero_gpu import on_gpu  # noqa: E402
from macosnet_hf.hints import Hint  # noqa: E402
from macosnet_hf.io.package import DEFAULT_CHECKPOINT, EMBEDDED  # noqa: E402


@pytest.fixture
def loads(monkeypatch):
    """Checkpoints that are loaded, in the order in which that begins; none is really loaded."""
    begun, at_once = [], []

    def load(checkpoint):
        begun.append(checkpoint)
        at_once.append(checkpoint)
        threading.Event().wait(0.05)
        if at_once != [checkpoint]:
            begun.append("two at once")
        at_once.remove(checkpoint)
        return f"model of {checkpoint}", "processor"

    monkeypatch.setattr(module, "load_model_and_processor", load)
    return begun


def test_names_of_models_are_short_and_tell_them_apart(tmp_path):
    own = tmp_path / "base"
    own.mkdir()
    assert app.Matcher().checkpoints == {"lite": EMBEDDED["lite"], "base": EMBEDDED["base"]}
    assert list(app.Matcher("base").checkpoints) == ["base", "lite"]
    assert list(app.Matcher(EMBEDDED["base"], ["me/my-model", "base"]).checkpoints) == ["base", "me/my-model"]
    both = app.Matcher("base", [str(own)]).checkpoints
    assert both == {"base": EMBEDDED["base"], "base (2)": str(own)}
    assert list(app.Matcher("lite", []).checkpoints) == ["lite"]


def test_visitors_do_not_see_where_the_folder_of_a_model_is(tmp_path):
    folders = [save_small_checkpoint(tmp_path / name / "model") for name in ("private", "other")]
    matcher = app.Matcher(str(folders[0]), [str(folders[1])])
    assert list(matcher.checkpoints) == ["model", "model (2)"]
    pair = matcher.pair(CHEETAH, LION, "none")
    assert pair.checkpoint == "model"
    assert "checkpoint='model'" in pair_code(pair, 0.0, 40)
    shutil.rmtree(folders[1])
    with pytest.raises(macosnet_hf.CheckpointError) as error:
        matcher.pair(CHEETAH, LION, "none", model="model (2)")
    assert str(error.value) == "There is no checkpoint folder 'model (2)'."
    assert (
        app.Matcher(str(save_small_checkpoint(tmp_path / "lite")), []).pair(CHEETAH, LION, "none").checkpoint
        == "./lite"
    )


def test_each_model_is_loaded_when_it_is_asked_for_and_one_at_a_time(loads):
    matcher = app.Matcher("lite", ["base", "me/my-model"])
    assert not loads
    names = ["base", None, "me/my-model", "base", "lite"] * 2
    threads = [threading.Thread(target=matcher.load, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(loads) == sorted([EMBEDDED["lite"], EMBEDDED["base"], "me/my-model"])
    assert matcher.load("base")["model"] == f"model of {EMBEDDED['base']}"


def test_who_asks_for_a_loaded_model_does_not_wait_for_another(loads, monkeypatch):
    matcher = app.Matcher()
    matcher.load()
    going_on, may_end = threading.Event(), threading.Event()

    def slow(checkpoint):
        going_on.set()
        assert may_end.wait(30)
        return "model", "processor"

    monkeypatch.setattr(module, "load_model_and_processor", slow)
    thread = threading.Thread(target=matcher.load, args=("base",))
    thread.start()
    assert going_on.wait(30)
    assert matcher.load("lite")["model"] == f"model of {EMBEDDED['lite']}"
    may_end.set()
    thread.join()


def test_a_model_that_is_not_offered_is_refused():
    with pytest.raises(macosnet_hf.InputError, match=r"^There is no model 'huge' here; choose lite or base\.$"):
        app.Matcher().pair(CHEETAH, LION, "none", model="huge")


def test_a_result_carries_its_model():
    matcher = app.Matcher()
    pair = matcher.pair(CHEETAH, LION, "none", model="base")
    assert pair.checkpoint == EMBEDDED["base"]
    assert pair.refined("otsu").checkpoint == EMBEDDED["base"]
    assert "checkpoint='base'" in pair_code(pair, 0.0, 40)
    assert len(pair.result.matches) == len(
        macosnet_hf.match_pair(CHEETAH, LION, checkpoint="base", refine="none").matches
    )
    collection = matcher.collection([CHEETAH, LION], "none", None, "base")
    assert "load_model_and_processor('base')" in collection_code(collection)
    assert "files = ['cheetah1.jpg', 'lion.jpg']\n" in collection_code(collection)
    twice = dataclasses.replace(collection, copies=[collection.copies[0]] * 2)
    assert "files = ['cheetah1.jpg', 'cheetah1.jpg']  # some have the same name" in collection_code(twice)
    assert "load_model_and_processor()" in collection_code(matcher.collection([CHEETAH, LION], "none", None))


@pytest.fixture
def zero_gpu(monkeypatch):
    """A ZeroGPU Space: what the package `spaces` does to arguments and results, without its processes."""
    asked = []

    def gpu(task):
        def elsewhere(*arguments):
            asked.append(task.__name__)
            return pickle.loads(pickle.dumps(task(*pickle.loads(pickle.dumps(arguments)))))

        return elsewhere

    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=gpu))
    return asked


def test_in_a_zero_gpu_space_the_network_runs_elsewhere(zero_gpu, tmp_path):
    matcher, plain = app.Matcher(), macosnet_hf.match_pair(CHEETAH, LION)
    pair = matcher.pair(CHEETAH, LION, "grabcut")
    np.testing.assert_array_equal(pair.keypoints, plain.keypoints)
    assert pair.copies[0].read == matcher.reader.whole
    assert pair.warped_source().size == plain.target.size
    hinted = matcher.hinted(pair, {"target": Hint(include=[(100, 100)])})
    expected = macosnet_hf.match_pair(CHEETAH, LION, hints={"target": Hint(include=[(100, 100)])})
    np.testing.assert_array_equal(hinted.result.source_mask, expected.source_mask)
    assert hinted.copies == pair.copies
    said = []
    collection = matcher.collection([CHEETAH, LION], "none", lambda share, text: said.append(text))
    assert said[-1] == "Segmented"
    assert collection.copies[1].read == matcher.reader.whole
    assert zero_gpu == ["_match_copies", "_with_hints", "_segment_copies"]
    matcher.reader.close()


def test_elsewhere_spaces_is_not_needed(monkeypatch):
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    monkeypatch.setitem(sys.modules, "spaces", None)  # an import of it fails
    assert on_gpu(len) is len


def test_spaces_is_imported_before_torch():
    program = "import sys, app; app.Matcher(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_an_unusable_model_that_is_offered_ends_with_a_sentence(tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(DEFAULT_CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    process = start_app("--port", str(free_port()), MACOSNET_OFFER=f"base {folder}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.splitlines()[-1] == f"error: The checkpoint folder {folder} has no model.safetensors."
    assert "Traceback" not in output


def test_one_model_alone_is_no_choice():
    def choices(*offered):
        demo = app.build_demo(app.Matcher("lite", offered))
        return [
            block for block in demo.blocks.values() if getattr(block, "elem_id", "") in ("model", "collection-model")
        ]

    assert [(place.visible, place.info) for place in choices()] == [(False, None)] * 2
    shown = choices("base", "me/my-model")
    assert [[name for name, _ in place.choices] for place in shown] == [["lite", "base", "me/my-model"]] * 2
    assert all(place.visible and place.info for place in shown)


def test_settings_of_an_address_are_taken_where_they_are_some(monkeypatch):
    warned = []
    monkeypatch.setattr("gradio.Warning", warned.append)
    places = {
        "lines": gr.Slider(5, 200, 40, step=5),
        "threshold": gr.Slider(0, 1, 0.0, step=0.01),
        "edges": refinement_choice(),
    }

    def read(**query):
        return tuple(Settings(places).read(types.SimpleNamespace(query_params=query)).values())

    assert read() == (40, 0.0, "grabcut")
    assert read(lines="60", threshold="0.35", edges="otsu", other="1") == (60, 0.35, "otsu")
    assert read(lines="61.9") == (60, 0.0, "grabcut")
    assert not warned
    for query in (
        {"lines": "4"},
        {"lines": "inf"},
        {"threshold": "nan"},
        {"threshold": ""},
        {"edges": "<b>" + 99 * "x"},
    ):
        assert read(**query) == (40, 0.0, "grabcut")
        assert "which there is not" in warned[-1]
        assert len(warned[-1]) < 160
    assert len(warned) == 5
    assert "<" not in warned[-1]
