"""Shards to samples: open_clip's grouping, one row and one reason per sample, uids, and damage that stays local."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.data import shards
from curation.data.drop_reasons import DROP_REASONS, WARNINGS
from curation.data.read_rules import ReadRules
from curation.data.samples import Sample
from curation.data.shards import ShardReader, read_sample_members

URL = "memory://pool/part/00000.tar"
SPARSE = b"sparse"
"""Stands for a member that is stored sparsely."""


def tar_of(members: Sequence[tuple[str, bytes]], *, tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type = tarfile.GNUTYPE_SPARSE if data == SPARSE else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(data: bytes, **rules: Any) -> tuple[list[Sample], Counter[str]]:
    """Samples and warnings; and the laws that hold for every shard: rows count up, reasons and warnings are listed."""
    reader = ShardReader(io.BytesIO(data), url=URL, rules=ReadRules(**rules))
    samples = list(reader)
    assert (reader.num_bytes, reader.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert [sample.row for sample in samples] == list(range(len(samples)))
    assert {sample.reason for sample in samples} - {None} <= set(DROP_REASONS)
    assert set(reader.warnings) <= set(WARNINGS)
    assert all(re.fullmatch("[0-9a-f]{32}", sample.uid) for sample in samples)
    for sample in samples:
        assert sample.sha256 == (None if sample.image is None else hashlib.sha256(sample.image).hexdigest())
        json.dumps([sample.key, sample.caption, sample.fields], ensure_ascii=False).encode("utf-8")
    return samples, reader.warnings


def reasons(data: bytes, **rules: Any) -> list[tuple[str, str | None]]:
    return [(sample.key, sample.reason) for sample in read(data, **rules)[0]]


def one(*members: tuple[str, bytes], **rules: Any) -> Sample:
    """The only sample of a shard with these members."""
    (sample,) = read(tar_of(members), **rules)[0]
    return sample


def pair(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", f"image {key}".encode()), (f"{key}.txt", f"caption {key}".encode())]


def test_adjacent_members_with_one_key_are_one_sample_and_a_repeated_extension_begins_the_next():
    members = [*pair("a"), ("a.JPG", b"again"), ("a.txt", b"again"), *pair("b"), *pair("a"), ("b.txt", b"alone")]
    samples, _ = read(tar_of(members))
    assert [(s.key, s.image, s.caption, s.reason) for s in samples] == [
        ("a", b"image a", "caption a", None),
        ("a", b"again", "again", None),
        ("b", b"image b", "caption b", None),
        ("a", b"image a", "caption a", None),
        ("b", None, "alone", "image:missing"),
    ]


def test_members_of_no_sample_neither_count_nor_part_a_sample():
    strangers = ["README", "__meta__.json", "__MACOSX/._a.jpg", "._a.jpg", "a.pickle", "dir/", ".hidden"]
    image, caption = pair("a")
    members = [("first", b""), image, *[(name, b"x") for name in strangers], ("no-ext", SPARSE), caption, ("last", b"")]
    assert reasons(tar_of(members)) == [("a", None)]


GROUP_NAMES = st.tuples(
    st.sampled_from(["a", "b", "d/a", "A"]), st.sampled_from(["jpg", "JPG", "txt", "json", "x.y", "png"])
).map(".".join) | st.sampled_from(["README", "._a.jpg", "__m__"])


@settings(max_examples=100, deadline=None)
@given(st.lists(GROUP_NAMES, max_size=14))
def test_groups_are_those_of_open_clip(names):
    """The oracle is open_clip's group_by_keys_nothrow with webdataset's base_plus_ext."""
    expected: list[dict[str, Any]] = []
    current = None
    for number, name in enumerate(names):
        match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
        if match is None:
            continue
        key, extension = match.group(1), match.group(2).lower()
        if current is None or key != current["key"] or extension in current:
            current = {"key": key}
            expected.append(current)
        current[extension] = b"%d" % number
    samples, _ = read(tar_of([(name, b"%d" % number) for number, name in enumerate(names)]))
    assert [(s.key, s.image) for s in samples] == [
        (group["key"], group.get("jpg", group.get("png"))) for group in expected
    ]


def test_the_first_image_field_that_is_present_is_the_image_even_if_it_is_empty():
    members = [("a.webp", b"w"), ("a.png", b"p"), ("a.txt", b"t")]
    assert one(*members).image == b"p"
    assert one(*members, image_fields=("webp", "png")).image == b"w"
    assert one(*members, ("a.jpg", b"")).reason == "image:empty"
    assert one(("a.jpg", b"j"), ("a.cls", b"7"), caption_field="cls").caption == "7"
    assert one(("a.seg.jpg", b"j"), ("a.txt", b"t")).reason == "image:missing"


@pytest.mark.parametrize(
    ("members", "rules", "reason"),
    [
        ([("a.txt", b"t")], {}, "image:missing"),
        ([("a.jpg", b""), ("a.txt", b"t")], {}, "image:empty"),
        ([("a.jpg", b"12345"), ("a.txt", b"t")], {"max_image_bytes": 4}, "image:too_large"),
        ([("a.jpg", b"1234"), ("a.txt", b"t")], {"max_image_bytes": 4}, None),
        ([("a.json", b'{"url": "u"}'), ("a.txt", b"t")], {}, "image:not_downloaded"),
        ([("a.json", b'{"URL": "u", "status": "failed_to_download"}')], {}, "image:not_downloaded"),
        ([("a.json", b'{"url": "u", "status": "success"}'), ("a.txt", b"t")], {}, "image:missing"),
        ([("a.json", b'{"url": null}'), ("a.txt", b"t")], {}, "image:missing"),
        ([("a.jpg", b"i")], {}, "caption:missing"),
        ([("a.jpg", b"i"), ("a.txt", b"")], {}, "caption:empty"),
        ([("a.jpg", b"i"), ("a.txt", b" \n\t")], {}, "caption:empty"),
        ([("a.jpg", b"i"), ("a.txt", b"\xef\xbb\xbf ")], {}, "caption:empty"),
        ([("a.jpg", b"i"), ("a.txt", b"caf\xe9")], {}, "caption:not_utf8"),
        ([("a.jpg", b"i"), ("a.txt", b"12345")], {"max_caption_bytes": 4}, "caption:too_large"),
        ([("a.jpg", b"i"), ("a.txt", b"1234")], {"max_caption_bytes": 4}, None),
        ([("a.jpg", SPARSE), ("a.txt", b"t")], {}, "tar:sparse"),
        ([("a.jpg", b""), ("a.txt", b"")], {}, "image:empty"),
    ],
)
def test_a_sample_is_dropped_for_the_first_reason_that_applies(members, rules, reason):
    assert one(*members, **rules).reason == reason


@pytest.mark.parametrize(
    ("fields", "caption", "reason"),
    [
        (b'{"caption": "a dog "}', "a dog ", None),
        (b'{"caption": "\\ud83d\\ude00 \\ud83d!"}', "\U0001f600 \ufffd!", None),
        (b'{"caption": " "}', " ", "caption:empty"),
        (b'{"caption": null}', None, "caption:missing"),
        (b"{}", None, "caption:missing"),
        (b'{"caption": ["a"]}', None, "caption:not_text"),
        (b'{"caption": "12345678901234567"}', None, "caption:too_large"),
        (b'{"caption": "a dog"', None, "caption:unreadable"),
        (b'{"caption": "%s"}' % (b"x" * 200), None, "caption:unreadable"),
    ],
)
def test_a_caption_may_come_from_the_json(fields, caption, reason):
    rules = {"caption_field": "json.caption", "max_caption_bytes": 16, "max_json_bytes": 100}
    sample = one(("a.jpg", b"i"), ("a.json", fields), ("a.txt", b"ignored"), **rules)
    assert (sample.caption, sample.reason) == (caption, reason)
    assert one(("a.jpg", b"i"), **rules).reason == "caption:missing"


@pytest.mark.parametrize("caption", ["a dog .\n", "\ufeffdog", "  dog\r\n", "chó\0"])
def test_a_caption_stays_exactly_as_it_is_stored(caption):
    assert one(("a.jpg", b"i"), ("a.txt", caption.encode())).caption == caption


@pytest.mark.parametrize(
    ("data", "warning"),
    [
        (b"{", "json:invalid"),
        (b"\xff{}", "json:invalid"),
        ('{"a": 1}'.encode("utf-16"), "json:invalid"),
        (b'{"a": ' + b"9" * 5000 + b"}", "json:invalid"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "json:too_deep"),
        (b'{"a": "' + b"x" * 300_000 + b'"}', "json:too_large"),
        (b"[1]", "json:not_an_object"),
        (b'"text"', "json:not_an_object"),
    ],
)
def test_a_broken_json_costs_the_fields_and_nothing_else(data, warning):
    samples, warnings = read(tar_of([*pair("a"), ("a.json", data), *pair("b")]), max_json_bytes=250_000)
    assert [(s.key, s.fields, s.reason) for s in samples] == [("a", {}, None), ("b", {}, None)]
    assert warnings == {warning: 1}


def test_json_fields_come_through_and_the_surplus_is_counted():
    fields = {"url": "u", "none": None, "deep": {"a": [1, "\ud800"]}, "nan": float("nan"), "bom": "\ufeff"}
    data = b"\xef\xbb\xbf" + json.dumps(fields).encode()
    sample = one(*pair("a"), ("a.json", data))
    assert sample.fields["deep"] == {"a": [1, "\ufffd"]}
    assert list(sample.fields) == list(fields)
    surrogate_names = one(*pair("a"), ("a.json", b'{"\\uD8FF": 1}'))
    assert surrogate_names.fields == {"\ufffd": 1}
    uid = "AB" * 16
    many = json.dumps({**{f"f{number}": number for number in range(10)}, "uid": uid}).encode()
    samples, warnings = read(tar_of([*pair("a"), ("a.json", many)]), max_json_fields=3)
    assert samples[0].fields == {"f0": 0, "f1": 1, "f2": 2}
    assert samples[0].uid == uid.lower()
    assert warnings == {"json:too_many_fields": 1}


def test_a_uid_is_the_jsons_or_128_bits_of_the_content():
    by_hand = hashlib.sha256()
    for part in (b"part/00000.tar", b"k/a", b"image", "chó".encode()):
        by_hand.update(len(part).to_bytes(8, "little") + part)
    members = [("k/a.jpg", b"image"), ("k/a.txt", "chó".encode())]
    assert one(*members).uid == by_hand.hexdigest()[:32]
    assert one(*members, ("k/a.json", b'{"uid": "%s"}' % (b"0F" * 16))).uid == "0f" * 16
    assert one(*members, ("k/a.json", b'{"uid": null}')).uid == by_hand.hexdigest()[:32]
    for malformed in (b'"0F"', b"7", b'"%s"' % (b"0g" * 16), b'"%s\\n"' % (b"0f" * 16), b"[]"):
        samples, warnings = read(tar_of([*members, ("k/a.json", b'{"uid": %s}' % malformed)]))
        assert (samples[0].uid, samples[0].reason) == (by_hand.hexdigest()[:32], None)
        assert warnings == {"uid:malformed": 1}


def test_a_content_uid_changes_with_each_of_its_parts_and_with_where_they_part():
    uids = [
        one((f"{key}.jpg", image), (f"{key}.txt", caption)).uid
        for key, image, caption in [("a", b"b", b"c"), ("b", b"b", b"c"), ("a", b"bc", b"c"), ("a", b"b", b"cc")]
    ]
    uids.append(one(("a.jpg", b""), ("a.txt", b"bc")).uid)
    uids.append(one(("ab.jpg", b""), ("ab.txt", b"c")).uid)
    assert len(set(uids)) == len(uids)


SAMPLES = [
    (
        key,
        [(f"{key}.jpg", key.encode() * 300), (f"{key}.json", b'{"k": 1}'), (f"{key}.txt", b"caption " + key.encode())],
    )
    for key in "abc"
]
LONG_SAMPLES = [(f"{'long/' * 30}{key}", [(f"{'long/' * 30}{n}", d) for n, d in members]) for key, members in SAMPLES]


@pytest.mark.parametrize("entries", [SAMPLES, LONG_SAMPLES], ids=["short names", "long names"])
def test_a_cut_at_any_byte_drops_at_most_the_sample_in_progress_and_is_never_silent(entries):
    data = tar_of([member for _, members in entries for member in members])
    whole, warnings = read(data)
    assert [s.reason for s in whole] == [None] * 3
    assert not warnings
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        data_ends = [info.offset_data + info.size for info in tar if info.name.endswith("txt")]
    archive_end = -(-data_ends[-1] // 512) * 512 + 1024
    for cut in range(len(data)):
        samples, warnings = read(data[:cut])
        num_whole = sum(cut >= end for end in data_ends)
        assert samples[:num_whole] == whole[:num_whole]
        is_lost = cut == 0 or (num_whole < 3 and cut > whole[num_whole].offset)
        assert [s.reason for s in samples[num_whole:]] == ["tar:truncated"] * is_lost
        assert is_lost or warnings == ({} if cut >= archive_end else {"tar:no_end_marker": 1})
    for sample in whole:  # a cut between a sample's members is a cut, not a missing caption
        (dropped,) = read(data[: read_offset(data, f"{sample.key}.txt")])[0][sample.row :]
        assert (dropped.key, dropped.reason) == (sample.key, "tar:truncated")


def read_offset(data: bytes, name: str) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmember(name).offset


@pytest.mark.parametrize("flip", [0x01, 0xFF])
@pytest.mark.parametrize("entries", [SAMPLES, LONG_SAMPLES], ids=["short names", "long names"])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_any_damaged_byte_of_any_header_costs_one_sample_and_one_row(tar_format, entries, flip):
    data = tar_of([member for _, members in entries for member in members], tar_format=tar_format)
    whole, _ = read(data)
    for start in range(0, len(data) - 1024, 512):
        if data[start + 257 : start + 262] != b"ustar":
            continue
        hit = max(s.row for s in whole if s.offset <= start)
        for offset in range(start, start + 512, 3):
            damaged = bytearray(data)
            damaged[offset] ^= flip
            samples, _ = read(bytes(damaged))
            others = [(s.key, s.image, s.caption, s.reason) for s in samples if s.row != hit]
            assert others == [(s.key, s.image, s.caption, None) for s in whole if s.row != hit]
            assert samples[hit] == whole[hit] or samples[hit].reason == "tar:corrupt_header"


def damaged_headers(data: bytes, *names: str) -> bytes:
    damaged = bytearray(data)
    for name in names:
        damaged[read_offset(data, name)] ^= 1
    return bytes(damaged)


def test_a_damage_between_whole_samples_is_a_row_of_its_own():
    data = tar_of([*pair("a"), ("a.json", b"{}"), *pair("b")])
    offset = read_offset(data, "a.json")
    samples, _ = read(damaged_headers(data, "a.json"))
    assert [(s.key, s.offset, s.reason) for s in samples] == [
        ("a", 0, None),
        (f"@{offset}", offset, "tar:corrupt_header"),
        ("b", read_offset(data, "b.jpg"), None),
    ]
    assert (samples[1].image, samples[1].caption, samples[1].fields) == (None, None, {})


def test_a_damage_is_charged_to_the_incomplete_sample_beside_it():
    data = tar_of([*pair("a"), *pair("b"), *pair("c")])
    assert reasons(damaged_headers(data, "b.jpg")) == [("a", None), ("b", "tar:corrupt_header"), ("c", None)]
    assert reasons(damaged_headers(data, "b.txt")) == [("a", None), ("b", "tar:corrupt_header"), ("c", None)]
    assert reasons(damaged_headers(data, "a.txt", "b.jpg")) == [
        ("a", "tar:corrupt_header"),
        ("b", "image:missing"),  # one region, one charge; the other sample says what it lacks
        ("c", None),
    ]
    assert reasons(damaged_headers(data, "a.jpg", "a.txt", "c.jpg", "c.txt")) == [
        ("@0", "tar:corrupt_header"),
        ("b", None),
        (f"@{read_offset(data, 'c.jpg')}", "tar:corrupt_header"),
    ]


def test_two_damages_in_a_row_are_two_rows():
    data = tar_of([*pair("a"), ("x", b""), ("README", b"r"), ("y", b""), *pair("b")])
    rows = reasons(damaged_headers(data, "x", "y"))
    assert [reason for _, reason in rows] == [None, "tar:corrupt_header", "tar:corrupt_header", None]


def test_a_damage_inside_a_sample_drops_it_even_if_image_and_caption_are_there():
    data = tar_of([*pair("a"), ("a.json", b'{"uid": "%s"}' % (b"0" * 32)), ("a.cls", b"1"), *pair("b")])
    assert reasons(damaged_headers(data, "a.json")) == [("a", "tar:corrupt_header"), ("b", None)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "tar:truncated"), (b"<html>" * 500, "tar:not_a_tar"), (b"\x1f\x8b" * 900, "tar:not_a_tar")],
)
def test_a_shard_that_is_no_tar_is_one_dropped_row(data, reason):
    samples, _ = read(data)
    assert [(s.key, s.offset, s.reason) for s in samples] == [("@0", 0, reason)]


def test_a_missing_end_marker_loses_no_whole_sample():
    data = tar_of([*pair("a"), *pair("b")]).rstrip(b"\0")
    samples, warnings = read(data + bytes(-len(data) % 512))
    assert ([s.reason for s in samples], warnings) == ([None, None], {"tar:no_end_marker": 1})


def test_a_shard_with_more_rows_than_addresses_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(shards, "MAX_ROWS_PER_SHARD", 2)
    data = tar_of([*pair("a"), *pair("b"), *pair("c")])
    reader = ShardReader(io.BytesIO(data), url=URL, rules=ReadRules())
    assert [s.key for s in itertools.islice(reader, 2)] == ["a", "b"]
    with pytest.raises(ValueError, match=f"shard {URL} has more than 2 samples"):
        list(ShardReader(io.BytesIO(data), url=URL, rules=ReadRules()))


def test_a_group_without_end_is_parted(monkeypatch):
    monkeypatch.setattr(shards, "MAX_MEMBERS_PER_SAMPLE", 3)
    members = [*pair("a"), *[(f"a.{number}", b"x") for number in range(5)]]
    assert reasons(tar_of(members)) == [("a", None), ("a", "image:missing"), ("a", "image:missing")]


def test_no_name_from_a_tar_reaches_the_file_system(monkeypatch):
    data = tar_of([*pair("../../etc/passwd"), *pair("/etc/shadow"), *pair("~/x"), *pair("C:\\x")])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the file system was touched")

    for target in ("builtins.open", "io.open", "os.open", "os.stat", "os.mkdir"):
        monkeypatch.setattr(target, refuse)
    samples = list(ShardReader(io.BytesIO(data), url=URL, rules=ReadRules()))
    members = read_sample_members(io.BytesIO(data), samples[1].offset)
    monkeypatch.undo()
    assert [s.key for s in samples] == ["../../etc/passwd", "/etc/shadow", "~/x", "C:\\x"]
    assert members == pair("/etc/shadow")


def test_a_samples_members_are_found_again_by_its_offset_untouched():
    members = [*pair("a"), ("b.JPG", b"i"), ("b.x.y", b"\0\xff"), ("b.pickle", b"P"), ("b.txt", b"t"), *pair("c")]
    data = tar_of(members)
    samples, _ = read(data)
    found = [read_sample_members(io.BytesIO(data), sample.offset) for sample in samples]
    assert found == [pair("a"), [("b.JPG", b"i"), ("b.x.y", b"\0\xff"), ("b.txt", b"t")], pair("c")]
    long = tar_of([member for _, members in LONG_SAMPLES for member in members])
    assert read_sample_members(io.BytesIO(long), read(long)[0][1].offset) == LONG_SAMPLES[1][1]


def test_members_of_what_is_no_whole_sample_are_refused():
    data = tar_of([*pair("a"), *pair("b")])
    for offset in (512, len(data) - 1024, len(data)):
        with pytest.raises(ValueError, match=f"no whole sample begins at offset {offset}"):
            read_sample_members(io.BytesIO(data), offset)
    with pytest.raises(ValueError, match="no whole sample begins at offset 0"):
        read_sample_members(io.BytesIO(data[:515]), 0)
    with pytest.raises(ValueError, match=r"member 'a.jpg' of the sample at offset 0 is above 3 bytes"):
        read_sample_members(io.BytesIO(data), 0, max_member_bytes=3)


@pytest.mark.parametrize(
    ("path", "num_samples"),
    [("cc12m-mini/cc12m-train-0000.tar", 32), ("flickr8k/00000.tar", 750), ("bad-input/00000.tar", 159)],
)
def test_real_shards_are_read_whole(real_data: Path, path, num_samples):
    with open(real_data / path, "rb") as raw:
        reader = ShardReader(raw, url=str(real_data / path), rules=ReadRules())
        samples = list(reader)
        assert [s.reason for s in samples] == [None] * num_samples
        assert len({s.uid for s in samples}) == num_samples
        assert all(s.key == s.fields["key"] and s.caption == s.fields["caption"] for s in samples)
        assert not reader.warnings
        assert read_sample_members(raw, samples[7].offset)[0] == (f"{samples[7].key}.jpg", samples[7].image)


def test_real_images_are_those_that_the_pool_says_it_stores(real_data: Path):
    with open(real_data / "flickr8k/00000.tar", "rb") as raw:
        for sample in ShardReader(raw, url="flickr8k/00000.tar", rules=ReadRules()):
            assert sample.sha256 == sample.fields["stored_sha256"]


def test_originals_under_other_extensions_have_no_image(real_data: Path):
    with open(real_data / "bad-input/manifest.csv", newline="") as lines:
        num_listed = sum(1 for _ in csv.DictReader(lines))
    with tarfile.open(real_data / "bad-input/originals.tar") as tar:
        extensions = {name.split(".")[0]: name.split(".", 1)[1] for name in tar.getnames()}
    with open(real_data / "bad-input/originals.tar", "rb") as raw:
        samples = list(ShardReader(raw, url="bad-input/originals.tar", rules=ReadRules()))
    assert len(samples) == num_listed
    for sample in samples:
        is_image = extensions[sample.key] in ("jpg", "png", "jpeg", "webp")
        assert sample.reason == ("caption:missing" if is_image else "image:missing")
