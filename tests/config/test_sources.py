"""Where values of the configuration come from, which of them counts, and what is said of wrong ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcm_ray.cli.groups import group_options
from kvcm_ray.cli.lifecycle import SETTING_FLAGS
from kvcm_ray.cluster.options import Options
from kvcm_ray.config import group_form, texts
from kvcm_ray.config.settings import Group, Settings
from kvcm_ray.config.sources import load, look
from kvcm_ray.errors import InvalidArgument

FILE = """\
port: 7001
replicas: 3
tiers: ["shm:64MiB"]
storages:
  Disk1: {path: /mnt/kv}
groups:
  chat:
    quota: 8GiB
    high_water: 95%
    ttl: 2h
    storages: [shm_01, Disk1]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kvcm.yaml"
    path.write_text(FILE)
    return path


# ------------------------------------------------------------------------------- one list of settings


def test_settings_are_the_fields_of_options() -> None:
    """A setting added to `Options` must be one here too, with the same default."""
    options = {field.name: field for field in dataclasses.fields(Options)}
    launch = Settings().launch()
    assert set(launch) == set(options)
    made = Options(**launch)
    for name, field in options.items():
        if field.default is not dataclasses.MISSING:
            assert getattr(made, name) == field.default, name
    assert Options.from_json(made.to_json()) == made


def test_every_setting_has_a_flag_of_up() -> None:
    from kvcm_ray.cli.lifecycle import up

    flags = {parameter.name for parameter in up.params}
    assert set(Settings.model_fields) - {"storages", "groups"} <= flags
    assert len(SETTING_FLAGS) == len(Settings.model_fields) - 2


def test_a_group_is_declared_with_the_options_of_the_group_command() -> None:
    def carrier() -> None: ...

    function = carrier
    for option in group_options:
        function = option(function)
    named = {option.name for option in function.__click_params__}  # type: ignore[attr-defined]
    assert named == set(Group.model_fields) == set(group_form.OPTIONS)


def test_everything_is_explained() -> None:
    for key in texts.all_keys():
        about = texts.explain(key)
        assert about.meaning
        assert about.values
        assert about.default


# ------------------------------------------------------------------------------------ precedence


def test_precedence(file: Path) -> None:
    environ = {"KVCM_PORT": "7002", "KVCM_REPLICAS": "4", "KVCM_HOST": ""}
    loaded = load({"port": 7003, "host": None, "tiers": ()}, file, environ)
    assert (loaded.settings.port, loaded.settings.replicas, loaded.settings.host) == (7003, 4, "127.0.0.1")
    assert loaded.settings.tiers == ["shm:64MiB"]
    assert [str(loaded.origin(key)) for key in ("port", "replicas", "tiers", "host")] == [
        "flag --port", "environment KVCM_REPLICAS", f"file {file}:3", "default",
    ]  # fmt: skip


