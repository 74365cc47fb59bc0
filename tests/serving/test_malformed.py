"""Requests that are wrong in every way: each gets a 4xx and a JSON error, and the server goes on as before."""

from __future__ import annotations

import gzip
import json
import pathlib
import posixpath
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette")

from obmlite.serving import ModelConfig, Repository
from obmlite.serving.asgi import Limits, build_app
from obmlite.serving.server import Server

MODELS = ("half", "many", "fixed", "kinds", "scalar")

# --- requests that are never good

KNOWN = re.compile(
    r"(?i:/v1/models/[^/:]+((/versions/\d+)|(/labels/[^/:]+))?(:predict|/metadata)?)|/|/metrics|/monitoring/.*|/v2.*"
)
numbers = st.integers() | st.floats(width=32)
wrong = (
    st.text(max_size=5) | st.none() | st.booleans() | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)
trees = st.recursive(numbers | wrong, lambda inner: st.lists(inner, max_size=4), max_leaves=12)


@st.composite
def wrong_trees(draw: Any) -> Any:
    """Lists in lists with something that is no number."""
    value = draw(wrong)
    for _ in range(draw(st.integers(0, 4))):
        value = [*draw(st.lists(trees, max_size=2)), value]
    return value


@st.composite
def wrong_documents(draw: Any) -> bytes:
    """JSON that asks for no prediction of ``half``: no object, no inputs, or inputs that are no numbers."""
    keys = st.text(max_size=8).filter(lambda key: key not in ("inputs", "instances"))
    signatures = st.text(min_size=1) | st.integers()
    tensors = st.fixed_dictionaries(
        {"data": wrong_trees()}, optional={"name": wrong, "shape": wrong, "datatype": wrong}
    )
    value = draw(
        st.one_of(
            trees,
            st.dictionaries(keys, trees, max_size=3),
            st.tuples(st.sampled_from(["inputs", "instances"]), wrong_trees()).map(lambda pair: dict([pair])),
            signatures.map(lambda name: {"inputs": [1], "signature_name": name}),
            tensors.map(lambda own: {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], **own}]}),
        )
    )
    return json.dumps(value).encode()


GOOD = [
    ("/v1/models/half:predict", b'{"instances": [1.0, 2.0, 5.0]}'),
    ("/v1/models/many:predict", b'{"inputs": {"a": [[1, 2, 3]], "n": [4], "flag": [true]}}'),
    ("/v2/models/half/infer", b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}'),
]


