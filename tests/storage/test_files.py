"""What can happen to files: cuts, torn headers, holes, full devices, other files in their place."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.errors import SegmentMissing, StorageFull, StorageIOError
from kvcm_ray.storage_adapters import erase, header, open_storage, system
from kvcm_ray.storage_adapters.file import FileStorage
from kvcm_ray.storage_adapters.handles import FILES_PER_HANDLE, Handle, HandleCache
from kvcm_ray.storage_adapters.path_storage import PathStorage
from kvcm_ray.storage_adapters.shm import SharedMemoryStorage
from kvcm_ray.testing.storage_lab import OWNER, Lab, arrays, block


def another(lab: Lab) -> Lab:
    """The same storage as another process would open it."""
    assert isinstance(lab.storage, PathStorage)
    return Lab(type(lab.storage)("s", lab.storage.root))


# ------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("suffix", [".dat", ".hdr"])
@pytest.mark.parametrize("size", [100, 65_536])
def test_cut_anywhere_is_a_miss_or_the_bytes(path_lab: Lab, size: int, suffix: str) -> None:
    """Cut shorter and shorter while the files stay open (and mapped)."""
    segment = path_lab.segment(size, slots=8)
    content = {slot: block(size, slot) for slot in range(8)}
    path_lab.write(segment, content)
    assert None not in path_lab.read(segment, list(range(8)))
    unit = size if suffix == ".dat" else header.HEADER_BYTES
    chance = random.Random(size)
    cuts = sorted({chance.randrange(8 * unit) for _ in range(60)} | {0, unit, 4 * unit - 1})
    for cut in reversed(cuts):
        os.truncate(path_lab.file(segment, suffix), cut)
        whole = cut // unit
        expected = [content[slot] if slot < whole else None for slot in range(8)]
        assert path_lab.read(segment, list(range(8))) == expected, cut
        assert another(path_lab).read(segment, list(range(8))) == expected, cut
    assert path_lab.storage.check_segment(segment) != ""
    with pytest.raises(SegmentMissing, match="are needed"):
        path_lab.write(segment, {7: block(size, 7)})
    path_lab.delete(segment, list(range(8)))
    path_lab.storage.create_segment(segment, OWNER)  # grows the files again
    path_lab.write(segment, {7: block(size, 7)}, generation=2)
    assert path_lab.read(segment, [7], generation=2) == [block(size, 7)]


def test_cut_and_grown_again_is_a_miss(path_lab: Lab) -> None:
    """Holes where there were bytes: all sizes fit, the headers too."""
    segment = path_lab.segment(65_536, slots=8)
    path_lab.write(segment, {slot: block(65_536, slot) for slot in range(8)})
    assert None not in path_lab.read(segment, list(range(8)))
    data = path_lab.file(segment, ".dat")
    os.truncate(data, 3 * 65_536 + 5000)
    os.truncate(data, 8 * 65_536)
    found = path_lab.read(segment, list(range(8)))
    assert found == [block(65_536, slot) for slot in range(3)] + [None] * 5
    assert data.stat().st_blocks * 512 <= 4 * 65_536, "reading must not fill holes"


def test_a_torn_header_is_a_miss(path_lab: Lab) -> None:
    """Any prefix of the new header over the old one, with the new payload or the old one."""
    segment = path_lab.segment(64, slots=2)
    path_lab.write(segment, {1: block(64, 1)}, generation=1)
    old = path_lab.file(segment, ".hdr").read_bytes()
    old_data = path_lab.file(segment, ".dat").read_bytes()
    path_lab.write(segment, {1: block(64, 2)}, generation=2)
    new = path_lab.file(segment, ".hdr").read_bytes()
    new_data = path_lab.file(segment, ".dat").read_bytes()
    for cut in range(header.HEADER_BYTES + 1):
        at = header.HEADER_BYTES + cut
        path_lab.file(segment, ".hdr").write_bytes(new[:at] + old[at:])
        for data in (old_data, new_data):
            path_lab.file(segment, ".dat").write_bytes(data)
            first = path_lab.read(segment, [1], generation=1)[0]
            second = path_lab.read(segment, [1], generation=2)[0]
            assert first in (None, block(64, 1))
            assert second in (None, block(64, 2))
            assert data == new_data or second is None
            assert data == old_data or first is None
            assert cut >= 48 or second is None  # its checksum is not whole before that


def test_garbage_instead_of_files(path_lab: Lab) -> None:
    segment = path_lab.segment(100, slots=64)
    chance = np.random.default_rng(5)
    for _ in range(20):
        path_lab.file(segment, ".hdr").write_bytes(chance.bytes(64 * 64))
        path_lab.file(segment, ".dat").write_bytes(chance.bytes(6400))
        assert path_lab.read(segment, list(range(64))) == [None] * 64
        assert path_lab.storage.headers(segment, "tp0").size == 0
    (path_lab.file(segment, ".hdr").parent / "segment.json").write_bytes(chance.bytes(300))
    (found,) = path_lab.storage.list_segments()
    assert (found.path, found.segment, found.owner) == (segment.path, None, None)


def test_headers_moved_elsewhere_prove_nothing(path_lab: Lab) -> None:
    """A slot copied to another slot, spec or segment, header and all, is not that block."""
    segment = path_lab.segment(64, 64, slots=4)
    path_lab.write(segment, {0: block(64, 0)})
    data, heads = path_lab.file(segment, ".dat"), path_lab.file(segment, ".hdr")
    data.write_bytes(data.read_bytes()[:64] * 4)
    heads.write_bytes(heads.read_bytes()[:64] * 4)
    assert path_lab.read(segment, [1, 2, 3], keys=[1000] * 3) == [None] * 3
    path_lab.file(segment, ".dat", "tp1").write_bytes(data.read_bytes())
    path_lab.file(segment, ".hdr", "tp1").write_bytes(heads.read_bytes())
    assert path_lab.read(segment, [0], spec="tp1") == [None]
    other = path_lab.segment(64, 64, slots=4, number=2)
    path_lab.file(other, ".dat").write_bytes(data.read_bytes())
    path_lab.file(other, ".hdr").write_bytes(heads.read_bytes())
    assert path_lab.read(other, [0]) == [None]
    assert path_lab.read(segment, [0]) == [block(64, 0)]


def test_an_unreadable_storage_is_misses_and_one_line(
    path_lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    segment = path_lab.segment(64)
    path_lab.write(segment, {0: block(64, 0)})
    path_lab.storage.close()
    data = path_lab.file(segment, ".dat")
    data.unlink()
    data.mkdir()
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert path_lab.read(segment, [0]) == [None]
    assert len(caplog.records) == 1
    assert segment.path in caplog.text
    with pytest.raises(StorageIOError, match=segment.path):
        path_lab.write(segment, {0: block(64, 0)})
    with pytest.raises(StorageIOError):
        path_lab.delete(segment, [0])


# ----------------------------------------------------------------- in the middle of a transfer


class Interrupted(FileStorage):
    """Does something of ours between payload and header."""

    def __init__(self, root: Path, between: Callable[[], None]) -> None:
        super().__init__("s", str(root))
        self.between = between

    def _load(self, *args: Any) -> bool:
        loaded = super()._load(*args)
        self.between()
        return loaded

    def _store(self, *args: Any) -> None:
        super()._store(*args)
        self.between()


def test_a_block_erased_during_the_copy_is_a_miss(tmp_path: Path) -> None:
    """Even if the copy was complete by then: nobody vouches for these bytes any more."""
    lab = Lab(FileStorage("s", str(tmp_path)))
    segment = lab.segment(4096)
    lab.write(segment, {1: block(4096, 1), 2: block(4096, 2)})
    reader = Lab(Interrupted(tmp_path, lambda: lab.delete(segment, [1]) and None))
    assert reader.read(segment, [1, 2]) == [None, block(4096, 2)]


def test_a_writer_that_dies_leaves_no_header(tmp_path: Path) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    lab = Lab(FileStorage("s", str(tmp_path)))
    segment = lab.segment(4096)
    lab.write(segment, {1: block(4096, 1)}, generation=1)
    writer = Lab(Interrupted(tmp_path, die))
    with pytest.raises(KeyboardInterrupt):
        writer.write(segment, {1: block(4096, 2)}, generation=2)
    assert header.blank(lab.storage.raw_headers(segment, "tp0")).all()


def test_a_segment_dropped_during_a_write_is_told(tmp_path: Path) -> None:
    lab = Lab(FileStorage("s", str(tmp_path)))
    segment = lab.segment(4096)
    writer = Lab(Interrupted(tmp_path, lambda: lab.storage.drop_segment(segment) and None))
    with pytest.raises(SegmentMissing, match="removed during the write"):
        writer.write(segment, {1: block(4096, 1)})


# --------------------------------------------------------------------------- files replaced


def test_a_segment_made_anew_by_others_is_found(path_lab: Lab) -> None:
    segment = path_lab.segment(4096)
    path_lab.write(segment, {1: block(4096, 1)})
    assert path_lab.read(segment, [1]) == [block(4096, 1)]
    other = another(path_lab)
    other.storage.drop_segment(segment)
    assert path_lab.read(segment, [1]) == [None]
    with pytest.raises(SegmentMissing):
        path_lab.write(segment, {1: block(4096, 2)}, generation=2)
    other.storage.create_segment(segment, OWNER)
    other.write(segment, {1: block(4096, 3)}, generation=3)
    assert path_lab.read(segment, [1], generation=3) == [block(4096, 3)]


def test_a_segment_moved_aside_and_replaced_is_found(path_lab: Lab) -> None:
    """The files we have open still exist, elsewhere."""
    segment = path_lab.segment(4096)
    path_lab.write(segment, {1: block(4096, 1)})
    directory = path_lab.file(segment, ".dat").parent
    directory.rename(directory.with_name("aside"))
    other = another(path_lab)
    other.storage.create_segment(segment, OWNER)
    other.write(segment, {1: block(4096, 3)}, generation=3)
    assert path_lab.read(segment, [1], generation=3) == [block(4096, 3)]


def test_a_segment_removed_during_use_never_harms(path_lab: Lab) -> None:
    segment = path_lab.segment(65_536, slots=8)
    stop = time.monotonic() + 0.5
    wrong: list[int] = []

    def read_on() -> None:
        while time.monotonic() < stop:
            for slot, got in enumerate(path_lab.read(segment, list(range(8)))):
                if got not in (None, bytes([slot]) * 65_536):
                    wrong.append(slot)

    readers = [threading.Thread(target=read_on) for _ in range(2)]
    for reader in readers:
        reader.start()
    other = another(path_lab)
    while time.monotonic() < stop:
        other.write(segment, {slot: bytes([slot]) * 65_536 for slot in range(8)})
        other.storage.drop_segment(segment)
        other.storage.create_segment(segment, OWNER)
    for reader in readers:
        reader.join()
    assert not wrong


def test_open_files_are_bounded(path_lab: Lab) -> None:
    assert isinstance(path_lab.storage, PathStorage)
    root = path_lab.storage.root
    path_lab.storage._handles = HandleCache(root, handles_max=4)

    def open_files() -> int:
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(str(os.readlink(link)).startswith(root) for link in links if link.is_symlink())

    segments = [path_lab.segment(4096, number=number, slots=2) for number in range(30)]
    for _ in range(2):
        for segment in segments:
            path_lab.write(segment, {1: block(4096, segment.segment_id)})
            assert path_lab.read(segment, [1]) == [block(4096, segment.segment_id)]
    assert len(path_lab.storage._handles) <= 4
    assert 0 < open_files() <= 4 * FILES_PER_HANDLE
    path_lab.storage.close()
    assert open_files() == 0


def test_a_forked_child_reads_and_writes(path_lab: Lab) -> None:
    size = 1 << 20
    segment = path_lab.segment(size, slots=8)
    content = {slot: block(size, slot) for slot in range(8)}
    path_lab.write(segment, content)
    assert None not in path_lab.read(segment, list(content))  # threads and maps exist now
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert isinstance(path_lab.storage, PathStorage)
            assert len(path_lab.storage._handles) == 0, "its locks would be the parent's too"
            path_lab.delete(segment, [0, 1])
            path_lab.write(segment, {0: content[7]}, generation=2)
            good = path_lab.read(segment, list(range(2, 8))) == list(content.values())[2:]
            code = 0 if good else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path_lab.read(segment, [0], generation=2) == [content[7]]
    assert path_lab.read(segment, [1, 2]) == [None, content[2]]


# ---------------------------------------------------------------------------------- giving back


@pytest.mark.parametrize("size", [24, 100, 1000, 4000, 6000])
def test_slots_that_share_pages_are_given_back_in_the_end(path_lab: Lab, size: int) -> None:
    slots = 40
    segment = path_lab.segment(size, slots=slots)
    content = {slot: block(size, slot) for slot in range(slots)}
    path_lab.write(segment, content)
    order = list(range(slots))
    random.Random(size).shuffle(order)
    for index, slot in enumerate(order):
        path_lab.delete(segment, [slot])
        left = sorted(order[index + 1 :])
        assert path_lab.read(segment, left) == [content[s] for s in left]
    assert path_lab.file(segment, ".dat").stat().st_blocks == 0


def test_deleting_waits_for_a_reader_but_not_for_ever(
    shm_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that was stopped in the middle of a copy keeps its pages, not its header."""
    monkeypatch.setattr(erase, "LOCK_WAIT_S", 0.1)
    lab = Lab(SharedMemoryStorage("s", str(shm_root)))
    segment = lab.segment(65_536, slots=4)
    lab.write(segment, {slot: block(65_536, slot) for slot in range(4)})
    assert isinstance(lab.storage, PathStorage)
    with (
        lab.storage._handles.use(segment, "tp0") as handle,
        handle.locked(1, 1) as held,
    ):
        assert held
        assert another(lab).delete(segment, [3]) == 65_536
        begin = time.monotonic()
        assert another(lab).delete(segment, [1]) == 0
        assert 0.1 <= time.monotonic() - begin < 1
        assert lab.read(segment, [1]) == [None]
        assert lab.storage.written_slots(segment, "tp0").tolist() == [True, True, True, False]
    assert lab.delete(segment, [1]) == 65_536
    assert lab.read(segment, [0, 2]) == [block(65_536, 0), block(65_536, 2)]


