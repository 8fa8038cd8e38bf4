"""Text of a pool that stays in its place: what could move the text around it is taken out before it is shown."""

from __future__ import annotations

import unicodedata
from typing import Any

MAX_TEXT = 400
"""Characters of a caption that are shown."""
BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of what follows them; marks and right-to-left letters are left as they are."""


def plain(text: Any, most: int = MAX_TEXT) -> str:
    """Text that stays in its place: control characters and turns of direction are U+FFFD, and it is cut at `most`."""
    shown = "".join("\ufffd" if _is_control(character) else character for character in str(text)[: most + 1])
    return shown if len(shown) <= most else shown[:most].rstrip() + "…"


def _is_control(character: str) -> bool:
    return character in BIDI_CONTROLS or (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t")
