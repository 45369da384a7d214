"""Chat templates: conversation to prompt text, rendered as transformers renders it, in a sandbox.

jinja2 (extra ``[chat]``) is imported only when a template is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from gemini.errors import RequestError

if TYPE_CHECKING:
    from jinja2 import Template

Messages = Sequence[Mapping[str, Any]]
TEMPLATE_NAME = "chat_template.jinja"
_OLDEST_JINJA = (3, 1, 6)  # older releases have known ways out of the sandbox


def compile_template(source: str) -> Template:
    """Compile a chat template; RequestError if jinja2 is missing or too old, or the template is malformed."""
    try:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise RequestError(
            "Chat prompts need jinja2, which is not installed.", "Run pip install 'gemini-edge[chat]'."
        ) from error
    from importlib.metadata import version

    if tuple(int(part) for part in version("jinja2").split(".")[:3] if part.isdigit()) < _OLDEST_JINJA:
        raise RequestError("The installed jinja2 has a leaky sandbox.", "Run pip install 'jinja2>=3.1.6'.")

    class Generation(Extension):
        """``{% generation %}`` marks assistant text for training; here its body is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an instance variable)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise RequestError(
            f"The bundle's chat template is malformed ({error}).", "Use it without a chat prompt."
        ) from error


def render_chat(
    template: Template,
    messages: Messages,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
) -> str:
    """The prompt text of a conversation ``[{"role": "user", "content": "…"}, …]``.

    ``special_tokens`` are the template's ``bos_token``, ``eos_token`` … The text already holds all special
    tokens, so encode it with ``special_tokens=False``. RequestError if the template refuses the conversation.
    """
    conversation = _checked(messages)
    try:
        return template.render(
            messages=conversation,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except (
        Exception
    ) as error:  # a template can raise anything: undefined names, type errors, its own refusals
        raise RequestError(
            f"The chat template refuses this conversation ({error}).", "Check its roles and their order."
        ) from error


def _checked(messages: Messages) -> list[dict[str, Any]]:
    valid = isinstance(messages, Sequence) and len(messages) > 0
    if not valid or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
        raise RequestError(
            "The conversation is not a list of messages.", "Give {'role': …, 'content': …} items."
        )
    return [dict(message) for message in messages]


def _raise_exception(message: object) -> None:
    from jinja2 import TemplateError

    raise TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own filter escapes HTML; prompts must not be escaped."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
