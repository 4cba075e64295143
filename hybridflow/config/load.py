"""`load_config`: YAML and `key=value` in, a checked `Config` out. The only file that knows OmegaConf."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridflow import registry
from hybridflow.config import verl_keys
from hybridflow.config.build import Builder, found, keys_of
from hybridflow.config.rules import AlgorithmClass, check
from hybridflow.config.schema import AlgorithmConfig, Config
from hybridflow.config.settings import KNOWN_KEYS, Setting, Settings, default_mappings
from hybridflow.errors import ConfigError, Mistake

COMMAND_LINE = "command line"
MAPPINGS = default_mappings()


def load_config(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file at `path` (None: the defaults alone) with `key=value` overrides on top.

    Keys of verl are accepted in both, and translated (hybridflow/config/verl_keys.py). Neither torch nor Ray is imported.

    Raises:
        ConfigError: with every mistake found, not only the first.
    """
    settings = Settings(resolve_value)
    mistakes = settings.mistakes
    for layer in read_files(path, mistakes) if path else ():
        settings.apply(layer)
    settings.apply(read_overrides(overrides, mistakes))
    values = resolve(settings)
    algorithm = _algorithm_of(values, settings)
    options = keys_of(algorithm.config_class, "algorithm") if algorithm else []
    builder = Builder(settings.place_of, [*KNOWN_KEYS, *options], aliases=verl_keys.KEYS)
    config = build_config(builder, values, algorithm)
    mistakes += builder.mistakes
    noted = {mistake.key for mistake in mistakes}
    for mistake in check(config, algorithm):
        if mistake.key not in noted:
            mistakes.append(replace(mistake, where=mistake.where or settings.place_of(mistake.key)))
    if mistakes:
        raise ConfigError(mistakes)
    return config


def read_files(path: str, mistakes: list[Mistake]) -> list[list[Setting]]:
    """The settings of the YAML file at `path` and of those that it builds on (`base: other.yaml`), lowest first."""
    layers: list[list[Setting]] = []
    seen: list[str] = []
    place = ""
    while path:
        if os.path.realpath(path) in seen:
            mistakes.append(Mistake("base", f"{path} builds on itself", place))
            break
        seen.append(os.path.realpath(path))
        tree, lines = _read_yaml(path, place, mistakes)
        base = tree.pop("base", None)
        layers.insert(0, list(_flatten(tree, path, lines)))
        place = f"{path}:{lines.get('base', 1)}"
        if base is not None and not isinstance(base, str):
            mistakes.append(Mistake("base", f"found {found(base)}; needed: the path of a YAML file", place))
            break
        path = os.path.normpath(os.path.join(os.path.dirname(path), os.path.expanduser(base))) if base else ""
    return layers


def read_overrides(overrides: Sequence[str], mistakes: list[Mistake]) -> list[Setting]:
    """The settings of `key=value` arguments; values are YAML. A leading `+`, as Hydra wants for new keys, is ignored."""
    settings = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip().lstrip("+")
        if not equals or not key:
            mistakes.append(Mistake(override, "is not of the form key=value", COMMAND_LINE))
            continue
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            reason = str(error).partition("\n")[0]
            mistakes.append(Mistake(key, f"the value {text!r} cannot be read as YAML: {reason}", COMMAND_LINE))
            continue
        assert isinstance(value, dict)
        settings.append(Setting(key, value["value"], COMMAND_LINE))
    return settings


def resolve_value(value: object, context: Mapping[str, object]) -> object:
    """`value` with its interpolations replaced, `context` being what they refer to.

    Raises:
        ValueError: one of them refers to nothing.
    """
    if not isinstance(value, str | list | dict) or "${" not in str(value):
        return value
    try:
        return _resolved_child(OmegaConf.create({**context, "_value_": value}), "_value_")
    except OmegaConfBaseException as error:
        raise ValueError(f"found {value!r}: {error}") from error


def resolve(settings: Settings) -> dict[str, object]:
    """The values of `settings` without interpolations. What cannot be resolved is noted as a mistake and left out."""
    root = OmegaConf.create(settings.context())
    return {str(key): value for key, value in _resolve_section(root, settings.values, "", settings)}


def load_algorithm(name: str) -> AlgorithmClass:
    """The class that `algorithm.name` names.

    Raises:
        ConfigError: there is no such name, it does not import, or is no algorithm.
    """
    loaded = registry.load(name, registry.ALGORITHMS, key="algorithm.name")
    names = {name for base in loaded.__mro__ for name in vars(base)} if isinstance(loaded, type) else set()
    if not {"config_class", "check", "roles"} <= names:
        problem = f"{name!r} is no subclass of hybridflow.algorithms.base.Algorithm"
        raise ConfigError([Mistake("algorithm.name", problem)])
    algorithm: AlgorithmClass = loaded  # type: ignore[assignment]
    return algorithm


