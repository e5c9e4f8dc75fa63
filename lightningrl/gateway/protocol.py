"""What requests may hold. Fields that change nothing here (`user`, `metadata`, …) are accepted and ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

MAX_TOP_LOGPROBS = 20
MIN_TEMPERATURE = 1e-4  # less is greedy


class Part(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None
    refusal: str | None = None

    @field_validator("type")
    @classmethod
    def _only_text(cls, value: str) -> str:
        if value not in ("text", "input_text", "output_text", "refusal"):
            raise ValueError(f"a part of type {value} is not supported, the policy reads text")
        return value


class FunctionCall(BaseModel):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(BaseModel):
    id: str | None = None
    function: FunctionCall


class Message(BaseModel):
    """One chat message, in any of the forms that clients write it."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text or part.refusal or "" for part in self.content)
        return self.content or ""

    @property
    def speaker(self) -> str:
        return {"developer": "system", "function": "tool"}.get(self.role, self.role)


ToolName = Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=128)]


class Function(BaseModel):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"] = "function"
    function: NamedFunction


ToolChoice = Literal["auto", "none", "required"] | NamedTool
Stop = Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]


class StreamOptions(BaseModel):
    include_usage: bool | None = False


def _greedy_if_tiny(temperature: float) -> float:
    """Logits over 1e-30 are infinite in float32; far below 1e-4 nothing but the largest has a chance."""
    return 0.0 if 0 < temperature < MIN_TEMPERATURE else temperature


class SamplingFields(BaseModel):
    """The fields that say how to sample, shared by every endpoint; null means the default."""

    model: str
    temperature: Annotated[float, AfterValidator(_greedy_if_tiny)] | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    seed: int | None = None
    stop: Stop | None = None
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(SamplingFields):
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: dict[str, Any] | None = None


class CompletionRequest(SamplingFields):
    prompt: str | list[int]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: Literal[False] | None = None
    return_token_ids: bool | None = False  # this and the next are vLLM's
    return_tokens_as_token_ids: bool | None = False

    @field_validator("prompt", mode="before")
    @classmethod
    def _single(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
            return value[0]
        if isinstance(value, list) and value and not isinstance(value[0], int):
            raise ValueError("one prompt a request, please")
        return value


class FlatTool(BaseModel):
    """A tool as the Responses API writes it."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class FlatChoice(BaseModel):
    type: Literal["function"]
    name: str


class Item(BaseModel):
    """One input item of the Responses API; which fields it needs depends on its type."""

    model_config = ConfigDict(extra="allow")
    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class ResponsesRequest(SamplingFields):
    n: Literal[1] | None = None
    input: str | list[Item]
    instructions: str | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | FlatChoice | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    previous_response_id: str | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    include: list[str] | None = None
    text: dict[str, Any] | None = None


class RewardRequest(BaseModel):
    """`{"reward": 1.0}` or `{"reward": {"reward": 1.0, "format": 0.5}}`."""

    reward: Annotated[float, Field(allow_inf_nan=False)] | dict[str, Annotated[float, Field(allow_inf_nan=False)]]

    @field_validator("reward")
    @classmethod
    def _named(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        if isinstance(value, dict) and "reward" not in value:
            raise ValueError('named rewards must hold one named "reward", the one that is trained on')
        return value
