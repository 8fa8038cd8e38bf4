"""The captions of a sample that offers several: which of its texts can be one, and where each comes from.

A model later chooses the best of them; here they are only put in order: that of the recipe's fields, and inside a list
its own. Equal texts are one. The first is what the sample is known by, whatever a model makes of it: a uid that hung on
a model's scores would be another one for another model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

LEFT_OUT = "caption:choice_left_out"
TOO_MANY = "caption:too_many_choices"


class Choice(NamedTuple):
    """A caption and where it stands: `txt`, `json.title`, `json.captions[2]`."""

    where: str
    text: str


def choices_of(
    offered: Iterable[tuple[str, Any]], *, max_bytes: int, most: int, warnings: Counter[str]
) -> tuple[tuple[Choice, ...], str | None]:
    """The captions among what fields hold, and if there is none the reason to drop the sample.

    A field holds a text, its bytes, a list of texts, or None for nothing. What cannot be a caption is left out and
    counted; so are more than `most`.
    """
    choices: dict[str, Choice] = {}
    reason = None
    for where, value in _each(offered):
        text, refused = _text(value, max_bytes)
        if text is not None:
            choices.setdefault(text, Choice(where, text))
        elif refused:
            warnings[LEFT_OUT] += 1
            reason = reason or refused
    if len(choices) > most:
        warnings[TOO_MANY] += 1
    return tuple(choices.values())[:most], None if choices else reason or "caption:missing"


def is_blank(caption: str) -> bool:
    """True if there is nothing to read."""
    return not caption.replace("\ufeff", "").strip()


def _each(offered: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for where, value in offered:
        if isinstance(value, list):
            yield from ((f"{where}[{place}]", one) for place, one in enumerate(value))
        else:
            yield where, value


def _text(value: Any, max_bytes: int) -> tuple[str | None, str | None]:
    """The caption that a value is, or why it is none; neither for a value that is not there."""
    if value is None:
        return None, None
    if isinstance(value, str):
        value = value.encode("utf-8")
    if not isinstance(value, bytes):
        return None, "caption:not_text"
    if len(value) > max_bytes:
        return None, "caption:too_large"
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        return None, "caption:not_utf8"
    return (None, "caption:empty") if is_blank(text) else (text, None)
