"""What clients send and get: OpenAI's completions and chat, and our fields beside them.

Unknown fields are refused, so that a misspelled or unsupported one is not silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, model_validator

from megatron_retro.inference.serving.fields import StrictModel, Text, TokenList
from megatron_retro.inference.serving.messages import Message, MessageCall, NamedTool, Tool

MAX_TEXTS = 16
TokenName = Annotated[str, StringConstraints(pattern=r"^\d{1,9}$")]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
RetrievalMode = Literal["live", "none", "random"]


class StreamOptions(StrictModel):
    """OpenAI's options of a stream."""

    include_usage: bool = False


class SharedRequest(StrictModel):
    """Fields of both kinds of request. The last group is ours."""

    model: str | None = None
    temperature: float = Field(1.0, ge=0.0, le=100.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    n: int = Field(1, ge=1, le=MAX_TEXTS)
    seed: int | None = Field(None, ge=0, lt=1 << 62)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = Field(None, description="taken, and not kept")
    service_tier: str | None = Field(None, description="taken; there is one")
    store: bool = Field(False, description="taken; nothing is kept")
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    logit_bias: dict[TokenName, Bias] = Field({}, max_length=1024)
    top_k: int = Field(0, ge=0, le=1 << 20)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100.0)
    retrieval: bool = Field(False, description="send the neighbours that each chunk read with the answer")
    retrieval_mode: RetrievalMode | None = Field(None, description="where neighbours come from")
    retrieval_step: int | None = Field(None, ge=1, le=1 << 16, description="tokens between retrievals")
    passages: Annotated[list[Text], Field(max_length=MAX_TEXTS)] | None = Field(
        None, description="texts to read as neighbours instead of searching"
    )


class CompletionRequest(SharedRequest):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
        | TokenList
        | Annotated[list[TokenList], Field(min_length=1, max_length=MAX_TEXTS)]
    )
    max_tokens: int = Field(16, ge=1, le=1 << 20)
    echo: bool = False
    attention: bool = Field(False, description="what neighbours' tokens got and what each is worth, at the end")
    logprobs: int | None = Field(None, ge=0, le=5, description="log-probabilities of a token and of this many others")

    @model_validator(mode="after")
    def _whole(self) -> CompletionRequest:
        if self.stream and self.logprobs is not None:
            raise ValueError("logprobs come with whole answers: leave stream out")
        return self


class JsonSchema(StrictModel):
    """OpenAI's schema with a name; every one is followed strictly."""

    name: str
    description: str | None = None
    strict: bool = True
    content: dict[str, Any] = Field({}, alias="schema")


class ResponseFormat(StrictModel):
    """OpenAI's field for what an answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema")
        return self

    def schema_of_answer(self) -> dict[str, Any] | None:
        """What the answer is held to."""
        if self.json_schema is not None:
            return self.json_schema.content
        return {"type": "object"} if self.type == "json_object" else None


class ChatRequest(SharedRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: int | None = Field(None, ge=1, le=1 << 20)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 20)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] = Field([], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _whole(self) -> ChatRequest:
        if self.stream and self.logprobs:
            raise ValueError("logprobs come with whole answers: leave stream out")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if self.must_call == []:
            names = ", ".join(tool.function.name for tool in self.tools) or "none"
            raise ValueError(f"tool_choice asks for a function that is not among the tools: {names}")
        if self.offered and self.response_format is not None and self.response_format.schema_of_answer() is not None:
            raise ValueError("an answer is held to response_format or free to call tools: leave one of them out")
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> list[Tool] | None:
        """The tools of which one has to be called; None where none has to be."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else None


class Neighbor(BaseModel):
    """A neighbour; id -1 is a passage that was given, and has no distance. `attention`: of its tokens, in order;
    `worth`: nats that the text loses without it."""

    id: int
    distance: float | None
    text: str
    attention: list[tuple[str, float]] | None = None
    worth: float | None = None


class Chunk(BaseModel):
    """Tokens [query_start, query_stop) and what was found for them; tokens from query_stop - 1 on read it."""

    query: str
    query_start: int
    query_stop: int
    neighbors: list[Neighbor]


class Logprobs(BaseModel):
    """Of each token: its text, log-probability (none for the first of all), others in its place, where it begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: Logprobs | None = None
    retrieval: list[Chunk] | None = None


class ChatToken(BaseModel):
    """A token of an answer, or one that might have stood in its place; a part of a character has no bytes of a text."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(ChatToken):
    """A token and the most likely ones in its place."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    """The tokens of an answer in their order."""

    content: list[ChatLogprob]


class ChatMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[MessageCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    retrieval: list[Chunk] | None = None


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """Answer of `POST /v1/completions`, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatCompletion(BaseModel):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class CallDelta(MessageCall):
    """A call in a stream, whole."""

    index: int


class ChatDelta(BaseModel):
    """What is new in an event of a chat's stream."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """The part of one answer."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: None = None
    retrieval: list[Chunk] | None = None


class ChatCompletionChunk(BaseModel):
    """An event of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """An entry of `/v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "megatron_retro"
    retrieval_modes: list[RetrievalMode] = []


class ModelList(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """OpenAI's form of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail


class Health(BaseModel):
    """Answer of `GET /health`."""

    status: Literal["ok", "failing"]
    active: int
    waiting: int
