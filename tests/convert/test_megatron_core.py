"""Checkpoints that megatron-core 0.15.3 wrote: their function stays, their pickles run nothing, a retro-fit starts."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_retro.assembly.loading import load_model
from megatron_retro.checkpoint.loading import open_checkpoint, stored_settings
from megatron_retro.cli.main import main
from megatron_retro.config.command_line import parse_settings
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import read_parameter, write_checkpoint
from megatron_retro.convert.core_names import EMBEDDING
from megatron_retro.convert.distributed_checkpoint import DistributedTensors
from megatron_retro.convert.megatron_core import read_distributed
from megatron_retro.convert.megatron_export import core_problems
from megatron_retro.convert.megatron_import import import_megatron
from megatron_retro.errors import ArtifactError
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.testing.tiny_models import random_model, random_tokens, tiny_model
from tests.data.byte_level import save_byte_level
from tests.peer_core import require_core, run_beside_core

DATA = Path(__file__).parent / "data"
BYTES = TokenizerConfig()
OF_BYTES = ["--tokenizer-type", "ByteTokenizer"]
LLAMA_BOUNDS = {
    "rope_scaling_low_freq_factor": 1.0,
    "rope_scaling_high_freq_factor": 4.0,
    "rope_scaling_original_max_positions": 8192,
}
WHOLE = ("llama", "gpt", "qwen", "retro", "retro_rope")
OURS = ("squared_relu", "rescaled", "stretched")
CUT = ("gpt_1_2", "gpt_2_1", "gpt_2_2", "llama_2_2", "qwen_2_1", "retro_2_1", "retro_rope_2_1")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("core")
    with tarfile.open(DATA / "core_checkpoints.tar.xz") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def written(stored: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    for name in ("llama", "gpt"):
        shutil.copytree(stored / name, tmp_path / name)
    return tmp_path


def silent(text: str) -> None:
    del text


def model_of(run: Path) -> Retro:
    checkpoint = open_checkpoint(run)
    settings = stored_settings(checkpoint)
    model = Retro(settings[ModelConfig], settings[RetroConfig]).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read_parameter(checkpoint, name))
    return model


def expected_of(stored: Path, name: str) -> dict[str, Tensor]:
    whole = max((each for each in WHOLE if name.startswith(each)), key=len)
    found: dict[str, Tensor] = torch.load(stored / whole / "expected.pt", weights_only=True)
    return found


def neighbors_of(expected: dict[str, Tensor], suffix: str = "") -> Neighbors[Tensor] | None:
    tokens = expected.get(f"neighbors{suffix}")
    if tokens is None:
        return None
    # the mask says that half is absent; core has no masks
    return Neighbors(tokens[None], torch.arange(tokens.numel()).view_as(tokens)[None] % 2 == 0)


@pytest.mark.parametrize("name", [*WHOLE, *CUT, *(f"{name}_torch" for name in CUT)])
@torch.no_grad()
def test_computes_what_core_computes(name: str, stored: Path, tmp_path: Path) -> None:
    """Whatever cut wrote it, and in which of core's formats; a text may have a short first chunk."""
    said: list[str] = []
    import_megatron(stored / name, tmp_path, BYTES, said.append)
    model, expected = model_of(tmp_path), expected_of(stored, name)
    for suffix in ("", "_short"):
        logits = model(expected[f"tokens{suffix}"], neighbors_of(expected, suffix))
        assert (logits - expected[f"logits{suffix}"]).abs().max() < 1e-9
    assert ("retro_core_checkpoint" in " ".join(said)) == name.startswith("retro") == model.retro.retro_core_checkpoint
    assert len(said) <= 4 and "_extra_state" not in " ".join(said)


def test_what_lies_beside_the_model_is_named_and_stays_behind(stored: Path, tmp_path: Path) -> None:
    """By kind, however many entries there are; extra states of layers are not worth a word."""
    folder = tmp_path / "iter_0000005"
    names = ("optimizer.state.exp_avg.w", "chained_0.optimizer.state.exp_avg.w", "decoder.x._extra_state", EMBEDDING)
    state = {name: torch.zeros(16, 8) for name in names}
    save(state, storage_writer=FileSystemWriter(str(folder)), no_dist=True)
    for name in ("common.pt", "metadata.json"):
        shutil.copy(stored / "gpt" / "iter_0000005" / name, folder / name)
    assert read_distributed(folder).skipped == ("optimizer",)
    said: list[str] = []
    import_megatron(stored / "gpt_2_1_torch", tmp_path / "run", BYTES, said.append)
    assert "the optimizer's state stays behind" in " ".join(said)
    import_megatron(stored / "gpt", tmp_path / "another", BYTES, said.append)
    assert "skipped: nothing" in said[-1]


