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

        Raises:
            InstanceMismatch: the id is registered with another shape.
            GroupNotFound, InstanceLimitReached, InvalidArgument, Unavailable.
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
        )
        return self._handle(await self.backend.register(info, CALL_TIMEOUT_S))

    async def instance(self, instance_id: str) -> AsyncInstance:
        """Handle of a registered instance. Raises InstanceNotFound, Unavailable."""
        return self._handle(await self.backend.instance(instance_id, CALL_TIMEOUT_S))

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
