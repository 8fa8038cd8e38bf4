"""What a night says of itself, and how far two nights are apart.

Each figure is of a group of rows: `pool`, all that was embedded; `kept`, what the selection chose; `new`, the shards
that came since the promoted night, which a large pool would hide. `new` is held against the pool as it was, the others
against themselves. Distances: absolute for a drop reason's share and a quantile, total variation for a column's values
(half the summed differences of their shares, in [0, 1]), relative for counts and cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
GROUPS = ("pool", "new", "kept")


class Change(NamedTuple):
    """One figure then and now. `kind` is the limit it is held against."""

    kind: str
    name: str
    then: float | None
    now: float | None
    distance: float


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Every figure of two nights' statistics (`night.json`), in a fixed order; a figure that one lacks is left out.

    A group is {"read", "dropped": {reason: count}, "rows", "quantiles": {column: values at QUANTILES}, "shares":
    {column: {value: count}}, "actor_seconds", "decoded"}.
    """
    found: list[Change] = []
    for group in GROUPS:
        before, after = then["groups"]["pool" if group == "new" else group], now["groups"][group]
        found += _drops(group, before, after)
        if not after["rows"] or not before["rows"]:  # all may be dropped: that is told by the reasons
            continue
        found += _quantiles(group, before, after)
        for column in sorted(before["shares"].keys() & after["shares"].keys()):
            distance = total_variation(before["shares"][column], after["shares"][column])
            found.append(Change("share", f"{group}: {column}", None, None, distance))
    rows = then["groups"]["kept"]["rows"], now["groups"]["kept"]["rows"]
    found.append(Change("kept", "kept: rows", *rows, _relative(*rows)))
    costs = then["groups"]["pool"], now["groups"]["new"]
    if all(cost["decoded"] for cost in costs):
        before, after = (1000 * cost["actor_seconds"] / cost["decoded"] for cost in costs)
        found.append(Change("cost", "new: actor seconds per 1,000 images", before, after, _relative(before, after)))
    return found


def beyond(found: Sequence[Change], limits: Mapping[str, float]) -> list[Change]:
    """The changes that are larger than the limit of their kind."""
    return [change for change in found if change.distance > limits[change.kind]]


def total_variation(then: Mapping[str, int], now: Mapping[str, int]) -> float:
    """Half the summed absolute differences of two columns' shares; 0 if neither has a row, 1 if only one has."""
    totals = sum(then.values()), sum(now.values())
    if not all(totals):
        return float(any(totals))
    names = then.keys() | now.keys()
    return sum(abs(then.get(name, 0) / totals[0] - now.get(name, 0) / totals[1]) for name in names) / 2


def _drops(group: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    if not (before["read"] and after["read"]):
        return
    for reason in sorted(before["dropped"].keys() | after["dropped"].keys()):
        then, now = (side["dropped"].get(reason, 0) / side["read"] for side in (before, after))
        yield Change("drop_share", f"{group}: dropped {reason}", then, now, abs(now - then))


def _quantiles(group: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    for column in sorted(before["quantiles"].keys() & after["quantiles"].keys()):
        values = zip(QUANTILES, before["quantiles"][column], after["quantiles"][column], strict=True)
        for q, old, new in values:
            if old is not None and new is not None:
                yield Change("quantile", f"{group}: {column} at {q:.0%}", old, new, abs(new - old))


def _relative(then: float, now: float) -> float:
    return abs(now - then) / then if then else float(now > 0)
