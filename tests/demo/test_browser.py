"""The demo in a real headless Chromium: what a visitor does, and what it must look like."""

import contextlib
import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="the demo needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser' (playwright)")

from demo_browser import (  # noqa: E402
    CHROMIUM,
    PRESS_THE_BUTTON,
    USUAL,
    choose,
    clear,
    click_on_photo,
    close_page,
    download,
    letter,
    nothing_stands_there,
    open_collection,
    open_options,
    open_page,
    query,
    show,
    wait_until,
)
from demo_server import CHEETAH, LION, TOWER, save_large  # noqa: E402

import macosnet_hf  # noqa: E402
from macosnet_hf.demo.examples import CAT, EXAMPLES, MIRRORED  # noqa: E402
from macosnet_hf.inference.result_files import pair_file_names  # noqa: E402
from macosnet_hf.inference.verdict import REASONS  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


@pytest.fixture(scope="module")
def result():
    return macosnet_hf.match_pair(*EXAMPLES[0])


def set_threshold(page, value, done):
    """Writes a threshold and waits for what follows from it.

    Gradio sets the first value of a slider a moment after it has opened, so what is written before that is written
    again.
    """
    number = page.locator("#threshold input[type=number]")

    def written_and_done():
        if number.input_value() != value:
            number.fill(value)
        return done()

    wait_until(page, written_and_done)


def numbers(page):
    """Lines drawn, and matches there are, in the words of the page."""
    shown, _, everything, *_ = page.locator(".viewer-words").inner_text().split()
    assert page.locator("#viewer .match").count() == int(shown)
    return int(shown), int(everything)


def test_a_stranger_sees_a_result_at_once(page, result):
    """The first example is there, matched, without a click."""
    assert f"{len(result.matches)} matching points" in page.locator("#verdict").inner_text()
    assert numbers(page) == (40, len(result.matches))
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


@pytest.mark.parametrize("size", [(1400, 900), (1280, 720), (1024, 768)])
def test_verdict_result_and_controls_are_above_the_fold(browser, address, size):
    page = open_page(browser, address, viewport={"width": size[0], "height": size[1]})
    for name in ("#verdict", "#viewer svg", ".viewer-modes", ".viewer-words", "#match", "#examples"):
        box = page.locator(name).bounding_box()
        assert box["y"] >= 0, name
        assert box["y"] + box["height"] <= size[1], name
    stage = page.locator("#stage").bounding_box()
    assert page.locator("#viewer svg").bounding_box()["height"] > 0.38 * size[1]
    clear(page, "source")
    nothing_stands_there(page)
    places = page.locator("#stage").bounding_box()
    assert abs(places["height"] - stage["height"]) < 12, "what is below does not jump"
    for place in ("source", "target"):
        assert page.locator(f"#{place}").is_visible()
    close_page(page, address)


def test_modes_draw_on_both_photos(page, matcher, result):
    """Masks, cutouts and parts cover both photos, a warp is one layer; nothing is asked for twice."""
    before = matcher.pairs
    over = page.locator("#viewer image.over")
    asked = lambda: sum("component_server" in url for url in page.asked)  # noqa: E731
    layers = {}
    for mode, count in (("Masks", 2), ("Cutout", 2), ("Warp", 1), ("Parts", 2)):
        show(page, mode)
        wait_until(page, lambda count=count: over.count() == count)
        layers[mode] = [over.nth(number).get_attribute("href") for number in range(count)]
        assert page.locator("#viewer .match").count() == 0
    assert len({href for hrefs in layers.values() for href in hrefs}) == 7
    times = asked()
    assert times == 4
    show(page, "Masks")
    assert [over.nth(number).get_attribute("href") for number in (0, 1)] == layers["Masks"]
    show(page, "Matches")
    assert over.count() == 0
    assert numbers(page) == (40, len(result.matches))
    assert asked() == times
    assert matcher.pairs == before


def test_a_heat_map_follows_the_clicked_point(page, matcher):
    """It lies over the other photo, and there is one before the first click."""
    before = matcher.pairs
    show(page, "Heat map")
    over = page.locator("#viewer image.over")
    over.wait_for()
    assert over.get_attribute("data-side") == "1"
    assert page.locator("#viewer .pin").count() == 2
    box = page.locator("#viewer image.photo").nth(1).bounding_box()
    page.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + 0.6 * box["height"])
    wait_until(page, lambda: over.get_attribute("data-side") == "0")
    assert over.count() == 1
    first = over.get_attribute("href")
    page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + 0.2 * box["height"])
    wait_until(page, lambda: over.get_attribute("href") != first)
    assert matcher.pairs == before


def test_points_by_keyboard(page, result):
    show(page, "Points")
    page.locator("#viewer svg").focus()
    for name in ("ArrowLeft", "ArrowUp", "Enter"):
        page.keyboard.press(name)
    wait_until(page, lambda: page.locator("#viewer .pin").count() == 1)
    size = np.array(result.source.size)
    np.testing.assert_allclose(pin(page, 0, 0, size), size / 2 - max(size) / 40, atol=1)
    for _ in range(24):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")  # in the other photo
    wait_until(page, lambda: page.locator("#viewer .pin").count() == 2)
    assert page.locator("#viewer .pin").nth(1).locator(".start").get_attribute("data-side") == "1"


