import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mimoflash.config import DENSE, GLOBAL, SPARSE, WINDOW, ModelConfig
from mimoflash.model import Transformer

HUB = {  # as XiaomiMiMo/MiMo-V2-Flash spells it, four layers of it
    "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "vocab_size": 128, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 24, "v_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 24,
    "swa_v_head_dim": 16, "hybrid_layer_pattern": [0, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1],
    "rope_theta": 5000000, "swa_rope_theta": 10000, "partial_rotary_factor": 0.334, "sliding_window": 128,
    "sliding_window_size": 128, "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
    "attention_value_scale": 0.707, "layernorm_epsilon": 1e-5, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "routed_scaling_factor": None, "n_shared_experts": None, "hidden_act": "silu",
    "attention_bias": False, "tie_word_embeddings": False, "max_position_embeddings": 262144,
}
NATIVE = {  # as transformers 5 spells it
    "model_type": "mimo_v2_flash", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24, "v_head_dim": 16,
    "layer_types": [GLOBAL, WINDOW, WINDOW, GLOBAL], "mlp_layer_types": [DENSE, SPARSE, SPARSE, SPARSE],
    "rope_parameters": {
        GLOBAL: {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.334},
        WINDOW: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.334},
    },
    "sliding_window": 129, "attention_value_scale": 0.707, "rms_norm_eps": 1e-5, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "routed_scaling_factor": 1.0,
    "max_position_embeddings": 262144,
}


def test_both_spellings_say_the_same():
    assert ModelConfig.from_dict(HUB) == ModelConfig.from_dict(NATIVE)


@pytest.mark.parametrize("config", [ModelConfig.flash(), ModelConfig.tiny(), ModelConfig.from_dict(HUB)])
def test_what_is_written_reads_back(config, tmp_path):
    config.save(tmp_path)
    assert ModelConfig.load(tmp_path) == config
    written = json.loads((tmp_path / "config.json").read_text())
    assert {"hybrid_layer_pattern", "swa_rope_theta", "layer_types", "rope_parameters"} <= written.keys()


def test_transformers_reads_what_is_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    ModelConfig.flash().save(tmp_path)
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    default = transformers.MiMoV2FlashConfig()
    for name in ("layer_types", "mlp_layer_types", "sliding_window", "head_dim", "v_head_dim", "n_routed_experts"):
        assert getattr(read, name) == getattr(default, name), name
    assert read.rope_parameters[WINDOW]["rope_theta"] == 10_000
    assert read.rope_parameters[GLOBAL]["rope_theta"] == 5_000_000


def test_the_window_is_128_previous_positions_and_the_query():
    assert ModelConfig.from_dict(HUB).sliding_window == 129  # the hub's file carries both keys with 128
    assert ModelConfig.from_dict(NATIVE).sliding_window == 129
    assert ModelConfig.from_dict(NATIVE | {"sliding_window": 65}).sliding_window == 65


def test_flash_is_309_billion_of_which_15_active():
    config = ModelConfig.flash()
    with torch.device("meta"):
        model = Transformer(config)
    tensors = model.state_dict()
    trunk = sum(t.numel() for name, t in tensors.items() if ".mtp." not in name)
    counted = config.count_parameters()
    assert counted["total"] == trunk
    assert round(trunk / 1e9) == 309
    assert round(counted["active"] / 1e9) == 15
    assert counted["mtp"] == sum(t.numel() for name, t in tensors.items() if ".mtp." in name)
    assert round(counted["mtp"] / 3 / 1e9, 2) == 0.33


def test_flops_count_what_a_forward_multiplies():
    config = ModelConfig.tiny(moe_intermediate_size=30)  # odd rows: experts one by one, which the counter can see
    model, length = Transformer(config), 50
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long))
    ours = config.flops_per_token(length) * length
    attention = sum(
        2 * 4 * (24 + 16) * sum(min(i + 1, w or length) for i in range(length))
        for w in (config.attention(kind).window for kind in config.layer_types)
    )
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
    assert ours - attention == pytest.approx(counted)


def test_cache_is_a_fifth_of_all_global_at_long_context():
    config = ModelConfig.flash()
    all_global = 48 * 4 * (192 + 128) * 2 * 262_144
    assert all_global / config.kv_bytes(262_144) == pytest.approx(5.3, abs=0.05)
    assert config.kv_bytes(300_000) - config.kv_bytes(200_000) == 9 * 4 * 320 * 2 * 100_000  # windows do not grow


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"hybrid_layer_pattern": [0, 1, 1]}, "num_hidden_layers"),
        ({"hybrid_layer_pattern": [0, 1, 1, 2]}, "hybrid_layer_pattern"),
        ({"layer_types": [GLOBAL] * 4}, "hybrid_layer_pattern"),
        ({"rms_norm_eps": 1e-6}, "layernorm_epsilon"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"attention_bias": True}, "attention_bias"),
        ({"partial_rotary_factor": 0.02}, "partial_rotary_factor"),
        ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor"),
        ({"sliding_window_size": -1, "sliding_window": None}, "sliding_window_size"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"eos_token_id": 128}, "eos_token_id"),
        ({"rope_parameters": {GLOBAL: {"rope_type": "yarn"}}}, "rope_type"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"rope_parameters": {GLOBAL: {"type": "yarn", "factor": 4}}}, "rope_parameters"),
        ({"sliding_window_size": "128"}, "sliding_window_size"),
        ({"hybrid_layer_pattern": [[0]]}, "hybrid_layer_pattern"),
        ({"layer_types": 5}, "layer_types"),
        ({"moe_layer_freq": 1}, "moe_layer_freq"),
        ({"model_type": "llama", "num_attention_heads": 0}, "num_attention_heads"),
        ({"model_type": "llama", "num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"model_type": "llama", "rope_parameters": [1]}, "rope_parameters"),
    ],
)
def test_bad_values_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_dict(HUB | changes)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        ModelConfig.load(tmp_path)


def test_llama_is_a_point_of_the_same_space():
    raw = {
        "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e5,
        "tie_word_embeddings": True, "hidden_act": "silu", "mlp_bias": False, "attention_bias": False,
    }
    config = ModelConfig.from_dict(raw)
    assert config.layer_types == (GLOBAL, GLOBAL)
    assert config.moe_layers == ()
    assert config.attention(GLOBAL).rope_dim == 16
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="rope_scaling"):
        ModelConfig.from_dict(raw | {"rope_scaling": {"type": "linear", "factor": 2}})
