"""FP8 blocks against a reference in float64, a loop over blocks; and the fused qkv against an encoder of its own."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mimoflash.checkpoint import load_model, save_model
from mimoflash.checkpoint.fp8 import dequantise, quantise
from mimoflash.checkpoint.layout import published_tensors


def e4m3_values():
    """All finite magnitudes of e4m3, from its definition: 4 bits of exponent (bias 7), 3 of mantissa, one NaN."""
    normal = [2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return np.array([m / 8 * 2.0**-6 for m in range(8)] + normal)


def nearest_in_float64(weight):
    """Each block / its scale, rounded to the nearest e4m3 value, x the scale: a loop over blocks."""
    out, scales, values = np.zeros_like(weight), [], e4m3_values()
    for r in range(0, weight.shape[0], 128):
        scales.append([])
        for c in range(0, weight.shape[1], 128):
            block = weight[r : r + 128, c : c + 128]
            scale = np.abs(block).max() / 448 or 1.0
            distance = np.abs(np.abs(block / scale)[..., None] - values)
            out[r : r + 128, c : c + 128] = np.sign(block) * values[distance.argmin(-1)] * scale
            scales[-1].append(scale)
    return out, np.array(scales)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 270), columns=st.integers(1, 270), exponent=st.integers(-30, 30), seed=st.integers(0, 99))
def test_round_trip_is_the_nearest_value_in_float64(rows, columns, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, columns, generator=generator).exp()  # magnitudes over several powers of two
    weight = torch.randn(rows, columns, generator=generator) * spread * 2.0**exponent
    weight[: rows // 3] *= torch.rand((), generator=generator) > 0.3  # blocks of zeros, at times
    quantised, scale = quantise(weight)
    assert quantised.dtype == torch.float8_e4m3fn
    assert quantised.shape == weight.shape
    assert scale.shape == (math.ceil(rows / 128), math.ceil(columns / 128))
    wanted, scales = nearest_in_float64(weight.double().numpy())
    np.testing.assert_allclose(scale.numpy(), scales, rtol=1e-6)
    got = dequantise(quantised, scale).double().numpy()
    error, best = np.abs(got - weight.double().numpy()), np.abs(wanted - weight.double().numpy())
    assert (error <= best * (1 + 1e-5) + np.abs(wanted) * 1e-6).all()  # ties may fall either way


def test_what_cannot_be_stored():
    with pytest.raises(ValueError, match="not finite"):
        quantise(torch.tensor([[1.0, float("inf")]]))
    weight, scale = quantise(torch.randn(130, 4))
    with pytest.raises(ValueError, match=r"\(1, 1\); blocks of 128 x 128 need \(2, 1\)"):
        dequantise(weight, scale[:1])
    scale[1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        dequantise(weight, scale)


# -- fused qkv --------------------------------------------------------------------------------------------------------

# 2 global and 4 window KV heads; a chunk is 216 rows in global layers and 232 in window and MTP layers
SHAPE = dict(
    hidden_size=144, num_attention_heads=16, num_key_value_heads=2, head_dim=24, v_head_dim=16,
    num_nextn_predict_layers=2,
)


def fuse(folder, config, quantised):
    """Rewrites a folder of one shard as V2.5 stores it; returns q, k and v as they should come back."""
    file = next(folder.glob("*.safetensors"))
    for other in folder.glob("*.safetensors"):
        if other != file:
            both = load_file(file) | load_file(other)
            save_file(both, file)
            other.unlink()
    tensors = load_file(file)
    expected = {}
    for prefix in [name.removesuffix("q_proj.weight") for name in tensors if name.endswith("q_proj.weight")]:
        parts = [tensors.pop(f"{prefix}{letter}_proj.weight") for letter in "qkv"]
        chunks, scales, back = [], [], [[], [], []]
        for c in range(config.num_key_value_heads):
            piece = [part[c * (len(part) // 2) : (c + 1) * (len(part) // 2)] for part in parts]
            rows = torch.cat(piece)
            if quantised:
                weight, scale = quantise(rows)
                scales.append(scale)
                wide = scale.double().repeat_interleave(128, 0)[: len(rows)].repeat_interleave(128, 1)
                rows_back, rows = weight.double() * wide[:, : rows.shape[1]], weight
            else:
                rows_back = rows
            chunks.append(rows)
            for i, part in enumerate(rows_back.split([len(p) for p in piece])):
                back[i].append(part)
        tensors[f"{prefix}qkv_proj.weight"] = torch.cat(chunks)
        if quantised:
            tensors[f"{prefix}qkv_proj.weight_scale_inv"] = torch.cat(scales)
        expected |= {f"{prefix}{letter}_proj.weight": torch.cat(b) for letter, b in zip("qkv", back, strict=True)}
    save_file(tensors, folder / "model.safetensors")
    for stale in folder.glob("model-*"):
        stale.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return expected


@pytest.mark.parametrize("quantised", [True, False])
def test_fused_qkv(tmp_path, make_model, quantised):
    model = make_model(**SHAPE)
    save_model(model, tmp_path / "m")
    expected = fuse(tmp_path / "m", model.config, quantised)
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "mimo_v2"}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing"):
        load_model(tmp_path / "m")
    file.write_text(json.dumps(config | {"attention_projection_layout": "fused_qkv"}))
    loaded = published_tensors(load_model(tmp_path / "m", dtype="float32"))
    assert len(expected) == 3 * (4 + 2)
    if quantised:  # what the format says of its scales: tiled for each chunk
        scales = load_file(tmp_path / "m" / "model.safetensors")
        assert scales["model.layers.0.self_attn.qkv_proj.weight_scale_inv"].shape == (2 * 2, 2)
    for name, tensor in published_tensors(model).items():
        torch.testing.assert_close(loaded[name].double(), expected.get(name, tensor).double(), rtol=1e-6, atol=1e-12)
