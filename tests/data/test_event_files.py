"""Event files for TensorBoard: the numbers of a stretch, at their steps, written again as the same file."""

from __future__ import annotations

from pathlib import Path

from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c

from curation.data.event_files import write_events


def events(path: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of a file: records of length, its checksum, data, its checksum."""
    data, found = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        record = data[12 : 12 + length]
        assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(record)
        event = Event.FromString(record)
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


def test_every_number_is_written_at_its_step_and_nothing_else(tmp_path: Path) -> None:
    rows = [{"step": 3, "loss": 0.5, "learnability": None, "note": "text"}, {"step": 4, "loss": 0.25, "repeated": 2}]
    write_events(str(tmp_path), "steps", rows)
    [file] = (tmp_path / "train" / "tensorboard").iterdir()
    assert file.name == "events.out.tfevents.0000000003.steps"
    assert events(file) == [(3, "steps/loss", 0.5), (4, "steps/loss", 0.25), (4, "steps/repeated", 2.0)]


def test_a_stretch_that_is_trained_again_replaces_its_file_and_an_empty_one_has_none(tmp_path: Path) -> None:
    write_events(str(tmp_path), "steps", [])
    assert not list(tmp_path.iterdir())
    for loss in (1.0, 2.0):
        write_events(str(tmp_path), "steps", [{"step": 1, "loss": loss}])
    [file] = (tmp_path / "train" / "tensorboard").iterdir()
    assert events(file) == [(1, "steps/loss", 2.0)]
