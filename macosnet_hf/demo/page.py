"""The page: header, tabs and footer."""

from __future__ import annotations

import html

import gradio as gr

from . import limits
from .api import public_api
from .collection_tab import CollectionTab
from .examples import ROOT
from .matcher import Matcher
from .pair_tab import PairTab
from .sessions import Sessions
from .texts import LIMITS, PAPER, SUMMARY, TITLE, missing_models


def build_demo(matcher: Matcher | None = None) -> gr.Blocks:
    """The page. Without a `matcher`, one with the embedded checkpoint is made, which loads at the first request."""
    matcher = matcher or Matcher()
    sessions = Sessions(matcher)
    files = (limits.FILE_SECONDS, limits.FILE_SECONDS)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=files) as demo:
        gr.HTML(f"<h1>{TITLE}</h1><p>{SUMMARY}</p>", elem_id="header")
        if matcher.missing:
            gr.HTML(html.escape(missing_models(list(matcher.missing))), elem_id="missing")
        with gr.Tabs():
            with gr.Tab("Pair", id="pair", elem_id="tab-pair"):
                PairTab(sessions, demo)
            with gr.Tab("Collection", id="collection", elem_id="tab-collection") as tab:
                CollectionTab(sessions, tab)
            with gr.Tab("About", id="about", elem_id="tab-about"):
                _about(matcher)
        gr.Markdown(
            f"{LIMITS} [Paper]({PAPER}); the model card is under *About*.", elem_classes="small", elem_id="limits"
        )
        public_api(sessions)
        demo.unload(sessions.leave)
    return demo.queue(max_size=limits.MAX_WAITING)


def _about(matcher: Matcher) -> None:
    models = ", ".join(f"`{name}`" for name in matcher.checkpoints)
    gr.Markdown(
        "One network finds which place of one photo corresponds to which place of another, and which pixels "
        "belong to the object that both show. It was trained without a single keypoint and without a single mask.\n\n"
        f"**Limits.** {LIMITS}\n\n"
        f"**Paper.** Chen, Lin, Yang and Huang, [Show, Match and Segment]({PAPER}).\n\n"
        f"**Models.** {models}; *Options* of a tab choose. Lite and base come with the project.\n\n"
        "**From a program.** `/match`, `/transfer_points` and `/segment_collection`: see *Use via API* at the bottom."
    )
    card = (ROOT / "model_card.md").read_text(encoding="utf-8").split("\n---\n", 1)[-1]  # without its front matter
    with gr.Accordion("Model card of the embedded checkpoint", open=False):
        gr.Markdown(card.strip())