def test_a_mirror_image_is_said_and_the_choice_matches_anew(page, matcher):
    page.locator("#examples tbody tr").nth(1).click()
    page.get_by_text("matched as a mirror image").wait_for(timeout=240_000)
    before = matcher.pairs
    open_options(page)
    same = page.get_by_label("as photo A", exact=True)
    wait_until(page, lambda: same.check() or matcher.pairs == before + 1)
    wait_until(page, lambda: page.locator("#verdict .mark").inner_text() in REASONS, 60)
    assert "mirror" not in page.locator("#verdict").inner_text()
    page.locator("#viewer svg").wait_for()


def test_the_code_makes_what_is_shown(page, result):
    page.get_by_role("button", name="Copy as Python").first.click()
    text = page.locator(".as-python .cm-content:visible")
    text.wait_for()
    open_options(page)
    set_threshold(page, "0.5", lambda: "threshold=0.5" in text.inner_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("macosnet_hf.match_pair", lambda *files, **options: calls.append((files, options)) or result)
        patch.setattr(type(result), "draw_matches", lambda self, count: Image.new("RGB", (count, 1)))
        patch.setattr(Image.Image, "save", lambda self, name: calls.append((self.width, name)))
        calls = []
        exec(text.inner_text().replace("\xa0", " "), {})
    assert calls[0][0] == ("dog.jpg", "cat.jpg")
    assert calls[0][1] == {"refine": "grabcut", "threshold": 0.5}
    assert calls[1] == (40, "matches.png")


def test_the_line_of_a_warp_follows_mouse_and_keys(page):
    show(page, "Warp")
    page.locator("#viewer image.over").wait_for()
    layer = page.locator("#viewer image.photo")
    assert layer.count() == 1
    box = layer.bounding_box()
    covered = lambda: page.locator("#viewer-after rect").get_attribute  # noqa: E731
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    assert abs(float(covered()("width")) - box["width"] / 2) < 1
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], middle[1])
    page.mouse.up()
    assert abs(float(covered()("width")) - 0.75 * box["width"]) < 1
    page.mouse.move(*middle)  # without a button
    assert abs(float(covered()("width")) - 0.75 * box["width"]) < 1
    page.locator(".viewer-slide").focus()
    page.keyboard.press("End")
    assert float(covered()("width")) == 0


def test_a_photo_is_dropped_onto_the_stage(page, tmp_path):
    path = save_large(TOWER, (500, 400), tmp_path / "dropped.jpg")
    handle = page.evaluate_handle(
        """async ([bytes, name]) => {
          const files = new DataTransfer();
          files.items.add(new File([Uint8Array.from(bytes)], name, { type: "image/jpeg" }));
          return files;
        }""",
        [list(path.read_bytes()), path.name],
    )
    page.locator("#viewer image").nth(1).dispatch_event("drop", {"dataTransfer": handle})
    page.locator("#target img[src*='dropped.jpg']").wait_for()
    assert "dropped" not in page.locator("#source img").get_attribute("src")
    nothing_stands_there(page)


def test_upload_and_match(page, matcher, tmp_path):
    before = matcher.pairs
    for place, photo in (("source", LION), ("target", CHEETAH)):
        clear(page, place)
        choose(page, place, save_large(photo, (800, 500), tmp_path / f"my-{place}.jpg"))
    page.locator("#match").click()
    wait_until(page, lambda: page.locator("#viewer image").first.get_attribute("href") is not None)
    box = "document.querySelectorAll('#viewer image')[1].getBBox()"
    wide = f"Math.abs({box}.width / {box}.height - 1.6) < 0.02"  # 800x500, which the example is not
    page.wait_for_function(wide, timeout=240_000)
    assert matcher.pairs == before + 1
    assert page.locator("#verdict .mark").inner_text() in REASONS


def test_dragging_the_threshold_redraws_without_the_network(page, matcher, result):
    before = matcher.pairs
    shown, everything = numbers(page)
    open_options(page)
    set_threshold(page, "1", lambda: page.locator("#viewer .match").count() == 0)
    knob = page.locator("#threshold input[type=range]")
    knob.scroll_into_view_if_needed()
    box = knob.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 6, y)
    page.mouse.down()
    for share in (0.2, 0.6, 0.3, 0.4):
        page.mouse.move(box["x"] + share * box["width"], y)
    page.mouse.up()
    threshold = float(knob.input_value())
    assert 0.3 < threshold < 0.5
    expected = int((result.scores > threshold).sum())
    assert 0 < expected < shown
    wait_until(page, lambda: page.locator("#viewer .match").count() == expected)
    assert numbers(page) == (expected, everything)

    page.locator("#threshold input[type=number]").fill("1")
    page.get_by_text("has so high a score").wait_for()
    page.locator("#threshold input[type=number]").fill("0")
    page.locator("#count input[type=number]").fill("15")
    wait_until(page, lambda: page.locator("#viewer .match").count() == 15)
    assert matcher.pairs == before


def test_other_edges_of_the_masks_need_no_network(page, matcher):
    before = matcher.pairs
    show(page, "Masks")
    mask = page.locator("#viewer image.over").first
    first = mask.get_attribute("href")
    open_options(page)
    raw = page.get_by_label("raw").first
    wait_until(page, lambda: raw.check() or mask.get_attribute("href") != first)
    assert matcher.pairs == before


def pin(page, number, side, size):
    """Where a numbered point stands on a photo of the given (width, height), in its pixels."""
    circle = page.locator(f"#viewer .pin circle[data-side='{side}']").nth(number)
    box = page.locator("#viewer image").nth(side)
    x, y, width, height = (float(box.get_attribute(name)) for name in ("x", "y", "width", "height"))
    centre = float(circle.get_attribute("cx")), float(circle.get_attribute("cy"))
    return np.array([(centre[0] - x) / width, (centre[1] - y) / height]) * size - 0.5


