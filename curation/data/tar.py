"""A streaming tar reader that ends neither early nor silently, whatever the file holds.

The standard library's `r|` mode stops without a word at many cuts and at the first damaged header. Here every member
that was begun comes out, whole or with its problem, and a damaged header costs its own member only. Headers are parsed
from 1 MiB reads without a seek or a read per member; memory is bounded by one wanted member plus one read.

Formats: V7, ustar (prefix), GNU (`L`, `K`, base-256 sizes, old sparse), PAX (`x`, `g`, `X`: path, size, sparse).

| the file holds | outcome |
|---|---|
| a regular file of at most `max_bytes(name)` bytes | `Member` with its data |
| a larger one | `Member`, `data=None`, no problem; streamed past |
| a directory, link, device, fifo, unknown kind | no member; streamed past |
| a sparse file | `Member`, `tar:sparse`, named; streamed past |
| a header with a wrong checksum or size | one unnamed `Member`, `tar:corrupt_header`, up to the next valid header |
| a damaged, malformed or > 1 MiB extension header | the same, together with the member whose name it holds |
| an extension header that no member follows | the same |
| an end inside a header or a member's data | `Member`, `tar:truncated`, named if the name was read; the last one |
| nothing, or less than two zero blocks only | one unnamed `Member`, `tar:truncated` |
| no valid header anywhere (a web page, a gzip) | one unnamed `Member`, `tar:not_a_tar` |
| no two zero blocks at the end, no data cut | warning `tar:no_end_marker` |
| one zero block between members | warning `tar:lone_zero_block`; reading goes on, as in GNU tar |
| members behind the end marker (`cat a.tar b.tar`) | they are read; warning `tar:data_after_end` |
| anything else but zeros there | warning `tar:data_after_end` |
| an error of the file object | it propagates: storage errors are not damaged data |

The next valid header is searched in steps of 512 bytes. If a damaged member holds a tar, that tar's members come out as
if they were ours. A size that a *valid* header declares is believed: one beyond the end of the file is one truncation.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple
from zlib import adler32

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20
"""Largest long name or PAX header that is held. Real ones have a few hundred bytes."""

_ZEROS = bytes(BLOCK)
_BLANK_CHECKSUM = 8 * ord(" ")
_OCTAL = re.compile(rb" *([0-7]*) *(?:\0|\Z)")
_REGULAR = frozenset(b"\x0007S")  # NUL, 0, contiguous, sparse
_PLAIN_FILE = ord("0")
_EXTENSIONS = frozenset(b"xXgLK")
_WITHOUT_DATA = frozenset(b"123456")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")


class Member(NamedTuple):
    """A regular file in a tar, or the place where one was lost."""

    name: str
    """As stored; bytes that are not UTF-8 as `\\xNN`. Never a path of ours. Empty if the name was lost."""
    offset: int
    """Of the first header block that belongs to the member, its extension headers included, in bytes."""
    size: int
    """As declared, in bytes; 0 if unknown."""
    data: bytes | None
    """None if the member is larger than the caller wants, or has a problem."""
    problem: str | None
    """None, `tar:truncated`, `tar:corrupt_header`, `tar:sparse` or `tar:not_a_tar`."""


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: int


@dataclass(slots=True)
class _Extension:
    """What the extension headers before a member say about it."""

    offset: int
    name: bytes | None = None
    size: int | None = None
    sparse: bool = False
    broken: bool = False


class TarReader:
    """Iterate once over a tar's members; after that `sha256`, `num_bytes` and `warnings` describe the whole file.

    `max_bytes` says how many bytes of the member with the given name the caller wants to hold at most; `start` is the
    offset at which `raw` stands. The file object is read to its end, also after the end marker, and is not closed.
    `hashed=False` leaves the sha256 out, which takes as long as all the rest once a sample has 30 kB.
    """

    def __init__(
        self,
        raw: BinaryIO,
        *,
        max_bytes: Callable[[str], int],
        start: int = 0,
        read_bytes: int = 1 << 20,
        hashed: bool = True,
    ) -> None:
        self.warnings: Counter[str] = Counter()
        self._raw, self._max_bytes, self._start, self._read_bytes = raw, max_bytes, start, read_bytes
        self._chunk, self._chunk_offset, self._position, self._exhausted = b"", start, 0, False
        self._hash = hashlib.sha256() if hashed else None
        self._global = _Extension(start)
        self._has_globals = False

    @property
    def sha256(self) -> str:
        """Of all bytes read, 64 hex digits. RuntimeError before the end of the file, or if it was left out."""
        self._check_exhausted()
        if self._hash is None:
            raise RuntimeError("this tar was read with hashed=False")
        return self._hash.hexdigest()

    @property
    def num_bytes(self) -> int:
        """How many bytes were read. RuntimeError before the end of the file."""
        self._check_exhausted()
        return self._chunk_offset + len(self._chunk) - self._start

    def _check_exhausted(self) -> None:
        if not self._exhausted:
            raise RuntimeError("sha256 and num_bytes are known once the tar has been read to its end")

    def __iter__(self) -> Iterator[Member]:
        extension: _Extension | None = None  # the extension headers read so far for the next member
        damage: int | None = None  # where the damaged region that we are in began
        hides_name = False  # the damaged region held an extension header, so the next member's name is not its own
        found = False  # a valid header was seen
        zeros = 0  # zero blocks just before

        while True:
            here = self._chunk_offset + self._position
            block = self._take(BLOCK)
            if len(block) < BLOCK:
                break

            if (header := _parse_header(block)) is None:
                if block == _ZEROS:
                    zeros += 1
                    if extension is not None and damage is None:
                        damage, extension, hides_name = extension.offset, None, False
                elif zeros >= 2 and damage is None:
                    self.warnings["tar:data_after_end"] = 1
                else:
                    if damage is None:
                        damage, extension, hides_name = (extension.offset if extension else here), None, False
                    hides_name = hides_name or _looks_like_extension(block)
                    zeros = 0
                continue

            found = True
            if damage is not None:
                if hides_name:
                    extension = _Extension(damage, broken=True)
                else:
                    yield Member("", damage, 0, None, "tar:corrupt_header")
                damage = None
            elif zeros:
                self.warnings["tar:data_after_end" if zeros >= 2 else "tar:lone_zero_block"] = 1
            zeros = 0

            if header.kind in _EXTENSIONS:
                extension = extension or _Extension(here)
                if not self._read_extension(extension, header):
                    yield Member("", extension.offset, header.size, None, "tar:truncated")
                    return
                continue

            if extension is None and header.kind == _PLAIN_FILE and not self._has_globals:
                member, whole = self._read_plain(header.name, header.size, here)
            else:
                member, whole = self._read_member(block, header, here, extension)
            extension = None
            if member is not None:
                yield member
            if not whole:
                return

        is_rest = any(block)  # a partial block of zeros is a cut end marker or padding, which loses nothing
        if damage is not None or (not found and self.warnings["tar:data_after_end"]):
            problem = "tar:corrupt_header" if found else "tar:not_a_tar"
            yield Member("", self._start if damage is None else damage, 0, None, problem)
        elif is_rest and zeros >= 2:
            self.warnings["tar:data_after_end"] = 1
        elif is_rest and not found and not _may_begin_a_tar(block):
            yield Member("", here, 0, None, "tar:not_a_tar")
        elif is_rest or extension is not None or (not found and zeros < 2):
            lost = extension.offset if extension else here if found else self._start
            yield Member("", lost, 0, None, "tar:truncated")
        elif zeros < 2:
            self.warnings["tar:no_end_marker"] = 1

    def _read_plain(self, name: bytes, size: int, offset: int) -> tuple[Member, bool]:
        """What `_read_member` gives for a regular file that no extension header speaks of: nearly every member."""
        text = name.decode("utf-8", "backslashreplace")
        data, whole = None, True
        if size <= self._max_bytes(text):
            data = self._take(size)
            whole = len(data) == size
        else:
            whole = self._skip(size)
        if not whole:
            return Member(text, offset, size, None, "tar:truncated"), False
        self._skip(-size % BLOCK)
        return Member(text, offset, size, data, None), True

    def _read_member(
        self, block: bytes, header: _Header, offset: int, extension: _Extension | None
    ) -> tuple[Member | None, bool]:
        """The member of this header, None if it is not a regular file; and whether the file goes on after it."""
        name, size, kind = header
        sparse, broken = kind == ord("S"), False
        if self._global.name is not None:
            name = self._global.name
        if self._global.size is not None:
            size = self._global.size
        if extension is not None:
            offset, broken = extension.offset, extension.broken
            name = name if extension.name is None else extension.name
            size = size if extension.size is None else extension.size
            sparse = sparse or extension.sparse
        text = name.decode("utf-8", "backslashreplace")

        whole = True
        is_extended = block[482] if kind == ord("S") else 0
        while is_extended and whole:  # old GNU sparse maps go on in further blocks, ahead of the data
            block = self._take(BLOCK)
            whole = len(block) == BLOCK
            is_extended = whole and block[504]

        is_regular = kind in _REGULAR and not (kind == 0 and name.endswith(b"/"))  # V7 directories are named `x/`
        if size and kind in _WITHOUT_DATA and self._stands_at_header():
            size = 0  # most tars put no data behind a link or directory that declares a size

        data = None
        if is_regular and not sparse and not broken and size <= self._max_bytes(text):
            data = self._take(size)
            whole = len(data) == size
        else:
            whole = self._skip(size) and whole
        self._skip(-size % BLOCK)

        if not whole:
            return Member("" if broken else text, offset, size, None, "tar:truncated"), False
        if broken:
            return Member("", offset, size, None, "tar:corrupt_header"), True
        if not is_regular:
            return None, True
        return Member(text, offset, size, data, "tar:sparse" if sparse else None), True

    def _read_extension(self, extension: _Extension, header: _Header) -> bool:
        """Take in an extension header's data. False if the file ends in it."""
        if header.size > MAX_EXTENSION_BYTES:
            extension.broken = True
            return self._skip(header.size) and self._skip(-header.size % BLOCK)
        data = self._take(header.size)
        if len(data) < header.size:
            return False
        self._skip(-header.size % BLOCK)
        if header.kind == ord("L"):
            extension.name = data.split(b"\0", 1)[0]
        elif header.kind != ord("K"):  # K is the target of a link, which nobody here follows
            records = _parse_pax(data)
            if records is None:
                extension.broken = True
            else:
                self._has_globals = self._has_globals or header.kind == ord("g")
                _apply_pax(self._global if header.kind == ord("g") else extension, records)
        return True

    def _stands_at_header(self) -> bool:
        """True if a header, a zero block or the end comes next."""
        while len(self._chunk) - self._position < BLOCK:
            rest, offset = self._chunk[self._position :], self._chunk_offset + self._position
            is_more = self._read_chunk()
            self._chunk, self._chunk_offset, self._position = rest + (self._chunk if is_more else b""), offset, 0
            if not is_more:
                return True
        block = self._chunk[self._position : self._position + BLOCK]
        return block == _ZEROS or _parse_header(block) is not None

    def _read_chunk(self) -> bool:
        """Replace the chunk by the next one. False, with the old one gone, at the end of the file."""
        if not self._exhausted:
            self._chunk_offset += len(self._chunk)
            self._chunk = self._raw.read(self._read_bytes)
            self._position = 0
            if self._hash is not None:
                self._hash.update(self._chunk)
            self._exhausted = not self._chunk
        return not self._exhausted

    def _take(self, n: int) -> bytes:
        """The next n bytes, fewer at the end of the file. What is not there is never allocated."""
        end = self._position + n
        if end <= len(self._chunk):
            data = self._chunk[self._position : end]
            self._position = end
            return data
        # Views, so that what lies across reads is copied once, as everything else is.
        parts = [memoryview(self._chunk)[self._position :]]
        missing = end - len(self._chunk)
        self._position = len(self._chunk)
        while missing and self._read_chunk():
            parts.append(memoryview(self._chunk)[:missing])
            self._position = len(parts[-1])
            missing -= self._position
        return b"".join(parts)

    def _skip(self, n: int) -> bool:
        """Pass over n bytes. False if the file ends before that."""
        self._position += n
        while self._position > len(self._chunk):
            beyond = self._position - len(self._chunk)
            self._position = len(self._chunk)
            if not self._read_chunk():
                return False
            self._position = beyond
        return True


