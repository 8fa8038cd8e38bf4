"""`python -m jobs.benchmark select`: JEST's selection, matrix-free, against Algorithm 1 on dense matrices.

Both select from the same embeddings with the same noise, each run in a process of its own with one thread, so that peak
memory is its own. The embeddings are made as a learner's and a reference's are late in training: pairs that point the
same way, in clusters, some of them mismatched. How long scoring takes beside it is extrapolated from a few rows through
a ViT-B/16 with random weights on the same thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from curation.methods.jest import Jest
from curation.models.clip import build_network, load_tokenizer
from curation.numerics.sampling import gumbel_top_k
from curation.selector import Rows
from jobs.benchmarks.pairs import interleaved, paired_ratio, provenance

SUPER_BATCH, SUB_BATCH, DIM, CHUNKS = 20_480, 4_096, 512, 16
SCORED_ROWS, SCORER = 256, "ViT-B-16"
TARGET_MEMORY, TARGET_OVERHEAD = 0.1, 0.02


def benchmark(*, pairs: int, tiny: bool) -> dict[str, Any]:
    """All figures of this benchmark."""
    sizes = (640, 128, 32) if tiny else (SUPER_BATCH, SUB_BATCH, DIM)
    told: dict[str, list[dict[str, Any]]] = {"ours": [], "dense": []}

    def run(side: str) -> float:
        told[side].append(_answer(side, sizes))
        return told[side][-1]["seconds"]

    speed = paired_ratio([(d, o) for o, d in interleaved(lambda: run("ours"), lambda: run("dense"), pairs=pairs)])
    # A tiny selection may not raise the peak at all: a page is the least that can be told.
    memory = told["ours"][0]["peak_mib"] / max(told["dense"][0]["peak_mib"], 4 / 1024)
    same = len(set(told["ours"][0]["chosen"]) & set(told["dense"][0]["chosen"])) / sizes[1]
    scoring = _answer("scoring", (sizes[0], 8 if tiny else SCORED_ROWS, 0))["seconds"]
    overhead = sorted(side["seconds"] for side in told["ours"])[pairs // 2] / scoring
    print(f"selection at B={sizes[0]:,}, b={sizes[1]:,}, d={sizes[2]}, {CHUNKS} chunks, one thread")
    print(f"seconds, dense / ours: {speed}")
    print(f"extra peak memory, ours / dense: {memory:.3f} (target {TARGET_MEMORY})")
    print(f"rows that both chose, with the same noise: {same:.4%}")
    print(f"selection / scoring with {SCORER} (extrapolated): {overhead:.3%} (target {TARGET_OVERHEAD:.0%})")
    for side in told.values():
        for run_of_side in side:
            del run_of_side["chosen"]
    return {
        **provenance(),
        "benchmark": "select",
        "sizes": dict(zip(("super_batch", "sub_batch", "dim"), sizes, strict=True)),
        "speedup": speed._asdict(),
        "memory_ratio": memory,
        "same_rows": same,
        "scoring_seconds": scoring,
        "overhead": overhead,
        **told,
    }


def _answer(side: str, sizes: tuple[int, int, int]) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.benchmarks.select", side, *map(str, sizes)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _rows(num_rows: int, dim: int) -> Rows:
    """Embeddings of a learner and a reference: clusters, pairs that agree, and a fifth that do not."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(64, dim, generator=generator)
    cluster = torch.randint(64, (num_rows,), generator=generator)
    own = torch.randn(num_rows, dim, generator=generator)
    other = own[torch.randperm(num_rows, generator=generator)]
    mismatched = torch.rand(num_rows, generator=generator) < 0.2
    rows: Rows = {}
    for prefix, noise in (("", 1.0), ("reference_", 0.5)):
        for side in ("image", "text"):
            shown = torch.where(mismatched[:, None], other, own) if side == "text" else own
            drawn = centres[cluster] + shown + noise * torch.randn(num_rows, dim, generator=generator)
            rows[f"{prefix}{side}_embedding"] = F.normalize(drawn, dim=1)
    values = {"logit_scale": 30.0, "logit_bias": -12.0, "reference_logit_scale": 50.0, "reference_logit_bias": -20.0}
    return {**rows, **{name: torch.tensor(value) for name, value in values.items()}}


def _dense(rows: Rows, keep: int, rng: torch.Generator) -> Tensor:
    """Algorithm 1 as the paper has it: the whole score matrix, then chunk after chunk."""
    scores_BB = _losses(rows, "") - _losses(rows, "reference_")
    chosen = torch.zeros(len(scores_BB), dtype=torch.bool)
    drawn: list[Tensor] = []
    for _ in range(CHUNKS):
        logits = scores_BB.diagonal() + scores_BB[chosen].sum(dim=0) + scores_BB[:, chosen].sum(dim=1)
        drawn.append(gumbel_top_k(logits.masked_fill(chosen, -torch.inf), keep // CHUNKS, rng))
        chosen[drawn[-1]] = True
    return torch.cat(drawn)


def _losses(rows: Rows, prefix: str) -> Tensor:
    image, text = rows[f"{prefix}image_embedding"], rows[f"{prefix}text_embedding"]
    logits_BB = rows[f"{prefix}logit_scale"] * (image @ text.T) + rows[f"{prefix}logit_bias"]
    logits_BB.diagonal().neg_()
    return F.softplus(logits_BB)


def _score(num_rows: int, measured: int) -> float:
    """Seconds to embed `num_rows` rows with SCORER, from `measured` of them."""
    network, tokenize = build_network(SCORER).eval(), load_tokenizer(SCORER)
    pixels = torch.zeros(measured, 224, 224, 3, dtype=torch.uint8)
    tokens = tokenize(["a photo of a dog on a beach"] * measured)
    with torch.inference_mode():
        network(pixels[:4], tokens[:4])
        begun = time.perf_counter()
        for at in range(0, measured, 32):
            network(pixels[at : at + 32], tokens[at : at + 32])
    return (time.perf_counter() - begun) * num_rows / measured


def _memory_mib(field: str) -> float:
    """VmRSS, what is held now, or VmHWM, the most since the mark was last taken back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def main(side: str, first: int, second: int, dim: int) -> None:
    """One side's run, told as JSON."""
    torch.set_num_threads(1)
    if side == "scoring":
        print(json.dumps({"seconds": _score(first, second)}))
        return
    rows = _rows(first, dim)
    # Making the embeddings held more than a selection needs, so the high-water mark is taken back first.
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = _memory_mib("VmRSS"), time.perf_counter()
    rng = torch.Generator().manual_seed(1)
    chosen = (
        Jest(num_chunks=CHUNKS).select(rows, second, 0.5, rng).indices if side == "ours" else _dense(rows, second, rng)
    )
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "peak_mib": _memory_mib("VmHWM") - before, "chosen": chosen.tolist()}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
