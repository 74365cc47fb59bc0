"""A Python function → a StableHLO module and the signature that goes with it.

The function is exported over its flat leaves, so that ``jax.export`` never meets a container class, most of which it
refuses to serialize; the trees are ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jaxlib
from jax import export as jax_export

from obmlite import dims, specs
from obmlite import tree as trees
from obmlite.errors import ExportError, LeafError, context
from obmlite.schema.records import ArgumentKind, FixedArgument, FixedKind, ModuleFormat, ModuleRecord
from obmlite.signature import Signature
from obmlite.specs import TensorSpec

if TYPE_CHECKING:
    from obmlite import _stablehlo

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""Platforms that a function is exported for unless told otherwise."""

MAX_CONSTANT_BYTES = 1024
"""Largest array, in bytes, that may stay in StableHLO; weights belong into safetensors."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported function.

    Attributes:
      signature: its arguments and results.
      module: what the manifest says of its module; ``file`` is empty until it is saved.
      blob: the file's bytes.
    """

    signature: Signature
    module: ModuleRecord
    blob: bytes


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of the call that is exported."""

    name: str
    kind: ArgumentKind
    value: Any
    place: int | str  # position or keyword in the call of the user's function


def export(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    static: Sequence[str],
    constraints: Sequence[str],
    platforms: Sequence[str],
    name: str,
) -> Exported:
    """Exports a function for arguments like the given ones.

    Raises:
      ExportError: the function cannot be exported as it is; the text says why and what to do.
      LeafError: an argument or result holds something that is neither array nor number.
    """
    from obmlite import _stablehlo  # MLIR's bindings take long to import, and loading has no use for them

    arguments, fixed = name_arguments(fn, args, kwargs, static)
    leaves, tree = trees.flatten_arguments({a.name: a.value for a in arguments})
    leaf_specs = []
    for leaf_name, leaf in zip(tree.names, leaves, strict=True):
        hint = f'static=("{trees.split_name(leaf_name)[0]}",), if it only decides what is computed'
        with context(object=name, leaf=leaf_name, fix=hint):
            leaf_specs.append(TensorSpec.of(leaf))
    texts = [*constraints, *_constraints_of(leaves)]
    constraints = list(dict.fromkeys(dims.parse_constraint(text).text for text in texts))
    structs = specs.to_jax(leaf_specs, constraints)
    rebuild = _rebuilder([a.value for a in arguments], leaves, tree)
    outputs: list[trees.Tree] = []

    def flat(*values: Any) -> tuple[Any, ...]:
        positional: dict[int, Any] = {}
        keywords: dict[str, Any] = {}
        for argument, value in zip(arguments, rebuild(list(values)), strict=True):
            (positional if isinstance(argument.place, int) else keywords)[argument.place] = value  # type: ignore[index]
        for place, value in fixed_values.items():
            (positional if isinstance(place, int) else keywords)[place] = value  # type: ignore[index]
        result = fn(*(positional[n] for n in sorted(positional)), **keywords)
        result_leaves, result_tree = trees.flatten(result)
        for result_name, leaf in zip(result_tree.names, result_leaves, strict=True):
            with context(leaf=f"result {result_name}".strip(), object=name):
                TensorSpec.of(leaf)
        outputs[:] = [result_tree]
        return tuple(result_leaves)

    fixed_values = {place: value for place, value, _ in fixed if place is not None}
    flat.__name__ = flat.__qualname__ = _identifier(name)
    with _no_locations(), context(object=name):
        exported = _lower(jax.jit(flat), structs, platforms)
        module = _stablehlo.normalise(exported.mlir_module_serialized)
        _check_constants(module)
        blob, offset = _serialize(exported, module)
    out_specs = [TensorSpec.of(aval) for aval in exported.out_avals]
    signature = Signature(
        tree,
        tuple(leaf_specs),
        outputs[0],
        tuple(out_specs),
        tuple(a.kind for a in arguments),
        tuple(constraints),
        tuple(f for _, _, f in fixed),
    )
    kept = tuple(exported.module_kept_var_idx)
    record = ModuleRecord(
        file="",
        format=ModuleFormat.JAX_EXPORT,
        offset=offset,
        length=len(module.artifact),
        stablehlo_version=module.version,
        calling_convention=exported.calling_convention_version,
        platforms=tuple(exported.platforms),
        num_devices=exported.nr_devices,
        arguments=tuple(leaf_specs),
        results=tuple(out_specs),
        kept=None if len(kept) == len(leaves) else kept,
        ordered_effects=tuple(type(e).__name__ for e in exported.ordered_effects),
        unordered_effects=tuple(type(e).__name__ for e in exported.unordered_effects),
        disabled_checks=tuple(str(c) for c in exported.disabled_safety_checks),
        uses_global_constants=exported.uses_global_constants,
        custom_calls=module.custom_calls,
        dialects=module.dialects,
        jax_version=jax.__version__,
        jaxlib_version=jaxlib.__version__,
        name=exported.fun_name,
    )
    return Exported(signature, record, blob)


# --- arguments


def name_arguments(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], static: Sequence[str]
) -> tuple[list[Argument], list[tuple[int | str | None, Any, FixedArgument]]]:
    """The call's arguments under the function's own names for them, and apart from them those that are fixed.

    A fixed argument stands with its place in the call (None where its default is left to the function) and its value.
    """
    parameters = _parameters(fn)
    given: list[Argument] = []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None if parameters else "args")
    for n, value in enumerate(args):
        if n < len(positional):
            p = positional[n]
            kind = ArgumentKind.POSITIONAL_ONLY if p.kind is p.POSITIONAL_ONLY else ArgumentKind.POSITIONAL_OR_KEYWORD
            given.append(Argument(p.name, kind, value, n))
        elif rest is not None:
            given.append(Argument(f"{rest}[{n - len(positional)}]", ArgumentKind.POSITIONAL_ONLY, value, n))
        else:
            raise ExportError(
                "The function takes fewer arguments than were given.",
                expected=f"at most {len(positional)}: {', '.join(p.name for p in positional)}",
                found=str(len(args)),
            )
    given.extend(Argument(key, ArgumentKind.KEYWORD_ONLY, value, key) for key, value in kwargs.items())
    names = [a.name for a in given]
    for twice in {n for n in names if names.count(n) > 1}:
        raise ExportError("An argument is given twice.", leaf=twice)
    unknown = [n for n in static if n not in names and n not in {p.name for p in parameters}]
    if unknown:
        raise ExportError(
            "A static argument is none of the function's.", field="static", expected=", ".join(names), found=unknown[0]
        )
    fixed: list[tuple[int | str | None, Any, FixedArgument]]
    fixed = [(a.place, a.value, _fixed(a.name, FixedKind.STATIC, a.value)) for a in given if a.name in static]
    defaults = [
        (None, p.default, _fixed(p.name, FixedKind.DEFAULT, p.default))
        for p in parameters
        if p.name not in names and p.default is not inspect.Parameter.empty
    ]
    _check_required(parameters, names)
    return [a for a in given if a.name not in static], [*fixed, *defaults]


def _parameters(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some callables tell nothing of themselves
        return []


def _check_required(parameters: Sequence[inspect.Parameter], names: Sequence[str]) -> None:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [p.name for p in parameters if p.name not in names and p.default is p.empty and p.kind not in variable]
    if missing:
        raise ExportError(
            "The function needs an argument that was not given.",
            leaf=", ".join(missing),
            fix="give an array, or a shape and dtype, for each of its arguments",
        )


def _fixed(name: str, kind: FixedKind, value: Any) -> FixedArgument:
    """What can be held of a fixed argument; never a repr that holds an address."""
    try:
        trees.pack_static(value)
    except LeafError:
        return FixedArgument(name, kind, False, None, f"a {type(value).__qualname__}")
    return FixedArgument(name, kind, True, value, repr(value)[:200])


def _rebuilder(values: list[Any], leaves: list[Any], tree: trees.Tree) -> Callable[[list[Any]], list[Any]]:
    """Puts traced leaves into the containers that the user gave, which our tree may hold only a plain view of."""
    jax_leaves, treedef = jax.tree.flatten(values)
    if len(jax_leaves) == len(leaves) and all(a is b for a, b in zip(jax_leaves, leaves, strict=True)):
        return lambda traced: list(jax.tree.unflatten(treedef, traced))
    return lambda traced: list(tree.unflatten(traced).values())


def _constraints_of(leaves: Sequence[Any]) -> list[str]:
    """The constraints of the one symbolic scope that the user's own specs are in."""
    scopes = {
        id(d.scope): d.scope for leaf in leaves for d in getattr(leaf, "shape", ()) if jax_export.is_symbolic_dim(d)
    }
    if len(scopes) > 1:
        raise ExportError(
            "The arguments' symbolic dimensions are of different scopes.",
            field="dimension",
            fix="make all of them in one jax.export.symbolic_shape call or scope, or give them as text by obmlite.spec",
        )
    # Private, with this name in JAX 0.9.2 to 0.12; without it the constraints would be lost without a word.
    return [c.debug_str for scope in scopes.values() for c in scope._explicit_constraints]


