"""Results in a real headless Chromium: marks in a collection, another order, a reload, and models that are missing."""

import shutil
from pathlib import Path

import numpy as np
import pytest

gr = pytest.importorskip("gradio", reason="the demo needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser' (playwright)")

from demo_browser import (  # noqa: E402
    CHROMIUM,
    PRESS_THE_BUTTON,
    choose,
    clear,
    close_page,
    download,
    nothing_stands_there,
    open_collection,
    open_options,
    open_page,
    query,
    show,
    wait_until,
)
from demo_server import CHEETAH, LION, free_port, save_large, start_app  # noqa: E402
from hub_server import HubServer  # noqa: E402

import app  # noqa: E402
from macosnet_hf.demo import limits  # noqa: E402
from macosnet_hf.demo.examples import COLLECTION_EXAMPLE, DOG_AND_CUP, PARROT_AND_CUP, TABBY  # noqa: E402
from macosnet_hf.inference.files import segment_files  # noqa: E402
from macosnet_hf.io.package import DEFAULT_CHECKPOINT  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


# ---- uploads ---------------------------------------------------------------------------------------------------------


def cut_off(folder, name="holiday.jpg"):
    """A JPEG whose header is sound."""
    (folder / name).write_bytes(Path(LION).read_bytes()[:4000])
    return folder / name


@pytest.mark.parametrize(("place", "photo"), [("source", "Photo A"), ("target", "Photo B")])
def test_a_photo_that_was_cut_off_is_refused_at_once(page, matcher, tmp_path, place, photo):
    before = matcher.pairs
    clear(page, place)
    page.locator(f"#{place} input[type=file]").set_input_files(str(cut_off(tmp_path)))
    sentence = f"{photo}: 'holiday.jpg' is damaged, cut off or of an unusual kind and cannot be read."
    page.locator(".toast-body").get_by_text(sentence, exact=True).wait_for()
    assert page.locator(".toast-body").count() == 1
    page.locator(f"#{place} img").wait_for(state="detached")
    choose(page, place, save_large(LION, (300, 200), tmp_path / "sound.jpg"))
    assert matcher.pairs == before


def test_a_photo_that_is_damaged_later_is_called_as_on_the_page(page, matcher, tmp_path, monkeypatch):
    """Its file is cut off on the server between upload and Match."""
    for_browser, checked = matcher.reader.for_browser, []
    monkeypatch.setattr(matcher.reader, "for_browser", lambda *asked: [for_browser(*asked), checked.append(asked)][0])
    clear(page, "target")
    choose(page, "target", save_large(LION, (300, 200), tmp_path / "sound.jpg"))
    wait_until(page, lambda: checked)
    stored = Path(page.locator("#target img").get_attribute("src").split("file=")[1])
    stored.write_bytes(stored.read_bytes()[:4000])
    page.locator("#match").click()
    page.locator(".toast-body").get_by_text("Photo B: 'sound.jpg' is damaged").wait_for()
    assert "Target" not in page.locator(".toast-body").inner_text()


def test_photos_of_a_collection_that_were_cut_off_are_left_out(page, tmp_path):
    open_collection(page)
    page.locator("#photos button[aria-label='Clear']").click()
    page.locator("#photos input[type=file]").set_input_files([str(cut_off(tmp_path)), LION, CHEETAH])
    page.locator(".toast-body").get_by_text("'holiday.jpg' is damaged").wait_for()
    wait_until(page, lambda: page.locator("#photos .gallery-item").count() == 2)


# ---- marks in a collection -------------------------------------------------------------------------------------------


def open_masks(page, photos, tmp_path):
    """A collection of these photos, its masks shown."""
    open_collection(page)
    page.locator("#photos button[aria-label='Clear']").click()
    page.locator("#photos input[type=file]").set_input_files([str(path) for path in photos])
    page.locator(f"#photos img[src*='{Path(photos[-1]).name}']").wait_for()
    nothing_stands_there(page, PRESS_THE_BUTTON)
    page.locator("#segment").click()
    page.locator("#agreement .agreement").wait_for(timeout=240_000)
    page.locator("#collection-results").get_by_role("tab", name="Masks").click()
    wait_until(page, lambda: page.locator("#masks figure").count() == len(photos))


