"""Teachers in memory, in folders and behind an endpoint say the same, and students become like them."""

import copy
import json
import math
import threading
import weakref
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
import torch
from small_world import CAPITALS, DIGITS, Log, Say, chats, small_model, small_tokenizer
from torch.testing import assert_close

from mimoflash.checkpoint import save_model
from mimoflash.engine import Engine, SamplingParams
from mimoflash.engine.speculation import replay_speculation
from mimoflash.posttrain import (
    ModelTeacher,
    MOPDSettings,
    RemoteTeacher,
    Shelf,
    StoredTeacher,
    make_batch,
    mopd,
    mopd_loss,
    teachers,
    token_logp,
    train_mopd,
)
from mimoflash.posttrain.groups import samples_of, sound
from mimoflash.posttrain.policy import mtp_loss, view

TOPS = [0, 1, 5, 10**6]


@pytest.fixture(scope="module")
def student():
    return small_model(initializer_range=0.1, num_nextn_predict_layers=2)


@pytest.fixture(scope="module")
def samples(student):
    return chats(student, tasks=[0, 0, 1, 2])


@pytest.fixture(scope="module")
def batches(student, samples):
    return [make_batch(part, student.config) for part in (samples[:3], samples[3:])]


def other_model(seed):
    return small_model(seed=seed, initializer_range=0.1)


