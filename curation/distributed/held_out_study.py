"""What a model knows of held-out samples, from columns that are there: retrieval, zero-shot classes, a linear probe.

The samples are a curated run. Embeddings are the run's own or those of a piece that `jobs.fit embeddings` made, so of
any open_clip model or local checkpoint; features of the probe are any column, so of a timm network too. Only texts
that no column holds, the prompts of classes and further captions, are embedded here, by the model that is named. All is
in memory: such a set is thousands of samples.

N samples, M captions, C classes, T templates, D embedding.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from curation.columns import FORMAT_VERSION
from curation.data import manifest, storage, tables
from curation.data.held_out import held_by_pool
from curation.data.pool_rows import embedded_shards, read_pool, selected_uids
from curation.data.row_tests import InPart
from curation.distributed.shared_networks import networks_of
from curation.distributed.stopping import Stop
from curation.distributed.subset_study import checked_run
from curation.evaluation.linear_probe import fit_probe, probe_accuracy
from curation.evaluation.retrieval import retrieval_recall
from curation.evaluation.zero_shot import class_embeddings, zero_shot_accuracy
from curation.models.clip import Towers, load_towers
from curation.models.registry import weights_digest
from curation.recipe.curate import CachedLayout, Embed
from curation.recipe.evaluate import OF_THE_RUN, HeldOutRecipe
from curation.recipe.parts import Weights

TOP_KS = (1, 5, 10)
TEXTS_AT_A_TIME = 256
Told = Callable[[dict[str, int]], None]
"""Hears, before any figure, how many samples are `evaluated` and how many of them are `held_by_the_selection`."""


@dataclass(frozen=True)
class HeldOutStudy:
    """Shares in [0, 1] by name; `overlap` is empty if no selection was named."""

    samples: int
    without_value: int
    """Embedded samples that are not measured on, for want of a value in one of the columns."""
    overlap: dict[str, int]
    figures: dict[str, float]
    notes: list[str]
    format_version: int = FORMAT_VERSION


def judge_held_out(recipe: HeldOutRecipe, *, told: Told = lambda _: None, stop: Stop | None = None) -> HeldOutStudy:
    """Measure, and keep the figures in OUTPUT/held_out.json. ValueError if something cannot be measured as it is,
    Interrupted if it is asked to stop before the last measure: it is short, so what came before is not kept."""
    stop = stop or Stop()
    run = checked_run(recipe.run)
    if not recipe.output:
        raise ValueError("output: name a folder, as in --output studies/first")
    recipe = recipe.model_copy(update={"run": run})
    samples, without_value = _samples(recipe, run)
    overlap = _overlap(recipe, samples)
    told(overlap)
    figures, notes = _retrieval(recipe, samples)
    if recipe.label:
        stop.check()
        zero_shot, more = _zero_shot(recipe, samples)
        stop.check()
        figures |= zero_shot | _probes(recipe, samples)
        notes += more
    study = HeldOutStudy(len(samples), without_value, overlap, figures, notes)
    url = storage.join(storage.absolute(recipe.output), "held_out.json")
    storage.write_bytes(url, json.dumps(dataclasses.asdict(study), indent=1).encode())
    return study


def _samples(recipe: HeldOutRecipe, run: str) -> tuple[pa.Table, int]:
    """The rows of a run that have all that is measured on, and how many have not."""
    vectors = {*_embedding_columns(recipe), *(recipe.features if recipe.label else ())}
    names = {"uid", "sha256", "caption", *vectors, *filter(None, (recipe.label, recipe.captions))}
    pool = read_pool(run, sorted(names))
    if recipe.label and pool[recipe.label].null_count:
        raise ValueError(
            f"label: {pool[recipe.label].null_count} of {len(pool)} samples of {run} have no {recipe.label}"
        )
    if recipe.captions and not pa.types.is_list(pool[recipe.captions].type):
        raise ValueError(f"captions: {recipe.captions} is {pool[recipe.captions].type}, no list of captions")
    whole = pool.filter(np.logical_and.reduce([pool[name].is_valid().to_numpy() for name in sorted(vectors)]))
    if not len(whole):
        raise ValueError(f"run: no sample of {run} has a value in all of {', '.join(sorted(vectors))}")
    return whole, len(pool) - len(whole)


def _embedding_columns(recipe: HeldOutRecipe) -> list[str]:
    prefix = f"{recipe.embeddings}." if recipe.embeddings else ""
    return [f"{prefix}{side}_embedding" for side in ("image", "text")] if recipe.is_of_pairs else []


def _overlap(recipe: HeldOutRecipe, samples: pa.Table) -> dict[str, int]:
    """What of the samples the selection holds that the model was trained on: by uid, of a run also by equal bytes."""
    if not recipe.selection:
        return {}
    uids, sha256s = samples["uid"].to_pylist(), samples["sha256"].to_pylist()
    if recipe.selection.endswith((".npy", ".parquet")):
        held = len(set(uids) & set(selected_uids(recipe.selection)))
        return {"evaluated": len(uids), "held_by_the_selection": held}
    trained_on = checked_run(recipe.selection)
    shards = [shard.number for shard in embedded_shards(trained_on)]
    among = selected_uids(trained_on) if recipe.selected_only else None
    held = held_by_pool(uids, sha256s, trained_on, shards, among=among)
    return {"evaluated": len(uids), "held_by_the_selection": held}


def _retrieval(recipe: HeldOutRecipe, samples: pa.Table) -> tuple[dict[str, float], list[str]]:
    if not recipe.is_of_pairs:
        return {}, []
    image, text = _embedding_columns(recipe)
    image_ND, text_MD = _vectors(samples, image), _vectors(samples, text)
    image_of_text = torch.arange(len(image_ND))
    if recipe.captions:
        lists = [[words for words in told or [] if words] for told in samples[recipe.captions].to_pylist()]
        image_of_text = torch.repeat_interleave(image_of_text, torch.tensor([len(texts) for texts in lists]))
        text_MD = _embedded(_towers(recipe), [words for texts in lists for words in texts])
    ks = [k for k in TOP_KS if k <= min(len(image_ND), len(text_MD))]
    found = retrieval_recall(image_ND, text_MD, image_of_text=image_of_text, ks=ks)
    sides = {"image_to_text": found.image_to_text, "text_to_image": found.text_to_image}
    return {f"{side}_r{k}": share for side, shares in sides.items() for k, share in shares.items()}, [
        f"retrieval: {len(image_ND):,} images, {len(text_MD):,} captions"
    ]


def _zero_shot(recipe: HeldOutRecipe, samples: pa.Table) -> tuple[dict[str, float], list[str]]:
    if not recipe.is_of_pairs:
        return {}, []
    classes, labels = _labels([samples], str(recipe.label))
    prompts = [template.format(name) for name in classes for template in recipe.templates]
    prompts_CTD = _embedded(_towers(recipe), prompts).reshape(len(classes), len(recipe.templates), -1)
    ks = [k for k in (1, 5) if k <= len(classes)]
    image_ND = _vectors(samples, _embedding_columns(recipe)[0])
    accuracy = zero_shot_accuracy(image_ND, class_embeddings(prompts_CTD), labels[0], ks=ks)
    return {f"zero_shot_top{k}": share for k, share in accuracy.items()}, [f"zero-shot: {len(classes)} classes"]


def _probes(recipe: HeldOutRecipe, samples: pa.Table) -> dict[str, float]:
    """Of each column of features the accuracy of a linear probe, fitted on `probe_run` or on a part of the samples."""
    if recipe.probe_run:
        fitted_on, tested = _samples(recipe, checked_run(recipe.probe_run))[0], samples
    else:
        # By the image's bytes, so that copies of an image are on one side.
        part = InPart("test", 0.0, recipe.test_share, recipe.seed, "sha256", inside=True).passes(samples)
        fitted_on, tested = samples.filter(~part), samples.filter(part)
    if not len(fitted_on) or not len(tested):
        raise ValueError(f"test_share: {len(fitted_on)} samples to fit a probe on, {len(tested)} to test it on")
    classes, (seen, asked) = _labels([fitted_on, tested], str(recipe.label))
    figures = {"probe_fitted_on": float(len(fitted_on)), "probe_tested_on": float(len(tested))}
    held = set(fitted_on["sha256"].to_pylist())
    figures["probe_copies"] = float(sum(sha256 in held for sha256 in tested["sha256"].to_pylist()))
    for column in recipe.features:
        probe = fit_probe(_vectors(fitted_on, column), seen, num_classes=len(classes), penalty=recipe.penalty)
        figures[f"linear_probe {column}"] = probe_accuracy(probe, _vectors(tested, column), asked)
    return figures


def _labels(parts: Sequence[pa.Table], column: str) -> tuple[list[str], list[Tensor]]:
    """All classes, sorted, and the labels of each part as places among them."""
    told = [[str(label) for label in part[column].to_pylist()] for part in parts]
    classes = sorted({label for labels in told for label in labels})
    places = {name: place for place, name in enumerate(classes)}
    return classes, [torch.tensor([places[label] for label in labels]) for labels in told]


def _vectors(samples: pa.Table, column: str) -> Tensor:
    return torch.from_numpy(tables.as_array(samples[column], name=column).astype(np.float32))


def _embedded(towers: Towers, texts: Sequence[str]) -> Tensor:
    """(n, D) float32 of texts."""
    parts = [texts[at : at + TEXTS_AT_A_TIME] for at in range(0, len(texts), TEXTS_AT_A_TIME)]
    return torch.cat([towers.embed_texts(towers.tokenize(list(part))).float().cpu() for part in parts])


def _towers(recipe: HeldOutRecipe) -> Towers:
    """The model that made the embeddings. ValueError if it is not known, or another one is named."""
    weights = None if recipe.weights.model == OF_THE_RUN else recipe.weights
    if weights is None and not recipe.embeddings:
        embed = Embed.model_validate(manifest.read(storage.join(recipe.run, "recipe.json"))["recipe"]["embed"])
        if embed.cached is None:
            weights = Weights(
                model=embed.model, pretrained=embed.pretrained, checkpoint=embed.checkpoint, seed=embed.seed
            )
    if weights is None:
        raise ValueError("weights: name the model that made the embeddings, its text tower embeds prompts and captions")
    made_by, num_features = networks_of(recipe.run, _embedding_columns(recipe)[0]), None
    # Of embeddings that others made only the name is known, so the weights are taken at their word.
    if weights_digest(weights.model, **weights.source()) not in made_by and not made_by & set(get_args(CachedLayout)):
        raise ValueError(f"weights: {weights.model} with these weights did not make {recipe.embeddings or 'the run'}")
    if recipe.embeddings:
        number, piece = next(iter(manifest.committed(recipe.run, tables.piece_stage(recipe.embeddings)).items()))
        features = piece["made_by"]["features"]
        num_features = tables.vector_width(recipe.run, number, features) if features else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_towers(weights.model, **weights.source(), precision="float32", device=device, num_features=num_features)
