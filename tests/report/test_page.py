"""The page: its numbers are the tables', and nothing that a pool holds can act on it, or be fetched by it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.report import page, thumbnails
from curation.report.costs import Prices
from curation.report.page import Wanted, report
from curation.report.plain import plain
from jobs import report as job
from tests.report.conftest import Row

LOADING = {"src", "srcset", "poster", "data", "action", "formaction", "background", "ping", "manifest", "xlink:href"}


class Page(HTMLParser):
    """What a browser would make of the page: facts, tags with their attributes, text."""

    def __init__(self, html: str):
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.facts: dict[tuple[str, str], str] = {}
        self.texts: list[str] = []
        self.savings: dict[str, float] = {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        named = {name: value or "" for name, value in attrs}
        if "data-fact" in named:
            self.facts[named.get("data-run") or f"arm{named.get('data-arm')}", named["data-fact"]] = named["value"]
        if "data-saving" in named:
            self.savings[named["data-saving"]] = float(named["value"])

    def handle_data(self, data):
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def number(self, name: str, run: int = 0) -> int:
        return int(self.facts[str(run), name])


def made(*runs: Path, **wanted) -> Page:
    return Page(report([str(run) for run in runs], Wanted(**wanted)))


def rows_of(run: Path) -> list[dict]:
    return [row for path in sorted((run / "samples").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def mixed(count: int) -> list[Row]:
    return [
        Row(
            f"caption {place}",
            {"language": "en" if place % 3 else "vi", "url": f"https://www.host{place % 2}.example/{place}.png"},
            score=place / 10,
            broken=place % 7 == 3,
            size=(20, 16) if place % 2 else (80, 70),
        )
        for place in range(count)
    ]


def test_the_pages_numbers_are_those_of_the_tables(write_run) -> None:
    selection = [{"column": "width", "at_least": 40}, {"method": {"name": "clip_score"}, "keep": 6}]
    run = write_run("run", [mixed(20), mixed(11)], keep=6, selection=selection)
    rows, kept = rows_of(run), set(pq.read_table(run / "selection" / "selected.parquet")["address"].to_pylist())
    shown = made(run)
    ok = [row for row in rows if row["status"] == "ok"]
    assert shown.number("read") == len(rows) == 31
    assert shown.number("kept") == len(kept) == 6
    assert shown.number("cut") == len(ok) - len(kept)
    assert shown.number("dropped") == len(rows) - len(ok)
    for reason, count in Counter(row["reason"] for row in rows if row["reason"]).items():
        assert shown.number(f"reason:{reason}") == shown.number(f"stage:{reason}") == count
    for value, count in Counter(row["json.language"] for row in ok).items():
        assert shown.number(f"rows:language:{value}") == count
        of_kept = sum(row["json.language"] == value for row in ok if row["address"] in kept)
        assert shown.number(f"kept:language:{value}") == of_kept
    for place in (0, 1):
        mine = [row for row in ok if f"host{place}." in row["json.url"]]
        assert shown.number(f"rows:domain:host{place}.example") == len(mine)
    assert shown.number("rows:shorter side:64–127 px") == sum(row["height"] == 70 for row in ok)


def test_the_waterfall_is_the_runs_own_account(write_run) -> None:
    falls = [("duplicate_uid", 10, 9), ("width >= 40", 9, 5), ("clip_score", 5, 3)]
    shown = made(write_run("run", [[Row(score=place) for place in range(10)]], keep=3, waterfall=falls))
    stages = {name: shown.number(f"stage:{name}") for name in ("read", *(name for name, _, _ in falls), "kept")}
    assert stages == {"read": 10, "duplicate_uid": 1, "width >= 40": 4, "clip_score": 2, "kept": 3}


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</style></script><svg onload=alert(3)>",
    "{{ 7 * 7 }}{% raw %}",
    "user\u202egnp.exe\u2066 and on",
    "صورة لقطة حمراء على سجادة",
    "a" * 5000,
    "nul \x00 and bell \x07",
    "javascript:alert(4) https://evil.example/x.png",
]


def test_hostile_captions_fields_and_keys_are_text(write_run) -> None:
    fields = [{"language": text, "url": text, "domain": text, text[:50]: 0.5} for text in HOSTILE]
    fields[4] |= {f"{HOSTILE[4]}.cluster": "a group"}
    rows = [Row(text, named, score=1.0) for text, named in zip(HOSTILE, fields, strict=True)]
    run = write_run("run", [rows, rows], keep=len(HOSTILE), name="<script>alert(5)</script>")
    shown = made(run, group_by=["json.language"])
    assert shown.count("script") == 1  # the calculator
    assert not [name for tag, attrs in shown.tags for name in attrs if name.startswith("on")]
    assert not set("\u202e\u2066\x00\x07") & set(shown.html)
    assert all((attrs["src"] or "").startswith("data:") for tag, attrs in shown.tags if tag == "img")
    text = "".join(shown.texts)
    assert "<script>alert(1)</script>" in text and "{{ 7 * 7 }}{% raw %}" in text
    assert "صورة لقطة حمراء على سجادة" in text
    assert "a" * 400 + "…" in text and "a" * 401 not in text
    assert ("div", "auto") in [(tag, attrs.get("dir")) for tag, attrs in shown.tags]


def test_the_page_loads_nothing_and_only_its_own_script_may_run(write_run) -> None:
    shown = made(write_run("run", [mixed(9)], keep=3))
    assert shown.count("link") == shown.count("iframe") == shown.count("object") == 0
    for _, attrs in shown.tags:
        for name in LOADING & attrs.keys():
            assert (attrs[name] or "").startswith("data:image/webp;base64,"), attrs
        if "href" in attrs:
            assert (attrs["href"] or "").startswith("#")
    style = shown.html.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    policy = next(attrs["content"] for tag, attrs in shown.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    script = shown.html.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None and "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize(
    ("shards", "keep"),
    [
        pytest.param([[Row(), Row()]], 0, id="nothing kept"),
        pytest.param([[Row()]], 1, id="one sample"),
        pytest.param([[Row(broken=True)]], 0, id="all dropped"),
        pytest.param([[]], 0, id="an empty shard"),
        pytest.param([], 0, id="no shard"),
    ],
)
def test_a_run_of_nearly_nothing_has_a_report(write_run, shards, keep) -> None:
    shown = made(write_run("run", shards, keep=keep))
    assert shown.number("read") == sum(map(len, shards)) and shown.number("kept") == keep
    assert "NaN" not in shown.html and "nan" not in re.findall(r'(?:points|d|x|y|cx|cy)="([^"]*)"', shown.html)


def test_a_run_that_was_stopped_before_its_account_says_so(write_run) -> None:
    run = write_run("run", [[Row(), Row()]])
    for name in ("summary.json", "selection/selected.parquet"):
        (run / name).unlink()
    shown = made(run)
    assert shown.number("read") == 2 and "written no account yet" in shown.html
    assert not {("0", "cut"), ("0", "kept")} & shown.facts.keys()
    assert "Borderline" not in shown.html and 'class="lift"' not in shown.html and "Cut by" not in shown.html
    assert "<title>not selected yet</title>" in shown.html and "<title>cut</title>" not in shown.html


def test_a_curated_run_that_was_stopped_says_why(write_run) -> None:
    run = write_run("run", [[Row()]])
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "stopped": "SIGTERM"}))
    assert "the run was stopped before its work was done: SIGTERM" in made(run).html


@pytest.mark.parametrize("value", [1.7e18, -1e30, 3e38, 1e-40, 0.25])
def test_a_constant_of_any_size_is_drawn(write_run, value) -> None:
    shown = made(write_run("run", [[Row(str(place), {"constant": value}) for place in range(3)]], keep=1))
    chart = shown.html.partition('aria-label="histogram of json.constant"')[2].partition("</svg>")[0]
    shapes = re.findall(r'(?:points|d|x|y)="([^"]*)"', chart)
    numbers = [float(found) for shape in shapes for found in re.findall(r"-?[\d.]+|nan|inf", shape)]
    assert numbers and all(-1 <= number <= 361 for number in numbers)


def cut_labels(shown: Page, score: str) -> list[str]:
    chart = shown.html.partition(f'aria-label="histogram of {score}"')[2].partition("</svg>")[0]
    return re.findall(r'class="cut-label"[^>]*>([^<]*)', chart)


def test_every_cut_is_marked_on_the_scores_that_it_cuts(write_run) -> None:
    rows = [Row(f"{place}", {"aesthetic": place / 10}, score=place / 10) for place in range(10)]
    limits = [{"column": "json.aesthetic", "at_least": 0.25}, {"column": "json.aesthetic", "at_most": 0.8}]
    select = {"method": {"name": "clip_score"}, "keep": 3}
    shown = made(write_run("a", [rows], keep=3, selection=[*limits, select]))
    assert cut_labels(shown, "json.aesthetic") == ["at least 0.25", "at most 0.8"]
    assert cut_labels(shown, "clip_score") == ["cut 0.7"] and "Borderline" in shown.html
    then_compared = made(write_run("b", [rows], keep=3, selection=[select, {"method": {"name": "semantic_dedup"}}]))
    assert cut_labels(then_compared, "clip_score") == ["lowest kept 0.7"] and "Borderline" not in then_compared.html


def test_unsafe_pictures_are_veiled_until_clicked(write_run) -> None:
    rows = [Row(f"caption {place}", {"punsafe": place / 10}, score=1.0) for place in range(10)]
    run = write_run("run", [rows], keep=10)
    veiled = [tag for tag, attrs in made(run).tags if attrs.get("class") == "veil"]
    shown = made(run, safety={"json.punsafe": 0.95})
    assert veiled and not [tag for tag, attrs in shown.tags if attrs.get("class") == "veil"]
    assert shown.count("img") == made(run).count("img")


def test_a_page_to_pass_on_has_neither_pictures_nor_captions(write_run) -> None:
    rows = [Row(f"a private caption {place}", score=1.0) for place in range(5)]
    shown = made(write_run("run", [[*rows, Row("a broken one", broken=True)]], keep=2), with_images=False)
    assert shown.count("img") == 0 and "private caption" not in shown.html and "a broken one" not in shown.html
    assert shown.number("reason:image:unrecognized") == 1 and shown.number("kept") == 2


def test_two_runs_stand_side_by_side(write_run) -> None:
    shown = made(write_run("a", [mixed(5)], keep=1), write_run("b", [mixed(9)], keep=3))
    assert [shown.number("read", place) for place in (0, 1)] == [5, 9]
    assert [shown.number("kept", place) for place in (0, 1)] == [1, 3]


def test_a_training_run_beside_its_pool(write_run, write_training) -> None:
    pool = write_run("pool", [[Row(score=place / 10) for place in range(6)]], keep=2)
    uniform = write_training("uniform", [0.1, 0.2, 0.4, 0.4])
    jest = write_training(
        "jest", [0.2, 0.4, 0.6, 0.8], method="jest", ratio=0.5, data_run=pool, usage=[3, 0, 1, 0, 0, 0]
    )
    shown = made(pool, uniform, jest)
    assert shown.facts["arm0", "mean_r1"] == "0.8"  # the last arm's
    # uniform first comes to its last value, 0.4, after 30 rows; JEST after 20, of 40 that it loaded.
    assert shown.savings["samples_trained"] == pytest.approx(1 - 20 / 30)
    assert shown.savings["samples_loaded"] == pytest.approx(1 - 40 / 30)
    # Its cache is counted: 6 images at 100 a second.
    assert shown.savings["seconds"] == pytest.approx(1 - (4 + 0.06) / 6)
    assert "used at least once" in shown.html and "2 (33%)" in shown.html
    assert "jest (" in shown.html  # its scores stand among the pool's


def test_training_alone_and_a_failed_one_have_a_report(write_training) -> None:
    run = write_training("uniform", [0.1])
    shown = made(run)
    assert "Held-out mean_r1" in shown.html and not shown.savings
    (run / "train" / "evaluations.parquet").unlink()
    (run / "train" / "steps.parquet").unlink()
    assert "Arms" in made(run).html


def test_what_is_unfinished_of_a_training_run_is_said(write_training) -> None:
    killed, failed = write_training("killed", [0.1]), write_training("failed", [0.1, 0.2], method="jest", ratio=0.5)
    (killed / "train" / "summary.json").unlink()
    told = {"failures": ["rank 0: NaN"], "stopped": "SIGTERM", "warnings": ["9 held-out samples are in the pool"]}
    (failed / "train" / "summary.json").write_text(json.dumps({**told, "format_version": 1}))
    text = " ".join(made(killed, failed).texts)
    assert "killed: the run has written no account, after 1 of 1 steps: it is under way, or was stopped" in text
    for said in ("the run failed: rank 0: NaN", "stopped at step 2: SIGTERM", "9 held-out samples are in the pool"):
        assert f"failed: {said}" in text or f"failed: the run was {said}" in text


def test_the_rival_stands_in_the_row_of_what_is_saved(write_training, tmp_path) -> None:
    runs = [
        write_training("ua", [0.1, 0.2], data_run=tmp_path / "a"),
        write_training("ub", [0.5, 0.6], data_run=tmp_path / "b"),
        write_training("jb", [0.6, 0.7], data_run=tmp_path / "b", method="jest", ratio=0.5),
    ]
    shown = made(*runs)
    assert "against uniform, 2 steps" in "".join(shown.texts) and "ub), 1 seed" in "".join(shown.texts)
    assert shown.savings["samples_trained"] == pytest.approx(0.5)  # of 20 rows: against the other pool's, it has 0


def test_a_run_that_is_named_twice_is_one(write_run, write_training) -> None:
    run, seed = write_run("run", [mixed(5)], keep=2), write_training("seed", [0.1, 0.2])
    again = Path(f"{seed}/../seed")
    assert "2 seeds" not in made(seed, again).html
    assert made(run, run).count("article") == made(run).count("article")


def test_eight_arms_have_eight_looks_that_the_style_sheet_knows(write_training) -> None:
    shown = made(*(write_training(f"run{steps}", [0.1] * steps) for steps in range(2, 10)))
    looks = dict.fromkeys(re.findall(r'class="line (s\d+ d\d+)"', shown.html))
    assert len(looks) == 8 and set(re.findall(r'class="swatch ([^"]*)"', shown.html)) == set(looks)
    style = shown.html.partition("<style>")[2].partition("</style>")[0]
    for look in looks:
        colour, dash = look.split()
        assert f".line.{colour} " in style and f".swatch.{colour}" in style
        assert dash == "d0" or (f".line.{dash} " in style and f":is(.swatch, .key i).{dash} " in style)


def test_the_size_is_limited(write_run, monkeypatch) -> None:
    run = write_run("run", [mixed(30)], keep=9)
    whole = made(run)
    assert len(whole.html.encode()) < page.MAX_BYTES
    pictures = sum(len(attrs["src"] or "") for tag, attrs in whole.tags if tag == "img")
    with monkeypatch.context() as smaller:
        smaller.setattr(page, "IMAGE_BYTES", pictures // 2)
        less = made(run)
    assert 0 < less.count("img") < whole.count("img") and "the page is full" in less.html
    assert sum(len(attrs["src"] or "") for tag, attrs in less.tags if tag == "img") <= pictures // 2
    monkeypatch.setattr(page, "MAX_BYTES", len(whole.html.encode()) - pictures // 2)
    fitting = made(run)
    assert len(fitting.html.encode()) <= page.MAX_BYTES
    assert 0 < fitting.count("img") < whole.count("img") and "the page is full" in fitting.html
    monkeypatch.setattr(page, "MAX_BYTES", 10_000)
    with pytest.raises(ValueError, match="more than 10,000: report fewer runs at a time, or --no-images"):
        made(run)


def test_money_comes_from_the_price_file_and_is_left_out_without_one(write_run, tmp_path) -> None:
    run = write_run("run", [mixed(5)], keep=1)
    assert ">EUR<" not in made(run).html
    shown = made(run, prices=Prices(currency="CHF", cpu_core_hour=3600.0), has_prices=True)
    # One shard kept its actor busy for 1 + 2.5 + 0.5 s, at 1 CHF a second.
    assert ">CHF<" in shown.html and ">4<" in shown.html


def test_a_rerun_that_embeds_nothing_still_has_rates_and_estimates(write_run) -> None:
    run = write_run("run", [mixed(7)], compute={"actors": 1})
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"images_per_second": {}, "shards": {"committed": 1, "embedded_now": 0}}
    (run / "summary.json").write_text(json.dumps(summary))
    shown = made(run)
    assert "by the shards' records" in "".join(shown.texts) and "The same on other pools" in shown.html
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["recipe"]["compute"]["actors"] = None
    (run / "recipe.json").write_text(json.dumps(recipe))
    assert "how many there were was not noted" in made(run).html and "The same on other pools" in made(run).html


def test_energy_says_whether_it_was_measured(write_run) -> None:
    rows = [[Row(), Row()]]
    assert ">estimate<" in made(write_run("cpu", rows)).html
    measured = made(write_run("gpu", rows, device="cuda", joules=[7200.0], selection=[]))
    assert "2 Wh" in measured.html and ">measured<" in measured.html and "at the measured rate" in measured.html


def test_scores_are_correlated_by_rank(write_run) -> None:
    """Of four rows the second score turns the order of the first but for one pair: Spearman's -0.8."""
    scores = [(1, 40), (2, 30), (3, 10), (4, 20)]
    run = write_run("run", [[Row(score=a, fields={"quality": float(b)}) for a, b in scores]])
    matrix = made(run).html.partition('<table class="matrix">')[2].partition("</table>")[0]
    assert re.findall(r">(−?\d\.\d\d)<", matrix) == ["1.00", "−0.80", "−0.80", "1.00"]


