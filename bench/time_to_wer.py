"""How long does it take from the launch to the same error rate on validation rows, beside the published way?

    python bench/time_to_wer.py                                  # the nano Whisper, whose window is 5 s
    python bench/time_to_wer.py --model outputs/wide_whisper     # ... with one of 30 s (bench/wide_whisper.yaml)

It learns the digits of another synthesiser. Both arms take the same rows,
the same number in each step, the same rates and the same number of steps, and evaluate equally often. The rate to reach
is the highest of the arms' final ones, in each round; the time to it is that of the first evaluation that is no worse.
Each arm is evaluated as its users would see it: the published way padded to the full window, ours as it is trained.
`quality.py` compares what both are worth to stock transformers.
"""

import argparse
from functools import partial
from pathlib import Path

from arms import BENCH, add_common_flags, alternate, ours, print_table, rival, summarise, write_record

REFERENCES = ("B1", "B2")
COLUMNS = [
    ("seconds_to_wer", "s to that WER", ".1f", 1, True),
    ("steps_to_wer", "steps", ".0f", 1, False),
    ("wer_to_reach", "WER", ".3f", 1, False),
    ("final_wer", "final WER", ".3f", 1, False),
    ("first_step_s", "first step, s", ".1f", 1, False),
    ("ended_s", "all steps, s", ".1f", 1, False),
]
SCHEDULE = {"learning_rate": 3e-4, "warmup_steps": 20, "lr_scheduler_type": "cosine"}


def figures(timing):
    """Returns the course of one run: [seconds since the launch, step, WER] of each evaluation."""
    course = [[e["ended"], e["step"], e["wer"]] for e in timing["evaluations"] if e["name"] == "eval" and e["step"]]
    first_step_s, ended_s = timing["steps"][0]["ended"], timing["train_ended"]
    return {"course": course, "final_wer": course[-1][2], "first_step_s": first_step_s, "ended_s": ended_s}


def run_ours(folder, seed, *, model, data, args):
    course = {
        "max_steps": args.steps,
        "eval_steps": args.eval_steps,
        "eval_strategy": "steps",
        "max_eval_samples": None,
    }
    bounds = {"generation_max_length": None, "normalizer": "basic"}
    return figures(ours(folder, model, data, seed=seed, **course, **bounds, **SCHEDULE))


def run_rival(arm, folder, seed, *, model, data, args):
    course = {"max_steps": args.steps, "eval_steps": args.eval_steps, "eval_split_name": "validation"}
    return figures(rival(arm, folder, model, data, "do_train", "do_eval", seed=seed, **course, **SCHEDULE))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser, "time_to_wer.json")
    parser.add_argument("--arms", nargs="*", choices=["ours", "B1", "B2"], default=["ours", "B1", "B2"])
    parser.add_argument("--model", type=Path, default=BENCH.parent / "assets/nano_whisper")
    parser.add_argument("--dataset_name", type=Path, default=BENCH.parent / "assets/flite_digits")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--eval_steps", type=int, default=10)
    args = parser.parse_args()

    args.work_dir.mkdir(parents=True, exist_ok=True)
    common = {"model": args.model, "data": args.dataset_name, "args": args}
    known = {"ours": run_ours, "B1": partial(run_rival, "B1"), "B2": partial(run_rival, "B2")}
    measurements = alternate({name: partial(known[name], **common) for name in args.arms}, args.rounds, args.work_dir)
    for runs in zip(*measurements.values()):
        wer_to_reach = max(run["final_wer"] for run in runs)
        for run in runs:
            reached = next(entry for entry in run["course"] if entry[2] <= wer_to_reach)
            run |= {"wer_to_reach": wer_to_reach, "seconds_to_wer": reached[0], "steps_to_wer": reached[1]}
    references = [name for name in REFERENCES if name in measurements]
    summary = summarise(measurements, [figure for figure, *_ in COLUMNS], references)
    print_table("launch to the same WER", summary, COLUMNS, references)
    write_record(args.output, args, summary=summary, measurements=measurements)


if __name__ == "__main__":
    main()
