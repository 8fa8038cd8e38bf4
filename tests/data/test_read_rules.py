"""Which members make a sample: how a name is split, and rules that cannot hold."""

from __future__ import annotations

import pytest

from curation.data.read_rules import ReadRules, split_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a/b.seg.PNG", ("a/b", "seg.png")),
        ("v1.0/b.jpg", ("v1.0/b", "jpg")),
        ("./a.jpg", ("./a", "jpg")),
        ("../../etc/passwd.jpg", ("../../etc/passwd", "jpg")),
        ("a__b__.jpg", ("a__b__", "jpg")),
        ("v1.0/README", None),
        ("README", None),
        ("a.", None),
        (".hidden", None),
        ("a/.jpg", None),
        ("a/._b.jpg", None),
        ("__MACOSX/a.jpg", None),
        ("x/__MACOSX/._a.jpg", None),
        ("__meta__", None),
        ("__meta__.json", None),
        ("__x__/a.jpg", None),
        ("a.pyd", None),
        ("a.state.PTH", None),
        ("a.pickle", None),
        ("", None),
    ],
)
def test_a_name_is_split_at_the_first_dot_after_the_last_slash(name, expected):
    assert split_name(name) == expected


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"image_fields": ()}, "image_fields must name at least one extension"),
        ({"image_fields": ("JPG",)}, "lower-case extensions .* got 'JPG'"),
        ({"image_fields": (".jpg",)}, "without a dot around them .* got '.jpg'"),
        ({"caption_field": ""}, "lower-case extensions .* got ''"),
        ({"caption_field": "a/b"}, "got 'a/b'"),
        ({"caption_field": "json."}, "got 'json.'"),
        ({"max_image_bytes": 0}, "max_image_bytes must be at least 1, got 0"),
        ({"max_caption_bytes": 0}, "max_caption_bytes must be at least 1, got 0"),
        ({"max_json_bytes": 0}, "max_json_bytes must be at least 1, got 0"),
        ({"max_json_fields": -1}, "max_json_fields must be at least 1, got -1"),
    ],
)
def test_read_rules_that_cannot_hold_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        ReadRules(**rules)
