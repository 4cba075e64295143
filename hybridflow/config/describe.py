"""The resolved configuration as YAML, and `docs/configuration.md`, made from the strings under the fields.

`python -m hybridflow.config.describe [FILE]` writes the latter.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

from hybridflow import registry
from hybridflow.config import verl_keys
from hybridflow.config.build import default_of, wanted
from hybridflow.config.load import load_algorithm, to_yaml
from hybridflow.config.schema import AlgorithmConfig, Config

INTRODUCTION = """\
# Configuration

Made by `python -m hybridflow.config.describe` from the strings under the fields; do not edit.

    python -m hybridflow.train config.yaml rollout.temperature=0.8 data.train_files=[a.parquet,b.parquet]

A YAML file gives sections with keys, and `key=value` arguments, whose values are read as YAML, win over it. Three things
beside plain YAML:

- `base: other.yaml` at the top of a file builds on another, found relative to the first; the file's own keys win.
- `${section.key}` stands for the value of another key, `${oc.env:NAME}` and `${oc.env:NAME,default}` for the environment.
- `algorithm: grpo`, or `algorithm=grpo`, is short for a section with that name and otherwise defaults. It drops the options
  that a file below gives to its algorithm; options on the same level refine it.

A list or a mapping is replaced as a whole: `placement.pools: {all: 1x8}` leaves no other pool. A dotted key,
`placement.pools.main=1x8`, changes one entry. `~` at the start of a path is the home folder. Every mistake is
reported at once, before anything starts.

`--dry-run` prints what comes of it all, and where each role would run. What this machine lacks and the one that is to run may
have, such as a data file, vLLM, GPUs or a network, is a warning then. The exit code is 0 where nothing else is wrong, else 2.

A model with a name like `org/name`, and no folder of that name here, is asked for on the hub before anything starts, in one
request. With HF_HUB_OFFLINE=1 it is looked for in the hub's cache. Where a cluster is joined, what is found is a warning: the
ranks load models, on machines of their own.
"""


VERL_INTRODUCTION = """\
Accepted in YAML and on the command line, so that most of a script written for verl carries over. What is not listed is a
mistake, which says what to set in its place where there is something. A key that becomes nothing is accepted with a warning.
`actor_rollout_ref.`, `data.` and `trainer.` may be left out. The command wants a YAML file first, which may be empty.

Keys that a script leaves out have *our* defaults. Some of them change what is learned: PPO and GRPO have a KL term of 0.001 and
load a reference (verl has none unless `use_kl_in_reward` or `use_kl_loss`; here `algorithm.kl_in: none` for PPO and
`algorithm.kl_coefficient: 0` for GRPO), GRPO averages its loss by response (verl over tokens), and `algorithm.dual_clip` is off
(`clip_ratio_c` is 3.0 there).
"""


def resolved_yaml(config: Config) -> str:
    """Every key of `config` with its value, as YAML that `load_config` reads back to an equal `Config`."""
    return to_yaml(_fields(config))


def documentation() -> str:
    """The text of `docs/configuration.md`."""
    parts = [INTRODUCTION]
    for name, section in vars(Config()).items():
        if name == "algorithm":
            parts += ["## algorithm\n", *_class_text(type(section), "algorithm", skipped="options")]
            parts += _algorithms_text()
        else:
            parts += [f"## {name}\n", *_class_text(type(section), name, default=section)]
    parts += ["## verl's keys\n", VERL_INTRODUCTION]
    rows = [f"| `{key}` | {translation.becomes} |" for key, translation in verl_keys.KEYS.items()]
    rows += [f"| `{key}*` | `{ours}*` |" for key, ours in verl_keys.PREFIXES.items()]
    parts.append("\n".join(["| verl | here |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass, its own and those that it inherits, on one line."""
    docs: dict[str, str] = {}
    for base in kind.__bases__:
        docs |= field_docs(base) if is_dataclass(base) else {}
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    assert isinstance(tree.body[0], ast.ClassDef)
    body = tree.body[0].body
    for statement, following in pairwise(body):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def _algorithms_text() -> Iterator[str]:
    for name in registry.ALGORITHMS:
        options = load_algorithm(name).config_class
        yield f"### algorithm: {name}\n"
        yield from _class_text(options, "algorithm")


def _class_text(kind: type, section: str, *, default: object = None, skipped: str = "") -> Iterator[str]:
    yield f"{inspect.cleandoc(kind.__doc__ or '')}\n"
    docs, hints = field_docs(kind), get_type_hints(kind, include_extras=True)
    yield "| key | default | type | |\n|---|---|---|---|"
    for field in sorted(fields(kind), key=lambda field: field.name not in inspect.get_annotations(kind)):  # inherited ones last
        if field.name == skipped:
            continue
        value = default_of(field) if default is None else vars(default)[field.name]
        key = f"{section}.{field.name}"
        yield f"| `{key}` | {_shown(value)} | {wanted(hints[field.name])} | {docs.get(field.name, '')} |"
    yield ""


def _shown(value: object) -> str:
    if value is MISSING:
        return "required"
    text = to_yaml({"x": _plain(value)}, flow=True).partition("x: ")[2].rstrip().removesuffix("}")
    return f"`{text}`" if text else ""


def _plain(value: object) -> object:
    if isinstance(value, AlgorithmConfig):
        return {"name": value.name, **_fields(value.options)}
    if is_dataclass(value):
        return _fields(value)
    if isinstance(value, Mapping):
        return {key: _plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    return value


def _fields(value: object) -> dict[str, object]:
    assert is_dataclass(value), f"the options of an algorithm are a dataclass, not {value!r}"
    return {field.name: _plain(vars(value)[field.name]) for field in fields(value)}


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/configuration.md").write_text(documentation(), encoding="utf-8")
