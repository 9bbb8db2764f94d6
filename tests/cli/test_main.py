"""Exit codes, messages, help, and that `python -O` changes nothing."""

from __future__ import annotations

import ast
import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_retro.artifacts.manifest import write_manifest
from megatron_retro.cli import main as entry
from megatron_retro.cli.verbs import VERBS, Verb
from megatron_retro.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_REQUEUE, EXIT_USER, Requeue
from megatron_retro.testing.corpora import write_reference_token_file

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_help_of_every_verb_needs_no_torch(verb: str) -> None:
    code = (
        "import sys; from megatron_retro.cli.main import main\n"
        f"try: main(['{verb}', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'faiss', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"megatron-retro {verb}" in done.stdout


def test_a_start_imports_nothing_that_it_does_not_use() -> None:
    """The check of the network no distributed tensors, and what only runs a model no compiler."""
    code = (
        "import sys; from megatron_retro.cli.main import main\n"
        "assert main(['reach']) == 0 and 'torch.distributed.tensor' not in sys.modules\n"
        "import megatron_retro.assembly.loading\n"
        "assert not {'torch._dynamo', 'torch.distributed.pipelining', 'transformers', 'faiss'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_names_a_function_that_takes_what_it_is_given(verb: Verb) -> None:
    module, function = verb.program.split(":")
    tree = ast.parse((ROOT / "megatron_retro" / f"{module.replace('.', '/')}.py").read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    assert len(found.args.args) == bool(verb.sections) + bool(verb.positional)


def test_help_is_fast() -> None:
    start = time.process_time()
    subprocess.run([sys.executable, "-m", "megatron_retro.cli.main", "--help"], check=True, capture_output=True)
    assert time.process_time() - start < 60  # a bound on hanging only; the figure is in benchmarks/


@pytest.mark.parametrize("flag", [[], ["-O"]], ids=["python", "python -O"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspekt"], "did you mean inspect"),
        (["inspect"], "the following arguments are required: paths"),
        (["inspect", "/nowhere/at/all"], "there is nothing at /nowhere/at/all"),
        (["inspect", str(ROOT / "LICENSE")], "LICENSE is no file of ours"),
        (["inspect", "x", "--colour"], "--colour is no flag"),
        (["environment", "--config", "/nowhere.toml"], "cannot read /nowhere.toml"),
        (["environment", "--preset", "retro-9000b"], "there is no preset 'retro-9000b'"),
    ],
)
def test_user_errors_are_one_message_and_exit_2(flag: list[str], words: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, *flag, "-m", "megatron_retro.cli.main", *words], capture_output=True, text=True
    )
    assert done.returncode == EXIT_USER
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("tools/preprocess_data.py", "preprocess"), ("pretrain_gpt.py", "pretrain"), ("build-index", "build-retrieval"),
     ("export", "convert"), ("retro-preprocess", "build-retrieval"), ("evaluat", "evaluate")],
)  # fmt: skip
def test_names_of_verbs_from_memory_get_a_hint(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([typed]) == EXIT_USER
    assert f"(did you mean {meant}?)" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["preprocess", "--profile"], ["generate", "--async-save"], ["serve", "--save", "x"]])
def test_flags_without_effect_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(words) == EXIT_USER
    assert "is no flag of this command" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["preprocess", "generate", "pretrain", "build-retrieval"])
def test_a_tokenizers_file_without_its_kind_is_not_passed_over(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([verb, "--tokenizer-model", "x.model"]) == EXIT_USER
    assert "add --tokenizer-type SentencePieceTokenizer or" in capsys.readouterr().err


def test_internal_errors_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: list[str]) -> int:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(entry, "run_words", fail)
    assert entry.main(["inspect"]) == EXIT_INTERNAL
    assert "ZeroDivisionError: ours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/closed/door"), "/closed/door cannot be opened"),
    ],
)
def test_a_full_disk_or_a_closed_file_is_the_users_wherever_it_is_met(
    error: OSError, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: list[str]) -> int:
        raise error

    monkeypatch.setattr(entry, "run_words", fail)
    assert entry.main(["inspect"]) == EXIT_USER
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_run_that_saved_and_asks_to_be_started_again_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: list[str]) -> int:
        raise Requeue("the run stopped early: a signal arrived")

    monkeypatch.setattr(entry, "run_words", stop)
    assert entry.main(["pretrain"]) == EXIT_REQUEUE
    assert capsys.readouterr().err == "the run stopped early: a signal arrived\n"


def test_interrupted_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "run_words", interrupt)
    assert entry.main(["inspect"]) == EXIT_INTERRUPTED


CONFIG = {"seed": 5, "model": {"width": 3, "depth": None}}


def test_inspect_explains_and_notices_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = tmp_path / "things" / "one"
    artifact.mkdir(parents=True)
    (artifact / "data").write_text("content")
    write_manifest(artifact, kind="thing", version=3, inputs={"corpus": "abc"}, config=CONFIG, counts={"rows": 7})
    assert entry.main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for part in ("thing, format version 3", "corpus = abc", "seed = 5", "[model] width=3\n", "rows = 7", "intact"):
        assert part in shown
    (artifact / "data").write_text("c0ntent")
    assert entry.main(["inspect", str(artifact / "data")]) == EXIT_USER
    assert "data has changed" in capsys.readouterr().err


def test_inspect_explains_a_token_file_of_another_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron's have no manifest."""
    write_reference_token_file(tmp_path / "theirs", [[[1, 2, 3]], [[4, 5]]], "int32")
    for name in ("theirs", "theirs.idx"):
        assert entry.main(["inspect", str(tmp_path / name)]) == 0
        shown = capsys.readouterr().out
        assert "tokens of another program" in shown and "documents = 2" in shown and "tokens = 5" in shown
    content = (tmp_path / "theirs.bin").read_bytes()
    (tmp_path / "theirs.bin").write_bytes(content[:-4])
    assert entry.main(["inspect", str(tmp_path / "theirs")]) == EXIT_USER
    assert "does not belong to" in capsys.readouterr().err


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_every_tool_answers_help(tool: Path) -> None:
    done = subprocess.run([sys.executable, str(tool), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout


def test_environment_reports_every_optional_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["environment"]) == 0
    shown = capsys.readouterr().out
    for name in ("torch", "faiss", "transformer_engine", "apex", "mpi4py"):
        assert name in shown
