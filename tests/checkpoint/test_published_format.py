"""The published format against transformers: what either writes, the other reads, with the same logits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimoflash.checkpoint import load_model, save_model
from mimoflash.checkpoint.layout import published_tensors


def assert_same(model, other):
    for (name, a), (other_name, b) in zip(
        published_tensors(model).items(), published_tensors(other).items(), strict=True
    ):
        assert name == other_name
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("dtype", "tie"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_transformers_reads_what_we_save(tmp_path, make_model, tokens, dtype, tie):
    transformers = pytest.importorskip("transformers")
    save_model(make_model(tie_word_embeddings=tie), tmp_path / "m", dtype=dtype, max_shard_bytes=100_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").eval()
    ours = load_model(tmp_path / "m")
    assert theirs.dtype == ours.lm_head.weight.dtype == dtype
    with torch.no_grad():  # in float32: in bf16 the order of roundings would choose other experts
        torch.testing.assert_close(ours.float()(tokens), theirs.float()(tokens).logits, atol=1e-5, rtol=1e-5)


def test_we_read_what_transformers_saves(tmp_path, make_model, tokens):
    transformers = pytest.importorskip("transformers")
    config = make_model().config
    theirs = transformers.MiMoV2FlashForCausalLM(transformers.MiMoV2FlashConfig(**config.to_dict())).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "m")(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tie", [False, True])
def test_llama_folders(tmp_path, tokens, tie):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=tie, initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "m")
    ours = load_model(tmp_path / "m")
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    save_model(ours, tmp_path / "again")  # as a point of this family's own format
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_fp8(tmp_path, make_model, tokens):
    """Blocks of 128 with narrower ones at the edges: dequantised, transformers has the same logits."""
    transformers = pytest.importorskip("transformers")
    model = make_model(hidden_size=160, intermediate_size=200, moe_intermediate_size=144)
    save_model(model, tmp_path / "fp8", dtype="fp8")
    ours = load_model(tmp_path / "fp8")
    assert ours.lm_head.weight.dtype == torch.bfloat16
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["ignored_layers"] == [f"model.layers.{i}.self_attn.o_proj" for i in range(4)]
    assert config["weight_block_size"] == [128, 128]
    save_model(ours, tmp_path / "plain")  # transformers reads FP8 itself only where accelerate is installed
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.float()(tokens), theirs.float()(tokens).logits, atol=1e-5, rtol=1e-5)
    quantised = load_model(tmp_path / "fp8", dtype="float32")
    for name, tensor in published_tensors(model).items():
        # e4m3 keeps 3 bits: half a step is 1/16 of a value, and small ones are a fraction of the block's largest
        error = (published_tensors(quantised)[name] - tensor).abs()
        assert (error <= tensor.abs() / 16 + tensor.abs().max() / 448 / 64).all(), name


def test_everything_comes_back(tmp_path, make_model):
    model = make_model(num_nextn_predict_layers=3, norm_topk_prob=False, eos_token_id=(1, 2), swa_head_dim=16,
                       partial_rotary_factor=0.5, global_sink=True)
    save_model(model, tmp_path / "m", max_shard_bytes=60_000)
    loaded = load_model(str(tmp_path / "m"))
    assert loaded.config == model.config
    assert_same(model, loaded)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
    mtp = {file for name, file in index.items() if name.startswith("model.mtp.")}
    assert mtp
    assert not mtp & {file for name, file in index.items() if not name.startswith("model.mtp.")}
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in index
    assert "model.layers.1.self_attn.attention_sink_bias" in index
    assert "model.mtp.layers.2.eh_proj.weight" in index


def test_routers_stay_float32(tmp_path, make_model):
    model = make_model()
    for dtype in ("bf16", "fp8"):
        save_model(model, tmp_path / dtype, dtype=dtype)
        gate = load_model(tmp_path / dtype).model.layers[1].mlp.gate
        assert torch.equal(gate.weight, model.model.layers[1].mlp.gate.weight)
        assert torch.equal(gate.e_score_correction_bias, model.model.layers[1].mlp.gate.e_score_correction_bias)


def test_number_of_mtp_layers_comes_from_the_tensors(tmp_path, make_model):
    save_model(make_model(num_nextn_predict_layers=2), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    del config["num_nextn_predict_layers"]
    file.write_text(json.dumps(config))
    assert load_model(tmp_path / "m").config.num_nextn_predict_layers == 2
    file.write_text(json.dumps(config | {"num_nextn_predict_layers": 3}))
    with pytest.raises(ValueError, match="names 3 MTP layers, the tensors 2"):
        load_model(tmp_path / "m")


def test_mtp_layers_in_a_file_beside_the_index(tmp_path, make_model):
    model = make_model(num_nextn_predict_layers=1)
    save_model(model, tmp_path / "m")  # two shards, the second MTP's
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if "mtp" not in k}
    index.write_text(json.dumps(content))
    (tmp_path / "m" / "model-00002-of-00002.safetensors").rename(tmp_path / "m" / "model_mtp.safetensors")
    assert_same(model, load_model(tmp_path / "m"))
    (tmp_path / "m" / "model_mtp.safetensors").unlink()
    with pytest.warns(UserWarning, match="no tensors of the 1 MTP layers"):
        assert load_model(tmp_path / "m").config.num_nextn_predict_layers == 0


def test_saving_again_replaces_the_model_and_keeps_the_tokenizer(tmp_path, make_model):
    class Tokenizer:
        def save(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    save_model(make_model(), tmp_path / "m", max_shard_bytes=50_000, tokenizer=Tokenizer())
    (tmp_path / "m" / "README.md").write_text("mine")
    save_model(make_model(seed=1), tmp_path / "m")
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert_same(load_model(tmp_path / "m"), make_model(seed=1))


def test_a_folder_with_other_things_is_not_touched(tmp_path, make_model):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis\.tex"):
        save_model(make_model(), tmp_path / "m")
    assert (tmp_path / "m" / "thesis.tex").read_text() == "mine"


def test_a_save_that_fails_leaves_the_old_model(tmp_path, make_model):
    save_model(make_model(), tmp_path / "m")
    broken = make_model(seed=1)
    broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: .* not finite"):
        save_model(broken, tmp_path / "m", dtype="fp8")
    assert_same(load_model(tmp_path / "m"), make_model())
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


MEASURE = """
import re, sys
from mimoflash.checkpoint import load_model