def assert_same_scores(got, wanted):
    """The likeliest tokens in whatever order."""
    for one, other in zip(got, wanted, strict=True):
        assert_close(one.logp_BT, other.logp_BT, atol=1e-5, rtol=0)
        assert (one.top_ids_NK is None) == (other.top_ids_NK is None)
        if one.top_ids_NK is None:
            continue
        order, other_order = one.top_ids_NK.argsort(-1), other.top_ids_NK.argsort(-1)
        assert torch.equal(one.top_ids_NK.gather(-1, order), other.top_ids_NK.gather(-1, other_order))
        assert_close(
            one.top_logp_NK.gather(-1, order), other.top_logp_NK.gather(-1, other_order), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("top", TOPS)
def test_a_model_says_what_it_would_have_written(batches, top):
    model = other_model(1)
    for batch, scores in zip(batches, ModelTeacher(model, small_tokenizer()).score(batches, top), strict=True):
        assert torch.equal(scores.logp_BT, token_logp(model, batch, replay=False).detach())
        if not top:
            assert scores.top_logp_NK is scores.top_ids_NK is None
            continue
        logp_NV = view(model, batch, replay=False).logp_NV.detach()
        size = min(top, logp_NV.shape[-1])
        assert scores.top_ids_NK.shape == (int(batch.own_tokens), size)
        assert torch.equal(logp_NV.gather(-1, scores.top_ids_NK), scores.top_logp_NK)
        assert_close(scores.top_logp_NK.sort(-1, descending=True).values, logp_NV.topk(size).values)


# -- in folders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    for name, seed in {"one": 1, "two": 2}.items():
        save_model(other_model(seed), root / name, tokenizer=small_tokenizer())
    return {"one": root / "one", "two": root / "two"}


@pytest.mark.parametrize("top", TOPS)
def test_stored_models_say_the_same(folders, batches, top):
    shelf = Shelf()
    for seed, name in ((1, "one"), (2, "two"), (1, "one")):
        teacher = StoredTeacher(folders[name], shelf)
        wanted = ModelTeacher(other_model(seed), small_tokenizer()).score(batches, top)
        assert_same_scores(teacher.score(batches, top), wanted)


def test_one_stored_model_is_held_at_a_time(folders, batches, monkeypatch):
    loaded, load = [], teachers.load_model

    def noting(folder, **settings):
        assert all(model() is None for _, model in loaded)  # before memory for the next one is asked for
        model = load(folder, **settings)
        loaded.append((folder, weakref.ref(model)))
        return model

    monkeypatch.setattr(teachers, "load_model", noting)
    save_model(small_model(num_nextn_predict_layers=1), folders["one"].parent / "larger", tokenizer=small_tokenizer())
    shelf = Shelf()
    one, two, larger = (StoredTeacher(folders["one"].parent / name, shelf) for name in ("one", "two", "larger"))
    assert loaded == []  # who teaches is known before any model is there
    assert one.tokenizer.fingerprint == small_tokenizer().fingerprint
    assert one.config.vocab_size == other_model(1).config.vocab_size
    for teacher in (one, one, two, larger, larger, one):
        teacher.score(batches, 0)
    assert [folder.name for folder, _ in loaded] == ["one", "larger", "one"]  # the second takes the first one's memory


# -- behind an endpoint ------------------------------------------------------------------------------------------------


class Endpoint(ThreadingHTTPServer):
    """Answers as vLLM does: the prompt's own tokens, and the likeliest ones beside them. `spoil` changes an answer, or
    gives another status."""

    def __init__(self, model):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.asked, self.spoil = model, [], lambda number, answer: answer

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], asked))
        whole = {"choices": [{"text": "a", "prompt_logprobs": self.places(asked)}]}
        answer = self.server.spoil(len(self.server.asked), whole)
        status, body = answer if isinstance(answer, tuple) else (200, json.dumps(answer).encode())
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @torch.no_grad()
    def places(self, asked):
        tokens = asked["prompt"]
        logp_SV = self.server.model(torch.tensor([tokens]))[0].log_softmax(-1)
        places = [None]
        for token, logp_V in zip(tokens[1:], logp_SV, strict=False):
            top = logp_V.topk(min(asked["prompt_logprobs"], len(logp_V))).indices.tolist()
            places.append({str(t): {"logprob": logp_V[t].item(), "decoded_token": "?"} for t in [token, *top]})
        return places

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    with Endpoint(other_model(1)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def remote(endpoint, **settings):
    return RemoteTeacher(endpoint.url, "mimo", small_tokenizer(), **settings)


@pytest.mark.parametrize("top", TOPS)
def test_an_endpoint_says_the_same(endpoint, samples, batches, top):
    got = remote(endpoint).score(batches, top)
    wanted = ModelTeacher(endpoint.model, small_tokenizer()).score(batches, top)
    assert_same_scores(got, wanted)
    if top > 1000:  # all tokens, and these in their order
        assert all(torch.equal(one.top_ids_NK, other.top_ids_NK) for one, other in zip(got, wanted, strict=True))
    assert len(endpoint.asked) == 4  # once a sequence
    for sample, (path, key, asked) in zip(samples, endpoint.asked, strict=True):
        assert path == "/v1/completions"
        assert key is None
        assert asked["prompt"] == sample.rollout.tokens[: sample.length]  # no padding, and nothing after it
        assert (asked["model"], asked["prompt_logprobs"]) == ("mimo", top)


def test_an_endpoint_gets_its_key(endpoint, batches):
    remote(endpoint, api_key="secret").score(batches[1:], 0)
    assert [key for _, key, _ in endpoint.asked] == ["Bearer secret"]


def test_an_endpoint_that_fails_is_asked_again(endpoint, batches):
    endpoint.spoil = lambda number, answer: (500, b"overloaded") if number == 1 else answer
    got = remote(endpoint).score(batches[1:], 0)
    assert_same_scores(got, ModelTeacher(endpoint.model, small_tokenizer()).score(batches[1:], 0))
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize(("status", "times"), [(500, 2), (401, 1)])
def test_an_endpoint_that_goes_on_failing_is_an_error(endpoint, batches, status, times):
    endpoint.spoil = lambda number, answer: (status, b"no")
    with pytest.raises(requests.RequestException):
        remote(endpoint, retries=1).score(batches, 0)
    assert len(endpoint.asked) == times


def without_the_prompts_own(number, answer):
    answer["choices"][0]["prompt_logprobs"][1:] = [{"0": {"logprob": -1.0}}] * (len(places_of(answer)) - 1)
    return answer


def fewer_at_one_place(number, answer):
    places = places_of(answer)
    places[-1] = dict(list(places[-1].items())[:1])
    return answer


def places_of(answer):
    return answer["choices"][0]["prompt_logprobs"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda number, answer: {"choices": [{"text": "a"}]}, "knows prompt_logprobs"),
        (lambda number, answer: {"choices": [{"text": "a", "prompt_logprobs": None}]}, "knows prompt_logprobs"),
        (lambda number, answer: {"choices": [{"prompt_logprobs": places_of(answer)[:-1]}]}, "knows prompt_logprobs"),
        (without_the_prompts_own, "said nothing of token"),
        (fewer_at_one_place, "1 to 5 tokens a place: 5 were asked for"),
    ],
    ids=["none", "null", "too few", "without its own", "fewer at a place"],
)
def test_answers_that_lack_something_are_an_error(endpoint, batches, spoil, message):
    endpoint.spoil = spoil
    with pytest.raises(ValueError, match=message):
        remote(endpoint).score(batches, 5)


