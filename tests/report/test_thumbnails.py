from __future__ import annotations

import base64
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.data import tables
from curation.data.read_rules import ReadRules
from curation.report import thumbnails
from curation.report.thumbnails import SIDE, Sample, check_safety_column, encode, samples
from tests.report.conftest import Row, picture


def shown(run, *addresses: int, **changes) -> dict[int, Sample]:
    rules = {"rules": ReadRules(), "max_pixels": 10**6, "scores": ["clip_score"], "safety": {}, "max_bytes": 10**6}
    return samples(str(run), addresses, **{**rules, **changes})


def opened(uri: str | None) -> Image.Image:
    assert uri is not None and uri.startswith("data:image/webp;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_sample_comes_with_its_row_and_its_picture(write_run) -> None:
    run = write_run("run", [[Row("one"), Row("two", score=0.5, size=(400, 100))]])
    found = shown(run, 1)[1]
    assert (found.caption, found.scores, found.width, found.height) == ("two", {"clip_score": 0.5}, 400, 100)
    assert opened(found.image).size == (SIDE, SIDE // 4)


def test_what_cannot_be_shown_says_why(write_run, tmp_path) -> None:
    run = write_run("run", [[Row(), Row(broken=True)], [Row()], [Row(), Row()]])
    (tmp_path / "run-pool" / "00001.tar").unlink()
    edited = tmp_path / "run-pool" / "00002.tar"
    data = bytearray(edited.read_bytes())
    data[600] ^= 0xFF  # inside the first picture
    edited.write_bytes(data)
    at = 1 << 20
    found = shown(run, 0, 1, at, 2 * at, 2 * at + 1)
    why = {address: sample.why_none for address, sample in found.items()}
    assert why == {
        0: None,
        1: "image:unrecognized",
        at: "the shard is gone",
        2 * at: "the shard was edited",
        2 * at + 1: None,
    }


def test_an_image_of_too_many_pixels_is_not_decoded(write_run) -> None:
    run = write_run("run", [[Row(size=(50, 50))]])
    assert shown(run, 0, max_pixels=2499)[0].why_none == "image:too_many_pixels"


def test_rows_of_a_parquet_pool_are_read_by_their_row(write_run, tmp_path) -> None:
    run = write_run("run", [[Row("one"), Row("two")]])
    url = tmp_path / "pool.parquet"
    pq.write_table(pa.table({"image": [picture(0), picture(1)], "caption": ["one", "two"]}), url)
    table = tables.read(str(run), 0)
    for name, values in {"shard": [str(url)] * 2, "offset": [0, 1]}.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    tables.write(str(run), 0, table)
    found = shown(run, 0, 1)
    assert [opened(found[row].image).size for row in (0, 1)] == [(20, 16)] * 2


def test_only_what_is_above_the_limit_is_unsafe(write_run) -> None:
    run = write_run("run", [[Row(fields={"punsafe": value}) for value in (0.4, 0.5, 0.6, None)]])
    found = shown(run, 0, 1, 2, 3, safety={"json.punsafe": 0.5})
    assert [found[row].unsafe for row in range(4)] == [False, False, True, False]


def test_one_odd_value_makes_text_of_a_column_and_its_numbers_count_all_the_same(write_run) -> None:
    values = (0.4, "0.99", 0.6, "n/a", "", None, True)
    run = write_run("run", [[Row(fields={"punsafe": value}) for value in values]])
    assert tables.read(str(run), 0, ["json.punsafe"])["json.punsafe"].type == pa.string()
    found = shown(run, *range(7), safety={"json.punsafe": 0.5})
    assert [found[row].unsafe for row in range(7)] == [False, True, True, True, True, False, True]
    nothing = write_run("nan", [[Row(fields={"punsafe": value}) for value in (0.1, float("nan"))]])
    assert not shown(nothing, 1, safety={"json.punsafe": 0.5})[1].unsafe


def test_a_safety_column_that_can_veil_nothing_is_refused(write_run) -> None:
    run = str(write_run("run", [[Row(fields={"NSFW": "NSFW", "p": "0.7"})], [Row(fields={"p": 0.2})]]))
    check_safety_column(run, [0, 1], "json.p")
    check_safety_column(run, [], "json.p")
    with pytest.raises(ValueError, match="'json.nsfw': no table of .* has such a column, they have .*'json.NSFW'"):
        check_safety_column(run, [0, 1], "json.nsfw")
    with pytest.raises(ValueError, match="'json.NSFW' holds no number in any table"):
        check_safety_column(run, [0, 1], "json.NSFW")


def test_a_picture_is_charged_as_often_as_it_is_placed(write_run) -> None:
    run = write_run("run", [[Row(), Row()]])
    size = len(shown(run, 0)[0].image or "")
    assert shown(run, 0, max_bytes=size)[0].image
    assert shown(run, 0, 0, max_bytes=2 * size - 1)[0].why_none == "left out: the page is full"
    assert [bool(each.image) for each in shown(run, 0, 0, 1, max_bytes=2 * size).values()] == [True, False]


@pytest.mark.parametrize(("mode", "comes_as"), [("RGBA", "RGBA"), ("L", "RGB"), ("CMYK", "RGB"), ("P", "RGB")])
def test_transparency_stays_and_all_else_is_rgb(mode, comes_as) -> None:
    image = Image.new(mode, (3, 3))
    if mode == "RGBA":
        image.putpixel((0, 0), (255, 0, 0, 128))
    assert opened(encode(image)).mode == comes_as


def test_what_crashed_workers_is_not_decoded_for_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails.storage, "open_read", lambda url: pytest.fail("it was opened"))
    row = {"reason": "sample:crashes_worker", "shard": "a.tar"}
    assert thumbnails._thumbnail(row, ReadRules(), 1 << 20) == (None, "not decoded: it crashes whoever does")
