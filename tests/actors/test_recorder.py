"""Recordings: what was fed is in the file, at any time, within the limits, and nothing else."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvcm_ray.actors import recorder as module
from kvcm_ray.actors.recorder import Options, Recorder
from kvcm_ray.core.levels import levels
from kvcm_ray.core.observed import Observed
from kvcm_ray.core.ragged import offsets_of
from kvcm_ray.core.requests import Touch
from kvcm_ray.errors import InvalidArgument, RecordingNotFound, RecordingUnderWay, StorageIOError
from kvcm_ray.optimizer import READ, WRITE, load
from kvcm_ray.testing.blocks import instance, some_keys, start_request
from kvcm_ray.testing.reclaim_lab import ReclaimLab
from kvcm_ray.traces import open_trace


def observed(
    prompts: list[list[int]], *, writes: bool = False, ids: list[str] | None = None, held: int = 0
) -> Observed:
    n = len(prompts)
    counts = np.array([len(keys) for keys in prompts], np.int64)
    return Observed(
        instance_ids=ids or ["m"] * n,
        times_s=time.time() + np.arange(n) * 1e-3,
        writes=np.full(n, writes),
        partial=np.full(n, writes),
        found=counts // 2 * (not writes),
        counts=counts,
        keys=np.array([key for keys in prompts for key in keys], np.int64),
        held=np.minimum(held, counts),
    )


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(-(2**63), 2**63 - 1, draw.integers(1, 40)).tolist() for _ in range(count)]


def read(file: str | Path) -> list[list[int]]:
    return [request.keys.tolist() for request in open_trace(file)]


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_recording_has_what_was_fed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "new", "chat")
    recorder.feed(observed([[9]]))
    began = recorder.start({"block_tokens": 16})
    assert (began["state"], began["requests"], began["group"]) == ("recording", 0, "chat")
    recorder.feed(observed([[1, 2, 3], [4]], held=2, ids=["a", "b"]))
    recorder.feed(observed([[1, 2, 3]], writes=True, ids=["a"]))
    done = recorder.stop()
    accesses = load(done["file"], cache=False)
    assert accesses.ops.tolist() == [READ, READ, WRITE]
    assert accesses.keys[accesses.blocks[accesses.offsets[2] :]].tolist() == [1, 2, 3]
    assert [accesses.instance_names[i] for i in accesses.instances] == ["a", "b", "a"]
    assert accesses.held.tolist() == [True, True, False, True, False, False, False]
    assert accesses.partial.tolist() == [False, False, True]
    assert (accesses.block_tokens, accesses.sample_level) == (16, 0)
    assert abs(accesses.times_s[0] - time.time()) < 20
    told = {name: done[name] for name in ("look_ups", "accessed_blocks", "hit_blocks", "writes", "state")}
    assert told == {
        "look_ups": 2, "accessed_blocks": 4, "hit_blocks": 1, "writes": 1, "state": "stopped"
    }  # fmt: skip
    assert done["missing_requests"] == 0
    assert done["bytes"] == os.path.getsize(done["file"])


def test_the_file_is_a_trace_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.05)
    recorder = Recorder(tmp_path, "chat")
    file = recorder.start({})["file"]
    assert read(file) == []
    fed: list[list[int]] = []
    for round_ in range(3):
        prompts = random_prompts(50, round_)
        fed += prompts
        recorder.feed(observed(prompts))
        until(lambda: recorder.list()[0]["requests"] == len(fed))  # noqa: B023
        assert read(file) == fed
        assert load(file).requests == len(fed)
    recorder.close()
    assert recorder.list()[0]["state"] == "the group's process ended"


def test_wherever_a_recording_is_cut_it_has_what_is_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.0)
    recorder = Recorder(tmp_path, "chat")
    file = Path(recorder.start({})["file"])
    header = file.stat().st_size
    prompts = random_prompts(30)
    for prompt in prompts:
        recorder.feed(observed([prompt]))
    recorder.stop()
    whole = file.read_bytes()
    cut = tmp_path / "cut.jsonl.gz"
    lengths = []
    for size in [*range(header, len(whole), 41), len(whole)]:
        cut.write_bytes(whole[:size])
        found = read(cut)
        assert found == prompts[: len(found)]
        lengths.append(len(found))
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0, 30)
    cut.write_bytes(whole[: header // 2])
    with pytest.raises(InvalidArgument, match="cut off"):
        read(cut)


ENDLESS = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from kvcm_ray.actors import recorder
    from kvcm_ray.core.observed import Observed
    recorder.FLUSH_S = 0.001
    recording = recorder.Recorder(Path(sys.argv[1]), "chat")
    print(recording.start({})["file"], flush=True)
    key = 0
    while True:
        none = np.zeros(100, np.int64)
        keys = np.arange(key, key + 1000)
        key += 1000
        times = np.full(100, time.time())
        recording.feed(Observed(["m"] * 100, times, none > 0, none > 0, none, none + 10, keys, none))
        time.sleep(0.001)
"""


