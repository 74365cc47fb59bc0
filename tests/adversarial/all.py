"""Every kind of input."""

from __future__ import annotations

from tests.adversarial import code, files, manifests, packages, signatures
from tests.adversarial.kinds import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        manifests.MANIFEST,
        manifests.SEALED,
        packages.PACKAGE,
        packages.WEIGHTS,
        packages.HEADER,
        packages.CONTENT,
        code.STABLEHLO,
        files.EXAMPLES,
        files.INDEX,
        files.MSGPACK,
        files.DESCRIPTION,
        files.TEXT,
        files.STATIC,
        signatures.SIGNATURE,
    )
}
