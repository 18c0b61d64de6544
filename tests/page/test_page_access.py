"""The page for everybody: by keyboard, on a phone, in the dark, read aloud, and without violations by axe."""

# ruff: noqa: E501 -- lines of HTML and script stay whole

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="session")
def axe():
    """axe-core from npm, kept in the temporary folder between runs."""
    kept = Path(tempfile.gettempdir()) / "axe-core-4.14.1"
    script = kept / "package" / "axe.min.js"
    if not script.exists():
        if shutil.which("npm") is None:
            pytest.skip("axe-core is fetched with npm")
        kept.mkdir(exist_ok=True)
        packed = subprocess.run(["npm", "pack", "-s", "axe-core@4.14.1"], cwd=kept, capture_output=True, text=True, timeout=60)
        if packed.returncode:
            pytest.skip("axe-core could not be fetched from npm")
        subprocess.run(["tar", "xzf", packed.stdout.split()[-1]], cwd=kept, check=True)
    return script.read_text()


def violations(chat, axe):
    chat.page.wait_for_timeout(400)  # colours fade in
    chat.page.evaluate(axe)
    found = chat.page.evaluate("axe.run(document, {iframes: false}).then((result) => result.violations)")
    return [(each["id"], [node["html"][:120] for node in each["nodes"]][:3]) for each in found]


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_axe_finds_nothing(open_chat, axe, look):
    chat = open_chat(**(PHONE if look == "phone" else {"color_scheme": look}))
    assert violations(chat, axe) == []
    chat.ask("think about it")
    chat.answer.locator("summary").click()
    chat.ask("markdown # Title\n\nSome `code`, [a link](https://example.org)\n\n```python\n# why\nx = 'a' + str(1)\n```\n\n| a |\n|---|\n| 1 |\n\n$x^2$")
    chat.button("Regenerate").click()
    chat.answer.get_by_text("2/2").wait_for()
    chat.ask("weather")
    chat.ask("limit")
    chat.ask("refused")
    assert violations(chat, axe) == []
    for opener, dialog in [("#open-settings", "#settings-dialog"), ("#open-keys", "#keys-dialog"), ("#sidebar .open-gallery", "#gallery-dialog")]:
        if look == "phone" and not chat.page.locator("#sidebar").is_visible():
            chat.page.click("#toggle-sidebar")
        chat.page.click(opener)
        assert violations(chat, axe) == []
        chat.page.locator(dialog).get_by_role("button", name="Close").or_(chat.page.locator(dialog + " .cancel")).first.click()
    if look == "phone":
        assert violations(chat, axe) == []
        chat.page.keyboard.press("Escape")
        chat.page.locator("#sidebar").wait_for(state="hidden")
    chat.ask("artifact")
    chat.button("Open").click()
    chat.artifact().get_by_text("tock").wait_for()
    assert violations(chat, axe) == []
    chat.page.click("#tab-code")
    assert violations(chat, axe) == []


def test_everything_by_keyboard(chat):
    press = chat.page.keyboard.press
    press("Tab")
    assert chat.page.evaluate("document.activeElement.className") == "skip"
    press("Enter")
    assert chat.page.evaluate("document.activeElement.id") == "composer"
    chat.page.keyboard.type("one")
    press("Shift+Enter")
    chat.page.keyboard.type("two")
    assert chat.page.input_value("#composer") == "one\ntwo"
    press("Enter")
    chat.prose.get_by_text("You said: one").wait_for()
    chat.finished()
    press("Control+Shift+o")
    assert chat.page.evaluate("document.activeElement.id") == "composer"
    chat.page.keyboard.type("three")
    press("Control+Enter")
    chat.prose.get_by_text("You said: three").wait_for()
    press("Control+k")
    assert chat.page.evaluate("document.activeElement.id") == "search"
    chat.page.locator("#scroller").focus()
    press("?")
    chat.page.locator("#keys-dialog").wait_for()
    press("Escape")
    chat.page.locator("#keys-dialog").wait_for(state="hidden")
    press("/")
    assert chat.page.evaluate("document.activeElement.id") == "composer"
    assert chat.page.input_value("#composer") == ""
    press("Control+,")
    chat.page.locator("#settings-dialog").wait_for()


def test_enter_can_be_for_new_lines(chat):
    chat.set(enterSends=False)
    chat.page.focus("#composer")
    chat.page.keyboard.type("a")
    chat.page.keyboard.press("Enter")
    chat.page.keyboard.type("b")
    assert chat.page.input_value("#composer") == "a\nb"
    chat.page.keyboard.press("Control+Enter")
    chat.prose.get_by_text("You said: a").wait_for()


def test_focus_is_seen(chat):
    for _ in range(12):
        chat.page.keyboard.press("Tab")
        outline = chat.page.evaluate("""() => {
          const seen = (e) => getComputedStyle(e).outlineStyle !== 'none' && parseFloat(getComputedStyle(e).outlineWidth) >= 1;
          const e = document.activeElement;
          return seen(e) || seen(e.closest('form') ?? e) ? '' : e.outerHTML.slice(0, 80);
        }""")
        assert outline == ""


def test_on_a_phone_the_sidebar_is_a_drawer_and_the_panel_a_sheet(open_chat):
    chat = open_chat(**PHONE)
    assert chat.page.locator("#sidebar").is_hidden()
    chat.page.click("#toggle-sidebar")
    chat.page.locator("#sidebar").wait_for()
    chat.page.mouse.click(380, 500)
    chat.page.locator("#sidebar").wait_for(state="hidden")
    chat.ask("artifact")
    chat.button("Open").click()
    chat.artifact().get_by_text("tock").wait_for()
    assert chat.page.locator("#artifact").bounding_box() == {"x": 0, "y": 0, "width": 390, "height": 844}
    assert chat.page.locator("#chat").get_attribute("inert") is not None
    chat.page.click(".artifact-close")
    assert chat.page.locator("#chat").get_attribute("inert") is None
    chat.ask("markdown | " + " | ".join("column" * 2 for _ in range(9)) + " |\n" + "|---" * 9 + "|\n\n`" + "x" * 200 + "`\n\n```\n" + "y" * 200 + "\n```")
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert chat.page.evaluate("document.querySelector('#scroller').scrollWidth <= document.querySelector('#scroller').clientWidth")


@pytest.mark.parametrize(("system", "chosen", "dark"), [("light", "system", False), ("dark", "system", True), ("dark", "light", False), ("light", "dark", True)])
def test_light_and_dark(open_chat, system, chosen, dark):
    chat = open_chat(color_scheme=system)
    chat.set(theme=chosen)
    chat.reload()
    red = chat.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert (int(red) < 100) == dark


def test_reduced_motion(open_chat):
    chat = open_chat(reduced_motion="reduce")
    chat.send("slow")
    chat.prose.get_by_text("one").wait_for()
    assert chat.page.evaluate("document.getAnimations().length") == 0


def test_the_page_needs_nothing_from_elsewhere(chat):
    addresses = []
    chat.page.on("request", lambda request: addresses.append(request.url))
    chat.reload()
    chat.ask("markdown $x$\n\n```js\n1\n```")
    assert addresses
    assert [address for address in addresses if not address.startswith((chat.url, "data:", "blob:"))] == []
