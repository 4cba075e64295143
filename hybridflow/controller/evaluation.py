"""A whole evaluation: answers, scores, and what they are worth."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from hybridflow import interrupts
from hybridflow.config.schema import Config
from hybridflow.controller.cluster import cluster
from hybridflow.controller.launch import check_files, launched
from hybridflow.controller.measures import Estimate
from hybridflow.controller.run_folder import reserved
from hybridflow.controller.validation import answered, estimates

logger = logging.getLogger("hybridflow")

ROWS_FILE, RESULTS_FILE = "rows.parquet", "results.json"
Results = Mapping[str, Mapping[str, Estimate]]
"""Data source -> measure -> estimate; `all` stands for all sources."""


def evaluate(config: Config, ks: Sequence[int]) -> Results:
    """Answer and score the validation prompts of `config`, with the measures of each k; `rows.parquet` and `results.json` go to
    the run's folder.

    Raises:
        HybridflowError: what went wrong, where, and what to do.
    """
    check_files(replace(config, data=replace(config.data, train_files=())))  # which are the same ones
    with interrupts.noticed(), cluster(config):
        interrupts.heed_sigterm()
        with reserved(config) as folder, launched(config) as groups:
            logger.info("answering %d prompts", groups.dataset.num_validation_prompts)
            rows = answered(config, groups, groups.rollout)
            results = estimates(config, groups, rows, ks)
            groups.data.write_rows(rows, str(folder.path / ROWS_FILE))
    numbers = {source: {name: asdict(estimate) for name, estimate in found.items()} for source, found in results.items()}
    Path(config.run.folder, RESULTS_FILE).write_text(json.dumps(numbers, indent=1))
    return results
