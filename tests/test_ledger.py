import io
import json
import tracemalloc
from contextlib import contextmanager
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.addresses import pack
from curation.ledger import Ledger, LedgerSpec, Statistic

SIZES = np.array([3, 0, 2, 4])
ADDRESSES = np.concatenate([pack(shard, np.arange(size)) for shard, size in enumerate(SIZES)])
FLOAT32_MAX = float(np.finfo(np.float32).max)

scores = st.sampled_from([0.0, -0.0, -1.5, 0.25, 2.0**100]) | st.floats(width=32, allow_nan=False, allow_infinity=False)
batches = st.tuples(
    st.integers(0, 5) | st.just(2**32 - 1),
    st.lists(st.tuples(st.sampled_from(ADDRESSES.tolist()), scores), max_size=12),
)
streams = st.lists(batches, max_size=8)


def ledger_of(statistic: Statistic = "last", *, sizes=SIZES, **fields):
    return Ledger(sizes, {"score": LedgerSpec(statistic, **fields)})


def feed(ledger, batch):
    step, rows = batch
    addresses = np.array([address for address, _ in rows], dtype=np.int64)
    ledger.update("score", addresses, np.array([value for _, value in rows], dtype=np.float32), step=step)
    ledger.add_usage(addresses[::2])


def state_of(ledger):
    return {name: column.tolist() for name, column in ledger.export(ADDRESSES).items()}


def totals_of(ledger):
    return {name: ledger.known(name) for name in ledger.names}, ledger.saturated()


class Memory:
    """Files in a dict, in the order in which they were begun."""

    def __init__(self):
        self.files = {}
        self.largest_write = 0

    @contextmanager
    def writer(self, name):
        memory = self

        class File(io.BytesIO):
            def write(self, data):
                memory.largest_write = max(memory.largest_write, len(data))
                return super().write(data)

        file = File()
        self.files[name] = b""
        yield file
        self.files[name] = file.getvalue()

    def reader(self, name):
        return io.BytesIO(self.files[name])

    def head(self):
        return json.loads(self.files["ledger.json"])

    def put_head(self, **fields):
        self.files["ledger.json"] = json.dumps({**self.head(), **fields}).encode()


def saved(ledger):
    memory = Memory()
    ledger.save(memory.writer)
    return memory


# what a stream leaves behind


@settings(max_examples=200, deadline=None)
@given(streams)
def test_last_counts_usage_and_last_step_are_those_of_a_plain_loop(stream):
    ledger = ledger_of()
    last, count, usage = {}, dict.fromkeys(ADDRESSES.tolist(), 0), dict.fromkeys(ADDRESSES.tolist(), 0)
    for step, rows in stream:
        feed(ledger, (step, rows))
        for address, value in rows:
            last[address] = max(last.get(address, (-1, -inf)), (step, value))
            count[address] += 1
        for address, _ in rows[::2]:
            usage[address] += 1
    read = ledger.read("score", ADDRESSES)
    assert read["ledger_count"].tolist() == list(count.values())
    assert read["usage_count"].tolist() == list(usage.values())
    assert read["last_step"].tolist() == [last.get(address, (0,))[0] for address in ADDRESSES.tolist()]
    for address, value in zip(ADDRESSES.tolist(), read["ledger_value"].tolist(), strict=True):
        assert value == last[address][1] if address in last else np.isnan(value)
    assert ledger.known("score") == len(last)


@settings(max_examples=200, deadline=None)
@given(stream=streams, data=st.data())
def test_last_counts_usage_and_last_step_do_not_depend_on_the_order_or_the_split_of_the_stream(stream, data):
    whole = ledger_of()
    for batch in stream:
        feed(whole, batch)
    parts = [ledger_of() for _ in range(3)]
    for batch in data.draw(st.permutations(stream)):
        feed(parts[data.draw(st.integers(0, 2))], batch)
    merged = ledger_of()
    for part in data.draw(st.permutations(parts)):
        merged.merge(part)
    assert state_of(merged) == state_of(whole)
    assert totals_of(merged) == totals_of(whole)
    assert np.signbit(merged.export(ADDRESSES)["score.value"]).tolist() == [
        value < 0 for value in state_of(whole)["score.value"]
    ]


