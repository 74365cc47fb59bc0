"""Who goes where: the sharding that each leaf is restored to, from what a caller asks for."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from obmlite import _arrays
from obmlite import tree as trees
from obmlite.errors import ArgumentError, LeafError, RestoreError, context
from obmlite.plan.topology import Entry, axes_of, misfit
from obmlite.specs import UNCONSTRAINED, Partition, TensorSpec
from obmlite.tree import Kind, Tree

Rules: TypeAlias = "Mapping[str, Entry] | Sequence[tuple[str, Entry]]"
"""From names of logical axes to mesh axes. In a sequence a name may stand several times, as Flax has it."""

SHOWN = 20
"""Leaves that an error lists."""


class Problems:
    """What is wrong with each leaf, gathered into one error."""

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []

    def add(self, name: str, problem: str) -> None:
        """Notes what is wrong with a leaf."""
        self._found.append((name, problem))

    def check(self, problem: str, *, expected: str | None = None, fix: str | None = None, **facts: Any) -> None:
        """Raises what was noted, if anything was.

        Raises:
          RestoreError: lists the first :data:`SHOWN` leaves and says how many more there are.
        """
        if not self._found:
            return
        only = self._found[0][0] if len(self._found) == 1 else None
        lines = [f"{name or '(the leaf)'}: {text}" for name, text in self._found[:SHOWN]]
        if len(self._found) > SHOWN:
            lines.append(f"… and {len(self._found) - SHOWN} more")
        found = "".join(f"\n    {line}" for line in lines) if len(lines) > 1 else lines[0]
        raise RestoreError(problem, leaf=only, expected=expected, found=found, fix=fix, **facts)


# --- partitions


class Unfit(Exception):  # noqa: N818 - never leaves this package: it becomes a line of a RestoreError
    """Why a leaf's partition says nothing on a mesh."""


def check_rules(rules: Rules | None) -> None:
    """Refuses what is no rules.

    Raises:
      ArgumentError: it is neither a mapping nor a sequence of pairs, or maps to something else than mesh axes.
    """
    pairs: Any = rules.items() if isinstance(rules, Mapping) else rules or ()
    try:
        good = all(isinstance(name, str) and _is_entry(axes) for name, axes in pairs)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ArgumentError(
            "The rules are not of the form that is needed.",
            field="rules",
            expected="a mapping, or pairs, from an axis' name to a mesh axis, a tuple of them, or None",
            found=f"{rules!r:.200}",
        )


def _is_entry(axes: Any) -> bool:
    return axes is None or isinstance(axes, str) or all(isinstance(axis, str) for axis in axes)


def partition_on(spec: TensorSpec, axes: Mapping[str, int], rules: Rules | None = None) -> tuple[Entry, ...]:
    """How a leaf is split over a mesh: as it was when saved, or else as its logical axes say.

    Rules are asked for logical axes, and for axes of the saved mesh that this one lacks. Of a sequence of rules the
    first whose mesh axes are still free counts, and a dimension whose rules are all taken is not split, as in Flax;
    a mapping is taken at its word. A logical axis without a rule is the mesh axis of its own name, if there is one.

    Args:
      spec: the leaf's; of its partition and its logical axes the first that there is counts, and a leaf with
        neither is whole on every device.
      axes: the mesh's axes and their sizes.
      rules: from names to mesh axes; checked by :func:`check_rules`.

    Raises:
      Unfit: an axis is unknown, or the shape does not divide.
    """
    saved = spec.partition or spec.logical_axes
    if saved is None:
        return ()
    entries = [() if entry == UNCONSTRAINED else axes_of(entry) for entry in saved.entries]
    logical = saved is spec.logical_axes
    asked = {name for entry in entries for name in entry if logical or name not in axes}
    found = _ruled(asked, {name for entry in entries for name in entry} - asked, rules)
    unknown = sorted(name for name in asked if name not in found and name not in axes)
    if unknown:
        kind = "logical axis" if logical else "axis"
        raise Unfit(f"{spec} as {saved}: the {kind} {unknown[0]!r} is not on the mesh, and no rule maps it")
    mapped = tuple(tuple(axis for name in entry for axis in found.get(name, (name,))) or None for entry in entries)
    problem = misfit(spec.shape, mapped, axes)  # type: ignore[arg-type]
    if problem:
        shown = str(Partition(mapped))
        raise Unfit(f"{spec} as {saved}{'' if shown == str(saved) else f', here {shown}'}: {problem}")
    return mapped


