"""The last result of a tab of the page, which a reload shows again while the server has it.

The browser's tab stores its key, which nobody can guess; `assets/last_result.js` writes it.
"""

from __future__ import annotations

import json
import os
from typing import Any

import gradio as gr

from ..errors import InputError
from .result_store import ResultStore
from .sessions import Sessions
from .texts import GONE, marked
from .viewer import asset


class LastResult:
    """What remembers the last result of a tab. Made inside the tab.

    Args:
        sessions, results: of the server, and those of this tab.
        tab: its name in [`Sessions.place`].

    Attributes:
        given: the input of an event that opens the page; its script is `js`.
        noted: the output for [`note`].
    """

    def __init__(self, sessions: Sessions, results: ResultStore[Any], tab: str) -> None:
        self._sessions, self._results, self._tab = sessions, results, tab
        self._name = f"macosnet-{tab}"
        self.given = gr.Textbox(visible=False, label="last result")
        self.noted = gr.HTML(elem_classes="last-result", html_template="", js_on_load=asset("last_result.js"))
        read = f"try {{ key = sessionStorage.getItem('{self._name}') || ''; }} catch {{}}"
        self.js = f"(...values) => {{ let key = ''; {read} return [...values.slice(0, -1), key]; }}"

    def note(self, request: gr.Request, key: str) -> str:
        """The value of `noted` for the result of a key, or for none with an empty key."""
        self._sessions.place(request, self._tab).last_key = key
        return json.dumps({"name": self._name, "key": key})

    def find(self, key: str, request: gr.Request) -> tuple[Any, str] | None:
        """The result of a key, which becomes one of this page, and the name of its model.

        None if the result, one of its files or its model has gone.
        """
        try:
            result = self._results.adopt(key, request.session_hash)
        except InputError:
            return None
        names = {checkpoint: name for name, checkpoint in self._sessions.matcher.checkpoints.items()}
        there = all(os.path.isfile(copy.path) for copy in result.copies)
        return (result, names[result.checkpoint]) if there and result.checkpoint in names else None

    def gone(self, request: gr.Request) -> tuple[Any, ...]:
        """The values of key, verdict, column of results and `noted` where the last result has gone."""
        return None, marked("result gone", "gone", GONE), gr.Column(visible=False), self.note(request, "")
