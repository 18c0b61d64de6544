import pytest
import torch

from mimoflash.benchmarks.cuda_check import Generation, make_model, make_runner, prompts
from mimoflash.config import ModelConfig


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_its_greedy_loop_gives_the_tokens_of_the_model_alone(drafts):
    config = ModelConfig.tiny(vocab_size=3, initializer_range=0.3)  # few tokens: a third of the drafts is right
    model = make_model(config, torch.float32, torch.device("cpu"), mtp_layers=3)
    texts = [text[: 4 + 9 * i] for i, text in enumerate(prompts(config, 3, 30))]
    run = Generation(make_runner(model, drafts, 80, graphs=True), texts, chunk=7)
    found = run.greedy(12)
    for text, own in zip(texts, found, strict=True):
        tokens = list(text)
        with torch.no_grad():
            for _ in own:
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert own == tokens[len(text) :]
