"""Whether models that are named as on the hub can be had: the hub is asked once, or its cache looked at. Loads no weights.

Without this, every rank would find out by itself, after a minute of retries.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hybridflow.config.pools import joins_a_cluster
from hybridflow.config.rules_files import HUB_NAME, WEIGHTS, model_paths
from hybridflow.config.schema import Config
from hybridflow.errors import FieldError, FieldReport, FieldWarning
from hybridflow.tokenizers import TOKENIZER_FILES

TIMEOUT_S = 10.0
NUM_ATTEMPTS = 2
PAUSE_S = 1.0
"""Between attempts to connect: a name server may fail once."""
NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"}
"""Errors by name: releases of huggingface_hub differ in the library that they use for HTTP."""


@dataclass(frozen=True)
class HubReply:
    """What the hub said about a name."""

    kind: Literal["found", "refused", "no connection", "unclear"]
    problem: str = ""


def hub_models_can_be_had(config: Config, roles: tuple[str, ...]) -> Iterator[FieldReport]:
    """The hub knows every model that is named so, or its cache on this machine holds it.

    On a cluster that is joined the ranks load the models, so what is found here is only a warning.
    """
    unreachable: HubReply | None = None
    is_remote = joins_a_cluster(config)
    here = "on this machine (the ranks look where they run), " if is_remote else ""

    def report(key: str, problem: str) -> FieldReport:
        return FieldWarning(key, here + problem) if is_remote else FieldError(key, problem, is_local=True)

    for key, name in _names(config, roles).items():
        if _is_offline():
            if lacking := _lacking_in_cache(name, is_tokenizer=key == "model.tokenizer"):
                yield report(key, f"{name!r} is no folder, HF_HUB_OFFLINE is set, and {lacking}. {_advice(name)}")
            continue
        answer = unreachable or _ask(name, "tokenizer_config.json" if key == "model.tokenizer" else "config.json")
        if answer.kind == "unclear":
            yield FieldWarning(key, f"{answer.problem}. The hub is asked again when the model is loaded")
        elif answer.kind == "refused":
            yield report(key, f"{name!r} is no folder, and {answer.problem}")
        elif answer.kind == "no connection":
            unreachable = answer
            if lacking := _lacking_in_cache(name, is_tokenizer=key == "model.tokenizer"):
                yield report(key, f"{name!r} is no folder, {answer.problem}, and {lacking}. {_advice(name)}")
            else:
                yield FieldWarning(
                    key, f"{answer.problem}; its cache holds {name!r}. Set HF_HUB_OFFLINE=1 to use that without asking"
                )


def _names(config: Config, roles: tuple[str, ...]) -> dict[str, str]:
    """What is to be found on the hub, by key. A folder of that name here comes first."""
    paths = model_paths(config, roles)
    if config.model.tokenizer is not None:
        paths["model.tokenizer"] = config.model.tokenizer
    return {key: path for key, path in paths.items() if HUB_NAME.fullmatch(path) and not Path(path).is_dir()}


def _ask(name: str, file: str) -> HubReply:
    """What the hub says about a file: one request without its content."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    hub = constants.ENDPOINT
    for attempt in range(1, NUM_ATTEMPTS + 1):
        try:
            get_hf_file_metadata(hf_hub_url(name, file), timeout=TIMEOUT_S)
            return HubReply("found")
        except EntryNotFoundError:
            is_model = file == "config.json"  # a tokenizer has other files too
            return HubReply("refused", f"{hub}/{name} holds no config.json. Name a model") if is_model else HubReply("found")
        except RepositoryNotFoundError:
            problem = f"{hub} knows no such model, or shows it to others only. Check the name"
            return HubReply("refused", f"{problem}; log in with `hf auth login` or set HF_TOKEN where it is private or gated")
        except HfHubHTTPError as error:
            return HubReply("unclear", f"{hub} answered {error.response.status_code} when asked for {name!r}")
        except HFValidationError as error:
            return HubReply("refused", f"is no name on the hub either: {error}")
        except Exception as error:
            reason = str(error) or type(error).__name__
            if not NO_CONNECTION & {base.__name__ for base in type(error).__mro__}:
                return HubReply(
                    "unclear", f"{hub} did not answer for {name!r} in {TIMEOUT_S:g} s or not as a hub does ({reason})"
                )
            if attempt == NUM_ATTEMPTS:
                return HubReply("no connection", f"{hub} cannot be reached ({reason})")
            time.sleep(PAUSE_S)
    raise AssertionError("the last attempt returns")


def _lacking_in_cache(name: str, *, is_tokenizer: bool) -> str:
    """What the hub's cache lacks of a model, or of a tokenizer, as a clause; empty where it is complete."""
    from huggingface_hub import constants, try_to_load_from_cache

    wanted = TOKENIZER_FILES if is_tokenizer else ("config.json",)
    found = [file for file in wanted if isinstance(try_to_load_from_cache(name, file), str)]
    cache = f"the cache {constants.HF_HUB_CACHE}"
    if not found:
        return f"{cache} holds no {'tokenizer' if is_tokenizer else 'config.json'} of it"
    snapshot = Path(str(try_to_load_from_cache(name, found[0]))).parent
    if is_tokenizer or any(file for pattern in WEIGHTS for file in snapshot.glob(pattern)):
        return ""
    return f"{cache} holds no weights of it"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _advice(name: str) -> str:
    filled = f"where there is a network fill the cache with `hf download {name}`, and set HF_HUB_OFFLINE=1"
    return f"Give a local folder; or {filled}"
