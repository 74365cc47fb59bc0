"""From the names of another library's tensors to a pytree: by a function, or by a table of patterns."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from obmlite import tree as trees
from obmlite.errors import ArgumentError

Path: TypeAlias = "str | tuple[Any, ...]"
Naming: TypeAlias = "Callable[[str], Path | Part | None] | Mapping[str, Path | None]"

_SHOWN = 20  # names in an error


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One entry of a leaf that is stacked of several tensors along new leading dimensions.

    Attributes:
      path: of the leaf: keys joined by ``.``, or a tuple of keys.
      index: where the tensor goes along each new dimension; a number if there is one.
    """

    path: Path
    index: int | tuple[int, ...]


def placed(names: Sequence[str], naming: Naming | None) -> dict[str, tuple[tuple[Any, ...], tuple[int, ...]]]:
    """For each tensor that is not left out the keys of its leaf, and where in that it goes.

    Args:
      names: of the tensors.
      naming: a function from a name to a path, a :class:`Part`, or None to leave the tensor out. Or a table from
        patterns to paths or None, of which the first that matches counts: ``*`` stands for any text, ``{word}`` for
        what stands between dots. A word that the path has too is put in there; others are numbers along new leading
        dimensions, in the pattern's order. None: nested dicts, by the dots in the names.

    Raises:
      ArgumentError: no pattern matches some names, the pattern or what was returned is malformed, or paths are no
        tree.
    """
    if naming is None:
        targets: dict[str, Any] = {name: tuple(name.split(".")) for name in names}
    else:
        targets = {name: naming(name) for name in names} if callable(naming) else _by_table(naming, names)
    found = {name: _checked(name, target) for name, target in targets.items() if target is not None}
    _check_tree({path: name for name, (path, _) in found.items()})
    return found