def test_a_clicked_point_appears_in_the_other_photo(page, matcher, result):
    before = matcher.pairs
    sizes = np.array([result.source.size, result.target.size])
    for number, (side, x, y) in enumerate([(0, 0.35, 0.35), (1, 0.45, 0.3), (0, 0.6, 0.5)]):
        box = page.locator("#viewer image").nth(side).bounding_box()
        page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
        wait_until(page, lambda count=number + 1: page.locator("#viewer .pin").count() == count)
        start, end = (pin(page, number, place, sizes[place]) for place in (side, 1 - side))
        np.testing.assert_allclose(start, np.array([x, y]) * sizes[side] - 0.5, atol=1)
        expected = result.transfer([start], ("source_to_target", "target_to_source")[side])[0]
        expected = expected.clip(0, sizes[1 - side] - 1)
        np.testing.assert_allclose(end, expected, atol=2)
    assert page.locator("#viewer .pin text").all_text_contents() == ["1", "1", "2", "2", "3", "3"]
    page.get_by_role("button", name="Clear points").click()
    assert page.locator("#viewer .pin").count() == 0
    page.get_by_role("button", name="Grid of points").click()
    wait_until(page, lambda: page.locator("#viewer .pin.dot").count() > 20)
    page.get_by_role("button", name="Clear points").click()
    assert page.get_by_role("button", name="Clear points").is_disabled()
    assert matcher.pairs == before


def test_an_example_runs_at_one_click(page):
    page.locator("#examples tbody tr").nth(4).click()
    page.get_by_text(REASONS["poor"]).wait_for(timeout=240_000)
    assert page.locator("#verdict .mark.poor").is_visible()


def test_a_wrong_file_is_said_at_once_and_the_place_is_free_again(page, tmp_path):
    clear(page, "source")
    page.locator("#source input[type=file]").set_input_files(str(letter(tmp_path)))
    page.locator(".toast-body").get_by_text("' is not an image in a format that can be read").wait_for()
    assert "'letter & i.jpg'" in page.locator(".toast-body").inner_text()  # gradio takes < and > out of names
    page.locator("#source img").wait_for(state="detached")
    choose(page, "source", Path(LION))


def test_no_old_result_stays_where_there_is_no_new_one(page):
    clear(page, "source")
    page.locator("#match").click()
    page.locator(".toast-body").get_by_text("Choose two photos first.").wait_for()
    page.locator("#viewer").wait_for(state="hidden")
    page.locator("#examples tbody tr").first.click()  # the server lives on
    page.locator("#viewer svg").wait_for(timeout=240_000)


def test_a_changed_photo_takes_the_result_away(page, tmp_path):
    clear(page, "source")
    nothing_stands_there(page)
    choose(page, "source", save_large(TOWER, (500, 400), tmp_path / "tower.jpg"))
    page.wait_for_timeout(300)
    nothing_stands_there(page)
    page.locator("#match").click()
    page.get_by_text(REASONS["poor"]).wait_for(timeout=240_000)
    for place in ("source", "target"):  # both
        clear(page, place)
        nothing_stands_there(page)
        choose(page, place, save_large(LION, (500, 400), tmp_path / f"{place}.jpg"))
    nothing_stands_there(page)
    page.locator("#match").click()
    page.get_by_text("This is the same photo twice").wait_for(timeout=240_000)
    assert page.locator("#viewer").is_visible()


def test_a_photo_that_is_changed_during_a_run_ends_it(page, matcher, tmp_path):
    before, tower = matcher.pairs, save_large(TOWER, (500, 400), tmp_path / "tower.jpg")
    matcher.may_answer.clear()
    try:
        page.locator("#match").click()
        wait_until(page, lambda: matcher.pairs == before + 1)
        assert "matching points" not in page.locator("#verdict").inner_text(), "progress replaces the old verdict"
        assert not page.locator("#pair-results").is_visible()
        clear(page, "source")
        nothing_stands_there(page)
    finally:
        matcher.may_answer.set()
    choose(page, "source", tower)
    page.wait_for_timeout(2000)  # in which the answer of the old run would come
    nothing_stands_there(page)
    page.locator("#match").click()
    page.get_by_text(REASONS["poor"]).wait_for(timeout=240_000)


def test_tabs_do_not_disturb_each_other(page, address):
    """Neither those of the page nor those of the browser."""
    other = page.context.new_page()
    other.goto(address)
    other.locator("#viewer svg").wait_for(timeout=240_000)
    open_collection(page)
    page.get_by_role("tab", name="Pair").click()
    clear(page, "target")
    nothing_stands_there(page)
    page.get_by_role("tab", name="Collection").click()
    page.locator("#collection-verdict").get_by_text("cup.jpg does not seem to belong").wait_for()
    assert page.locator("#collection-results").is_visible()
    assert "matching points" in other.locator("#verdict").inner_text()
    assert other.locator("#pair-results").is_visible()
    page.locator("#photos button[aria-label='Clear']").click()
    page.locator("#collection-results").wait_for(state="hidden")
    assert other.locator("#pair-results").is_visible()
    other.close()


