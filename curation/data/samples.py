"""A sample of a shard, whether a tar or a parquet file holds it: its uid, and what drops it in both alike."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from curation.data.captions import Choice, is_blank
from curation.data.read_rules import ReadRules

_UID = re.compile(r"[0-9a-fA-F]{32}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One row of a shard: an image-text pair, or what is left of one and the reason why it is dropped."""

    row: int
    offset: int
    """Byte offset of its first member's header in a tar; its row in a parquet file."""
    key: str
    uid: str
    image: bytes | None
    caption: str | None
    """Exactly as stored: not stripped, a byte order mark kept, as open_clip has it. Lone surrogates are U+FFFD."""
    fields: dict[str, Any]
    """The json's fields, always encodable as UTF-8."""
    sha256: str | None
    """Of the image bytes, 64 hex digits."""
    reason: str | None
    """None, or one of `drop_reasons.DROP_REASONS`."""
    choices: tuple[Choice, ...] = ()
    """With best_caption_of: its captions, of which `caption` is the first."""


class Content(NamedTuple):
    """A sample before it has a row."""

    key: str
    offset: int
    image: bytes | None
    caption: str | None
    fields: dict[str, Any]
    uid: str | None
    reason: str | None
    choices: tuple[Choice, ...] = ()


def is_uid(value: Any) -> TypeGuard[str]:
    """True if a pool's own uid is one: 32 hex digits."""
    return isinstance(value, str) and _UID.fullmatch(value) is not None


def sample_of(content: Content, *, row: int, shard: bytes) -> Sample:
    """The sample at a row of the shard whose name is `shard`; its own uid, else that of its content."""
    image, caption = content.image or b"", content.caption or ""
    return Sample(
        row=row,
        offset=content.offset,
        key=content.key,
        uid=content.uid or content_uid(shard, content.key, image=image, caption=caption),
        image=content.image,
        caption=content.caption,
        fields=content.fields,
        sha256=None if content.image is None else hashlib.sha256(content.image).hexdigest(),
        reason=content.reason,
        choices=content.choices,
    )


def shard_name(url: str) -> str:
    """Last folder and file name of a shard's URL: what of its place enters a uid, so that a pool can be moved."""
    path = url
    if "://" in url:
        path = url.rsplit("://", 1)[1].split("?", 1)[0]  # a signed URL changes with every signature
    return "/".join([part for part in path.split("/") if part not in ("", ".")][-2:])


def content_uid(shard: bytes, key: str, *, image: bytes, caption: str) -> str:
    """First 128 bits, as 32 hex digits, of the sha256 of shard name, key, image bytes and caption.

    Each is preceded by its length in bytes (8 bytes, little-endian). What is missing counts as empty.
    """
    name, text = key.encode("utf-8"), caption.encode("utf-8")
    digest = hashlib.sha256(_length(shard) + shard + _length(name) + name + _length(image))
    digest.update(image)
    digest.update(_length(text) + text)
    return digest.hexdigest()[:32]


def _length(part: bytes) -> bytes:
    return len(part).to_bytes(8, "little")


def no_image_reason(fields: Mapping[str, Any]) -> str:
    """Why a sample with these fields has no image: only its URL is known, or nothing is."""
    has_url = any(value for name, value in fields.items() if name.lower() == "url")
    is_listed = has_url and fields.get("status") != "success"
    return "image:not_downloaded" if is_listed else "image:missing"


def caption_of(data: bytes, rules: ReadRules) -> tuple[str | None, str | None]:
    """Caption and drop reason from the caption's bytes."""
    if len(data) > rules.max_caption_bytes:
        return None, "caption:too_large"
    try:
        caption = data.decode("utf-8")
    except UnicodeDecodeError:
        return None, "caption:not_utf8"
    return caption, "caption:empty" if is_blank(caption) else None
