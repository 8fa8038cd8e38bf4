"""A curation run: what is read, the model that embeds it, what is kept, what is written."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from curation.data import row_tests
from curation.data.derived_columns import DERIVED
from curation.data.row_tests import RowTest, Within
from curation.data.tables import check_piece_name
from curation.recipe.balance import Audit, Balance
from curation.recipe.guards import DecontaminateArgument, ExcludeArgument, HoldoutArgument
from curation.recipe.made_columns import MadeColumnsArgument
from curation.recipe.parts import Part, Pool, WholeRecipe, json_argument, selector_of
from curation.selector import BucketSelector, PoolSelector, QuotaSelector

CachedLayout = Literal["clip-retrieval", "datacomp-b32", "datacomp-l14"]


class Embed(Part):
    """The model that embeds the pool."""

    model: str = Field(default="ViT-B-32", min_length=1)
    """An open_clip model, or `nano`, a small model of the same build for CPUs."""
    pretrained: str | None = Field(default=None, min_length=1)
    """open_clip's tag of pretrained weights, such as laion2b_s34b_b79k."""
    checkpoint: str | None = Field(default=None, min_length=1)
    """A local checkpoint instead; a state dict that fits the model."""
    cached: CachedLayout | None = None
    """Embeddings that are there already: no model is run, no image decoded. The pool is the folder `metadata` of a
    clip-retrieval folder, or DataComp's metadata parquets with their .npz files beside them; or it is shards of images,
    and `pool.metadata` names DataComp's parquets, whose rows and vectors join them by uid."""
    seed: int = Field(default=0, ge=0)
    """Seed of random weights, when neither tag nor checkpoint is given; a run with such weights says so."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on a GPU, float32 on a CPU."""
    resize: Literal["exact", "fast"] = "exact"
    """exact: the model's own open_clip transform. fast: plain JPEGs are decoded at a part of their size (scaled DCT),
    which moves a score a little and costs a fifth; any other image goes the exact way, and is counted."""
    batch_size: int = Field(default=128, gt=0)
    """Rows per forward pass; a batch never crosses a shard, and the last one is padded."""

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.pretrained and self.checkpoint:
            raise ValueError(f"give pretrained or checkpoint, got both: {self.pretrained!r}, {self.checkpoint!r}")
        return self

    @property
    def has_random_weights(self) -> bool:
        """True if the scores mean nothing."""
        return self.pretrained is None and self.checkpoint is None and self.cached is None


