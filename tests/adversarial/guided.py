"""The same kinds, with inputs that are guided by what of the library they reach: by atheris, where it is installed.

``python -m tests.adversarial.guided KIND [SECONDS]``, in the environment ``fuzz`` of ``tests/versions.py``. What
atheris changes are bytes below any digest; they are sealed before they are read. It ends at the first finding, and
keeps it.
"""

from __future__ import annotations

import pathlib
import random
import sys
import tempfile

import atheris  # type: ignore[import-not-found,unused-ignore]

with atheris.instrument_imports(include=["obmlite", "msgpack"]):
    from obmlite.schema import trailer
    from tests.adversarial import all as every
    from tests.adversarial import fuzzing
    from tests.adversarial.kinds import Kind

KEPT = pathlib.Path(__file__).resolve().parents[2] / ".cache" / "fuzz"


def sealed(kind: Kind, data: bytes) -> bytes:
    """Input for a kind, from bytes without digests."""
    if kind.name == "manifest":
        return trailer.seal(data)
    if kind.name == "package":
        return data[:1] + trailer.seal(data[1:])
    return data


def unsealed(kind: Kind, data: bytes) -> bytes:
    return data[: -trailer.SIZE] if kind.name in ("manifest", "package") else data


def main() -> None:
    kind = every.KINDS[sys.argv[1]]
    seconds = int(sys.argv[2]) if len(sys.argv) > 2 else 60

    def once(data: bytes) -> None:
        if not data:
            return
        given = sealed(kind, data)
        _, error = fuzzing.one(kind, given)
        if error is not None:
            print(f"{fuzzing.where(error)}\n{fuzzing.keep(kind, given, str(KEPT))}", file=sys.stderr, flush=True)
            raise error

    with tempfile.TemporaryDirectory() as corpus:
        for n in range(50):
            made = kind.make(random.Random(n))
            pathlib.Path(corpus, str(n)).write_bytes(unsealed(kind, made))
        options = [f"-max_total_time={seconds}", "-max_len=100000", "-rss_limit_mb=4096", f"-artifact_prefix={corpus}/"]
        atheris.Setup([sys.argv[0], *options, corpus], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
