"""Weights: a named, lazy pytree of tensors.

In memory and loaded from a package they are the same thing. Nothing is read before it is asked for: names, shapes
and dtypes come from the manifest, values from a memory map (or positioned reads) of the safetensors files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np

from obmlite import _arrays, dtypes
from obmlite import tree as trees
from obmlite._collector import paused
from obmlite._processes import OfOneProcess
from obmlite.errors import ArgumentError, RestoreError, UnknownNameError, context
from obmlite.frameworks.axes import logical_axes
from obmlite.specs import TensorSpec
from obmlite.tree import Key, Kind, Tree

if TYPE_CHECKING:
    from obmlite._tensors import Tensor, TensorSource
    from obmlite.placement import Rules

__all__ = ["LazyArray", "Weights"]

Array: TypeAlias = _arrays.Array
DTypeChoice: TypeAlias = "Any | Callable[[str, TensorSpec], Any]"


class LazyArray(OfOneProcess):
    """One leaf of weights: known by name, shape and dtype, read when asked.

    ``np.asarray(leaf)`` is its values, without a copy where the file's bytes are the array's; the result is read-only.
    ``leaf[:2]`` reads only that slice. :meth:`restore` makes a ``jax.Array``. A PRNG key's values are its key data,
    uint32 with the implementation's trailing dimensions.

    Attributes:
      name: its path in the weights, joined by ``.``.
      spec: shape, dtype and placement hints.
      tensor: where its values are.
    """

    def __init__(self, name: str, spec: TensorSpec, tensor: Tensor) -> None:
        self.name = name
        self.spec = spec
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""
        return self.spec.shape  # type: ignore[return-value]

    @property
    def dtype(self) -> Any:
        """The dtype as JAX has it: a numpy dtype, or a key dtype."""
        return self.spec.dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.spec.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return _arrays.number_of(self.spec)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a file."""
        return _arrays.nbytes(self.spec)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a scalar")
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        with context(leaf=self.name):
            return np.array(self.tensor.whole(), dtype=dtype, copy=copy)

    def __getitem__(self, index: Any) -> Any:
        """The values at an index, as numpy has it; of a file only what a basic index covers is read."""
        with context(leaf=self.name):
            return self.tensor.part(index)

    def same_array(self, other: LazyArray) -> bool:
        """Whether two leaves in memory are one array, or equal numbers; of what is stored nothing is read."""
        return self.spec == other.spec and self.tensor.same(other.tensor)

    def restore(self, *, sharding: Any = None, dtype: Any = None) -> Any:
        """The leaf as a ``jax.Array``.

        Args:
          sharding: a ``jax.sharding.Sharding`` or device; the default device, uncommitted, if not given.
          dtype: dtype to cast to, if of the same family (float, integer, complex).

        Raises:
          RestoreError: it has 64-bit numbers and JAX does not hold them, ``dtype`` is of another family, or
            ``sharding`` does not divide its shape.
        """
        from obmlite.placement import shardings_of
        from obmlite.restoring import Limits, Target, restore

        _, tree = trees.flatten(0)
        [place] = shardings_of(tree, [self.name], [self.spec], shardings=sharding)
        [array] = restore([self], [Target(place, _casts([self], dtype)[0])], Limits())
        return array

    def __repr__(self) -> str:
        return f"LazyArray({self.name!r}, {self.spec}, {self.tensor.where})"