def test_a_map_is_not_touched_while_slots_are_being_erased(
    shm_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deleter holds the slot; a reader gets the bytes by a system call."""
    lab = Lab(SharedMemoryStorage("s", str(shm_root)))
    segment = lab.segment(65_536, slots=4)
    lab.write(segment, {1: block(65_536, 1)})
    deleter = another(lab).storage
    assert isinstance(deleter, PathStorage)
    with (
        deleter._handles.use(segment, "tp0") as handle,
        handle.locked(1, 1, exclusive=True) as held,
    ):
        assert held
        monkeypatch.setattr(Handle, "mapped", lambda *_: pytest.fail("touched the map"))
        assert lab.read(segment, [1]) == [block(65_536, 1)]


def test_without_punching_the_bytes_stay_until_the_segment_goes(
    path_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = path_lab.segment(4096)
    path_lab.write(segment, {1: block(4096, 1)})
    monkeypatch.setattr(system, "punch", lambda *_: False)
    assert path_lab.delete(segment, [1]) == 0
    assert path_lab.read(segment, [1]) == [None]
    assert path_lab.storage.drop_segment(segment) >= 4096


# ------------------------------------------------------------------------------------------ full


FULL = """
import resource, sys
import numpy as np
from kvcm_ray.errors import StorageFull
from kvcm_ray.storage_adapters import open_storage
from kvcm_ray.storage_adapters.{module} import {kind}
from kvcm_ray.testing.storage_lab import Lab, block

lab = Lab({kind}("s", sys.argv[1]))
size = 65536
{limit}
segment = lab.segment(size, slots={slots})
lab.write(segment, {{0: block(size, 0)}})
try:
    {attempt}
except StorageFull as error:
    assert sys.argv[1] in error.message, error.message
    assert error.details["asked"] == {asked}, error.details
    assert error.details["free"] >= 0, error.details
    assert error.details["path"].startswith(sys.argv[1])
else:
    raise SystemExit("not full")
assert lab.read(segment, [0]) == [block(size, 0)]
{after}
print("fine")
"""


def run_full(root: Path, **pieces: str) -> None:
    program = FULL.format(**pieces)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(root)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


@pytest.mark.parametrize(("module", "kind"), [("file", "FileStorage"), ("shm", "SharedMemoryStorage")])
def test_a_file_size_limit_is_storage_full(tmp_path: Path, shm_root: Path, module: str, kind: str) -> None:
    """Creating a segment larger than a file may be."""
    run_full(
        tmp_path if module == "file" else shm_root,
        module=module, kind=kind, slots="4", asked="1000 * (size + 64)", after="",
        limit="resource.setrlimit(resource.RLIMIT_FSIZE, (10 * size, 10 * size))",
        attempt="lab.segment(size, slots=1000, number=2)",
    )  # fmt: skip


@pytest.fixture
def tiny_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB that is all ours."""
    place = tmp_path / "tiny"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"cannot mount a tmpfs: {error}")
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


