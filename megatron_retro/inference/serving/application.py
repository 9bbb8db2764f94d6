"""The routes of the service: completions, chat, embeddings, models, health, metrics and the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from megatron_retro import __version__
from megatron_retro.config.inference import ServeConfig
from megatron_retro.errors import MegatronRetroError
from megatron_retro.inference.serving import answering, schema
from megatron_retro.inference.serving.embeddings import add_embeddings
from megatron_retro.inference.serving.engine_thread import RequestHandle, RequestRefused
from megatron_retro.inference.serving.guards import Guards
from megatron_retro.inference.serving.metrics import Metrics
from megatron_retro.inference.serving.responses import add_responses
from megatron_retro.runtime.strict_json import json_text

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorAnswer} for status in (400, 401, 404, 413, 421, 422, 429, 500, 503)
}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_KINDS = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error"}


def build_application(
    service: answering.Service, metrics: Metrics, config: ServeConfig, api_keys: Sequence[str] = ()
) -> Guards:
    """The whole service as one ASGI application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.close()

    application = FastAPI(
        title="megatron_retro",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )
    _add_error_handlers(application)
    _add_page(application)
    _add_status(application, service, metrics)
    _add_completions(application, service, metrics)
    _add_chat(application, service, metrics)
    add_embeddings(application, service, metrics)
    add_responses(application, service, partial(_submit, service, metrics))
    return Guards(application, config, api_keys)


def error_answer(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    detail = schema.ErrorDetail(message=message, type=_KINDS.get(status, "api_error"), param=param, code=code)
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse({"error": detail.model_dump()}, status_code=status, headers=headers)


def _add_error_handlers(application: FastAPI) -> None:
    @application.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        where, message = _explained(error.errors())
        return error_answer(400, f"{where or 'body'}: {message}", param=where or None)

    @application.exception_handler(RequestRefused)
    async def refused(_: Request, error: RequestRefused) -> Response:
        return error_answer(error.status, str(error))

    @application.exception_handler(MegatronRetroError)
    async def bad_input(_: Request, error: MegatronRetroError) -> Response:
        return error_answer(400, str(error))

    @application.exception_handler(HTTPException)
    async def not_here(_: Request, error: HTTPException) -> Response:
        answer = error_answer(error.status_code, str(error.detail))
        answer.headers.update(error.headers or {})
        return answer


def _explained(errors: Sequence[Any]) -> tuple[str, str]:
    """Which field is wrong, and why; one that may be of several kinds has a reason for each."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return "", f"no JSON at character {first['loc'][-1]}: {first['ctx']['error']}"
    where = _field(first["loc"])
    return where, "; or ".join(dict.fromkeys(error["msg"] for error in errors if _field(error["loc"]) == where))


def _field(place: Sequence[str | int]) -> str:
    """`messages.0.role`: pydantic's names of kinds, such as `list[str]`, are left out."""
    parts = [str(part) for part in place if part != "body"]
    kinds = [number for number, part in enumerate(parts) if not (part.isidentifier() or part.isdigit())]
    return ".".join(parts[: kinds[0]] if kinds else parts)


def _add_page(application: FastAPI) -> None:
    folder = files("megatron_retro.inference.serving").joinpath("page")

    def route(path: str, name: str, kind: str) -> None:
        content = folder.joinpath(name).read_text(encoding="utf-8")

        @application.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=f"{kind}; charset=utf-8")

    for path, (name, kind) in _PAGE.items():
        route(path, name, kind)

    @application.get("/favicon.ico", include_in_schema=False)
    async def no_icon() -> Response:
        return Response(status_code=204)


def _add_status(application: FastAPI, service: answering.Service, metrics: Metrics) -> None:
    @application.get("/health")
    async def health() -> schema.Health:
        failing = service.engine.failures > 0
        return schema.Health(
            status="failing" if failing else "ok", active=service.engine.num_active, waiting=service.engine.num_waiting
        )

    @application.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> str:
        metrics.set("megatron_retro_active", service.engine.num_active)
        metrics.set("megatron_retro_waiting", service.engine.num_waiting)
        return metrics.render()

    @application.get("/v1/models")
    async def models() -> schema.ModelList:
        return schema.ModelList(data=[_card(service)])

    @application.get("/v1/models/{name:path}")
    async def model(name: str) -> schema.ModelCard:
        if name != service.model_name:
            raise RequestRefused(f"there is no model {name!r} here", 404)
        return _card(service)


def _card(service: answering.Service) -> schema.ModelCard:
    return schema.ModelCard(id=service.model_name, created=service.created, retrieval_modes=service.retrieval_modes)


async def _submit(
    service: answering.Service, metrics: Metrics, body: schema.CompletionRequest | schema.ChatRequest
) -> list[RequestHandle]:
    metrics.count("megatron_retro_requests_total", kind=type(body).__name__)
    requests = await asyncio.to_thread(service.requests_of, body)  # a long prompt holds up nobody
    grammar = await service.grammar_of(body)
    held = [replace(one, grammar=grammar) for one in requests]
    return service.engine.submit(held, asyncio.get_running_loop())


