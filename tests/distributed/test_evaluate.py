"""Selections judged by their own rows and by small generative models: from a curated run to figures and a page."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curation.data import manifest, tables
from curation.data.manifest import OtherRun
from curation.data.pool_rows import middle_square, read_pixels, read_pool, selected_uids
from curation.data.read_rules import ReadRules
from curation.distributed import diffusion_loop
from curation.distributed.arms import choose, columns_of, overlap
from curation.distributed.diffusion_loop import Unit, load_array, run_unit, save_array, unit_url
from curation.distributed.diffusion_study import study_diffusion
from curation.distributed.shared_networks import networks_of, shared_networks
from curation.distributed.stopping import Interrupted, Stop
from curation.evaluation.compare import Reference
from curation.evaluation.retrieval import retrieval_recall
from curation.models.frozen import load_frozen
from curation.rating.study import open_study
from curation.recipe.columns import Network
from curation.recipe.evaluate import DiffusionRecipe, Generator, HeldOutRecipe, SubsetRecipe, parse_arm
from curation.recipe.train_parts import Evaluate
from jobs import evaluate

NET = Network(model="nano", seed=3)
TINY = Generator(
    image_size=8,
    channels=(8,),
    layers_per_level=1,
    attention=False,
    batch_size=4,
    sampling_steps=2,
    noise_steps=10,
    ema_every=2,
)


def diffusion(run: Path, output: Path, **fields: Any) -> DiffusionRecipe:
    return DiffusionRecipe(
        run=str(run),
        output=str(output),
        arms=("random", "coreset"),
        straw_men=False,
        keep=20,
        generator=TINY,
        steps=4,
        seeds=1,
        samples=10,
        network=NET,
        device="cpu",
        checkpoint_every=2,
        **fields,
    )


def test_subsets_are_judged_and_say_first_what_they_hold_of_what_they_are_measured_against(
    curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["subset", "debug", "--run", str(curated), "--output", str(tmp_path), "--keep", "60", "--seeds", "2"]
    assert evaluate.main([*arguments, "--arms", "random", "coreset", "typicality", "everything=full"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("random: the selection holds 60 of the 236 images that it is measured against (25.4%")
    assert "WARNING: coreset, typicality: selected on 'image_embedding' and measured with the network" in told
    assert "WARNING: match: selected on 'clip_score' and measured with the network that made it" in told
    study = json.loads((tmp_path / "subset.json").read_text())
    assert study["arms"].keys() == {"random", "coreset", "typicality", "everything", "match"}
    assert [note.partition(":")[0] for note in study["notes"]] == ["no arm clarity", "no arm aesthetic"]
    for figures in study["arms"].values():
        assert all(len(values) == 2 for values in figures.values()) and figures["distance"][0] > 0
        assert all(0 <= value <= 1 for name in ("precision", "recall", "coverage") for value in figures[name])
    assert study["arms"]["coreset"]["distance"] != study["arms"]["random"]["distance"]


def test_a_study_that_is_stopped_ends_after_an_arm_and_the_same_command_goes_on_to_the_same_figures(
    curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["subset", "debug", "--run", str(curated), "--keep", "60", "--seeds", "2", "--no-straw-men"]
    arguments += ["--arms", "random", "coreset", "--output"]
    stopped = [*arguments, str(tmp_path / "stopped"), "--max-hours", "1e-9"]
    assert [evaluate.main(stopped) for _ in range(4)] == [4, 4, 4, 0]
    assert "stopped: --max-hours 1e-09 are over" in capsys.readouterr().err
    assert evaluate.main([*arguments, str(tmp_path / "whole")]) == 0
    whole, parts = (json.loads((tmp_path / name / "subset.json").read_text()) for name in ("whole", "stopped"))
    assert whole == parts
    capsys.readouterr()
    assert evaluate.main([*stopped, "--keep", "61"]) == 4  # other rows: nothing of the former ones is taken
    assert (evaluate.main([*stopped]), evaluate.main([*stopped, "--infinity"])) == (0, 4)

    labelled = ["held-out", "images", "--run", str(curated), "--label", "shard", "--output", str(tmp_path / "held-out")]
    assert evaluate.main([*labelled, "--max-hours", "1e-9"]) == 4
    recipe = tmp_path / "recipe.json"
    recipe.write_text(diffusion(curated, tmp_path / "diffusion").model_dump_json())
    assert evaluate.main(["diffusion", str(recipe), "--max-hours", "1e-9"]) == 4
    assert not list(tmp_path.glob("diffusion/units/*/done.json"))


def test_the_distance_of_endless_rows_is_told_where_it_is_asked_for(
    curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["subset", "debug", "--run", str(curated), "--output", str(tmp_path), "--keep", "60", "--seeds", "1"]
    assert evaluate.main([*arguments, "--arms", "random", "--no-straw-men", "--infinity"]) == 0
    assert "distance_infinity" in capsys.readouterr().out
    told = json.loads((tmp_path / "subset.json").read_text())["arms"]["random"]
    pool = read_pool(str(curated), ["uid", "sha256", "image_embedding"])
    features = torch.from_numpy(tables.as_array(pool["image_embedding"], name="x").astype(np.float32))
    rows = choose(parse_arm("random"), pool, keep=60, selected_on="", seed=0, cut_full=True)
    reference = Reference(features)
    assert told["distance_infinity"] == [reference.distance_infinity(features[rows], seed=0)]
    assert told["distance_infinity"] != told["distance"] == [reference.distance(features[rows])]
    with pytest.raises(ValueError, match="infinity needs keep of at least 28, got 27"):
        SubsetRecipe(keep=27, infinity=True)
    with pytest.raises(ValueError, match="infinity needs samples of at least 28, got 27"):
        DiffusionRecipe(keep=27, samples=27, infinity=True)


@pytest.mark.slow
def test_models_that_are_in_training_when_a_study_is_stopped_save_their_states(
    ray_session: None, curated: Path, tmp_path: Path
) -> None:
    recipe, stop = diffusion(curated, tmp_path, workers=1), Stop()
    recipe = recipe.model_copy(update={"steps": 10**9, "checkpoint_every": 10**9})
    watched = threading.Thread(target=ask_once_there, args=(stop, tmp_path / "features.npy"))
    watched.start()
    with pytest.raises(Interrupted, match="enough"):
        study_diffusion(recipe, stop=stop)
    watched.join()
    states = list(tmp_path.glob("units/*/state.pt"))
    assert len(states) == 1 and 0 < torch.load(states[0], weights_only=True)["step"] < 10**9
    assert not list(tmp_path.glob("units/*/done.json")) and not (tmp_path / "diffusion.json").exists()


def ask_once_there(stop: Stop, path: Path) -> None:
    """Ask for the end of a run as soon as it has written a file."""
    while not path.exists():
        time.sleep(0.05)
    stop.ask("enough")


@pytest.mark.slow
def test_a_diffusion_study_trains_a_model_for_each_arm_and_shows_them_side_by_side(
    ray_session: None, curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = diffusion(curated, tmp_path)
    written = tmp_path / "recipe.json"
    written.write_text(recipe.model_dump_json())
    assert evaluate.main(["diffusion", str(written)]) == 0
    assert "random: the selection holds 20 of the 236 images" in capsys.readouterr().out
    study = json.loads((tmp_path / "diffusion.json").read_text())
    assert study["arms"].keys() == {"random", "coreset"} and study["warnings"] == []
    wanted = {"distance", "precision", "recall", "median_ratio", "memorised_share", "authentic_share"}
    assert all(wanted <= figures.keys() for figures in study["arms"].values())
    page = (tmp_path / "samples.html").read_text()
    assert page.count("<figure>") == 3 and all(name in page for name in ("random", "coreset", "real images"))
    # Both started from the same noise, and learnt from different images.
    units = [Unit("random", 0, 4), Unit("coreset", 0, 4)]
    samples = [load_array(unit_url(str(tmp_path), unit, "samples.npy")) for unit in units]
    assert samples[0].shape == (10, 8, 8, 3) and not np.array_equal(samples[0], samples[1])

    rated = open_study(str(tmp_path))  # what `jobs.rate` shows people of it
    assert {arm: len(items) for arm, items in rated.models.items()} == {"random": 10, "coreset": 10}
    assert np.array_equal(np.asarray(rated.open(rated.models["coreset"][3])), samples[1][3])

    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("units/*/samples.npy")}
    again = study_diffusion(recipe)
    assert again.arms == study["arms"]
    assert done == {path: path.stat().st_mtime_ns for path in tmp_path.glob("units/*/samples.npy")}
    with pytest.raises(OtherRun, match="a study made with another recipe .*steps was 4, now 5"):
        study_diffusion(recipe.model_copy(update={"steps": 5}))
    with pytest.raises(OtherRun, match='the arm coreset made with another recipe .*source was "coreset", now "full"'):
        study_diffusion(recipe.model_copy(update={"arms": ("coreset=full",)}))


def test_a_model_whose_training_was_killed_or_stopped_goes_on_from_its_checkpoint(
    curated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.from_numpy(read_pixels(str(curated), side=8, rules=ReadRules(), max_pixels=10**6))
    judge = load_frozen("open_clip", "nano", seed=3)
    for name in ("whole", "killed", "stopped"):
        save_array(unit_url(str(tmp_path / name), Unit("a", 0, 4), "rows.npy"), np.arange(20))
    run_unit(diffusion(curated, tmp_path / "whole"), Unit("a", 0, 4), images, judge, device="cpu")

    steps = 0
    train_step = diffusion_loop.Diffusion.train_step

    def killed(self: Any, batch: torch.Tensor) -> float:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return train_step(self, batch)

    monkeypatch.setattr(diffusion_loop.Diffusion, "train_step", killed)
    recipe = diffusion(curated, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        run_unit(recipe, Unit("a", 0, 4), images, judge, device="cpu")
    steps = -10
    run_unit(recipe, Unit("a", 0, 4), images, judge, device="cpu")
    assert steps == -8  # two steps, from the checkpoint after the second

    recipe, asked = diffusion(curated, tmp_path / "stopped"), iter([False, False, True])
    run_unit(recipe, Unit("a", 0, 4), images, judge, device="cpu", is_to_end=lambda: next(asked))
    assert not (tmp_path / "stopped" / "units" / "a-0" / "done.json").exists()
    steps = -10
    run_unit(recipe, Unit("a", 0, 4), images, judge, device="cpu")
    assert steps == -9  # one step, from the state that was saved when the end was asked for
    names = ("whole", "killed", "stopped")
    whole, *others = [(tmp_path / name / "units" / "a-0" / "samples.npy").read_bytes() for name in names]
    assert others == [whole, whole]


def test_pixels_are_the_middle_squares_in_the_order_of_the_table(curated: Path) -> None:
    pool, pixels = (
        read_pool(str(curated), ["uid", "sha256"]),
        read_pixels(str(curated), side=8, rules=ReadRules(), max_pixels=10**6),
    )
    assert pixels.shape == (len(pool), 8, 8, 3) == (236, 8, 8, 3)
    wide = Image.fromarray(np.repeat(np.array([[0, 0, 200, 200, 0, 0]], np.uint8), 2, axis=0)[..., None].repeat(3, 2))
    assert middle_square(wide, 2).tolist() == [[[200] * 3] * 2] * 2


def test_an_arm_is_a_method_a_run_or_a_file_and_what_it_lacks_is_told(curated: Path, tmp_path: Path) -> None:
    pool = read_pool(str(curated), ["uid", "sha256", "image_embedding", "clip_score"])
    rules = {"keep": 30, "selected_on": "image_embedding", "seed": 0, "cut_full": False}
    by_run = choose(parse_arm(f"kept={curated}"), pool, **rules)
    assert len(by_run) == 30 and set(pool["uid"].take(pa.array(by_run)).to_pylist()) <= set(selected_uids(str(curated)))
    subset = selected_uids(str(curated / "selection" / "subset.npy"))
    assert sorted(subset) == sorted(selected_uids(str(curated)))
    assert len(choose(parse_arm("full"), pool, **rules)) == 236
    assert len(choose(parse_arm("full"), pool, **{**rules, "cut_full": True})) == 30
    assert overlap(pool, by_run, pool) == {"evaluated": 236, "held_by_the_selection": 30}
    pq.write_table(pa.table({"uid": ["0" * 32]}), tmp_path / "foreign.parquet")
    with pytest.raises(ValueError, match="arm x: 1 of 1 uids are not in the pool, 0000"):
        choose(parse_arm(f"x={tmp_path}/foreign.parquet"), pool, **rules)
    with pytest.raises(ValueError, match="is no method, no run with a selection, and no .npy or .parquet file"):
        choose(parse_arm("nothing"), pool, **rules)
    with pytest.raises(ValueError, match="arm kept has 71 rows, keep is 72"):
        choose(parse_arm(f"kept={curated}"), pool, **{**rules, "keep": 72})


def test_a_column_of_the_same_network_is_known_to_share_its_features(curated: Path) -> None:
    assert networks_of(str(curated), "image_embedding") == networks_of(str(curated), "clip_score") != frozenset()
    assert not networks_of(str(curated), "no_such_column")


def test_each_arm_is_asked_what_it_was_selected_on_whatever_the_methods_select_on(
    curated: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(curated, run)
    made = {"aesthetic": {"head": "x", "column": "image_embedding"}, "other": {"weights": "another network"}}
    made["percentile"] = {"of": "aesthetic.score"}
    for piece, made_by in made.items():
        manifest.commit(str(run), tables.piece_stage(piece), 0, {"shard": 0}, made_by=made_by)
    (tmp_path / "uids.parquet").write_bytes(b"")
    sources = ["random", "full", "coreset", "match", "aesthetic", "alchemist", f"uids={tmp_path}/uids.parquet"]
    arms = [parse_arm(arm) for arm in [*sources, f"run={curated}", f"file={curated}/selection/subset.npy"]]
    network = networks_of(str(run), "image_embedding")
    told = shared_networks(str(run), arms, selected_on="other", measured_by=network)
    assert [warning.partition(" and measured")[0] for warning in told] == [
        "match, run, file: selected on 'clip_score'",
        "aesthetic: selected on 'aesthetic.score'",
    ]
    told = shared_networks(str(run), arms, selected_on="other", measured_by=frozenset({"another network"}))
    assert [warning.partition(":")[0] for warning in told] == ["coreset"]
    percentile = [parse_arm("alchemist")]
    manifest.commit(str(run), "columns.rating_percentile", 0, {"shard": 0}, made_by={"of": "percentile"})
    told = shared_networks(str(run), percentile, selected_on="other", measured_by=network)
    assert told[0].startswith("alchemist: selected on 'rating_percentile'")


def test_only_methods_that_compare_vectors_are_given_the_studys_column(curated: Path) -> None:
    arms = {name: parse_arm(name) for name in ("coreset", "typicality", "semantic_dedup")}
    assert all("other" in columns_of([arm], selected_on="other") for arm in arms.values())
    own = {"clip_score": "clip_score", "alchemist": "rating_percentile", "exact_duplicates": "sha256"}
    for name, column in own.items():
        needed = columns_of([parse_arm(name)], selected_on="other")
        assert column in needed and "other" not in needed
    pool = read_pool(str(curated), ["uid", "image_embedding", "clip_score"])
    pool = pool.append_column("rating_percentile", pa.array(np.linspace(0, 1, len(pool))))
    best = set(np.argsort(pool["clip_score"].to_numpy())[-30:].tolist())
    rules = {"keep": 30, "selected_on": "image_embedding", "seed": 0, "cut_full": False}
    assert set(choose(parse_arm("clip_score"), pool, **rules).tolist()) == best
    assert len(choose(parse_arm("alchemist"), pool, **rules)) == 30


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": ("random", "random=full")}, "arms must be one or more, each of another name"),
        ({"arms": ()}, "arms must be one or more"),
        ({"arms": ("a b",)}, "arm must be NAME, NAME=SOURCE or NAME=SOURCE@STEPS, got 'a b'"),
    ],
)
def test_arms_that_cannot_be_told_apart_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubsetRecipe(**fields)


def test_a_generator_whose_levels_do_not_halve_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="channels must be multiples of 8, and image_size one of 4"):
        Generator(image_size=10, channels=(8, 8, 8))
    with pytest.raises(ValueError, match="channels must be multiples of 8"):
        Generator(channels=(7,))


def test_held_out_samples_are_measured_by_columns_of_any_model_and_first_it_is_said_what_the_selection_holds(
    curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--run", str(curated), "--output", str(tmp_path), "--label", "shard", "--selection", str(curated)]
    assert evaluate.main(["held-out", "pairs", *arguments, "--features", "image_embedding", "text_embedding"]) == 0
    assert capsys.readouterr().out.startswith("the selection holds 71 of the 236 held-out samples (30.1%)")
    study = json.loads((tmp_path / "held_out.json").read_text())
    figures = study["figures"]
    pool = read_pool(str(curated), ["image_embedding", "text_embedding", "shard"])
    image, text = (torch.from_numpy(tables.as_array(pool[name], name=name)).float() for name in pool.column_names[:2])
    found = retrieval_recall(image, text)
    assert figures["image_to_text_r1"] == found.image_to_text[1]
    assert figures["text_to_image_r10"] == found.text_to_image[10]
    assert figures["zero_shot_top1"] <= figures["zero_shot_top5"] <= 1
    assert figures["probe_fitted_on"] + figures["probe_tested_on"] == 236 and figures["probe_copies"] == 0
    # A caption names its shard's number, an image is noise.
    assert figures["linear_probe text_embedding"] > 0.5 > figures["linear_probe image_embedding"]

    assert evaluate.main(["held-out", "pairs", *arguments, "--no-selected-only"]) == 0
    assert capsys.readouterr().out.startswith("the selection holds 236 of the 236 held-out samples (100.0%)")
    assert evaluate.main(["held-out", "images", *arguments[:6], "--probe-run", str(curated)]) == 0
    assert capsys.readouterr().out.startswith("what the model was trained on is not known")
    probes = json.loads((tmp_path / "held_out.json").read_text())["figures"]
    assert probes.keys() == {"probe_fitted_on", "probe_tested_on", "probe_copies", "linear_probe image_embedding"}
    assert probes["probe_copies"] == 236


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pairs", "--weights.model", "nano", "--label", "shard"], "weights: nano with these weights did not make"),
        (["pairs", "--label", "json.class"], "label: 236 of 236 samples of .* have no json.class"),
        (["pairs", "--features", "absent", "--label", "shard"], "has no column 'absent'"),
        (["pairs", "--captions", "key"], "captions: key is string, no list of captions"),
    ],
)
def test_what_cannot_be_measured_on_held_out_samples_is_refused(
    curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert evaluate.main(["held-out", *arguments, "--run", str(curated), "--output", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "None"], "label: without pairs only probes are left"),
        (["--captions", "json.captions"], "captions and embeddings are for pairs"),
        (["--templates", "a {name}"], "templates must hold {} once"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["held-out", "images", *arguments, "--run", "run", "--output", "out"])
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_labels_that_are_numbers_in_one_shard_and_words_in_another_are_words(curated: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(curated, run)
    for number in range(6):
        table = tables.read(str(run), number)
        classes = [row % 2 if number % 2 else "dog" for row in range(len(table))]
        tables.write(str(run), number, table.append_column("json.class", pa.array(classes)))
    pool = read_pool(str(run), ["uid", "json.class"])
    assert len(pool) == 236 and set(pool["json.class"].to_pylist()) == {"0", "1", "dog"}
    arguments = ["held-out", "images", "--run", str(run), "--label", "json.class", "--output", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 0


@pytest.mark.parametrize("template", ["a photo", "a {name}", "{} or {}", "a {", "a {!r}", "a {:d}", "a {0}"])
def test_a_template_has_one_place_for_the_name_of_a_class(template: str) -> None:
    for recipe in (HeldOutRecipe, Evaluate):
        with pytest.raises(ValueError, match="templates must hold {} once, where a class's name goes"):
            recipe(templates=("a {}", template))
        assert recipe(templates=("a {{}} {}", "{}")).templates[1].format("cat") == "cat"
        with pytest.raises(ValueError, match="templates must be one or more"):
            recipe(templates=())


@pytest.mark.parametrize("kind", ["subset", "diffusion"])
def test_a_study_without_pool_or_output_is_refused(
    kind: str, curated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"subset": "debug", "diffusion": "tiny"}[kind]
    assert evaluate.main([kind, recipe, "--output", "x"]) == 2
    assert "is no run of jobs.curate that embedded anything" in capsys.readouterr().err
    assert evaluate.main([kind, recipe, "--run", str(curated)]) == 2
    assert "output: name a folder" in capsys.readouterr().err
    assert evaluate.main(["elsewhere"]) == 2