def masks(page):
    return [image.get_attribute("src") for image in page.locator("#masks img").all()]


def click_mask(page, number, x, y, **options):
    image = page.locator("#masks img").nth(number)
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    place = {"x": x * box["width"], "y": y * box["height"]}
    page.locator("#masks figure button").nth(number).click(position=place, **options)


def test_a_click_in_one_photo_of_a_collection_changes_the_masks_of_all(page, matcher, tmp_path):
    """A dog beside a cup, a parrot beside a cup, and a cat: clicks say that the dog and not the cup is meant."""
    photos = [DOG_AND_CUP, PARROT_AND_CUP, TABBY]
    open_masks(page, photos, tmp_path)
    before, first = matcher.collections, masks(page)
    words, marks = page.locator("#masks .photo-words"), page.locator("#masks figure i")
    assert words.inner_text() == "Wrong object? Click on the right one in any photo."
    assert page.locator(".photo-unhint").is_disabled()
    click_mask(page, 0, 0.3, 0.5)
    assert marks.count() == 1, "at once"
    wait_until(page, lambda: words.inner_text() == "Click on a mark to remove it.")
    one = masks(page)
    assert one[0] != first[0]
    page.locator(".photo-hints").get_by_role("button", name="Leave out").click()
    click_mask(page, 1, 0.8, 0.6)
    wait_until(page, lambda: masks(page)[1] != one[1])
    two = masks(page)
    assert [mark.inner_text() for mark in marks.all()] == ["+", "−"]
    assert page.locator("#masks figure").nth(1).locator("i:not(.belongs)").count() == 1
    assert matcher.collections == before, "no photo is read again"

    page.get_by_role("button", name="Copy as Python").last.click()
    text = page.locator(".as-python .cm-content:visible")
    wait_until(page, lambda: "exclude=[" in text.inner_text())
    code = text.inner_text().replace("\xa0", " ")
    names = [Path(path).name for path in photos]
    assert f"files = {names!r}" in code
    code = code.replace(f"files = {names!r}", f"files = {photos!r}").replace(
        '"overview.png"', repr(str(tmp_path / "o.png"))
    )
    made = {}
    exec(code, made)
    hints = made["result"].hints
    assert [len(hints[0].include), len(hints[1].exclude), sorted(hints)] == [1, 1, [0, 1]]
    np.testing.assert_allclose([hints[0].include[0], hints[1].exclude[0]], [[0.3, 0.5], [0.8, 0.6]], atol=0.01)
    _, document = download(page, "collection", tmp_path)
    shares = [photo["object_share"] for photo in document["photos"]]
    np.testing.assert_allclose(shares, [mask.mean() for mask in made["result"].masks], atol=0.01)
    plain = segment_files(photos, photos, model=matcher.load()["model"], processor=matcher.load()["processor"])
    changed = [(a != b).mean() for a, b in zip(made["result"].masks, plain.masks, strict=True)]
    assert min(changed[:2]) > 0.02, "those with marks"
    assert masks(page) == two

    page.locator("#segment").click()
    wait_until(page, lambda: matcher.collections == before + 1)
    page.locator("#agreement .agreement").wait_for(timeout=240_000)
    _, document = download(page, "collection", tmp_path)
    assert [photo["object_share"] for photo in document["photos"]] == shares, "a new run starts with the marks"
    page.locator("#collection-results").get_by_role("tab", name="Masks").click()
    wait_until(page, lambda: marks.count() == 2 and masks(page) == two)

    click_mask(page, 1, 0.8, 0.6)  # on the mark
    wait_until(page, lambda: masks(page) == one)
    page.locator(".photo-unhint").click()
    wait_until(page, lambda: masks(page) == first)
    assert marks.count() == 0
    assert "hints" not in text.inner_text()


