"""A whole run, from a checked configuration to the last step."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from hybridflow.config.describe import resolved_yaml
from hybridflow.config.schema import Config
from hybridflow.controller.launch import algorithm_class, all_roles, cluster, launched
from hybridflow.controller.loop import Loop
from hybridflow.controller.placement import placement_lines

logger = logging.getLogger("hybridflow")


def run(config: Config) -> None:
    """Launch the roles, train, and end every process that was started.

    Raises:
        HybridflowError: what went wrong, where, and what to do.
    """
    started = time.perf_counter()
    folder = Path(config.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(resolved_yaml(config))
    with cluster(config):
        for line in placement_lines(config, all_roles(config)):
            logger.info(line)
        with launched(config) as groups:
            algorithm = algorithm_class(config)(config, groups.groups)
            data = groups.data.open(algorithm.rows)
            total_steps = config.run.total_steps or config.run.total_epochs * data.steps_per_epoch
            logger.info(
                "%d training and %d validation prompts; %d steps", data.num_prompts, data.num_validation_prompts, total_steps
            )
            logger.info("ready for the first step after %.1f s", time.perf_counter() - started)
            Loop(config, groups, algorithm, total_steps=total_steps).run()
    logger.info("done: everything is in %s", folder)
