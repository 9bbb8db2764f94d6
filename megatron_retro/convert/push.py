"""The verb `push`: an exported folder goes to a hub, through `huggingface_hub`.

Whose token it is (`hf auth login`, HF_TOKEN), which hub (HF_ENDPOINT) and what may be asked (HF_HUB_OFFLINE) is that
library's affair; a token is never seen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_retro.config.conversion import PushConfig
from megatron_retro.config.settings import Settings
from megatron_retro.data.hub import hub_name
from megatron_retro.errors import ArtifactError, ConfigError, EnvironmentProblem
from megatron_retro.runtime.console import say

_CONFIGS = ("config.json", "adapter_config.json")  # of transformers and of peft


def push(settings: Settings, paths: Sequence[str]) -> None:
    """Upload FOLDER to NAME, and say where it lies."""
    if len(paths) != 2:
        raise ConfigError("push takes a folder and a name", got=" ".join(paths) or "none", expected="FOLDER NAME")
    folder, (name, branch) = Path(paths[0]), hub_name(paths[1])
    if not any((folder / one).is_file() for one in _CONFIGS):
        raise ArtifactError(
            f"{folder} is no export",
            expected="a folder with " + " or ".join(_CONFIGS),
            fix="make one of a run: convert RUN FOLDER --convert-to huggingface, remote-code or peft",
        )
    say(f"{folder} is at {_uploaded(folder, name, branch, settings[PushConfig])}")


def _uploaded(folder: Path, name: str, branch: str | None, config: PushConfig) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    hub = HfApi()
    try:
        address = hub.create_repo(name, private=not config.push_public, exist_ok=True)
        if branch is not None:
            hub.create_branch(name, branch=branch, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, revision=branch, commit_message=config.push_message)
    except HFValidationError as error:
        raise ConfigError(f"{name} cannot be a name on the hub", got=_first_line(error)) from None
    except Exception as error:  # of a client whose versions and ways of transport have types of their own
        raise EnvironmentProblem(
            f"{folder} is not on the hub as {name}, or not all of it",
            got=_first_line(error.__cause__ or error),
            fix="check HF_TOKEN (or `hf auth login`), HF_ENDPOINT and HF_HUB_OFFLINE, and run the same command again: "
            "what arrived is not sent again",
        ) from None
    return str(address)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0] or type(error).__name__
