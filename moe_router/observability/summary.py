"""summary.json: what a finished run says about itself, in one flat object."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_router.errors import DataError
from moe_router.observability.files import write_atomic
from moe_router.observability.records import quality


def write_summary(run_dir: Path, **fields: Any) -> Path:
    """Write runs/NAME/summary.json in one piece.

    Args:
        fields: plain JSON values; a number that is not finite is written as null, for JSON has
            no NaN.

    Returns:
        The file.

    Raises:
        MoeRouterError: the disk refused.
    """
    path = run_dir / "summary.json"
    text = json.dumps(_finite(fields), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())
    return path


def read_summary(run_dir: Path) -> dict[str, Any]:
    """What `write_summary` wrote.

    Raises:
        DataError: there is none, or it is not a JSON object.
    """
    path = run_dir / "summary.json"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; want a finished run: let it end, or name another run"
        )
    return read_object(path)


def quality_of(summary: Mapping[str, Any]) -> str:
    """The held-out quality in a summary, in a few words."""
    names = ("bits_per_byte", "unigram_bits_per_byte", "accuracy", "matthews")
    return quality(*(summary.get(name) for name in names))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top is an object.

    Raises:
        DataError: it is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error}); want an object: make it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}; want an object: make it again")
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (-float("inf") < value < float("inf")):
        return None
    return value
