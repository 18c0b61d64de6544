"""A small model with random weights, and a tokenizer: it says anything, and ends now and then."""

from pathlib import Path

import pytest
import torch

from mimoflash.checkpoint import save_gguf
from mimoflash.config import DENSE, GLOBAL, ModelConfig
from mimoflash.model import Transformer
from mimoflash.text import Tokenizer, train_tokenizer

TEXT = """
def render(messages, tools=None, *, thinking=False):
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            yield added(index, True), False
            answer = added(index + 1, False)
            end = max((answer.rfind(text) + len(text) for text in ends if text in answer), default=len(answer))
            yield answer[:end], True
    return "".join(text for text, _ in spans(marked))

The assistant writes from the end of its header to the end of its turn. What the user said is read as it is; the answer
that is cut off closes its conversation. The sum of the first odd numbers is a square, and so on, and so forth.
"""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Of a text that does not change: what a random model says hangs on every merge."""
    return train_tokenizer([TEXT], 320)


@pytest.fixture
def talker(tokenizer: Tokenizer) -> Transformer:
    """Global and dense throughout, as the embedded model is."""
    torch.manual_seed(0)
    config = ModelConfig.tiny(
        vocab_size=320, head_dim=32, v_head_dim=32, layer_types=(GLOBAL,) * 2, mlp_layer_types=(DENSE,) * 2,
        n_routed_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, partial_rotary_factor=1.0,
        attention_value_scale=1.0, swa_num_key_value_heads=1, swa_sink=False, max_position_embeddings=4096,
        eos_token_id=tokenizer.special.im_end,
    )
    return Transformer(config)


@pytest.fixture
def talker_gguf(talker: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_gguf(talker, tmp_path / "talker.gguf", dtype="float32", tokenizer=tokenizer.gguf_fields())
    return tmp_path / "talker.gguf"
