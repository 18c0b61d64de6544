"""GGUF: llama.cpp runs what we write with the same tokens and drafts; we read it back; foreign files are named."""

import gguf
import numpy as np
import pytest
import torch

from mimoflash.checkpoint import load_model, save_gguf
from mimoflash.checkpoint.gguf_in import _values
from mimoflash.checkpoint.layout import published_tensors
from mimoflash.config import DENSE, GLOBAL, WINDOW

# what llama.cpp asks of a shape: widths that are multiples of 32, the same heads in all layers
SHAPE = dict(vocab_size=320, hidden_size=64, intermediate_size=96, head_dim=32, v_head_dim=32, initializer_range=0.12)


def vocabulary(size):
    """The `tokenizer.*` metadata of a vocabulary of `size` words. (llama.cpp's server reports no log-probabilities
    inside a character: bytes alone would not do.)"""
    tokens = [*(f"t{i}" for i in range(size - 1)), "<|im_end|>"]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3], "tokenizer.ggml.merges": ["t 1", "t 2"],
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }


def run_llama_cpp(file, prompt, n, drafts=0):
    """Greedy tokens, their log-probabilities, and llama.cpp's timings."""
    xllamacpp = pytest.importorskip("xllamacpp")
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.verbosity = str(file), 256, 1, False, 0
    p.cpuparams.n_threads = 1
    p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
    p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if drafts:
        p.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        p.speculative.draft.n_max = drafts
        p.speculative.draft.p_min = 0.0
    answer = xllamacpp.Server(p).handle_completions(
        {"prompt": prompt, "max_tokens": n, "temperature": 0, "logprobs": 1, "ignore_eos": True, "cache_prompt": False}
    )
    content = answer["choices"][0]["logprobs"]["content"]
    return [t["id"] for t in content], torch.tensor([t["logprob"] for t in content]), answer["timings"]


