"""The staged mode: CPU tasks read and decode, actors embed, so that decoding may run on nodes without a GPU.

    decode task --parts--> embedding actor --part tables, records--> driver --commit task--> table and manifest

A shard becomes **parts**: its rows in order, cut after so many rows to embed that their pixels make a block of 64 to
128 MiB, always a whole number of batches. So the batches are those of the fused mode, and so are the table's bytes. A
part travels as one row of Ray Data, which never joins or splits rows. The actor leaves a part's table under parts/;
when the parts cover a shard from its first row to its last, a task makes the shard's table of them and commits it.
What a killed run leaves under parts/ is garbage, and the next one begins by removing it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from curation.data import manifest, storage, tables
from curation.data.captions import Choice
from curation.data.json_columns import TOO_DEEP
from curation.data.open_shard import fingerprint, open_shard
from curation.data.samples import Sample
from curation.data.shard_list import Shard
from curation.distributed import energy
from curation.distributed.decode import Decoded, ReadAhead, SampleDecoder
from curation.distributed.embed import CALLS_AT_A_TIME, STAGE, BatchEmbedder, EmbedSpec, Piece, noted, set_aside
from curation.distributed.resources import Placement
from curation.distributed.roster import Attempt, bench, verdict_of
from curation.models.clip import load_tokenizer
from curation.models.resize import load_resize

MIN_BLOCK_BYTES, MAX_BLOCK_BYTES = 64 << 20, 128 << 20
DECODE_MEMORY = 3 * MAX_BLOCK_BYTES
"""What a decode task holds: a part in the making, and what Ray has of it and of the one before."""
AHEAD_ROWS = 32
COMMITS_AT_A_TIME = 16
FOLDER = "parts"
FIELDS = "fields"
"""Column of a part's table: each row's json fields, as JSON; only a whole shard shows what type a field has."""

Record = dict[str, Any]

_PART_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("url", pa.string()),
        ("rows", pa.large_string()),  # JSON, a list
        ("pixels", pa.large_binary()),  # uint8 (m, H, W, 3) of the m rows to embed
        ("tokens", pa.large_binary()),  # int64 (M, L) of their captions
        ("end", pa.string()),  # JSON of what is known at the shard's end; null in the parts before it
    ]
)


def staged_shards(shards: Sequence[Shard], spec: EmbedSpec, placement: Placement) -> Iterator[Record]:
    """Embed and commit the shards; their records, as they are done. A shard whose store fails is told as pending."""
    _remove_parts(spec.output)
    rows = [pa.table({"number": [s.number], "url": [s.url], "fingerprint": [s.fingerprint]}) for s in shards]
    decoded = ray.data.from_arrow(rows).map_batches(
        cast(Any, decode_shard),
        fn_kwargs={"spec": spec},
        batch_size=1,
        batch_format="numpy",
        num_cpus=1,
        # Also what keeps Ray from fusing the task into a CPU actor, whose resources would be the same.
        memory=DECODE_MEMORY,
    )
    # A part of 64 MiB or more is a block of its own; smaller ones of the same shard share one.
    decoded.context.target_max_block_size = MIN_BLOCK_BYTES
    parts = decoded.map_batches(
        PartEmbed,
        fn_constructor_args=(spec,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=placement.actors,
            max_tasks_in_flight_per_actor=CALLS_AT_A_TIME,
            max_concurrent_calls_per_actor=CALLS_AT_A_TIME,
            enable_true_multi_threading=True,
        ),
        num_cpus=placement.num_cpus,
        num_gpus=placement.num_gpus or None,
    )
    yield from _committed((json.loads(row["record"]) for row in parts.iter_rows()), shards, spec)
    _remove_parts(spec.output)


def _committed(parts: Iterable[Record], shards: Sequence[Shard], spec: EmbedSpec) -> Iterator[Record]:
    """The shards' records: each shard is committed, by a task, once its parts cover it."""
    # No CPU for it: the decode tasks may hold them all.
    task = ray.remote(num_cpus=0)(commit_shard)
    seen: dict[int, dict[int, Record]] = {shard.number: {} for shard in shards}
    running: list[ray.ObjectRef] = []
    for part in parts:
        number = part["shard"]
        if number not in seen:
            continue  # a part that was made twice, because a worker died after it had made it
        if "pending" in part:
            del seen[number]
            yield part
            continue
        if "set_aside" in part:
            continue  # told again below, from the roster
        seen[number][part["first"]] = part
        if covers_shard(seen[number]):
            whole = seen.pop(number)
            running.append(task.remote(spec, [whole[first] for first in sorted(whole)]))
        done, running = (
            ray.wait(running, timeout=0 if len(running) < COMMITS_AT_A_TIME else None) if running else ([], [])
        )
        yield from ray.get(done)
    yield from ray.get(running)
    for shard in shards:
        if shard.number not in seen:
            continue
        if verdict_of(spec.run, shard.number).whole:
            yield ray.get(ray.remote(num_cpus=0)(commit_set_aside).remote(spec, shard.number, shard.url))
        else:  # no way leads here; but a shard is never left out without a word
            yield {"shard": shard.number, "url": shard.url, "pending": "not all of its parts were embedded"}


