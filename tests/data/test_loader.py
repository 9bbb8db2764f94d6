"""What the loader hands out: one global order for any ranks, resumed exactly, from one source or many."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_retro.data.builders import build_dataset, build_loader
from megatron_retro.data.dataset import MockSamples
from megatron_retro.data.loader import Loader
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.microbatch import Array, Microbatch
from megatron_retro.testing.sample_corpora import EOD, LENGTH, config, corpus, retro_config, same


def everything(loader: Any, steps: int) -> list[Microbatch[Array]]:
    return [batch for _ in range(steps) for batch in next(loader)]


@pytest.mark.parametrize("threads", [0, 3])
def test_the_global_order_is_the_same_for_any_ranks(tmp_path: Path, threads: int) -> None:
    file = corpus(tmp_path / "a")
    setting = retro_config(tmp_path, file, num_workers=threads)
    whole = everything(build_loader(setting, eod=EOD), 5)
    by_number = {int(n): batch.tokens_BS[i] for batch in whole for i, n in enumerate(batch.sample_ids_B)}
    assert sorted(by_number) == list(range(40))
    for size in (1, 2, 4):
        loaders = [build_loader(setting, eod=EOD, data_rank=rank, data_size=size) for rank in range(size)]
        for step in range(5):
            batches = [batch for loader in loaders for batch in next(loader)]
            numbers = [int(n) for batch in batches for n in batch.sample_ids_B]
            assert numbers == list(range(8 * step, 8 * step + 8))
            rows = [row for batch in batches for row in batch.tokens_BS]
            assert all((row == by_number[number]).all() for row, number in zip(rows, numbers, strict=True))
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_resume_goes_on_exactly_with_any_ranks(tmp_path: Path, threads: int) -> None:
    file = corpus(tmp_path / "a")
    setting = retro_config(tmp_path, file, num_workers=threads)
    unbroken = everything(build_loader(setting, eod=EOD), 9)
    first = build_loader(setting, eod=EOD, data_size=2, data_rank=1)
    everything(first, 4)
    state = first.state()
    assert state["consumed_samples"] == 32
    resumed = build_loader(setting, eod=EOD)
    everything(resumed, 2)
    resumed.load_state(state)
    again = everything(resumed, 5)
    assert all(same(a, b) for a, b in zip(again, unbroken[16:], strict=True))
    other = build_loader(config([file.prefix], seq_length=2 * LENGTH), eod=EOD)
    with pytest.raises(ArtifactError, match="another order"):
        other.load_state(state)


@pytest.mark.parametrize("threads", [0, 3])
def test_the_first_steps_are_read_alone_and_leave_the_place(tmp_path: Path, threads: int) -> None:
    """What an evaluation reads: by threads as without, nothing behind it, at any place of the order."""
    setting = retro_config(tmp_path, corpus(tmp_path / "a"), num_workers=threads)
    expected = everything(build_loader(setting, eod=EOD, data_size=2, data_rank=1), 3)
    loader = build_loader(setting, eod=EOD, data_size=2, data_rank=1)
    dataset, numbers = loader.dataset, list[int]()

    class Watched:
        def read(self, wanted: Sequence[int]) -> Microbatch[Array]:
            numbers.extend(wanted)
            return dataset.read(wanted)

    loader.dataset = Watched()  # type: ignore[assignment]
    loader.seek(16)
    assert all(same(a, b) for a, b in zip(loader.first(3), expected, strict=True))
    assert loader.consumed_samples == 16 and loader.first(0) == []
    assert sorted(numbers) == sorted(int(number) for batch in expected for number in batch.sample_ids_B)
    loader.close()


def random_read_files(folder: Path) -> set[str]:
    """Names of the mapped files below a folder that the system was told to read at random."""
    found, name = set(), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            path = Path(line.split(maxsplit=5)[-1])
            name = path.name if path.is_relative_to(folder) else ""
        elif name and line.startswith("VmFlags:") and " rr" in line:
            found.add(name)
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_tables_and_databases_are_read_at_random_and_samples_are_not(tmp_path: Path) -> None:
    """A neighbour is a few hundred bytes anywhere: reading on behind it would fetch hundreds of times as much."""
    file = corpus(tmp_path / "a")
    setting = retro_config(tmp_path, file)
    assert random_read_files(tmp_path) == set()
    dataset = build_dataset(setting, "train", eod=EOD)
    dataset.read(range(8))
    found = random_read_files(tmp_path)
    assert any(name.startswith("rows-") for name in found) and "a.bin" in found
    stream = dataset.sources[0].samples.file.stream
    own = [line for line in smaps_of(stream) if line.startswith("VmFlags:")]
    assert own and " rr" not in own[0]


def smaps_of(content: np.ndarray[Any, Any]) -> list[str]:
    """What the system says of the mapping that holds an array."""
    place, lines, inside = content.__array_interface__["data"][0], list[str](), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= place < int(bounds[2], 16)
        elif inside:
            lines.append(line)
    return lines


def test_batch_sizes_may_grow(tmp_path: Path) -> None:
    file = corpus(tmp_path / "a")
    loader = build_loader(config([file.prefix]), eod=EOD, global_batch_size=lambda done: 4 if done < 8 else 8)
    assert [sum(batch.num_samples for batch in next(loader)) for _ in range(4)] == [4, 4, 8, 8]
    assert loader.state()["consumed_samples"] == 24
    bad = build_loader(config([file.prefix]), eod=EOD, data_size=3)
    with pytest.raises(ConfigError, match="multiple"):
        next(bad)


def test_seeds_and_contents_change_the_order(tmp_path: Path) -> None:
    file, other = corpus(tmp_path / "a"), corpus(tmp_path / "b", 1)
    orders = [
        build_dataset(config([path], training={"seed": seed}), "train", eod=EOD)
        .sources[0]
        .samples.first_chunks(np.arange(50))
        for path in (file.prefix, other.prefix)
        for seed in (1, 2)
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_a_blend_draws_from_each_source_in_its_own_order(tmp_path: Path) -> None:
    files = [corpus(tmp_path / name, seed) for seed, name in enumerate("abc")]
    words = [word for weight, file in zip((5, 1, 2), files, strict=True) for word in (weight, file.prefix)]
    dataset = build_dataset(config(words), "train", eod=EOD)
    batch = dataset.read(range(64))
    drawn = [0, 0, 0]
    for row, number in zip(batch.tokens_BS, range(64), strict=True):
        source, place = dataset.blend.locate(number)
        assert place == drawn[source]
        drawn[source] += 1
        samples = dataset.sources[source].samples
        start = int(samples.first_chunks(np.array([place]))[0]) * LENGTH
        assert (row == files[source].stream[start : start + 32]).all()
    assert drawn == [40, 8, 16]
    assert np.allclose(
        dataset.epochs(64), [n / s.samples.num_samples for n, s in zip(drawn, dataset.sources, strict=True)]
    )


def test_samples_know_their_documents_through_all_sources(tmp_path: Path) -> None:
    """Against a walk over the documents: sample by sample, the document of its middle token."""
    files = [corpus(tmp_path / "a", seed=1), corpus(tmp_path / "b", seed=2)]
    dataset = build_dataset(config([1, files[0].prefix, 3, files[1].prefix]), "train", eod=EOD)
    owners = [[number for number in range(file.num_documents) for _ in file.document(number)] for file in files]
    batch = dataset.read(range(40))
    for number, document in enumerate(dataset.documents(range(40))):
        source, draw = dataset.blend.locate(number)
        middle = int(dataset.sources[source].samples.first_chunks(np.array([draw]))[0]) * LENGTH + 2 * LENGTH
        assert batch.tokens_BS[number, 2 * LENGTH] == files[source].stream[middle]
        assert document == owners[source][middle] + (files[0].num_documents if source else 0)


def megatron_boundaries(tokens: np.ndarray, eod: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Megatron's _get_ltor_masks_and_position_ids for one sample: loss mask, positions, who may attend to whom."""
    length = len(tokens)
    allowed = np.tril(np.ones((length, length), bool))
    positions = np.arange(length)
    previous = 0
    for end in np.flatnonzero(tokens == eod):
        allowed[end + 1 :, : end + 1] = False
        positions[end + 1 :] -= end + 1 - previous
        previous = end + 1
    return tokens != eod, positions, allowed


