"""The page as `mimoflash serve` serves it, and the rules that its files come with."""

import httpx
import pytest
from reader import Chat
from scripted import ScriptedEngine, served

from mimoflash.text import train_tokenizer

HTML = "<!doctype html><title>A sign</title><h1>open</h1><script>document.body.firstChild.textContent = 'ran'</script>"


@pytest.fixture
def address():
    tokenizer = train_tokenizer(["What is the weather in Paris? "] * 20, 300)
    engine = ScriptedEngine(tokenizer, lambda _: f"<think>A sign.</think>Here:\n\n```html\n{HTML}\n```\n", seconds=0.01)
    with served({"scripted": engine}) as url:
        yield url


def test_an_answer_and_its_artifact(browser, address):
    context = browser.new_context()
    chat = Chat(context.new_page(), address)
    chat.page.get_by_role("button", name="Thinking").click()
    chat.ask("Make a sign.")
    assert "Thought for" in chat.answer.inner_text()
    chat.answer.get_by_role("button", name="Open").click()
    assert chat.artifact().locator("h1").inner_text() == "ran"
    context.close()
    assert chat.errors == []


def test_files_come_with_their_rules(address):
    page = httpx.get(f"{address}/")
    assert "script-src 'self';" in page.headers["content-security-policy"]
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    artifact = httpx.get(f"{address}/page/artifact.html").headers
    assert artifact["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none';")
    assert artifact["connection-allowlist"] == "()"
    for file, kind in (("app.js", "text/javascript"), ("icon.svg", "image/svg+xml"),
                       ("vendor/katex/fonts/KaTeX_Main-Regular.woff2", "font/woff2")):
        assert httpx.get(f"{address}/page/{file}").headers["content-type"].split(";")[0] == kind
    for nothing in ("../app.py", "..%2fapp.py", "%2e%2e/app.py", "vendor", "", "nix.js", "/etc/passwd"):
        assert httpx.get(f"{address}/page/{nothing}").status_code == 404
