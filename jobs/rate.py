"""`python -m jobs.rate STUDY`: a page on which people choose the better of two images, and what their votes came to.

    STUDY                 serve the study on this machine, until Ctrl-C
    results STUDY         win rates, strengths, agreement, votes still needed
    export STUDY          every vote as a parquet file

STUDY is a folder with a folder of images for each model, or what `jobs.evaluate diffusion` wrote. (One that is called
`results` or `export`: ./results.) Votes go into STUDY/votes.sqlite, each of them on disk before the next pair is shown;
the server may be stopped, or killed, and started again at any time.

Exit code 0: done, or stopped by Ctrl-C. 1: the address cannot be listened on. 2: STUDY is none, or an option does not
fit, or the extra `rate` is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from curation.data import storage
from curation.evaluation.pairwise import DETECT, votes_needed
from curation.rating import votes
from curation.rating.access import RATER, RESULTS, Access, is_loopback, kept_tokens
from curation.rating.database import NAME
from curation.rating.results_page import lines
from curation.rating.schedule import OVERLAP_PERCENT
from curation.rating.study import Study, open_study
from jobs.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_USAGE

PORT = 8765
EXTRA = "the rating page needs FastAPI and uvicorn: pip install 'curation[rate]'"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    job = COMMANDS.get(arguments[0]) if arguments else None
    try:
        return job(arguments[1:]) if job else _serve(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED


def _serve(arguments: list[str]) -> int:
    parser = _parser("")
    parser.add_argument("--question", help="what raters are asked (which image looks better)")
    parser.add_argument(
        "--goal", type=int, metavar="N", help="decisive votes for each pair of models (what --detect needs)"
    )
    parser.add_argument("--overlap", type=int, default=OVERLAP_PERCENT, help="percent of matchups that two raters see")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; beyond loopback a token is wanted")
    parser.add_argument("--port", type=int, default=PORT, help=f"({PORT}); 0 takes a free one")
    parser.add_argument("--with-token", action="store_true", help="want a token on loopback too")
    known = parser.parse_args(arguments)
    if not 0 <= known.overlap <= 100:
        raise ValueError(f"--overlap must be a percentage, got {known.overlap}")
    goal = votes_needed(known.detect) if known.goal is None else known.goal
    if goal < 1:
        raise ValueError(f"--goal must be at least 1, got {goal}")
    study, file = open_study(known.study), _votes_file(known)
    try:
        import uvicorn

        from curation.rating.server import make_app
    except ImportError as error:
        raise ValueError(f"{EXTRA} ({error})") from error
    from curation.rating.desk import Desk
    from curation.rating.store import Store

    wants_token = known.with_token or not is_loopback(known.host)
    access = Access(kept_tokens(file.with_name(file.name + ".tokens")) if wants_token else None)
    store = Store(file, study, goal=goal, question=known.question, overlap_percent=known.overlap)
    app = make_app(Desk(study, store), access=access, votes_file=file, detect=known.detect)
    # Bound here, so that an address that is taken is an error of ours, and port 0 is known before it is printed.
    with socket.create_server((known.host, known.port), family=_family(known.host)) as listening:
        _say(study, file, access, known.host, listening.getsockname()[1])
        # No log of requests: it would be a list of who voted when.
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
    store.close()
    return EXIT_OK


def _results(arguments: list[str]) -> int:
    parser = _parser(" results")
    parser.add_argument("--json", metavar="FILE", help="where the figures go as JSON")
    known = parser.parse_args(arguments)
    found = votes.results(_votes_file(known), detect=known.detect)
    for line in lines(found):
        print(line)
    if known.json:
        storage.write_bytes(known.json, (json.dumps(votes.plain(found), indent=1) + "\n").encode())
    return EXIT_OK


def _export(arguments: list[str]) -> int:
    parser = _parser(" export")
    parser.add_argument("--output", metavar="FILE", help="(STUDY/votes.parquet)")
    parser.add_argument("--with-names", action="store_true", help="the names that raters gave; else numbers alone")
    known = parser.parse_args(arguments)
    output = known.output or str(Path(known.study) / "votes.parquet")
    count = votes.export(_votes_file(known), output, with_names=known.with_names)
    print(f"{count} votes: {output}")
    return EXIT_OK


COMMANDS: dict[str, Callable[[list[str]], int]] = {"results": _results, "export": _export}


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"python -m jobs.rate{name}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", metavar="STUDY", help="folder of image folders, or of a diffusion study")
    parser.add_argument("--votes", metavar="FILE", help=f"the file of votes (STUDY/{NAME})")
    parser.add_argument(
        "--detect", type=float, default=DETECT, help=f"true win rate that is to be told from a half ({DETECT})"
    )
    return parser


def _votes_file(known: argparse.Namespace) -> Path:
    votes_needed(known.detect)  # says what is wrong with it, before anything is opened
    return Path(known.votes) if known.votes else Path(known.study) / NAME


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _say(study: Study, file: Path, access: Access, host: str, port: int) -> None:
    """What is served, and the links to it; flushed, for whoever reads them from a pipe."""
    for reason, count in study.left_out.items():
        print(f"WARNING: left out: {count} x {reason}")
    told = ", ".join(f"{name} ({len(items):,} images)" for name, items in study.models.items())
    print(f"{told}; votes go into {file}")
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    root = f"http://{name}:{port}"
    for role, path, whom in ((RATER, "/", "raters"), (RESULTS, "/results", "you alone, the results")):
        token = f"#{access.tokens[role]}" if access.tokens else ""
        print(f"for {whom}: {root}{path}{token}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
