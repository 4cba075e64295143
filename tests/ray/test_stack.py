"""From the command to the loss: what a reader steps through who follows an update."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import hybridflow
from hybridflow.controller import group
from hybridflow.controller.protocols import Arguments
from hybridflow.ops.losses import PolicyLoss
from hybridflow.ops.reduce import TokenMetric
from hybridflow.ops.surrogates import PolicyTokens, Surrogate
from tests.ray.runs import Toy, trained

PACKAGE = Path(hybridflow.__file__).parent
README = PACKAGE.parent / "README.md"
MOST_FILES = 8


def files_on_the_stack() -> list[str]:
    """Files of the package that the present call goes through, outermost first, each once."""
    paths = [Path(frame.filename) for frame in traceback.extract_stack()]
    return list(dict.fromkeys(path.relative_to(PACKAGE).as_posix() for path in paths if path.is_relative_to(PACKAGE)))


@dataclass(frozen=True)
class TellingSurrogate:
    """A surrogate that writes from where it was called."""

    surrogate: Surrogate
    file: str

    def __call__(self, tokens: PolicyTokens) -> tuple[torch.Tensor, dict[str, TokenMetric]]:
        Path(self.file).write_text("\n".join(files_on_the_stack()))
        return self.surrogate(tokens)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_an_update_passes_through_at_most_eight_files(
    algorithm: str, toy: Toy, cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_controller: list[str] = []
    on_a_rank = tmp_path / "stack"

    def telling_arguments(args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments:
        if isinstance(loss := kwargs.get("loss"), PolicyLoss):
            on_the_controller[:] = files_on_the_stack()
            assert loss.surrogate is not None
            kwargs = {**kwargs, "loss": replace(loss, surrogate=TellingSurrogate(loss.surrogate, str(on_a_rank)))}
        return Arguments(args, kwargs)

    monkeypatch.setattr(group, "Arguments", telling_arguments)  # the group makes them where it sends a call
    trained(toy, tmp_path / "run", f"algorithm={algorithm}", "algorithm.responses_per_prompt=2", "run.total_steps=1")
    files = [*on_the_controller, *on_a_rank.read_text().split()]
    assert files[0] == "train.py" and files[-1] == "ops/losses.py"
    assert len(files) <= MOST_FILES, files
    told = re.findall(r"`([\w/]+\.py)`", README.read_text().partition("files from the command line to the loss.")[2])
    assert files == [file.replace("ppo", algorithm) for file in told[: len(files)]], "README says otherwise"
