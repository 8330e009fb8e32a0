"""Runs any training script unmodified and notes when its trainer did what, and what memory and disk that took.

    python bench/timed.py TIMING.json SCRIPT [ARGUMENT ...]

The same clock for every arm: a callback and a look at each batch, both put into transformers' `Trainer` before the script
starts. Times count from the launch, `HFSPEECH_BENCH_STARTED` (`time.time()` of the launcher). Disk is what lies in the
folder `HFSPEECH_BENCH_WRITTEN`, into which the launcher points caches, temporary files and output.
`HFSPEECH_BENCH_OFF` names an entry of `levers.PATCHES` to apply. Linux only.

TIMING.json then holds (seconds since the launch, bytes):
    steps: list with, for each optimizer step, `began`, `ended`, `since_last` (seconds from the end of the step before, or
        from the end of an evaluation between the two, or from the beginning of training: with the wait for the batch) and,
        for each of its batches, `rows`, `encoded_rows`, `frames` (both of the mel features; 0 where there are none), `labels`
        (length with padding) and `targets` (label tokens without padding).
    train_began, train_ended, ended: of training, and of the script.
    evaluations: list of `ended`, `step`, the trainer's own `seconds` and its `wer`, with the `name` of the metrics.
    disk_before_first_step_bytes, disk_bytes: before the first step, and when the script has ended.
    peak_rss_bytes: the most that the process held resident, before it trained (`preparing`), from its first step to its
        last (`training`), in evaluations (`evaluating`) and in all (`all`), and the most that its children had to themselves at the end of a step, the
        pages that they share with it left out (`children`).
    peak_gpu_bytes: the most that torch held on the GPU; null without one.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path

import psutil
import torch
import transformers
from transformers.trainer import DEFAULT_CALLBACKS

STARTED = float(os.environ["HFSPEECH_BENCH_STARTED"])
WRITTEN = Path(os.environ["HFSPEECH_BENCH_WRITTEN"])
PATCH = os.environ.get("HFSPEECH_BENCH_OFF")
timing = {"steps": [], "evaluations": [], "peak_rss_bytes": {}}


def now():
    """Returns the seconds since the launch, once the GPU has done all that it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.time() - STARTED


def bytes_written():
    return sum(path.stat().st_size for path in WRITTEN.rglob("*") if path.is_file() and not path.is_symlink())


def take_peak_rss():
    """Returns the most memory that this process has held resident since the last call, in bytes."""
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    Path("/proc/self/clear_refs").write_text("5")  # the kernel counts the peak anew from here
    return peak


def private_bytes(child):
    """Returns the memory that a child process shares with no other; 0 if it has just ended."""
    try:
        return child.memory_full_info().uss
    except psutil.Error:
        return 0


class Clock(transformers.TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        timing["train_began"] = timing["last"] = now()

    def on_step_begin(self, args, state, control, **kwargs):
        if not timing["steps"]:
            timing["disk_before_first_step_bytes"] = bytes_written()
            timing["peak_rss_bytes"]["preparing"] = take_peak_rss()
        timing["steps"].append({"began": now(), "batches": []})

    def on_step_end(self, args, state, control, **kwargs):
        ended, step = now(), timing["steps"][-1]
        step |= {"ended": ended, "since_last": ended - timing["last"]}
        children = sum(private_bytes(child) for child in psutil.Process().children(recursive=True))
        peaks = timing["peak_rss_bytes"]
        peaks["training"] = max(take_peak_rss(), peaks.get("training", 0))
        peaks["children"] = max(children, peaks.get("children", 0))
        timing["last"] = now()  # looking at the memory is not part of the next step

    def on_train_end(self, args, state, control, **kwargs):
        timing["train_ended"] = now()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        timing["last"], peak = now(), take_peak_rss()
        timing["peak_rss_bytes"]["evaluating"] = max(peak, timing["peak_rss_bytes"].get("evaluating", 0))
        for key, seconds in metrics.items():
            if key.endswith("_runtime"):
                name = key.removesuffix("_runtime")
                timing["evaluations"].append(
                    {
                        "ended": timing["last"],
                        "step": state.global_step,
                        "name": name,
                        "seconds": seconds,
                        "wer": metrics.get(f"{name}_wer"),
                    }
                )


def noted(training_step):
    """Returns the trainer's `training_step`, which also notes the shape of each batch of an optimizer step."""

    def step(trainer, model, inputs, *args, **kwargs):
        if timing["steps"] and "ended" not in timing["steps"][-1]:
            labels, features = inputs["labels"], inputs.get("input_features")
            batch = {"rows": len(labels), "labels": labels.shape[1], "targets": labels.ne(-100).sum()}
            batch |= {"encoded_rows": 0, "frames": 0}
            if features is not None:
                batch |= {"encoded_rows": len(features), "frames": features.shape[-1]}
            timing["steps"][-1]["batches"].append(batch)
        return training_step(trainer, model, inputs, *args, **kwargs)

    return step


def main():
    timing_file, script = sys.argv[1:3]
    if PATCH:
        import levers

        levers.PATCHES[PATCH]()
    DEFAULT_CALLBACKS.append(Clock)
    transformers.Trainer.training_step = noted(transformers.Trainer.training_step)
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
    timing.pop("last", None)
    for step in timing["steps"]:
        for batch in step["batches"]:
            batch["targets"] = int(batch["targets"])
    timing["ended"], timing["disk_bytes"] = now(), bytes_written()
    peaks = timing["peak_rss_bytes"]
    peaks["all"] = max(take_peak_rss(), *(bytes for name, bytes in peaks.items() if name != "children"), 0)
    timing["peak_gpu_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    Path(timing_file).write_text(json.dumps(timing, indent=1) + "\n")


if __name__ == "__main__":
    main()
