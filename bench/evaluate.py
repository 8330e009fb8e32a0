"""How fast does evaluation go, beside the published way?

    python bench/evaluate.py

Ours is the evaluation of a training run, after its first step: loss and text of every row, unpadded as the model is trained.
Theirs is `Seq2SeqTrainer.evaluate` with `predict_with_generate`. All arms use the model of random weights, which never
ends a text (see `material.make_model`), so that each writes exactly `--tokens` tokens for each row: about as many as a
model that has learnt its task writes for such a row. `rows_per_s` counts what the trainer itself says an evaluation took.
There the published way has its features ready and ours makes them; what making them took is in `rows_per_s_wall`, which
counts from the launch to the end of the evaluation (of ours with its one training step).
"""

import argparse
from functools import partial

from arms import add_common_flags, alternate, ours, print_table, rival, summarise, write_record
from material import make_model, make_speech

REFERENCES = ("B1", "B2")
COLUMNS = [
    ("rows_per_s", "rows/s", ".2f", 1, True),
    ("audio_s_per_s", "audio s/s", ".1f", 1, False),
    ("rows_per_s_wall", "wall rows/s", ".2f", 1, True),
    ("peak_rss_bytes", "peak MB", ".0f", 2**-20, False),
]


def figures(timing, num_rows, duration_s):
    evaluation = timing["evaluations"][0]
    return {
        "rows_per_s": num_rows / evaluation["seconds"],
        "audio_s_per_s": duration_s * num_rows / evaluation["seconds"],
        "rows_per_s_wall": num_rows / evaluation["ended"],
        "evaluation_s": evaluation["seconds"],
        "name": evaluation["name"],
        "peak_rss_bytes": timing["peak_rss_bytes"]["evaluating"],
        "peak_gpu_bytes": timing["peak_gpu_bytes"],
    }


def run_ours(folder, seed, *, model, data, args, **settings):
    timing = ours(
        folder,
        model,
        data,
        seed=seed,
        max_steps=1,
        max_train_samples=16,
        max_eval_samples=args.rows,
        eval_strategy="steps",
        eval_steps=1,
        generation_max_length=args.tokens,
        **settings,
    )
    return figures(timing, args.rows, args.duration_s)


def run_rival(arm, folder, seed, *, model, data, args):
    limits = {"limit_eval": args.rows, "eval_split_name": "validation", "generation_max_length": args.tokens}
    return figures(rival(arm, folder, model, data, "do_eval", seed=seed, **limits), args.rows, args.duration_s)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser, "evaluate.json")
    choices = ["ours", "ours_padded", "B1", "B2"]
    parser.add_argument("--arms", nargs="*", choices=choices, default=["ours", "B1", "B2"])
    parser.add_argument("--duration_s", type=float, default=5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24, help="of each text, the four of the prompt among them")
    args = parser.parse_args()

    args.work_dir.mkdir(parents=True, exist_ok=True)
    model = make_model(args.work_dir / args.shape, args.shape)
    place = args.work_dir / f"speech_{args.duration_s:g}s_evaluation_{args.rows}"
    data = make_speech(place, args.duration_s, 16, args.rows, 1)
    known = {
        "ours": run_ours,
        "ours_padded": partial(run_ours, encoder_window="full"),
        "B1": partial(run_rival, "B1"),
        "B2": partial(run_rival, "B2"),
    }
    arms = {name: partial(known[name], model=model, data=data, args=args) for name in args.arms}
    measurements = alternate(arms, args.rounds, args.work_dir)
    summary = summarise(measurements, [figure for figure, *_ in COLUMNS], REFERENCES)
    references = [name for name in REFERENCES if name in arms]
    title = f"evaluation, {args.shape}, {args.rows} rows of {args.duration_s:g} s, {args.tokens} tokens each"
    print_table(title, summary, COLUMNS, references)
    write_record(args.output, args, summary=summary, measurements=measurements)


if __name__ == "__main__":
    main()
