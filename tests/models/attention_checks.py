"""What any causal model with routed attention must hold: batches, causality, caches."""

import torch

from moe_router.models import KVCache
from tests.models.helpers import packed

VOCAB = 64
LENGTHS = [37, 1, 0, 22, 9]


def logits(model, *batch, **more):
    with torch.no_grad():
        out = model(*batch, **more)
    return out.logits_TV if hasattr(model, "vocab") else out.logits


def check_each_sequence_alone(model):
    ids, position, offsets = packed(LENGTHS, vocab=VOCAB)
    together = logits(model, ids, position, offsets)
    for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        alone = logits(model, ids[a:b], position[a:b], torch.tensor([0, b - a]))
        torch.testing.assert_close(together[a:b], alone, rtol=1e-4, atol=1e-4)


def check_causality(model):
    ids, position, offsets = packed([48], vocab=VOCAB)
    before = logits(model, ids, position, offsets)
    for cut in (5, 18, 31, 44):
        other = torch.cat([ids[:cut], ids[cut:].flip(0)])
        after = logits(model, other, position, offsets)
        torch.testing.assert_close(after[:cut], before[:cut], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(after[cut:], before[cut:])


def check_prefill_then_decode(model, prompts, page):
    """Prompts of these lengths, then one token at a time, then four: a block may begin inside."""
    ids, position, offsets = packed(LENGTHS, vocab=VOCAB)
    wanted = logits(model, ids, position, offsets)
    cache = KVCache(3, len(LENGTHS), page=page)
    got = torch.full_like(wanted, torch.nan)
    done = [0] * len(LENGTHS)
    for step in [prompts, *[[1] * 5] * 7, *[[4] * 5] * 10]:
        new = [min(n, length - at) for n, length, at in zip(step, LENGTHS, done, strict=True)]
        token = torch.cat([torch.arange(n) + int(offsets[b]) + done[b] for b, n in enumerate(new)])
        token, bounds = token.long(), torch.tensor([0, *new]).cumsum(0).int()
        got[token] = logits(model, ids[token], position[token], bounds, cache=cache)
        done = [at + n for at, n in zip(done, new, strict=True)]
    assert done == LENGTHS
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def check_leaving_and_joining(model):
    cache = KVCache(3, 2)
    ids, position, _ = packed([40], vocab=VOCAB)
    wanted = logits(model, ids, position, torch.tensor([0, 40]))
    feed = torch.cat([ids[:5], ids[:21]])
    where = torch.cat([position[:5], position[:21]])
    logits(model, feed, where, torch.tensor([0, 5, 26]), cache=cache)
    cache.keep(torch.tensor([1]))
    cache.join(1)
    feed, where = torch.cat([ids[21:30], ids[:30]]), torch.cat([position[21:30], position[:30]])
    got = logits(model, feed, where, torch.tensor([0, 9, 39]), cache=cache)
    torch.testing.assert_close(got, torch.cat([wanted[21:30], wanted[:30]]), rtol=1e-4, atol=1e-4)
    cache.join(2)
    cache.keep(torch.tensor([3, 1]))  # one leaves before a step has met it, one is kept
    feed, where = torch.cat([ids[:7], ids[30:34]]), torch.cat([position[:7], position[30:34]])
    got = logits(model, feed, where, torch.tensor([0, 7, 11]), cache=cache)
    torch.testing.assert_close(got, torch.cat([wanted[:7], wanted[30:34]]), rtol=1e-4, atol=1e-4)
    none, begun = KVCache(3, 2), torch.tensor([0, 3])
    logits(model, ids[:0], position[:0], torch.tensor([0, 0, 0]), cache=none)
    none.keep(torch.tensor([1]))
    got = logits(model, ids[:3], position[:3], begun, cache=none)
    torch.testing.assert_close(got, wanted[:3], rtol=1e-4, atol=1e-4)
