"""The matrix instruction as the shim executes it: lanes by the PTX ISA's tables, values by a float64 product.

The tables are written here once more, from the ISA's text, so that the shim cannot share an error with its test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
LANES = [divmod(lane, 4) for lane in range(32)]  # the ISA's groupID and threadID_in_group

pytestmark = pytest.mark.skipif(COMPILER is None or not CSRC.exists(), reason="needs csrc and a C++ compiler")

PROGRAM = """
#include <cstdio>
#include "cuda/matrix.cuh"
using namespace megatron_retro::device;

uint32_t registers[64][6], loaded[64][4];
float sums[64][4], products[3][64][2][4];
uint16_t numbers[2][16 * 24], copied[64][8];

template <typename Element> __global__ void multiply() {
  uint32_t left[4], right[2];
  std::copy_n(registers[threadIdx.x], 4, left);
  std::copy_n(registers[threadIdx.x] + 4, 2, right);
  multiply_add<Element>(sums[threadIdx.x], left, right);
}

__global__ void load(bool transposed) {
  uint16_t* shared = shared_memory<uint16_t>();
  if (threadIdx.x == 0) std::copy_n(numbers[0], 16 * 24, shared);
  __syncthreads();
  const int lane = threadIdx.x % 32;  // one matrix beside the other, two above two
  const uint16_t* row = shared + (lane / 16 * 8 + lane % 8) * 24 + lane / 8 % 2 * 8;
  transposed ? load_transposed(loaded[threadIdx.x], row) : load_matrices(loaded[threadIdx.x], row);
}

// left right, left right^T, and (left right) rounded times right
template <typename Element> __global__ void chain() {
  Element* shared = shared_memory<Element>();
  for (int i = threadIdx.x; i < 2 * 16 * 24; i += 64) shared[i] = Element{numbers[0][i]};
  __syncthreads();
  uint32_t left[4], right[2][2];
  float(&all)[3][64][2][4] = products;
  const int thread = threadIdx.x;
  load_left(shared, 24, left);
  load_right(shared + 16 * 24, 24, right);
  for (int half = 0; half < 2; ++half) multiply_add<Element>(all[0][thread][half], left, right[half]);
  load_right_transpose(shared + 16 * 24, 24, right);
  for (int half = 0; half < 2; ++half) multiply_add<Element>(all[1][thread][half], left, right[half]);
  as_left<Element>(all[0][thread][0], all[0][thread][1], left);
  load_right(shared + 16 * 24, 24, right);
  for (int half = 0; half < 2; ++half) multiply_add<Element>(all[2][thread][half], left, right[half]);
}

__global__ void copy(bool wait) {
  uint16_t* shared = shared_memory<uint16_t>();
  copy_16_bytes(shared + threadIdx.x * 8, threadIdx.x % 2 ? numbers[0] + threadIdx.x % 32 * 8 : nullptr);
  if (wait) wait_for_copies();
  __syncthreads();
  std::copy_n(shared + (63 - threadIdx.x) * 8, 8, copied[threadIdx.x]);
}

template <typename Values> void read(Values& values) {
  if (std::fread(&values, sizeof(values), 1, stdin) != 1) std::exit(2);
}
template <typename Values> void write(const Values& values) { std::fwrite(&values, sizeof(values), 1, stdout); }

template <typename Element> void run(const std::string& what) {
  const auto launch = [](auto&& kernel) { shim::launch(1, 64, 4096, kernel); };
  if (what == "multiply") read(registers), read(sums), launch([] { multiply<Element>(); }), write(sums);
  if (what == "chain") read(numbers), launch([] { chain<Element>(); }), write(products);
  if (what == "load") read(numbers), launch([] { load(false); }), write(loaded);
  if (what == "transposed") read(numbers), launch([] { load(true); }), write(loaded);
  if (what == "copy") read(numbers), launch([] { copy(true); }), write(copied);
  if (what == "hasty") read(numbers), launch([] { copy(false); }), write(copied);
}