def is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@st.composite
def requests(draw: Any) -> tuple[str, str, bytes, dict[str, Any]]:
    """Method, path, body and headers."""
    kind = draw(st.integers(0, 6))
    path, good = draw(st.sampled_from(GOOD))
    if kind == 0:  # anything
        return "POST", path, draw(st.binary(max_size=200).filter(lambda b: not is_object(b))), {}
    if kind == 1:  # cut off
        return "POST", path, good[: draw(st.integers(0, len(good) - 1))], {}
    if kind == 2:
        return "POST", draw(st.sampled_from([GOOD[0][0], GOOD[2][0]])), draw(wrong_documents()), {}
    if kind == 3:  # bytes behind the JSON that it does not speak of, or a length that is none
        length = draw(st.integers(-5, len(good) - 1).map(str) | st.text("0123456789abc.-+ ", min_size=9, max_size=30))
        return "POST", GOOD[2][0], GOOD[2][1], {"Inference-Header-Content-Length": length}
    if kind == 4:  # paths
        parts = st.sampled_from(
            ["v1", "v2", "models", "half", "versions", "1", "labels", ":predict", "infer", "%00", ".."]
        )
        text = "/" + "/".join(draw(st.lists(parts | st.text(max_size=6), max_size=6))).lstrip("/")
        method = draw(st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH"]))
        known = KNOWN.fullmatch(posixpath.normpath(text))  # as httpx sends it
        return ("PUT" if known else method), urllib.parse.quote(text, safe="/:%"), good, {}
    if kind == 5:  # other models, versions and labels
        model = draw(st.text("abcdefghijklmnopq.", min_size=1, max_size=12).filter(lambda text: text not in MODELS))
        place = draw(st.sampled_from([f"/versions/{draw(st.integers(3))}", "/labels/none", ""]))
        return "POST", f"/v1/models/{model}{place}:predict", good, {}
    header = draw(
        st.sampled_from(
            [
                {"Content-Encoding": "gzip"},
                {"Content-Encoding": "br"},
                {"Content-Encoding": b"\xff"},
                {"Origin": "http://evil.example"},
                {"Origin": "null"},
                {"Content-Length": "1" * 30},
            ]
        )
    )
    return "POST", path, good, header


def check(reply: Any) -> None:
    assert 400 <= reply.status_code < 500, (reply.status_code, reply.text)
    assert reply.headers["content-type"] == "application/json"
    [(key, text)] = reply.json().items()
    assert key == "error"
    assert text
    assert "Traceback" not in text


def resident() -> int:
    """KiB of this process in memory."""
    found = re.search(r"VmRSS:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def attack(client: Any, count: int) -> None:
    sent = 0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests())
    def run(request: tuple[str, str, bytes, dict[str, Any]]) -> None:
        nonlocal sent
        method, path, body, headers = request
        check(client.send(method, path, body, headers))
        sent += 1

    run()
    assert sent >= count * 0.9
    for path, body in GOOD:
        assert client("POST", path, body).status_code == 200


def test_requests(client: Any) -> None:
    attack(client, 300)


@pytest.mark.long
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads /proc")
def test_ten_thousand_requests_in_flat_memory(client: Any) -> None:
    attack(client, 500)
    before = resident()
    for _ in range(20):  # hypothesis remembers what it has tried: each time anew
        attack(client, 500)
    assert resident() - before < 32 << 10


def test_memory_is_flat(client: Any) -> None:
    """Bodies of a MiB, each refused another way."""
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("reads /proc")
    bodies = [
        b'{"instances": [' + b"1," * (1 << 19) + b'"x"]}',
        b'{"instances": "' + b"x" * (1 << 20) + b'"}',
        b'{"instances": [' + b"[]," * (1 << 18) + b"1]}",
        b'{"instances": [' + b"[" * (1 << 20),
        b'{"instances": [' + b'"", ' * (1 << 18) + b'"' + b"x" * 1000 + b'"]}',
    ]
    for body in bodies:
        check(client("POST", "/v1/models/half:predict", body))
    before = resident()
    for _ in range(4):
        for body in bodies:
            check(client("POST", "/v1/models/half:predict", body))
    assert resident() - before < 64 << 10


# --- over a socket


@pytest.fixture(scope="module")
def server(models: pathlib.Path) -> Iterator[Server]:
    limits = Limits(body_bytes=1 << 20, body_seconds=0.4, head_seconds=0.4)
    with Server(
        Repository([ModelConfig("half", str(models / "half"))], poll_seconds=0.05), port=0, limits=limits
    ) as made:
        deadline = time.monotonic() + 60
        while not made.repository.ready() and time.monotonic() < deadline:
            time.sleep(0.01)
        yield made


HEAD = b"POST /v1/models/half:predict HTTP/1.1\r\nHost: localhost\r\n"


def talk(server: Server, *parts: bytes, pause: float = 0, close: bool = False) -> tuple[int, dict[str, Any]]:
    """Sends bytes; gives the status and the body, as a client that reads what HTTP/1.1 says."""
    host, port = re.fullmatch(r"http://(.*):(\d+)", server.url).groups()  # type: ignore[union-attr]
    with socket.create_connection((host, int(port)), timeout=10) as own:
        for part in parts:
            try:
                own.sendall(part)
            except OSError:  # it has answered and closed
                break
            time.sleep(pause)
        if close:
            own.shutdown(socket.SHUT_WR)
        data = b""
        while b"\r\n\r\n" not in data or len(data) < length_of(data):
            more = own.recv(65536)
            if not more:
                break
            data += more
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower(), data
    return int(head.split()[1]), json.loads(body)


def length_of(data: bytes) -> int:
    head, _, _ = data.partition(b"\r\n\r\n")
    return len(head) + 4 + int(re.search(rb"content-length: (\d+)", head.lower())[1])  # type: ignore[index]


def alive(server: Server) -> None:
    body = b'{"instances": [1]}'
    assert talk(server, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) == (200, {"predictions": [2.5]})


@pytest.mark.parametrize(
    ("parts", "options", "status"),
    [
        ((b"nonsense\r\n\r\n",), {}, 400),
        ((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,), {}, 400),
        ((b"GET / HTTP/1.1\r\n\r\n",), {}, 400),  # no Host
        ((HEAD + b"Content-Length: x\r\n\r\n",), {}, 400),
        ((HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",), {}, 400),
        ((HEAD + b"A" * 100_000,), {}, 431),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",), {}, 400),
        ((HEAD + b"Content-Length: 100\r\n\r\n{",), {"close": True}, 400),  # cut off
        ((HEAD[:20],), {"close": True}, 400),
        ((HEAD + b"Content-Length: 100\r\n\r\n{",), {}, 408),  # slow
        ((HEAD + b"Content-Length: 100\r\n\r\n", *[b"1"] * 20), {"pause": 0.05}, 408),
        ((HEAD[:20],), {}, 408),
        ((HEAD[:20], *[b"a"] * 20), {"pause": 0.05}, 408),
        ((HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",), {}, (400, 413)),
        ((HEAD + b"Content-Length: 2000000\r\n\r\n", b"1" * 2_000_000), {}, 413),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"10000\r\n" + b"1" * 65536 + b"\r\n"] * 20), {}, 413),
    ],
)
def test_over_a_socket(server: Server, parts: tuple[bytes, ...], options: Any, status: Any) -> None:
    found, answer = talk(server, *parts, **options)
    assert found in (status if isinstance(status, tuple) else (status,)), answer
    assert list(answer) == ["error"]
    alive(server)


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
EMPTY = b"0\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        # two lengths of one body: proxies take either
        HEAD + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n1",
        HEAD + b"Content-Length: 1, 1\r\n\r\n1",
        HEAD + b"Content-Length: +1\r\n\r\n1",
        HEAD + b"Content-Length: -1\r\n\r\n1",
        HEAD + b"Content-Length:\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + EMPTY,
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + EMPTY,
        # codings that not all know, or that some overlook
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + EMPTY,
        HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n" + EMPTY,
        HEAD + b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n" + EMPTY,
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n" + EMPTY,
        HEAD + b"Transfer-Encoding : chunked\r\n\r\n" + EMPTY,
        HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + EMPTY,
        HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n" + EMPTY,
        # lines that end another way, go on, or hold what none may
        HEAD.replace(b"\r\n", b"\n") + b"\n",
        HEAD + b"A: b\nContent-Length: 5\r\n\r\n",
        HEAD + b"A: b\rContent-Length: 5\r\n\r\n",
        HEAD + b"A: b\r\n c\r\n\r\n",
        HEAD + b"A: b\0c\r\n\r\n",
        HEAD + b"A\x01: b\r\n\r\n",
        HEAD + b": b\r\n\r\n",
        # chunks
        CHUNKED + b"1\n1\n0\n\n",
        CHUNKED + b"1 \r\n1\r\n" + EMPTY,
        CHUNKED + b"0x1\r\n1\r\n" + EMPTY,
        CHUNKED + b"-1\r\n1\r\n" + EMPTY,
        CHUNKED + b"1\r\n123\r\n" + EMPTY,
        CHUNKED + b"1;a\nb\r\n1\r\n" + EMPTY,
        CHUNKED + b"f" * 17 + b"\r\n1\r\n" + EMPTY,
        # hosts, versions and methods
        HEAD + b"Host: y\r\n\r\n",
        b"GET /v2 HTTP/2.0\r\nHost: x\r\n\r\n",
        b"GET /v2\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v2/\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_what_can_be_read_in_several_ways(server: Server, head: bytes) -> None:
    """It is refused, and what follows on the connection is never taken for a request."""
    replies = all_of(server, head + b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+)", replies) == [b"400"], replies
    assert b'{"error":' in replies
    alive(server)


def all_of(server: Server, *parts: bytes) -> bytes:
    """All that is answered until the server closes the connection; where it does not, a second passes."""
    host, port = server.url.removeprefix("http://").split(":")
    data = b""
    with socket.create_connection((host, int(port)), timeout=1) as own:
        for part in parts:
            own.sendall(part)
        try:
            while more := own.recv(65536):
                data += more
        except TimeoutError:
            pass
    return data


BODY = b'{"instances": [1]}'
LAST = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
        # another protocol is offered, as Java's client does: body and connection stay what they are
        HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
        HEAD
        + b"Connection: upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\n\r\n12\r\n"
        + BODY
        + b"\r\n0\r\n\r\n",
        # a trailer is no header
        CHUNKED + b"12\r\n" + BODY + b"\r\n0\r\nContent-Encoding: gzip\r\n\r\n",
        CHUNKED + b"12;extension=1\r\n" + BODY + b"\r\n0\r\n\r\n",
    ],
)
def test_requests_ahead_of_their_answers(server: Server, request_: bytes) -> None:
    """They are answered one after the other, whole or byte by byte."""
    replies = all_of(server, request_ * 3 + LAST)
    assert replies.count(b'{"predictions":[2.5]}') == 3, replies
    assert replies.endswith(b'{"live":true}')
    pieces = request_ + LAST
    replies = all_of(server, *(pieces[n : n + 1] for n in range(len(pieces))))
    assert replies.count(b'{"predictions":[2.5]}') == 1, replies
    assert replies.endswith(b'{"live":true}')


