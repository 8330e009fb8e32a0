"""What a trainer is told along the way: the order of each pass, the request to stop, the curves, the progress lines."""

import logging
import math
from pathlib import Path

from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import IntervalStrategy, has_length

from hfspeech.errors import UserError

logger = logging.getLogger("hfspeech")


class StepCallback(TrainerCallback):
    """Sets each epoch's row order, hears the request to stop, and ends a run whose loss is no longer a number."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch or 0)
        trainer = self.trainer
        for holder in (getattr(trainer, "train_sampler", None), trainer.train_dataset):
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)
        trainer.begin_pass()

    def on_train_begin(self, args, state, control, **kwargs):
        # The next loss to be logged is that of all steps since the last one, those before the checkpoint among them.
        self.trainer._tr_loss += self.trainer._progress.get("unlogged_loss", 0.0)
        self.trainer._globalstep_last_logged -= self.trainer._progress.get("unlogged_steps", 0)

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if not has_length(trainer.train_dataset):
            trainer._stream |= {
                "num_batches": state.global_step * args.gradient_accumulation_steps * args.world_size,
                "places": list(trainer._places.items()),
            }
            state.epoch = state.global_step / state.max_steps  # Trainer begins to count anew when a stream is resumed
        ends_epoch = args.eval_strategy == IntervalStrategy.EPOCH and state.epoch == int(state.epoch)
        trainer._evaluation_is_due = control.should_evaluate or ends_epoch
        trainer._stops = trainer._stop_is_asked()
        if trainer._stops:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may be no time for it; the next launch begins with it

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer._stops:
            control.should_save = control.should_evaluate = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise UserError(
                f"The loss at step {state.global_step} is {logs['loss']}: lower --learning_rate; the checkpoints in "
                f"{args.output_dir} are kept.",
                of_all=True,
            )


class Curves(TensorBoardCallback):
    """Writes the curves into the run's folder for as long as that can be done: a run is worth more than they are."""

    def __init__(self, output_dir):
        super().__init__()
        # An evaluation before training would else be logged into the working directory.
        self.logging_dir = self.logging_dir or str(Path(output_dir) / "runs")

    def on_train_begin(self, *args, **kwargs):
        self._try(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args, **kwargs):
        self._try(super().on_log, *args, **kwargs)

    def on_train_end(self, *args, **kwargs):
        self._try(super().on_train_end, *args, **kwargs)

    def _try(self, method, *args, **kwargs):
        try:
            method(*args, **kwargs)
        except OSError as error:
            logger.warning("No more curves for TensorBoard (%s); the run goes on", error.strerror or error)
            self.tb_writer = self._SummaryWriter = None


class ProgressLines(ProgressCallback):
    """The progress bar, with a line of words for each figure that is logged."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "eval_wer" in logs:
            text = f"validation WER {100 * logs['eval_wer']:.1f} %, loss {logs['eval_loss']:.3f}"
        elif "loss" in logs:
            text = f"loss {logs['loss']:.3f}, gradient norm {logs['grad_norm']:.2f}"
        else:
            return
        self.training_bar.write(f"step {state.global_step:5d}  {text}")
