"""What every storage promises, run against shared memory, files and the in-memory twin."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from kvcm_ray.core.model import Segment
from kvcm_ray.errors import AlreadyExists, InvalidArgument, SegmentMissing, SessionNotFound
from kvcm_ray.storage_adapters import SegmentOwner, header
from kvcm_ray.testing.storage_lab import OWNER, Lab, arrays, block

SIZES = [1, 63, 64, 1000, 4096, 12_288, 65_536, 1 << 20, (1 << 20) + 7, 3 << 20]


# ------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("size", SIZES)
def test_bytes_come_back(lab: Lab, size: int) -> None:
    segment = lab.segment(size, slots=9)
    content = {slot: block(size, slot) for slot in (0, 1, 2, 3, 5, 8)}
    lab.write(segment, content)
    assert lab.read(segment, list(content)) == list(content.values())
    assert lab.read(segment, [8, 0, 3, 3]) == [content[8], content[0], content[3], content[3]]
    assert lab.read(segment, [4, 5, 6]) == [None, content[5], None]


def test_many_small_blocks(lab: Lab) -> None:
    """More blocks than one vectored call takes, in one go and by halves."""
    segment = lab.segment(512, slots=3000)
    slots, keys, generations = arrays(list(range(3000)), 7)
    source = np.random.default_rng(1).integers(0, 256, (3000, 512), np.uint8)
    lab.storage.write(segment, "tp0", slots, keys, generations, source)
    out = np.zeros_like(source)
    assert lab.storage.read(segment, "tp0", slots, keys, generations, out).all()
    assert (out == source).all()
    rows = [bytearray(512) for _ in range(3000)]
    assert lab.storage.read(segment, "tp0", slots, keys, generations, rows).all()
    assert b"".join(rows) == source.tobytes()
    rows = [bytearray(512) for _ in range(1500)]
    odd = slice(1, None, 2)
    assert lab.storage.read(segment, "tp0", slots[odd], keys[odd], generations[odd], rows).all()
    assert b"".join(rows) == source[odd].tobytes()


def test_specs_do_not_mix(lab: Lab) -> None:
    segment = lab.segment(4096, 100, 4096)
    lab.write(segment, {3: block(4096, 0)}, spec="tp0")
    lab.write(segment, {3: block(100, 1)}, spec="tp1")
    assert lab.read(segment, [3], spec="tp0") == [block(4096, 0)]
    assert lab.read(segment, [3], spec="tp1") == [block(100, 1)]
    assert lab.read(segment, [3], spec="tp2") == [None]


@pytest.mark.parametrize("size", [96, 65_536])
def test_any_memory_will_do(lab: Lab, size: int) -> None:
    segment = lab.segment(size, slots=6)
    data = [block(size, i) for i in range(6)]
    sources = [
        data[0],
        bytearray(data[1]),
        memoryview(data[2]),
        np.frombuffer(data[3], np.float16),
        np.frombuffer(data[4], np.int32).reshape(2, -1),
        memoryview(bytearray(data[5])).cast("I"),
    ]
    slots, keys, generations = arrays(list(range(6)), 1)
    lab.storage.write(segment, "tp0", slots, keys, generations, sources)
    targets = [
        bytearray(size),
        memoryview(bytearray(size)),
        np.zeros(size, np.uint8),
        np.zeros((2, size // 4), np.uint16),
        memoryview(bytearray(size)).cast("Q"),
        np.zeros(size // 4, np.float32),
    ]
    assert lab.storage.read(segment, "tp0", slots, keys, generations, targets).all()
    assert [bytes(memoryview(t).cast("B")) for t in targets] == data


def test_tensors(lab: Lab) -> None:
    torch = pytest.importorskip("torch")
    segment = lab.segment(256, slots=3)
    source = torch.arange(3 * 128).reshape(3, 128).to(torch.bfloat16)
    slots, keys, generations = arrays([0, 1, 2], 1)
    lab.storage.write(segment, "tp0", slots, keys, generations, source)
    out = torch.zeros(3, 2, 64, dtype=torch.bfloat16)
    assert lab.storage.read(segment, "tp0", slots, keys, generations, out).all()
    assert torch.equal(out.reshape(3, 128), source)
    with pytest.raises(InvalidArgument, match="gaps"):
        lab.storage.write(segment, "tp0", slots[:1], keys[:1], generations[:1], [source[:, 0]])


def test_nothing_asked_nothing_done(lab: Lab) -> None:
    segment = lab.segment(64)
    none = arrays([], 1)
    lab.storage.write(segment, "tp0", *none, [])
    assert len(lab.storage.read(segment, "tp0", *none, [])) == 0
    assert len(lab.storage.seal(segment, "tp0", *none)) == 0
    assert lab.storage.delete(segment, none[0], none[2]) == 0
    lab.storage.prepare(segment, 0, 0)


# -------------------------------------------------------------------------------- bad arguments


def test_wrong_arguments_are_named(lab: Lab) -> None:
    segment = lab.segment(64, slots=4)
    slots, keys, generations = arrays([0, 1], 1)
    good = [bytearray(64), bytearray(64)]
    write, read = lab.storage.write, lab.storage.read
    for call in (write, read):
        with pytest.raises(InvalidArgument, match="unequal lengths"):
            call(segment, "tp0", slots, keys[:1], generations, good)
        with pytest.raises(InvalidArgument, match="unequal lengths"):
            call(segment, "tp0", slots, keys, generations, good[:1])
        with pytest.raises(InvalidArgument, match="buffer 1 has 63 bytes"):
            call(segment, "tp0", slots, keys, generations, [bytearray(64), bytearray(63)])
        with pytest.raises(InvalidArgument, match="126 bytes"):
            call(segment, "tp0", slots, keys, generations, np.zeros((2, 63), np.uint8))
        with pytest.raises(InvalidArgument, match="no spec 'nope'"):
            call(segment, "nope", slots, keys, generations, good)
        with pytest.raises(InvalidArgument, match="slot"):
            call(segment, "tp0", slots + np.uint32(3), keys, generations, good)
        with pytest.raises(InvalidArgument, match="gaps"):
            call(segment, "tp0", slots, keys, generations, list(np.zeros((64, 2), np.uint8).T))
        with pytest.raises(InvalidArgument, match="not contiguous memory"):
            call(segment, "tp0", slots, keys, generations, ["text", 5])
    with pytest.raises(InvalidArgument, match="read-only"):
        read(segment, "tp0", slots, keys, generations, [bytes(64), bytes(64)])
    with pytest.raises(InvalidArgument):
        lab.storage.delete(segment, slots + np.uint32(3), generations)
    with pytest.raises(InvalidArgument):
        lab.storage.prepare(segment, 3, 2)
    assert lab.read(segment, [0, 1, 2, 3]) == [None] * 4  # refused means that nothing happened


@pytest.mark.parametrize(("slots", "sizes"), [(0, (64,)), (4, ()), (4, (64, 0))])
def test_a_segment_without_room_is_refused(lab: Lab, slots: int, sizes: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument):
        lab.segment(*sizes, slots=slots)


# ---------------------------------------------------------------------------------- identity


def test_another_key_generation_spec_or_segment_is_a_miss(lab: Lab) -> None:
    segment = lab.segment(64, 64)
    lab.write(segment, {2: block(64, 0)}, generation=5)
    assert lab.read(segment, [2], generation=5) == [block(64, 0)]
    assert lab.read(segment, [2], generation=5, keys=[1003]) == [None]
    assert lab.read(segment, [2], generation=4) == [None]
    assert lab.read(segment, [2], generation=6) == [None]
    assert lab.read(segment, [2], generation=5, spec="tp1") == [None]
    other = lab.segment(64, 64, number=2)
    assert lab.read(other, [2], generation=5) == [None]


def test_keys_and_generations_keep_all_their_bits(lab: Lab) -> None:
    segment = lab.segment(8, slots=3)
    slots = np.arange(3, dtype=np.uint32)
    keys = np.array([-(2**63), -1, 2**63 - 1], np.int64)
    generations = np.full(3, 2**32 - 1, np.uint32)
    lab.storage.write(segment, "tp0", slots, keys, generations, [b"01234567"] * 3)
    out = np.zeros((3, 8), np.uint8)
    assert lab.storage.read(segment, "tp0", slots, keys, generations, out).all()
    found = lab.storage.headers(segment, "tp0")
    assert (found["key"] == keys).all()
    assert (found["generation"] == generations).all()


def test_a_reused_slot_is_a_miss_for_its_former_owner(lab: Lab) -> None:
    segment = lab.segment(4096)
    lab.write(segment, {1: block(4096, 1)}, generation=1)
    lab.delete(segment, [1], generation=1)
    assert lab.read(segment, [1], generation=1) == [None]
    lab.write(segment, {1: block(4096, 2)}, generation=2)
    assert lab.read(segment, [1], generation=1) == [None]
    assert lab.read(segment, [1], generation=2) == [block(4096, 2)]


def test_a_writer_that_came_too_late_changes_nothing(lab: Lab) -> None:
    segment = lab.segment(4096)
    lab.write(segment, {1: block(4096, 2)}, generation=2)
    with pytest.raises(SessionNotFound):
        lab.write(segment, {0: block(4096, 0), 1: block(4096, 1)}, generation=1)
    assert lab.read(segment, [1], generation=2) == [block(4096, 2)]
    assert lab.read(segment, [0], generation=1) == [None]


def test_writing_again_replaces(lab: Lab) -> None:
    segment = lab.segment(4096)
    for seed, generation in ((1, 1), (2, 1), (3, 9)):
        lab.write(segment, {1: block(4096, seed)}, generation=generation)
        assert lab.read(segment, [1], generation=generation) == [block(4096, seed)]


# -------------------------------------------------------------------------------------- rot


def test_every_flipped_header_bit_is_a_miss_or_harmless(lab: Lab) -> None:
    """Harmless: the header's own CRC, which only those look at who ask for no certain block."""
    segment = lab.segment(200, slots=2)
    content = block(200, 0)
    lab.write(segment, {1: content})
    for bit in range(header.HEADER_BYTES * 8):
        lab.flip_header(segment, 1, bit)
        in_crc = bit >= header.CRC_OFFSET * 8
        assert lab.read(segment, [1]) == [content if in_crc else None], bit
        assert len(lab.storage.headers(segment, "tp0")) == 0, bit
        lab.flip_header(segment, 1, bit)
    assert lab.read(segment, [1]) == [content]


