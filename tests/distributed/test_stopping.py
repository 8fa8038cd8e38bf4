"""A run that is asked to end: at a limit after its next commit, by SIGTERM at once or after a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray.train
from ray.train.v2.api.preemption import PreemptionInfo

from curation.data import storage
from curation.distributed import notices
from curation.distributed.notices import EndNote, Notice, Notices, note_url, passed_on
from curation.distributed.pipeline import Record, Watch, curate
from curation.distributed.stopping import Interrupted, Stop
from curation.recipe import CurateRecipe
from jobs.command import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, exit_code


def test_a_limit_is_a_reason_when_it_is_over() -> None:
    assert Stop().reason is None
    assert Stop(max_hours=1).reason is None
    assert Stop(max_hours=1e-12).reason == "--max-hours 1e-12 are over"
    with pytest.raises(ValueError, match="--max-hours must be more than 0, got 0"):
        Stop(max_hours=0)


def test_sigterm_interrupts_where_nothing_can_be_lost_and_the_former_handler_comes_back() -> None:
    stop, former = Stop(), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"), stop.on_sigterm(interrupts=True):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "SIGTERM" and signal.getsignal(signal.SIGTERM) is former


def test_where_a_checkpoint_is_to_be_saved_only_a_second_sigterm_interrupts() -> None:
    stop, heard = Stop(), []
    with pytest.raises(Interrupted), stop.on_sigterm(interrupts=False):
        os.kill(os.getpid(), signal.SIGTERM)
        heard.append(stop.reason)
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == ["SIGTERM"]


@pytest.mark.slow
def test_sigterm_while_ray_starts_is_a_stop_like_any_other(small_pool: Path, tmp_path: Path) -> None:
    words = ["debug", "--pool.shards", f"{small_pool}/a/*.tar", "--output", str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.curate", *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as job:
        while "gcs_server" not in commands_of(job.pid):
            assert job.poll() is None, job.communicate()[1]
            time.sleep(0.01)
        job.terminate()
        said = job.communicate(timeout=120)[1]
    assert job.returncode == EXIT_STOPPED and "stopped: SIGTERM" in said, said
    begun = time.monotonic()
    while commands_of(job.pid) and time.monotonic() - begun < 30:  # Ray's own processes take a moment to end
        time.sleep(0.1)
    assert not commands_of(job.pid)


def commands_of(session: int) -> str:
    """The command lines of a session's processes, however long."""
    return subprocess.run(["ps", "-ww", "-o", "args=", "-s", str(session)], capture_output=True, text=True).stdout


def test_in_another_thread_a_block_changes_no_handler() -> None:
    seen, former = [], signal.getsignal(signal.SIGTERM)

    def block() -> None:
        with Stop().on_sigterm(interrupts=True):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert seen == [former]


@pytest.mark.parametrize(
    ("failures", "stopped", "code"),
    [([], None, EXIT_OK), ([], "SIGTERM", EXIT_STOPPED), (["x"], None, EXIT_FAILED), (["x"], "SIGTERM", EXIT_FAILED)],
)
def test_a_failure_outweighs_a_stop(failures: list[str], stopped: str | None, code: int) -> None:
    assert exit_code(failures, stopped) == code


def test_rank_0_tells_to_end_when_there_is_a_note_and_else_to_look_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ear = Notices(str(tmp_path))
    assert ear.rank_0_says() is Notice.LOOK
    assert ear.rank_0_says() is Notice.GO_ON  # it has just looked
    storage.write_bytes(note_url(str(tmp_path)), b"SIGTERM")
    assert ear.rank_0_says() is Notice.GO_ON
    monkeypatch.setattr(notices, "LOOK_EVERY_S", 0.0)
    assert Notices(str(tmp_path)).rank_0_says() is Notice.END
    assert ear.heard(Notice.END) is Notice.END


def test_workers_hear_a_stop_by_a_note_that_a_thread_leaves_as_soon_as_it_is_asked_for(tmp_path: Path) -> None:
    stop, note = Stop(), Path(note_url(str(tmp_path)))
    with passed_on(stop, str(tmp_path)):
        assert not note.exists() and not EndNote(str(tmp_path))()
        stop.ask("SIGTERM")
        begun = time.monotonic()
        while not note.exists():
            assert time.monotonic() - begun < 30
            time.sleep(0.01)
    assert note.read_text() == "SIGTERM"
    assert EndNote(str(tmp_path))()
    with pytest.raises(Interrupted, match="SIGTERM"):
        stop.check()
    Stop().check()


def test_a_node_that_is_to_be_taken_is_answered_with_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[PreemptionInfo | None] = [None]
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: told[0])
    ear = Notices(str(tmp_path))
    assert ear.heard(Notice.LOOK) is Notice.GO_ON
    told[0] = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [1]})
    assert ear.heard(Notice.GO_ON) is Notice.GO_ON
    assert [ear.heard(Notice.LOOK) for _ in range(3)] == [Notice.SAVE, Notice.GO_ON, Notice.GO_ON]
    told[0] = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [1], "b": [0]})
    assert ear.heard(Notice.LOOK) is Notice.SAVE


def test_a_curation_at_its_limit_ends_after_a_commit_selects_nothing_and_goes_on_later(
    ray_session: None, small_pool: Path, recipe_for: Callable[..., CurateRecipe]
) -> None:
    recipe, stop = recipe_for(f"{small_pool}/*/*.tar"), Stop()

    class AtTheFirstCommit(Watch):
        def committed(self, record: Record) -> None:
            stop.ask("the limit")

    summary = curate(recipe, watch=AtTheFirstCommit(), stop=stop)
    assert (summary.stopped, summary.failures, summary.selected) == ("the limit", [], None)
    assert summary.shards["committed"] == 1
    assert not (Path(recipe.output) / "selection").exists()
    again = curate(recipe)
    assert again.stopped is None and again.read == 75
    # What was in an actor's hands at the stop may have been committed too.
    assert again.shards["embedded_now"] <= 4
