"""A server and a browser for the tests of what visitors see. What needs gradio or playwright is imported inside."""

import pytest


@pytest.fixture(scope="module")
def matcher():
    """The models of the server, which count what they are asked."""
    from demo_server import CountingMatcher

    return CountingMatcher()


@pytest.fixture(scope="module")
def demo(matcher):
    """The page."""
    import app

    matcher.load()
    demo = app.build_demo(matcher)
    yield demo
    demo.close(verbose=False)


@pytest.fixture(scope="module")
def address(demo):
    import app

    return app.serve(demo)


@pytest.fixture(scope="module")
def browser():
    from demo_browser import CHROMIUM, USUAL
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a green one
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        browser.usual = browser.new_context(**USUAL)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    from demo_browser import close_page, open_page

    page = open_page(browser, address)
    yield page
    close_page(page, address)
