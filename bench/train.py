"""How fast does training go, beside the published way, and what is each lever worth?

    python bench/train.py                                            # ours, B1 and B2 on utterances of 5 s and 12 s
    python bench/train.py --arms ours_lora B1 --durations_s 5        # LoRA under a frozen encoder whose outputs are kept
    python bench/train.py --arms ours_fp32 --durations_s 5           # share of the machine's matrix-multiply peak
    python bench/train.py --arms ours --levers all --durations_s 5   # each lever off

The same shape of model, 16 rows in each optimizer step, audio counted without padding, arms in turn, each round with a
seed of its own. `audio_s_per_s` leaves out the first step of a run (of LoRA: the first pass over the rows, in which the
encoder still runs); `..._all_steps` counts every step, and `..._wall` everything from the launch to the last step's end,
so it compares arms of equal step counts only.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

from arms import add_common_flags, alternate, ours, print_table, rival, summarise, write_record
from levers import LORA_SETTINGS, PATCHES, SETTINGS
from material import SHAPES, make_model, make_speech

ROWS_PER_STEP = 16
LORA = {"recipe": "whisper_lora", "freeze_encoder": True}
REFERENCES = ("B1", "B2", "ours", "ours_lora")
COLUMNS = [
    ("audio_s_per_s", "audio s/s", ".1f", 1, True),
    ("audio_s_per_s_all_steps", "all steps", ".1f", 1, False),
    ("audio_s_per_s_wall", "wall", ".1f", 1, False),
    ("peak_rss_bytes", "peak MB", ".0f", 2**-20, True),
    ("disk_bytes", "disk MB", ".2f", 2**-20, False),
]


def useful_flops(shape, frames, label_tokens):
    """Returns the floating-point operations of one training step on one row that matrix products need, padding apart.

    Counted from the products in transformers' modeling_whisper.py, a multiplication and an addition as two: with d the
    width, T = frames / 2 encoder positions and N label tokens, the forward pass takes

        convolutions   12 mels d T + 6 d² T           (kernels of 3; the first at 2 T positions)
        encoder layer  24 d² T + 4 d T²               (four projections, a fourfold feed-forward; scores and sums)
        decoder layer  28 d² N + 4 d² T + 2 d N² + 4 d N T   (keys and values of T; causal scores are half a square)
        head           2 d V N

    and the backward pass twice that, for all weights are trained. Recomputing what was not kept is not useful.

    Args:
        shape: a key of `material.SHAPES`.
        frames: mel frames, 100 for a second of audio.
        label_tokens: tokens that the decoder learns.
    """
    size = SHAPES[shape]
    d, layers, mels, vocabulary = size["d_model"], size["layers"], size["num_mel_bins"], size["vocab_size"]
    positions, n = frames / 2, label_tokens
    encoder = 12 * mels * d * positions + 6 * d**2 * positions
    encoder += layers * (24 * d**2 * positions + 4 * d * positions**2)
    decoder = layers * (28 * d**2 * n + 4 * d**2 * positions + 2 * d * n**2 + 4 * d * n * positions)
    return 3 * (encoder + decoder + 2 * d * vocabulary * n)


def matmul_peak(dtype="float32", size=4096, tries=8):
    """Returns the floating-point operations per second of the best of some products of two square matrices."""
    import time

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(tries + 1):
        began = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def figures(timing, duration_s, skip, shape):
    """Returns the figures of one run: throughput, memory, disk, and the operations of its steps beside `skip` ones."""
    steps = timing["steps"]
    rows = [sum(batch["rows"] for batch in step["batches"]) for step in steps]
    seconds = [step["since_last"] for step in steps]
    batches = [batch for step in steps[skip:] for batch in step["batches"]]
    useful = sum(
        batch["rows"] * useful_flops(shape, 100 * duration_s, batch["targets"] / batch["rows"]) for batch in batches
    )
    padded = sum(batch["rows"] * useful_flops(shape, batch["frames"], batch["labels"]) for batch in batches)
    peaks = timing["peak_rss_bytes"]
    return {
        "audio_s_per_s": duration_s * sum(rows[skip:]) / sum(seconds[skip:]),
        "audio_s_per_s_all_steps": duration_s * sum(rows) / sum(seconds),
        "audio_s_per_s_wall": duration_s * sum(rows) / steps[-1]["ended"],
        "median_step_s": statistics.median(seconds[skip:]),
        "first_step_after_launch_s": steps[0]["ended"],
        "step_s": seconds,
        "rows": rows,
        "encoded_rows": [sum(batch["encoded_rows"] for batch in step["batches"]) for step in steps],
        "frames": [max(batch["frames"] for batch in step["batches"]) for step in steps],
        "useful_flops_per_s": useful / sum(seconds[skip:]),
        "flops_per_s_with_padding": padded / sum(seconds[skip:]),
        "peak_rss_bytes": peaks["training"] + peaks["children"],
        "peak_rss_parts_bytes": peaks,
        "peak_gpu_bytes": timing["peak_gpu_bytes"],
        "disk_bytes": timing["disk_before_first_step_bytes"],
    }


def run_ours(
    folder,
    seed,
    *,
    model,
    data,
    steps,
    duration_s,
    shape,
    rows=None,
    skip=1,
    off=None,
    recipe="whisper_full",
    **settings,
):
    timing = ours(
        folder,
        model,
        data,
        recipe,
        off,
        seed=seed,
        max_steps=steps,
        max_train_samples=rows or ROWS_PER_STEP * steps,
        **settings,
    )
    return figures(timing, duration_s, skip, shape)


def run_with_peak(folder, seed, *, dtype, **arguments):
    """The peak is measured right before the run, on the same machine in the same state."""
    peak = matmul_peak(dtype)
    found = run_ours(folder, seed, **arguments)
    shares = {
        "share_of_peak": found["useful_flops_per_s"] / peak,
        "share_of_peak_with_padding": found["flops_per_s_with_padding"] / peak,
    }
    return found | {"matmul_peak_flops": peak, "dtype": dtype} | shares


def run_rival(arm, folder, seed, *, model, data, steps, duration_s, shape):
    limit = ROWS_PER_STEP * steps  # nothing is prepared in vain
    timing = rival(arm, folder, model, data, "do_train", seed=seed, max_steps=steps, limit_train=limit)
    return figures(timing, duration_s, 1, shape)


def make_arms(args, model, data, duration_s):
    """Returns the arms of one duration, by name."""
    common = {"model": model, "data": data, "duration_s": duration_s, "shape": args.shape}
    full = partial(run_ours, steps=args.steps, **common)
    lora = partial(
        run_ours, steps=args.lora_steps, rows=args.lora_rows, skip=args.lora_rows // ROWS_PER_STEP, **common, **LORA
    )
    known = {"ours": full, "ours_lora": lora}
    for dtype, name in (("float32", "ours_fp32"), ("bfloat16", "ours_bf16")):
        known[name] = partial(run_with_peak, dtype=dtype, steps=args.steps, bf16=dtype == "bfloat16", **common)
    for arm in ("B1", "B2"):
        known[arm] = partial(run_rival, arm, steps=args.rival_steps, **common)
    arms = {name: known[name] for name in args.arms}
    names = [*SETTINGS, *PATCHES, *LORA_SETTINGS] if args.levers == ["all"] else args.levers
    for name in names:
        if name in LORA_SETTINGS:
            arms[f"ours_lora without {name}"] = partial(lora, **LORA_SETTINGS[name])
        elif name in PATCHES:
            arms[f"ours without {name}"] = partial(full, off=name)
        else:
            arms[f"ours without {name}"] = partial(full, **SETTINGS[name])
    return arms


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser, "train.json")
    choices = ["ours", "ours_lora", "ours_fp32", "ours_bf16", "B1", "B2"]
    parser.add_argument("--arms", nargs="*", choices=choices, default=["ours", "B1", "B2"])
    parser.add_argument("--levers", nargs="*", choices=["all", *SETTINGS, *PATCHES, *LORA_SETTINGS], default=[])
    parser.add_argument("--durations_s", nargs="*", type=float, default=[5, 12])
    parser.add_argument("--steps", type=int, default=20, help="of ours: enough that some are of the full window")
    parser.add_argument("--rival_steps", type=int, default=3)
    parser.add_argument("--lora_steps", type=int, default=40)
    parser.add_argument("--lora_rows", type=int, default=160, help="of LoRA: read several times, encoded once")
    parser.add_argument("--model", type=Path, help="a model folder instead of one of random weights")
    args = parser.parse_args()
    if min(args.steps, args.rival_steps) < 2 or args.lora_steps * ROWS_PER_STEP <= args.lora_rows:
        parser.error("there have to be steps behind the first one, or behind the first pass of LoRA")

    args.work_dir.mkdir(parents=True, exist_ok=True)
    model = args.model or make_model(args.work_dir / args.shape, args.shape)
    num_rows = ROWS_PER_STEP * max(args.steps, args.rival_steps)
    measurements, summary = {}, {}
    for duration_s in args.durations_s:
        data = make_speech(args.work_dir / f"speech_{duration_s:g}s_{num_rows}", duration_s, num_rows)
        case = f"{duration_s:g} s"
        found = measurements[case] = alternate(make_arms(args, model, data, duration_s), args.rounds, args.work_dir)
        more = ["median_step_s", "share_of_peak", "share_of_peak_with_padding", "peak_gpu_bytes"]
        summary[case] = summarise(found, [figure for figure, *_ in COLUMNS] + more, REFERENCES)
        # A lever is told by what is left of our own speed without it.
        references = [name for name in REFERENCES if name in found and (args.levers or name.startswith("B"))]
        print_table(f"training, {args.shape}, {case}", summary[case], COLUMNS, references)
        for run in found.get("ours_lora", []):
            if again := sum(run["encoded_rows"][args.lora_rows // ROWS_PER_STEP :]):
                print(f"ours_lora: the encoder ran again for {again} rows after the first pass")
        for name, entry in summary[case].items():
            if entry["median"]["share_of_peak"]:
                shares = [100 * entry["median"][figure] for figure in ("share_of_peak", "share_of_peak_with_padding")]
                print(f"{name}: {shares[0]:.0f} % of the peak, {shares[1]:.0f} % if the padding counts as work")
    write_record(args.output, args, summary=summary, measurements=measurements)


if __name__ == "__main__":
    main()
