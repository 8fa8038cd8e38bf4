from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curation.data.held_out import read_held_out
from curation.data.read_rules import ReadRules
from curation.models.resize import load_resize


def write(path: Path, captions: list[str], *, labels: list[str] | None = None, broken: tuple[int, ...] = ()) -> None:
    with tarfile.open(path, "w") as tar:
        for row, caption in enumerate(captions):
            out = io.BytesIO()
            Image.new("RGB", (20, 20), (row * 40, 0, 0)).save(out, "PNG")
            members = {"png": b"?" if row in broken else out.getvalue(), "txt": caption.encode()}
            if labels:
                members["json"] = json.dumps({"class": labels[row]}).encode()
            for extension, data in members.items():
                header = tarfile.TarInfo(f"{row:03d}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


def read(patterns: Path, *, max_samples: int = 100, label_field: str | None = None):
    return read_held_out(
        str(patterns),
        max_samples=max_samples,
        resize=load_resize("nano"),
        rules=ReadRules(),
        max_pixels=10**6,
        label_field=label_field,
    )


def test_pairs_come_in_order_and_broken_ones_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", ["one", "two", "three"], broken=(1,))
    write(tmp_path / "b.tar", ["four"])
    held_out = read(tmp_path)
    assert held_out.captions == ["one", "three", "four"] and held_out.num_dropped == 1
    assert held_out.images.shape == (3, 48, 48, 3) and held_out.images.dtype == np.uint8
    assert held_out.images[1, 0, 0].tolist() == [80, 0, 0]
    assert len(set(held_out.uids)) == 3 and held_out.labels == [None] * 3
    assert held_out.sha256s[0] == held_out.sha256s[2] != held_out.sha256s[1]  # the first images of both are one


def test_the_first_so_many_are_taken_and_labels_are_text(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", ["one", "two", "three"], labels=["cat", "dog", "cat"])
    held_out = read(tmp_path, max_samples=2, label_field="class")
    assert held_out.captions == ["one", "two"] and held_out.labels == ["cat", "dog"]


def test_a_set_without_a_readable_pair_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", ["one"], broken=(0,))
    with pytest.raises(ValueError, match=r"evaluate.shards: .* holds no pair that can be read \(1 cannot\)"):
        read(tmp_path)
