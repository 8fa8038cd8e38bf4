"""What the race is run on: pools whose truth is known, each with a reference trained on a small clean set beside it.

    demo       rendered pairs, 60% of the captions mismatched; learners see pixels
    flickr8k   photos and captions by people, half of the captions shuffled; learners see frozen MobileNet features
    cifar10    photos captioned "a photo of a CLASS" by CIFAR-10N's worst human label; MobileNet features

Splits are by image: the pool's, the reference's and the held-out images are three disjoint sets. Everything is made by
the engine's own jobs; what is there already is not made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from curation.distributed.columns import add_columns
from curation.distributed.pipeline import curate
from curation.distributed.stopping import Interrupted
from curation.distributed.train import learner_url, train
from curation.models.clip import build_network
from curation.recipe import Compute, CurateRecipe, Embed, Pool, TrainRecipe, Write
from curation.recipe.columns import ColumnsRecipe, EmbeddingsRecipe, FeaturesRecipe, Network
from curation.recipe.parts import Weights
from curation.recipe.train_parts import Data, Evaluate, Reference, Train, Workers
from curation.training.flops import TRAINING_PASS, tower_flops
from jobs import demo, demo_reference
from jobs.benchmarks.real_data import TFLITE, real_data, tar_samples
from jobs.command import ended
from jobs.demo_pool import make_pool
from jobs.demo_race import METRIC, NUM_STEPS, SUB_BATCH, race_recipe, write_held_out, write_mismatched
from jobs.exit_codes import EXIT_STOPPED

FEATURES, REFERENCE = "mobilenet", "reference"
LEARNING_RATE, WARMUP = 2e-3, 0.1
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PAIRS_PER_TAR = 1000


class Before(NamedTuple):
    """What a method that compares with a reference needs before its first step."""

    flops: float
    seconds: float


class Track(NamedTuple):
    """A prepared pool, and the recipe of a run on it: all but method, filter ratio, steps, seed and output."""

    name: str
    about: str
    recipe: TrainRecipe
    before: Before
    step_flops: float
    """Of a step on everything."""
    metric: str
    reference: TrainRecipe | None = None
    """The run that trained the reference, on a pool of features."""

    def run(
        self, output: Path, *, method: dict[str, Any], filter_ratio: float, num_steps: int, seed: int
    ) -> TrainRecipe:
        """The recipe of one run."""
        recipe = self.recipe
        trained = {"num_steps": num_steps, "filter_ratio": filter_ratio}
        every = max(1, num_steps // 12)
        changed = recipe.model_copy(
            update={
                "name": f"{self.name}-{method['name']}",
                "method": method,
                "train": recipe.train.model_copy(update=trained),
                "learner": recipe.learner.model_copy(update={"seed": 1_000 + seed}),
                "evaluate": recipe.evaluate.model_copy(update={"every_steps": every}),
                "checkpoint_every": num_steps,
                "output": str(output),
                "seed": seed,
            }
        )
        return TrainRecipe.model_validate(changed.model_dump())


class Pair(NamedTuple):
    """A sample of a track's pool."""

    image: bytes
    caption: str
    mismatched: bool
    fields: dict[str, Any]


class DemoSize(NamedTuple):
    """Samples of the pool, pairs and steps of the reference."""

    samples: int
    pairs: int
    steps: int


def demo_size(*, tiny: bool) -> DemoSize:
    """The demo's own size, or the smallest that proves the command."""
    return DemoSize(400, 200, 8) if tiny else DemoSize(20_000, demo_reference.NUM_PAIRS, demo_reference.NUM_STEPS)


def demo_track(folder: Path, *, tiny: bool) -> Track:
    """The demo's own pool, reference and cache, made as `jobs.demo` makes them."""
    samples, pairs, steps = demo_size(tiny=tiny)
    arguments = ["--samples", samples, "--reference-pairs", pairs, "--reference-steps", steps]

    def prepare() -> None:
        code = demo.main(["--folder", str(folder), "--no-race", *map(str, arguments)])
        if code == EXIT_STOPPED:
            raise Interrupted("in the demo")
        if code:
            raise RuntimeError("the demo failed, its message is above")

    make_pool(folder / "pool", samples=samples)
    seconds = _timed(folder / "prepared.json", prepare)
    recipe = race_recipe(
        run=folder / "run",
        output=folder / "none",
        held_out=write_held_out(folder / "held_out.tar", num_pairs=100 if tiny else 1_000),
        mismatched=write_mismatched(make_pool(folder / "pool", samples=samples), folder / "mismatched.parquet"),
        method="uniform",
        sub_batch=16 if tiny else SUB_BATCH,
    )
    per_row = _row_flops(demo_reference.MODEL, num_features=None)
    spent = steps * demo_reference.BATCH_SIZE * TRAINING_PASS + samples
    about = f"demo pool, {samples} samples"
    step_flops = per_row * TRAINING_PASS * recipe.train.sub_batch
    return Track("demo", about, recipe, Before(per_row * spent, seconds), step_flops, METRIC)


