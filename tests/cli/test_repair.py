"""`kvcm fsck --repair`: afterwards everything agrees, and no block that could be read is gone."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcm_ray import fsck
from kvcm_ray.actors import paths
from kvcm_ray.cluster.facts import DataDirLock, Owner
from kvcm_ray.core.model import Segment
from kvcm_ray.errors import InUse, Unavailable
from kvcm_ray.index.lock import process_start
from kvcm_ray.repair import Repairs, repair
from kvcm_ray.testing.commands import run_command
from kvcm_ray.testing.stopped import BLOCKS, COPIES, SLOTS, SPECS, Stopped

ROUNDS = 8


@pytest.fixture
def stopped(tmp_path: Path) -> Stopped:
    return Stopped(tmp_path / "data")


def check(stopped: Stopped, *, deep: bool = False) -> fsck.FsckReport:
    return fsck.check(stopped.root, settle_s=0, deep=deep)


def repaired(stopped: Stopped, **more: object) -> Repairs:
    """Repair, and see that it was what the dry run said, that all is well, and that it is done once."""
    before = stopped.contents()
    planned = repair(stopped.root, do=False, **more)  # type: ignore[arg-type]
    assert stopped.contents() == before, "a dry run changes nothing"
    done = repair(stopped.root, **more)  # type: ignore[arg-type]
    assert planned.anything == done.anything
    after = stopped.contents()
    assert {place: after.get(place) for place in before} == before, "what could be read still can"
    assert check(stopped, deep=bool(more.get("deep"))).ok
    assert not repair(stopped.root, **more).anything  # type: ignore[arg-type]
    return done


def test_nothing_to_repair(stopped: Stopped) -> None:
    assert check(stopped, deep=True).ok
    assert not repaired(stopped).anything
    assert len(stopped.contents()) == 4 * BLOCKS


def test_a_block_without_bytes_goes(stopped: Stopped) -> None:
    stopped.break_header(stopped.infos[0], BLOCKS - 1)
    assert check(stopped).dangling_locations == 1
    done = repaired(stopped)
    assert (done.removed_blocks, done.served_from_copy) == (1, 0)
    assert done.erased_bytes == sum(spec.size for spec in SPECS), "also what was left of it"
    assert len(stopped.contents()) == 4 * BLOCKS - 1


def test_a_block_with_a_copy_is_served_from_there(stopped: Stopped) -> None:
    stopped.break_header(stopped.infos[0], 2)
    done = repaired(stopped)
    assert (done.removed_blocks, done.served_from_copy) == (0, 1)
    assert len(stopped.contents()) == 4 * BLOCKS


def test_a_copy_without_bytes_is_forgotten(stopped: Stopped) -> None:
    from kvcm_ray.testing.storage_lab import flip

    flip(stopped.file(stopped.infos[1], 3, "tp0.hdr", stopped.slow), (1 * 64 + 9) * 8)
    done = repaired(stopped)
    assert (done.dropped_copies, done.removed_blocks) == (1, 0)
    assert len(stopped.contents()) == 4 * BLOCKS


def test_rot_is_found_when_every_byte_is_read(stopped: Stopped) -> None:
    stopped.rot(stopped.infos[0], BLOCKS - 2)
    assert not repaired(stopped).anything
    assert repaired(stopped, deep=True).removed_blocks == 1


def test_a_lost_segment(stopped: Stopped) -> None:
    stopped.lose_segment(stopped.infos[0])
    done = repaired(stopped)
    assert done.removed_blocks == BLOCKS
    assert check(stopped).blocks == 3 * BLOCKS


def test_bytes_and_segments_that_nobody_knows(stopped: Stopped) -> None:
    stopped.leave_bytes(stopped.infos[0], SLOTS - 1)
    stopped.leave_segment(stopped.infos[1])
    done = repaired(stopped)
    assert done.dropped_segments == 1
    assert done.erased_bytes >= 3 * sum(spec.size for spec in SPECS)


def test_trash_that_names_blocks_would_erase_them(stopped: Stopped) -> None:
    stopped.leave_trash(stopped.infos[0], [3, 4, SLOTS - 2])
    assert not check(stopped).counters_ok
    assert repaired(stopped).mended_indexes == 1


def test_damaged_records(stopped: Stopped) -> None:
    stopped.break_run(stopped.infos[0])
    assert check(stopped).corrupt_records
    assert repaired(stopped).mended_indexes == 1


def test_an_index_that_cannot_be_opened_is_made_again(stopped: Stopped) -> None:
    whole = stopped.contents()
    stopped.truncate_index(stopped.infos[0])
    done = repaired(stopped)
    assert done.rebuilt_indexes == 1
    assert stopped.contents() == whole, "from block headers"


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_any_damage(tmp_path: Path, seed: int) -> None:
    """Several kinds at once, in any order."""
    stopped, chance = Stopped(tmp_path / "data"), random.Random(seed)
    damages = [
        lambda info: stopped.break_header(info, chance.randrange(BLOCKS)),
        lambda info: stopped.rot(info, chance.randrange(BLOCKS)),
        lambda info: stopped.leave_bytes(info, chance.randrange(BLOCKS, SLOTS)),
        lambda info: stopped.leave_segment(info, chance.randrange(10, 99)),
        lambda info: stopped.leave_trash(info, chance.sample(range(SLOTS), 3)),
        lambda info: stopped.lose_segment(info),
    ]
    for _ in range(chance.randint(1, 6)):
        chance.choice(damages)(chance.choice(stopped.infos))
    if chance.random() < 0.3:
        stopped.break_run(stopped.infos[0])
    repaired(stopped, deep=True)


# ---------------------------------------------------------------------------- what is left alone


def test_a_storage_that_is_not_mounted(stopped: Stopped) -> None:
    root = Path(str(stopped.fast.root))
    away = root.rename(root.with_name("unmounted"))
    root.mkdir()
    done = repair(stopped.root)
    assert not done.anything
    assert "--lost fast" in done.notes[0]
    root.rmdir()
    away.rename(root)
    assert len(stopped.contents()) == 4 * BLOCKS, "mounted again, nothing is lost"
    shutil.rmtree(root)
    root.mkdir()
    done = repair(stopped.root, lost=["fast"])
    assert (done.removed_blocks, done.served_from_copy) == (4 * BLOCKS - 2 * COPIES, 2 * COPIES)
    assert check(stopped).ok


def test_segments_of_another_manager(stopped: Stopped, tmp_path: Path) -> None:
    """A storage outside of the data directory may be shared; what is unknown there is not ours to remove."""
    from kvcm_ray.actors.registry_store import RegistryStore
    from kvcm_ray.core.model import NfsSpec, StorageConfig
    from kvcm_ray.storage_adapters import SegmentOwner
    from kvcm_ray.storage_adapters.file import FileStorage

    shared = FileStorage("shared", str(tmp_path / "shared"))
    store = RegistryStore(paths.registry_dir(stopped.root), write=True)
    store.write([StorageConfig("shared", nfs=NfsSpec(str(tmp_path / "shared")))])
    store.close()
    theirs = Segment(1, "shared", "other/aaaaaaaa-000001", SPECS, SLOTS)
    shared.create_segment(theirs, SegmentOwner("g", "other", "aaaaaaaa"))
    stopped.store(shared, theirs, [0], [1], 1)
    done = repair(stopped.root)
    assert not done.anything
    assert "may be another manager's" in done.notes[0]
    assert shared.stored_bytes(theirs)


def test_not_beside_a_manager(stopped: Stopped) -> None:
    """Whoever owns the data directory keeps repairs out, and a repair keeps managers out."""
    lock = DataDirLock(stopped.root)
    lock.name_owner(Owner(os.getpid(), process_start(os.getpid()), "", ""))
    for do in (True, False):
        with pytest.raises(InUse):
            repair(stopped.root, do=do)
    lock.release()
    assert not repair(stopped.root).anything


def test_an_older_writer_is_fenced(stopped: Stopped) -> None:
    """A group's actor that outlived its manager cannot write any more."""
    from kvcm_ray.errors import Fenced

    info = stopped.infos[0]
    with stopped.writing(info) as older:
        repair(stopped.root)
        with pytest.raises(Fenced), older.begin():
            pass


