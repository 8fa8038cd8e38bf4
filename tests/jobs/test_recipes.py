import json
from functools import partial

import pytest

from curation.columns import FORMAT_VERSION
from curation.recipe import CurateRecipe, Select, Threshold, TrainRecipe
from curation.recipe.parts import Weights
from jobs.command import load_recipe, parsed
from jobs.recipes import CURATE, DIFFUSION, TRAIN, straw_men

load = partial(load_recipe, recipes=CURATE, recipe_type=CurateRecipe)
load_train = partial(load_recipe, recipes=TRAIN, recipe_type=TrainRecipe)


@pytest.mark.parametrize("name", CURATE)
def test_a_named_recipe_bears_its_name_and_round_trips(name, tmp_path):
    recipe = load(name)
    assert recipe.name == name
    (tmp_path / "saved.json").write_text(recipe.model_dump_json())
    assert load(str(tmp_path / "saved.json")) == recipe


def test_debug_needs_no_gpu_and_no_download():
    recipe = load("debug")
    assert (recipe.compute.device, recipe.embed.model) == ("cpu", "nano")
    assert recipe.embed.pretrained is None
    assert recipe.embed.checkpoint is None


@pytest.mark.parametrize("name", [name for name in CURATE if name != "debug"])
def test_no_other_recipe_has_random_weights(name):
    assert not load(name).embed.has_random_weights


def test_laion_keeps_what_scores_at_least_0_28():
    assert load("laion").selection == (Select(method={"name": "clip_score"}, min_score=0.28),)


def test_a_runs_own_recipe_json_runs_it_again(tmp_path):
    recipe = CurateRecipe(selection=(Threshold(column="json.punsafe", at_most=0.5),), output="/out", seed=3)
    whole = {"format_version": FORMAT_VERSION, "recipe": recipe.model_dump(mode="json"), "versions": {"torch": "2"}}
    (tmp_path / "recipe.json").write_text(json.dumps(whole))
    assert load(str(tmp_path / "recipe.json")) == recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "smal",
            r"no recipe 'smal': known are debug, small, medium, large, laion, basic, or a \.json file; "
            r"did you mean 'small'\?",
        ),
        ("zzz", r"no recipe 'zzz': known are .* \.json file$"),
        ("absent.json", r"no recipe 'absent\.json': known are"),
        ("", "no recipe '': known are"),
    ],
)
def test_an_unknown_name_is_told_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("{half", "Expecting property name"),
        ("[]", "Input should be an object"),
        ("\xff", "codec can't decode"),
        ('{"sede": 1}', "sede"),
        ('{"recipe": {"seed": -1}}', "seed"),
        ('{"format_version": 99, "news": 1}', "format_version 99 is newer than this code's"),
        ('{"recipe": {"format_version": 99, "news": 1}}', "format_version 99 is newer"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_with_the_reason(tmp_path, text, message):
    (tmp_path / "bad.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"(?s)bad\.json is no recipe of ours: .*{message}"):
        load(str(tmp_path / "bad.json"))


@pytest.mark.parametrize("name", TRAIN)
def test_a_named_training_recipe_bears_its_name_and_round_trips(name, tmp_path):
    recipe = load_train(name)
    assert recipe.name == name
    (tmp_path / "saved.json").write_text(recipe.model_dump_json())
    assert load_train(str(tmp_path / "saved.json")) == recipe


def test_the_jest_recipe_has_the_papers_sizes():
    train = load_train("jest").train
    assert (train.super_batch, train.sub_batch, train.filter_ratio) == (163_840, 32_768, 0.8)
    assert train.num_steps * train.sub_batch >= 4_000_000_000 - 32_768


def test_a_straw_man_is_one_number_alone():
    straw = straw_men(0.2)
    assert {name: next(iter(step.selector().needs - {"uid"})) for name, step in straw.items()} == {
        "clarity": "quality.sharpness",
        "match": "clip_score",
        "aesthetic": "aesthetic.score",
    }
    assert {step.keep_fraction for step in straw.values()} == {0.2}


def test_the_recipe_lightly_is_the_articles_set_up() -> None:
    recipe = DIFFUSION["lightly"]()
    generator = recipe.generator
    assert (generator.image_size, generator.batch_size, recipe.keep, recipe.samples) == (128, 32, 1000, 10_000)
    assert (recipe.max_width, recipe.straw_men) == (1024, False)
    steps = {arm.name: (arm.source, arm.steps or recipe.steps) for arm in recipe.all_arms()}
    assert steps == {
        "random": ("uniform", 20_000),
        "coreset": ("coreset", 20_000),
        "typicality": ("typicality", 20_000),
        "full": ("full", 20_000),
        "full-70k": ("full", 70_000),
    }
    assert recipe.seeds >= 2 and (recipe.network.library, recipe.network.model) == ("timm", "vit_large_patch14_dinov2")
    assert (generator.prediction, generator.schedule, generator.ema_decay, generator.ema_every) == (
        "v_prediction",
        "sigmoid",
        0.995,
        10,
    )


def train_recipe(*flags: str) -> TrainRecipe:
    return parsed(TrainRecipe, TRAIN["small"](), list(flags), program="jobs.train small")


def test_a_part_that_is_none_by_default_is_there_once_one_of_its_flags_is() -> None:
    assert train_recipe().reference.weights is None
    given = train_recipe("--reference.online", "--reference.weights.checkpoint", "a.pt", "--seed", "3")
    assert given.reference.weights is not None and given.reference.weights.checkpoint == "a.pt"
    assert given.reference.online and given.seed == 3
    assert train_recipe("--reference.weights.seed=4").reference.weights == Weights(seed=4)
    saved = parsed(TrainRecipe, given, ["--reference.weights.model", "nano"], program="jobs.train recipe.json")
    assert saved.reference.weights == given.reference.weights.model_copy(update={"model": "nano"})
    offline = ["--reference.no-online", "reference.weights:none"]
    assert parsed(TrainRecipe, given, offline, program="jobs.train recipe.json").reference.weights is None


def test_the_flags_of_a_part_that_is_none_by_default_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_recipe("--help")
    assert "--reference.weights.checkpoint" in capsys.readouterr().out
