"""What can go wrong, one class for each kind of answer that a caller may want to give.

Every class inherits :class:`ObmliteError` and the builtin that a caller who does not know obmlite would
expect. The facts stand in attributes as well as in the text, so that a program need not parse a message.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = [
    "ArgumentError",
    "CoordinationError",
    "CorruptPackageError",
    "ExportError",
    "LeafError",
    "MissingFileError",
    "ObmliteError",
    "PackageExistsError",
    "PackageNotFoundError",
    "PlatformError",
    "RestoreError",
    "SignatureError",
    "UnknownNameError",
    "UnsafePathError",
    "UnsupportedFormatError",
]

MAX_FACT = 4000
"""Characters of one fact in an error's text, which a package of a stranger may have filled; attributes have it all."""

_FACTS = ("package", "object", "leaf", "field", "expected", "found", "fix")


class ObmliteError(Exception):
    """Base of every error that obmlite raises on purpose.

    Attributes:
      problem: one sentence that says what is wrong.
      package: path of the package, if one was involved.
      object: name of the function, weights object, pipeline or supplemental.
      leaf: name of the leaf, argument or tensor.
      field: the field of the manifest or of a file's header that is at fault.
      expected: what was expected.
      found: what was found.
      fix: what to do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        package: Any = None,
        object: str | None = None,  # noqa: A002 - the format's word for it
        leaf: str | None = None,
        field: str | None = None,
        expected: Any = None,
        found: Any = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.package = None if package is None else str(package)
        self.object = object
        self.leaf = leaf
        self.field = field
        self.expected = expected
        self.found = found
        self.fix = fix

    def __str__(self) -> str:
        facts = ((name, getattr(self, name)) for name in _FACTS)
        lines = (f"  {name}: {_shortened(str(value))}" for name, value in facts if value not in (None, ""))
        return "\n".join([_shortened(self.problem), *lines])

    def facts(self) -> dict[str, str]:
        """The problem and whatever is known of it, as text."""
        known = {name: getattr(self, name) for name in _FACTS}
        return {"problem": self.problem, **{name: str(value) for name, value in known.items() if value is not None}}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.problem, {name: getattr(self, name) for name in _FACTS}))


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_FACT else f"{text[: MAX_FACT - 1]}…"


def _rebuild(cls: type[ObmliteError], problem: str, facts: dict[str, Any]) -> ObmliteError:
    return cls(problem, **facts)


class PackageNotFoundError(ObmliteError, FileNotFoundError):
    """There is no package at the path: nothing at all, or a directory without a manifest."""


class PackageExistsError(ObmliteError, FileExistsError):
    """The path holds a package (and ``overwrite=True`` was not given) or something that is no package."""


class CorruptPackageError(ObmliteError, ValueError):
    """The package's bytes are not what its format or its digests say."""


class MissingFileError(CorruptPackageError, FileNotFoundError):
    """A file that the manifest names is not there."""


class UnsafePathError(CorruptPackageError):
    """A path in a package leaves the package, or names something other than a regular file."""


class UnsupportedFormatError(ObmliteError, NotImplementedError):
    """The package, or one object of it, needs a newer obmlite."""


class SignatureError(ObmliteError, ValueError):
    """The package is not signed with a key that is trusted, or its signature does not fit it."""


class LeafError(ObmliteError, TypeError):
    """A pytree cannot be saved: a leaf, key, node or name is of a kind that the format does not hold."""


class ExportError(ObmliteError, ValueError):
    """A function cannot be exported as it was given."""


class ArgumentError(ObmliteError, TypeError, ValueError):
    """A call's arguments do not match the function's signature."""


class RestoreError(ObmliteError, ValueError):
    """Weights cannot be restored in the way that was asked for."""


class UnknownNameError(ObmliteError, KeyError):
    """There is no object, subtree or leaf of this name."""

    __str__ = ObmliteError.__str__  # KeyError's would quote it


class PlatformError(ObmliteError, RuntimeError):
    """The function was not exported for the platform that it would run on."""


class CoordinationError(ObmliteError, RuntimeError):
    """The processes of a program disagree about what they do together, or one of them failed or did not answer."""


@contextlib.contextmanager
def context(**facts: Any) -> Iterator[None]:
    """Adds facts (``package=``, ``object=``, …) to an :class:`ObmliteError` that passes through without them.

    Lower floors of the code do not know in which package or object they work; whoever does wraps the call.
    """
    try:
        yield
    except ObmliteError as error:
        add_facts(error, **facts)
        raise


def add_facts(error: ObmliteError, **facts: Any) -> None:
    """Adds what an error does not know yet; None adds nothing."""
    for name, value in facts.items():
        if getattr(error, name) is None and value is not None:
            setattr(error, name, str(value))
