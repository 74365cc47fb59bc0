"""Under which JAX the tests run, and what several files look at."""

from typing import Any

import jax
import jaxlib
import pytest

from obmlite.io.chunked import Chunks


def pytest_report_header() -> str:
    return f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, {len(jax.devices())} x {jax.default_backend()}"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each chunk that was hashed."""
    seen: list[int] = []
    real = Chunks._compare

    def spy(self: Chunks, chunk: Any, found: bytes) -> None:
        seen.append(chunk.end - chunk.start)
        real(self, chunk, found)

    monkeypatch.setattr(Chunks, "_compare", spy)
    return seen
