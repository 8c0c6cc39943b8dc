"""Copying sessions in progress: their blocks stay out of the eviction order as long as they last."""

from __future__ import annotations

import numpy as np

from kvcm_ray.core.blocks import Ids
from kvcm_ray.core.ledger import KINDS, Instance, Ledger, Move
from kvcm_ray.core.session import Session


def enlist(ledger: Ledger, session: Session, ids: Ids) -> None:
    """Take a copying session into the books; `ids` are its blocks, in order, -1 for those gone."""
    ledger.sessions.add(session)
    name = session.record.session_id
    ledger.moves.by_id[name] = move = Move(session, ids)
    ledger.moves.waiting[name] = None
    present = ids[ids >= 0]
    ledger.table.moving[present] = True
    ledger.order.hold(present)
    # Also when they are promoted: a copy stays below only where there is room.
    for kind in np.unique(ledger.table.kind[present]).tolist():
        nbytes = int(ledger.table.nbytes[present[ledger.table.kind[present] == kind]].sum())
        move.leaving[KINDS[kind]] = nbytes
    ledger.moves.leaving.update(move.leaving)


def release(ledger: Ledger, session: Session) -> None:
    """A copying session ended, whatever came of it: its blocks are in the order again."""
    move = ledger.moves.by_id.pop(session.record.session_id, None)
    if move is None:
        return
    ledger.moves.waiting.pop(session.record.session_id, None)
    ledger.moves.leaving.subtract(move.leaving)
    ids = still_there(ledger, ledger.instance(session.record.instance_id), session)
    ids = ids[ids >= 0]
    ledger.table.moving[ids] = False
    ledger.order.release(ids)


def still_there(ledger: Ledger, instance: Instance, session: Session) -> Ids:
    """Id of each block of the session that is where it was copied from; -1 for the others."""
    return ledger.table.find(instance.number, session.record.source)
