"""The demo: two photographs in, their matches, masks and warp out. Everything it shows is computed by `macosnet_hf`.

Run it with `make demo`, or `python app.py --port 7860 --host 127.0.0.1 --model FOLDER_OR_HUB_ID`.
"""

import argparse
import importlib
import logging
import os
import sys
import threading
from typing import Any

import gradio as gr
import numpy as np
from gradio.media import MEDIA_ROOT
from PIL import Image

# Before torch is loaded: threads that spin while they wait slow each other down wherever cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import macosnet_hf
from macosnet_hf import DEFAULT_CHECKPOINT, MaCoSNetError
from macosnet_hf.drawing import overlay_mask
from macosnet_hf.loading import load_model_and_processor

logger = logging.getLogger("macosnet_hf.app")

MAX_FILE_MEGABYTES = 20
MAX_WAITING = 20
DISPLAY_SIDE = 1400  # pixels; a page has no use for more, and a phone's photograph takes seconds to encode
UPLOAD_HEIGHT = 280  # pixels on the page
RESULT_HEIGHT = 320  # the same, of the smaller results
RESULT_MIN_WIDTH = 260  # narrower than this, they stand below one another

TITLE = "Show, Match and Segment"
SUMMARY = "Give it two photographs of the same kind of object: it finds matching points, and the object in both."
LIMITS = (
    "Best with one clear object in each photograph, seen from a similar side; thin parts are easily missed. "
    f"Files up to {MAX_FILE_MEGABYTES} MB."
)
VERDICTS = {
    "good": "These two fit together well.",
    "fair": "These two fit together in part.",
    "poor": "These two hardly fit together; do not rely on the result.",
}
# Photographs that come with gradio itself, so the page has examples without a download.
EXAMPLES_FOLDER = MEDIA_ROOT / "images"
EXAMPLES = (("cheetah1.jpg", "lion.jpg"), ("lion.jpg", "cheetah.jpg"))

# Fonts that every computer has: nothing on the page is fetched from elsewhere.
THEME = gr.themes.Soft(
    primary_hue=gr.themes.colors.orange,
    neutral_hue=gr.themes.colors.stone,
    font=["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    body_background_fill="*neutral_100",
    block_label_background_fill="*block_background_fill",
    block_label_background_fill_dark="*block_background_fill",
    block_label_text_color="*body_text_color",
    block_label_text_color_dark="*body_text_color",
    block_label_text_weight="500",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
)
CSS = """
.gradio-container { width: 100%; max-width: 1120px !important; margin: 0 auto !important; }
#header { text-align: center; padding: 1rem 0 0.25rem; }
#header h1 { font-size: 2rem; font-weight: 650; line-height: 1.2; margin: 0 0 0.4rem; }
#header p { font-size: 1.05rem; margin: 0 auto; max-width: 60rem; color: var(--body-text-color-subdued); }
#verdict { text-align: center; font-size: 1.1rem; min-height: 1.75rem; }
#limits p { text-align: center; font-size: 0.875rem; color: var(--body-text-color-subdued); }
/* The examples as a row of pairs instead of a table with a line for each. */
#examples .table-wrap, #examples table { border: none; background: none; box-shadow: none; width: auto; padding: 0; }
#examples thead { display: none; }
#examples tbody { display: flex; flex-wrap: wrap; gap: 0.75rem; }
#examples tr { display: flex; gap: 0.25rem; padding: 0.35rem; border: none; border-radius: var(--radius-md); }
#examples tr { background: var(--block-background-fill); box-shadow: var(--block-shadow); }
#examples td { padding: 0; border: none; }
footer .divider { display: none; }
"""


class Matcher:
    """The one model of this process: loaded once, by whichever thread asks first, while the others wait for it."""

    def __init__(self, checkpoint: str = DEFAULT_CHECKPOINT) -> None:
        self.checkpoint = checkpoint
        self._lock = threading.Lock()
        self._loaded: dict[str, Any] = {}

    def load(self) -> dict[str, Any]:
        """Returns the arguments `model` and `processor` of `match_pair`. Raises `CheckpointError`."""
        with self._lock:
            if not self._loaded:
                model, processor = load_model_and_processor(self.checkpoint)
                # The import belongs under the lock as well: two threads that import torch and transformers from
                # different ends at the same time can meet a module that is only half there.
                importlib.import_module("macosnet_hf.pair")
                self._loaded = {"model": model, "processor": processor}
            return self._loaded

    def match(self, source: Image.Image, target: Image.Image) -> "macosnet_hf.PairResult":
        arguments = self.load()
        return macosnet_hf.match_pair(source, target, **arguments)


def open_photograph(path: str | None, role: str) -> Image.Image:
    """The upright picture in an uploaded file. Raises `gr.Error`, which the page shows as a message."""
    if path is None:
        raise gr.Error("Choose two photographs first.", print_exception=False)
    try:
        return macosnet_hf.load_image(path)
    except MaCoSNetError as error:
        # The person knows the file by its name, not by the folder that it was uploaded to.
        sentence = str(error).replace(path, os.path.basename(path))
        raise gr.Error(f"{role}: {sentence}", print_exception=False) from error


def for_display(image: Image.Image) -> Image.Image:
    """A copy of at most `DISPLAY_SIDE` pixels on its longer side."""
    copy = image.copy()
    copy.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE))
    return copy


