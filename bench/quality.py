"""Asks whether a Whisper that was fine-tuned unpadded is as good, for stock transformers, as one tuned on full windows.

    python bench/quality.py --dataset_name fsdd_strings assets/flite_digits --output bench/results/quality.json

Fine-tunes the same base with the same recipe for the same number of steps, once with every batch padded to the full
window and once for each `full_window_share`, with several seeds, on each dataset. Every tuned model is then loaded and
decoded by transformers alone: features padded to the full window, greedy `generate`. Rows joined to recordings too long
for the model are cut in their pauses into pieces, padded to the full window, too (`hfspeech transcribe`), and go
through transformers' own chunked pipeline. The difference to the padded runs comes with a bootstrap over seeds and
rows: its 95th percentile has to stay under half a point.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jiwer
import numpy as np
import torch
from transformers import AutomaticSpeechRecognitionPipeline, WhisperForConditionalGeneration, WhisperProcessor

from hfspeech.arguments import DataArguments
from hfspeech.data import load_split
from hfspeech.inference import joined, transcribe
from hfspeech.models.loading import quiet_transformers
from hfspeech.runs import RUN_FILE, environment, read_json, write_json
from hfspeech.text import normalizer

ROOT = Path(__file__).resolve().parent.parent
MARGIN = 0.005  # half a point of WER
JOINED_ROWS, GAP_S = 5, 0.3  # rows in one long recording, and the silence between them
NUM_RESAMPLES = 4000
RATE = 16000
KINDS = ("short", "long", "pipeline")


def test_splits(dataset):
    """Returns the names of a dataset's test splits."""
    return sorted(path.name for path in Path(dataset).iterdir() if path.name.startswith("test"))


def train(base, dataset, arm, seed, output_dir, flags):
    """Runs the recipe as a user does, in one process with one thread; returns its results."""
    command = [sys.executable, str(ROOT / "recipes/whisper_full/run.py"), str(ROOT / "bench/quality.yaml")]
    command += ["--model_name_or_path", str(base), "--dataset_name", dataset, "--seed", str(seed)]
    command += ["--test_split_name", *test_splits(dataset)]
    command += ["--output_dir", str(output_dir), *arm, *flags]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return read_json(output_dir / "run.json")


def stock_errors(model_dir, rows, long_recordings, max_piece_s):
    """Decodes padded to the full window; returns [errors, words] of each row, and of each long recording, both ways."""
    torch.set_num_threads(1)
    model = WhisperForConditionalGeneration.from_pretrained(model_dir).eval()
    processor = WhisperProcessor.from_pretrained(model_dir)
    texts = []
    for start in range(0, len(rows), 32):
        waveforms = [row["waveform"] for row in rows[start : start + 32]]
        features = processor(waveforms, sampling_rate=RATE, return_tensors="pt").input_features
        with torch.no_grad():
            tokens = model.generate(features)
        texts += processor.batch_decode(tokens, skip_special_tokens=True)
    pipeline = AutomaticSpeechRecognitionPipeline(
        model=model, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor,
        chunk_length_s=max_piece_s,
    )  # fmt: skip
    chunked = pipeline([{"raw": r["waveform"], "sampling_rate": RATE} for r in long_recordings], batch_size=32)
    waveforms = [recording["waveform"] for recording in long_recordings]
    cut = transcribe(model, processor, waveforms, 32, max_piece_s, encoder_window="full")
    references = [recording["text"] for recording in long_recordings]
    return {
        "short": errors_and_words(texts, [row["text"] for row in rows]),
        "long": errors_and_words([joined(segments) for segments in cut], references),
        "pipeline": errors_and_words([found["text"] for found in chunked], references),
    }


def errors_and_words(predictions, references):
    clean = normalizer("basic")
    pairs = [(clean(reference), clean(prediction)) for reference, prediction in zip(references, predictions)]
    counts = [jiwer.process_words(reference, prediction) for reference, prediction in pairs]
    return [[c.substitutions + c.deletions + c.insertions, c.hits + c.substitutions + c.deletions] for c in counts]


def join_rows(rows):
    """Returns long recordings: `JOINED_ROWS` rows of one speaker each, short silences between them."""
    gap, found = np.zeros(round(GAP_S * RATE), np.float32), []
    for _, group in itertools.groupby(
        sorted(rows, key=lambda row: (row["split"], row["speaker"] or "")), key=lambda r: r["speaker"]
    ):
        group = list(group)
        for start in range(0, len(group) - JOINED_ROWS + 1, JOINED_ROWS):
            part = group[start : start + JOINED_ROWS]
            waveform = np.concatenate([piece for row in part for piece in (row["waveform"], gap)])
            found.append({"waveform": waveform, "text": " ".join(row["text"] for row in part)})
    return found


