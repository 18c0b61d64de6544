import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mimoflash.config import DENSE, GLOBAL, SPARSE, WINDOW, ModelConfig
from mimoflash.model import Transformer

transformers = pytest.importorskip("transformers")


@torch.no_grad()
def randomised(config, seed=0):
    """A model whose norms, sinks and correction biases are not at their initial values either."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if "norm" in name or "bias" in name:
            tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


def oracle(model, spelling, dtype=torch.float32):
    """transformers' mimo_v2_flash with the same weights, configured by one of the two spellings."""
    raw = model.config.to_dict()
    hub = {"hybrid_layer_pattern", "moe_layer_freq", "sliding_window_size", "layernorm_epsilon", "rope_theta"}
    native = {"layer_types", "mlp_layer_types", "rope_parameters", "sliding_window", "rms_norm_eps"}
    config = {key: value for key, value in raw.items() if key not in (native if spelling == "hub" else hub)}
    if spelling == "hub":  # transformers' class reads the hub's window, and expects its own names for the rest
        config |= {key: raw[key] for key in native - {"sliding_window"}}
    theirs = transformers.MiMoV2FlashForCausalLM(transformers.MiMoV2FlashConfig(**config)).eval()
    tensors = {k.replace("attention_sink_bias", "sinks"): v for k, v in model.state_dict().items() if ".mtp." not in k}
    theirs.load_state_dict(tensors)
    return theirs.to(dtype)


@st.composite
def configs(draw, like_transformers=True):
    kv_heads = draw(st.integers(1, 2))
    heads = 2 * kv_heads * draw(st.integers(1, 2))
    kinds = draw(st.lists(st.sampled_from([GLOBAL, WINDOW]), min_size=1, max_size=4))
    experts = draw(st.integers(1, 6))
    changes = {
        "hidden_size": 8 * draw(st.integers(1, 4)), "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([12, 18, 24])), "v_head_dim": draw(st.sampled_from([8, 12])),
        "sliding_window": draw(st.integers(1, 20)), "layer_types": tuple(kinds),
        "mlp_layer_types": tuple(draw(st.sampled_from([DENSE, SPARSE])) for _ in kinds),
        "n_routed_experts": max(2, experts), "num_experts_per_tok": draw(st.integers(1, experts)),
        "moe_intermediate_size": draw(st.sampled_from([4, 8, 16])), "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "attention_value_scale": draw(st.sampled_from([1.0, 0.707])), "initializer_range": 0.2,
    }
    if not like_transformers:
        changes |= {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 12, "swa_v_head_dim": 4,
                    "global_sink": draw(st.booleans()), "swa_sink": draw(st.booleans()),
                    "num_nextn_predict_layers": draw(st.integers(0, 3))}
    return ModelConfig.tiny(**changes)


