"""A page for people: what is served, how it does, and a form that sends an example request."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import importlib.resources
import re
import string
import threading
import time
from collections import defaultdict, deque
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from obmlite._version import __version__
from obmlite.errors import ObmliteError
from obmlite.serving import _json
from obmlite.serving._requests import PathRoute
from obmlite.serving.interface import Interface
from obmlite.serving.observer import Silent
from obmlite.serving.repository import Repository
from obmlite.serving.servable import DEFAULT, Servable, State
from obmlite.serving.status import Code

__all__ = ["route"]

_CALLS = 512  # of a model, over which times are shown
_REQUEST = 64 << 10  # bytes of an example that the form is filled with


def route(repository: Repository) -> PathRoute:
    """The page, at ``/``."""
    calls = _Calls()
    repository.observe(calls)

    async def page(request: Request) -> Response:
        models = "\n".join(_model(repository, name, calls) for name in repository.names())
        text = _template().substitute(version=html.escape(__version__), models=models or "<p>No models.</p>")
        return HTMLResponse(text, headers={"Content-Security-Policy": _policy(), "Cache-Control": "no-store"})

    return PathRoute("GET", "/?", page)


@functools.cache
def _template() -> string.Template:
    return string.Template(importlib.resources.files("obmlite.serving").joinpath("_page.html").read_text("utf-8"))


@functools.cache
def _policy() -> str:
    """Nothing runs but the script that stands in the page, whatever a package's names are."""
    text = _template().substitute(version="", models="")
    hashes = {}
    for tag in ("script", "style"):
        [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    return (
        f"default-src 'none'; connect-src 'self'; script-src 'sha256-{hashes['script']}'; "
        f"style-src 'sha256-{hashes['style']}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Calls(Silent):
    """The last calls of each model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_CALLS))
        self._counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def request(self, model: str, version: int, signature: str, code: Code, seconds: float, rows: int | None) -> None:
        """Notes a call."""
        with self._lock:
            self._counts[model][code is not Code.OK] += 1
            if code is Code.OK:
                self._seconds[model].append(seconds)

    def row(self, model: str) -> list[str]:
        """How many went well and how many did not, and the median and 99th percentile in milliseconds."""
        with self._lock:
            good, bad = self._counts[model]
            seconds = sorted(self._seconds[model])
        if not seconds:
            return [str(good), str(bad), "–", "–"]
        places = (len(seconds) // 2, len(seconds) * 99 // 100)
        return [str(good), str(bad), *(f"{seconds[place] * 1000:.2f} ms" for place in places)]


def _model(repository: Repository, name: str, calls: _Calls) -> str:
    slug = hashlib.sha256(name.encode()).hexdigest()[:12]
    labels = ", ".join(f"{label} = {version}" for label, version in sorted(repository.labels(name).items()))
    states = "".join(
        f"<tr><td>{status.version}</td><td class='{status.state.name}'>{status.state.name}</td>"
        f"<td>{html.escape(status.message)}</td></tr>"
        for status in repository.status(name)
    )
    numbers = "".join(f"<td class='number'>{text}</td>" for text in calls.row(name))
    heads = "".join(f"<th class='number'>{text}</th>" for text in ("Calls", "Errors", "Median", "99 %"))
    return (
        f"<section><h2>{html.escape(name)}</h2>"
        f"<div class='live' id='m{slug}'><table><tr><th>Version</th><th>State</th><th>Reason</th></tr>{states}</table>"
        f"{f'<p>Labels: {html.escape(labels)}</p>' if labels else ''}"
        f"<table><tr>{heads}</tr><tr>{numbers}</tr></table></div>{_served(repository, name)}</section>"
    )


def _served(repository: Repository, name: str) -> str:
    """The latest version's signatures and the form; nothing where none is served."""
    if not any(status.state is State.AVAILABLE for status in repository.status(name)):
        problem = repository.problem(name)
        return f"<p class='quiet'>No version is served. {html.escape(str(problem or ''))}</p>"
    try:
        with repository.acquire(name) as servable:
            return _signatures(servable) + _form(servable)
    except ObmliteError as error:  # it went in this moment
        return f"<p class='quiet'>{html.escape(str(error))}</p>"


def _signatures(servable: Servable) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(_title(servable, key))}</td>"
        f"<td>{_tensors(interface.inputs)}</td><td>{_tensors(interface.outputs)}</td></tr>"
        for key, interface in servable.interfaces.items()
        if key != DEFAULT or servable.default in ("", DEFAULT)
    )
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(servable.loaded_at))
    return (
        f"<p>Version {servable.version}, loaded at {when}.</p>"
        f"<table><tr><th>Signature</th><th>Inputs</th><th>Outputs</th></tr>{rows}</table>"
    )


def _title(servable: Servable, key: str) -> str:
    return f"{key} (default)" if key == servable.default else key


def _tensors(infos: Any) -> str:
    return "<br>".join(f"{html.escape(name)}: <code>{html.escape(info.text)}</code>" for name, info in infos.items())


def _form(servable: Servable) -> str:
    options = {
        key: example(servable, interface)
        for key, interface in servable.interfaces.items()
        if key != DEFAULT or servable.default in ("", DEFAULT)
    }
    texts = {key: _request(key, inputs, servable.interfaces[key]) for key, inputs in options.items()}
    choices = "".join(
        f"<option data-request='{html.escape(text, quote=True)}'{' selected' if key == servable.default else ''}>"
        f"{html.escape(key)}</option>"
        for key, text in texts.items()
    )
    first = texts.get(servable.default) or next(iter(texts.values()), "")
    action = f"v1/models/{_quoted(servable.name)}:predict"
    return (
        f"<form action='{html.escape(action, quote=True)}'>"
        f"<p><code>POST /{html.escape(action)}</code> "
        f"<label>signature <select name='signature'>{choices}</select></label></p>"
        f"<textarea name='request' aria-label='request' spellcheck='false'>\n{html.escape(first)}</textarea>"
        f"<p><button>Send</button> <span class='time quiet'></span></p><pre></pre></form>"
    )


def _quoted(name: str) -> str:
    return "".join(
        c if c.isascii() and (c.isalnum() or c in "-._~") else "".join(f"%{b:02X}" for b in c.encode()) for c in name
    )


def example(servable: Servable, interface: Interface) -> dict[str, Any] | None:
    """Inputs that a signature takes: the package's first example, or zeros; None where neither is known."""
    try:
        found = servable.model.examples.get(interface.name) if servable.model is not None else None
        return interface.named(found[0]) if found else next(interface.zeros(), None)
    except ObmliteError:
        return None


def _request(signature: str, inputs: dict[str, Any] | None, interface: Interface) -> str:
    if inputs is None or sum(array.nbytes for array in inputs.values()) > _REQUEST:
        inputs = {}
    value: dict[str, Any] = {"signature_name": signature}
    try:
        if interface.batched and len(inputs) == 1:
            [array] = inputs.values()
            value["instances"] = _json.writable(array)
        else:
            value["inputs"] = {name: _json.writable(array) for name, array in inputs.items()}
    except ObmliteError:  # a dtype that JSON lacks
        value["inputs"] = {}
    return _json.dumps(value).decode()
