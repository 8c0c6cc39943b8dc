"""Which blocks leave a full group: the order of eviction and its policies.

`EvictionOrder` keeps resident blocks in order and finds victims; a `Policy` decides between classes
of blocks. The live group and simulations (`simulate`) use the same objects.
"""

from kvcm_ray.core.eviction.order import EvictionOrder
from kvcm_ray.core.eviction.policy import POLICIES, Policy, make_policy
from kvcm_ray.core.eviction.simulate import simulate

__all__ = ["POLICIES", "EvictionOrder", "Policy", "make_policy", "simulate"]
