"""What only a card can show about decoding on CUDA, in one call: `python -m mimoflash.benchmarks.cuda_check`.

First checks: kernels against their references, the runner against the model in float32 and bfloat16, greedy tokens with
and without speculation and with and without CUDA graphs. Then measures: decode, prefill, the attention kernel. A line
each, and at the end one line of JSON; the exit status is 1 where a check fails. `--device cpu --quick` tries the script
itself.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimoflash.config import DENSE, GLOBAL, SPARSE, WINDOW, ModelConfig
from mimoflash.engine.cache import PAGE, HybridCache
from mimoflash.engine.cuda import CudaRunner
from mimoflash.engine.runner import RECENT, DraftNoise, Step
from mimoflash.kernels.experts import reference_experts
from mimoflash.kernels.grouped import decode_experts
from mimoflash.kernels.paged_attention import paged_attention, reference_paged_attention
from mimoflash.model import Transformer

NANO = Path(__file__).parent / "shapes" / "nano.json"
SEED = 0
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 4e-2}  # of outputs of size 1


def one_card_of_flash() -> ModelConfig:
    """Three of the published model's layers: one of each kind, at full width (14 B parameters; 28 GB in bfloat16)."""
    kinds, mlps = (GLOBAL, WINDOW, GLOBAL), (DENSE, SPARSE, SPARSE)
    return replace(ModelConfig.flash(), layer_types=kinds, mlp_layer_types=mlps)


