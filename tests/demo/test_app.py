"""The demo, really served: through its API with gradio's client, and against what nobody should send."""

import http.server
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

gr = pytest.importorskip("gradio", reason="the demo needs gradio")
import httpx  # noqa: E402
from demo_server import CHEETAH, LION, ROOT, TOWER, free_port, save_large, start_app  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError, ValidationError  # noqa: E402

import app  # noqa: E402
import macosnet_hf  # noqa: E402
from macosnet_hf.demo import limits  # noqa: E402
from macosnet_hf.demo.downloads import cached_images  # noqa: E402
from macosnet_hf.demo.examples import (  # noqa: E402
    CAT,
    COLLECTION_EXAMPLE,
    DOG_AND_CUP,
    EXAMPLES,
    PARROT_AND_CUP,
    TABBY,
)
from macosnet_hf.demo.sessions import Sessions, Stopped  # noqa: E402
from macosnet_hf.hints import Hint  # noqa: E402
from macosnet_hf.inference.files import match_files, segment_files  # noqa: E402
from macosnet_hf.inference.verdict import REASONS  # noqa: E402
from macosnet_hf.io.checkpoints import load_model_and_processor  # noqa: E402
from macosnet_hf.io.package import DEFAULT_CHECKPOINT  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the server keeps uploads and results."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def address(folder):
    """The address of the demo, started as a person starts it and stopped as a person stops it."""
    process = start_app("--port", str(free_port()), GRADIO_TEMP_DIR=str(folder))
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
    """What the library says about the same two photos."""
    return macosnet_hf.match_pair(CHEETAH, LION, checkpoint=macosnet_hf.DEFAULT_CHECKPOINT)


def match(client: Client, source, target, **options) -> tuple:
    files = [None if photo is None else handle_file(str(photo)) for photo in (source, target)]
    return client.predict(*files, **options, api_name="/match")


def segment(client: Client, photos, **options) -> tuple:
    return client.predict([handle_file(str(p)) for p in photos], **options, api_name="/segment_collection")


def difference(shown: str, expected: Image.Image) -> float:
    """Mean absolute difference (0 to 255) between an image of the page and the one it should be."""
    with Image.open(shown) as image:
        assert image.size == expected.size
        return float(np.abs(np.asarray(image.convert("RGB"), np.float64) - np.asarray(expected, np.float64)).mean())


def as_mask(path: str) -> np.ndarray:
    values = np.asarray(Image.open(path).convert("L"))
    assert set(np.unique(values)) <= {0, 255}
    return values > 127


# ---- /match ----------------------------------------------------------------------------------------------------------


def test_match_answers_what_the_library_computes(client, result):
    report, drawing, source_mask, target_mask, warped = match(client, CHEETAH, LION)
    assert report["quality"] == result.quality
    assert report["words"] == f"{REASONS[result.quality][:-1]}: {len(result.matches)} matching points on the object."
    assert (report["source"]["file"], report["target"]["file"]) == ("cheetah1.jpg", "lion.jpg")
    assert (report["source"]["width"], report["source"]["height"]) == (256, 256)
    found = np.array([[m["source"], m["target"]] for m in report["matches"]])
    np.testing.assert_allclose(found, result.keypoints, atol=0.006)
    np.testing.assert_allclose([m["score"] for m in report["matches"]], result.scores, atol=1e-4)
    np.testing.assert_array_equal(as_mask(source_mask), result.source_mask)
    np.testing.assert_array_equal(as_mask(target_mask), result.target_mask)
    assert source_mask.endswith("source_mask.png")
    # The images are compressed, hence close but not equal; another image is far away.
    assert difference(drawing, result.draw_matches()) < 8
    assert difference(warped, result.warped_source()) < 8
    assert difference(warped, result.target) > 16


