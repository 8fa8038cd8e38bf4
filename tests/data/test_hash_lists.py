"""Lists hold what their files name, whatever the format, and nothing that is not understood passes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.data.hash_lists import build, contains, entries_of, listed, opened
from curation.data.read_rules import ListKind

UIDS = [f"{value:032x}" for value in (0, 7, 2**127 + 5, 2**64)]
ABSENT = [f"{value:032x}" for value in (1, 2**64 + 1, 2**128 - 1)]


def built(tmp_path: Path, path: Path, kind: ListKind) -> np.ndarray:
    return opened(build(str(tmp_path / "run"), listed(str(path)), kind))


def write(path: Path, values: list[str]) -> Path:
    if path.suffix == ".txt":
        path.write_text("# opt-outs\n\n" + "".join(f" {value.upper()} \n" for value in [*values, values[0]]))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"n": [0] * (len(values) + 1), "UID": [*values, None]}), path)
    else:
        words = np.array([(int(v[:16], 16), int(v[16:], 16)) for v in values], "u8,u8")
        np.save(path, np.sort(words)[::-1])
    return path


@pytest.mark.parametrize("suffix", [".txt", ".parquet", ".npy"])
def test_a_list_has_what_its_file_names_in_every_format(tmp_path: Path, suffix: str) -> None:
    entries = built(tmp_path, write(tmp_path / f"list{suffix}", UIDS), "uid")
    assert len(entries) == len(UIDS)
    found = contains(entries, entries_of([*UIDS, *ABSENT], "uid"))
    assert found.tolist() == [True] * len(UIDS) + [False] * len(ABSENT)


def test_binary_uids_of_a_parquet_file_are_uids(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uid": pa.array([bytes.fromhex(UIDS[2])], pa.binary(16))}), tmp_path / "b.parquet")
    assert contains(built(tmp_path, tmp_path / "b.parquet", "uid"), entries_of(UIDS, "uid")).tolist() == [0, 0, 1, 0]


def test_an_empty_list_has_nothing(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("")
    assert not contains(built(tmp_path, tmp_path / "none.txt", "uid"), entries_of(UIDS, "uid")).any()


def test_a_url_is_named_by_itself_or_by_its_sha256(tmp_path: Path) -> None:
    urls = ["https://a.example/größe.jpg", "https://b.example/1"]
    hashed = hashlib.sha256(urls[1].encode()).hexdigest()
    (tmp_path / "urls.txt").write_text(f"{urls[0]}\n{hashed}\n", encoding="utf-8")
    entries = built(tmp_path, tmp_path / "urls.txt", "url")
    assert contains(entries, entries_of([*urls, "https://c.example"], "url")).tolist() == [True, True, False]


def test_a_byte_order_mark_is_no_part_of_the_first_entry(tmp_path: Path) -> None:
    urls = ["https://a.example/1", "https://a.example/2"]
    (tmp_path / "urls.txt").write_text("\n".join(urls), encoding="utf-8-sig")
    entries = built(tmp_path, tmp_path / "urls.txt", "url")
    assert contains(entries, entries_of(urls, "url")).all()


def test_a_list_of_a_million_is_16_bytes_an_entry_and_several_files_are_one_list(tmp_path: Path) -> None:
    words = np.random.default_rng(0).integers(0, 2**64, (1_000_000, 2), np.uint64)
    np.save(tmp_path / "l0.npy", words[:600_000].view("u8,u8")[:, 0])
    np.save(tmp_path / "l1.npy", words[500_000:].view("u8,u8")[:, 0])
    url = build(str(tmp_path / "run"), listed(str(tmp_path / "l{0,1}.npy")), "uid")
    assert Path(url).stat().st_size == 128 + 16 * 1_000_000
    some = [f"{high:016x}{low:016x}" for high, low in words[::997]]
    assert contains(opened(url), entries_of(some, "uid")).all()


@pytest.mark.parametrize(
    ("name", "text", "kind", "message"),
    [
        ("a.txt", UIDS[0] + "\nxyz\n", "uid", "a.txt: a uid is 32 hex digits, got 'xyz'"),
        ("a.txt", UIDS[0], "sha256", "a sha256 is 64 hex digits, got '000"),
        ("a.npy", None, "uid", r"is float64 \(3,\), a list is u8,u8"),
        ("a.parquet", None, "sha256", r"has no column 'sha256', it has \['n', 'UID'\]"),
    ],
)
def test_what_is_not_understood_is_an_error_that_names_the_file(
    tmp_path: Path, name: str, text: str | None, kind: ListKind, message: str
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    elif name.endswith(".npy"):
        np.save(path, np.zeros(3))
    else:
        write(path, UIDS)
    with pytest.raises(ValueError, match=message):
        built(tmp_path, path, kind)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", UIDS)
    with pytest.raises(ValueError, match=r"exclude: no file matches '.*gone.txt'"):
        built(tmp_path, tmp_path / "gone.txt", "uid")
    with pytest.raises(ValueError, match=r"exclude: .*b.txt is named but not there"):
        built(tmp_path, tmp_path / "{a,b}.txt", "uid")


def test_an_edited_file_is_another_list(tmp_path: Path) -> None:
    first = build(str(tmp_path), listed(str(write(tmp_path / "l.txt", UIDS[:1]))), "uid")
    assert build(str(tmp_path), listed(str(tmp_path / "l.txt")), "uid") == first
    assert build(str(tmp_path), listed(str(write(tmp_path / "l.txt", UIDS))), "uid") != first
