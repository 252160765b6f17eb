"""A process that reads images of visitors and nothing else, under limits of memory and processor time.

`reading.py` starts it with the limits as its argument in JSON. Each line of standard input is a request; the answer is
a line of JSON, followed by the pixels of an image. It ends with its standard input, or when a file exceeds a limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ImageError
from ..io.decoding_cost import CostError
from ..io.image_files import load_image
from ..io.memory import give_memory_back
from ..io.working_copy import for_browser, open_working_copy

Answer = tuple[dict[str, Any], "Image.Image | None"]


def _working_copy(path: str, name: str | None, side: int, **limits: int) -> Answer:
    copy = open_working_copy(path, name, side, limits=limits)
    return {"size": copy.size}, copy.image


def _whole(path: str, **limits: int) -> Answer:
    return {}, load_image(path, **limits)


def _for_browser(path: str, folder: str, **limits: int) -> Answer:
    made = for_browser(path, Path(folder), limits)
    return {"file": made and str(made)}, None


_REQUESTS: dict[str, Callable[..., Answer]] = {
    "working_copy": _working_copy,
    "whole": _whole,
    "for_browser": _for_browser,
}


def _answer(request: dict[str, Any], limits: dict[str, int]) -> Answer:
    try:
        return _REQUESTS[request.pop("do")](**request, **limits)
    except CostError as error:
        return {"error": str(error), "large": True}, None
    except ImageError as error:
        return {"error": str(error)}, None


def _limit(memory: int, nice: int) -> None:
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):  # not everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    if nice:
        os.nice(nice)


def main() -> None:
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not be taken for an answer
    give_memory_back()
    _limit(settings["memory"], settings["nice"])
    timer: Any = getattr(signal, "setitimer", lambda *_: None)
    for line in sys.stdin.buffer:
        # The default action of its signal ends the process, also in the middle of a library.
        timer(getattr(signal, "ITIMER_PROF", None), settings["seconds"])
        answer, image = _answer(json.loads(line), settings["limits"])
        pixels = b"" if image is None else image.tobytes()
        timer(getattr(signal, "ITIMER_PROF", None), 0)
        if image is not None:
            answer["pixels"] = image.size
        answers.write(json.dumps(answer).encode() + b"\n" + pixels)
        answers.flush()


if __name__ == "__main__":
    main()
