import dataclasses
import json
import math
import sys
import types
from typing import Any, Literal, get_args

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from curation import methods
from curation.columns import FORMAT_VERSION
from curation.data.cached_embeddings import LAYOUTS
from curation.data.read_rules import ReadRules
from curation.recipe import (
    Audit,
    Balance,
    Compute,
    CurateRecipe,
    Embed,
    Group,
    OneOf,
    Pool,
    Select,
    Threshold,
    Write,
    parse_steps,
)
from curation.recipe.curate import CachedLayout
from curation.recipe.guards import Decontaminate, Exclude, Holdout
from curation.recipe.made_columns import Clusters, EmbeddingHead, Language
from curation.recipe.train_parts import Train

CLIP = {"name": "clip_score"}
FILLED = CurateRecipe(
    name="filled",
    pool=Pool(shards="/a/{0..9}.tar::s3://b", caption_field="json.text", image_fields=("webp",), verify="content"),
    embed=Embed(model="nano", checkpoint="/w.pt", seed=3, precision="bfloat16", batch_size=1),
    compute=Compute(device="cuda", actors=2, gpus_per_actor=0.5, decode_threads=3, torch_threads=4),
    selection=(
        Threshold(column="json.punsafe", at_most=-0.5, nulls="keep"),
        Threshold(column="width", at_least=0.0),
        Select(method=CLIP, keep_fraction=0.0, ties="datacomp"),
        Select(method={"name": "uniform"}, keep=0),
        Select(method=CLIP, min_score=-1.0),
        OneOf(column="language.label", one_of=("en", "de"), nulls="keep"),
        Balance(balance="url_domain", quotas={"a.org": 3}, others="keep"),
        Balance(balance="clip_score", edges=(0.0, 0.5), cap=0, nulls="keep"),
    ),
    columns=(
        Language(make="language", model="/lid.ftz"),
        EmbeddingHead(make="embedding_head", name="nsfw", checkpoint="/h.pth", layout="nsfw"),
        Clusters(make="clusters", name="like", num_clusters=3, target="/t", seed=1),
    ),
    exclude=(Exclude(name="opt-out", files="/a.txt", by="url"),),
    holdout=Holdout(parts={"test": (0.0, 0.5)}, keep="test", seed=3, by="sha256"),
    decontaminate=Decontaminate(sets={"flickr": "/f"}, near=None),
    audit=Audit(groups=(Group(column="clip_score", edges=(0.1,)),), warn_lift=3.0, min_rows=1, max_groups=2),
    write=Write(tars=False, samples_per_shard=1),
    output="memory://out",
    seed=2**62,
    max_drop_fraction=1.0,
)


RESOLVED = {"weights_digest": "ab", "device": "cpu", "precision": "float32"}


def cli(*arguments, default=None):
    return tyro.cli(CurateRecipe, default=default or CurateRecipe(), args=list(arguments))