@pytest.mark.parametrize("name", ["retro", "retro_rope"])
@torch.no_grad()
def test_a_core_retro_generates_what_it_computes(name: str, stored: Path, tmp_path: Path) -> None:
    """With a cache, fed in pieces; a text of whole chunks has the same grid."""
    import_megatron(stored / name, tmp_path, BYTES, silent)
    model, expected = model_of(tmp_path), expected_of(stored, name)
    neighbors, cache, pieces = neighbors_of(expected), model.new_cache(1, 12), []
    assert neighbors is not None
    for start, stop in ((0, 5), (5, 6), (6, 8), (8, 12)):
        chunks = slice(start // 4, stop // 4)
        some = Neighbors(neighbors.tokens_BCKR[:, chunks], neighbors.mask_BCKR[:, chunks])
        pieces.append(model(expected["tokens"][:, start:stop], some, cache=cache))
    assert (torch.cat(pieces, 1) - expected["logits"]).abs().max() < 1e-9


def test_a_retrofit_starts_from_it(written: Path) -> None:
    main(["convert", str(written / "llama"), str(written / "run"), *OF_BYTES])
    flags = ["--mock-data", "--seq-length", "8", "--retro-chunk-length", "4", "--retro-layers", "2"]
    flags += ["--train-iters", "1", "--global-batch-size", "1", "--eval-iters", "0", "--num-workers", "0"]
    assert main(["retrofit", "--load", str(written / "run"), "--save", str(written / "retro"), *flags]) == 0
    assert stored_settings(open_checkpoint(written / "retro"))[RetroConfig].retro_add_retriever


class Dangerous:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("print('run')",)


def test_an_index_that_would_run_code_is_refused(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written / "gpt" / "iter_0000005"
    (folder / ".metadata").write_bytes(pickle.dumps(Dangerous()))
    with pytest.raises(ArtifactError, match="would run code") as raised:
        import_megatron(folder, written / "run", BYTES, silent)
    assert "builtins.exec" in str(raised.value) and "run" not in capsys.readouterr().out


def test_damage_is_named(written: Path) -> None:
    folder = written / "gpt" / "iter_0000005"
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:500])
    with pytest.raises(ArtifactError, match="cannot be read"):
        import_megatron(folder, written / "run", BYTES, silent)
    (folder / ".metadata").write_bytes(b"\x80\x04garbage")
    with pytest.raises(ArtifactError, match="cannot be read"):
        DistributedTensors(folder)
    assert not list((written / "run").glob("*"))


@pytest.mark.parametrize("name", ["llama", "gpt", "qwen", "retro", "retro_rope"])
@torch.no_grad()
def test_goes_out_as_core_writes_it(name: str, stored: Path, tmp_path: Path) -> None:
    """The index has core's own names and shapes, and every object that core asks for; it comes in again unchanged."""
    import_megatron(stored / name, tmp_path / "run", BYTES, silent)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--convert-to", "megatron-core"]) == 0
    theirs = DistributedTensors(stored / name / "iter_0000005")
    ours = DistributedTensors(tmp_path / "out" / "release")
    assert ours.shapes == theirs.shapes
    assert set(theirs.others) <= set(ours.others)
    assert all(torch.equal(ours.read(key), theirs.read(key).float()) for key in theirs.shapes)
    assert str(tmp_path).encode() not in (ours.folder / ".metadata").read_bytes()
    backend = "metadata.json"
    written = [json.loads((folder / backend).read_text()) for folder in (ours.folder, theirs.folder)]
    assert written[0] == written[1]
    import_megatron(tmp_path / "out", tmp_path / "again", BYTES, silent)
    model, expected = model_of(tmp_path / "again"), expected_of(stored, name)
    assert (model(expected["tokens"], neighbors_of(expected)) - expected["logits"]).abs().max() < 1e-9


def models_of_ours() -> dict[str, ModelConfig]:
    """What none of core's own checkpoints above has: settings that core must take from our run's arguments."""
    shape = {"num_layers": 2, "make_vocab_size_divisible_by": 1, "untie_embeddings_and_output_weights": True}
    plain = tiny_model(**shape, rotary_base=700.0)
    return {
        "squared_relu": replace(plain, squared_relu=True, kv_channels=8, rotary_percent=0.5, num_query_groups=2),
        "rescaled": replace(plain, kv_channels=16, rope_scaling_type="llama3", rope_scaling_factor=4.0, **LLAMA_BOUNDS),
        "stretched": replace(plain, rope_scaling_type="interpolated", rope_scaling_factor=3.0, norm_epsilon=1e-3),
    }