def covers_shard(parts: Mapping[int, Record]) -> bool:
    """True if the parts, by their first row, are all rows of a shard: without a gap, up to the one with its end."""
    row = 0
    for first in sorted(parts):
        if first != row:
            return False
        row += parts[first]["read"]
    return any(part["end"] is not None for part in parts.values())


def decode_shard(batch: dict[str, np.ndarray], *, spec: EmbedSpec) -> Iterator[pa.Table]:
    """One row (number, url, fingerprint) in, the shard's parts out, in order: a row each. Runs as a task on a CPU.

    A shard that the store does not give whole, or that changed meanwhile, ends in a part that says so.
    """
    torch.set_num_threads(1)
    number, url = int(batch["number"][0]), str(batch["url"][0])
    decoder, image_size = _decoder(spec.model, spec.pretrained, spec.resize, spec.max_pixels)
    part = _PartMaker(number, url, image_size, rows_per_part=rows_per_part(image_size, spec.batch_size))
    with bench(spec.run).attempt("decode", number) as attempt:
        if attempt.is_set_aside:
            yield part.taken(end={"set_aside": True})
        else:
            yield from _decoded_parts(part, decoder, url, str(batch["fingerprint"][0]), spec, attempt)


def _decoded_parts(
    part: _PartMaker, decoder: SampleDecoder, url: str, listed: str, spec: EmbedSpec, attempt: Attempt
) -> Iterator[pa.Table]:
    try:
        with (
            open_shard(url, spec.rules) as reader,
            ThreadPoolExecutor(1, "decode") as pool,
            ReadAhead(attempt.reading(reader), pool, noted(attempt, decoder), ahead=AHEAD_ROWS) as rows,
        ):
            for row in rows:
                if part.is_full:
                    yield part.taken(end=None)
                part.add(row)
        if fingerprint(url) != listed:
            raise OSError(f"{url} changed while it was read")
        end = {"sha256": reader.sha256, "bytes": reader.num_bytes, "warnings": dict(reader.warnings)}
        yield part.taken(end={"fingerprint": listed, **end})
    except OSError as error:
        yield part.taken(end={"pending": f"{type(error).__name__}: {error}"})


@functools.cache
def _decoder(model: str, pretrained: str | None, how: Any, max_pixels: int) -> tuple[SampleDecoder, tuple[int, int]]:
    """The model's decoder, made once in a worker's life, and its image size (H, W)."""
    resize = load_resize(model, pretrained=pretrained)
    return SampleDecoder(resize, load_tokenizer(model), how=how, max_pixels=max_pixels), resize.image_size


