"""The crafted safetensors files: what the format forbids, one thing each, and what is only odd."""

from __future__ import annotations

import json

from tests.io.test_safetensors import ACCEPTED, REFUSED, STRICTER, pack


def _overlapping(count: int) -> bytes:
    """Many large tensors over the same bytes: a reader that copies each takes far more memory than the file has."""
    entry = {"dtype": "F32", "shape": [200, 200], "data_offsets": [0, 160_000]}
    return pack(json.dumps({f"t{n:05}": entry for n in range(count)}), bytes(160_000))


FORBIDDEN: dict[str, tuple[bytes, str, str | None]] = {
    **REFUSED,
    **STRICTER,
    "2,000 tensors over the same bytes": (_overlapping(2000), "data_offsets", "t00001"),
}
"""What it is → (the file, the field that its refusal names, and the tensor)."""

ODD: dict[str, bytes] = {name: case[0] for name, case in ACCEPTED.items()}
"""What it is → the file, which is in order."""
