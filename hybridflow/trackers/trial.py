"""Trackers are tried before Ray starts: whoever lacks a key is told at once, and not after all models are loaded."""

from __future__ import annotations

import threading

from hybridflow.config.schema import Config
from hybridflow.errors import ConfigError, FieldError
from hybridflow.trackers.base import tracker_class
from hybridflow.trackers.behind import message_of

LIMIT_S = 30.0
"""For each tracker."""


def try_trackers(config: Config, *, limit_s: float = LIMIT_S) -> None:
    """Call `check` of each tracker that `trackers.names` lists, each for at most `limit_s`.

    Raises:
        ConfigError: with a line for each that cannot start.
    """
    errors: list[FieldError] = []
    for name in dict.fromkeys(config.trackers.names):
        found: list[FieldError] = [FieldError("trackers.names", f"{name!r} does not answer within {limit_s:g} s. {ADVICE}")]
        thread = threading.Thread(target=_try, args=(name, config, found), name=f"trial of {name}", daemon=True)
        thread.start()
        thread.join(limit_s)
        errors += found
    if errors:
        raise ConfigError(errors)


ADVICE = "Repair it, or leave it out: metrics.jsonl in the run's folder is always written"


def _try(name: str, config: Config, found: list[FieldError]) -> None:
    """Replace what `found` says by what is found, which is nothing where the tracker can start."""
    try:
        tracker_class(name).check(config)
    except ConfigError as error:
        found[:] = error.errors
    except BaseException as error:  # whatever a library or a user's class raises, sys.exit() among it
        said = message_of(error).partition("\n")[0].rstrip(".")
        found[:] = [FieldError("trackers.names", f"{name!r} cannot start: {said}. {ADVICE}")]
    else:
        found.clear()
