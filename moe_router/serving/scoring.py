"""How likely tokens were: what OpenAI calls logprobs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_router.serving.requests import Score


def score(logits_NV: Tensor, tokens: Sequence[int], top: int) -> list[Score]:
    """Each token under the logits that it was, or could have been, drawn from.

    Args:
        logits_NV: fp32.
        top: likeliest tokens to name, ties by the lower id.
    """
    if not tokens:
        return []
    logprob_NV = logits_NV.log_softmax(-1)
    token_N1 = torch.tensor(tokens, device=logits_NV.device)[:, None]
    own = logprob_NV.gather(1, token_N1)[:, 0].tolist()
    best = logprob_NV.sort(dim=-1, descending=True, stable=True)
    values, ids = best.values[:, :top].tolist(), best.indices[:, :top].tolist()
    return [
        Score(token, logprob, tuple(zip(row_ids, row_values, strict=True)))
        for token, logprob, row_ids, row_values in zip(tokens, own, ids, values, strict=True)
    ]


def score_prompt(logits_NV: Tensor, prompt: Sequence[int], held: int, top: int) -> list[Score]:
    """Tokens of a prompt under the ones before them; nothing stands before the first.

    Args:
        logits_NV: after tokens held, held + 1, ... of it.
    """
    first = [Score(prompt[0], None, ())] if held == 0 else []
    following = prompt[held + 1 : held + 1 + len(logits_NV)]
    return first + score(logits_NV[: len(following)], following, top)
