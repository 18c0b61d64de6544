"""A browser, a server with a script, and the moves of a reader. Skipped where Playwright or Chromium is missing."""

import shutil

import pytest
from reader import Chat
from scripted_page import ScriptedServer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
    if CHROMIUM is None:
        pytest.skip("the page's tests need Debian's chromium")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield running
        running.close()


@pytest.fixture
def url():
    """The address of a server whose model says what `scripted.script` tells it to."""
    with ScriptedServer() as server:
        yield server.url


@pytest.fixture
def open_chat(browser, url):
    """Opens the page in a browser of its own; options are Playwright's of a context."""
    chats = []

    def open_with(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        chats.append(Chat(context.new_page(), url))
        return chats[-1]

    yield open_with
    for chat in chats:
        chat.page.context.close()
    assert [error for chat in chats for error in chat.errors] == []


@pytest.fixture
def chat(open_chat):
    return open_chat()
