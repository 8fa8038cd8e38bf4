"""The embedding actor without Ray: what it commits equals a plain loop, and what goes wrong is said."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from curation.data import storage, tables
from curation.data.read_rules import ReadRules
from curation.data.shards import ShardReader
from curation.distributed.embed import ShardEmbed, best_captions
from curation.models.clip import Towers, load_towers
from tests.distributed.conftest import nano_spec

BATCH = 8
RULES = ReadRules()


@pytest.fixture(scope="module")
def towers() -> Towers:
    return load_towers("nano", seed=0)


@pytest.fixture
def embed(towers: Towers, tmp_path: Path) -> Callable[..., ShardEmbed]:
    def make(*, with_towers: Any = towers, **changes: Any) -> ShardEmbed:
        fields = {"output": str(tmp_path / "out"), "batch_size": BATCH, "decode_threads": 2, "rules": RULES, **changes}
        return ShardEmbed(nano_spec(**fields), towers=with_towers)

    return make


def call(embed: ShardEmbed, url: str, *, number: int = 0) -> dict[str, Any]:
    row = {"number": np.array([number]), "url": np.array([url]), "fingerprint": np.array([storage.fingerprint(url)])}
    return json.loads(embed(row)["record"][0])


def test_embeddings_and_scores_equal_a_plain_open_clip_loop(
    embed: Callable[..., ShardEmbed], towers: Towers, write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shard = write_shard(tmp_path / "a.tar", count=BATCH + 5, broken=[3])
    record = call(embed(), str(shard))
    assert (record["read"], record["embedded"], record["decoded"]) == (13, 12, 13)
    table = pq.read_table(tmp_path / "out" / "samples" / "00000000.parquet")
    ok = [row for row in table.to_pylist() if row["status"] == "ok"]

    clip = towers.network.clip
    transform = open_clip.image_transform(towers.image_size, is_train=False)
    with open(shard, "rb") as raw, torch.inference_mode():
        samples = [s for s in ShardReader(raw, url=str(shard), rules=RULES) if s.row != 3]
        images = torch.stack([transform(Image.open(io.BytesIO(s.image or b""))) for s in samples])  # pyright: ignore
        image_ND = F.normalize(clip.encode_image(images), dim=-1)  # pyright: ignore[reportCallIssue]
        text_ND = F.normalize(clip.encode_text(towers.tokenize([s.caption or "" for s in samples])), dim=-1)  # pyright: ignore
    np.testing.assert_allclose(np.stack([row["image_embedding"] for row in ok]), image_ND.numpy(), atol=1e-3)
    np.testing.assert_allclose(np.stack([row["text_embedding"] for row in ok]), text_ND.numpy(), atol=1e-3)
    np.testing.assert_allclose([row["clip_score"] for row in ok], (image_ND * text_ND).sum(-1).numpy(), atol=1e-5)


def test_a_rows_embedding_does_not_depend_on_how_many_rows_its_shard_has(
    embed: Callable[..., ShardEmbed], write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    call(embed(), str(write_shard(tmp_path / "three.tar", count=3)), number=0)
    call(embed(), str(write_shard(tmp_path / "one.tar", count=1)), number=1)
    three, one = (pq.read_table(tmp_path / "out" / "samples" / f"{n:08d}.parquet").to_pylist()[0] for n in (0, 1))
    assert three["image_embedding"] == one["image_embedding"] and three["clip_score"] == one["clip_score"]


CAPTIONS = {0: ["a dog on grass", "two cats", "x"], 2: ["only one"], 4: [f"caption {n}" for n in range(2 * BATCH)]}
"""Row 1 has none, row 3 no image; row 4 has more than fit a batch."""


def captions_of(row: int) -> dict[str, Any]:
    return {"captions": CAPTIONS.get(row, [])}


def test_of_several_captions_the_best_is_used_and_it_is_noted_where_it_stood(
    embed: Callable[..., ShardEmbed], towers: Towers, write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shard = write_shard(tmp_path / "a.tar", count=5, broken=[3], fields=captions_of)
    rules = ReadRules(best_caption_of=("json.captions", "txt"))
    assert call(embed(rules=rules), str(shard))["embedded"] == 4
    rows = pq.read_table(tmp_path / "out" / "samples" / "00000000.parquet").to_pylist()
    for number in (0, 1, 2, 4):
        captions = [*CAPTIONS.get(number, []), f"picture 0 {number}"]
        texts = towers.embed_texts(towers.tokenize(captions))
        cosines = texts @ torch.tensor(rows[number]["image_embedding"], dtype=torch.float32)
        best = int(cosines.argmax())
        where = "txt" if best == len(captions) - 1 else f"json.captions[{best}]"
        assert (rows[number]["caption"], rows[number]["caption_from"]) == (captions[best], where)
        assert rows[number]["clip_score"] == pytest.approx(float(cosines[best]), abs=1e-3)
        np.testing.assert_allclose(rows[number]["text_embedding"], texts[best].numpy(), atol=1e-3)
    assert (rows[3]["status"], rows[3]["caption_from"]) == ("dropped", "txt")

    call(embed(output=str(tmp_path / "one"), rules=ReadRules(caption_field="json.captions")), str(shard))
    assert "caption_from" not in pq.read_schema(tmp_path / "one" / "samples" / "00000000.parquet").names


def test_the_best_caption_is_the_first_of_the_highest_and_none_that_is_no_number() -> None:
    image_ND = torch.eye(2).repeat_interleave(torch.tensor([2, 1]), dim=0)
    nan = torch.full((2,), torch.nan)
    text_MD = torch.stack([nan, *torch.eye(2), torch.eye(2)[1], nan, torch.eye(2)[0]])
    chosen = best_captions(image_ND, text_MD, [2, 2, 2])
    assert chosen.choices == [1, 0, 1] and chosen.places.tolist() == [1, 2, 5]


@pytest.mark.parametrize("decode_threads", [1, 5])
def test_decode_threads_do_not_change_a_byte(
    embed: Callable[..., ShardEmbed], write_shard: Callable[..., Path], tmp_path: Path, decode_threads: int
) -> None:
    shard = str(write_shard(tmp_path / "a.tar", count=30, broken=[2]))
    call(embed(), shard)
    call(embed(output=str(tmp_path / "other"), decode_threads=decode_threads), shard)
    name = "samples/00000000.parquet"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("count, broken", [(0, []), (2, [0, 1])])
def test_a_shard_with_nothing_to_embed_is_committed(
    embed: Callable[..., ShardEmbed], write_shard: Callable[..., Path], tmp_path: Path, count: int, broken: list[int]
) -> None:
    record = call(embed(), str(write_shard(tmp_path / "a.tar", count=count, broken=broken)))
    assert (record["read"], record["embedded"]) == (count, 0)
    assert pq.read_table(tmp_path / "out" / "samples" / "00000000.parquet").num_rows == count
    assert (tmp_path / "out" / "manifest" / "embed" / "00000000.json").exists()


class OutOfMemoryAbove:
    """Towers that run out of GPU memory when a batch has more rows than `limit`."""

    def __init__(self, towers: Towers, *, limit: int):
        self._towers, self._limit = towers, limit
        self.shapes: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._towers, name)

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > self._limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.shapes.add(len(pixels))
        return self._towers.embed_images(pixels)


def test_rows_whose_json_has_more_names_than_a_table_has_columns_are_counted(
    embed: Callable[..., ShardEmbed], write_shard: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_JSON_COLUMNS", 2)
    shard = write_shard(tmp_path / "a.tar", count=3, fields=lambda row: {f"own-{row}": row})
    assert call(embed(), str(shard))["warnings"] == {"json:too_many_columns": 1}
    schema = pq.read_schema(tmp_path / "out" / "samples" / "00000000.parquet")
    assert [name for name in schema.names if name.startswith("json.")] == ["json.own-0", "json.own-1"]


def test_out_of_gpu_memory_halves_the_batch_keeps_every_row_and_is_noted(
    embed: Callable[..., ShardEmbed], towers: Towers, write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    starved = OutOfMemoryAbove(towers, limit=3)
    record = call(embed(with_towers=starved), str(write_shard(tmp_path / "a.tar", count=11)))
    assert (record["embedded"], record["batch_size"], record["warnings"]) == (11, 2, {"gpu:batch_halved": 4})
    assert starved.shapes == {2}
    manifest = json.loads((tmp_path / "out" / "manifest" / "embed" / "00000000.json").read_text())
    assert manifest["batch_size"] == 2


def test_out_of_gpu_memory_at_one_row_is_an_error(
    embed: Callable[..., ShardEmbed], towers: Towers, write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        call(embed(with_towers=OutOfMemoryAbove(towers, limit=0)), str(write_shard(tmp_path / "a.tar", count=2)))


def test_a_shard_edited_while_it_is_read_is_pending_not_committed(
    embed: Callable[..., ShardEmbed], write_shard: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_shard(tmp_path / "a.tar", count=3)
    row = {"number": np.array([0]), "url": np.array([str(shard)]), "fingerprint": np.array(["listed:before"])}
    record = json.loads(embed()(row)["record"][0])
    assert "changed while it was read" in record["pending"]
    assert not (tmp_path / "out").exists()


class BreaksAfter(io.RawIOBase):
    """A file whose store fails after `good` bytes."""

    def __init__(self, path: str, *, good: int):
        self._raw, self._good = io.BytesIO(Path(path).read_bytes()), good

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._raw.tell() >= self._good:
            raise ConnectionResetError("the store hung up")
        data = self._raw.read(min(len(buffer), 512))
        buffer[: len(data)] = data
        return len(data)


def test_a_storage_error_in_the_middle_leaves_the_shard_pending_and_no_thread_behind(
    embed: Callable[..., ShardEmbed], write_shard: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    shard = write_shard(tmp_path / "a.tar", count=40)
    before = threading.active_count()
    monkeypatch.setattr(storage, "open_read", lambda url: io.BufferedReader(BreaksAfter(url, good=30_000)))
    record = call(embed(), str(shard))
    assert record["pending"] == "ConnectionResetError: the store hung up"
    assert threading.active_count() == before


def test_a_shard_in_memory_is_read_as_one_on_disk(
    embed: Callable[..., ShardEmbed], write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shard = write_shard(tmp_path / "a.tar", count=4)
    storage.write_bytes("memory://pool/a.tar", shard.read_bytes())
    record = call(embed(), "memory://pool/a.tar")
    assert (record["embedded"], record["bytes"]) == (4, shard.stat().st_size)


def test_the_manifest_holds_the_sha256_of_the_shards_bytes(
    embed: Callable[..., ShardEmbed], write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shard = write_shard(tmp_path / "a.tar", count=4)
    assert call(embed(), str(shard))["sha256"] == storage.sha256_of(str(shard))


def test_no_member_name_reaches_the_file_system(
    embed: Callable[..., ShardEmbed], write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shard = write_shard(tmp_path / "pool" / "a.tar", count=1)
    data = shard.read_bytes().replace(b"000000000.", b"../../up.\0")
    assert b"../../up" in data
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    call(embed(), str(shard))
    assert {path for path in tmp_path.rglob("*") if "out" not in path.relative_to(tmp_path).parts} == before


def test_a_committed_shard_is_not_done_again(
    embed: Callable[..., ShardEmbed], write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shard = str(write_shard(tmp_path / "a.tar", count=4))
    first = call(embed(), shard)
    table = tmp_path / "out" / "samples" / "00000000.parquet"
    written = table.stat().st_mtime_ns
    again = call(embed(), shard)
    assert table.stat().st_mtime_ns == written
    assert again["sha256"] == first["sha256"] and again["embedded"] == 4


class NotFinite:
    """Towers that give NaN for the second row of every batch."""

    def __init__(self, towers: Towers):
        self._towers = towers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._towers, name)

    def embed_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        embeddings = self._towers.embed_texts(tokens).clone()
        embeddings[1] = torch.nan
        return embeddings


def test_a_row_whose_embedding_is_not_finite_is_dropped_and_takes_no_neighbour_along(
    embed: Callable[..., ShardEmbed], towers: Towers, write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shard = str(write_shard(tmp_path / "a.tar", count=4, broken=[0]))
    record = call(embed(with_towers=NotFinite(towers)), shard)
    assert record["dropped"] == {"embedding:not_finite": 1, "image:unrecognized": 1} and record["embedded"] == 2
    rows = pq.read_table(tmp_path / "out" / "samples" / "00000000.parquet").to_pylist()
    assert [row["reason"] for row in rows] == ["image:unrecognized", None, "embedding:not_finite", None]
    assert [row["clip_score"] is None for row in rows] == [True, False, True, False]