@settings(max_examples=200, deadline=None)
@given(stream=streams, data=st.data())
def test_a_mean_is_that_of_all_values_to_1e_5_for_any_order_and_split(stream, data):
    parts = [ledger_of("mean") for _ in range(3)]
    values = {address: [] for address in ADDRESSES.tolist()}
    for step, rows in data.draw(st.permutations(stream)):
        feed(parts[data.draw(st.integers(0, 2))], (step, rows))
        for address, value in rows:
            values[address].append(np.float64(np.float32(value)))
    merged, *others = parts
    for part in others:
        merged.merge(part)
    read = merged.read("score", ADDRESSES)
    assert read["ledger_count"].tolist() == [len(all_of) for all_of in values.values()]
    for value, all_of in zip(read["ledger_value"].tolist(), values.values(), strict=True):
        if all_of:
            assert value == pytest.approx(np.mean(all_of), abs=max(1e-5 * np.abs(all_of).max(), 1e-44))
        else:
            assert np.isnan(value)


def test_a_batch_of_any_size_is_as_good_as_its_rows_one_by_one():
    rng = np.random.default_rng(0)
    sizes = np.full(40, 1000)
    addresses = (rng.integers(0, 40, 30_000) << 20) | rng.integers(0, 1000, 30_000)  # more than one block, with repeats
    values = rng.normal(size=30_000).astype(np.float32)
    for statistic in ("last", "mean"):
        at_once, in_parts = ledger_of(statistic, sizes=sizes), ledger_of(statistic, sizes=sizes)
        at_once.update("score", addresses, values, step=3)
        for rows in np.split(np.arange(30_000), [1, 2, 5000, 20_000]):
            in_parts.update("score", addresses[rows], values[rows], step=3)
        one, other = at_once.read("score", addresses), in_parts.read("score", addresses)
        assert (one["ledger_count"] == other["ledger_count"]).all()
        assert one["ledger_value"] == pytest.approx(other["ledger_value"], abs=1e-5)
        assert at_once.known("score") == in_parts.known("score") == len(np.unique(addresses))


def test_a_mean_does_not_stand_still_when_increments_fall_below_half_a_unit_in_the_last_place():
    ledger = ledger_of("mean", sizes=np.array([64]))
    addresses = np.arange(64)
    for step in range(60_000):
        ledger.update("score", addresses, np.full(64, 1.0 if step < 30_000 else 1.001, np.float32), step=step)
    read = ledger.read("score", addresses)
    assert (read["ledger_count"] == 60_000).all()
    exact = (1 + float(np.float32(1.001))) / 2  # rounding to nearest ends at 1.0, an error of 5e-4
    assert read["ledger_value"] == pytest.approx(np.full(64, exact), rel=3e-6)


def test_the_mean_of_noise_keeps_1e_5_for_thousands_of_values():
    rng, ledger, exact = np.random.default_rng(0), ledger_of("mean", sizes=np.array([256])), np.zeros(256)
    for step in range(5000):
        values = (1 + 0.01 * rng.random(256)).astype(np.float32)  # just above 1 a float32 is at its coarsest
        ledger.update("score", np.arange(256), values, step=step)
        exact += values
    assert ledger.read("score", np.arange(256))["ledger_value"] == pytest.approx(exact / 5000, rel=1e-5)


def test_a_mean_is_the_same_in_a_ledger_that_holds_other_shards_too():
    whole, part = ledger_of("mean"), ledger_of("mean", sizes=np.array([0, 0, 0, 4]))
    for step in range(500):
        values = np.random.default_rng(step).normal(size=4)
        for ledger in (whole, part):
            ledger.update("score", ADDRESSES[5:], values, step=step)
    assert whole.read("score", ADDRESSES[5:])["ledger_value"].tolist() == (
        part.read("score", ADDRESSES[5:])["ledger_value"].tolist()
    )


