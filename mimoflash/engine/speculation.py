"""What MTP layers would save: greedy speculation replayed over text that the model has generated greedily."""

from collections.abc import Sequence

import torch

from mimoflash.model import Transformer


@torch.inference_mode()
def replay_speculation(model: Transformer, prompt: Sequence[int], generated: Sequence[int]) -> list[int]:
    """Tokens gained at each verification (1 to MTP layers + 1), were `generated` decoded with all MTP layers drafting.

    `generated` is the model's own greedy continuation of `prompt`. A draft counts if it is the token that came and all
    drafts before it did: then the layer has seen the real tokens, so one pass over the whole text shows them all.
    """
    tokens = torch.tensor([[*prompt, *generated]], device=model.lm_head.weight.device)
    drafts = [logits[0].argmax(-1).tolist() for logits in model.mtp_logits(tokens)]
    text, gains = tokens[0].tolist(), []
    place = len(prompt) - 1  # the trunk has run here and named the token at place + 1
    while place + 1 < len(text):
        gained = 1
        while gained <= len(drafts) and place + 1 + gained < len(text):
            if drafts[gained - 1][place] != text[place + 1 + gained]:
                break
            gained += 1
        gains.append(gained)
        place += gained
    return gains
