"""`AsyncClient`: for programs with an event loop, and the implementation of the blocking one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from kvcm_ray.client.backend import CALL_TIMEOUT_S, Backend
from kvcm_ray.client.instance import AsyncInstance
from kvcm_ray.client.runtime import Runtime
from kvcm_ray.client.transfer import Transfer
from kvcm_ray.core.limits import SPECS_PER_INSTANCE_MAX
from kvcm_ray.core.model import (
    InstanceInfo,
    LocationSpecGroup,
    LocationSpecInfo,
    ModelDeployment,
)
from kvcm_ray.errors import InvalidArgument


class AsyncClient:
    """A connection to one manager; made by `kvcm_ray.client.connect_async`."""

    def __init__(self, backend: Backend, runtime: Runtime, raise_errors: bool = False) -> None:
        self.backend = backend
        self._transfer = Transfer(runtime)
        self._raise_errors = raise_errors

    @property
    def address(self) -> str:
        """URL or data directory of the manager."""
        return self.backend.address

    async def register(
        self,
        instance_id: str,
        group: str = "default",
        *,
        block_size: int,
        specs: Mapping[str, int],
        model_name: str = "unnamed",
        dtype: str = "bytes",
        spec_groups: Mapping[str, Sequence[str]] | None = None,
        deployment: ModelDeployment | None = None,
        model_version: str = "",
        supersedes: str = "",
        handover_s: int = 0,
    ) -> AsyncInstance:
        """Register a model configuration, or find it registered. Any number of processes may do so.

        Args:
            instance_id: name of the configuration, unique in the manager.
            group: the instance group whose quota it uses.
            block_size: tokens in one block.
            specs: bytes of each part of one block, by name; ``tp0, tp1, ...`` for the ranks of a
                tensor-parallel engine.
            model_name, dtype: described to others; part of the identity.
            spec_groups: named subsets of the specs, for blocks that have only some of them.
            deployment: all of the model's description at once, instead of the two above.
            model_version: names the weights, and whatever else makes blocks of two instances differ.
            supersedes: an instance of the same group that this one replaces. Both are served; the
                share of the quota that the other one may use shrinks to nothing.
            handover_s: time that this takes; 0 is an hour.

        Raises:
            InstanceMismatch: the id is registered with another shape or model version.
            GroupNotFound, InstanceLimitReached, InstanceNotFound, InvalidArgument, Unavailable.
        """
        if not 0 < len(specs) <= SPECS_PER_INSTANCE_MAX:
            raise InvalidArgument(f"1 to {SPECS_PER_INSTANCE_MAX} specs needed, got {len(specs)}")
        for name, size in specs.items():
            if not isinstance(size, int) or size <= 0:
                raise InvalidArgument(f"spec {name!r} must have a size above 0, got {size!r}")
        if block_size <= 0:
            raise InvalidArgument(f"block_size must be above 0, got {block_size}")
        info = InstanceInfo(
            instance_group_name=group,
            instance_id=instance_id,
            block_size=block_size,
            location_spec_infos=tuple(LocationSpecInfo(n, s) for n, s in specs.items()),
            model_deployment=deployment
            or ModelDeployment(model_name=model_name, dtype=dtype, tp_size=len(specs)),
            location_spec_groups=tuple(
                LocationSpecGroup(name, tuple(names)) for name, names in (spec_groups or {}).items()
            ),
            model_version=model_version,
            supersedes=supersedes,
            handover_seconds=handover_s,
        )
        return self._handle(await self.backend.register(info, CALL_TIMEOUT_S))

    async def instance(self, instance_id: str) -> AsyncInstance:
        """Handle of a registered instance. Raises InstanceNotFound, Unavailable."""
        return self._handle(await self.backend.instance(instance_id, CALL_TIMEOUT_S))

    async def flush_touches(self) -> None:
        """Tell the manager at once of all reads so far, and wait until it knows.

        It is told in the background anyway, a moment later; this is for replays whose outcome must
        not depend on that moment. By URL there is nothing to send: the manager's replicas report the
        reads that they serve, in their own time.

        Raises:
            KvcmError: some of the reports were lost.
        """
        await self.backend.flush_touches()

    async def close(self) -> None:
        """Send pending reports and give back connections, mappings and threads."""
        await self.backend.close()
        self._transfer.close()

    def _handle(self, info: InstanceInfo) -> AsyncInstance:
        return AsyncInstance(self.backend, self._transfer, info, self._raise_errors)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.address}>"