@settings(max_examples=100, deadline=None)
@given(stream=streams, decay=st.sampled_from([0.0, 0.5, 0.9]), variance=st.booleans())
def test_an_ema_is_that_of_a_plain_loop_over_the_steps(stream, decay, variance):
    ledger, loop = ledger_of("ema", decay=decay, variance=variance), {}
    for step, rows in sorted(stream, key=lambda batch: batch[0]):
        feed(ledger, (step, rows))
        came = {}
        for address, value in rows:
            came.setdefault(address, []).append(np.float64(np.float32(value)))
        for address, all_of in came.items():
            new = sum(all_of) / len(all_of)
            if address in loop:
                value, spread, count = loop[address]
                spread = min(decay * (spread + (1 - decay) * (new - value) ** 2), FLOAT32_MAX)
                value = decay * value + (1 - decay) * new
                loop[address] = float(np.float32(value)), float(np.float32(spread)), count + len(all_of)
            else:
                loop[address] = float(np.float32(new)), 0.0, len(all_of)
    read = ledger.read("score", np.array(list(loop), dtype=np.int64))
    assert read["ledger_value"].tolist() == [value for value, _, _ in loop.values()]
    assert read["ledger_count"].tolist() == [count for _, _, count in loop.values()]
    assert ("ledger_variance" in read) == variance
    if variance:
        assert read["ledger_variance"].tolist() == [spread for _, spread, _ in loop.values()]


def test_an_ema_of_one_address_by_hand():
    ledger = ledger_of("ema", decay=0.5, variance=True)
    address = ADDRESSES[:1]
    for step, values in ((1, [4.0]), (2, [0.0, 4.0]), (2, [1.0])):  # 4; 0.5 * 4 + 0.5 * 2 = 3; 0.5 * 3 + 0.5 * 1 = 2
        ledger.update("score", np.repeat(address, len(values)), np.array(values), step=step)
    read = ledger.read("score", address)
    assert read["ledger_value"].tolist() == [2.0]
    assert read["ledger_variance"].tolist() == [0.5 * (0.5 * (0 + 0.5 * 2**2) + 0.5 * 2**2)]
    assert read["ledger_count"].tolist() == [4]


def test_a_large_ema_batch_takes_one_step_for_an_address_wherever_its_repeats_lie():
    sizes = np.array([20_000])
    addresses = np.concatenate([np.arange(20_000), np.arange(20_000)[::-1]])  # repeats far apart, many blocks
    ledger = ledger_of("ema", sizes=sizes, decay=0.5)
    ledger.update("score", np.arange(20_000), np.zeros(20_000), step=0)
    ledger.update("score", addresses, np.repeat([1.0, 3.0], 20_000), step=1)
    assert (ledger.read("score", np.arange(20_000))["ledger_value"] == 1.0).all()


def test_counts_stop_at_65535_and_are_reported_and_a_full_mean_goes_on_with_weight_1_over_65535():
    ledger = ledger_of("mean")
    state = ledger.export(ADDRESSES[:2])
    state |= {
        "usage": np.array([65534, 65534], np.uint16),
        "score.value": np.array([1.0, 1.0], np.float32),
        "score.count": np.array([65534, 65534], np.uint16),
    }
    ledger.adopt(ADDRESSES[:2], state)
    assert ledger.saturated() == {"usage": 0, "score": 0}
    exact = 1.0
    for step in range(200):
        ledger.update("score", ADDRESSES[:1], np.array([2.0]), step=step)
        ledger.add_usage(ADDRESSES[[0, 0, 1]])
        exact += (2.0 - exact) / 65535
    read = ledger.read("score", ADDRESSES[:2])
    assert read["ledger_count"].tolist() == [65535, 65534]
    assert read["usage_count"].tolist() == [65535, 65535]
    assert read["ledger_value"] == pytest.approx([exact, 1.0], rel=1e-6)
    assert ledger.saturated() == {"usage": 2, "score": 1}


def test_more_repeats_in_a_batch_than_a_count_can_hold_fill_it():
    ledger = ledger_of("mean")
    for step in range(2):
        ledger.update("score", np.repeat(ADDRESSES[:1], 70_000), np.full(70_000, float(step)), step=step)
        ledger.add_usage(np.repeat(ADDRESSES[1:2], 70_000))
    read = ledger.read("score", ADDRESSES[:2])
    assert read["ledger_count"].tolist() == [65535, 0]
    assert read["usage_count"].tolist() == [0, 65535]
    assert read["ledger_value"][:1] == pytest.approx([1 - (1 - 1 / 65_535) ** 70_000], rel=1e-6)
    assert ledger.saturated() == {"usage": 1, "score": 1}


@pytest.mark.parametrize("count", [0, 1, 60_000, 65_534, 65_535])
def test_repeats_weigh_in_a_full_mean_as_if_they_came_one_by_one(count):
    ledger, mean = ledger_of("mean"), 0.0
    ledger.update("score", np.repeat(ADDRESSES[:1], count), np.zeros(count), step=1)
    ledger.update("score", np.repeat(ADDRESSES[:1], 6_000), np.ones(6_000), step=2)
    for number in range(count + 1, count + 6_001):
        mean += (1 - mean) / min(number, 65_535)
    assert ledger.read("score", ADDRESSES[:1])["ledger_value"] == pytest.approx([mean], rel=1e-6)


