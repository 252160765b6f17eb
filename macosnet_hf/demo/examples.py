"""The photos that the page offers as examples: files that are there without a download."""

from pathlib import Path

from gradio.media import MEDIA_ROOT

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or of the Space

# Photos that come with gradio itself, and a cat of examples/README.md.
EXAMPLES_FOLDER = MEDIA_ROOT / "images"
CHEETAH, LION, TOWER = (str(EXAMPLES_FOLDER / name) for name in ("cheetah1.jpg", "lion.jpg", "tower.jpg"))
CAT = str(ROOT / "examples" / "cat.jpg")
EXAMPLES = ((CHEETAH, CAT), (CHEETAH, LION), (LION, TOWER))
COLLECTION_EXAMPLE = (CHEETAH, LION, CAT, TOWER)
