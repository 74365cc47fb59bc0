"""StableHLO of strangers: read in a child first, so that what crashes MLIR's reader is a refusal."""

from __future__ import annotations

import collections
import functools
import random
import struct

import jax
import jax.numpy as jnp

from obmlite import _isolation
from obmlite.errors import CorruptPackageError, ObmliteError, UnsupportedFormatError
from obmlite.replay import _reading
from obmlite.schema import records as r
from tests.adversarial import mutations, packages
from tests.adversarial.kinds import MAX_MESSAGE, REFUSALS, Kind
from tests.adversarial.memory import Finding

BATCH = 8
"""Modules in one input: a child that survives one reads the next."""

LIMITS = _isolation.Limits(seconds=5)


@functools.cache
def good_modules() -> tuple[bytes, ...]:
    """Modules as packages hold them: without their debugging data."""
    record, contents = packages.record_of(0), packages.whole()
    found = []
    for function in record.functions.values():
        for module in (function.primal, *function.vjps):
            found.append(contents[module.file][module.offset : module.offset + module.length])

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: jnp.sort(c) + jnp.cumsum(c), x)

    exported = jax.export.export(jax.jit(loop))(jax.ShapeDtypeStruct((5,), "float32"))
    assert record.files[module.file].kind is r.FileKind.FUNCTION
    return (*found, exported.mlir_module_serialized)


def _make(rng: random.Random) -> bytes:
    parts = []
    for _ in range(BATCH):
        good = rng.choice(good_modules())
        changed = bytearray(good)
        if rng.random() < 0.5:
            for _ in range(rng.choice((1, 1, 2, 4))):
                changed[rng.randrange(4, len(changed))] ^= 1 << rng.randrange(8)
        else:
            changed = bytearray(mutations.changed(rng, good, (b"ML\xefR", b"StableHLO_v9.9.9"), good_modules()))
        parts.append(struct.pack("<Q", len(changed)) + changed)
    return b"".join(parts)


def _read(data: bytes) -> dict[str, int]:
    modules = []
    at = 0
    while at < len(data):
        [length] = struct.unpack_from("<Q", data, at)
        modules.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    outcomes: collections.Counter[str] = collections.Counter()
    for module, found in zip(modules, _isolation.read_apart(modules, LIMITS), strict=True):
        if isinstance(found, ObmliteError):
            if not isinstance(found, REFUSALS) or not found.field or len(str(found)) > MAX_MESSAGE:
                raise Finding("an error names no field, or is too long") from found
            outcomes["refused"] += 1
            if isinstance(found, CorruptPackageError):
                outcomes["crashed child"] += 1
                outcomes["refused"] -= 1
            continue
        _reading.read(found)  # here, as a package's reader does
        outcomes["same" if module in good_modules() else "other"] += 1
    return dict(outcomes)


STABLEHLO = Kind(
    "stablehlo",
    "modules, their digests made again, as untrusted=True reads them",
    _make,
    _read,
    seconds=60.0,
    refusals=(CorruptPackageError, UnsupportedFormatError),
)
