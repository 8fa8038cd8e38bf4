"""Several captions of a sample: which texts can be one, in which order, and what is counted of the others."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.data.captions import LEFT_OUT, TOO_MANY, Choice, choices_of
from curation.data.open_shard import open_shard
from curation.data.read_rules import ReadRules
from curation.data.shards import ShardReader


def choices(*offered: tuple[str, Any], most: int = 16) -> tuple[list[str], str | None, dict[str, int]]:
    warnings = Counter[str]()
    found, reason = choices_of(offered, max_bytes=8, most=most, warnings=warnings)
    return [f"{where}={text}" for where, text in found], reason, dict(warnings)


def test_captions_stand_in_the_order_of_the_fields_and_equal_ones_are_one() -> None:
    offered = ("txt", b"a dog"), ("json.captions", ["two", "a dog", "one"]), ("json.alt", "alt"), ("json.none", None)
    assert choices(*offered) == (
        ["txt=a dog", "json.captions[0]=two", "json.captions[2]=one", "json.alt=alt"],
        None,
        {},
    )


def test_what_cannot_be_a_caption_is_left_out_and_counted_and_the_first_reason_drops_a_sample_without_any() -> None:
    assert choices(("txt", b" "), ("json.c", ["x" * 9, 7, "ok"])) == (["json.c[2]=ok"], None, {LEFT_OUT: 3})
    assert choices(("txt", b"\xff"), ("json.c", ["", 7])) == ([], "caption:not_utf8", {LEFT_OUT: 3})
    assert choices(("txt", None), ("json.c", [])) == ([], "caption:missing", {})


def test_of_very_many_captions_the_first_are_kept() -> None:
    assert choices(("json.c", ["a", "b", "c"]), most=2) == (["json.c[0]=a", "json.c[1]=b"], None, {TOO_MANY: 1})


def tar_of(*samples: dict[str, bytes]) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for row, members in enumerate(samples):
            for extension, data in members.items():
                header = tarfile.TarInfo(f"{row:03d}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    out.seek(0)
    return out


def test_a_tars_sample_brings_all_its_captions_and_is_known_by_the_first() -> None:
    several = {"jpg": b"i", "txt": b"first", "json": json.dumps({"captions": ["second", None, "x" * 20]}).encode()}
    broken = {"jpg": b"i", "json": b"{"}
    large = {"jpg": b"i", "txt": b"y" * 30}
    rules = ReadRules(best_caption_of=("txt", "json.captions"), max_caption_bytes=10)
    reader = ShardReader(tar_of(several, broken, large), url="a/0.tar", rules=rules)
    samples = list(reader)
    assert samples[0].choices == (Choice("txt", "first"), Choice("json.captions[0]", "second"))
    assert [sample.reason for sample in samples] == [None, "caption:unreadable", "caption:too_large"]
    assert reader.warnings[LEFT_OUT] == 2
    [alone] = ShardReader(tar_of({"jpg": b"i", "txt": b"first"}), url="a/0.tar", rules=ReadRules())
    assert (samples[0].caption, samples[0].uid) == (alone.caption, alone.uid) and not alone.choices


def test_a_parquet_rows_captions_are_its_caption_column_and_its_lists(tmp_path) -> None:
    columns = {"jpg": [b"i", b"j"], "caption": ["one", None], "all": [["two", "one"], []]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    rules = ReadRules(best_caption_of=("json.all", "txt"))
    with open_shard(str(tmp_path / "a.parquet"), rules) as reader:
        first, second = reader
    assert [text for _, text in first.choices] == ["two", "one"] and first.caption == "two"
    assert second.reason == "caption:missing"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"caption_field": "json.a", "best_caption_of": ("txt",)}, "give caption_field or best_caption_of, got both"),
        ({"best_caption_of": ("txt", "txt")}, "best_caption_of must name fields, each once"),
        ({"best_caption_of": ("json.",)}, "best_caption_of must name fields"),
        ({"best_caption_of": ("TXT",)}, "lower-case extensions .* got 'TXT'"),
        ({"best_caption_of": ("txt",), "max_captions": 0}, "max_captions must be at least 1"),
    ],
)
def test_fields_that_cannot_be_captions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReadRules(**fields)
