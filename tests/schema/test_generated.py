"""manifest.fbs is the one source: generated code, our field table, the enums and the documentation follow it."""

from __future__ import annotations

import enum
import pathlib
import re
import shutil
import subprocess

import pytest

import obmlite.schema
from obmlite import dtypes, specs, tree
from obmlite.schema import _shared, encode, records
from obmlite.schema._fields import FIELDS
from obmlite.schema._generated import manifest_generated as generated
from tests.schema import flat

FLATC = "2.0.8"
"""The version of flatc that made obmlite/schema/_generated; others write other code for the same schema."""

GENERATED = pathlib.Path(obmlite.schema.__file__).parent / "_generated"
FORMAT = pathlib.Path(__file__).parents[2] / "docs" / "format.md"


def flatc_version():
    found = shutil.which("flatc")
    if found is None:
        return None
    text = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    return text.split()[-1]


@pytest.mark.skipif(flatc_version() != FLATC, reason=f"flatc {FLATC} is not on PATH")
def test_the_generated_code_is_flatcs(tmp_path):
    command = ["flatc", "--python", "--gen-onefile", "-o", str(tmp_path), str(flat.SCHEMA)]
    subprocess.run(command, check=True, capture_output=True)
    made = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert made == {path.name: path.read_bytes() for path in GENERATED.glob("*.py")}


def test_the_field_table_is_the_schemas():
    assert {name: tuple(f.name for f in fields) for name, fields in flat.TABLES.items()} == FIELDS
    for name, fields in flat.TABLES.items():
        assert [f.number for f in fields] == list(range(len(fields))), name


def test_every_type_of_the_schema_is_one_that_the_reader_knows():
    for fields in flat.TABLES.values():
        for field in fields:
            kind = field.type.strip("[]")
            assert kind in flat.FORMS or kind in flat.TABLES or kind == "string", field


ENUMS: dict[str, type[enum.IntEnum] | dict[str, int]] = {
    "DigestAlgorithm": {"SHA256": 1},
    "FileKind": records.FileKind,
    "AxisType": specs.AxisType,
    "PartitionEntry": {
        "NOT_SPLIT": encode.ENTRY_NOT_SPLIT,
        "AXES": encode.ENTRY_AXES,
        "UNCONSTRAINED": encode.ENTRY_UNCONSTRAINED,
    },
    "NodeKind": tree.Kind,
    "KeyKind": tree.KeyKind,
    "DType": {**{d.name.upper(): d.code for d in dtypes.ALL}, "KEY": dtypes.KEY},
    "ModuleFormat": records.ModuleFormat,
    "ArgumentKind": records.ArgumentKind,
    "FixedKind": records.FixedKind,
    "Visibility": records.Visibility,
    "StepRole": records.StepRole,
    "SupplementalForm": records.SupplementalForm,
}


@pytest.mark.parametrize("name", ENUMS)
def test_enums_are_the_schemas(name):
    ours = ENUMS[name]
    values = ours if isinstance(ours, dict) else {member.name: int(member) for member in ours}
    assert flat.ENUMS[name] == {"UNSPECIFIED": 0, **values}
    made = {k: v for k, v in vars(getattr(generated, name)).items() if k.isupper()}
    assert made == flat.ENUMS[name]


def test_every_enum_is_compared():
    assert set(flat.ENUMS) == set(ENUMS)
    in_modules = {
        value.__name__
        for module in (records, tree, specs)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, enum.IntEnum) and value is not enum.IntEnum
    }
    assert in_modules == {value.__name__ for value in ENUMS.values() if isinstance(value, type)}


def test_entries_of_partition_specs_are_read_as_they_are_written():
    # decode.py takes the entry's kind as a position; this pins that position to the writer's names.
    assert (encode.ENTRY_NOT_SPLIT, encode.ENTRY_AXES, encode.ENTRY_UNCONSTRAINED) == (1, 2, 3)
    assert _shared.UNCONSTRAINED == specs.UNCONSTRAINED


# --- docs/format.md


def documented():
    """Table → [(id, field, type)] as the page has them."""
    found = {}
    for section in FORMAT.read_text().split("\n#### ")[1:]:
        name = section.split("\n", 1)[0].strip()
        body = section.split("\n## ")[0]
        found[name] = [
            (int(number), field, kind)
            for number, field, kind in re.findall(r"^\| (\d+) \| `(\w+)` \| (\S+) \|", body, re.M)
        ]
    return found


def test_the_page_has_every_table_and_field():
    pages = documented()
    assert set(pages) == set(flat.TABLES)
    for name, fields in flat.TABLES.items():
        assert pages[name] == [(f.number, f.name, f.type) for f in fields], name


def numbers(name, field):
    """``1 public, 2 private`` → {1: "public", 2: "private"} of one field of the page."""
    section = FORMAT.read_text().split(f"\n#### {name}\n")[1].split("\n#### ")[0].split("\n## ")[0]
    text = re.search(rf"^\| \d+ \| `{field}` \| \S+ \| (.*) \|$", section, re.M)[1]
    return [int(n) for n in re.findall(r"(?:^|[,;:] )(\d)(?= [a-z]|: | = )", text)]


@pytest.mark.parametrize(
    ("table", "field", "kind"),
    [(f"{table}", f.name, f.enum) for table, fields in flat.TABLES.items() for f in fields if f.enum]
    + [(*place.split("."), kind) for place, kind in flat.COLUMN_ENUMS.items() if kind not in ("NodeKind", "KeyKind")],
)
def test_the_page_has_every_value_of_an_enum(table, field, kind):
    if kind == "DType":
        rows = re.findall(r"(?:^|\| )\|? ?(\d+) \| (PRNG key|[a-z0-9_]+) \| ", FORMAT.read_text(), re.M)
        page = {name.upper(): int(code) for code, name in rows if name.upper() in flat.ENUMS["DType"]}
        page["KEY"] = next(int(code) for code, name in rows if name == "PRNG key")
        assert {"UNSPECIFIED": 0, **page} == flat.ENUMS["DType"]
    else:
        assert numbers(table, field) == sorted(flat.ENUMS[kind].values())[1:]


@pytest.mark.parametrize(("title", "kind"), [("| kind | node |", "NodeKind"), ("| key kind | key |", "KeyKind")])
def test_the_page_has_every_kind_of_node_and_key(title, kind):
    body = FORMAT.read_text().split(title)[1].split("\n\n")[0]
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", body, re.M)] == sorted(flat.ENUMS[kind].values())[1:]
