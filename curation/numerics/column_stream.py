"""A flat array as a .npy stream: written and read in slices, with a checksum, so it takes no second array in memory.

Any reader of .npy files reads what is written here. Files are opened by the caller.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

WRITE_BYTES = 64 << 20
READ_BYTES = 1 << 20
"""Where a piece of this size is all zeros, the pages of the array that is filled stay untouched."""


def slices(length: int, size: int) -> Iterator[slice]:
    """[0, length) in slices of at most `size`."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def write_column(file: BinaryIO, column: np.ndarray) -> dict[str, int]:
    """Writes a column (n,), which may be a strided view; returns its length and the crc32 of its data."""
    header = {"descr": np.lib.format.dtype_to_descr(column.dtype), "fortran_order": False, "shape": column.shape}
    np.lib.format.write_array_header_1_0(file, header)
    crc32 = 0
    for rows in slices(len(column), WRITE_BYTES // column.itemsize):
        data = np.ascontiguousarray(column[rows]).data.cast("B")
        crc32 = zlib.crc32(data, crc32)
        file.write(data)
        del data  # or the next slice would be made beside it
    return {"length": len(column), "crc32": crc32}


def read_column(file: BinaryIO, column: np.ndarray, written: Mapping[str, Any], *, name: str) -> None:
    """Fills a column of zeros (n,), which may be a strided view, with what `write_column` wrote.

    ValueError that bears the name if the stream is not a .npy of the column's dtype and length, is cut off, goes on
    after its end, or has another checksum than `written`.
    """
    try:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    if shape != column.shape or dtype != column.dtype:
        raise ValueError(f"{name} must be {column.dtype} {column.shape}, got {dtype} {shape}")
    crc32 = 0
    for rows in slices(len(column), READ_BYTES // column.itemsize):
        data = _read(file, (rows.stop - rows.start) * column.itemsize)
        crc32 = zlib.crc32(data, crc32)
        piece = np.frombuffer(data[: len(data) - len(data) % column.itemsize], dtype=column.dtype)
        if len(piece) < rows.stop - rows.start:
            raise ValueError(f"{name} is cut off: it ends at row {rows.start + len(piece)} of {len(column)}")
        if piece.any():
            column[rows] = piece
    if file.read(1):
        raise ValueError(f"{name} goes on after its {len(column)} rows")
    if {"length": len(column), "crc32": crc32} != written:
        raise ValueError(f"{name} is damaged: its checksum is {crc32}, it was written with {written}")


def _read(file: BinaryIO, size: int) -> bytes:
    """The next `size` bytes, fewer only at the end: a raw file may give less than it was asked for."""
    data = file.read(size)
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data
