"""What is to be served: names, where their versions are, and which of these."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from obmlite._verifying import LEVELS as VERIFY
from obmlite._verifying import check_level
from obmlite.errors import ArgumentError, context

if TYPE_CHECKING:
    from obmlite._signatures import PublicKeys

__all__ = ["VERIFY", "All", "BatchingConfig", "Latest", "ModelConfig", "Policy", "Specific", "read_config"]

_NAME = re.compile(r"[^/:\x00-\x1f\x7f]{1,200}")  # what is between the slashes and colons of TensorFlow Serving's paths


@dataclasses.dataclass(frozen=True)
class Latest:
    """The versions with the highest numbers.

    Attributes:
      n: how many.
    """

    n: int = 1

    def __post_init__(self) -> None:
        _check_number("n", self.n, 1)

    def choose(self, versions: Collection[int]) -> list[int]:
        """Those of some versions that are to be served, the highest first."""
        return sorted(versions, reverse=True)[: self.n]


@dataclasses.dataclass(frozen=True)
class All:
    """All versions that there are."""

    def choose(self, versions: Collection[int]) -> list[int]:
        """All of them, the highest first."""
        return sorted(versions, reverse=True)


@dataclasses.dataclass(frozen=True)
class Specific:
    """Certain versions.

    Attributes:
      versions: their numbers.
    """

    versions: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", tuple(self.versions))
        for version in self.versions:
            _check_number("versions", version, 0)
        if not self.versions:
            raise ArgumentError(
                "A policy names no versions.", field="versions", expected="at least one number", found="none"
            )

    def choose(self, versions: Collection[int]) -> list[int]:
        """Those of some versions that were named, the highest first."""
        return sorted(set(versions) & set(self.versions), reverse=True)


Policy: TypeAlias = "Latest | All | Specific"


@dataclasses.dataclass(frozen=True)
class BatchingConfig:
    """How requests are put together. The names are TensorFlow Serving's.

    Attributes:
      max_batch_size: rows of a batch of several requests; a request of more rows is a batch of its own.
      batch_timeout_micros: for how long a request waits for others, in microseconds.
      num_batch_threads: batches that run at the same time.
      max_enqueued_batches: full batches that may wait; a request beyond them is refused.
      allowed_batch_sizes: sizes to which batches of a model that takes any size are filled up, so that few sizes are
        compiled; none for batches as they come. A model of fixed sizes has its own.
    """

    max_batch_size: int = 32
    batch_timeout_micros: int = 1000
    num_batch_threads: int = 1
    max_enqueued_batches: int = 64
    allowed_batch_sizes: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.allowed_batch_sizes, (list, tuple)):
            raise ArgumentError(
                "The allowed sizes of batches are no list.",
                field="allowed_batch_sizes",
                expected="rising sizes",
                found=repr(self.allowed_batch_sizes)[:200],
            )
        object.__setattr__(self, "allowed_batch_sizes", tuple(self.allowed_batch_sizes))
        for name in ("max_batch_size", "num_batch_threads", "max_enqueued_batches"):
            _check_number(name, getattr(self, name), 1)
        _check_number("batch_timeout_micros", self.batch_timeout_micros, 0)
        sizes = self.allowed_batch_sizes
        for size in sizes:
            _check_number("allowed_batch_sizes", size, 1)
        if sizes and (list(sizes) != sorted(set(sizes)) or sizes[-1] != self.max_batch_size):
            raise ArgumentError(
                "The allowed sizes of batches do not rise to the largest batch.",
                field="allowed_batch_sizes",
                expected=f"rising sizes, the last of them max_batch_size = {self.max_batch_size}",
                found=str(list(sizes)),
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model that is served.

    Attributes:
      name: under which clients ask for it.
      base_path: the directory of its numbered versions.
      policy: which of them are served.
      labels: name → version that it stands for, while that one is loaded.
      batching: how requests are put together; None for not at all.
      verify: what is compared with the package's digests, as :func:`obmlite.load` has it: ``"structure"``,
        ``"lazy"`` or ``"all"``.
      warmup: whether a version is called before it is shown.
      public_key: only versions that are signed with this key, or with one of these, are served; as
        :func:`obmlite.load` takes it. Files are read once, by the :class:`~obmlite.serving.Repository`.
      untrusted: the packages are a stranger's: see :func:`obmlite.load`.
    """

    name: str
    base_path: str
    policy: Policy = dataclasses.field(default_factory=Latest)
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    batching: BatchingConfig | None = None
    verify: str = "structure"
    warmup: bool = True
    public_key: PublicKeys | None = None
    untrusted: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_path", os.fspath(self.base_path))
        names: list[tuple[str, Any]] = [("name", self.name), *(("labels", label) for label in self.labels)]
        for what, name in names:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ArgumentError(
                    "A model's or label's name cannot be in a path.",
                    field=what,
                    expected="1 to 200 characters without /, : and control characters",
                    found=repr(name)[:200],
                )
        if not isinstance(self.policy, (Latest, All, Specific)):
            raise ArgumentError(
                "There is no such policy.",
                field="policy",
                expected="Latest(n), All() or Specific(versions)",
                found=repr(self.policy)[:200],
            )
        for version in self.labels.values():
            _check_number("labels", version, 0)
        check_level(self.verify)


