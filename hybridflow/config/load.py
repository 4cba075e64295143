"""`load_config`: YAML and `key=value` in, a checked `Config` out. The only file that knows OmegaConf."""

from __future__ import annotations

import difflib
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridflow import registry
from hybridflow.config import verl_keys
from hybridflow.config.build import Builder, default_of, found, keys_of
from hybridflow.config.rules import AlgorithmClass, check
from hybridflow.config.schema import AlgorithmConfig, Config
from hybridflow.config.secrets import FromEnvironment, referred, with_references
from hybridflow.config.settings import DROPPED, KNOWN_KEYS, MAPPINGS, Chosen, Settings
from hybridflow.config.tree import Setting, join, leaves, with_texts
from hybridflow.config.yaml_values import read_value, read_yaml
from hybridflow.errors import ConfigError, FieldError, FieldReport

logger = logging.getLogger("hybridflow")

COMMAND_LINE, IN_PYTHON = "command line", "in Python"


def load_config(
    path: str | Mapping[str, object] | None,
    overrides: Sequence[str] = (),
    *,
    over: Mapping[str, object] | None = None,
    is_dry_run: bool = False,
    asks_hub: bool = False,
) -> Config:
    """The configuration in the YAML file at `path` (None: the defaults alone; or the tree of one) with the tree `over` and
    `key=value` overrides on top.

    Keys of verl are accepted in both, and translated (docs/from_verl.md). Neither torch nor Ray is imported.
    With `asks_hub`, models that are named as on the hub are asked for there. In a dry run, what this machine lacks and another
    may have is a warning. Warnings are logged.

    Example:
        >>> load_config("configs/quickstart.yaml", ["run.seed=x", "actor.lerning_rate=1"])  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        hybridflow.errors.ConfigError: 2 errors in the configuration:
          command line: run.seed: found 'x' (text); needed: an integer of at least 0
          command line: actor.lerning_rate: no such key; did you mean 'actor.learning_rate'?

    Raises:
        ConfigError: with every error found, not only the first.
    """
    unread: list[FieldError] = []
    settings = Settings(resolve_value, _chosen)
    layers = read_files(path, unread) if isinstance(path, str) else []
    in_python = [tree for tree in (path, over) if isinstance(tree, Mapping)]
    layers += [[Setting(*leaf, IN_PYTHON) for leaf in leaves(tree, whole=MAPPINGS)] for tree in in_python]
    layers.append(read_overrides(overrides, settings.reports))
    settings.take(layers, has_file=len(layers) > 1)
    values, unresolved = resolve(settings)
    settings.reports += [] if unread else unresolved  # what an interpolation refers to may be in a file that was not read
    algorithm = _algorithm_of(values, settings) if not unread or settings.place_of("algorithm.name") else None
    options = keys_of(algorithm.config_class, "algorithm") if algorithm else []
    builder = Builder(settings.place_of, [*KNOWN_KEYS, *options], aliases=verl_keys.stands_for())
    config = build_config(builder, values, algorithm)
    reports = [*settings.reports, *builder.errors]
    mistaken = {report.key for report in reports if isinstance(report, FieldError)}
    for report in check(config, algorithm, asks_hub=asks_hub):
        keys = (report.key, *report.related)
        # A key that is mistaken, or that an unread file may give, had its default in the comparison.
        if not mistaken.intersection(keys) and not (unread and not all(map(settings.place_of, keys))):
            reports.append(replace(report, where=report.where or settings.place_of(report.key)))
    _tell([*unread, *(report for report in reports if report.where or not unread)], is_dry_run=is_dry_run)
    return with_references(config, referred(setting.value for layer in layers for setting in layer))