def test_a_killed_process_leaves_a_trace(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(ENDLESS), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        file = child.stdout.readline().strip()
        until(lambda: os.path.getsize(file) > 50_000)
        os.kill(child.pid, signal.SIGKILL)
    keys = [key for prompt in read(file) for key in prompt]
    assert keys == list(range(len(keys)))
    assert len(keys) >= 5_000
    assert load(file).requests == len(keys) // 10
    (told,) = Recorder(tmp_path, "chat").list()
    assert (told["state"], told["file"]) == ("cut off", file)


FULL_DISK = """
    import resource, sys
    sys.path[:0] = sys.argv[2:]
    from pathlib import Path
    from kvcm_ray.actors import recorder as module
    from kvcm_ray.actors.recorder import Recorder
    from test_recorder import observed, random_prompts, until
    recorder = Recorder(Path(sys.argv[1]), "chat")
    module.FLUSH_BYTES = 1 << 30
    module.FLUSH_S = 0.05
    recorder.start({})
    recorder.feed(observed(random_prompts(1000)))
    until(lambda: recorder.list()[0]["requests"] == 1000)
    size = recorder.list()[0]["bytes"] + 10_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    recorder.feed(observed(random_prompts(1000, 1)))
    done = recorder.stop()
    print(done["state"], done["requests"], done["missing_requests"], done["file"], sep="|")
"""


def test_a_disk_that_takes_no_more_ends_it_and_the_file_stays_whole(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(FULL_DISK),
        str(tmp_path),
        str(Path(__file__).parent),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    state, requests, missing, file = done.stdout.strip().split("|")
    assert state.startswith("failed: "), done.stderr
    assert "File too large" in state
    assert int(requests) == len(read(file)) == 1000
    assert int(missing) > 0


def test_only_one_instance(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "chat")
    file = recorder.start({"instance_id": "b"})["file"]
    recorder.feed(observed([[1, 2], [3], [4, 5]], ids=["a", "b", "b"], held=1))
    recorder.feed(observed([[6]], ids=["a"]))
    done = recorder.stop()
    assert read(file) == [[3], [4, 5]]
    assert (done["requests"], done["accessed_blocks"]) == (2, 3)
    assert load(file).held.tolist() == [True, True, False]


@pytest.mark.parametrize(("rate", "level"), [(0.5, 1), (0.1, 4)])
def test_a_sample_of_the_blocks(tmp_path: Path, rate: float, level: int) -> None:
    recorder = Recorder(tmp_path, "chat")
    recorder.start({"sample_rate": rate})
    batch = observed(random_prompts(200))
    recorder.feed(batch)
    done = recorder.stop()
    kept = levels(batch.keys, offsets_of(batch.counts)) >= level
    parts = zip(*(np.split(each, np.cumsum(batch.counts)[:-1]) for each in (batch.keys, kept)), strict=True)
    assert read(done["file"]) == [keys[flags].tolist() for keys, flags in parts]
    assert load(done["file"]).sample_level == level
    assert done["accessed_blocks"] == len(batch.keys), "the blocks that were asked for, sampled or not"


def test_a_file_gets_no_larger_than_asked(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "chat")
    limit = 1 << 16
    recorder.start({"max_bytes": limit})
    for round_ in range(20):
        recorder.feed(observed(random_prompts(40, round_)))
        time.sleep(0.002)
    until(lambda: recorder.list()[0]["state"] != "recording")
    done = recorder.stop()
    assert done["state"] == "max_bytes"
    assert 0 < done["bytes"] == os.path.getsize(done["file"]) <= limit
    assert 0 < done["requests"] == len(read(done["file"]))
    assert done["missing_requests"] > 0


def test_a_recording_ends_in_time(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "chat")
    recorder.start({"seconds": 0.2})
    recorder.feed(observed([[1]]))
    with pytest.raises(RecordingUnderWay, match="recorded already"):
        recorder.start({})
    until(lambda: recorder.list()[0]["state"] == "seconds")
    recorder.feed(observed([[2]]))
    assert read(recorder.list()[0]["file"]) == [[1]]
    recorder.start({})
    assert recorder.stop()["requests"] == 0
    with pytest.raises(RecordingNotFound, match="kvcm trace list"):
        recorder.stop()
    assert [each["state"] for each in recorder.list()] == ["seconds", "stopped"]


def test_traffic_that_is_too_much_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_KEYS_MAX", 100)
    lost = [5]
    recorder = Recorder(tmp_path, "chat", lambda: lost[0])
    recorder.start({})
    recorder.feed(observed([[1] * 101, [2]]))
    recorder.feed(observed([[1], [2]]))
    lost[0] += 3
    done = recorder.stop()
    lost[0] += 100
    assert (done["requests"], done["missing_requests"]) == (2, 5)
    assert recorder.list()[0]["missing_requests"] == 5


def test_recordings_of_other_groups_are_not_told_of(tmp_path: Path) -> None:
    for group in ("chat", "chat/2", "chat-20250101T000000Z"):
        recorder = Recorder(tmp_path, group)
        recorder.start({})
        recorder.stop()
    for group in ("chat", "chat/2"):
        (told,) = Recorder(tmp_path, group).list()
        assert (told["group"], told["state"]) == (group, "stopped")


@pytest.mark.parametrize(
    "options",
    [
        {"seconds": -1},
        {"seconds": float("nan")},
        {"max_bytes": 10},
        {"sample_rate": 0.0},
        {"sample_rate": 1.5},
        {"rate": 1},
    ],
)
def test_what_cannot_be_recorded(options: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        Options.of(options)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("no folder")
    with pytest.raises(StorageIOError, match="cannot write the recording"):
        Recorder(tmp_path / "traces", "chat").start({})


def test_a_disk_that_is_full_from_the_beginning_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    recorder = Recorder(tmp_path, "chat")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageIOError, match="No space left"):
            recorder.start({})
    assert recorder.list() == []
    recorder.start({})
    recorder.feed(observed([[1, 2]]))
    assert recorder.stop()["requests"] == 1


def test_its_report_is_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.TraceWriter.flush

    def slow(writer: module.TraceWriter, bytes_max: int | None = None) -> bool:
        time.sleep(0.01)
        return real(writer, bytes_max)

    monkeypatch.setattr(module.TraceWriter, "flush", slow)
    recorder = Recorder(tmp_path, "chat")
    recorder.start({})
    assert [recorder.stop()] == recorder.list()


def test_a_clock_that_is_set_back_does_not_end_it(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "chat")
    recorder.start({})
    earlier = observed([[1]])
    recorder.feed(replace(earlier, times_s=earlier.times_s - 60))  # was asked before it began
    recorder.feed(observed([[2, 3]]))
    recorder.feed(replace(earlier, times_s=earlier.times_s - 3600))
    assert read(recorder.stop()["file"]) == [[2, 3], [1]]


def test_a_group_records_what_it_is_asked(tmp_path: Path) -> None:
    lab = ReclaimLab(tmp_path, ("shm:2MiB",))
    try:
        lab.registry.register_instance(instance("one", size=16 * 1024))
        service, keys = lab.service, some_keys(4)
        file = service.record_start({"block_tokens": 16}).result(10)["file"]
        service.submit([Touch("one", keys[:0], 4, missed=keys)]).result(10)
        service.submit([start_request("one", keys)]).result(10)
        service.submit([Touch("one", keys[:2], 2, chained=False)]).result(10)
        done = service.record_stop().result(10)
        assert service.recordings().result(10) == {"recordings": [done]}
        service.record_start({}).result(10)
    finally:
        lab.close()
    assert Path(file).parent == tmp_path / "traces"
    assert [(request.op, request.keys.tolist()) for request in open_trace(file)] == [
        (READ, keys.tolist()),
        (WRITE, keys.tolist()),
    ]
    assert Recorder(tmp_path / "traces", "default").list()[-1]["state"] == "the group's process ended"
