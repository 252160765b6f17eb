"""The web server of the page, and the look that gradio takes when it starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from . import limits
from .examples import EXAMPLES_FOLDER
from .guard import LOOPBACK, guard
from .viewer import asset
from .visitor_files import sweeping


def serve(
    demo: gr.Blocks,
    host: str = "127.0.0.1",
    port: int | None = None,
    *,
    allowed_hosts: Sequence[str] | None = None,
    files: Path | None = None,
) -> str:
    """Starts the page in the background and returns its address.

    Args:
        demo, host, port: the page and where it listens.
        allowed_hosts: names under which it may be addressed, "*" for any; by default those of this machine where it
            listens to this machine alone, and else any.
        files: a base folder to sweep, see `visitor_files.py`.

    Raises:
        OSError: if the port is taken.
    """
    if allowed_hosts is None:
        allowed_hosts = LOOPBACK if host in LOOPBACK else ["*"]
    options: dict[str, Any] = guard(allowed_hosts)
    if files is not None:
        options["lifespan"] = sweeping(files)
    _, address, _ = demo.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        ssr_mode=False,
        max_file_size=limits.MAX_FILE_MEGABYTES * gr.FileSize.MB,
        state_session_capacity=limits.MAX_SESSIONS,
        theme=_theme(),
        css=asset("page.css") + asset("viewer.css"),
        js=f"() => {{ ({asset('paste.js').rstrip()})(); ({asset('address.js').rstrip()})(); }}",
        footer_links=["api"],
        allowed_paths=[str(EXAMPLES_FOLDER)],
        quiet=True,
        app_kwargs=options,
    )
    return address


def _theme() -> gr.themes.Base:
    """gradio's Soft theme where letters can be read everywhere; fonts that every computer has, so none is fetched."""
    fonts = ["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "monospace"]
    theme = gr.themes.Soft(primary_hue="orange", neutral_hue="stone", font=fonts, font_mono=mono)
    return theme.set(**json.loads(asset("theme.json")))
