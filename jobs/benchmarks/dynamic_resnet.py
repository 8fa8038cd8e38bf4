"""`python -m jobs.benchmark dynamic_resnet`: claim D-8, ResNet-18 on CIFAR-10 at keep 70% and 30%, on a GPU.

The recipe is that of InfoBatch's code, which the paper's figures go back to: SGD with momentum 0.9 and weight decay
5e-4, one-cycle to 0.05 over all steps, batches of 128, label smoothing 0.1, crops from 4 reflected pixels around,
mirrored by chance; the last epoch counts. Full data takes 200 epochs; an arm takes as many rounds of its share, so at
0.7 at most 1.43 times fewer sample-gradients. The images are JPEG copies, so the paper's 96.1 is out of reach for all
arms alike. Seconds are those of training, with choosing; what was done beforehand stands beside them.

`--tiny` proves the command on a CPU, on images of 8 pixels; anything else refuses to begin without a GPU.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from curation.models.cifar_resnet import normalise
from curation.models.frozen import load_frozen
from curation.training.schedules import rate_factor
from jobs.benchmarks.dynamic_runs import BATCH, Arm, ArmRun, Pool
from jobs.benchmarks.dynamic_sets import Found, Rows, factors_of, projected
from jobs.benchmarks.dynamic_tables import LABEL, paired
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.parts import once
from jobs.benchmarks.race import interval, show
from jobs.benchmarks.tracks import TFLITE, real_data

EPOCHS, TINY_EPOCHS = 200, 2
KEEPS, TINY_KEEPS = (0.7, 0.3), (0.5,)
ROWS, TEST_ROWS, SIDE = 50_000, 10_000, 32
TINY_ROWS, TINY_TEST_ROWS, TINY_SIDE = 4 * BATCH, 64, 8
RATE, MOMENTUM, WEIGHT_DECAY, SMOOTHING, MARGIN = 0.05, 0.9, 5e-4, 0.1, 4
PUBLISHED = {"full": 0.961, "dynamic 0.7": 0.961, "speed of dynamic 0.7": 2.51, "speed of rcap 0.7": 1.7}


class Images(NamedTuple):
    """CIFAR-10: pixels (N, S, S, 3) uint8, labels, and components of MobileNet's features of the training part."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    rows: Rows


def benchmark(*, seeds: int, tiny: bool, folder: Path) -> dict[str, Any]:
    """All figures; a run that is in `folder` already is not done again. ValueError without a GPU, unless tiny."""
    if not tiny and not torch.cuda.is_available():
        raise ValueError("dynamic_resnet trains ResNet-18 for 200 epochs: it needs a GPU (--tiny proves the command)")
    device, folder = torch.device("cpu" if tiny else "cuda"), folder / "dynamic_resnet"
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "-tiny" if tiny else ""
    images, runs = _images(folder / f"images{suffix}.npz", tiny=tiny), {}
    for seed in range(seeds):
        found = factors_of(images.rows, folder / f"factors-{seed}{suffix}.npz", seed=seed, tiny=tiny)
        for arm in _arms(TINY_KEEPS if tiny else KEEPS):
            file = folder / f"{arm.name.replace(' ', '-')}-{seed}{suffix}.json"
            run = partial(_run, arm, images, found, epochs=TINY_EPOCHS if tiny else EPOCHS, seed=seed, device=device)
            runs.setdefault(arm.name, []).append(once(file, run))
    figures = _summary(runs)
    for name, of in figures["arms"].items():
        print(f"{name:<26}{show(of['accuracy'])}   speed {of['in_sample_gradients']:.2f}   {show(of['by_the_clock'])}")
    about = {"benchmark": "dynamic_resnet", "tiny": tiny, "label": LABEL, "device": _device_name(device)}
    return {**provenance(), **about, "published": PUBLISHED, "seeds": seeds, **figures}


def _arms(keeps: tuple[float, ...]) -> list[Arm]:
    """Full data first; "fewer" is full data for as many sample-gradients as the keep fraction's other arms."""
    arms = [Arm("full")]
    for keep in keeps:
        arms += [
            Arm(f"dynamic {keep}", "dynamic", keep=keep),
            Arm(f"rs2 {keep}", "rs2", keep=keep),
            Arm(f"fewer {keep}"),
            Arm(f"infobatch {keep}", "infobatch", {"kept_share": keep}),
            Arm(f"rcap {keep}", "rcap", keep=keep),
        ]
    return arms