# --- lowering

_locations = threading.Lock()


@contextlib.contextmanager
def _no_locations() -> Iterator[None]:
    """Keeps paths of this machine out of what is traced and lowered meanwhile; they would also make bytes differ.

    The setting is the whole process's: other threads that trace meanwhile lose the locations in theirs, no more.
    """
    setting = "jax_traceback_in_locations_limit"
    with _locations:
        before = getattr(jax.config, setting)
        jax.config.update(setting, 0)
        try:
            yield
        finally:
            jax.config.update(setting, before)


def _lower(jitted: Any, structs: Sequence[Any], platforms: Sequence[str]) -> jax_export.Exported:
    try:
        traced = jitted.trace(*structs)  # the user's own errors pass through from here
    except jax.errors.ConcretizationTypeError as error:
        error.add_note('obmlite: an argument that decides what is computed must be static, as in static=("train",)')
        raise
    _refuse_callbacks(traced.jaxpr)
    try:
        return jax_export.export(jitted, platforms=list(platforms))(*structs)
    except (NotImplementedError, ValueError, TypeError, RuntimeError) as error:  # what JAX's lowering rules raise
        text = str(error)
        found = re.search(r"primitive '?([\w.-]+)'? not found for platforms? \[?'?(\w+)", text)
        if found:
            raise ExportError(
                "The function uses a primitive that one of the platforms does not have.",
                field="platforms",
                expected=f"{found[1]} on {', '.join(platforms)}",
                found=f"no {found[1]} on {found[2]}",
                fix=f"platforms={tuple(p for p in platforms if p != found[2])!r}",
            ) from error
        if "no compatibility guarantees" in text:
            raise ExportError(
                "The function uses custom calls that JAX does not promise to keep.", found=text[:300]
            ) from error
        raise ExportError(
            "JAX cannot lower the function.",
            field="platforms",
            expected=f"code for {', '.join(platforms)}",
            found=text[:300],
            fix="if one platform is at fault, leave it out of platforms=",
        ) from error


