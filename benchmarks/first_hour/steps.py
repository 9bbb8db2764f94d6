"""What the first hour does, step by step: each function returns its figures, or raises what its outcome is."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from outcomes import Failure, Skip, Stage, Step, TimedOut, end, last_lines

from megatron_retro.runtime.run_log import EVENTS, read_run_log
from megatron_retro.runtime.run_records import StepRecord

PROGRAM = ("-m", "megatron_retro.cli.main")
# One model of 0.9 billion parameters with its published shape, and one that a CPU steps through in a moment.
STEP_OF_A_GPU = ("--preset", "retro-878m", "--bf16", "--micro-batch-size", "2")
TINY = (
    *("--preset", "retro-tiny", "--vocab-size", "512", "--num-layers", "2", "--hidden-size", "32"),
    *("--num-attention-heads", "2", "--seq-length", "64", "--retro-chunk-length", "16", "--retro-layers", "2"),
    *("--micro-batch-size", "1"),
)
RUN = ("--mock-data", "--eval-iters", "0", "--log-interval", "1", "--lr", "1e-4", "--global-batch-size", "4")
SYMBOLS = """
import json, torch
from megatron_retro.ops import library
name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
print(json.dumps({
    "library": library.problem(), "cuda": library.cuda_problem(), "device": name,
    "architectures": library.compiled_architectures(),
}))
"""
PROOF = """
from megatron_retro.ops.verdicts import verdict_of
from megatron_retro.runtime.strict_json import json_text, to_plain
print(json_text(to_plain(verdict_of("cuda"))))
"""
SEARCH = """
import json, time
import numpy as np
try:
    import faiss
except ImportError:
    print(json.dumps({"skip": "faiss is not installed"})); raise SystemExit
if not getattr(faiss, "get_num_gpus", int)():
    print(json.dumps({"skip": "this faiss has no GPU"})); raise SystemExit
vectors = np.random.default_rng(0).standard_normal((200_000, 128)).astype("float32")
cpu = faiss.IndexFlatL2(128)
cpu.add(vectors)
gpu = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, cpu)
gpu.search(vectors[:1000], 10)
began = time.perf_counter()
_, found = gpu.search(vectors[:1000], 10)
seconds = time.perf_counter() - began
_, expected = cpu.search(vectors[:1000], 10)
same = float((found == expected).mean())
assert same > 0.999, f"{same:.4f} of the neighbours are those of the CPU"
print(json.dumps({"same_neighbors": same, "queries_per_second": 1000 / seconds}))
"""


def build(stage: Stage) -> Mapping[str, Any]:
    """Compile csrc for the GPU at hand."""
    if not stage.gpu:
        raise Skip("without a GPU, what the set-up compiled is used")
    return {"said": last_lines(stage.python("setup.py", "build_ext", "--inplace"))}


def symbols(stage: Stage) -> Mapping[str, Any]:
    """The library loads, finds torch's stream, and holds kernels for this GPU."""
    found: dict[str, Any] = last_json(stage.python("-c", SYMBOLS))
    problem = found["library"] or (found["cuda"] if stage.gpu else None)
    if problem:
        raise Failure(problem)
    return found


def correctness(stage: Stage) -> Mapping[str, Any]:
    """The tests of the operators, on the device."""
    if stage.gpu:
        return tests(stage, "tests/ops", "-k", "device-0 or on_a_device")
    return tests(stage, "tests/ops/test_kernels.py", "-k", "rotary_in_place or ignores_what_is_masked")


