"""How long does it take from the launch to the first optimizer step, and what lies on the disk by then?

    python bench/first_step.py

Ours on 2,000 and on 20,000 utterances of 5 s, loaded and streamed, and the published way on 2,000. No arm evaluates
anything before the first step. `--rival_rows 2000 20000` has the published way prepare the large corpus, too: that takes
20 GB of disk and about ten times as long as the small one. `imports alone` starts Python, imports the packages that every
arm needs, and ends: no launch can be shorter.
"""

import argparse
import subprocess
import sys
import time
from functools import partial

from arms import add_common_flags, alternate, ours, print_table, rival, summarise, write_record
from material import make_model, make_speech

PACKAGES = (
    "accelerate, datasets, peft, torch, transformers.models.whisper.modeling_whisper, transformers.trainer_seq2seq"
)
COLUMNS = [
    ("first_step_s", "first step, s", ".1f", 1, True),
    ("ready_s", "its batch, s", ".1f", 1, False),
    ("disk_bytes", "disk MB", ".2f", 2**-20, False),
    ("peak_rss_bytes", "peak MB", ".0f", 2**-20, False),
]


def figures(timing):
    step = timing["steps"][0]
    return {
        "first_step_s": step["ended"],
        "ready_s": step["began"],  # the batch is there, the step begins
        "train_began_s": timing["train_began"],
        "disk_bytes": timing["disk_before_first_step_bytes"],
        "peak_rss_bytes": timing["peak_rss_bytes"]["all"],
    }


def run_imports(folder, seed):
    began = time.time()
    subprocess.run([sys.executable, "-c", f"import {PACKAGES}"], check=True)
    return {"first_step_s": time.time() - began, "disk_bytes": 0}


def run_ours(folder, seed, *, model, data, streaming):
    return figures(ours(folder, model, data, seed=seed, max_steps=1, streaming=streaming))


def run_rival(arm, folder, seed, *, model, data):
    return figures(rival(arm, folder, model, data, "do_train", seed=seed, max_steps=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser, "first_step.json")
    parser.add_argument("--duration_s", type=float, default=5)
    parser.add_argument("--rows", nargs="*", type=int, default=[2000, 20000])
    parser.add_argument("--rivals", nargs="*", choices=["B1", "B2"], default=["B1"])
    parser.add_argument("--rival_rows", nargs="*", type=int, default=[2000])
    args = parser.parse_args()

    args.work_dir.mkdir(parents=True, exist_ok=True)
    model = make_model(args.work_dir / args.shape, args.shape)
    arms = {"imports alone": run_imports}
    for rows in sorted({*args.rows, *args.rival_rows}):
        data = make_speech(args.work_dir / f"speech_{args.duration_s:g}s_{rows}", args.duration_s, rows)
        if rows in args.rows:
            arms[f"ours {rows}"] = partial(run_ours, model=model, data=data, streaming=False)
            arms[f"ours, streaming {rows}"] = partial(run_ours, model=model, data=data, streaming=True)
        if rows in args.rival_rows:
            arms |= {f"{arm} {rows}": partial(run_rival, arm, model=model, data=data) for arm in args.rivals}
    measurements = alternate(arms, args.rounds, args.work_dir)
    references = [name for name in arms if not name.startswith(("ours, ", "imports"))]
    summary = summarise(measurements, [figure for figure, *_ in COLUMNS], references)
    print_table(f"launch to first step, {args.shape}, {args.duration_s:g} s", summary, COLUMNS, references)
    write_record(args.output, args, summary=summary, measurements=measurements)


if __name__ == "__main__":
    main()
