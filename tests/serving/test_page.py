"""The page for people, as text and in a real browser."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")

import obmlite
from obmlite.serving import ModelConfig, Repository
from obmlite.serving.asgi import build_app
from obmlite.serving.server import Server

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def test_what_it_shows(client: Any) -> None:
    reply = client("GET", "/")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert policy.count("sha256-") == 2
    for text in ("half", "canary = 2, stable = 1", "AVAILABLE", "f32[b,3]", "POST /v1/models/many:predict", "Median"):
        assert text in reply.text
    assert "http://" not in reply.text, "it needs nothing from elsewhere"


def test_example_requests_are_good(client: Any) -> None:
    text = client("GET", "/").text
    forms = re.findall(r"<form action='([^']*)'>.*?<textarea[^>]*>\n(.*?)</textarea>", text, re.DOTALL)
    assert len(forms) == 5
    for action, request in forms:
        assert client("POST", f"/{action}", request.replace("&quot;", '"').encode()).status_code == 200, request


def test_names_are_only_text(tmp_path: pathlib.Path, new_client: Any) -> None:
    def fn(x: Any) -> Any:
        return x

    name = "<script>alert(1)</script>&'\""
    model = obmlite.Model.from_function(fn, obmlite.spec("f32[b]"), weights=None, name=name, platforms="cpu")
    model.save(tmp_path / "1")
    with Repository([ModelConfig("<b>'\"", str(tmp_path), labels={"<i>": 1})]) as own:
        own.scan()
        text = new_client(build_app(own))("GET", "/").text
    assert text.count("<script>") == 1
    assert "&lt;b&gt;&#x27;&quot;" in text
    assert "<b>" not in text
    assert "<i>" not in text
    assert "%3Cb%3E%27%22:predict" in text


def test_without_versions(tmp_path: pathlib.Path, new_client: Any) -> None:
    own = Repository([ModelConfig("none", str(tmp_path / "nothing"))])
    assert "No version is served." in new_client(build_app(own))("GET", "/").text
    assert new_client(build_app(own, page=False))("GET", "/").status_code == 404


class Browser:
    """A page in headless Chromium, driven by the DevTools protocol over a pair of pipes."""

    def __init__(self, program: str, profile: pathlib.Path) -> None:
        command_read, self._write = os.pipe()
        read, reply_write = os.pipe()
        # The browser wants them as descriptors 3 and 4; from above these they cannot be in each other's way.
        given = [fcntl.fcntl(own, fcntl.F_DUPFD, 10) for own in (command_read, reply_write)]
        moved = f"import os, sys; os.dup2({given[0]}, 3); os.dup2({given[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--window-size=1000,900",
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", moved, program, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            pass_fds=given,
            stderr=subprocess.DEVNULL,
        )
        for own in (command_read, reply_write, *given):
            os.close(own)
        self._replies = os.fdopen(read, "rb")
        self._number, self._session, self._rest = 0, "", b""
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """A command's result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps({**message, **session}).encode() + b"\0")
        while (reply := self._next()).get("id") != self._number:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self._replies.read1(1 << 16)
            assert more, "the browser ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def evaluate(self, expression: str) -> Any:
        """A JavaScript expression's value; a promise's, once it has one."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        """Waits for a JavaScript expression to hold."""
        deadline = time.monotonic() + 30
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, self.evaluate("document.body.innerText")
            time.sleep(0.05)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._write)
        self._replies.close()


@pytest.fixture
def browser(tmp_path: pathlib.Path) -> Iterator[Browser]:
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    made = Browser(program, tmp_path / "profile")
    yield made
    made.close()


def test_in_a_browser(models: pathlib.Path, tmp_path: pathlib.Path, browser: Browser) -> None:
    """The page's own script sends the example and shows the answer, under its content security policy."""
    names = ("half", "many")
    own = Repository([ModelConfig(name, str(models / name)) for name in names])
    own.scan()
    with Server(own, port=0) as server:
        browser.send("Page.navigate", url=server.url)
        browser.until("document.readyState == 'complete' && document.forms.length == 2")
        browser.evaluate("document.forms[0].querySelector('button').click()")
        browser.until("document.forms[0].querySelector('pre').textContent != ''")
        assert browser.evaluate("document.forms[0].querySelector('pre').textContent") == '{"predictions":[2.5,3.0,4.5]}'
        assert re.fullmatch(r"200 in [0-9.]+ ms", browser.evaluate("document.querySelector('.time').textContent"))
        browser.until("document.querySelector('.live td.number').textContent == '1'")  # the tables follow by themselves
        browser.evaluate("document.forms[1].request.value = '{}'; document.forms[1].querySelector('button').click()")
        browser.until("document.forms[1].querySelector('pre.bad') != null")
        assert "Missing 'inputs' or 'instances' key" in browser.evaluate("document.forms[1].innerText")
        colour = "getComputedStyle(document.querySelector('.AVAILABLE')).color"
        assert browser.evaluate(colour) == "rgb(26, 127, 55)", "the style sheet is applied"
        if "OBMLITE_SCREENSHOT" in os.environ:
            shot = browser.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
            pathlib.Path(os.environ["OBMLITE_SCREENSHOT"]).write_bytes(base64.b64decode(shot))
    wrong = [e for e in browser.events if e["method"] == "Runtime.exceptionThrown" or "Log.entryAdded" in e["method"]]
    texts = [str(event) for event in wrong]
    assert not [text for text in texts if "Content Security Policy" in text or "exceptionThrown" in text], texts
