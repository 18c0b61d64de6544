"""Generation: the engine, its hybrid cache and its sampler."""

from mimoflash.engine.cache import HybridCache
from mimoflash.engine.engine import Engine
from mimoflash.engine.grammar import Grammar
from mimoflash.engine.params import SamplingParams
from mimoflash.engine.request import Event, NewTokens, Output, Request

__all__ = ["Engine", "Event", "Grammar", "HybridCache", "NewTokens", "Output", "Request", "SamplingParams"]