def _ruled(asked: set[str], used: set[str], rules: Rules | None) -> dict[str, tuple[str, ...]]:
    """The mesh axes of those names that have a rule."""
    if isinstance(rules, Mapping):
        return {name: tuple(axes_of(rules[name])) for name in asked if name in rules}
    found: dict[str, tuple[str, ...]] = {}
    for name, target in rules or ():
        if name in asked and name not in found and used.isdisjoint(axes_of(target)):
            found[name] = tuple(axes_of(target))
            used.update(found[name])
    return {**{name: () for name, _ in rules or () if name in asked}, **found}


UNFIT = "Leaves do not fit on the mesh in the way that they are to be split."
UNFIT_FIX = 'rules={"axis": "mesh axis", …} (None: not split), another mesh, or shardings= for these leaves'


# --- shardings


def shardings_of(
    tree: Tree,
    names: Sequence[str],
    specs: Sequence[TensorSpec],
    *,
    shardings: Any = None,
    mesh: Any = None,
    rules: Rules | None = None,
    chosen: Sequence[int] | None = None,
) -> list[Any]:
    """The ``jax.sharding.Sharding`` that each leaf is restored to; None for the default device, uncommitted.

    Args:
      tree: the weights' pytree.
      names: of each leaf.
      specs: of each leaf.
      shardings: a sharding or device for all leaves; or a pytree prefix of the weights' tree with these at its leaves,
        containers matched by their keys; or a function from a leaf's name and spec to one. With ``mesh`` a
        ``PartitionSpec`` will do, too. None leaves a leaf to ``mesh``.
      mesh: leaves are split over it as :func:`partition_on` says, in the kind of memory that they were saved from
        if its devices have that.
      rules: from logical axes, and from saved mesh axes that ``mesh`` lacks, to its axes.
      chosen: numbers of the leaves that are to be restored, all if not given; the others need not fit.

    Raises:
      ArgumentError: an argument is of a wrong kind.
      RestoreError: leaves do not fit; lists them all.
    """
    check_rules(rules)
    if mesh is not None:
        _check_mesh(mesh)
    elif rules is not None:
        raise ArgumentError("Rules map to the axes of a mesh, and there is none.", field="rules", fix="give mesh=, too")
    numbers = range(len(names)) if chosen is None else chosen
    asked = _asked(tree, names, specs, shardings, numbers)
    problems = Problems()
    by_partition = functools.lru_cache(maxsize=None)(functools.partial(_on_mesh, mesh, rules))
    by_choice = functools.lru_cache(maxsize=None)(functools.partial(_checked, mesh))
    found: list[Any] = []
    for number in numbers:
        name, spec, choice = names[number], specs[number], asked[number]
        if choice is None:
            sharding, problem = (None, None) if mesh is None else by_partition(spec)
        elif isinstance(choice, (jax.sharding.Sharding, jax.sharding.PartitionSpec, jax.Device)):
            sharding, problem = by_choice(choice, spec.shape)
        else:
            kind = type(choice).__name__
            sharding, problem = None, f"{choice!r:.100} ({kind}) is no sharding, no device and not None"
        found.append(sharding)
        if problem:
            problems.add(name, problem)
    shown = None if mesh is None else ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    problems.check(
        "Leaves cannot be placed as asked." if shardings is not None else UNFIT,
        field="shardings" if shardings is not None else "mesh",
        expected=shown and f"what fits the mesh ({shown})",
        fix=UNFIT_FIX if mesh is not None else "shardings that divide each dimension of these leaves",
    )
    return found


def _check_mesh(mesh: Any) -> None:
    if isinstance(mesh, jax.sharding.Mesh) and not mesh.empty:
        return
    abstract = isinstance(mesh, jax.sharding.AbstractMesh)
    raise ArgumentError(
        "An abstract mesh has no devices to restore to." if abstract else "This is no mesh of devices.",
        field="mesh",
        expected="a jax.sharding.Mesh",
        found=str(mesh) if abstract else f"{mesh!r:.200}",
        fix="jax.make_mesh(sizes, names)",
    )


def _on_mesh(mesh: Any, rules: Rules | None, spec: TensorSpec) -> tuple[Any, str | None]:
    """A leaf's sharding by what its spec says, or what is wrong."""
    try:
        entries = partition_on(spec, dict(mesh.shape), rules)
    except Unfit as unfit:
        return None, str(unfit)
    partition = jax.sharding.PartitionSpec(*entries)
    memory = spec.memory_kind if spec.memory_kind and spec.memory_kind in _memories(mesh) else None
    return jax.sharding.NamedSharding(mesh, partition, memory_kind=memory), None


