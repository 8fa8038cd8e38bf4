"""What the jobs' command lines share: a recipe by name, its fields as flags, errors in one line, exit codes that tell.

Exit code 0: all is well. 1: the run failed, and says why; what it committed stays, and the same command goes on from
there. 2: the command or the recipe is wrong. 3: another run holds the output. 4: the run was stopped before its end, by
--max-hours or SIGTERM; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, get_args

import tyro

from curation.data.lease import OutputInUse
from curation.distributed import logs
from curation.distributed.pipeline import ActorsFailed
from curation.distributed.stopping import Interrupted, Stop
from curation.distributed.train import TrainFailed
from curation.recipe.parts import Part
from jobs import log
from jobs.exit_codes import EXIT_FAILED, EXIT_IN_USE, EXIT_OK, EXIT_STOPPED, EXIT_USAGE

AnyRecipe = TypeVar("AnyRecipe", bound=Part)
AnyPart = TypeVar("AnyPart", bound=Part)
Recipes = Mapping[str, Callable[[], AnyRecipe]]


class Command(NamedTuple):
    """One job's command line: `python -m jobs.NAME RECIPE [flags] [fields]`."""

    name: str
    doc: str | None

    def run(
        self,
        arguments: list[str] | None,
        *,
        recipes: Recipes[AnyRecipe],
        recipe_type: type[AnyRecipe],
        job: Callable[[AnyRecipe, Stop], int],
        dry_run: Callable[[AnyRecipe], None],
    ) -> int:
        """Read the recipe and run the job; returns the exit code."""
        arguments = sys.argv[1:] if arguments is None else arguments
        program = f"python -m jobs.{self.name}"
        parser = argparse.ArgumentParser(program, description=self.doc, add_help=False, allow_abbrev=False)
        parser.add_argument("recipe", nargs="?", help=f"{', '.join(recipes)}, or a .json file")
        parser.add_argument("--dry-run", action="store_true", help="print the plan and touch nothing")
        parser.add_argument("--max-hours", type=float, help="stop cleanly after so long, with exit code 4")
        parser.add_argument("--log-json", action="store_true", help="one JSON object a line, with the run's id")
        known, rest = parser.parse_known_args(arguments)
        if known.recipe is None:
            print(
                f"usage: {program} RECIPE [--dry-run] [--max-hours H] [--log-json] [fields]\n"
                f"RECIPE: {', '.join(recipes)}, or a .json file; "
                f"{program} RECIPE --help lists the fields.",
                file=sys.stderr,
            )
            return EXIT_USAGE
        logs.configure(as_json=known.log_json)
        try:
            stop = Stop(max_hours=known.max_hours)
            start = load_recipe(known.recipe, recipes=recipes, recipe_type=recipe_type)
            recipe = parsed(recipe_type, start, rest, program=f"{program} {known.recipe}")
            if known.dry_run:
                dry_run(recipe)
                print("dry run: nothing was touched")
                return EXIT_OK
            with stop.on_sigterm(interrupts=True):
                return job(recipe, stop)
        except OutputInUse as error:
            return _failed(EXIT_IN_USE, f"error: {error}")
        except ValueError as error:  # pydantic's ValidationError is one
            return _failed(EXIT_USAGE, f"error: {error}")
        except Interrupted as error:
            return was_stopped(error)
        except (OSError, ActorsFailed, TrainFailed) as error:
            told = f"error: {type(error).__name__}: {error}\nWhat is committed stays: run again to go on."
            return _failed(EXIT_FAILED, told)


def parsed(recipe_type: type[AnyRecipe], start: AnyRecipe, arguments: list[str], *, program: str) -> AnyRecipe:
    """The recipe with what the flags say. SystemExit as argparse has it, ValueError if the fields do not fit together.

    A part that may be None, such as `reference.weights`, is there as soon as one of its flags is; tyro by itself wants
    a subcommand for it, which may be given too (`reference.weights:none`).
    """
    flags = [argument.replace("_", "-") for argument in arguments]
    wanted = {path for path in _optional_parts(start) if {"-h", "--help"} & {*flags} or _names_field_of(path, flags)}
    return tyro.cli(
        recipe_type,
        prog=program,
        default=_with_parts(start, wanted),
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,) if wanted else (),
    )


