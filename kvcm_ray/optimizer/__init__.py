"""What more cache, or another policy, would be worth: replay of traces without a manager.

    analysis    all of it at once: `analyse` is what ``kvcm optimize`` runs; rows and report are its parts
    dataset     a trace file as arrays (`Accesses`), kept in parsed form beside the file
    anonymize   logs of texts or token ids as traces that hold neither;  contents: what is in a trace
    curve       hits of LRU at every capacity in one pass, and the offline optimum
    sampling    the same curve, near enough, from a tenth of the blocks, for traces beyond memory
    replay      hits of each request at one capacity, through the policies that the live manager runs
    sweep       many capacities and policies, in threads or Ray tasks;  breakdown: by turn, class, instance
    simulation  groups, storages and tiers of a `Scenario`, as in production
    catalogue   models, GPUs and tiers by name, as data
    savings     from hits to prefill FLOPs
    economics   from FLOPs to GPU-hours, time to first token and money; the knee, the best

All are pure functions of arrays. Hits are blocks of the leading run of a prompt that is present when
its request begins; the request then writes what is missing, and blocks leave down to the capacity.
"""

from kvcm_ray.optimizer.accesses import READ, REQUEST, WRITE, Accesses
from kvcm_ray.optimizer.analysis import Analysis, analyse
from kvcm_ray.optimizer.breakdown import breakdown
from kvcm_ray.optimizer.catalogue import Catalogue, Gpu, Model, TierCosts, read_catalogue
from kvcm_ray.optimizer.contents import contents
from kvcm_ray.optimizer.curve import Curve, hit_curve, optimum
from kvcm_ray.optimizer.dataset import load, of_requests, save
from kvcm_ray.optimizer.economics import Costs, Worth, best, group_update, knee, worth
from kvcm_ray.optimizer.replay import POLICIES, Totals, replay, totals
from kvcm_ray.optimizer.rows import Facts, Row
from kvcm_ray.optimizer.sampling import Sample, recorded_sample, sample, sample_file, sampled_curve
from kvcm_ray.optimizer.scenario import Scenario
from kvcm_ray.optimizer.simulation import Outcome, simulate
from kvcm_ray.optimizer.sweep import Point, sweep

__all__ = [
    "POLICIES", "READ", "REQUEST", "WRITE", "Accesses", "Analysis", "Catalogue", "Costs", "Curve", "Facts",
    "Gpu", "Model", "Outcome", "Point", "Row", "Sample", "Scenario", "TierCosts", "Totals", "Worth",
    "analyse", "best", "breakdown", "contents", "group_update", "hit_curve", "knee", "load", "of_requests",
    "optimum", "read_catalogue", "recorded_sample", "replay", "sample", "sample_file", "sampled_curve",
    "save", "simulate", "sweep", "totals", "worth",
]  # fmt: skip