DENSE_ONLY = dict(mlp_layer_types=(DENSE,) * 4, n_routed_experts=0, num_experts_per_tok=0, moe_intermediate_size=0)
LLAMA = DENSE_ONLY | dict(layer_types=(GLOBAL,) * 4, partial_rotary_factor=1.0, attention_value_scale=1.0)
CASES = {
    "family": dict(num_nextn_predict_layers=2),
    "scaled": dict(routed_scaling_factor=2.5, attention_value_scale=1.0, partial_rotary_factor=0.5),
    "no sinks, many kv heads": dict(swa_sink=False, num_key_value_heads=2, swa_num_key_value_heads=4),
    "sinks everywhere, tied": dict(global_sink=True, tie_word_embeddings=True),
    "dense": DENSE_ONLY,
    "window only": dict(layer_types=(WINDOW,) * 4),
    "llama": LLAMA,
    "llama, tied": LLAMA | dict(tie_word_embeddings=True, num_key_value_heads=2),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_writes_the_same_tokens(tmp_path, make_model, case):
    model = make_model(**SHAPE | CASES[case])
    save_gguf(model, tmp_path / "m.gguf", dtype="float32", tokenizer=vocabulary(310))
    prompt = list(range(5, 25))  # longer than the window
    theirs, logprobs, _ = run_llama_cpp(tmp_path / "m.gguf", prompt, 64)
    assert len(theirs) == 64
    logits = model(torch.tensor([prompt + theirs]))[0, len(prompt) - 1 : -1]
    ours = logits.log_softmax(-1)
    assert (ours.gather(1, torch.tensor(theirs)[:, None])[:, 0] - logprobs).abs().max() < 2e-5
    logits[:, 309] = -torch.inf  # the end token, which ignore_eos forbids
    assert logits.argmax(-1).tolist() == theirs


def test_llama_cpp_accepts_the_same_drafts(tmp_path, make_model):
    """One MTP layer and a head that knows six tokens, so that chance makes it right now and then: llama.cpp accepts
    exactly the drafts that ours would have been right with."""
    model = make_model(seed=3, **SHAPE, num_nextn_predict_layers=1)
    model.lm_head.weight[6:] = 0
    model.lm_head.weight[:6] *= 3
    save_gguf(model, tmp_path / "m.gguf", dtype="float32", tokenizer=vocabulary(310))
    prompt = list(range(5, 25))
    theirs, _, timings = run_llama_cpp(tmp_path / "m.gguf", prompt, 48, drafts=1)
    assert theirs == run_llama_cpp(tmp_path / "m.gguf", prompt, 48)[0]
    sequence = torch.tensor([prompt + theirs])
    drafts = model.mtp_logits(sequence)[0][0].argmax(-1)  # at t: of token t + 2
    place, drafted, accepted = len(prompt), 0, 0  # the newest token's
    while place + 1 < sequence.shape[1]:
        right = drafts[place - 1] == sequence[0, place + 1]
        drafted, accepted, place = drafted + 1, accepted + int(right), place + 1 + int(right)
    assert 0 < accepted < drafted
    assert (timings["draft_n"], timings["draft_n_accepted"]) == (drafted, accepted)


@pytest.mark.parametrize(
    ("dtype", "step"),
    [("float32", 0), ("bf16", 2**-8), ("float16", 2**-10), ("q8_0", 2**-6), ("q4_1", 1 / 14)],  # of 15 steps, half
)
def test_what_we_write_we_read(tmp_path, make_model, dtype, step):
    model = make_model(num_nextn_predict_layers=2, intermediate_size=80, global_sink=True)  # 80: no multiple of 32
    save_gguf(model, tmp_path / "m.gguf", dtype=dtype)
    loaded = load_model(tmp_path / "m.gguf", dtype="float32")
    same = "layer_types mlp_layer_types swa_num_key_value_heads swa_sink global_sink sliding_window swa_rope_theta"
    for name in [*same.split(), "num_nextn_predict_layers", "attention_value_scale", "rms_norm_eps", "rope_theta"]:
        assert getattr(loaded.config, name) == getattr(model.config, name), name
    assert loaded.config.attention(GLOBAL).rope_dim == model.config.attention(GLOBAL).rope_dim
    for (name, a), b in zip(published_tensors(loaded).items(), published_tensors(model).values(), strict=True):
        exact = a.dim() == 1 or name.endswith("mlp.gate.weight")
        bound = b.abs().amax(-1, keepdim=True) if dtype in ("q8_0", "q4_1") else b.abs()
        assert ((a - b).abs() <= (0 if exact else step) * bound + 2**-24 * (not exact)).all(), name
    stored = {"bf16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32)
    assert load_model(tmp_path / "m.gguf").lm_head.weight.dtype == stored
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("changes", [LLAMA, LLAMA | dict(tie_word_embeddings=True)])
def test_a_llama_file_comes_back_as_it_was(tmp_path, make_model, changes):
    model = make_model(**SHAPE | changes)
    save_gguf(model, tmp_path / "m.gguf", dtype="float32")
    loaded = load_model(tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes().find(b"llama.block_count") > 0
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    for a, b in zip(published_tensors(loaded).values(), published_tensors(model).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32"])
def test_dequantisation_is_ggufs(kind):
    kind = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=(5000, 64)).astype(np.float32)  # more rows than are taken at a time
    data = gguf.quants.quantize(values, kind)
    np.testing.assert_array_equal(_values(data, kind).float().numpy(), gguf.quants.dequantize(data, kind))


def test_llama_files(tmp_path, tokens):
    """q and k come back from llama.cpp's order of rows, written here by its own rule."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True, initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_array("tokenizer.ggml.tokens", [str(i) for i in range(5000)])  # long: walked over
    writer.add_array("tokenizer.ggml.scores", [0.5] * 5000)
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.reshape(heads, 2, -1, 64).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with torch.no_grad():
        ours = load_model(tmp_path / "m.gguf")
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert ours.config.rms_norm_eps == 1e-5


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [3, 40, 2000, -40])
def test_truncated(tmp_path, make_model, kept):
    save_gguf(make_model(), tmp_path / "m.gguf", dtype="float32")
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"m\.gguf: cut off or not a GGUF file"):
        load_model(tmp_path / "m.gguf")


def write(path, architecture="mimo2", **tensors):
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_foreign_and_incomplete_files(tmp_path, make_model, monkeypatch):
    path = tmp_path / "m.gguf"
    write(path, "falcon", x=np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"m\.gguf: architecture 'falcon' is not one of llama, mimo2"):
        load_model(path)
    write(path, x=np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"m\.gguf: mimo2\.attention\.head_count is missing"):
        load_model(path)

    from mimoflash.checkpoint import gguf_out

    original = gguf_out.gguf_tensors

    def save(change):
        def changed(*arguments):
            tensors = original(*arguments)
            change(tensors)
            return tensors

        monkeypatch.setattr(gguf_out, "gguf_tensors", changed)
        save_gguf(make_model(), path)

    save(lambda tensors: tensors.pop("blk.1.attn_k.weight"))
    with pytest.raises(ValueError, match=r"m\.gguf: blk\.1\.attn_k\.weight is missing"):
        load_model(path)
    save(lambda tensors: tensors.update({"blk.1.attn_q.bias": (torch.ones(8),)}))
    with pytest.raises(ValueError, match=r"m\.gguf: blk\.1\.attn_q\.bias has no place"):
        load_model(path)
    save(lambda tensors: tensors.update({"blk.1.attn_norm.weight": (torch.ones(8),)}))
    with pytest.raises(ValueError, match=r"m\.gguf: blk\.1\.attn_norm\.weight is \(8,\), but .* \(64,\)"):
        load_model(path)


def test_models_that_the_format_cannot_hold(tmp_path, make_model):
    for changes, message in (
        (dict(swa_head_dim=16, partial_rotary_factor=0.5), "swa_head_dim is 16 and head_dim 24"),
        (dict(swa_num_attention_heads=8), "swa_num_attention_heads is 8 and num_attention_heads 4"),
        (dict(norm_topk_prob=False), "norm_topk_prob is false"),
        (dict(layer_types=(GLOBAL,) * 4), "without window layers.*but mlp_layer_types has sparse layers"),
        (LLAMA, "but v_head_dim is 16 and head_dim 24"),
        (SHAPE | LLAMA | dict(global_sink=True), "but global_sink is true"),
        (SHAPE | LLAMA | dict(partial_rotary_factor=0.5), "but partial_rotary_factor is 0.5"),
        (SHAPE | LLAMA | dict(attention_value_scale=0.7), "but attention_value_scale is 0.7"),
        (SHAPE | LLAMA | dict(num_nextn_predict_layers=2), "but num_nextn_predict_layers is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            save_gguf(make_model(**changes), tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="tokenizer has 300 tokens, the model's vocabulary only 128"):
        save_gguf(make_model(), tmp_path / "m.gguf", tokenizer=vocabulary(300))
    with pytest.raises(ValueError, match="dtype 'fp8' is not one of"):
        save_gguf(make_model(), tmp_path / "m.gguf", dtype="fp8")
    large = make_model()
    large.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight has values beyond float16"):
        save_gguf(large, tmp_path / "m.gguf", dtype="float16")
    assert list(tmp_path.iterdir()) == []
