"""A whole run, from a checked configuration to the last step."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hybridflow import interrupts
from hybridflow.config.schema import Config
from hybridflow.controller.cluster import cluster
from hybridflow.controller.launch import algorithm_class, all_roles, check_files, launched
from hybridflow.controller.loop import Loop
from hybridflow.controller.placement import device_type, placement_lines
from hybridflow.controller.run_folder import reserved
from hybridflow.controller.watch import watched
from hybridflow.ending import phase, what_happened
from hybridflow.trackers.trial import try_trackers

logger = logging.getLogger("hybridflow")


@contextmanager
def prepared(config: Config) -> Iterator[Loop]:
    """The loop of a run whose roles are launched. In the end every process that was started is ended.

    Once the last step is taken and saved the run is done: what fails in ending its processes is a warning.

    Raises:
        HybridflowError: what went wrong, where, and what to do.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # what ranks write reaches a log file as plain text
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # it prints whole traces of calls whose failure was told
    check_files(config)
    try_trackers(config)
    started, is_finished = time.perf_counter(), False
    try:
        with interrupts.noticed(), phase("the run was prepared"), cluster(config):
            interrupts.heed_sigterm()
            for line in placement_lines(config, all_roles(config)):
                logger.info(line)
            with reserved(config) as folder, launched(config) as groups, watched(config, groups.log):
                loop = Loop(config, groups, algorithm_class(config)(config, groups.groups), folder)
                data = groups.dataset
                logger.info(
                    "%d training %s, %d validation prompts; %d steps",
                    *(data.num_prompts, loop.algorithm.rows, data.num_validation_prompts, loop.total_steps),
                )
                logger.info("ready for the first step after %.1f s", time.perf_counter() - started)
                if device_type(config) == "cuda":
                    logger.info("the first step compiles kernels: it may take half a minute more than the following ones")
                yield loop
                is_finished = True
    except (Exception, KeyboardInterrupt) as error:
        if not is_finished:
            raise
        logger.warning("the run is finished; in ending its processes: %s", what_happened(error))
    logger.info("done: everything is in %s", config.run.folder)