class Bench:
    def __init__(self, device: torch.device, quick: bool):
        self.device, self.quick = device, quick
        self.results: dict[str, Any] = {}
        self.failed: list[str] = []

    def say(self, name: str, value: Any, *, good: bool = True) -> None:
        self.results[name] = value
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name}: {shown}{'' if good else '   FAILED'}", flush=True)
        if not good:
            self.failed.append(name)

    def seconds(self, body: Callable[[], Any], least: float = 0.5) -> float:
        """Of one call: the best of three runs of at least `least` seconds together, after one to warm up."""
        body()
        best, least = float("inf"), 0.01 if self.quick else least
        for _ in range(3):
            calls, begin = 0, self._now()
            while (spent := self._now() - begin) < least / 3 or not calls:
                body()
                calls += 1
            best = min(best, spent / calls)
        return best

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    # -- checks ---------------------------------------------------------------------------------------------------

    def check_attention(self) -> None:
        for name, heads, kv_heads, widths, window in (
            ("global 64/4 heads", 64, 4, (192, 128), None), ("window 64/8 heads", 64, 8, (192, 128), 129),
            ("nano global", 8, 2, (48, 32), None), ("nano window", 8, 2, (48, 32), 129),
        ):
            for dtype in TOLERANCES:
                case = attention_case(self.device, dtype, [700, 5, 64, 2048], 4, heads, kv_heads, widths, window)
                sink = torch.randn(heads, device=self.device, dtype=dtype) if window else None
                ours = paged_attention(*case, window=window, sink=sink).double()
                q, k, v, units, starts, counts = (x.double() if x.is_floating_point() else x for x in case)
                precise = None if sink is None else sink.double()
                want = reference_paged_attention(q, k, v, units, starts, counts, window, precise, None)
                error = (ours - want).abs().max().item()
                self.say(f"attention, {name}, {short(dtype)}: error", error, good=error < TOLERANCES[dtype])

    def check_experts(self) -> None:
        torch.manual_seed(SEED)
        for dtype, tolerance in TOLERANCES.items():
            sizes = ((64, 256), (16, 256, 256), (16, 256, 128))
            x, gate_up, down = (torch.randn(size, device=self.device).to(dtype) / 256**0.25 for size in sizes)
            indices = torch.rand(64, 16, device=self.device).topk(4).indices
            weights = torch.full((64, 4), 0.25, device=self.device)
            ours = decode_experts(x, gate_up, down, indices, weights).double()
            want = reference_experts(x.double(), gate_up.double(), down.double(), indices, weights.double())
            error = (ours - want).abs().max().item()
            self.say(f"experts, {short(dtype)}: error", error, good=error < tolerance)

    def check_model(self) -> None:
        for dtype in TOLERANCES:
            model = make_model(ModelConfig.load(NANO), dtype, self.device, mtp_layers=3)
            texts = prompts(model.config, 3, 300)
            with torch.inference_mode():
                want = model(torch.tensor(texts, device=self.device)).float()
            runner = make_runner(model, 3, 400, graphs=True)
            got = Generation(runner, [text[:200] for text in texts])
            rows = [got.logits[:, None]]
            for start in range(200, 300, 4):
                logits = got.run([text[start : start + 4] for text in texts])
                rows.append(logits.view(3, 4, -1))
            # in bfloat16 near ties of routers fall differently, and a token's experts with them: the mean tells
            error = (torch.cat(rows, 1) - want[:, 199:]).abs().mean().item() / want.std().item()
            self.say(f"logits against the model, {short(dtype)}: mean error", error, good=error < TOLERANCES[dtype])

    def check_greedy(self) -> None:
        for dtype in TOLERANCES:
            model = make_model(ModelConfig.load(NANO), dtype, self.device, mtp_layers=3)
            length = 8 if self.quick else 64
            texts = [text[: 20 + 30 * i] for i, text in enumerate(prompts(model.config, 5, 200))]
            runs = {
                f"{drafts} drafts, graphs {graphs}": Generation(make_runner(model, drafts, 400, graphs=graphs), texts)
                for drafts in (0, 1, 3) for graphs in (False, True)
            }
            tokens = {name: run.greedy(length) for name, run in runs.items()}
            first = next(iter(tokens.values()))
            for name, own in tokens.items():
                share = float((np.array(own) == np.array(first)).mean())
                # in bfloat16 two matrix shapes round differently: near ties may flip, and all that follows
                self.say(f"greedy, {short(dtype)}, {name}: equal", share, good=share == 1 or dtype != torch.float32)
            for name, run in runs.items():
                if "graphs True" in name:
                    recording = run.runner.graphs.enabled or self.device.type == "cpu"
                    self.say(f"recorded, {short(dtype)}, {name}", recording, good=recording)

    # -- measures -------------------------------------------------------------------------------------------------

    def measure_decode(self, name: str, config: ModelConfig, dtype: torch.dtype, *, fp8: bool = False) -> None:
        model = make_model(config, dtype, self.device, mtp_layers=0 if fp8 else 3)
        context = 64 if self.quick else 1024
        for drafts in (0,) if fp8 else (0, 3):
            for streams in (1, 2) if self.quick else (1, 16, 64):
                for graphs in (False, True):
                    runner = make_runner(model, drafts, context + 70, slots=streams, graphs=graphs, fp8=fp8)
                    run = Generation(runner, [text[:context] for text in prompts(config, streams, context)])
                    step = self.seconds(partial(run.repeat, 1 + drafts))
                    label = f"{name}, {'fp8' if fp8 else short(dtype)}, {streams} streams, graphs {graphs}"
                    self.say(f"{label}: pass of {1 + drafts} tokens, ms", step * 1e3)
                    self.say(f"{label}: tokens/s at {1 + drafts} a pass", streams * (1 + drafts) / step)
                    if drafts:
                        drafting = self.seconds(partial(run.draft, drafts))
                        self.say(f"{label}: drafting {drafts}, ms", drafting * 1e3)
        length = 128 if self.quick else 8192
        runner = make_runner(model, 0, length, slots=1, graphs=False, fp8=fp8)
        text = prompts(config, 1, length)
        prefill = self.seconds(lambda: Generation(runner, text).free())
        self.say(f"{name}, {'fp8' if fp8 else short(dtype)}: prefill of {length}, tokens/s", length / prefill)

    def measure_attention(self) -> None:
        for streams, context in [(2, 512)] if self.quick else product((1, 16, 64), (4096, 32_768)):
            case = attention_case(self.device, torch.bfloat16, [context] * streams, 1, 64, 4, (192, 128), None)
            seconds = self.seconds(partial(paged_attention, *case))
            rate = streams * context * 4 * (192 + 128) * 2 / seconds / 1e9
            self.say(f"attention, {streams} x {context} positions, 4 KV heads of 192/128, bf16: GB/s", rate)


# -- sequences over a runner ------------------------------------------------------------------------------------------