@pytest.mark.parametrize("size", [40, 4096, 1 << 20])
def test_every_flipped_payload_bit_is_a_miss(lab: Lab, size: int) -> None:
    segment = lab.segment(size, slots=3)
    content = {slot: block(size, slot) for slot in range(3)}
    lab.write(segment, content)
    chance = random.Random(size)
    bits = range(size * 8) if size < 100 else [chance.randrange(size * 8) for _ in range(100)]
    for bit in bits:
        lab.flip_payload(segment, 1, bit)
        assert lab.read(segment, [0, 1, 2]) == [content[0], None, content[2]]
        lab.flip_payload(segment, 1, bit)
    assert lab.read(segment, [0, 1, 2]) == list(content.values())


# ------------------------------------------------------------------------------------- delete


def test_delete_is_idempotent_and_gives_bytes_back(lab: Lab) -> None:
    segment = lab.segment(8192, 4096, slots=8)
    for spec in ("tp0", "tp1"):
        size = 8192 if spec == "tp0" else 4096
        lab.write(segment, {slot: block(size, slot) for slot in range(8)}, spec=spec)
    before = lab.storage.stored_bytes(segment)
    assert lab.delete(segment, [5, 2, 3]) == 3 * (8192 + 4096)
    assert before - lab.storage.stored_bytes(segment) == 3 * (8192 + 4096)
    assert lab.delete(segment, [2, 3, 5]) == 0
    hits = [slot for slot in range(8) if lab.read(segment, [slot])[0]]
    assert hits == [0, 1, 4, 6, 7]
    assert lab.read(segment, [5], spec="tp1") == [None]


