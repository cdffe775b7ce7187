"""Chat templates: what a model that was trained on conversations is to be asked."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jax_lora.adapters import read_json, refuse_pointer
from jax_lora.adapters.files import open_file, read_bounded
from jax_lora.messages import printable, shown
from jax_lora.models.families import Json

_TOKENIZER = "tokenizer_config.json"
_MAX_TEMPLATE_BYTES = 1 << 20


def chat_prompt(folder: str | os.PathLike[str], messages: Sequence[Mapping[str, object]]) -> str:
    """A conversation as the text that the model continues with its answer.

    It holds the special tokens, so encode it without adding any: `encode(tokenizer, [prompt],
    special_tokens=False)`.

    Example::

        chat_prompt(folder, [{"role": "user", "content": "Good morning"}])

    Args:
      folder: of the model; its template is in `chat_template.jinja` or `tokenizer_config.json`.
      messages: each with a `role` and a `content`, as in OpenAI's API.

    Raises:
      FileNotFoundError: the model has no template.
      ValueError: a file is malformed, or the template refuses the messages.
    """
    return ChatTemplate(folder).prompt(messages)


class ChatTemplate:
    """A model's chat template, read and compiled once, when the first prompt is asked for.

    Args:
      folder: as in `chat_prompt`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)

    @functools.cached_property
    def _compiled(self) -> tuple[Template, dict[str, str]]:
        """The template, and the special tokens that it may name."""
        has_config = (self._folder / _TOKENIZER).exists()
        config = read_json(self._folder, _TOKENIZER) if has_config else {}
        text = _template(self._folder, config)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        environment.filters["tojson"] = _to_json
        try:
            return environment.from_string(text), _special_tokens(config)
        except Exception as error:
            raise self._failure(error) from None

    def prompt(self, messages: Sequence[Mapping[str, object]]) -> str:
        """As `chat_prompt`, which says what is raised."""
        template, tokens = self._compiled
        try:
            return template.render(messages=messages, add_generation_prompt=True, **tokens)
        except Exception as error:  # a template is a program, and fails in any way
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> ValueError:
        return ValueError(
            f"the chat template of {printable(self._folder)} fails: {type(error).__name__}: "
            f"{printable(str(error))}"
        )


def _template(folder: Path, config: Json) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        with open_file(file, allow_links=True) as stream:
            data = read_bounded(stream, file, _MAX_TEMPLATE_BYTES)
        refuse_pointer(data, file)
        return data.decode(errors="replace")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    if found is None:
        raise FileNotFoundError(
            f"{printable(folder)} has no chat template, in neither {file.name} nor {_TOKENIZER}; "
            "give its prompts as plain text, or take the model that was trained on conversations"
        )
    if not isinstance(found, str):
        raise ValueError(
            f"{printable(folder / _TOKENIZER)}: chat_template must be text, got {shown(found)}"
        )
    return found


def _special_tokens(config: Json) -> dict[str, str]:
    """Those that a template may name, such as `bos_token`."""
    texts = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in config.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _refuse(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: object, indent: int | None = None) -> str:
    # Not Jinja's own, which writes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)