class TestBounds:
    @pytest.mark.parametrize(
        ("part", "fields", "message"),
        [
            (Pool, {"max_pixels": 0}, "max_pixels"),
            (Pool, {"max_image_bytes": 0}, "max_image_bytes"),
            (Pool, {"max_caption_bytes": -1}, "max_caption_bytes"),
            (Pool, {"max_json_bytes": 0}, "max_json_bytes"),
            (Pool, {"max_json_fields": 0}, "max_json_fields"),
            (Pool, {"verify": "both"}, "verify"),
            (Pool, {"image_fields": ()}, "image_fields must name at least one extension"),
            (Pool, {"image_fields": (".jpg",)}, r"lower-case extensions .* got '\.jpg'"),
            (Pool, {"caption_field": "TXT"}, "lower-case extensions .* got 'TXT'"),
            (Embed, {"batch_size": 0}, "batch_size"),
            (Embed, {"seed": -1}, "seed"),
            (Embed, {"model": ""}, "model"),
            (Embed, {"pretrained": ""}, "pretrained"),
            (Embed, {"checkpoint": ""}, "checkpoint"),
            (Embed, {"precision": "float16"}, "precision"),
            (Embed, {"resize": "fastest"}, "resize"),
            (Embed, {"pretrained": "a", "checkpoint": "b"}, "give pretrained or checkpoint, got both: 'a', 'b'"),
            (Compute, {"device": "tpu"}, "device"),
            (Compute, {"actors": 0}, "actors"),
            (Compute, {"gpus_per_actor": 0}, "gpus_per_actor"),
            (Compute, {"gpus_per_actor": 1.5}, "gpus_per_actor must be at most 1, or whole, got 1.5"),
            (Compute, {"decode_threads": 0}, "decode_threads"),
            (Compute, {"torch_threads": 0}, "torch_threads"),
            (Write, {"samples_per_shard": 0}, "samples_per_shard"),
            (CurateRecipe, {"seed": -1}, "seed"),
            (CurateRecipe, {"max_drop_fraction": 1.1}, "max_drop_fraction"),
            (CurateRecipe, {"max_drop_fraction": math.nan}, "max_drop_fraction"),
            (
                CurateRecipe,
                {"format_version": FORMAT_VERSION + 1, "news": 1},
                "is newer than this code's .: update curation",
            ),
            (CurateRecipe, {"format_version": "newest"}, "format_version"),
        ],
    )
    def test_a_value_out_of_bounds_is_an_error_that_names_the_field(self, part, fields, message):
        with pytest.raises(ValidationError, match=message):
            part(**fields)

    @pytest.mark.parametrize("part", [Pool, Embed, Compute, Write, CurateRecipe])
    def test_an_unknown_field_is_an_error_that_names_it(self, part):
        with pytest.raises(ValidationError, match=r"bach_size\n\s+Extra inputs are not permitted"):
            part(bach_size=1)

    def test_a_recipe_cannot_be_changed(self):
        with pytest.raises(ValidationError, match="frozen"):
            FILLED.seed = 1  # pyright: ignore[reportAttributeAccessIssue]

    @pytest.mark.parametrize("gpus", [0.25, 1.0, 2.0])
    def test_a_share_of_a_gpu_or_whole_ones_can_be_given(self, gpus):
        assert Compute(gpus_per_actor=gpus).gpus_per_actor == gpus

    def test_the_reader_has_the_rules_of_the_pool(self):
        assert Pool().read_rules() == ReadRules()
        rules = Pool(caption_field="json.text", image_fields=("webp",), max_image_bytes=7).read_rules()
        assert rules == ReadRules(caption_field="json.text", image_fields=("webp",), max_image_bytes=7)
        from_elsewhere = {"exclude"}  # lists, which the recipe names beside the pool
        assert {field.name for field in dataclasses.fields(ReadRules)} - from_elsewhere <= Pool.model_fields.keys()