def _refuse_callbacks(jaxpr: Any) -> None:
    """Refuses calls back into Python, wherever in the function they are; JAX's own message depends on the platforms."""
    pending, seen = [jaxpr], set()
    while pending:
        current = pending.pop()
        current = getattr(current, "jaxpr", current)
        if id(current) in seen:
            continue
        seen.add(id(current))
        for eqn in current.eqns:
            name = eqn.primitive.name
            if "callback" in name or name.startswith("debug_print"):
                raise ExportError(
                    "The function calls back into Python, which no other process can do.",
                    found=name,
                    fix="remove callbacks and debug prints (jax.debug, pure_callback, io_callback) before exporting",
                )
            for value in eqn.params.values():
                parts = value if isinstance(value, (tuple, list)) else (value,)
                pending.extend(p for p in parts if hasattr(p, "eqns") or hasattr(p, "jaxpr"))


def _check_constants(module: _stablehlo.Module) -> None:
    large = [c for c in module.constants if c.nbytes > MAX_CONSTANT_BYTES]
    if large:
        shown = ", ".join(f"{c.type} ({c.nbytes} bytes)" for c in large[:5])
        raise ExportError(
            "The function captures arrays that are too large to stay in its code.",
            field="captured arrays",
            expected=f"at most {MAX_CONSTANT_BYTES} bytes each",
            found=shown + (f", … ({len(large)} in all)" if len(large) > 5 else ""),
            fix="pass them as arguments, and so as weights, instead of closing over them",
        )


def _serialize(exported: jax_export.Exported, module: _stablehlo.Module) -> tuple[bytes, int]:
    """jax.export's own serialization with our module in it, and where the module lies."""
    blob = bytes(dataclasses.replace(exported, mlir_module_serialized=module.artifact).serialize())
    offset = blob.find(module.artifact)
    if offset < 0 or blob.find(module.artifact, offset + 1) >= 0:
        raise ExportError("jax.export did not keep the module as one range of bytes.", found=f"jax {jax.__version__}")
    return blob, offset


def _identifier(name: str) -> str:
    """A name that a StableHLO module may have."""
    return re.sub(r"\W", "_", name) or "function"
