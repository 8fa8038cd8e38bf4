"""Languages are fastText's own, and the basic filter of DataComp is that of its own script."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.data.row_tests import OneOf, Within
from curation.models.language import language_model_digest, load_language_model
from curation.recipe import OneOf as OneOfStep
from curation.recipe import Threshold
from jobs.recipes import basic

pytest.importorskip("fasttext")


@pytest.fixture(scope="module")
def model(real_data: Path) -> str:
    return str(real_data / "weights" / "lid.176.ftz")


def test_captions_get_their_language_and_its_probability(model: str) -> None:
    labels, probabilities = load_language_model(model)(
        ["Một nhóm người đang chơi bóng đá", "a group of people\nplaying football", "ein Hund spielt im Garten"]
    )
    assert labels == ["vi", "en", "de"]
    assert probabilities.dtype == np.float32 and (probabilities > 0.5).all()
    assert load_language_model(model)([])[0] == []


def apply_basic_filter(rows: list[dict], predict) -> list[bool]:
    """DataComp's basic filter, written from its description, one row at a time and in plain Python.

    Gadre et al. 2023, baselines/apply_filter.py: English by fastText on the text without line feeds; more than 2 words
    as `str.split` parts them and more than 5 characters; smaller side >= 200, larger / smaller <= 3.
    """
    kept = []
    for row in rows:
        language = predict(row["text"].replace("\n", " "))[0][0].split("__label__")[1]
        small, large = sorted((row["original_width"], row["original_height"]))
        words_and_characters = len(row["text"].split()) > 2 and len(row["text"]) > 5
        kept.append(language == "en" and words_and_characters and small >= 200 and large / small <= 3.0)
    return kept


def test_the_basic_recipe_is_datacomps_filter_on_real_alt_text(model: str, real_data: Path) -> None:
    import fasttext

    texts = pq.read_table(real_data / "web-text" / "laion-alt-text.parquet")["caption"].to_pylist()[:4000]
    texts += ["a\nb c d e f", "dogs and", "dogs  and\tcats", "a b c", "größe ist gut", " x y z "]
    rng = np.random.default_rng(0)
    width, height = rng.integers(1, 700, (2, len(texts)))
    width[:6], height[:6] = [200, 199, 600, 601, 200, 900], [200, 200, 200, 200, 600, 300]
    rows = [
        {"text": text, "original_width": int(w), "original_height": int(h)}
        for text, w, h in zip(texts, width, height, strict=True)
    ]
    expected = apply_basic_filter(rows, fasttext.load_model(model).predict)
    labels, _ = load_language_model(model)(texts)
    table = pa.table(
        {
            "caption": texts,
            "language.label": labels,
            "json.original_width": width,
            "json.original_height": height,
            **{name: pa.nulls(len(texts)) for name in ("json.WIDTH", "json.HEIGHT", "width", "height")},
        }
    )
    kept = np.ones(len(texts), bool)
    for step in basic().selection:
        if isinstance(step, OneOfStep):
            kept &= OneOf(step.name, step.column, step.one_of, step.nulls).passes(table)
        else:
            assert isinstance(step, Threshold)
            kept &= Within(step.name, step.column, step.at_least, step.at_most, step.nulls).passes(table)
    assert kept.tolist() == expected and 200 < sum(expected) < len(texts) / 2


def test_what_is_no_model_and_a_missing_package_are_errors_that_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.ftz").write_text("this is no model")
    with pytest.raises(ValueError, match="is no fastText model"):
        load_language_model(str(tmp_path / "text.ftz"))
    for call in (load_language_model, language_model_digest):
        with pytest.raises(ValueError, match=r"is not a file: name fastText's lid.176.bin"):
            call(str(tmp_path / "gone"))
    original = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "fasttext":
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'curation\[language\]'"):
        load_language_model(str(tmp_path / "text.ftz"))