def test_threshold_and_refinement_are_used(client, result):
    threshold = float(np.median(result.scores))
    report, *_ = match(client, CHEETAH, LION, threshold=round(threshold, 2))
    assert 0 < len(report["matches"]) < len(result.matches)
    assert min(m["score"] for m in report["matches"]) > round(threshold, 2)
    report, _, mask, *_ = match(client, CHEETAH, LION, refine="none")
    assert report["refine"] == "none"
    assert (as_mask(mask) != result.source_mask).any()
    with pytest.raises(ValidationError, match=r"Refine must be one of grabcut, otsu, none; it is 'magic'\."):
        match(client, CHEETAH, LION, refine="magic")


def test_a_large_photo_comes_back_in_its_own_pixels(client, tmp_path, result):
    """Worked on as a small copy, but points and masks are those of the original."""
    large = save_large(LION, (2400, 1600), tmp_path / "large.jpg")
    report, _, _, mask, warped = match(client, CHEETAH, large)
    assert (report["target"]["width"], report["target"]["height"]) == (2400, 1600)
    assert as_mask(mask).shape == (1600, 2400)
    assert max(Image.open(warped).size) <= 960
    found = {tuple(m["source"]): np.array(m["target"]) for m in report["matches"]}
    same = [
        (found[tuple(np.round(source, 2))], target * np.array([2399, 1599]) / 255)
        for source, target in result.keypoints
        if tuple(np.round(source, 2)) in found
    ]
    assert len(same) > 30
    assert np.median([np.hypot(*(a - b)) for a, b in same]) < 40


def test_orientation_of_a_phone_is_applied(client, tmp_path):
    with Image.open(TOWER) as tower:
        lying = tower.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "phone.jpg"
    lying.save(path, exif=exif, quality=95)
    with Image.open(path) as photo:
        assert ImageOps.exif_transpose(photo).size != photo.size
        upright = ImageOps.exif_transpose(photo).size
    report, _, mask, *_ = match(client, path, LION)
    assert (report["source"]["width"], report["source"]["height"]) == upright
    assert Image.open(mask).size == upright


def test_nothing_in_common_is_said_in_words(client):
    report, *_ = match(client, LION, TOWER)
    assert report["quality"] == "poor"
    assert report["words"].startswith(REASONS["poor"])


def test_the_same_photo_twice_is_noticed(client):
    report, *_ = match(client, LION, LION)
    assert "same photo twice" in report["words"]


def test_hints_of_a_program_are_those_of_the_library(client, tmp_path):
    """The second photo is processed as a smaller copy."""
    large = save_large(DOG_AND_CUP, (1500, 1000), tmp_path / "large.jpg")
    plain, _, *masks, _ = match(client, PARROT_AND_CUP, large)
    points = [[1, 450, 500, True], [1, 1350, 700.5, False], [0, 30, 40, True]]
    report, _, *hinted, _ = match(client, PARROT_AND_CUP, large, hints=points)
    hints = {
        "source": Hint(include=[(30, 40)]),
        "target": Hint(include=[(450, 500)], exclude=[(1350, 700.5)]),
    }
    network = dict(zip(("model", "processor"), load_model_and_processor(), strict=True))
    expected = match_files(PARROT_AND_CUP, str(large), **network, hints=hints)
    for view, path in enumerate(hinted):
        np.testing.assert_array_equal(as_mask(path), expected.original_mask(view))
        assert (as_mask(path) != as_mask(masks[view])).mean() > 0.01
    assert len(report["matches"]) == len(expected.keypoints)
    assert plain["source"]["object_share"] != report["source"]["object_share"]


@pytest.mark.parametrize(
    ("hints", "sentence"),
    [
        ([[0, 256, 5, True]], r"^The point 256,5 lies outside of source, which is 256x256 pixels\.$"),
        ([[1, 5, -0.5, True]], r"^The point 5,-0\.5 lies outside of target"),
        ([[2, 5, 5, True]], r"^There is no image 2 for a hint; there are 2, counted from 0\.$"),
        ([[0, 5, 5, True], [0, 5, 5, False]], r"^The point 5,5 of source is both included and excluded\.$"),
        ([[0, n, 5, True] for n in range(21)], r"^An image takes at most 20 hints; image 0 has more\.$"),
    ],
    ids=["outside", "above", "no image", "both", "too many"],
)
def test_hints_that_cannot_be_used(client, hints, sentence):
    with pytest.raises(AppError, match=sentence):
        match(client, CHEETAH, LION, hints=hints)


