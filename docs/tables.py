"""The tables of `docs/configuration.md`, made from the strings under the fields, and of `docs/from_verl.md`, made from
verl_keys.txt.

`python -m docs.tables` writes them below the line that says so; what stands above is written by hand.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

from hybridflow import registry
from hybridflow.config import verl_keys
from hybridflow.config.build import default_of, wanted
from hybridflow.config.load import load_algorithm, to_yaml
from hybridflow.config.schema import Config

FILE = Path(__file__).with_name("configuration.md")
FROM_VERL = FILE.with_name("from_verl.md")
MADE_BELOW = "<!-- What follows is made by `python -m docs.tables`; do not edit. -->\n"


def documentation(text: str) -> str:
    """`text` of `docs/configuration.md` with what is made in it as it is today."""
    by_hand = text.partition(MADE_BELOW)[0]
    parts = [f"{by_hand}{MADE_BELOW}"]
    for name, section in vars(Config()).items():
        parts += [f"## {name}\n", *_class_text(type(section), name, default=section)]
        if name == "algorithm":
            for algorithm in registry.ALGORITHMS:
                parts += [f"### algorithm: {algorithm}\n", *_class_text(load_algorithm(algorithm).config_class, name)]
    return "\n".join(parts)


def verls_keys(text: str) -> str:
    """`text` of `docs/from_verl.md` with the table in it as it is today."""
    rows = [f"| `{key.name}` | {_default(key)} | {_meaning(key)} | {key.since} |" for key in verl_keys.KEYS.values()]
    heading = "| verl's key | its default | here | since |\n|---|---|---|---|"
    return "\n".join([f"{text.partition(MADE_BELOW)[0]}{MADE_BELOW}", heading, *rows, ""])


def _default(key: verl_keys.Key) -> str:
    shown = "" if key.default is None else _shown(key.default)
    return shown if key.is_filled or not shown else f"{shown}, not taken over"


def _meaning(key: verl_keys.Key) -> str:
    """What a key becomes, or why it is refused, in the words of the table."""
    match key.how:
        case "-":
            return f"nothing: {key.words}"
        case "only":
            passing = " or ".join(f"`{value}`" for value in (key.default, *key.ours.split()) if value is not None)
            return f"only {passing or 'unset'}; else: {key.words}"
    ours = ", ".join(f"`{name.strip()}`" for name in key.ours.split(","))
    words = f"as {ours}, or not at all" if key.how == "same" else ours
    return f"{words}; {key.words}" if key.words else words


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
    for path, made in ((FILE, documentation), (FROM_VERL, verls_keys)):
        path.write_text(made(path.read_text(encoding="utf-8")), encoding="utf-8")