def test_a_photo_of_a_phone(page, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="HEIC needs pillow-heif")
    pillow_heif.register_heif_opener()
    with Image.open(EXAMPLES[0][1]) as photo:
        photo.save(tmp_path / "IMG_0001.HEIC", quality=95)
        width = photo.width
    clear(page, "source")
    page.locator("#source input[type=file]").set_input_files(str(tmp_path / "IMG_0001.HEIC"))
    page.wait_for_function(f"document.querySelector('#source img')?.naturalWidth == {width}")
    page.locator("#match").click()
    page.locator("#verdict .mark.good").wait_for(timeout=240_000)


def test_a_photo_that_browsers_do_not_show_is_shown(page, tmp_path):
    with Image.open(EXAMPLES[0][1]) as photo:
        photo.save(tmp_path / "scan.tif")
        width = photo.width
    clear(page, "source")
    page.locator("#source input[type=file]").set_input_files(str(tmp_path / "scan.tif"))
    page.locator("#source img[src*='scan.png']").wait_for()
    page.wait_for_function("document.querySelector('#source img').naturalWidth == " + str(width))
    page.locator("#match").click()
    page.get_by_text("This is the same photo twice").wait_for(timeout=240_000)


# What somebody does who copies an image: one of the examples is on the clipboard afterwards.
COPY = """async (number) => {
  const image = new Image();
  image.src = document.querySelectorAll("#examples img")[number].src;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext("2d").drawImage(image, 0, 0);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
}"""
CAR_EXAMPLE, CAT_EXAMPLE = 9, 1


def paste(page, number, place):
    """Puts an example on the clipboard, presses Ctrl+V and waits until the place shows something else."""
    before = page.locator(f"#{place} img").first.get_attribute("src") if page.locator(f"#{place} img").count() else ""
    page.evaluate(COPY, number)
    page.keyboard.press("Control+v")
    wait_until(page, lambda: (page.locator(f"#{place} img").all() or [None])[0] is not None)
    wait_until(page, lambda: page.locator(f"#{place} img").first.get_attribute("src") != before)


@pytest.fixture
def clipboard_page(browser, address):
    page = open_page(browser, address, permissions=["camera", "clipboard-read", "clipboard-write"])
    yield page
    close_page(page, address)


def test_images_are_pasted_one_after_the_other(clipboard_page):
    page = clipboard_page
    cat = page.locator("#target img").get_attribute("src")
    page.mouse.move(5, 5)
    paste(page, CAR_EXAMPLE, "source")  # both places are taken: one after the other
    assert page.locator("#target img").get_attribute("src") == cat
    paste(page, CAR_EXAMPLE, "target")
    page.locator("#match").click()
    page.get_by_text("This is the same photo twice").wait_for(timeout=240_000)
    page.locator("#viewer image").nth(1).hover(force=True)  # whatever lies under the pointer
    car = page.locator("#source img").get_attribute("src")
    paste(page, CAT_EXAMPLE, "target")
    assert page.locator("#source img").get_attribute("src") == car
    clear(page, "source")  # an empty place
    page.mouse.move(5, 5)
    paste(page, CAT_EXAMPLE, "source")


def test_the_button_of_the_clipboard(clipboard_page):
    page = clipboard_page
    clear(page, "target")
    page.evaluate(COPY, CAR_EXAMPLE)
    page.locator("#target button[aria-label='Paste from clipboard']").click()
    page.locator("#target img").wait_for()
    page.locator("#match").click()
    page.get_by_text(REASONS["poor"]).wait_for(timeout=240_000)


def test_pasting_words_changes_nothing(clipboard_page):
    page = clipboard_page
    before = page.locator("#source img").get_attribute("src")
    page.evaluate("navigator.clipboard.writeText('a word')")
    open_options(page)
    page.locator("#count input[type=number]").fill("")
    page.locator("#count input[type=number]").focus()
    page.keyboard.press("Control+v")
    page.wait_for_timeout(300)
    assert page.locator("#source img").get_attribute("src") == before


def test_a_photo_of_the_camera(clipboard_page, matcher):
    page, before = clipboard_page, matcher.pairs
    clear(page, "source")
    page.locator("#source button[aria-label='Capture from camera']").click()
    page.get_by_text("Click to Access Webcam").click()
    video = page.locator("#source video")
    page.wait_for_function("document.querySelector('#source video').videoWidth > 0")
    assert "flip" not in video.get_attribute("class")  # a mirrored partner is not recognised
    page.locator("#source button[aria-label='capture photo']").click()
    page.locator("#source img[src*='/gradio_api/file=']").wait_for()
    page.locator("#match").click()
    wait_until(page, lambda: page.locator("#verdict .mark").inner_text() in REASONS, 60)
    assert matcher.pairs == before + 1


def test_files_of_a_pair_are_downloaded(page, result, tmp_path):
    names, document = download(page, "pair", tmp_path)
    assert names[0] == "matches.json"
    assert sorted(names) == sorted(pair_file_names(flow=True))
    assert len(document["matches"]) == len(result.matches)
    open_options(page)
    # Files of another threshold than what is shown.
    set_threshold(page, "0.5", lambda: page.locator("#viewer .match").count() < 40)
    names, document = download(page, "pair", tmp_path)
    assert document["threshold"] == 0.5
    assert len(document["matches"]) == int((result.scores > 0.5).sum())