@settings(max_examples=20)
@given(configs(), st.integers(1, 60), st.integers(0, 99))
def test_logits_equal_transformers_over_random_configs(config, length, seed):
    model = randomised(config, seed)
    tokens = torch.randint(0, config.vocab_size, (2, length))
    with torch.no_grad():
        assert_close(model(tokens), oracle(model, "native")(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spelling", ["hub", "native"])
@pytest.mark.parametrize("length", [1, 8, 9, 10, 33, 200])
def test_logits_equal_transformers_on_both_sides_of_the_window(spelling, length):
    model = randomised(ModelConfig.tiny())
    tokens = torch.randint(0, 128, (2, length))
    with torch.no_grad():
        assert_close(model(tokens), oracle(model, spelling)(tokens).logits, atol=1e-4, rtol=0)


def test_bf16_is_as_close_to_float32_as_transformers_is():
    model = randomised(ModelConfig.tiny())
    tokens = torch.randint(0, 128, (4, 100))
    with torch.no_grad():
        exact = model(tokens)
        theirs = (oracle(model, "native", torch.bfloat16)(tokens).logits.float() - exact).abs()
        ours = (model.to(torch.bfloat16)(tokens).float() - exact).abs()
    # a rounding may flip a route for either; the bulk of the errors says how close the arithmetic is
    assert ours.median() <= 1.1 * theirs.median()
    assert ours.mean() <= 1.25 * theirs.mean()


def test_float16_follows_float32():
    model = randomised(ModelConfig.tiny())
    tokens = torch.randint(0, 128, (2, 40))
    with torch.no_grad():
        exact = model(tokens)
        assert (model.half()(tokens).float() - exact).abs().median() < 0.01


@settings(max_examples=15)
@given(configs(like_transformers=False), st.data())
def test_packed_documents_are_documents_alone(config, data):
    model = randomised(config)
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    documents = [torch.randint(0, config.vocab_size, (1, n)) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    packed = torch.cat(documents, 1)
    with torch.no_grad():
        together, drafts = model(packed, positions, ids), model.mtp_logits(packed, positions, ids)
        starts = [0, *itertools.accumulate(lengths)]
        for start, document in zip(starts, documents, strict=False):
            end = start + document.shape[1]
            assert_close(together[:, start:end], model(document), atol=1e-4, rtol=1e-4)
            for k, (mine, alone) in enumerate(zip(drafts, model.mtp_logits(document), strict=True)):
                meant = max(document.shape[1] - 1 - k, 0)
                assert_close(mine[:, start : start + meant], alone[:, :meant], atol=1e-4, rtol=1e-4)


def test_replayed_routes_give_the_same_logits_and_gradients_reach_the_router():
    model = randomised(ModelConfig.tiny())
    tokens = torch.randint(0, 128, (2, 20))
    out = model.trunk(tokens)
    assert out.routes.shape == (2, 20, 3, 2)
    replayed = model(tokens, routes=out.routes)
    assert_close(replayed, model.logits(out.hidden))
    other = torch.stack([torch.randperm(8)[:2] for _ in range(2 * 20 * 3)]).view(2, 20, 3, 2)
    assert (model(tokens, routes=other) - replayed).abs().max() > 1e-3
    assert (model.trunk(tokens, routes=other).routes == other).all()
    model(tokens, routes=other).square().sum().backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.model.layers[1:])


def test_the_correction_bias_chooses_but_does_not_weigh():
    model = randomised(ModelConfig.tiny(layer_types=(GLOBAL,), mlp_layer_types=(SPARSE,)))
    gate = model.model.layers[0].mlp.gate
    x = torch.randn(5, 64)
    gate.e_score_correction_bias.zero_()[3] = 100.0
    routing, weights = gate(x)
    assert (routing.indices == 3).any(-1).all()
    scores = torch.sigmoid(x @ gate.weight.T).gather(1, routing.indices)
    assert_close(weights, scores / scores.sum(-1, keepdim=True))


def test_mtp_layer_is_the_formula_of_the_report():
    config = ModelConfig.tiny(num_nextn_predict_layers=3)
    model = randomised(config).double()
    tokens, length = torch.randint(0, 128, (1, 30)), 30
    drafts = model.mtp_logits(tokens)
    hidden = model.trunk(tokens).hidden[0]

    def norm(module, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight

    def rotated(x, position):
        angle = position / 10_000.0 ** (torch.arange(4, dtype=torch.float64) / 4)
        a, b = x[..., :4], x[..., 4:8]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), x[..., 8:]], -1)

    for k, layer in enumerate(model.model.mtp.layers):
        count = length - 1 - k
        embedding = model.model.embed_tokens.weight[tokens[0, 1 + k :]]  # of token i + 1 + k
        x = torch.cat([norm(layer.enorm, embedding), norm(layer.hnorm, hidden[:count])], -1) @ layer.eh_proj.weight.T
        y, a = norm(layer.input_layernorm, x), layer.self_attn
        rows = []
        for i in range(count):
            seen = range(max(0, i - 8), i + 1)
            heads = []
            for h in range(4):
                q = rotated(a.q_proj.weight[h * 24 : h * 24 + 24] @ y[i], i)
                keys = a.k_proj.weight[h // 2 * 24 : h // 2 * 24 + 24]
                values = a.v_proj.weight[h // 2 * 16 : h // 2 * 16 + 16] * 0.707
                scores = torch.stack([q @ rotated(keys @ y[j], j) / 24**0.5 for j in seen]).exp()
                total = scores.sum() + a.attention_sink_bias[h].exp()
                heads.append(sum(s * (values @ y[j]) for s, j in zip(scores, seen, strict=True)) / total)
            rows.append(a.o_proj.weight @ torch.cat(heads))
        x = x + torch.stack(rows)
        y, m = norm(layer.pre_mlp_layernorm, x), layer.mlp
        x = x + (F.silu(y @ m.gate_proj.weight.T) * (y @ m.up_proj.weight.T)) @ m.down_proj.weight.T
        want = norm(layer.final_layernorm, x) @ model.lm_head.weight.T
        assert_close(drafts[k][0, :count], want, atol=1e-5, rtol=1e-4)  # cos and sin are float32 in the model


def test_llama_shapes_equal_transformers():
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e5,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    model = Transformer(ModelConfig.from_dict(config.to_dict()))
    model.load_state_dict(theirs.state_dict())
    tokens = torch.randint(0, 100, (2, 40))
    with torch.no_grad():
        assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.tensor([[128]])}, "vocabulary of 128"),
        ({"tokens": torch.tensor([[-1]])}, "vocabulary of 128"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, "neither of them 0"),
        ({"tokens": torch.tensor([[1, 2]]), "positions": torch.tensor([0, 1])}, "positions"),
        ({"tokens": torch.tensor([[1, 2]]), "routes": torch.zeros(1, 2, 4, 2, dtype=torch.long)}, "routes"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Transformer(ModelConfig.tiny())(**arguments)
