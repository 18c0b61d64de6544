"""A server that says fixed things: the page's folder with its headers, and the chat API with a script for each prompt.

The last user message chooses the script by its first word (see `script`). What it was asked is kept in `requests`.
"""

# ruff: noqa: E501 -- lines of HTML and script stay whole

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).parents[2] / "mimoflash" / "serve" / "page"
TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml", ".woff2": "font/woff2", ".md": "text/markdown; charset=utf-8",
}
PAGE_POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src *; frame-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'"
)
ARTIFACT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; media-src data: blob:; form-action 'none'; base-uri 'none'"
)

CLOCK = "<!doctype html>\n<html><head><title>A clock</title></head><body><h1 id=t>tick</h1>\n<script>t.textContent = 'tock'</script></body></html>"


def say(text, pause=0.0, size=6):
    """Deltas of a text, a few characters each."""
    for at in range(0, len(text), size):
        yield {"content": text[at : at + size]}, pause


def think(text, pause=0.01):
    for at in range(0, len(text), 8):
        yield {"reasoning_content": text[at : at + 8]}, pause


def call(index, name, arguments, call_id):
    yield {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}]}, 0
    for at in range(0, len(arguments), 3):
        yield {"tool_calls": [{"index": index, "function": {"arguments": arguments[at : at + 3]}}]}, 0


def script(body):
    """Yields (delta, pause) and at last a finish reason, or an error to send in the middle."""
    messages = body["messages"]
    last = messages[-1]
    if last["role"] == "tool":
        results = [message["content"] for message in messages if message["role"] == "tool"]
        asked = next(message["content"] for message in reversed(messages) if message["role"] == "user")
        if asked.startswith("forever"):
            yield from call(0, "calculator", '{"expression": "1+1"}', f"call_{len(results)}")
            yield "tool_calls"
        else:
            yield from say("The tool said: " + "; ".join(results))
            yield "stop"
        return
    if body.get("continue_final_message"):
        yield from say(" and the rest of it.")
        yield "stop"
        return
    word, _, rest = last["content"].partition(" ")
    if word == "think":
        yield from think("First I look at the question. Then I answer it.", 0.02)
        yield from say("The answer is **42**.")
    elif word == "markdown":
        yield from say(rest)
    elif word == "artifact":
        yield from say("Here it is:\n\n```html\n" + CLOCK + "\n```\n\nEnjoy.", 0.002)
    elif word == "slowartifact":
        yield from say("Here it is:\n\n```html\n" + CLOCK, 0.03)
        yield from say("\n```\n\n" + "And more is said. " * 10, 0.05)
    elif word == "html":  # a document of the asker's
        yield from say("```html\n" + rest + "\n```", size=500)
    elif word == "bare":
        yield from say(CLOCK)
    elif word == "long":
        yield from say("\n\n".join(f"Paragraph {n} says something that takes a line or two of the page." for n in range(200)), 0.004, 40)
    elif word == "slow":
        yield from say("one two three four five six seven eight nine ten " * 10, 0.03, 5)
    elif word == "calculate":
        yield from call(0, "calculator", json.dumps({"expression": rest}), "call_a")
        yield from call(1, "current_date_and_time", "{}", "call_b")
        yield "tool_calls"
        return
    elif word == "weather":
        yield from call(0, "weather", '{"city": "Bern"}', "call_w")
        yield "tool_calls"
        return
    elif word == "forever":
        yield from call(0, "calculator", '{"expression": "1+1"}', "call_0")
        yield "tool_calls"
        return
    elif word == "limit":
        yield from say("This was cut")
        yield "length"
        return
    elif word == "broken":
        yield from say("Half an answer")
        yield {"message": "the engine stopped", "type": "server_error", "param": None, "code": None}
        return
    elif word == "cut":
        yield from say("Half an answer", 0.01)
        yield "cut"
        return
    else:
        yield from say(f"You said: {last['content']}")
    yield "stop"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/v1/models":
            self._json(200, {"data": [
                {"id": "tiny", "object": "model", "created": 0, "owned_by": "test", "context_length": 4096, "mtp_layers": 3},
                {"id": "other", "object": "model", "created": 0, "owned_by": "test"},
            ]})
            return
        file = PAGE / ("index.html" if path == "/" else path.removeprefix("/page/"))
        inside = file.resolve().is_relative_to(PAGE) and (path == "/" or path.startswith("/page/"))
        if not inside or not file.is_file():
            self._json(404, {"error": {"message": "not found", "type": "not_found", "param": None, "code": None}})
            return
        artifact = path == "/page/artifact.html"
        self._send(200, file.read_bytes(), {
            "Content-Type": TYPES.get(file.suffix, "text/plain; charset=utf-8"),
            "Content-Security-Policy": ARTIFACT_POLICY if artifact else PAGE_POLICY,
            **({"Connection-Allowlist": "()"} if artifact else {}),
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
            **self.server.page_headers.get(path, {}),
        })

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((body, dict(self.headers)))
        asked = str(body["messages"][-1]["content"]).split(" ")[0]
        refusals = {"locked": (401, "no such API key", {}), "busy": (429, "the queue is full", {"Retry-After": "2"}),
                    "refused": (400, "temperature: must be at most 2", {})}
        if asked == "locked" and self.headers.get("Authorization") == "Bearer right":
            asked = "hello"
        if asked in refusals and not (asked == "busy" and self.server.busy_once.pop(asked, None)):
            status, message, headers = refusals[asked]
            if asked == "busy":
                self.server.busy_once[asked] = True  # the second attempt is served
            self._json(status, {"error": {"message": message, "type": "x", "param": None, "code": None}}, headers)
            return
        self._stream(body)

    def _stream(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        tokens, start = 0, time.monotonic()
        try:
            for step in script(body):
                if isinstance(step, tuple):
                    tokens += 1
                    self._event({"choices": [{"index": 0, "delta": step[0], "finish_reason": None}]})
                    time.sleep(step[1])
                elif step == "cut":
                    return
                elif isinstance(step, dict):
                    self._event({"error": step})
                else:
                    self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": step}]})
                    self._event({"choices": [], "usage": {
                        "prompt_tokens": 100, "completion_tokens": tokens, "total_tokens": 100 + tokens,
                        "prompt_tokens_details": {"cached_tokens": 64}, "completion_tokens_details": {"reasoning_tokens": 0},
                    }, "timings": {
                        "prompt_n": 36, "prompt_ms": 12.0, "prompt_per_second": 3000.0, "predicted_n": tokens,
                        "predicted_ms": 1000 * (time.monotonic() - start), "predicted_per_second": 123.4, "accept_length": 2.61,
                    }})
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.server.disconnects += 1

    def _event(self, data):
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _json(self, status, data, headers=()):
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json", **dict(headers)})

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class ScriptedServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.requests, self.busy_once, self.page_headers, self.disconnects = [], {}, {}, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


if __name__ == "__main__":
    server = ScriptedServer(8123)
    print(server.url)
    server.serve_forever()
