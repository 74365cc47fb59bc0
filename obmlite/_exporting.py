"""A Python function → its signature, and a function over flat leaves to be lowered.

The function is exported over its flat leaves, so that ``jax.export`` never meets a container class, most of which it
refuses to serialize; the trees are ours.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import export as jax_export

from obmlite import _engine, _lowering, dims, specs
from obmlite import tree as trees
from obmlite.errors import ExportError, LeafError, context
from obmlite.schema.records import ArgumentKind, FixedArgument, FixedKind, ModuleRecord
from obmlite.signature import Signature
from obmlite.specs import TensorSpec


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported function.

    Attributes:
      signature: its arguments and results.
      modules: what the manifest says of its module and of those of its VJPs. Until they are saved, ``file`` is a key of
        :attr:`blobs`, and captures are of the weights object ``""``, whose leaves are :attr:`captures`.
      blobs: the files' bytes.
      captures: arrays that it closed over.
    """

    signature: Signature
    modules: tuple[ModuleRecord, ...]
    blobs: Mapping[str, bytes]
    captures: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of the call that is exported."""

    name: str
    kind: ArgumentKind
    value: Any
    place: int | str  # position or keyword in the call of the user's function


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to export.

    Attributes:
      static: names of arguments whose values are fixed.
      constraints: on the symbols.
      platforms: to lower for.
      vjp_order: up to which order gradients are saved.
      allow_custom_calls: targets beyond those that JAX promises to keep.
    """

    static: Sequence[str] = ()
    constraints: Sequence[str] = ()
    platforms: Sequence[str] = _engine.PLATFORMS
    vjp_order: int = 0
    allow_custom_calls: Sequence[str] = ()


def export(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], name: str, options: Options
) -> Exported:
    """Exports a function for arguments like the given ones.

    Raises:
      ExportError: the function cannot be exported as it is; the text says why and what to do.
      LeafError: an argument or result holds something that is neither array nor number.
    """
    arguments, fixed = name_arguments(fn, args, kwargs, options.static)
    leaves, tree = trees.flatten_arguments({a.name: a.value for a in arguments})
    leaf_specs = []
    for leaf_name, leaf in zip(tree.names, leaves, strict=True):
        hint = f'static=("{trees.split_name(leaf_name)[0]}",), if it only decides what is computed'
        with context(object=name, leaf=leaf_name, fix=hint):
            leaf_specs.append(TensorSpec.of(leaf))
    texts = [*options.constraints, *_constraints_of(leaves)]
    constraints = list(dict.fromkeys(dims.parse_constraint(text).text for text in texts))
    dims.check_together(map(dims.parse_constraint, constraints))
    structs = specs.to_jax(leaf_specs, constraints)
    # Traced leaves go into the containers that the user gave, which our tree may hold only a plain view of.
    given = [a.value for a in arguments]
    rebuild = trees.filler(given, leaves, lambda values: list(tree.unflatten(values).values()))
    fixed_values = {place: value for place, value, _ in fixed if place is not None}
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

    with _no_locations(), context(object=name):
        lowered = _lowering.lower(flat, structs, leaf_specs, name, options)
    signature = Signature(
        tree,
        tuple(leaf_specs),
        outputs[0],
        lowered.modules[0].results,
        tuple(a.kind for a in arguments),
        tuple(constraints),
        tuple(f for _, _, f in fixed),
    )
    # The leaves' own specs have what avals lack: hints of placement, logical names.
    primal = lowered.modules[0]
    primal = dataclasses.replace(primal, arguments=(*_merge(leaf_specs, primal), *primal.arguments[len(leaves) :]))
    return Exported(signature, (primal, *lowered.modules[1:]), lowered.blobs, lowered.captures)


def _merge(leaf_specs: Sequence[TensorSpec], primal: ModuleRecord) -> Sequence[TensorSpec]:
    if primal.num_devices == 1:
        return leaf_specs
    return [
        dataclasses.replace(spec, partition=aval.partition)
        for spec, aval in zip(leaf_specs, primal.arguments, strict=False)
    ]


# --- arguments


def name_arguments(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], static: Sequence[str]
) -> tuple[list[Argument], list[tuple[int | str | None, Any, FixedArgument]]]:
    """The call's arguments under the function's own names for them, and apart from them those that are fixed.

    A fixed argument stands with its place in the call (None where its default is left to the function) and its value.
    """
    parameters = _parameters(fn)
    static = [*static, *_static_of(fn)]
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
    names = collections.Counter(a.name for a in given)
    for name, count in names.items():
        if count > 1:
            raise ExportError("An argument is given twice.", leaf=name)
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


def _static_of(fn: Callable[..., Any]) -> Sequence[str]:
    """The static arguments of a function that is jitted already."""
    # Private, with this name in JAX 0.9.2 to 0.12; without it they would have to be named once more.
    return tuple(getattr(getattr(fn, "_jit_info", None), "static_argnames", ()))


def _check_required(parameters: Sequence[inspect.Parameter], names: Collection[str]) -> None:
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


def uses(constraint: str, args: Sequence[Any]) -> bool:
    """Whether arguments have all the symbols of a constraint."""
    symbols = dims.parse_constraint(constraint).symbols
    found: set[str] = set()
    for leaf in jax.tree.leaves(args):
        with contextlib.suppress(LeafError):  # which is reported where the argument is looked at
            found |= TensorSpec.of(leaf).symbols
    return symbols <= found


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
