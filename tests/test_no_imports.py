"""Nothing that a package says is imported, evaluated or unpickled."""

from __future__ import annotations

import ast
import collections
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import obmlite

ROOT = pathlib.Path(obmlite.__file__).parent

UNPICKLERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
    "runpy",
}
EVALUATORS = {"eval", "exec", "compile", "__import__"}
IMPORTERS = {"import_module", "find_spec", "locate", "load_module", "exec_module"}

TABLES = {
    "__init__.py": "names of obmlite's own",
    "frameworks/__init__.py": "the adapters, by a fixed table of prefixes",
    "interop/__init__.py": "the steps, by a fixed table of MIME types",
    "interop/_converting.py": "the converters that a call names",
}
"""Where a module is imported that is no literal there, and why it is no package's choice."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        if "_generated" not in path.parts:
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_bytes(), str(path))


def forbidden(name: str, tree: ast.Module) -> Iterator[str]:
    """What of a module imports, evaluates or unpickles by a name that it does not hold itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in UNPICKLERS)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in UNPICKLERS:
                yield f"from {node.module} import"
        elif isinstance(node, ast.Call):
            function = node.func
            own = function.id if isinstance(function, ast.Name) else ""
            called = own or (function.attr if isinstance(function, ast.Attribute) else "")
            if own in EVALUATORS:
                yield f"{own}(…)"
            if called in IMPORTERS and not isinstance(node.args[0], ast.Constant) and name not in TABLES:
                yield f"{called}({ast.unparse(node.args[0])})"
            if called in ("load", "save", "savez") and isinstance(function, ast.Attribute):
                words = {word.arg: word.value for word in node.keywords}
                safe = isinstance(words.get("allow_pickle"), ast.Constant) and not ast.literal_eval(
                    words["allow_pickle"]
                )
                if isinstance(function.value, ast.Name) and function.value.id == "np" and not safe:
                    yield f"np.{called}(…) without allow_pickle=False"
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "sys.modules":
            yield f"sys.modules[{ast.unparse(node.slice)}]"


def test_no_module_unpickles_evaluates_or_imports_what_it_is_told() -> None:
    found = {name: list(forbidden(name, tree)) for name, tree in sources()}
    assert len(found) > 100
    assert {name: own for name, own in found.items() if own} == {}
    assert TABLES.keys() <= found.keys()


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from marshal import loads",
        "eval(x)",
        "exec(x)",
        "importlib.import_module(name)",
        "import_module(f'{name}')",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "sys.modules[name]",
        "def f():\n  import dill.session",
    ],
)
def test_the_search_finds_what_it_looks_for(text: str) -> None:
    assert list(forbidden("x.py", ast.parse(text)))


def test_the_search_leaves_the_rest_alone() -> None:
    text = "re.compile(x); importlib.import_module('onnx'); np.load(p, allow_pickle=False); model.eval(); onnx.load(p)"
    assert list(forbidden("x.py", ast.parse(text))) == []


# --- a package whose names point at modules

NAMES = (
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "leaves_a_mark.Thing",
    "posix.system",
    "antigravity.Thing",
    "leaves_a_mark",
)

LOOKED_AT = """
import json, sys
import numpy as np, obmlite
from obmlite import listing
from obmlite.verify import verify
before = set(sys.modules)
for untrusted in (False, True):
    model = obmlite.load(sys.argv[1], untrusted=untrusted)
    assert verify(sys.argv[1]).good
    listing.listing(sys.argv[1], operations=True)
    repr(model)
    trees = {name: model.weights[name].restore() for name in model.weights}
    assert all(type(tree) in (dict, tuple) for tree in trees.values()), trees
    result = model.functions["f"](trees["class 0"], np.ones(3, np.float32))
    np.testing.assert_array_equal(result["y"], np.full(3, 2.0))
    model.supplementals["s"].read()
print(json.dumps(sorted(set(sys.modules) - before)))
"""


class Thing:
    def __init__(self, view: Any) -> None:
        self.view = view


def made(path: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    """A package whose nodes, metadata and supplementals name modules, beside one of them that leaves a mark."""
    objects: dict[str, Any] = {}
    for n, name in enumerate(names):
        kind = type(f"Thing{n}", (Thing,), {})
        obmlite.register_node(
            kind, name, flatten=lambda thing: (thing.view, None), unflatten=lambda static, view, kind=kind: kind(view)
        )
        objects[f"class {n}"] = obmlite.Weights(kind({"a": np.ones(3, np.float32)}))
    pair = collections.namedtuple("pair", ["left", "right"])
    obmlite.register_node(pair, f"{names[-1]}.pair")
    objects["pair"] = obmlite.Weights(pair(np.ones(2, np.float32), np.ones(3, np.float32)))
    objects["f"] = obmlite.export(
        lambda thing, x: {"y": thing.view["a"] + x},
        objects["class 0"].restore(),
        np.ones(3, np.float32),
        name="f",
        metadata={"class": names[0]},
    )
    reduced = b"cposix\nsystem\n(S'touch mark'\ntR."  # a pickle that runs a command
    supplemental = obmlite.Supplemental.from_bytes(reduced, mime_type=f"application/{names[-1]}", version=names[0])
    obmlite.Model(
        objects,
        supplementals={"s": supplemental},
        metadata={"module": names[-1], "__class__": names[0], "__reduce__": reduced},
    ).save(path)
    (path.parent / "leaves_a_mark.py").write_text("open('mark', 'w').close()\nclass Thing: pass\n", encoding="utf-8")
    return path


def imported(package: pathlib.Path) -> list[str]:
    """What is imported by a process that loads a package, looks at all of it and uses it."""
    done = subprocess.run(
        [sys.executable, "-c", LOOKED_AT, str(package)],
        cwd=package.parent,  # where leaves_a_mark.py is: `import leaves_a_mark` would work
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT.parent}:{package.parent}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_no_name_in_a_package_is_imported(tmp_path: pathlib.Path) -> None:
    for name in ("dangerous", "innocent"):
        (tmp_path / name).mkdir()
    dangerous = made(tmp_path / "dangerous" / "m.obm", NAMES)
    manifest = dangerous.joinpath("manifest.obm").read_bytes()
    assert all(name.encode() in manifest for name in NAMES)
    found = imported(dangerous)
    assert found == imported(made(tmp_path / "innocent" / "m.obm", [f"nothing.n{n}" for n in range(len(NAMES))]))
    assert not {"leaves_a_mark", "antigravity", "pickle"} & set(found)
    assert not list(tmp_path.rglob("mark"))
    subprocess.run([sys.executable, "-c", "import leaves_a_mark"], cwd=dangerous.parent, check=True)
    assert list(tmp_path.rglob("mark"))  # it would have left one
