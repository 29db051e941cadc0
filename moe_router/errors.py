"""Every error this project raises on purpose. One line says where, got, wanted and the fix.

MoeRouterError
├── ConfigError       a YAML file, a flag or an argument is wrong; change it
├── DataError         a data file is missing, empty, corrupt, or cannot be downloaded
├── CheckpointError   a checkpoint is truncated, foreign, or could not be written
├── NotCausalError    generate was asked of a model whose routing looks at later tokens
├── NonFiniteError    the loss or a gradient became NaN or infinite
├── WorkerLostError   another rank died or stopped answering; the group must be formed anew
├── GatingError       the gating service was asked something it cannot answer
│   ├── UnknownRouterError  no router is registered under that model and layer
│   └── StaleEpochError     what ranks share has changed since; take the new snapshot
├── QueueFullError    too many requests wait; ask again after retry_after_s
└── ClusterError      Ray could not give what was asked, or too many actors were lost
"""


class MoeRouterError(Exception):
    """Base class: `except MoeRouterError` catches only what we raised."""


class ConfigError(MoeRouterError, ValueError):
    pass


class DataError(MoeRouterError, ValueError):
    pass


class CheckpointError(MoeRouterError, RuntimeError):
    pass


class NotCausalError(MoeRouterError, RuntimeError):
    pass


class NonFiniteError(MoeRouterError, ArithmeticError):
    pass


class WorkerLostError(MoeRouterError, RuntimeError):
    pass


class GatingError(MoeRouterError, ValueError):
    pass


class UnknownRouterError(GatingError):
    pass


class StaleEpochError(GatingError):
    pass


class QueueFullError(MoeRouterError, RuntimeError):
    retry_after_s = 1  # about what a short answer takes


class ClusterError(MoeRouterError, RuntimeError):
    pass


def require(holds: bool, key: str, got: object, want: str) -> None:
    """Refuse a value in one line: which key, what it is, what it must be."""
    if not holds:
        raise ConfigError(f"{key}={got}: want {want}")
