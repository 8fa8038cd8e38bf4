"""`python -m jobs.benchmark NAME`: speed claims as ratios against a named rival, measured in one run on one machine.

    embed   jobs.curate against a hand-written loop; peak memory of a larger pool

`--tiny` runs the smallest size, which proves the command and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jobs.benchmarks import embed


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m jobs.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=["embed"])
    parser.add_argument("--shards", help="a pool to measure on; a demo pool is made if none is named")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs of runs (7)")
    parser.add_argument("--tiny", action="store_true", help="the smallest size")
    parser.add_argument("--json", type=Path, help="write the raw figures there")
    known = parser.parse_args(arguments)
    figures = embed.benchmark(shards=known.shards, pairs=1 if known.tiny else known.pairs, tiny=known.tiny)
    if known.json:
        known.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
