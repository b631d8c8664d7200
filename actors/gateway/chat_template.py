"""From messages to the text of a prompt: the chat template that comes with a checkpoint's tokenizer.

A template is Jinja source, rendered as transformers' apply_chat_template renders it; transformers itself would take a
gateway seconds to import. A test compares the two.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from expertmesh.cluster.errors import CorruptCheckpointError, InputError

if TYPE_CHECKING:
    import jinja2

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Message = Mapping[str, object]


def open_chat_template(directory: Path) -> "ChatTemplate | None":
    """Open the chat template of a checkpoint directory; return None if it has none.

    Read is chat_template.jinja, else `chat_template` of tokenizer_config.json, of several the one named "default".

    Raises:
        CorruptCheckpointError: tokenizer_config.json is damaged, or its template is no text.
    """
    config = _read_json(directory / "tokenizer_config.json")
    tokens = {**_read_json(directory / "special_tokens_map.json"), **config}
    source: object = _read_text(directory / "chat_template.jinja") or config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CorruptCheckpointError(f"{directory}: the chat template is a {type(source).__name__}, not a text")
    return ChatTemplate(source, {name: _token_text(tokens[name]) for name in _SPECIAL_TOKENS if tokens.get(name)})


class ChatTemplate:
    """A chat template and the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], variables: Mapping[str, object]) -> str:
        """Return the prompt that asks for the next message of the assistant, with all special tokens it begins with.

        Args:
            messages: each with `role` and `content`.
            variables: more that the template may look at.

        Raises:
            InputError: the template refuses these messages.
            CorruptCheckpointError: the template itself cannot be used.
        """
        import jinja2

        given = {**variables, **self._special_tokens, "messages": messages, "add_generation_prompt": True}
        try:
            return self._compiled.render(given)
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refuses these messages: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"the chat template cannot take these messages: {error}") from error

    @cached_property
    def _compiled(self) -> "jinja2.Template":
        """Compile at the first use: servers that nobody chats with need no Jinja."""
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.nodes import Node
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """Reads `{% generation %}`, with which templates mark for training what the assistant wrote."""

            tags = frozenset({"generation"})  # type: ignore[assignment]  # typed as a set; jinja reads it alone

            def parse(self, parser: Parser) -> list[Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        extensions: list[type[Extension]] = [loopcontrols, Generation]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        # Jinja's own filter escapes HTML; templates write JSON for models.
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            return environment.from_string(self._source)
        except jinja2.TemplateSyntaxError as error:
            raise CorruptCheckpointError(f"the chat template cannot be used, line {error.lineno}: {error}") from error


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _read_text(path: Path) -> str:
    """Return a file's text, empty if there is none."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise CorruptCheckpointError(f"{path} is damaged: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(_read_text(path) or "{}")
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is damaged: {error}") from error
    return content


def _token_text(token: object) -> str:
    """Return the text of a special token: written as one, or as an object with its properties."""
    return str(token["content"]) if isinstance(token, dict) else str(token)
