"""The page in a real browser: type, stream, switch retrieval, open a neighbour."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.testing.browser import Browser, missing_browser

pytestmark = pytest.mark.skipif(missing_browser() is not None, reason=str(missing_browser()))
PROMPT = "the quick brown fox jumps over the lazy cat and"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as window:
        yield window


def ask(browser: Browser, prompt: str, tokens: int) -> None:
    browser.clear("#prompt")
    browser.type("#prompt", prompt)
    browser.clear("#tokens")
    browser.type("#tokens", str(tokens))
    browser.click("#go")


def test_type_stream_compare_open(service: Any, browser: Browser, room: Path) -> None:
    browser.open(service.url)
    browser.wait_for("document.getElementById('model').textContent === 'small'")
    browser.click("#attention")
    browser.run(
        "window.lengths = []; new MutationObserver(() => window.lengths.push("
        "document.querySelector('#answer-0 .new')?.textContent.length || 0))"
        ".observe(document.getElementById('answers'), {childList: true, subtree: true, characterData: true})"
    )
    ask(browser, PROMPT, 60)
    browser.wait_for("document.getElementById('status').textContent === 'done'")
    steps = set(browser.run("return window.lengths"))
    assert len(steps) > 20, "text came piece by piece"
    assert browser.text("#answer-0 h2") == "Neighbors on" and browser.text("#answer-1 h2") == "Neighbors off"
    answers = [browser.run(f"return document.querySelector('#answer-{n} .new').textContent") for n in (0, 1)]
    assert len(answers[0]) == len(answers[1]) == 60 and answers[0] != answers[1]
    assert browser.run("return document.querySelectorAll('#answer-0 details.chunk').length") == 6
    assert browser.run("return document.querySelectorAll('#answer-1 details.chunk').length") == 0
    assert not browser.run("return document.querySelector('#answer-0 .neighbor').checkVisibility()")
    browser.click("#answer-0 details.chunk summary")
    assert browser.run("return document.querySelector('#answer-0 .neighbor').checkVisibility()")
    shown = browser.text("#answer-0 details.chunk")
    assert "quick brown fox" in shown and "distance" in shown and re.search("worth [+−][0-9.]+ nats", shown)
    marked = browser.run(
        "return [...document.querySelectorAll('#answer-0 details.chunk:first-child mark')]"
        ".map((one) => one.textContent)"
    )
    assert any("quick" in text.lower() for text in marked)
    read = browser.run(
        "return [...document.querySelectorAll('#answer-0 details.chunk:first-child .neighbor [class^=read-]')]"
        ".map((one) => one.className)"
    )
    assert "read-4" in read and browser.run("return document.querySelectorAll('#answer-1 [class^=read-]').length") == 0
    browser.screenshot(room / "compared.png")
    assert (room / "compared.png").stat().st_size > 10_000
    assert [entry for entry in browser.log() if entry["level"] == "SEVERE"] == []


def test_random_neighbors_and_stop(
    service: Any, generator: Any, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token takes so long that no answer ends before a slow browser stops it."""
    next_logits = generator.forward.next_logits
    monkeypatch.setattr(generator.forward, "next_logits", lambda *given: time.sleep(0.05) or next_logits(*given))
    browser.open(service.url)
    browser.wait_for("document.getElementById('model').textContent === 'small'")
    browser.click("input[value=random]")
    ask(browser, PROMPT, 400)
    browser.wait_for("document.querySelector('#answer-0 .new')?.textContent.length > 5")
    browser.click("#stop")
    browser.wait_for("document.getElementById('status').textContent === 'stopped'")
    assert browser.run("return document.querySelector('#answer-0 .new').textContent.length") < 400
    assert browser.text("#answer-0 h2") == "Random neighbors"


def test_chat_with_passages_and_sampling(service: Any, browser: Browser) -> None:
    browser.open(service.url)
    browser.wait_for("document.getElementById('model').textContent === 'small'")
    browser.click("#chat")
    browser.click("form details summary")
    browser.type("#passages", "A fox that is given.\n\nAnother one.")
    browser.type("input[name=top_k]", "1")
    browser.type("#stop-text", "zzz")
    ask(browser, "What is a fox?", 30)
    browser.wait_for("document.getElementById('status').textContent === 'done'")
    assert browser.text("#answer-0 h2") == "Neighbors on" and browser.text("#answer-1 h2") == "Neighbors off"
    assert all(browser.run(f"return document.querySelector('#answer-{n} .new').textContent") for n in (0, 1))
    browser.click("#answer-0 details.chunk summary")
    shown = browser.text("#answer-0 details.chunk")
    assert "given passage" in shown and "A fox that is given." in shown and "Another one." in shown
    assert browser.run("return document.querySelectorAll('#answer-1 details.chunk').length") == 0


def test_text_is_never_markup(service: Any, browser: Browser) -> None:
    browser.open(service.url)
    ask(browser, "<img src=x onerror=document.title='pwned'><b>fox jumps over</b>", 20)
    browser.wait_for("document.getElementById('status').textContent === 'done'")
    assert browser.run("return document.title") == "megatron_retro"
    assert browser.run("return document.querySelectorAll('#answers img, #answers b').length") == 0


def test_error_is_shown(service: Any, browser: Browser) -> None:
    browser.open(service.url)
    ask(browser, "x" * 200, 400)
    browser.wait_for("document.getElementById('status').classList.contains('failed')")
    assert "too long" in browser.text("#status")


def test_key_is_asked_for(service_with: Callable[..., Any], browser: Browser) -> None:
    service = service_with(api_keys=["secret"])
    browser.open(service.url)
    browser.wait_for("!document.getElementById('key-label').hidden")
    browser.type("#key", "secret\t")
    browser.wait_for("document.getElementById('model').textContent === 'small'")
    ask(browser, "a fox", 10)
    browser.wait_for("document.getElementById('status').textContent === 'done'")


def test_keyboard_alone(service: Any, browser: Browser) -> None:
    """Everything can be reached and used without a mouse."""
    browser.open(service.url)
    browser.type("#prompt", PROMPT + "\ue009\ue007")  # Ctrl+Enter
    browser.wait_for("document.getElementById('status').textContent === 'done'")
    browser.run("document.querySelector('#answer-0 details.chunk summary').focus()")
    browser.type("#answer-0 details.chunk summary", " ")
    assert browser.run("return document.querySelector('#answer-0 details.chunk').open")
    unnamed = browser.run(
        "return [...document.querySelectorAll('input, textarea, select, button')]"
        ".filter((one) => !one.labels?.length && !one.textContent.trim() && !one.ariaLabel).length"
    )
    assert unnamed == 0
