"""Samples that really kill or stop the process that decodes them: set aside, told, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from curation.data import manifest, storage
from curation.data.attempts import CRASHES_WORKER
from curation.data.samples import Sample
from curation.distributed import embed, pipeline, staged
from curation.distributed.decode import Decoded
from curation.distributed.embed import EmbedSpec, ShardEmbed
from curation.distributed.pipeline import Watch, curate
from curation.recipe import Compute, CurateRecipe, Embed, Pool
from tests.distributed.conftest import nano_spec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

ROWS = 12
KILLS, STOPS_ONCE = "picture 0 5", "picture 1 3"
"""Captions as write_shard makes them: of shard 0 and 1."""


def act(sample: Sample, flag: str, turn: threading.Lock) -> None:
    """`turn`: a process that is about to stop is not killed by its other shard before it has stopped."""
    if sample.image is None:  # nothing is left to decode
        return
    with turn:
        if sample.caption == KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        if sample.caption == STOPS_ONCE and not os.path.exists(flag):
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.5)  # the other threads may stop a moment later than this one


class Hostile(ShardEmbed):
    """An actor to which some samples do what broken C code does."""

    def __init__(self, spec: EmbedSpec):
        super().__init__(spec)
        decode, flag, turn = self._decode, f"{spec.output}.flag", threading.Lock()

        def hostile_decode(sample: Sample) -> Decoded:
            act(sample, flag, turn)
            return decode(sample)

        self._decode: Any = hostile_decode


def hostile_decode_shard(batch: dict[str, np.ndarray], *, spec: EmbedSpec) -> Iterator[pa.Table]:
    from curation.distributed.staged import decode_shard  # the worker's own: here it is replaced by this one

    decoder, turn = staged._decoder, threading.Lock()

    def hostile(*about: Any) -> Any:
        decode, size = decoder(*about)

        def kill(sample: Sample) -> Decoded:
            act(sample, f"{spec.output}.flag", turn)
            return decode(sample)

        return kill, size

    setattr(staged, "_decoder", hostile)  # noqa: B010 - in the worker that runs this, for as long as it runs
    try:
        yield from decode_shard(batch, spec=spec)
    finally:
        setattr(staged, "_decoder", decoder)  # noqa: B010


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """Workers cannot import this file."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Heard(Watch):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def stalled(self, lines: list[str]) -> None:
        self.lines += lines


def recipe(pool: Path, output: Path, **compute: Any) -> CurateRecipe:
    return CurateRecipe(
        pool=Pool(shards=str(pool)),
        embed=Embed(model="nano", batch_size=4),
        compute=Compute(device="cpu", **compute),
        output=str(output),
        max_drop_fraction=0.9,
    )


def rows_of(output: Path, number: int) -> list[dict[str, Any]]:
    return pq.read_table(output / "samples" / f"{number:08d}.parquet").to_pylist()


def test_what_kills_three_workers_is_set_aside_what_stops_one_is_replaced_and_all_else_is_embedded(
    tmp_path: Path, write_shard: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = ShardEmbed(nano_spec(str(tmp_path / "quiet"), batch_size=4))
    for number in range(3):
        shard = str(write_shard(tmp_path / "pool" / f"{number:05d}.tar", count=ROWS, seed=number))
        mark = storage.fingerprint(shard)
        quiet({"number": np.array([number]), "url": np.array([shard]), "fingerprint": np.array([mark])})
    before, second, third = (rows_of(tmp_path / "quiet", number) for number in range(3))

    monkeypatch.setattr(pipeline, "ShardEmbed", Hostile)
    heard = Heard()
    summary = curate(recipe(tmp_path / "pool", tmp_path / "out", actors=2, stall_s=8), watch=heard)
    assert not summary.failures
    assert (summary.read, summary.dropped) == (3 * ROWS, {CRASHES_WORKER: 1}), heard.lines
    after = rows_of(tmp_path / "out", 0)
    assert [row["key"] for row in after if row["reason"] == CRASHES_WORKER] == [f"{5:09d}"]
    assert [row for row in after if row["status"] == "ok"] == [row for at, row in enumerate(before) if at != 5]
    assert [row["uid"] for row in before] == [row["uid"] for row in after]
    assert (rows_of(tmp_path / "out", 1), rows_of(tmp_path / "out", 2)) == (second, third)
    # The same command again: what was set aside is committed so, and is not tried again.
    again = curate(recipe(tmp_path / "pool", tmp_path / "out", actors=2))
    assert again.decoded_now == 0 and again.dropped == summary.dropped

    told = [line for line in heard.lines if f"decoding the sample at offset {second[3]['offset']} for" in line]
    assert any("was killed, another takes the shard" in line for line in told), "\n".join(heard.lines)


def test_a_decode_task_that_dies_three_times_at_a_sample_sets_it_aside_too(
    tmp_path: Path, write_shard: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "pool" / "00000.tar", count=ROWS, seed=0)
    monkeypatch.setattr(staged, "decode_shard", hostile_decode_shard)
    summary = curate(recipe(tmp_path / "pool", tmp_path / "out", actors=1, mode="staged"))
    assert not summary.failures and summary.dropped == {CRASHES_WORKER: 1} and summary.read == ROWS
    assert [at for at, row in enumerate(rows_of(tmp_path / "out", 0)) if row["status"] == "dropped"] == [5]


def test_a_shard_set_aside_is_a_piece_like_any_other(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    """Without Ray: what is committed when three workers died at no sample."""
    shard = write_shard(tmp_path / "a.tar", count=3)
    spec = nano_spec(str(tmp_path / "out"))
    record = embed.set_aside(spec, 0, str(shard), embed.BatchEmbedder(spec))
    committed = manifest.find(str(tmp_path / "out"), "embed", 0, made_by=spec.made_by)
    assert committed and json.loads(json.dumps(record | {"batch_ends": None})) == {
        **{name: value for name, value in committed.items() if name not in ("format_version", "key", "made_by")},
        "batch_ends": None,
    }
    assert record["read"] == 1 == sum(record["dropped"].values()) and record["bytes"] == shard.stat().st_size