def _memories(mesh: Any) -> set[str]:
    """The kinds of memory of a mesh's devices, which are all alike; none where this process has none of them."""
    return {memory.kind for device in mesh.local_devices[:1] for memory in device.addressable_memories()}


def _checked(mesh: Any, choice: Any, shape: Any) -> tuple[Any, str | None]:
    """A caller's choice as a sharding, or what is wrong with it."""
    if isinstance(choice, jax.Device):
        return jax.sharding.SingleDeviceSharding(choice), None
    if isinstance(choice, jax.sharding.PartitionSpec):
        if mesh is None:
            return None, f"{choice} says nothing without a mesh: give mesh=, too, or a NamedSharding"
        problem = _misfit(shape, choice, mesh)
        return (None, problem) if problem else (jax.sharding.NamedSharding(mesh, choice), None)
    if isinstance(choice, jax.sharding.NamedSharding):
        if not isinstance(choice.mesh, jax.sharding.Mesh):
            return None, f"{choice} is over an abstract mesh, which has no devices: give mesh="
        problem = _misfit(shape, choice.spec, choice.mesh)
    else:
        try:
            choice.shard_shape(shape)
            problem = None
        except ValueError as error:
            problem = f"{list(shape)} cannot be split by {choice}: {error}"
    return (None, problem) if problem else (choice, None)


def _misfit(shape: tuple[int, ...], partition: Any, mesh: Any) -> str | None:
    # As in Partition.of: a spec with reduced axes cannot be iterated over where it has `partitions`.
    entries = getattr(partition, "partitions", partition)
    unconstrained = jax.sharding.PartitionSpec.UNCONSTRAINED
    problem = misfit(shape, [None if entry is unconstrained else entry for entry in entries], mesh.shape)
    over = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return problem and f"{list(shape)} as {partition} over a mesh of {over}: {problem}"


# --- what was asked for each leaf


