"""Checks of a data directory and of the storages that its registry names."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvcm_ray import fsck
from kvcm_ray.core.model import InstanceGroup, InstanceInfo, StorageConfig, StorageType
from kvcm_ray.doctor.findings import LOST, REFUSED, SLOW, UNTIDY, Checked, Place, Problem, size
from kvcm_ray.errors import Corrupt, KvcmError, NotFound
from kvcm_ray.index import IndexReader, environment, preflight
from kvcm_ray.storage_adapters import StorageAdapter, open_storage

#: File systems whose locks or mappings are not those of one machine.
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "beegfs", "glusterfs", "afs", "gpfs"}
MOUNTS = Path("/proc/self/mountinfo")


def registry(place: Place) -> Checked:
    """Can the registry be read, and are all its records sound?"""
    name = "registry"
    if place.folder is None:
        return Checked(name, "no data directory on this machine")
    if place.view is None:
        if not (place.folder / "registry" / "data.mdb").exists():
            return Checked(name, "no manager was ever started here")
        sentence = "The registry cannot be read: no manager can start, groups and instances are unknown."
        command = f"kvcm snapshot load FILE{place.where}   # into a new data directory"
        return Checked(name, "unreadable", (Problem(LOST, name, sentence, str(place.folder), command),))
    contents = place.view.contents()
    kinds = (("storages", len(contents.storages)), ("groups", len(contents.groups)))
    saw = ", ".join(f"{count} {kind}" for kind, count in (*kinds, ("instances", len(contents.instances))))
    return Checked(name, saw)


def network_file_system(place: Place) -> Checked:
    """LMDB needs locks and mappings of one machine."""
    name = "file system of the indexes"
    if place.folder is None:
        return Checked(name, "no data directory on this machine")
    kind, mount = mount_of(place.folder, MOUNTS.read_text())
    if kind not in NETWORK and not kind.startswith("fuse."):
        return Checked(name, kind)
    sentence = (
        "The indexes are on a network file system, where LMDB's locks and mappings do not work: they will "
        "be damaged."
    )
    command = "kvcm up --data-dir DIR   # on a local disk; blocks themselves may be on the network"
    return Checked(name, kind, (Problem(LOST, name, sentence, f"{kind} mounted at {mount}", command),))


def mount_of(path: Path, mounts: str) -> tuple[str, str]:
    """Type and mount point of the file system of a path, by the text of ``mountinfo``."""
    best = ("", "")
    for line in mounts.splitlines():
        fields = line.split()
        at = fields[4].encode().decode("unicode_escape")
        kind = fields[fields.index("-") + 1]
        if path.is_relative_to(at) and len(at) >= len(best[1]):
            best = (kind, at)
    return best


def storages(place: Place) -> Checked:
    """Every storage must be there, writable and enabled."""
    name = "storages"
    if place.view is None:
        return Checked(name, "no registry to look at")
    found = []
    configs = place.view.storages()
    for config in configs.values():
        root, called = config.root_path, config.global_unique_name
        if not config.is_available:
            sentence = f"Storage {called} is disabled: its blocks are misses and nothing is written there."
            command = f"kvcm storage enable {called}{place.where}"
            found.append(Problem(REFUSED, name, sentence, "somebody disabled it", command))
        elif root and not os.access(root, os.R_OK | os.W_OK | os.X_OK):
            what = "is missing" if not os.path.isdir(root) else "may not be read and written"
            sentence = (
                f"The directory of storage {called} {what}: its blocks are misses and writes there fail."
            )
            command = f"ls -ld {root}" if os.path.isdir(root) else f"mkdir -p {root}   # or mount it"
            found.append(Problem(LOST, name, sentence, root, command))
    return Checked(name, f"{len(configs)} storages", tuple(found))


def indexes(place: Place) -> Checked:
    """Can every index be opened?"""
    name = "indexes"
    found, count = [], 0
    for info, path in _indexes(place):
        try:
            IndexReader(path).close()
            count += 1
        except NotFound:
            continue
        except KvcmError as error:
            sentence = f"The index of instance {info.instance_id} cannot be read: all its blocks are misses."
            command = f"kvcm fsck --repair{place.where}"
            found.append(Problem(LOST, name, sentence, error.message, command))
    return Checked(name, f"{count} can be read", tuple(found))


def map_headroom(place: Place) -> Checked:
    """LMDB's map has a fixed size."""
    name = "room in index maps"
    found, worst = [], 0.0
    for info, path in _indexes(place):
        try:
            used, total = preflight.map_usage(path)
        except KvcmError:
            continue  # `indexes` says so
        ratio = used / total if total else 0.0
        worst = max(worst, ratio)
        if ratio > place.limits.map_ratio:
            sentence = (
                f"The index of instance {info.instance_id} is nearly full; then its writes are refused."
            )
            command = f"kvcm instance remove {info.instance_id}{place.where}   # or write less to it"
            found.append(Problem(REFUSED, name, sentence, f"{size(used)} of {size(total)} used", command))
    return Checked(name, f"at most {worst:.1%} used", tuple(found))


