"""A conversation to token ids, by the template that came with the checkpoint's tokenizer.

A template is a program of the checkpoint: it runs in jinja's sandbox, and sees the messages alone.
Clients cannot write special tokens: a message that holds the text of one is refused, or it would
speak for somebody else.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_router.errors import ConfigError
from moe_router.training.data import FileTokenizer, Tokenizer

TEMPLATE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
Message = tuple[str, str]  # role, content
_MOST = 1 << 22  # characters that a template may write


class Chat:
    """Args:
    tokenizer: of the model.
    source: the template.
    settings: of the tokenizer, by which templates ask for its tokens.
    """

    def __init__(self, tokenizer: FileTokenizer, source: str, settings: Mapping[str, Any]) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._tokenizer = tokenizer
        names = [name for name in settings if name.endswith("_token")]
        self._tokens = {name: _text(settings[name]) for name in names if settings[name]}
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the chat template of the tokenizer: {error}") from None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Chat":
        """Raises ConfigError: the tokenizer has no template."""
        refusal = "the model was not made for chat: {}; ask /v1/completions for text instead"
        if not isinstance(tokenizer, FileTokenizer):
            raise ConfigError(refusal.format("its tokenizer is bytes, without a chat template"))
        folder = tokenizer.path.parent
        settings = _settings(folder / SETTINGS)
        file, inside = folder / TEMPLATE, settings.get("chat_template")
        if isinstance(inside, list):  # several by name
            inside = next((one["template"] for one in inside if one["name"] == "default"), None)
        source = file.read_text("utf-8") if file.is_file() else inside
        if not source:
            want = f"no {TEMPLATE} and no chat_template in {SETTINGS} beside its tokenizer"
            raise ConfigError(refusal.format(want))
        return cls(tokenizer, source, settings)

    @property
    def stop(self) -> tuple[str, ...]:
        """The text of the token that ends a turn, if the settings name it."""
        return tuple(text for name, text in self._tokens.items() if name == "eos_token")

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of a conversation, up to where the assistant's answer begins.

        Raises:
            ConfigError: a message holds a special token, or the template refuses the conversation.
        """
        from jinja2 import TemplateError

        for i, (_, content) in enumerate(messages):
            found = next((one for one in self._tokenizer.special if one in content), None)
            if found is not None:
                raise ConfigError(
                    f"messages.{i}.content holds {found}, which means something to the model: "
                    "want text without special tokens"
                )
        said = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self._template.render(messages=said, add_generation_prompt=True, **self._tokens)
        except TemplateError as error:
            raise ConfigError(f"messages: the chat template refuses them: {error}") from None
        if len(text) > _MOST:
            raise ConfigError(f"messages: {len(text)} characters, want at most {_MOST}")
        return tuple(self._tokenizer.encode_special(text))


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; want the settings of a tokenizer") from None
    return found


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
