"""`python -m jobs.report RUN [RUN ...]`: one HTML file of what runs of `jobs.curate` and `jobs.train` came to.

Several curated runs stand side by side; training runs that differ in their seeds only become one curve with its
interval. Everything is read from the runs' folders, and pictures from the pool by offset; the file needs no network.

Exit code 0: it is written. 2: a folder holds no run or cannot be read, or an option does not fit.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from curation.data import storage
from curation.report.costs import Prices, read_prices
from curation.report.page import SAFETY, Wanted, report
from jobs.command import EXIT_OK, EXIT_USAGE

NAME = "report.html"
DEFAULT_SAFETY_COLUMN = next(iter(SAFETY))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        "python -m jobs.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder or URL of a run")
    parser.add_argument("--output", help=f"where the page goes (RUN/{NAME} of the first run)")
    parser.add_argument("--no-images", action="store_true", help="neither pictures nor captions: a page to pass on")
    parser.add_argument(
        "--prices", metavar="FILE", help="JSON: currency, gpu_hour, cpu_core_hour, gpu_watts, cpu_core_watts"
    )
    parser.add_argument(
        "--safety-column", help=f"pictures that are above --safety there are veiled ({DEFAULT_SAFETY_COLUMN}, if there)"
    )
    parser.add_argument("--safety", type=float, default=next(iter(SAFETY.values())), help="(0.5)")
    parser.add_argument("--by", action="append", default=[], metavar="COLUMN", help="a further column to group by")
    known = parser.parse_args(arguments)
    try:
        wanted = Wanted(
            prices=read_prices(known.prices) if known.prices else Prices(),
            has_prices=known.prices is not None,
            with_images=not known.no_images,
            safety={known.safety_column or DEFAULT_SAFETY_COLUMN: known.safety},
            must_have_safety=known.safety_column is not None,
            group_by=known.by,
            command=shlex.join(["python", "-m", "jobs.report", *arguments]),
        )
        print(write_report(known.runs, wanted, output=known.output))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return EXIT_OK


def write_report(runs: list[str], wanted: Wanted, *, output: str | None = None) -> str:
    """Write the page, and return where it is. ValueError as `page.report` has it."""
    url = output or storage.join(storage.absolute(runs[0]), NAME)
    storage.write_bytes(url, report(runs, wanted).encode())
    return url


if __name__ == "__main__":
    sys.exit(main())
