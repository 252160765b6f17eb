"""The edges of HTTP: what a program may send ends in an answer or in 4xx with a sentence, and never in a traceback."""

import json
import re
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio", reason="the demo needs gradio")
import httpx  # noqa: E402
from demo_server import CHEETAH, LION, free_port  # noqa: E402
from gradio.routes import App  # noqa: E402

import app  # noqa: E402
from macosnet_hf.demo.arranging import ORDER  # noqa: E402
from macosnet_hf.demo.guard import _schema  # noqa: E402
from macosnet_hf.demo.hinting import COLLECTION_HINTS, HINTS  # noqa: E402
from macosnet_hf.demo.hinting import POINTS as POINTS_OF_PROGRAMS  # noqa: E402


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page, its address without a slash, and two uploaded files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("served")))
        demo = app.build_demo()
        address = app.serve(demo, port=free_port()).rstrip("/")
        yield demo, address, [upload(address, path) for path in (CHEETAH, LION)]
        demo.close(verbose=False)


@pytest.fixture
def no_traceback(capfd):
    yield
    assert "Traceback" not in "".join(capfd.readouterr())


def upload(address, path):
    files = {"files": (Path(path).name, Path(path).read_bytes())}
    (stored,) = httpx.post(f"{address}/gradio_api/upload", files=files, timeout=60).json()
    return {"path": stored, "meta": {"_type": "gradio.FileData"}}


def post(address, route, body):
    """`json.dumps` writes NaN and Infinity as well, which `httpx` does not."""
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"content-type": "application/json"}
    return httpx.post(f"{address}/gradio_api/{route}", content=content, headers=headers, timeout=60)


NAN, FAR, HUGE = float("nan"), float("inf"), 10**400
POINTS = r"Points must be a list of at most 1000 pairs of numbers \[x, y\]; it is"


@pytest.mark.parametrize(
    ("endpoint", "values", "sentence"),
    [
        ("match", ["S", "T", NAN, "none", []], r"Threshold must be a number from 0 to 1; it is nan\."),
        ("match", ["S", "T", -FAR, "none", []], r"it is -inf\."),
        ("match", ["S", "T", HUGE, "none", []], r"Threshold must be a number from 0 to 1; it is 1000"),
        ("match", ["S", "T", "0.5", "none", []], r"it is '0\.5'\."),
        ("match", ["S", "T", True, "none", []], r"it is True\."),
        ("match", ["S", "T", 1.01, "none", []], r"it is 1\.01\."),
        ("match", ["S", "T", 0, ["none"], []], r"Refine must be one of grabcut, otsu, none"),
        ("match", ["S", {"path": "/tmp/a\0.jpg"}, 0, "none", []], "Target must be a file that was uploaded"),
        ("match", [{"path": CHEETAH}, "T", 0, "none", []], "Source must be a file that was uploaded"),
        (
            "match",
            [{"path": CHEETAH, "meta": {"_type": "gradio.FileData"}}, "T", 0, "none", []],
            "Source must be a file",
        ),
        ("match", ["not a file", "T", 0, "none", []], "Source must be a file"),
        ("match", [{"path": "a" * 5000}, "T", 0, "none", []], "Source must be a file"),
        ("match", ["S", "T"], "takes a list of 5 values"),
        ("match", {"a": 1}, "takes the values source, target, threshold, refine, hints"),
        ("match", None, "takes a list of 5 values"),
        ("transfer_points", ["key", [[1, NAN]], "source_to_target"], POINTS),
        ("transfer_points", ["key", [[1, HUGE]], "source_to_target"], POINTS),
        ("transfer_points", ["key", [[1, 2]] * 1001, "source_to_target"], POINTS),
        ("transfer_points", [["key"], [[1, 2]], "source_to_target"], "Result must be a short text"),
        (
            "segment_collection",
            [[{"video": {"path": "a.mp4"}}], "none", []],
            "Photographs must be files that were uploaded",
        ),
        ("segment_collection", [[{"path": CHEETAH}, {"path": LION}], "none", []], "Photographs must be files"),
        ("segment_collection", ["SS", "none", []], "Photographs must be files that were uploaded"),
    ],
)
def test_values_that_no_endpoint_takes(served, no_traceback, endpoint, values, sentence):
    _, address, uploads = served
    if isinstance(values, list):
        values = [
            dict(zip("ST", uploads, strict=True)).get(value, value) if value in ("S", "T") else value
            for value in values
        ]
    answer = post(address, f"call/{endpoint}", {"data": values})
    assert answer.status_code in (400, 422)
    assert re.search(sentence, json.dumps(answer.json(), ensure_ascii=False).replace('\\"', '"')), answer.text