class Weights(OfOneProcess, Mapping[Key, Any]):
    """A named, lazy pytree of tensors.

    ``weights["Dense_0"]["kernel"]`` goes down the pytree by its own keys (indices of sequences, fields of
    namedtuples): to another ``Weights`` on the way, to a :class:`LazyArray` at a leaf. :attr:`flat` has all leaves by
    their full names.

    Args:
      value: the pytree; its leaves are arrays or Python numbers. Leaves that are one object or one buffer are tied:
        saved once, restored as one array. The pytree is not changed, and its arrays are not copied.
      metadata: what else to keep with them: None, bool, int, float, str, bytes, and lists and dicts of these.

    Raises:
      LeafError: a leaf, key or node is of a kind that cannot be saved; ``leaf`` names it.
    """

    def __init__(self, value: Any, *, metadata: Mapping[str, Any] | None = None) -> None:
        from obmlite._tensors import MemorySource

        leaves, tree = trees.flatten(value)
        specs = []
        for leaf, name in zip(leaves, tree.names, strict=True):
            with context(leaf=name):
                specs.append(_arrays.check_leaf(leaf))
        for number, axes in logical_axes(tree).items():
            if len(axes.entries) <= specs[number].ndim:
                specs[number] = dataclasses.replace(specs[number], logical_axes=axes)
        trees.pack_static(dict(metadata or {}))
        self._set(tree, tuple(specs), MemorySource(leaves, specs), dict(metadata or {}))

    def _set(
        self,
        tree: Tree,
        specs: Sequence[TensorSpec],
        source: TensorSource,
        metadata: Mapping[str, Any],
        prefix: tuple[str, ...] = (),
    ) -> None:
        self._tree = tree
        self._specs = specs
        self._source = source
        self._prefix = prefix
        self.metadata = metadata

    @classmethod
    def from_source(
        cls,
        tree: Tree,
        specs: Sequence[TensorSpec],
        source: TensorSource,
        metadata: Mapping[str, Any],
        prefix: tuple[str, ...] = (),
    ) -> Weights:
        """Weights over any source of tensors."""
        self = cls.__new__(cls)
        self._set(tree, specs, source, metadata, prefix)
        return self

    # --- looking

    @property
    def tree(self) -> Tree:
        """The pytree without its leaves."""
        return self._tree

    @property
    def specs(self) -> Sequence[TensorSpec]:
        """Shape and dtype of each leaf, in the pytree's order."""
        return self._specs

    @property
    def source(self) -> TensorSource:
        """Where the tensors are."""
        return self._source

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The name of each leaf, in the pytree's order; below the top it begins with the path to here."""
        if not self._prefix:
            return self._tree.names
        return tuple(trees.join([*self._prefix, *trees.split_name(n)]) for n in self._tree.names)

    @functools.cached_property
    def flat(self) -> Mapping[str, LazyArray]:
        """All leaves by name."""
        return {name: self.leaf(n) for n, name in enumerate(self.names)}

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors, tied ones once."""
        return sum(_arrays.nbytes(self._specs[n]) for n in self._distinct())

    @functools.cached_property
    def num_parameters(self) -> int:
        """Elements of all tensors, tied ones once."""
        return sum(_arrays.number_of(self._specs[n]) for n in self._distinct())

    def _distinct(self) -> list[int]:
        """One leaf of each tensor."""
        return list({self._source.number(n): n for n in range(len(self._specs) - 1, -1, -1)}.values())

    def leaf(self, leaf: int) -> LazyArray:
        """A leaf by its number in the pytree's order."""
        return LazyArray(self.names[leaf], self._specs[leaf], self._source.tensor(leaf))

    def __getitem__(self, key: Key) -> Any:
        child = self._tree.child(0, key)
        if child is None:
            raise UnknownNameError("The weights have no such key here.", expected=_some(list(self)), found=repr(key))
        first, last = self._tree.first_leaf[child], self._tree.first_leaf[self._tree.ends[child]]
        if self._tree.kinds[child] == Kind.LEAF:
            return self.leaf(first)
        prefix = (*self._prefix, trees.key_text(key))
        return Weights.from_source(
            self._tree.subtree(child), self._specs[first:last], self._source.narrow(first, last), {}, prefix
        )

    def at(self, name: str) -> Weights:
        """The subtree of a name, as names of leaves are made.

        Raises:
          UnknownNameError: there is none, or it is a leaf.
        """
        prefix = tuple(trees.split_name(name))
        found: Any = self
        for component in prefix:
            keys = [key for key in found if trees.key_text(key) == component] if isinstance(found, Weights) else []
            if not keys:
                raise UnknownNameError(
                    "The weights have no such subtree.", expected=_some(self.names), found=repr(name)
                )
            found = found[keys[0]]
        if not isinstance(found, Weights):
            raise UnknownNameError("This is a leaf and no subtree.", found=repr(name))
        return found

    def __iter__(self) -> Iterator[Key]:
        return (self._tree.keys[child] for child in self._tree.children(0))  # type: ignore[misc]

    def __len__(self) -> int:
        return self._tree.arities[0]

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def lazy(self) -> Any:
        """The pytree, in its own containers, of :class:`LazyArray`."""
        return self._tree.unflatten(list(self.flat.values()))

    def __repr__(self) -> str:
        place = f" at {trees.join(self._prefix)!r}" if self._prefix else ""
        count = count_leaves(self._tree.num_leaves)
        head = f"Weights{place}: {count}, {self.num_parameters:,} parameters, {size(self.nbytes)}"
        lines = [f"  {name or '(the leaf)'}: {spec}" for name, spec in zip(self.names[:20], self._specs, strict=False)]
        more = self._tree.num_leaves - len(lines)
        return "\n".join([head, *lines, *([f"  … {more} more leaves"] if more else [])])

    # --- restoring

    def restore_leaves(self, **options: Any) -> list[Any]:
        """:meth:`restore` without the containers: all leaves in the pytree's order."""
        arrays = self._restored_leaves(**options)
        return [arrays[number] for number in range(len(self._specs))]

    def restored(self, **options: Any) -> Weights:
        """These weights, in memory: :meth:`restore` in the form of weights."""
        from obmlite._tensors import MemorySource

        leaves = self.restore_leaves(**options)
        specs = [
            dataclasses.replace(spec, kind=dtypes.of(leaf)) for spec, leaf in zip(self._specs, leaves, strict=True)
        ]
        return Weights.from_source(self._tree, specs, MemorySource(leaves, specs), self.metadata, self._prefix)

    def restore(
        self,
        *,
        shardings: Any = None,
        mesh: jax.sharding.Mesh | None = None,
        rules: Rules | None = None,
        select: str | Sequence[str] | None = None,
        like: Any = None,
        dtype: DTypeChoice = None,
        memory_budget: int | None = None,
        threads: int | None = None,
        progress: bool | Callable[[int], Any] | None = None,
        broadcast: bool = False,
        timeout: float | None = None,
    ) -> Any:
        """The pytree, in its own containers, of ``jax.Array``.

        This process reads the bytes that its own devices need, each once, and nothing else; under ``jax.distributed``
        the other processes read theirs, and nothing is exchanged, unless ``broadcast`` asks for it. Without any
        argument, arrays are on the default device, uncommitted. On CPU, arrays and shards whose bytes lie in a row and
        aligned in a mapped file are used in place: they cost neither time nor memory until they are read. Tied leaves
        are one array.

        Args:
          shardings: a ``jax.sharding.Sharding`` or device for all leaves; a pytree prefix of them; or a function from a
            leaf's name and spec to one, or to None for the default device.
          mesh: a mesh that the leaves are split over as their saved partition specs say, or as ``rules`` map their
            logical axes. Leaves without either are held whole by every device.
          rules: from names of logical axes, and of saved mesh axes that ``mesh`` lacks, to axes of ``mesh`` (a name, a
            tuple of names, or None for not split); a mapping, or pairs as Flax has them.
          select: names of leaves or subtrees, or glob patterns over names, to restore only those. What is not
            selected is left out of dicts, and is None in sequences and other containers.
          like: a pytree of ``jax.ShapeDtypeStruct`` or arrays with the names and shapes of these weights, instead of
            ``select`` and ``dtype``. The result has its containers and dtypes, and its shardings where it says any.
          dtype: a dtype to cast leaves of the same family (float, integer, complex) to; or a function from a leaf's
            name and spec to one, or to None for no change. Cast chunk by chunk, never a whole array.
          memory_budget: bytes of host memory in flight, beside the arrays that are made in host memory; 1 GiB if not
            given. An accelerator's shard that is larger is nevertheless held whole while it is sent.
          threads: that read and copy; if not given, one for each core, but not more than 8.
          progress: whether to show a progress bar; left out, only on a terminal. Or a function that is told the stored
            bytes of what is there, from several threads.
          broadcast: whether what several processes hold is read once by them together, a part by each, and spread from
            device to device. Then all processes have to call this, with the same arguments: it is a collective. Each
            distinct shape compiles a small program.
          timeout: seconds for which a process then waits, at each step, for the slowest of the others; by default 300.

        Raises:
          CoordinationError: with ``broadcast``, processes do not restore the same, or one failed or did not answer.
          RestoreError: leaves do not fit where they are to go, or ``like``: all of them are listed. A leaf has 64-bit
            numbers and JAX does not hold them. ``select`` matches nothing.
          ArgumentError: an argument is of a wrong kind.
          CorruptPackageError: a file is not what the manifest says.
        """
        for name, given in (("select", select), ("dtype", dtype)):
            if like is not None and given is not None:
                raise ArgumentError(
                    f"like= says what {name}= would say.", field=name, fix="give a template of what is wanted"
                )
        options: dict[str, Any] = {"dtype": dtype, "memory_budget": memory_budget, "threads": threads}
        options.update(shardings=shardings, mesh=mesh, rules=rules, progress=progress)
        options.update(broadcast=broadcast, timeout=timeout)
        if like is not None:
            from obmlite.placement import match_like

            matched = match_like(self._tree, self.names, self._specs, like, mesh)
            placed = dict(zip(matched.leaves, matched.targets, strict=True))
            arrays = self._restored_leaves(placed=placed, **options)
            return matched.build([arrays[number] for number in matched.leaves])
        if select is None:
            return self._tree.unflatten(self.restore_leaves(**options))
        chosen = _select(self.names, [select] if isinstance(select, str) else select)
        return self._tree.unflatten_some(self._restored_leaves(chosen, **options))

    def _restored_leaves(
        self,
        chosen: Sequence[int] | None = None,
        *,
        placed: Mapping[int, tuple[Any, Any]] | None = None,
        shardings: Any = None,
        mesh: Any = None,
        rules: Any = None,
        dtype: DTypeChoice = None,
        memory_budget: int | None = None,
        threads: int | None = None,
        progress: bool | Callable[[int], Any] | None = None,
        broadcast: bool = False,
        timeout: float | None = None,
    ) -> dict[int, Any]:
        """Leaf's number → array; ``placed`` has what a template says of each: dtype and sharding."""
        from obmlite.placement import shardings_of
        from obmlite.restoring import Limits, Target, restore

        limits = Limits.of(memory_budget, threads)
        numbers = range(len(self._specs)) if chosen is None else chosen
        with paused():
            leaves = [self.leaf(n) for n in numbers]
        if shardings is None and mesh is None and rules is None:
            places: list[Any] = [None] * len(leaves)
        else:
            asked = {"shardings": shardings, "mesh": mesh, "rules": rules}
            places = shardings_of(self._tree, self.names, self._specs, chosen=numbers, **asked)
        dtypes_ = _casts(leaves, dtype)
        if placed is not None:
            places = [placed[n][1] or place for n, place in zip(numbers, places, strict=True)]
            dtypes_ = [_arrays.cast_to(leaf.spec, placed[n][0]) for n, leaf in zip(numbers, leaves, strict=True)]
        targets = [Target(place, cast) for place, cast in zip(places, dtypes_, strict=True)]
        with _bar(progress, leaves) as tell:
            if broadcast:
                from obmlite import _broadcasting

                arrays = _broadcasting.restore(leaves, targets, limits, tell, timeout)
            else:
                arrays = restore(leaves, targets, limits, tell)
        return dict(zip(numbers, arrays, strict=True))


