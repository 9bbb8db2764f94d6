"""`POST /v1/responses`: OpenAI's newer form of a chat, text in and text out. Nothing is kept between requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, model_validator

from megatron_retro.inference.serving import answering, schema
from megatron_retro.inference.serving.engine_thread import RequestHandle
from megatron_retro.inference.serving.fields import StrictModel, Text

Submit = Callable[[schema.ChatRequest], Awaitable[list[RequestHandle]]]
_NOT_HERE = ("previous_response_id", "conversation", "store", "background", "stream", "tools", "reasoning", "include")


class InputText(StrictModel):
    """A part of a message; what an answer's text came with is taken back."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: list[Any] = Field([], max_length=1024)
    logprobs: list[Any] = Field([], max_length=1024)


class InputMessage(StrictModel):
    """A message, as a client or an earlier answer gives it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[InputText]
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None

    def message(self) -> dict[str, str]:
        """As chats have it."""
        given = self.content
        return {"role": self.role, "content": given if isinstance(given, str) else "".join(one.text for one in given)}


class ResponseRequest(StrictModel):
    """OpenAI's fields."""

    input: Text | list[InputMessage] = Field(min_length=1)
    instructions: Text | None = None
    model: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=1 << 20)
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    metadata: dict[str, str] | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_state(cls, body: object) -> object:
        """What says no is dropped; what asks for more than text is refused in words."""
        if not isinstance(body, dict):
            return body
        asked = [name for name in _NOT_HERE if body.get(name)]
        if asked:
            raise ValueError(
                f"{', '.join(asked)}: answers here are whole texts, and none is kept; send the conversation in input, "
                "or use /v1/chat/completions, which has streams and tools"
            )
        return {name: value for name, value in body.items() if name not in _NOT_HERE}

    def chat(self) -> schema.ChatRequest:
        """The same as a chat."""
        told = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        given = self.input
        asked = [{"role": "user", "content": given}] if isinstance(given, str) else [one.message() for one in given]
        shared = self.model_dump(include={"model", "temperature", "top_p"})
        return schema.ChatRequest.model_validate(
            {**shared, "messages": [*told, *asked], "max_completion_tokens": self.max_output_tokens}
        )


class ResponseAnswer(BaseModel):
    """OpenAI's answer, in the fields that have a meaning here."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    error: None = None
    instructions: str | None
    output: list[dict[str, Any]]
    parallel_tool_calls: bool = False
    tool_choice: str = "none"
    tools: tuple[()] = ()
    temperature: float
    top_p: float
    metadata: dict[str, str] | None
    usage: dict[str, Any]


def add_responses(application: FastAPI, service: answering.Service, submit: Submit) -> None:
    """Add the route."""

    @application.post("/v1/responses", response_model=ResponseAnswer)
    async def responses(body: ResponseRequest, request: Request) -> Response:
        chat = body.chat()
        generations = await answering.whole_answers(service, await submit(chat), request)
        message, reason = service.message(chat, generations[0])
        used = answering.usage_of(generations, 1)
        status: Literal["completed", "incomplete"] = "incomplete" if reason == "length" else "completed"
        content: list[dict[str, Any]] = [{"type": "output_text", "text": message.content, "annotations": []}]
        answer = ResponseAnswer(
            id=answering.new_id("resp"),
            created_at=answering.now(),
            model=service.model_name,
            status=status,
            incomplete_details={"reason": "max_output_tokens"} if reason == "length" else None,
            instructions=body.instructions,
            output=[
                {"type": "message", "id": answering.new_id("msg"), "status": status, "role": "assistant",
                 "content": content}
            ],
            temperature=body.temperature,
            top_p=body.top_p,
            metadata=body.metadata,
            usage={
                "input_tokens": used.prompt_tokens, "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": used.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used.total_tokens,
            },
        )  # fmt: skip
        return JSONResponse(answer.model_dump())
