"""Both sides run the same weights and prompts."""

import json

import pytest
import torch

from mimoflash.benchmarks.subject import gguf_file, open_subject, published_folder, read_conversations
from mimoflash.checkpoint import load_model, save_gguf, save_model
from mimoflash.checkpoint.layout import published_tensors
from mimoflash.config import DENSE, GLOBAL, ModelConfig
from mimoflash.model import Transformer
from mimoflash.text import render_chat, train_tokenizer


def test_a_shapes_weights_are_the_same_in_every_run_and_file(shape, tmp_path):
    subjects = [open_subject(shape, tmp_path / name, context=None, tokens=8) for name in ("a", "b")]
    a, b = (load_model(subject.source) for subject in subjects)
    theirs = load_model(gguf_file(subjects[0], "float32", tmp_path))
    assert published_folder(subjects[0], tmp_path) == tmp_path / "a" / "weights"
    for name, tensor in published_tensors(a).items():
        assert torch.equal(tensor, published_tensors(b)[name])
        assert torch.equal(tensor, published_tensors(theirs)[name])


def test_random_prompts_differ_from_pair_to_pair_only(shape, tmp_path):
    subject = open_subject(shape, tmp_path, context=None, tokens=8)
    (prompts,) = subject.batches(3, 20, seed=1)
    assert [len(prompt) for prompt in prompts] == [20, 20, 20]
    assert subject.batches(3, 20, seed=1) == [prompts]
    assert subject.batches(3, 20, seed=2) != [prompts]


def test_a_shape_gets_the_context_that_is_asked_for(shape, tmp_path):
    assert open_subject(shape, tmp_path, context=5000, tokens=100).config.max_position_embeddings >= 5100


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model with a tokenizer, global and dense: GGUF's `llama`, with MTP layers that it cannot hold."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["What is the way to the world?"] * 20, 300)
    config = ModelConfig.tiny(
        vocab_size=320, hidden_size=64, head_dim=32, v_head_dim=32, partial_rotary_factor=1.0,
        attention_value_scale=1.0, layer_types=(GLOBAL,) * 4, mlp_layer_types=(DENSE,) * 4, n_routed_experts=0,
        num_experts_per_tok=0, moe_intermediate_size=0, num_nextn_predict_layers=1,
    )
    folder = tmp_path_factory.mktemp("talker") / "model"
    save_model(Transformer(config), folder, tokenizer=tokenizer)
    return str(folder), tokenizer


def test_a_model_is_asked_questions_by_its_template(talker, tmp_path):
    name, tokenizer = talker
    (tmp_path / "asked.txt").write_text("What is it?\n\nThe way?\nWhy?\n")
    subject = open_subject(name, tmp_path, context=None, tokens=8, drafts=1, prompts=tmp_path / "asked.txt")
    messages = [{"role": "user", "content": "The way?"}]
    assert tokenizer.decode(subject.prompts[1]) == render_chat(tokenizer, messages, enable_thinking=True)
    assert [len(batch) for batch in subject.batches(2, None, seed=0)] == [2, 2]  # the first once more fills up
    assert subject.batches(2, None, seed=0)[1] == [subject.prompts[2], subject.prompts[0]]
    assert open_subject(name, tmp_path, context=16, tokens=8).prompts is None
    assert load_model(gguf_file(subject, "int8", tmp_path)).config.num_nextn_predict_layers == 0


def test_a_file_of_the_wanted_type_is_taken_as_it_is(talker, tmp_path):
    name, tokenizer = talker
    model = load_model(name)
    model.set_mtp_layers(0)
    for dtype in ("q4_1", "q8_0"):
        save_gguf(model, tmp_path / f"{dtype}.gguf", dtype=dtype, tokenizer=tokenizer.gguf_fields())
        subject = open_subject(str(tmp_path / f"{dtype}.gguf"), tmp_path, context=16, tokens=8)
        assert (gguf_file(subject, "int4", tmp_path) == tmp_path / f"{dtype}.gguf") == (dtype == "q4_1")
        folder = published_folder(subject, tmp_path)
        assert torch.equal(load_model(folder).lm_head.weight, load_model(tmp_path / f"{dtype}.gguf").lm_head.weight)


def test_each_turn_of_a_conversation_is_asked_for(tmp_path):
    said = [{"role": r, "content": r} for r in ("user", "assistant", "tool", "assistant")]
    (tmp_path / "c.json").write_text(json.dumps([{"messages": said, "tools": [{"name": "t"}]}]))
    assert read_conversations(tmp_path / "c.json") == [(said[:1], [{"name": "t"}]), (said[:3], [{"name": "t"}])]


def test_what_cannot_be_opened_is_named(shape, talker, tmp_path):
    def fails(message, name=shape, **options):
        with pytest.raises(ValueError, match=message):
            open_subject(name, tmp_path, **dict(context=None, tokens=8) | options)

    fails("--shape huge: it must be one of nano, small", name="huge")
    fails("has 2 MTP layers: give at most so many", drafts=3)
    fails("has random weights", prompts=tmp_path / "x.txt")
    fails("no such file", name=talker[0], prompts=tmp_path / "x.txt")
    (tmp_path / "empty.txt").write_text("\n")
    fails("there is none in it", name=talker[0], prompts=tmp_path / "empty.txt")
    fails("give one of them", name=talker[0], prompts=tmp_path / "empty.txt", context=5)
    fails("a context of 1024 tokens, but 2008 are asked for", name=talker[0], context=1900, tokens=100)
