"""What a group holds, as plain JSON values for status pages, metrics and the quota commands.

Bytes are payload bytes. ``used`` includes ``pending_delete``: bytes of removed, failed and expired
blocks stay used until they are erased.
"""

from __future__ import annotations

from typing import Any

from kvcm_ray.core.ledger import Instance, Ledger
from kvcm_ray.core.quota import Account
from kvcm_ray.core.report import reclaimed


def usage(ledger: Ledger) -> dict[str, Any]:
    """Totals, then ``by_type`` (types with a quota of their own or with blocks) and ``instances``.

    ``quota_bytes`` of a type is None if only the total bounds it. Sessions with nothing to write
    are not counted. ``hit_blocks``, ``lookup_blocks`` and ``reclaim`` begin at 0 with the process.
    """
    quota, instances = ledger.quota, ledger.instances.values()
    held = {kind for kind, account in quota.accounts.items() if account != Account()}
    return {
        "group": ledger.group.name,
        "quota_bytes": quota.capacity,
        **_account(quota.total()),
        "by_type": {
            kind.name: {
                "quota_bytes": quota.capacities.get(kind),
                **_account(quota.accounts.get(kind, Account())),
            }
            for kind in sorted(held | quota.capacities.keys())
        },
        "blocks": sum(i.key_count for i in instances),
        "writing_blocks": sum(len(i.writing) for i in instances),
        "sessions": len(ledger.sessions),
        "trash_records": len(ledger.trash),
        "hit_blocks": ledger.hit_blocks,
        "lookup_blocks": ledger.lookup_blocks,
        "pins": sum(len(i.pins) for i in instances),
        "reclaim": reclaimed(ledger),
        "instances": {name: _instance(i) for name, i in sorted(ledger.instances.items())},
    }


def _account(account: Account) -> dict[str, int]:
    return {
        "used_bytes": account.used,
        "reserved_bytes": account.reserved,
        "pending_delete_bytes": account.pending,
    }


def _instance(instance: Instance) -> dict[str, int | bool]:
    slots, free = instance.segments.slots()
    return {
        "blocks": instance.key_count,
        "writing_blocks": len(instance.writing),
        "segments": len(instance.segments.segments),
        "slots": slots,
        "free_slots": free,
        "retiring": bool(instance.info.retiring_since_s),
    }