def test_collection_upload_run_and_zip(page, tmp_path):
    open_collection(page)  # the example is there at once
    assert "cup.jpg does not seem to belong" in page.locator("#collection-verdict").inner_text()
    page.locator("#photos button[aria-label='Clear']").click()
    own = [
        save_large(photo, (500, 400), tmp_path / f"own{number}.jpg")
        for number, photo in enumerate((TOWER, LION, CHEETAH, CAT))
    ]
    page.locator("#photos input[type=file]").set_input_files([str(path) for path in own])
    page.locator("#photos img[src*='own3.jpg']").wait_for()
    page.locator("#segment").click()
    page.get_by_text("own0.jpg does not seem to belong").wait_for(timeout=240_000)
    assert page.locator("#agreement .name").count() == 4
    assert page.locator("#agreement .odd.name").inner_text() == "own0.jpg"
    page.get_by_role("tab", name="Contact sheet").click()
    page.locator("#sheet img").wait_for()
    names, _ = download(page, "collection", tmp_path)
    assert {f"own{number}_cutout.png" for number in range(4)} <= set(names)


def test_a_point_of_a_collection_is_clicked_in_one_photo_and_seen_in_all_that_belong(page):
    open_collection(page)
    page.get_by_role("tab", name="Points").click()
    photos = page.locator("#points figure")
    assert photos.count() == 4
    assert page.locator("#points .odd figcaption").inner_text() == "odd one out: cup.jpg"
    photos.first.locator("button").click(position={"x": 60, "y": 60})
    wait_until(page, lambda: page.locator("#points i").count() >= 2)
    first = photos.first.locator("i")
    box, dot = photos.first.locator("img").bounding_box(), first.bounding_box()
    assert abs(dot["x"] + dot["width"] / 2 - box["x"] - 60) < 2
    assert abs(dot["y"] + dot["height"] / 2 - box["y"] - 60) < 2
    assert page.locator("#points .odd i").count() == 0
    odd = page.locator("#points .odd button")
    odd.focus()
    page.keyboard.press("Enter")
    wait_until(page, lambda: page.locator("#points .odd i").inner_text() == "2")


def test_wrong_files_of_a_collection_are_left_out_at_once(page, tmp_path):
    open_collection(page)
    page.locator("#photos button[aria-label='Clear']").click()
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    files = [letter(tmp_path), CHEETAH, tmp_path / "dot.png", LION]
    page.locator("#photos input[type=file]").set_input_files([str(path) for path in files])
    page.locator(".toast-body").get_by_text("'dot.png' has only 1 x 1 pixels").wait_for()
    assert "'letter & i.jpg' is not an image" in page.locator(".toast-body").inner_text()
    wait_until(page, lambda: page.locator("#photos img").count() == 2)


def test_who_comes_back_to_the_collection_finds_the_own_photos(page, tmp_path):
    open_collection(page)
    page.locator("#photos button[aria-label='Clear']").click()
    photos = {"mine0.jpg": LION, "mine1.jpg": CHEETAH}
    own = [save_large(path, (300, 200), tmp_path / name) for name, path in photos.items()]
    page.locator("#photos input[type=file]").set_input_files([str(path) for path in own])
    page.locator("#photos img[src*='mine1.jpg']").wait_for()
    page.get_by_role("tab", name="Pair").click()
    page.get_by_role("tab", name="Collection").click()
    page.wait_for_timeout(500)
    page.locator("#segment").click()
    page.get_by_text("2 photos are too few").wait_for(timeout=240_000)
    assert set(page.locator("#agreement .name").all_inner_texts()) == set(photos)


def test_a_name_of_a_file_is_text_and_nothing_else(page, tmp_path):
    """gradio takes some characters out of names, and runs what its templates make as a JavaScript template string."""
    open_collection(page)
    page.locator("#photos button[aria-label='Clear']").click()
    names = ["${document.title = 'gone'}.jpg", "{{value}} & &lt;b&gt;.jpg"]
    own = [save_large(path, (300, 200), tmp_path / name) for path, name in zip((LION, CHEETAH), names, strict=True)]
    page.locator("#photos input[type=file]").set_input_files([str(path) for path in own])
    wait_until(page, lambda: page.locator("#photos img").count() == 2)
    title = page.title()
    page.locator("#segment").click()
    page.get_by_text("2 photos are too few").wait_for(timeout=240_000)
    shown = page.locator("#agreement .name").all_inner_texts()
    assert sum("document.title = 'gone'" in name for name in shown) == 1
    assert sum("value" in name and "& &lt;b&gt;" in name for name in shown) == 1
    assert page.title() == title


def test_photos_of_the_same_name_are_told_apart_and_a_change_takes_the_result_away(page, tmp_path):
    open_collection(page)
    page.locator("#photos button[aria-label='Clear']").click()
    page.locator("#collection-results").wait_for(state="hidden")
    own = []
    for number, photo in enumerate((LION, TOWER, CHEETAH, CAT)):
        (tmp_path / str(number)).mkdir()
        name = "image_0001.jpg" if number < 2 else f"own{number}.jpg"
        own.append(save_large(photo, (500, 400), tmp_path / str(number) / name))
    page.locator("#photos input[type=file]").set_input_files([str(path) for path in own])
    page.locator("#photos img[src*='own3.jpg']").wait_for()
    nothing_stands_there(page, PRESS_THE_BUTTON)
    page.locator("#segment").click()
    page.get_by_text("image_0001.jpg (photo 2) does not seem to belong").wait_for(timeout=240_000)
    assert page.locator("#collection-verdict img").count() == 1
    assert len(set(page.locator("#agreement .name").all_inner_texts())) == 4
    assert page.locator("#agreement .name img").count() == 4
    names, document = download(page, "collection", tmp_path)
    assert {"image_0001_mask.png", "image_0001_2_mask.png"} <= set(names)
    assert document["odd_ones_out"] == ["image_0001.jpg (photo 2)"]
    page.locator("#photos button[aria-label='Delete image']").first.click(force=True)
    nothing_stands_there(page, PRESS_THE_BUTTON)


