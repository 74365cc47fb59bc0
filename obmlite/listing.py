"""What a package holds, for people and for programs; from the manifest alone."""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from obmlite import _arrays
from obmlite._promises import durable
from obmlite.errors import ObmliteError, context
from obmlite.io.store import LocalDirectory
from obmlite.loading import function_signature, open_manifest, open_model
from obmlite.model import Model
from obmlite.schema import records as r
from obmlite.schema.decode import decode
from obmlite.signature import Signature
from obmlite.specs import TensorSpec
from obmlite.weights import count_leaves, size

LEAVES = 40
"""Leaves that a listing for people shows unless told otherwise."""


def listing(path: str | os.PathLike[str], *, operations: bool = False) -> dict[str, Any]:
    """Everything that the manifest says, but digests and leaves' places, as plain data for JSON.

    Args:
      path: the package's directory.
      operations: whether to list each function's operations too, and which of them are not replayed; its file is read
        for this, in a child process first, since who looks into a package may not know yet whether to trust it.

    Raises:
      PackageNotFoundError: there is no package at the path.
      CorruptPackageError: the manifest is not what was saved.
      UnsupportedFormatError: the package needs a newer obmlite.
    """
    store = LocalDirectory(path)
    with context(package=store.name):
        manifest = decode(open_manifest(store))
    describe = functools.partial(_function, manifest)
    if operations:
        describe = functools.partial(_with_operations, describe, open_model(store, manifest, untrusted=True))
    return {
        "package": store.name,
        "format": f"{manifest.format[0]}.{manifest.format[1]}",
        "producer": manifest.producer,
        "digest": manifest.digest.hex(),
        "files": {f.path: f.length for f in manifest.files.values()},
        "nbytes": sum(f.length for f in manifest.files.values()),
        "functions": _each(manifest.functions, describe),
        "weights": _each(manifest.weights, _weights),
        "pipelines": _each(manifest.pipelines, _pipeline),
        "polymorphic": _each(manifest.polymorphic, _polymorphic),
        "supplementals": _each(manifest.supplementals, functools.partial(_supplemental, manifest)),
        "default_pipeline": manifest.default_pipeline,
        "device_assignment": [
            {"id": d.id, **({} if d.coords is None else {"coords": list(d.coords), "core_on_chip": d.core_on_chip})}
            for d in manifest.device_assignment
        ],
        "metadata": dict(manifest.metadata),
    }


def _each(objects: Mapping[str, Any], describe: Any) -> dict[str, Any]:
    found = {}
    for name in objects:
        try:
            found[name] = describe(objects[name])
        except ObmliteError as error:  # the others can still be shown
            found[name] = {"error": error.problem, "found": error.found}
    return found


def _leaf(name: str, spec: TensorSpec) -> dict[str, Any]:
    leaf: dict[str, Any] = {
        "name": name,
        "dtype": spec.kind.short,
        "shape": [d if isinstance(d, int) else str(d) for d in spec.shape],
    }
    for key, value in (
        ("weak_type", spec.weak_type),
        ("partition", spec.partition and str(spec.partition)),
        ("mesh", spec.partition and spec.partition.mesh and str(spec.partition.mesh)),
        ("memory_kind", spec.memory_kind),
        ("logical_axes", spec.logical_axes and str(spec.logical_axes)),
    ):
        if value:
            leaf[key] = value
    return leaf