def flickr8k_track(folder: Path, *, tiny: bool) -> Track:
    """4,000 photos with five captions each, half of the captions another photo's; 1,000 photos for the reference."""
    images = 60 if tiny else 6_000
    data = real_data() / "flickr8k"

    def split(first: int, last: int, *, all_captions: bool, shuffled: float) -> Iterator[Pair]:
        photos = list(tar_samples(data, limit=images))[first:last]
        owned = [
            (place, caption)
            for place, (_, fields) in enumerate(photos)
            for caption in (fields["captions"] if all_captions else [fields["caption"]])
        ]
        rng = np.random.default_rng(0)
        captions = _some_shuffled([caption for _, caption in owned], share=shuffled, rng=rng)
        for index in rng.permutation(len(owned)):
            place, own = owned[index]
            yield Pair(photos[place][0], captions[index], captions[index] != own, {})

    held_out, reference = images // 6, images // 6
    splits: dict[str, Callable[[], Iterator[Pair]]] = {
        "held_out": lambda: split(0, held_out, all_captions=False, shuffled=0.0),
        "clean": lambda: split(held_out, held_out + reference, all_captions=True, shuffled=0.0),
        "pool": lambda: split(held_out + reference, images, all_captions=True, shuffled=0.5),
    }
    about = f"Flickr8k, {images - held_out - reference} photos with 5 captions each, half of the captions shuffled"
    return _on_features(folder, "flickr8k", about, splits, metric=METRIC, label_field=None, tiny=tiny)


def cifar10_track(folder: Path, *, tiny: bool) -> Track:
    """20,000 training images captioned by CIFAR-10N's worst label; 2,000 with their true labels for the reference."""
    pool, reference, held_out = (300, 100, 60) if tiny else (20_000, 2_000, 2_000)
    data = real_data() / "cifar"

    def split(file: str, first: int, last: int, *, label: str) -> Iterator[Pair]:
        table = pq.read_table(data / f"{file}.parquet", columns=sorted({"image", "label", label})).slice(
            first, last - first
        )
        for image, true, said in zip(*(table[name].to_pylist() for name in ("image", "label", label)), strict=True):
            fields = {"class": CIFAR_CLASSES[true], "said": CIFAR_CLASSES[said]}
            yield Pair(image, f"a photo of a {CIFAR_CLASSES[said]}.", said != true, fields)

    splits: dict[str, Callable[[], Iterator[Pair]]] = {
        "held_out": lambda: split("cifar10-test-jpeg", 0, held_out, label="label"),
        "clean": lambda: split("cifar10-train-jpeg", pool, pool + reference, label="label"),
        "pool": lambda: split("cifar10-train-jpeg", 0, pool, label="noisy_worst"),
    }
    about = f"CIFAR-10, {pool} images, captions from CIFAR-10N's worst label"
    return _on_features(folder, "cifar10", about, splits, metric="zero_shot_top1", label_field="class", tiny=tiny)


TRACKS: dict[str, Callable[..., Track]] = {"demo": demo_track, "flickr8k": flickr8k_track, "cifar10": cifar10_track}


