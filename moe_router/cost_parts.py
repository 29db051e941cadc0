"""The parts of a model, layer by layer: what each holds, and what a token costs there."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe_router.config import (
    AttentionConfig,
    Config,
    ModelConfig,
    MoEConfig,
    RouterKind,
    RoutingConfig,
)
from moe_router.config_attention import FEATURES

BYTES = 4  # fp32: what weights, gradients and AdamW's moments are kept in, bf16 or not


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix-product part of one layer.

    Attributes:
        layer: "embed", "0", "1", ..., "head".
        name: "embed", "attention", "norms", "router", "experts", "shared", "mlp" or "head".
        parameters: held by all ranks together.
        active: of them, those that one token meets.
        flops: forward, per token.
        dense_flops: the same if every expert processed every token, and every block.
    """

    layer: str
    name: str
    parameters: int
    active: int
    flops: int
    dense_flops: int

    @property
    def bytes(self) -> int:
        """Of the fp32 weights."""
        return BYTES * self.parameters


def parts_of(config: Config, vocab: int) -> Iterator[Part]:
    """Every part of the model that `config` describes, from the embedding to the head."""
    model = config.model
    D = model.dim
    tied = model.kind == "causal_lm" and model.tie_embeddings
    # a tied matrix is held here and met at the head
    yield _embedding(config, vocab, met=not tied)
    staying = 1.0  # of the tokens, after what was pruned
    for step in range(model.steps):
        for part in _parts_of_step(step, config, staying):
            yield part if step < model.layers else replace(part, parameters=0, active=0)
        staying *= _stays(step, model)
    yield Part("head", "norms", D, D, 0, 0)
    if model.kind != "causal_lm":
        yield _label_head(D, len(config.data.labels), config.data.seq_len)
    else:
        own, flops = 0 if tied else vocab * D, 2 * vocab * D
        yield Part("head", "head", own, vocab * D, flops, flops)


def _parts_of_step(step: int, config: Config, staying: float) -> Iterator[Part]:
    """A block, and what decides there. staying: share of the tokens that come to it."""
    model, layer = config.model, str(step)
    i, routing = step % model.layers, model.routing
    share = staying * (routing.keep if routing and model.routes(i, "skip") else 1.0)
    merges = routing if model.routes(i, "merge") else None
    yield from _block_of_some(step, config, share, share * merges.keep if merges else share)
    if merges is not None:
        yield _match(layer, config, merges, staying)
    leaves = step < model.steps - 1 and (model.routes(i, "prune") or model.routes(i, "halt"))
    chooses = leaves or model.routes(i, "skip") or model.routes(i, "leap")
    if routing is not None and chooses:
        yield _depth_router(layer, config, routing, staying)


def _stays(step: int, model: ModelConfig) -> float:
    """Share of the tokens that are left after a step."""
    routing, i = model.routing, step % model.layers
    if routing is None:
        return 1.0
    pruned = step < model.steps - 1 and model.routes(i, "prune") and routing.decide == "top"
    return routing.keep if pruned or model.routes(i, "merge") else 1.0


def _embedding(config: Config, vocab: int, *, met: bool) -> Part:
    """Rows of a table that tokens look up, or a product for the values of a patch."""
    D, image = config.model.dim, config.data.image
    if image is None:
        return Part("embed", "embed", vocab * D, D if met else 0, 0, 0)
    weights = image.values * D
    return Part("embed", "embed", weights + D, weights + D, 2 * weights, 2 * weights)


def _label_head(D: int, labels: int, seq_len: int) -> Part:
    """Once for each document: its tokens share what it costs."""
    both, flops = D * labels + labels, round(2 * D * labels / seq_len)
    return Part("head", "head", both, both, flops, flops)


def _block(layer: str, index: int, model: ModelConfig, seq_len: int) -> Iterator[Part]:
    yield _attention(layer, index, model, seq_len)
    routed = model.attends(index)
    if routed is not None and routed.clustered and routed.cluster_score is not None:
        groups = model.kv_heads * routed.clusters
        both, _ = _score(routed.cluster_score, model.dim, groups, FEATURES)
        yield Part(layer, "router", both, both, 2 * both, 0)
    yield Part(layer, "norms", 2 * model.dim, 2 * model.dim, 0, 0)
    if model.moe is not None and model.is_moe(index):
        yield from _moe(layer, model.dim, model.moe)
    else:
        yield _dense(layer, "mlp", model.dim, model.hidden)


def _block_of_some(index: int, config: Config, share: float, fed: float) -> Iterator[Part]:
    """The parts of a block that computes a share of the tokens, which see only each other, and
    feeds forward a share that may be smaller."""
    S = config.data.seq_len
    whole, short = (_block(str(index), index, config.model, n) for n in (S, round(share * S)))
    for part, computed in zip(whole, short, strict=True):
        of = share if part.name == "attention" else fed
        yield replace(part, flops=round(of * computed.flops))