def test_merged_counts_stop_at_65535_too():
    parts = [ledger_of("mean"), ledger_of("mean")]
    for value, part in enumerate(parts):
        part.update("score", np.repeat(ADDRESSES[:1], 40_000), np.full(40_000, float(value)), step=1)
        part.add_usage(np.repeat(ADDRESSES[:1], 40_000))
    parts[0].merge(parts[1])
    read = parts[0].read("score", ADDRESSES[:1])
    assert (read["ledger_count"].tolist(), read["usage_count"].tolist()) == ([65535], [65535])
    assert parts[0].saturated() == {"usage": 1, "score": 1}


def test_named_ledgers_share_the_usage_and_nothing_else():
    ledger = Ledger(
        SIZES, {"score": LedgerSpec(), "loss": LedgerSpec("mean"), "slow": LedgerSpec("ema", variance=True)}
    )
    ledger.update("loss", ADDRESSES[:2], np.array([1.0, 2.0]), step=4)
    ledger.add_usage(ADDRESSES[:1])
    assert [ledger.known(name) for name in ledger.names] == [0, 2, 0]
    assert ledger.read("slow", ADDRESSES[:1])["usage_count"].tolist() == [1]
    assert ledger.read("score", ADDRESSES[:1])["last_step"].tolist() == [0]
    assert ledger.specs["loss"] == LedgerSpec("mean")
    assert ledger.num_bytes == 9 * (2 + 10 + 10 + 14)


def test_a_sample_takes_12_bytes_and_only_where_it_was_written():
    sizes = np.full(100, 1_000_000)
    before = _resident_bytes()
    ledger = ledger_of(sizes=sizes)
    ledger.update("score", pack(99, np.arange(1000)), np.ones(1000), step=1)
    assert ledger.num_bytes == 12 * ledger.num_samples == 1_200_000_000
    assert _resident_bytes() - before < 100_000_000


def _resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_reads_are_in_the_order_of_the_addresses_and_may_repeat():
    ledger = ledger_of()
    ledger.update("score", ADDRESSES[[8, 0]], np.array([8.0, 0.5]), step=2**32 - 1)
    read = ledger.read("score", ADDRESSES[[0, 8, 4, 8]])
    assert read["ledger_value"].tolist()[:2] == [0.5, 8.0]
    assert np.isnan(read["ledger_value"][2])
    assert read["last_step"].tolist() == [2**32 - 1, 2**32 - 1, 0, 2**32 - 1]
    assert {name: str(column.dtype) for name, column in read.items()} == {
        "ledger_value": "float32",
        "ledger_count": "uint16",
        "usage_count": "uint16",
        "last_step": "uint32",
    }


def test_what_was_never_scored_has_no_variance_and_no_step_bears_on_it():
    ledger = ledger_of("ema", variance=True)
    assert np.isnan(ledger.read("score", ADDRESSES[:1])["ledger_variance"]).all()
    ledger.update("score", ADDRESSES[:0], np.zeros(0), step=1)
    assert ledger.known("score") == 0


# what is refused, and that nothing of it is applied


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"values": [1, nan, 3]}, ValueError, "finite in float32, 1 are not .* 1:nan$"),
        ({"values": [1, -inf, 1e39]}, ValueError, r"2 are not .* 1:-inf, 2:1e\+39$"),
        ({"addresses": [0, 3, 1]}, KeyError, "address 3 is not in the pool"),
        ({"addresses": [5 << 20, 3, 1]}, KeyError, f"address {5 << 20} is not in the pool"),
        ({"addresses": [0, -1, 1]}, KeyError, "address -1 is not in the pool"),
        ({"addresses": [0, -(2**62), 1]}, KeyError, f"address {-(2**62)} is not in the pool"),
        ({"addresses": [0.0, 1.0, 2.0]}, ValueError, r"addresses must be integers \(n,\), got float64 \(3,\)"),
        ({"addresses": [[0], [1], [2]]}, ValueError, r"addresses must be integers \(n,\), got int64 \(3, 1\)"),
        ({"values": [1, 2]}, ValueError, r"one per address, got \(2,\) for addresses \(3,\)"),
        ({"step": -1}, ValueError, r"step must be in \[0, 2\*\*32\), got -1"),
        ({"step": 2**32}, ValueError, r"step must be in \[0, 2\*\*32\), got 4294967296"),
        ({"name": "scor"}, ValueError, r"no ledger is named 'scor', did you mean 'score'\? There are \['score'\]"),
    ],
)
@pytest.mark.parametrize("statistic", ["last", "mean", "ema"])
def test_a_bad_batch_is_named_and_leaves_everything_as_it_was(statistic, changes, error, complaint):
    ledger = ledger_of(statistic)
    feed(ledger, (1, [(0, 7.0), (1, 8.0)]))
    before = state_of(ledger), totals_of(ledger)
    batch = {"name": "score", "addresses": [0, 1, 2], "values": [1.0, 2.0, 3.0], "step": 1, **changes}
    with pytest.raises(error, match=complaint):
        ledger.update(batch["name"], np.array(batch["addresses"]), np.array(batch["values"]), step=batch["step"])
    assert (state_of(ledger), totals_of(ledger)) == before