class Compute(Part):
    """Where the work runs."""

    mode: Literal["fused", "staged"] = "fused"
    """fused: an embedding actor reads and decodes for itself. staged: tasks on any CPU of the cluster do it for the
    actors, for nodes without a GPU and for models that outrun their node's cores. The result is the same."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if the cluster has a GPU, else cpu."""
    actors: int | None = Field(default=None, gt=0)
    """Embedding actors; none given: all the GPUs, or all the CPUs, that the cluster has."""
    gpus_per_actor: float = Field(default=1.0, gt=0)
    """Share of a GPU that an actor takes; 0.5 puts two actors on each."""
    decode_threads: int = Field(default=2, gt=0)
    """Threads per actor that decode and tokenise ahead of the model; in staged mode, each task has one."""
    torch_threads: int = Field(default=1, gt=0)
    """CPU threads per actor for the model itself; CPUs that a CPU actor takes."""
    stall_s: float = Field(default=300.0, gt=0)
    """Without a commit for so long, the run says on whom it waits; a worker that is as long at one sample, one batch or
    one read is replaced. Several times the slowest batch."""
    wait_for_nodes_s: float = Field(default=0.0, ge=0)
    """On a cluster that grows: ask its autoscaler for what the run needs, and wait so long for it, before it is an
    error that the cluster has too little."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> Self:
        if self.gpus_per_actor > 1 and self.gpus_per_actor % 1:
            raise ValueError(f"gpus_per_actor must be at most 1, or whole, got {self.gpus_per_actor}")
        return self


class Threshold(Part):
    """A filter: keep the rows whose column lies in [at_least, at_most]."""

    column: str
    """`clip_score`, `width`, `height`, `min_side`, `aspect_ratio`, `caption_words`, `caption_chars`, a number among the
    pool's own fields, such as `json.punsafe`, or a column that `jobs.fit` added, such as `NAME.clip_score`."""
    at_least: float | None = None
    at_most: float | None = None
    nulls: Literal["drop", "keep"] = "drop"
    """What happens to a row without a value; NaN is no value."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        ours = ("clip_score", "width", "height", *DERIVED)
        if self.column not in ours and "." not in self.column:
            raise ValueError(f"column must be {', '.join(ours)}, json.NAME or PIECE.COLUMN, got {self.column!r}")
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"threshold on {self.column!r} needs at_least or at_most")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least must not exceed at_most, got {self.at_least} > {self.at_most}")
        return self

    @property
    def name(self) -> str:
        """What the account calls this step."""
        low = f"{self.at_least:g} <= " if self.at_least is not None else ""
        high = f" <= {self.at_most:g}" if self.at_most is not None else ""
        return f"{low}{self.column}{high}"

    def test(self) -> RowTest:
        """What it asks of a row."""
        return Within(self.name, self.column, self.at_least, self.at_most, self.nulls)


class OneOf(Part):
    """A filter: keep the rows whose column is one of some words."""

    column: str
    """`NAME.label` of a language column, `url_domain`, or a field of the pool, such as `json.LANGUAGE`."""
    one_of: tuple[str, ...] = Field(min_length=1)
    nulls: Literal["drop", "keep"] = "drop"
    """What happens to a row without a value."""

    @property
    def name(self) -> str:
        """What the account calls this step."""
        return f"{self.column} in {', '.join(self.one_of)}"

    def test(self) -> RowTest:
        """What it asks of a row."""
        return row_tests.OneOf(self.name, self.column, self.one_of, self.nulls)


class Select(Part):
    """A selector: rank the rows by a method's score and keep the top ones; or, for a method that compares rows with one
    another (semantic_dedup, exact_duplicates, coreset, typicality), keep those that it chooses."""

    method: dict[str, Any]
    """{"name": a file in curation/methods, and the fields of its selector}."""
    keep_fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of the rows that reach this step."""
    keep: int | None = Field(default=None, ge=0)
    """Number of rows."""
    min_score: float | None = None
    """Every row that scores at least this; a row without a score is not kept."""
    ties: Literal["exact", "datacomp"] = "exact"
    """exact: round(n * keep_fraction) rows, equal scores in the order of a hash of the uid. datacomp: every row that
    scores at least the one of rank int(n * keep_fraction) from the top, as DataComp's baselines cut (ties included)."""

    @model_validator(mode="after")
    def _says_how_many(self) -> Self:
        given = [name for name in ("keep_fraction", "keep", "min_score") if getattr(self, name) is not None]
        selector = self.selector()
        if isinstance(selector, BucketSelector):
            wanted = ("keep_fraction", "keep") if isinstance(selector, QuotaSelector) else ()
            if len(given) != bool(wanted) or not {*given} <= {*wanted}:
                asked = f"give one of {', '.join(wanted)}" if wanted else "its outcome says how many rows stay"
                raise ValueError(f"method {self.name!r} compares rows: {asked}; got {given or 'none'}")
            if self.ties == "datacomp":
                raise ValueError(f"ties='datacomp' is for methods that rank rows, {self.name!r} compares them")
            return self
        if len(given) != 1:
            raise ValueError(f"give one of keep_fraction, keep, min_score; got {given or 'none'}")
        if self.ties == "datacomp" and self.keep_fraction is None:
            raise ValueError("ties='datacomp' needs keep_fraction")
        if not isinstance(selector, PoolSelector):
            raise ValueError(f"method {self.name!r} does not decide row by row, so it cannot select from a pool")
        most = getattr(selector, "most_kept", 1.0)  # alchemist cuts a head off: more would bring it back
        if self.keep_fraction is not None and self.keep_fraction > most + 1e-9:
            raise ValueError(f"method {self.name!r} keeps at most {most:g} of the rows, got {self.keep_fraction}")
        return self

    @property
    def name(self) -> str:
        """The method's name."""
        return str(self.method.get("name"))

    def selector(self) -> Any:
        """The method's selector. ValueError if it is unknown or a field does not fit."""
        return selector_of(self.method)


def _kind_of_step(step: Any) -> str:
    """A filter names a column, a selector a method; so an error is told about the one that was meant."""
    if isinstance(step, dict):
        return next((kind for field, kind in KINDS.items() if field in step), "selector")
    return next((kind for field, kind in KINDS.items() if hasattr(step, field)), "selector")


KINDS = {"one_of": "words", "method": "selector", "balance": "balance", "column": "filter"}
"""The field by which a step is known -> its kind."""
Step = Annotated[
    Annotated[Threshold, Tag("filter")]
    | Annotated[OneOf, Tag("words")]
    | Annotated[Select, Tag("selector")]
    | Annotated[Balance, Tag("balance")],
    Discriminator(_kind_of_step),
]
_STEPS: TypeAdapter[tuple[Step, ...]] = TypeAdapter(tuple[Step, ...])