def start_long_run(page, matcher, tmp_path):
    open_collection(page)
    page.locator("#photos button[aria-label='Clear']").click()
    paths = [
        save_large((LION, CHEETAH, TOWER)[number % 3], (600 + number, 400), tmp_path / f"{number}.jpg")
        for number in range(24)
    ]
    page.locator("#photos input[type=file]").set_input_files([str(path) for path in paths])
    page.locator("#photos img[src*='23.jpg']").wait_for()
    before = matcher.collections
    page.locator("#segment").click()
    wait_until(page, lambda: matcher.collections > before)


def test_a_run_can_be_stopped(page, matcher, tmp_path):
    stopped = matcher.stopped
    start_long_run(page, matcher, tmp_path)
    page.locator("#stop").click()
    wait_until(page, lambda: matcher.stopped == stopped + 1, 20)


def test_photos_that_are_changed_during_a_run_end_it(page, matcher, tmp_path):
    stopped = matcher.stopped
    start_long_run(page, matcher, tmp_path)
    page.locator("#photos button[aria-label='Clear']").click()
    wait_until(page, lambda: matcher.stopped == stopped + 1, 20)
    page.wait_for_timeout(1000)
    assert not page.locator("#collection-results").is_visible()


def test_a_closed_browser_ends_its_run_and_the_server_lives_on(browser, address, matcher, tmp_path):
    stopped = matcher.stopped
    page = open_page(browser, address, **USUAL)
    start_long_run(page, matcher, tmp_path)
    page.context.close()
    end = time.monotonic() + 30
    while matcher.stopped == stopped:
        assert time.monotonic() < end
        time.sleep(0.1)
    other = open_page(browser, address)
    open_collection(other)
    close_page(other, address)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off(browser, address, theme):
    page = open_page(
        browser, address, f"?__theme={theme}", viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True
    )
    for tab in ("Pair", "Collection", "About"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("tab", name="Pair").click()
    page.wait_for_function("document.documentElement.scrollHeight <= 2 * innerHeight")
    for target in page.locator("#viewer button:visible, #viewer input:visible, #match, #options button").all():
        assert target.bounding_box()["height"] >= 44, target.inner_html()
    open_options(page)
    for choice in page.locator("#options label:has(> input[type=radio])").all():
        circle = choice.locator("input").bounding_box()
        assert abs(circle["width"] - circle["height"]) < 1
        assert choice.bounding_box()["height"] >= 44
    number, line = (page.locator(f"#threshold {name}").first.bounding_box() for name in ("input", ".head"))
    assert number["height"] <= line["height"] + 1
    page.get_by_role("button", name="Options").click()
    first, second = (page.locator("#viewer image").nth(side).bounding_box() for side in (0, 1))
    assert second["y"] > first["y"] + first["height"]  # below one another
    assert first["width"] > 250
    assert page.locator("#match").evaluate("button => getComputedStyle(button).backgroundColor") == "rgb(194, 65, 12)"
    corner = Image.open(io.BytesIO(page.screenshot())).convert("L").crop((0, 0, 8, 200))
    brightness = np.mean(np.asarray(corner))
    assert (brightness < 60) == (theme == "dark")
    show(page, "Warp")
    page.locator("#viewer image.over").wait_for()
    box = page.locator("#viewer image.over").bounding_box()
    page.touchscreen.tap(box["x"] + 0.2 * box["width"], box["y"] + 0.7 * box["height"])
    wait_until(
        page, lambda: abs(page.locator("#viewer-after rect").bounding_box()["width"] / box["width"] - 0.8) < 0.02
    )
    devtools = page.context.new_cdp_session(page)
    y = box["y"] + box["height"] / 2
    for kind, share in (("touchStart", 0.8), ("touchMove", 0.6), ("touchMove", 0.4), ("touchEnd", None)):
        touched = [] if share is None else [{"x": box["x"] + share * box["width"], "y": y}]
        devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touched})
    wait_until(
        page, lambda: abs(page.locator("#viewer-after rect").bounding_box()["width"] / box["width"] - 0.6) < 0.02
    )
    show(page, "Matches")
    pins = page.locator("#viewer .pin")
    while pins.count() == 0:  # a browser takes some taps after a drag for its end
        page.locator("#viewer image").first.tap(position={"x": 100, "y": 100}, force=True)  # perhaps on a line
        with contextlib.suppress(playwright.TimeoutError):
            pins.first.wait_for(timeout=10_000)
    show(page, "Masks")
    for target in page.locator(".viewer-hints button").all():
        assert min(target.bounding_box()[side] for side in ("width", "height")) >= 44
    close_page(page, address)


def test_another_model_matches_anew_and_files_and_code_name_it(page, matcher, tmp_path):
    before = matcher.pairs
    open_options(page)
    base = page.locator("#model").get_by_label("base")
    wait_until(page, lambda: base.check() or matcher.pairs == before + 1)
    wait_until(page, lambda: page.locator("#verdict .mark").inner_text() in REASONS, 60)
    page.locator("#viewer svg").wait_for()
    _, document = download(page, "pair", tmp_path)
    assert document["model"] == "macosnet-base"
    page.get_by_role("button", name="Copy as Python").first.click()
    text = page.locator(".as-python .cm-content:visible")
    wait_until(page, lambda: "checkpoint='base'" in text.inner_text())
    wait_until(page, lambda: query(page) == {"model": "base"})
    clear(page, "source")
    page.locator("#model").get_by_label("lite").check()  # nothing to match, nothing to complain about
    nothing_stands_there(page)
    assert not page.locator(".toast-body").is_visible()
    assert matcher.pairs == before + 1