class TestSteps:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({}, r"give one of keep_fraction, keep, min_score; got none"),
            ({"keep": 0, "min_score": 0.0}, r"give one of .*; got \['keep', 'min_score'\]"),
            ({"keep_fraction": 0.0, "keep": 0}, r"got \['keep_fraction', 'keep'\]"),
            ({"keep_fraction": 0.1, "keep": 1, "min_score": 0.1}, r"got \['keep_fraction', 'keep', 'min_score'\]"),
            ({"keep": 5, "ties": "datacomp"}, "ties='datacomp' needs keep_fraction"),
            ({"min_score": 0.2, "ties": "datacomp"}, "ties='datacomp' needs keep_fraction"),
            ({"keep_fraction": 1.5}, "keep_fraction"),
            ({"keep_fraction": -0.1}, "keep_fraction"),
            ({"keep": -1}, "keep"),
            ({"min_score": math.inf}, "min_score"),
            ({"keep": 1, "method": {"name": "clip_scor"}}, "no method is named 'clip_scor', did you mean 'clip_score'"),
            ({"keep": 1, "method": {}}, r'method must be \{"name": \.\.\., fields\}, got \{\}'),
            ({"keep": 1, "method": {"name": 5}}, "no method is named '5'"),
            ({"keep": 1, "method": {"name": "uniform", "seed": 1}}, "method 'uniform' has no field 'seed'"),
            ({"keep": 1, "column": "width"}, "column"),
        ],
    )
    def test_a_selector_that_does_not_fit_says_why(self, fields, message):
        with pytest.raises(ValidationError, match=message):
            Select(**{"method": CLIP, **fields})

    def test_a_method_that_does_not_decide_row_by_row_cannot_select_from_a_pool(self, monkeypatch):
        @dataclasses.dataclass(frozen=True)
        class Joint:
            needs: frozenset[str] = frozenset()
            records: Literal["score"] = "score"
            fixed_size: bool = True
            unbiased: bool = False

            def score(self, rows, progress): ...

            def select(self, rows, keep, progress, rng): ...

        module: Any = types.ModuleType("curation.methods.joint")
        module.Joint, Joint.__module__ = Joint, module.__name__
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(methods, "selector_names", lambda: ["joint"])
        with pytest.raises(
            ValidationError, match="method 'joint' does not decide row by row, so it cannot select from a"
        ):
            Select(method={"name": "joint"}, keep=1)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"column": "width"}, "threshold on 'width' needs at_least or at_most"),
            ({"column": "width", "at_least": 2, "at_most": 1}, r"at_least must not exceed at_most, got 2\.0 > 1\.0"),
            (
                {"column": "uid", "at_least": 0},
                "column must be clip_score, width, .* json.NAME or PIECE.COLUMN, got 'uid'",
            ),
            ({"column": "width", "at_least": math.nan}, "at_least"),
            ({"column": "width", "at_least": 0, "nulls": "zero"}, "nulls"),
            ({"column": "width", "at_least": 0, "keep": 1}, "keep"),
        ],
    )
    def test_a_threshold_that_does_not_fit_says_why(self, fields, message):
        with pytest.raises(ValidationError, match=message):
            Threshold(**fields)

    @pytest.mark.parametrize(
        ("step", "name"),
        [
            (Threshold(column="width", at_least=0), "0 <= width"),
            (Threshold(column="json.punsafe", at_most=-0.5), "json.punsafe <= -0.5"),
            (Threshold(column="height", at_least=1, at_most=1), "1 <= height <= 1"),
            (Select(method=CLIP, keep=0), "clip_score"),
        ],
    )
    def test_a_step_has_the_name_that_the_account_shows(self, step, name):
        assert step.name == name

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "Invalid JSON"),
            ("[{]", "Invalid JSON"),
            ("{}", "valid tuple|should be a valid array"),
            ("[{}]", "selector.method"),
            ('[{"column": "width", "at_most": 1, "keep": 1}]', "keep"),
            ('[{"method": {"name": "nonsense"}, "keep": 1}]', "no method is named 'nonsense'"),
        ],
    )
    def test_a_selection_that_is_no_list_of_steps_says_what_does_not_fit(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse_steps(text)

    def test_an_empty_selection_keeps_everything(self):
        assert parse_steps("[]") == ()
        assert CurateRecipe(selection=()).selection == ()


class TestJson:
    @pytest.mark.parametrize("recipe", [CurateRecipe(), FILLED, CurateRecipe(selection=())])
    def test_a_recipe_comes_back_from_its_json(self, recipe):
        assert CurateRecipe.model_validate_json(recipe.model_dump_json()) == recipe
        assert CurateRecipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe

    @given(
        keep=st.integers(0, 2**63),
        low=st.floats(allow_nan=False, allow_infinity=False),
        column=st.text(st.characters(codec="utf-8")),
    )
    def test_steps_come_back_from_their_json(self, keep, low, column):
        steps = (Threshold(column="json." + column, at_least=low), Select(method=CLIP, keep=keep))
        assert parse_steps(json.dumps([step.model_dump(exclude_defaults=True) for step in steps])) == steps


class TestCommandLine:
    def test_without_arguments_the_recipe_is_the_default(self):
        assert cli(default=FILLED) == FILLED

    def test_single_fields_are_changed_and_all_others_stay(self):
        changed = cli(
            "--pool.shards", "/a/{0..9}.tar::/b", "--output", "o", "--compute.actors", "3", "--embed.batch-size", "7",
            "--pool.image-fields", "webp", "jpg", "--write.no-tars", "--seed", "5", default=FILLED,
        )  # fmt: skip
        assert changed == FILLED.model_copy(
            update={
                "pool": FILLED.pool.model_copy(update={"shards": "/a/{0..9}.tar::/b", "image_fields": ("webp", "jpg")}),
                "output": "o",
                "compute": FILLED.compute.model_copy(update={"actors": 3}),
                "embed": FILLED.embed.model_copy(update={"batch_size": 7}),
                "seed": 5,
            }
        )

    def test_a_selection_is_given_as_json(self):
        text = '[{"column": "json.punsafe", "at_most": 0.5}, {"method": {"name": "uniform"}, "keep": 10}]'
        assert cli("--selection", text).selection == parse_steps(text)
        assert cli("--selection", "[]", default=FILLED).selection == ()

    def test_a_field_is_set_back_to_none(self):
        assert cli("--compute.actors", "None", default=FILLED).compute.actors is None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--selection", '[{"column": "width"}]'], "needs at_least or at_most"),
            (["--selection", '[{"method": {"name": "clip_scor"}, "keep": 1}]'], "did you mean 'clip_score'"),
            (["--selection", "{half"], "Invalid JSON"),
            (["--selection", '["clip_score"]'], "Input should be an object"),
            (["--selection", "[[1]]"], "Input should be an object"),
            (["--compute.actors", "0"], "greater than 0"),
            (["--compute.actors", "two"], "actors"),
            (["--embed.pretrained", "a", "--embed.checkpoint", "b"], "give pretrained or checkpoint, got both"),
            (["--pool.shard", "x"], "--pool.shard"),
            (["--format-version", "1"], "--format-version"),
        ],
    )
    def test_a_wrong_argument_ends_the_program_and_says_why(self, arguments, message, capsys):
        with pytest.raises(SystemExit) as ended:
            cli(*arguments)
        assert ended.value.code == 2
        said = capsys.readouterr()
        plain = " ".join((said.err + said.out).replace("│", " ").split())
        assert message in plain

    def test_help_shows_the_selection_as_the_json_that_it_takes(self, capsys):
        with pytest.raises(SystemExit) as ended:
            cli("--help")
        assert ended.value.code == 0
        plain = "".join(capsys.readouterr().out.replace("│", " ").split())
        assert '[{"method":{"name":"clip_score"},"keep_fraction":0.3}]' in plain


