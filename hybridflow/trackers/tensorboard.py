"""TensorBoard event files in `<run folder>/tensorboard`."""

from __future__ import annotations

from collections.abc import Sequence

from hybridflow.config.schema import Config
from hybridflow.errors import ConfigError, FieldError
from hybridflow.metrics import Metrics
from hybridflow.trackers.base import Sample, Tracker, run_folder


class TensorboardTracker(Tracker):
    """Metrics as scalars, samples as text. After a resume TensorBoard hides the steps that are taken again."""

    def __init__(self, config: Config, total_steps: int, resume_step: int):
        super().__init__(config, total_steps, resume_step)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            found = f"'tensorboard' needs the package tensorboard, which does not import: {error}"
            raise ConfigError([FieldError("trackers.names", f"{found}. pip install tensorboard, or leave it out")]) from error
        self.folder = run_folder(config) / "tensorboard"
        self._writer = SummaryWriter(str(self.folder), purge_step=resume_step + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for index, sample in enumerate(samples):
            # Four spaces make Markdown show the text as it stands.
            text = f"{sample.prompt}{sample.response}".replace("\n", "\n    ")
            verdict = f"reward {sample.reward:g}, ground truth `{sample.ground_truth}`"
            self._writer.add_text(f"samples/{index}", f"    {text}\n\n{verdict}", step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
