from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from curation.rating.access import RATER, RESULTS, Access
from curation.rating.database import NAME
from curation.rating.desk import AHEAD, Desk
from curation.rating.server import make_app
from curation.rating.store import Store
from curation.rating.study import open_study
from tests.rating.conftest import COLOURS, colour_of

TOKENS = {RATER: "for-raters", RESULTS: "for-results"}
HOSTILE = "<script>alert(1)</script>"
Open = Callable[..., TestClient]


@pytest.fixture
def open_page(folder: Path, make_store: Callable[..., Store]) -> Open:
    """A client of the study's pages."""

    def opened(*, tokens: dict[str, str] | None = None, **options: Any) -> TestClient:
        desk = Desk(open_study(str(folder)), make_store(**options))
        app = make_app(desk, access=Access(tokens), votes_file=folder / NAME, detect=0.6)
        return TestClient(app, base_url="http://localhost:8765")

    return opened


def enter(page: TestClient, name: str = "Ann") -> dict[str, str]:
    """The header of a rater."""
    return {"X-Rater": page.post("/api/rater", json={"name": name}).json()["rater"]}


def cast(page: TestClient, rater: dict[str, str], pair: str, answer: str = "left", key: str = "") -> Any:
    return page.post("/api/vote", headers=rater, json={"pair": pair, "answer": answer, "key": key or f"key-{pair}"})


def test_a_rater_votes_undoes_and_goes_on(open_page: Open) -> None:
    page = open_page()
    rater = enter(page)
    state = page.get("/api/queue", headers=rater).json()
    assert len(state["queue"]) == AHEAD and state["votes"] == 0 and state["undo"] is None
    first = state["queue"][0]["id"]
    after = cast(page, rater, first).json()
    assert [pair["id"] for pair in after["queue"]] == [pair["id"] for pair in state["queue"][1:]]
    assert after["votes"] == 1 and after["gained"] == 1
    assert cast(page, rater, first).json() == after  # sent again
    assert cast(page, rater, first, "right", key="x" * 20).status_code == 409
    back = page.post("/api/undo", headers=rater, json={"vote": after["undo"]}).json()
    assert back["queue"][0]["id"] == first and back["votes"] == 0


def test_images_are_the_pairs_two_models_and_no_address_tells_which(open_page: Open, folder: Path) -> None:
    page = open_page()
    rater = enter(page)
    for pair in page.get("/api/queue", headers=rater).json()["queue"]:
        answers = [page.get(pair[side]) for side in ("left", "right")]
        assert len({colour_of(answer.content) for answer in answers}) == 2
        for answer in answers:
            told = " ".join([str(answer.url), *(f"{name}: {value}" for name, value in answer.headers.items())])
            assert not any(word in told for word in (*COLOURS, ".png", "etag", "last-modified"))
            assert len(answer.content) & (len(answer.content) - 1) == 0
    told = page.get("/").text + page.get("/api/queue", headers=rater).text
    assert not re.search(rf"\b({'|'.join(COLOURS)}|png)\b", told)


