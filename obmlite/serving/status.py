"""What a request, or a version of a model, came to: a code that each protocol has a number for, and a sentence."""

from __future__ import annotations

import enum
from typing import Any

from obmlite.errors import (
    ArgumentError,
    CorruptPackageError,
    ObmliteError,
    PackageNotFoundError,
    PlatformError,
    SignatureError,
    UnknownNameError,
    UnsupportedFormatError,
)

__all__ = ["Code", "ServingError"]

_TEXT = 500  # characters of an error that is not ours
_MOST = 2000  # characters of any: a request, or a stranger's package, may have filled it


class Code(enum.Enum):
    """The canonical codes of gRPC (``google/rpc/code.proto``), which are TensorFlow's too."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16

    @property
    def http(self) -> int:
        """The status of HTTP that TensorFlow Serving answers with."""
        return _HTTP.get(self, 500)


_HTTP = {
    Code.OK: 200,
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
}

_CODES: tuple[tuple[type[Exception], Code], ...] = (
    (ArgumentError, Code.INVALID_ARGUMENT),
    (PackageNotFoundError, Code.NOT_FOUND),
    (UnknownNameError, Code.NOT_FOUND),
    (CorruptPackageError, Code.DATA_LOSS),
    (UnsupportedFormatError, Code.UNIMPLEMENTED),
    (PlatformError, Code.FAILED_PRECONDITION),
    (SignatureError, Code.FAILED_PRECONDITION),
    (MemoryError, Code.RESOURCE_EXHAUSTED),
)


class ServingError(ObmliteError):
    """A request was refused or failed, or a version could not be loaded.

    Its text is one line, which names what is wrong, what was expected and what came: what a client is told.

    Attributes:
      code: what kind of failure it is.
    """

    def __init__(self, code: Code, problem: str, **facts: Any) -> None:
        super().__init__(problem if len(problem) <= _MOST else f"{problem[: _MOST - 1]}…", **facts)
        self.code = code

    def __str__(self) -> str:
        return self.problem

    def __reduce__(self) -> tuple[Any, ...]:
        facts = {name: value for name, value in self.facts().items() if name != "problem"}
        return (_rebuild, (self.code, self.problem, facts))

    @classmethod
    def of(cls, error: BaseException) -> ServingError:
        """What an error of the library, of JAX or of Python is to a client: a code and one line, no traceback."""
        if isinstance(error, ServingError):
            return error
        code = next((code for kind, code in _CODES if isinstance(error, kind)), None)
        if isinstance(error, ObmliteError):
            facts = error.facts()
            problem = facts.pop("problem")
            if code is Code.INVALID_ARGUMENT:  # where the package is, is nothing to a client
                facts.pop("package", None)
            known = "; ".join(f"{name}: {value}" for name, value in facts.items())
            text = f"{problem} ({known})" if known else problem
            return cls(code or Code.INTERNAL, " ".join(text.split()), **facts)
        text = " ".join(str(error).split())[:_TEXT]
        # XLA's errors begin with the name of such a code.
        head = text.partition(":")[0]
        code = code or (Code[head] if head in Code.__members__ and head != "OK" else Code.INTERNAL)
        return cls(code, f"{type(error).__name__}: {text}" if text else f"{type(error).__name__}.")


def _rebuild(code: Code, problem: str, facts: dict[str, Any]) -> ServingError:
    return ServingError(code, problem, **facts)
