"""``safejax.objax``: the types of variables are kept, so that a ``VarCollection`` comes back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from obmlite.errors import ArgumentError, RestoreError
from obmlite.interop.safejax import _save
from obmlite.interop.safejax._load import load, read
from obmlite.interop.safejax._names import typed
from obmlite.interop.safejax._variables import imported

if TYPE_CHECKING:
    import fsspec

__all__ = ["deserialize", "deserialize_with_assignment", "serialize"]


def serialize(
    params: Any,
    metadata: Mapping[str, str] | None = None,
    include_objax_variables: bool = True,
    filename: str | os.PathLike[str] | None = None,
    fs: fsspec.AbstractFileSystem | None = None,
) -> bytes | str | os.PathLike[str]:
    """:func:`obmlite.interop.safejax.serialize`, with ``include_objax_variables=True``."""
    return _save.serialize(params, metadata, include_objax_variables, filename, fs)


def deserialize(
    path_or_buf: str | os.PathLike[str] | bytes,
    fs: fsspec.AbstractFileSystem | None = None,
    freeze_dict: bool = False,
    requires_unflattening: bool = False,
    to_var_collection: bool = True,
) -> Any:
    """:func:`obmlite.interop.safejax.deserialize`, with ``to_var_collection=True``; needs Objax."""
    return load(path_or_buf, fs, freeze_dict, requires_unflattening, to_var_collection)


def deserialize_with_assignment(filename: str | os.PathLike[str], model_vars: Any) -> None:
    """Gives a module's variables the values in a file; needs Objax.

    Args:
      filename: a file's path; names with and without the types of variables will do.
      model_vars: the ``VarCollection`` of the module, ``module.vars()``.

    Raises:
      RestoreError: the file and the variables differ in names, shapes or dtypes; all differences are listed, and
        nothing has been assigned.
      CorruptPackageError: the file breaks a rule of its format.
      ArgumentError: the arguments are of other types.
      ImportError: Objax is not installed, or not for this JAX.
      OSError: the file cannot be read.
    """
    objax = imported()
    if not isinstance(model_vars, objax.VarCollection):
        raise ArgumentError(
            "Values can be assigned to the variables of a VarCollection only.",
            field="model_vars",
            expected="objax.VarCollection",
            found=type(model_vars).__qualname__,
            fix="module.vars()",
        )
    if not isinstance(filename, (str, os.PathLike)):
        raise ArgumentError("A filename must be a path.", field="filename", found=type(filename).__name__)
    values = {name: value for name, (_, value) in typed(read(filename).values).items()}
    differences = [*_differences(values, model_vars)]
    if differences:
        raise RestoreError(
            f"A file and a module's variables differ in {len(differences)} ways; nothing was assigned.",
            package=filename,
            found="; ".join(differences),
            fix="deserialize the file, and assign by hand what of it is wanted",
        )
    for name, value in values.items():
        model_vars[name].assign(value, check=False)


def _differences(values: Mapping[str, Any], variables: Mapping[str, Any]) -> list[str]:
    found = [f"{name} is only in the file" for name in sorted(values.keys() - variables.keys())]
    found += [f"{name} is not in the file" for name in sorted(variables.keys() - values.keys())]
    for name in sorted(values.keys() & variables.keys()):
        wanted, given = (f"{v.dtype}{list(v.shape)}" for v in (variables[name], values[name]))
        if wanted != given:
            found.append(f"{name} is {given} in the file and {wanted} in the model")
    return found
