"""Runs' folders made without Ray: shards that are really there, and tables, accounts and logs as jobs leave them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.addresses import pack
from curation.columns import DROPS_SCHEMA, SELECTED_SCHEMA
from curation.data import manifest, offered, shard_list, storage, tables
from curation.data.open_shard import open_shard
from curation.data.read_rules import ReadRules
from curation.data.shard_list import Shard
from curation.ledger import Ledger, LedgerSpec
from curation.recipe import CurateRecipe, Pool, TrainRecipe, parse_steps

DIM = 4


class Row(NamedTuple):
    """A sample of a made-up pool."""

    caption: str = "a red square"
    fields: Mapping[str, Any] = {}
    score: float = 0.0
    broken: bool = False
    size: tuple[int, int] = (20, 16)


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    """A small PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, rows: Sequence[Row], *, seed: int = 0) -> None:
    """A shard of these samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            image = b"no image at all" if row.broken else picture(1000 * seed + number, row.size)
            members = {"png": image, "json": json.dumps(row.fields).encode(), "txt": row.caption.encode()}
            for extension, data in members.items():
                header = tarfile.TarInfo(f"{number:09d}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """write_run(folder, shards=lists of Row, keep=how many of the highest scores, selection=steps): a curated run."""

    def write(
        folder: str,
        shards: Sequence[Sequence[Row]],
        /,
        *,
        keep: int = 0,
        selection: Sequence[Mapping[str, Any]] | None = None,
        waterfall: Sequence[tuple[str, int, int]] | None = None,
        device: str = "cpu",
        joules: Sequence[float | None] = (),
        **fields: Any,
    ) -> Path:
        run = tmp_path / folder
        listed, kept_from = [], []
        dropped: dict[str, int] = {}
        for number, rows in enumerate(shards):
            url = tmp_path / f"{folder}-pool" / f"{number:05d}.tar"
            write_tar(url, rows, seed=number)
            table = _table(str(url), number, rows)
            tables.write(str(run), number, table)
            reasons = [reason for reason in table["reason"].to_pylist() if reason]
            for reason in reasons:
                dropped[reason] = dropped.get(reason, 0) + 1
            record = {
                "shard": number,
                "url": str(url),
                "read": len(rows),
                "embedded": len(rows) - len(reasons),
                "dropped": {},
                "seconds": {"wait": 1.0, "decode": 2.0, "forward": 2.5, "write": 0.5},
            }
            record |= {"joules": joules[number]} if joules else {}
            manifest.commit(str(run), "embed", number, record, made_by={"embed.model": "nano"})
            listed.append(Shard(number, str(url), "x", sha256=storage.sha256_of(str(url)), rows=len(rows)))
            kept_from += [row for row in table.to_pylist() if row["status"] == "ok"]
        shard_list.save(str(run), listed)
        chosen = sorted(sorted(kept_from, key=lambda row: -row["clip_score"])[:keep], key=lambda row: row["address"])
        columns = [[row["address"] for row in chosen], [row["uid"] for row in chosen]]
        columns += [[row["clip_score"] for row in chosen], [1.0] * len(chosen), [1] * len(chosen)]
        (run / "selection").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns, schema=SELECTED_SCHEMA), run / "selection" / "selected.parquet")
        pq.write_table(DROPS_SCHEMA.empty_table(), run / "drops.parquet")
        read, embedded = sum(map(len, shards)), len(kept_from)
        steps = [{"method": {"name": "clip_score"}, "keep": keep}] if selection is None else selection
        falls = waterfall or [("duplicate_uid", embedded, embedded), ("clip_score", embedded, keep)]
        summary = {"read": read, "embedded": embedded, "dropped": dropped, "selected": len(chosen), "failures": []}
        summary |= {"waterfall": falls, "images_per_second": {"embed": 100.0}, "warnings": {}, "format_version": 1}
        (run / "summary.json").write_text(json.dumps(summary))
        recipe = CurateRecipe(
            pool=Pool(shards=str(tmp_path / f"{folder}-pool")),
            selection=parse_steps(json.dumps(list(steps))),
            output=str(run),
            **fields,
        )
        whole = {
            "format_version": 1,
            "recipe": recipe.model_dump(mode="json"),
            "code": "c0de",
            "seeds": {"selection": 0},
        }
        whole |= {"embedded_by": {"compute.device": device, "embed.model": "nano"}, "versions": {"python": "3.11"}}
        (run / "recipe.json").write_text(json.dumps(whole))
        return run

    return write


def _table(url: str, number: int, rows: Sequence[Row]) -> pa.Table:
    """The sample table that embedding would leave, with the scores that the rows name."""
    columns: dict[str, Any] = {name: [] for name in tables.sample_schema(DIM).names}
    fields = []
    with open_shard(url, ReadRules()) as reader:
        for place, (sample, row) in enumerate(zip(reader, rows, strict=True)):
            reason = "image:unrecognized" if row.broken else sample.reason
            values = {
                "address": pack(number, np.array([place]))[0],
                "uid": sample.uid,
                "key": sample.key,
                "shard": url,
                "offset": sample.offset,
                "status": "dropped" if reason else "ok",
                "reason": reason,
                "caption": sample.caption,
                "width": None if reason else row.size[0],
                "height": None if reason else row.size[1],
                "sha256": sample.sha256,
                "clip_score": None if reason else row.score,
            }
            for name, value in values.items():
                columns[name].append(value)
            fields.append(sample.fields)
    num_ok = columns["status"].count("ok")
    for name in ("image_embedding", "text_embedding"):
        columns[name] = np.zeros((num_ok, DIM), np.float16)
    return tables.sample_table(columns, fields)


@pytest.fixture
def write_training(tmp_path: Path) -> Callable[..., Path]:
    """write_training(name, recall=values, method=..., seed=..., usage=...): a finished training run, 10 rows a step."""

    def write(
        name: str,
        recall: Sequence[float],
        *,
        method: str = "uniform",
        ratio: float = 0.0,
        seed: int = 0,
        data_run: Path | None = None,
        usage: Sequence[int] | None = None,
        joules: Sequence[float | None] | None = None,
        device: str = "cpu",
        scoring: str = "trainer",
        scoring_actors: int = 1,
    ) -> Path:
        run = tmp_path / name
        (run / "train").mkdir(parents=True)
        steps = range(1, len(recall) + 1)
        loaded = 10 / (1 - ratio)
        totals = {
            "step": list(steps),
            "samples_loaded": [loaded * step for step in steps],
            "samples_trained": [10.0 * step for step in steps],
            "flops": [100.0 * step for step in steps],
            "seconds": [2.0 * step for step in steps],
        }
        spent = {"seconds_wait": [0.5] * len(recall), "seconds_score": [0.25] * len(recall)}
        log = {**totals, **spent, "seconds_step": [1.0] * len(recall), "junk_share": [0.5] * len(recall)}
        log |= {} if joules is None else {"joules": list(joules)}
        pq.write_table(pa.table(log), run / "train" / "steps.parquet")
        pq.write_table(pa.table({**totals, "mean_r1": list(recall)}), run / "train" / "evaluations.parquet")
        recipe = TrainRecipe.model_validate(
            {
                "method": {"name": method},
                "data": {"run": str(data_run or "")},
                "train": {"sub_batch": 10, "filter_ratio": ratio, "num_steps": len(recall), "scoring": scoring},
                "compute": {"device": device, "scoring_actors": scoring_actors},
                "learner": {"model": "nano", "seed": seed},
                "output": str(run),
                "seed": seed,
            }
        )
        (run / "recipe.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json"), "format_version": 1}))
        summary = {"samples_loaded": loaded * len(recall), "samples_trained": 10 * len(recall), "format_version": 1}
        (run / "train" / "summary.json").write_text(json.dumps(summary))
        if usage is not None:
            _write_ledger(run, usage)
        return run

    return write


def _write_ledger(run: Path, usage: Sequence[int]) -> None:
    """A ledger of one actor over one shard, where row r was used usage[r] times and scored r."""
    sizes = np.array([len(usage)])
    ledger = Ledger(sizes, {"score": LedgerSpec("last")})
    addresses = pack(0, np.arange(len(usage)))
    ledger.update("score", addresses, np.arange(len(usage), dtype=np.float32), step=1)
    ledger.add_usage(np.repeat(addresses, usage))
    snapshot = run / "ledger" / "actor-00000" / "snapshots" / "00000001"
    snapshot.mkdir(parents=True)
    ledger.save(lambda name: cast(Any, storage.write_atomic(str(snapshot / name))))
    spec = {"statistic": "last", "decay": 0.9, "variance": False}
    head = {"snapshots": {"step-1": {"generation": 1, "call": ""}}, "specs": {"score": spec}, "format_version": 1}
    (snapshot.parent.parent / "HEAD.json").write_text(json.dumps(head))
    np.save(run / "ledger" / "shards.npy", np.stack([sizes, np.zeros(1, np.int64)]))
    shard = {"number": [0], "url": ["x"], "fingerprint": [""], "rows": [len(usage)], "dropped": [[]]}
    pq.write_table(pa.table(shard, schema=offered.SCHEMA), run / "train" / "pool.parquet")
