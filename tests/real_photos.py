"""Images that come with gradio, for the tests: two cats of prey and a tower, none of them of the same shape."""

from pathlib import Path

import pytest

gradio = pytest.importorskip("gradio", reason="the images of these tests come with gradio")

PHOTOS = Path(gradio.__file__).parent / "media_assets" / "images"
CHEETAH, LION, TOWER = (str(PHOTOS / name) for name in ("cheetah1.jpg", "lion.jpg", "tower.jpg"))
