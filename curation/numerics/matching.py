"""Where samples went: their old and new addresses, matched by uid."""

from __future__ import annotations

import numpy as np


def moves(
    old_uids: np.ndarray, old_addresses: np.ndarray, new_uids: np.ndarray, new_addresses: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """(from, to, lost): addresses (m,) int64 that samples leave and take, and how many old samples have no new place.

    uids (n, 2) uint64, addresses (n,) int64. A uid that repeats stands for its lowest address on either side, so an
    old sample whose uid has a lower address is lost too: m + lost old samples in all. ValueError if uids and addresses
    of a side do not fit each other.
    """
    for side, uids, addresses in (("old", old_uids, old_addresses), ("new", new_uids, new_addresses)):
        if uids.shape != (len(addresses), 2) or uids.dtype != np.uint64 or addresses.dtype.kind not in "iu":
            raise ValueError(
                f"{side}_uids must be uint64 (n, 2) beside {side}_addresses (n,) of integers, "
                f"got {uids.dtype} {uids.shape} and {addresses.dtype} {addresses.shape}"
            )
    uids = np.concatenate([old_uids, new_uids])
    addresses = np.concatenate([old_addresses, new_addresses]).astype(np.int64)
    is_new = np.arange(len(uids)) >= len(old_uids)
    # By uid, of each uid the old samples first, by address: the first row of a (uid, side) is the one that stands.
    order = np.lexsort((addresses, is_new, uids[:, 1], uids[:, 0]))
    uids, addresses, is_new = uids[order], addresses[order], is_new[order]
    same_uid = (uids[1:] == uids[:-1]).all(axis=1)
    stands = np.concatenate([[True], ~same_uid | (is_new[1:] != is_new[:-1])])[: len(uids)]
    uids, addresses, is_new = uids[stands], addresses[stands], is_new[stands]
    pairs = np.flatnonzero((uids[1:] == uids[:-1]).all(axis=1))
    return addresses[pairs], addresses[pairs + 1], len(old_uids) - len(pairs)