# -- what students learn from them -------------------------------------------------------------------------------------


@torch.no_grad()
def true_reverse_kl(model, teacher, samples):
    batch = make_batch(samples, model.config)
    logp_NV, teacher_logp_NV = (view(one, batch, replay=False).logp_NV for one in (model, teacher))
    return (logp_NV.exp() * (logp_NV - teacher_logp_NV)).sum(-1).mean().item()


@pytest.mark.parametrize(("top", "left"), [(16, 0.8), (10**6, 0.5)])
def test_a_student_becomes_like_its_teacher(top, left):
    """The more of its tokens are looked at, the sooner (`test_mopd` has the sampled ones alone)."""
    teacher, model = other_model(1), other_model(0)
    before = true_reverse_kl(model, teacher, chats(model))
    settings = MOPDSettings(steps=8, lr=3e-3, alpha=0.0, groups=2, group_size=8, max_tokens=8, top=top)
    own, log = {"go": ModelTeacher(teacher, small_tokenizer())}, Log()
    train_mopd(Engine(model, small_tokenizer()), {"go": Say("go", "")}, own, settings, log)
    assert true_reverse_kl(model, teacher, chats(model)) < left * before
    assert log[-1]["mopd/reverse_kl"] < log[0]["mopd/reverse_kl"]


@pytest.mark.parametrize("balance", ["domains", "sequences", "tokens"])
def test_balance_weighs_as_it_says(balance, monkeypatch):
    """Where one domain has fewer and longer sequences, and micro-batches are cut otherwise."""
    seen, played, groups_of = [], [], mopd.Training.groups
    monkeypatch.setattr(mopd.Training, "groups", lambda training: played.append(groups_of(training)) or played[-1])
    monkeypatch.setattr(mopd.Training, "update", lambda training, parts, loss, metrics: seen.append((parts, loss)))
    domains = {"a": Say("go", DIGITS), "b": Say("word", CAPITALS, broken=lambda seed, answer: seed % 3 > 0)}
    own = {name: ModelTeacher(other_model(seed), small_tokenizer()) for seed, name in enumerate(domains, 1)}
    model = other_model(0)
    settings = MOPDSettings(
        steps=1, lr=1.0, alpha=0.5, groups=4, group_size=4, max_tokens=20, micro_tokens=200, balance=balance,
    )
    train_mopd(Engine(model, small_tokenizer()), domains, own, settings)
    (((items,), loss_fn),) = seen
    outs = [loss_fn(model, item) for item in items]
    got = sum(out.total for out in outs) / sum(out.weight for out in outs)

    losses, weights = [], []
    for name, teacher in own.items():
        samples = [sample for group in played[0][name] for sample in samples_of(sound(group))]
        batch = make_batch(samples, model.config)
        logp_BT = token_logp(model, batch, replay=True)
        loss, _ = mopd_loss(
            logp_BT, logp_BT.detach(), batch.rollout_logp_BT, teacher.score([batch], 0)[0].logp_BT, batch.outcome_B,
            batch.mask_BT, alpha=0.5, gate=settings.gate, per_token=balance == "tokens",
        )
        losses.append(loss)
        weights.append({"domains": 1, "sequences": len(samples), "tokens": batch.own_tokens}[balance])
    assert weights[0] != weights[1] or balance == "domains"
    wanted = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    assert_close(got, wanted, rtol=1e-3, atol=1e-5)


