"""What a visitor of the demo does in a browser, for the tests of several files."""

import json
import shutil
import time
import zipfile
from urllib.parse import parse_qsl, urlsplit

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
USUAL = {"viewport": {"width": 1280, "height": 900}}
PRESS_THE_BUTTON = "Press the button above to find what these photos have in common."


def open_page(browser, address, query="", **options):
    """A page in the usual context, whose cache has gradio's scripts already; with options, in a context of its own."""
    context = browser.new_context(**{**USUAL, **options}) if options else browser.usual
    page = context.new_page()
    page.set_default_timeout(120_000)  # the machine may be busy
    page.asked, page.complaints = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(address + query)
    page.locator("#viewer svg").wait_for(timeout=240_000)
    return page


def close_page(page, address):
    """No other host was asked, and no script failed."""
    page.close()
    if page.context is not page.context.browser.usual:
        page.context.close()
    assert any(url.startswith(address) for url in page.asked)
    assert not [url for url in page.asked if not url.startswith((address, "data:", "blob:"))]
    assert not page.complaints


def choose(page, place, path):
    page.locator(f"#{place} input[type=file]").set_input_files(str(path))
    page.locator(f"#{place} img[src*='{path.name}']").wait_for()


def clear(page, place):
    """Takes a photo away: on the stage where there is a result, else in its place."""
    change = page.get_by_role("button", name={"source": "Change photo A", "target": "Change photo B"}[place])
    change.or_(page.locator(f"#{place} button[aria-label='Remove Image']:visible")).click()
    page.locator(f"#{place} img").first.wait_for(state="detached")


def show(page, mode):
    """Chooses a mode of the stage."""
    button = page.locator(".viewer-modes").get_by_role("button", name=mode, exact=True)
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert page.locator(".viewer-modes [aria-pressed='true']").count() == 1


def open_options(page):
    page.get_by_role("button", name="Options").click()
    page.locator("#threshold").wait_for()


def wait_until(page, condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        page.wait_for_timeout(20)


def letter(folder, name="letter & <i>.jpg"):
    """Text under the name of a photo."""
    (folder / name).write_text("This is a letter, not an image. " * 20)
    return folder / name


def nothing_stands_there(page, words="Press Match when both photos are there."):
    """No result, and what to do."""
    tab = "collection" if "above" in words else "pair"
    verdict = page.locator("#collection-verdict" if tab == "collection" else "#verdict")
    wait_until(page, lambda: words in verdict.inner_text().splitlines())
    page.locator(f"#{tab}-results").wait_for(state="hidden")


def download(page, name, tmp_path):
    """The zip that one click gives: names of its files, and the document in the first."""
    with page.expect_download(timeout=240_000) as started:
        page.locator(f"#{name}-download").click()
    started.value.save_as(tmp_path / started.value.suggested_filename)
    with zipfile.ZipFile(tmp_path / started.value.suggested_filename) as archive:
        return archive.namelist(), json.loads(archive.read(archive.namelist()[0]))


def open_collection(page):
    page.get_by_role("tab", name="Collection").click()
    page.locator("#agreement .agreement").wait_for(timeout=240_000)


def query(page):
    """What the address of the page holds."""
    return dict(parse_qsl(urlsplit(page.url).query))


def click_on_photo(page, side, x, y, **options):
    """Clicks on a photo of the stage at shares of it."""
    box = page.locator("#viewer image.photo").nth(side).bounding_box()
    page.mouse.move(5, 5)
    keys = options.pop("keys", ())
    for key in keys:
        page.keyboard.down(key)
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
    for key in keys:
        page.keyboard.up(key)