def read_files(path: str, errors: list[FieldError]) -> list[list[Setting]]:
    """The settings of the YAML file at `path` and of those that it builds on (`base: other.yaml`), lowest first."""
    layers: list[list[Setting]] = []
    seen: list[str] = []
    place = ""
    while path:
        if os.path.realpath(path) in seen:
            errors.append(FieldError("base", f"{path} builds on itself", place))
            break
        seen.append(os.path.realpath(path))
        try:
            tree, lines = _read_yaml(path, place)
        except ConfigError as error:
            errors += error.errors
            break
        base = tree.pop("base", None)
        layers.insert(0, [Setting(*leaf, f"{path}:{lines.get(leaf[0], 1)}") for leaf in leaves(tree, whole=MAPPINGS)])
        place = f"{path}:{lines.get('base', 1)}"
        if base is not None and not isinstance(base, str):
            errors.append(FieldError("base", f"found {found(base)}; needed: the path of a YAML file", place))
            break
        path = os.path.normpath(os.path.join(os.path.dirname(path), os.path.expanduser(base))) if base else ""
    return layers


def read_overrides(overrides: Sequence[str], reports: list[FieldReport]) -> list[Setting]:
    """The settings of `key=value` arguments; values are YAML. As in Hydra, `~key` takes a key out of the files. A leading `+`
    and an empty argument do nothing.

    Example:
        >>> read_overrides(["+rollout.stop=[a, b]", "actor.learning_rate=1e-6"], reports=[])
        [Setting(key='rollout.stop', value=['a', 'b'], place='command line'), Setting(key='actor.learning_rate', ...)]
    """
    settings, now = [], time.localtime()
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip().lstrip("+")
        if not override.strip():
            continue
        if key.startswith("~"):
            settings.append(Setting(key[1:], DROPPED, COMMAND_LINE))
            continue
        if "@" in key:
            advice = "Give the keys that the group would set"
            reports.append(FieldError(key, f"groups of Hydra's are not read. {advice}", COMMAND_LINE))
            continue
        if not equals or not key:
            reports.append(FieldError(override, "is not of the form key=value", COMMAND_LINE))
            continue
        try:
            value = OmegaConf.to_container(OmegaConf.create({"value": read_value(text)}), resolve=False)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            problem = f"the value {text!r} cannot be read as YAML: {_first_line(error)}"
            reports.append(FieldError(key, problem, COMMAND_LINE))
            continue
        assert isinstance(value, dict)
        settings.append(Setting(key, _with_time(value["value"], now), COMMAND_LINE))
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


def resolve(settings: Settings) -> tuple[dict[str, object], list[FieldError]]:
    """The values of `settings` without interpolations, and errors for those that cannot be resolved, which are left out."""
    errors: list[FieldError] = []

    def section(node: DictConfig, tree: Mapping[str, object], path: str) -> Iterator[tuple[str, object]]:
        for name, value in tree.items():
            key = join(path, name)
            try:
                if isinstance(value, Mapping):
                    yield name, dict(section(node[name], value, key))
                else:
                    yield name, _resolved_child(node, name)
            except OmegaConfBaseException as error:
                errors.append(FieldError(key, f"found {value!r}: {_first_line(error)}", settings.place_of(key)))

    return dict(section(OmegaConf.create(settings.context()), settings.values, "")), errors


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


def _chosen(name: str) -> Chosen | None:
    """What translations of verl's keys depend on; None where there is no such algorithm, which is told later."""
    try:
        algorithm = load_algorithm(name)
    except ConfigError:
        return None
    options = {field.name: default_of(field) for field in fields(algorithm.config_class)}
    return Chosen(options, "critic" in algorithm.roles(Config()))


def to_yaml(value: Mapping[str, object], *, flow: bool = False) -> str:
    """`value` as YAML that this file reads back unchanged; `flow` for one line."""
    text = OmegaConf.to_yaml(OmegaConf.create(with_texts(value, _escaped)))
    return yaml.safe_dump(yaml.safe_load(text), default_flow_style=True, width=10000, sort_keys=False) if flow else text


def resolved_yaml(config: Config) -> str:
    """Every key of `config` with its value, as YAML that `load_config` reads back to an equal `Config`."""
    tree = asdict(config)
    return to_yaml(tree | {"algorithm": {"name": config.algorithm.name, **(tree["algorithm"]["options"] or {})}})