def test_a_client_that_asks_before_it_sends_a_body(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as own:
        own.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
        assert own.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        own.sendall(BODY)
        assert own.recv(65536).endswith(b'{"predictions":[2.5]}')


def test_an_answer_without_a_body(server: Server) -> None:
    """The head is sent, also where nothing comes behind it."""
    replies = all_of(server, b"HEAD /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n" + LAST)
    assert re.findall(rb"HTTP/1.1 (\d+)", replies) == [b"405", b"200"], replies


def test_nonsense_behind_a_request(server: Server) -> None:
    """The request is answered, the nonsense is not, and the connection ends."""
    begun = time.monotonic()
    replies = all_of(server, HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY + b"\x16\x03\x01\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+)", replies) == [b"200"]
    assert time.monotonic() - begun < 0.9, "the connection stayed open"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (HEAD + b"A: " + b"b" * 70_000 + b"\r\n\r\n", 431),
        (HEAD + b"A: b\r\n" * 20_000 + b"\r\n", 431),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (CHUNKED + b"1;" + b"a" * 600_000, 431),
        (CHUNKED + b"0\r\nA: " + b"b" * 600_000, 431),
    ],
)
def test_what_is_no_body_is_bounded(server: Server, head: bytes, status: int) -> None:
    assert talk(server, head)[0] == status
    alive(server)