# ---- /transfer_points ------------------------------------------------------------------------------------------------


def test_points_are_transferred_both_ways(client, result):
    key = match(client, CHEETAH, LION)[0]["result"]
    points = [[10, 20], [120.5, 80], [255, 255]]
    for direction in ("source_to_target", "target_to_source"):
        found = client.predict(key, points, direction, api_name="/transfer_points")
        np.testing.assert_allclose(found, result.transfer(points, direction), atol=0.006)


def test_points_are_pixels_of_the_original(client, tmp_path):
    """The same photo at two sizes: a point finds itself, in the other's pixels."""
    large = save_large(LION, (1800, 1200), tmp_path / "large.jpg")
    report = match(client, large, LION)[0]
    point = np.array([[700.0, 400.0]])
    (found,) = client.predict(report["result"], point.tolist(), api_name="/transfer_points")
    assert np.hypot(*(np.array(found) - point[0] * [255 / 1799, 255 / 1199])) < 10
    (corner,) = client.predict(report["result"], [[1799, 1199]], api_name="/transfer_points")
    assert len(corner) == 2


@pytest.mark.parametrize(
    "points",
    [[[1, 2, 3]], "12", {"x": 1}, [["a", "b"]], [[True, 1]], [[0, 0]] * (limits.MAX_POINTS + 1)],
    ids=["three numbers", "text", "object", "letters", "truth", "too many"],
)
def test_points_that_are_none(client, points):
    with pytest.raises(
        ValidationError, match=r"Points must be a list of at most 1000 pairs of numbers \[x, y\]; it is"
    ):
        client.predict("any", points, "source_to_target", api_name="/transfer_points")


def test_points_outside_of_the_photo(client):
    key = match(client, CHEETAH, LION)[0]["result"]
    with pytest.raises(AppError, match=r"\(256, 5\) lies outside of the image, which is 256x256"):
        client.predict(key, [[256, 5]], "source_to_target", api_name="/transfer_points")


@pytest.mark.parametrize("key", ["", "guess", "0" * 24])
def test_a_result_cannot_be_guessed(client, key):
    with pytest.raises(AppError, match="no longer available"):
        client.predict(key, [[1, 1]], "source_to_target", api_name="/transfer_points")


def test_only_the_latest_results_of_a_client_are_stored(address, tmp_path):
    client = Client(address, verbose=False, download_files=str(tmp_path))
    keys = [match(client, CHEETAH, LION, refine="none")[0]["result"] for _ in range(limits.RESULTS_PER_VISITOR + 1)]
    assert len(set(keys)) == len(keys)
    assert client.predict(keys[-1], [[1, 1]], api_name="/transfer_points")
    with pytest.raises(AppError, match="no longer available"):
        client.predict(keys[0], [[1, 1]], api_name="/transfer_points")


# ---- /segment_collection ---------------------------------------------------------------------------------------------