class TestEmbeddedBy:
    @pytest.mark.parametrize(
        "part",
        [
            {"pool": Pool(caption_field="json.text")},
            {"pool": Pool(best_caption_of=("txt", "json.captions"))},
            {"pool": Pool(image_fields=("webp",))},
            {"pool": Pool(caption_column="text")},
            {"pool": Pool(image_column="photo")},
            {"pool": Pool(max_image_bytes=1)},
            {"pool": Pool(max_caption_bytes=1)},
            {"pool": Pool(max_json_bytes=1)},
            {"pool": Pool(max_json_fields=1)},
            {"pool": Pool(max_pixels=1)},
            {"embed": Embed(model="ViT-B-16")},
            {"embed": Embed(batch_size=1)},
            {"compute": Compute(torch_threads=2)},
        ],
    )
    def test_it_changes_with_every_field_that_can_change_the_bytes(self, part):
        assert CurateRecipe(**part).embedded_by(**RESOLVED) != CurateRecipe().embedded_by(**RESOLVED)

    def test_a_run_from_before_captions_could_be_chosen_is_the_same_run(self):
        assert not [name for name in CurateRecipe().embedded_by(**RESOLVED) if "best" in name or "max_captions" in name]

    def test_embeddings_of_one_caption_leave_no_choice(self):
        with pytest.raises(ValidationError, match="pool.best_caption_of: the embeddings of embed.cached datacomp-l14"):
            CurateRecipe(pool=Pool(best_caption_of=("json.a",)), embed=Embed(cached="datacomp-l14"))

    @pytest.mark.parametrize("resolved", [{"weights_digest": "cd"}, {"device": "cuda"}, {"precision": "bfloat16"}])
    def test_it_changes_with_the_weights_the_device_and_the_precision(self, resolved):
        assert CurateRecipe().embedded_by(**{**RESOLVED, **resolved}) != CurateRecipe().embedded_by(**RESOLVED)

    @pytest.mark.parametrize(
        "part",
        [
            {"pool": Pool(shards="/b")},
            {"pool": Pool(verify="content")},
            {"compute": Compute(actors=5)},
            {"compute": Compute(decode_threads=9)},
            {"compute": Compute(gpus_per_actor=0.5)},
            {"compute": Compute(device="cpu")},
            {"embed": Embed(precision="float32")},  # resolved is what counts
            {"embed": Embed(checkpoint="/w.pt")},  # its digest is what counts
            {"embed": Embed(seed=1)},
            {"selection": ()},
            {"write": Write(tars=False)},
            {"output": "/o"},
            {"seed": 1},
            {"name": "other"},
            {"max_drop_fraction": 1.0},
        ],
    )
    def test_it_stays_with_every_other_field(self, part):
        assert CurateRecipe(**part).embedded_by(**RESOLVED) == CurateRecipe().embedded_by(**RESOLVED)

    def test_on_a_gpu_the_threads_of_the_cpu_do_not_matter(self):
        on_gpu = {**RESOLVED, "device": "cuda"}
        threads = CurateRecipe(compute=Compute(torch_threads=2))
        assert threads.embedded_by(**on_gpu) == CurateRecipe().embedded_by(**on_gpu)

    def test_every_field_of_pool_and_embed_is_either_in_it_or_known_not_to_matter(self):
        # A field that is added later must be thought about here.
        elsewhere = {
            "pool.shards",
            "pool.verify",
            "pool.metadata",  # its digest is what counts
            "embed.cached",  # the next test but one
            "embed.precision",
            "embed.pretrained",
            "embed.checkpoint",
            "embed.seed",
        }
        fields = {f"pool.{name}" for name in Pool.model_fields} | {f"embed.{name}" for name in Embed.model_fields}
        # Columns are in it only where they are named, so that runs of tars from before there were any go on.
        columns = Pool(caption_column="c", image_column="i", best_caption_of=("txt",))
        named = CurateRecipe(pool=columns).embedded_by(**RESOLVED).keys()
        assert fields - elsewhere == {name for name in named if name.startswith(("pool.", "embed."))} - {
            "embed.weights",
            "embed.precision",
        }

    def test_it_changes_with_the_metadata_that_are_joined(self):
        recipe = CurateRecipe(pool=Pool(metadata="/m"))
        made_by = [recipe.embedded_by(**RESOLVED, metadata_digest=digest) for digest in ("aa", "bb", None)]
        assert [fields.get("pool.metadata") for fields in made_by] == ["aa", "bb", None]

    def test_it_changes_with_the_lists_that_are_applied_at_read(self):
        digests = ("aa", "bb", None)
        made_by = [CurateRecipe().embedded_by(**RESOLVED, exclude_digest=digest) for digest in digests]
        assert [fields.get("exclude.at_read") for fields in made_by] == ["aa", "bb", None]

    def test_of_cached_embeddings_their_layout_and_the_pool_count_and_no_model(self):
        recipe = CurateRecipe(embed=Embed(cached="datacomp-b32"), write=Write(tars=False))
        made_by = recipe.embedded_by(**RESOLVED)
        assert made_by["embed.cached"] == "datacomp-b32"
        assert {name for name in made_by if not name.startswith("pool.")} == {"embed.cached"}
        assert not recipe.embed.has_random_weights

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({}, "holds no images to write: add --write.no-tars"),
            ({"write": Write(tars=False), "pool": Pool(metadata="/m")}, "a clip-retrieval folder is a pool itself"),
            (
                {"write": Write(tars=False), "exclude": (Exclude(name="a", files="b", at_read=True),)},
                "exclude.at_read is for shards of images",
            ),
        ],
    )
    def test_cached_embeddings_without_images_go_with_neither_tars_nor_joined_metadata(self, fields, message):
        with pytest.raises(ValueError, match=message):
            CurateRecipe(embed=Embed(cached="clip-retrieval"), **fields)

    def test_cached_embeddings_that_join_images_may_be_written_and_tell_their_metadata(self):
        recipe = CurateRecipe(embed=Embed(cached="datacomp-l14"), pool=Pool(metadata="/m"))
        assert recipe.write.tars
        assert recipe.embedded_by(**RESOLVED, metadata_digest="aa")["pool.metadata"] == "aa"

    def test_every_layout_of_cached_embeddings_can_be_read(self):
        assert set(get_args(CachedLayout)) == set(LAYOUTS)

    def test_it_is_json(self):
        made_by = FILLED.embedded_by(**RESOLVED)
        assert json.loads(json.dumps(made_by)) == made_by


def test_the_shape_of_a_cosine_is_refused_for_another_schedule() -> None:
    assert Train(schedule="step").warmup == 0.05 and Train(schedule="cosine", floor=0.1).floor == 0.1
    with pytest.raises(ValidationError, match=r"train.cooldown shapes the schedule cosine, not step; got 0.2"):
        Train(schedule="step", cooldown=0.2)
    with pytest.raises(ValidationError, match="Input should be 'cosine', 'step' or 'one-cycle'"):
        Train.model_validate({"schedule": "linear"})
