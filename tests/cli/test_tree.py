"""What all commands have in common: help, examples, options, suggestions, speed, generated pages."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from kvcm_ray import errors, explanations
from kvcm_ray.cli import reference
from kvcm_ray.cli.main import COMMANDS, cli
from kvcm_ray.testing.served import Served

Kvcm = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
ALL = list(reference.commands())
IDS = ["-".join(path) for path, _ in ALL]
#: Commands that print a script, a file, or what other commands printed.
NOT_JSON = {("demo",), ("completion",), ("config", "example")}
START_S = 0.15


@pytest.mark.parametrize(("path", "command"), ALL, ids=IDS)
def test_every_command(kvcm: Kvcm, path: tuple[str, ...], command: click.Command) -> None:
    options = {option for parameter in command.params for option in parameter.opts}
    assert command.help, "says what it does"
    assert f"kvcm {' '.join(path)}" in command.help, "shows an example"
    assert {"--quiet", "--no-color", "--output"} <= options
    assert "--json" in options or path in NOT_JSON
    assert "--curl" in options or "--url" not in options
    arguments = {p.name for p in command.params if isinstance(p, click.Argument)}
    assert not arguments & {p.name for p in command.params if isinstance(p, click.Option)}
    shown = kvcm(*path, "--help")
    assert (shown.code, shown.err) == (0, "")
    wrong = kvcm(*path, "--no-such-option")
    assert (wrong.code, wrong.out) == (2, "")
    assert "No such option" in wrong.err


def test_the_examples_are_commands(kvcm: Kvcm) -> None:
    """Each example parses: its command and its options exist, its values are of the right kinds."""
    for _, command in ALL:
        for line in (command.help or "").partition("\b\n")[2].splitlines()[1:]:
            words = shlex.split(line.split(" | ")[0].split("# ")[0].split(" > ")[0])
            while words and "=" in words[0]:
                words.pop(0)
            if not words or words[0] != "kvcm":
                continue
            _parses(words[1:], line)


def _parses(words: list[str], line: str) -> None:
    command: click.Command = cli
    context = click.Context(cli, info_name="kvcm")
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found is not None, line
        command, words = found, words[1:]
    options = [p for p in command.params if isinstance(p, click.Option)]
    known = {"--help"} | {name for option in options for name in (*option.opts, *option.secondary_opts)}
    for word in words:
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in known, line


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lines_are_those_of_the_commands(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    first = " ".join((command.help or "").split("\n\n")[0].split())
    assert COMMANDS[name][2] == first


def test_suggestions(kvcm: Kvcm) -> None:
    for typed, meant in ((("stauts",), "status"), (("group", "lsit"), "list"), (("acount",), "account")):
        ran = kvcm(*typed)
        assert (ran.code, f"Did you mean '{meant}'" in ran.err) == (2, True), ran.err
    assert "Did you mean" not in kvcm("xyzzy").err
    assert "--data-dir" in kvcm("status", "--data-dri", "x").err


def test_help_is_quick_and_light() -> None:
    """CPU time, because others use the machine too; and nothing heavy is imported for it."""
    best = 9.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "kvcm_ray.cli", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best < START_S
    code = (
        "import sys; from kvcm_ray.cli.main import main; main(['--help']); "
        "sys.exit(sorted({'numpy', 'httpx', 'ray', 'pydantic', 'lmdb', 'yaml'} & set(sys.modules)) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


# ------------------------------------------------------------------------------------- the options


def test_quiet(kvcm: Kvcm, tmp_path: Path) -> None:
    assert (kvcm("status", "-q").out, kvcm("status", "-q").code) == ("", 0)
    assert kvcm("status", "-q", "--json").json["healthy"] is True
    file = tmp_path / "out"
    ran = kvcm("status", "-q", "--output", str(file))
    assert (ran.out, ran.err) == ("", "")
    assert "healthy" in file.read_text()
    away = kvcm("status", "-q", "--url", "http://127.0.0.1:9")
    assert (away.code, "error[KVCM-U001]" in away.err) == (3, True), "errors are never quiet"
    assert kvcm("status").out, "the next command speaks again"


def test_output(kvcm: Kvcm, tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    ran = kvcm("status", "--json", "--output", str(file))
    assert ran.out == ""
    assert json.loads(file.read_text())["healthy"] is True
    wrong = kvcm("status", "--output", str(tmp_path / "no" / "where"))
    assert (wrong.code, "cannot write" in wrong.err) == (2, True)


def test_curl_does_the_same(kvcm: Kvcm, manager: Served) -> None:
    ran = kvcm("group", "show", "default", "--curl", "--json")
    (line,) = ran.err.splitlines()
    again = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True)
    groups = json.loads(again.stdout)["instance_group"]
    assert ran.json in groups


def test_colours(manager: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal errors are red, unless somebody does not want it."""
    import pty

    def shown(*arguments: str, **environment: str) -> bytes:
        leader, follower = pty.openpty()
        plain = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        child = subprocess.Popen(
            [sys.executable, "-m", "kvcm_ray.cli", "why", "nothing", *arguments],
            stderr=follower, stdout=subprocess.DEVNULL, env={**plain, **environment},
        )  # fmt: skip
        os.close(follower)
        child.wait(30)
        found = os.read(leader, 1 << 16)
        os.close(leader)
        return found

    assert b"\x1b[31m" in shown()
    assert b"\x1b[" not in shown("--no-color")
    assert b"\x1b[" not in shown(NO_COLOR="1")