def _leaves(names: Sequence[str], specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [_leaf(name, spec) for name, spec in zip(names, specs, strict=True)]


def _function(manifest: r.ManifestRecord, record: r.FunctionRecord) -> dict[str, Any]:
    signature: Signature = function_signature(record)
    module = record.primal
    return {
        "signature": str(signature),
        "inputs": _leaves(signature.inputs.names, signature.input_specs),
        "outputs": _leaves(signature.outputs.names, signature.output_specs),
        "constraints": list(record.constraints),
        "fixed": {f.name: {"kind": f.kind.name.lower(), "value": f.text} for f in record.fixed},
        "weights": {b.argument: b.weights for b in record.bindings},
        "captures": [
            {"weights": c.weights, "leaf": c.leaf, "differentiable": c.differentiable} for c in module.captures
        ],
        "platforms": list(module.platforms),
        "devices": module.num_devices,
        "mesh": str(module.mesh) if module.mesh else "",
        "vjp_order": len(record.vjps),
        "jax": module.jax_version,
        "jaxlib": module.jaxlib_version,
        "stablehlo": module.stablehlo_version,
        "calling_convention": module.calling_convention,
        "custom_calls": list(module.custom_calls),
        "dialects": list(module.dialects),
        "durable": durable(module.dialects),
        "nbytes": manifest.files[module.file].length,
        "compile_options": {platform: dict(options) for platform, options in record.compile_options.items()},
        "visibility": record.visibility.name.lower(),
        "metadata": dict(record.metadata),
    }


def _with_operations(describe: Any, model: Model, record: r.FunctionRecord) -> dict[str, Any]:
    function = model.functions[record.name]
    return {
        **describe(record),
        "operations": function.operations,
        "not_replayed": [str(reason) for reason in function.replayable.reasons],
    }


def _weights(record: r.WeightsRecord) -> dict[str, Any]:
    names = record.tree.names
    leaves = []
    dtypes: collections.Counter[str] = collections.Counter()
    for leaf, (name, spec, tensor) in enumerate(zip(names, record.specs, record.leaf_tensor.tolist(), strict=True)):
        entry = _leaf(name, spec)
        first = int(record.tensor_leaf[tensor]) if tensor >= 0 else leaf
        if first != leaf:
            entry["tied_to"] = names[first]
        else:
            dtypes[spec.kind.short] += _arrays.number_of(spec)
        entry["nbytes"] = _arrays.nbytes(spec)
        leaves.append(entry)
    return {
        "leaves": leaves,
        "parameters": dtypes.total(),
        "dtypes": dict(dtypes.most_common()),
        "nbytes": sum(leaf["nbytes"] for leaf in leaves if "tied_to" not in leaf),
        "files": sorted({piece.file for pieces in record.pieces for piece in pieces}),
        "visibility": record.visibility.name.lower(),
        "metadata": dict(record.metadata),
    }


def _pipeline(record: r.PipelineRecord) -> dict[str, Any]:
    return {
        "steps": [
            {
                "role": s.role.name.lower(),
                "function": s.function,
                "weights": {b.argument: f"{b.weights}{'.' if b.subtree else ''}{b.subtree}" for b in s.bindings},
            }
            for s in record.steps
        ],
        "pass_through": record.pass_through,
        "visibility": record.visibility.name.lower(),
        "metadata": dict(record.metadata),
    }


def _polymorphic(record: r.PolymorphicRecord) -> dict[str, Any]:
    return {
        "functions": list(record.functions),
        "visibility": record.visibility.name.lower(),
        "metadata": dict(record.metadata),
    }


def _supplemental(manifest: r.ManifestRecord, record: r.SupplementalRecord) -> dict[str, Any]:
    lengths = [manifest.files[path].length for path in record.entries.values() if path is not None]
    return {
        "mime_type": record.mime_type,
        "version": record.version,
        "function": record.function,
        "form": record.form.name.lower(),
        "entries": list(record.entries),
        "nbytes": sum(lengths) + len(record.inline),
        "metadata": dict(record.metadata),
    }


# --- text


def text(found: Mapping[str, Any], name: str | None = None, *, leaves: int | None = LEAVES) -> Iterator[str]:
    """The listing, or one object of it, as lines of text.

    Args:
      found: what :func:`listing` returned.
      name: an object; None for the whole package.
      leaves: how many leaves to show at most; None for all.

    Raises:
      KeyError: there is no object of that name.
    """
    if name is None:
        yield from _package_text(found)
        return
    for kind in ("functions", "weights", "pipelines", "polymorphic", "supplementals"):
        if name in found[kind]:
            yield from _object_text(kind, name, found[kind][name], leaves)
            return
    raise KeyError(name)


def _package_text(found: Mapping[str, Any]) -> Iterator[str]:
    yield found["package"]
    count = len(found["files"])
    yield (
        f"  format {found['format']}, written by {found['producer']}, {count} {'file' if count == 1 else 'files'}, "
        f"{size(found['nbytes'])}"
    )
    yield f"  digest {found['digest']}"
    for kind in ("functions", "polymorphic", "weights", "pipelines", "supplementals"):
        if found[kind]:
            yield ""
            yield kind
        for name, entry in found[kind].items():
            default = kind == "pipelines" and name == found["default_pipeline"]
            for n, line in enumerate(_summary(kind, name, entry)):
                yield f"{'  ' if n == 0 else '      '}{line}{' (default)' if default and n == 0 else ''}"
            if kind == "functions":
                yield from (f"      {line}".rstrip() for line in _operations_text(entry))
    if found["device_assignment"]:
        yield ""
        yield "device assignment"
        yield from (f"  {_device(device)}" for device in found["device_assignment"])
    if found["metadata"]:
        yield ""
        yield "metadata"
        for key, value in found["metadata"].items():
            yield f"  {key}: {value}"


def _device(device: Mapping[str, Any]) -> str:
    coords = f" at {','.join(map(str, device['coords']))}, core {device['core_on_chip']}" if "coords" in device else ""
    return f"device {device['id']}{coords}"


def _summary(kind: str, name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    if entry.get("visibility") == "private":
        lines = _lines(kind, name, entry)
        yield f"{next(lines)} (private)"
        yield from lines
    else:
        yield from _lines(kind, name, entry)


def _lines(kind: str, name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    if "error" in entry:
        yield f"{name}: {entry['error']} {entry['found'] or ''}".rstrip()
    elif kind == "functions":
        yield f"{name}{entry['signature']}"
        yield (
            f"{', '.join(entry['platforms'])} · jax {entry['jax']} · StableHLO {entry['stablehlo']} · "
            + size(entry["nbytes"])
            + ("" if entry["durable"] else " · not durable")
        )
        if entry["constraints"]:
            yield f"where {', '.join(entry['constraints'])}"
        if entry["fixed"]:
            yield "fixed " + ", ".join(f"{k} = {v['value']} ({v['kind']})" for k, v in entry["fixed"].items())
    elif kind == "weights":
        dtypes = ", ".join(entry["dtypes"])
        yield (
            f"{name}: {count_leaves(len(entry['leaves']))}, {entry['parameters']:,} parameters, {size(entry['nbytes'])}"
            + (f", {dtypes}" if dtypes else "")
        )
    elif kind == "pipelines":
        steps = []
        for step in entry["steps"]:
            bound = "".join(f", {argument} = {weights}" for argument, weights in step["weights"].items())
            steps.append(f"{step['function']}{bound}")
        yield f"{name}: {' → '.join(steps)}{' (with a value passed by)' if entry['pass_through'] else ''}"
    elif kind == "polymorphic":
        yield f"{name}: {', '.join(entry['functions'])}"
    else:
        files = f" of {len(entry['entries'])} files" if entry["form"] == "directory" else ""
        owner = f", of {entry['function']}" if entry["function"] else ""
        kind = f"{entry['mime_type']} {entry['version']}".strip()
        yield f"{name}: {entry['form']}{files}, {size(entry['nbytes'])}{f', {kind}' if kind else ''}{owner}"


def _object_text(kind: str, name: str, entry: Mapping[str, Any], leaves: int | None) -> Iterator[str]:
    yield from _summary(kind, name, entry)
    if kind == "functions" and "error" not in entry:
        yield ""
        yield "inputs"
        yield from _rows(entry["inputs"], leaves)
        yield ""
        yield "outputs"
        yield from _rows(entry["outputs"], leaves)
        yield ""
        facts = {
            "weights": ", ".join(f"{a} = {w}" for a, w in entry["weights"].items()),
            "captures": _captured(entry["captures"]),
            "devices": "any number" if entry["devices"] == 1 else f"{entry['devices']}, of a mesh {entry['mesh']}",
            "gradients": f"to order {entry['vjp_order']}" if entry["vjp_order"] else "none saved",
            "jaxlib": entry["jaxlib"],
            "calling convention": entry["calling_convention"],
            "custom calls": ", ".join(entry["custom_calls"]) or "none",
            "dialects": ", ".join(entry["dialects"]),
            **{
                f"compiled for {platform} with": ", ".join(f"{option}={value}" for option, value in options.items())
                for platform, options in entry["compile_options"].items()
            },
        }
        yield from (f"  {key}: {value}" for key, value in facts.items() if value)
        yield from _operations_text(entry)
    if kind == "weights" and "error" not in entry:
        for file in entry["files"]:
            yield f"      {file}"
        yield ""
        yield from _rows(entry["leaves"], leaves)
    if kind == "supplementals" and "error" not in entry:
        yield from (f"      {path}" for path in entry["entries"])
    if entry.get("metadata"):
        yield ""
        yield "metadata"
        yield from (f"  {key}: {value}" for key, value in entry["metadata"].items())


def _operations_text(entry: Mapping[str, Any]) -> Iterator[str]:
    if "operations" in entry:
        yield ""
        yield "operations"
        yield from (f"  {count:6,} {operation}" for operation, count in entry["operations"].items())
        yield ""
        yield "not replayed" if entry["not_replayed"] else "replayable"
        yield from (f"  {reason}" for reason in entry["not_replayed"])


def _captured(captures: Sequence[Mapping[str, Any]]) -> str:
    constant = sum(not c["differentiable"] for c in captures)
    held = f", {constant} of them constant under jax.grad" if constant else ""
    return f"{len(captures)} in {', '.join(sorted({c['weights'] for c in captures}))}{held}" if captures else "none"


def _rows(entries: Sequence[Mapping[str, Any]], most: int | None) -> Iterator[str]:
    shown = entries if most is None else entries[:most]
    width = min(max((len(e["name"]) for e in shown), default=0), 60)
    for e in shown:
        weak = "~" if e.get("weak_type") else ""
        kind = f"{weak}{e['dtype']}[{','.join(map(str, e['shape']))}]"
        parts = [
            size(e["nbytes"]) if "nbytes" in e and "tied_to" not in e else "",
            f"tied to {e['tied_to']}" if "tied_to" in e else "",
            f"{e['partition']} on {e['mesh']}" if "mesh" in e else e.get("partition", ""),
            e.get("memory_kind", ""),
            e.get("logical_axes", ""),
        ]
        rest = "  ".join(part for part in parts if part)
        yield f"  {e['name'] or '(the leaf)':<{width}}  {kind:<20}  {rest}".rstrip()
    if len(entries) > len(shown):
        yield f"  … {len(entries) - len(shown):,} more leaves (--leaves N or --all shows more)"