def parse_steps(text: str) -> tuple[Step, ...]:
    """A selection from its JSON: a list of filters and selectors. ValueError that says what does not fit."""
    return _STEPS.validate_json(text)


StepsArgument = Annotated[tuple[Step, ...], json_argument(tuple[Step, ...], tuple)]


class Write(Part):
    """What is written of the kept set, besides the tables."""

    tars: bool = True
    """The kept samples as tars, their raw bytes untouched."""
    samples_per_shard: int = Field(default=10_000, gt=0)

    embeddings: bool = False
    """The kept samples' embeddings and metadata as a clip-retrieval folder, `samples_per_shard` a part."""


class CurateRecipe(WholeRecipe):
    """A curation run: pool -> embeddings and scores -> a kept set and an account of every sample."""

    name: str = "debug"
    pool: Pool = Pool()
    embed: Embed = Embed()
    compute: Compute = Compute()
    columns: MadeColumnsArgument = ()
    """Columns that are made of stored ones before the selection, for its steps: languages, heads, clusters."""
    selection: StepsArgument = (Select(method={"name": "clip_score"}, keep_fraction=0.3),)
    """Filters and selectors, applied in order, each to what the one before it left."""
    exclude: ExcludeArgument = ()
    """Lists of samples that are never kept, whatever the selection."""
    holdout: HoldoutArgument = None
    """Disjoint parts of the pool, and the one that this selection is of."""
    decontaminate: DecontaminateArgument = None
    """Evaluation sets whose copies are cut; by default exact ones and near ones."""
    audit: Audit = Audit()
    """What is told of the groups of rows that the selection keeps and leaves out."""
    write: Write = Write()
    output: str = ""
    """Folder or fsspec URL of the run."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random choice of the selection."""
    max_drop_fraction: float = Field(default=0.1, ge=0, le=1)
    """The run fails when a larger share of what it read had to be dropped."""

    @model_validator(mode="after")
    def _captions_can_be_scored(self) -> Self:
        if self.pool.best_caption_of and self.embed.cached:
            raise ValueError(
                f"pool.best_caption_of: the embeddings of embed.cached {self.embed.cached} are of one caption each, "
                "and no model is run to score others"
            )
        return self

    @model_validator(mode="after")
    def _columns_have_names_of_their_own(self) -> Self:
        names = [check_piece_name(column.name) for column in self.columns]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"columns: two of them are called {sorted(twice)[0]!r}")
        return self

    @model_validator(mode="after")
    def _tars_need_images(self) -> Self:
        if self.embed.cached and not self.pool.metadata and self.write.tars:
            raise ValueError("a pool of cached embeddings holds no images to write: add --write.no-tars")
        if self.embed.cached and any(exclude.at_read for exclude in self.exclude):
            raise ValueError("exclude.at_read is for shards of images: of cached embeddings nothing is decoded")
        if self.embed.cached == "clip-retrieval" and self.pool.metadata:
            raise ValueError("a clip-retrieval folder is a pool itself: its metadata have no uid to join images by")
        return self

    def embedded_by(
        self,
        *,
        weights_digest: str,
        device: str,
        precision: str,
        metadata_digest: str | None = None,
        exclude_digest: str | None = None,
    ) -> dict[str, Any]:
        """All that can change the bytes of an embedded piece: the recipe's fields, resolved, and the model's digest."""
        without = {"shards", "verify", "metadata"}
        if not self.pool.best_caption_of:  # so that runs from before there was a choice are the same runs
            without |= {"best_caption_of", "max_captions"}
        pool = self.pool.model_dump(exclude=without, exclude_none=True)
        pool_fields = {f"pool.{name}": value for name, value in json.loads(json.dumps(pool)).items()}
        if metadata_digest:
            pool_fields["pool.metadata"] = metadata_digest
        if exclude_digest:
            pool_fields["exclude.at_read"] = exclude_digest
        if self.embed.cached:
            return {**pool_fields, "embed.cached": self.embed.cached}
        return {
            **pool_fields,
            "embed.model": self.embed.model,
            "embed.weights": weights_digest,
            "embed.precision": precision,
            "embed.resize": self.embed.resize,
            "embed.batch_size": self.embed.batch_size,
            "compute.device": device,
            "compute.torch_threads": self.compute.torch_threads if device == "cpu" else None,
        }
