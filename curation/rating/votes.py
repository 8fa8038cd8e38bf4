"""What a file of votes holds: for the results, and as a parquet file for anybody's own analysis."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from curation.columns import FORMAT_VERSION
from curation.data import storage
from curation.evaluation.pairwise import DETECT, FIRST, SECOND, TIE, Results, Vote, analyse
from curation.rating.database import open_to_read

EXPORTED = pa.schema(
    [
        ("vote", pa.int64()),
        ("rater", pa.int64()),
        ("rater_name", pa.string()),
        ("matchup", pa.int64()),
        ("shared", pa.bool_()),
        ("left_model", pa.string()),
        ("left_image", pa.string()),
        ("right_model", pa.string()),
        ("right_image", pa.string()),
        ("answer", pa.string()),
        ("winner", pa.string()),
        ("seconds", pa.float64()),
        ("voted_at", pa.timestamp("ms", tz="UTC")),
        ("undone", pa.bool_()),
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)

_ROWS = (
    "SELECT v.vote, a.rater, r.name, m.matchup, m.shared, m.first_model, m.second_model, p.name, i.name, q.name, "
    "j.name, a.first_is_left, v.answer, v.seconds, v.voted_at, v.undone_at FROM votes v JOIN assignments a "
    "USING (assignment) JOIN raters r USING (rater) JOIN matchups m USING (matchup) "
    "JOIN models p ON p.model = m.first_model JOIN models q ON q.model = m.second_model "
    "JOIN images i ON i.image = m.first_image JOIN images j ON j.image = m.second_image ORDER BY v.vote"
)


class Row(NamedTuple):
    """One vote as it stands in the file."""

    vote: int
    rater: int
    rater_name: str
    matchup: int
    shared: bool
    first: int
    second: int
    first_model: str
    first_image: str
    second_model: str
    second_image: str
    first_is_left: bool
    answer: str
    seconds: float | None
    voted_at: float
    undone_at: float | None

    @property
    def outcome(self) -> int:
        """FIRST, TIE or SECOND."""
        if self.answer == "unsure":
            return TIE
        return FIRST if (self.answer == "left") == bool(self.first_is_left) else SECOND


def read(path: Path) -> tuple[list[str], list[Row]]:
    """Names of the models, in the order of their numbers, and all votes. ValueError if there is no such file."""
    connection = open_to_read(path)
    try:
        names = [name for (name,) in connection.execute("SELECT name FROM models ORDER BY model")]
        return names, [Row(*row) for row in connection.execute(_ROWS)]
    finally:
        connection.close()


def results(path: Path, *, detect: float = DETECT) -> Results:
    """What the standing votes say. ValueError if there is no such file."""
    names, rows = read(path)
    standing = [
        # Numbers of models begin at 1 in the file and at 0 in the analysis.
        Vote(row.rater, row.matchup, row.first - 1, row.second - 1, row.outcome)
        for row in rows
        if row.undone_at is None
    ]
    return analyse(names, standing, detect=detect)


def plain(found: Results) -> dict[str, Any]:
    """The results as JSON takes them."""
    pairs = [
        {
            **pair._asdict(),
            "rate_ties_half": pair.rate_ties_half._asdict(),
            "rate_decisive": pair.rate_decisive._asdict(),
        }
        for pair in found.pairs
    ]
    # JSON knows no infinity; a nu without bound is told as null.
    nu = found.nu if found.nu < 1e9 else None
    return {**found._asdict(), "nu": nu, "models": [model._asdict() for model in found.models], "pairs": pairs}


def export(path: Path, output: str, *, with_names: bool) -> int:
    """Write every vote, the undone too, as parquet; returns how many. Raters are numbers unless `with_names`."""
    _, rows = read(path)
    table = pa.Table.from_pylist([_exported(row, with_names=with_names) for row in rows], schema=EXPORTED)
    with storage.write_atomic(output) as file:
        pq.write_table(table, file)
    return len(rows)


def _exported(row: Row, *, with_names: bool) -> dict[str, object]:
    first, second = (row.first_model, row.first_image), (row.second_model, row.second_image)
    left, right = (first, second) if row.first_is_left else (second, first)
    return {
        "vote": row.vote,
        "rater": row.rater,
        "rater_name": row.rater_name if with_names else None,
        "matchup": row.matchup,
        "shared": bool(row.shared),
        "left_model": left[0],
        "left_image": left[1],
        "right_model": right[0],
        "right_image": right[1],
        "answer": row.answer,
        "winner": {FIRST: row.first_model, TIE: None, SECOND: row.second_model}[row.outcome],
        "seconds": row.seconds,
        "voted_at": datetime.datetime.fromtimestamp(row.voted_at, datetime.UTC),
        "undone": row.undone_at is not None,
    }