def test_slow_clients_are_in_nobodys_way(server: Server) -> None:
    threads = [
        threading.Thread(target=talk, args=(server, HEAD + b"Content-Length: 9\r\n\r\n", b"1")) for _ in range(50)
    ]
    for thread in threads:
        thread.start()
    begun = time.monotonic()
    for _ in range(5):
        alive(server)
    assert time.monotonic() - begun < 5
    for thread in threads:
        thread.join()


def test_a_refused_body_is_not_read_for_ever(server: Server) -> None:
    """The answer comes at once, and the connection ends when the rest of the body does not."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as own:
        own.sendall(HEAD + b"Content-Length: 2000000\r\n\r\n" + b"1" * 10)
        assert own.recv(65536).startswith(b"HTTP/1.1 413")
        own.sendall(b"1")
        assert own.recv(65536) == b""


# --- limits that others use up


def test_too_many(repository: Repository, new_client: Any) -> None:
    busy = new_client(build_app(repository, limits=Limits(requests=0)))
    reply = busy("POST", "/v1/models/half:predict", {"instances": [1.0] * 7})
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
    packed = gzip.compress(b"1" * 100_000)
    small = new_client(build_app(repository, limits=Limits(buffered_bytes=50_000)))
    assert small("POST", "/v1/models/half:predict", packed, Content_Encoding="gzip").status_code == 429
    tight = new_client(build_app(repository, limits=Limits(body_bytes=50_000)))
    assert tight("POST", "/v1/models/half:predict", packed, Content_Encoding="gzip").status_code == 413
    full = new_client(build_app(repository, limits=Limits(buffered_bytes=10)))
    for _ in range(3):
        assert full("POST", "/v1/models/half:predict", {"instances": [1.0]}).status_code == 429
        assert full("GET", "/v1/models/half").status_code == 200