def _run(arm: Arm, images: Images, found: Found, *, epochs: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Train one network on what the arm chooses."""
    share = 1.0 if arm.name == "full" else float(arm.name.split()[-1])
    steps = epochs * max(1, round(share * len(images.train) / BATCH))
    is_wrong = np.zeros(len(images.train), bool)
    none = torch.zeros(0, 1)
    pool = Pool(none, images.train_labels, is_wrong, found.ranks, none, images.test_labels)
    chooser = ArmRun(arm, pool, num_steps=steps, seed=seed)
    torch.manual_seed(seed)
    network = cifar_resnet18(pool.num_classes).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    rng, begun = torch.Generator().manual_seed(seed), time.perf_counter()
    for step in range(steps):
        rows, weights = chooser.batch(step)
        pixels = augmented(images.train[rows], rng).to(device)
        labels = images.train_labels[rows].to(device)
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate_factor("one-cycle", (step + 0.5) / steps)
        losses = F.cross_entropy(network(normalise(pixels)), labels, reduction="none", label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        (losses * weights.to(device)).mean().backward()
        optimizer.step()
        chooser.take_losses(losses.detach().float().cpu())
    chooser.close()
    seconds = time.perf_counter() - begun
    usage = chooser.usage_N
    return {
        "accuracy": _accuracy(network, images, device),
        "sample_gradients": steps * BATCH,
        "seconds": seconds,
        "choose_seconds": chooser.choose_seconds,
        "factor_seconds": found.report["factors"]["cpu_seconds"] if arm.method == "dynamic" else 0.0,
        "usage": [int(usage.min()), int(usage.max())],
        "gap_bound": chooser.log[-1].usage_gap,
    }


def cifar_resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 as it is used on 32 px images: a 3 x 3 first layer, and no pooling after it."""
    network = resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return network


def augmented(pixels_nSS3: Tensor, rng: torch.Generator) -> Tensor:
    """Each image cut anew from its own with 4 reflected pixels around it, and mirrored by chance; uint8 as it came."""
    n, side = len(pixels_nSS3), pixels_nSS3.shape[1]
    wide = F.pad(pixels_nSS3.permute(0, 3, 1, 2).float(), (MARGIN,) * 4, mode="reflect")
    top, left = (torch.randint(2 * MARGIN + 1, (n, 1), generator=rng) + torch.arange(side) for _ in range(2))
    mirrored = torch.rand(n, 1, generator=rng) < 0.5
    left = torch.where(mirrored, left.flip(1), left)
    cut = wide[torch.arange(n)[:, None, None], :, top[:, :, None], left[:, None, :]]
    return cut.to(torch.uint8)


@torch.no_grad()
def _accuracy(network: nn.Module, images: Images, device: torch.device) -> float:
    network.eval()
    parts = [network(normalise(part.to(device))).argmax(dim=1).cpu() for part in images.test.split(500)]
    return (torch.cat(parts) == images.test_labels).double().mean().item()


def _images(file: Path, *, tiny: bool) -> Images:
    if not file.exists():
        counts = (TINY_ROWS, TINY_TEST_ROWS) if tiny else (ROWS, TEST_ROWS)
        parts = dict(zip(("train", "test"), map(_read, ("train", "test"), counts), strict=True))
        side = TINY_SIDE if tiny else SIDE
        stored = {f"{name}_labels": labels for name, (_, labels) in parts.items()}
        stored |= {
            name: np.stack([np.array(image.resize((side, side))) for image in of]) for name, (of, _) in parts.items()
        }
        unfinished = file.with_suffix(".part.npz")
        np.savez(unfinished, allow_pickle=False, features=_features(parts["train"][0], tiny=tiny), **stored)
        unfinished.rename(file)
    with np.load(file, allow_pickle=False) as stored:
        none, labels = np.zeros(0, np.int64), stored["train_labels"]
        rows = Rows(stored["features"], labels, none, stored["features"][:1], none)
        train, test = (torch.from_numpy(stored[name]) for name in ("train", "test"))
        return Images(train, torch.from_numpy(labels), test, torch.from_numpy(stored["test_labels"]), projected(rows))


def _read(split: str, count: int) -> tuple[list[Image.Image], np.ndarray]:
    table = pq.read_table(real_data() / "cifar" / f"cifar10-{split}-jpeg.parquet", columns=["image", "label"])
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in table["image"].slice(0, count).to_pylist()]
    return images, table["label"].slice(0, count).to_numpy().astype(np.int64)


def _features(images: list[Image.Image], *, tiny: bool) -> np.ndarray:
    """MobileNet's; of tiny images their pixels, for it takes minutes."""
    if tiny:
        return np.stack([np.array(image.resize((8, 8)), np.float16).ravel() for image in images])

    def each() -> Iterator[np.ndarray]:
        frozen = load_frozen("tflite", str(real_data() / TFLITE))
        for image in images:
            yield frozen.embed(frozen.resize(image)[None])[0]

    return np.stack(list(each())).astype(np.float16)


def _summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    full = runs["full"]
    accuracy = {name: [run["accuracy"] for run in of] for name, of in runs.items()}

    def speed(of: list[dict[str, Any]], *fields: str) -> dict[str, Any]:
        return interval([a["seconds"] / sum(b[f] for f in fields) for a, b in zip(full, of, strict=True)])

    return {
        "arms": {
            name: {
                "accuracy": interval(accuracy[name]),
                "minus_full": paired(accuracy[name], accuracy["full"]),
                "in_sample_gradients": full[0]["sample_gradients"] / of[0]["sample_gradients"],
                "by_the_clock": speed(of, "seconds"),
                "with_factors": speed(of, "seconds", "factor_seconds"),
                "seconds": interval([run["seconds"] for run in of]),
            }
            for name, of in runs.items()
        },
        "runs": runs,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
