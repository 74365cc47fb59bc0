"""``python -m obmlite.replay`` prints the table of docs/replay.md."""

from obmlite import replay

print(replay.table())  # noqa: T201 - this is what it is for
