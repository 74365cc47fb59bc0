"""The server as a program and as an object: what it says, how it starts, changes and ends."""

from __future__ import annotations

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from typing import Any

import pytest

pytest.importorskip("starlette")

import obmlite
from obmlite import cli
from obmlite.errors import ArgumentError
from obmlite.serving import ModelConfig, Repository
from obmlite.serving.server import Server
from tests.serving.program import Program, ask, until


def times(factor: float) -> obmlite.Model:
    def scaled(x: Any) -> Any:
        return x * factor

    return obmlite.Model.from_function(scaled, obmlite.spec("f32[b]"), weights=None, platforms="cpu")


def test_program(tmp_path: pathlib.Path) -> None:
    """It serves what is there, takes what comes, says both, and ends well when it is told to."""
    times(2).save(tmp_path / "double" / "1")
    with Program(tmp_path / "double") as program:
        until(lambda: program.said("double 1: loaded in"))
        until(lambda: available(program.url, "double"))
        path = f"{program.url}/v1/models/double:predict"
        assert ask(path, {"instances": [1, 2]}) == {"predictions": [2.0, 4.0]}
        times(3).save(tmp_path / "double" / "2")
        until(lambda: program.said("double 1: unloading"))
        assert ask(path, {"instances": [1, 2]}) == {"predictions": [3.0, 6.0]}
        assert any(str(tmp_path / "double") in line for line in program.lines)
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(30) == 0
        until(lambda: program.lines[-1] == "stopped")


def test_requests_under_way_are_finished(models: pathlib.Path) -> None:
    own = Repository([ModelConfig("half", str(models / "half"))])
    own.scan()
    body = b'{"instances": [1.0]}'
    with Server(own, port=0, grace=20) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as begun:
            begun.sendall(b"POST /v1/models/half:predict HTTP/1.1\r\nHost: x\r\n")
            begun.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body[:5])
            time.sleep(0.2)
            server.stop()
            until(lambda: _refused(host, int(port)))
            begun.sendall(body[5:])
            reply = begun.recv(65536)
            assert reply.startswith(b"HTTP/1.1 200")
            assert reply.endswith(b'{"predictions":[2.5]}')
    assert not own.ready()


