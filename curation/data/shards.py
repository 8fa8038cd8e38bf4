"""A shard -> its samples, each with its uid, bytes and caption, or the reason why it is dropped.

Every sample that was begun is one row, in the order of the tar, so rows and reasons account for the whole file.
Grouping is open_clip's (`tarfile_to_samples_nothrow`): adjacent members with the same key are one sample, and a
repeated extension begins the next one. A name that belongs to no sample (read_rules.py) is no break between the members
of one, and what no rule names is streamed past, so memory is bounded by one sample's image, caption and json.

Where the tar itself is damaged, the loss is charged to one row: to the sample around the damage if both sides belong to
it, else to the one before or after it that lacks its image or caption, else to a row of its own with the key `@OFFSET`.
Other neighbours stay. An incomplete last sample of a tar without end marker is `tar:truncated`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from curation.addresses import MAX_ROWS_PER_SHARD
from curation.data.captions import Choice, choices_of, is_blank
from curation.data.read_rules import ReadRules, split_name
from curation.data.samples import Content, Sample, caption_of, is_uid, no_image_reason, sample_of, shard_name
from curation.data.tar import Member, TarReader

MAX_MEMBERS_PER_SAMPLE = 1024
"""A group that goes on beyond this begins the next sample, so that no shard makes one of unbounded size."""

_LACKING = frozenset({"image:missing", "image:not_downloaded", "caption:missing"})
_SURROGATES = re.compile("[\ud800-\udfff]")


class ShardReader:
    """Iterate once over a shard's samples; after that `sha256`, `num_bytes` and `warnings` describe the whole shard.

    `raw` may be a part of the shard that begins with the sample at offset `start`; rows are then counted from there.
    Storage errors propagate. ValueError if the shard has more rows than an address can hold.
    """

    def __init__(self, raw: BinaryIO, *, url: str, rules: ReadRules, start: int = 0) -> None:
        self._url, self._rules = url, rules
        self._shard_name = shard_name(url).encode("utf-8", "backslashreplace")
        self._tar = TarReader(raw, max_bytes=rules.max_bytes, start=start)
        self.warnings = self._tar.warnings

    @property
    def sha256(self) -> str:
        """Of the shard's bytes, 64 hex digits. RuntimeError before the end."""
        return self._tar.sha256

    @property
    def num_bytes(self) -> int:
        """Size of the shard. RuntimeError before the end."""
        return self._tar.num_bytes

    def __iter__(self) -> Iterator[Sample]:
        for row, content in enumerate(self._contents()):
            if row >= MAX_ROWS_PER_SHARD:
                raise ValueError(f"shard {self._url} has more than {MAX_ROWS_PER_SHARD} samples; split it")
            yield self._sample(row, content)

    def _contents(self) -> Iterator[Content]:
        """The samples in order, after it was settled which one bears a damage."""
        before: list[Member] = []
        for group, after in _groups(self._tar):
            content = None if group is None else self._read(group)
            if content is not None and content.reason in _LACKING:
                if before:
                    content = content._replace(reason=before.pop().problem)
                elif after:
                    content = content._replace(reason=after.pop(0).problem)
                elif self.warnings["tar:no_end_marker"]:  # counted at the very end, so this sample is the last
                    content = content._replace(reason="tar:truncated")
            yield from map(_unnamed, before)
            if content is not None:
                yield content
            before = after
        yield from map(_unnamed, before)

    def _read(self, group: _Group) -> Content:
        """The group's image, caption and json fields, and the first reason to drop it."""
        rules, members = self._rules, group.members
        fields, is_json_broken = self._read_json(members.get("json"))
        image = next((members[extension] for extension in rules.image_fields if extension in members), None)
        choices: tuple[Choice, ...] = ()
        if rules.best_caption_of:
            choices, caption_reason = self._choices(members, fields, is_json_broken)
            caption = choices[0].text if choices else None
        elif rules.json_caption:
            caption, caption_reason = _json_caption(fields, is_json_broken, rules)
        else:
            caption, caption_reason = _member_caption(members.get(rules.caption_field), rules)

        if image is None:
            image_reason = no_image_reason(fields)
        elif not image.size:
            image_reason = "image:empty"
        else:
            image_reason = "image:too_large" if image.size > rules.max_image_bytes else None
        reason = group.problem or image_reason or caption_reason

        uid = fields.get("uid")
        if uid is not None and not is_uid(uid):
            self.warnings["uid:malformed"] += 1
            uid = None
        if len(fields) > rules.max_json_fields:
            self.warnings["json:too_many_fields"] += 1
            fields = dict(list(fields.items())[: rules.max_json_fields])
        data = None if image is None or image.size > rules.max_image_bytes else image.data
        return Content(group.key, group.offset, data, caption, fields, uid and uid.lower(), reason, choices)

    def _choices(
        self, members: Mapping[str, Member], fields: Mapping[str, Any], is_json_broken: bool
    ) -> tuple[tuple[Choice, ...], str | None]:
        """All captions of a sample, and if there is none the reason."""

        def held(name: str) -> Any:
            if name.startswith("json."):
                return fields.get(name[5:])
            member = members.get(name)
            if member is None:
                return None
            # What was not held is too large: one byte more than is allowed says so.
            return bytes(rules.max_caption_bytes + 1) if member.data is None else member.data

        rules = self._rules
        offered = [(name, held(name)) for name in rules.best_caption_of]
        choices, reason = choices_of(
            offered, max_bytes=rules.max_caption_bytes, most=rules.max_captions, warnings=self.warnings
        )
        return choices, "caption:unreadable" if reason == "caption:missing" and is_json_broken else reason

    def _read_json(self, member: Member | None) -> tuple[dict[str, Any], bool]:
        """The json's fields, and whether there is a json that could not be read. Broken is counted, not a drop."""
        if member is None or member.problem is not None:
            return {}, False
        if member.data is None or member.size > self._rules.max_json_bytes:
            self.warnings["json:too_large"] += 1
            return {}, True
        try:
            fields = json.loads(member.data.decode("utf-8-sig"))
            if rb"\u" in member.data:  # only an escape can make a lone surrogate, which no table can hold
                fields = _without_surrogates(fields)
        except ValueError:  # no JSON, no UTF-8, or an integer of more than 4,300 digits
            self.warnings["json:invalid"] += 1
            return {}, True
        except RecursionError:
            self.warnings["json:too_deep"] += 1
            return {}, True
        if not isinstance(fields, dict):
            self.warnings["json:not_an_object"] += 1
            return {}, True
        return fields, False

    def _sample(self, row: int, content: Content) -> Sample:
        return sample_of(content, row=row, shard=self._shard_name)