def readers(place: Place) -> Checked:
    """Readers that keep old pages of an index from being used again."""
    name = "readers of indexes"
    found, count = [], 0
    for info, path in _indexes(place):
        try:
            shared = environment.acquire(path, environment.READ)
        except KvcmError:
            continue
        try:
            text, last = str(shared.env.readers()), int(shared.env.info()["last_txnid"])
        finally:
            environment.release(shared)
        rows = [row.split() for row in text.splitlines()[1:] if len(row.split()) == 3]
        count += len(rows)
        for pid, at in sorted({(int(row[0]), row[2]) for row in rows}):
            problem = _stale_reader(place, name, info, pid, at, last)
            found += [problem] if problem else []
    return Checked(name, f"{count} readers", tuple(found))


def _stale_reader(
    place: Place, name: str, info: InstanceInfo, pid: int, at: str, last: int
) -> Problem | None:
    if at == "-":
        return None
    behind = last - int(at)
    if not os.path.exists(f"/proc/{pid}"):
        sentence = (
            f"Process {pid} died while it read the index of {info.instance_id}; the pages that it saw are "
            "kept until a writer clears up after it."
        )
        return Problem(UNTIDY, name, sentence, f"{behind} commits behind", f"kvcm fsck{place.where}")
    if behind <= place.limits.stale_commits:
        return None
    sentence = (
        f"Process {pid} has been inside one look-up of {info.instance_id} for long; the index grows because "
        "no page that was freed since can be used again."
    )
    return Problem(
        SLOW, name, sentence, f"{behind} commits behind", f"ps -fp {pid}   # stopped? then kill -9 it"
    )


# ------------------------------------------------------------------------------------- room


def room(place: Place) -> Checked:
    """What the quotas promise against what the devices still have."""
    name = "room for the quotas"
    if place.view is None:
        return Checked(name, "no registry to look at")
    configs, groups = place.view.storages(), place.view.groups()
    stored = _stored(place, configs)
    needed: dict[tuple[StorageType, frozenset[int]], int] = {}
    roots: dict[tuple[StorageType, frozenset[int]], set[str]] = {}
    for group in groups.values():
        for kind, promised in _promises(group, configs).items():
            mine = [
                configs[n]
                for n in group.storage_candidates
                if n in configs and configs[n].storage_type == kind
            ]
            devices = frozenset(_device(config.root_path) for config in mine)
            there = sum(stored.get((group.name, config.global_unique_name), 0) for config in mine)
            key = (kind, devices)
            needed[key] = needed.get(key, 0) + max(0, promised - there)
            roots.setdefault(key, set()).update(config.root_path for config in mine)
    found = [p for key, more in needed.items() if (p := _too_small(place, name, key[0], more, roots[key]))]
    return Checked(name, f"{len(needed)} devices compared", tuple(found))


def _promises(group: InstanceGroup, configs: Mapping[str, StorageConfig]) -> dict[StorageType, int]:
    """Bytes that each storage type of the group may come to hold."""
    kinds = {configs[name].storage_type for name in group.storage_candidates if name in configs}
    config = group.quota.quota_config if group.quota is not None else ()
    limits = {entry.storage_type: entry.capacity for entry in config}
    return {kind: min(limits.get(kind) or group.quota_bytes, group.quota_bytes) for kind in kinds}


