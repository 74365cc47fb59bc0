"""A reader written from docs/format.md alone reads the golden packages, and refuses what the page says is refused."""

import ast
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from tests import independent_reader as reader
from tests.independent_reader import Refused, read_package

HERE = Path(__file__).parent
GOLDEN = sorted((HERE / "golden").glob("*/jax-*/*/package.obm"))
golden = pytest.mark.parametrize("path", GOLDEN, ids=lambda path: "-".join(path.parts[-4:-1]))
# Of which JAX they are makes no difference to what is damaged.
damaged = pytest.mark.parametrize(
    "path", [p for p in GOLDEN if p.parent.parent == GOLDEN[0].parent.parent], ids=lambda path: path.parent.name
)


def sha(data):
    return hashlib.sha256(data).digest()


def seal(flatbuffer):
    return flatbuffer + struct.pack("<Q32sII16s", len(flatbuffer), sha(flatbuffer), 1, 0, b"obmlite manifest")


def test_it_imports_nothing_else():
    tree = ast.parse(Path(reader.__file__).read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module)
        elif isinstance(node, ast.Name):
            assert node.id not in ("__import__", "eval", "exec", "importlib")
    assert names == {
        *("argparse", "collections.abc", "dataclasses", "hashlib", "json", "os", "pathlib", "struct", "sys", "numpy"),
    }


# ---- the golden packages ---------------------------------------------------------------------------------------------


def test_there_are_golden_packages():
    assert GOLDEN


@golden
def test_leaves_of_a_golden_package(path):
    package = read_package(path)
    expected = json.loads((path.parent / "leaves.json").read_text(encoding="utf-8"))
    found = [(weights.name, leaf) for weights in package.weights.values() for leaf in weights.leaves.values()]
    assert [(name, leaf.name) for name, leaf in found] == [(row["weights"], row["leaf"]) for row in expected]
    for row, (_, leaf) in zip(expected, found, strict=True):
        assert leaf.spec.dtype.name == row["dtype"]
        assert leaf.spec.shape == tuple(row["shape"])
        if "file" not in row:
            assert leaf.spec.dtype.name == "float0"
            assert leaf.value is None
            continue
        value = np.load(path.parent / "leaves" / row["file"])
        assert leaf.value.dtype == value.dtype
        assert leaf.value.shape == value.shape
        assert leaf.value.tobytes() == value.tobytes()  # equal bits, NaN too


@golden
def test_listing_of_a_golden_package(path, capsys):
    assert reader.main([str(path)]) == 0
    lines = capsys.readouterr().out
    for row in json.loads((path.parent / "leaves.json").read_text(encoding="utf-8")):
        assert repr(row["leaf"]) in lines
    assert lines.endswith("all digests agree\n")


def test_function_of_a_golden_package():
    for path in (path for path in GOLDEN if path.parent.name == "symbolic"):
        package = read_package(path)
        function = package.functions["digits"]
        assert {a.name: {n: str(s) for n, s in a.leaves.items()} for a in function.arguments} == {
            "params": {
                "params.dense.bias": "float32[16]",
                "params.dense.kernel": "float32[64, 16]",
                "params.head": "float32[16, 10]",
            },
            "x": {"x": "float32[b, 8, 8]"},
        }
        assert {name: str(spec) for name, spec in function.results.items()} == {
            "argmax": "int32[b]",
            "logits": "float32[b, 10]",
        }
        assert function.constraints == ["b <= 16"]
        assert [(b.argument, b.weights, b.subtree) for b in function.bindings] == [("params", "params", "")]
        assert "cpu" in function.primal.platforms
        assert function.primal.artifact.startswith(b"ML\xefR")
        assert package.pipelines[package.default_pipeline].steps[0].function == "digits"


@damaged
def test_a_flipped_byte_anywhere_is_noticed(path, tmp_path):
    package = tmp_path / "p.obm"
    shutil.copytree(path, package)
    files = [file for file in package.rglob("*") if file.is_file() and not file.name.endswith(".index.json")]
    assert len(files) >= 2
    for file in files:
        data = file.read_bytes()
        for at in {0, 7, 8, *range(3, len(data), 97), len(data) - 64, len(data) - 1}:
            file.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
            with pytest.raises(Refused):
                read_package(package)
        for shorter_or_longer in (data[:-1], data + b"\0", b""):
            file.write_bytes(shorter_or_longer)
            with pytest.raises(Refused):
                read_package(package)
        file.unlink()
        with pytest.raises(Refused):
            read_package(package)
        file.write_bytes(data)
    read_package(package)