def test_the_address_holds_mode_and_settings_and_a_reload_keeps_them(page, browser, address):
    show(page, "Masks")
    wait_until(page, lambda: query(page) == {"mode": "masks"})
    open_options(page)
    set_threshold(page, "0.5", lambda: query(page) == {"mode": "masks", "threshold": "0.5"})
    page.get_by_label("soft").first.check()
    wait_until(page, lambda: query(page) == {"mode": "masks", "threshold": "0.5", "edges": "otsu"})
    page.reload()
    page.locator("#viewer image.over").nth(1).wait_for(timeout=240_000)
    assert page.locator("button[data-mode='masks']").get_attribute("aria-pressed") == "true"
    open_options(page)
    wait_until(page, lambda: page.locator("#threshold input[type=number]").input_value() == "0.5")
    assert page.get_by_label("soft").first.is_checked()
    page.get_by_role("button", name="Copy as Python").first.click()
    page.locator(".as-python .cm-content:visible").get_by_text("threshold=0.5").first.wait_for()
    other = open_page(browser, address, "?facing=sideways&model=huge&lines=9&threshold=nan&tab=nothing&mode=1")
    said = other.locator(".toast-body").inner_text()
    assert "threshold=nan and facing=sideways and model=huge, which there is not" in said
    assert numbers(other)[0] == 10
    close_page(other, address)


def test_settings_stay_in_the_address_after_back_and_are_in_their_ranges(page, address):
    show(page, "Masks")
    wait_until(page, lambda: query(page) == {"mode": "masks"})
    open_options(page)
    set_threshold(page, "5", lambda: query(page) == {"mode": "masks", "threshold": "1"})
    set_threshold(page, "0.5", lambda: query(page) == {"mode": "masks", "threshold": "0.5"})
    page.go_back()
    wait_until(page, lambda: query(page) == {"threshold": "0.5"})


def test_back_and_forward_go_through_modes_and_tabs_by_keyboard_too(page):
    page.locator("button[data-mode='masks']").focus()
    page.keyboard.press("Enter")
    wait_until(page, lambda: query(page) == {"mode": "masks"})
    page.locator("#tab-collection-button").focus()
    page.keyboard.press("Enter")
    wait_until(page, lambda: query(page) == {"mode": "masks", "tab": "collection"})
    page.locator("#agreement .agreement").wait_for(timeout=240_000)
    page.go_back()
    page.locator("#viewer svg").wait_for()
    page.go_back()
    wait_until(page, lambda: page.locator("button[data-mode='matches']").get_attribute("aria-pressed") == "true")
    assert query(page) == {}
    page.go_forward()
    page.go_forward()
    page.locator("#agreement .agreement").wait_for()
    page.reload()
    page.locator("#agreement .agreement").wait_for(timeout=240_000)


def test_nothing_moves_for_who_asks_for_that(browser, address):
    page = open_page(browser, address, reduced_motion="reduce")
    moving = """() => [...document.querySelectorAll(".gradio-container *")].filter((each) => {
      const style = getComputedStyle(each);
      return [style.animationDuration, style.transitionDuration].some((time) => parseFloat(time) > 0.01);
    }).length"""
    assert page.evaluate(moving) == 0
    close_page(page, address)


def test_photos_of_a_collection_that_face_the_other_way_are_found(page, matcher):
    open_collection(page)
    page.locator("#photos button[aria-label='Clear']").click()
    page.locator("#photos input[type=file]").set_input_files([*MIRRORED, CAT])
    page.locator("#photos img[src*='cat.jpg']").wait_for()
    page.locator("#collection-verdict").get_by_text(PRESS_THE_BUTTON).wait_for()
    before = matcher.collections
    page.get_by_role("button", name="Options").click()
    mirrored = page.locator("#collection-orientations").get_by_label("mirrored, some of them")
    wait_until(page, lambda: mirrored.check() or matcher.collections == before + 1)
    page.locator("#agreement .said", has_text="mirrored").wait_for(timeout=240_000)
    assert page.locator("#agreement .said", has_text="mirrored").count() == 1
    wait_until(page, lambda: query(page) == {"tab": "collection", "collection_facing": "mirror"})
    page.get_by_role("tab", name="Points").click()
    photos = page.locator("#points figure")
    box = photos.first.locator("img").bounding_box()
    photos.first.locator("button").click(position={"x": 0.4 * box["width"], "y": 0.4 * box["height"]})
    wait_until(page, lambda: page.locator("#points i").count() == 3)
    first, second = (photos.nth(number).locator("i").bounding_box() for number in (0, 1))
    boxes = [photos.nth(number).locator("img").bounding_box() for number in (0, 1)]
    share = (first["x"] + first["width"] / 2 - boxes[0]["x"]) / boxes[0]["width"]
    other = (second["x"] + second["width"] / 2 - boxes[1]["x"]) / boxes[1]["width"]
    assert abs(share + other - 1) < 0.04
    page.get_by_role("button", name="Copy as Python").last.click()
    page.locator(".as-python .cm-content:visible").get_by_text("orientations='mirror'").first.wait_for()


