"""Training speed: the same steps by our code and by transformers, in turn."""

import contextlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mimoflash.benchmarks.pairs import Side, answer_requests, compare, described, machine, run_in_turn, write_results
from mimoflash.benchmarks.peers import check_peer
from mimoflash.benchmarks.subject import shape_file
from mimoflash.config import ModelConfig
from mimoflash.data import Batch
from mimoflash.model import Transformer
from mimoflash.train.losses import language_model_loss
from mimoflash.train.monitor import matmul_peak
from mimoflash.train.trainer import Trainer

STEPS = 5  # measured steps a side and pair; their median counts


def bench_training(
    shape: str, *, peer: str | None, batch: int, length: int, pairs: int, json_file: Path | None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Tokens a second of training steps of `batch` x `length` random tokens, ours and the peer's, `pairs` times.

    Both sides: float32, next-token loss, gradient clipped at 1, fused AdamW. MFU counts the model's own arithmetic
    (`ModelConfig.flops_per_token`) against a matmul of 2048 measured in the same process. Raises ValueError for a
    shape that is not there.
    """
    check_peer(peer, "float32", speculate=0)
    settings = {"file": str(shape_file(shape)), "batch": batch, "length": length}
    with contextlib.ExitStack() as stack:
        sides = {"ours": "ours"} | ({"peer": peer} if peer else {})
        opened = {name: stack.enter_context(Side(__name__, side=side, **settings)) for name, side in sides.items()}
        results = run_in_turn({name: partial(_measure, side) for name, side in opened.items()}, pairs, say, "tok/s")
    result = compare(results["ours"], results.get("peer", [])) | {
        "unit": "tokens/s", "shape": shape, "dtype": "float32", "streams": batch, "context": length,
        "mfu": statistics.median(one["mfu"] for one in results["ours"]), "machine": machine(),
    }
    say(f"{described(result, peer)}; {result['mfu']:.0%} of the matmul peak")
    write_results([result], json_file)
    return result


def _measure(side: Side, pair: int) -> dict[str, Any]:
    return side.ask()


def _our_step(config: ModelConfig, tokens: torch.Tensor) -> Callable[[], object]:
    trainer = Trainer(Transformer(config))
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens, torch.zeros_like(tokens), places, torch.ones(tokens.shape))
    return lambda: trainer.step([batch], language_model_loss, 1e-4)


def _transformers_step(file: Path, tokens: torch.Tensor) -> Callable[[], object]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(file)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _open_side(settings: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    torch.manual_seed(0)
    file, shape = Path(settings["file"]), (settings["batch"], settings["length"])
    config = ModelConfig.load(file)
    tokens = torch.randint(0, config.vocab_size, shape)
    step = _our_step(config, tokens) if settings["side"] == "ours" else _transformers_step(file, tokens)
    step()  # the first one allocates

    def measure() -> dict[str, Any]:
        seconds = []
        for _ in range(STEPS):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        rate = tokens.numel() / statistics.median(seconds)
        matmul_peak.cache_clear()  # of now: machines drift
        return {"rate": rate, "mfu": rate * 3 * config.flops_per_token(shape[1]) / matmul_peak()}

    return measure


if __name__ == "__main__":
    answer_requests(_open_side)
