"""How selections are judged: by their own rows, or by what generative models make of them."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from curation.evaluation.fid import INFINITY_ROWS
from curation.recipe.columns import Network
from curation.recipe.parts import Part, Weights, WholeRecipe, checked_templates
from curation.training.diffusion import DiffusionSpec

_ARM = re.compile(r"(?P<name>[A-Za-z0-9_-]+)(=(?P<source>[^@]+))?(@(?P<steps>[1-9]\d*))?")


STRAW_MEN = {"clarity": "quality.sharpness", "match": "clip_score", "aesthetic": "aesthetic.score"}
"""One number alone, and its column: what any method must beat (the comparison of arXiv:2512.16905). Clarity is of
`jobs.fit quality`, aesthetic of a head that the run was given."""


class Arm(NamedTuple):
    """One selection under study: `source` is a method's name, a straw man's, `full`, a run of `jobs.curate`, or a file
    of uids."""

    name: str
    source: str
    steps: int | None


def parse_arm(text: str) -> Arm:
    """An arm from NAME, NAME=SOURCE or NAME=SOURCE@STEPS; the name alone is its own source, `random` means uniform.

    ValueError if it is none of these.
    """
    found = _ARM.fullmatch(text)
    if found is None:
        raise ValueError(f"arm must be NAME, NAME=SOURCE or NAME=SOURCE@STEPS, got {text!r}")
    source, steps = found["source"] or found["name"], found["steps"]
    return Arm(found["name"], "uniform" if source == "random" else source, int(steps) if steps else None)


class Judged(WholeRecipe):
    """What every study says: the pool, the selections, how many rows each keeps, and where the figures go."""

    name: str = "debug"
    run: str = ""
    """Folder or URL of the pool: a run of `jobs.curate`."""
    arms: tuple[str, ...] = ("random", "coreset", "typicality")
    """NAME=SOURCE: a method's name, a straw man's (clarity, match, aesthetic), `full`, another run of `jobs.curate`, or
    a .npy or .parquet file of uids. NAME alone is its own source; @STEPS behind it gives an arm of the diffusion study
    steps of its own."""
    straw_men: bool = True
    """Also clarity, match and aesthetic, one number alone each, where the run has their column."""
    keep: int = Field(default=1000, gt=1)
    """Rows that a method keeps of the pool, and to which larger selections are cut at random."""
    selected_on: str = "image_embedding"
    """The column of vectors that methods see; figures on the same features flatter them, and a warning says so."""
    max_width: int = Field(default=256, gt=0)
    """Wider features are projected on so many principal directions of the pool's."""
    infinity: bool = False
    """Also the distance that an endless number of such rows would have, which costs as much as 15 distances."""
    output: str = ""
    """Folder or URL of the study."""
    seeds: int = Field(default=3, gt=0)
    """Repeats of all that is drawn: selection, training, sampling."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _arms_are_named_once(self) -> Self:
        names = [arm.name for arm in self.all_arms()]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"arms must be one or more, each of another name, got {names}")
        return self

    def rows_compared(self) -> tuple[str, int]:
        """How many rows of each arm are compared, and the field that says so."""
        return "keep", self.keep

    @model_validator(mode="after")
    def _rows_have_a_limit(self) -> Self:
        field, rows = self.rows_compared()
        if self.infinity and rows < INFINITY_ROWS:
            raise ValueError(f"infinity needs {field} of at least {INFINITY_ROWS}, got {rows}")
        return self

    def all_arms(self) -> list[Arm]:
        """The arms, read."""
        return [parse_arm(arm) for arm in self.arms]


class SubsetRecipe(Judged):
    """Selections judged by their own rows against the pool: no model is trained."""

    features: str = "image_embedding"
    """The column that is measured on: the pool's embeddings, or one that `jobs.fit` made."""


OF_THE_RUN = "run"


