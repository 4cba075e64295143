"""MLflow: on the server that `MLFLOW_TRACKING_URI` names, else in `<run folder>/mlflow.db`, which
`mlflow ui --backend-store-uri sqlite:///<run folder>/mlflow.db` shows."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from hybridflow.config.schema import Config
from hybridflow.config.secrets import as_written
from hybridflow.config.tree import leaves
from hybridflow.metrics import Metrics
from hybridflow.trackers.base import Sample, Tracker, run_folder, run_name

RUN_ID_FILE = "mlflow_run_id"
PARAMETERS_PER_CALL = 100
"""MLflow's limit."""
NOT_IN_NAMES = re.compile(r"[^\w.:/ -]")
"""What MLflow refuses in names of metrics."""


class MlflowTracker(Tracker):
    """Metrics, the configuration as parameters, samples as a file per validation. A resumed run goes on in its MLflow run."""

    def __init__(self, config: Config, total_steps: int, resume_step: int):
        super().__init__(config, total_steps, resume_step)
        self._client = _client(config)
        id_file = run_folder(config) / RUN_ID_FILE
        if resume_step > 0 and id_file.exists():
            self.run_id = id_file.read_text().strip()
            self._client.update_run(self.run_id, status="RUNNING")
            return
        self.run_id = self._client.create_run(self._experiment(), run_name=run_name(config)).info.run_id
        id_file.write_text(self.run_id)
        parameters = [Param(NOT_IN_NAMES.sub("_", key), str(value)) for key, value in leaves(as_written(config))]
        for first in range(0, len(parameters), PARAMETERS_PER_CALL):
            self._client.log_batch(self.run_id, params=parameters[first : first + PARAMETERS_PER_CALL])

    @classmethod
    def check(cls, config: Config) -> None:
        """Ask the server for its experiments, where there is one: nothing is made there.

        Raises:
            mlflow.exceptions.MlflowException: it does not answer, or refuses.
        """
        if "MLFLOW_TRACKING_URI" in os.environ:
            _client(config).search_experiments(max_results=1)

    def log(self, step: int, metrics: Metrics) -> None:
        now = int(time.time() * 1000)
        values = [Metric(NOT_IN_NAMES.sub("_", name), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=values)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._client.log_dict(self.run_id, {"samples": [asdict(sample) for sample in samples]}, f"samples/step_{step:06d}.json")

    def close(self) -> None:
        self._client.set_terminated(self.run_id)

    def _experiment(self) -> str:
        name = self.config.trackers.project
        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        is_local = "MLFLOW_TRACKING_URI" not in os.environ
        artifacts = (run_folder(self.config) / "mlflow_artifacts").absolute().as_uri() if is_local else None
        return str(self._client.create_experiment(name, artifact_location=artifacts))


def _client(config: Config) -> MlflowClient:
    # MLflow's seven retries of a server that is down take minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    return MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_folder(config).absolute()}/mlflow.db")