def _some(keys: Sequence[Any]) -> str:
    shown = ", ".join(repr(k) for k in keys[:8])
    return f"{shown}, … ({len(keys)} in all)" if len(keys) > 8 else shown or "none"


def count_leaves(count: int) -> str:
    """A number of leaves for people."""
    return f"{count:,} {'leaf' if count == 1 else 'leaves'}"


def size(nbytes: float) -> str:
    """A number of bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1024 or unit == "TiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"


def _casts(leaves: Sequence[LazyArray], dtype: DTypeChoice) -> list[np.dtype[Any] | None]:
    """What each leaf is cast to.

    Raises:
      RestoreError: there is no such dtype, or no leaf is of its family.
    """
    if dtype is None:
        return [None] * len(leaves)
    if callable(dtype) and not isinstance(dtype, type):
        return [_arrays.cast_to(leaf.spec, dtype(leaf.name, leaf.spec)) for leaf in leaves]
    if leaves and not any(_arrays.same_family(leaf.spec, dtype) for leaf in leaves):
        raise RestoreError(
            "No leaf is of the family (float, integer, complex) of this dtype.",
            leaf=leaves[0].name if len(leaves) == 1 else None,
            field="dtype",
            expected=_some(sorted({leaf.spec.kind.short for leaf in leaves})),
            found=str(dtype),
            fix="restore as it is, and convert the values with .astype()",
        )
    return [_arrays.cast_to(leaf.spec, dtype) for leaf in leaves]


@contextlib.contextmanager
def _bar(progress: bool | Callable[[int], Any] | None, leaves: Sequence[LazyArray]) -> Iterator[Callable[[int], Any]]:
    """What is to be told of bytes that are there."""
    if callable(progress):
        yield progress
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda _: None
        return
    import tqdm

    total = sum({leaf.tensor.key: leaf.nbytes for leaf in leaves}.values())
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="restoring", delay=0 if progress else 1) as bar:
        yield bar.update


def _select(names: Sequence[str], patterns: Sequence[str]) -> list[int]:
    chosen: set[int] = set()
    for pattern in patterns:
        found = {
            n
            for n, name in enumerate(names)
            if name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)
        }
        if not found:
            raise RestoreError(
                "A selection matches no leaf.",
                field="select",
                expected=f"names or globs among {_some(names)}",
                found=repr(pattern),
            )
        chosen |= found
    return sorted(chosen)


def check_not_lazy(value: Any, name: str) -> None:
    """Refuses a lazy leaf where an array is needed.

    Raises:
      ArgumentError: it is one.
    """
    if isinstance(value, (LazyArray, Weights)):
        kind = type(value).__name__
        raise ArgumentError(
            f"An argument is a {kind}, which has no values in memory yet.", leaf=name, fix="call .restore() on it first"
        )
