"""Training speed: the same steps by our code and by transformers, one process each, in turn."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mimoflash.config import ModelConfig
from mimoflash.data import Batch
from mimoflash.model import Transformer
from mimoflash.train.losses import language_model_loss
from mimoflash.train.monitor import matmul_peak
from mimoflash.train.trainer import Trainer

SHAPES = Path(__file__).parent / "shapes"
STEPS = 5  # measured steps a process, after one to warm up; their median counts


def bench_training(
    shape: str, *, peer: str | None, batch: int, length: int, pairs: int, json_file: Path | None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Tokens a second of training steps of `batch` x `length` random tokens, ours and the peer's, `pairs` times.

    Both sides: float32, next-token loss, gradient clipped at 1, fused AdamW. MFU counts the model's own arithmetic
    (`ModelConfig.flops_per_token`) against a matmul of 2048 measured in the same process. Raises ValueError for a
    shape that is not there.
    """
    file = _shape_file(shape)
    ours, theirs, mfus = [], [], []
    for pair in range(pairs):
        mine = _measure("ours", file, batch, length)
        ours.append(mine["tokens_per_second"])
        mfus.append(mine["mfu"])
        line = f"{pair + 1}/{pairs}  ours {ours[-1]:,.0f} tok/s, {mfus[-1]:.0%} of the matmul peak"
        if peer:
            theirs.append(_measure(peer, file, batch, length)["tokens_per_second"])
            line += f"; {peer} {theirs[-1]:,.0f} tok/s; ratio {ours[-1] / theirs[-1]:.2f}"
        say(line)
    ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
    result = {
        "ours": statistics.median(ours), "peer": statistics.median(theirs) if theirs else None,
        "ratio": statistics.median(ratios) if ratios else None,
        "spread": [min(ratios), max(ratios)] if ratios else None, "unit": "tokens/s", "shape": shape,
        "dtype": "float32", "streams": batch, "context": length, "mfu": statistics.median(mfus), "machine": machine(),
    }
    say(f"median: {result['ours']:,.0f} tok/s, {result['mfu']:.0%} of the matmul peak" + (
        f", {result['ratio']:.2f} x {peer} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
    ))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def _shape_file(shape: str) -> Path:
    file = SHAPES / f"{shape}.json"
    file = file if file.exists() else Path(shape)
    if not file.exists():
        known = ", ".join(sorted(known.stem for known in SHAPES.glob("*.json")))
        raise ValueError(f"--shape {shape}: it must be one of {known}, a config.json, or a folder with one")
    return file


def _measure(side: str, file: Path, batch: int, length: int) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, side, str(file), str(batch), str(length)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the {side} side failed:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _our_step(config: ModelConfig, tokens: torch.Tensor) -> Callable[[], object]:
    trainer = Trainer(Transformer(config))
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens, torch.zeros_like(tokens), places, torch.ones(tokens.shape))
    return lambda: trainer.step([batch], language_model_loss, 1e-4)


def _transformers_step(file: Path, tokens: torch.Tensor) -> Callable[[], object]:
    try:
        import transformers
    except ImportError:
        raise ImportError("the peer needs transformers: pip install -e '.[peers]'") from None
    config = transformers.AutoConfig.from_pretrained(file)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _side(side: str, file: Path, batch: int, length: int) -> None:
    torch.manual_seed(0)
    config = ModelConfig.load(file)
    tokens = torch.randint(0, config.vocab_size, (batch, length))
    step = _our_step(config, tokens) if side == "ours" else _transformers_step(file, tokens)
    step()
    seconds = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    rate = batch * length / statistics.median(seconds)
    mfu = rate * 3 * config.flops_per_token(length) / matmul_peak()
    print(json.dumps({"tokens_per_second": rate, "mfu": mfu}))


if __name__ == "__main__":
    _side(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
