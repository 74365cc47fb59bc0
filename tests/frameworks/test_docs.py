"""The table of docs/frameworks.md: every cell names a test that is there."""

from __future__ import annotations

import pathlib
import re

HERE = pathlib.Path(__file__).parent
TABLE = (HERE.parent.parent / "docs" / "frameworks.md").read_text(encoding="utf-8")


def test_every_cell_has_a_test() -> None:
    table = TABLE.partition("<!-- table -->\n")[2].partition("<!-- end -->")[0]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert header[1:] == ["params", "state", "tied leaves", "containers back", "function runs", "framework absent"]
    assert [row[0].partition(",")[0] for row in rows] == [
        "Flax Linen", "Flax NNX", "Haiku", "Objax", "Equinox", "plain JAX"
    ]  # fmt: skip
    for framework, *cells in rows:
        file = re.fullmatch(r".*, `(test_\w+\.py)`", framework)
        assert file, framework
        tests = re.findall(r"^def (test_\w+)\(", (HERE / file[1]).read_text(encoding="utf-8"), re.MULTILINE)
        assert len(cells) == 6
        for cell in cells:
            assert cell.strip("`") in tests, (framework, cell)
