"""Where a sample lives in a pool: shard number and row packed in one int64, and flat offsets for arrays by address.

address = shard number * 2**20 + row. Shard numbers are given once, by the pool's append-only shard list, so an address
never changes its meaning; a shard holds at most 2**20 rows and a pool at most 2**43 shards.
"""

import numpy as np

ROW_BITS = 20
MAX_ROWS_PER_SHARD = 1 << ROW_BITS
MAX_SHARDS = 1 << (63 - ROW_BITS)


def pack(shard_number: int, rows: np.ndarray) -> np.ndarray:
    """Addresses (n,) int64 of the given rows (n,) of one shard. ValueError if the shard or a row is out of range."""
    if not 0 <= shard_number < MAX_SHARDS:
        raise ValueError(f"shard number must be in [0, {MAX_SHARDS}), got {shard_number}")
    rows = np.asarray(rows, dtype=np.int64)
    if len(rows) and not (0 <= rows.min() and rows.max() < MAX_ROWS_PER_SHARD):
        raise ValueError(f"rows must be in [0, {MAX_ROWS_PER_SHARD}), got {rows.min()} to {rows.max()}")
    return (np.int64(shard_number) << ROW_BITS) | rows


def shard_of(addresses: np.ndarray) -> np.ndarray:
    """Shard numbers (n,) int64 of addresses (n,)."""
    return np.asarray(addresses, dtype=np.int64) >> ROW_BITS


def row_of(addresses: np.ndarray) -> np.ndarray:
    """Rows within the shard (n,) int64 of addresses (n,)."""
    return np.asarray(addresses, dtype=np.int64) & (MAX_ROWS_PER_SHARD - 1)


def prefix_sums(shard_sizes: np.ndarray) -> np.ndarray:
    """Offsets (S+1,) int64 of each shard's first row in a flat array over S shards; the last one is the array's length.

    ValueError if a size is negative or above 2**20.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    if len(sizes) and not (0 <= sizes.min() and sizes.max() <= MAX_ROWS_PER_SHARD):
        raise ValueError(f"shard sizes must be in [0, {MAX_ROWS_PER_SHARD}], got {sizes.min()} to {sizes.max()}")
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


def flat_positions(addresses: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Positions (n,) int64 in a flat array whose shard offsets are `offsets` (from `prefix_sums`).

    KeyError that names the first address which no shard holds.
    """
    addresses = np.asarray(addresses, dtype=np.int64)
    shards, positions = shard_of(addresses), row_of(addresses)
    # Every ledger update passes here: two gathers from the offsets and no array as long as the shard list.
    if len(shards) == 0 or (0 <= shards.min() and shards.max() < len(offsets) - 1):
        positions += offsets.take(shards)
        held = positions < offsets.take(shards + 1)
    else:
        known = (shards >= 0) & (shards < len(offsets) - 1)
        held = known & (positions < np.diff(offsets, append=offsets[-1])[np.where(known, shards, -1)])
    if not held.all():
        raise KeyError(f"address {int(addresses[~held][0])} is not in the pool")
    return positions
