"""MTP layers in a file of their own: they come back as they were, for their own trunk only."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mimoflash.checkpoint import OtherTrunk, load, load_heads, load_model, save_gguf, save_heads
from mimoflash.config import DENSE, GLOBAL


@pytest.fixture
def trunk(tmp_path, make_model):
    """A model without MTP layers, in a GGUF file."""
    model = make_model(
        head_dim=32, v_head_dim=32, layer_types=(GLOBAL,) * 2, mlp_layer_types=(DENSE,) * 2, n_routed_experts=0,
        num_experts_per_tok=0, moe_intermediate_size=0, partial_rotary_factor=1.0, attention_value_scale=1.0,
        swa_num_key_value_heads=1, swa_sink=False,
    )
    save_gguf(model, tmp_path / "trunk.gguf", dtype="float32")
    return tmp_path / "trunk.gguf"


def with_heads(trunk, layers=3):
    torch.manual_seed(1)
    model = load_model(trunk)
    for count in range(1, layers + 1):  # each one's weights are its own
        model.set_mtp_layers(count)
        for p in model.model.mtp.layers[-1].parameters():
            p.data.normal_()
    model.model.mtp.draft_tokens = torch.tensor([1, 5, 7])
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_come_back_with_their_draft_vocabulary(trunk, tmp_path, dtype):
    model, again = with_heads(trunk), load_model(trunk)
    save_heads(model, tmp_path / "heads.safetensors", trunk, dtype)
    load_heads(again, tmp_path / "heads.safetensors", trunk)
    assert again.config == model.config
    assert again.config.num_nextn_predict_layers == 3
    assert again.model.mtp.draft_tokens.tolist() == [1, 5, 7]
    for (name, ours), (_, theirs) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs.to(dtype).float() if ".mtp." in name else theirs), name


def test_the_file_has_the_published_names(trunk, tmp_path):
    save_heads(with_heads(trunk, 1), tmp_path / "heads.safetensors", trunk)
    with safe_open(tmp_path / "heads.safetensors", "pt") as heads:
        names = set(heads.keys())
    layer = "model.mtp.layers.0."
    norms = ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")
    matrices = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert names == {f"{layer}{name}.weight" for name in (*norms, "eh_proj", *matrices)} | {"draft_tokens"}


def test_another_trunk_is_refused_by_name(trunk, tmp_path):
    save_heads(with_heads(trunk), tmp_path / "heads.safetensors", trunk)
    other = tmp_path / "other.gguf"
    other.write_bytes(trunk.read_bytes() + b"\0")
    model = load_model(trunk)
    with pytest.raises(OtherTrunk, match=r"heads\.safetensors.*other\.gguf"):
        load_heads(model, tmp_path / "heads.safetensors", other)
    assert model.config.num_nextn_predict_layers == 0
    assert model.model.mtp.draft_tokens is None


def test_damage_is_named(trunk, tmp_path):
    file = tmp_path / "heads.safetensors"
    save_heads(with_heads(trunk), file, trunk)
    with safe_open(file, "pt") as heads:
        metadata = heads.metadata()
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"heads\.safetensors: not a whole"):
        load_heads(load_model(trunk), file, trunk)
    del tensors["model.mtp.layers.1.eh_proj.weight"]
    file.unlink()
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match="not those of MTP layers for this model"):
        load_heads(load_model(trunk), file, trunk)


def test_another_smol_is_told_that_it_gets_none(trunk, tmp_path, monkeypatch):
    save_heads(with_heads(trunk), tmp_path / "heads.safetensors", trunk)
    other = tmp_path / "other.gguf"
    other.write_bytes(trunk.read_bytes() + b"\0")
    monkeypatch.setenv("MIMOFLASH_SMOL", str(other))
    monkeypatch.setattr(load, "SMOL_HEADS", tmp_path / "heads.safetensors")
    with pytest.warns(UserWarning, match="loaded without them"):
        assert load_model("smol").config.num_nextn_predict_layers == 0


def test_only_smol_by_its_name_has_heads(trunk, tmp_path, monkeypatch):
    monkeypatch.setenv("MIMOFLASH_SMOL", str(trunk))
    monkeypatch.setattr(load, "SMOL_HEADS", tmp_path / "heads.safetensors")
    assert load_model("smol").config.num_nextn_predict_layers == 0  # a package without them
    save_heads(with_heads(trunk), tmp_path / "heads.safetensors", trunk)
    assert load_model("smol", dtype="bf16").model.mtp.layers[2].eh_proj.weight.dtype == torch.bfloat16
    assert load_model(trunk).config.num_nextn_predict_layers == 0