RESUME = """
lab.delete(segment, [1, 2, 3, 4, 5, 6, 7, 8])
lab.write(segment, {2: block(size, 2)}, generation=2)
assert lab.read(segment, [0]) == [block(size, 0)]
assert lab.read(segment, [2], generation=2) == [block(size, 2)]
"""
ATTEMPTS = {
    "prepare": ("lab.storage.prepare(segment, 1, 30)", "30 * size"),
    "write": ("lab.write(segment, {s: block(size, s) for s in range(1, 31)})", "30 * size"),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
@pytest.mark.parametrize(("module", "kind"), [("file", "FileStorage"), ("shm", "SharedMemoryStorage")])
def test_a_full_device_refuses_writes_reads_on_and_recovers(
    tiny_tmpfs: Path, module: str, kind: str, attempt: str
) -> None:
    call, asked = ATTEMPTS[attempt]
    run_full(
        tiny_tmpfs, module=module, kind=kind, slots="31", limit="", attempt=call, asked=asked,
        after=RESUME,
    )  # fmt: skip


def test_holes_on_a_full_tmpfs_are_misses_not_signals(tiny_tmpfs: Path) -> None:
    """Somebody emptied the file under our map, and there is no page left to fill its holes."""
    after = """
path = lab.file(segment, ".dat")
import os
os.truncate(path, 0)
os.truncate(path, 31 * size)
filler = open(sys.argv[1] + "/filler", "wb", buffering=0)
try:
    while filler.write(bytes(4096)):
        pass
except OSError:
    pass
assert lab.read(segment, [0, 1, 2]) == [None, None, None]
"""
    run_full(
        tiny_tmpfs, module="shm", kind="SharedMemoryStorage", slots="31", limit="",
        attempt=ATTEMPTS["write"][0], asked="30 * size", after=after,
    )  # fmt: skip


# ----------------------------------------------------------------------------- many processes


HAMMER = """
import random, sys, time
import numpy as np
from kvcm_ray.errors import KvcmError
from kvcm_ray.storage_adapters.{module} import {kind}
from kvcm_ray.testing.storage_lab import Lab, arrays
lab, role = Lab({kind}("s", sys.argv[1])), sys.argv[2]
size, slots = {size}, 6
segment = lab.segment(size, slots=slots)
chance = random.Random(role)
stop = time.monotonic() + 0.7
count = 0
generation = int(role)
while time.monotonic() < stop:
    generation += 10
    slot = chance.randrange(slots)
    try:
        lab.write(segment, {{slot: bytes([generation % 251]) * size}}, generation)
    except KvcmError:
        pass  # the other writer's generation was younger
    for where in range(slots):
        rows = lab.storage.headers(segment, "tp0")
        for row in rows[rows["slot"] == where]:
            held = int(row["generation"])
            got = lab.read(segment, [where], held)[0]
            assert got is None or got == bytes([held % 251]) * size, (where, held)
            count += got is not None
            if chance.random() < 0.2:
                lab.delete(segment, [where], held)
print(count)
"""


@pytest.mark.parametrize("size", [3000, 65_536])
def test_processes_that_fight_over_slots_never_read_wrong_bytes(path_lab: Lab, size: int) -> None:
    """No manager keeps them apart here: writers overwrite and delete each other's slots."""
    assert isinstance(path_lab.storage, PathStorage)
    module, kind = path_lab.storage.__module__.rsplit(".", 1)[1], type(path_lab.storage).__name__
    program = HAMMER.format(module=module, kind=kind, size=size)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, path_lab.storage.root, str(role)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for role in range(3)
    ]  # fmt: skip
    for worker in workers:
        out, error = worker.communicate(timeout=60)
        assert worker.returncode == 0, error
        assert int(out) > 0