def test_collection_names_the_odd_one_out(client, tmp_path):
    large = save_large(LION, (900, 900), tmp_path / "lion.jpg")
    other = tmp_path / "other"
    other.mkdir()
    twin = save_large(CHEETAH, (300, 200), other / "lion.jpg")  # another photo of the same name
    report, sheet, average, archive = segment(client, [large, twin, CAT, TOWER])
    assert report["odd_ones_out"] == ["tower.jpg"]
    assert [photo["belongs"] for photo in report["photos"]] == [True, True, True, False]
    agreement = [photo["agreement"] for photo in report["photos"]]
    assert min(agreement) == agreement[3]
    assert [photo["file"] for photo in report["photos"]] == [
        "lion.jpg (photo 1)",
        "lion.jpg (photo 2)",
        "cat.jpg",
        "tower.jpg",
    ]
    assert Image.open(sheet).width > 400
    assert max(Image.open(average).size) <= 480
    with zipfile.ZipFile(archive) as zipped:
        assert zipped.testzip() is None
        names = [photo[kind] for photo in report["photos"] for kind in ("mask", "cutout")]
        assert len(set(names)) == 8
        assert sorted(zipped.namelist()) == sorted([*names, "summary.json", "overview.png", "average.png"])
        assert json.loads(zipped.read("summary.json")) == report
        for photo, size in zip(report["photos"], [(900, 900), (300, 200), (451, 300), (377, 600)], strict=True):
            assert (photo["width"], photo["height"]) == size
            cut = Image.open(io.BytesIO(zipped.read(photo["cutout"])))
            mask = np.asarray(Image.open(io.BytesIO(zipped.read(photo["mask"])))) > 127
            assert cut.size == size
            assert mask.shape == size[::-1]
            assert cut.mode == "RGBA"
            reach = Image.fromarray(mask).filter(ImageFilter.MaxFilter(2 * round(0.03 * max(size)) + 1))
            assert (np.asarray(cut)[~np.asarray(reach)] == [255, 255, 255, 0]).all()  # edges are soft
            assert mask.mean() == pytest.approx(photo["object_share"], abs=0.02)


def test_hints_in_a_collection_change_the_masks_of_all(client):
    photos = [DOG_AND_CUP, PARROT_AND_CUP, TABBY]
    plain, *_ = segment(client, photos)
    report, *_ = segment(client, photos, hints=[[0, 150, 200, True], [1, 480, 250, False]])
    network = dict(zip(("model", "processor"), load_model_and_processor(), strict=True))
    hints = {0: Hint(include=[(150, 200)]), 1: Hint(exclude=[(480, 250)])}
    expected = segment_files(photos, photos, **network, hints=hints)
    shares = [[photo["object_share"] for photo in each["photos"]] for each in (plain, report)]
    np.testing.assert_allclose(shares[1], [mask.mean() for mask in expected.masks], atol=0.01)
    assert max(abs(a - b) for a, b in zip(*shares, strict=True)) > 0.05
    with pytest.raises(AppError, match=r"^There is no image 3 for a hint; there are 3, counted from 0\.$"):
        segment(client, photos, hints=[[3, 5, 5, True]])
    with pytest.raises(AppError, match=r"lies outside of tabby\.jpg"):
        segment(client, photos, hints=[[2, 5000, 5, True]])


@pytest.mark.parametrize(
    ("count", "sentence"), [(0, "two or more"), (1, "two or more"), (31, "at most 30 images; these are 31")]
)
def test_too_few_or_too_many_photos(client, tmp_path, count, sentence):
    paths = [save_large(LION, (20 + index, 20), tmp_path / f"{index}.jpg") for index in range(count)]
    with pytest.raises(AppError, match=sentence):
        segment(client, paths)


def test_a_damaged_photo_of_a_collection_is_named(client, tmp_path):
    (tmp_path / "letter.jpg").write_text("This is a letter. " * 20)
    with pytest.raises(AppError, match=r"^'letter\.jpg' is not an image"):
        segment(client, [LION, tmp_path / "letter.jpg", CHEETAH])


# ---- the API as such -------------------------------------------------------------------------------------------------


def test_the_public_api_has_three_documented_end_points(client, address):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/match", "/transfer_points", "/segment_collection"]
    named = {name: [p["parameter_name"] for p in end["parameters"]] for name, end in endpoints.items()}
    assert named == {
        "/match": ["source", "target", "threshold", "refine", "hints"],
        "/transfer_points": ["result", "points", "direction"],
        "/segment_collection": ["photographs", "refine", "hints"],
    }
    info = httpx.get(f"{address}/gradio_api/info").json()["named_endpoints"]
    assert all(len(end["description"]) > 80 for end in info.values())