@given(st.sets(st.sampled_from(["flag", "environment", "file"])))
def test_the_strongest_source_that_speaks_counts(spoken: set[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text("port: 1003\n" if "file" in spoken else "")
        flags = {"port": 1001} if "flag" in spoken else {}
        loaded = load(flags, path, {"KVCM_PORT": "1002"} if "environment" in spoken else {})
    strongest = next((s for s in ("flag", "environment", "file") if s in spoken), "default")
    values = {"flag": 1001, "environment": 1002, "file": 1003, "default": 6382}
    assert loaded.settings.port == values[strongest]
    assert loaded.origin("port").kind == strongest


def test_parts_of_tables_from_several_sources(file: Path) -> None:
    environ = {
        "KVCM_GROUPS__CHAT__QUOTA": "9GiB", "KVCM_STORAGES__DISK1__KIND": "file",
        "KVCM_GROUPS__OTHER__QUOTA": "1GiB", "KVCM_GROUPS__OTHER__STORAGES": "a, b",
    }  # fmt: skip
    settings = load({}, file, environ).settings
    assert settings.groups["chat"].quota == 9 << 30
    assert settings.groups["chat"].ttl == 7200
    assert settings.groups["other"].storages == ["a", "b"]
    assert list(settings.storages) == ["Disk1"], "the file's spelling"
    assert settings.declared()["groups"]["chat"]["high_water"] == 0.95


def test_lists_in_variables() -> None:
    assert load({}, None, {"KVCM_TIERS": "shm:1GiB,file:2GiB"}).settings.tiers == ["shm:1GiB", "file:2GiB"]
    assert load({}, None, {"KVCM_TIERS": '["shm:1GiB"]'}).settings.tiers == ["shm:1GiB"]


def test_which_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "data"
    other.mkdir()
    (other / "kvcm.yaml").write_text("port: 7009\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert load({}, None, {}).file is None
    assert load({"data_dir": other}, None, {}).settings.port == 7009
    assert load({}, None, {"KVCM_DATA_DIR": str(other)}).settings.port == 7009
    monkeypatch.chdir(tmp_path)
    assert load({"data_dir": other}, None, {}).settings.port == 7001, "the working directory first"
    assert load({}, None, {"KVCM_CONFIG": str(other / "kvcm.yaml")}).settings.port == 7009
    assert load({}, file, {"KVCM_CONFIG": str(other / "kvcm.yaml")}).settings.port == 7001


def test_paths_in_a_file_are_relative_to_it(file: Path) -> None:
    file.write_text("data_dir: here\n")
    assert load({}, file, {}).settings.data_dir == str(file.parent / "here")


# -------------------------------------------------------------------------------------- problems


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("prot: 1", 1, "did you mean 'port'?"),
        ("replicas: 2\nreplicas: 3", 2, "is there twice"),
        ("\nport: abc", 2, "valid integer"),
        ("port: 70000", 1, "65535"),
        ("replicas: 0", 1, "greater than or equal to 1"),
        ("groups:\n  chat:\n    quota: 8GX", 3, "'8GX' is not a size"),
        ("groups:\n  chat:\n    quota: true", 3, "not a number"),
        ("groups:\n  chat:\n    high_water: 95 percent", 3, "not a fraction"),
        ("groups:\n  chat:\n    polcy: lru", 3, "did you mean 'policy'?"),
        ("groups:\n  chat:\n    policy: lrru", 3, "lru"),
        ("storages:\n  d:\n    kind: file", 2, "field required"),
        ("storages:\n  d: {path: relative}", 2, "match pattern"),
        ("tiers: [tape:1]", 1, "tier 'tape:1'"),
        ("log_format: xml", 1, "json"),
        ("a: [", 1, "is not YAML"),
        ("- 1", 1, "must hold keys and values"),
    ],
)
def test_problems_name_the_line(file: Path, text: str, line: int, told: str) -> None:
    file.write_text(text + "\n")
    loaded, problems = look({}, file, {})
    assert loaded is None
    (problem,) = problems
    assert problem.where in (f"{file}:{line}", f"{file}:{line + 1}")
    assert told in problem.message


def test_all_problems_at_once(file: Path) -> None:
    file.write_text("prot: 1\nreplicas: 99\n")
    with pytest.raises(InvalidArgument) as caught:
        load({"port": -1}, file, {"KVCM_LOG_LEVEL": "loud"})
    for told in ("did you mean 'port'?", f"{file}:2", "--port: port", "KVCM_LOG_LEVEL: log_level"):
        assert told in caught.value.message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be read"):
        load({}, tmp_path / "none.yaml", {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidArgument):
        load({}, tmp_path / "binary", {})


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80))
def test_no_text_is_too_strange(text: str) -> None:
    """Whatever is in a file: settings, or problems that say where."""
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        loaded, problems = look({}, file.name, {})
    assert (loaded is None) == bool(problems)
    assert all(problem.where.startswith(file.name) for problem in problems)


def test_a_variable_that_is_nearly_a_setting() -> None:
    assert load({}, None, {"KVCM_RELICAS": "3"}).notes == [
        "KVCM_RELICAS is no setting; did you mean KVCM_REPLICAS?"
    ]
    assert load({}, None, {"KVCM_URL": "http://x", "KVCM_SOMETHING": "1"}).notes == []


# ----------------------------------------------------------------------------------------- texts


def test_the_example_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "kvcm.yaml"
    path.write_text(texts.example())
    loaded = load({}, path, {})
    assert loaded.settings.model_copy(update={"data_dir": Settings().data_dir}) == Settings()


def test_the_examples_tables_are_good(tmp_path: Path) -> None:
    lines = texts.example().splitlines()
    begin = lines.index("# storages:")
    tables = [line.removeprefix("# ") for line in lines[begin:] if line.startswith(("# ", "#  "))]
    about = [line for line in tables if not line.startswith("instance groups by name") and line[:1] != "m"]
    text = "\n".join(line for line in about if line.startswith(" ") or line in ("storages:", "groups:"))
    path = tmp_path / "kvcm.yaml"
    path.write_text(text)
    settings = load({}, path, {}).settings
    assert settings.storages["disk1"].path == "/mnt/nvme1/kv"
    assert settings.groups["chat"].quota == 8 << 30
    assert all(value is not None for value in settings.groups["chat"].model_dump().values())


def test_secrets_are_masked() -> None:
    assert texts.SECRET.search("admin_password")
    assert not texts.SECRET.search("token_file")