@damaged
def test_a_truncated_manifest_is_refused(path, tmp_path):
    data = (path / "manifest.obm").read_bytes()
    for length in {0, 1, 63, 64, 65, len(data) // 2, len(data) - 64, len(data) - 1}:
        (tmp_path / "manifest.obm").write_bytes(data[:length])
        with pytest.raises(Refused, match="manifest"):
            read_package(tmp_path)
        if length <= len(data) // 2:  # also where someone made the trailer agree
            (tmp_path / "manifest.obm").write_bytes(seal(data[:length]))
            with pytest.raises(Refused):
                read_package(tmp_path)


@damaged
def test_a_flatbuffer_of_any_bytes_is_read_or_refused(path, tmp_path):
    package = tmp_path / "p.obm"
    shutil.copytree(path, package)
    flatbuffer = (path / "manifest.obm").read_bytes()[:-64]
    random, refused = np.random.default_rng(0), 0
    for at in range(0, len(flatbuffer), 13):
        for value in {0, 0xFF, int(random.integers(256))}:
            changed = flatbuffer[:at] + bytes([value]) + flatbuffer[at + 1 :]
            (package / "manifest.obm").write_bytes(seal(changed))
            try:
                read_package(package)
            except Refused:
                refused += 1
    assert refused > len(flatbuffer) / 52


# ---- a package made by hand, of what the golden ones lack ------------------------------------------------------------


def flatbuffer_of(root):
    """Tables are dicts by field id; scalars pairs of struct's letter and the number; lists are vectors of offsets."""
    out = bytearray(b"\0\0\0\0OBML")

    def link(at, value):
        struct.pack_into("<I", out, at, place(value) - at)

    def place(value):
        if isinstance(value, dict):
            count, vtable = max(value, default=-1) + 1, len(out)
            offsets = [4 + 8 * i if i in value else 0 for i in range(count)]
            out.extend(struct.pack(f"<HH{count}H", 4 + 2 * count, 4 + 8 * count, *offsets))
            position = len(out)
            out.extend(struct.pack("<i", position - vtable) + bytes(8 * count))
            for i, item in value.items():
                if isinstance(item, tuple):
                    struct.pack_into("<" + item[0], out, position + 4 + 8 * i, item[1])
                else:
                    link(position + 4 + 8 * i, item)
            return position
        position = len(out)
        if isinstance(value, list):
            out.extend(struct.pack("<I", len(value)) + bytes(4 * len(value)))
            for i, item in enumerate(value):
                link(position + 4 + 4 * i, item)
        else:
            data = value.encode() + b"\0" if isinstance(value, str) else bytes(value)
            count = len(data) - 1 if isinstance(value, str) else len(value)
            out.extend(struct.pack("<I", count) + data)
        return position

    link(0, root)
    return bytes(out)


def u1(*values):
    return np.array(values, "<u1")


def u4(*values):
    return np.array(values, "<u4")


def u8(*values):
    return np.array(values, "<u8")


WHOLE = np.arange(12, dtype=np.float32).reshape(4, 3)
FLOAT6 = np.array([1, 62, 33, 7, 63], np.uint8)
STABLEHLO = b"ML\xefR and so on"
NOTE = b"carried as it is"


class Made:
    """A package in pieces that a test can change before it is written."""

    def __init__(self):
        self.strings, self.blobs = [], []
        self.contents = {}
        self.files = {"path": [], "length": [], "kind": [], "digest": []}
        first = self.weights_file(b"\x00", {"m": ("F32", [2, 3], WHOLE[:2].tobytes())})
        packed = np.packbits(np.unpackbits(FLOAT6[:, None], axis=1, bitorder="little")[:, :6], bitorder="little")
        second = self.weights_file(
            b"\x01", {"part": ("F32", [2, 3], WHOLE[2:].tobytes()), "s.0": ("U8", [4], packed.tobytes())}
        )
        for path, kind, data in (("functions/f-{}", 1, STABLEHLO), ("supplementals/note-{}.txt", 3, NOTE)):
            self.add_file(path.format(sha(data).hex()[:16]), kind, data, sha(data))
        self.order = np.argsort(self.files["path"])
        number = {int(old): new for new, old in enumerate(self.order)}
        names = [self.s(text) for text in ("", "m", "s", "0", "1", "z")]
        self.weights = {
            0: "w",
            2: ("B", 2),
            4: {
                0: u1(3, 1, 6, 1, 1, 1),
                1: u4(3, 0, 2, 0, 0, 0),
                2: u1(1, 2, 2, 5, 5, 2),
                3: u4(*names),
                4: u4(*[0] * 6),
                5: u4(*[0] * 6),
            },
            5: self.specs((25, [4, 3]), (32, [5]), (32, [5]), (29, [7])),
            6: u4(1, 2, 2, 0),
            7: u4(0, 1),
            8: u4(0, 2, 3),
            9: u4(number[first], number[second], number[second]),
            10: u4(0, self.s("part") + 1, 0),
            11: u8(0, 0, 2, 0),
            12: u8(2, 3, 2, 3),
            13: b"".join(sha(data) for data in (WHOLE[:2].tobytes(), WHOLE[2:].tobytes(), packed.tobytes())),
        }
        one = u1(1), u4(0)
        leaf = {0: one[0], 1: one[1], 2: u1(1), 3: u4(names[0]), 4: u4(0), 5: u4(0)}
        self.module = {
            0: ("I", number[2]),
            1: ("B", 2),
            3: ("Q", len(STABLEHLO)),
            6: ["cpu"],
            7: ("I", 1),
            8: self.specs((25, [-1, 3]), (25, [4, 3])),
            9: self.specs((25, [-1])),
            10: ("B", 1),
            13: {0: u4(self.s("w")), 1: u4(0), 2: u1(1)},
        }
        x = self.s("x")
        self.function = {
            0: "f",
            2: ("B", 1),
            3: ("I", self.blob(b"\x82\xa1a\xc7\x05\x01\x94\x01\xff\xc0\xc3\x02\xcb" + struct.pack(">d", 0.5)) + 1),
            4: {0: u1(10, 1), 1: u4(1, 0), 2: u1(1, 6), 3: u4(names[0], x), 4: u4(0, 0), 5: u4(0, 0)},
            5: leaf,
            6: u1(2),
            7: [{0: "mode", 1: ("B", 1), 2: ("I", self.blob(b"\xc4\x02hi") + 1), 3: "'hi'"}],
            10: self.module,
        }
        note = {8: u4(self.s("a/"), self.s("a/note.txt")), 9: u4(0, number[3] + 1)}
        self.root = {
            0: ("H", 1),
            2: "somebody",
            5: ("B", 1),
            11: u4(self.s("n + 1")),
            12: [self.function],
            13: [{0: "g", 2: ("B", 1), 4: ["f"]}],
            14: [self.weights],
            15: [{0: "p", 2: ("B", 1), 4: [{0: ("B", 1), 1: "g"}, {0: ("B", 2), 1: "f"}]}],
            16: [
                {0: "inline", 6: ("B", 1), 7: ("I", self.blob(NOTE))},
                {0: "folder", 5: "g", 6: ("B", 3), **note},
            ],
            17: "p",
            19: ("Q", 8 << 20),
        }

    def s(self, text):
        self.strings.append(text.encode())
        return len(self.strings) - 1

    def blob(self, data):
        self.blobs.append(data)
        return len(self.blobs) - 1

    def specs(self, *rows):
        dims = [size for _, shape in rows for size in shape]
        zeros = u4(*[0] * len(rows))
        return {
            0: u1(*(code for code, _ in rows)),
            1: zeros,
            2: u1(*(len(shape) for _, shape in rows)),
            3: np.array(dims, "<i8"),
            4: u1(*zeros),
            5: zeros,
            6: zeros,
            7: zeros,
        }

    def add_file(self, path, kind, data, digest):
        self.contents[path] = data
        for name, value in (("path", path), ("length", len(data)), ("kind", kind), ("digest", digest)):
            self.files[name].append(value)
        return len(self.files["path"]) - 1

    def weights_file(self, salt, tensors):
        entries, data = {"__metadata__": {"salt": salt.hex()}}, b""
        for name, (dtype, shape, content) in tensors.items():
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
            data += content
        text = json.dumps(entries).encode()
        header = struct.pack("<Q", len(text)) + text
        name = sha(sha(header) + b"".join(sha(sha(content)) for _, _, content in tensors.values()))
        return self.add_file(f"weights/w-{name.hex()[:16]}.safetensors", 2, header + data, sha(header))

    def write(self, path):
        pick = {name: [column[i] for i in self.order] for name, column in self.files.items()}
        files = {0: u4(*map(self.s, pick["path"])), 1: u8(*pick["length"]), 2: u1(*pick["kind"])}
        self.root.setdefault(8, {**files, 3: b"".join(pick["digest"])})
        for number, pool in ((6, self.strings), (7, self.blobs)):
            starts = np.cumsum([0, *map(len, pool)])
            self.root.setdefault(number, {0: b"".join(pool), 1: u4(*starts)})
        for name, data in self.contents.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        (path / "manifest.obm").write_bytes(seal(flatbuffer_of(self.root)))
        return path


def test_what_the_golden_packages_lack(tmp_path, capsys):
    package = read_package(Made().write(tmp_path))
    weights = package.weights["w"]
    assert list(weights.leaves) == ["m", "s.0", "s.1", "z"]
    m, s0, s1, z = weights.leaves.values()
    np.testing.assert_array_equal(m.value, WHOLE)
    assert len({piece.file.path for piece in m.pieces}) == 2
    np.testing.assert_array_equal(s0.value, FLOAT6)
    assert s0.spec.dtype.name == "float6_e3m2fn"
    assert s1.value is s0.value
    assert (s0.tied, s1.tied, m.tied) == (["s.1"], ["s.0"], [])
    assert z.value is None
    assert not weights.public
    function = package.functions["f"]
    assert {name: str(spec) for name, spec in function.arguments[0].leaves.items()} == {"x": "float32[n + 1, 3]"}
    assert function.metadata == {"a": (1, -1, None, True), 2: 0.5}
    assert function.fixed[0].value == b"hi"
    assert function.primal.artifact == STABLEHLO
    assert [(c.weights, c.leaf, c.differentiable) for c in function.primal.captures] == [("w", 0, True)]
    assert package.polymorphic["g"].functions == ["f"]
    assert [step.role for step in package.pipelines["p"].steps] == ["pre-processor", "model"]
    assert package.supplementals["inline"].content == {"": NOTE}
    assert package.supplementals["folder"].content == {"a/": None, "a/note.txt": NOTE}
    assert reader.main([str(tmp_path)]) == 0
    assert "tied to ['s.1']" in capsys.readouterr().out


def change(**fields):
    """Sets fields of the root, the function, the module or the weights, by names such as `function_2`."""

    def changed(made):
        for name, value in fields.items():
            part, _, number = name.rpartition("_")
            getattr(made, part)[int(number)] = value

    return changed


def other_path(path):
    def changed(made):
        made.files["path"][3] = path

    return changed


REFUSED = {
    "major": (change(root_0=("H", 2), root_5=("B", 9)), "format 2.0; 'somebody'"),
    "no major": (change(root_0=("H", 0)), "format"),
    "required": (change(root_3=["flying"]), "flying"),
    "digest algorithm": (change(root_5=("B", 2)), "digest algorithm"),
    "no digest algorithm": (change(root_5=("B", 0)), "digest algorithm"),
    "chunk size": (change(root_19=("Q", 1 << 20)), "chunks"),
    "dimension": (change(root_11=u4()), "no such dimension"),
    "string": (change(root_11=u4(10_000)), "no such string"),
    "pool": (change(root_6={0: b"abc", 1: u4(0, 2, 1, 3)}), "offsets"),
    "text": (change(root_6={0: b"\xff", 1: u4(0, 1)}), "UTF-8"),
    "default pipeline": (change(root_17="q"), "default pipeline"),
    "visibility": (change(function_2=("B", 3)), "visibility"),
    "argument kind": (change(function_6=u1(4)), "unknown value"),
    "argument kinds": (change(function_6=u1(1, 1)), "lengths"),
    "bool": (change(module_10=("B", 2)), "bool"),
    "file": (change(module_0=("I", 99)), "no such file"),
    "kind of file": (change(module_0=("I", 1)), "no such file"),
    "range": (change(module_1=("B", 1), module_3=("Q", 1 << 40)), "out of bounds"),
    "magic": (change(module_1=("B", 1), module_2=("Q", 1), module_3=("Q", 4)), "MLIR"),
    "kept": (change(module_10=("B", 0), module_11=u4(1, 0)), "order"),
    "capture": (lambda made: made.module[13].update({1: u4(9)}), "capture"),
    "two of one name": (change(weights_0="f"), "of one name"),
    "arity": (lambda made: made.weights[4].update({1: u4(4, 0, 2, 0, 0, 0)}), "children"),
    "two roots": (lambda made: made.weights[4].update({1: u4(2, 0, 2, 0, 0, 0)}), "several roots"),
    "node": (lambda made: made.weights[4].update({0: u1(3, 1, 66, 1, 1, 1)}), "unknown kind"),
    "dtype": (lambda made: made.weights[5].update({0: u1(25, 99, 99, 29)}), "unknown dtype"),
    "other dtype": (lambda made: made.weights[5].update({0: u1(6, 32, 32, 29)}), "another dtype"),
    "tied": (lambda made: made.weights[5].update({0: u1(25, 32, 31, 29)}), "tied"),
    "float0": (change(weights_6=u4(1, 2, 0, 0)), "float0"),
    "overlap": (change(weights_11=u8(0, 0, 1, 0)), "overlap"),
    "outside": (change(weights_11=u8(0, 0, 3, 0)), "outside"),
    "piece": (change(weights_10=u4(0, 0, 0)), "other tensors"),
    "chunk": (change(weights_13=bytes(96)), "digest of"),
    "no chunk": (change(weights_13=bytes(64)), "missing"),
    "chunks": (change(weights_13=bytes(128)), "left over"),
    "up": (other_path("../note.txt"), "bad path"),
    "here": (other_path("a/./note.txt"), "bad path"),
    "absolute": (other_path("/etc/passwd"), "bad path"),
    "empty": (other_path("a//b"), "bad path"),
    "backslash": (other_path("a\\b"), "bad character"),
    "control": (other_path("a\nb"), "bad character"),
    "deep": (other_path("/".join("a" * 33)), "too long"),
    "long": (other_path("a" * 256), "bad path"),
}


@pytest.mark.parametrize(("mutate", "why"), REFUSED.values(), ids=list(REFUSED))
def test_refused(mutate, why, tmp_path):
    made = Made()
    mutate(made)
    made.contents = {name: data for name, data in made.contents.items() if name in made.files["path"]}
    made.order = np.argsort(made.files["path"])
    with pytest.raises(Refused, match=why):
        read_package(made.write(tmp_path))


def test_an_object_that_requires_a_feature_is_refused_alone(tmp_path):
    made = Made()
    made.function[1] = ["flying"]
    package = read_package(made.write(tmp_path))
    assert package.refused == {"function f": ["flying"]}
    assert not package.functions
    assert package.weights


def test_a_field_of_a_later_minor_version_is_ignored(tmp_path):
    made = Made()
    made.root |= {1: ("H", 3), 25: "later"}
    made.weights[14] = u4(1, 2, 3)
    assert read_package(made.write(tmp_path)).format == (1, 3)


@pytest.mark.parametrize("kind", ["file", "folder", "fifo", "outer"])
def test_only_regular_files_are_opened(kind, tmp_path):
    path = Made().write(tmp_path / "p.obm")
    folder = path / "supplementals"
    (file,) = folder.iterdir()
    if kind == "folder":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        file.unlink()
        os.mkfifo(file)
    else:  # a link to the package itself is none inside it
        (tmp_path / "link").symlink_to(path)
        read_package(tmp_path / "link")
        return
    with pytest.raises(Refused):
        read_package(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x91",
        b"\xa2a",
        b"\xa1\xff",
        b"\xd6\xff\0\0\0\0",
        b"\xd4\x01\x01",
        b"\x81\x90\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 1000 + b"\xc0",
    ],
)
def test_bad_msgpack(data):
    with pytest.raises(Refused):
        reader.msgpack(data)


def test_names():
    assert reader.full_name([]) == ""
    assert reader.full_name(["a.b", "c\\", "0"]) == "a\\.b.c\\\\.0"
    assert reader.full_name(["__metadata__", "x"]) == "\\__metadata__.x"
    assert reader.full_name(["x", "__metadata__"]) == "x.__metadata__"


@pytest.mark.parametrize(
    "text",
    ['{"a":1,"a":2}', "[NaN]", "[1", "[" * 100_000],
)
def test_bad_json(text):
    with pytest.raises(Refused):
        reader.parse_json(text, "it")
