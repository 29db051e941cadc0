"""What passes between the fronts, the engine and the ranks: immutable, and cheap to send."""

from dataclasses import dataclass
from typing import Literal

from moe_router.models import Sampling

Finish = Literal["", "stop", "length"]
Path = tuple[tuple[int, ...] | None, ...]
"""What computed one token: by block its experts, () where the block is dense, None where the token
passed it by."""
STOPS, STOP_CHARACTERS = 4, 256  # most texts that end an answer: each is looked for at every token


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What a client wants; None leaves the run's own `serve` value.

    Attributes:
        prompts: texts or token ids; each is continued by itself.
        seed: None draws one, so that equal prompts get different texts.
        stop: texts that end a completion and are not part of it.
        trace: say what computed each token; costs a wait for the device in every pass.
        logprobs: how many likeliest tokens to tell beside each token's own log-probability; None
            tells of neither.
        echo: the answer begins with the prompt, and so do the log-probabilities; then max_tokens
            may be 0.
        messages: a conversation, role and content, in the place of prompts; the checkpoint's chat
            template makes one of it.
        compute_budget: from the least that the model's routers in depth can compute (0) to the most
            (1), in hundredths; None: as trained.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    trace: bool = False
    logprobs: int | None = None
    echo: bool = False
    messages: tuple[tuple[str, str], ...] = ()
    compute_budget: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a token was, in nats, before temperature, top_k and top_p.

    Attributes:
        logprob: None for the first token of a prompt.
        top: the likeliest tokens there, and their log-probabilities.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Said:
    """A `Score` whose tokens are texts."""

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """What one pass did for one sequence.

    Attributes:
        paths: of the tokens that were read: the whole prompt first, then the token made before.
        executed, dense: FLOPs of the rank's pass, and of one in which every token takes every
            block and expert; all sequences of the rank together.
    """

    paths: tuple[Path, ...]
    executed: int
    dense: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the answer to one prompt of an `Ask`.

    Attributes:
        index: of the prompt.
        text: whole characters only; may be empty.
        tokens: what was made since the piece before.
        finish: empty until the last piece of a prompt.
        prompt_tokens: of the prompt, its separator among them.
        made: tokens of this prompt's answer so far.
        trace: if it was asked for.
        said: likewise, of the tokens made, and of the prompt's before them if it is echoed.
        known: tokens of the prompt that a rank remembered.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    made: int
    trace: Trace | None = None
    said: tuple[Said, ...] = ()
    known: int = 0


@dataclass(frozen=True, slots=True)
class Health:
    """Attributes:
    reason: why not; empty when ok.
    """

    ok: bool
    reason: str
    model: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What the page shows of a served model.

    Attributes:
        experts: by block, how many; 0 where it is dense.
        homes: by expert, the ranks that hold a copy.
        routing: how blocks are routed in depth, or nothing.
    """

    model: str
    experts: tuple[int, ...]
    homes: tuple[tuple[int, ...], ...]
    ranks: int
    routing: str


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence, as a rank takes it.

    Attributes:
        id: unique in the engine.
        prompt: token ids, at least one.
        made: tokens that another generation of ranks has made already.
        trace, logprobs: as in `Ask`.
        echo: score the prompt too.
        reads_only: end after the prompt, without a token.
        shift: of the routers in depth; what its compute budget comes to.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    made: tuple[int, ...] = ()
    trace: bool = False
    logprobs: int | None = None
    echo: bool = False
    reads_only: bool = False
    shift: float = 0.0

    @property
    def reads_all(self) -> bool:
        """Whether something is told of each token of the prompt, so that all have to be read."""
        return self.trace or (self.echo and self.logprobs is not None)

    @property
    def cost(self) -> int:
        """Most cache slots it will take."""
        return len(self.prompt) + self.sampling.max_new_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """What one rank does in one pass, beside a token for each sequence that it holds.

    Attributes:
        admit: sequences that begin.
        drop: ids of sequences that nobody waits for any more.
        read: most tokens of prompts; what is left of them waits for the next pass.
    """

    admit: tuple[Request, ...] = ()
    drop: tuple[int, ...] = ()
    read: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Event:
    """What one pass came to for one sequence.

    Attributes:
        token: None when the stop token was drawn, which is no part of the text.
        finish: not empty once the rank has let the sequence go.
        known: tokens of the prompt that were not read, for they were remembered; told with the
            first token.
    """

    id: int
    token: int | None
    finish: Finish
    trace: Trace | None = None
    scores: tuple[Score, ...] = ()
    known: int = 0
