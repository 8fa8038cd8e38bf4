"""`python -m jobs.evaluate correlation SEED [SEED ...]`: do the scores of a pool's samples agree? (study X-1)

A SEED is RUN, or RUN+TRAINING+...: a run of `jobs.curate` with its scores, and runs of `jobs.train` on it, whose
ledgers hold what their methods scored last. Prints Spearman's rank correlation of every pair, the mean over the seeds
with its 95% t interval, and writes it as JSON.

Exit code 0: it is done. 1: a file cannot be read or written. 2: a seed is none or names a run of another, or there are
not two scores that all of them have.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from curation.data import storage
from curation.report.agreement import Agreement, agreement
from jobs.benchmarks.pairs import provenance
from jobs.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_USAGE


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m jobs.evaluate correlation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seeds", nargs="+", metavar="SEED", help="RUN, or RUN+TRAINING+TRAINING")
    parser.add_argument(
        "--scores", nargs="+", default=[], metavar="NAME", help="compare these; all that every seed has without it"
    )
    parser.add_argument(
        "--typicality", metavar="COLUMN", help="one more score: how typical a row is among these vectors (TypiClust)"
    )
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    known = parser.parse_args(arguments)
    try:
        found = agreement(known.seeds, only=known.scores, typicality=known.typicality)
        for line in lines(found):
            print(line)
        if known.json:
            storage.write_bytes(known.json, (json.dumps(figures(found), indent=1, allow_nan=False) + "\n").encode())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def lines(found: Agreement) -> list[str]:
    """Every pair with its correlation, the strongest first."""
    size = len(found.scores)
    pairs = [
        (cell, found.scores[i], found.scores[j])
        for i in range(size)
        for j in range(i + 1, size)
        if (cell := found.pairs[i][j])
    ]
    said = [f"Spearman's rank correlation over {len(found.matrices)} seeds, 95% t intervals"]
    for cell, one, other in sorted(pairs, key=lambda pair: -abs(pair[0].mean)):
        half = "" if cell.half_width is None else f" ± {cell.half_width:.3f}"
        said.append(f"  {cell.mean:+.3f}{half:<10}  {one} and {other}")
    constant = [name for place, name in enumerate(found.scores) if found.pairs[place][place] is None]
    told = {
        "no correlation, constant or without values in a seed": constant,
        "not in every seed": found.left_out,
        f"{len(found.unread)} more scores were not looked at, name them with --scores": found.unread,
    }
    return said + [f"{what}: {', '.join(names)}" for what, names in told.items() if names]


def figures(found: Agreement) -> dict[str, Any]:
    """What the JSON holds; null where there is no correlation."""
    return {
        **provenance(),
        "study": "correlation",
        "scores": found.scores,
        "seeds": len(found.matrices),
        "spearman": [[cell and cell._asdict() for cell in row] for row in found.pairs],
        "by_seed": [
            [[round(value, 6) if math.isfinite(value) else None for value in row] for row in matrix.tolist()]
            for matrix in found.matrices
        ],
        "left_out": found.left_out,
        "unread": found.unread,
    }


if __name__ == "__main__":
    sys.exit(main())