def rows_per_part(image_size: tuple[int, int], batch_size: int) -> int:
    """As many whole batches as fit into MAX_BLOCK_BYTES with a little room for the rest; one batch if none does."""
    row_bytes = image_size[0] * image_size[1] * 3
    return max(1, MAX_BLOCK_BYTES * 7 // 8 // row_bytes // batch_size) * batch_size


class _PartMaker:
    """Gathers decoded rows until there are `rows_per_part` to embed."""

    def __init__(self, number: int, url: str, image_size: tuple[int, int], *, rows_per_part: int):
        self._number, self._url, self._shape, self._limit = number, url, (*image_size, 3), rows_per_part
        self._begin()

    def _begin(self) -> None:
        self._rows: list[Decoded] = []
        self._pixels = np.empty((self._limit, *self._shape), np.uint8)
        self._tokens: list[np.ndarray] = []

    @property
    def is_full(self) -> bool:
        """True if the next row belongs to the next part."""
        return len(self._tokens) == self._limit

    def add(self, row: Decoded) -> None:
        """Take a row."""
        if row.pixels is not None and row.tokens is not None:
            self._pixels[len(self._tokens)] = row.pixels
            self._tokens.append(row.tokens.numpy())
        self._rows.append(row)

    def taken(self, *, end: Record | None) -> pa.Table:
        """The part as a table of one row, and a new part begun."""
        tokens = np.concatenate(self._tokens) if self._tokens else np.zeros(0, np.int64)
        table = pa.Table.from_arrays(
            [
                pa.array([self._number]),
                pa.array([self._url]),
                pa.array([json.dumps([_row_text(row) for row in self._rows])], pa.large_string()),
                _one_binary(self._pixels[: len(self._tokens)]),
                _one_binary(tokens),
                pa.array([None if end is None else json.dumps(end)], pa.string()),
            ],
            schema=_PART_SCHEMA,
        )
        self._begin()
        return table


def _one_binary(values: np.ndarray) -> pa.Array:
    """An array of one element, the values' bytes, not copied."""
    offsets = pa.py_buffer(np.array([0, values.nbytes], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(values)])


def _row_text(row: Decoded) -> Record:
    """What of a row JSON can hold: all but pixels and tokens."""
    sample = {field.name: getattr(row.sample, field.name) for field in dataclasses.fields(Sample)}
    fields = {name: value if _fits_json(value) else TOO_DEEP for name, value in row.sample.fields.items()}
    return {**row._asdict(), "sample": {**sample, "fields": fields}, "pixels": None, "tokens": None}


def _fits_json(value: Any) -> bool:
    """False for a value that was parsed on a shorter stack: a table would say TOO_DEEP, too."""
    try:
        json.dumps(value)
    except RecursionError:
        return False
    return True


class PartEmbed:
    """Embeds parts, one a call, and leaves each one's table. Called by Ray Data with a part as a table of one row."""

    def __init__(self, spec: EmbedSpec):
        self._spec = spec
        self._embedder = BatchEmbedder(spec)
        self._model = threading.Lock()
        self._bench = bench(spec.run)

    def __call__(self, part: pa.Table) -> dict[str, list[str]]:
        """One part in, one row (record) out: the part's account as JSON."""
        number, url = part["number"][0].as_py(), part["url"][0].as_py()
        end = json.loads(part["end"][0].as_py() or "null")
        if end is not None and ("pending" in end or "set_aside" in end):
            return {"record": [json.dumps({"shard": number, "url": url, **end})]}
        rows = json.loads(part["rows"][0].as_py())
        piece = Piece(self._embedder.towers.embedding_dim, chooses=bool(self._spec.rules.best_caption_of))
        first = rows[0]["sample"]["row"] if rows else 0
        with self._bench.attempt(f"embed from row {first}", number) as attempt:
            if attempt.is_set_aside:
                return {"record": [json.dumps({"shard": number, "url": url, "set_aside": True})]}
            with self._model:
                self._embedder.embed(piece, self._decoded(part, rows), attempt)
            begun = time.perf_counter()
            with attempt.write():
                _write_part(self._spec.output, number, first, piece.part_table(number, url, fields_column=FIELDS))
        piece.seconds["write"] = time.perf_counter() - begun
        record = {
            "shard": number,
            "url": url,
            "first": first,
            **piece.account(),
            "warnings": piece.warnings() | self._embedder.warnings(),
            **self._embedder.facts(),
            "seconds": piece.seconds,
            "joules": piece.joules,
            "batch_ends": piece.batch_ends,
            "end": end,
        }
        return {"record": [json.dumps(record)]}

    def _decoded(self, part: pa.Table, rows: list[Record]) -> Iterator[Decoded]:
        """The part's rows, their pixels and tokens views of the block."""
        size, length = self._embedder.towers.image_size, self._embedder.towers.context_length
        pixels = np.frombuffer(part["pixels"][0].as_buffer(), np.uint8).reshape(-1, *size, 3)
        tokens = torch.tensor(np.frombuffer(part["tokens"][0].as_buffer(), np.int64)).reshape(-1, length)
        place = at = 0
        for row in rows:
            choices = tuple(Choice(*choice) for choice in row["sample"]["choices"])
            decoded = Decoded(**{**row, "sample": Sample(**{**row["sample"], "choices": choices})})
            if decoded.reason is None:
                num_captions = max(1, len(choices))
                decoded = decoded._replace(pixels=pixels[place], tokens=tokens[at : at + num_captions])
                place, at = place + 1, at + num_captions
            yield decoded


def commit_shard(spec: EmbedSpec, parts: Sequence[Record]) -> Record:
    """Make the shard's table of its parts' tables, and commit it; its record. Runs as a task, needs no Ray itself."""
    number, url = parts[0]["shard"], parts[0]["url"]
    begun = time.perf_counter()
    try:
        part_tables = [_read_part(spec.output, number, part["first"]) for part in parts]
        table = pa.concat_tables(part_tables)
        fields = [json.loads(text) for text in table[FIELDS].to_pylist()]
        columns: dict[str, Any] = {name: _values(table, name) for name in table.column_names if name != FIELDS}
        tables.write(spec.output, number, tables.sample_table(columns, fields))
        record = _record(parts, fields, seconds=time.perf_counter() - begun)
        manifest.commit(spec.output, STAGE, number, record, made_by=spec.made_by)
    except OSError as error:
        return {"shard": number, "url": url, "pending": f"{type(error).__name__}: {error}"}
    for part in parts:
        storage.delete(_part_url(spec.output, number, part["first"]))
    return {**record, "batch_ends": [end for part in parts for end in part["batch_ends"]]}


def commit_set_aside(spec: EmbedSpec, number: int, url: str) -> Record:
    """Commit a shard that crashes workers at no known sample; its record. A task that loads the model for its facts."""
    return set_aside(spec, number, url, BatchEmbedder(dataclasses.replace(spec, device="cpu", precision="float32")))


def _values(table: pa.Table, name: str) -> Any:
    """A column as `sample_table` takes it: an embedding only of the rows that are ok."""
    if not pa.types.is_fixed_size_list(table.schema.field(name).type):
        return table[name].to_pylist()
    ok = table.filter(pc.field("status") == "ok")
    return tables.as_array(ok[name], name=name)


def _record(parts: Sequence[Record], fields: Sequence[dict[str, Any]], *, seconds: float) -> Record:
    """The piece's account: the sum of its parts', and what was known at the shard's end."""
    end = cast(Record, next(part["end"] for part in parts if part["end"] is not None))
    dropped, warnings = Counter[str](), Counter[str](end["warnings"] | tables.too_many_columns(fields))
    for part in parts:
        dropped.update(part["dropped"])
        warnings.update({name: n for name, n in part["warnings"].items() if name != "gpu:batch_halved"})
    spent: dict[str, float] = {name: sum(part["seconds"][name] for part in parts) for name in parts[0]["seconds"]}
    spent["write"] += seconds
    halved = max(part["warnings"].get("gpu:batch_halved", 0) for part in parts)
    return {
        "shard": parts[0]["shard"],
        "url": parts[0]["url"],
        "fingerprint": end["fingerprint"],
        "sha256": end["sha256"],
        "bytes": end["bytes"],
        **{name: sum(part[name] for part in parts) for name in ("read", "embedded")},
        "dropped": dict(sorted(dropped.items())),
        "decoded": sum(part["decoded"] for part in parts),
        "warnings": dict(sorted((+warnings).items())) | ({"gpu:batch_halved": halved} if halved else {}),
        "batch_size": min(part["batch_size"] for part in parts),
        "logit_scale": parts[0]["logit_scale"],
        "logit_bias": parts[0]["logit_bias"],
        "seconds": {name: round(value, 4) for name, value in spent.items()},
        "joules": energy.total(part["joules"] for part in parts),
    }


def _part_url(output: str, number: int, first: int) -> str:
    return storage.join(output, FOLDER, f"{manifest.shard_name(number)}-{first:07d}.parquet")


def _write_part(output: str, number: int, first: int, table: pa.Table) -> None:
    with storage.write_atomic(_part_url(output, number, first)) as file:
        pq.write_table(table, file, compression="none", use_dictionary=False)


def _read_part(output: str, number: int, first: int) -> pa.Table:
    with storage.open_read(_part_url(output, number, first)) as file:
        return pq.read_table(file)


def _remove_parts(output: str) -> None:
    for name in storage.names_in(storage.join(output, FOLDER)):
        storage.delete(storage.join(output, FOLDER, name))