# -- layers that draft -------------------------------------------------------------------------------------------------


def test_the_drafting_loss_is_a_loop_over_tokens(student, samples, batches):
    got = mtp_loss(student, view(student, batches[0], replay=True))
    exact, by_layer = copy.deepcopy(student).double(), ([], [])
    for sample in samples[:3]:
        text = sample.rollout.tokens[: sample.length]
        routes = sample.rollout.routes[None].long()
        tokens = torch.tensor([text])
        hidden = exact.trunk(tokens[:, :-1], routes=routes).hidden
        for k, drafted_BSH in enumerate(exact.mtp_hidden(hidden, tokens[:, :-1])):
            probabilities = exact.lm_head(drafted_BSH)[0].softmax(-1)
            for start, end in sample.rollout.turns:
                by_layer[k].extend(-math.log(probabilities[i - 2 - k, text[i]].item()) for i in range(start, end))
    means = [sum(layer) / len(layer) for layer in by_layer]
    assert got.item() == pytest.approx(sum(means) / 2, abs=1e-4)


def test_its_gradient_reaches_the_drafting_layers_alone(student, batches):
    student.zero_grad()
    seen = view(student, batches[0], replay=True)
    mtp_loss(student, seen).backward(retain_graph=True)
    reached = Counter("mtp" in name for name, p in student.named_parameters() if p.grad is not None and p.grad.any())
    assert reached[False] == 0
    assert reached[True] > 10
    seen.token_logp().sum().backward()  # these can learn as before
    assert student.lm_head.weight.grad.any()
    assert student.model.embed_tokens.weight.grad.any()
    student.zero_grad()


PROMPT = "<|im_start|>user\na {}<|im_end|><|im_start|>assistant\n<think>\n\n</think>\n\n"


def taught(model, ahead, steps):
    """Answers a digit by those that follow it, each so far `ahead`; its MTP layers draft them."""
    tokenizer = small_tokenizer()
    rows = [PROMPT.format(n) + "".join(DIGITS[(n + ahead * i) % 10] for i in range(12)) for n in range(10)]
    tokens_BT = torch.tensor([tokenizer.encode(row) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        hidden = model.trunk(tokens_BT).hidden
        drafts = [model.lm_head(drafted) for drafted in model.mtp_hidden(hidden.detach(), tokens_BT)]
        losses = [
            torch.nn.functional.cross_entropy(logits[:, : -1 - k].flatten(0, 1), tokens_BT[:, 1 + k :].flatten())
            for k, logits in enumerate([model.logits(hidden), *drafts])
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    return model


def accept_length(model):
    """Of greedy answers."""
    tokenizer, gains = small_tokenizer(), []
    engine = Engine(model, tokenizer)
    for n in range(10):
        prompt = tokenizer.encode(PROMPT.format(n))
        answer = engine.generate([prompt], SamplingParams(max_tokens=12, temperature=0.0))[0]
        gains += replay_speculation(model, prompt, answer.tokens)
    engine.close()
    return sum(gains) / len(gains)


def test_drafts_go_on_being_accepted_while_the_model_moves():
    """To another way of counting, its teacher's."""
    start = taught(small_model(num_nextn_predict_layers=2, initializer_range=0.1), 1, 60)
    teacher = ModelTeacher(taught(copy.deepcopy(start), 3, 40), small_tokenizer())
    assert accept_length(start) > 2.5
    lengths = {}
    for weight in (0.0, 1.0):
        model = copy.deepcopy(start)
        settings = MOPDSettings(
            steps=12, lr=1e-2, alpha=0.0, groups=4, group_size=2, max_tokens=12, top=10**6, mtp_weight=weight,
            thinking=False,
        )
        train_mopd(Engine(model, small_tokenizer()), {"a": Say("a", "")}, {"a": teacher}, settings)
        lengths[weight] = accept_length(model)
    assert lengths[0.0] < 1.8
    assert lengths[1.0] > 2.2
