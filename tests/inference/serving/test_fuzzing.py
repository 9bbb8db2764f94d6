"""Requests that schemathesis invents from the service's own OpenAPI: whatever comes, no 5xx and no crash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_no_request_breaks_the_service(service: Any, count: Callable[[int, int], int], record: Any, mode: Any) -> None:
    answers: Counter[str] = Counter()
    schema = schemathesis.openapi.from_url(service.url + "/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    posts = [operation.as_strategy(generation_mode=mode) for operation in operations if operation.method == "post"]
    assert len(posts) == 4

    @settings(
        max_examples=count(12 if mode is GenerationMode.POSITIVE else 50, 600),
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(st.one_of(posts))
    def fuzz(case: Any) -> None:
        if isinstance(case.body, dict):
            for name in ("max_tokens", "max_completion_tokens"):  # long answers teach nothing here
                if isinstance(case.body.get(name), int) and case.body[name] > 4:
                    case.body[name] = 4
        answer = case.call(timeout=30)
        answers[f"{answer.status_code // 100}xx"] += 1
        assert answer.status_code < 500, (answer.status_code, answer.text, case.body)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    try:
        fuzz()
    finally:
        record(f"fuzzed requests, {mode.value}", {"requests": answers.total(), "5xx": 0} | answers)
    assert httpx.get(service.url + "/health").json() == {"status": "ok", "active": 0, "waiting": 0}


def test_gets(service: Any) -> None:
    for path in (
        "/v1/models",
        "/v1/models/%00",
        "/v1/models/a/b",
        "/v1/models/%F0%9F%92%A9",
        "/metrics",
        "/health",
        "//",
    ):
        assert httpx.get(service.url + path).status_code in (200, 404)
