"""docs/scaling.md says what the program says."""

from __future__ import annotations

from benchmarks import scaling
from obmlite import _arrays


def test_the_document_has_the_figures() -> None:
    with open(scaling.DOCUMENT, encoding="utf-8") as file:
        document = file.read()
    assert document.count(scaling.BEGIN) == document.count(scaling.END) == 1
    assert scaling.replace(document) == document, "python -m benchmarks.scaling --write"


def test_the_model_is_the_one_that_it_says() -> None:
    specs = scaling.specs().values()
    assert len(specs) == 1137
    assert sum(_arrays.number_of(spec) for spec in specs) == 405_853_388_800  # as the model card has it, in full
    assert sum(_arrays.nbytes(spec) for spec in specs) / scaling.GIB > 755
