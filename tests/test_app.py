"""The demo, really served: through its API with gradio's client, and in a browser where there is one."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

gr = pytest.importorskip("gradio", reason="the demo needs gradio")
from gradio.media import get_image  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

import app  # noqa: E402
import macosnet_hf  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CHEETAH, LION, TOWER = (get_image(name) for name in ("cheetah1.jpg", "lion.jpg", "tower.jpg"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_app(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "app.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of the demo, started as a person starts it and stopped as a person stops it."""
    process = start_app("--port", str(free_port()), GRADIO_TEMP_DIR=str(tmp_path_factory.mktemp("served")))
    first_line = process.stdout.readline()
    found = re.match(r"Open (http://127\.0\.0\.1:\d+)/ ", first_line)
    if not found:
        process.kill()
        pytest.fail(first_line + process.communicate()[0])
    # Nobody else reads the server's log, and a full pipe would stop it.
    drain = threading.Thread(target=process.stdout.read, daemon=True)
    drain.start()
    yield found[1]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    drain.join(timeout=5)


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    return Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloaded")))


@pytest.fixture(scope="module")
def result():
    """What the library says about the same two photographs."""
    return macosnet_hf.match_pair(CHEETAH, LION, checkpoint=macosnet_hf.DEFAULT_CHECKPOINT)


def match(client: Client, source: str | None, target: str | None) -> tuple:
    return client.predict(source and handle_file(str(source)), target and handle_file(str(target)), api_name="/match")


def difference(shown: str, expected: Image.Image) -> float:
    """Mean absolute difference (0 to 255) between a picture of the page and the one it should be."""
    with Image.open(shown) as picture:
        assert picture.size == expected.size
        return float(np.abs(np.asarray(picture.convert("RGB"), np.float64) - np.asarray(expected, np.float64)).mean())


# ---- what the page computes ------------------------------------------------------------------------------------------


def test_page_shows_what_the_library_computes(client, result):
    line, matches, source_object, target_object, (target, warped) = match(client, CHEETAH, LION)
    assert line == app.verdict(result)
    source_overlay = app.overlay(result.source, result.source_mask)
    target_overlay = app.overlay(result.target, result.target_mask)
    # The page's pictures are compressed, hence close but not equal; another picture is far away.
    assert difference(matches, result.draw_matches()) < 8
    assert difference(source_object, source_overlay) < 8
    assert difference(target_object, target_overlay) < 8
    assert difference(source_object, target_overlay) > 16
    assert difference(target, result.target) < 8
    assert difference(warped, result.warped_source()) < 8
    assert difference(warped, result.target) > 16


def test_photographs_may_differ_in_shape(client):
    with Image.open(TOWER) as tower:
        portrait = tower.size
    _, _, source_object, target_object, (target, warped) = match(client, TOWER, LION)
    assert Image.open(source_object).size == portrait
    assert Image.open(target_object).size == Image.open(target).size == Image.open(warped).size == (256, 256)


def test_orientation_of_a_phone_is_applied(client, tmp_path):
    with Image.open(TOWER) as tower:
        lying = tower.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "phone.jpg"
    lying.save(path, exif=exif, quality=95)
    with Image.open(path) as picture:
        assert ImageOps.exif_transpose(picture).size != picture.size
        upright = ImageOps.exif_transpose(picture).size
    assert Image.open(match(client, path, LION)[2]).size == upright


def test_large_photograph_is_shown_smaller(client, tmp_path):
    with Image.open(LION) as lion:
        lion.resize((2400, 1600)).save(tmp_path / "large.jpg")
    _, _, source_object, *_ = match(client, tmp_path / "large.jpg", CHEETAH)
    assert Image.open(source_object).size == (app.DISPLAY_SIDE, round(app.DISPLAY_SIDE * 1600 / 2400))


def test_starting_the_demo_leaves_no_file_behind(client):
    """gradio writes `app.pyi` beside a module that derives from one of its components."""
    assert not (ROOT / "app.pyi").exists()


def test_only_match_is_public(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/match"]


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"Source: 'holiday\.jpg' is empty"),
        (b"This is a letter, not a picture. " * 20, r"Source: 'holiday\.jpg' is not a picture"),
        (Path(LION).read_bytes()[:4000], r"Source: 'holiday\.jpg' is damaged"),
    ],
    ids=["empty", "text", "truncated"],
)
def test_unusable_photograph_is_named_in_one_sentence(client, tmp_path, content, sentence):
    path = tmp_path / "holiday.jpg"
    path.write_bytes(content)
    with pytest.raises(AppError, match=sentence) as caught:
        match(client, path, LION)
    assert os.sep + "holiday" not in str(caught.value)  # the server's folders are nobody's business
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(("source", "target"), [(None, LION), (LION, None), (None, None)])
def test_missing_photograph_is_asked_for(client, source, target):
    with pytest.raises(AppError, match=r"Choose two photographs first\."):
        match(client, source, target)


def test_too_large_file_is_refused(client, tmp_path):
    path = tmp_path / "huge.jpg"
    path.write_bytes(b"\xff" * ((app.MAX_FILE_MEGABYTES << 20) + 1000))
    with pytest.raises(Exception, match=r"(?i)413|size|large"):
        match(client, path, LION)


