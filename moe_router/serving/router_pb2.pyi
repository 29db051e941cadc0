from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Matrix(_message.Message):
    __slots__ = ("rows", "columns", "float32", "bfloat16", "int32")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    FLOAT32_FIELD_NUMBER: _ClassVar[int]
    BFLOAT16_FIELD_NUMBER: _ClassVar[int]
    INT32_FIELD_NUMBER: _ClassVar[int]
    rows: int
    columns: int
    float32: bytes
    bfloat16: bytes
    int32: bytes
    def __init__(self, rows: _Optional[int] = ..., columns: _Optional[int] = ..., float32: _Optional[bytes] = ..., bfloat16: _Optional[bytes] = ..., int32: _Optional[bytes] = ...) -> None: ...

class WatchSnapshotRequest(_message.Message):
    __slots__ = ("after_epoch", "with_weights")
    AFTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    WITH_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    after_epoch: int
    with_weights: bool
    def __init__(self, after_epoch: _Optional[int] = ..., with_weights: _Optional[bool] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("epoch", "step", "placements", "capacity_factor", "alive", "load_LE", "routers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FACTOR_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    LOAD_LE_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    placements: _containers.RepeatedCompositeFieldContainer[Placement]
    capacity_factor: float
    alive: _containers.RepeatedScalarFieldContainer[int]
    load_LE: Matrix
    routers: _containers.RepeatedCompositeFieldContainer[RouterWeights]
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., placements: _Optional[_Iterable[_Union[Placement, _Mapping]]] = ..., capacity_factor: _Optional[float] = ..., alive: _Optional[_Iterable[int]] = ..., load_LE: _Optional[_Union[Matrix, _Mapping]] = ..., routers: _Optional[_Iterable[_Union[RouterWeights, _Mapping]]] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("every_ms",)
    EVERY_MS_FIELD_NUMBER: _ClassVar[int]
    every_ms: int
    def __init__(self, every_ms: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("epoch", "step", "alive", "routers", "load_LE", "skew_L")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    LOAD_LE_FIELD_NUMBER: _ClassVar[int]
    SKEW_L_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    alive: _containers.RepeatedScalarFieldContainer[int]
    routers: _containers.RepeatedScalarFieldContainer[str]
    load_LE: Matrix
    skew_L: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., alive: _Optional[_Iterable[int]] = ..., routers: _Optional[_Iterable[str]] = ..., load_LE: _Optional[_Union[Matrix, _Mapping]] = ..., skew_L: _Optional[_Iterable[float]] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("experts", "ranks")
    class Rank(_message.Message):
        __slots__ = ("experts",)
        EXPERTS_FIELD_NUMBER: _ClassVar[int]
        experts: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, experts: _Optional[_Iterable[int]] = ...) -> None: ...
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    experts: int
    ranks: _containers.RepeatedCompositeFieldContainer[Placement.Rank]
    def __init__(self, experts: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[Placement.Rank, _Mapping]]] = ...) -> None: ...

class RouterWeights(_message.Message):
    __slots__ = ("model", "layer", "dim", "config_json", "safetensors")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    SAFETENSORS_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    dim: int
    config_json: str
    safetensors: bytes
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ..., dim: _Optional[int] = ..., config_json: _Optional[str] = ..., safetensors: _Optional[bytes] = ...) -> None: ...

class ReportLoadRequest(_message.Message):
    __slots__ = ("rank", "epoch", "load_LE")
    RANK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOAD_LE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    epoch: int
    load_LE: Matrix
    def __init__(self, rank: _Optional[int] = ..., epoch: _Optional[int] = ..., load_LE: _Optional[_Union[Matrix, _Mapping]] = ...) -> None: ...

class ReportLoadReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("rank",)
    RANK_FIELD_NUMBER: _ClassVar[int]
    rank: int
    def __init__(self, rank: _Optional[int] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class RouteRequest(_message.Message):
    __slots__ = ("model", "layer", "epoch", "x_TD", "offsets_B1")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    X_TD_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_B1_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    epoch: int
    x_TD: Matrix
    offsets_B1: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ..., epoch: _Optional[int] = ..., x_TD: _Optional[_Union[Matrix, _Mapping]] = ..., offsets_B1: _Optional[_Iterable[int]] = ...) -> None: ...

class RouteReply(_message.Message):
    __slots__ = ("epoch", "target_TK", "weight_TK", "position_TK", "capacity", "losses", "rows_E")
    class LossesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TARGET_TK_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_TK_FIELD_NUMBER: _ClassVar[int]
    POSITION_TK_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    ROWS_E_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    target_TK: Matrix
    weight_TK: Matrix
    position_TK: Matrix
    capacity: int
    losses: _containers.ScalarMap[str, float]
    rows_E: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., target_TK: _Optional[_Union[Matrix, _Mapping]] = ..., weight_TK: _Optional[_Union[Matrix, _Mapping]] = ..., position_TK: _Optional[_Union[Matrix, _Mapping]] = ..., capacity: _Optional[int] = ..., losses: _Optional[_Mapping[str, float]] = ..., rows_E: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model", "text", "tokens", "max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "compute_budget")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_BUDGET_FIELD_NUMBER: _ClassVar[int]
    model: str
    text: str
    tokens: TokenIds
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    compute_budget: float
    def __init__(self, model: _Optional[str] = ..., text: _Optional[str] = ..., tokens: _Optional[_Union[TokenIds, _Mapping]] = ..., max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., compute_budget: _Optional[float] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("text", "tokens", "finish_reason", "prompt_tokens", "completion_tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    def __init__(self, text: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ...) -> None: ...

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthReply(_message.Message):
    __slots__ = ("ok", "reason", "model")
    OK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    reason: str
    model: str
    def __init__(self, ok: _Optional[bool] = ..., reason: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...