@pytest.mark.parametrize(
    ("kwh", "said"), [(0.856, "856 Wh"), (0.9996, "1k Wh"), (0.00017, "0.17 Wh"), (2.5, "2.5 kWh"), (4e4, "40 MWh")]
)
def test_energies_are_short(kwh, said) -> None:
    assert page.energy(kwh) == said


def test_what_rounds_to_nothing_has_no_sign() -> None:
    assert page.signed(-0.001) == "0.00" and page.signed(-0.126) == "−0.13"


def test_text_stays_in_its_place() -> None:
    assert plain("a\u202eb\x1bc\nd") == "a\ufffdb\ufffdc\nd"
    assert plain("x" * 10, 4) == "xxxx…"
    assert plain("\u200fא\u0301") == "\u200fא\u0301"


def test_the_command_writes_the_page_into_the_run(write_run, tmp_path, capsys) -> None:
    run = write_run("run", [mixed(5)], keep=1)
    assert job.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert Page((run / "report.html").read_text()).number("read") == 5
    assert job.main([str(tmp_path)]) == 2
    assert "is no run's folder" in capsys.readouterr().err
    assert job.main([str(run / "summary.json")]) == 2
    assert "summary.json is no run's folder" in capsys.readouterr().err
    assert job.main([str(run), "--output", str(run / "summary.json" / "page.html")]) == 2
    assert "summary.json" in capsys.readouterr().err
    assert job.main([str(run), "--safety-column", "json.typo"]) == 2
    assert "no table of" in capsys.readouterr().err
    assert job.main([str(run), "--by", "json.colour"]) == 2
    assert "no table has such a column" in capsys.readouterr().err
    (tmp_path / "prices.json").write_text(json.dumps({"gpu_hour": -1}))
    assert job.main([str(run), "--prices", str(tmp_path / "prices.json")]) == 2
    assert "is no price file" in capsys.readouterr().err


def test_a_thumbnail_is_never_the_pools_own_bytes(write_run) -> None:
    shown = made(write_run("run", [mixed(3)], keep=3))
    data = [base64.b64decode((attrs["src"] or "").partition(",")[2]) for tag, attrs in shown.tags if tag == "img"]
    assert data and all(each[:4] == b"RIFF" and each[8:12] == b"WEBP" for each in data)
    assert thumbnails.SIDE < 200
