"""What the parts of all recipes share: frozen, validated fields, the pool that a run reads, a model's weights."""

from __future__ import annotations

import dataclasses
import json
from string import Formatter
from typing import Annotated, Any, Literal, Self, TypedDict

import tyro
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from curation.columns import FORMAT_VERSION
from curation.data.read_rules import ReadRules
from curation.methods import load_selector
from curation.selector import Selector


class Part(BaseModel):
    """A part of a recipe: immutable, and a name that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def json_argument(kind: Any, instances: type | tuple[type, ...]) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """On the command line, a field that is one word of JSON; `instances` is what a value of it is."""
    adapter = TypeAdapter(kind)
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: adapter.validate_json(words[0]),
        is_instance=lambda value: isinstance(value, instances),
        str_from_instance=lambda value: [adapter.dump_json(value, exclude_defaults=True).decode()],
    )


def checked_templates(templates: tuple[str, ...]) -> tuple[str, ...]:
    """The templates. ValueError if there is none, or one has no place, or more than one, for the name of a class."""
    for template in templates:
        try:
            fields = [field for _, *field in Formatter().parse(template) if field[0] is not None]
        except ValueError:
            fields = []
        if fields != [["", "", None]]:
            raise ValueError(
                f"templates must hold {{}} once, where a class's name goes, and no other braces: {template!r}"
            )
    if not templates:
        raise ValueError("templates must be one or more, as in 'a photo of a {}.'")
    return templates


class WeightsSource(TypedDict):
    """Where weights come from, as `models` takes it; a seed, where neither of the others is given."""

    pretrained: str | None
    checkpoint: str | None
    seed: int


class Weights(Part):
    """A model and where its weights come from."""

    model: str = Field(default="ViT-B-32", min_length=1)
    """An open_clip model, or `nano`. On `data.features` its text tower stands beside two linear layers for the image.
    A classifier is `linear` or `mlp-WIDTH` on features, or a model whose image tower gets a linear head."""
    pretrained: str | None = Field(default=None, min_length=1)
    """open_clip's tag of pretrained weights."""
    checkpoint: str | None = Field(default=None, min_length=1)
    """A local checkpoint instead."""
    seed: int = Field(default=0, ge=0)
    """Seed of random weights, when neither is given."""

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.pretrained and self.checkpoint:
            raise ValueError(f"give pretrained or checkpoint, got both: {self.pretrained!r}, {self.checkpoint!r}")
        return self

    def source(self) -> WeightsSource:
        """Tag, checkpoint and seed."""
        return {"pretrained": self.pretrained, "checkpoint": self.checkpoint, "seed": self.seed}


_READ = ReadRules()


class Pool(Part):
    """Which samples a run may choose from, and how they are read."""

    shards: str = ""
    """Paths, globs, brace lists or fsspec URLs of tars or parquet files, joined by `::`; a folder means its *.tar, or,
    if it has none, its *.parquet."""
    caption_field: str = _READ.caption_field
    """Extension of the member that holds the caption, or json.NAME for a field of the json."""
    best_caption_of: tuple[str, ...] = ()
    """In place of caption_field: several fields of that kind, also json fields that hold lists of captions. Of all
    captions of a sample the one with the highest CLIP score is its caption; the column caption_from says where it
    stood. Each costs a pass of the text tower."""
    max_captions: int = Field(default=_READ.max_captions, gt=0)
    """Of those, at most so many of a sample; more are left out, and counted."""
    image_fields: tuple[str, ...] = _READ.image_fields
    """Extensions of the member (or names of the column) that holds the image; the first that is present wins."""
    caption_column: str | None = None
    """Parquet pools: the column that holds the caption; none given: the first of txt, caption, text, in any case."""
    image_column: str | None = None
    """Parquet pools: the column that holds the image's bytes; none given: image, an image field, or image_bytes."""
    metadata: str | None = None
    """Paths, globs or URLs of parquet files with a column `uid`, such as DataComp's metadata; their numbers become
    fields of the samples with that uid, where those have none of that name."""
    max_image_bytes: int = Field(default=_READ.max_image_bytes, gt=0)
    """A larger image member is dropped unread."""
    max_caption_bytes: int = Field(default=_READ.max_caption_bytes, gt=0)
    max_json_bytes: int = Field(default=_READ.max_json_bytes, gt=0)
    max_json_fields: int = Field(default=_READ.max_json_fields, gt=0)
    max_pixels: int = Field(default=90_000_000, gt=0)
    """An image whose header says more is dropped before it is decoded."""
    verify: Literal["fingerprint", "content"] = "fingerprint"
    """What tells that a shard was edited since it was read: size and mtime (or etag), or the sha256 of its bytes."""

    @model_validator(mode="after")
    def _can_be_read_by(self) -> Self:
        self.read_rules()
        return self

    def read_rules(self) -> ReadRules:
        """The reader's part of these fields."""
        names = {field.name for field in dataclasses.fields(ReadRules)} - {
            "metadata",
            "exclude",
        }  # there they are URLs of indexes
        return ReadRules(**{name: getattr(self, name) for name in names})


class WholeRecipe(Part):
    """A complete recipe. It knows by which version of the format it was written."""

    format_version: Annotated[int, tyro.conf.Suppress] = FORMAT_VERSION

    @model_validator(mode="before")
    @classmethod
    def _is_readable(cls, fields: Any) -> Any:
        # Before all else: what a newer recipe has besides would be told as unknown names.
        version = fields.get("format_version", FORMAT_VERSION) if isinstance(fields, dict) else FORMAT_VERSION
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ValueError(f"format_version {version} is newer than this code's {FORMAT_VERSION}: update curation")
        return fields


def parse_method(text: str) -> dict[str, Any]:
    """A method from its JSON, or from its name alone. ValueError if it is neither."""
    method = json.loads(text) if text.lstrip().startswith("{") else {"name": text}
    selector_of(method)
    return method


MethodArgument = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME|JSON",
        instance_from_str=lambda words: parse_method(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda method: [json.dumps(method)],
    ),
]
"""{"name": a file in curation/methods, and the fields of its selector}; on the command line the name alone will do."""


def selector_of(method: dict[str, Any]) -> Selector:
    """The selector that {"name": ..., fields} describes. ValueError if it is unknown or a field does not fit."""
    if "name" not in method:
        raise ValueError(f'method must be {{"name": ..., fields}}, got {method}')
    fields = {key: value for key, value in method.items() if key != "name"}
    return load_selector(str(method["name"]), **fields)
