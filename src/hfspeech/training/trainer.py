"""`SpeechTrainer`: what fine-tuning any speech model has in common: batches, resuming, measuring, records."""

import functools
import json
import logging
import math
import pickle
import shutil
import time
from pathlib import Path

import psutil
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list, gather, gather_object
from transformers import EarlyStoppingCallback, ProgressCallback, Seq2SeqTrainer, TrainerState
from transformers.integrations import TensorBoardCallback, unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    EvalLoopOutput,
    has_length,
    rotate_checkpoints,
    set_seed,
)

from hfspeech.batching import LengthBatchSampler
from hfspeech.data.fingerprint import other_rows
from hfspeech.errors import Interrupted, UserError
from hfspeech.hardware import can_train_in_bf16, keep_freed_memory, most_seconds_that_fit
from hfspeech.models.loading import base_of, identify, is_quantized
from hfspeech.runs import (
    PART_FOLDER,
    PREDICTIONS_FILE,
    PROGRESS_FILE,
    RUN_FILE,
    clear_half_written,
    finish_checkpoint,
    is_whole_checkpoint,
    last_checkpoint,
    peak_rss_bytes,
    read_json,
    read_jsonl,
    require_space,
    what_is_run,
    write_json,
    write_jsonl,
    writing,
)
from hfspeech.training import sharding
from hfspeech.training.callbacks import Curves, ProgressLines, StepCallback
from hfspeech.training.stopping import Stoppable, StopRequest, begin_worker

ADAM_BYTES_PER_PARAMETER = 8  # two fp32 moments
MOST_BATCH_SECONDS = 3600.0  # a larger step is no faster on any GPU, and makes too few of them

logger = logging.getLogger("hfspeech")


