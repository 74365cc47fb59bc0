"""``obmlite serve`` in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any


def ask(url: str, body: Any = None) -> Any:
    """What a URL is answered, as JSON; sent as JSON, if anything is."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as reply:
        return json.loads(reply.read() or b"null")


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.02)


class Program:
    """``obmlite serve`` in a process of its own, and the lines that it prints."""

    def __init__(self, *arguments: object) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "obmlite", "serve", *map(str, arguments), "--port", "0", "--poll", "0.05"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.lines.append(line.rstrip())

    def said(self, text: str) -> bool:
        """Whether a text is in one of its lines."""
        assert self.process.poll() is None or any(text in line for line in self.lines), self.lines
        return any(text in line for line in self.lines)

    def _listening(self) -> re.Match[str]:
        until(lambda: self.said("listening at"))
        found = re.search(r"listening at (http://127\.0\.0\.1:\d+)(?:, gRPC at (\S+))?", "\n".join(self.lines))
        assert found is not None
        return found

    @property
    def url(self) -> str:
        """Of its REST application."""
        return self._listening()[1]

    @property
    def grpc_address(self) -> str:
        """Of its gRPC, which it was asked for."""
        return self._listening()[2]

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
