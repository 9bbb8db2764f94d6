"""`megatron-retro VERB ...`: finds the verb, reads its settings, turns errors into messages and exit codes."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from megatron_retro import __version__
from megatron_retro.artifacts.files import disk_problem
from megatron_retro.artifacts.object_cache import use_cache
from megatron_retro.cli.other_names import other_name
from megatron_retro.cli.verbs import VERBS, Verb
from megatron_retro.config.command_line import parse_settings
from megatron_retro.config.data import LOCAL, ExecutorConfig, ObjectStorageConfig, require_tokenizer_type
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.toml_files import nearest, render_toml
from megatron_retro.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_REQUEUE, ConfigError, MegatronRetroError
from megatron_retro.runtime.console import say, show_error, warn
from megatron_retro.runtime.endings import end_on_signals, write_ending


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    code, why = _outcome(words)
    write_ending(code, why)
    return code


def _outcome(words: list[str]) -> tuple[int, str]:
    """The exit code, and why it is not 0."""
    try:
        end_on_signals()
        return run_words(words), ""
    except MegatronRetroError as error:
        _show(error, words)
        return error.exit_code, str(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED, "interrupted"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INTERNAL, "nobody reads what it says"
    except Exception as error:
        problem = disk_problem(error)
        if problem:
            _show(problem, words)
            return problem.exit_code, str(problem)
        traceback.print_exc()
        print("this is a fault of megatron_retro, not of your input; please report the lines above", file=sys.stderr)
        return EXIT_INTERNAL, f"a fault of megatron_retro: {type(error).__name__}: {error}"


def _show(error: MegatronRetroError, words: Sequence[str]) -> None:
    """Show a named error; where its advice is to run the command again, the whole of it."""
    show_error(error)
    if error.exit_code != EXIT_REQUEUE and "same command again" in str(error):
        say(f"  command:  megatron-retro {shlex.join(words)}")


def run_verb(name: str) -> None:
    """The entry of `tools/NAME.py`."""
    sys.exit(main([name, *sys.argv[1:]]))


def run_words(words: Sequence[str]) -> int:
    """Do what the words of a command line say; errors are raised."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"megatron_retro {__version__}")
        return 0
    verb = _find(words[0])
    settings, namespace = parse_settings(
        f"megatron-retro {verb.name}",
        verb.sections,
        words[1:],
        all_sections=ALL_SECTIONS,
        description=verb.description,
        positional=verb.positional,
        reads=verb.reads,
    )
    if namespace.note:
        warn(namespace.note)
    if namespace.print_config:
        print(render_toml(settings))
        return 0
    require_tokenizer_type(settings)
    if ObjectStorageConfig in verb.sections:
        use_cache(**vars(settings[ObjectStorageConfig]))
    if ExecutorConfig in verb.sections and settings[ExecutorConfig].executor != LOCAL:
        from megatron_retro.cli.executors.job import run_elsewhere

        return run_elsewhere(words, settings)
    return verb.run(settings, getattr(namespace, verb.positional.name) if verb.positional else ())


def _find(name: str) -> Verb:
    by_name = {verb.name: verb for verb in VERBS}
    if name not in by_name:
        hint = other_name(name) or nearest(name, by_name)
        raise ConfigError(f"there is no verb {name!r}{hint}", expected=", ".join(by_name))
    return by_name[name]


def _overview() -> str:
    width = max(len(verb.name) for verb in VERBS)
    lines = [f"  {verb.name:<{width}}  {verb.summary}" for verb in VERBS]
    return "\n".join(
        [
            "usage: megatron-retro VERB [--config FILE.toml] [flags]",
            "",
            "Train language models that retrieve: from a corpus to text.",
            "",
            *lines,
            "",
            "megatron-retro VERB --help lists the flags of a verb.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
