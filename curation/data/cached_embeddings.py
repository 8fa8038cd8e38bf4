"""Embeddings that another tool made, beside the metadata of their samples: clip-retrieval's folders, DataComp's files.

Row k of the arrays beside a metadata parquet is its row k, and nothing else joins them, so files of different lengths
are never paired. A shard is such a parquet, or some of its rows; or a shard of images, whose samples find their
metadata by uid. Vectors are stored as float16, whose norms are 1 to about 1e-3 only: they are normalised anew in
float32.

Legend: N rows, D embedding dimension.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from curation.data import metadata, open_shard, storage
from curation.data.parquet_shards import ParquetReader, row_range
from curation.data.read_rules import ReadRules
from curation.data.samples import Sample

MAX_DIM = 1 << 16
_CLIP_RETRIEVAL = re.compile(r"(?P<root>.*/|)metadata/metadata_(?P<part>\d+)\.parquet(?P<query>\?.*)?", re.S)
_DTYPES = (np.float16, np.float32, np.float64)


class Source(NamedTuple):
    """Where the arrays of one kind lie: a .npy, or the member of an .npz with that name."""

    file: str
    member: str | None = None


LAYOUTS: Mapping[str, tuple[str, str] | None] = {
    "clip-retrieval": None,  # img_emb/img_emb_K.npy and text_emb/text_emb_K.npy beside metadata/metadata_K.parquet
    "datacomp-b32": ("b32_img", "b32_txt"),  # arrays of NAME.npz beside NAME.parquet
    "datacomp-l14": ("l14_img", "l14_txt"),
}
"""Where embeddings lie beside their metadata, by the name that a recipe has for it."""


class Cached(NamedTuple):
    """A shard's samples, the reason of each that is dropped, and the unit vectors (N, D) float32 of the others."""

    samples: list[Sample]
    reasons: list[str | None]
    image_ND: np.ndarray
    text_ND: np.ndarray
    sha256: str
    num_bytes: int
    warnings: dict[str, int]


class _Unfit(ValueError):
    """Embeddings that cannot belong to the shard; the argument is the drop reason."""


def sources(url: str, layout: str) -> tuple[Source, Source]:
    """Where the image and text embeddings of a shard lie. ValueError if its name is not one of the layout's."""
    file = row_range(url).file
    members = LAYOUTS[layout]
    if members is not None:
        arrays = re.sub(r"\.[^./]*(\?.*)?$", ".npz", file)
        return Source(arrays, members[0]), Source(arrays, members[1])
    match = _CLIP_RETRIEVAL.fullmatch(file)
    if match is None:
        raise ValueError(
            f"embed.cached is {layout!r}, whose shards are metadata/metadata_K.parquet beside img_emb/ and text_emb/, "
            f"got {file!r}: name the folder `metadata` of it"
        )
    root, part = match["root"], match["part"]
    return Source(f"{root}img_emb/img_emb_{part}.npy"), Source(f"{root}text_emb/text_emb_{part}.npy")


def fingerprint(url: str, layout: str) -> str:
    """A mark that changes when the metadata or the arrays do. FileNotFoundError if there is no such metadata."""
    marks = [open_shard.fingerprint(url)]
    for file in dict.fromkeys(source.file for source in sources(url, layout)):
        try:
            marks.append(storage.fingerprint(file))
        except FileNotFoundError:
            marks.append("absent")
    return "+".join(marks)


def read(url: str, layout: str, rules: ReadRules) -> Cached:
    """A shard's samples and embeddings; a row is dropped only for want of those, or if its metadata is damaged.

    OSError as the store raises it.
    """
    with open_shard.open_shard(url, rules) as reader:
        assert isinstance(reader, ParquetReader)
        samples = list(reader)
    # Without images each row is said to be one that was not downloaded; here that is no reason to drop it.
    reasons = [sample.reason if sample.reason and sample.reason.startswith("parquet:") else None for sample in samples]
    first = row_range(url).first
    found = [_Found(np.arange(len(samples)), np.arange(first, first + len(samples)), url, reader.file_rows)]
    image_ND, text_ND, reasons = _vectors(found, reasons, layout)
    return Cached(samples, reasons, image_ND, text_ND, reader.sha256, reader.num_bytes, dict(reader.warnings))


