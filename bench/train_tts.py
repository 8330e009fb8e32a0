"""How fast does SpeechT5's training go, beside the way of the published course?

    python bench/train_tts.py                                     # ours, B1 and B2, in microsoft/speecht5_tts's shape
    python bench/train_tts.py --arms ours B2_by_length            # a rival that groups its rows by length, too
    python bench/train_tts.py --arms ours ours_small_batches      # the same 32 rows a step, as 8 batches of 4
    python bench/train_tts.py --shape tiny --rounds 1             # a small model, to see whether it runs

The same shape of model, the same random speaker embeddings in a column, 32 rows in each optimizer step (of B1 and
`ours_small_batches`: 8 batches of 4), drawn from one corpus of utterances of 2 to 8 seconds with 15 characters of text a
second, arms in turn, each round with a seed of its own. Every arm is given the whole corpus, for a step whose rows are of
like length needs more rows than its own to choose from: disk and wall time have the preparation of all of it.

Audio is what the loss was computed on: the frames that are no padding, 16 ms each. hfspeech cuts the silence at both ends of
a recording, and what it cuts does not count. `audio_s_per_s` leaves out the first step of a run; `..._all_steps` counts
every step, and `..._wall` everything from the launch to the last step's end, so it compares arms of equal step counts only.
`padding` is the share of the frames in the batches that are none.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

from arms import add_common_flags, alternate, ours, print_table, rival, summarise, write_record
from material import ASSETS, SPEECHT5_SHAPES, make_speecht5, make_text_and_speech

ROWS_PER_STEP = 32
NUM_MEL_BINS, FRAME_S = 80, 0.016
SMALL_BATCH = 4
RIVALS = ("B1", "B2", "B2_by_length")
# What differs from `arms.SAME_WORK`; None leaves a setting to the recipe.
SPEECHT5 = {
    "recipe": "speecht5_full",
    "language": "en",
    "encoder_window": None,  # Whisper's
    "generation_max_length": None,
    "per_device_train_batch_size": ROWS_PER_STEP,
    "speaker_embedding_column_name": "speaker_embeddings",
    "vocoder": "griffin_lim",
    "speaker_encoder": "mel_statistics",
    "asr_model_name_or_path": str(ASSETS / "nano_whisper"),
}
COLUMNS = [
    ("audio_s_per_s", "audio s/s", ".2f", 1, True),
    ("audio_s_per_s_all_steps", "all steps", ".2f", 1, False),
    ("audio_s_per_s_wall", "wall", ".2f", 1, False),
    ("padding", "padding %", ".0f", 100, False),
    ("peak_rss_bytes", "peak MB", ".0f", 2**-20, True),
    ("disk_bytes", "disk MB", ".2f", 2**-20, False),
]


def figures(timing):
    """Returns the figures of one run: throughput, padding, memory and disk."""
    steps = timing["steps"]
    rows = [sum(batch["rows"] for batch in step["batches"]) for step in steps]
    if set(rows) != {ROWS_PER_STEP}:
        raise SystemExit(f"The steps had {rows} rows and not {ROWS_PER_STEP} each: the arms did not do the same work.")
    seconds = [step["since_last"] for step in steps]
    # A frame has one target for each mel band.
    frames = [sum(batch["targets"] for batch in step["batches"]) / NUM_MEL_BINS for step in steps]
    padded = [sum(batch["rows"] * batch["labels"] for batch in step["batches"]) for step in steps]
    audio_s = [FRAME_S * number for number in frames]
    peaks = timing["peak_rss_bytes"]
    return {
        "audio_s_per_s": sum(audio_s[1:]) / sum(seconds[1:]),
        "audio_s_per_s_all_steps": sum(audio_s) / sum(seconds),
        "audio_s_per_s_wall": sum(audio_s) / steps[-1]["ended"],
        "padding": 1 - sum(frames) / sum(padded),
        "median_step_s": statistics.median(seconds[1:]),
        "first_step_after_launch_s": steps[0]["ended"],
        "step_s": seconds,
        "audio_s": audio_s,
        "longest_frames": [max(batch["labels"] for batch in step["batches"]) for step in steps],
        "peak_rss_bytes": peaks["training"] + peaks["children"],
        "peak_rss_parts_bytes": peaks,
        "peak_gpu_bytes": timing["peak_gpu_bytes"],
        "disk_bytes": timing["disk_before_first_step_bytes"],
    }


def run_ours(folder, seed, *, model, data, steps, **settings):
    return figures(ours(folder, model, data, seed=seed, max_steps=steps, **SPEECHT5 | settings))


def run_rival(arm, folder, seed, *, model, data, steps):
    # Batch, learning rate and warm-up are the arm's own.
    own = dict.fromkeys(("per_device_train_batch_size", "learning_rate", "warmup_steps"))
    return figures(rival(arm, folder, model, data, script="speecht5_course.py", seed=seed, max_steps=steps, **own))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser, "train_tts.json", shapes=SPEECHT5_SHAPES)
    parser.add_argument(
        "--arms", nargs="*", choices=["ours", "ours_small_batches", *RIVALS], default=["ours", "B1", "B2"]
    )
    parser.add_argument("--durations_s", nargs=2, type=float, default=[2, 8], help="least and most of an utterance")
    parser.add_argument("--steps", type=int, default=4, help="of ours")
    parser.add_argument("--rival_steps", type=int, default=2)
    parser.add_argument("--rows", type=int, default=640, help="of the corpus")
    parser.add_argument("--model", type=Path, help="a model folder instead of one of random weights")
    args = parser.parse_args()
    if min(args.steps, args.rival_steps) < 2:
        parser.error("there have to be steps behind the first one")
    if args.rows < ROWS_PER_STEP * max(args.steps, args.rival_steps):
        parser.error(f"--rows {args.rows} are fewer than the steps read")

    args.work_dir.mkdir(parents=True, exist_ok=True)
    model = args.model or make_speecht5(args.work_dir / f"speecht5_{args.shape}", args.shape)
    least_s, most_s = args.durations_s
    data = make_text_and_speech(
        args.work_dir / f"voices_{least_s:g}-{most_s:g}s_{args.rows}", least_s, most_s, args.rows
    )
    small = {"per_device_train_batch_size": SMALL_BATCH, "gradient_accumulation_steps": ROWS_PER_STEP // SMALL_BATCH}
    full = partial(run_ours, model=model, data=data, steps=args.steps)
    arms = {"ours": full, "ours_small_batches": partial(full, **small)}
    for name in RIVALS:
        arms[name] = partial(run_rival, name, model=model, data=data, steps=args.rival_steps)
    measurements = alternate({name: arms[name] for name in args.arms}, args.rounds, args.work_dir)
    more = ["median_step_s", "first_step_after_launch_s", "peak_gpu_bytes"]
    summary = summarise(measurements, [figure for figure, *_ in COLUMNS] + more, RIVALS)
    references = [name for name in RIVALS if name in measurements]
    print_table(f"training, SpeechT5, {args.shape}, {least_s:g} to {most_s:g} s", summary, COLUMNS, references)
    write_record(args.output, args, summary=summary, measurements=measurements)


if __name__ == "__main__":
    main()