def kilobytes(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

load_model(sys.argv[1] + "/tiny")  # imports what it imports
before = kilobytes("VmRSS")
model = load_model(sys.argv[1] + "/m", dtype=sys.argv[2])
print((kilobytes("VmHWM") - before) << 10)  # the peak of this process (ru_maxrss would begin at its parent's)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak")
@pytest.mark.parametrize(("stored", "dtype"), [("float32", "float32"), ("fp8", "bf16")])
def test_loading_needs_the_model_and_one_shard(tmp_path, make_model, stored, dtype):
    shard = 8 << 20
    model = make_model(vocab_size=2048, hidden_size=512, intermediate_size=1024, moe_intermediate_size=640,
                       n_routed_experts=8)
    save_model(model, tmp_path / "m", dtype=stored, max_shard_bytes=shard)
    save_model(make_model(), tmp_path / "tiny")
    size = sum(p.numel() for p in model.parameters()) * (4 if dtype == "float32" else 2)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) >= 3
    assert size > 5 * shard
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dtype], capture_output=True, text=True, check=True
    )
    extra = int(run.stdout) - size
    assert extra > -(4 << 20)  # the model itself was seen
    print(f"{stored} -> {dtype}: model {size >> 20} MiB, peak {int(run.stdout) >> 20} MiB")
    assert extra < shard + (16 << 20)  # and a tensor of float32 while FP8 is dequantised, and what the allocator keeps
