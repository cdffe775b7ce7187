"""What requests may hold: the fields of OpenAI's API, and those that vLLM adds."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jax_lora.messages import printable, shown
from jax_lora.serving.server.errors import ApiError

# They say who asks, or what for; they change no answer.
_NOTES = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)
# OpenAI's default of each, which asks for nothing.
_NEUTRAL: dict[str, object] = {"best_of": 1, "repetition_penalty": 1, "tool_choice": "none"}


class _Body(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Body):
    """`include_usage`: a last event tells how many tokens there were."""

    include_usage: bool = False


class AskBody(_Body):
    """What completions and chats have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    n: int = Field(1, ge=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: object) -> object:
        return (
            {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        stop = self.stop or ()
        return (stop,) if isinstance(stop, str) else tuple(stop)


class CompletionBody(AskBody):
    """Asks `/v1/completions`. A prompt is text or tokens; several are answered in their order."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        return [tokens] if tokens else [p for p in self.prompt if not isinstance(p, int)]


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A message of a conversation; a list of parts counts as their text, one behind the other."""

    role: str
    content: Annotated[str | list[TextPart], Field(union_mode="left_to_right")]

    @property
    def plain(self) -> dict[str, object]:
        """For the chat template."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        return {"role": self.role, "content": "".join(part.text for part in self.content)}


class ChatBody(AskBody):
    """Asks `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0)


class LoadBody(_Body):
    """Asks `/v1/load_lora_adapter`, as vLLM has it."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadBody(_Body):
    """Asks `/v1/unload_lora_adapter`."""

    lora_name: str


def parsed[T: _Body](kind: type[T], data: bytes) -> T:
    """A body of this kind.

    Raises:
      ApiError: 400; it is malformed, or asks for what the server does not do.
    """
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or None
        got = (
            "" if first["type"] in ("missing", "json_invalid") else f", got {shown(first['input'])}"
        )
        message = f"{where or 'the body'}: {first['msg']}{got}"
        raise ApiError(400, message, param=where and printable(where)) from None
    for name, value in (body.model_extra or {}).items():
        if name not in _NOTES and value and value != _NEUTRAL.get(name):
            raise ApiError(
                400,
                f"{shown(name)} is not supported, got {shown(value)}; leave it out",
                param=printable(name),
                code="unsupported_parameter",
            )
    return body