def _too_small(place: Place, name: str, kind: StorageType, more: int, roots: set[str]) -> Problem | None:
    by_device = {_device(root): root for root in sorted(roots)}
    free = sum(shutil.disk_usage(_existing(root)).free for root in by_device.values())
    if more <= free:
        return None
    where, option = ", ".join(sorted(roots)), "--file-quota"
    advice = ""
    if kind == StorageType.ST_TAIRMEMPOOL:
        option, advice = "--memory-quota", " (in a container: a larger --shm-size)"
    sentence = (
        f"The quotas promise more than {where} has room for; writes will fail with KVCM-S001 before the "
        f"quota is reached{advice}."
    )
    evidence = f"{size(more)} may still come, {size(free)} are free"
    return Problem(REFUSED, name, sentence, evidence, f"kvcm group update GROUP {option} SIZE{place.where}")


def _device(root: str) -> int:
    return os.stat(_existing(root)).st_dev


def _existing(root: str) -> Path:
    """The directory, or the nearest one above that exists."""
    path = Path(root or "/")
    while not path.exists():
        path = path.parent
    return path


def _stored(place: Place, configs: Mapping[str, StorageConfig]) -> dict[tuple[str, str], int]:
    """Allocated bytes by (group, storage)."""
    found: dict[tuple[str, str], int] = {}
    for config, adapter in _adapters(configs):
        for segment in adapter.list_segments():
            group = segment.owner.group if segment.owner else ""
            key = (group, config.global_unique_name)
            found[key] = found.get(key, 0) + segment.stored_bytes
    return found


# ----------------------------------------------------------------------------------- orphans


def unowned_bytes(place: Place) -> Checked:
    """Bytes that no index knows, and blocks without bytes: in a sample, as `kvcm fsck` finds them all."""
    name = "bytes and blocks"
    if place.view is None:
        return Checked(name, "no registry to look at")
    adapters = {config.global_unique_name: adapter for config, adapter in _adapters(place.view.storages())}
    known = {info.uid for info in place.view.instances().values()}
    orphans = sum(
        segment.stored_bytes
        for adapter in adapters.values()
        for segment in adapter.list_segments()
        if segment.owner is not None and segment.owner.uid not in known
    )
    blocks = dangling = looked = 0
    everything = list(_indexes(place))
    random.shuffle(everything)
    for info, path in everything:
        if blocks >= place.limits.sample_blocks:
            break
        found = _findings(path, adapters, info, place.limits.settle_s)
        if found is None:
            continue
        looked += 1
        blocks += found.blocks
        dangling += len(found.dangling)
        orphans += sum(found.orphans.values())
    saw = f"{blocks} blocks of {looked} instances looked at"
    problems = []
    if orphans:
        sentence = "There are bytes that no block owns; they take room that the quotas count on."
        problems.append(Problem(SLOW, name, sentence, size(orphans), f"kvcm fsck{place.where}"))
    if dangling:
        sentence = "Blocks have lost their bytes; they are misses, and count against the quota until they go."
        problems.append(Problem(REFUSED, name, sentence, f"{dangling} blocks", f"kvcm fsck{place.where}"))
    return Checked(name, saw, tuple(problems))


def _findings(
    path: Path, adapters: Mapping[str, StorageAdapter], info: InstanceInfo, settle_s: float
) -> fsck.Findings | None:
    """What is wrong with an instance twice in a row; None if it cannot be read."""
    try:
        reader = IndexReader(path)
    except KvcmError:
        return None
    try:
        first = fsck.check_instance(reader, adapters, info)
        if first.clean:
            return first
        time.sleep(settle_s)
        reader.refresh()
        return first.still(fsck.check_instance(reader, adapters, info))
    except (KvcmError, Corrupt):
        return None
    finally:
        reader.close()


def _adapters(configs: Mapping[str, StorageConfig]) -> Iterator[tuple[StorageConfig, StorageAdapter]]:
    for config in configs.values():
        try:
            yield config, open_storage(config)
        except KvcmError:
            continue  # of another kind than ours


def _indexes(place: Place) -> Iterator[tuple[InstanceInfo, Path]]:
    if place.view is not None:
        for info in list(place.view.instances().values()):
            yield info, place.view.index_path(info)
