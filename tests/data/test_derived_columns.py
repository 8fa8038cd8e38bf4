"""Derived columns count as DataComp's `apply_filter.py` does."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from curation.data.derived_columns import DERIVED, numbers, sources_of

NAN = float("nan")


def table(**columns) -> pa.Table:
    given = {name.replace("json_", "json."): values for name, values in columns.items()}
    n = len(next(iter(given.values())))
    every = {source for sources in DERIVED.values() for source in sources}
    return pa.table({**{name: pa.nulls(n) for name in every}, **given})


def test_words_are_parted_by_white_space_and_characters_are_code_points():
    captions = table(caption=["a  b\tc", "", "größe\u00a0é", None])
    np.testing.assert_array_equal(numbers(captions, "caption_words"), [3, 0, 2, NAN])
    np.testing.assert_array_equal(numbers(captions, "caption_chars"), [6, 0, 7, NAN])


def test_sides_are_those_before_resizing_where_they_are_known():
    sides = table(
        width=[10, 10, 10, None],
        height=[20, 20, 20, 20],
        json_original_width=[600, None, None, None],
        json_original_height=[200, None, None, None],
        json_WIDTH=pa.array([1.0, 300.0, NAN, NAN]),
        json_HEIGHT=pa.array([1.0, 100.0, NAN, NAN]),
    )
    np.testing.assert_array_equal(numbers(sides, "min_side"), [200, 100, 10, NAN])
    np.testing.assert_array_equal(numbers(sides, "aspect_ratio"), [3, 3, 2, NAN])


def test_a_side_that_is_no_number_is_not_known():
    sides = table(
        width=[10, 10], height=[20, 20], json_original_width=["N/A", "600"], json_original_height=[[640], None]
    )
    np.testing.assert_array_equal(numbers(sides, "min_side"), [10, 20])


def test_a_side_of_nothing_has_no_aspect():
    np.testing.assert_array_equal(numbers(table(width=[0], height=[5]), "aspect_ratio"), [NAN])


def test_any_other_column_is_itself():
    assert sources_of("json.x") == ("json.x",)
    np.testing.assert_array_equal(numbers(pa.table({"json.x": [1, None]}), "json.x"), [1, NAN])
    np.testing.assert_array_equal(numbers(pa.table({"json.x": ["a", "1"]}), "json.x"), [NAN, 1])
    with pytest.raises(ValueError, match="column 'language.label' of type string holds no numbers"):
        numbers(pa.table({"language.label": ["en"]}), "language.label")
