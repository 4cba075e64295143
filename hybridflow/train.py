"""Train: `python -m hybridflow.train config.yaml key=value ...`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hybridflow.config.describe import resolved_yaml
from hybridflow.config.load import load_config
from hybridflow.config.schema import Config
from hybridflow.errors import ConfigError, HybridflowError


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hybridflow.train", description=__doc__)
    parser.add_argument("config", help="YAML file; docs/configuration.md lists every key")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a key, for example actor.learning_rate=1e-6")
    parser.add_argument("--dry-run", action="store_true", help="print what would run where; what is missing here is a warning")
    options = parser.parse_intermixed_args(arguments)  # options may stand between the overrides
    if "=" in options.config and not Path(options.config).exists():
        found = f"a YAML file comes first, and the first argument is {options.config!r}"
        parser.error(f"{found}. For example: {parser.prog} configs/quickstart.yaml {options.config}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 done, 1 the run failed, 2 the configuration has errors, 130 Ctrl-C, 143 SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    options = parse(arguments)
    try:
        config = load_config(options.config, options.overrides, is_dry_run=options.dry_run, asks_hub=True)
        if options.dry_run:
            sys.stdout.write(plan(config))
            return 0
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    # Imported here, so that an error in the configuration or --help waits for neither Ray nor torch.
    from hybridflow.controller.run import run

    try:
        run(config)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except HybridflowError as error:
        sys.stderr.write(f"\nThe run failed.\n{error}\n")
        return 1
    except KeyboardInterrupt as error:
        sys.stderr.write(f"\nStopped. {how_to_go_on(config)}\n")
        return 128 + (error.args[0] if error.args else 2)  # the number of the signal; 2 is Ctrl-C
    return 0


def plan(config: Config) -> str:
    """What a dry run prints: every key with its value, and where each role would run."""
    from hybridflow.controller.launch import all_roles
    from hybridflow.controller.placement import placement_lines

    return "\n".join([resolved_yaml(config), *placement_lines(config, all_roles(config)), ""])


def how_to_go_on(config: Config) -> str:
    """What the same command would do after a run was stopped."""
    from hybridflow.checkpoint.store import CheckpointStore

    newest = CheckpointStore(config.run.folder).latest()
    if newest is None:
        return "There is no checkpoint yet: the same command starts anew."
    if config.checkpoint.resume == "auto":
        return f"The same command continues after {newest}."
    return f"checkpoint.resume={config.checkpoint.resume}: add checkpoint.resume=auto to continue after {newest}."


if __name__ == "__main__":
    sys.exit(main())