def _parse_header(block: bytes) -> _Header | None:
    """Name, size and kind of a 512-byte header; None if its checksum or size is wrong."""
    stored = _octal(block[148:156])
    if not stored:  # no real header sums to 0; a zero block comes here
        return None
    # The low half of an Adler-32 is the sum of the bytes modulo 65521, so exact for 256 of them; 20x faster than sum().
    # The checksum's own eight bytes count as blanks.
    unsigned = (
        (adler32(block[:148], 0) & 0xFFFF)
        + (adler32(block[156:334], 0) & 0xFFFF)
        + (adler32(block[334:], 0) & 0xFFFF)
        + _BLANK_CHECKSUM
    )
    if stored != unsigned and stored != unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        return None  # old tars sum signed bytes
    size = int.from_bytes(block[125:136], "big") if block[124] == 0x80 else _octal(block[124:136])
    if size is None:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return _Header(name, size, block[156])


def _octal(field: bytes) -> int | None:
    """An octal number with blanks around it, ended by a NUL; 0 if empty, None if it is none."""
    text = _OCTAL.match(field)  # int() alone would take signs and underscores
    return None if text is None else int(text[1] or b"0", 8)


def _parse_pax(data: bytes) -> dict[bytes, bytes] | None:
    """The records `<length> <keyword>=<value>\\n` of a PAX header; None if one is malformed."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(data) and data[position]:
        digits = data[position : position + 8].split(b" ", 1)[0]
        end = position + int(digits) if digits.isdigit() else 0
        record = data[position + len(digits) + 1 : end]
        keyword, equals, value = record[:-1].partition(b"=")
        if not record.endswith(b"\n") or end > len(data) or not equals or not keyword:
            return None
        records[keyword] = value
        position = end
    size = records.get(b"size", b"")
    if any(data[position:]) or (size and not (size.isdigit() and len(size) <= 20)):
        return None
    return records


def _apply_pax(extension: _Extension, records: dict[bytes, bytes]) -> None:
    """Note what PAX records say; an empty value takes back what an earlier one said."""
    if b"path" in records:
        extension.name = records[b"path"] or None
    if b"size" in records:
        extension.size = int(records[b"size"]) if records[b"size"] else None
    if any(keyword.startswith(b"GNU.sparse.") for keyword in records):
        extension.sparse = True
        extension.name = records.get(b"GNU.sparse.name", extension.name)


def _looks_like_extension(block: bytes) -> bool:
    """True if a damaged block was the header of a long name or PAX header: two of its three marks are still there."""
    is_named_so = b"@LongLink" in block[:100] or b"PaxHeader" in block[:100]
    return (block[156] in _EXTENSIONS) + (block[257:262] == b"ustar") + is_named_so >= 2


def _may_begin_a_tar(rest: bytes) -> bool:
    """False if fewer than 512 bytes cannot be the start of a header: it has a NUL after the name or the mode."""
    return not rest.startswith(_COMPRESSED) and (len(rest) < 108 or b"\0" in rest[:108])
