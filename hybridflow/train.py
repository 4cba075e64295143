"""Train: `python -m hybridflow.train [config.yaml] key=value ...`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from hybridflow.api import TrainModule
from hybridflow.config.command_line import parse
from hybridflow.config.load import load_config, resolved_yaml
from hybridflow.config.schema import Config
from hybridflow.controller.boundary import ended_by
from hybridflow.ending import as_process, show

sys.modules[__name__].__class__ = TrainModule


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 done, 1 it failed, 2 the configuration has errors, 128 + n where signal n has stopped it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    options = parse(arguments)
    config: Config | None = None
    try:
        checked = load_config(options.config, options.overrides, is_dry_run=options.dry_run, asks_hub=True)
        if options.dry_run:
            show(plan(checked))
            return 0
        # Imported here, so that an error in the configuration or --help waits for neither Ray nor torch.
        from hybridflow.controller.run import prepared

        config = checked
        with prepared(config) as loop:
            loop.run()
    except BaseException as error:  # the one place where whatever ends a run is told
        return ended_by(error, config)
    return 0


def plan(config: Config) -> str:
    """What a dry run prints: every key with its value, and where each role would run. Raises ConfigError as a run would."""
    from hybridflow.controller.launch import all_roles, check_files
    from hybridflow.controller.placement import placement_lines

    check_files(config)
    return "\n".join([resolved_yaml(config), *placement_lines(config, all_roles(config)), ""])


if __name__ == "__main__":
    as_process(main)
