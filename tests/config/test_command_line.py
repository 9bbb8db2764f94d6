"""Flags, TOML and presets: precedence, every fault at once, the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_retro.config.command_line import parse_settings
from megatron_retro.config.data import DataConfig, TokenizerConfig
from megatron_retro.config.fields import field_specs
from megatron_retro.config.megatron_flags import BY_FLAG
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import Settings, section_name, specs_by_name
from megatron_retro.config.toml_files import (
    flat_values,
    parse_toml,
    preset_names,
    preset_path,
    read_recipe,
    render_toml,
)
from megatron_retro.errors import ConfigError

SECTIONS = (ModelConfig, RetroConfig, ParallelConfig)


def parse(*words: str) -> Settings:
    return parse_settings("test", SECTIONS, words, all_sections=ALL_SECTIONS)[0]


def test_flags_win_over_toml_and_say_so(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[model]\nnum_layers = 7\nhidden_size = 96\n[training]\nseed = 3\n")
    settings = parse("--config", str(recipe), "--num-layers", "9", "--retro-layers", "3", "6")
    assert settings[ModelConfig].num_layers == 9
    assert settings[ModelConfig].hidden_size == 96
    assert settings[RetroConfig].retro_layers == (3, 6)
    assert settings.origin("num_layers") == "flag"
    assert settings.origin("hidden_size") == str(recipe)
    assert settings.origin("kv_channels") == "default"


def test_none_unsets_what_a_recipe_sets(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[model]\nkv_channels = 8\n[retro]\nretro_layers = [2]\n[parallel]\npipeline_layout = "1,1"\n')
    words = ("--kv-channels", "none", "--retro-layers", "none", "--pipeline-layout", "none")
    settings = parse("--config", str(recipe), *words)
    found = (settings[ModelConfig].kv_channels, settings[RetroConfig].retro_layers)
    assert (*found, settings[ParallelConfig].pipeline_layout) == (None, None, None)
    assert settings.origin("pipeline_layout") == "flag"
    assert parse("--position-embedding-type", "none")[ModelConfig].position_embedding_type == "none"
    with pytest.raises(ConfigError, match="--num-layers none: expected a whole number"):
        parse("--num-layers", "none")


def test_megatron_spelling() -> None:
    settings = parse(
        "--tensor-model-parallel-size", "2", "--sequence-parallel", "--retro-num-neighbors", "3",
        "--rotary-percent", "0.5", "--swiglu", "--no-disable-bias-linear",
    )  # fmt: skip
    assert settings[ParallelConfig].tensor_model_parallel_size == 2
    assert settings[ParallelConfig].sequence_parallel
    assert settings[RetroConfig].retro_num_neighbors == 3
    assert settings[ModelConfig].swiglu and not settings[ModelConfig].disable_bias_linear


@pytest.mark.parametrize("name", [name for name, (_, spec) in specs_by_name(ALL_SECTIONS).items() if spec.kind is bool])
def test_a_switch_sets_what_it_says_and_its_opposite_the_other(name: str) -> None:
    """Megatron's --no-load-optim too, whose opposite is --load-optim."""
    section, spec = specs_by_name(ALL_SECTIONS)[name]
    off = spec.flag.replace("--no-", "--", 1) if spec.flag.startswith("--no-") else spec.flag.replace("--", "--no-", 1)
    for flag, expected in ((spec.flag, True), (off, False)):
        settings, _ = parse_settings("t", [section], [flag], all_sections=ALL_SECTIONS)
        assert getattr(settings[section], name) is expected