def test_marks_of_a_collection_by_keyboard_and_where_they_cannot_be_used(page, matcher, monkeypatch):
    open_collection(page)
    page.locator("#collection-results").get_by_role("tab", name="Masks").click()
    marks, words = page.locator("#masks figure i"), page.locator("#masks .photo-words")
    wait_until(page, lambda: page.locator("#masks figure").count() == 4)
    page.locator("#masks figure button").nth(1).focus()
    page.keyboard.press("Enter")  # the middle
    wait_until(page, lambda: words.inner_text() == "Click on a mark to remove it.")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Mark in cat.jpg")
    assert marks.count() == 1
    shown = masks(page)

    def refused(*arguments):
        raise ZeroDivisionError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(matcher, "hinted_collection", refused)
        click_mask(page, 0, 0.2, 0.2, modifiers=["Shift"])
        page.get_by_text("Something went wrong on our side").wait_for()
        wait_until(page, lambda: marks.count() == 1)
    assert page.locator("#collection-results").is_visible()
    assert masks(page) == shown


def test_marks_set_during_a_run_are_sent_after_it_and_stop_forgets_them(page, matcher, monkeypatch):
    open_collection(page)
    page.locator("#collection-results").get_by_role("tab", name="Masks").click()
    marks, words = page.locator("#masks figure i"), page.locator("#masks .photo-words")
    wait_until(page, lambda: page.locator("#masks figure").count() == 4)
    asked, work = [], matcher.hinted_collection

    def slow(collection, hints, progress):
        asked.append(hints)
        assert matcher.may_answer.wait(240)
        return work(collection, hints, progress)

    monkeypatch.setattr(matcher, "hinted_collection", slow)
    matcher.may_answer.clear()
    try:
        click_mask(page, 0, 0.5, 0.5)
        wait_until(page, lambda: len(asked) == 1)
        assert words.inner_text() == "Looking for it in all photos ..."
        for number in (1, 2):
            click_mask(page, number, 0.5, 0.5)
    finally:
        matcher.may_answer.set()
    wait_until(page, lambda: words.inner_text() == "Click on a mark to remove it.")
    assert [len(hints) for hints in asked] == [1, 3], "those of a run in one"
    assert marks.count() == 3
    matcher.may_answer.clear()
    try:
        click_mask(page, 3, 0.5, 0.5)
        wait_until(page, lambda: len(asked) == 3)
        page.locator("#stop").click()
        wait_until(page, lambda: marks.count() == 3)
    finally:
        matcher.may_answer.set()
    assert page.locator("#collection-results").is_visible()


# ---- another order ---------------------------------------------------------------------------------------------------


def order(page):
    """Names of the photos in the gallery."""
    return [image.get_attribute("src").split("/")[-1] for image in page.locator("#photos .gallery-item img").all()]


NAMES = [Path(path).name for path in COLLECTION_EXAMPLE]


def middle(page, number):
    box = page.locator("#photos .gallery-item").nth(number).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_a_photo_is_dragged_to_another_place_and_the_result_follows(page, matcher, tmp_path):
    open_collection(page)
    before, verdict = matcher.collections, page.locator("#collection-verdict").inner_text()
    assert order(page) == NAMES
    page.mouse.move(*middle(page, 3))
    page.mouse.down()
    page.mouse.move(*middle(page, 2))
    page.mouse.move(*middle(page, 0))
    assert page.locator("#photos .dragged").count() == 1
    assert page.locator("#photos .gallery-item").nth(0).get_attribute("class").split()[-1] == "before"
    page.mouse.up()
    moved = [NAMES[3], *NAMES[:3]]
    wait_until(page, lambda: order(page) == moved)
    page.locator(".arrange-words").get_by_text("Photo 4 is now photo 1 of 4.").wait_for()
    captions = page.locator("#cutouts .caption-label")
    wait_until(page, lambda: captions.all_inner_texts() == [f"odd one out: {moved[0]}", *moved[1:]])
    assert page.locator("#collection-verdict").inner_text() == verdict
    _, document = download(page, "collection", tmp_path)
    assert [photo["file"] for photo in document["photos"]] == moved
    assert document["odd_ones_out"] == ["cup.jpg"]
    assert not page.locator("#photos .preview").is_visible(), "a drag is no click"

    page.locator("#photos .thumbnail-item").nth(1).focus()
    for place in (3, 4):
        page.keyboard.press("Shift+ArrowRight")
        words = f"Thumbnail {place} of 4"
        wait_until(
            page, lambda words=words: page.evaluate("document.activeElement.getAttribute('aria-label')") == words
        )
    wait_until(page, lambda: order(page) == [NAMES[3], NAMES[1], NAMES[2], NAMES[0]])
    page.keyboard.press("Shift+ArrowRight")  # there is no further place
    page.mouse.move(*middle(page, 0))
    page.mouse.down()
    page.mouse.move(*middle(page, 2))
    page.keyboard.press("Escape")
    page.mouse.up()
    assert page.locator("#photos .dragged").count() == 0
    assert order(page) == [NAMES[3], NAMES[1], NAMES[2], NAMES[0]]
    assert matcher.collections == before
    page.locator("#photos button[aria-label='Delete image']").first.click(force=True)
    nothing_stands_there(page, PRESS_THE_BUTTON)
    assert order(page) == [NAMES[1], NAMES[2], NAMES[0]]


