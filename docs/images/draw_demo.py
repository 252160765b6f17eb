"""Draws demo.jpg and demo-collection.jpg, the page in a browser: `python docs/images/draw_demo.py [FOLDER]`.

It starts the app and needs Chromium and the extra `browser`.
"""

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import app  # noqa: E402  # a file of the checkout

WIDTH = 1280
# Name, address, height and what must be there.
PAGES = (
    ("demo", "", 706, "#viewer svg"),
    ("demo-collection", "?tab=collection", 1150, "#agreement .agreement"),
)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    matcher = app.Matcher()
    matcher.load()
    demo = app.build_demo(matcher)
    address = app.serve(demo)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, query, height, shown in PAGES:
            page = browser.new_page(viewport={"width": WIDTH, "height": height})
            page.goto(address + query)
            page.locator(shown).wait_for(timeout=120_000)
            page.wait_for_timeout(1500)  # images are decoded
            page.screenshot(path=folder / f"{name}.png")
            with Image.open(folder / f"{name}.png") as image:
                image.convert("RGB").save(folder / f"{name}.jpg", quality=85, optimize=True)
            (folder / f"{name}.png").unlink()
        browser.close()
    demo.close(verbose=False)
    matcher.reader.close()


if __name__ == "__main__":
    main()