class SpeechTrainer(Seq2SeqTrainer):
    """Fine-tunes a speech model and measures it, before and after, on rows that it is never trained on.

    What differs from `Seq2SeqTrainer`:
    - the loss is the mean over all targets of one optimizer step, whatever the accumulation and the number of processes
      (transformers inflates it by both for Whisper and SpeechT5, transformers#47688);
    - training batches are of like length, evaluation runs from the longest row to the shortest and counts each row once
      under several processes;
    - `train_or_resume` goes on by itself, and Ctrl-C or SIGTERM saves a checkpoint first;
    - `measure` keeps what it found in `run.json` and `predictions.jsonl` as soon as it is known.

    `WhisperTrainer` and `SpeechT5Trainer` say what a batch costs, how it is scored, and what the loss is: `summed_loss`,
    `measure_batch`, `train_batch_sampler` and `eval_batch_sampler`.

    Args:
        model: the model, or a `PeftModel` of it.
        args: `SpeechTrainingArguments`.
        train_dataset, eval_dataset: as `load_speech` returns them.
        data_collator: the model's collator.
        compute_metrics: callable that takes a list of rows (dicts with `text`, what `measure_batch` found, and the
            dataset's columns) and returns a dict with at least `wer` and `cer`.
        processing_class: the model's processor.
    """

    logged = ("loss", "wer", "cer")  # of each evaluation, for TensorBoard and the progress lines
    targets_per_item = 1  # labels that make one target of the loss
    window_s = None  # seconds that the model hears at once
    may_be_sharded = True

    # compute_loss divides by the tokens of the whole optimizer step, so Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(self, model, args, train_dataset, eval_dataset, data_collator, compute_metrics, processing_class):
        if is_quantized(model) and not hasattr(model, "peft_config"):
            raise UserError(
                "Weights in 8 or 4 bits cannot be trained themselves: use the LoRA recipe, or leave it out."
            )
        sharding.require_support(model, args, self.may_be_sharded)
        if train_dataset is not None and not has_length(train_dataset) and args.max_steps <= 0:
            raise UserError("A streamed dataset has no length: say how long to train with --max_steps.")
        if args.resume_from_checkpoint and not is_whole_checkpoint(args.resume_from_checkpoint):
            raise UserError(
                f"--resume_from_checkpoint {args.resume_from_checkpoint} is not a whole checkpoint: leave the flag out to "
                "go on from the last whole one."
            )
        if train_dataset is not None and not has_length(train_dataset) and args.max_batch_seconds:
            raise UserError(
                "--max_batch_seconds needs rows whose lengths are known before they are read, and a stream's are "
                "not: give --per_device_train_batch_size instead."
            )
        if args.precision_is_open:
            is_faster, reason = can_train_in_bf16(base_of(model).config.hidden_size)
            args.bf16, args.mixed_precision = is_faster, "bf16" if is_faster else args.mixed_precision
            args.choices.append(reason)
        if args.device.type == "cpu":
            keep_freed_memory()
        if args.max_batch_seconds == "auto" and args.device.type == "cpu":
            raise UserError("--max_batch_seconds auto needs a GPU to fill: give a number of seconds, such as 80.")
        self.max_batch_seconds = None if args.max_batch_seconds == "auto" else args.max_batch_seconds
        self.stop_request = StopRequest()
        callbacks = [StepCallback(self)]
        if args.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        unset_hf_deepspeed_config()  # Trainer sets it once more
        if self.pop_callback(TensorBoardCallback):
            self.add_callback(Curves(args.output_dir))
        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressLines)
        self.model_accepts_loss_kwargs = True  # asks Trainer to count the step's tokens for compute_loss
        self.record_file = Path(args.output_dir) / RUN_FILE
        self.results = read_json(self.record_file) if self.record_file.exists() else {}
        self.predictions = {
            (row["set"], row["index"]): row for row in read_jsonl(Path(args.output_dir) / PREDICTIONS_FILE)
        }
        self._progress = {"seconds": 0.0, "audio_seconds": 0.0}
        self._evaluation_is_due, self._stops, self._place_of_checkpoints = False, False, None
        self._bad_audio, self._left_out = {}, {}
        self._evaluation_seconds = 0.0
        self._stage = "train"
        self._launched = psutil.Process().create_time()
        self._earlier_s = self.results.get("timings", {}).get("total", 0.0)  # of the launches before this one
        self._spent("load", self._launched)
        self._skeleton = None  # of a model whose weights are sharded
        for choice in args.choices:
            logger.info(choice)

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Returns the loss summed over this batch's targets, divided by those of the whole step.

        Under several processes `num_items_in_batch` counts the labels of all of them, and DDP averages the gradients,
        hence the factor `num_processes`.
        """
        loss = self.summed_loss(model, inputs)
        if num_items_in_batch is None:
            num_items_in_batch, scale = inputs["labels"].ne(-100).sum(), 1
        else:
            scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        # No targets at all: every row of the step was left out, and nothing is to be learnt from it.
        return loss / torch.as_tensor(num_items_in_batch).clamp(min=1) * self.targets_per_item * scale

    def summed_loss(self, model, inputs):
        """Returns the loss of a batch, summed over its targets."""
        raise NotImplementedError

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Returns the batches of a step, having stopped all processes together at a broken recording in one of them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._stop_at(next(filter(None, map(self._fault_of, batches)), None))
        for batch in batches:
            self._account(batch)
        return batches, num_items

    def _fault_of(self, batch):
        """Returns a sentence if a batch must end the run, else None."""
        if batch["bad_audio"] and self.data_collator.on_bad_audio == "error":
            return f"{batch['bad_audio'][0]}. Leave such rows out with --on_bad_audio skip."
        return next(iter(batch["fatal"]), None)

    def _stop_at(self, fault):
        """Ends all processes if one of them has found a fault; none is left waiting, and what is trained is saved."""
        if not self._most(fault is not None):
            return
        told = next(filter(None, gather_object([fault])))
        raise UserError(told + (self._save_what_is_trained() if self.is_in_train else ""), of_all=True)

    def _account(self, batch):
        """Adds up the audio trained on, and remembers broken recordings."""
        if self._stage == "train":
            self._progress["audio_seconds"] += sum(batch["duration_s"])
        for reason, row, detail in batch["left_out"]:
            self._left_out.setdefault(reason, {}).setdefault(row, detail)
        for sentence in batch["bad_audio"]:
            if sentence not in self._bad_audio.setdefault(self._stage, {}):
                logger.warning("left out: %s", sentence)
            self._bad_audio[self._stage][sentence] = True
        if batch.get("place"):
            reader, *self._places[reader] = batch["place"]

    # Batches

    def get_train_dataloader(self):
        if not has_length(self.train_dataset):
            return self._stream_dataloader()
        self.train_sampler = self.train_batch_sampler(self.train_dataset)
        return self._prepared_dataloader(self.train_dataset, self.train_sampler)

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._prepared_dataloader(dataset, self.eval_batch_sampler(dataset))

    def train_batch_sampler(self, dataset, **options):
        """Returns the `LengthBatchSampler` of a pass; `options` are those that depend on the model."""
        args = self.args
        stretch = math.prod(transform.stretch for transform in dataset.transforms)
        return LengthBatchSampler(
            [seconds * stretch for seconds in dataset.column("duration_s")],
            batch_size=None if self.max_batch_seconds else self._train_batch_size,
            max_batch_seconds=self.max_batch_seconds,
            batches_per_step=args.world_size * args.gradient_accumulation_steps,
            seed=args.seed if args.data_seed is None else args.data_seed,
            **options,
        )

    def eval_batch_sampler(self, dataset):
        """Returns the `LongestFirstSampler` of an evaluation."""
        raise NotImplementedError

    def begin_pass(self):
        """Is called when a pass over the training rows begins."""

    def _prepared_dataloader(self, dataset, batch_sampler):
        loader = self._dataloader(dataset, self.args.dataloader_num_workers, batch_sampler=batch_sampler)
        return self.accelerator.prepare(loader)

    def _stream_dataloader(self):
        """Returns the loader of this process's share of a stream, from the place that the checkpoint remembers."""
        args = self.args
        num_readers = args.world_size * max(1, args.dataloader_num_workers)
        self._stream = self._progress.get("stream", {"num_readers": num_readers, "num_batches": 0, "places": []})
        num_workers, left = divmod(self._stream["num_readers"], args.world_size)
        if left:
            raise UserError(
                f"The stream of this run is shared out to {self._stream['num_readers']} readers, the dataloader workers of "
                "all processes: go on with a number of processes that divides that."
            )
        if self._stream["num_readers"] == num_readers:
            num_workers = args.dataloader_num_workers
        else:
            args.choices.append(f"{num_workers} dataloader workers for training: the stream is shared out like that")
            logger.info(args.choices[-1])
        self.train_dataset.begin(args.process_index, args.world_size, **self._stream)
        self._places = dict(self.train_dataset.places)
        args.ignore_data_skip = True  # the stream goes on by itself, without decoding what was read before
        # A generator of its own, or the beginning of a loader would move on the random numbers of a resumed run.
        options = {"batch_size": self._train_batch_size, "generator": torch.Generator()}
        loader = self._dataloader(self.train_dataset, num_workers, **options)
        # accelerate would share the rows out once more.
        return prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def _dataloader(self, dataset, num_workers, **options):
        args = self.args
        return torch.utils.data.DataLoader(
            dataset,
            **options,
            collate_fn=self.data_collator,
            num_workers=num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor if num_workers else None,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=functools.partial(begin_worker, num_workers=num_workers, rank=args.process_index),
        )

    # Evaluation

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Measures each batch, and scores each row once."""
        started, self._stage = time.monotonic(), metric_key_prefix
        try:
            # Training goes on with the same random numbers, whether a launch has come by this evaluation or not.
            with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
                score, rows = self._score(dataloader)
        finally:
            self._stage = "train"
        self._evaluation_seconds += time.monotonic() - started
        self.last_evaluation = score, rows
        metrics = {f"{metric_key_prefix}_{name}": score[name] for name in self.logged if score.get(name) is not None}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(rows))

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        """Evaluates while training; at the start of a launch, what an earlier one had to leave out when it was stopped."""
        is_late = skip_scheduler and self.state.global_step > 0
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not is_late)
        if is_late:
            self._determine_best_metric(metrics, trial)
        self._evaluation_is_due = False
        return metrics

    def _score(self, dataloader):
        """Returns the score of a dataloader's rows, with their loss, and the rows with what was found of each."""
        model = self.whole_model()
        self.callback_handler.eval_dataloader = dataloader  # for the length of the progress bar
        found, fault = [], None
        for batch in dataloader:
            fault = self._fault_of(batch)
            if fault or self.stop_request.received:
                break
            self._account(batch)
            if not batch["index"]:  # no good row; training has to take its step even so
                continue
            with torch.no_grad(), self.accelerator.autocast():
                found += zip(batch["index"], *self.measure_batch(model, batch))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self._stop_at(fault)
        if self._stop_is_asked():
            raise KeyboardInterrupt
        # The index keeps one of each row, should two processes have had it.
        by_index = {index: rest for index, *rest in gather_object(found)}
        rows = [{**dataloader.dataset.record(index), **row} for index, (row, _, _) in sorted(by_index.items())]
        if not rows:
            raise UserError("Nothing is left to evaluate: every row of the split is unreadable.", of_all=True)
        num_targets = sum(count for *_, count in by_index.values())
        losses = [loss for _, loss, _ in by_index.values()]
        score = {name: sum(loss[name] for loss in losses) / num_targets for name in losses[0]}
        score["unfinished"] = sum(row["is_unfinished"] for row in rows)
        return {**score, **self.compute_metrics(rows)}, rows

    def whole_model(self):
        """Returns the model in eval mode, with all of its weights, as a process may call it by itself.

        Of a sharded model that is a copy, which takes memory as long as it is held, and all processes have to ask.
        """
        if self._skeleton is not None:
            return sharding.filled(self._skeleton, self.model).eval()
        model = self.accelerator.unwrap_model(self.model).eval()
        # Trainer leaves a model that FSDP or DeepSpeed is to take over where it was loaded.
        return model if is_quantized(model) else model.to(self.args.device)

    def measure_batch(self, model, batch):
        """Measures a batch whose rows are all good.

        Args:
            model: the model, in eval mode.
            batch: what the collator made.

        Returns:
            Three lists with an entry for each row: a dict of what `compute_metrics` needs, with `is_unfinished`; a dict
            of losses summed over the row's targets, `loss` among them; and the number of its targets.
        """
        raise NotImplementedError

    def measure(self, when, speech):
        """Scores the test rows, and those of the old condition, `before` or `after` training.

        What is found goes into `run.json` and `predictions.jsonl` at once. A resumed run keeps its first `before`; with
        `eval_on_start` off there is none.

        Args:
            when: `before` or `after`.
            speech: what `load_speech` returned.
        """
        self._require_same_data(speech)
        started = time.time()
        if when == "before":
            self.write_record(speech)  # what the run is made of, should it not come to its first result
            if not self.args.eval_on_start:
                return
        for split in ("test", "retention"):
            place = self.results if split == "test" else self.results.setdefault("retention", {})
            if split not in speech or (when == "before" and when in place):
                continue
            logger.info("Measuring %s rows %s training", split, when)
            with self._stoppable():
                self.evaluate(speech[split], metric_key_prefix=f"{when}_{split}")
                place[when], rows = self.last_evaluation
                self.measure_further(when, split, speech[split], place[when])
            for row in rows:
                known = speech[split].record(row["index"])
                entry = self.predictions.setdefault((split, row["index"]), {"set": split})
                entry |= {name: value for name, value in known.items() if value is not None}
                entry[when] = row["prediction"]
                told = {*known, "prediction", "is_unfinished"}
                entry |= {f"{when}_{name}": value for name, value in row.items() if name not in told}
            started = self._spent(when, started)
            self.write_record(speech)

    def measure_further(self, when, split, dataset, score):
        """Adds to `score` what else is to be known of a set of rows."""

    def save_beside(self, folder):
        """Writes into the model's folder what belongs to it besides weights and processor."""

    def _require_same_data(self, speech):
        """Refuses to go on with a run whose data is no longer what it began with."""
        earlier, account = self.results.get("rows"), json.loads(json.dumps(speech.account))
        if not earlier:
            return
        now = {split: len(rows) if has_length(rows) else None for split, rows in speech.items()}
        counts = [split for split, count in now.items() if earlier.get(split, count) != count]
        others = other_rows(earlier["account"], account)
        were, are = (
            [{**dataset, "license": None} for dataset in one["datasets"]] for one in (earlier["account"], account)
        )  # the license may not be known offline
        if counts or others or were != are:
            what = "another commit"
            if counts:
                what = f"{counts[0]} had {earlier[counts[0]]} rows, now {now[counts[0]]}"
            elif others:
                what = f"other rows in {others[0]}"
            raise UserError(
                f"The data of {self.args.output_dir} has changed since that run began ({what}): choose another "
                "--output_dir."
            )

    def write_record(self, speech):
        """Writes everything known so far to `run.json` and `predictions.jsonl`, whole or not at all."""
        bad_audio, left_out = self._gather_faults()
        account = json.loads(json.dumps(speech.account))
        for reason, rows in left_out.items():  # of a stream, whose rows are looked at as they come
            row, detail = next(iter(rows.items()))
            example = {"count": len(rows), "example": f"{row}: {detail}" if detail else row}
            account["splits"].setdefault("train", {"rows": None, "dropped": {}})["dropped"][reason] = example
        self.results["rows"] = {
            **{split: len(rows) if has_length(rows) else None for split, rows in speech.items()},
            "account": account,
            "bad_audio": self.results.get("rows", {}).get("bad_audio", {})  # of what an earlier launch measured
            | {stage: {"count": len(s), "examples": list(s)[:3]} for stage, s in bad_audio.items()},
        }
        self.results["choices"] = self.args.choices
        if self.args.process_index == 0:
            self.results |= self._identities
        self.results |= what_is_run(self.args)
        if self.args.process_index == 0:  # the record comes last: what it says is measured is not measured again
            write_jsonl(self.record_file.with_name(PREDICTIONS_FILE), self.predictions.values())
        self._write_record()

    def finish_record(self):
        """Says in `run.json` that nothing is left to do."""
        self.results["state"] = "finished"
        self._write_record()

    def _gather_faults(self):
        """Returns the rows that were unreadable, and those left out, as all processes together have met them."""
        bad_audio, left_out = {}, {}
        for found_bad, found_left_out in gather_object([(self._bad_audio, self._left_out)]):
            for target, found in ((bad_audio, found_bad), (left_out, found_left_out)):
                for name, entries in found.items():
                    target.setdefault(name, {}).update(entries)
        return bad_audio, left_out

    @functools.cached_property
    def _identities(self):
        settings = self.args.run_arguments
        name = settings.get("model_name_or_path") or settings.get("config_name")
        model = identify(name, settings.get("model_revision"), base_of(self.model).hub_commit)
        # What its card states, and the seconds that it hears at once.
        model |= {"license": base_of(self.model).license, "window_s": self.window_s}
        return {"model": model, "models": self.other_models()}

    def other_models(self):
        """Returns role → what `identify` says, of each model that takes part besides the trained one."""
        return {}

    def _spent(self, on, since):
        """Adds the seconds since a time to those that the launches of this run spent on something; returns now."""
        timings, now = self.results.setdefault("timings", {}), time.time()
        timings[on] = timings.get(on, 0.0) + now - since
        return now

    def _write_record(self):
        if self.args.process_index == 0:
            chosen = {"bf16": self.args.bf16, "fp16": self.args.fp16}
            if self.args.max_batch_seconds == "auto" and self.max_batch_seconds:
                chosen["max_batch_seconds"] = self.max_batch_seconds
            self.results["chosen"] = chosen  # where the arguments left it to the machine
            self.results["timings"]["total"] = self._earlier_s + time.time() - self._launched
            write_json(self.record_file, self.results)

    # Training

    def train_or_resume(self):
        """Trains to the end, from the last whole checkpoint of this run if there is one.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; a checkpoint is saved and the sentence says how to go on.
            UserError: the disk is full, the GPU is too small, or the loss is no longer a number.
        """
        last = [last_checkpoint(self.args.output_dir) if self.args.process_index == 0 else None]
        if self.args.process_index == 0:
            clear_half_written(self.args.output_dir, *last)
        broadcast_object_list(last)
        checkpoint = self.args.resume_from_checkpoint or last[0]
        if self._most(checkpoint is not None and not Path(checkpoint).is_dir()):
            raise UserError(
                f"Not every machine sees {checkpoint}: choose an --output_dir on a disk that all of them share.",
                of_all=True,
            )
        if checkpoint:
            sharding.require_same_layout(checkpoint, self.args)
            self._progress = read_json(Path(checkpoint) / PROGRESS_FILE)
            self._bad_audio, self._left_out = self._progress["bad_audio"], self._progress["left_out"]
            self._earlier_s = max(self._earlier_s, self._progress.get("total_seconds", 0.0))  # it may have been killed
            if self._load_finished(checkpoint):
                return
            # Each process goes on with its share, so that the sum over the processes is right again.
            self._progress["audio_seconds"] /= self.args.world_size
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        state = sum(p.numel() for p in self.model.parameters() if p.requires_grad) * ADAM_BYTES_PER_PARAMETER
        require_space(self.args.output_dir, (weights + state) * ((self.args.save_total_limit or 2) + 1))
        if checkpoint:
            logger.info("Going on from %s", checkpoint)
            self.max_batch_seconds = self._progress.get("max_batch_seconds")
            self.args.eval_on_start = self._evaluation_is_due = self._progress["evaluation_is_due"]
        self.choose_max_batch_seconds()
        set_seed(self.args.seed)  # a launch that finds the model measured has drawn fewer random numbers so far
        self._started, self._evaluation_seconds = time.monotonic(), 0.0
        self._skeleton = sharding.skeleton_of(self.model) if sharding.is_sharded(self.args) else None
        with self._stoppable(), writing(self.args.output_dir):
            try:
                self.train(resume_from_checkpoint=checkpoint)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"The GPU ran out of memory at step {self.state.global_step}: halve --per_device_train_batch_size "
                    "and double --gradient_accumulation_steps."
                ) from None
            except pickle.UnpicklingError:  # optimizer, schedule and random states are read as numbers alone
                raise UserError(
                    f"{checkpoint} holds something else than numbers, or is damaged: delete that folder to go on from "
                    "the checkpoint before it."
                ) from None
        if self._stops:
            raise Interrupted(
                f"Stopped at step {self.state.global_step} of {self.state.max_steps}; checkpoint-{self.state.global_step} "
                f"is saved in {self.args.output_dir}. Run the same command again to go on.",
                self.stop_request.received,
                of_all=True,
            )
        self._record_training(self._progress_now())

    def choose_max_batch_seconds(self):
        """Finds how many seconds of padded audio fit on every process's GPU in one training step, if that is asked.

        Raises:
            UserError: there is no room for a single row.
        """
        if self.args.max_batch_seconds != "auto":
            self.max_batch_seconds = self.args.max_batch_seconds
            return
        self.max_batch_seconds = self.max_batch_seconds or self._find_max_batch_seconds()
        self.args.choices.append(f"batches of {self.max_batch_seconds:.0f} s: the most that fits on the GPU")
        logger.info(self.args.choices[-1])

    def _find_max_batch_seconds(self):
        durations_s = self.train_dataset.column("duration_s")
        by_length = sorted(range(len(durations_s)), key=lambda i: durations_s[i])
        # For the same seconds, long rows have most positions to attend to and short ones most text.
        longest, median = by_length[-1], by_length[len(by_length) // 2]
        rows = [self.train_dataset[key] for key in self.keys_to_try(longest, median)]
        batches = [batch for batch in (self.data_collator([row]) for row in rows) if batch["index"]]
        if not batches:
            raise UserError(f"{rows[0]['bad_audio']}. Give --max_batch_seconds a number of seconds instead.")

        def seconds_of(batch):
            return batch.get("padded_s") or batch["duration_s"][0]

        first = max(seconds_of(batch) for batch in batches)
        found = most_seconds_that_fit(
            lambda seconds: [self._try_step(batch, int(seconds // seconds_of(batch))) for batch in batches],
            first,
            MOST_BATCH_SECONDS,
        )
        if self.args.world_size > 1:
            found = gather(torch.tensor([found or 0.0], device=self.args.device)).min().item()
        if not found:
            raise UserError(
                "The GPU has no room for a single row: lower --max_duration_in_seconds, or take a smaller model or LoRA."
            )
        return found

    def keys_to_try(self, longest, median):
        """Returns the keys by which the training dataset gives these two rows as long as a batch may have them."""
        return [longest, median]

    def _try_step(self, batch, num_rows):
        """Runs one batch, its row repeated, forth and back, with room taken for the optimizer; changes nothing."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer_bytes = ADAM_BYTES_PER_PARAMETER * sum(p.numel() for p in trained)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}  # of a batch normalisation
        reserved = torch.empty(optimizer_bytes, dtype=torch.uint8, device=self.args.device)
        inputs = {
            name: value.to(self.args.device).repeat(num_rows, *[1] * (value.dim() - 1))
            for name, value in batch.items()
            if torch.is_tensor(value)
        }
        try:
            with torch.random.fork_rng(), self.accelerator.autocast():
                self.model.train()(**inputs).loss.backward()
        finally:
            self.model.zero_grad(set_to_none=True)
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
            del reserved

    def _record_training(self, progress):
        """Puts what training took into the results, at once, so that nothing that follows can lose it."""
        self.results["train"] = {
            "steps": self.state.global_step,
            "best_step": self.state.best_global_step or self.state.global_step,
            "seconds": progress["seconds"],
            "audio_seconds": progress["audio_seconds"],
            "audio_seconds_per_second": progress["audio_seconds"] / max(progress["seconds"], 1e-9),
            "peak_rss_bytes": peak_rss_bytes(),
            "log": [entry for entry in self.state.log_history if "loss" in entry or "eval_loss" in entry],
        }
        self.results["timings"] |= {"train": progress["seconds"], "evaluations": progress.get("evaluation_seconds")}
        self._write_record()

    def _stop_is_asked(self):
        """Tells whether a signal has come; under several processes it may have reached them at different steps."""
        self.stop_request.note(self._most(self.stop_request.received))
        return self.stop_request.received > 0

    def _most(self, number):
        """Returns the largest of the numbers that the processes have; all have to ask."""
        if self.args.world_size == 1:
            return number
        return gather(torch.tensor([int(number)], device=self.args.device)).max().item()

    def _progress_now(self):
        """Returns the seconds spent so far (training, evaluating meanwhile, in all) and the audio seen by all processes."""
        audio = torch.tensor(self._progress["audio_seconds"], dtype=torch.float64, device=self.args.device)
        return {
            "seconds": self._progress["seconds"] + time.monotonic() - self._started - self._evaluation_seconds,
            "evaluation_seconds": self._progress.get("evaluation_seconds", 0.0) + self._evaluation_seconds,
            "total_seconds": self._earlier_s + time.time() - self._launched,
            "audio_seconds": self.accelerator.reduce(audio, "sum").item(),
            "max_batch_seconds": self.max_batch_seconds,
        }

    def _load_finished(self, checkpoint):
        """Loads the weights that a finished run ended with and returns True, or returns False if it is not finished."""
        if "train" not in self.results and not self._progress["is_over"]:
            return False
        self.state = state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if "train" not in self.results and self._progress["evaluation_is_due"]:
            self._load_from_checkpoint(checkpoint)
            with self._stoppable():
                self.is_in_train = True
                self._evaluate(None, None, skip_scheduler=True)
                self.is_in_train = False
            if state.best_global_step == state.global_step:
                state.best_model_checkpoint = checkpoint
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        folder = Path(self.args.output_dir) / Path(best or checkpoint).name
        logger.info("This run is finished: nothing is trained any more, its weights are those of %s", folder)
        self._load_from_checkpoint(str(folder if is_whole_checkpoint(folder) else checkpoint))
        if "train" not in self.results:  # it was killed right after its last step
            self._record_training(self._progress)
        return True

    def _load_rng_state(self, checkpoint):
        """Goes on with the random numbers of a checkpoint; a process that it knows nothing of begins its own."""
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if checkpoint is None or (Path(checkpoint) / name).exists():
            super()._load_rng_state(checkpoint)
        else:
            set_seed(hash((self.args.seed, self.state.global_step, self.args.process_index)) % 2**32)

    def _save_what_is_trained(self):
        """Saves a checkpoint of the last whole step if there is none, and returns the sentence that says so.

        All processes have to take part.
        """
        if not self.state.global_step:
            return ""
        self._save_checkpoint(self.model, None)
        return f" The {self.state.global_step} steps trained so far are saved: the same command goes on from there."

    def save_model(self, output_dir=None, _internal_call=False):
        """Saves the model for stock tools; FSDP's checkpoints, which Trainer asks for, hold it in shards alone."""
        if not sharding.is_sharded(self.args) or (_internal_call and self.is_fsdp_enabled):
            return super().save_model(output_dir, _internal_call)
        sharded, self.model = self.model, self.whole_model()
        try:
            self._save(output_dir)
        finally:
            self.model = sharded

    def _get_output_dir(self, trial):
        return self._place_of_checkpoints or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """Writes a checkpoint aside, and gives it its name when every process has written its part of it.

        Only then are older ones deleted: by their numbers, where Trainer trusts the clock.
        """
        output_dir = Path(self.args.output_dir)
        aside = output_dir / PART_FOLDER
        folder, part = (place / f"checkpoint-{self.state.global_step}" for place in (output_dir, aside))
        if self._most(self.args.should_save and is_whole_checkpoint(folder)):
            return
        bad_audio, left_out = self._gather_faults()
        progress = self._progress_now() | {
            "unlogged_loss": self.accelerator.reduce(self._tr_loss, "mean").item(),
            "unlogged_steps": self.state.global_step - self._globalstep_last_logged,
            "evaluation_is_due": self._evaluation_is_due,
            "is_over": self.state.global_step >= self.state.max_steps
            or (self.control.should_training_stop and not self._stops),
            "bad_audio": bad_audio,
            "left_out": left_out,
        }
        if not has_length(self.train_dataset):
            progress["stream"] = {**self._stream, "places": gather_object(self._stream["places"])}
        self._place_of_checkpoints = str(aside)
        try:
            with writing(output_dir):
                if self.args.should_save:
                    part.mkdir(parents=True, exist_ok=True)
                    write_json(part / PROGRESS_FILE, progress)
                super()._save_checkpoint(model, trial)
                best = output_dir / f"checkpoint-{self.state.best_global_step}"
                if best == folder or best.exists():
                    self.state.best_model_checkpoint = str(best)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.state.save_to_json(part / TRAINER_STATE_NAME)  # Trainer saw the best checkpoint aside
                    finish_checkpoint(part, folder)
                    limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
                    rotate_checkpoints(str(output_dir), limit, best, use_mtime=False)
                self.accelerator.wait_for_everyone()
        finally:
            self._place_of_checkpoints = None
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)

    # Trainer would push in mid-training, and its failures are silent; `publish` pushes once, at the end.

    def init_hf_repo(self, token=None, private=None):
        pass

    def push_to_hub(self, *args, **kwargs):
        pass

    def _push_from_checkpoint(self, checkpoint_folder):
        pass

    def _stoppable(self):
        return Stoppable(self)