def _asked(
    tree: Tree, names: Sequence[str], specs: Sequence[TensorSpec], shardings: Any, chosen: Sequence[int]
) -> Mapping[int, Any]:
    """For each chosen leaf what the caller gave: a sharding, a device, a partition spec, None, or something wrong."""
    if isinstance(shardings, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
        raise ArgumentError("A mesh is no sharding.", field="shardings", fix="restore(mesh=…)")
    if callable(shardings):
        return {number: shardings(names[number], specs[number]) for number in chosen}
    if isinstance(shardings, (jax.sharding.Sharding, jax.Device, jax.sharding.PartitionSpec)) or shardings is None:
        return dict.fromkeys(chosen, shardings)
    try:
        values, prefix = trees.flatten(shardings)
    except LeafError as error:
        raise ArgumentError(
            "The shardings are no pytree that matches weights.", field="shardings", found=error.found, leaf=error.leaf
        ) from error
    return _spread(tree, values, prefix, sorted(chosen))


def _spread(tree: Tree, values: Sequence[Any], prefix: Tree, chosen: Sequence[int]) -> Mapping[int, Any]:
    """A pytree prefix's leaves, each for all chosen leaves of the tree that are below its place.

    Containers match by their keys, of whatever class they are; None in the prefix is a leaf.

    Args:
      tree: the whole pytree.
      values: the prefix's leaves.
      prefix: the prefix's pytree. It may leave out what has no chosen leaves.
      chosen: numbers of leaves, sorted.

    Raises:
      RestoreError: keys differ; lists all places.
    """
    found: dict[int, Any] = {}
    problems = Problems()

    def below(node: int) -> Sequence[int]:
        first, last = tree.first_leaf[node], tree.first_leaf[tree.ends[node]]
        return chosen[bisect.bisect_left(chosen, first) : bisect.bisect_left(chosen, last)]

    stack: list[tuple[int, int, tuple[str, ...]]] = [(0, 0, ())]
    while stack:
        node, place, path = stack.pop()
        if prefix.kinds[place] in (Kind.LEAF, Kind.NONE):
            value = values[prefix.first_leaf[place]] if prefix.kinds[place] == Kind.LEAF else None
            found.update(dict.fromkeys(below(node), value))
            continue
        if tree.kinds[node] == Kind.LEAF:
            problems.add(trees.join(path), "the weights have a leaf here, and no container")
            continue
        here = {(type(tree.keys[child]), tree.keys[child]): child for child in tree.children(node)}
        there = {(type(prefix.keys[child]), prefix.keys[child]): child for child in prefix.children(place)}
        for key in [*there, *(key for key in here if key not in there)]:
            inside = (*path, trees.key_text(key[1]))  # type: ignore[arg-type]
            if key not in here:
                problems.add(trees.join(inside), "the weights have nothing here")
            elif key in there:
                stack.append((here[key], there[key], inside))
            elif below(here[key]):
                problems.add(trees.join(inside), "the weights have this, and the shardings do not")
    problems.check(
        "The shardings do not match the weights' tree.",
        field="shardings",
        expected="a pytree prefix of the weights' tree",
        fix="give a sharding or None for each of its keys, or a function of a leaf's name and spec",
    )
    return found


# --- templates


Target: TypeAlias = "tuple[Any, Any]"
"""A dtype or None for no change, and a sharding or None for the default device."""


@dataclasses.dataclass(frozen=True)
class Like:
    """A template, matched with weights.

    Attributes:
      leaves: for each leaf of the template the number of the weights' leaf.
      targets: for each leaf of the template the dtype to cast to (None: as it is) and the sharding (None: the
        default device, uncommitted).
      build: from leaves in the template's order to a pytree of the template's containers.
    """

    leaves: tuple[int, ...]
    targets: tuple[Target, ...]
    build: Callable[[Sequence[Any]], Any]


def match_like(tree: Tree, names: Sequence[str], specs: Sequence[TensorSpec], like: Any, mesh: Any = None) -> Like:
    """Matches a template's leaves with the weights', by their names.

    Args:
      tree: the weights' pytree.
      names: of each leaf, for errors.
      specs: of each leaf.
      like: a pytree of arrays, ``jax.ShapeDtypeStruct`` or ``TensorSpec``. A dtype of the same family (float,
        integer, complex) is cast to; a Python number takes what was saved. A sharding is taken over, unless it is
        the default device alone.

    Raises:
      RestoreError: the template lacks a leaf, has one too many, or one of another shape or of a dtype that is not cast
        to; lists them all.
    """
    try:
        values, template = trees.flatten(like)
    except LeafError as error:
        raise RestoreError(
            "The template is no pytree that matches weights.", field="like", found=error.found, leaf=error.leaf
        ) from error
    numbers = {name: number for number, name in enumerate(tree.names)}
    problems = Problems()
    leaves, targets = [], []
    for name, value in zip(template.names, values, strict=True):
        number = numbers.pop(name, None)
        if number is None:
            problems.add(name, "the template has it, and the weights do not")
            continue
        with context(leaf=names[number]):
            target, problem = _like_leaf(specs[number], value, mesh)
        if problem:
            problems.add(names[number], problem)
        leaves.append(number)
        targets.append(target)
    for number in numbers.values():
        problems.add(names[number], "the weights have it, and the template does not")
    problems.check(
        "The template does not match the weights.",
        field="like",
        expected="the weights' leaves: same names and shapes, dtypes of the same family",
        fix="make the template as the weights' author did, or select= the part of the weights that it describes",
    )
    return Like(tuple(leaves), tuple(targets), trees.filler(like, values, template.unflatten))


def _like_leaf(spec: TensorSpec, value: Any, mesh: Any) -> tuple[Target, str | None]:
    try:
        wanted = TensorSpec.of(value)
    except LeafError as error:
        return (None, None), f"the template's leaf is no array: {error.found}"
    if wanted.shape != spec.shape:
        return (None, None), f"the template has {wanted}, the weights {spec}"
    dtype = None
    if wanted.kind != spec.kind:
        if not _castable(spec, wanted):
            return (None, None), f"the template has {wanted}, the weights {spec}, which is not cast to it"
        dtype = None if wanted.weak_type else wanted.dtype
    sharding = None if isinstance(value, (TensorSpec, jax.core.Tracer)) else getattr(value, "sharding", None)
    if sharding is None or _is_default(sharding) or not getattr(value, "committed", True):
        return (dtype, None), None
    if mesh is not None and isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        sharding = sharding.spec  # as jax.eval_shape has it where mesh axes are explicit
    sharding, problem = _checked(mesh, sharding, spec.shape)
    return (dtype, sharding), problem


def _castable(spec: TensorSpec, wanted: TensorSpec) -> bool:
    if wanted.kind.is_key or not wanted.kind.storage:
        return False
    try:
        return _arrays.same_family(spec, wanted.dtype)
    except RestoreError:  # nothing is cast to booleans, for one
        return False


def _is_default(sharding: Any) -> bool:
    """Whether a sharding is what an array gets that nobody placed."""
    if not isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return False
    device = next(iter(sharding.device_set))
    default = jax.config.jax_default_device or jax.local_devices()[0]
    if isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    return device == default and sharding.memory_kind in (None, device.default_memory().kind)
