"""The README says what is so: its code runs, its listings are what the commands print, its links lead somewhere."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]


def block(name: str) -> str:
    """The content of the fenced block behind the comment ``<!-- name -->``."""
    found = re.findall(rf"<!-- {re.escape(name)} -->\n```\w*\n(.*?)```\n", README.read_text(), re.DOTALL)
    assert len(found) == 1, f"{len(found)} blocks are marked {name!r}"
    return found[0]


def python(*arguments: str, cwd: pathlib.Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def alike(text: str) -> str:
    """Text without what depends on versions: digests and numbers of versions and sizes of files."""
    text = re.sub(r"\b[0-9a-f]{16,64}\b", "<digest>", text)
    return re.sub(r"\b\d+\.\d[\w.]*", "<number>", text)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the example has run, in a process of its own."""
    directory = tmp_path_factory.mktemp("readme")
    (directory / "example.py").write_text(block("example"))
    python("-W", "error", "example.py", cwd=directory)
    return directory


@pytest.fixture
def variables(directory, monkeypatch):
    """What the example's names stand for, run again here."""
    monkeypatch.chdir(directory)
    variables = {}
    exec(block("example").replace('.save("small.obm")', '.save("again.obm", overwrite=True)'), variables)
    return variables


def test_example_is_short():
    assert sum(bool(line.strip()) for line in block("example").splitlines()) <= 10


def test_example_does_what_its_comments_say(variables):
    saved = {"kernel": np.ones((4, 3), np.float32), "bias": np.zeros(3, np.float32)}
    expected = jax.jit(variables["apply"])(saved, jnp.ones((2, 4)))
    np.testing.assert_array_equal(variables["y"], expected)
    assert variables["model"](jnp.ones((7, 4))).shape == (7, 3)
    assert type(variables["rows"]) is np.ndarray
    np.testing.assert_array_equal(variables["rows"], saved["kernel"][:2])
    assert jax.tree.all(jax.tree.map(np.array_equal, variables["params"], saved))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables["params"]))


def test_restoring(variables):
    exec(block("restore"), variables)
    for name in ("everywhere", "as_saved", "again"):
        assert jax.tree.all(jax.tree.map(np.array_equal, variables[name], variables["params"]))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables[name]))
    assert variables["everywhere"]["kernel"].sharding == variables["as_saved"]["kernel"].sharding
    assert variables["half"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(variables["model"](jnp.ones((2, 4))), np.full((2, 3), 4.0))


def test_package_runs_in_a_process_without_the_source(directory):
    code = "import jax.numpy as jnp, obmlite; print(obmlite.load('small.obm')(jnp.ones((2, 4))).tolist())"
    assert python("-I", "-c", code, cwd=directory) == "[[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]\n"


def test_objects(variables):
    exec(block("objects"), variables)
    np.testing.assert_array_equal(variables["z"], np.full((5, 2), 4.0))
    decoded = variables["model"].pipelines["decoder"](variables["z"])
    np.testing.assert_array_equal(decoded, np.full((5, 4), 8.0))


def test_looking_inside(variables):
    code = block("look")
    variables["np"] = np
    exec(code, variables)
    signature = variables["model"].functions["apply"].signature
    assert re.search(r"\.signature +# (.*)", code)[1] == str(signature)
    assert sorted(variables["model"].weights["params"].flat) == ["bias", "kernel"]
    assert not np.asarray(variables["kernel"]).flags.writeable
    last = code.strip().splitlines()[-1]
    restored = eval(last, variables)
    assert restored.keys() == {"kernel"}
    assert restored["kernel"].dtype == jnp.bfloat16


def test_layout(directory):
    lines = block("layout").splitlines()
    assert lines[0] == "small.obm/"
    package = directory / "small.obm"
    files = {alike(path.relative_to(package).as_posix()) for path in package.rglob("*") if path.is_file()}
    assert {alike(line.split()[0]) for line in lines[1:]} == files


@pytest.mark.parametrize("command", ["show", "verify"])
def test_command_prints(directory, command):
    prompt, _, expected = block(command).partition("\n")
    assert prompt == f"$ obmlite {command} small.obm"
    assert alike(python("-m", "obmlite", command, "small.obm", cwd=directory)) == alike(expected)


def test_error(directory, monkeypatch):
    monkeypatch.chdir(directory)
    call = re.search(r"<!-- (error: (.*)) -->", README.read_text())
    with pytest.raises(obmlite.ArgumentError) as caught:
        eval(call[2], {"model": obmlite.load("small.obm"), "jnp": jnp})
    expected = f"{obmlite.ArgumentError.__module__}.ArgumentError: {caught.value}\n"
    assert block(call[1]) == expected
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(document):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    missing = [target for target in local if not (document.parent / target).exists()]
    assert not missing