def read_joined(url: str, layout: str, rules: ReadRules) -> Cached:
    """A shard of images, its samples, and the embeddings that `rules.metadata` have of their uids; nothing is decoded.

    A sample that the metadata lack is dropped: embedding:missing. OSError as the store raises it.
    """
    assert rules.metadata is not None
    index = metadata.opened(rules.metadata)
    with open_shard.open_shard(url, rules) as reader:
        samples = [dataclasses.replace(sample, image=None) for sample in reader]
    reasons = [sample.reason for sample in samples]
    places = [
        index.locate(sample.uid) if reason is None else None for sample, reason in zip(samples, reasons, strict=True)
    ]
    reasons = [
        reason or ("embedding:missing" if place is None else None)
        for reason, place in zip(reasons, places, strict=True)
    ]
    rows_of: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for at, place in enumerate(places):
        if place is not None:
            rows_of[place[0]].append((place[1], at))
    found = []
    for number, pairs in sorted(rows_of.items()):
        rows, at = np.array(sorted(pairs)).T
        found.append(_Found(at, rows, *index.files[number]))
    image_ND, text_ND, reasons = _vectors(found, reasons, layout)
    return Cached(samples, reasons, image_ND, text_ND, reader.sha256, reader.num_bytes, dict(reader.warnings))


class _Found(NamedTuple):
    """Samples of a shard, by their places, and the ascending rows of a metadata file in which they are."""

    places: np.ndarray
    rows: np.ndarray
    url: str
    file_rows: int | None
    """How many rows the file has; None if it is damaged."""


def _vectors(
    found: Sequence[_Found], reasons: list[str | None], layout: str
) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    """Unit vectors (N, D) of the samples that have no reason to be dropped, in their order, and the reasons of all."""
    reasons, places = list(reasons), [np.zeros(0, np.int64)]
    images, texts = list[np.ndarray](), list[np.ndarray]()
    for part in found:
        if part.file_rows is None:
            continue
        try:
            image_nD, text_nD = (_rows(source, part.rows, part.file_rows) for source in sources(part.url, layout))
            if image_nD.shape != text_nD.shape or (images and image_nD.shape[1] != images[0].shape[1]):
                raise _Unfit("embedding:unreadable")
        except _Unfit as error:
            for place in part.places:
                reasons[place] = reasons[place] or str(error)
            continue
        image_nD, text_nD = _unit(image_nD), _unit(text_nD)
        for place in part.places[~np.isfinite(np.einsum("nd,nd->n", image_nD, text_nD))]:
            reasons[place] = reasons[place] or "embedding:not_finite"
        ok = np.array([reasons[place] is None for place in part.places], bool)
        places.append(part.places[ok])
        images.append(image_nD[ok])
        texts.append(text_nD[ok])
    if not images:
        empty_ND = np.zeros((0, 1), np.float32)  # no table holds vectors of length 0
        return empty_ND, empty_ND, reasons
    order = np.argsort(np.concatenate(places))
    return np.concatenate(images)[order], np.concatenate(texts)[order], reasons


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    """Vectors (N, D) of unit norm; NaN where there is none."""
    with np.errstate(all="ignore"):
        return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def _rows(source: Source, rows: np.ndarray, file_rows: int) -> np.ndarray:
    """Ascending rows (n,) of an array (file_rows, D) as float32 (n, D). _Unfit if there is no such array."""
    try:
        with _array_opened(source) as file:
            shape, is_fortran, dtype = _header(file)
            if len(shape) != 2 or is_fortran or dtype not in _DTYPES or not 0 < shape[1] <= MAX_DIM:
                raise _Unfit("embedding:unreadable")
            if shape[0] != file_rows:
                raise _Unfit("embedding:not_aligned")
            row_bytes, at, parts = shape[1] * dtype.itemsize, 0, [b""]
            # Neighbours are one read: a shard's samples mostly lie side by side in the metadata that it was made from.
            for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else ():
                file.seek((int(run[0]) - at) * row_bytes, 1)
                parts.append(file.read(len(run) * row_bytes))
                if len(parts[-1]) < len(run) * row_bytes:
                    raise _Unfit("embedding:unreadable")
                at = int(run[-1]) + 1
    except FileNotFoundError:
        raise _Unfit("embedding:missing") from None
    return np.frombuffer(b"".join(parts), dtype).reshape(len(rows), shape[1]).astype(np.float32)


@contextlib.contextmanager
def _array_opened(source: Source) -> Iterator[IO[bytes]]:
    with storage.open_read(source.file) as file:
        if source.member is None:
            yield file
            return
        try:
            with zipfile.ZipFile(file) as archive, archive.open(f"{source.member}.npy") as member:
                yield member
        except (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError, zlib.error) as error:
            raise _Unfit("embedding:unreadable") from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and dtype of an .npy file, which is then at its first value."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)
    except ValueError as error:
        raise _Unfit("embedding:unreadable") from error
