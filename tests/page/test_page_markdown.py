"""What a model writes: rendered, and never script."""

# ruff: noqa: E501 -- lines of HTML and script stay whole

import json

import pytest

RICH = r"""# Title

A **bold** and *slanted* word, `code`, ~~gone~~, [a link](https://example.org/a).

| a | b |
|---|--:|
| 1 | 2 |

- [x] done

Inline $e^{i\pi} + 1 = 0$ and \(x\), but $5 and $6 are money.

$$\int_0^1 x\,dx = \tfrac12$$

```python
def f(x):
    return x + 1
```
"""


def test_markdown_code_and_formulas(chat):
    chat.ask("markdown " + RICH)
    prose = chat.prose
    assert prose.locator("h3").inner_text() == "Title"
    assert prose.locator("td").all_inner_texts() == ["1", "2"]
    assert prose.locator(".katex").count() == 3
    assert prose.locator(".katex-display").count() == 1
    assert "$5 and $6 are money" in prose.inner_text()
    assert prose.locator(".hljs-keyword").all_inner_texts() == ["def", "return"]
    link = prose.locator("a").first
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert link.get_attribute("target") == "_blank"
    assert chat.page.evaluate("document.fonts.size") > 0
    loaded = "document.fonts.load('16px KaTeX_Main').then((fonts) => fonts.length)"
    assert chat.page.evaluate(loaded) == 1  # the vendored font is found


ATTACKS = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror=window.hacked=1>",
    "<svg onload=window.hacked=1><script>window.hacked=1</script></svg>",
    "[click](javascript:window.hacked=1)",
    "[click](JaVaScRiPt&colon;window.hacked=1)",
    "[click](data:text/html,<script>parent.hacked=1</script>)",
    "<a href='javascript:window.hacked=1'>click</a>",
    "![x](x\" onerror=\"window.hacked=1)",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror=window.hacked=1&gt;\">",
    "<form action=/v1/models><input name=attributes><button>click</button></form>",
    "<b onclick=window.hacked=1 class=composer id=composer style='position:fixed;inset:0'>click</b>",
    "<details open ontoggle=window.hacked=1>x</details>",
    "<span data-tex='\\href{javascript:window.hacked=1}{click}'></span>",
    "$\\href{javascript:window.hacked=1}{click}$",
    "$\\htmlData{x=1}{y} \\includegraphics{http://127.0.0.1:9/x.png}$",
    "$<img src=x onerror=window.hacked=1>$",
    "```html\"><img src=x onerror=window.hacked=1>\n<script>window.hacked=1</script>\n```",
    "`<img src=x onerror=window.hacked=1>`",
    "<https://example.org/\"onmouseover=window.hacked=1>",
    "| a |\n|---|\n| <img src=x onerror=window.hacked=1> |",
    "<base href=http://127.0.0.1:9/><link rel=stylesheet href=http://127.0.0.1:9/x.css><meta http-equiv=refresh content=0>",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_models_text_never_becomes_script(chat, attack):
    elsewhere = []
    chat.page.on("request", lambda r: None if r.url.startswith(chat.url) else elsewhere.append(r.url))
    chat.ask("markdown Look: " + attack + "\n\n" + attack + "\n\nend of it")
    chat.prose.get_by_text("end of it").last.wait_for()
    found = chat.prose.evaluate("""e => [...e.querySelectorAll('*')].flatMap((n) => [
        ['SCRIPT', 'IFRAME', 'FORM', 'INPUT', 'IMG', 'OBJECT', 'EMBED', 'STYLE', 'LINK', 'META', 'BASE'].includes(n.tagName.toUpperCase()) ? n.tagName : '',
        ...[...n.attributes].filter((a) => a.name.startsWith('on') || a.name === 'id' || /^\\s*(javascript|data|vbscript):/i.test(a.value)).map((a) => a.name),
    ]).filter(Boolean)""")
    assert found == []
    for target in chat.prose.get_by_text("click").all():
        if target.is_visible() and target.evaluate("e => e.tagName") in ("B", "BUTTON"):
            target.click()
    assert chat.page.evaluate("window.hacked") is None
    assert elsewhere == []


def test_a_title_and_a_user_message_are_text(chat):
    chat.ask("<img src=x onerror=window.hacked=1>")
    assert chat.page.locator("#title").inner_text() == "<img src=x onerror=window.hacked=1>"
    assert chat.page.locator("#thread img, #sidebar li img").count() == 0
    assert chat.page.evaluate("window.hacked") is None


def test_remote_images_are_links(chat):
    chat.ask("markdown ![a cat](https://example.org/cat.png)")
    assert chat.prose.locator("img").count() == 0
    assert chat.prose.locator("a").inner_text() == "Image: a cat"


@pytest.mark.parametrize("step", [1, 2, 7])
def test_any_cut_of_the_text_ends_the_same(chat, step):
    text = json.dumps(RICH + "\n<!doctype html>\n<html><body>\n\n<p>x\n</html>\nafter\n\n~~~\nopen")
    same = chat.page.evaluate(f"""async () => {{
        const {{ GrowingMarkdown }} = await import('/page/markdown.js');
        const text = {text}, [grown, whole] = [document.createElement('div'), document.createElement('div')];
        const growing = new GrowingMarkdown(grown);
        for (let at = 1; at < text.length; at += {step}) growing.update(text.slice(0, at));
        growing.finish(text);
        new GrowingMarkdown(whole).finish(text);
        return grown.innerHTML === whole.innerHTML ? 'same' : [grown.innerHTML, whole.innerHTML];
    }}""")
    assert same == "same"