def test_gradios_own_clients_are_told_which_value_it_is(served):
    """gradio's page paints these on the components, its clients print them."""
    _, address, (source, target) = served
    detail = post(address, "call/match", {"data": [source, target, 2, "none", []]}).json()["detail"]
    assert [verdict["parameter_name"] for verdict in detail] == ["source", "target", "threshold", "refine", "hints"]
    assert [verdict["is_valid"] for verdict in detail] == [True, True, False, True, True]
    assert all(verdict["__type__"] == "validate" for verdict in detail)
    by_name = post(address, "call/v2/match", {"source": source, "target": target, "threshold": NAN})
    assert by_name.status_code == 422
    assert post(address, "call/v2/match", {"sauce": source}).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        '{"data": [',
        "[]",
        '"text"',
        '{"data": NaN}',
        '{"data": [1' + "0" * 5000 + "]}",
        "[" * 50_000,
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
    ids=["cut off", "list", "text", "nan", "5,000 digits", "nested", "no text"],
)
@pytest.mark.parametrize(
    "route", ["call/match", "queue/join", "run/match", "api/match", "component_server", "call/v2/match"]
)
def test_bodies_that_are_none(served, no_traceback, route, body):
    answer = post(served[1], route, body)
    assert 400 <= answer.status_code < 500
    assert answer.json()["detail"]


@pytest.mark.parametrize("route", ["call/match", "queue/join", "reset", "component_server", "cancel"])
@pytest.mark.parametrize("length", [True, False])
def test_a_long_body_is_refused_before_it_is_read(served, no_traceback, route, length):
    """Thirty megabytes of JSON took the server 0.8 GB. The length may be unknown: the body then comes in chunks."""
    _, address, _ = served
    body = b'{"data": [' + b"{}," * 400_000 + b"{}]}"
    content = body if length else iter([body[:700_000], body[700_000:]])
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{address}/gradio_api/{route}", content=content, headers=headers, timeout=60)
    assert (answer.status_code, answer.json()["detail"]) == (413, "The body of the request is too long.")


def test_a_long_name_of_a_session_is_not_remembered(served, no_traceback):
    _, address, (source, target) = served
    body = {"data": [source, target, 0, "none"], "session_hash": "x" * 100_000}
    answer = post(address, "call/match", body)
    assert (answer.status_code, answer.json()["detail"]) == (422, "The name of the session is too long.")


def test_private_events_of_the_page_are_checked_as_well(served, no_traceback):
    demo, address, uploads = served
    wrong = {
        gr.Slider: NAN,
        gr.Radio: "magic",
        gr.Image: {"path": CHEETAH},
        gr.Dataset: 99,
        gr.JSON: "x",
        gr.Textbox: 5,
    }
    wrong |= {gr.Gallery: [{"video": {"path": uploads[0]["path"]}, "caption": None}], gr.File: [{"path": CHEETAH}]}
    checked = 0
    for fn in demo.fns.values():
        for number, component in enumerate(fn.inputs):
            if type(component) in wrong:
                values = [wrong[type(each)] if at == number else None for at, each in enumerate(fn.inputs)]
                body = {"data": values, "fn_index": fn._id, "session_hash": "visitor"}
                answer = post(address, "queue/join", body)
                assert answer.status_code == 422, (fn.api_name, component, answer.text)
                assert answer.json()["detail"][number]["is_valid"] is False
                assert post(address, "run/predict", body).status_code == 422  # where the page sends what does not wait
                assert post(address, "run/match", body).status_code == 422
                checked += 1
    assert checked > 20
    assert post(address, "queue/join", {"data": [], "fn_index": 9999, "session_hash": "x"}).status_code == 404
    assert post(address, "queue/join", {"data": [], "fn_index": None, "session_hash": "x"}).status_code == 404


def test_an_event_of_the_page_that_does_not_wait_is_answered(served, no_traceback):
    """An example that is clicked: the number of a function, in an address that names none."""
    demo, address, _ = served
    (fn,) = [fn for fn in demo.fns.values() if [type(each) for each in fn.inputs] == [gr.Dataset, gr.Radio]]
    answer = post(address, "run/predict", {"data": [1, "lite"], "fn_index": fn._id, "session_hash": "visitor"})
    assert answer.status_code == 200, answer.text
    files = [each for each in answer.json()["data"] if isinstance(each, dict)]
    assert [file["orig_name"] for file in files] == ["dog.jpg", "dog-mirrored.jpg"]


