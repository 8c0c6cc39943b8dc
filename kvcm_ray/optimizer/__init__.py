"""What more cache, or another policy, would be worth: replay of traces without a manager.

    dataset    a trace file as arrays (`Accesses`), kept in parsed form beside the file
    curve      hits of LRU at every capacity in one pass, and the offline optimum
    sampling   the same curve, near enough, from a tenth of the blocks, for traces beyond memory
    replay     hits of each request at one capacity, through the policies that the live manager runs
    savings    from hits to prefill FLOPs, GPU-hours and money

All are pure functions of arrays. Hits are blocks of the leading run of a prompt that is present when
its request begins; the request then writes what is missing, and blocks leave down to the capacity.
"""

from kvcm_ray.optimizer.accesses import READ, REQUEST, WRITE, Accesses
from kvcm_ray.optimizer.curve import Curve, hit_curve, optimum
from kvcm_ray.optimizer.dataset import load, of_requests, save
from kvcm_ray.optimizer.replay import POLICIES, Totals, replay, totals
from kvcm_ray.optimizer.sampling import Sample, sample, sample_file, sampled_curve
from kvcm_ray.optimizer.savings import GPUS, MODELS, Gpu, Model, Savings, savings

__all__ = [
    "GPUS", "MODELS", "POLICIES", "READ", "REQUEST", "WRITE", "Accesses", "Curve", "Gpu", "Model", "Sample",
    "Savings", "Totals", "hit_curve", "load", "of_requests", "optimum", "replay", "sample", "sample_file",
    "sampled_curve", "save", "savings", "totals",
]  # fmt: skip
