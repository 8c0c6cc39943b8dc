"""The surface of kvcm_py_client as its contract has it: types, creation, transfers on plain files.

The client is imported by the name that connectors use. Locations here are those of a manager that knows
nothing of ours (no ``gen``); `test_py_client_verified` has ours.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.connectors.py_client import config, install, install_files, uninstall_files
from kvcm_ray.connectors.py_client.types import ClientError
from kvcm_ray.errors import AlreadyExists

kvcm = install()
Code = kvcm.ClientErrorCode
SIZE = 4096

# ----------------------------------------------------------------------------------------- helpers


def configuration(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "instance_group": "default",
        "instance_id": "m",
        "block_size": 16,
        "location_spec_infos": {"tp0": SIZE},
        "sdk_config": {"thread_num": 4, "queue_size": 100, "timeout_config": {"get_timeout_ms": 5000,
                       "put_timeout_ms": 5000}, "sdk_backend_configs": [{"type": "file"}]},
    }  # fmt: skip
    return {name: value for name, value in (found | changes).items() if value is not None}


def sdk(**changes: Any) -> dict[str, Any]:
    return configuration()["sdk_config"] | changes  # type: ignore[no-any-return]


def storage(name: str = "nfs_01", kind: str = "file", **spec: Any) -> dict[str, Any]:
    spec = spec or {"root_path": "/tmp/nfs/", "key_count_per_file": 8}
    return {"type": kind, "is_available": True, "global_unique_name": name, "storage_spec": spec}


def params(storages: Any = None, **changes: Any) -> Any:
    found = kvcm.InitParams()
    found.role_type, found.self_location_spec_name = kvcm.RoleType.WORKER, "tp0"
    found.storage_configs = storages if isinstance(storages, str) else json.dumps(storages or [storage()])
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def make(storages: Any = None, **changes: Any) -> Any:
    client = kvcm.TransferClient.Create(json.dumps(configuration(**changes)), params(storages))
    assert client is not None
    return client


_ALIVE: list[np.ndarray] = []  # an Iov holds an address, not the memory


def iov(memory: np.ndarray, **changes: Any) -> Any:
    _ALIVE.append(memory)
    found = kvcm.Iov()
    found.type, found.base, found.size = kvcm.MemoryType.CPU, memory.ctypes.data, memory.nbytes
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def buffer(*memories: Any) -> Any:
    found = kvcm.BlockBuffer()
    found.iovs = [iov(m) if isinstance(m, np.ndarray) else m for m in memories]
    return found


def buffers(blocks: np.ndarray) -> list[Any]:
    return [buffer(row) for row in blocks]


def uri(path: Path | str, slot: int, size: int = SIZE, host: str = "nfs_01", scheme: str = "file") -> str:
    return f"{scheme}://{host}{path}?blkid={slot}&size={size}"


def noise(count: int, size: int = SIZE) -> Any:
    return np.random.default_rng(count).integers(0, 256, (count, size), dtype=np.uint8)


@pytest.fixture
def client() -> Any:
    return make()


# ------------------------------------------------------------------------------------------- types


def test_error_codes() -> None:
    names = """
    ER_OK 0, ER_INVALID_STUB 1, ER_INVALID_GRPCSTATUS 2, ER_INVALID_PARAMS 3, ER_INVALID_ROLETYPE 4,
    ER_INVALID_CLIENT_CONFIG 5, ER_INVALID_STORAGE_CONFIG 6, ER_INVALID_SDKWRAPPER_CONFIG 7,
    ER_INVALID_SDKBACKEND_CONFIG 8, ER_CONNECT_FAIL 9, ER_THREADPOOL_ERROR 10, ER_SKIPINIT 11,
    ER_METACLIENT_INIT_ERROR 12, ER_TRANSFERCLIENT_INIT_ERROR 13, ER_MANAGERCLIENT_INIT_ERROR 14,
    ER_CLIENT_NOT_EXISTS 15, ER_SERVICE_NO_STATUS 50, ER_SERVICE_INTERNAL_ERROR 51,
    ER_SERVICE_UNSUPPORTED 52, ER_SERVICE_INVALID_ARGUMENT 53, ER_SERVICE_DUPLICATE_ENTITY 54,
    ER_SERVICE_INSTANCE_NOT_EXIST 55, ER_SDK_TIMEOUT 100, ER_GETSDK_ERROR 101, ER_CREATESDK_ERROR 102,
    ER_SDKINIT_ERROR 103, ER_SDKREAD_ERROR 104, ER_SDKWRITE_ERROR 105, ER_SDKALLOC_ERROR 106,
    ER_INVALID_ADDRESS 107, ER_INVALID_LOCAL_BUFFERS 108, ER_UNSUPPORTED_MEMORY_TYPE 109,
    ER_UNCONSISTENT_MEMORY_TYPE 110, ER_FILE_IO_ERROR 111, ER_CUDAMEMCPY_ERROR 112,
    ER_EXTRACT_SLICES_ERROR 113, ER_CUDA_STREAM_CREATE_ERROR 114, ER_CUDA_STREAM_SYNCHRONIZE_ERROR 115,
    ER_CUDA_STREAM_DESTROY_ERROR 116, ER_CUDA_HOST_REGISTER_ERROR 117"""
    expected = {name: int(value) for name, value in (pair.split() for pair in names.split(","))}
    assert {code.name: code.value for code in Code} == expected


def test_types_and_defaults() -> None:
    assert {m.name: m.value for m in kvcm.MemoryType} == {"CPU": 0, "GPU": 1}
    assert {m.name: m.value for m in kvcm.RoleType} == {
        "UNKNOWN": 0, "WORKER": 1, "SCHEDULER": 2, "HYBRID": 3,
    }  # fmt: skip
    assert all(issubclass(kind, enum.Enum) for kind in (Code, kvcm.MemoryType, kvcm.RoleType))
    piece = kvcm.Iov()
    assert (piece.type, piece.base, piece.size, piece.ignore) == (kvcm.MemoryType.GPU, 0, 0, False)
    context = kvcm.ForwardContext()
    assert (context.metas, context.sw_size) == ({}, -1)
    assert (kvcm.RegistSpan().base, kvcm.RegistSpan().size) == (0, 0)
    assert kvcm.InitParams().regist_span is None


def test_reading_iovs_gives_a_copy() -> None:
    block = kvcm.BlockBuffer()
    assert block.iovs == []
    block.iovs.append(kvcm.Iov())
    assert block.iovs == []
    block.iovs = [kvcm.Iov()]
    assert len(block.iovs) == 1


def test_names_that_are_not_bound() -> None:
    assert not hasattr(kvcm, "MetaClient")
    assert not hasattr(kvcm, "ManagerClient")


# ---------------------------------------------------------------------------------------- creation

BAD = [
    ("ER_SKIPINIT", {}, {"role_type": kvcm.RoleType.SCHEDULER}),
    ("ER_SKIPINIT", {}, {"role_type": kvcm.RoleType.UNKNOWN}),
    ("ER_INVALID_PARAMS", {}, {"self_location_spec_name": ""}),
    ("ER_INVALID_CLIENT_CONFIG", {"instance_group": ""}, {}),
    ("ER_INVALID_CLIENT_CONFIG", {"instance_id": None}, {}),
    ("ER_INVALID_CLIENT_CONFIG", {"block_size": 0}, {}),
    ("ER_INVALID_CLIENT_CONFIG", {"block_size": "16"}, {}),
    ("ER_INVALID_CLIENT_CONFIG", {"location_spec_infos": {}}, {}),
    ("ER_INVALID_CLIENT_CONFIG", {"location_spec_infos": {"tp0": 0}}, {}),
    ("ER_INVALID_CLIENT_CONFIG", {"location_spec_infos": {"tp1": 4096}}, {}),
    ("ER_INVALID_CLIENT_CONFIG", {"location_spec_groups": {"g": ["nope"]}}, {}),
    ("ER_INVALID_CLIENT_CONFIG", {"sdk_config": None}, {}),
    ("ER_INVALID_SDKWRAPPER_CONFIG", {"sdk_config": sdk(thread_num=0)}, {}),
    ("ER_INVALID_SDKWRAPPER_CONFIG", {"sdk_config": sdk(queue_size=-1)}, {}),
    ("ER_INVALID_SDKWRAPPER_CONFIG", {"sdk_config": sdk(timeout_config={"get_timeout_ms": 0})}, {}),
    ("ER_INVALID_SDKWRAPPER_CONFIG", {"sdk_config": sdk(timeout_config={"put_timeout_ms": 0})}, {}),
    ("ER_INVALID_SDKWRAPPER_CONFIG", {"sdk_config": sdk(timeout_config=[])}, {}),
    ("ER_INVALID_SDKWRAPPER_CONFIG", {"sdk_config": sdk(sdk_backend_configs={})}, {}),
    ("ER_INVALID_STORAGE_CONFIG", {}, {"storage_configs": ""}),
    ("ER_INVALID_STORAGE_CONFIG", {}, {"storage_configs": "[]"}),
    ("ER_INVALID_STORAGE_CONFIG", {}, {"storage_configs": '{"type": "file"}'}),
    ("ER_INVALID_STORAGE_CONFIG", {}, {"storage_configs": "[{}]"}),
    ("ER_INVALID_SDKBACKEND_CONFIG", {}, {"storage_configs": json.dumps([storage(kind="mooncake")])}),
    ("ER_INVALID_SDKBACKEND_CONFIG", {}, {"storage_configs": json.dumps([storage(kind="new")])}),
    ("ER_CREATESDK_ERROR", {}, {"storage_configs": json.dumps([storage(kind="pace", domain="x")])}),
    ("ER_CREATESDK_ERROR", {"sdk_config": sdk(sdk_backend_configs=[{"type": "mooncake"}])},
     {"storage_configs": json.dumps([storage(kind="mooncake")])}),
    ("ER_CREATESDK_ERROR", {}, {"storage_configs": json.dumps([storage(), storage("b", root_path="rel")])}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "changes", "init"), BAD)
def test_create_refuses(code: str, changes: dict[str, Any], init: dict[str, Any]) -> None:
    text, given = json.dumps(configuration(**changes)), params(**init)
    with pytest.raises(ClientError) as caught:
        config.parse(text, given)
    assert caught.value.code is Code[code]
    assert kvcm.TransferClient.Create(text, given) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_create_refuses_what_is_no_json_object(text: str) -> None:
    assert kvcm.TransferClient.Create(text, params()) is None


def test_create_fills_in_defaults_and_ignores_what_it_does_not_know() -> None:
    text = json.dumps(configuration(sdk_config={"sdk_config": {"thread_num": 0}}, address=["x"], more=1))
    found = config.parse(text, params(role_type=kvcm.RoleType.HYBRID))
    assert (found.threads, found.queue_size, found.get_timeout_s, found.put_timeout_s) == (8, 2000, 2, 2)
    odd = sdk(sdk_backend_configs=[{"type": "unheard"}, {"type": "hf3fs", "mountpoint": "/x/"}])
    assert config.parse(json.dumps(configuration(sdk_config=odd)), params()).spec_size == SIZE


def test_create_opens_storages_that_are_switched_off() -> None:
    mounted = storage("fs", "hf3fs", cluster_name="", mountpoint="/3fs/stage", root_dir="kv")
    off = storage("b") | {"is_available": False}
    found = config.parse(json.dumps(configuration()), params([storage(), off, mounted]))
    assert set(found.backends) == {"nfs_01", "b", "fs"}


# --------------------------------------------------------------------------------------- transfers


def test_round_trip_of_slots_in_files(client: Any, tmp_path: Path) -> None:
    blocks = noise(12)
    uris = [uri(tmp_path / f"deep/er/{n // 8}.bin", n % 8) for n in range(12)]
    assert client.SaveKvCaches(uris, buffers(blocks)) == (Code.ER_OK, uris)
    assert (tmp_path / "deep/er/0.bin").read_bytes() == blocks[:8].tobytes()
    out = np.zeros_like(blocks)
    assert client.LoadKvCaches(uris, buffers(out)) == Code.ER_OK
    assert (out == blocks).all()
    order = [7, 2, 11, 0]
    picked = np.zeros((4, SIZE), np.uint8)
    assert client.LoadKvCaches([uris[n] for n in order], buffers(picked)) == Code.ER_OK
    assert (picked == blocks[order]).all()


def test_a_file_grows_to_the_last_slot_and_never_shrinks(client: Any, tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert client.SaveKvCaches([uri(path, 5)], buffers(noise(1)))[0] == Code.ER_OK
    assert path.stat().st_size == 6 * SIZE
    assert client.SaveKvCaches([uri(path, 1)], buffers(noise(1)))[0] == Code.ER_OK
    assert path.stat().st_size == 6 * SIZE
    assert path.read_bytes()[:SIZE] == bytes(SIZE)


def test_pieces_fill_a_block_in_order(client: Any, tmp_path: Path) -> None:
    blocks = noise(1)[0]
    path = tmp_path / "f"
    parts = [blocks[:1000].copy(), blocks[1000:1001].copy(), blocks[1001:].copy()]
    assert client.SaveKvCaches([uri(path, 2)], [buffer(*parts)])[0] == Code.ER_OK
    assert path.read_bytes()[2 * SIZE :] == blocks.tobytes()
    out = [np.zeros(SIZE - 96, np.uint8), np.zeros(96, np.uint8)]
    assert client.LoadKvCaches([uri(path, 2)], [buffer(*out)]) == Code.ER_OK
    assert np.concatenate(out).tobytes() == blocks.tobytes()


def test_ignored_pieces_skip_bytes(client: Any, tmp_path: Path) -> None:
    block = noise(1)[0]
    path = tmp_path / "f"
    client.SaveKvCaches([uri(path, 0)], [buffer(block)])
    head, tail = np.zeros(10, np.uint8), np.zeros(20, np.uint8)
    gap = iov(head, base=0, size=100, ignore=True)
    assert client.LoadKvCaches([uri(path, 0)], [buffer(head, gap, tail)]) == Code.ER_OK
    assert (head.tobytes(), tail.tobytes()) == (block[:10].tobytes(), block[110:130].tobytes())
    ones = np.ones(10, np.uint8)
    assert client.SaveKvCaches([uri(path, 0)], [buffer(gap, ones)])[0] == Code.ER_OK
    expected = block.copy()
    expected[100:110] = 1
    assert path.read_bytes() == expected.tobytes()


def test_a_block_may_be_written_in_part(client: Any, tmp_path: Path) -> None:
    half = noise(1)[0][: SIZE // 2]
    assert client.SaveKvCaches([uri(tmp_path / "f", 0)], [buffer(half)])[0] == Code.ER_OK
    assert (tmp_path / "f").read_bytes() == half.tobytes() + bytes(SIZE // 2)


@pytest.mark.parametrize("call", ["LoadKvCaches", "SaveKvCaches"])
def test_wrong_parameters(client: Any, tmp_path: Path, call: str) -> None:
    block, path = noise(1), tmp_path / "f"
    good = uri(path, 0)
    cases = [
        ([], [], Code.ER_INVALID_PARAMS),
        ([good], [], Code.ER_INVALID_PARAMS),
        ([], buffers(block), Code.ER_INVALID_PARAMS),
        ([good, good], buffers(block), Code.ER_INVALID_PARAMS),
        ([good, "no scheme"], buffers(noise(2)), Code.ER_INVALID_PARAMS),
        ([""], buffers(block), Code.ER_INVALID_PARAMS),
        ([f"file://nfs_01{path}?blkid=x&size={SIZE}"], buffers(block), Code.ER_INVALID_PARAMS),
        ([uri(path, 0, host="other")], buffers(block), Code.ER_GETSDK_ERROR),
        ([good, uri(path, 1, host="other")], buffers(noise(2)), Code.ER_GETSDK_ERROR),
        ([good], [buffer()], Code.ER_INVALID_LOCAL_BUFFERS),
        ([good], [buffer(iov(block[0], size=0))], Code.ER_INVALID_LOCAL_BUFFERS),
        ([good], [buffer(iov(block[0], size=-1))], Code.ER_INVALID_LOCAL_BUFFERS),
        ([good], [buffer(block[0], block[0])], Code.ER_INVALID_LOCAL_BUFFERS),
        ([good], [buffer(iov(block[0], ignore=True))], Code.ER_INVALID_LOCAL_BUFFERS),
        ([good], [buffer(iov(block[0], base=0))], Code.ER_INVALID_ADDRESS),
        ([good], [buffer(iov(block[0], base=16))], Code.ER_INVALID_ADDRESS),
        ([good], [buffer(iov(block[0], base=1 << 62))], Code.ER_INVALID_ADDRESS),
        ([good], [buffer(iov(block[0], type=kvcm.MemoryType.GPU))], Code.ER_UNSUPPORTED_MEMORY_TYPE),
        ([good, good], [buffer(block[0]), buffer(iov(block[0], type=kvcm.MemoryType.GPU))],
         Code.ER_UNCONSISTENT_MEMORY_TYPE),
    ]  # fmt: skip
    for names, given, code in cases:
        answer = getattr(client, call)(names, given)
        assert answer == (code if call == "LoadKvCaches" else (code, [])), (names, code)
    assert not path.exists()


def test_what_cannot_be_read(client: Any, tmp_path: Path) -> None:
    path, out = tmp_path / "f", noise(1)
    before = out.copy()
    assert client.LoadKvCaches([uri(path, 0)], buffers(out)) == Code.ER_SDKREAD_ERROR
    path.write_bytes(bytes(2 * SIZE - 1))
    assert client.LoadKvCaches([uri(path, 1)], buffers(out)) == Code.ER_SDKREAD_ERROR
    assert client.LoadKvCaches([uri(path, 0, size=SIZE + 1)], buffers(out)) == Code.ER_SDKREAD_ERROR
    assert client.LoadKvCaches([f"file://nfs_01{path}?blkid=0"], buffers(out)) == Code.ER_SDKREAD_ERROR
    assert (out == before).all()


def test_what_cannot_be_written(client: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "below", tmp_path):
        answer = client.SaveKvCaches([uri(path, 0)], buffers(noise(1)))
        assert answer == (Code.ER_SDKWRITE_ERROR, [])


def test_all_or_nothing(client: Any, tmp_path: Path) -> None:
    blocks = noise(3)
    uris = [uri(tmp_path / str(n), 0) for n in range(3)]
    client.SaveKvCaches(uris, buffers(blocks))
    (tmp_path / "1").unlink()
    assert client.LoadKvCaches(uris, buffers(np.zeros_like(blocks))) == Code.ER_SDKREAD_ERROR
    assert client.LoadKvCaches([uris[0], uris[2]], buffers(np.zeros_like(blocks[:2]))) == Code.ER_OK


def test_parts_of_a_uri(client: Any, tmp_path: Path) -> None:
    block = noise(1)
    query = f"?size={SIZE}&blkid=3&more=x=y&flag"
    for authority in ("nfs_01", "user@nfs_01", "nfs_01:8080"):
        name = f"file://{authority}{tmp_path}/f{query}"
        assert client.SaveKvCaches([name], buffers(block)) == (Code.ER_OK, [name])
        out = np.zeros_like(block)
        assert client.LoadKvCaches([uri(tmp_path / "f", 3)], buffers(out)) == Code.ER_OK
        assert (out == block).all()


def test_slots_of_a_mounted_hf3fs_have_the_size_of_the_uri(tmp_path: Path) -> None:
    spec = {"mountpoint": str(tmp_path), "root_dir": "kv", "cluster_name": "", "key_count_per_file": 8}
    client = make([storage("fs", "hf3fs", **spec)])
    block, path = noise(1), tmp_path / "kv" / "f"
    name = uri(path, 2, size=2 * SIZE, host="fs", scheme="hf3fs")
    assert client.SaveKvCaches([name], buffers(block))[0] == Code.ER_OK
    assert path.read_bytes()[4 * SIZE : 5 * SIZE] == block.tobytes()
    out = np.zeros_like(block)
    assert client.LoadKvCaches([name], buffers(out)) == Code.ER_OK
    assert (out == block).all()
    bare = f"hf3fs://fs{path}?blkid=0"
    assert client.LoadKvCaches([bare], buffers(out)) == Code.ER_SDKREAD_ERROR
    assert client.SaveKvCaches([bare], buffers(out))[0] == Code.ER_SDKWRITE_ERROR


# ------------------------------------------------------------------------------ time and threads


def hanging_file(path: Path) -> str:
    """Opening it to read waits until somebody opens it to write."""
    os.mkfifo(path)
    return uri(path, 0)


def release(path: Path) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


def test_a_storage_that_hangs_ends_in_a_timeout(tmp_path: Path) -> None:
    client = make(sdk_config=sdk(thread_num=2, queue_size=2, timeout_config={"get_timeout_ms": 200}))
    out = np.zeros((1, SIZE), np.uint8)
    name = hanging_file(tmp_path / "fifo")
    try:
        begin_s = time.monotonic()
        assert client.LoadKvCaches([name], buffers(out)) == Code.ER_SDK_TIMEOUT
        assert 0.2 <= time.monotonic() - begin_s < 1.0
        client.SaveKvCaches([uri(tmp_path / "f", 0)], buffers(noise(1)))  # another thread is free
        assert client.LoadKvCaches([uri(tmp_path / "f", 0)], buffers(out)) == Code.ER_OK
        codes = [client.LoadKvCaches([name], buffers(out)) for _ in range(4)]
        assert codes == [Code.ER_SDK_TIMEOUT] * 3 + [Code.ER_THREADPOOL_ERROR]
        assert (out == noise(1)).all(), "the last good load"
    finally:
        for _ in range(3):
            release(tmp_path / "fifo")
            time.sleep(0.05)
    deadline = time.monotonic() + 5
    while client.LoadKvCaches([uri(tmp_path / "f", 0)], buffers(out)) != Code.ER_OK:
        assert time.monotonic() < deadline, "the threads did not come back"
        release(tmp_path / "fifo")


def test_a_read_that_was_given_up_leaves_the_memory_alone(tmp_path: Path) -> None:
    client = make(sdk_config=sdk(thread_num=1, timeout_config={"get_timeout_ms": 200}))
    path, out = tmp_path / "f", np.zeros((1, SIZE), np.uint8)
    os.mkfifo(path)
    assert client.LoadKvCaches([uri(path, 0)], buffers(out)) == Code.ER_SDK_TIMEOUT
    (tmp_path / "real").write_bytes(b"\xff" * SIZE)
    (tmp_path / "real").replace(path)
    time.sleep(0.1)
    assert not out.any()


def test_the_process_ends_while_a_storage_hangs(tmp_path: Path) -> None:
    code = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import test_py_client as t, numpy as np
    client = t.make(sdk_config=t.sdk(timeout_config={"get_timeout_ms": 100}))
    name = t.hanging_file(t.Path(sys.argv[2]))
    print(client.LoadKvCaches([name], t.buffers(np.zeros((1, t.SIZE), np.uint8))).name)
    """
    arguments = [str(Path(__file__).parent), str(tmp_path / "fifo")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "ER_SDK_TIMEOUT"


def test_threads_share_a_client(client: Any, tmp_path: Path) -> None:
    failures: list[str] = []

    def work(number: int) -> None:
        blocks = noise(16) ^ np.uint8(number)
        uris = [uri(tmp_path / "shared", number * 16 + n) for n in range(16)]
        out = np.zeros_like(blocks)
        for _ in range(5):
            if client.SaveKvCaches(uris, buffers(blocks))[0] != Code.ER_OK:
                failures.append("save")
            if client.LoadKvCaches(uris, buffers(out)) != Code.ER_OK or not (out == blocks).all():
                failures.append("load")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_a_call_releases_the_interpreter_lock(tmp_path: Path) -> None:
    client = make(sdk_config=sdk(timeout_config={"get_timeout_ms": 300}))
    name, ticks = hanging_file(tmp_path / "fifo"), 0
    thread = threading.Thread(
        target=client.LoadKvCaches, args=([name], buffers(np.zeros((1, SIZE), np.uint8)))
    )
    thread.start()
    while thread.is_alive():
        ticks += 1
        time.sleep(0.01)
    assert ticks > 10


# -------------------------------------------------------------------------------------- installing


def run(code: str, *arguments: str, path: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *(["-c", code] if code else []), *arguments],
        capture_output=True, text=True, timeout=60, env=environment, check=False,
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else done.stderr


IMPORT = "from kv_cache_manager.client.pybind import kvcm_py_client as k; print(k.TransferClient.__module__)"
OURS = "kvcm_ray.connectors.py_client.client"


def test_install_adds_to_a_package_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "kv_cache_manager/py_connector").mkdir(parents=True)
    (tmp_path / "kv_cache_manager/__init__.py").touch()
    (tmp_path / "kv_cache_manager/py_connector/__init__.py").write_text("X = 1\n")
    assert "ModuleNotFoundError" in run(IMPORT, path=str(tmp_path))
    code = (
        "from kvcm_ray.connectors import py_client as p; p.install(); p.install();"
        f"{IMPORT}; import kv_cache_manager.py_connector as c; print(c.X);"
        "import kv_cache_manager.client.pybind.kvcm_py_client as m; print(m is k)"
    )
    assert run(code, path=str(tmp_path)).split() == [OURS, "1", "True"]