int main(int, char** words) { words[2][0] == 'b' ? run<BFloat16>(words[1]) : run<Half>(words[1]); }
"""

Program = Callable[..., NDArray[np.uint8]]


def built(folder: Path, csrc: Path) -> Program:
    """PROGRAM over the headers of `csrc`."""
    (folder / "program.cpp").write_text(PROGRAM)
    includes = [f"-I{csrc / each}" for each in ("shim", "operators")]
    command = [str(COMPILER), "-std=c++17", "-O1", "-w", "-DMEGATRON_RETRO_SHIM", *includes]
    subprocess.run([*command, "program.cpp", "-o", "program"], check=True, cwd=folder)

    def run(what: str, dtype: torch.dtype, *given: NDArray[np.generic], seed: int = 0) -> NDArray[np.uint8]:
        words = [str(folder / "program"), what, "b" if dtype == torch.bfloat16 else "h"]
        sent = b"".join(np.ascontiguousarray(each).tobytes() for each in given)
        environment = {"MEGATRON_RETRO_SHIM_SEED": str(seed)}
        ran = subprocess.run(words, input=sent, env=environment, capture_output=True, check=True)
        return np.frombuffer(ran.stdout, np.uint8)

    return run


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return built(tmp_path_factory.mktemp("matrix"), CSRC)


def bits(values: Tensor) -> NDArray[np.uint16]:
    return np.asarray(values.contiguous().view(torch.int16).numpy().view(np.uint16))


def pair(low: int, high: int) -> int:
    return int(low) | int(high) << 16


def left_registers(left: NDArray[np.uint16]) -> list[list[int]]:
    """`a` of mma.m16n8k16: eight numbers to a lane, two to a register."""
    found = []
    for group, thread in LANES:
        rows = [group if i in (0, 1, 4, 5) else group + 8 for i in range(8)]
        columns = [thread * 2 + (i & 1) + (0 if i < 4 else 8) for i in range(8)]
        a = left[rows, columns]
        found.append([pair(a[i], a[i + 1]) for i in range(0, 8, 2)])
    return found


def right_registers(right: NDArray[np.uint16]) -> list[list[int]]:
    """`b`: four numbers to a lane."""
    found = []
    for group, thread in LANES:
        b = right[[thread * 2 + (i & 1) + (0 if i < 2 else 8) for i in range(4)], group]
        found.append([pair(b[0], b[1]), pair(b[2], b[3])])
    return found


def spread_sums(sums: NDArray[np.float32]) -> NDArray[np.float32]:
    """`c` and `d`: [16, 8] to [lane, 4]."""
    return np.array(
        [[sums[group + (0 if i < 2 else 8), thread * 2 + (i & 1)] for i in range(4)] for group, thread in LANES],
        np.float32,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_lane_holds_what_the_isa_says(program: Program, dtype: torch.dtype, seed: int) -> None:
    """Two warps with numbers of their own."""
    torch.manual_seed(seed)
    left, right = torch.randn(2, 16, 16).to(dtype), torch.randn(2, 16, 8).to(dtype)
    sums = torch.randn(2, 16, 8)
    registers = [
        [*a, *b]
        for warp in range(2)
        for a, b in zip(left_registers(bits(left[warp])), right_registers(bits(right[warp])), strict=True)
    ]
    given = np.concatenate([spread_sums(each.numpy()) for each in sums])
    got = program("multiply", dtype, np.array(registers, np.uint32), given, seed=seed).view(np.float32).reshape(64, 4)
    exact = sums.double() + left.double() @ right.double()
    expected = np.concatenate([spread_sums(each.numpy()) for each in exact])
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    assert np.unique(expected).size == expected.size  # no two lanes could be confused


@pytest.mark.parametrize("transposed", [False, True])
def test_loaded_matrices_lie_as_the_isa_says(program: Program, transposed: bool) -> None:
    numbers = np.arange(2 * 16 * 24, dtype=np.uint16)
    got = program("transposed" if transposed else "load", torch.float16, numbers).view(np.uint32).reshape(64, 4)
    area = numbers[: 16 * 24].reshape(16, 24)
    matrices = [area[up : up + 8, left : left + 8] for up in (0, 8) for left in (0, 8)]
    for lane, (group, thread) in enumerate(LANES):
        given = [each.T if transposed else each for each in matrices]
        expected = [pair(each[group, 2 * thread], each[group, 2 * thread + 1]) for each in given]
        assert got[lane].tolist() == got[lane + 32].tolist() == expected


def check_products(program: Program, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tiles = torch.randn(2, 16, 24).to(dtype)  # eight columns of each are padding
    got = program("chain", dtype, bits(tiles)).view(np.float32).reshape(3, 2, 32, 2, 4)
    left, right = tiles[:, :, :16].double()
    first = left @ right
    for which, exact in enumerate((first, left @ right.T, first.float().to(dtype).double() @ right)):
        for half in range(2):
            expected = spread_sums(exact[:, half * 8 : half * 8 + 8].numpy())
            tolerance = 1e-5 if which < 2 else 0.1  # a sum may be rounded to the neighbor
            for warp in range(2):
                np.testing.assert_allclose(got[which, warp, :, half], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_tiles_in_shared_memory(program: Program, dtype: torch.dtype) -> None:
    """What the kernels are made of: both kinds of right operand, and sums that become a left one."""
    check_products(program, dtype)


FAULTS = {  # of csrc/operators/cuda/matrix.cuh
    "a register of the left operand": ("left[1] = packed<Element>(low[2], low[3])", "left[1] = left[0]"),
    "registers in another order": ("left[2] = packed<Element>(high[0], high[1])", "left[2] = left[3]"),
    "two numbers of a register": ("narrow(first, pair.each[0])", "narrow(second, pair.each[0])"),
    "rows of the left operand": ("load_matrices(left, corner + lane % 16", "load_matrices(left, corner + lane / 2"),
    "not transposed": ("load_transposed(matrices, corner", "load_matrices(matrices, corner"),
    "the other right operand": ("lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2", "lane % 16) * stride + lane / 16"),
}


def test_a_number_in_the_wrong_lane_or_register_is_noticed(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    header = tmp_path / "csrc" / "operators" / "cuda" / "matrix.cuh"
    shutil.copytree(CSRC, tmp_path / "csrc")
    text = header.read_text()
    for fault, (right, wrong) in list(FAULTS.items())[: count(2, len(FAULTS))]:
        assert text.count(right) == 1, fault
        header.write_text(text.replace(right, wrong))
        with pytest.raises(AssertionError):
            check_products(built(tmp_path, tmp_path / "csrc"), torch.bfloat16)


def test_a_copy_is_there_after_the_wait_and_not_before(program: Program) -> None:
    numbers = np.arange(1, 2 * 16 * 24 + 1, dtype=np.uint16)
    rows = numbers[: 32 * 8].reshape(32, 8)
    expected = np.array([rows[i % 32] if i % 2 else np.zeros(8) for i in reversed(range(64))], np.uint16)
    assert np.array_equal(program("copy", torch.float16, numbers).view(np.uint16).reshape(64, 8), expected)
    hasty = program("hasty", torch.float16, numbers).view(np.float16)
    assert np.isnan(hasty).any()
