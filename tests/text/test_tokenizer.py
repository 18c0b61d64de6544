"""Tokens against transformers, tokenizers and llama.cpp; loading, saving, streaming."""

import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimoflash.text import FAMILY_TOKENS, StreamDecoder, Tokenizer, load_tokenizer, train_tokenizer
from mimoflash.text.vocabulary import read_gguf_fields

PIECES = [
    "Hello world",
    " \n\n\t  ",
    "12345.678",
    "³½٣",
    "naïve Grüße",
    "世界，你好",
    "🙂👩‍👩‍👧 e\u0301",
    "don't WE'LL",
    "\r\n x\u00a0y",
    "a_b(c)->{d}",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "<|im_",
    "  trailing   ",
    "\u2028\x00\x7f",
    "\ufffd",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12).map("".join)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(texts)
def test_decode_inverts_encode_and_agrees_with_tokenizers(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert ids == tokenizer.core.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text == tokenizer.core.decode(ids, skip_special_tokens=False)


@quick
@given(data=st.data())
def test_decode_and_stream_of_any_ids_agree_with_tokenizers(tokenizer: Tokenizer, data: st.DataObject):
    ids = data.draw(
        st.lists(st.integers(0, tokenizer.vocab_size + 50), max_size=30)
    )  # broken UTF-8, ids beyond the end
    expected = tokenizer.core.decode([i for i in ids if i < tokenizer.vocab_size], skip_special_tokens=False)
    assert tokenizer.decode(ids) == expected
    stream = StreamDecoder(tokenizer, skip_special=False)
    pieces = []
    while ids:
        count = data.draw(st.integers(1, len(ids)))
        pieces.append(stream.feed(ids[:count]))
        ids = ids[count:]
    pieces.append(stream.finish())
    assert "".join(pieces) == expected


def test_stream_gives_a_character_with_its_last_byte_and_never_a_broken_one(tokenizer: Tokenizer):
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode("𓀀")  # four bytes, none of them merged in training
    assert len(ids) == 4
    assert [stream.feed([index]) for index in ids] == ["", "", "", "𓀀"]
    assert stream.feed(ids[:3]) == ""
    assert stream.finish() == "\ufffd"


def test_skipping_special_tokens_keeps_the_tags_that_the_parser_reads(tokenizer: Tokenizer):
    ids = tokenizer.encode("<|im_start|>a<think>b</think><tool_call></tool_call><|im_end|><|endoftext|>")
    assert tokenizer.decode(ids, skip_special=True) == "a<think>b</think><tool_call></tool_call>"
    assert StreamDecoder(tokenizer).feed(ids) == "a<think>b</think><tool_call></tool_call>"


def test_tags_flagged_as_special_by_a_checkpoint_are_still_kept(tokenizer: Tokenizer):
    core = tokenizers.Tokenizer.from_str(tokenizer.core.to_str().replace('"special":false', '"special":true'))
    flagged = Tokenizer(core)
    assert flagged.core.get_added_tokens_decoder()[flagged.special.think].special
    assert flagged.decode(flagged.encode("<think>b<|im_end|>"), skip_special=True) == "<think>b"


def test_an_added_token_stands_for_its_own_text(tokenizer: Tokenizer):
    core = tokenizers.Tokenizer.from_str(tokenizer.core.to_str())
    core.add_tokens(["néw"])  # é is also the printable character of a byte
    added = Tokenizer(core)
    assert added.encode("néw") == [tokenizer.vocab_size]
    assert added.decode(added.encode("néw!")) == "néw!"


def test_digits_are_single_and_special_tokens_have_roles(tokenizer: Tokenizer):
    assert [tokenizer.decode([index]) for index in tokenizer.encode("2026")] == ["2", "0", "2", "6"]
    for role, text in FAMILY_TOKENS.items():
        assert tokenizer.encode(text) == [getattr(tokenizer.special, role)]
    assert tokenizer.stop_ids == {tokenizer.special.im_end, tokenizer.special.end_of_text}
    assert tokenizer.vocab_size == 1500 == tokenizer.special.end_think + 1


def test_training_is_repeatable_and_needs_room():
    corpus = ["the cat sat on the mat, the dog too"] * 3
    assert train_tokenizer(corpus, 275).fingerprint == train_tokenizer(corpus, 275).fingerprint
    assert train_tokenizer(corpus, 275).fingerprint != train_tokenizer(corpus, 276).fingerprint
    with pytest.raises(ValueError, match="vocab_size is 100, but bytes and special tokens need 265"):
        train_tokenizer(corpus, 100)


def test_saved_tokenizer_is_the_same_here_and_in_transformers(tokenizer: Tokenizer, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.fingerprint == tokenizer.fingerprint
    assert ours.special == tokenizer.special
    assert ours.stop_ids == tokenizer.stop_ids
    assert theirs.eos_token_id == ours.special.im_end
    for text in ["".join(PIECES), *PIECES]:
        assert theirs(text, add_special_tokens=True)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    ours.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == tokenizer.fingerprint
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("a b") == tokenizer.encode("a b")


def test_the_map_of_special_tokens_is_configurable_and_kept(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    mapped = load_tokenizer(tmp_path, {"im_end": "<|endoftext|>", "think": "<thought>"})
    assert mapped.special.im_end == tokenizer.special.end_of_text
    assert mapped.special.think is None
    mapped.save(tmp_path / "mapped")
    assert load_tokenizer(tmp_path / "mapped").special == mapped.special
    with pytest.raises(ValueError, match="unknown role of a special token: im_middle"):
        load_tokenizer(tmp_path, {"im_middle": "x"})


def test_configs_of_published_checkpoints(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.core.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).chat_template is None
    config = {"eos_token": {"content": "<think>"}, "chat_template": [{"name": "default", "template": "T"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == "T"
    assert loaded.stop_ids == tokenizer.stop_ids | {tokenizer.special.think}
    (tmp_path / "chat_template.jinja").write_bytes(b"own\r\n")
    assert load_tokenizer(tmp_path).chat_template == "own\r\n"


def test_what_is_no_tokenizer_is_said(tmp_path: Path, tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(40))
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_tokenizer(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="only byte-level BPE"):
        Tokenizer.from_gguf({"tokenizer.ggml.model": "llama"})
    with pytest.raises(ValueError, match="'deepseek-llm'"):
        Tokenizer.from_gguf({**tokenizer.gguf_fields(), "tokenizer.ggml.pre": "deepseek-llm"})


def test_gguf_metadata_reader_agrees_with_the_gguf_package(tokenizer: Tokenizer, tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tokenizer.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    expected = {**tokenizer.gguf_fields(), "x.floats": [0.5, 2.0], "x.number": -3, "x.real": 0.25}
    for key, value in expected.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_int32(key, value)
        else:
            {str: writer.add_string, float: writer.add_float32, list: writer.add_array}[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = read_gguf_fields(path)
    assert {key: fields[key] for key in expected} == expected
    reader = gguf.GGUFReader(path)
    assert fields == {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    for loaded in (load_tokenizer(path), Tokenizer.from_gguf(reader.fields)):
        assert loaded.special == tokenizer.special
        assert loaded.stop_ids == tokenizer.stop_ids
        assert [loaded.encode(text) for text in PIECES] == [tokenizer.encode(text) for text in PIECES]
        assert loaded.gguf_fields() == tokenizer.gguf_fields()


class LlamaCpp:
    """llama.cpp's tokenizer behind its server's /tokenize."""

    def __init__(self, path: Path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 64, 1, False, 0
        params.fit_params, params.n_gpu_layers, params.cpuparams.n_threads = False, 0, 1
        self.server = xllamacpp.Server(params)

    def encode(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]


def write_tiny_llama(tokenizer: Tokenizer, path: Path) -> None:
    """A llama of one layer with a vocabulary, so that llama.cpp loads it."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("context_length", "embedding_length", "feed_forward_length"):
        getattr(writer, f"add_{name}")(32)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in tokenizer.gguf_fields().items():
        adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        adders[type(value)](key, value)
    for name in (
        "token_embd",
        "output_norm",
        "blk.0.attn_norm",
        "blk.0.ffn_norm",
        "blk.0.attn_q",
        "blk.0.attn_k",
        "blk.0.attn_v",
        "blk.0.attn_output",
        "blk.0.ffn_gate",
        "blk.0.ffn_up",
        "blk.0.ffn_down",
    ):
        shape = (tokenizer.vocab_size, 32) if name == "token_embd" else (32,) if "norm" in name else (32, 32)
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_trained_vocabulary_has_the_same_tokens_in_llama_cpp(tokenizer: Tokenizer, tmp_path: Path):
    write_tiny_llama(tokenizer, tmp_path / "tiny.gguf")
    theirs = LlamaCpp(tmp_path / "tiny.gguf")
    for text in [*PIECES, "".join(PIECES), Path(__file__).read_text(encoding="utf-8")]:
        assert tokenizer.encode(text) == theirs.encode(text), text


def test_smol_tokens_are_those_of_llama_cpp(smol_gguf: Path, tmp_path: Path):
    ours, theirs = load_tokenizer(smol_gguf), LlamaCpp(smol_gguf)
    assert ours.vocab_size == 49152
    assert ours.stop_ids == {0, 2}
    assert ours.chat_template
    ours.save(tmp_path)
    saved = load_tokenizer(tmp_path)
    whole = Path(__file__).read_text(encoding="utf-8")
    for text in [*PIECES, "".join(PIECES), whole]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
        assert saved.encode(text) == ours.encode(text)

    @quick
    @given(texts)
    def agree(text: str) -> None:
        assert ours.encode(text) == theirs.encode(text)

    agree()


def test_no_merge_reaches_across_a_special_token():
    texts = ["<think></think>The end<|im_end|><|im_start|>user\nThe way<|im_end|>"] * 50
    tokenizer = train_tokenizer(texts, 400)
    assert not any(">The" in token for token in tokenizer.core.get_vocab())
    assert tokenizer.decode(tokenizer.encode("</think>The")[1:]) == "The"
    assert len(tokenizer.encode("</think>The")) == 2