def test_clients_at_the_same_time_get_their_own_results(address, tmp_path):
    """Each has photos of a size that nobody else has."""

    def work(number: int) -> None:
        client = Client(address, verbose=False, download_files=str(tmp_path / str(number)))
        size = (150 + number, 120 + 2 * number)
        path = save_large((CHEETAH, LION)[number % 2], size, tmp_path / f"own{number}.jpg")
        for _ in range(2):
            report, _, mask, *_ = match(client, path, TOWER, refine="none")
            assert report["source"] == {**report["source"], "file": path.name, "width": size[0], "height": size[1]}
            assert Image.open(mask).size == size
            corner = [[size[0] - 1, size[1] - 1]]  # outside of every smaller one
            assert client.predict(report["result"], corner, api_name="/transfer_points")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


# ---- what nobody should send -----------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of 200 megapixels in some kilobytes."""
    stream = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(stream, "PNG")
    return stream.getvalue()


def one_pixel() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (1, 1), "red").save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda: b"", r"^Source: 'holiday\.jpg' is empty"),
        (lambda: b"This is a letter, not an image. " * 20, r"^Source: 'holiday\.jpg' is not an image"),
        (lambda: Path(LION).read_bytes()[:4000], r"^Source: 'holiday\.jpg' is damaged"),
        (bomb, r"^Source: 'holiday\.jpg' has .*megapixels"),
        (one_pixel, r"^Source: 'holiday\.jpg' has only 1 x 1 pixels"),
    ],
    ids=["empty", "text", "truncated", "bomb", "one pixel"],
)
def test_unusable_photo_is_named_in_one_sentence(client, tmp_path, content, sentence):
    path = tmp_path / "holiday.jpg"
    path.write_bytes(content())
    with pytest.raises(AppError, match=sentence) as caught:
        match(client, path, LION)
    assert os.sep + "holiday" not in str(caught.value)  # the server's folders are nobody's business
    assert "Traceback" not in str(caught.value)
    with pytest.raises(AppError, match=sentence.replace("Source", "Target")):
        match(client, LION, path)


@pytest.mark.parametrize(("source", "target"), [(None, LION), (LION, None), (None, None)])
def test_missing_photo_is_asked_for(client, source, target):
    with pytest.raises(AppError, match=r"^Choose two photos first\.$"):
        match(client, source, target)


def test_too_large_file_is_refused(client, tmp_path):
    path = tmp_path / "huge.jpg"
    path.write_bytes(b"\xff" * ((limits.MAX_FILE_MEGABYTES << 20) + 1000))
    with pytest.raises(Exception, match=r"(?i)413|size|large"):
        match(client, path, LION)


def raw_match(address: str, source: object) -> str:
    """The events that `/match` answers to a source exactly as given, as any program could send it."""
    upload = httpx.post(f"{address}/gradio_api/upload", files={"files": ("lion.jpg", Path(LION).read_bytes())})
    target = {"path": upload.json()[0], "meta": {"_type": "gradio.FileData"}}
    call = httpx.post(f"{address}/gradio_api/call/match", json={"data": [source, target, 0, "none", []]})
    if call.status_code != 200:
        return f"event: error {call.status_code}"
    return httpx.get(f"{address}/gradio_api/call/match/{call.json()['event_id']}", timeout=60).text


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["bare", "as a file"])
@pytest.mark.parametrize(
    "path", [CHEETAH, str(ROOT / "docs" / "images" / "matches.png"), "/etc/hostname", "../../x.jpg"]
)
def test_files_of_the_server_cannot_be_named(address, path, meta):
    """Images that would be matched if they could be read."""
    answer = raw_match(address, {"path": path, **meta})
    assert "event: error" in answer
    assert "event: complete" not in answer
    assert '"quality"' not in answer


def test_gradio_reads_no_upload_itself():
    """Every event with an upload among its inputs takes it as sent and checks it; also the private ones of the page."""
    of_files = (gr.Image, gr.Gallery, gr.File, gr.AnnotatedImage, gr.ImageSlider)
    demo = app.build_demo()
    events = [fn for fn in demo.fns.values() if any(isinstance(block, of_files) for block in fn.inputs)]
    assert {fn.api_name for fn in events} >= {"match", "segment_collection"}
    assert len(events) >= 8
    for fn in events:
        assert not fn.preprocess
        values = [component_sample(component) for component in fn.inputs]
        with pytest.raises(gr.Error, match="Only uploaded files"):
            fn.fn(*values, request_of("visitor"))