@pytest.fixture(scope="module")
def read_by_core(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each model: what we wrote, the logits that are expected, and what core made of it."""
    require_core()
    room = tmp_path_factory.mktemp("for_core")
    for name in WHOLE:
        import_megatron(stored / name, room / f"{name}_run", BYTES, silent)
        expected = expected_of(stored, name)
        export_for_core(room, name, {key: expected[key] for key in expected if not key.endswith("_short")})
    for name, config in models_of_ours().items():
        model = random_model(config, RetroConfig())
        tensors = dict(model.named_parameters())
        shapes = {each: tuple(tensor.shape) for each, tensor in tensors.items()}
        settings = Settings([config, RetroConfig(), BYTES])
        write_checkpoint(room / f"{name}_run", settings, shapes, lambda each, of=tensors: of[each].detach(), {})
        tokens = random_tokens(1, 24)
        with torch.no_grad():
            export_for_core(room, name, {"tokens": tokens, "logits": model.double()(tokens)})
    folders = [str(room / name) for name in (*WHOLE, *OURS)]
    run_beside_core(Path(__file__).with_name("core_loads.py"), *folders)
    return room


def export_for_core(room: Path, name: str, given: dict[str, Tensor]) -> None:
    main(["convert", str(room / f"{name}_run"), str(room / name), "--convert-to", "megatron-core"])
    torch.save(given, room / name / "given.pt")


@pytest.mark.parametrize("name", [*WHOLE, *OURS])
def test_core_itself_loads_it_and_computes_the_same(name: str, read_by_core: Path) -> None:
    """Core's model comes from the arguments that we wrote; it finds all it asks for, and ours holds nothing else."""
    computed = torch.load(read_by_core / name / "computed.pt", weights_only=True)
    given = torch.load(read_by_core / name / "given.pt", weights_only=True)
    assert computed["absent"] == []
    assert all(key.endswith("_extra_state") for key in computed["unasked"])  # of TransformerEngine's layers
    assert (computed["logits"] - given["logits"]).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--sliding-window", "8"], "sliding_window 8"),
        (["--no-rope-freq", "2"], "no_rope_freq 2"),
        (["--position-embedding-type", "relative"], "position_embedding_type relative"),
        (["--gelu-tanh", "--disable-bias-linear"], "gelu_tanh without biases"),
        (["--rope-scaling-type", "llama3", "--rope-scaling-low-freq-factor", "2"], "llama3 scaling with bounds"),
        (["--retro-add-retriever", "--retro-layers", "2", "--retro-chunk-length", "4"], "reads neighbours otherwise"),
    ],
)
def test_what_core_does_not_compute_does_not_go_out(flags: list[str], named: str) -> None:
    sections = (ModelConfig, RetroConfig)
    settings = parse_settings("pretrain", sections, flags, all_sections=sections)[0]
    problems = list(core_problems(settings[ModelConfig], settings[RetroConfig]))
    assert len(problems) == 1 and named in problems[0]


def test_the_padding_of_a_vocabulary_is_cut_off_where_asked(stored: Path, tmp_path: Path) -> None:
    said: list[str] = []
    import_megatron(stored / "qwen", tmp_path / "all", BYTES, said.append)
    assert "3 of 16 rows of the vocabulary fill it up: --convert-vocab-size 13" in " ".join(said)
    flags = ["--convert-vocab-size", "13", *OF_BYTES]
    assert main(["convert", str(stored / "qwen"), str(tmp_path / "true"), *flags]) == 0
    checkpoints = [open_checkpoint(tmp_path / name) for name in ("all", "true")]
    whole, true = (read_parameter(checkpoint, "output.weight") for checkpoint in checkpoints)
    assert len(whole) == 16 and torch.equal(true, whole[:13])
    with pytest.raises(ArtifactError, match="smaller vocabulary"):
        import_megatron(stored / "qwen", tmp_path / "wrong", BYTES, silent, vocab_size=17)


def test_a_model_without_a_tokenizer_is_refused(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(written / "llama"), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "holds no tokenizer" in error and "ByteTokenizer for a model of bytes" in error
    assert not (tmp_path / "run").exists()


def test_a_refusal_says_which_tokenizer_the_run_had(written: Path, tmp_path: Path) -> None:
    common = written / "gpt" / "iter_0000005" / "common.pt"
    content = torch.load(common, weights_only=False)
    content["args"].tokenizer_type, content["args"].tokenizer_model = "GPTSentencePieceTokenizer", "/old/text.model"
    torch.save(content, common)
    with pytest.raises(ArtifactError, match="tokenizer_type GPTSentencePieceTokenizer, tokenizer_model /old/text"):
        import_megatron(written / "gpt", tmp_path / "run", None, silent)


@pytest.mark.parametrize(("kind", "warned"), [("SentencePieceTokenizer", True), ("Llama2Tokenizer", False)])
def test_a_name_that_means_another_tokenizer_here_is_warned_of(kind: str, warned: bool, written: Path) -> None:
    common = written / "gpt" / "iter_0000005" / "common.pt"
    content = torch.load(common, weights_only=False)
    content["args"].tokenizer_type = "SentencePieceTokenizer"
    torch.save(content, common)
    said: list[str] = []
    import_megatron(written / "gpt", written / "run", TokenizerConfig(tokenizer_type=kind), said.append)
    assert ("here that is MegatronSentencePieceTokenizer" in " ".join(said)) == warned


def test_the_tokenizer_that_is_named_comes_along(written: Path, tmp_path: Path) -> None:
    save_byte_level(tmp_path / "tokenizer", ["</s>"])
    words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "tokenizer")]
    assert main(["convert", str(written / "llama"), str(tmp_path / "run"), *words]) == 0
    shutil.rmtree(tmp_path / "tokenizer")
    assert load_model(tmp_path / "run", device="cpu").tokenizer.vocab_size == 257