class Generation:
    """Sequences of one runner, side by side; `logits` (S, V) of their ends."""

    def __init__(self, runner: CudaRunner, texts: list[list[int]], chunk: int = 2048):
        self.runner, self.texts = runner, [[int(token) for token in text] for text in texts]
        cache = runner.cache
        slots = [cache.take_slot() for _ in texts]
        self.slots = np.array(slots, np.int32)
        for slot in self.slots:
            assert cache.reserve(int(slot), cache.pages // len(texts) * PAGE), "pages for all were made"
        self.done = np.zeros(len(texts), np.int32)
        ends = []
        for s, text in enumerate(self.texts):
            for start in range(0, len(text), chunk):
                logits = self._pass([s], [text[start : start + chunk]])[-1:]
            ends.append(logits)
        self.logits = torch.cat(ends)

    def _pass(self, who: list[int], tokens: list[list[int]]) -> Tensor:
        counts = np.array([len(t) for t in tokens], np.int32)
        flat = np.concatenate([np.array(t, np.int32) for t in tokens])
        rows = np.arange(len(flat), dtype=np.int32)
        logits, _ = self.runner.forward(Step(self.slots[who], self.done[who], counts, flat, rows))
        self.done[who] += counts
        return logits

    def run(self, tokens: list[list[int]]) -> Tensor:
        return self._pass(list(range(len(tokens))), tokens)

    def repeat(self, count: int) -> None:
        """A pass of `count` tokens at the same place as before."""
        start = self.done.copy()
        self.run([[1] * count] * len(self.texts))
        self.done = start

    def draft(self, count: int) -> np.ndarray:
        """Drafts after the token at each end, which has not been run."""
        last = self.done - 1
        texts = [[*text, 1] for text in self.texts]
        recent = [[text[i] if i >= 0 else -1 for i in range(p + 2 - RECENT, p + 2)]
                  for p, text in zip(last, texts, strict=True)]
        greedy = DraftNoise(np.zeros(len(last), np.float32), np.zeros(len(last), np.uint64))
        return self.runner.draft(self.slots, last, np.array(recent, np.int32), count, greedy)

    def greedy(self, count: int) -> list[list[int]]:
        """`count` tokens a sequence, with as many drafts as the cache is made for."""
        drafts, starts = self.runner.cache.drafts, [len(text) for text in self.texts]
        for text, token in zip(self.texts, self.logits.argmax(-1).tolist(), strict=True):
            text.append(token)
        while any(len(text) < start + count for text, start in zip(self.texts, starts, strict=True)):
            tokens = [[text[-1]] for text in self.texts]
            if drafts:
                tokens = [a + b for a, b in zip(tokens, self.draft(drafts).tolist(), strict=True)]
            begun = self.done.copy()
            picked = self.run(tokens).argmax(-1).view(len(tokens), -1).tolist()
            for s, (text, ran, found) in enumerate(zip(self.texts, tokens, picked, strict=True)):
                right = next((i for i in range(drafts) if ran[1 + i] != found[i]), drafts)
                text += found[: right + 1]
                self.done[s] = begun[s] + right + 1
        return [text[start : start + count] for text, start in zip(self.texts, starts, strict=True)]

    def free(self) -> None:
        for slot in self.slots:
            self.runner.cache.free_slot(int(slot))


def make_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, mtp_layers: int) -> Transformer:
    torch.manual_seed(SEED)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Transformer(config).eval()
            model.set_mtp_layers(mtp_layers)
    finally:
        torch.set_default_dtype(default)
    return model


def make_runner(
    model: Transformer, drafts: int, length: int, *, slots: int = 8, graphs: bool, fp8: bool = False
) -> CudaRunner:
    weight = model.lm_head.weight
    pages = slots * -(-length // PAGE)
    cache = HybridCache(model.config, slots=slots, pages=pages, drafts=drafts, dtype=weight.dtype, device=weight.device)
    return CudaRunner(model, cache, dtype=weight.dtype, fp8=fp8, graphs=graphs)


def prompts(config: ModelConfig, count: int, length: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(SEED)
    return torch.randint(0, config.vocab_size, (count, length), generator=g).tolist()


def attention_case(
    device: torch.device, dtype: torch.dtype, ends: list[int], tokens: int, heads: int, kv_heads: int,
    widths: tuple[int, int], window: int | None,
) -> list[Tensor]:
    """Random arguments of `paged_attention`: q, k, v, units, starts, counts."""
    torch.manual_seed(SEED)
    longest = -(-max(ends) // PAGE)
    units, places = (len(ends) * longest, PAGE) if window is None else (len(ends), window + tokens - 1)
    k, v = (torch.randn(units, kv_heads, places, w, device=device, dtype=dtype) for w in widths)
    order = torch.randperm(units, device=device)
    lengths = torch.tensor(ends, device=device)
    q = torch.randn(len(ends), tokens, heads, widths[0], device=device, dtype=dtype)
    table = order.view(len(ends), longest) if window is None else order
    return [q, k, v, table, lengths - tokens, torch.full_like(lengths, tokens)]


def short(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "float32"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script itself")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    bench = Bench(device, chosen.quick)
    bench.say("torch", torch.__version__)
    bench.say("device", torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    bench.check_attention()
    bench.check_experts()
    bench.check_model()
    bench.check_greedy()
    nano = ModelConfig.load(NANO)
    for dtype in TOLERANCES:
        bench.measure_decode("nano", nano, dtype)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        if memory > 60e9:
            bench.measure_decode("flash, 3 layers", one_card_of_flash(), torch.bfloat16)
            bench.measure_decode("flash, 3 layers", one_card_of_flash(), torch.bfloat16, fp8=True)
    bench.measure_attention()
    print(json.dumps({"failed": bench.failed, **bench.results}))
    sys.exit(bool(bench.failed))


if __name__ == "__main__":
    main()
