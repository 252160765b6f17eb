"""Inputs that fuzzers found or attackers made, one folder for each target of tests/reliability/guided.py."""

import importlib.util
import resource
import time
from pathlib import Path

import guided
import pytest

INPUTS = sorted(path for path in guided.CORPUS.glob("*/*") if path.is_file())


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    made = {}

    def target(name: str):
        if name == "yaml":
            pytest.importorskip("macosnet_hf.training.settings", reason="PyYAML is not installed (extra `train`)")
        if name not in made:
            made[name] = guided.make_target(name, tmp_path_factory.mktemp(name))
            made[name](guided.sound_inputs(name)[0])  # what is imported with the first one is not an input's cost
        return made[name]

    return target


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_that_was_found_is_refused_within_a_second(targets, path):
    read, data = targets(path.parent.name), path.read_bytes()
    before, began = _most_memory(), time.process_time()
    assert read(data) is None  # a typed error; any other comes out
    assert time.process_time() - began < 1
    assert _most_memory() - before < 300


def test_every_target_has_inputs_and_reads_sound_ones(targets):
    assert {path.parent.name for path in INPUTS} == set(guided.TARGETS)
    for name in guided.TARGETS:
        if name == "mat" and importlib.util.find_spec("scipy") is None:
            continue
        assert any(targets(name)(data) is not None for data in guided.sound_inputs(name)), name


def test_a_fault_comes_out_of_a_target(tmp_path, monkeypatch):
    from macosnet_hf.datasets.benchmarks import mat

    monkeypatch.setattr(mat, "read_matrix", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guided.make_target("mat", tmp_path)(b"x")


def test_its_help_runs_without_atheris(capsys, monkeypatch):
    monkeypatch.setitem(guided.sys.modules, "atheris", None)
    with pytest.raises(SystemExit) as caught:
        guided.main(["--help"])
    assert caught.value.code == 0
    assert "--seconds" in capsys.readouterr().out


def test_a_single_input_again(capsys):
    assert guided.main(["csv", "--file", str(Path(guided.CORPUS, "csv", "nul.csv"))]) == 0
    assert capsys.readouterr().out == "None\n"


def _most_memory() -> float:
    """Megabytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_what_others_have_loaded_guides_the_search_too():
    """`transformers` loads yaml and PIL before atheris can."""
    import yaml
    from PIL import Image

    found = guided._functions_loaded(("yaml", "PIL"))
    assert {yaml.scanner.Scanner.fetch_more_tokens, yaml.safe_load, Image.open, Image.Image.convert} <= set(found)
    assert {function.__module__.partition(".")[0] for function in found} == {"yaml", "PIL"}
    assert not guided._functions_loaded(("yam",))
