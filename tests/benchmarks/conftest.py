import pytest

from mimoflash.config import ModelConfig


@pytest.fixture(scope="session")
def shape(tmp_path_factory):
    """A config.json that all sides can run: llama.cpp wants widths that are multiples of 32."""
    config = ModelConfig.tiny(
        vocab_size=320, hidden_size=64, intermediate_size=96, head_dim=32, v_head_dim=32, moe_intermediate_size=32,
        num_nextn_predict_layers=2, eos_token_id=None,
    )
    file = tmp_path_factory.mktemp("shape") / "tiny.json"
    config.save(file)
    return str(file)