class BrokenMatcher(app.Matcher):
    def match(self, source, target):
        raise ZeroDivisionError("secret detail")


class PickyMatcher(app.Matcher):
    def match(self, source, target):
        raise macosnet_hf.InputError("These two are too alike.")


@pytest.mark.parametrize(
    ("matcher", "sentence"),
    [(BrokenMatcher, "Something went wrong on our side"), (PickyMatcher, r"^These two are too alike\.$")],
)
def test_failure_in_the_library(matcher, sentence):
    demo = app.build_demo(matcher())
    try:
        with pytest.raises(AppError, match=sentence) as caught:
            match(Client(app.serve(demo), verbose=False), CHEETAH, LION)
        assert "secret detail" not in str(caught.value)
    finally:
        demo.close(verbose=False)


def test_model_is_loaded_once_for_all_threads():
    matcher = app.Matcher()
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: matcher.load()["model"], range(4)))
    assert all(model is loaded[0] for model in loaded)
    assert not loaded[0].training


def test_unusable_model_ends_with_a_sentence(tmp_path):
    process = start_app("--port", str(free_port()), "--model", str(tmp_path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.search(r"^error: The checkpoint folder .* has no config\.json\.$", output, re.MULTILINE)
    assert "Traceback" not in output


def test_taken_port_ends_with_a_sentence():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        output, _ = (process := start_app("--port", str(port))).communicate(timeout=120)
    assert process.returncode == 2
    assert output.strip() == f"error: cannot listen on 127.0.0.1:{port}; choose another --port."


def test_verdict_has_words_for_every_quality(result):
    from macosnet_hf.pair import quality_in_words

    words = {quality_in_words(np.full(20, score)) for score in np.linspace(0, 1, 41)}
    assert words == set(app.VERDICTS)


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def page(address):
    """A tab of headless Chromium with the demo open. At the end: no other host was asked, and nothing failed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser' (playwright)")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        requests: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        page.get_by_role("button", name="Match", exact=True).wait_for()
        yield page
        browser.close()
    assert any(url.startswith(address) for url in requests)
    assert not [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert not complaints


@pytest.mark.browser
def test_browser_upload_and_match(page, result, tmp_path):
    for name, photograph in (("source", CHEETAH), ("target", LION)):
        own_copy = shutil.copy(photograph, tmp_path / f"my-{name}.jpg")  # not to be confused with the examples
        page.locator(f"#{name} input[type=file]").set_input_files(own_copy)
        page.locator(f"#{name} img[src*='my-{name}.jpg']").wait_for()
    assert not page.get_by_text("Matching points", exact=True).is_visible()
    page.get_by_role("button", name="Match", exact=True).click()
    page.get_by_text("matching points on the object").wait_for(timeout=60_000)
    shown = page.locator("#verdict").inner_text()
    assert shown.strip() == app.verdict(result).replace("**", "")
    for label in ("Matching points", "Source object", "Target object", "Target | warped source"):
        page.get_by_text(label, exact=True).wait_for()
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


@pytest.mark.browser
def test_browser_example_fills_both_photographs_and_matches(page, result):
    assert app.EXAMPLES[0] == (Path(CHEETAH).name, Path(LION).name)
    page.locator("#examples tbody tr").first.click()
    for place, name in zip(("source", "target"), app.EXAMPLES[0], strict=True):
        page.locator(f"#{place} img[src*='{name}']").wait_for()
    page.get_by_role("button", name="Match", exact=True).click()
    page.get_by_text(app.verdict(result).split("** ")[1]).wait_for(timeout=60_000)


@pytest.mark.browser
def test_browser_error_is_a_message(page, tmp_path):
    """Also after an example was chosen, and beside a result that is there already."""
    button = page.get_by_role("button", name="Match", exact=True)
    button.click()
    message = page.locator(".toast-body")
    message.get_by_text("Choose two photographs first.").wait_for()
    assert not page.get_by_text("Matching points", exact=True).is_visible()

    page.locator("#examples tbody tr").first.click()
    page.locator(f"#target img[src*='{app.EXAMPLES[0][1]}']").wait_for()
    button.click()
    page.get_by_text("Matching points", exact=True).wait_for(timeout=60_000)

    (tmp_path / "letter.jpg").write_bytes(b"This is a letter, not a picture. " * 20)
    page.locator("#source input[type=file]").set_input_files(tmp_path / "letter.jpg")
    page.locator("#source img[src*='letter.jpg']").wait_for()
    button.click()
    message.get_by_text("Source: 'letter.jpg' is not a picture").wait_for()
    page.get_by_text("Matching points", exact=True).wait_for(
        state="hidden"
    )  # the old result does not belong to these photographs


def test_a_request_while_the_model_is_still_loading_waits_for_it():
    # In a process of its own: what can go wrong is the very first import of transformers, from two threads at once.
    program = """
import threading
import app
from macosnet_hf import load_image

matcher, found = app.Matcher(), []
photos = [load_image(app.EXAMPLES_FOLDER / name) for name in app.EXAMPLES[0]]
thread = threading.Thread(target=lambda: found.append(matcher.match(*photos)))
thread.start()
matcher.load()
thread.join()
assert found[0].matches
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)
