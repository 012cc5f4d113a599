"""The bodies of requests, and the errors: OpenAI's shapes, and personasteer's own fields beside them."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from personasteer.monitor.guard import ACTIONS, MOMENTS
from personasteer.monitor.thresholds import STATES
from personasteer.steering import SCOPES

MAX_CHOICES, MAX_STOPS, MAX_EDITS, MAX_TOP = 16, 16, 64, 20
MAX_STOP, MAX_NAME = 500, 200  # characters
MAX_SCHEMA = 2**17  # bytes
MAX_MESSAGES = 10_000

Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
Layer: TypeAlias = Annotated[int, Field(ge=0, le=10_000)]
Tokens: TypeAlias = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
Texts: TypeAlias = Annotated[list[str], Field(fail_fast=True)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Edit(Strict):
    """One edit of a named vector. `strength` is rho of "add" (in units of the stream's norm), the share of "ablate";
    `tau` is the threshold of "cap" and "floor", the vector's own where it is left out.
    """

    vector: Name
    strength: Finite | None = None
    op: Literal["add", "cap", "floor", "ablate"] = "add"
    scope: Annotated[str, Field(json_schema_extra={"enum": list(SCOPES)})] = "all"
    layers: Annotated[list[Layer], Field(min_length=1, max_length=1000)] | None = None
    tau: Finite | None = None
    keep_norm: bool = False
    start: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    stop: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    half_life: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @field_validator("scope")
    @classmethod
    def _known(cls, scope: str) -> str:
        if scope not in SCOPES:
            raise ValueError(f"must be one of {', '.join(SCOPES)}")
        return scope

    @model_validator(mode="after")
    def _goes_together(self) -> Edit:
        if self.tau is not None and self.op not in ("cap", "floor"):
            raise ValueError(f"tau goes with cap and floor, not with {self.op}")
        if self.strength is not None and self.op in ("cap", "floor"):
            raise ValueError(f"{self.op} takes no strength, but tau")
        if self.strength is None and self.op == "add":
            raise ValueError("add needs a strength")
        if self.keep_norm and self.op != "add":
            raise ValueError(f"keep_norm goes with add, not with {self.op}")
        return self


class GuardRule(Strict):
    """What is done when a trait's reading comes to a state: see personasteer.monitor.Rule."""

    vector: Name
    action: str = Field("log", json_schema_extra={"enum": list(ACTIONS)})
    on: str = Field("alarm", json_schema_extra={"enum": list(STATES[1:])})
    when: str = Field("both", json_schema_extra={"enum": list(MOMENTS)})
    strength: float = Field(0.2, gt=0, allow_inf_nan=False)
    edit: Edit | None = None
    message: str = Field("", max_length=10_000)
    tries: int = Field(2, ge=1, le=8)


Mix: TypeAlias = Annotated[list[Edit], Field(max_length=MAX_EDITS)]


class Open(BaseModel):
    """Fields that we do not know are left alone, as other servers do."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Own(Open):
    """What is personasteer's own in a request."""

    steering: Mix | None = Field(None, description="Edits; the server's own where it is left out, none where empty.")
    guard: list[GuardRule] | None = Field(None, max_length=MAX_EDITS, description="Rules; the server's by default.")
    readings: bool | Annotated[list[Name], Field(max_length=MAX_EDITS)] = Field(
        False, description="Readings of all vectors, or of the named ones."
    )
    cache_prompt: bool = Field(True, description="Take over computed prompts; rounding may then differ (llama.cpp's).")


class StreamOptions(Open):
    include_usage: bool = False


class Generation(Own):
    """What chat and plain completions have in common."""

    model: str | None = Field(None, max_length=1000)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repeat_penalty: float | None = Field(None, gt=0, le=100, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-100, le=100, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-100, le=100, allow_inf_nan=False)
    logit_bias: dict[str, Finite] | None = Field(None, max_length=4096)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    grammar: str | None = Field(None, max_length=MAX_SCHEMA, description="GBNF that the answer follows.")

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        given = [stop] if isinstance(stop, str) else stop or []
        if len(given) > MAX_STOPS or any(len(text) > MAX_STOP for text in given):
            raise ValueError(f"at most {MAX_STOPS} stop texts of {MAX_STOP} characters")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _tokens(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        for token in given or {}:
            if not token.isdecimal() or len(token) > 9:
                raise ValueError(f"{token[:40]!r} is no token id")
        return given

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self) -> dict[str, Any]:
        """As Session.submit takes them."""
        named = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "frequency_penalty", "presence_penalty")
        given = {name: value for name in named if (value := getattr(self, name)) is not None}
        given["stop"] = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        if self.logit_bias:
            given["logit_bias"] = {int(k): -math.inf if v <= -100 else v for k, v in self.logit_bias.items()}
        if self.grammar is not None:
            given["grammar"] = self.grammar
        if not self.cache_prompt:
            given["reuse_cache"] = False
        return given


class TextPart(Open):
    type: str
    text: str | None = None


class FunctionCall(Open):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Open):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Open):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Open):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Open):
    type: Literal["function"]
    function: Function


class ToolChoiceFunction(Open):
    name: str


class ToolChoice(Open):
    type: Literal["function"]
    function: ToolChoiceFunction


class JsonSchema(Open):
    name: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(Open):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="llama.cpp's place for a schema.")


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _small_schemas(self) -> ChatRequest:
        """Grammars are made where everybody's answers are computed."""
        for given in (self.response_format, *(self.tools or ())):
            if given is not None and len(given.model_dump_json()) > MAX_SCHEMA:
                raise ValueError(f"a schema or a tool is larger than {MAX_SCHEMA:,} bytes")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs or self.top_logprobs)


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | Texts | Tokens = Field(max_length=2**24)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class SteeringBody(Strict):
    """POST /v1/steering: what requests without `steering` of their own get from now on."""

    steering: Mix


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorBody


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers
        self.kind = kind or KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


KINDS = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable"}
