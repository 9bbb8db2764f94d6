"""Every error that a user can cause, by name.

An error here carries one message that answers four questions: what is wrong, what was got,
what was expected, what to do. The command line prints that message alone and exits with
`exit_code`; anything that is not a `MegatronRetroError` is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_INTERNAL = 1
EXIT_USER = 2
EXIT_BELOW_FLOOR = 3
EXIT_REQUEUE = 75
EXIT_LOST_RANK = 76
EXIT_INTERRUPTED = 130


class MegatronRetroError(Exception):
    """Something the user can put right; the message is all that is printed."""

    exit_code = EXIT_USER

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        lines = [what]
        if got is not None:
            lines.append(f"  got:      {got}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if fix is not None:
            lines.append(f"  fix:      {fix}")
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Violation:
    """One rule that a configuration breaks."""

    field: str
    got: object
    expected: str
    fix: str

    def __str__(self) -> str:
        flag = "--" + self.field.replace("_", "-")
        return f"{flag} = {self.got!r}: expected {self.expected}; {self.fix}"


class ConfigError(MegatronRetroError):
    """A flag, a TOML file or a combination of settings that cannot be."""

    @classmethod
    def from_violations(cls, violations: Sequence[Violation]) -> ConfigError:
        """All broken rules in one message."""
        noun = "problem" if len(violations) == 1 else "problems"
        lines = [f"the configuration has {len(violations)} {noun}:"]
        lines += [f"  {number}. {violation}" for number, violation in enumerate(violations, 1)]
        return cls("\n".join(lines))


class ArtifactError(MegatronRetroError):
    """A file or directory that is missing, damaged, foreign or made from something else."""


class DamagedArtifact(ArtifactError):
    """An artifact whose content is not what was written: missing, cut or changed files."""


class DataError(MegatronRetroError):
    """Input text, tokens or records that cannot be used."""


class EnvironmentProblem(MegatronRetroError):
    """A package, compiler, device or permission that is missing on this machine."""


class DistributedError(MegatronRetroError):
    """Ranks that disagree, died or hang."""


class LostRank(DistributedError):
    """A rank that died, hangs or is out of reach: the same command, started again, goes on from what was saved."""

    exit_code = EXIT_LOST_RANK


class BelowFloor(MegatronRetroError):
    """A measured quality is under the floor that the user set."""

    exit_code = EXIT_BELOW_FLOOR


class Requeue(MegatronRetroError):
    """The run saved its state and wants to be started again."""

    exit_code = EXIT_REQUEUE
