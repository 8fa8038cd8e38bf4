"""Which members of a tar, or columns of a parquet file, make a sample, and how large they may be.

A member's name is split at the first dot after the last slash into key and extension (lower-cased), as open_clip does.
No sample: names without key or extension (directories, `.hidden`, AppleDouble `._x`), webdataset's meta members
(`__x__`), `__MACOSX/`, and pickles (`.pyd`, `.pickle`, `.pkl`, `.pth`, `.pt`), whose bytes are never held.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

_PICKLES = frozenset({"pyd", "pickle", "pkl", "pth", "pt"})
_META = re.compile(r"(^|/)__([^/]*__|MACOSX)($|/)")

ListKind = Literal["uid", "sha256", "url"]
"""What an entry of a list names: a sample, its image's bytes, where it came from."""


@dataclass(frozen=True, kw_only=True)
class ReadRules:
    """Which members or columns make a sample, and how large they may be.

    Extensions are lower case, without a dot around them. Columns are found in any case.
    """

    caption_field: str = "txt"
    """An extension, or `json.NAME` for a field of the json."""
    best_caption_of: tuple[str, ...] = ()
    """In place of caption_field: fields of the same kind, also json fields that hold lists. All their captions come
    with the sample, and the model that embeds it chooses."""
    max_captions: int = 16
    """Of those, at most so many."""
    image_fields: tuple[str, ...] = ("jpg", "png", "jpeg", "webp")
    """Extensions; the first that is present is the image (open_clip's order)."""
    caption_column: str | None = None
    """Parquet pools: the column that holds the caption; if none is named, the first of txt, caption, text."""
    image_column: str | None = None
    """Parquet pools: the column of image bytes; if none is named, `image`, one of image_fields, or image_bytes."""
    metadata: str | None = None
    """URL of an index made by metadata.py; its numbers join the fields of the samples, by uid."""
    exclude: tuple[tuple[str, ListKind], ...] = ()
    """Lists made by hash_lists.py, and what their entries name: samples that are dropped unread."""
    max_image_bytes: int = 64 << 20
    max_caption_bytes: int = 64 << 10
    max_json_bytes: int = 1 << 20
    max_json_fields: int = 256

    def __post_init__(self) -> None:
        if not self.image_fields:
            raise ValueError("image_fields must name at least one extension, got none")
        if self.best_caption_of and self.caption_field != "txt":
            raise ValueError(
                f"give caption_field or best_caption_of, got both: {self.caption_field!r}, {self.best_caption_of}"
            )
        if "json." in self.best_caption_of or len(set(self.best_caption_of)) < len(self.best_caption_of):
            raise ValueError(f"best_caption_of must name fields, each once, got {self.best_caption_of}")
        members = [name for name in self.caption_fields if not name.startswith("json.") or name == "json."]
        for extension in (*self.image_fields, *members):
            if not extension or extension != extension.lower() or extension.strip(".") != extension or "/" in extension:
                raise ValueError(
                    f"image_fields and caption_field must be lower-case extensions without a dot around them "
                    f"(caption_field also json.NAME), got {extension!r}"
                )
        if "" in (self.caption_column, self.image_column):
            raise ValueError("caption_column and image_column must name a column, got an empty name")
        for limit in ("max_image_bytes", "max_caption_bytes", "max_json_bytes", "max_json_fields", "max_captions"):
            if getattr(self, limit) < 1:
                raise ValueError(f"{limit} must be at least 1, got {getattr(self, limit)}")

    @property
    def caption_fields(self) -> tuple[str, ...]:
        """Where captions are looked for."""
        return self.best_caption_of or (self.caption_field,)

    @property
    def json_caption(self) -> str:
        """The json field that holds the caption; empty if a member holds it."""
        return self.caption_field[5:] if self.caption_field.startswith("json.") else ""

    def max_bytes(self, name: str) -> int:
        """How much to hold of the member with this name; 0 if no rule needs it."""
        split = split_name(name)
        return 0 if split is None else self._limits.get(split[1], 0)

    @cached_property
    def _limits(self) -> dict[str, int]:
        """Extension -> how much to hold of a member that has it."""
        limits = dict.fromkeys(self.image_fields, self.max_image_bytes)
        captions = [(name, self.max_caption_bytes) for name in self.caption_fields if not name.startswith("json.")]
        for extension, limit in (*captions, ("json", self.max_json_bytes)):
            limits[extension] = max(limit, limits.get(extension, 0))
        return limits


@lru_cache(maxsize=16)  # a member's name is split when it is read, and once more when it is grouped
def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a name: `a/b.Seg.PNG` -> (`a/b`, `seg.png`). None if it belongs to no sample."""
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    extension = name[dot + 1 :].lower()
    if dot <= base or not extension or extension.rsplit(".", 1)[-1] in _PICKLES:
        return None
    key = name[:dot]
    return None if "__" in key and _META.search(key) else (key, extension)