MARK = [0.5, 0.5, True]


@pytest.mark.parametrize(
    "marks",
    [
        None,
        "x",
        [],
        [[MARK]],
        [[MARK], [MARK], []],
        {"source": [MARK]},
        [[MARK] * 21, []],
        [[], [[0.5, 0.5]]],
        [[], [[NAN, 0.5, True]]],
        [[], [[0.5, -FAR, True]]],
        [[], [[0.5, HUGE, True]]],
        [[], [[0.5, 1.01, False]]],
        [[], [[-0.01, 0.5, False]]],
        [[], [["0.5", 0.5, True]]],
        [[], [[True, 0.5, True]]],
        [[], [[0.5, 0.5, 1]]],
        [[], [[0.5, 0.5, None]]],
        [[], [0.5]],
    ],
    ids=lambda marks: repr(marks)[:40],
)
def test_marks_that_are_none(served, no_traceback, marks):
    demo, address, uploads = served
    (fn,) = [fn for fn in demo.fns.values() if any(getattr(each, "elem_id", None) == HINTS for each in fn.inputs)]
    body = {"data": [*uploads, None, 0, 40, marks], "fn_index": fn._id, "session_hash": "visitor"}
    answer = post(address, "queue/join", body)
    assert answer.status_code == 422, answer.text
    verdict = answer.json()["detail"][-1]
    assert verdict["is_valid"] is False
    assert verdict["message"].startswith(
        "Hints must be two lists, one a photo, of at most 20 points [x, y, true or false]"
    )
    usable = {**body, "data": [*uploads, None, 0, 40, [[[0, 1, False]] * 20, []]]}
    assert post(address, "queue/join", usable).status_code == 200


POINT = [0, 5.5, 6, True]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (
            POINTS_OF_PROGRAMS,
            ["x", None, {}, [1], [[]], [POINT[:3]], [[*POINT, 1]], [["0", 1, 2, True]], [POINT] * 601],
        ),
        (POINTS_OF_PROGRAMS, [[[0, NAN, 6, True]], [[0, FAR, 6, True]], [[0, HUGE, 6, True]], [[0, 5, 6, 1]]]),
        (POINTS_OF_PROGRAMS, [[[-1, 5, 6, True]], [[0.0, 5, 6, True]], [[True, 5, 6, True]], [[0, True, 6, True]]]),
        (COLLECTION_HINTS, ["x", None, [MARK], [[MARK] * 21], [[]] * 31, [[[0.5, 1.01, True]]], [[[0.5, NAN, True]]]]),
        (ORDER, ["x", None, [0.0], [True], [-1], ["1"], [[0]], [NAN], [0] * 1001]),
    ],
)
def test_hints_and_orders_that_are_none(served, no_traceback, name, values):
    demo, address, _ = served
    fns = [fn for fn in demo.fns.values() if any(getattr(each, "elem_id", None) == name for each in fn.inputs)]
    assert fns
    for fn in fns:
        at = next(number for number, each in enumerate(fn.inputs) if getattr(each, "elem_id", None) == name)
        for value in values:
            data = [None] * len(fn.inputs)
            data[at] = value
            answer = post(address, "queue/join", {"data": data, "fn_index": fn._id, "session_hash": "visitor"})
            assert answer.status_code == 422, (value, answer.text)
            verdict = answer.json()["detail"][at]
            assert verdict["is_valid"] is False
            assert verdict["message"].split(" must be ")[0] in ("Hints", "Order")


def test_every_input_of_the_page_has_a_schema(served):
    """A component that is added later must be taught to `guard.py`."""
    for fn in served[0].fns.values():
        for component in fn.inputs:
            assert isinstance(component, gr.State) or _schema(component)[1], component


