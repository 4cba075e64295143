"""The resolved configuration as YAML, and the tables of `docs/configuration.md`, made from the strings under the fields.

`python -m hybridflow.config.describe` writes the latter below the line that says so; what stands above is written by hand.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

from hybridflow import registry
from hybridflow.config import verl_keys
from hybridflow.config.build import default_of, wanted
from hybridflow.config.load import load_algorithm, to_yaml
from hybridflow.config.schema import Config

FILE = Path(__file__).parents[2] / "docs/configuration.md"
MADE_BELOW = "<!-- What follows is made by `python -m hybridflow.config.describe`; do not edit. -->\n"


def resolved_yaml(config: Config) -> str:
    """Every key of `config` with its value, as YAML that `load_config` reads back to an equal `Config`."""
    tree = asdict(config)
    return to_yaml(tree | {"algorithm": {"name": config.algorithm.name, **(tree["algorithm"]["options"] or {})}})


def documentation(text: str) -> str:
    """`text` of `docs/configuration.md` with what is made in it as it is today."""
    by_hand = text.partition(MADE_BELOW)[0]
    parts = [f"{by_hand}{MADE_BELOW}"]
    for name, section in vars(Config()).items():
        parts += [f"## {name}\n", *_class_text(type(section), name, default=section)]
        if name == "algorithm":
            for algorithm in registry.ALGORITHMS:
                parts += [f"### algorithm: {algorithm}\n", *_class_text(load_algorithm(algorithm).config_class, name)]
    rows = [f"| `{key}` | {translation.becomes} |" for key, translation in verl_keys.KEYS.items()]
    rows += [f"| `{key}*` | `{ours}*` |" for key, ours in verl_keys.PREFIXES.items()]
    return "\n".join([*parts, "## verl's keys\n", "| verl | here |", "|---|---|", *rows, ""])


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


def _class_text(kind: type, section: str, *, default: object = None) -> Iterator[str]:
    yield f"{inspect.cleandoc(kind.__doc__ or '')}\n"
    docs, hints = field_docs(kind), get_type_hints(kind, include_extras=True)
    yield "| key | default | type | |\n|---|---|---|---|"
    for field in sorted(fields(kind), key=lambda field: field.name not in inspect.get_annotations(kind)):  # inherited ones last
        key = f"{section}.{field.name}"
        if key == "algorithm.options":
            continue  # written as keys of the section, and told with each algorithm
        value = default_of(field) if default is None else vars(default)[field.name]
        yield f"| `{key}` | {_shown(value)} | {wanted(hints[field.name])} | {docs.get(field.name, '')} |"
    yield ""


def _shown(value: object) -> str:
    if value is MISSING:
        return "required"
    text = to_yaml({"x": value}, flow=True).partition("x: ")[2].rstrip().removesuffix("}")
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    FILE.write_text(documentation(FILE.read_text(encoding="utf-8")), encoding="utf-8")