def test_nothing_but_the_pairs_images_is_served(open_page: Open, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    page = open_page()
    pair = page.get("/api/queue", headers=enter(page)).json()["queue"][0]
    for path in (
        *("/image/red/0.png", "/red/0.png", "/static/../server.py", "/static/%2e%2e/server.py", "/static/rate.html"),
        *("/image/..%2f..%2fsecret.png/left", "/%2e%2e/secret.png", "/votes.sqlite", "/docs", "/openapi.json"),
        *(f"/image/{pair['id']}/both", f"/image/{pair['id']}/..%2f..%2fvotes.sqlite"),
    ):
        answer = page.get(path)
        assert answer.status_code == 404 and b"secret" not in answer.content, path


def test_an_image_that_turns_into_a_link_out_is_not_served_and_its_pair_is_replaced(
    open_page: Open, folder: Path, tmp_path: Path
) -> None:
    page = open_page()  # listed now, while all are images
    Image.new("RGB", (24, 24), (255, 255, 0)).save(tmp_path / "secret.png")
    for image in (folder / "red").iterdir():
        image.unlink()
        image.symlink_to(tmp_path / "secret.png")
    queue = page.get("/api/queue", headers=enter(page)).json()["queue"]
    shown = {colour_of(page.get(pair[side]).content) for pair in queue for side in ("left", "right")}
    assert len(queue) == AHEAD and shown == {"green", "blue"}


def test_every_answer_forbids_scripts_of_others(open_page: Open) -> None:
    page = open_page()
    for path in ("/", "/results", "/static/rate.js", "/api/queue", "/nothing"):
        headers = page.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
    for path in ("/", "/results"):
        text = page.get(path).text
        assert " style=" not in text and "<style" not in text and " onclick" not in text
        assert text.count("<script") == text.count('<script src="/static/')


def test_hostile_names_captions_and_questions_are_text(folder: Path, open_page: Open) -> None:
    (folder / "red").rename(folder / "<img src=x onerror=alert(1)>")
    (folder / "green" / "0.txt").write_text(HOSTILE)
    page = open_page(question=HOSTILE)
    rater = enter(page, HOSTILE)
    for path in ("/", "/results"):
        text = page.get(path).text
        assert "<script>alert" not in text and "&lt;script&gt;alert" in text and "<img src=x" not in text
    queue = page.get("/api/queue", headers=rater)
    assert queue.headers["content-type"] == "application/json"


def test_without_the_token_nothing_is_told_and_the_raters_token_opens_no_results(open_page: Open) -> None:
    page = open_page(tokens=TOKENS)
    for path in ("/", "/results", "/api/queue", "/image/x/left"):
        answer = page.get(path)
        assert answer.status_code == 401 and "Which?" not in answer.text
    assert page.post("/api/rater", json={"name": "Ann"}).status_code == 401
    assert page.post("/api/enter", json={"token": "guess"}).status_code == 403
    entered = page.post("/api/enter", json={"token": "for-raters"})
    cookie = entered.headers["set-cookie"].lower()
    assert entered.status_code == 204 and "httponly" in cookie and "samesite=strict" in cookie
    assert page.get("/").status_code == 200 and page.get("/results").status_code == 401
    page.post("/api/enter", json={"token": "for-results"})
    assert page.get("/results").status_code == 200


def test_pages_of_other_places_and_long_bodies_are_refused(open_page: Open) -> None:
    page = open_page()
    assert page.get("/", headers={"Host": "evil.example"}).status_code == 403
    evil = {"Origin": "http://evil.example"}
    assert page.post("/api/rater", json={"name": "Ann"}, headers=evil).status_code == 403
    assert page.post("/api/rater", json={"name": "x" * 100_000}).status_code == 413
    assert page.post("/api/rater", content=iter([b'{"name": "Ann"}'])).status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        {"pair": "x", "answer": "both", "key": "k" * 16},
        {"pair": "x", "answer": "left", "key": "short"},
        {"pair": "x", "answer": "left", "key": "k" * 16, "seconds": -1},
        {"pair": "x", "answer": "left", "key": "k" * 16, "model": "red"},
        {"answer": "left", "key": "k" * 16},
    ],
)
def test_what_is_no_vote_is_refused(open_page: Open, body: dict[str, Any]) -> None:
    page = open_page()
    assert page.post("/api/vote", headers=enter(page), json=body).status_code == 422


def test_who_is_not_known_is_asked_and_what_is_no_name_is_told(open_page: Open) -> None:
    page = open_page()
    assert page.get("/api/queue", headers={"X-Rater": "nobody's"}).status_code == 404
    answer = page.post("/api/rater", json={"name": " "})
    assert answer.status_code == 422 and "1 to 60 characters" in answer.json()["detail"]


def test_broken_images_are_passed_over_and_none_is_shown_twice_as_whole(folder: Path, open_page: Open) -> None:
    for place in range(5):
        (folder / "red" / f"{place}.png").write_bytes(b"no image")
    page = open_page()
    rater = enter(page)
    shown = set()
    for _ in range(12):
        for pair in page.get("/api/queue", headers=rater).json()["queue"]:
            answers = [page.get(pair[side]) for side in ("left", "right")]
            assert [answer.status_code for answer in answers] == [200, 200]
            shown |= {colour_of(answer.content) for answer in answers}
            cast(page, rater, pair["id"])
    assert shown == set(COLOURS)


def test_a_model_whose_every_image_is_broken_leaves_the_others(folder: Path, open_page: Open) -> None:
    for image in (folder / "red").iterdir():
        image.write_bytes(b"no image")
    page = open_page(goal=3)
    rater = enter(page)
    queue = page.get("/api/queue", headers=rater).json()["queue"]
    shown = {colour_of(page.get(pair[side]).content) for pair in queue for side in ("left", "right")}
    assert shown == {"green", "blue"}


def test_the_results_page_has_every_pair_and_figure(open_page: Open) -> None:
    page = open_page()
    for name in ("Ann", "Bob"):
        rater = enter(page, name)
        for _ in range(5):
            for pair in page.get("/api/queue", headers=rater).json()["queue"]:
                cast(page, rater, pair["id"])
    text = page.get("/results").text
    for told in ("30 votes of 2 raters", "green", "Wilson [", "over raters [", "still needed", "Krippendorff", "Elo"):
        assert told in text
    assert text.count('<section class="card">') == 3