def read_config(path: str | os.PathLike[str]) -> list[ModelConfig]:
    """The models that a file names.

    Args:
      path: a ``.toml`` file with a table ``[[model]]`` for each model, or a ``.json`` file with a list ``"model"`` of
        objects. Their keys are the attributes of :class:`ModelConfig`; ``policy`` is ``"all"``, ``"latest"``,
        ``{latest = 2}`` or ``{specific = [1, 2]}``, ``public_key`` a PEM file or a list of them; a relative
        ``base_path`` or ``public_key`` starts at the file's directory.

    Raises:
      ArgumentError: the file is malformed, or names a model twice.
      OSError: it cannot be read.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        data = file.read()
    try:
        table = json.loads(data) if path.endswith(".json") else tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ArgumentError("A configuration is malformed.", object=path, found=str(error)[:300]) from error
    models = table.get("model") if isinstance(table, dict) else None
    if not isinstance(models, list) or not models or set(table) != {"model"}:
        raise ArgumentError(
            "A configuration names no models.",
            object=path,
            expected="a table [[model]] for each, and nothing else",
            found=", ".join(table) if isinstance(table, dict) else type(table).__name__,
        )
    found = []
    for number, own in enumerate(models):
        with context(object=f"{path}, model {number}"):
            found.append(_model(own, os.path.dirname(path)))
    names = [config.name for config in found]
    for name in names:
        if names.count(name) > 1:
            raise ArgumentError("A configuration names a model twice.", object=path, found=name)
    return found


def parse_policy(value: Any) -> Policy:
    """A policy as a configuration or a command line has it: ``all``, ``latest``, ``{"latest": 2}``, ….

    Raises:
      ArgumentError: it is none.
    """
    if value == "all":
        return All()
    if value == "latest":
        return Latest()
    if isinstance(value, dict) and len(value) == 1:
        [(kind, argument)] = value.items()
        if kind == "latest":
            return Latest(argument)
        if kind == "specific" and isinstance(argument, list):
            return Specific(tuple(argument))
    raise ArgumentError(
        "There is no such policy.",
        field="policy",
        expected="all, latest, {latest = N} or {specific = [N, …]}",
        found=repr(value)[:200],
    )


def _model(given: Any, folder: str) -> ModelConfig:
    values = _known(given, ModelConfig, ("name", "base_path"))
    kinds = {"name": str, "base_path": str, "labels": dict, "verify": str, "warmup": bool, "untrusted": bool}
    for key, kind in kinds.items():
        if key in values and type(values[key]) is not kind:
            raise ArgumentError(
                "A model's configuration has a value of another type.",
                leaf=key,
                expected=kind.__name__,
                found=repr(values[key])[:200],
            )
    values["base_path"] = os.path.join(folder, values["base_path"])
    if "public_key" in values:
        values["public_key"] = _files(values["public_key"], folder)
    if "policy" in values:
        values["policy"] = parse_policy(values["policy"])
    if "batching" in values:
        values["batching"] = BatchingConfig(**_known(values["batching"], BatchingConfig, ()))
    return ModelConfig(**values)


def _files(given: Any, folder: str) -> list[str]:
    """The public keys' files, of one name or a list."""
    files = [given] if isinstance(given, str) else given
    if not isinstance(files, list) or not files or not all(isinstance(file, str) and file for file in files):
        raise ArgumentError(
            "A model's configuration has a value of another type.",
            leaf="public_key",
            expected="a PEM file, or a list of them",
            found=repr(given)[:200],
        )
    return [os.path.join(folder, file) for file in files]


def _known(given: Any, kind: type, required: Collection[str]) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(given, dict) or not set(required) <= set(given) <= set(known):
        missing = [key for key in required if not isinstance(given, dict) or key not in given]
        raise ArgumentError(
            "A configuration lacks a key, or has one that is not known.",
            expected=f"{', '.join(known)}{'; missing: ' if missing else ''}{', '.join(missing)}",
            found=", ".join(map(str, given)) if isinstance(given, dict) else repr(given)[:200],
        )
    return dict(given)


def _check_number(field: str, value: Any, least: int) -> None:
    if type(value) is not int or not least <= value < 2**63:
        raise ArgumentError(
            "A number is no number, or out of range.",
            field=field,
            expected=f"an integer of at least {least}",
            found=repr(value)[:200],
        )