@pytest.mark.parametrize(
    ("function", "question", "status"),
    [
        ("viewer_transfer", {"id": "x", "point": [1, 2], "side": 0}, 200),
        ("viewer_transfer", {"id": "x", "point": [1, FAR], "side": 0}, 422),
        ("viewer_transfer", {"id": "x", "point": [1, HUGE], "side": 0}, 422),
        ("viewer_transfer", {"id": "x", "point": [1, 2, 3], "side": 0}, 422),
        ("viewer_transfer", {"id": "x", "point": [1, "2"], "side": 0}, 422),
        ("viewer_transfer", {"id": "x", "point": [1, 2], "side": -1}, 422),
        ("viewer_transfer", {"id": "x", "point": [1, 2], "side": FAR}, 422),
        ("viewer_transfer", {"id": ["x"], "point": [1, 2], "side": 0}, 422),
        ("viewer_transfer", None, 422),
        ("viewer_grid", {"id": "x"}, 200),
        ("viewer_heat", {"id": "x", "point": [1, 2], "side": 0}, 200),
        ("viewer_heat", {"id": "x", "point": [1, 2], "side": 2}, 422),
        ("collection_transfer", {"id": "x", "point": [1, 2], "image": 3}, 200),
        ("collection_transfer", {"id": "x", "point": [1, 2], "image": -1}, 422),
        ("viewer_layers", {"id": "x", "mode": "masks"}, 200),
        ("viewer_layers", {"id": "x", "mode": "passwords"}, 422),
        ("viewer_layers", {"id": "x"}, 422),
        ("viewer_grid", [], 422),
        ("preprocess", {"id": "x"}, 404),
    ],
)
def test_questions_of_the_viewer(served, no_traceback, function, question, status):
    demo, address, _ = served
    place = "points" if function == "collection_transfer" else "viewer"
    (viewer,) = [block for block in demo.blocks.values() if getattr(block, "elem_id", None) == place]
    body = {"data": question, "component_id": viewer._id, "session_hash": "s", "fn_name": function}
    answer = post(address, "component_server", body)
    assert answer.status_code == status, answer.text
    assert ("no longer available" in answer.text) == (status == 200)
    for number in (99_999, "1", None, True):
        assert post(address, "component_server", {**body, "component_id": number}).status_code == 404
    assert post(address, "component_server", {**body, "session_hash": None}).status_code in (404, 422)


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("POST", "gradio_api/process_recording"),
        ("POST", "//gradio_api/process_recording"),
        ("GET", "gradio_api/deep_link?session_hash=x"),
        ("GET", "monitoring"),
        ("GET", "monitoring/summary"),
        ("GET", "gradio_api/proxy=https://example.hf.space"),
        ("POST", "gradio_api/vibe-edit/"),
        ("GET", "gradio_api/vibe-code"),
        ("POST", "gradio_api/stream/x"),
        ("POST", "login"),
        ("GET", "gradio_api/dev/reload"),
    ],
)
def test_routes_that_the_page_does_not_need_are_closed(served, no_traceback, method, route):
    assert httpx.request(
        method, f"{served[1]}/{route}", files={"video": b"x"} if method == "POST" else None
    ).status_code in (404, 405)


def test_nothing_was_written_by_what_was_refused(served):
    folder = Path(served[0].app.uploaded_file_dir)
    assert len([path for path in folder.rglob("*") if path.is_file() and "deep_link" not in str(path)]) >= 2
    assert not list(folder.rglob("deep_links"))
    assert not list(folder.rglob("*.mp4"))


def test_a_null_byte_in_an_address(served, no_traceback):
    assert httpx.get(f"{served[1]}/gradio_api/file=a%00b.jpg").status_code == 400


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:1234", 200),
        ("[::1]:80", 200),
        ("evil.example.org", 400),
        ("127.0.0.1.evil.org", 400),
        ("", 400),
    ],
)
def test_the_host_must_be_this_machine(served, host, status):
    """Else a page of another site leads its own name here, and reads what the demo answers."""
    for method, route in (("GET", "config"), ("POST", "gradio_api/call/transfer_points")):
        headers = {"Host": host, "Origin": f"http://{host}"}
        answer = httpx.request(method, f"{served[1]}/{route}", headers=headers, json={} if method == "POST" else None)
        assert answer.status_code == (status if method == "GET" or status == 400 else 400)
        if status == 400:
            assert answer.text == "Invalid host header"


@pytest.mark.parametrize(
    ("host", "allowed", "expected"),
    [
        ("127.0.0.1", None, ["127.0.0.1", "localhost", "::1", "[::1]"]),
        ("0.0.0.0", None, ["*"]),
        ("0.0.0.0", ["demo.example.org"], ["demo.example.org"]),
        ("127.0.0.1", ["*"], ["*"]),
    ],
)
def test_allowed_hosts(monkeypatch, host, allowed, expected):
    seen = {}

    class Page:
        def launch(self, **options):
            seen.update(options)
            return None, "address", None

    app.serve(Page(), host, allowed_hosts=allowed)
    middleware = seen["app_kwargs"]["middleware"][0]
    assert middleware.kwargs["allowed_hosts"] == expected
    assert App(**{**seen["app_kwargs"], "dependencies": []})  # gradio passes these on
