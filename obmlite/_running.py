"""Arrays from files → a model's pipeline → arrays in files, as the command line runs one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from obmlite import _arrays
from obmlite import tree as trees
from obmlite.errors import ArgumentError
from obmlite.pipeline import BoundPipeline
from obmlite.specs import TensorSpec


def read_inputs(pipeline: BoundPipeline, given: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A pipeline's arguments from files.

    Args:
      pipeline: that is to be called.
      given: (name of a leaf of the arguments, path of a ``.npy`` file); a ``.npz`` or ``.safetensors`` file under the
        name of an argument, or under no name, has leaves by name.

    Raises:
      ArgumentError: a leaf is missing or not expected, or a file is of another kind.
      OSError: a file cannot be read.
    """
    leaves: dict[str, Any] = {}
    for name, path in given:
        for inner, array in _read(path).items():
            own = ".".join(part for part in (name, inner) if part)
            if own in leaves:
                raise ArgumentError("An input is given twice.", leaf=own, found=path)
            leaves[own] = array
    signature = pipeline.signature
    wanted = signature.inputs.names
    if len(wanted) == 1 and list(leaves) == [""]:
        leaves = {wanted[0]: leaves[""]}
    if set(leaves) != set(wanted):
        raise ArgumentError(
            "The inputs are not the leaves of the pipeline's arguments.",
            object=pipeline.name,
            expected=", ".join(wanted) or "no inputs",
            found=", ".join(leaves) or "none",
            fix="give each as --input NAME=FILE.npy",
        )
    ordered = [_cast(leaves[name], spec) for name, spec in zip(wanted, signature.input_specs, strict=True)]
    given_by_name: dict[str, Any] = {}
    for node in signature.inputs.children(0):
        first, last = signature.leaves(node)
        given_by_name[str(signature.inputs.keys[node])] = signature.inputs.subtree(node).unflatten(ordered[first:last])
    return given_by_name


def _read(path: str) -> dict[str, Any]:
    """Leaf → array of a file; the one array of a ``.npy`` file is under no name."""
    extension = os.path.splitext(path)[1]
    try:
        if extension == ".npy":
            return {"": np.load(path, allow_pickle=False)}
        if extension == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        if extension == ".safetensors":
            return dict(safetensors.numpy.load_file(path))
    except (ValueError, EOFError, safetensors.SafetensorError) as error:
        raise ArgumentError("An input cannot be read.", expected="an array", found=f"{path}: {error}") from error
    raise ArgumentError("An input is of a kind that is not known.", expected=".npy, .npz or .safetensors", found=path)


def _cast(array: Any, spec: TensorSpec) -> Any:
    """Raw bytes as the dtype that they hold: numpy's files have no names for those that are JAX's alone."""
    kind = spec.kind.numpy
    if array.dtype.kind == "V" and array.dtype.itemsize == kind.itemsize:
        return array.view(kind)
    return array


def write_outputs(result: Any, given: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Writes a pipeline's results to files.

    Args:
      result: the results.
      given: (name of a leaf, path of a ``.npy`` file); a ``.npz`` or ``.safetensors`` file under no name takes all.

    Returns:
      (name of a leaf, path) of each that was written.

    Raises:
      ArgumentError: there is no such leaf, or several for one ``.npy`` file.
      OSError: a file cannot be written.
    """
    leaves = host_leaves(result)
    written = []
    for name, path in given:
        extension = os.path.splitext(path)[1]
        if extension == ".npy":
            if name not in leaves and not (not name and len(leaves) == 1):
                raise ArgumentError(
                    "There is no such result, or several and no name.",
                    leaf=name,
                    expected=", ".join(leaves) or "no results",
                    fix="give --output NAME=FILE.npy, or --output FILE.npz for all",
                )
            leaf = name if name in leaves else next(iter(leaves))
            np.save(path, leaves[leaf], allow_pickle=False)
            written.append((leaf, path))
        elif extension in (".npz", ".safetensors") and not name:
            named = {leaf or "result": array for leaf, array in leaves.items()}
            if extension == ".npz":
                np.savez(path, allow_pickle=False, **named)
            else:
                safetensors.numpy.save_file({n: np.ascontiguousarray(a) for n, a in named.items()}, path)
            written += [(leaf, path) for leaf in leaves]
        else:
            raise ArgumentError(
                "An output is of a kind that is not known.",
                expected="NAME=FILE.npy, or one FILE.npz or FILE.safetensors for all",
                found=f"{name}={path}" if name else path,
            )
    return written


def host_leaves(result: Any) -> dict[str, Any]:
    """The leaves of results by name, as numpy arrays; texts of a step that JAX does not run as numpy's own."""
    leaves, tree = trees.flatten(result)
    return {n: _to_host(leaf) for n, leaf in zip(tree.names, leaves, strict=True)}


def _to_host(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray) and leaf.dtype == object:
        return np.array([str(t, errors="replace") if isinstance(t, bytes) else t for t in leaf.flat], str).reshape(
            leaf.shape
        )
    return _arrays.to_host(leaf, TensorSpec.of(leaf))


def summary(leaves: Mapping[str, Any]) -> list[str]:
    """A line for each leaf: dtype, shape, and the values of a small one, or their range."""
    lines = []
    for name, array in leaves.items():
        spec = f"string{list(array.shape)}" if array.dtype.kind == "U" else TensorSpec.of(array)
        if array.size <= 8:
            shown = np.array2string(array, separator=", ", max_line_width=10**6).replace("\n", "")
        elif np.issubdtype(array.dtype, np.number):
            shown = f"{array.min():.6g} to {array.max():.6g}, mean {array.mean():.6g}"
        else:
            shown = ""
        lines.append(f"{name or '(the result)'}: {spec}  {shown}".rstrip())
    return lines
