"""The tar reader against the standard library's writer, and against damage at every byte."""

from __future__ import annotations

import hashlib
import io
import tarfile
import tracemalloc
from collections.abc import Sequence
from typing import BinaryIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.data.tar import MAX_EXTENSION_BYTES, Member, TarReader

END = bytes(1024)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
LONG_NAME = "folder/" * 12 + "x" * 80 + ".jpg"


def header(
    name: bytes = b"a.jpg",
    size: int = 0,
    kind: bytes = b"0",
    *,
    patches: dict[int, bytes] | None = None,
    magic: bytes = b"ustar\x0000",
    is_signed: bool = False,
) -> bytes:
    """A header block by hand, with patches by offset, and its checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124:136], block[148:156] = b"0000644\0", b"%011o\0" % size, b" " * 8
    block[156:157], block[257 : 257 + len(magic)] = kind, magic
    for offset, patch in (patches or {}).items():
        block[offset : offset + len(patch)] = patch
    total = sum(byte - 256 if is_signed and byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def entry(name: bytes = b"a.jpg", data: bytes = b"abc", kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + padded(data)


def pax(**records: str) -> bytes:
    """The body of a PAX header."""
    body = b""
    for keyword, value in records.items():
        record = f" {keyword}={value}\n".encode()
        length = len(record) + 1
        while len(str(length)) + len(record) != length:
            length += 1
        body += b"%d" % length + record
    return body


def written(members: Sequence[tuple[str, bytes]], *, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar by the standard library."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(data: bytes, *, max_bytes: int = 1 << 30, read_bytes: int = 1 << 20) -> tuple[list[Member], dict[str, int]]:
    """Members and warnings; and the law that holds for every file: all its bytes were counted and hashed."""
    tar = TarReader(io.BytesIO(data), max_bytes=lambda _: max_bytes, read_bytes=read_bytes)
    members = list(tar)
    assert (tar.num_bytes, tar.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    return members, dict(tar.warnings)


def contents(members: Sequence[Member]) -> list[tuple[str, bytes | None]]:
    return [(member.name, member.data) for member in members if member.problem is None]


def problems(members: Sequence[Member]) -> list[tuple[str, str]]:
    return [(member.name, member.problem) for member in members if member.problem is not None]


SAMPLES = [(f"{key}.{extension}", key.encode() * n) for key in "abc" for extension, n in (("jpg", 700), ("txt", 5))]
LONG_SAMPLES = [(f"{'long/' * 30}{name}", data) for name, data in SAMPLES]

NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), min_size=1, max_size=120).filter(
    lambda name: name.strip(".") and not name.isspace()
)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1500), st.sampled_from(["file", "folder", "link"])), max_size=8),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from([1, 511, 512, 700, 1 << 20]),
)
def test_intact_tars_read_as_the_standard_library_reads_them(entries, tar_format, read_bytes):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data, kind in entries:
            info = tarfile.TarInfo(name)
            if kind == "file":
                info.size = len(data)
            else:
                info.type, info.linkname = (tarfile.DIRTYPE, "") if kind == "folder" else (tarfile.SYMTYPE, "y" * 150)
            tar.addfile(info, io.BytesIO(data) if kind == "file" else None)
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        files = [(info, tar.extractfile(info)) for info in tar if info.isreg()]
        expected = [(info.name, info.offset, info.size, file.read() if file else None, None) for info, file in files]
    members, warnings = read(buffer.getvalue(), read_bytes=read_bytes)
    assert ([tuple(member) for member in members], warnings) == (expected, {})


@pytest.mark.parametrize("tar_format", FORMATS)
def test_long_names_are_read_whole_in_every_format(tar_format):
    members, _ = read(written([(LONG_NAME, b"1"), ("b.jpg", b"2")], tar_format=tar_format))
    assert contents(members) == [(LONG_NAME, b"1"), ("b.jpg", b"2")]


@pytest.mark.parametrize("entries", [SAMPLES, LONG_SAMPLES], ids=["ustar", "long names"])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_a_cut_at_any_byte_keeps_every_whole_member_and_is_never_silent(entries, tar_format):
    data = written(entries, tar_format=tar_format)
    whole, warnings = read(data)
    assert (contents(whole), warnings) == (entries, {})
    ends = [member.offset for member in whole[1:]]
    archive_end = len(padded(data.rstrip(b"\0")))
    for cut in range(len(data)):
        members, warnings = read(data[:cut])
        kept = [
            member
            for member, next_offset in zip(whole, [*ends, archive_end], strict=True)
            if cut >= next_offset - (-member.size % 512)
        ]
        assert [member for member in members if member.problem is None] == kept
        is_lost = cut == 0 or (len(kept) < len(whole) and cut > ([0, *ends])[len(kept)])
        assert [problem for _, problem in problems(members)] == ["tar:truncated"] * is_lost
        is_marked = cut >= archive_end + 1024
        assert warnings == ({} if is_lost or is_marked else {"tar:no_end_marker": 1})


@pytest.mark.parametrize("flip", [0x01, 0xFF])
@pytest.mark.parametrize("tar_format", FORMATS, ids=["ustar", "gnu", "pax"])
def test_any_damaged_byte_of_any_header_costs_that_member_only(flip, tar_format):
    entries = LONG_SAMPLES[:4]
    data = written(entries, tar_format=tar_format)
    num_headers = 0
    for start in range(0, len(data) - 1024, 512):
        if data[start + 257 : start + 262] != b"ustar":
            continue
        num_headers += 1
        for offset in range(start, start + 512):
            damaged = bytearray(data)
            damaged[offset] ^= flip
            members, _ = read(bytes(damaged))
            if contents(members) == entries:
                assert not problems(members)  # the byte behind the checksum means nothing
                continue
            assert problems(members) == [("", "tar:corrupt_header")]
            assert len(contents(members)) == 3
            assert set(contents(members)) < set(entries)
    assert num_headers == (4 if tar_format == tarfile.USTAR_FORMAT else 8)


def test_a_zeroed_or_overwritten_region_is_counted_and_reading_goes_on_behind_it():
    data = written(SAMPLES)
    ends = [member.offset for member in read(data)[0]]
    for filler in (b"\xff", b"x\n"):
        damaged = data[: ends[2]] + (filler * 4000)[: ends[4] - ends[2]] + data[ends[4] :]
        members, _ = read(damaged)
        assert contents(members) == SAMPLES[:2] + SAMPLES[4:]
        assert [(m.offset, m.problem) for m in members if m.problem] == [(ends[2], "tar:corrupt_header")]
    members, warnings = read(data[: ends[2]] + bytes(ends[4] - ends[2]) + data[ends[4] :])
    assert contents(members) == SAMPLES[:2] + SAMPLES[4:]
    assert warnings == {"tar:data_after_end": 1}


def test_data_of_a_damaged_member_does_not_cost_the_next_one_its_name():
    noise = bytes(range(256)) * 64 + b"x" * 4096
    damaged = bytearray(entry(b"a.jpg", noise) + entry(b"b.jpg", b"b") + END)
    damaged[0] ^= 1
    members, _ = read(bytes(damaged))
    assert contents(members) == [("b.jpg", b"b")]
    assert problems(members) == [("", "tar:corrupt_header")]


def test_a_last_member_with_a_damaged_header_is_counted():
    damaged = bytearray(entry(b"a.jpg") + entry(b"b.jpg") + END)
    damaged[1024] ^= 1
    members, warnings = read(bytes(damaged))
    assert (contents(members), warnings) == ([("a.jpg", b"abc")], {})
    assert [(m.offset, m.problem) for m in members[1:]] == [(1024, "tar:corrupt_header")]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"x", b"20 path=short\n"),  # the length goes beyond the header
        (b"x", b"ab path=b.jpg\n"),
        (b"x", b"9 path=ab"),  # no newline
        (b"x", b"9 pathabc\n"),
        (b"x", b"6 =ab\n"),
        (b"x", pax(size="-1")),
        (b"x", pax(size="9" * 5000)),  # int() of it would raise
        (b"x", pax(path="b.jpg") + b"\0junk"),
    ],
)
def test_a_malformed_extension_header_takes_its_own_member_along_and_no_other(kind, body):
    members, _ = read(entry(b"x", body, kind) + entry(b"a.jpg") + entry(b"c.jpg") + END)
    assert [(m.name, m.offset, m.problem) for m in members] == [
        ("", 0, "tar:corrupt_header"),
        ("c.jpg", 512 + len(padded(body)) + 1024, None),
    ]


def test_an_extension_header_of_any_size_is_not_held():
    size = 64 << 20
    raw = Generated([header(b"x", size, b"x"), size, entry(b"a.jpg") + entry(b"b.jpg") + END])
    tracemalloc.start()
    members = list(TarReader(cast(BinaryIO, raw), max_bytes=lambda _: 1 << 30))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > MAX_EXTENSION_BYTES
    assert [(m.name, m.problem) for m in members] == [("", "tar:corrupt_header"), ("b.jpg", None)]
    assert peak < 8 << 20


def test_an_extension_header_that_no_member_follows_is_counted():
    orphan = entry(b"x", pax(path="b.jpg"), b"x")
    for rest, problem in ((END, "tar:corrupt_header"), (b"", "tar:truncated"), (b"junk" * 128, "tar:corrupt_header")):
        members, _ = read(entry() + orphan + rest)
        assert [(m.offset, m.problem) for m in members] == [(0, None), (1024, problem)]


def test_global_pax_values_hold_until_a_local_or_an_empty_one():
    members, _ = read(
        entry(b"g", pax(path="all.jpg", comment="c"), b"g")
        + entry(b"1.jpg")
        + entry(b"x", pax(path="local.jpg"), b"x")
        + entry(b"2.jpg")
        + entry(b"3.jpg")
        + entry(b"g", pax(path="", size="3"), b"g")
        + header(b"4.jpg", 0)
        + padded(b"xyz")
        + END
    )
    assert [name for name, _ in contents(members)] == ["all.jpg", "local.jpg", "all.jpg", "4.jpg"]
    assert members[-1].data == b"xyz"
    assert not problems(members)


def test_a_pax_size_overrides_the_header_and_an_offset_is_that_of_the_first_header():
    members, _ = read(entry() + entry(b"x", pax(size="4"), b"x") + header(b"b.jpg", 0) + padded(b"wxyz") + END)
    assert members[1] == Member("b.jpg", 1024, 4, b"wxyz", None)


def test_sizes_in_base_256_prefixes_and_signed_checksums_are_understood():
    base_256 = header(b"a.jpg", patches={124: b"\x80" + (3).to_bytes(11, "big")})
    prefixed = header(b"b.jpg", 3, patches={345: b"folder/deep"})
    gnu_times = header(b"c.jpg", 3, magic=b"ustar  \0", patches={345: b"00000000000\0"})  # not a prefix in GNU's format
    signed = header(b"d\xe9.jpg", 3, is_signed=True)
    v7 = header(b"e.jpg", 3, b"\0", magic=b"")
    data = b"".join(block + padded(b"abc") for block in (base_256, prefixed, gnu_times, signed, v7))
    members, warnings = read(data + header(b"folder/", 0, b"\0", magic=b"") + END)
    assert [m.name for m in members] == ["a.jpg", "folder/deep/b.jpg", "c.jpg", "d\\xe9.jpg", "e.jpg"]
    assert all(m.data == b"abc" for m in members)
    assert not warnings


@pytest.mark.parametrize(
    "patch", [{124: b"\xff" * 12}, {124: b"0000000000-1"}, {124: b"00000000009\0"}, {124: b"0000_000003\0"}]
)
def test_a_size_that_is_none_is_a_damaged_header(patch):
    members, _ = read(header(patches=patch) + padded(b"abc") + entry(b"b.jpg") + END)
    assert [(m.name, m.problem) for m in members] == [("", "tar:corrupt_header"), ("b.jpg", None)]


def test_names_are_printable_and_stay_distinct_whatever_their_bytes():
    members, _ = read(entry(b"caf\xe9.jpg") + entry(b"caf\xe8.jpg") + entry("é.jpg".encode()) + END)
    assert [m.name for m in members] == ["caf\\xe9.jpg", "caf\\xe8.jpg", "é.jpg"]
    for member in members:
        member.name.encode("utf-8")


def test_what_is_no_file_is_passed_over_with_its_data_and_without_its_neighbours():
    odd = [entry(b"odd", b"", kind) for kind in (b"1", b"2", b"3", b"4", b"5", b"6")]
    odd += [header(b"link", 2000, b"1"), header(b"folder", 99, b"5")]  # a size, and no data behind it
    odd += [entry(b"link", b"data", b"1"), entry(b"?", b"data", b"Z"), entry(b"volume", b"", b"V")]
    for read_bytes in (100, 1 << 20):
        members, warnings = read(b"".join(x + entry() for x in odd) + END, read_bytes=read_bytes)
        assert contents(members) == [("a.jpg", b"abc")] * len(odd)
        assert not problems(members) + list(warnings)
    assert read(entry() + header(b"folder", 99, b"5"))[1] == {"tar:no_end_marker": 1}
    cut_header = read(entry() + header(b"folder", 99, b"5") + header()[:300], read_bytes=100)[0]
    assert problems(cut_header) == [("", "tar:truncated")]


def test_sparse_files_are_named_and_passed_over():
    extended = header(b"old.jpg", 5, b"S", patches={482: b"\1"}) + bytes(504) + b"\1" + bytes(7) + bytes(512)
    new = entry(b"x", pax(**{"GNU.sparse.major": "1", "GNU.sparse.name": "new.jpg"}), b"x") + entry(
        b"GNUSparseFile.0/n"
    )
    members, _ = read(extended + padded(b"abcde") + new + entry() + END)
    assert problems(members) == [("old.jpg", "tar:sparse"), ("new.jpg", "tar:sparse")]
    assert contents(members) == [("a.jpg", b"abc")]
    assert problems(read(extended[:600])[0]) == [("old.jpg", "tar:truncated")]


class Generated:
    """A file object whose zeros (the numbers among its parts) are never held."""

    def __init__(self, parts: Sequence[bytes | int]) -> None:
        self._parts = list(parts)

    def read(self, n: int) -> bytes:
        while self._parts:
            part = self._parts.pop(0)
            size = part if isinstance(part, int) else len(part)
            taken = min(size, n)
            if taken < size:
                self._parts.insert(0, size - taken if isinstance(part, int) else part[taken:])
            if taken:
                return bytes(taken) if isinstance(part, int) else part[:taken]
        return b""


def test_members_above_the_cap_are_never_held():
    size = 128 << 20
    raw = Generated(
        [
            header(b"a.jpg", size),
            size,
            entry(b"b.jpg"),
            header(b"c.jpg", patches={124: b"\x80" + (1 << 62).to_bytes(11, "big")}),
            1 << 20,
        ]
    )
    tracemalloc.start()
    tar = TarReader(cast(BinaryIO, raw), max_bytes=lambda name: 1 << 20 if name == "a.jpg" else 1 << 63)
    members = list(tar)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert members == [
        Member("a.jpg", 0, size, None, None),
        Member("b.jpg", size + 512, 3, b"abc", None),
        Member("c.jpg", size + 1536, 1 << 62, None, "tar:truncated"),
    ]
    assert tar.num_bytes == size + 2048 + (1 << 20)
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "tar:truncated"),
        (bytes(100), "tar:truncated"),
        (bytes(512), "tar:truncated"),
        (header()[:1], "tar:truncated"),
        (header()[:511], "tar:truncated"),
        (b"<html>" + b"not found " * 20, "tar:not_a_tar"),
        (b"<html>" + b"not found " * 999, "tar:not_a_tar"),
        (b"\x1f\x8b\x08\0" + b"\0" * 30, "tar:not_a_tar"),
        (b"\x1f\x8b\x08\0" + bytes(range(256)) * 9, "tar:not_a_tar"),
        (END + b"junk" * 500, "tar:not_a_tar"),
    ],
)
def test_a_file_without_a_single_header_is_one_problem(data, problem):
    members, warnings = read(data)
    assert [(m.name, m.offset, m.data, m.problem) for m in members] == [("", 0, None, problem)]
    assert "tar:no_end_marker" not in warnings


def test_an_empty_archive_has_no_members_and_no_problem():
    assert read(END) == ([], {})
    assert read(written([])) == ([], {})


@pytest.mark.parametrize(
    ("tail", "warnings"),
    [
        (b"", {"tar:no_end_marker": 1}),
        (bytes(512), {"tar:no_end_marker": 1}),
        (bytes(700), {"tar:no_end_marker": 1}),
        (END, {}),
        (bytes(9999), {}),
        (END + b"junk", {"tar:data_after_end": 1}),
        (END + b"junk" * 1000, {"tar:data_after_end": 1}),
        (bytes(512) + entry() + END, {"tar:lone_zero_block": 1}),
        (END + entry() + END, {"tar:data_after_end": 1}),
    ],
)
def test_every_way_to_end_is_told_apart(tail, warnings):
    members, seen = read(entry() + tail)
    assert contents(members) == [("a.jpg", b"abc")] * (2 if entry() in tail else 1)
    assert (problems(members), seen) == ([], warnings)


def test_a_storage_error_propagates_and_the_hash_is_not_given_before_the_end():
    class Broken(io.BytesIO):
        def read(self, n: int | None = -1) -> bytes:
            if self.tell() >= 1024:
                raise OSError("the bucket is gone")
            return super().read(n)

    tar = TarReader(Broken(entry() + entry()), max_bytes=lambda _: 1 << 30, read_bytes=1024)
    members = iter(tar)
    assert next(members).name == "a.jpg"
    with pytest.raises(OSError, match="the bucket is gone"):
        next(members)
    with pytest.raises(RuntimeError, match="read to its end"):
        _ = tar.sha256
    with pytest.raises(RuntimeError, match="read to its end"):
        _ = tar.num_bytes


def test_offsets_are_those_in_the_file_when_reading_begins_in_its_middle():
    data = written(SAMPLES)
    offset = read(data)[0][2].offset
    raw = io.BytesIO(data)
    raw.seek(offset)
    tar = TarReader(raw, max_bytes=lambda _: 1 << 30, start=offset)
    assert list(tar) == read(data)[0][2:]
    assert tar.num_bytes == len(data) - offset


def test_the_hash_can_be_left_out_and_is_then_not_given():
    tar = TarReader(io.BytesIO(written(SAMPLES)), max_bytes=lambda _: 1 << 30, hashed=False)
    assert contents(list(tar)) == SAMPLES and tar.num_bytes == len(written(SAMPLES))
    with pytest.raises(RuntimeError, match="read with hashed=False"):
        _ = tar.sha256


def test_what_lies_across_many_reads_is_joined_and_is_bytes():
    data = written([("a.jpg", bytes(range(256)) * 40)])
    for read_bytes in (1, 7, 512, 513):
        (member,), _ = read(data, read_bytes=read_bytes)
        assert type(member.data) is bytes and member.data == bytes(range(256)) * 40