def to_yaml(value: Mapping[str, object], *, flow: bool = False) -> str:
    """`value` as YAML that this file reads back unchanged; `flow` for one line."""
    text = OmegaConf.to_yaml(OmegaConf.create({key: _escaped(element) for key, element in value.items()}))
    return yaml.safe_dump(yaml.safe_load(text), default_flow_style=True, width=10000, sort_keys=False) if flow else text


def build_config(builder: Builder, values: Mapping[str, object], algorithm: AlgorithmClass | None) -> Config:
    """The `Config` of `values`, with defaults in place of mistaken ones."""
    sections = dict(values)
    section = sections.pop("algorithm", {})
    config = builder.build(Config, sections, default=Config())
    assert config is not None
    if not isinstance(section, Mapping):
        builder.add("algorithm", f"found {found(section)}; needed: the name of an algorithm, or a section with `name`")
        return config
    given = dict(section)
    name = given.pop("name", AlgorithmConfig.name)
    if not isinstance(name, str):
        builder.add("algorithm.name", f"found {found(name)}; needed: text")
        return config
    options = builder.build(algorithm.config_class, given, path="algorithm") if algorithm else None
    return replace(config, algorithm=AlgorithmConfig(name=name, options=options))


def _algorithm_of(values: Mapping[str, object], settings: Settings) -> AlgorithmClass | None:
    section = values.get("algorithm", {})
    name = section.get("name", AlgorithmConfig.name) if isinstance(section, Mapping) else None
    if not isinstance(name, str):
        return None  # build_config tells
    try:
        return load_algorithm(name)
    except ConfigError as error:
        place = settings.place_of("algorithm.name")
        settings.mistakes += [replace(mistake, where=place) for mistake in error.mistakes]
        return None


def _escaped(value: object) -> object:
    """Text that looks like an interpolation, and is none, is written with a backslash."""
    if isinstance(value, Mapping):
        return {key: _escaped(element) for key, element in value.items()}
    if isinstance(value, list):
        return [_escaped(element) for element in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _read_yaml(path: str, place: str, mistakes: list[Mistake]) -> tuple[dict[object, object], dict[str, int]]:
    """The tree in a file, and the line of each dotted key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines = dict(_lines(yaml.compose(text, Loader=yaml.SafeLoader), ""))
        loaded = OmegaConf.load(path) if text.strip() else OmegaConf.create()
    except OSError as error:
        mistakes.append(Mistake(path, f"cannot be read: {error.strerror}", place))
        return {}, {}
    except UnicodeDecodeError as error:
        mistakes.append(Mistake(path, f"is not text: {error}", place))
        return {}, {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        mistakes.append(Mistake("YAML", f"{error.problem}", f"{path}:{mark.line + 1 if mark else 1}"))
        return {}, {}
    except OmegaConfBaseException as error:
        line = lines.get(str(error.full_key), 1)
        mistakes.append(Mistake(str(error.full_key), str(error).partition("\n")[0], f"{path}:{line}"))
        return {}, {}
    tree = OmegaConf.to_container(loaded, resolve=False) if isinstance(loaded, DictConfig) else None
    if not isinstance(tree, dict):
        mistakes.append(Mistake(path, "holds no mapping of keys to values", place))
        return {}, {}
    return dict(tree), lines


def _lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if key.value == "<<":
            yield from _lines(value, prefix)
        else:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _lines(value, f"{prefix}{key.value}.")


def _flatten(tree: Mapping[object, object], path: str, lines: Mapping[str, int], prefix: str = "") -> Iterator[Setting]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and key not in MAPPINGS:
            yield from _flatten(value, path, lines, f"{key}.")
        else:
            yield Setting(key, value, f"{path}:{lines.get(key, 1)}")


def _resolve_section(
    root: DictConfig, tree: Mapping[str, object], prefix: str, settings: Settings
) -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        try:
            if isinstance(value, Mapping):
                yield name, dict(_resolve_section(root[name], value, f"{key}.", settings))
            else:
                yield name, _resolved_child(root, name)
        except OmegaConfBaseException as error:
            reason = str(error).partition("\n")[0]
            settings.mistakes.append(Mistake(key, f"found {value!r}: {reason}", settings.place_of(key)))


def _resolved_child(section: DictConfig, name: str) -> object:
    child = section[name]
    return OmegaConf.to_container(child, resolve=True) if OmegaConf.is_config(child) else child