def test_of_many_values_that_are_not_finite_five_are_named_and_a_late_one_stops_the_whole_batch():
    ledger = ledger_of(sizes=np.array([20_000]))
    values = np.ones(20_000)
    values[10_000:10_007] = nan
    with pytest.raises(ValueError, match="7 are not .* 10000:nan, 10001:nan, 10002:nan, 10003:nan, 10004:nan$"):
        ledger.update("score", np.arange(20_000), values, step=1)
    assert ledger.known("score") == 0
    with pytest.raises(KeyError, match="address 20000 is not in the pool"):
        ledger.add_usage(np.arange(20_001))
    assert ledger.usage_histogram()[0] == 20_000


def test_an_ema_refuses_a_step_before_the_last_one_of_any_address():
    ledger = ledger_of("ema")
    ledger.update("score", ADDRESSES[:1], np.array([1.0]), step=5)
    ledger.update("score", ADDRESSES[1:2], np.array([1.0]), step=4)
    before = state_of(ledger)
    with pytest.raises(ValueError, match="ema of address 0 is at step 5, step 4 comes too late"):
        ledger.update("score", ADDRESSES[[2, 1, 0]], np.array([2.0, 2.0, 2.0]), step=4)
    assert state_of(ledger) == before
    ledger.update("score", ADDRESSES[:1], np.array([2.0]), step=5)
    assert ledger.read("score", ADDRESSES[:1])["ledger_count"].tolist() == [2]


@pytest.mark.parametrize("name", ["", "a/b", "..", "a.b", "usage", "x" * 65, "a\n"])
def test_a_ledger_whose_name_no_file_could_bear_is_refused(name):
    with pytest.raises(ValueError, match="a ledger's name must be up to 64"):
        Ledger(SIZES, {name: LedgerSpec()})


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"statistic": "median"}, "statistic must be 'last', 'mean' or 'ema', got 'median'"),
        ({"statistic": "ema", "decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"statistic": "ema", "decay": nan}, r"decay must be in \[0, 1\), got nan"),
        ({"statistic": "mean", "variance": True}, "variance is kept for statistic 'ema' only, got 'mean'"),
    ],
)
def test_an_impossible_spec_is_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        LedgerSpec(**fields)


def test_unknown_names_and_addresses_are_refused_wherever_they_come():
    ledger = ledger_of()
    for ask in (ledger.known, lambda name: ledger.read(name, ADDRESSES), lambda name: ledger.quantiles(name, [0.5])):
        with pytest.raises(ValueError, match="did you mean 'score'"):
            ask("loss")
    for ask in (lambda a: ledger.read("score", a), ledger.export, ledger.forget, ledger.add_usage):
        with pytest.raises(KeyError, match="address 3 is not in the pool"):
            ask(np.array([0, 3]))
    with pytest.raises(ValueError, match=r"no ledger is named 'score' There are \[\]"):
        Ledger(SIZES, {}).known("score")


# all samples


