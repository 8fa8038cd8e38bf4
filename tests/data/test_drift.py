"""How far two nights are apart: figures by hand, and that only what passes a limit holds a night back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from curation.data import nights, storage
from curation.data.drift import beyond, changes, total_variation

LIMITS = {"drop_share": 0.02, "quantile": 0.02, "share": 0.05, "kept": 0.5, "cost": 1.0}


def group(rows: int, **fields: Any) -> dict[str, Any]:
    nothing = {"read": rows, "dropped": {}, "quantiles": {}, "shares": {}, "actor_seconds": 0.0, "decoded": 0}
    return {**nothing, "rows": rows, **fields}


def night(**groups: Any) -> dict[str, Any]:
    return {"groups": {"pool": group(10), "new": group(0), "kept": group(5), **groups}}


def test_total_variation_by_hand() -> None:
    assert total_variation({"a": 3, "b": 1}, {"a": 1, "b": 1}) == 0.25
    assert total_variation({"a": 1}, {"b": 7}) == 1.0
    assert total_variation({"a": 2, "b": 4}, {"a": 1, "b": 2}) == 0.0
    assert (total_variation({}, {}), total_variation({}, {"a": 1})) == (0.0, 1.0)


def test_equal_nights_do_not_differ() -> None:
    same = night(pool=group(10, dropped={"x": 1}, quantiles={"s": [0.1] * 5}, shares={"c": {"en": 4}}))
    assert [change.distance for change in changes(same, same)] == [0.0] * 8
    assert not beyond(changes(same, same), dict.fromkeys(LIMITS, 0.0))


def test_new_rows_are_held_against_the_pool_as_it_was() -> None:
    then = night(pool=group(90, read=100, dropped={"x": 10}, actor_seconds=9.0, decoded=100))
    new = group(5, read=10, dropped={"x": 2, "y": 3}, actor_seconds=2.7, decoded=10)
    now = night(pool=group(95, read=110, dropped={"x": 12, "y": 3}), new=new)
    found = {change.name: change for change in changes(then, now)}
    assert found["new: dropped x"][2:] == pytest.approx((0.1, 0.2, 0.1))
    assert found["new: dropped y"][2:] == pytest.approx((0.0, 0.3, 0.3))
    assert found["pool: dropped x"].distance == pytest.approx(0.1 - 12 / 110, abs=0.02)
    assert found["new: actor seconds per 1,000 images"][2:] == pytest.approx((90.0, 270.0, 2.0))
    kinds = {change.name for change in beyond(list(found.values()), LIMITS)}
    assert kinds == {"new: dropped x", "new: dropped y", "pool: dropped y", "new: actor seconds per 1,000 images"}


def test_new_shards_of_which_every_row_was_dropped_are_told_by_the_reason() -> None:
    now = night(new=group(0, read=10, dropped={"x": 10}))
    assert [change.name for change in beyond(changes(night(), now), LIMITS)] == ["new: dropped x"]


def test_a_quantile_that_one_night_lacks_is_left_out() -> None:
    then = night(kept=group(5, quantiles={"s": [0.1, 0.2, 0.3, 0.4, None]}))
    now = night(kept=group(15, quantiles={"s": [0.1, 0.25, 0.3, 0.4, 0.5]}))
    found = changes(then, now)
    assert [change.name for change in beyond(found, LIMITS)] == ["kept: s at 25%", "kept: rows"]
    assert len([change for change in found if change.kind == "quantile"]) == 4


def test_two_nights_of_one_second_have_two_names(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path)
    monkeypatch.setattr(nights.time, "strftime", lambda *_: "now")
    for name in ("now", "now-2", "now-3"):
        assert nights.new_name(output) == name
        storage.write_bytes(storage.join(nights.night_url(output, name), "README.md"), b"")


def test_the_pointer_goes_forth_and_back_and_names_complete_nights_only(tmp_path: Any) -> None:
    output = str(tmp_path)
    assert nights.current(output) is None
    with pytest.raises(ValueError, match="no night was promoted before any"):
        nights.roll_back(output)
    for name in ("a", "b"):
        storage.write_bytes(storage.join(nights.night_url(output, name), nights.NIGHT), b'{"format_version": 1}')
        nights.promote(output, name)
    storage.write_bytes(storage.join(nights.night_url(output, "c"), "README.md"), b"killed in the middle")
    with pytest.raises(ValueError, match="no night 'c' .*: known are a, b"):
        nights.promote(output, "c")
    assert nights.current(output) == "b"
    assert nights.roll_back(output) == "a" == nights.current(output)
    with pytest.raises(ValueError, match="no night was promoted before a"):
        nights.roll_back(output)


def test_a_set_that_was_taken_back_is_known_until_it_is_promoted_and_a_deleted_night_is_passed_over(
    tmp_path: Any,
) -> None:
    output = str(tmp_path)
    for name in ("a", "b", "c"):
        about = json.dumps({"format_version": 1, "kept_sha256": f"set {name}"})
        storage.write_bytes(storage.join(nights.night_url(output, name), nights.NIGHT), about.encode())
        nights.promote(output, name)
        nights.promote(output, name)  # once more changes nothing: the way back is to the night before
    (tmp_path / "nights" / "b" / nights.NIGHT).unlink()
    assert nights.roll_back(output) == "a" == nights.current(output)
    assert [nights.rolled_back(output, f"set {name}") for name in "abc"] == [None, None, "c"]
    nights.promote(output, "c")
    assert nights.rolled_back(output, "set c") is None