def difference(ours, padded, generator):
    """Returns the mean difference of WER, ours less padded, over seeds, and the bootstrap's 5th and 95th percentile.

    Args:
        ours, padded: (seeds, rows, 2), errors and words of each row.

    Rows are drawn with replacement, the same for every seed and both arms; seeds are drawn with replacement, too.
    """
    ours, padded = np.asarray(ours), np.asarray(padded)

    def rates(errors_and_words):
        total = errors_and_words.sum(axis=-2)
        return total[..., 0] / total[..., 1]

    drawn = []
    for _ in range(NUM_RESAMPLES):
        rows = generator.integers(0, ours.shape[1], ours.shape[1])
        seeds = generator.integers(0, len(ours), len(ours))
        drawn.append((rates(ours[seeds][:, rows]) - rates(padded[seeds][:, rows])).mean())
    low, high = np.percentile(drawn, [5, 95])
    return {"difference": float((rates(ours) - rates(padded)).mean()), "low": float(low), "high": float(high)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "assets/nano_whisper", help="the base, a folder")
    parser.add_argument("--dataset_name", nargs="+", default=["assets/flite_digits"])
    parser.add_argument("--full_window_share", nargs="+", type=float, default=[0.0, 0.02, 0.05, 0.1, 0.25])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--max_piece_s", type=float, default=5, help="of long recordings; longer rows are left out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings that run at once, one thread each")
    parser.add_argument("--output", type=Path, required=True)
    args, flags = parser.parse_known_args()  # what is left goes to the recipe
    quiet_transformers()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    arms = {"padded": ["--encoder_window", "full"]}
    for share in args.full_window_share:
        arms[f"{share:g}"] = ["--encoder_window", "auto", "--full_window_share", str(share)]
    window_s = WhisperProcessor.from_pretrained(args.model).feature_extractor.chunk_length
    record = {"environment": environment(), "model": os.path.relpath(args.model, ROOT), "window_s": window_s}
    if (args.model / RUN_FILE).exists():  # a base that was trained for this, and how
        made = read_json(args.model / RUN_FILE)
        record["base"] = {"environment": made["environment"], "test": made["after"]["wer"]}
    record |= {"margin": MARGIN, "seeds": args.seeds, "flags": flags, "datasets": {}}
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.jobs) as pool:
        for dataset in args.dataset_name:
            entry = compare(args, dataset, arms, Path(work) / Path(dataset).name, pool, flags)
            record["datasets"][Path(dataset).name] = entry
            write_json(args.output, record)
            print(table(record))


def compare(args, dataset, arms, work, pool, flags):
    """Trains every arm with every seed on one dataset, and returns the record of how they did."""
    tests = [load_split(DataArguments(dataset_name=[dataset]), split) for split in test_splits(dataset)]
    seeds = args.seeds
    rows = [test[i] for test in tests for i in range(len(test)) if test[i]["duration_s"] <= args.max_piece_s]
    long_recordings = join_rows(rows)

    def run(arm, seed):
        folder = work / arm / str(seed)
        results = train(args.model, dataset, arms[arm], seed, folder, flags)
        found = stock_errors(folder, rows, long_recordings, args.max_piece_s)
        shutil.rmtree(folder)
        print(f"{dataset} {arm} seed {seed}: {rate(found['short']):.4f} {rate(found['long']):.4f}", flush=True)
        unpadded = results["after"].get("unpadded", {}).get("wer")
        return {**found, "unpadded_wer": unpadded, "seconds": results["train"]["seconds"]}

    jobs = {(arm, seed): pool.submit(run, arm, seed) for seed in seeds for arm in arms}
    found = {key: job.result() for key, job in jobs.items()}
    before = stock_errors(args.model, rows, long_recordings, args.max_piece_s)
    entry = {
        "rows": len(rows),
        "words": sum(words for _, words in before["short"]),
        "long_recordings": len(long_recordings),
        "before": {kind: rate(before[kind]) for kind in KINDS},
        "arms": {},
    }
    for arm in arms:
        of_arm, padded = ([found[name, seed] for seed in seeds] for name in (arm, "padded"))
        entry["arms"][arm] = {
            "wer": {kind: [rate(one[kind]) for one in of_arm] for kind in KINDS},
            "unpadded_wer": [one["unpadded_wer"] for one in of_arm],
            "seconds": [one["seconds"] for one in of_arm],
        }
        if arm != "padded":
            entry["arms"][arm]["against_padded"] = {
                kind: difference([o[kind] for o in of_arm], [p[kind] for p in padded], np.random.default_rng(0))
                for kind in KINDS
            }
    return entry


def rate(errors_and_words):
    errors, words = np.sum(errors_and_words, axis=0)
    return float(errors / words)


def table(record):
    """Returns the record as a Markdown table, one line for each dataset and arm."""
    lines = [
        f"| dataset | arm | {' | difference, 95 % under | '.join(KINDS)} | difference, 95 % under |",
        "|---" * 8 + "|",
    ]
    for name, entry in record["datasets"].items():
        for arm, found in entry["arms"].items():
            cells = []
            for kind in KINDS:
                cells.append(" ".join(f"{100 * wer:.1f}" for wer in found["wer"][kind]))
                gap = found.get("against_padded", {}).get(kind)
                cells.append(f"{100 * gap['difference']:+.2f}, {100 * gap['high']:+.2f}" if gap else "")
            lines.append(f"| {name} | {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
