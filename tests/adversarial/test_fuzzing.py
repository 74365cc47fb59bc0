"""A bounded part of ``make fuzz``, and that it notices what it is there for."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from obmlite.errors import CorruptPackageError, ObmliteError
from obmlite.schema import trailer
from tests.adversarial import fuzzing, kinds, manifests
from tests.adversarial.all import KINDS
from tests.adversarial.broken import BROKEN, ILLS
from tests.adversarial.memory import Finding
from tests.schema import flat

ROOT = pathlib.Path(__file__).resolve().parents[2]

COUNTS = {"manifest": 300, "package": 60, "weights": 60, "stablehlo": 0, "sealed": 5000, "static": 3000}
"""Inputs of a kind; of others 500. StableHLO has tests of its own, in tests/test_untrusted.py."""


@pytest.mark.parametrize("name", KINDS)
def test_a_kind(name: str) -> None:
    if name == "signature":
        pytest.importorskip("cryptography")
    kind = KINDS[name]
    rng = random.Random(f"{name} in make test")
    outcomes: dict[str, int] = {}
    count = COUNTS.get(name, 500)
    for _ in range(count):
        data = kind.make(rng)
        begun = time.process_time()
        for outcome, more in kinds.judge(kind, data).items():
            outcomes[outcome] = outcomes.get(outcome, 0) + more
        assert time.process_time() - begun < kind.seconds, data.hex()
    if count:
        assert outcomes["refused"] > count / 4


# Each field of a manifest, by what Hypothesis makes of it, smallest example first.

PLACES = manifests.places(manifests.good())[0]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes=some.lists(
        some.tuples(some.integers(0, len(PLACES) - 1), some.integers(0, 2**64 - 1) | some.integers(0, 9)),
        min_size=1,
        max_size=4,
    )
)
def test_numbers_of_a_manifest(changes: list[tuple[int, int]]) -> None:
    data = bytearray(manifests.good()[: -trailer.SIZE])
    for number, value in changes:
        place: flat.Place = PLACES[number]
        size = {"B": 1, "H": 2, "I": 4, "Q": 8}[place.form[1].upper()]
        data[place.position : place.position + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    kinds.judge(KINDS["manifest"], trailer.seal(bytes(data)))


# --- the harness itself


def _mumble(data: bytes) -> str:
    raise CorruptPackageError("no field is named")


def test_a_refusal_names_its_field_and_is_of_its_class() -> None:
    mumbling = kinds.Kind("mumbling", "", lambda rng: b"", _mumble)
    with pytest.raises(Finding, match="names no field"):
        kinds.judge(mumbling, b"")
    kinds.judge(dataclasses.replace(mumbling, unnamed=lambda _: True), b"")
    with pytest.raises(ObmliteError, match="no field is named"):
        kinds.judge(dataclasses.replace(mumbling, refusals=()), b"")


def test_what_must_not_happen_is_counted_and_kept(tmp_path: pathlib.Path) -> None:
    tally = fuzzing.run(BROKEN, seed=2, seconds=100, count=60, findings=str(tmp_path))
    assert tally.inputs >= 60
    assert {*ILLS, "refused", "same"} <= tally.outcomes.keys()
    for number, ill in enumerate(ILLS):
        [files] = tally.findings[ill].values()
        assert {pathlib.Path(file).read_bytes() for file in files} == {bytes([number])}


def test_one_that_was_kept_can_be_tried_again(tmp_path: pathlib.Path) -> None:
    kept = fuzzing.keep(KINDS["text"], b"\0b +", str(tmp_path))
    command = [sys.executable, "-m", "tests.adversarial", "replay", kept]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=100)
    assert "refused" in done.stdout