def test_delete_of_another_generation_does_nothing(lab: Lab) -> None:
    segment = lab.segment(4096)
    lab.write(segment, {1: block(4096, 1)}, generation=8)
    assert lab.delete(segment, [1], generation=7) == 0
    assert lab.delete(segment, [1], generation=9) == 0
    assert lab.read(segment, [1], generation=8) == [block(4096, 1)]


def test_delete_takes_slots_without_a_readable_header(lab: Lab) -> None:
    segment = lab.segment(4096)
    lab.store_unsealed(segment, 1, block(4096, 1))
    lab.write(segment, {2: block(4096, 2)})
    lab.flip_header(segment, 2, 100)
    assert lab.storage.written_slots(segment, "tp0").tolist() == [False, True, True] + [False] * 13
    assert lab.delete(segment, [1, 2, 3], generation=44) == 8192
    assert not lab.storage.written_slots(segment, "tp0").any()
    assert header.blank(lab.storage.raw_headers(segment, "tp0")).all()


def test_delete_leaves_neighbours_without_headers_alone(lab: Lab) -> None:
    """Slots that share a page, one of them being written by a plain client."""
    segment = lab.segment(1000)
    lab.write(segment, {0: block(1000, 0), 2: block(1000, 2)})
    lab.store_unsealed(segment, 1, block(1000, 1))
    lab.delete(segment, [0, 2])
    assert lab.storage.seal(segment, "tp0", *arrays([1], 5)).all()
    assert lab.read(segment, [1], generation=5) == [block(1000, 1)]


