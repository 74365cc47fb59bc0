"""Keys of containers as text, and the names of leaves that they make."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from typing import Any, TypeAlias

from obmlite.errors import CorruptPackageError

MAX_KEY_NESTING = 8
"""Tuples within tuples in a dictionary key."""

MAX_NAME = 1 << 14
"""Characters of the name of a leaf, or of any node, and so of a key. Keys are shared in a manifest, names are not:
without a limit a small manifest could ask for any amount of memory, and comparing its keys for any amount of time."""

RESERVED = "__metadata__"  # safetensors' key for its own string map

Key: TypeAlias = "str | int | tuple[Any, ...]"


class KeyKind(enum.IntEnum):
    """How a parent refers to a child. Numbers are the format's; append only."""

    ROOT = 1
    STR = 2
    INT = 3
    TUPLE = 4
    INDEX = 5
    ATTRIBUTE = 6


def escape(component: str) -> str:
    r"""One component of a leaf's name: ``\`` before every ``.`` and ``\``."""
    return component.replace("\\", "\\\\").replace(".", "\\.")


def join(components: Sequence[str]) -> str:
    r"""Joins components by ``.``; a leading ``__metadata__``, which safetensors reserves, gets a ``\`` in front."""
    name = ".".join(map(escape, components))
    return f"\\{name}" if name.startswith(RESERVED) else name


def split_name(name: str) -> list[str]:
    r"""Undoes :func:`join`: the components of a leaf's name. ``""`` is the one component ``""``."""
    components = [""]
    characters = iter(name)
    for character in characters:
        if character == "\\":
            components[-1] += next(characters, "")
        elif character == ".":
            components.append("")
        else:
            components[-1] += character
    return components


def key_text(key: Key) -> str:
    """The component that a key gives to a name: itself, its decimal digits, or a tuple as compact JSON."""
    if isinstance(key, str):
        return key
    if isinstance(key, int):
        return str(key)
    return json.dumps(key, ensure_ascii=False, separators=(",", ":"))


def key_from_text(kind: KeyKind, text: str) -> Key | None:
    """Undoes :func:`key_text` for a key of a known kind.

    Raises:
      CorruptPackageError: the text is no key of that kind.
    """
    if len(text) > MAX_NAME:
        raise CorruptPackageError(
            "A key of a tree is too long.",
            field="tree.key",
            expected=f"at most {MAX_NAME} characters",
            found=f"{len(text)} characters",
        )
    try:
        if kind is KeyKind.ROOT:
            if text:
                raise ValueError(text)
            return None
        if kind in (KeyKind.STR, KeyKind.ATTRIBUTE):
            return text
        key = int(text) if kind in (KeyKind.INT, KeyKind.INDEX) else _tuple_from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CorruptPackageError("A key of a tree is malformed.", field="tree.key", found=text[:80]) from error
    if check_key(key) or key_text(key) != text:
        raise CorruptPackageError("A key of a tree is not in its canonical form.", field="tree.key", found=text[:80])
    return key


def _tuple_from_json(value: Any, depth: int = 0) -> tuple[Any, ...]:
    if not isinstance(value, list) or depth >= MAX_KEY_NESTING:
        raise ValueError(value)
    return tuple(_tuple_from_json(v, depth + 1) if isinstance(v, list) else _atom(v) for v in value)


def _atom(value: Any) -> str | int:
    if isinstance(value, str) or type(value) is int:
        return value
    raise ValueError(value)


def check_key(key: Any, depth: int = 0) -> str | None:
    """Says why a dictionary's key cannot be stored, or None."""
    if isinstance(key, str):
        try:
            key.encode()
        except UnicodeEncodeError:
            return "a string that is not valid Unicode (a lone surrogate)"
        return None if type(key) is str else f"a {type(key).__name__}, a subclass of str"
    if type(key) is int:
        return None if abs(key) < 1 << 63 else "an integer of more than 63 bits"
    if type(key) is tuple:
        if depth >= MAX_KEY_NESTING:
            return f"a tuple nested more than {MAX_KEY_NESTING} deep"
        return next((why for part in key if (why := check_key(part, depth + 1))), None)
    return f"a key of type {type(key).__qualname__}"
