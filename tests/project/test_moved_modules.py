"""Names of version 0.1 that the documents showed still import."""

import importlib
import subprocess
import sys

import pytest

from macosnet_hf.io.moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_gives_the_new_module(old):
    sys.modules.pop(f"macosnet_hf.{old}", None)
    new = importlib.import_module(f"macosnet_hf.{MOVED[old]}")
    with pytest.warns(DeprecationWarning, match=f"macosnet_hf.{MOVED[old]}"):
        assert importlib.import_module(f"macosnet_hf.{old}") is new
    assert new.__name__ == new.__spec__.name == f"macosnet_hf.{MOVED[old]}"


def test_a_name_that_never_was_is_an_error_as_always():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("macosnet_hf.nowhere")


def test_the_old_command_module_runs():
    run = [sys.executable, "-c", "from macosnet_hf.cli import main; main(['--version'])"]
    assert "macosnet 0." in subprocess.run(run, capture_output=True, text=True, check=True).stdout