def test_a_deleted_slot_can_be_used_again(lab: Lab) -> None:
    segment = lab.segment(100, slots=60)
    for generation in range(1, 6):
        content = {slot: block(100, slot + generation) for slot in range(60)}
        lab.write(segment, content, generation=generation)
        assert lab.read(segment, list(content), generation=generation) == list(content.values())
        lab.delete(segment, list(content), generation=generation)
    assert lab.storage.headers(segment, "tp0").size == 0


# --------------------------------------------------------------------------------------- seal


def test_payloads_without_headers_are_misses_until_sealed(lab: Lab) -> None:
    segment = lab.segment(4096, slots=8)
    lab.store_unsealed(segment, 1, block(4096, 1))
    lab.store_unsealed(segment, 2, block(4096, 2))
    lab.write(segment, {3: block(4096, 3)}, generation=9)
    assert lab.read(segment, [1, 2], generation=5) == [None, None]
    slots, keys, generations = arrays([0, 1, 2, 3], 5)
    assert not lab.storage.sealed(segment, "tp0", slots, keys, generations).any()
    flags = lab.storage.seal(segment, "tp0", slots, keys, generations)
    assert flags.tolist() == [False, True, True, False]  # never written, two sealed, another's
    assert lab.read(segment, [1, 2], generation=5) == [block(4096, 1), block(4096, 2)]
    assert lab.read(segment, [3], generation=9) == [block(4096, 3)]
    again = lab.storage.seal(segment, "tp0", slots, keys, generations)
    assert again.tolist() == flags.tolist()
    assert lab.storage.sealed(segment, "tp0", slots, keys, generations).tolist() == flags.tolist()
    lab.storage.drop_segment(segment)
    assert not lab.storage.sealed(segment, "tp0", slots, keys, generations).any()


# --------------------------------------------------------------------------------- whole segments


def test_creating_again_keeps_the_bytes(lab: Lab) -> None:
    segment = lab.segment(4096)
    lab.write(segment, {1: block(4096, 1)})
    lab.storage.create_segment(segment, OWNER)
    assert lab.read(segment, [1]) == [block(4096, 1)]
    with pytest.raises(AlreadyExists):
        lab.storage.create_segment(replace(segment, slots=5), OWNER)
    assert lab.read(segment, [1]) == [block(4096, 1)]


def test_segments_are_found_without_an_index(lab: Lab) -> None:
    first, second = lab.segment(4096), lab.segment(64, 64, number=2)
    lab.write(first, {0: block(4096, 0)})
    found = list(lab.storage.list_segments())
    assert [(f.path, f.segment, f.owner) for f in found] == [
        (first.path, first, SegmentOwner("group", "instance", "0badcafe")),
        (second.path, second, SegmentOwner("group", "instance", "0badcafe")),
    ]
    assert found[0].stored_bytes == lab.storage.stored_bytes(first) >= 4096


def test_headers_say_what_is_there(lab: Lab) -> None:
    segment = lab.segment(64, slots=8)
    lab.write(segment, {5: block(64, 5), 2: block(64, 2)}, generation=3)
    rows = lab.storage.headers(segment, "tp0")
    assert rows["slot"].tolist() == [2, 5]
    assert rows["key"].tolist() == [1002, 1005]
    assert rows["generation"].tolist() == [3, 3]
    assert rows["length"].tolist() == [64, 64]
    assert len(lab.storage.raw_headers(segment, "tp0")) == 8


def test_a_missing_segment_is_all_misses(lab: Lab) -> None:
    segment = Segment(7, "s", "instance/0badcafe-000007", lab.segment(64).specs, 16)
    assert lab.read(segment, [0, 1]) == [None, None]
    assert lab.delete(segment, [0, 1]) == 0
    assert lab.storage.seal(segment, "tp0", *arrays([0], 1)).tolist() == [False]
    assert lab.storage.headers(segment, "tp0").size == 0
    assert lab.storage.stored_bytes(segment) == 0
    assert lab.storage.drop_segment(segment) == 0
    assert "0badcafe-000007" in lab.storage.check_segment(segment)
    for call in (
        lambda: lab.write(segment, {0: bytes(64)}),
        lambda: lab.storage.prepare(segment, 0, 1),
        lambda: lab.storage.raw_headers(segment, "tp0"),
        lambda: lab.storage.written_slots(segment, "tp0"),
    ):
        with pytest.raises(SegmentMissing):
            call()


