from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curation.data.images import ImageError
from curation.rating.study import LINK_OUT, NO_SAMPLES, Item, open_study


def test_a_folder_of_image_folders_is_a_study(folder: Path) -> None:
    (folder / "red" / "deep").mkdir()
    (folder / "red" / "0.png").rename(folder / "red" / "deep" / "x.PNG")
    (folder / "empty").mkdir()
    (folder / ".hidden").mkdir()
    (folder / "red" / "notes.md").write_text("no image")
    study = open_study(str(folder))
    assert {name: len(items) for name, items in study.models.items()} == {"blue": 6, "green": 6, "red": 6}
    assert "deep/x.PNG" in [item.name for item in study.models["red"]] and not study.left_out
    assert study.open(study.models["blue"][0]).size == (24, 24)


def test_a_text_file_beside_an_image_is_its_caption(folder: Path) -> None:
    (folder / "red" / "0.txt").write_text("  <b>a red square</b>\n" + "x" * 5000)
    study = open_study(str(folder))
    item = study.models["red"][0]
    assert study.caption(item).startswith("<b>a red square</b>") and len(study.caption(item)) == 1000
    assert study.caption(study.models["red"][1]) == ""


def diffusion(root: Path, *, arms: dict[str, int], done: bool = True) -> Path:
    """What `jobs.evaluate diffusion` leaves: a unit's folder for each arm and seed."""
    for arm, seeds in arms.items():
        for seed in range(seeds):
            unit = root / "units" / f"{arm}-{seed}"
            unit.mkdir(parents=True)
            np.save(unit / "samples.npy", np.full((4, 8, 8, 3), seed, np.uint8))
            if done:
                (unit / "done.json").write_text(json.dumps({"arm": arm, "seed": seed, "steps": 1}))
    (root / "study.json").write_text("{}")
    return root


def test_the_output_of_the_diffusion_study_is_a_study(tmp_path: Path) -> None:
    root = diffusion(tmp_path, arms={"random": 2, "core-set": 1})
    (root / "units" / "random-1" / "done.json").unlink()
    study = open_study(str(root))
    assert {name: len(items) for name, items in study.models.items()} == {"core-set": 4, "random": 4}
    assert study.left_out == {NO_SAMPLES: 1}
    image = study.open(study.models["random"][3])
    assert (
        image.size == (8, 8) and image.getpixel((0, 0)) == (0, 0, 0) and study.caption(study.models["random"][3]) == ""
    )


def test_samples_of_another_kind_are_refused(tmp_path: Path) -> None:
    root = diffusion(tmp_path, arms={"a": 1, "b": 1})
    np.save(root / "units" / "a-0" / "samples.npy", np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"must be \(n, S, S, 3\) uint8, is \(4, 8, 8\) uint8"):
        open_study(str(root))


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (None, "there is no folder"),
        ([], "holds no model; a study needs a folder of images for each of two models"),
        (["only"], "holds one model only, 'only'"),
    ],
)
def test_what_is_no_study_is_told(tmp_path: Path, made: list[str] | None, complaint: str) -> None:
    root = tmp_path / "study"
    if made is not None:
        root.mkdir()
        for name in made:
            (root / name).mkdir()
            Image.new("RGB", (8, 8)).save(root / name / "0.png")
    with pytest.raises(ValueError, match=complaint):
        open_study(str(root))


def test_a_study_elsewhere_and_one_of_unfinished_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a folder on this machine, got s3://pool/study: copy it here"):
        open_study("s3://pool/study")
    with pytest.raises(ValueError, match=f"finished models of two arms or more; left out: 2 x {NO_SAMPLES}"):
        open_study(str(diffusion(tmp_path, arms={"a": 1, "b": 1}, done=False)))


def test_links_out_of_the_study_are_never_read(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    (folder / "red" / "link.png").symlink_to(secret)
    (folder / "red" / "out").symlink_to(tmp_path)
    (folder / "red" / "inside.png").symlink_to(folder / "red" / "0.png")
    study = open_study(str(folder))
    assert study.left_out == {LINK_OUT: 1} and len(study.models["red"]) == 7
    # What becomes a link after it was listed, and names that nobody listed.
    (folder / "red" / "0.png").unlink()
    (folder / "red" / "0.png").symlink_to(secret)
    (folder / "red" / "0.txt").symlink_to(secret)
    for name in ("0.png", "../../secret.png", str(secret), "out/secret.png"):
        with pytest.raises(ImageError, match="image:unreadable"):
            study.open(Item("red", name, ""))
    assert study.caption(Item("red", "0.png", "")) == ""


def test_a_model_that_is_a_link_out_of_the_study_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="'linked' is a link that leads out of the study, .* copy the images"):
        open_study(str(folder))
    root = diffusion(tmp_path / "units-out", arms={"a": 1, "b": 1})
    (root / "units" / "a-0").rename(tmp_path / "a-0")
    (root / "units" / "a-0").symlink_to(tmp_path / "a-0")
    with pytest.raises(ValueError, match="'a-0' is a link that leads out"):
        open_study(str(root))
