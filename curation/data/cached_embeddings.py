"""Embeddings that another tool made, beside the metadata of their samples: clip-retrieval's folders, DataComp's files.

A shard is a metadata parquet, or some of its rows; row k of the arrays beside it is its row k, and nothing else joins
them, so files of different lengths are never paired. Vectors are stored as float16, whose norms are 1 to about 1e-3
only: they are normalised anew in float32.

Legend: N rows, D embedding dimension.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import numpy as np

from curation.data import open_shard, storage
from curation.data.parquet_shards import ParquetReader, row_range
from curation.data.shards import ReadRules, Sample

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
    reasons: list[str | None] = [None] * len(samples)
    for row, sample in enumerate(samples):
        if sample.reason and sample.reason.startswith("parquet:"):
            reasons[row] = sample.reason
    wanted = range(row_range(url).first, row_range(url).first + len(samples))
    empty_ND = np.zeros((0, 1), np.float32)  # no table holds vectors of length 0
    image_ND, text_ND = empty_ND, empty_ND
    if reader.file_rows is not None:
        try:
            image_ND, text_ND = (_rows(source, wanted, reader.file_rows) for source in sources(url, layout))
            if image_ND.shape != text_ND.shape:
                raise _Unfit("embedding:unreadable")
        except _Unfit as error:
            reasons = [reason or str(error) for reason in reasons]
            image_ND, text_ND = empty_ND, empty_ND
    if len(image_ND):
        image_ND, text_ND = _unit(image_ND), _unit(text_ND)
        for row in np.flatnonzero(~np.isfinite(np.einsum("nd,nd->n", image_ND, text_ND))):
            reasons[row] = reasons[row] or "embedding:not_finite"
        ok = np.array([reason is None for reason in reasons], bool)
        image_ND, text_ND = image_ND[ok], text_ND[ok]
    return Cached(samples, reasons, image_ND, text_ND, reader.sha256, reader.num_bytes, dict(reader.warnings))


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    """Vectors (N, D) of unit norm; NaN where there is none."""
    with np.errstate(all="ignore"):
        return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def _rows(source: Source, wanted: range, file_rows: int) -> np.ndarray:
    """Rows of an array (file_rows, D) as float32. _Unfit if there is no such array."""
    try:
        with _array_opened(source) as file:
            shape, is_fortran, dtype = _header(file)
            if len(shape) != 2 or is_fortran or dtype not in _DTYPES or not 0 < shape[1] <= MAX_DIM:
                raise _Unfit("embedding:unreadable")
            if shape[0] != file_rows:
                raise _Unfit("embedding:not_aligned")
            row_bytes = shape[1] * dtype.itemsize
            file.seek(wanted.start * row_bytes, 1)
            data = file.read(len(wanted) * row_bytes)
            if len(data) < len(wanted) * row_bytes:
                raise _Unfit("embedding:unreadable")
    except FileNotFoundError:
        raise _Unfit("embedding:missing") from None
    return np.frombuffer(data, dtype).reshape(len(wanted), shape[1]).astype(np.float32)


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
