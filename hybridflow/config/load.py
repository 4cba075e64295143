"""`load_config`: YAML and `key=value` in, a checked `Config` out. The only file that knows OmegaConf."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridflow import registry
from hybridflow.config import verl_keys
from hybridflow.config.build import Builder, keys_of
from hybridflow.config.build import found as shown
from hybridflow.config.findings import FieldWarning, Missing
from hybridflow.config.rules import AlgorithmClass, check
from hybridflow.config.schema import AlgorithmConfig, Config
from hybridflow.config.settings import KNOWN_KEYS, Setting, Settings, default_mappings
from hybridflow.errors import ConfigError, FieldError

logger = logging.getLogger("hybridflow")

COMMAND_LINE = "command line"
MAPPINGS = default_mappings()


def load_config(path: str | None, overrides: Sequence[str] = (), *, is_dry_run: bool = False, asks_hub: bool = False) -> Config:
    """The configuration in the YAML file at `path` (None: the defaults alone) with `key=value` overrides on top.

    Keys of verl are accepted in both, and translated (hybridflow/config/verl_keys.py). Neither torch nor Ray is imported.
    With `asks_hub`, models that are named as on the hub are asked for there. In a dry run, what this machine lacks and another
    may have is a warning. Warnings are logged.

    Raises:
        ConfigError: with every mistake found, not only the first.
    """
    settings = Settings(resolve_value)
    layers = read_files(path, settings.errors) if path else []
    unread = list(settings.errors)
    for layer in layers:
        settings.apply(layer)
    settings.apply(read_overrides(overrides, settings.errors))
    num_mistakes = len(settings.errors)
    values = resolve(settings)
    if unread:  # what an interpolation refers to may be there
        del settings.errors[num_mistakes:]
    algorithm = _algorithm_of(values, settings) if not unread or settings.place_of("algorithm.name") else None
    options = keys_of(algorithm.config_class, "algorithm") if algorithm else []
    builder = Builder(settings.place_of, [*KNOWN_KEYS, *options], aliases=verl_keys.stands_for())
    config = build_config(builder, values, algorithm)
    mistakes = settings.errors + builder.errors
    found = check(config, algorithm, is_partial=bool(unread), asks_hub=asks_hub)
    for mistake in _without_doubtful(found, {mistake.key for mistake in mistakes}, builder.known_keys):
        mistakes.append(replace(mistake, where=mistake.where or settings.place_of(mistake.key)))
    if unread:  # a key that is given nowhere may be in the file that could not be read
        mistakes = [mistake for mistake in mistakes if mistake.where or mistake in unread]
    _tell([*settings.warnings, *mistakes], is_dry_run=is_dry_run)
    return config


def read_files(path: str, mistakes: list[FieldError]) -> list[list[Setting]]:
    """The settings of the YAML file at `path` and of those that it builds on (`base: other.yaml`), lowest first."""
    layers: list[list[Setting]] = []
    seen: list[str] = []
    place = ""
    while path:
        if os.path.realpath(path) in seen:
            mistakes.append(FieldError("base", f"{path} builds on itself", place))
            break
        seen.append(os.path.realpath(path))
        tree, lines = _read_yaml(path, place, mistakes)
        base = tree.pop("base", None)
        layers.insert(0, list(_flatten(tree, path, lines)))
        place = f"{path}:{lines.get('base', 1)}"
        if base is not None and not isinstance(base, str):
            mistakes.append(FieldError("base", f"found {shown(base)}; needed: the path of a YAML file", place))
            break
        path = os.path.normpath(os.path.join(os.path.dirname(path), os.path.expanduser(base))) if base else ""
    return layers


def read_overrides(overrides: Sequence[str], mistakes: list[FieldError]) -> list[Setting]:
    """The settings of `key=value` arguments; values are YAML. A leading `+`, as Hydra wants for new keys, is ignored."""
    settings = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip().lstrip("+")
        if not equals or not key:
            mistakes.append(FieldError(override, "is not of the form key=value", COMMAND_LINE))
            continue
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            reason = str(error).partition("\n")[0]
            mistakes.append(FieldError(key, f"the value {text!r} cannot be read as YAML: {reason}", COMMAND_LINE))
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
        raise ConfigError([FieldError("algorithm.name", problem)])
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
        builder.add("algorithm", f"found {shown(section)}; needed: the name of an algorithm, or a section with `name`")
        return config
    given = dict(section)
    name = given.pop("name", AlgorithmConfig.name)
    if not isinstance(name, str):
        builder.add("algorithm.name", f"found {shown(name)}; needed: text")
        return config
    if algorithm is not None:
        for option in _options_of_others(name) - set(keys_of(algorithm.config_class)):
            given.pop(option, None)
    options = builder.build(algorithm.config_class, given, path="algorithm") if algorithm else None
    return replace(config, algorithm=AlgorithmConfig(name=name, options=options))


def _without_doubtful(mistakes: Iterable[FieldError], noted: Collection[str], known_keys: Iterable[str]) -> list[FieldError]:
    """Without those of or about keys with a mistake of their own (`noted`): what they were found with is a default."""
    keys = [key for key in known_keys if key in noted]
    names = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, keys))})(?!\w|\.\w)")
    return [m for m in mistakes if m.key not in noted and not (keys and names.search(m.problem))]


def _tell(mistakes: Sequence[FieldError], *, is_dry_run: bool) -> None:
    """Log what stops nothing, and raise what does."""
    stopping = []
    for mistake in mistakes:
        if isinstance(mistake, FieldWarning):
            logger.warning("%s", mistake)
        elif is_dry_run and isinstance(mistake, Missing):
            logger.warning("not on this machine: %s", mistake)
        else:
            stopping.append(mistake)
    if stopping:
        raise ConfigError(stopping)


def _algorithm_of(values: Mapping[str, object], settings: Settings) -> AlgorithmClass | None:
    """The class that `algorithm.name` names; where it is not known the nearest, to check the other options against."""
    section = values.get("algorithm", {})
    name = section.get("name", AlgorithmConfig.name) if isinstance(section, Mapping) else None
    if not isinstance(name, str):
        return None  # build_config tells
    try:
        return load_algorithm(name)
    except ConfigError as error:
        place = settings.place_of("algorithm.name")
        settings.errors += [replace(mistake, where=place) for mistake in error.errors]
    near = difflib.get_close_matches(name, registry.ALGORITHMS, n=1)
    return load_algorithm(near[0]) if near and ":" not in name else None


def _options_of_others(name: str) -> set[str]:
    """Options of any built-in algorithm where `name` is none, and may stand for another than the nearest."""
    if registry.unknown_name(name, registry.ALGORITHMS) is None:
        return set()
    return {option for other in registry.ALGORITHMS for option in keys_of(load_algorithm(other).config_class)}


def _escaped(value: object) -> object:
    """Text that looks like an interpolation, and is none, is written with a backslash."""
    if isinstance(value, Mapping):
        return {key: _escaped(element) for key, element in value.items()}
    if isinstance(value, list):
        return [_escaped(element) for element in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _read_yaml(path: str, place: str, mistakes: list[FieldError]) -> tuple[dict[object, object], dict[str, int]]:
    """The tree in a file, and the line of each dotted key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines = dict(_lines(yaml.compose(text, Loader=yaml.SafeLoader), ""))
        loaded = OmegaConf.load(path) if text.strip() else OmegaConf.create()
    except OSError as error:
        mistakes.append(FieldError(path, f"cannot be read: {error.strerror}", place))
        return {}, {}
    except UnicodeDecodeError as error:
        mistakes.append(FieldError(path, f"is not text: {error}", place))
        return {}, {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        mistakes.append(FieldError("YAML", f"{error.problem}", f"{path}:{mark.line + 1 if mark else 1}"))
        return {}, {}
    except OmegaConfBaseException as error:
        line = lines.get(str(error.full_key), 1)
        mistakes.append(FieldError(str(error.full_key), str(error).partition("\n")[0], f"{path}:{line}"))
        return {}, {}
    tree = OmegaConf.to_container(loaded, resolve=False) if isinstance(loaded, DictConfig) else None
    if not isinstance(tree, dict):
        mistakes.append(FieldError(path, "holds no mapping of keys to values", place))
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
            settings.errors.append(FieldError(key, f"found {value!r}: {reason}", settings.place_of(key)))


def _resolved_child(section: DictConfig, name: str) -> object:
    child = section[name]
    return OmegaConf.to_container(child, resolve=True) if OmegaConf.is_config(child) else child