def _refused(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return True
    return False


def test_several_models_of_a_file(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = tmp_path / "models.json"
    both = [
        {"name": "a", "base_path": str(models / "half"), "policy": "all"},
        {"name": "b", "base_path": str(models / "many")},
    ]
    config.write_text(json.dumps({"model": both}))
    with Program("--config", config) as program:
        for line in ("a 1: loaded", "a 2: loaded", "b 1: loaded"):
            until(lambda line=line: program.said(line))
        until(lambda: available(program.url, "a"))
        assert ask(f"{program.url}/v1/models/a/versions/1:predict", {"instances": [0]}) == {"predictions": [2.0]}
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(30) == 0


def available(url: str, name: str) -> bool:
    """Whether all versions of a model are there; a version is, a moment after it was loaded."""
    found = ask(f"{url}/v1/models/{name}")["model_version_status"]
    return bool(found) and all(version["state"] == "AVAILABLE" for version in found)


def status(url: str) -> Any:
    """Of the one version of the model ``m``; empty before it was found."""
    found = ask(f"{url}/v1/models/m")["model_version_status"]
    return found[0] if found else {"status": {"error_message": ""}}


def test_a_version_that_cannot_be_loaded(tmp_path: pathlib.Path) -> None:
    times(2).save(tmp_path / "m" / "1")
    [function] = (tmp_path / "m" / "1" / "functions").iterdir()
    function.write_bytes(function.read_bytes()[:-1])
    with Program(tmp_path / "m") as program:
        url = program.url
        until(lambda: status(url)["status"]["error_message"] != "")
        for path, body, code in (("v1/models/m:predict", {"instances": [1]}, 404), ("v2/health/ready", None, 400)):
            with pytest.raises(urllib.error.HTTPError) as info:
                ask(f"{url}/{path}", body)
            assert info.value.code == code
            info.value.close()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give BASE or --config, and not both"),
        (["x", "--config", "y"], "give BASE or --config, and not both"),
        (["--config", "y", "--name", "z"], "what --name says stands in the file of --config"),
        (["--config", "y", "--untrusted", "--public-key", "k"], "what --public-key, --untrusted says stands in"),
        (["--config", "/nothing/here.toml"], "cannot be read"),
        (["x", "--port", "70000"], "must be from 0 to 65535"),
        (["x", "--port", "http"], "must be from 0 to 65535"),
        (["x", "--policy", "newest"], "expected latest, latest=N, all or specific=N,N"),
        (["x", "--policy", "specific=9999999999999999999"], "expected latest, latest=N, all or specific=N,N"),
        (["x", "--poll", "-1"], "--poll: must be from 0 to"),
        (["x", "--poll", "inf"], "--poll: must be from 0 to"),
        (["x", "--grace", "soon"], "--grace: must be from 0 to"),
        (["x", "--max-body", "0"], "--max-body: must be from 1 to"),
        (["x", "--max-body", "4096"], "--max-body: must be from 1 to"),
        (["x", "--max-requests", "-5"], "--max-requests: must be from 1 to"),
        ([""], "'' is no directory of versions"),
        ([__file__], "is no directory of versions"),
    ],
)
def test_wrong_usage(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        cli.main(["serve", *arguments])
    assert info.value.code == cli.USAGE
    assert text in capsys.readouterr().err


def test_a_package_is_no_directory_of_versions(models: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        cli.main(["serve", str(models / "half" / "1")])
    assert info.value.code == cli.USAGE
    assert "is a package itself, and not a directory of versions" in capsys.readouterr().err


def test_a_port_that_another_has(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["serve", str(tmp_path), "--port", str(port)]) == cli.BAD
    assert "The server cannot listen there." in capsys.readouterr().err


def test_only_this_machine(models: pathlib.Path) -> None:
    with Server(Repository([ModelConfig("half", str(models / "half"))]), port=0) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert server.grpc_address is None


def test_extras_that_are_missing(tmp_path: pathlib.Path) -> None:
    """The command line works without them, and says which one is needed."""
    code = (
        "import sys\n"
        "for name in ('starlette', 'uvicorn', 'orjson', 'prometheus_client', 'grpc'): sys.modules[name] = None\n"
        "from obmlite import cli\n"
        f"sys.exit(cli.main(['serve', {str(tmp_path)!r}, '--port', '0']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == cli.BAD
    assert 'pip install "obmlite[serve]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("module", "missing"), [("asgi", "starlette"), ("server", "uvicorn")])
def test_a_module_names_its_extra(module: str, missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import obmlite.serving.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'obmlite[serve]'" in done.stderr


def test_grpc_beside_it(models: pathlib.Path) -> None:
    grpc = pytest.importorskip("grpc")
    messages = pytest.importorskip("obmlite.serving.grpc.messages").inference
    own = Repository([ModelConfig("half", str(models / "half"))])
    own.scan()
    with Server(own, port=0, grpc_port=0) as server:
        assert server.grpc_address is not None
        with grpc.insecure_channel(server.grpc_address) as channel:
            ready = channel.unary_unary("/inference.GRPCInferenceService/ServerReady")
            reply = messages.ServerReadyResponse.FromString(ready(b"", timeout=30))
        assert reply.ready
        assert ask(f"{server.url}/v2/health/ready") == {"ready": True}


def test_grpc_that_cannot_listen(repository: Repository) -> None:
    pytest.importorskip("grpc")
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ArgumentError, match="cannot listen"):
        Server(Repository([]), port=0, grpc_port=other.getsockname()[1]).__enter__()


def test_grpc_that_is_missing(monkeypatch: pytest.MonkeyPatch, repository: Repository) -> None:
    monkeypatch.setitem(sys.modules, "obmlite.serving.grpc", None)
    with pytest.raises(ArgumentError, match=r"obmlite\[grpc\]"):
        Server(repository, port=0, grpc_port=0)


def test_command_line_imports_no_server() -> None:
    code = "import sys, obmlite.cli; print([n for n in ('starlette', 'uvicorn', 'orjson') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
