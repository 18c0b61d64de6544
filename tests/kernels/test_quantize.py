import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimoflash.kernels.quantize import dequantise, quantise


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    return float((approximation - weight).norm() / weight.norm())


@pytest.mark.parametrize(("kind", "theirs"), [("int8", "Q8_0"), ("int4", "Q4_1")])
def test_the_error_is_no_more_than_llama_cpps(kind, theirs):
    # same groups and bits; their scales are float16, which costs int8 a hundredth less
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = quants.quantize(weight.numpy(), GGMLQuantizationType[theirs])
    expected = relative_error(weight, torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType[theirs])))
    assert relative_error(weight, dequantise(quantise(weight, kind))) < expected * (1.01 if kind == "int8" else 0.95)
    assert quantise(weight, kind).nbytes <= packed.nbytes


@st.composite
def weights(draw):
    n, k = draw(st.integers(1, 40)), draw(st.integers(1, 100))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    scale = 10.0 ** draw(st.integers(-30, 30))
    return torch.randn(n, k, generator=random) * scale + draw(st.sampled_from([0.0, 3.0])) * scale


@given(weights(), st.sampled_from(["int8", "int4"]))
def test_no_weight_is_further_off_than_a_step(weight, kind):
    packed = quantise(weight, kind)
    approximation = dequantise(packed)
    assert approximation.shape == weight.shape
    for start in range(0, weight.shape[1], 32):
        group = weight[:, start : start + 32].double()
        reach = group.abs().amax(1) / 127 if kind == "int8" else (group.amax(1) - group.amin(1)) / 15
        off = (approximation[:, start : start + 32].double() - group).abs().amax(1)
        assert (off <= 1.6 * reach + 2**-8 * group.abs().amax(1) + 1e-37).all()


def test_the_layout_is_the_kernels():
    # whole numbers that scale 1 (int8) or scale 1 and a min of -128 (int4) hold exactly
    q = torch.randint(-127, 128, (20, 64), generator=torch.Generator().manual_seed(0))
    q[:, ::32] = 127
    packed = quantise(q.float(), "int8")
    assert (packed.scales[:1] == 1).all()
    for output, i in [(0, 0), (3, 5), (17, 40), (19, 63)]:
        assert packed.data[output // 16, i // 32, i % 32 // 4, output % 16, i % 4] == q[output, i]
    four = q.remainder(16)
    four[:, ::32], four[:, 1::32] = 0, 15
    packed = quantise(four.float() - 128, "int4")
    assert (packed.mins[:1] == -128).all()
    for output, i in [(0, 0), (3, 5), (17, 40), (19, 63)]:
        byte = packed.data[output // 16, i // 32, i % 32 // 8, output % 16, i % 4]
        assert (byte >> 4 if i % 8 >= 4 else byte & 15) == four[output, i]


def test_values_on_the_grid_come_back_exactly():
    weight = torch.arange(-8, 8).repeat(3, 4).float() / 4
    assert torch.equal(dequantise(quantise(weight, "int4")), weight)
    assert torch.equal(dequantise(quantise(torch.zeros(3, 40), "int4")), torch.zeros(3, 40))
    constant = torch.full((3, 40), 0.5)
    assert torch.equal(dequantise(quantise(constant, "int4")), constant)


def test_a_large_weight_is_worked_on_in_parts(monkeypatch):
    weight = torch.randn(100, 96)
    whole = quantise(weight, "int4")
    monkeypatch.setattr("mimoflash.kernels.quantize._CHUNK", 96 * 16 * 2)
    parts = quantise(weight, "int4")
    for part in ("data", "scales", "mins"):
        assert torch.equal(getattr(whole, part), getattr(parts, part))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(value):
    weight = torch.ones(40, 40)
    weight[39, 39] = value
    with pytest.raises(ValueError, match=r"layers\.3\.up_proj holds values that are not finite"):
        quantise(weight, "int8", "layers.3.up_proj")


def test_what_cannot_be_quantised_is_named():
    with pytest.raises(ValueError, match=r"norm: only matrices .* \(7,\)"):
        quantise(torch.ones(7), "int8", "norm")
    with pytest.raises(ValueError, match="'int5' is no kind"):
        quantise(torch.ones(7, 7), "int5")