def test_a_click_says_which_object_is_meant(page, matcher, tmp_path):
    """A dog beside a cup, and a parrot beside a cup: the masks are cups, and a click on the dog changes both."""
    page.locator("#examples tbody tr").nth(3).click()
    wait_until(page, lambda: "parrot-and-cup" in (page.locator("#target img").get_attribute("src") or ""))
    page.locator("#viewer svg[aria-label*='parrot-and-cup']").wait_for(timeout=240_000)
    before = matcher.pairs
    assert not page.get_by_role("button", name="Leave out").is_visible()
    show(page, "Masks")
    over, hint = page.locator("#viewer image.over"), page.locator("#viewer .hint")
    layers = lambda: [each.get_attribute("href") for each in over.all()]  # noqa: E731
    wait_until(page, lambda: over.count() == 2)
    first, verdict = layers(), page.locator("#verdict").inner_text()
    assert "Wrong object? Click on the right one." in page.locator(".viewer-words").inner_text()

    click_on_photo(page, 0, 0.3, 0.5)
    assert page.locator("#viewer .hint.belongs[data-side='0']").count() == 1, "at once"
    wait_until(page, lambda: all(new != old for new, old in zip(layers(), first, strict=True)))
    assert page.locator("#verdict").inner_text() != verdict
    one = layers()
    page.get_by_role("button", name="Leave out").click()
    click_on_photo(page, 1, 0.8, 0.7)
    wait_until(page, lambda: all(new != old for new, old in zip(layers(), one, strict=True)))
    assert hint.count() == 2
    assert page.locator("#viewer .hint:not(.belongs)[data-side='1']").count() == 1

    page.get_by_role("button", name="Copy as Python").first.click()
    text = page.locator(".as-python .cm-content:visible")
    wait_until(page, lambda: "exclude=[" in text.inner_text())
    asked, plain = {}, macosnet_hf.match_pair(*EXAMPLES[3], refine="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("macosnet_hf.match_pair", lambda *files, **options: asked.update(options) or plain)
        patch.setattr(Image.Image, "save", lambda self, name: None)
        exec(text.inner_text().replace("\xa0", " "), {})
    sizes = np.array([plain.source.size, plain.target.size])
    found = [asked["hints"]["source"].include[0], asked["hints"]["target"].exclude[0]]
    np.testing.assert_allclose(found, np.array([[0.3, 0.5], [0.8, 0.7]]) * sizes - 0.5, atol=1.5)
    again = macosnet_hf.match_pair(*EXAMPLES[3], hints=asked["hints"])
    _, document = download(page, "pair", tmp_path)
    assert len(document["matches"]) == len(again.matches)
    assert document["source"]["object_share"] == pytest.approx(again.source_mask.mean(), abs=1e-3)

    click_on_photo(page, 1, 0.8, 0.7)  # on the mark
    wait_until(page, lambda: layers() == one)
    assert hint.count() == 1
    page.get_by_role("button", name="+ Add").click()
    click_on_photo(page, 0, 0.85, 0.6, keys=["Shift"])
    click_on_photo(page, 0, 0.1, 0.1, keys=["Alt"])  # while the first is under way
    wait_until(page, lambda: text.inner_text().count("), (") == 1)
    assert page.locator("#viewer .hint:not(.belongs)").count() == 2
    show(page, "Cutout")
    assert hint.count() == 3
    show(page, "Masks")
    page.get_by_role("button", name="Clear marks").click()
    wait_until(page, lambda: layers() == first)
    assert hint.count() == 0
    assert "hints" not in text.inner_text()
    assert page.locator("#verdict").inner_text() == verdict
    assert page.get_by_role("button", name="Clear marks").is_disabled()
    assert matcher.pairs == before

    click_on_photo(page, 0, 0.3, 0.5)
    wait_until(page, lambda: layers() == one)
    _, marked = download(page, "pair", tmp_path)
    page.locator("#match").click()
    wait_until(page, lambda: matcher.pairs == before + 1)
    page.locator("#verdict .mark").wait_for(timeout=60_000)
    _, document = download(page, "pair", tmp_path)
    assert document == marked, "a new run of the same photos starts with the marks"
    wait_until(page, lambda: hint.count() == 1 and layers() == one)


def test_marks_go_with_their_photo_and_where_they_cannot_be_used(page, address, matcher, tmp_path, monkeypatch):
    show(page, "Cutout")
    hint, over = page.locator("#viewer .hint"), page.locator("#viewer image.over")
    wait_until(page, lambda: over.count() == 2)
    page.locator("#viewer svg").focus()
    for key in ("ArrowDown", "Enter"):
        page.keyboard.press(key)
    assert hint.count() == 1
    page.locator(".viewer-words").get_by_text("Click on a mark to remove it").wait_for()

    def refused(*arguments):
        raise macosnet_hf.InputError("This cannot be used.")

    with monkeypatch.context() as patch:
        patch.setattr(matcher, "hinted", refused)
        click_on_photo(page, 1, 0.5, 0.5)
        page.get_by_text("This cannot be used.").wait_for()
        wait_until(page, lambda: hint.count() == 1)
    assert page.locator("#viewer").is_visible()
    clear(page, "target")
    choose(page, "target", save_large(TOWER, (500, 400), tmp_path / "tower.jpg"))
    page.locator("#match").click()
    page.locator("#viewer svg[aria-label*='tower.jpg']").wait_for(timeout=240_000)
    assert hint.count() == 0
