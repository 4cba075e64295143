"""Weights & Biases. `WANDB_MODE=offline` keeps everything in `<run folder>/wandb`, to be uploaded by `wandb sync`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

import wandb

from hybridflow.config.schema import Config
from hybridflow.config.secrets import as_written
from hybridflow.errors import ConfigError, FieldError
from hybridflow.metrics import Metrics
from hybridflow.trackers.base import Sample, Tracker, run_folder, run_name

RUN_ID_FILE = "wandb_run_id"
TIMEOUT_S = 20
"""For each answer of the server."""


class WandbTracker(Tracker):
    """Metrics and a table of samples. A resumed run goes on in the same wandb run."""

    def __init__(self, config: Config, total_steps: int, resume_step: int):
        super().__init__(config, total_steps, resume_step)
        folder = run_folder(config)
        id_file = folder / RUN_ID_FILE
        is_resumed = resume_step > 0 and id_file.exists()
        run_id = id_file.read_text().strip() if is_resumed else secrets.token_hex(4)
        id_file.write_text(run_id)
        self._run = wandb.init(
            project=config.trackers.project,
            name=run_name(config),
            dir=str(folder),
            id=run_id,
            resume="allow" if is_resumed else None,
            config=json.loads(json.dumps(as_written(config), default=str)),
            settings=wandb.Settings(init_timeout=TIMEOUT_S, finish_timeout=TIMEOUT_S),
        )
        # With a step of our own, values that a resumed run logs again stand at their own step: wandb's counter only rises.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @classmethod
    def check(cls, config: Config) -> None:
        """Ask the server whether it takes the key: no run is made there. Offline nobody is asked.

        Raises:
            ConfigError: there is no key.
            wandb.errors.Error: it is refused, or the server does not answer.
        """
        is_online = wandb.setup().settings.mode in ("online", "shared")
        if is_online and not wandb.login(verify=True, prompt=False, timeout=TIMEOUT_S):
            advice = "Set WANDB_API_KEY, or run `wandb login`; WANDB_MODE=offline needs none"
            raise ConfigError([FieldError("trackers.names", f"'wandb' finds no API key. {advice}")])

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log({"step": step, **metrics})

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        rows = [[sample.prompt, sample.response, sample.ground_truth, sample.reward] for sample in samples]
        table = wandb.Table(columns=["prompt", "response", "ground_truth", "reward"], data=rows)
        self._run.log({"step": step, "samples": table})

    def close(self) -> None:
        self._run.finish()