def build_config(builder: Builder, values: Mapping[str, object], algorithm: AlgorithmClass | None) -> Config:
    """The `Config` of `values`, with defaults in place of mistaken ones."""
    section = values.get("algorithm", {})
    config = builder.build(Config, {key: value for key, value in values.items() if key != "algorithm"}, default=Config())
    assert config is not None
    if not isinstance(section, Mapping):
        builder.add("algorithm", f"found {found(section)}; needed: the name of an algorithm, or a section with `name`")
        return config
    name = section.get("name", AlgorithmConfig.name)
    if not isinstance(name, str):
        builder.add("algorithm.name", f"found {found(name)}; needed: text")
        return config
    if algorithm is None:
        return replace(config, algorithm=AlgorithmConfig(name=name))
    known = set(keys_of(algorithm.config_class))
    if registry.unknown_name(name, registry.ALGORITHMS):  # it may stand for another than the nearest, which has other options
        others = {option for other in registry.ALGORITHMS for option in keys_of(load_algorithm(other).config_class)} - known
        section = {option: value for option, value in section.items() if option not in others}
    options = {option: value for option, value in section.items() if option != "name"}
    built = builder.build(algorithm.config_class, options, path="algorithm")
    return replace(config, algorithm=AlgorithmConfig(name=name, options=built))


def _algorithm_of(values: Mapping[str, object], settings: Settings) -> AlgorithmClass | None:
    """The class that `algorithm.name` names; where it is not known the nearest, to check the other options against."""
    section = values.get("algorithm", {})
    name = section.get("name", AlgorithmConfig.name) if isinstance(section, Mapping) else None
    if not isinstance(name, str):
        return None  # build_config tells
    try:
        return load_algorithm(name)
    except ConfigError as error:
        settings.reports += [replace(found, where=settings.place_of("algorithm.name")) for found in error.errors]
    near = difflib.get_close_matches(name, registry.ALGORITHMS, n=1)
    return load_algorithm(near[0]) if near and ":" not in name else None


def _tell(reports: Iterable[FieldReport], *, is_dry_run: bool) -> None:
    """Log what stops nothing, and raise what does."""
    errors = []
    for report in reports:
        if isinstance(report, FieldError) and not (is_dry_run and report.is_local):
            errors.append(report)
        else:
            logger.warning("%s%s", "not on this machine: " if isinstance(report, FieldError) else "", report)
    if errors:
        raise ConfigError(errors)


def _escaped(text: str) -> str:
    """Text that looks like an interpolation, and is none, is written with a backslash; what was one, as such."""
    return text.written if isinstance(text, FromEnvironment) else text.replace("${", "\\${")


def _read_yaml(path: str, place: str) -> tuple[dict[object, object], dict[str, int]]:
    """The tree in a file, and the line of each dotted key.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    lines: dict[str, int] = {}
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines = dict(_lines(yaml.compose(text, Loader=yaml.SafeLoader), ""))
        content = read_yaml(text)
        loaded = OmegaConf.create({} if content is None else content) if isinstance(content, dict | None) else None
    except OSError as error:
        raise ConfigError([FieldError(path, f"cannot be read: {error.strerror}", place)]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([FieldError(path, f"is not text: {error}", place)]) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError([FieldError("YAML", f"{error.problem}", f"{path}:{line}")]) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError([FieldError("YAML", _first_line(error), str(path))]) from error
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        raise ConfigError([FieldError(key, _first_line(error), f"{path}:{lines.get(key, 1)}")]) from error
    tree = OmegaConf.to_container(loaded, resolve=False) if isinstance(loaded, DictConfig) else None
    if not isinstance(tree, dict):
        raise ConfigError([FieldError(path, "holds no mapping of keys to values", place)])
    return dict(tree), lines


def _lines(node: yaml.Node | None, path: str) -> Iterator[tuple[str, int]]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == "<<":
            yield from _lines(value, path)
        else:
            yield join(path, key.value), key.start_mark.line + 1
            yield from _lines(value, join(path, key.value))


def _with_time(value: object, now: time.struct_time) -> object:
    """Text in which `${now:%Y-%m-%d}` is the time, as in Hydra."""
    return re.sub(r"\$\{now:([^{}]+)\}", lambda found: time.strftime(found[1], now), value) if isinstance(value, str) else value


def _resolved_child(section: DictConfig, name: str) -> object:
    child = section[name]
    return OmegaConf.to_container(child, resolve=True) if OmegaConf.is_config(child) else child


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