def test_every_field_is_one_flag() -> None:
    specs_by_name(ALL_SECTIONS)
    names = [section_name(section) for section in ALL_SECTIONS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("section", ALL_SECTIONS, ids=section_name)
def test_every_field_is_explained_and_its_default_is_legal(section: type) -> None:
    for spec in field_specs(section):
        assert spec.help, spec.name
        assert spec.default is None or spec.problem(spec.default) is None, spec.name


def test_megatrons_spelling_of_the_chunk_length_is_taken_and_a_flag_without_meaning_is_explained() -> None:
    for flag in ("--retro-chunk-length", "--retro-gpt-chunk-length"):
        settings, _ = parse_settings("x", SECTIONS, [flag, "32"], all_sections=ALL_SECTIONS)
        assert settings[RetroConfig].retro_chunk_length == 32
        assert settings.origin("retro_chunk_length") == "flag"
    with pytest.raises(ConfigError, match=r"--retro-cyclic-train-iters is no flag of this command: .*--train-iters"):
        parse_settings("x", [RetroConfig], ["--retro-cyclic-train-iters", "5"], all_sections=ALL_SECTIONS)


def test_unknown_flag_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--num-layer is no flag.*--num-layers"):
        parse("--num-layer", "3")


def test_an_unknown_flag_takes_its_value_with_it_and_flags_that_do_not_exist_are_not_advised() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings("x", [TokenizerConfig], ["--retro-gpt-vocab-file", "a", "b"], all_sections=ALL_SECTIONS)
    assert "(did you mean --vocab-file?)" in str(caught.value)
    assert "--no-vocab-file" not in str(caught.value) and "stands alone" not in str(caught.value)
    with pytest.raises(ConfigError, match="'b' stands alone"):
        parse("b")


def test_flags_of_megatrons_other_scripts_are_explained() -> None:
    for flag, said in (
        ("--split-sentences", "leave it out"),
        ("--retro-gpt-seed", "belong to the corpus"),
        ("--use-flash-attn", "fastest kernel"),
        ("--DDP-impl", "--data-parallel-sharding"),
        ("--override-opt_param-scheduler", "that of the command"),
        ("--confg", "did you mean --config"),
    ):
        with pytest.raises(ConfigError, match=f"{flag} is no flag of this command.*{said}"):
            parse(flag, "1")


def test_no_flag_of_ours_is_explained_away() -> None:
    ours = {spelling for section in ALL_SECTIONS for spec in field_specs(section) for spelling in spec.spellings}
    assert BY_FLAG.keys() & ours == set()


def test_a_verb_takes_no_flag_that_it_does_not_read(tmp_path: Path) -> None:
    """Of a recipe that other verbs share, the same setting is no fault."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[retro]\nretro_chunk_length = 32\nretro_num_neighbors = 5\n")
    words = ["--config", str(recipe), "--retro-num-neighbors", "3"]
    reads = {RetroConfig: ("retro_chunk_length",)}
    with pytest.raises(ConfigError, match="--retro-num-neighbors is no flag of this command; other verbs read it"):
        parse_settings("x", [RetroConfig], words, all_sections=ALL_SECTIONS, reads=reads)
    settings, _ = parse_settings("x", [RetroConfig], words[:2], all_sections=ALL_SECTIONS, reads=reads)
    assert settings[RetroConfig].retro_chunk_length == 32


def test_illegal_values_are_all_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("--num-layers", "many", "--rotary-percent", "1.5", "--normalization", "batch")
    for part in ("--num-layers many", "--rotary-percent 1.5", "--normalization batch", "LayerNorm"):
        assert part in str(caught.value)


def test_toml_syntax_error_has_line_and_column() -> None:
    with pytest.raises(ConfigError, match=r"bad\.toml, line 2, column \d+"):
        parse_toml("[model]\nnum_layers = = 3\n", "bad.toml")


def test_toml_faults_are_all_reported() -> None:
    document = {"model": {"num_layer": 3, "seed": 1, "hidden_size": "wide"}, "modle": {}}
    with pytest.raises(ConfigError) as caught:
        flat_values(document, "recipe.toml", SECTIONS, ALL_SECTIONS)
    for part in ("did you mean num_layers", "seed belongs in [training]", "hidden_size = 'wide'", "did you mean model"):
        assert part in str(caught.value)


def test_a_setting_that_moved_may_stand_in_its_former_table() -> None:
    for table in ("data", "retro"):
        found = flat_values(
            {table: {"retro_no_retrieval_probability": 0.1}}, "recipe.toml", (DataConfig,), ALL_SECTIONS
        )
        assert found == {"retro_no_retrieval_probability": 0.1}


@hypothesis_settings(deadline=None)
@given(layers=st.integers(1, 99), base=st.floats(1, 1e9), window=st.none() | st.integers(1, 9999))
def test_printed_toml_reads_back(layers: int, base: float, window: int | None) -> None:
    settings = Settings([ModelConfig(num_layers=layers, rotary_base=base, sliding_window=window), RetroConfig()])
    values = flat_values(parse_toml(render_toml(settings), "printed"), "printed", SECTIONS, ALL_SECTIONS)
    assert values["num_layers"] == layers
    assert values["rotary_base"] == base
    assert values.get("sliding_window") == window


@pytest.mark.parametrize("name", preset_names() or ["-"])
def test_presets_are_legal(name: str) -> None:
    if name != "-":
        assert read_recipe(preset_path(name), ALL_SECTIONS, ALL_SECTIONS)


def recipes(folder: Path, **texts: str) -> Path:
    """Files NAME.toml; the path of the first."""
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)
    return folder / f"{next(iter(texts))}.toml"


SIZED = """
base = "lower.toml"
[model]
num_layers = 3
[preset.gpt-tiny]
model = { num_layers = 4 }
[preset.retro-tiny.retro]
retro_num_neighbors = 3
"""


@pytest.mark.parametrize(("preset", "layers", "neighbors"), [("gpt-tiny", 4, 2), ("retro-tiny", 3, 3)])
def test_a_recipe_says_what_differs_by_preset(preset: str, layers: int, neighbors: int, tmp_path: Path) -> None:
    """Preset below base below recipe below what it says for the preset."""
    lower = "[model]\nnum_layers = 2\nhidden_size = 32\n[preset.retro-tiny.model]\nkv_channels = 16\n"
    words = ["--preset", preset, "--config", str(recipes(tmp_path, sized=SIZED, lower=lower))]
    settings = parse(*words)
    model = settings[ModelConfig]
    assert (model.num_layers, settings[RetroConfig].retro_num_neighbors) == (layers, neighbors)
    assert (model.hidden_size, model.swiglu) == (32, True)
    assert model.kv_channels == (16 if preset == "retro-tiny" else None)
    assert parse(*words, "--num-layers", "7")[ModelConfig].num_layers == 7


@pytest.mark.parametrize("words", [[], ["--preset", "gpt-43b"]])
def test_a_recipe_of_some_presets_serves_no_others(words: list[str], tmp_path: Path) -> None:
    path = recipes(tmp_path, sized=SIZED, lower="")
    with pytest.raises(ConfigError, match=r"(?s)has no settings for .*expected: gpt-tiny, retro-tiny"):
        parse(*words, "--config", str(path))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"one": 'base = "two.toml"', "two": 'base = "one.toml"'}, "builds on itself"),
        ({"one": 'base = "three.toml"'}, "cannot read"),
        ({"one": "base = 3"}, "cannot read"),
        ({"one": "[preset.gpt-tinny.model]\nnum_layers = 2"}, "did you mean gpt-tiny"),
        ({"one": 'preset = "gpt-tiny"'}, "\\[preset\\] is no table"),
        ({"one": "[preset]\ngpt-tiny = 3"}, "\\[preset.gpt-tiny\\] is no table"),
        ({"one": "[preset.gpt-tiny.model]\nnum_layer = 2"}, "did you mean num_layers"),
    ],
)
def test_what_is_wrong_with_a_base_or_a_size_is_named(texts: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        parse("--preset", "gpt-tiny", "--config", str(recipes(tmp_path, **texts)))


def test_configuration_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, megatron_retro.config.sections, megatron_retro.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("text", ["a = 1\na = 2\n", "[training]\nlr = 1\n[training]\nlr = 2\n", "a.b = 1\na.b = 2\n"])
def test_what_stands_twice_in_a_recipe_is_named(text: str) -> None:
    from megatron_retro.config.toml_files import parse_toml

    with pytest.raises(ConfigError, match="not valid TOML"):
        parse_toml(text, "recipe.toml")