def test_photos_that_have_no_result_are_moved_too(page, tmp_path):
    open_collection(page)
    page.locator("#photos button[aria-label='Clear']").click()
    page.locator("#arrange").wait_for(state="hidden")
    own = [save_large(path, (90, 80), tmp_path / f"{name}.jpg") for name, path in (("a", LION), ("b", CHEETAH))]
    page.locator("#photos input[type=file]").set_input_files([str(path) for path in own])
    page.locator("#photos img[src*='b.jpg']").wait_for()
    nothing_stands_there(page, PRESS_THE_BUTTON)
    page.locator("#photos .thumbnail-item").first.focus()
    page.keyboard.press("Shift+ArrowRight")
    wait_until(page, lambda: order(page) == ["b.jpg", "a.jpg"])
    nothing_stands_there(page, PRESS_THE_BUTTON)
    page.locator("#segment").click()
    page.get_by_text("2 photos are too few").wait_for(timeout=240_000)


def test_a_photo_is_moved_and_removed_on_a_phone(browser, address):
    """A finger that rests drags, one that moves at once scrolls."""
    page = open_page(browser, address, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    open_collection(page)
    devtools = page.context.new_cdp_session(page)

    def touch(kind, at=None):
        points = [] if at is None else [{"x": at[0], "y": at[1]}]
        devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    page.evaluate("window.scrollTo(0, 0)")
    start, end = middle(page, 0), middle(page, 1)
    touch("touchStart", start)
    page.locator("#photos .dragged").wait_for()
    touch("touchMove", ((start[0] + end[0]) / 2, start[1]))
    touch("touchMove", end)
    touch("touchEnd")
    wait_until(page, lambda: order(page) == [NAMES[1], NAMES[0], *NAMES[2:]])
    assert page.evaluate("scrollY") == 0
    cross = page.locator("#photos button[aria-label='Delete image']").first
    assert min(cross.bounding_box()[side] for side in ("width", "height")) >= 44
    assert cross.evaluate("element => getComputedStyle(element).opacity") == "1"
    for target in page.locator(".photo-hints button:visible").all():
        assert min(target.bounding_box()[side] for side in ("width", "height")) >= 44
    cross.click()
    wait_until(page, lambda: order(page) == [NAMES[0], *NAMES[2:]])
    close_page(page, address)


# ---- a reload --------------------------------------------------------------------------------------------------------


def match_own(page, tmp_path):
    """A result of the visitor's own photos."""
    for place, photo in (("source", LION), ("target", CHEETAH)):
        clear(page, place)
        choose(page, place, save_large(photo, (400, 300), tmp_path / f"my-{place}.jpg"))
    page.locator("#match").click()
    page.locator("#viewer svg[aria-label*='my-target.jpg']").wait_for(timeout=240_000)


def last_key(page, tab="pair"):
    return page.evaluate("(tab) => sessionStorage.getItem(`macosnet-${tab}`)", tab)


def test_a_reload_shows_the_last_result_again(page, matcher, tmp_path):
    assert last_key(page) is None, "the example of a new page"
    match_own(page, tmp_path)
    before = matcher.pairs
    show(page, "Masks")
    over = page.locator("#viewer image.over")
    wait_until(page, lambda: over.count() == 2)
    first = [each.get_attribute("href") for each in over.all()]
    open_options(page)
    page.get_by_label("soft").first.check()
    wait_until(page, lambda: [each.get_attribute("href") for each in over.all()] != first)
    soft, verdict = [each.get_attribute("href") for each in over.all()], page.locator("#verdict").inner_text()
    assert last_key(page) not in page.url, "the address is given to others"
    wait_until(page, lambda: query(page) == {"mode": "masks", "edges": "otsu"})
    for _ in range(2):
        page.reload()
        page.locator("#viewer svg[aria-label*='my-target.jpg']").wait_for(timeout=240_000)
        wait_until(page, lambda: over.count() == 2)
        assert [each.get_attribute("href") for each in over.all()] == soft
        assert page.locator("#verdict").inner_text() == verdict
        assert "my-source.jpg" in page.locator("#source img").get_attribute("src")
    assert matcher.pairs == before, "the network did not run again"
    _, document = download(page, "pair", tmp_path)
    assert document["source"]["file"] == "my-source.jpg"
    assert document["refine"] == "otsu"
    clear(page, "source")  # the page works as before
    nothing_stands_there(page)
    assert query(page) == {"mode": "masks", "edges": "otsu"}


def test_an_address_that_asks_for_other_settings_is_no_reload(page, address, tmp_path):
    match_own(page, tmp_path)
    page.goto(address + "?model=base")
    page.locator("#viewer svg[aria-label*='cat.jpg']").wait_for(timeout=240_000)
    assert last_key(page) is None


def test_an_example_of_other_facing_is_shown_again(page):
    page.locator("#examples tbody tr").nth(1).click()
    page.get_by_text("matched as a mirror image").wait_for(timeout=240_000)
    page.reload()
    page.get_by_text("matched as a mirror image").wait_for(timeout=240_000)
    open_options(page)
    wait_until(page, lambda: page.locator("#orientations").get_by_label("mirrored", exact=True).is_checked())


def test_a_collection_is_shown_again_with_its_marks_and_order(page, matcher):
    open_collection(page)
    page.locator("#photos .thumbnail-item").first.focus()
    page.keyboard.press("Shift+ArrowRight")
    moved = [NAMES[1], NAMES[0], *NAMES[2:]]
    wait_until(page, lambda: order(page) == moved)
    page.locator("#collection-results").get_by_role("tab", name="Masks").click()
    wait_until(page, lambda: page.locator("#masks figcaption").all_inner_texts()[:2] == moved[:2])
    click_mask(page, 2, 0.3, 0.6)
    words = page.locator("#masks .photo-words")
    wait_until(page, lambda: words.inner_text() == "Click on a mark to remove it.")
    shown, before = masks(page), matcher.collections
    page.reload()
    page.locator("#agreement .agreement").wait_for(timeout=240_000)
    assert order(page) == moved
    page.locator("#collection-results").get_by_role("tab", name="Masks").click()
    wait_until(page, lambda: masks(page) == shown)
    assert page.locator("#masks figure").nth(2).locator("i.belongs").count() == 1
    assert matcher.collections == before


@pytest.mark.parametrize("tab", ["pair", "collection"])
def test_a_result_that_has_gone_leaves_a_line_and_an_empty_page(page, address, tab):
    # What remains of a result that expired, and all that a guess is; there before the page looks, once.
    page.add_init_script(
        f"if (!sessionStorage.once) sessionStorage.setItem('macosnet-{tab}', 'A'.repeat(24)); sessionStorage.once = 1;"
    )
    page.goto(f"{address}?tab={tab}")
    verdict = page.locator("#verdict" if tab == "pair" else "#collection-verdict")
    verdict.get_by_text("Your last result is no longer on the server: results stay for 30 minutes.").wait_for()
    assert not page.locator(f"#{tab}-results").is_visible()
    places = page.locator("#source img, #target img" if tab == "pair" else "#photos img")
    assert places.count() == 0
    assert not page.locator(".toast-body").is_visible()
    wait_until(page, lambda: last_key(page, tab) is None)
    page.reload()  # said once
    page.locator("#viewer svg" if tab == "pair" else "#agreement .agreement").wait_for(timeout=240_000)


def test_a_result_that_lost_a_photo_is_not_shown(page, tmp_path):
    match_own(page, tmp_path)
    Path(page.locator("#source img").get_attribute("src").split("file=")[1]).unlink()
    page.reload()
    page.locator("#verdict").get_by_text("Your last result is no longer on the server").wait_for()
    page.locator("#examples tbody tr").nth(4).click()
    page.locator("#viewer svg[aria-label*='car.jpg']").wait_for(timeout=240_000)
    page.reload()
    page.locator("#viewer svg[aria-label*='car.jpg']").wait_for(timeout=240_000)


def test_a_result_that_expired_is_not_shown(browser, matcher, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "RESULT_SECONDS", 2)
    demo = app.build_demo(matcher)
    try:
        address = app.serve(demo)
        page = open_page(browser, address)
        match_own(page, tmp_path)
        page.goto("about:blank")
        page.wait_for_timeout(2500)
        page.go_back()
        page.locator("#verdict").get_by_text("Your last result is no longer on the server").wait_for()
        close_page(page, address)
    finally:
        demo.close(verbose=False)


def test_the_result_of_one_visitor_is_not_that_of_another(page, browser, address, tmp_path):
    match_own(page, tmp_path)
    other = open_page(browser, address, viewport={"width": 1000, "height": 800})
    assert last_key(other) is None
    assert "dog.jpg" in other.locator("#viewer svg").get_attribute("aria-label")
    close_page(other, address)


# ---- models that are missing -----------------------------------------------------------------------------------------


def test_a_page_opens_without_the_models_that_cannot_be_had(browser, tmp_path):
    """A Hub that has one of two offered models, and later none."""
    folder = Path(DEFAULT_CHECKPOINT)
    with HubServer() as hub:
        hub.files["model", "me/good"] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        cache = tmp_path / "hf"
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        environment["MACOSNET_OFFER"] = "me/good me/gone"
        process = start_app("--port", str(free_port()), **environment)
        try:
            warning, first_line = process.stdout.readline(), process.stdout.readline()
            assert warning.startswith("warning: 'me/gone' is no folder here, and could not be had from the Hub")
            address = first_line.split()[1]
            page = open_page(browser, address, "?model=me/gone")
            button = page.locator("#match").bounding_box()
            assert button["y"] + button["height"] <= 900, "above the fold in spite of the line"
            line = page.locator("#missing").inner_text()
            assert line == "The model me/gone cannot be had at the moment; the page works without it."
            assert "model=me/gone, which there is not" in page.locator(".toast-body").inner_text()
            open_options(page)
            assert page.locator("#model label").all_inner_texts() == ["lite", "me/good"]
            wait_until(page, lambda: page.locator("#model").get_by_label("lite").is_checked())
            page.goto(address + "?model=me/good")
            page.locator("#viewer svg").wait_for(timeout=240_000)
            _, document = download(page, "pair", tmp_path)
            assert document["model"] == "me/good"
            close_page(page, address)
        finally:
            process.terminate()
            process.communicate(timeout=60)
        process = start_app("--port", str(free_port()), **environment)
        try:
            process.stdout.readline()
            address = process.stdout.readline().split()[1]
            hub.files.clear()
            shutil.rmtree(cache)
            for tab in ("pair", "collection"):
                name = "model" if tab == "pair" else "collection_model"
                page = open_page(browser, address, viewport={"width": 900, "height": 800})
                page.goto(f"{address}?tab={tab}&{name}=me/good")
                page.locator(".toast-body").get_by_text("The model me/good cannot be had at the moment").wait_for()
                page.locator("#viewer svg" if tab == "pair" else "#agreement .agreement").wait_for(timeout=60_000)
                close_page(page, address)
        finally:
            process.terminate()
            process.communicate(timeout=60)