@settings(deadline=None)
@given(stream=streams, q=st.lists(st.floats(0, 1), max_size=5))
def test_quantiles_and_histograms_are_numpys_over_the_known_values(stream, q):
    ledger = ledger_of()
    for batch in stream:
        feed(ledger, batch)
    read = ledger.read("score", ADDRESSES)
    known = read["ledger_value"][read["ledger_count"] > 0]
    found = ledger.quantiles("score", [0.0, 0.5, 1.0, *q])
    assert found.dtype == np.float32
    if len(known):
        wanted = np.quantile(known, np.array([0.0, 0.5, 1.0, *q]), method="inverted_cdf")
        assert found.tolist() == wanted.tolist()
    else:
        assert np.isnan(found).all()
    edges = [-inf, -1.5, 0.0, 0.25, 2.0**100]
    assert ledger.histogram("score", edges).tolist() == np.histogram(known, edges)[0].tolist()
    assert ledger.usage_histogram().tolist() == np.bincount(read["usage_count"], minlength=65536).tolist()


def test_counts_of_ledgers_that_hold_different_shards_add_up():
    whole, parts = ledger_of(), [ledger_of(sizes=np.array([3, 0, 0, 4])), ledger_of(sizes=np.array([0, 0, 2, 0]))]
    values = np.random.default_rng(0).normal(size=9)
    held = np.isin(ADDRESSES >> 20, [0, 3])
    for ledger, rows in ((whole, held | True), (parts[0], held), (parts[1], ~held)):
        ledger.update("score", ADDRESSES[rows], values[rows], step=1)
    for prefix in (None, 0x3F80 ^ 0x8000, 0):
        summed = sum(part.quantile_counts("score", prefix=prefix) for part in parts)
        assert np.array_equal(summed, whole.quantile_counts("score", prefix=prefix))


@pytest.mark.parametrize("edges", [[], [1.0], [0.0, 0.0], [1.0, 0.0], [0.0, nan], [[0.0, 1.0]]])
def test_edges_that_do_not_ascend_are_refused(edges):
    with pytest.raises(ValueError, match="edges must be at least 2 ascending numbers, got"):
        ledger_of().histogram("score", edges)


@pytest.mark.parametrize("prefix", [-1, 65536])
def test_a_prefix_beyond_16_bits_is_refused(prefix):
    with pytest.raises(ValueError, match=rf"prefix must be None or in \[0, 65536\), got {prefix}"):
        ledger_of().quantile_counts("score", prefix=prefix)


def test_ledgers_that_do_not_belong_together_are_not_merged():
    with pytest.raises(ValueError, match="shard_sizes of the two ledgers differ"):
        ledger_of().merge(ledger_of(sizes=np.array([3, 2, 0, 4])))
    with pytest.raises(ValueError, match="specs of the two ledgers differ: .*'last'.*'mean'"):
        ledger_of().merge(ledger_of("mean"))


def test_emas_are_merged_if_no_address_is_in_both():
    one, other, both = (ledger_of("ema", variance=True) for _ in range(3))
    for ledger, addresses in ((one, ADDRESSES[:4]), (other, ADDRESSES[4:8])):
        for step in (1, 2):
            for taker in (ledger, both):
                taker.update("score", addresses, np.arange(4.0) * step, step=step)
    one.merge(other)
    assert state_of(one) == state_of(both)
    other.add_usage(ADDRESSES)
    before = state_of(one), totals_of(one)
    with pytest.raises(ValueError, match=f"both ledgers hold an ema 'score' of address {ADDRESSES[4]}"):
        one.merge(other)
    assert (state_of(one), totals_of(one)) == before


# statistics that move


def test_what_is_exported_and_adopted_goes_on_at_its_new_address():
    ledger = Ledger(SIZES, {"score": LedgerSpec("ema", variance=True), "loss": LedgerSpec("mean")})
    for step in (1, 2):
        ledger.update("score", ADDRESSES[:3], np.array([-1.0, 0.0, step]), step=step)
        ledger.update("loss", ADDRESSES[1:2], np.array([3.0]), step=step)
    ledger.add_usage(ADDRESSES[[0, 0, 2]])
    before, totals = ledger.export(ADDRESSES[:3]), totals_of(ledger)
    ledger.forget(ADDRESSES[[0, 1, 2, 0]])
    assert totals_of(ledger) == ({"score": 0, "loss": 0}, {"usage": 0, "score": 0, "loss": 0})
    assert not any(any(column) for column in state_of(ledger).values())
    ledger.adopt(ADDRESSES[[8, 4, 6]], before)
    after = ledger.export(ADDRESSES[[8, 4, 6]])
    assert {name: column.tolist() for name, column in after.items()} == {
        name: column.tolist() for name, column in before.items()
    }
    assert totals_of(ledger) == totals