def _match(layer: str, config: Config, routing: RoutingConfig, share: float) -> Part:
    """Each second token of a sequence beside each other one; a control has a score of its own."""
    model = config.model
    assert routing.router != "attention"  # the config refuses it
    channels, seen, weights = model.channels, share * config.data.seq_len, 0
    if routing.frozen or routing.router == "position":
        weights, _ = _score(routing.router, model.dim, channels, routing.router_hidden)
    flops = share * (channels * seen / 2 + 2 * weights)
    return Part(layer, "router", weights, weights, round(flops), 0)


def _depth_router(layer: str, config: Config, routing: RoutingConfig, share: float) -> Part:
    D = config.model.dim
    if routing.router == "attention":  # scores of each token for each other one, once more
        return Part(layer, "router", 1, 1, round(2 * D * share * share * config.data.seq_len), 0)
    weights, biases = _score(routing.router, D, 1, routing.router_hidden)
    if routing.kind == "skip" and routing.predictor == "mlp":
        more, bias = _score("mlp", D, 1, routing.router_hidden)
        weights, biases = weights + more, biases + bias + 1
    both = weights + biases + 1
    return Part(layer, "router", both, both, round(2 * share * weights), 0)


def _score(kind: RouterKind, D: int, groups: int, hidden: int) -> tuple[int, int]:
    """(weights, biases) of a router's score."""
    match kind:
        case "linear":
            return D * groups, 0
        case "mlp":
            return D * hidden + hidden * groups, hidden
        case "position":
            return 2 * hidden * groups, 0


def _attention(layer: str, index: int, model: ModelConfig, seq_len: int) -> Part:
    """A causal token looks at (seq_len + 1) / 2 tokens on average, an encoder's at all seq_len;
    fewer where documents end, and where attention is routed."""
    D, causal, routed = model.dim, model.kind == "causal_lm", model.attends(index)
    width, kv_width = model.channels * model.heads, model.channels * model.kv_heads
    weights = 2 * D * width + 2 * D * kv_width
    pairs = seq_len * (seq_len + 1) // 2 if causal else seq_len**2
    sums = 4 * width / max(seq_len, 1)  # scores and sums: 2 * 2 * width for each token seen
    dense = 2 * weights + round(sums * pairs)
    flops = dense
    if routed is not None and routed.clustered:
        flops = 2 * weights + round(sums * _pairs_clustered(routed, seq_len))
    elif routed is not None:
        blocks = -(-seq_len // routed.block)
        choosing = routed.choosing(blocks, blocks, kv_width, blocks)
        choosing = choosing if blocks > routed.top_k else 0
        seen = _pairs_seen(routed, seq_len, causal=causal)
        flops += round(sums * (seen - pairs) + choosing / max(seq_len, 1))
    return Part(layer, "attention", weights, weights, flops, dense)


def _pairs_clustered(routed: AttentionConfig, seq_len: int) -> int:
    """The same inside clusters that are equally full, with the window and the global tokens: a
    token of place t has t before it, of which 1 / C are of its cluster."""
    before = range(seq_len)
    near = sum(min(t, routed.window) + min(routed.global_tokens, max(0, t - routed.window))
               for t in before)  # fmt: skip
    return round(seq_len + sum(before) / routed.clusters + near * (1 - 1 / routed.clusters))


def _pairs_seen(routed: AttentionConfig, seq_len: int, *, causal: bool) -> int:
    """Queries and keys of a sequence that attend to each other."""
    whole, rest = divmod(seq_len, routed.block)
    sizes = [routed.block] * whole + [rest] * (rest > 0)
    if not causal:
        return sum(size * min(seq_len, routed.top_k * routed.block) for size in sizes)
    return sum(
        min(n, routed.top_k - 1) * routed.block * size + size * (size + 1) // 2
        for n, size in enumerate(sizes)
    )


def _moe(layer: str, D: int, moe: MoEConfig) -> Iterator[Part]:
    groups = moe.experts + moe.null_experts
    weights, biases = _score(moe.router, D, groups, moe.router_hidden)
    both = weights + biases
    yield Part(layer, "router", both, both, 2 * weights, 2 * weights)
    one, rows = 3 * D * moe.hidden, rows_of(moe)
    experts = moe.experts * one
    yield Part(layer, "experts", experts, round(rows * one), round(2 * rows * one), 2 * experts)
    if moe.shared_hidden:
        yield _dense(layer, "shared", D, moe.shared_hidden)


def _dense(layer: str, name: str, D: int, hidden: int) -> Part:
    weights = 3 * D * hidden
    return Part(layer, name, weights, weights, 2 * weights, 2 * weights)


def rows_of(moe: MoEConfig) -> float:
    """Rows per token and layer: top_k, less what null experts take, which no config knows."""
    if moe.policy == "top_k":
        return moe.top_k
    return min(moe.experts, moe.top_k * (moe.capacity_factor or 1.0))