def _names_field_of(path: str, flags: list[str]) -> bool:
    return any(flag.startswith(f"--{path}.") for flag in flags)


def _optional_parts(part: Part, prefix: str = "") -> dict[str, type[Part]]:
    """Paths of the parts that may be None and have flags, and what they are then; those read as JSON have none."""
    found: dict[str, type[Part]] = {}
    for name, field in type(part).model_fields.items():
        path, value = f"{prefix}{name.replace('_', '-')}", getattr(part, name)
        kinds = [kind for kind in get_args(field.annotation) if isinstance(kind, type) and issubclass(kind, Part)]
        if type(None) in get_args(field.annotation) and kinds and not field.metadata:
            found[path] = kinds[0]
        if isinstance(value, Part):
            found |= _optional_parts(value, f"{path}.")
    return found


def _with_parts(part: AnyPart, wanted: set[str], prefix: str = "") -> AnyPart:
    """The same, with defaults for the wanted parts that are None."""
    kinds, changes = _optional_parts(part), {}
    for name in type(part).model_fields:
        path, value = f"{prefix}{name.replace('_', '-')}", getattr(part, name)
        if isinstance(value, Part):
            changes[name] = _with_parts(value, wanted, f"{path}.")
        elif path in wanted:
            changes[name] = kinds[name.replace("_", "-")]()
    return part.model_copy(update=changes)


def _failed(code: int, message: str) -> int:
    log.say(message, level=logging.ERROR, exit_code=code)
    return code


def was_stopped(error: Interrupted) -> int:
    """The exit code of a job that was stopped, which is said."""
    return _failed(EXIT_STOPPED, f"stopped: {error}. What is committed stays: run again to go on.")


class Account(Protocol):
    """What any run's account says of its end."""

    @property
    def failures(self) -> list[str]: ...

    @property
    def stopped(self) -> str | None: ...


def ended(run: Account, *, of: str) -> None:
    """For a job that goes on from a run's end: RuntimeError if it failed, Interrupted if it was stopped before."""
    if run.failures:
        raise RuntimeError(f"{of}: {run.failures[0]}")
    if run.stopped:
        raise Interrupted(f"{run.stopped}, in {of}")


def exit_code(failures: list[str], stopped: str | None) -> int:
    """What a run's account means for the exit code; failures and a stop are said."""
    for failure in failures:
        log.say(f"FAILED: {failure}", level=logging.ERROR)
    if stopped and not failures:
        log.say(f"stopped: {stopped}. Run again to go on.", level=logging.WARNING)
    return EXIT_FAILED if failures else EXIT_STOPPED if stopped else EXIT_OK


def load_recipe(name: str, *, recipes: Recipes[AnyRecipe], recipe_type: type[AnyRecipe]) -> AnyRecipe:
    """A recipe by name, or from the JSON file of one (a run's recipe.json too). ValueError if there is none."""
    if name in recipes:
        return recipes[name]()
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        try:
            return recipe_type.model_validate_json(_recipe_text(path))
        except ValueError as error:  # no JSON, or not of our fields
            raise ValueError(f"{name} is no recipe of ours: {error}") from error
    nearest = get_close_matches(name, recipes, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"no recipe {name!r}: known are {', '.join(recipes)}, or a .json file{hint}")


def _recipe_text(path: Path) -> str:
    """The recipe's JSON, out of a plain recipe file or a run's recipe.json, which holds versions beside it."""
    whole = json.loads(path.read_text())
    return json.dumps(whole.get("recipe", whole) if isinstance(whole, dict) else whole)
