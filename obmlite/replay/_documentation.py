"""The tables of ``docs/replay.md``, made from the rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from obmlite.replay._table import COMPOSITES, CUSTOM_CALLS, REFUSED, RULES, Rule

__all__ = ["table"]

GROUPS = (
    "elementwise",
    "data movement",
    "reduction",
    "linear algebra",
    "control flow",
    "dynamism",
    "random",
    "sharding",
    "custom calls",
    "CHLO",
)
"""In the order of the specification; what it does not list comes last."""


def table() -> str:
    """Each operation by its group, what it becomes, and those that are refused."""
    parts = [
        f"### {title}\n\n| group | {column} | becomes |\n| --- | --- | --- |\n" + "\n".join(_rows(rules))
        for title, column, rules in (
            ("Operations", "operation", RULES),
            ("Custom calls", "target", CUSTOM_CALLS),
            ("Composites", "name", COMPOSITES),
        )
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(name)
    refused = "\n".join(f"| {_names(names)} | {reason} |" for reason, names in reasons.items())
    parts.append(f"### Refused\n\n| operation | why |\n| --- | --- |\n{refused}")
    return "\n\n".join(parts)


def _rows(rules: Mapping[str, Rule]) -> list[str]:
    rows: dict[tuple[int, str], list[str]] = {}
    for name, rule in sorted(rules.items()):
        rows.setdefault((GROUPS.index(rule.group), rule.meaning), []).append(name)
    return [
        f"| {GROUPS[group]} | {_names(names)} | {meaning} |"
        for (group, meaning), names in sorted(rows.items(), key=lambda row: (row[0][0], row[1]))
    ]


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name.removeprefix('stablehlo.')}`" for name in sorted(names))
