"""``kvcm doctor``: what is wrong, or will be, in order of consequence."""

from __future__ import annotations

import contextlib

import click

from kvcm_ray.cli.output import (
    EXIT_OK,
    EXIT_PROBLEMS,
    coloured,
    emit,
    json_option,
    progress,
)
from kvcm_ray.cli.target import Api, Target, open_api, target_options
from kvcm_ray.errors import Unavailable

COLOURS = {1: "red", 2: "red", 3: "yellow", 4: None}


@click.command()
@click.option("--all", "everything", is_flag=True, help="Also what was looked at and is well.")
@target_options
@json_option
def doctor(everything: bool, target: Target, as_json: bool) -> int:
    """Say what is wrong or will be, why it matters, and what to do about it.

    Looks at the manager, its data directory and this machine, and changes nothing. Works with the manager
    down. Exit code 4 if there are problems, 3 if there is neither a manager nor a data directory.

    \b
    Examples:
      kvcm doctor
      kvcm doctor --data-dir /data/kvcm --all
    """
    from kvcm_ray.doctor import CHECKS, Checked, Place, look, problems, to_dict

    directory = target.directory() if target.url is None or target.data_dir is not None else None
    with contextlib.ExitStack() as stack:
        api, url, why = _manager(target, stack)
        place = Place(directory, api.call if api else None, url)
        if api is None and place.folder is None:
            raise Unavailable(why or f"no manager and no data directory at {directory}")
        stack.callback(place.close)
        checked: list[Checked] = []
        with progress("checking", len(CHECKS), "checks") as bar:
            for each in look(place):
                checked.append(each)
                bar.add()
    found = problems(checked)
    lines: list[str] = []
    for number, problem in enumerate(found, 1):
        sentence = coloured(problem.sentence, fg=COLOURS[problem.weight], to_stdout=True)
        lines += [f"{number}. {sentence}", f"   seen: {problem.evidence}", f"   run:  {problem.command}"]
    if everything:
        lines += [f"{'-' if c.problems else '+'} {c.name}: {c.saw}" for c in checked]
    lines.append(f"{len(checked)} checks, " + (f"{len(found)} problems" if found else "nothing is wrong"))
    emit({**to_dict(checked), "running": api is not None, "url": url}, as_json, lines)
    return EXIT_PROBLEMS if found else EXIT_OK


def _manager(target: Target, stack: contextlib.ExitStack) -> tuple[Api | None, str, str]:
    """The API of the manager if it answers, where it should, and why it does not. Raises what it refuses."""
    url = ""
    try:
        url = target.find_url()
        api = stack.enter_context(open_api(target))
        api.call("checkHealth")
    except Unavailable as error:
        return None, url, error.message
    return api, url, ""