def test_document_borders_are_treated_as_megatron_treats_them(tmp_path: Path) -> None:
    file = corpus(tmp_path / "a", longest=20)
    flags = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    batch = build_dataset(config([file.prefix], **flags), "train", eod=EOD).read(range(30))
    assert batch.position_ids_BS is not None and batch.document_ids_BS is not None
    for row in range(30):
        loss, positions, allowed = megatron_boundaries(batch.tokens_BS[row], EOD)
        documents = batch.document_ids_BS[row]
        causal = np.tril(np.ones((32, 32), bool)) & (documents[:, None] == documents[None, :])
        assert (batch.loss_mask_BS[row] == loss).all()
        assert (batch.position_ids_BS[row] == positions).all()
        assert (causal == allowed).all() and documents[0] == 0


def test_retrieval_noise_hits_its_share_of_samples(tmp_path: Path) -> None:
    file = corpus(tmp_path / "a", count=400)
    plain = build_dataset(retro_config(tmp_path, file), "train", eod=EOD)
    noise = {"retro_no_retrieval_probability": 0.3, "retro_random_retrieval_probability": 0.3}
    noisy = build_dataset(retro_config(tmp_path, file, **noise), "train", eod=EOD)
    a, b = plain.read(range(300)), noisy.read(range(300))
    assert (a.tokens_BS == b.tokens_BS).all() and a.neighbors is not None and b.neighbors is not None
    absent = ~b.neighbors.mask_BCKR.any(axis=(1, 2, 3))
    equal = (a.neighbors.tokens_BCKR == b.neighbors.tokens_BCKR).all(axis=(1, 2, 3))
    assert 0.2 < absent.mean() < 0.4 and 0.12 < (~equal & ~absent).mean() < 0.32
    assert same(b, noisy.read(range(300))) and noisy.fingerprint != plain.fingerprint
    valid = build_dataset(retro_config(tmp_path, file, **noise, split="1,1"), "valid", eod=EOD)
    assert valid.transforms.absent_samples == 0.0