def test_no_data_directory(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        repair(tmp_path / "none")
    assert not (tmp_path / "none").exists()


# ----------------------------------------------------------------------------------- the command


def test_the_command(
    stopped: Stopped, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    def kvcm(*arguments: str) -> Callable[..., object]:
        return run_command(capsys, ("fsck", "--data-dir", str(stopped.root), *arguments))  # type: ignore[return-value]

    monkeypatch.setattr("sys.stdin", io.StringIO())
    stopped.break_header(stopped.infos[0], BLOCKS - 1)
    dry = kvcm("--repair", "--dry-run", "--json")
    assert dry.code == 4
    assert (dry.json["repairs"]["removed_blocks"], dry.json["dangling_locations"]) == (1, 1)
    refused = kvcm("--repair")
    assert (refused.code, "--yes" in refused.err) == (1, True)
    done = kvcm("--repair", "--yes", "--json")
    assert done.code == 0
    assert (done.json["repairs"]["removed_blocks"], done.json["dangling_locations"]) == (1, 0)
    again = kvcm("--repair")
    assert (again.code, "nothing to repair" in again.out) == (0, True)
    assert kvcm("--dry-run").code == 2


def test_killed_in_the_middle(stopped: Stopped) -> None:
    """Repairing again after a death leads to the same end."""
    for info in stopped.infos:
        stopped.lose_segment(info)
        stopped.leave_bytes(info, SLOTS - 1)
    before = stopped.contents()
    code = (
        "import os, sys; from kvcm_ray import repair\n"
        "take = repair._take_out\n"
        "def die(*args): take(*args); os._exit(9)\n"
        "repair._take_out = die\n"
        "repair.repair(sys.argv[1])"
    )
    died = subprocess.run([sys.executable, "-c", code, str(stopped.root)], check=False)
    assert died.returncode == 9
    repaired(stopped)
    assert stopped.contents() == before