def test_what_cannot_be_adopted_is_refused_and_leaves_everything_as_it_was():
    ledger = Ledger(SIZES, {"score": LedgerSpec(), "loss": LedgerSpec()})
    ledger.update("score", ADDRESSES[:1], np.array([1.0]), step=1)
    ledger.add_usage(ADDRESSES[1:2])
    state = ledger.export(ADDRESSES[[0, 0]])
    before = state_of(ledger), totals_of(ledger)
    one_less = {name: column for name, column in state.items() if name != "usage"}
    for addresses, given_state, error, complaint in (
        (ADDRESSES[[2, 0]], state, ValueError, f"address {ADDRESSES[0]} is in use already"),
        (ADDRESSES[[2, 1]], state, ValueError, f"address {ADDRESSES[1]} is in use already"),
        (ADDRESSES[[5, 5]], state, ValueError, f"address {ADDRESSES[5]} came more than once"),
        (np.array([2, 3]), state, KeyError, "address 3 is not in the pool"),
        (ADDRESSES[2:5], state, ValueError, r"state\['usage'\] must be uint16 \(3,\), got uint16 \(2,\)"),
        (ADDRESSES[2:4], one_less, ValueError, r"state must have the columns .*'usage'\], got"),
        (ADDRESSES[2:4], state | {"usage": np.zeros(2)}, ValueError, r"state\['usage'\] must be uint16 .* float64"),
    ):
        with pytest.raises(error, match=complaint):
            ledger.adopt(addresses, given_state)
        assert (state_of(ledger), totals_of(ledger)) == before


# snapshots


@settings(deadline=None)
@given(stream=streams, statistic=st.sampled_from(["last", "mean", "ema"]))
def test_a_snapshot_is_the_ledger_to_the_last_bit_and_goes_on_like_it(stream, statistic):
    ledger = ledger_of(statistic, variance=statistic == "ema")
    *stream, final = [*sorted(stream, key=lambda batch: batch[0]), (2**32 - 1, [(0, -0.5), (0, -0.0)])]
    for batch in stream:
        feed(ledger, batch)
    loaded = Ledger.load(saved(ledger).reader, SIZES, ledger.specs)
    for one in (ledger, loaded):
        feed(one, final)
    assert state_of(loaded) == state_of(ledger)
    assert totals_of(loaded) == totals_of(ledger)


def test_a_snapshot_is_npy_files_and_its_head_comes_last():
    ledger = Ledger(SIZES, {"score": LedgerSpec("ema", variance=True), "loss": LedgerSpec()})
    ledger.update("loss", ADDRESSES[3:5], np.array([-2.0, 0.5]), step=7)
    memory = saved(ledger)
    assert list(memory.files)[-1] == "ledger.json"
    assert sorted(memory.files) == sorted(
        ["ledger.json", "usage.npy", "score.variance.npy"]
        + [f"{name}.{column}.npy" for name in ("score", "loss") for column in ("value", "count", "last_step")]
    )
    values = np.load(memory.reader("loss.value.npy"), allow_pickle=False)
    assert (values.dtype, values.tolist()) == (np.float32, [0, 0, 0, -2.0, 0.5, 0, 0, 0, 0])
    head = memory.head()
    assert (head["format_version"], head["num_shards"], head["known"]) == (1, 4, {"score": 0, "loss": 2})
    assert head["columns"]["usage"] == {"length": 9, "crc32": head["columns"]["score.count"]["crc32"]}


@pytest.mark.parametrize("sizes", [[], [0, 0]])
def test_a_ledger_without_samples_has_a_snapshot_too(sizes):
    ledger = ledger_of(sizes=np.array(sizes, dtype=np.int64))
    loaded = Ledger.load(saved(ledger).reader, np.array([*sizes, 2]), ledger.specs)
    assert (loaded.num_samples, loaded.known("score")) == (2, 0)


def test_shards_that_the_pool_gained_since_are_untouched():
    ledger = ledger_of()
    feed(ledger, (3, [(0, 1.0), (int(ADDRESSES[-1]), 2.0)]))
    grown = Ledger.load(saved(ledger).reader, np.array([*SIZES, 0, 5]), ledger.specs)
    assert state_of(grown) == state_of(ledger)
    assert np.isnan(grown.read("score", pack(5, np.arange(5)))["ledger_value"]).all()
    assert (grown.num_samples, grown.known("score")) == (14, 2)