@pytest.mark.parametrize("there", [False, True])
def test_installed_files_serve_every_process(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "kv_cache_manager/client/pybind").mkdir(parents=True)
        for folder in ("", "client", "client/pybind"):
            (tmp_path / "kv_cache_manager" / folder / "__init__.py").touch()
    text = run("", "-m", "kvcm_ray.connectors.py_client", "install", str(tmp_path))
    assert text == f"written: {tmp_path}/kv_cache_manager/client/pybind/kvcm_py_client.py"
    assert run(IMPORT, path=str(tmp_path)) == OURS
    install_files(tmp_path)  # again: nothing to complain about
    assert run("", "-m", "kvcm_ray.connectors.py_client", "uninstall", str(tmp_path)) == "removed"
    assert (tmp_path / "kv_cache_manager").exists() == there
    assert not uninstall_files(tmp_path)


def test_another_client_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "kv_cache_manager/client/pybind"
    folder.mkdir(parents=True)
    for name in ("kvcm_py_client.cpython-311-x86_64-linux-gnu.so", "kvcm_py_client.py"):
        (folder / name).write_text("theirs")
        with pytest.raises(AlreadyExists, match="another client"):
            install_files(tmp_path)
        assert not uninstall_files(tmp_path)
        assert (folder / name).read_text() == "theirs"
        (folder / name).unlink()


def test_addresses_may_come_from_anywhere(client: Any, tmp_path: Path) -> None:
    memory = (ctypes.c_char * SIZE).from_buffer(bytearray(b"x" * SIZE))
    piece = kvcm.Iov()
    piece.type, piece.base, piece.size = kvcm.MemoryType.CPU, ctypes.addressof(memory), SIZE
    assert client.SaveKvCaches([uri(tmp_path / "f", 0)], [buffer(piece)])[0] == Code.ER_OK
    assert (tmp_path / "f").read_bytes() == b"x" * SIZE
