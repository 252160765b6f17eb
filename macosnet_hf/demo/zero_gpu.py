"""A ZeroGPU Space lends a GPU to single functions, which the package `spaces` runs in processes of their own."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any


def is_zero_gpu() -> bool:
    """Whether this is such a Space, as `spaces` itself asks."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def on_gpu(task: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs `task` with a GPU in such a Space, and elsewhere `task` itself.

    `spaces` must be imported before torch. Arguments and result are pickled, so they must not hold callbacks, locks or
    processes.
    """
    return importlib.import_module("spaces").GPU(task) if is_zero_gpu() else task
