"""What a model costs, from its config alone: parameters, FLOPs, bytes.

Counted are matrix products, 2 FLOPs per multiply-add, of a dropless forward pass; training is three
times that. Halting, leaping and pruning by threshold count as if no token left: when is learned.
Not counted: norms, rotations, softmax, the sizes of merged keys, the optimizer, activations in
memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moe_router.config import Config, RebalanceConfig
from moe_router.cost_parts import Part, parts_of, rows_of

BYTE_VOCAB = 257
_TRAINED = 4  # copies of a parameter while training: itself, its gradient, two moments
_BACKWARD = 3  # forward + backward, over forward
# dense bf16 FLOP/s of the datasheets, by what the device's name contains
_PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


@dataclass(frozen=True, slots=True)
class Cost:
    """The parts of a model, and sums over them.

    Attributes:
        tokens_per_step: trained on in one optimizer step, all ranks together; a bound for
            labelled documents, which may be shorter than data.seq_len.
        equal_width: hidden width of a dense SwiGLU of the same FLOPs as an MoE layer; 0: no MoE.
        bytes_per_rank: weights, gradients and optimizer state on the fullest rank.
    """

    parts: tuple[Part, ...]
    tokens_per_step: int
    equal_width: int
    bytes_per_rank: int

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.layer for part in self.parts))

    def of_layer(self, layer: str) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.layer == layer)

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def active(self) -> int:
        """Parameters that one token meets."""
        return sum(part.active for part in self.parts)

    @property
    def flops(self) -> int:
        """Forward, per token, as routed."""
        return sum(part.flops for part in self.parts)

    @property
    def dense_flops(self) -> int:
        """Forward, per token, if every expert processed every token."""
        return sum(part.dense_flops for part in self.parts)

    @property
    def flops_per_step(self) -> int:
        """Forward and backward of one optimizer step, all ranks together."""
        return _BACKWARD * self.flops * self.tokens_per_step

    @property
    def bytes(self) -> int:
        """Of the fp32 weights, all ranks together."""
        return sum(part.bytes for part in self.parts)

    @property
    def router_parameter_share(self) -> float:
        return self._router(lambda part: part.parameters) / self.parameters

    @property
    def router_flop_share(self) -> float:
        return self._router(lambda part: part.flops) / self.flops

    def _router(self, count: Callable[[Part], int]) -> int:
        return sum(count(part) for part in self.parts if part.name == "router")


def cost(config: Config, vocab: int = BYTE_VOCAB) -> Cost:
    """The cost of the model that `config` describes.

    Args:
        vocab: ids of its tokenizer.
    """
    parts = tuple(parts_of(config, vocab))
    moe = config.model.moe
    return Cost(
        parts=parts,
        tokens_per_step=config.train.batch * config.data.seq_len,
        equal_width=0 if moe is None else round(rows_of(moe) * moe.hidden) + moe.shared_hidden,
        bytes_per_rank=_bytes_per_rank(parts, config),
    )


def _bytes_per_rank(parts: Iterable[Part], config: Config) -> int:
    """Rank 0 is the fullest: it holds an expert more where they do not divide evenly."""
    ranks, moe, held = config.cluster.actors, config.model.moe, 1.0
    share = config.cluster.expert_ranks or ranks
    if moe is not None:
        rebalance = config.cluster.rebalance or RebalanceConfig()
        held = rebalance.slots(moe.experts, share) / moe.experts
    dense = 1 / ranks if config.train.dense == "fsdp" else 1.0
    shares = (part.bytes * (held if part.name == "experts" else dense) for part in parts)
    return round(_TRAINED * sum(shares))


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, by its name; None of a CPU, or of one not in the table."""
    return next((peak for name, peak in _PEAK.items() if name in device), None)
