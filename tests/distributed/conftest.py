"""One Ray on this machine for all the tests here, and small pools to run on."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image

from curation.data.read_rules import ReadRules
from curation.distributed.account import Summary
from curation.distributed.embed import EmbedSpec
from curation.distributed.pipeline import curate
from curation.distributed.resources import cluster
from curation.recipe import Compute, CurateRecipe, Embed, Pool

# More logical CPUs than the actors take, so that nothing waits for a CPU that an actor holds.
LOGICAL_CPUS = 4

WriteShard = Callable[..., Path]


@pytest.fixture(scope="session")
def ray_session(object_store: Any) -> Iterator[None]:
    """A local Ray that all the tests share: starting one costs seconds, and each worker imports torch.

    Its workers find the object store by the environment that they inherit.
    """
    with cluster(num_cpus=LOGICAL_CPUS):
        yield
    assert not ray.is_initialized()


def jpeg(seed: int, *, size: tuple[int, int] = (24, 20)) -> bytes:
    """A small picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="session")
def write_shard() -> WriteShard:
    """write_shard(path, count=..., seed=..., broken=rows whose image is no image, large=rows of 40 x 40 pixels,
    fields=per-row json fields)."""

    def write(
        path: Path,
        *,
        count: int,
        seed: int = 0,
        broken: Sequence[int] = (),
        large: Sequence[int] = (),
        fields: Callable[[int], Any] | None = None,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for row in range(count):
                size = (40, 40) if row in large else (24, 20)
                image = b"no image at all" if row in broken else jpeg(1000 * seed + row, size=size)
                extra = fields(row) if fields else {}
                members = {"jpg": image, "json": json.dumps(extra).encode(), "txt": f"picture {seed} {row}".encode()}
                for extension, data in members.items():
                    header = tarfile.TarInfo(f"{row:09d}.{extension}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def small_pool(tmp_path_factory: pytest.TempPathFactory, write_shard: WriteShard) -> Path:
    """Five shards in two folders that both hold a 00000.tar: 75 samples, two of them broken."""
    root = tmp_path_factory.mktemp("pool")
    write_shard(root / "a" / "00000.tar", count=20, seed=1)
    write_shard(root / "a" / "00001.tar", count=13, seed=2, broken=[4])
    write_shard(root / "a" / "00002.tar", count=1, seed=3)
    write_shard(root / "b" / "00000.tar", count=33, seed=4, broken=[0])
    write_shard(root / "b" / "00007.tar", count=8, seed=5)
    return root


@pytest.fixture(scope="session")
def curated(ray_session: None, tmp_path_factory: pytest.TempPathFactory, write_shard: WriteShard) -> Path:
    """The run of a curated pool of six shards, 240 samples of which 236 can be trained on."""
    root = tmp_path_factory.mktemp("curated")
    for number in range(6):
        broken = {1: [0, 17], 4: [38, 39]}.get(number, [])
        write_shard(root / "pool" / f"{number:05d}.tar", count=40, seed=50 + number, broken=broken)
    recipe = CurateRecipe(
        pool=Pool(shards=str(root / "pool")),
        embed=Embed(model="nano", batch_size=32, seed=7),
        compute=Compute(device="cpu", actors=2),
        output=str(root / "run"),
    )
    assert not curate(recipe).failures
    return root / "run"


def nano_spec(output: str, **changes: Any) -> EmbedSpec:
    """What an embedding actor is told of the nano model with random weights, on a CPU."""
    spec = EmbedSpec(
        output=output,
        model="nano",
        pretrained=None,
        checkpoint=None,
        seed=0,
        precision="float32",
        device="cpu",
        resize="exact",
        batch_size=8,
        decode_threads=1,
        torch_threads=1,
        max_pixels=90_000_000,
        staged=False,
        rules=ReadRules(),
        made_by={"test": True},
    )
    return dataclasses.replace(spec, **changes)


@pytest.fixture
def recipe_for(tmp_path: Path) -> Callable[..., CurateRecipe]:
    """recipe_for(shards, output=..., **fields): the nano model with random weights on a CPU."""

    def recipe(shards: str, *, output: Path | None = None, actors: int = 1, **fields: Any) -> CurateRecipe:
        return CurateRecipe(
            pool=fields.pop("pool", Pool(shards=shards)),
            embed=Embed(model="nano", batch_size=8),
            compute=Compute(device="cpu", actors=actors),
            output=str(output or tmp_path / "out"),
            **fields,
        )

    return recipe


def select_again(recipe: CurateRecipe, **fields: Any) -> Summary:
    """Run a recipe's selection anew, with other fields, over tables that are there."""
    summary = curate(recipe.model_copy(update=fields))
    assert summary.decoded_now == 0 and not summary.failures
    return summary


def kept_uids(recipe: CurateRecipe) -> set[str]:
    """The uids of the subset file that a run's last selection wrote."""
    subset = np.load(Path(recipe.output) / "selection" / "subset.npy")
    return {f"{int(high):016x}{int(low):016x}" for high, low in subset}