def _add_completions(application: FastAPI, service: answering.Service, metrics: Metrics) -> None:
    @application.post("/v1/completions", response_model=schema.Completion, responses=_STREAM)
    async def completions(body: schema.CompletionRequest, request: Request) -> Response:
        handles = await _submit(service, metrics, body)
        head = schema.Completion(
            id=answering.new_id("cmpl"), created=answering.now(), model=service.model_name, choices=[]
        )
        if body.stream:
            return _event_stream(_completion_events(service, body, handles, head))
        generations = await answering.whole_answers(service, handles, request)
        choices = [
            schema.CompletionChoice(
                index=index,
                text=service.prefix(body, one) + one.text,
                finish_reason=one.finish_reason,
                logprobs=service.logprobs(body, one),
                retrieval=service.chunks(one) if body.retrieval else None,
            )
            for index, one in enumerate(generations)
        ]
        usage = answering.usage_of(generations, body.n)
        return _json(head.model_copy(update={"choices": choices, "usage": usage}))


async def _completion_events(
    service: answering.Service, body: schema.CompletionRequest, handles: list[RequestHandle], head: schema.Completion
) -> AsyncIterator[schema.Completion]:
    begun: set[int] = set()
    async for new in answering.text_deltas(service, handles):
        generation = handles[new.index].generation
        prefix = "" if new.index in begun or generation is None else service.prefix(body, generation)
        begun.add(new.index)
        choice = schema.CompletionChoice(
            index=new.index,
            text=prefix + new.text,
            finish_reason=new.finish_reason,
            retrieval=new.chunks if body.retrieval else None,
        )
        yield head.model_copy(update={"choices": [choice]})
    if body.stream_options is not None and body.stream_options.include_usage:
        yield head.model_copy(update={"usage": _usage(handles, body.n)})


def _add_chat(application: FastAPI, service: answering.Service, metrics: Metrics) -> None:
    @application.post("/v1/chat/completions", response_model=schema.ChatCompletion, responses=_STREAM)
    async def chat(body: schema.ChatRequest, request: Request) -> Response:
        handles = await _submit(service, metrics, body)
        name, created = answering.new_id("chatcmpl"), answering.now()
        if body.stream:
            head = schema.ChatCompletionChunk(id=name, created=created, model=service.model_name, choices=[])
            return _event_stream(_chat_events(service, body, handles, head))
        generations = await answering.whole_answers(service, handles, request)
        messages = [service.message(body, one) for one in generations]
        choices = [
            schema.ChatChoice(
                index=index,
                message=message,
                finish_reason=reason,
                logprobs=service.chat_logprobs(body, one),
                retrieval=service.chunks(one) if body.retrieval else None,
            )
            for index, (one, (message, reason)) in enumerate(zip(generations, messages, strict=True))
        ]
        usage = answering.usage_of(generations, body.n)
        return _json(
            schema.ChatCompletion(id=name, created=created, model=service.model_name, choices=choices, usage=usage)
        )


async def _chat_events(
    service: answering.Service, body: schema.ChatRequest, handles: list[RequestHandle], head: schema.ChatCompletionChunk
) -> AsyncIterator[schema.ChatCompletionChunk]:
    begun: set[int] = set()
    readers = [service.call_reader(body) for _ in handles]
    async for new in answering.text_deltas(service, handles):
        text = readers[new.index].feed(new.text)
        left, calls = readers[new.index].finish() if new.finish_reason is not None else ("", [])
        text += left
        first = new.index not in begun
        text = text.lstrip() if first else text
        if text or not first:
            begun.add(new.index)
        found = answering.call_deltas(calls if body.parallel_tool_calls else calls[:1])
        delta = schema.ChatDelta(role="assistant" if first else None, content=text, tool_calls=found or None)
        choice = schema.ChatChunkChoice(
            index=new.index,
            delta=delta,
            finish_reason=answering.ended_by(new.finish_reason, bool(found)),
            retrieval=new.chunks if body.retrieval else None,
        )
        yield head.model_copy(update={"choices": [choice]})
    if body.stream_options is not None and body.stream_options.include_usage:
        yield head.model_copy(update={"usage": _usage(handles, body.n)})


def _usage(handles: list[RequestHandle], n: int) -> schema.Usage:
    return answering.usage_of([handle.generation for handle in handles if handle.generation is not None], n)


def _json(answer: schema.Completion | schema.ChatCompletion) -> Response:
    return JSONResponse(answer.model_dump(exclude_unset=False))


def _event_stream(events: AsyncIterator[schema.Completion] | AsyncIterator[schema.ChatCompletionChunk]) -> Response:
    """Server-sent events, ended by [DONE]; a failure on the way becomes an event, for the status is sent already."""

    async def lines() -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield b"data: " + event.model_dump_json().encode() + b"\n\n"
        except MegatronRetroError as error:
            detail = schema.ErrorDetail(message=str(error), type="api_error")
            yield b"data: " + json_text({"error": detail.model_dump()}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