def sanitizer(stage: Stage) -> Mapping[str, Any]:
    """The kernels' tests under compute-sanitizer: no access outside of a tensor."""
    program = shutil.which("compute-sanitizer")
    if not stage.gpu or program is None:
        raise Skip("compute-sanitizer is not installed" if stage.gpu else "there is no GPU")
    checked = (program, "--tool", "memcheck", "--error-exitcode", "9", sys.executable)
    output = stage.run(
        *checked, *pytest("tests/ops/test_cuda_sources.py", "-k", "device-0"), PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    return counted(output)


def proof(stage: Stage) -> Mapping[str, Any]:
    """Which kernels are right on this device, and how fast each is; the verdict that runs will use."""
    if stage.gpu:
        verdict: dict[str, Any] = last_json(stage.python("-c", PROOF))
        return verdict
    told = stage.folder / "told.jsonl"
    stage.python("-m", "megatron_retro.ops.proof", str(told), "cpu", "chunked_cross_attention")
    lines = [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines()]
    return {line["operator"]: line["findings"] for line in lines if "operator" in line}


def timings(stage: Stage) -> Mapping[str, Any]:
    """The kernels' benchmark."""
    result = stage.folder / "kernels.json"
    command = ("benchmarks/kernels.py", "--json", str(result), *(() if stage.gpu else ("--quick",)))
    try:
        stage.python(*command, BENCHMARK_DEVICE="cuda" if stage.gpu else "cpu")
    except TimedOut:
        if not result.exists():
            raise
    content = json.loads(result.read_text(encoding="utf-8"))
    figures = {figure["name"]: [figure["value"], figure["unit"]] for figure in content["figures"]}
    return {"complete": content["complete"], "figures": figures}


def training_step(stage: Stage) -> Mapping[str, Any]:
    """Steps of one Retro, as written: memory planned and measured, tokens per second, where the time goes."""
    return train(stage, "--no-compile")


def compiled_step(stage: Stage) -> Mapping[str, Any]:
    """The same steps with compiled layers: the same losses but for rounding, and how much faster."""
    if not stage.gpu:
        raise Skip("layers are compiled on GPUs")
    eager, compiled = (
        train(replace(stage, folder=stage.folder / flag.strip("-")), flag) for flag in ("--no-compile", "--compile")
    )
    apart = max(abs(one - other) for one, other in zip(eager["losses"], compiled["losses"], strict=False))
    if apart > 0.05:
        raise Failure(f"the losses differ: {eager['losses']} as written, {compiled['losses']} compiled")
    rates = [run["tokens_per_second"] for run in (eager, compiled)]
    return {**compiled, "losses_apart": apart, "times_as_fast": rates[1] / rates[0]}


def train(stage: Stage, how: str) -> Mapping[str, Any]:
    """A run that is ended after its profiled step, and what it tells."""
    stage.folder.mkdir(exist_ok=True)
    model = STEP_OF_A_GPU if stage.gpu else TINY
    steps, plan, run = 12 if stage.gpu else 4, stage.folder / "plan.json", stage.folder / "run"
    shape = (*model, *RUN, "--train-iters", "100")  # ended before, so that nothing is saved
    one = ("--plan-nodes", "1", "--plan-gpus-per-node", "1", "--plan-json", str(plan))
    stage.run(sys.executable, *PROGRAM, "plan", *shape, *one, allowed=(0, 2))
    profiled = ("--profile", "--profile-step-start", str(steps - 2), "--profile-step-end", str(steps - 1))
    trace = run / "profile" / "rank-00000.json"
    train_until(
        stage,
        lambda: trace.exists() and len(steps_of(run)) >= steps,
        *("pretrain", *shape, *profiled, how, "--save", str(run)),
    )
    log = read_run_log(run)
    planned = json.loads(plan.read_text(encoding="utf-8"))["ranks"][0]["memory_total"] if plan.exists() else None
    settled = log.steps[len(log.steps) // 3 : steps - 2]
    return {
        "parameters": log.facts.parameters,
        "planned_bytes": planned,
        "measured_bytes": max(step.memory_bytes for step in log.steps),
        "tokens_per_second": statistics.median(step.positions / step.step_seconds for step in settled),
        "flops_per_token": log.facts.flops_per_token,
        "losses": [step.loss for step in log.steps],
        "kernels": dict(log.facts.backends),
        "longest": longest(trace),
    }


def resume(stage: Stage) -> Mapping[str, Any]:
    """A run that is killed and started again ends with the losses of one that was not."""
    words = ("pretrain", *TINY, *RUN, "--train-iters", "8", "--save-interval", "2", "--deterministic-mode")
    whole, broken = stage.folder / "whole", stage.folder / "broken"
    stage.python(*PROGRAM, *words, "--save", str(whole))
    train_until(stage, (broken / "latest.json").exists, *words, "--save", str(broken))
    killed_after = len(steps_of(broken))
    stage.python(*PROGRAM, *words, "--save", str(broken))
    losses = [[step.loss for step in steps_of(run)] for run in (whole, broken)]
    if losses[0] != losses[1]:
        raise Failure(f"the losses differ: {losses[0]} without a kill, {losses[1]} with one")
    return {"killed_after_step": killed_after, "losses": losses[0]}


def train_until(stage: Stage, reached: Callable[[], bool], *words: str) -> None:
    """Start a run and kill it once it has come so far. Its output goes to a file, which no pipe holds up."""
    said = stage.folder / "said.txt"
    with said.open("w", encoding="utf-8") as stream:
        process = stage.start(sys.executable, *PROGRAM, *words, output=stream)
        try:
            while not reached():
                if process.poll() is not None:
                    raise Failure(f"the run ended too early\n{last_lines(said.read_text(encoding='utf-8'))}")
                if time.monotonic() > stage.until:
                    raise TimedOut(last_lines(said.read_text(encoding="utf-8")))
                time.sleep(0.05)
        finally:
            end(process)
            process.wait()


def steps_of(run: Path) -> Sequence[StepRecord]:
    """The steps that a run's log has so far."""
    return read_run_log(run).steps if (run / EVENTS).exists() else ()


def search(stage: Stage) -> Mapping[str, Any]:
    """faiss on the GPU finds what faiss on the CPU finds, in as many lists as are asked for."""
    found: dict[str, Any] = last_json(stage.python("-c", SEARCH))
    if "skip" in found:
        raise Skip(found["skip"])
    return {**found, **tests(stage, "tests/retrieval/test_gpu_search.py", "-k", "real_gpu or the_names")}


def pytest(*words: str) -> tuple[str, ...]:
    """A quiet run of some tests in one process."""
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", *words)


def tests(stage: Stage, *words: str) -> Mapping[str, Any]:
    """How many passed; none is a failure, too."""
    return counted(stage.python(*pytest(*words)))


def counted(output: str) -> Mapping[str, Any]:
    """The numbers of the last line of pytest."""
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|skipped|failed|errors?)", output)}
    if not counts.get("passed"):
        raise Failure(f"no test ran\n{last_lines(output)}")
    return counts


def longest(trace: Path, most: int = 15) -> Sequence[tuple[str, float]]:
    """The kernels (on a CPU the operators) that took most of the profiled step, with milliseconds."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    for category in ("kernel", "cpu_op"):
        taken: Counter[str] = Counter()
        for event in events:
            if event.get("cat") == category:
                taken[event["name"][:100]] += event.get("dur", 0)
        if taken:
            return [(name, round(microseconds / 1e3, 3)) for name, microseconds in taken.most_common(most)]
    return []


def last_json(output: str) -> Any:
    """The last line that a program printed."""
    lines = output.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise Failure(f"no result was printed\n{last_lines(output)}")
    return json.loads(lines[-1])


# Limits in seconds add up to more than ten minutes, which the whole may not take: few steps need theirs.
STEPS = (
    Step("build", 180.0, build),
    Step("symbols", 40.0, symbols),
    Step("correctness", 90.0, correctness),
    Step("sanitizer", 60.0, sanitizer),
    Step("proof", 150.0, proof),
    Step("training_step", 120.0, training_step),
    Step("compiled_step", 180.0, compiled_step),
    Step("resume", 90.0, resume),
    Step("search", 60.0, search),
    Step("timings", 120.0, timings),
)