# -------------------------------------------------------------------------------------- opening


def test_drafts_and_strangers_are_no_segments(path_lab: Lab) -> None:
    assert isinstance(path_lab.storage, PathStorage)
    segment = path_lab.segment(64)
    root = Path(path_lab.storage.root)
    (root / "notes").mkdir()
    (root / "notes" / "readme.txt").write_text("not ours")
    (root / "notes" / "blacklist.dat").write_text("not ours either")
    (root / "half" / "made").mkdir(parents=True)
    (root / "half" / "made" / "tp0.hdr").touch()
    shutil.copytree(root / segment.path, root / "copied")
    found = {f.path: f.segment for f in path_lab.storage.list_segments()}
    assert found == {segment.path: segment, "half/made": None, "copied": None}


def test_open_storage_checks_the_configuration(tmp_path: Path) -> None:
    from kvcm_ray.core.model import MooncakeSpec, NfsSpec, ShmSpec, StorageConfig
    from kvcm_ray.errors import InvalidArgument, Unsupported

    shm = open_storage(StorageConfig("m", shm=ShmSpec(str(tmp_path))))
    assert isinstance(shm, SharedMemoryStorage)
    assert isinstance(open_storage(StorageConfig("f", nfs=NfsSpec("/x"))), FileStorage)
    with pytest.raises(InvalidArgument, match="not absolute"):
        open_storage(StorageConfig("f", nfs=NfsSpec("relative")))
    with pytest.raises(Unsupported, match="ST_MOONCAKE"):
        open_storage(StorageConfig("f", mooncake=MooncakeSpec()))


