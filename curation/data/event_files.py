"""A training log for TensorBoard, beside the parquet one: `tensorboard --logdir OUTPUT/train/tensorboard`.

One event file for each stretch between checkpoints, written whole, like the parts of `step_log`; so steps that a crash
undid are never shown, and buckets work. tensorboardX writes the files; it comes with ray[train], and needs no
TensorBoard.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tensorboardX import SummaryWriter

from curation.data import storage
from curation.data.step_log import Row


def write_events(output: str, name: str, rows: Sequence[Row]) -> None:
    """Write every number of the rows as NAME/COLUMN at its step. Nothing is written if there are none."""
    if not rows:
        return
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for row in rows:
                step = int(row["step"] or 0)
                for column, value in row.items():
                    if column != "step" and isinstance(value, int | float):
                        writer.add_scalar(f"{name}/{column}", value, step)
        [file] = Path(folder).iterdir()
        storage.write_bytes(_url(output, name, rows), file.read_bytes())


def _url(output: str, name: str, rows: Sequence[Row]) -> str:
    # TensorBoard knows event files by "tfevents" in their name, and reads them in the order of their names.
    return storage.join(output, "train", "tensorboard", f"events.out.tfevents.{rows[0]['step']:010d}.{name}")