def test_a_snapshot_of_another_pool_or_of_other_specs_is_refused():
    memory, specs = saved(ledger_of()), ledger_of().specs
    with pytest.raises(ValueError, match="shard_sizes has 3 shards, the snapshot has 4"):
        Ledger.load(memory.reader, SIZES[:3], specs)
    with pytest.raises(ValueError, match="shard_sizes_sha256 of the snapshot is"):
        Ledger.load(memory.reader, np.array([3, 0, 3, 3]), specs)
    with pytest.raises(ValueError, match="specs of the snapshot is .*'last'.* wanted .*'mean'"):
        Ledger.load(memory.reader, SIZES, {"score": LedgerSpec("mean")})
    with pytest.raises(ValueError, match="specs of the snapshot is"):
        Ledger.load(memory.reader, SIZES, {**specs, "loss": LedgerSpec()})


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"format_version": 2}, "ledger.json has format_version 2, this code reads up to 1: update curation"),
        ({"format_version": None}, "ledger.json is damaged: format_version is None"),
        ({"num_shards": None}, "ledger.json is damaged: num_shards is None"),
        ({"columns": []}, r"ledger.json is damaged: columns is \[\]"),
        ({"columns": {}}, "usage.npy is damaged: its checksum is"),
        ({"num_shards": -1}, "shard_sizes has 4 shards, the snapshot has -1"),
        ({"known": {"score": 3}}, "known of the snapshot is {'score': 3}, its columns hold {'score': 2}"),
        ({"saturated": {}}, "saturated of the snapshot is {}, its columns hold {'usage': 0, 'score': 0}"),
    ],
)
def test_a_damaged_head_is_refused_with_the_field_named(fields, complaint):
    ledger = ledger_of()
    feed(ledger, (3, [(0, 1.0), (1, 2.0)]))
    memory = saved(ledger)
    memory.put_head(**fields)
    with pytest.raises(ValueError, match=complaint):
        Ledger.load(memory.reader, SIZES, ledger.specs)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff"])
def test_a_head_that_is_none_is_refused(data):
    memory = saved(ledger_of())
    memory.files["ledger.json"] = data
    with pytest.raises(ValueError, match="ledger.json is damaged"):
        Ledger.load(memory.reader, SIZES, ledger_of().specs)


def test_a_column_cut_off_anywhere_or_changed_anywhere_is_refused():
    ledger = ledger_of()
    feed(ledger, (3, [(address, 1.0 + address) for address in ADDRESSES.tolist()]))
    memory = saved(ledger)
    for name in [name for name in memory.files if name.endswith(".npy")]:
        whole = memory.files[name]
        changed = [whole[:size] for size in range(len(whole))]
        changed += [whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :] for byte in range(128, len(whole))]
        changed.append(whole + b"\0")
        for data in changed:
            memory.files[name] = data
            with pytest.raises(ValueError, match=name):
                Ledger.load(memory.reader, SIZES, ledger.specs)
        memory.files[name] = whole


def test_a_snapshot_takes_little_memory_beside_the_ledger_and_no_write_is_above_64_mib():
    ledger = ledger_of(sizes=np.full(24, 1_000_000))
    ledger.update("score", pack(23, np.arange(1000)), np.ones(1000), step=1)

    class Nowhere(io.RawIOBase):
        largest = 0

        def write(self, data):
            Nowhere.largest = max(Nowhere.largest, len(data))
            return len(data)

    tracemalloc.start()
    ledger.save(lambda name: Nowhere())  # pyright: ignore[reportArgumentType]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert Nowhere.largest == 64 << 20  # a column of 96 MB does not go out in one
    assert peak < 70 << 20


def test_a_snapshot_on_disk_is_read_back(tmp_path):
    ledger = ledger_of(sizes=np.array([700_000]))
    rng = np.random.default_rng(0)
    ledger.update("score", rng.permutation(700_000)[:300_000], rng.normal(size=300_000), step=1)
    ledger.save(lambda name: (tmp_path / name).open("wb"))
    loaded = Ledger.load(lambda name: (tmp_path / name).open("rb", buffering=0), np.array([700_000]), ledger.specs)
    for name, column in ledger.export(np.arange(700_000)).items():
        assert np.array_equal(column, loaded.export(np.arange(700_000))[name])
    assert loaded.known("score") == 300_000