def component_sample(component):
    """What a program sends that names a file of the server."""
    file = {"path": CHEETAH}
    if isinstance(component, gr.Gallery):
        return [{"image": file, "caption": None}]
    if isinstance(component, gr.File):
        return [file]
    return file if isinstance(component, gr.Image) else component.value


def test_an_uploaded_file_can_be_named(address):
    """Else the test above would pass whatever happens."""
    upload = httpx.post(f"{address}/gradio_api/upload", files={"files": ("c.jpg", Path(CHEETAH).read_bytes())})
    answer = raw_match(address, {"path": upload.json()[0], "meta": {"_type": "gradio.FileData"}})
    assert "event: complete" in answer
    assert '"quality"' in answer


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["bare", "as a file"])
def test_addresses_are_not_fetched(address, meta):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/photo.jpg"
        for source in ({"path": url, **meta}, {"path": None, "url": url, **meta}, {"path": url, "url": url, **meta}):
            answer = raw_match(address, source)
            assert "event: complete" not in answer
        assert not asked
    finally:
        server.shutdown()


def test_the_folder_of_uploads_cannot_be_looked_through(address, folder):
    (folder / "secret").mkdir(exist_ok=True)
    for place in (folder, folder / "secret", ROOT / "app.py", "/etc/hostname"):
        assert httpx.get(f"{address}/gradio_api/file={place}").status_code in (403, 404)


# ---- failures of the server ------------------------------------------------------------------------------------------


class BrokenMatcher(app.Matcher):
    def pair(self, *arguments, **options):
        raise ZeroDivisionError("secret detail")


class PickyMatcher(app.Matcher):
    def pair(self, *arguments, **options):
        raise macosnet_hf.InputError("These two are too alike.")


@pytest.mark.parametrize(
    ("matcher", "sentence"),
    [(BrokenMatcher, "Something went wrong on our side"), (PickyMatcher, r"^These two are too alike\.$")],
)
def test_failure_in_the_library(matcher, sentence, tmp_path):
    demo = app.build_demo(matcher())
    try:
        with pytest.raises(AppError, match=sentence) as caught:
            match(Client(app.serve(demo), verbose=False, download_files=str(tmp_path)), CHEETAH, LION)
        assert "secret detail" not in str(caught.value)
    finally:
        demo.close(verbose=False)


def test_uploads_and_results_are_removed_after_their_time(tmp_path, monkeypatch):
    served = tmp_path / "served"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(served))
    monkeypatch.setattr(limits, "FILE_SECONDS", 8)  # in which the request must be answered
    matcher = app.Matcher()
    matcher.load()
    matcher.reader.start()
    demo = app.build_demo(matcher)
    files = lambda: [path for path in served.rglob("*") if path.is_file()]  # noqa: E731
    try:
        client = Client(app.serve(demo), verbose=False, download_files=str(tmp_path / "mine"))
        own = save_large(LION, (222, 111), tmp_path / "own.jpg")
        match(client, own, TOWER)
        names = {path.name for path in files()}
        assert {"own.jpg", "tower.jpg", "source_mask.png"} & names
        end = time.monotonic() + 60
        while time.monotonic() < end and {"own.jpg", "source_mask.png"} & {path.name for path in files()}:
            time.sleep(0.3)
        assert not {"own.jpg", "source_mask.png"} & {path.name for path in files()}
    finally:
        demo.close(verbose=False)


def request_of(session):
    return type("Request", (), {"session_hash": session})()


