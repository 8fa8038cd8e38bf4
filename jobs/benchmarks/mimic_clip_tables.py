"""The tables of `mimic_clip`: means with intervals over seeds, differences paired, and what is printed."""

from __future__ import annotations

from typing import Any

from jobs.benchmarks.dynamic_tables import paired
from jobs.benchmarks.race import interval, show


def summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with intervals over seeds; differences are paired."""
    names = list(done[0]["runs"])
    ends = {
        name: {field: [seed["runs"][name][field] for seed in done] for field in done[0]["runs"][name]} for name in names
    }
    filters = {
        name: {
            field: [seed["filters"][name][field] for seed in done] for field in ("held_out_loss", "mean_r1", "samples")
        }
        for name in done[0]["filters"]
    }
    alone = filters["clip score"]
    return {
        "runs": {
            name: {
                **{field: interval(of[field]) for field in ("held_out_loss", "mean_r1", "seconds")},
                "loss_minus_plain": paired(of["held_out_loss"], ends["plain"]["held_out_loss"]),
                "share_of_plain_steps": _reached(of["share_of_steps"]),
                "share_of_plain_seconds": _reached(of["share_of_seconds"]),
            }
            for name, of in ends.items()
        },
        "filters": {
            name: {
                **{field: interval(of[field]) for field in of},
                "r1_minus_clip_score": paired(of["mean_r1"], alone["mean_r1"]),
                "loss_minus_clip_score": paired(of["held_out_loss"], alone["held_out_loss"]),
            }
            for name, of in filters.items()
        },
        "auc": {name: interval([seed["auc"][name] for seed in done]) for name in done[0]["auc"]},
        "auc_of_one_scoring": {
            when: {name: interval([seed["auc_of_one_scoring"][when][name] for seed in done]) for name in of}
            for when, of in done[0]["auc_of_one_scoring"].items()
        },
        "by_seed": done,
    }


def _reached(shares: list[float | None]) -> dict[str, Any]:
    """Over the seeds that reached the goal, and how many did."""
    known = [share for share in shares if share is not None]
    return {"seeds": len(known), "of": len(shares), **(interval(known) if known else {})}


def show_all(figures: dict[str, Any]) -> None:
    """Print the study's tables."""
    print("\nheld-out loss, mean R@1, share of plain training's steps and CPU seconds to its last loss")
    for name, found in figures["runs"].items():
        reached = (found["share_of_plain_steps"], found["share_of_plain_seconds"])
        told = "   ".join(
            f"{show(of)} ({of['seeds']} of {of['of']})" if of["seeds"] else "not reached" for of in reached
        )
        print(f"  {name:<20}{show(found['held_out_loss'])}   {show(found['mean_r1'])}   {told}")
    for name, found in figures["filters"].items():
        fewer = f"R@1 minus clip score's {show(found['r1_minus_clip_score'])}"
        print(f"  {name:<24}{show(found['samples'])} samples   R@1 {show(found['mean_r1'])}   {fewer}")
    for began, found in figures["auc_of_two_towers"].items():
        told = ", ".join(f"after {steps} steps {show(of)}" for steps, of in found.items())
        print(f"AUC of two towers, reference's start {began}: {told}")
    print("AUC, mean scores: " + ", ".join(f"{name} {show(of)}" for name, of in figures["auc"].items()))
    for when, of in figures["auc_of_one_scoring"].items():
        print(f"AUC, {when}: " + ", ".join(f"{name} {show(found)}" for name, found in of.items()))
