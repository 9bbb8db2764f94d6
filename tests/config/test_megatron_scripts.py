"""Command lines of Megatron-LM's example scripts: what has no meaning here is refused at once, and rightly advised."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_retro.cli.verbs import VERBS
from megatron_retro.config.command_line import parse_settings
from megatron_retro.config.megatron_flags import BY_VALUE, MEGATRON_DEFAULTS
from megatron_retro.config.model import ModelConfig
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import Settings, specs_by_name
from megatron_retro.config.training import CheckpointConfig
from megatron_retro.errors import ConfigError

LINES = (Path(__file__).parent / "megatron_scripts.txt").read_text(encoding="utf-8").splitlines()
SCRIPTS = {name: (verb, flags) for name, verb, *flags in (line.split() for line in LINES if line[0] != "#")}


def parsed(verb: str, flags: list[str]) -> Settings:
    row = next(each for each in VERBS if each.name == verb)
    words = ["perplexity"] if row.positional else []
    return parse_settings(
        verb, row.sections, [*words, *flags], all_sections=ALL_SECTIONS, positional=row.positional, reads=row.reads
    )[0]


def refused(verb: str, flags: list[str]) -> dict[str, str]:
    """What is said of each flag that is refused, all in one pass, and of the differing defaults."""
    try:
        parsed(verb, flags)
    except ConfigError as error:
        lines = [line for line in str(error).splitlines() if line.startswith(("--", "error: --"))]
        return {line.removeprefix("error: ").split()[0]: line for line in lines}
    return {}


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_flag_of_a_script_is_accepted_or_advised_at_once(name: str) -> None:
    verb, flags = SCRIPTS[name]
    said = refused(verb, flags)
    assert not [line for line in said.values() if line.endswith("is no flag of this command")]
    assert not [line for line in said.values() if "did you mean" in line and "_" not in line.split()[0]]
    # without what was refused, the rest is accepted: nothing comes in a second pass
    kept: list[str] = []
    dropping = False
    for word in flags:
        dropping = (word.startswith("--") and word in said) or (dropping and not word.startswith("--"))
        kept += [] if dropping else [word]
    assert refused(verb, kept) == {}


def test_the_page_says_how_many_flags_are_taken() -> None:
    given = {name: [word for word in flags if word.startswith("--")] for name, (_, flags) in SCRIPTS.items()}
    advised = {name: set(refused(*SCRIPTS[name])) & set(given[name]) for name in SCRIPTS}
    total, told = sum(map(len, given.values())), sum(map(len, advised.values()))
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
    assert f"{total} flags of {len(SCRIPTS)} scripts: {total - told} accepted, {told} refused with advice" in page


def test_megatrons_tokenizer_of_nothing_has_one_id_more() -> None:
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "128256"]
    assert parsed("pretrain", ["--mock-data", *flags])[ModelConfig].vocab_size == 128257
    assert "--mock-data with --vocab-size" in refused("pretrain", flags)["--tokenizer-type"]


def test_one_checkpoint_is_named_as_there() -> None:
    flags = ["--load", "RUN/", "--ckpt-step", "1000", "--calculate-per-token-loss"]
    assert parsed("pretrain", flags)[CheckpointConfig].load == "RUN/step-00001000"
    assert "--load RUN/step-NNNNNNNN" in refused("pretrain", ["--ckpt-step", "3"])["--ckpt-step"]


@pytest.mark.parametrize(
    ("name", "flag", "advice"),
    [
        ("train_retro_2b", "--retro-project-dir", "--neighbor-path and --database-path"),
        ("train_retro_2b", "--no-data-sharding", "--seed"),
        ("core_retro_preprocess", "--retro-tasks", "plan, train, encode, merge, query"),
        ("instruct_retro_preprocess", "--retro-workdir", "--retro-project-dir"),
        ("instruct_retro_generate", "--num-layers", "the checkpoint of --load says it"),
        ("instruct_retro_generate", "--sample-input-file", "--eval-data"),
        ("instruct_retro_generate", "--task", "evaluate TASK"),
        ("mixture_of_experts", "--num-experts", "mixtures of experts"),
        ("mixture_of_experts", "--data-args-path", "--config FILE.toml"),
    ],
)
def test_advice(name: str, flag: str, advice: str) -> None:
    assert advice in refused(*SCRIPTS[name])[flag]


def test_older_switches_of_positions_mean_what_they_meant() -> None:
    both = ["--no-position-embedding", "--use-rotary-position-embeddings"]
    assert parsed("pretrain", both)[ModelConfig].position_embedding_type == "rope"
    assert parsed("pretrain", both[:1])[ModelConfig].position_embedding_type == "none"


def test_megatrons_defaults_are_given_or_told() -> None:
    settings = parsed("pretrain", ["--megatron-defaults", "--group-query-attention", "--weight-decay", "0.3"])
    assert settings[ModelConfig].position_embedding_type == "learned_absolute"
    assert settings[ModelConfig].num_key_value_heads() == 1
    assert settings.origin("weight_decay") == "flag" and settings.origin("adam_beta2") == "Megatron-LM's default"
    with pytest.raises(ConfigError) as raised:
        parsed("pretrain", ["--use-mcore-models", "--weight-decay", "0.3"])
    told = str(raised.value)
    assert "--adam-beta2" in told and "0.999" in told and "--weight-decay" not in told
    specs = specs_by_name(ALL_SECTIONS)
    assert all(specs[name][1].default != theirs for name, theirs in MEGATRON_DEFAULTS.items())
    assert not [value for value in BY_VALUE if any(value in (spec.choices or ()) for _, spec in specs.values())]
