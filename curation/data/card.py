"""The data set's card: what it is made of, what was dropped and why, under which licences, by which model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MAX_CODE = 300
"""Characters that are shown of a text; a pool's licence may be a book."""


class CardFacts(NamedTuple):
    """What the card tells. `waterfall` is (step, rows in, rows out); `licences` counts the kept rows by licence."""

    recipe_name: str
    shards: str
    read: int
    embedded: int
    dropped: Mapping[str, int]
    warnings: Mapping[str, int]
    waterfall: Sequence[tuple[str, int, int]]
    selected: int
    licences: Mapping[str, int]
    embedded_by: Mapping[str, Any]
    versions: Mapping[str, str]


def card(facts: CardFacts) -> str:
    """The card as Markdown. Names that come from the pool are shown as code, never as markup."""
    reasons = [(f"dropped: {_code(reason)}", count) for reason, count in facts.dropped.items()]
    rows = [("read", facts.read), *reasons, ("embedded", facts.embedded), ("selected", facts.selected)]
    steps = [(_code(name), before, before - after, after) for name, before, after in facts.waterfall]
    licences = sorted(facts.licences.items(), key=lambda item: (-item[1], item[0]))
    parts = [
        "# A curated image-text data set",
        f"Made by `curation` with the recipe {_code(facts.recipe_name)} from {_code(facts.shards)}. Each sample's "
        "bytes are those of its source; `selected.parquet` says where each one came from.",
        "## Counts\n\n" + _table(("", "samples"), rows),
        "## Selection\n\n" + _table(("step", "rows in", "removed", "rows out"), steps),
        "## Licences of the kept samples\n\n"
        + _table(("licence", "samples"), [(_code(n), c) for n, c in licences])
        + "\n\nThe licence is what the pool's own metadata says; `curation` adds no rights to it.",
        "## Embedded by\n\n"
        + _table(("field", "value"), [(_code(n), _code(str(v))) for n, v in facts.embedded_by.items()]),
        "## Versions\n\n" + _table(("package", "version"), list(facts.versions.items())),
    ]
    if facts.warnings:
        parts.insert(
            3, "## Warnings\n\n" + _table(("warning", "count"), [(_code(n), c) for n, c in facts.warnings.items()])
        )
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows])


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _code(text: str) -> str:
    """Text as one line of code in a table cell: no backtick, bar, line break or control character of it survives."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    plain = " ".join(printable.split())
    short = plain if len(plain) <= MAX_CODE else plain[:MAX_CODE] + "..."
    return "`" + short.replace("`", "'").replace("|", "\\|") + "`" if short else "(none)"