def _checked(name: str, target: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    path, index = (target.path, target.index) if isinstance(target, Part) else (target, ())
    numbers = index if isinstance(index, tuple) else (index,)
    keys = tuple(trees.split_name(path)) if isinstance(path, str) else path
    if not isinstance(keys, tuple) or any(type(n) is not int or n < 0 for n in numbers):
        raise ArgumentError(
            "A tensor's new name is malformed.",
            leaf=name,
            field="names",
            expected="text, a tuple of keys, a Part, or None",
            found=repr(target),
        )
    size = sum(len(key) for key in keys if isinstance(key, str))
    if len(keys) > trees.MAX_DEPTH or size > trees.MAX_NAME:  # before nested dicts are made of it
        raise ArgumentError(
            "A tensor's name is longer than a leaf's may be.",
            leaf=name[:200],
            field="names",
            expected=f"at most {trees.MAX_DEPTH} keys of {trees.MAX_NAME} characters together",
            found=f"{len(keys)} keys of {size} characters",
            fix="names=, which gives it another one or leaves it out",
        )
    return keys, numbers


def _by_table(table: Mapping[str, Path | None], names: Sequence[str]) -> dict[str, Path | Part | None]:
    """What a table says of each name."""
    patterns = [_Pattern.of(pattern, target) for pattern, target in table.items()]
    found: dict[str, Path | Part | None] = {}
    for name in names:
        for pattern in patterns:
            match = pattern.expression.fullmatch(name)
            if match is not None:
                found[name] = pattern.target(match)
                break
    if len(found) < len(names):
        raise ArgumentError(
            "No pattern matches some of the tensors.",
            field="names",
            expected='a pattern for each, or "*": None to leave others out',
            found=_listed(name for name in names if name not in found),
        )
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Pattern:
    """A row of a table.

    Attributes:
      expression: matches names; the placeholders are its groups.
      path: that it is given, with placeholders; None to leave tensors out.
      stacked: placeholders that the path lacks.
    """

    expression: re.Pattern[str]
    path: Path | None
    stacked: tuple[str, ...]

    @staticmethod
    def of(pattern: str, path: Path | None) -> _Pattern:
        parts = re.split(r"(\{[^{}]*\}|\*)", pattern)
        words = [part[1:-1] for part in parts if part.startswith("{")]
        problem = next((word for word in words if not word.isidentifier() or words.count(word) > 1), None)
        inside = set(_words(path))
        if problem is not None or not inside <= set(words) or not isinstance(path, (str, tuple, type(None))):
            raise ArgumentError(
                "A pattern of names is malformed.",
                field="names",
                expected="placeholders {word}, each once in the pattern, and a path, or None, with no others",
                found=f"{pattern!r}: {path!r}",
            )
        texts = [
            ".*" if part == "*" else rf"(?P<{part[1:-1]}>[^.]+)" if part.startswith("{") else re.escape(part)
            for part in parts
        ]
        return _Pattern(re.compile("".join(texts), re.DOTALL), path, tuple(w for w in words if w not in inside))

    def target(self, match: re.Match[str]) -> Path | Part | None:
        """Where a name that matches goes."""
        if self.path is None:
            return None
        groups = match.groupdict()
        wrong = next((word for word in self.stacked if not re.fullmatch("0|[1-9][0-9]{0,8}", groups[word])), None)
        if wrong is not None:
            raise ArgumentError(
                f"A tensor is to be stacked along {{{wrong}}}, which is no number in its name.",
                leaf=match.string,
                field="names",
                found=groups[wrong],
                fix=f"put {{{wrong}}} into the path",
            )
        keys = trees.split_name(self.path) if isinstance(self.path, str) else self.path
        path = tuple(_filled(key, groups) if isinstance(key, str) else key for key in keys)
        return Part(path, tuple(int(groups[word]) for word in self.stacked))


def _words(path: Path | None) -> list[str]:
    keys: Iterable[Any] = path if isinstance(path, tuple) else (path,)
    return [word for key in keys if isinstance(key, str) for word in re.findall(r"\{([^{}]*)\}", key)]


def _filled(text: str, groups: Mapping[str, str]) -> str:
    return re.sub(r"\{([^{}]*)\}", lambda found: groups[found[1]], text)


def _check_tree(paths: Mapping[tuple[Any, ...], str]) -> None:
    """Refuses a leaf at a place where others need a container."""
    for path, name in paths.items():
        for length in range(len(path)):
            above = paths.get(path[:length])
            if above is not None:
                raise ArgumentError(
                    "A tensor's name is also the beginning of another one's, so that they make no tree.",
                    leaf=above,
                    field="names",
                    found=f"{above!r} and {name!r}",
                    fix="give one of them another path, by names=",
                )


def grid(leaf: str, sources: Mapping[tuple[int, ...], str]) -> tuple[int, ...]:
    """The sizes of the new leading dimensions of a leaf.

    Args:
      leaf: its name.
      sources: the name of the tensor at each index.

    Raises:
      ArgumentError: indices are of different lengths, or some are missing.
    """
    ranks = {len(index) for index in sources}
    if len(ranks) > 1:
        raise ArgumentError(
            "Tensors of one leaf are stacked along different numbers of dimensions.",
            leaf=leaf,
            field="names",
            found=_listed(sources.values()),
        )
    sizes = tuple(max(column) + 1 for column in zip(*sources, strict=True))
    count = 1
    for size in sizes:
        count *= size
    if count > len(sources):
        lacking = (index for index in itertools.product(*map(range, sizes)) if index not in sources)
        shown = [str(index[0] if len(index) == 1 else index) for index in itertools.islice(lacking, _SHOWN)]
        raise ArgumentError(
            "Tensors that a leaf is to be stacked of are missing.",
            leaf=leaf,
            field="names",
            expected=f"{count} tensors, at {' × '.join(map(str, sizes))} indices",
            found=f"{len(sources)}; none at {', '.join(shown)}{', …' if count - len(sources) > _SHOWN else ''}",
        )
    return sizes


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f", … ({len(every)} in all)" if len(every) > _SHOWN else ""
    return ", ".join(map(repr, every[:_SHOWN])) + more