# -------------------------------------------------------------------------------------- completion


def completed(words: str, cword: int, **environment: str) -> list[str]:
    ran = subprocess.run(
        [sys.executable, "-c", "from kvcm_ray.cli.main import main; main()"],
        env={**os.environ, **environment, "_KVCM_COMPLETE": "bash_complete", "COMP_WORDS": words,
             "COMP_CWORD": str(cword)},
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    return [line.partition(",")[2] for line in ran.stdout.splitlines() if line]


def test_completion(kvcm: Kvcm, manager: Served) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_KVCM_COMPLETE" in kvcm("completion", shell).out
    assert kvcm("completion", "tcsh").code == 2
    assert completed("kvcm gro", 1) == ["group"]
    assert "update" in completed("kvcm group ", 2)
    assert "--quota" in completed("kvcm group create --quo", 3)
    assert completed("kvcm group show d", 3, KVCM_URL=manager.url) == ["default"]
    assert completed("kvcm storage show ", 3, KVCM_URL=manager.url) == ["files", "memory"]
    assert completed("kvcm group show d", 3, KVCM_URL="http://127.0.0.1:9") == []


# --------------------------------------------------------------------------- codes and their pages


def test_every_error_is_explained() -> None:
    kinds = explanations.all_errors()
    assert set(explanations.EXPLANATIONS) == set(kinds)
    codes = [kind.code for kind in kinds]
    assert len(codes) == len(set(codes))
    for kind, found in explanations.EXPLANATIONS.items():
        assert re.fullmatch(r"KVCM-([A-Z]\d{3}|000)", kind.code)
        assert explanations.title(kind).endswith(".")
        assert found.causes, kind
        assert found.steps, kind
        assert found.unchanged, kind
        assert kind.hint or kind.code.endswith("000") or kind is errors.Unsupported, kind


def test_why(kvcm: Kvcm) -> None:
    found = kvcm("why", "KVCM-Q001", "--json").json
    assert found["error"] == "QuotaExceeded"
    assert found["steps"]
    for same in ("q001", "QuotaExceeded", "kvcm-q001"):
        assert kvcm("why", same, "--json").json == found
    assert "Usual causes" in kvcm("why", "Q001").out
    for typed, meant in (("KVCM-Q01", "KVCM-Q001"), ("QuotaExceded", "KVCM-Q001"), ("u01", "KVCM-U001")):
        ran = kvcm("why", typed)
        assert (ran.code, f"did you mean {meant}?" in ran.err) == (1, True), ran.err
    assert len(kvcm("why", "--json").json["codes"]) == len(explanations.all_errors())
    assert "more: kvcm why KVCM-N002" in kvcm("group", "show", "nobody").err


def test_commands_that_explanations_name_exist() -> None:
    texts = [step for found in explanations.EXPLANATIONS.values() for step in found.steps]
    texts += [kind.hint for kind in explanations.all_errors()]
    for text in texts:
        for line in re.findall(r"`(kvcm [^`]+)`", text):
            if not line.startswith("kvcm COMMAND"):
                _parses([word for word in line.split()[1:] if not word.isupper()], line)


@pytest.mark.parametrize("name", sorted(reference.pages()))
def test_generated_pages_are_current(name: str) -> None:
    """`python -m kvcm_ray.cli.reference docs` makes them."""
    assert (ROOT / "docs" / name).read_text() == reference.pages()[name]


def test_no_page_of_a_code_that_is_gone() -> None:
    pages = {path.name for path in (ROOT / "docs" / "errors").glob("*.md")}
    assert pages == {Path(name).name for name in reference.pages() if name.startswith("errors/")}
