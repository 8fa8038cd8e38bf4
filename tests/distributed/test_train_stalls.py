"""A rank that takes no step: it says where it is, and ends itself; what the driver makes of the notes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from curation.distributed.train_stalls import GRACE_S, Stall
from curation.recipe.train_parts import Workers

# Reads what nobody writes: as a store that hangs.
HANGS = """
import sys
from curation.data import storage
from curation.distributed.train_stalls import StallGuard

with StallGuard(sys.argv[1], 3, stall_s=0.3) as guard:
    guard.moved()
    storage.read_bytes(sys.argv[2])
"""


@pytest.mark.slow
def test_a_rank_that_hangs_ends_itself_and_its_note_says_where_it_was(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", HANGS, str(tmp_path), str(tmp_path / "pipe")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    told = json.loads((tmp_path / "train" / "stalls" / "rank-3.json").read_text())
    assert (told["rank"], told["waits_for_others"], told["ends"]) == (3, False, True)
    assert told["places"][-1].startswith("data/storage.py:") and told["silent_s"] > 0.6


def test_the_driver_tells_what_each_rank_noted_once_for_each_stall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    stall = Stall(str(tmp_path), Workers(workers=3, stall_s=60.0))
    folder = tmp_path / "train" / "stalls"
    folder.mkdir(parents=True)
    note = {"host": "n1", "pid": 7, "time": 1065.0, "silent_s": 61.0, "ends": False}
    (folder / "rank-0.json").write_text(
        json.dumps({**note, "waits_for_others": True, "places": ["a.py:1 f", "b.py:2 g", "c.py:3 h"]})
    )
    (folder / "rank-1.json").write_text(json.dumps({**note, "waits_for_others": False, "places": [], "ends": True}))
    (folder / "rank-2.json").write_text(json.dumps({**note, "time": 999.0}))  # of an earlier stall

    assert stall.lines() == []
    now[0] += 60.0 + GRACE_S
    first, *ranks = stall.lines()
    assert "for 70 s" in first
    assert ranks[0].endswith("process 7 on n1: waits for the other ranks, for 61 s, in b.py:2 g > c.py:3 h")
    assert "does not come back" in ranks[1] and "code that is not ours; it was ended" in ranks[1]
    assert "has noted nothing" in ranks[2]
    assert stall.lines() == []
    now[0] += 60.0
    assert stall.lines()
    stall.moved()
    assert stall.lines() == []
