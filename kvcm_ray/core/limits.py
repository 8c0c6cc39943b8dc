"""Bounds on everything a client can make us hold. Over a limit is a typed refusal, never a queue."""

from __future__ import annotations

KEYS_PER_CALL_MAX = 65_536
LOOK_UPS_PER_TOUCH_MAX = 256  #: reported in one call
TOKENS_PER_CALL_MAX = 8_388_608
REQUEST_BYTES_MAX = 64 * 1024 * 1024
NAME_BYTES_MAX = 200
SPECS_PER_INSTANCE_MAX = 1_024
SPEC_BYTES_MAX = 1 << 40
SESSION_TIMEOUT_DEFAULT_MS = 30_000
SESSION_TIMEOUT_MAX_MS = 3_600_000
SESSIONS_PER_GROUP_MAX = 65_536
ANSWERS_REMEMBERED_MAX = 16_384  #: answers kept for repeated event ids, per group
RUN_BLOCKS_MAX = 512  #: blocks in one index record
SEGMENT_BYTES_TARGET = 64 * 1024 * 1024
SEGMENT_SLOTS_MAX = 1 << 20
LEASE_MAX_MS = 600_000
PINNED_KEYS_MAX = 65_536  #: keys of one pin
PINS_PER_INSTANCE_MAX = 1_024
RECLAIM_STEP_BLOCKS = 1_024  #: evicted or moved in one commit, unless the group says otherwise
MOVE_BLOCKS_MAX = 256  #: in one copying session
MOVE_BYTES_MAX = 32 * 1024 * 1024
MOVES_IN_FLIGHT_MAX = 16  #: copying sessions of a group
MOVE_LEASE_MS = 60_000
PROMOTIONS_WAITING_MAX = 8_192  #: blocks; more hits in slow tiers meanwhile are not promoted