def test_a_stopped_run_ends_at_its_next_step():
    sessions = Sessions(app.Matcher())
    visitor = request_of("visitor")
    said = []
    with sessions.run(visitor, lambda share, desc: said.append(desc)) as progress:
        progress(0.1, "one")
        sessions.stop(request_of("somebody else"))
        progress(0.2, "two")
        sessions.stop(visitor)
        with pytest.raises(Stopped):
            progress(0.3, "three")
    assert said == ["one", "two"]
    with sessions.run(visitor) as progress:
        progress(0.1, "a new run starts afresh")
    sessions.stop(visitor)  # nothing runs, nothing happens


def test_results_go_with_the_session_that_leaves_but_for_what_it_shows():
    """A page that is loaded again is another session."""
    sessions = Sessions(app.Matcher())
    visitor = request_of("visitor")
    key, other = sessions.pairs.add("mine", "visitor"), sessions.pairs.add("theirs", "somebody else")
    last, collection = sessions.pairs.add("last", "visitor"), sessions.collections.add("example", "visitor")
    sessions.place(visitor, "pair").last_key = last
    sessions.leave(visitor)
    assert sessions.pairs.get(other) == "theirs"
    for store, gone in ((sessions.pairs, key), (sessions.collections, collection)):
        with pytest.raises(macosnet_hf.InputError):
            store.get(gone)
    assert sessions.pairs.adopt(last, "visitor again") == "last"
    sessions.leave(visitor)
    assert sessions.pairs.get(last) == "last"
    sessions.leave(request_of("visitor again"))
    with pytest.raises(macosnet_hf.InputError):
        sessions.pairs.get(last)


def test_model_is_loaded_once_for_all_threads():
    matcher = app.Matcher()
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: matcher.load()["model"], range(4)))
    assert all(model is loaded[0] for model in loaded)
    assert not loaded[0].training


@pytest.mark.parametrize("points", [[], [[0, 5, 5, True]]], ids=["plain", "hints"])
def test_a_request_while_the_model_is_still_loading_waits_for_it(points):
    # In a process of its own: what can go wrong is the very first import of transformers, from two threads at once.
    program = f"""
import threading
import app
from macosnet_hf.demo.examples import EXAMPLES
from macosnet_hf.demo.hinting import hints_of_points

matcher, found = app.Matcher(), []

def ask():
    hints = hints_of_points(matcher, {points}, 2) and {{}}
    found.append(matcher.pair(*EXAMPLES[0], "none", hints=hints))

thread = threading.Thread(target=ask)
thread.start()
matcher.load()
thread.join()
assert found[0].result.matches
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("kind", ["drawing", "slider", "gallery"])
def test_an_image_that_may_be_being_fetched_is_not_written_again(kind, tmp_path):
    """Images are named after their content: two equal requests have one file."""
    image = Image.open(LION).convert("RGB")
    component, count, suffix = {
        "drawing": (gr.Image(), 1, "jpeg"),
        "slider": (gr.ImageSlider(), 2, "jpeg"),
        "gallery": (gr.Gallery(), 2, "png"),
    }[kind]
    component.GRADIO_CACHE = str(tmp_path)
    images = [image, image.transpose(0)][:count]

    def show():
        shown = cached_images(component, images, suffix)
        component.postprocess(shown[0] if count == 1 else shown)
        return shown

    first = show()
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(map(str, paths)) == sorted(first)
    assert len(paths) == count
    for path in paths:
        with Image.open(path) as saved:
            assert saved.size == image.size
        path.write_bytes(b"being fetched")
    assert show() == first
    assert [path.read_bytes() for path in paths] == [b"being fetched"] * count
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == count


def test_nothing_that_is_served_is_written_again(tmp_path, monkeypatch):
    """Every image of the page and of the endpoints, with gradio's own writing of images made impossible."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "served"))
    monkeypatch.setattr("gradio.processing_utils.save_pil_to_cache", None)
    demo = app.build_demo()
    try:
        client = Client(app.serve(demo), verbose=False, download_files=str(tmp_path / "mine"))
        match(client, CHEETAH, LION)
        segment(client, [CHEETAH, LION, TOWER])
        shows = [fn for fn in demo.fns.values() if fn.name in ("open_page", "open_tab")]
        assert len(shows) == 2
        for fn in shows:
            nothing = ["" if isinstance(component, gr.Textbox) else [] for component in fn.inputs]
            values = fn.fn(*nothing, request_of("visitor"))
            for component, value in zip(fn.outputs, values, strict=True):
                if isinstance(component, (gr.Image, gr.Gallery, gr.ImageSlider)):
                    component.postprocess(value)
    finally:
        demo.close(verbose=False)