def test_a_dropped_segment_is_gone_and_can_be_made_anew(lab: Lab) -> None:
    segment = lab.segment(4096)
    lab.write(segment, {1: block(4096, 1)})
    assert lab.storage.check_segment(segment) == ""
    assert lab.storage.drop_segment(segment) >= 4096
    assert lab.read(segment, [1]) == [None]
    assert list(lab.storage.list_segments()) == []
    lab.storage.create_segment(segment, OWNER)
    assert lab.read(segment, [1]) == [None]
    lab.write(segment, {1: block(4096, 2)})
    assert lab.read(segment, [1]) == [block(4096, 2)]


def test_prepared_space_counts_as_stored(lab: Lab) -> None:
    segment = lab.segment(65_536, slots=8)
    lab.storage.prepare(segment, 2, 4)
    assert lab.storage.stored_bytes(segment) >= 4 * 65_536
    assert lab.delete(segment, [2, 3, 4, 5]) == 4 * 65_536


def test_closing_only_gives_handles_back(lab: Lab) -> None:
    segment = lab.segment(64)
    lab.write(segment, {1: block(64, 1)})
    lab.storage.close()
    assert lab.read(segment, [1]) == [block(64, 1)]


# ------------------------------------------------------------------------------ random histories


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_against_a_dictionary(lab: Lab, seed: int) -> None:
    """Reads, writes, deletes and rot by any party, also with stale generations."""
    chance = random.Random(seed)
    size = chance.choice([24, 1000, 4096, 40_000])
    segment = lab.segment(size, slots=12)
    truth: dict[int, tuple[int, bytes]] = {}
    for generation in range(1, 120):
        slots = chance.sample(range(12), chance.randrange(1, 8))
        action = chance.random()
        if action < 0.4:
            content = {slot: block(size, generation * 100 + slot) for slot in slots}
            lab.write(segment, content, generation)
            truth |= {slot: (generation, data) for slot, data in content.items()}
        elif action < 0.6:
            stale = chance.randrange(1, generation + 1)
            lab.delete(segment, slots, stale)
            for slot in slots:
                if slot in truth and truth[slot][0] == stale:
                    del truth[slot]
        elif action < 0.8:
            for slot in slots:
                if slot in truth:
                    lab.delete(segment, [slot], truth.pop(slot)[0])
        wanted = [truth.get(slot, (1, b""))[0] - (chance.random() < 0.1) for slot in range(12)]
        for slot, asked in enumerate(wanted):
            held, data = truth.get(slot, (-1, b""))
            expected = data if held == asked else None
            assert lab.read(segment, [slot], max(asked, 0)) == [expected]


def test_readers_never_see_wrong_bytes_while_slots_are_reused(lab: Lab) -> None:
    """Bytes say which generation they are of, all over; stale readers run beside the writer."""
    size, slots_total = 96 * 1024, 8
    segment = lab.segment(size, slots=slots_total)
    newest = [0] * slots_total
    stop = time.monotonic() + 1.0
    failures: list[str] = []
    hits = [0]

    def read_on(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < stop and not failures:
            slots = chance.sample(range(slots_total), 3)
            asked = [max(0, newest[slot] - chance.randrange(2)) for slot in slots]
            where, keys, _ = arrays(slots, 1)
            out = np.zeros((3, size), np.uint8)
            generations = np.array(asked, np.uint32)
            flags = lab.storage.read(segment, "tp0", where, keys, generations, out)
            for flag, slot, generation, got in zip(flags, slots, asked, out, strict=True):
                hits[0] += bool(flag)
                if flag and not (got == (generation * 7 + slot) % 251).all():
                    failures.append(f"slot {slot} generation {generation}")

    readers = [threading.Thread(target=read_on, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    chance = random.Random(99)
    generation = 0
    while time.monotonic() < stop:
        generation += 1
        slot = chance.randrange(slots_total)
        lab.delete(segment, [slot], newest[slot])
        data = bytes([(generation * 7 + slot) % 251]) * size
        lab.write(segment, {slot: data}, generation)
        newest[slot] = generation
    for reader in readers:
        reader.join()
    assert not failures
    assert hits[0] > 20
    assert generation > 20
