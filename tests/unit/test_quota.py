"""Quota arithmetic, placement by strategy and room, and their refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcm_ray.core.model import (
    CacheConfig,
    CachePreferStrategy,
    InstanceGroup,
    InstanceGroupQuota,
    MooncakeSpec,
    NfsSpec,
    QuotaConfig,
    ShmSpec,
    StorageConfig,
    StorageType,
    ThreeFSSpec,
    VcnsThreeFSSpec,
)
from kvcm_ray.core.placement import candidates, choose_storage
from kvcm_ray.core.quota import Account, Quota
from kvcm_ray.errors import NoStorageAvailable, QuotaExceeded

NFS, SHM = StorageType.ST_NFS, StorageType.ST_TAIRMEMPOOL

STORAGES = {
    "nfs": StorageConfig("nfs", nfs=NfsSpec("/n")),
    "shm": StorageConfig("shm", shm=ShmSpec("/dev/shm/x")),
    "3fs": StorageConfig("3fs", threefs=ThreeFSSpec(mountpoint="/m", root_dir="r")),
    "vcns": StorageConfig("vcns", vcnsthreefs=VcnsThreeFSSpec(mountpoint="/v", root_dir="r")),
    "moon": StorageConfig("moon", mooncake=MooncakeSpec()),
    "off": StorageConfig("off", nfs=NfsSpec("/o"), is_available=False),
}


def make_group(
    *names: str,
    total: int = 1000,
    strategy: CachePreferStrategy = CachePreferStrategy.CPS_UNSPECIFIED,
    **limits: int,
) -> InstanceGroup:
    entries = tuple(QuotaConfig(StorageType[f"ST_{k}"], v) for k, v in limits.items())
    return InstanceGroup(
        name="g",
        storage_candidates=names,
        quota=InstanceGroupQuota(total, entries),
        cache_config=CacheConfig(data_storage_strategy=strategy),
    )


def test_reserve_names_the_quota_that_refuses() -> None:
    quota = Quota(make_group(total=100, NFS=60))
    quota.reserve(NFS, 60)
    quota.commit(NFS, 50)
    quota.condemn(NFS, 20)
    with pytest.raises(QuotaExceeded, match="quota ST_NFS of 60 bytes") as caught:
        quota.reserve(NFS, 1)
    assert caught.value.details == {
        "quota": "ST_NFS",
        "capacity": 60,
        "used": 50,
        "reserved": 10,
        "pending_delete": 20,
        "asked": 1,
    }
    with pytest.raises(QuotaExceeded, match="quota total of 100 bytes"):
        quota.reserve(SHM, 41)
    quota.reserve(SHM, 40)
    assert quota.total() == Account(used=50, reserved=50, pending=20)
    quota.release(NFS, 20)
    quota.reserve(NFS, 20)


def test_both_kinds_of_3fs_share_one_quota() -> None:
    quota = Quota(make_group(**{"3FS": 10}))
    quota.reserve(StorageType.ST_VCNS_3FS, 6)
    with pytest.raises(QuotaExceeded, match="ST_3FS"):
        quota.reserve(StorageType.ST_3FS, 5)


def test_the_smaller_of_two_entries_of_a_type_counts() -> None:
    entries = (QuotaConfig(NFS, 10), QuotaConfig(NFS, 5))
    quota = Quota(InstanceGroup(quota=InstanceGroupQuota(100, entries)))
    assert quota.ceiling(NFS) == 5
    assert quota.ceiling(SHM) == 100


def test_lowering_a_quota_refuses_only_what_is_new() -> None:
    quota = Quota(make_group(total=100))
    quota.reserve(NFS, 80)
    quota.configure(make_group(total=50))
    quota.commit(NFS, 80)
    with pytest.raises(QuotaExceeded):
        quota.reserve(NFS, 1)


def test_a_group_without_a_quota_writes_nothing() -> None:
    with pytest.raises(QuotaExceeded):
        Quota(InstanceGroup()).reserve(NFS, 1)


operation = st.tuples(
    st.sampled_from(["reserve", "commit", "condemn", "release"]),
    st.sampled_from([NFS, SHM]),
    st.integers(0, 60),
)


@given(st.lists(operation, max_size=60))
def test_never_more_than_the_capacity(operations: list[tuple[str, StorageType, int]]) -> None:
    quota = Quota(make_group(total=100, NFS=70))
    for name, kind, nbytes in operations:
        account = quota.account(kind)
        room = {
            "reserve": nbytes,
            "commit": account.reserved,
            "condemn": account.used - account.pending,
            "release": account.pending,
        }[name]
        try:
            getattr(quota, name)(kind, min(nbytes, room))
        except QuotaExceeded:
            assert name == "reserve"
        assert 0 <= quota.total().held <= 100
        assert quota.account(NFS).held <= 70


# ----------------------------------------------------------------------------------- placement


def placed(group: InstanceGroup, nbytes: int = 1) -> str:
    ranked = candidates(group, STORAGES)
    return choose_storage(ranked, Quota(group), nbytes).global_unique_name


@pytest.mark.parametrize("strategy", list(CachePreferStrategy))
@pytest.mark.parametrize(
    "names",
    [("nfs", "shm", "3fs", "vcns", "moon"), ("moon", "vcns", "3fs"), ("nfs",), ("shm", "nfs")],
)
def test_strategies(strategy: CachePreferStrategy, names: tuple[str, ...]) -> None:
    _, verb, named = (*strategy.name.split("_", 2), "")[:3]
    exclusive = verb == "ALWAYS"
    kind = StorageType[f"ST_{named.replace('TAIR_MEMPOOL', 'TAIRMEMPOOL')}"] if named else None
    group = make_group(*names, strategy=strategy)
    of_kind = [n for n in names if STORAGES[n].storage_type is kind]
    if exclusive and not of_kind:
        with pytest.raises(NoStorageAvailable, match=f"nfs|shm|{names[0]}"):
            placed(group)
    else:
        assert placed(group) == (of_kind or list(names))[0]


def test_first_with_room_in_its_own_quota() -> None:
    group = make_group("shm", "nfs", TAIRMEMPOOL=10)
    assert placed(group, 10) == "shm"
    assert placed(group, 11) == "nfs"


def test_no_room_anywhere_names_the_largest_quota() -> None:
    group = make_group("shm", "nfs", TAIRMEMPOOL=10, NFS=20)
    with pytest.raises(QuotaExceeded) as caught:
        placed(group, 21)
    assert caught.value.details["quota"] == "ST_NFS"


@pytest.mark.parametrize(
    ("names", "reason"),
    [((), "no storage_candidates"), (("off",), "off is disabled"), (("x",), "x is not registered")],
)
def test_no_candidate_says_why(names: tuple[str, ...], reason: str) -> None:
    with pytest.raises(NoStorageAvailable, match=reason):
        placed(make_group(*names))


def test_disabled_and_unknown_candidates_are_passed_over() -> None:
    assert placed(make_group("x", "off", "nfs")) == "nfs"