def test_a_path_out_of_the_root_is_refused(path_lab: Lab) -> None:
    from dataclasses import replace

    from kvcm_ray.errors import InvalidArgument

    segment = path_lab.segment(64)
    for path in ("../outside", "/etc", "a/../../b", ""):
        with pytest.raises(InvalidArgument):
            path_lab.storage.create_segment(replace(segment, path=path), OWNER)
        with pytest.raises(InvalidArgument):
            path_lab.storage.drop_segment(replace(segment, path=path))


def test_full_is_told_with_numbers(path_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every error number that means full, from the call that fills the space."""
    import errno

    segment = path_lab.segment(4096)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(system, "write_from", fail)
            with pytest.raises(StorageFull, match="needs 8192 bytes") as caught:
                path_lab.write(segment, {0: bytes(4096), 1: bytes(4096)})
        assert caught.value.details["errno"] == number
        assert path_lab.read(segment, [0, 1]) == [None, None]
    slots, keys, generations = arrays([0], 1)
    path_lab.storage.write(segment, "tp0", slots, keys, generations, [block(4096, 0)])
    assert path_lab.read(segment, [0]) == [block(4096, 0)]


def test_dropping_frees_what_others_keep_open(path_lab: Lab) -> None:
    """The memory of a removed instance comes back, however long engines keep its files open."""
    segment = path_lab.segment(4096)
    path_lab.write(segment, {0: bytes(range(256)) * 16, 1: b"x" * 4096})
    with path_lab.file(segment, ".dat").open("rb") as kept:
        assert os.fstat(kept.fileno()).st_blocks * 512 >= 8192
        path_lab.storage.drop_segment(segment)
        assert os.fstat(kept.fileno()).st_blocks == 0
