"""The moves of a reader."""

import json


class Chat:
    """The page as a reader uses it. `requests` holds the bodies that it posted, `errors` what went wrong in scripts."""

    def __init__(self, page, url):
        self.page, self.url, self.requests, self.errors = page, url, [], []
        page.on("request", lambda r: self.requests.append(json.loads(r.post_data)) if r.method == "POST" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.set_default_timeout(10_000)
        page.goto(url)
        self.ready()

    def ready(self):
        self.page.wait_for_selector("#model option", state="attached")

    def reload(self):
        self.page.reload()
        self.ready()

    def send(self, text):
        self.page.fill("#composer", text)
        self.page.click("#send")
        self.page.wait_for_selector(".message.assistant")

    def finished(self, timeout=20_000):
        self.page.wait_for_selector("#send:visible", timeout=timeout)

    def ask(self, text):
        """Sends a message, waits for the end of the answer, returns its element."""
        self.send(text)
        self.finished()
        return self.answer

    @property
    def answer(self):
        return self.page.locator(".message.assistant").last

    @property
    def prose(self):
        return self.answer.locator(":scope > .prose")

    def button(self, name):
        return self.answer.get_by_role("button", name=name, exact=True)

    def set(self, **fields):
        """Changes settings in their dialog."""
        self.page.click("#open-settings")
        for name, value in fields.items():
            field = self.page.locator(f'#settings-dialog [name="{name.replace("tool_", "tool-")}"]')
            if isinstance(value, bool):
                field.set_checked(value)
            elif field.evaluate("e => e.tagName") == "SELECT":
                field.select_option(value)
            else:
                if name == "ownTools":
                    self.page.locator("#settings-dialog details").evaluate("e => { e.open = true; }")
                field.fill(value)
        self.page.click("#settings-dialog button[type=submit]")

    def artifact(self):
        """The document that runs in the panel."""
        self.page.wait_for_selector(".artifact-frame iframe")
        return self.page.frame_locator(".artifact-frame iframe")
