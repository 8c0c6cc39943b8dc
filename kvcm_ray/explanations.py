"""What ``kvcm why CODE`` says of each error, and what ``docs/errors`` is generated from.

The first line of a class's docstring says what happened, its ``hint`` the one thing to try first. Here is
the rest: usual causes, what to do about each, and what the error leaves as it was. Every class of
`kvcm_ray.errors` has an entry (a test looks). Nothing here is needed to raise an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvcm_ray import errors
from kvcm_ray.errors import KvcmError


@dataclass(frozen=True, slots=True)
class Explanation:
    causes: tuple[str, ...]  #: usual ones first
    steps: tuple[str, ...]  #: what to do, in order
    unchanged: str  #: what the error leaves as it was


NOTHING = "Nothing was changed."
PARENT = "The codes that end in 000 are raised as one of their kinds; see those."

EXPLANATIONS: dict[type[KvcmError], Explanation] = {
    KvcmError: Explanation(
        ("A fault of ours, or of the machine, that no other code describes.",),
        (
            "Run the command again with KVCM_DEBUG=1, which prints where it happened.",
            "Look at the end of `manager.log` in the data directory.",
            "`kvcm doctor` looks for the usual troubles of a machine.",
        ),
        "Unknown. `kvcm fsck` says whether index, bytes and counters agree.",
    ),
    errors.InvalidArgument: Explanation(
        (
            "A field is missing, has the wrong type, or is out of its range.",
            "Two fields contradict each other, such as block keys and token ids of different lengths.",
            "A name has characters that names may not have.",
        ),
        (
            "The message names the field: correct it.",
            "`/docs` of the manager has an example of every request; `kvcm COMMAND --help` one of each "
            "command; `kvcm config explain KEY` says what a setting takes.",
        ),
        NOTHING,
    ),
    errors.NotFound: Explanation(
        (PARENT,), ("Look the name up with the `list` command of its kind.",), NOTHING
    ),
    errors.StorageNotFound: Explanation(
        ("The name is mistyped.", "Somebody removed the storage.", "A group's list still names it."),
        (
            "`kvcm storage list` shows the names.",
            "`kvcm storage create NAME --path DIR` adds one; `kvcm group update GROUP --storage ...` gives a "
            "group another list.",
        ),
        NOTHING,
    ),
    errors.GroupNotFound: Explanation(
        ("The name is mistyped.", "The command talks to another manager than you think."),
        (
            "`kvcm group list` shows the names, `kvcm status` the URL of the manager.",
            "`kvcm group create NAME --quota 8GiB --storage ...` makes one.",
        ),
        NOTHING,
    ),
    errors.InstanceNotFound: Explanation(
        (
            "The engine has not registered yet, or registered with another manager.",
            "Somebody removed the instance; its blocks are gone with it.",
            "The account may not see the instance: then it gets the same answer as if there were none.",
        ),
        (
            "`kvcm instance list` shows what is registered.",
            "Start the engine again, or `kvcm instance create` with the same shape.",
        ),
        "Nothing was changed. For a look-up it means: no hits.",
    ),
    errors.SessionNotFound: Explanation(
        (
            "The bytes took longer than `write_timeout_seconds`, so the session expired.",
            "The write was finished already, by an earlier try whose answer got lost.",
            "The instance was removed meanwhile.",
        ),
        (
            "Start a new write for the blocks; those that were finished are answered as present.",
            "Raise `write_timeout_seconds` if this happens often: it should be several times what a "
            "write of that size takes.",
        ),
        "The blocks of an expired session are absent, and their room is given back. A finished one stays.",
    ),
    errors.AccountNotFound: Explanation(
        ("The name is mistyped.", "The account was deleted."), ("List the accounts.",), NOTHING
    ),
    errors.RecordingNotFound: Explanation(
        ("The recording has ended: its time was over, its file full, or somebody stopped it.",
         "The group's actor was restarted; a recording ends with it."),
        (
            "`kvcm trace list` shows recordings that have ended, with their files, which stay valid traces.",
            "`kvcm trace record GROUP` begins a new one.",
        ),
        NOTHING,
    ),
    errors.Conflict: Explanation((PARENT,), ("Read the present state, then decide.",), NOTHING),
    errors.AlreadyExists: Explanation(
        ("Somebody made it before.", "An earlier try succeeded and its answer got lost."),
        ("Look at what is there with the `show` command.", "Use the update call, or remove it first."),
        "What exists was not changed.",
    ),
    errors.InstanceMismatch: Explanation(
        (
            "The model, its dtype, the block size or the parallelism changed under the same instance id.",
            "Two engines with different settings share an id.",
        ),
        (
            "`kvcm instance show ID` shows the registered shape; the message names the first difference.",
            "Give the new shape an id of its own; `--supersedes OLD` hands the quota over to it.",
        ),
        "The registered instance and its blocks stay as they are.",
    ),
    errors.VersionConflict: Explanation(
        ("Two administrators changed the group at once.", "A script sends a version that it read long ago."),
        ("Read the group again, make the change again, send the new version.",),
        "The group is as the other change left it; yours was not applied at all.",
    ),
    errors.InUse: Explanation(
        (
            "A storage is named by a group, or blocks are on it.",
            "A group has instances.",
            "A manager runs on the data directory already, or its port is taken.",
        ),
        (
            "The message names the user: remove it first.",
            "`kvcm storage drain NAME --wait` empties a storage; `kvcm down --data-dir D` stops a manager.",
            "`--force` removes the users too, where a command has it.",
        ),
        NOTHING,
    ),
    errors.UpgradeConflict: Explanation(
        (
            "The instance that is to be superseded is superseded by another one already.",
            "A rollback was asked for an instance that is not the newest.",
        ),
        ("`kvcm instance list` shows the order; only its end can be extended or rolled back.",),
        NOTHING,
    ),
    errors.RecordingUnderWay: Explanation(
        ("Somebody else records the group.", "An earlier `kvcm trace record` still runs."),
        (
            "`kvcm trace list` shows how far it is.",
            "`kvcm trace stop GROUP` ends it; its file is a valid trace.",
        ),
        "The recording goes on.",
    ),
    errors.LimitReached: Explanation((PARENT,), ("`kvcm capacity` shows what holds the quota.",), NOTHING),
    errors.QuotaExceeded: Explanation(
        (
            "The write is larger than what can be reclaimed: pinned, leased and half-written blocks stay.",
            "Reclaiming is paused, or the reclaimers are slower than the writers.",
            "The quota of one storage type is full although the total is not.",
        ),
        (
            "`kvcm capacity GROUP` shows used, pinned and reclaimable bytes of each tier.",
            "`kvcm reclaimer` shows whether reclaiming is paused; `--resume` goes on, `--size N` adds some.",
            "`kvcm advise GROUP` tells what a larger quota would find; `kvcm group update GROUP --quota ...` "
            "sets it.",
        ),
        "The write did not begin, blocks stay as they were, look-ups go on. The prompt is computed as usual.",
    ),
    errors.KeyLimitReached: Explanation(
        ("`max_key_count` of the group is smaller than the number of blocks that fit its quota.",),
        ("`kvcm group update GROUP --max-keys N`; 0 is no limit, the quota still counts.",),
        "The write did not begin; blocks stay as they were.",
    ),
    errors.InstanceLimitReached: Explanation(
        ("Old instances of models that nobody runs any more.",),
        (
            "`kvcm instance list --group GROUP`, then `kvcm instance remove ID`.",
            "Or raise it: `kvcm group update GROUP --max-instances N`.",
        ),
        "The instance was not registered.",
    ),
    errors.NoStorageAvailable: Explanation(
        (
            "All storages of the group are disabled or draining.",
            "The group's list names storages that were removed.",
        ),
        (
            "`kvcm storage list` shows the state of each; `kvcm storage enable NAME` or `undrain NAME`.",
            "`kvcm group update GROUP --storage ...` gives the group another list.",
        ),
        "The write did not begin; look-ups of blocks on enabled storages go on.",
    ),
    errors.StorageError: Explanation((PARENT,), ("The message names the path.",), "Index and quota agree."),
    errors.StorageFull: Explanation(
        (
            "The file system has less room than the quota promises: other files fill it.",
            "/dev/shm is smaller than the quota of shared memory (containers often have 64 MiB).",
            "The index's map or its disk is full.",
        ),
        (
            "`kvcm doctor` compares quotas with what is free.",
            "Free space, or lower the quota: `kvcm group update GROUP --file-quota ...`.",
            "In a container: `--shm-size`, or a memory-backed emptyDir of the right size.",
        ),
        "The write's blocks are absent and its room is given back. Reads and removals go on.",
    ),
    errors.StorageIOError: Explanation(
        (
            "The device reports errors, or was unmounted.",
            "The manager may not write there: owner or mode of a directory.",
        ),
        (
            "The message names path and errno; `dmesg` names the device.",
            "`kvcm storage disable NAME` keeps writes away from it, `kvcm storage drain NAME` empties it.",
        ),
        "Blocks that cannot be read count as misses; those with a copy in another tier are read from there.",
    ),
    errors.SegmentMissing: Explanation(
        (
            "Somebody removed files below a storage's root.",
            "/dev/shm was emptied by a reboot, or by a tool that cleans up.",
            "Another file system is mounted over the root.",
        ),
        (
            "`kvcm fsck` lists what is lost; with the manager stopped, `kvcm fsck --repair` takes it out of "
            "the index.",
            "Check the mounts; if the files come back, the blocks are hits again.",
        ),
        "Its blocks are misses; all others are served.",
    ),
    errors.Corrupt: Explanation(
        (
            "The disk gave back other bytes than were written.",
            "A file of the index was truncated or edited while no manager ran.",
            "The power failed with durability `process`, and the boot was not noticed (a copied directory).",
        ),
        (
            "`kvcm fsck` says how far it goes; stop the manager and `kvcm fsck --repair`.",
            "An index that cannot be opened at all is set aside and made again from block headers when "
            "the manager starts.",
        ),
        "A damaged record is a miss, never a wrong hit: every record and every block has a checksum.",
    ),
    errors.Fenced: Explanation(
        (
            "The group's actor was taken for dead (paused machine, long swap) and another one started.",
            "Two managers were pointed at one data directory by going around its lock.",
        ),
        ("Nothing: clients send the request to the newer one by themselves.",
         "If it comes often, `kvcm doctor` shows how often the group was restarted."),
        "Nothing was changed by the older incarnation.",
    ),
    errors.Unavailable: Explanation(
        (
            "No manager runs, or on another port, host or data directory.",
            "It is starting, or one of its actors is being restarted (a second or two).",
            "The machine is so busy that answers take longer than the caller waits.",
        ),
        (
            "`kvcm status` tells what it tried to reach; `kvcm up` starts one.",
            "`kvcm doctor --data-dir D` looks at the data directory without a manager.",
            "See the end of `manager.log` in the data directory.",
        ),
        "A request that was under way may have been done or not; sending it again with the same event id is "
        "safe. For an engine it is a miss: it computes.",
    ),
    errors.Unsupported: Explanation(
        (
            "A part of the protocol that this manager does not have, such as other storage systems.",
            "A command needs a package that is not installed; the message says which.",
        ),
        ("docs/compatibility.md lists what is there.", "pip install 'kvcm-ray[serve]' has all of a manager."),
        NOTHING,
    ),
    errors.Refused: Explanation((PARENT,), ("See the message.",), NOTHING),
    errors.Unauthenticated: Explanation(
        (
            "The manager requires accounts and the request names none.",
            "The token is expired or was revoked; the password is wrong.",
        ),
        (
            "Give `--token-file FILE`, or set KVCM_TOKEN_FILE.",
            "Ask an administrator for a new token.",
        ),
        NOTHING,
    ),
    errors.Forbidden: Explanation(
        (
            "The call is for administrators and the account is a user.",
            "The account is limited to other instance groups.",
        ),
        ("Use another account, or have an administrator widen this one.",),
        NOTHING,
    ),
    errors.TooManyRequests: Explanation(
        ("The caller sends faster than its limit.", "Many clients share one address or one account."),
        (
            "Wait as long as Retry-After says and send it again.",
            "Send fewer, larger requests: one may carry thousands of keys.",
        ),
        NOTHING,
    ),
    errors.InjectedFault: Explanation(
        ("Somebody set a fault through the debug API, to see what clients do.",),
        ("List and remove the faults with the debug API, or restart the manager without it.",),
        "As the fault was set: before the call nothing was changed, after it everything was.",
    ),
}  # fmt: skip


def all_errors() -> list[type[KvcmError]]:
    """Every class of `kvcm_ray.errors`, in the order of its file."""
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KvcmError)]


def title(kind: type[KvcmError]) -> str:
    """What happened, in a sentence."""
    return (kind.__doc__ or "").strip().partition("\n")[0]


def by_code(code: str) -> type[KvcmError] | None:
    """The class of ``KVCM-Q001``, also written ``q001`` or ``QuotaExceeded``."""
    wanted = code.strip().upper().removeprefix("KVCM-")
    for kind in all_errors():
        if wanted in (kind.code.removeprefix("KVCM-"), kind.__name__.upper()):
            return kind
    return None


def lines(kind: type[KvcmError]) -> Iterator[str]:
    """What a terminal shows."""
    found = EXPLANATIONS[kind]
    yield f"{kind.code} {kind.__name__}: {title(kind)}"
    yield ""
    yield "Usual causes"
    yield from (f"  - {cause}" for cause in found.causes)
    yield "What to do"
    yield from (f"  {number}. {step}" for number, step in enumerate(found.steps, 1))
    yield f"State      {found.unchanged}"
    yield f"Retry      {'yes, the same request may succeed later' if kind.retryable else 'no'}"
    yield f"Wire code  {kind.wire}"


def page(kind: type[KvcmError]) -> str:
    """The page of ``docs/errors``, in Markdown."""
    found = EXPLANATIONS[kind]
    parents = [k.__name__ for k in kind.__mro__[1:] if issubclass(k, KvcmError)]
    rows = [
        ("class", f"`kvcm_ray.errors.{kind.__name__}`" + (f", a `{parents[0]}`" if parents else "")),
        ("code in the protocol", f"`{kind.wire}`"),
        ("the same request may succeed later", "yes" if kind.retryable else "no"),
        ("state", found.unchanged),
    ]
    text = [
        f"# {kind.code} {kind.__name__}", "", title(kind), "",
        "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "",
        "## Usual causes", "", *(f"- {cause}" for cause in found.causes), "",
        "## What to do", "", *(f"{number}. {step}" for number, step in enumerate(found.steps, 1)),
    ]  # fmt: skip
    if kind.hint:
        text += ["", f"The error itself says: {kind.hint}"]
    return "\n".join(text) + "\n"


def overview() -> str:
    """``docs/errors/index.md``."""
    text = [
        "# Errors", "",
        "Every error has a code that stays the same. `kvcm why CODE` prints its page. This folder is made by",
        "`python -m kvcm_ray.cli.reference docs`.", "",
        "| code | class | what happened | retry |", "|---|---|---|---|",
    ]  # fmt: skip
    for kind in all_errors():
        retry = "yes" if kind.retryable else "no"
        text.append(f"| [{kind.code}]({kind.code}.md) | {kind.__name__} | {title(kind)} | {retry} |")
    return "\n".join(text) + "\n"
