"""The figures of docs/trust.md are those of figures.json, and say what is said of them."""

from __future__ import annotations

import collections
import json

from tests.adversarial import figures
from tests.adversarial.all import KINDS


def test_the_document_has_the_figures() -> None:
    found = json.loads(figures.FIGURES.read_text())
    text = figures.DOCUMENT.read_text(encoding="utf-8")
    assert text.split(figures.BEGIN)[1].split(figures.END)[0] == figures.table(found)


def test_they_are_of_every_kind_and_of_nothing_that_must_not_be() -> None:
    found = json.loads(figures.FIGURES.read_text())
    assert found["kinds"].keys() == KINDS.keys()
    total = sum((collections.Counter(counts) for counts in found["kinds"].values()), collections.Counter())
    assert total.total() >= 1_000_000
    assert total.keys() <= {"refused", "same", "other", "crashed child"}
    assert min(sum(counts.values()) for counts in found["kinds"].values()) >= 2000
    for counts in found["readers"].values():
        assert counts["obmlite"].keys() <= {"refused", "right"}
