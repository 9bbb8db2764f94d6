"""The whole chain under a real SLURM with the tiny recipes: submitted once, with no data of
its own, preempted, robbed of a node, finished in a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_retro.testing.slurm import Cluster

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[3]
STAGES = ["corpus", "corpus-finish", "index", "index-finish", "pretrain", "retrofit", "instruct", "evaluate", "report"]
STEPS = 18


def submit_chain(cluster: Cluster, room: Path) -> dict[str, int]:
    output = cluster.run(
        str(ROOT / "examples/slurm/submit_all.sh"),
        "tiny",
        f"--chdir={room}",
        DATA=str(room / "data"),
        RUNS=str(room / "runs"),
        LOGS=str(room / "logs"),
        WORKERS="2",
        HEALTH_CHECK="off",
        OMP_NUM_THREADS="1",
    )
    return {stage: int(job) for stage, job in (line.split() for line in output.splitlines())}


def saved_steps(room: Path, run: str) -> list[int]:
    """Steps of the finished checkpoints of a run."""
    found = (room / "runs" / run).glob("step-*/manifest.json")
    return sorted(int(manifest.parent.name.removeprefix("step-")) for manifest in found)


def starts(room: Path, pattern: str) -> str:
    """What the first rank of a job said, over all its starts."""
    return "".join(path.read_text() for path in sorted((room / "logs").glob(f"{pattern}/rank-0.log")))


@pytest.mark.timeout(600)
def test_the_chain_survives_preemption_and_a_lost_node(cluster: Cluster, tmp_path: Path) -> None:
    jobs = submit_chain(cluster, tmp_path)
    assert list(jobs) == STAGES

    cluster.wait_until(
        lambda: bool(saved_steps(tmp_path, "gpt-tiny")), 300, "the GPT's first checkpoint", jobs["pretrain"]
    )
    cluster.run("scontrol", "requeue", str(jobs["pretrain"]))
    facts = cluster.wait(jobs["pretrain"], 300)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), starts(tmp_path, "pretrain-tiny-*")

    cluster.wait_until(lambda: bool(saved_steps(tmp_path, "retro-tiny")), 300, "a checkpoint", jobs["retrofit"])
    lost = last_node(cluster, jobs["retrofit"])
    cluster.kill_node(lost)
    facts = cluster.wait(jobs["retrofit"], 300)
    cluster.start_node(lost)  # other tests use the same cluster
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), starts(tmp_path, "retrofit-tiny-*")

    for stage, run in (("pretrain", "gpt-tiny"), ("retrofit", "retro-tiny")):
        words = starts(tmp_path, f"{stage}-tiny-*")
        assert re.search(r"resum", words), words
        assert max(saved_steps(tmp_path, run)) == STEPS

    assert cluster.wait(jobs["instruct"], 200)["JobState"] == "COMPLETED", starts(tmp_path, "instruct-tiny-*")
    assert max(saved_steps(tmp_path, "instruct-tiny")) == 4
    assert cluster.wait(jobs["evaluate"], 120)["JobState"] == "COMPLETED"
    assert json.loads((tmp_path / "runs/evaluate-tiny/perplexity.json").read_text())
    assert cluster.wait(jobs["report"], 120)["JobState"] == "COMPLETED", starts(tmp_path, "report-tiny-*")
    assert "What was trained" in (tmp_path / "runs/report-tiny.html").read_text()
    assert all(cluster.facts(job)["JobState"] == "COMPLETED" for job in jobs.values())


def last_node(cluster: Cluster, job: int) -> str:
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.facts(job)["NodeList"]).split()
    return nodes[-1]
