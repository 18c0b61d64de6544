"""Generation: the engine, its hybrid cache and its sampler."""

from mimoflash.engine.cache import HybridCache
from mimoflash.engine.engine import Engine, Output
from mimoflash.engine.sampling import SamplingParams

__all__ = ["Engine", "HybridCache", "Output", "SamplingParams"]