def test_a_validation_corpus_of_its_own_is_used_whole(tmp_path: Path) -> None:
    train, valid = corpus(tmp_path / "a"), corpus(tmp_path / "v", 5)
    setting = config([train.prefix], valid_data_path=(valid.prefix,), split="1")
    dataset = build_dataset(setting, "valid", eod=EOD)
    assert dataset.sources[0].samples.file.fingerprint == valid.fingerprint
    assert dataset.num_samples == (valid.num_tokens - 1) // 32


def test_mock_data_has_the_shape_of_a_run_and_one_order() -> None:
    setting = config(["nowhere"], {"retro_add_retriever": True}, mock_data=True)
    whole, half = build_loader(setting, eod=None), build_loader(setting, eod=None, data_size=2, data_rank=1)
    first, second = next(whole), next(half)
    assert first[0].tokens_BS.shape == (2, 32) and first[0].neighbors is not None
    assert first[0].neighbors.tokens_BCKR.shape == (2, 4, 2, 16)
    assert all(same(a, b) for a, b in zip(first[2:], second, strict=True)) and not same(first[0], first[1])


def test_a_gpu_gets_its_copy_from_the_thread_that_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` stands for it; a CPU gets none. What is made of a microbatch has no part in its copy."""
    gpu, threads, to = torch.device("meta"), [], Microbatch.to

    def noting(batch: Microbatch[Any], device: torch.device) -> Any:
        threads.append(threading.current_thread().name)
        return to(batch, device)

    monkeypatch.setattr(Microbatch, "to", noting)
    samples = MockSamples(1, 100, 16, 4, 2, 8)
    for device, expected in ((gpu, 2), (torch.device("cpu"), 0)):
        threads.clear()
        loader = Loader(samples, micro_batch_size=2, global_batch_size=4, num_threads=1, device=device)
        step = next(loader)
        loader.close()
        assert len(step) == 2 and len(threads) >= expected and all(name.startswith("loader") for name in threads)
        assert bool(threads) == bool(expected)
    loader = Loader(samples, micro_batch_size=2, global_batch_size=2, num_threads=1, device=gpu)
    (batch,) = next(loader)
    loader.close()
    copied = batch.to(gpu)
    assert copied is batch.to(gpu) and copied.tokens_BS.is_meta
    assert replace(batch, neighbors=None).to(gpu).neighbors is None
