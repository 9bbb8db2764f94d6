"""One run of the stages of the tiny chain under SLURM, on a disk and with a clock of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from megatron_retro.testing.slurm import Cluster
from tests.examples.slurm.events import ARRAYS, TRAINING, write_clock

ROOT = Path(__file__).resolve().parents[3]
DISK_MEGABYTES = 96


class Chain:
    """`disk` holds what the stages read and write; it is a file system of its own where this user may mount one."""

    longest_seconds = 400.0

    def __init__(self, cluster: Cluster, room: Path, clock: Path) -> None:
        self.cluster, self.room = cluster, room
        self.disk, self._clock, self._ballast = room / "disk", room / "clock", room / "disk/ballast"
        self.disk.mkdir(parents=True)
        mounted = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "none", str(self.disk)]
        self.has_disk = subprocess.run(mounted, capture_output=True, check=False).returncode == 0
        self.set_clock(0.0)
        self.variables = {
            "DATA": str(self.disk / "data"),
            "RUNS": str(self.disk / "runs"),
            "LOGS": str(room / "logs"),
            "WORKERS": "2",
            "HEALTH_CHECK": "off",
            "OMP_NUM_THREADS": "1",
            "LEAVE_SECONDS": "10",
            "LD_PRELOAD": str(clock),
            "CLOCK_FILE": str(self._clock),
        }

    def submit(self, stage: str, **more: str) -> int:
        """Queue a stage; a hang is to be noticed within a minute."""
        script = str(ROOT / "examples/slurm/submit.sh")
        options = [f"--chdir={self.room}", f"--output={self.room}/{stage}-%j.log"]
        flags = ["--", "--distributed-timeout-minutes", "1"] if stage in TRAINING else []
        return int(self.cluster.run(script, stage, "tiny", *options, *flags, **{**self.variables, **more}))

    def finish(self, stage: str) -> None:
        """The job that checks what the workers of an array left, and does the rest."""
        if stage in ARRAYS:
            facts = self.cluster.wait(self.submit(stage, FINISH="on"), self.longest_seconds)
            if facts["JobState"] != "COMPLETED":
                raise RuntimeError(f"the finishing job of {stage} in {self.room} ended {facts['JobState']}")

    def make_data(self) -> None:
        """The text of the chain; the stages are submitted one by one later."""
        submit_all = str(ROOT / "examples/slurm/submit_all.sh")
        self.cluster.run(submit_all, "tiny", "--hold", f"--chdir={self.room}", **{**self.variables, "STAGES": "report"})

    def set_clock(self, seconds: float) -> None:
        """How far the second rank's clock is ahead, from now on."""
        write_clock(self._clock, seconds)

    def fill_disk(self) -> bool:
        """To the last byte, where the disk is the chain's own."""
        if not self.has_disk:
            return False
        with suppress(OSError), self._ballast.open("ab", buffering=0) as stream:
            for size in (1 << 20, 1 << 12):
                with suppress(OSError):
                    while True:
                        stream.write(b"\0" * size)
        return True

    def free_disk(self) -> None:
        """As an operator would after the message."""
        self._ballast.unlink(missing_ok=True)

    def weights(self) -> dict[str, str]:
        """A checksum of the newest tensors of each run."""
        found = {}
        for run in TRAINING.values():
            newest = sorted((self.disk / "runs" / run).glob("step-*"))[-1]
            content = b"".join(path.read_bytes() for path in sorted(newest.glob("*.safetensors")))
            found[run] = hashlib.sha256(content).hexdigest()
        return found

    def steps_since(self, stage: str, moment: float) -> list[float]:
        """Times of the steps that the run of a stage made after a moment."""
        file = self.disk / "runs" / TRAINING[stage] / "events.jsonl"
        events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [event["time"] for event in events if event["event"] == "step" and event["time"] >= moment]

    def last_words(self, stage: str, job: int) -> str:
        """The summary line of a job, or the last line of its log."""
        logs = sorted(self.room.glob(f"{stage}-{job}*.log")) or sorted(self.room.glob(f"{stage}-*.log"))
        lines = "\n".join(log.read_text(errors="replace") for log in logs).splitlines()
        told = [line for line in lines if " logs in " in line]
        return told[-1].split(": ", 1)[-1] if told else (lines[-1] if lines else "")

    def close(self, *, keep: bool) -> None:
        """Give the disk back; what is kept moves beside it first."""
        if self.has_disk:
            if keep:
                self.free_disk()
                shutil.copytree(self.disk, self.room / "kept", dirs_exist_ok=True)
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)
        if not keep:
            shutil.rmtree(self.room)


def clear(room: Path) -> None:
    """What a stopped chain left."""
    while os.path.ismount(room / "disk"):
        subprocess.run(["umount", "--lazy", str(room / "disk")], check=True)
    shutil.rmtree(room, ignore_errors=True)