def overlay(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture in display size with the object of its `(H, W)` mask in colour and outlined, the rest faded."""
    shown = for_display(image)
    shown_mask = Image.fromarray(mask).resize(shown.size, Image.Resampling.NEAREST)
    return overlay_mask(shown, np.asarray(shown_mask), fade=0.8)


def verdict(result: "macosnet_hf.PairResult") -> str:
    """One line of Markdown: how far the result can be trusted, and how many matches there are."""
    count = len(result.matches)
    return f"**{VERDICTS[result.quality]}** {count} matching {'point' if count == 1 else 'points'} on the object."


def upload(name: str) -> gr.Image:
    """A place for a photograph of the visitor, which hands over the uploaded file as it is.

    `load_image` turns it upright and says in plain words what is wrong with it; gradio's own reading would do neither.
    """
    image = gr.Image(
        elem_id=name.lower(),
        label=name,
        sources=["upload", "clipboard"],
        type="filepath",
        image_mode=None,
        height=UPLOAD_HEIGHT,
    )
    # On the instance, because gradio writes a file of type stubs beside every module that derives from a component.
    image.preprocess = lambda payload: payload.path if payload else None
    return image


def picture(label: str, height: int | None = None) -> gr.Image:
    """A place for a result; without a height it takes that of the picture."""
    return gr.Image(
        label=label,
        type="pil",
        interactive=False,
        buttons=["download", "fullscreen"],
        height=height,
        min_width=RESULT_MIN_WIDTH,
    )


def build_demo(matcher: Matcher | None = None) -> gr.Blocks:
    """The page. Without a `matcher`, one with the embedded checkpoint is made, which loads at the first request."""
    matcher = matcher or Matcher()

    def match(source_path: str | None, target_path: str | None) -> tuple[Any, ...]:
        source = open_photograph(source_path, "Source")
        target = open_photograph(target_path, "Target")
        try:
            result = matcher.match(source, target)
            return (
                verdict(result),
                for_display(result.draw_matches()),
                overlay(result.source, result.source_mask),
                overlay(result.target, result.target_mask),
                (for_display(result.target), for_display(result.warped_source())),
            )
        except MaCoSNetError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            logger.exception("Matching failed")
            raise gr.Error(
                "Something went wrong on our side. Please try other photographs.", print_exception=False
            ) from error

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(f"<h1>{TITLE}</h1><p>{SUMMARY}</p>", elem_id="header")
        with gr.Row(equal_height=True):
            source, target = upload("Source"), upload("Target")
        button = gr.Button("Match", variant="primary", size="lg")
        examples = gr.Dataset(
            elem_id="examples",
            label="Examples",
            components=[source, target],
            samples=[[str(EXAMPLES_FOLDER / name) for name in pair] for pair in EXAMPLES],
        )
        line = gr.Markdown(elem_id="verdict")
        with gr.Column(visible=False) as results:
            matches = picture("Matching points")
            with gr.Row(equal_height=True):
                source_object = picture("Source object", RESULT_HEIGHT)
                target_object = picture("Target object", RESULT_HEIGHT)
                warped = gr.ImageSlider(
                    label="Target | warped source",
                    type="pil",
                    interactive=False,
                    buttons=["fullscreen"],
                    height=RESULT_HEIGHT,
                    max_height=RESULT_HEIGHT,
                    min_width=RESULT_MIN_WIDTH,
                )
        gr.Markdown(LIMITS, elem_id="limits")
        # Not gr.Examples: it replaces the uploads by ones that read the photographs in gradio's own way.
        examples.click(
            lambda pair: pair,
            inputs=examples,
            outputs=[source, target],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        matching = button.click(
            match,
            inputs=[source, target],
            outputs=[line, matches, source_object, target_object, warped],
            api_name="match",
            concurrency_limit=1,
            show_progress_on=line,
        )
        matching.success(lambda: gr.Column(visible=True), outputs=results, queue=False, api_visibility="private")
        matching.failure(
            lambda: ("", gr.Column(visible=False)), outputs=[line, results], queue=False, api_visibility="private"
        )
    return demo.queue(max_size=MAX_WAITING)


def serve(demo: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Starts the page in the background and returns its address. Raises `OSError` if the port is taken."""
    _, address, _ = demo.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        ssr_mode=False,
        max_file_size=MAX_FILE_MEGABYTES * gr.FileSize.MB,
        theme=THEME,
        css=CSS,
        footer_links=["api"],
        allowed_paths=[str(EXAMPLES_FOLDER)],
        quiet=True,
    )
    return address


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address")
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")), help="port")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="folder or Hub id of a checkpoint")
    options = parser.parse_args(arguments)

    matcher = Matcher(options.model)
    demo = build_demo(matcher)
    try:
        address = serve(demo, options.host, options.port)
    except OSError:
        print(f"error: cannot listen on {options.host}:{options.port}; choose another --port.", file=sys.stderr)
        return 2
    print(f"Open {address} in a browser. Stop with Ctrl+C.", flush=True)
    try:
        matcher.load()  # while the person looks at the page, so that the first match does not wait for it
        demo.block_thread()
    except MaCoSNetError as error:
        demo.close(verbose=False)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # gradio handles it while blocking; this is Ctrl+C while the model loads
        demo.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
