"""YAML, but nothing is lost in silence and every error is one line."""

from collections.abc import Hashable
from typing import Any

import yaml

from moe_router.errors import ConfigError


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document.

    Args:
        where: what an error line starts with; the line number follows.

    Raises:
        ConfigError: it is not YAML, or a mapping has a key twice.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{at}: {error.problem}; want valid YAML") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # "\\0"; 2026-02-31; [[[[...
        raise ConfigError(f"{where}: {' '.join(str(error).split())}; want valid YAML") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML would let the last of two equal keys win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"found key '{key.value}' twice, first on line {lines[key.value]}",
                    problem_mark=key.start_mark,
                )
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)
