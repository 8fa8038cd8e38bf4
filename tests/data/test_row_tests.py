"""Row tests keep what they say, row by row; labels say what a row is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.data import hash_lists
from curation.data.derived_columns import DERIVED
from curation.data.labels import LABELS, domain_of, labels, ranges
from curation.data.row_tests import InPart, NotListed, OneOf, Within, check_disjoint

NAN = float("nan")


def test_a_range_holds_its_ends_and_treats_nulls_as_told() -> None:
    table = pa.table({"json.x": [1.0, 2.0, 3.0, None, NAN]})
    assert Within("x", "json.x", 2.0, 3.0, "drop").passes(table).tolist() == [False, True, True, False, False]
    assert Within("x", "json.x", None, 1.0, "keep").passes(table).tolist() == [True, False, False, True, True]


def test_words_are_exact_and_null_is_no_word() -> None:
    table = pa.table({"language.label": ["en", "de", "EN", None]})
    assert OneOf("x", "language.label", ("en", "de"), "drop").passes(table).tolist() == [True, True, False, False]
    assert OneOf("x", "language.label", ("en",), "keep").passes(table).tolist() == [True, False, False, True]


def test_a_column_of_nulls_alone_and_one_of_numbers_can_be_asked_for_words() -> None:
    table = pa.table({"json.a": pa.nulls(2), "json.b": [1, 2]})
    assert OneOf("x", "json.a", ("1",), "drop").passes(table).tolist() == [False, False]
    assert OneOf("x", "json.b", ("1",), "drop").passes(table).tolist() == [True, False]


def test_a_row_without_a_url_is_on_no_list_of_urls(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("http://a\n")
    url = hash_lists.build(str(tmp_path), hash_lists.listed(str(tmp_path / "l.txt")), "url")
    table = pa.table({"json.url": ["http://a", None, None, "http://b"], "json.URL": [None, "http://a", None, None]})
    assert NotListed("x", url, "url").passes(table).tolist() == [False, False, True, True]


def test_adjacent_parts_share_no_row_and_leave_none_out() -> None:
    table = pa.table({"uid": [f"{n * 977:032x}" for n in range(2000)]})
    parts = [InPart("p", a, b, 3, "uid", True).passes(table) for a, b in ((0.0, 0.25), (0.25, 0.5), (0.5, 1.0))]
    assert (np.sum(parts, axis=0) == 1).all()
    assert [abs(float(part.mean()) - share) < 0.03 for part, share in zip(parts, (0.25, 0.25, 0.5), strict=True)]
    outside = InPart("p", 0.0, 0.25, 3, "uid", False).passes(table)
    assert (outside != parts[0]).all()
    assert (InPart("p", 0.0, 0.25, 4, "uid", True).passes(table) != parts[0]).any()


def test_without_a_sha256_the_uid_is_hashed() -> None:
    table = pa.table({"uid": ["0" * 31 + "1"], "sha256": pa.array([None], pa.string())})
    by = [InPart("p", 0.0, 0.5, 0, kind, True).passes(table).tolist() for kind in ("uid", "sha256")]
    assert by[0] == by[1]


def test_parts_that_share_a_point_are_found_and_touching_ones_are_not() -> None:
    check_disjoint({"a": (0.0, 0.1), "b": (0.1, 0.2)}, others={"a": (0.0, 0.05)})
    with pytest.raises(ValueError, match=r"'a' \[0.0, 0.1\) overlaps 'c' \[0.05, 0.2\)"):
        check_disjoint({"a": (0.0, 0.1)}, others={"c": (0.05, 0.2)})


@pytest.mark.parametrize(
    ("url", "domain"),
    [
        ("https://www.Example.com:80/a?b", "example.com"),
        ("http://user:pw@b.org/", "b.org"),
        ("no url", "(none)"),
        ("http://[broken", "(none)"),
        ("", "(none)"),
    ],
)
def test_a_domain_is_the_host(url: str, domain: str) -> None:
    assert domain_of(url) == domain


def test_labels_are_text_and_numbers_need_edges() -> None:
    n = 3
    every = {source for sources in (*LABELS.values(), *DERIVED.values()) for source in sources}
    table = pa.table(
        {
            **{name: pa.nulls(n) for name in every},
            "json.url": ["http://a.b/1", None, "x"],
            "width": [64, 63, None],
            "height": [100, 100, 100],
            "json.kind": ["x", None, "y"],
            "json.whole": [1, 2, None],
            "clip_score": [0.1, 0.2, NAN],
        }
    )
    assert labels(table, "url_domain").to_pylist() == ["a.b", None, "(none)"]
    assert labels(table, "image_size").to_pylist() == ["64 to 128", "< 64", None]
    assert labels(table, "json.kind").to_pylist() == ["x", None, "y"]
    assert labels(table, "json.whole").to_pylist() == ["1", "2", None]
    assert labels(table, "clip_score", edges=[0.2]).to_pylist() == ["< 0.2", ">= 0.2", None]
    with pytest.raises(ValueError, match="column 'clip_score' holds numbers: a label needs edges"):
        labels(table, "clip_score")


def test_a_whole_number_is_one_group_whether_a_shard_stores_it_as_float_or_not() -> None:
    floats = pa.table({"json.lab": [1.0, None, -2.0, NAN, 1e15]})
    assert labels(floats, "json.lab").to_pylist() == ["1", None, "-2", None, str(10**15)]
    assert labels(pa.table({"json.lab": [1, None, -2]}), "json.lab").to_pylist() == ["1", None, "-2"]
    for odd in (0.5, float("inf")):
        with pytest.raises(ValueError, match="column 'json.lab' holds numbers: a label needs edges"):
            labels(pa.table({"json.lab": [1.0, odd]}), "json.lab")


def test_a_range_begins_at_its_edge() -> None:
    assert ranges(np.array([0.0, 1.0, 1.5, 2.0, NAN]), [1.0, 2.0]).to_pylist() == [
        "< 1",
        "1 to 2",
        "1 to 2",
        ">= 2",
        None,
    ]