def read_sample_members(raw: BinaryIO, offset: int, *, max_member_bytes: int = 1 << 30) -> list[tuple[str, bytes]]:
    """Names and bytes of all members of the sample that begins at `offset`, in order and untouched, pickles left out.

    For the writer that copies samples. Names are for a tar, never for a file system. ValueError if no whole sample
    begins there, or a member is larger than `max_member_bytes`: the shard is not the one that was read.
    """
    raw.seek(offset)
    # 256 KiB reads: a sample is about 50 KB, and a 1 MiB read for each would read 20 times too much.
    tar = TarReader(raw, max_bytes=lambda _: max_member_bytes, start=offset, read_bytes=1 << 18, hashed=False)
    group, _ = next(_groups(tar), (None, []))
    if group is None or group.offset != offset or group.problem is not None:
        raise ValueError(f"no whole sample begins at offset {offset}")
    members = []
    for member in group.members.values():
        if member.data is None:
            raise ValueError(
                f"member {member.name!r} of the sample at offset {offset} is above {max_member_bytes} bytes"
            )
        members.append((member.name, member.data))
    return members


@dataclass(slots=True)
class _Group:
    """Adjacent members with the same key, by extension."""

    key: str
    offset: int
    members: dict[str, Member] = field(default_factory=dict)
    problem: str | None = None


def _groups(tar: TarReader) -> Iterator[tuple[_Group | None, list[Member]]]:
    """Groups in order, each with the unnamed damages that follow it; None stands for the group before the first."""
    group: _Group | None = None
    damages: list[Member] = []
    for member in tar:
        name = split_name(member.name)
        if name is None:
            if member.problem is not None and member.problem != "tar:sparse":
                damages.append(member)
            continue
        key, extension = name
        is_same = group is not None and key == group.key and extension not in group.members
        if group is None or not is_same or len(group.members) >= MAX_MEMBERS_PER_SAMPLE:
            if group is not None or damages:
                yield group, damages
            group, damages = _Group(key, member.offset), []
        elif damages:
            group.problem = group.problem or damages[0].problem
            damages = []
        group.members[extension] = member
        group.problem = group.problem or member.problem
    if group is not None or damages:
        yield group, damages


def _unnamed(damage: Member) -> Content:
    """The row of a damage that no sample bears."""
    return Content(f"@{damage.offset}", damage.offset, None, None, {}, None, damage.problem)


def _member_caption(member: Member | None, rules: ReadRules) -> tuple[str | None, str | None]:
    """Caption and drop reason from a caption member."""
    if member is None:
        return None, "caption:missing"
    if member.data is None or member.size > rules.max_caption_bytes:
        return None, "caption:too_large"
    return caption_of(member.data, rules)


def _json_caption(fields: dict[str, Any], is_json_broken: bool, rules: ReadRules) -> tuple[str | None, str | None]:
    """Caption and drop reason from the json's fields."""
    caption = fields.get(rules.json_caption)
    if caption is None:
        return None, "caption:unreadable" if is_json_broken else "caption:missing"
    if not isinstance(caption, str):
        return None, "caption:not_text"
    if len(caption.encode("utf-8")) > rules.max_caption_bytes:
        return None, "caption:too_large"
    return caption, "caption:empty" if is_blank(caption) else None


def _without_surrogates(value: Any) -> Any:
    """A parsed JSON value whose strings can all be encoded as UTF-8."""
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(name): _without_surrogates(item) for name, item in value.items()}
    return value