class HeldOutRecipe(WholeRecipe):
    """What a model knows of held-out samples, by columns of a curated run of them: nothing is trained but probes."""

    name: str = "debug"
    run: str = ""
    """Folder or URL of the held-out samples: a run of `jobs.curate`."""
    embeddings: str = ""
    """The piece of `jobs.fit embeddings` that is measured; none named: the run's own embeddings."""
    is_of_pairs: bool = True
    """Measure retrieval, and with labels zero-shot classification; off for features of networks without captions."""
    weights: Weights = Weights(model=OF_THE_RUN)
    """The model that made the embeddings, to embed prompts by; `run`: what the run's recipe says of its own."""
    label: str | None = None
    """Column that names each sample's class, such as json.class: zero-shot classification and probes."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompts of a class; {} is its name."""
    captions: str | None = None
    """Column with a list of captions, such as json.captions, to be retrieved in place of the one in the table."""
    features: tuple[str, ...] = ("image_embedding",)
    """Columns of vectors, on each of which a linear probe is fitted."""
    probe_run: str = ""
    """A run whose samples the probes are fitted on; none named: those of `run` that are not in the test share."""
    test_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of `run` that tests the probes, drawn by a hash of the images' bytes."""
    penalty: float = Field(default=1e-3, gt=0)
    """On the squared weights of a probe, whose features are brought to standard deviation 1."""
    selection: str = ""
    """What the model was trained on, a run of `jobs.curate` or a file of uids: said first is what of the held-out
    samples it holds."""
    selected_only: bool = True
    """Of such a run what it selected, not all that it embedded."""
    output: str = ""
    """Folder or URL of the figures."""
    seed: int = Field(default=0, ge=0)

    _templates_hold_a_name = field_validator("templates")(checked_templates)

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if not self.is_of_pairs and not self.label:
            raise ValueError("label: without pairs only probes are left, which need labels, as in --label json.class")
        if not self.is_of_pairs and (self.captions or self.embeddings):
            raise ValueError("captions and embeddings are for pairs; name the columns of probes in features")
        return self


class Generator(Part):
    """The generative model: a U-Net that is trained to undo noise, as a `training.diffusion.DiffusionSpec`."""

    image_size: int = Field(default=32, gt=0)
    """Pixels; images are cropped to the middle square."""
    channels: tuple[int, ...] = (32, 64, 128)
    """Of each level, each at half the resolution of the one before; multiples of 8."""
    layers_per_level: int = Field(default=2, gt=0)
    attention: bool = True
    """In the lowest level."""
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    schedule: Literal["sigmoid", "linear"] = "sigmoid"
    """Of the noise; sigmoid: Jabri et al. 2022 (arXiv:2212.11972), from -3 to 3."""
    noise_steps: int = Field(default=1000, gt=1)
    batch_size: int = Field(default=32, gt=0)
    learning_rate: float = Field(default=1e-4, gt=0)
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    ema_every: int = Field(default=10, gt=0)
    """Steps between two updates of the averaged weights, which are what is sampled from."""
    clip: float = Field(default=1.0, gt=0)
    """Norm to which gradients are cut."""
    flip: bool = True
    """Images are mirrored at random."""
    sampling_steps: int = Field(default=250, gt=0)
    """Of DDIM (arXiv:2010.02502), without added noise: equal seeds give comparable samples of all arms."""

    @model_validator(mode="after")
    def _halves_are_whole(self) -> Self:
        halvings = 2 ** (len(self.channels) - 1)
        if not self.channels or self.image_size % halvings or any(channels % 8 for channels in self.channels):
            raise ValueError(
                f"channels must be multiples of 8, and image_size one of {halvings}, "
                f"got {self.channels} and {self.image_size}"
            )
        return self

    def spec(self) -> DiffusionSpec:
        """The same fields, as training takes them."""
        return DiffusionSpec(**self.model_dump())


class DiffusionRecipe(Judged):
    """One generative model per selection and seed, at the same steps and seeds, and what their samples are worth."""

    arms: tuple[str, ...] = ("random", "coreset", "typicality", "full")
    generator: Generator = Generator()
    steps: int = Field(default=20_000, gt=0)
    """Gradient steps of each model, unless its arm has its own."""
    samples: int = Field(default=10_000, gt=7)
    """Of each model."""
    sample_batch: int = Field(default=256, gt=0)
    network: Network = Network()
    """The frozen network whose features are measured; real images are given to it at the model's resolution."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if the cluster has a GPU, else cpu."""
    workers: int = Field(default=2, gt=0)
    """Models in training at a time, each on a GPU or CPU of its own."""
    checkpoint_every: int = Field(default=1000, gt=0)
    """Steps between two checkpoints of a model."""

    def rows_compared(self) -> tuple[str, int]:
        """The samples of each model."""
        return "samples", self.samples
