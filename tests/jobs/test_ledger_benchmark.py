import json
from types import SimpleNamespace

import numpy as np
import pytest

from curation.addresses import flat_positions, prefix_sums
from jobs.benchmarks import ledger as benchmark
from jobs.benchmarks.ledger import BATCH, REPEATS, Race, agree, keep_in_dict, random_batch, scattered, uid_strings


@pytest.mark.slow
def test_the_smallest_size_gives_every_figure(capsys):
    figures = benchmark.in_process(pairs=1, tiny=True)
    assert json.loads(json.dumps(figures)) == figures
    assert all(figures["updates_per_s"][statistic] > 0 for statistic in ("last", "mean", "ema"))
    assert figures["snapshot"]["gb"] == pytest.approx(0.012, rel=0.01)  # 12 bytes for each of a million samples
    assert figures["peak_gb"] < 1
    assert all(figures["race"][rival]["rival_per_s"] > 0 for rival in ("dict", "checked dict", "ufunc.at", "ray.get"))
    out = capsys.readouterr().out
    assert "updates/s, mean, 1,000,000 addresses" in out
    assert "a plain copy of its files" in out
    assert "ledger / dict" in out


@pytest.mark.parametrize(("shards", "rows"), [(1, 1), (7, 10_007), (20, 10_000)])
def test_the_scattered_order_has_every_address_once(shards, rows):
    batches = list(scattered(shards, rows))
    positions = flat_positions(np.concatenate(batches), prefix_sums(np.full(shards, rows)))
    assert np.array_equal(np.sort(positions), np.arange(shards * rows))
    assert all(len(batch) <= BATCH for batch in batches)


def test_a_random_batch_repeats_some_of_its_addresses():
    addresses, values = random_batch(np.random.default_rng(0), 100_000, 10_000)
    assert len(addresses) == len(values) == BATCH
    assert BATCH - len(np.unique(addresses)) == pytest.approx(REPEATS, abs=20)


def test_the_dict_keeps_the_largest_step_then_the_larger_value():
    by_uid = {"a": [0.0, 0, 0], "b": [0.0, 0, 0]}
    keep_in_dict(by_uid, ["a", "b", "a"], [-1.0, 2.0, -3.0], 4)
    keep_in_dict(by_uid, ["b"], [9.0], 3)
    assert by_uid == {"a": [-1.0, 2, 4], "b": [2.0, 2, 4]}


def test_uid_strings_are_32_hex_digits_and_differ():
    strings = uid_strings(np.array([[1, 2], [1, 3]], dtype=np.uint64))
    assert len(set(strings)) == 2
    assert all(len(text) == 32 and int(text, 16) > 0 for text in strings)


def test_the_checked_dict_applies_nothing_of_a_bad_batch():
    sides = Race(20_000, batches=1)
    addresses, values = random_batch(np.random.default_rng(0), 2, 10_000)
    assert sides.to_checked_dict(addresses, values, 1) > 0
    before = {uid: list(kept) for uid, kept in sides.by_uid.items()}
    values[-1] = np.nan
    with pytest.raises(ValueError, match="a score is not finite, or a uid is unknown"):
        sides.to_checked_dict(addresses, values, 2)
    assert sides.by_uid == before


def test_sides_that_do_not_keep_the_same_figures_stop_the_race(monkeypatch):
    sides = Race(20_000, batches=1)
    agree(sides)
    monkeypatch.setattr(benchmark, "keep_in_dict", lambda *of: None)
    with pytest.raises(RuntimeError, match="the sides of the race do not keep the same figures"):
        agree(sides)


def test_a_snapshot_that_is_not_the_ledger_is_an_error(monkeypatch):
    def child(task, statistic, shards, rows, *rest):
        if task == "load":
            return {"seconds": 1.0, "probe": 2}
        saved = {"probe": 1, "bytes": 1, "seconds": 1.0, "extra_mib": 0.0}
        return {"updates_per_s": 1.0, "peak_gb": 1.0, "saved": saved if rest[-1] else None}

    monkeypatch.setattr(benchmark, "_child", child)
    with pytest.raises(RuntimeError, match="the snapshot that was read back is not the ledger that was saved"):
        benchmark.billion(1, 10, batches=1)


def test_a_pool_that_was_not_updated_everywhere_is_an_error(monkeypatch):
    monkeypatch.setattr(benchmark, "scattered", lambda shards, rows: iter([np.arange(rows - 1)]))
    with pytest.raises(RuntimeError, match="9 of 10 addresses were updated"):
        benchmark._fill("last", 1, 10, 1, "")


def test_a_machine_without_room_is_told_so_before_anything_is_done(monkeypatch, tmp_path):
    benchmark.check_room(tmp_path, 1)
    with pytest.raises(RuntimeError, match="GB of memory are needed"):
        benchmark.check_room(tmp_path, 10**15)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=16))
    with pytest.raises(RuntimeError, match="GB of disk of .* are needed"):
        benchmark.check_room(tmp_path, 1)
