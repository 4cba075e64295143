"""The arguments of `python -m hybridflow.train`: a file, keys, and what Hydra's users are used to."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

USAGE = "Train: `python -m hybridflow.train [config.yaml] key=value ...`."
HYDRA = {
    "-m --multirun": "start one run for each value",
    "-i --info": "use --dry-run",
    "-p --package": "write the keys with their section",
    "--hydra-help": "use --help",
    "--experimental-rerun": "give RUN/config.yaml as the file",
    "-sc --shell-completion": "there is none",
}
"""Flags of Hydra's that mean nothing here, and what to do."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `config` is None where no file is given."""
    parser = argparse.ArgumentParser(prog="python -m hybridflow.train", description=USAGE, allow_abbrev=False)
    first = "YAML file, which may be left out; docs/configuration.md lists every key, docs/from_verl.md those of verl"
    parser.add_argument("config", nargs="?", help=first)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a key, for example actor.learning_rate=1e-6")
    parser.add_argument("--dry-run", action="store_true", help="print what would run where; what is missing here is a warning")
    hydra = parser.add_argument_group("as in Hydra")
    hydra.add_argument("--config-name", "-cn", metavar="NAME", help="the file NAME.yaml")
    hydra.add_argument("--config-path", "-cp", "--config-dir", "-cd", metavar="DIR", default=".", help="its folder")
    hydra.add_argument("--cfg", "-c", choices=["job", "all"], help="a dry run")
    hydra.add_argument("--run", "-r", "--resolve", action="store_true", help=argparse.SUPPRESS)
    for flags in HYDRA:
        hydra.add_argument(*flags.split(), dest=flags, nargs="?", const=True, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)  # options may stand between the overrides
    if given := [flags for flags in HYDRA if vars(options)[flags]]:
        parser.error(f"{given[0].split()[-1]} of Hydra's is not known here: {HYDRA[given[0]]}")
    options.dry_run |= bool(options.cfg)
    if options.config is not None and not is_file(options.config):
        options.overrides.insert(0, options.config)
        options.config = None
    file = Path(options.config_path, options.config_name or "_").with_suffix(".yaml")
    found = VERLS_FILES.fullmatch(options.config_name or "")
    if found and not file.is_file():
        options.overrides += [f"trainer.v1.trainer_mode={found['mode'].strip('_')}"] if found["mode"] else []
        options.overrides += ["model_engine=megatron"] if found["engine"] else []
    elif options.config_name:
        if options.config is not None:
            parser.error(f"found the file {options.config} and --config-name {options.config_name}; give one of them")
        options.config = str(file)
    return options


VERLS_FILES = re.compile(r"(?P<mode>one_step_off_|fully_async_)?(?:ppo_|dapo_)(?P<engine>megatron_)?trainer(?:\.yaml)?")
"""Names of verl's own files; they say the trainer's mode and the engine. A file of the user's goes before."""


def is_file(argument: str) -> bool:
    """Whether the first argument is a YAML file, and not an override."""
    return bool(argument.strip()) and ("=" not in argument or Path(argument).is_file()) and not argument.startswith("~")