def _on_features(
    folder: Path,
    name: str,
    about: str,
    splits: dict[str, Callable[[], Iterator[Pair]]],
    *,
    metric: str,
    label_field: str | None,
    tiny: bool,
) -> Track:
    """Curate each split, add its features, train the reference on the clean one, cache its embeddings of the pool."""
    runs = {split: folder / f"{split}-run" for split in splits}
    for split, pairs in splits.items():
        _timed(folder / f"{split}.json", partial(_featured, folder, split, pairs, runs[split]))
    num_steps = 8 if tiny else NUM_STEPS
    trained = Train(
        num_steps=num_steps,
        sub_batch=16 if tiny else SUB_BATCH,
        filter_ratio=0.0,
        score_batch=256,
        learning_rate=LEARNING_RATE,
        warmup=WARMUP,
    )
    reference = TrainRecipe(
        name=f"{name}-reference",
        data=Data(run=str(runs["clean"]), features=FEATURES, segment_rows=16),
        learner=Weights(model="nano", seed=7),
        method={"name": "uniform"},
        train=trained,
        evaluate=Evaluate(run=str(runs["held_out"]), label_field=label_field),
        compute=Workers(device="cpu"),
        checkpoint_every=num_steps,
        output=str(folder / "reference"),
    )
    seconds = _timed(folder / "prepared.json", lambda: add_reference(reference, str(runs["pool"]), column=REFERENCE))
    recipe = reference.model_copy(
        update={
            "data": Data(
                run=str(runs["pool"]),
                features=FEATURES,
                segment_rows=16,
                truth=str(folder / "pool" / "mismatched.parquet"),
                truth_column="mismatched",
            ),
            "reference": Reference(columns=REFERENCE),
        }
    )
    per_row = _row_flops("nano", num_features=1024)
    rows = pq.read_metadata(folder / "pool" / "mismatched.parquet").num_rows
    spent = num_steps * trained.sub_batch * TRAINING_PASS + rows
    step_flops = per_row * TRAINING_PASS * trained.sub_batch
    return Track(name, about, recipe, Before(per_row * spent, seconds), step_flops, metric, reference)


def _featured(folder: Path, split: str, pairs: Callable[[], Iterable[Pair]], run: Path) -> None:
    shards = write_pairs(folder / split, pairs(), name=split)
    curated = CurateRecipe(
        name=split,
        pool=Pool(shards=str(shards)),
        embed=Embed(model="nano", batch_size=64),
        compute=Compute(device="cpu"),
        selection=(),
        write=Write(tars=False),
        output=str(run),
    )
    ended(curate(curated), of=f"the curation of {split}")
    network = Network(library="tflite", model=str(real_data() / TFLITE))
    _add(FeaturesRecipe(run=str(run), column=FEATURES, network=network, batch_size=1, compute=Compute(device="cpu")))


def add_reference(recipe: TrainRecipe, run: str, *, column: str) -> None:
    """Train a reference, and add its embeddings of another run's samples to that run."""
    ended(train(recipe), of=recipe.name)
    weights = Weights(model=recipe.learner.model, checkpoint=learner_url(recipe.output))
    _add(EmbeddingsRecipe(run=run, column=column, weights=weights, features=FEATURES, compute=Compute(device="cpu")))


def _add(recipe: ColumnsRecipe) -> None:
    ended(add_columns(recipe), of=f"column {recipe.column}")


def write_pairs(folder: Path, pairs: Iterable[Pair], *, name: str) -> Path:
    """Tars of the pairs, and `mismatched.parquet` beside them: uid, and whether the caption is another image's."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = [pair._replace(fields={**pair.fields, "uid": _uid(name, index)}) for index, pair in enumerate(pairs)]
    for first in range(0, len(whole), PAIRS_PER_TAR):
        with tarfile.open(folder / f"{first // PAIRS_PER_TAR:05d}.tar", "w") as tar:
            for index, pair in enumerate(whole[first : first + PAIRS_PER_TAR], start=first):
                said = json.dumps(pair.fields).encode()
                for extension, content in (("jpg", pair.image), ("json", said), ("txt", pair.caption.encode())):
                    header = tarfile.TarInfo(f"{index:09d}.{extension}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    truth = {"uid": [pair.fields["uid"] for pair in whole], "mismatched": [pair.mismatched for pair in whole]}
    pq.write_table(pa.table(truth), folder / "mismatched.parquet")
    return folder


def _uid(name: str, index: int) -> str:
    return hashlib.sha256(f"{name}-{index}".encode()).hexdigest()[:32]


def _some_shuffled(captions: list[str], *, share: float, rng: np.random.Generator) -> list[str]:
    """The captions, a share of them moved to each other's places by one long cycle, so that none stays."""
    moved = rng.permutation(len(captions))[: round(share * len(captions))]
    given = list(captions)
    for place, source in zip(moved, np.roll(moved, 1), strict=True):
        given[place] = captions[source]
    return given


def _row_flops(model: str, *, num_features: int | None) -> float:
    network = build_network(model, num_features=num_features)
    images = torch.zeros(1, num_features) if num_features else torch.zeros(1, 48, 48, 3, dtype=torch.uint8)
    return sum(tower_flops(network, images, torch.zeros(1, 28, dtype=torch.int64)))


def _timed(note: Path, work: Callable[[], None]) -> float:
    """Seconds that the work took, now or when it was done."""
    if not note.exists():
        note.parent.mkdir(parents=True, exist_ok=True)
        begun = time.time()
        work()
        note.write_text(json.dumps({"seconds": time.time() - begun}))
    return json.loads(note.read_text())["seconds"]
