"""The pages over HTTP: what a browser may ask, and what every answer forbids it.

Images go by the pair they are shown in, never by their file: /image/TOKEN/left. Nothing is cached, no answer bears a
date or a tag of a file, and all that is not in `static/` is made here. The policy lets the page run its own script,
load from here, and nothing else; there is no inline script or style.
"""

# No `from __future__ import annotations`: FastAPI could not resolve the types that `make_app` defines for itself.
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from jinja2 import Environment, FunctionLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from curation.data.images import ImageError
from curation.rating import votes
from curation.rating.access import RATER, RESULTS, Access, cookie_name
from curation.rating.desk import Desk
from curation.rating.results_page import shown
from curation.rating.store import Answer, Conflict

STATIC = files("curation.rating") / "static"
ASSETS = {
    "page.css": "text/css",
    "rate.js": "text/javascript",
    "gate.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
MAX_BODY_BYTES = 16 << 10
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Robots-Tag": "noindex",
}


class Body(BaseModel):
    """What a page sends: a name that is not known is an error."""

    model_config = ConfigDict(extra="forbid")


class Key(Body):
    token: str = Field(max_length=200)


class Name(Body):
    name: str = Field(max_length=200)


class Cast(Body):
    pair: str = Field(max_length=64)
    answer: Answer
    key: str = Field(min_length=16, max_length=64)
    seconds: float | None = Field(default=None, ge=0, le=1e6, allow_inf_nan=False)


class Taken(Body):
    vote: str = Field(max_length=64)


def make_app(desk: Desk, *, access: Access, votes_file: Path, detect: float) -> FastAPI:
    """The application; it holds no state that a restart would lose."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    pages = Environment(
        loader=FunctionLoader(lambda name: (STATIC / name).read_text()), autoescape=True, undefined=StrictUndefined
    )

    def rater_of(request: Request, x_rater: Annotated[str, Header(max_length=64)] = "") -> int:
        _wanted(RATER, request)
        try:
            return desk.store.rater(x_rater)
        except KeyError:
            raise HTTPException(404, "say who you are") from None

    def _wanted(role: str, request: Request) -> None:
        if not access.may(role, request.cookies):
            raise HTTPException(401, "a token is wanted")

    def page(name: str, role: str, request: Request, told: Callable[[], dict[str, Any]]) -> Response:
        """A page, or the gate if no token has been given."""
        if not access.may(role, request.cookies):
            return Response(pages.get_template("gate.html").render(role=role), 401, media_type="text/html")
        return Response(pages.get_template(name).render(told()), media_type="text/html")

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        length = request.headers.get("content-length", "0" if request.method == "GET" else "")
        if why := access.refusal(request.method, host=host, origin=origin):
            response = Response(why, 403)
        elif not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            response = Response("too long, or of no known length", 413)
        else:
            response = await answer(request)
        response.headers.update(HEADERS)
        return response

    @app.get("/")
    def rate(request: Request) -> Response:
        return page("rate.html", RATER, request, lambda: {"question": desk.store.question})

    @app.get("/results")
    def results(request: Request) -> Response:
        def told() -> dict[str, Any]:
            return {"question": desk.store.question, **shown(votes.results(votes_file, detect=detect))}

        return page("results.html", RESULTS, request, told)

    @app.get("/static/{name}")
    def asset(name: str) -> Response:
        if name not in ASSETS:
            raise HTTPException(404)
        return Response((STATIC / name).read_bytes(), media_type=ASSETS[name])

    @app.post("/api/enter")
    def enter(key: Key) -> Response:
        role = access.role_of(key.token)
        if role is None:
            raise HTTPException(403, "this is not the token")
        response = Response(status_code=204)
        response.set_cookie(cookie_name(role), key.token, max_age=30 * 86400, httponly=True, samesite="strict")
        return response

    @app.post("/api/rater")
    def introduce(name: Name, request: Request) -> dict[str, str]:
        _wanted(RATER, request)
        try:
            return {"rater": desk.store.enter(name.name)}
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    @app.get("/api/queue")
    def queue(rater: Annotated[int, Depends(rater_of)]) -> dict[str, Any]:
        return desk.state(rater, desk.top_up(rater))

    @app.post("/api/vote")
    def vote(cast: Cast, rater: Annotated[int, Depends(rater_of)]) -> dict[str, Any]:
        return moved(rater, lambda: desk.store.vote(rater, cast.pair, cast.answer, key=cast.key, seconds=cast.seconds))

    @app.post("/api/undo")
    def undo(taken: Taken, rater: Annotated[int, Depends(rater_of)]) -> dict[str, Any]:
        return moved(rater, lambda: desk.store.undo(rater, taken.vote))

    def moved(rater: int, step: Callable[[], None]) -> dict[str, Any]:
        """What is left after a step. New pairs come with the next queue: making them would keep the rater waiting."""
        try:
            step()
        except Conflict as conflict:
            raise HTTPException(409, str(conflict)) from None
        return desk.state(rater, desk.store.open_assignments(rater))

    @app.get("/image/{token}/{side}")
    def image(token: str, side: str, request: Request) -> Response:
        _wanted(RATER, request)
        try:
            return Response(desk.image(desk.store.image_of(token, side)), media_type="image/png")
        except (KeyError, ImageError):
            raise HTTPException(404, "no such image") from None

    return app
