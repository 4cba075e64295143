"""Two checkouts of this project in turns on one host: which keys the other one knows, and how many times as long we take."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hybridflow.config.schema import RENAMED

ROOT = Path(__file__).resolve().parents[1]
COMPARED = ("seconds/", "sync/seconds")
ASK_KEYS = """
import dataclasses, json, sys
from hybridflow import registry
from hybridflow.config.build import keys_of
from hybridflow.config.schema import Config
algorithm = registry.load(sys.argv[1], registry.ALGORITHMS, key="algorithm.name")
own = [f"algorithm.{field.name}" for field in dataclasses.fields(algorithm.config_class)]
print(json.dumps([*keys_of(Config), "algorithm", *own]))
"""


@dataclass(frozen=True)
class Checkout:
    """A version of the project in a folder."""

    folder: Path
    label: str
    """What results call it: a commit, or the folder."""

    def environment(self) -> dict[str, str]:
        """Of commands that are to import this version."""
        return {**os.environ, "PYTHONPATH": str(self.folder)}

    def adapted(self, settings: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
        """`settings` as this version knows them, and words on what was dropped or renamed."""
        algorithm = str(settings.get("algorithm", "ppo"))
        asked = [sys.executable, "-c", ASK_KEYS, algorithm]
        known = json.loads(subprocess.check_output(asked, cwd=self.folder, env=self.environment(), text=True))
        former = {new: old for old, new in RENAMED.items()}
        kept: dict[str, object] = {}
        words = []
        for key, value in settings.items():
            if _is_among(key, known):
                kept[key] = value
            elif former.get(key) in known:
                kept[former[key]] = value
                words.append(f"{key} is called {former[key]} there")
            else:
                words.append(f"{key}={value} is left out: that version does not know it")
        return kept, words


@contextmanager
def checked_out(commit_or_folder: str) -> Iterator[Checkout]:
    """A folder as it is; of a commit a work tree of its own, which is removed afterwards.

    Raises:
        SystemExit: there is neither.
    """
    if (Path(commit_or_folder) / "hybridflow").is_dir():
        yield Checkout(Path(commit_or_folder).resolve(), commit_or_folder)
        return
    label = _git("rev-parse", "--short", "--verify", "--quiet", f"{commit_or_folder}^{{commit}}")
    if not label:
        raise SystemExit(f"--against {commit_or_folder}: found neither a folder with a hybridflow in it nor a commit of {ROOT}")
    with tempfile.TemporaryDirectory(prefix="hybridflow-against-") as folder:
        tree = Path(folder, "checkout")
        _git("worktree", "add", "--quiet", "--detach", str(tree), label)
        try:
            yield Checkout(tree, label)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def own_checkout() -> Checkout:
    """The one that this file belongs to; its commit, with a plus where something was changed since."""
    changed = "+" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return Checkout(ROOT, f"{_git('rev-parse', '--short', 'HEAD') or ROOT}{changed}")


def ratios(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every measure of time that both have: the median over our turns over that of theirs; below 1 we are faster."""
    found = {}
    for name in sorted(set.intersection(*(set(turn) for turn in (*ours, *theirs)))):
        mine, other = (statistics.median(turn[name] for turn in turns) for turns in (ours, theirs))
        if name.startswith(COMPARED) and other:
            found[name] = mine / other
    return found


def _is_among(key: str, known: Sequence[str]) -> bool:
    """Whether a key, or the mapping that it belongs to, is known."""
    return any(key == other or key.startswith(f"{other}.") for other in known if other != "algorithm") or key == "algorithm"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