def test_sessions_are_remembered_up_to_a_limit(monkeypatch, tmp_path):
    """gradio keeps what each page shows, also of pages that were closed."""
    monkeypatch.setattr(limits, "MAX_SESSIONS", 3)
    demo = app.build_demo()
    try:
        address = app.serve(demo)
        for _ in range(5):
            client = Client(address, verbose=False, download_files=str(tmp_path))
            with pytest.raises(AppError, match="no longer available"):
                client.predict("no such key", [[1, 1]], api_name="/transfer_points")
        assert len(demo.app.state_holder.session_data) == 3
    finally:
        demo.close(verbose=False)


def test_free_memory_is_given_back_now_and_then(monkeypatch, tmp_path):
    trimmed = []
    monkeypatch.setattr("macosnet_hf.demo.matcher.trim", lambda: trimmed.append(True))
    matcher = app.Matcher()
    missing = str(tmp_path / "missing.jpg")
    for seconds, times in ((-1, 1), (1000, 1), (-1, 2)):
        monkeypatch.setattr(limits, "TRIM_SECONDS", seconds)
        with pytest.raises(macosnet_hf.ImageError):  # also where a request fails
            matcher.pair(missing, CHEETAH, "none")
        assert len(trimmed) == times
    with pytest.raises(macosnet_hf.InputError):
        matcher.collection([CHEETAH], "none", None)
    assert len(trimmed) == 3


# ---- starting --------------------------------------------------------------------------------------------------------


def test_starting_the_demo_leaves_no_file_behind(client):
    """gradio writes a file of type stubs beside a module that derives from one of its components."""
    assert not list(ROOT.glob("*.pyi"))
    assert not list((ROOT / "macosnet_hf").rglob("*.pyi"))


@pytest.mark.parametrize("by", ["option", "variable"])
def test_unusable_model_ends_with_a_sentence(tmp_path, by):
    port = ("--port", str(free_port()))
    if by == "option":
        process = start_app(*port, "--model", str(tmp_path))
    else:
        process = start_app(*port, MACOSNET_MODEL=str(tmp_path))
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


def test_examples_are_there_without_a_network_and_free():
    """Each stands in `examples/`, whose README.md names its licence; a test of the documentation checks that."""
    for path in {*(path for pair in EXAMPLES for path in pair), *COLLECTION_EXAMPLE}:
        assert Path(path).is_relative_to(ROOT / "examples")
        with Image.open(path) as photo:
            photo.load()


def test_the_same_photo_in_other_company_has_another_object():
    """A dog beside a cup, beside a cat and beside a parrot with a cup."""
    matcher = app.Matcher(DEFAULT_CHECKPOINT)
    shares = []
    for source, target in EXAMPLES[2:4]:
        mask = matcher.pair(source, target, "grabcut").result.source_mask
        halves = mask[:, : mask.shape[1] // 2], mask[:, mask.shape[1] // 2 :]
        shares.append([half.mean() for half in halves])
    (dog, cup), (other_dog, other_cup) = shares
    assert dog > 0.25 > 4 * cup
    assert other_cup > 0.25 > 4 * other_dog


def test_front_matter_is_what_a_space_needs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.split("---\n")[1].splitlines()
    settings = dict(line.split(": ", 1) for line in lines if ": " in line and not line.startswith((" ", "-")))
    assert settings["sdk"] == "gradio"
    assert (ROOT / settings["app_file"]).is_file()
    assert settings["license"] == "apache-2.0"
    assert len(settings["short_description"]) <= 60  # the Hub refuses longer ones
    pinned = re.search(r"^gradio==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert settings["sdk_version"] == pinned
    assert settings["colorFrom"] in {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
