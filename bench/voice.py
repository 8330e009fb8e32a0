"""Asks whether a SpeechT5 can be understood, and whose voice it has, by a recogniser that it was not trained beside.

    python bench/voice.py --model assets/nano_speecht5 --dataset_name flite_voices --name base
    python bench/voice.py --model outputs/speecht5_demo --dataset_name assets/flite_voice --name lora

Speaks the test rows of a dataset with several seeds of the decoder's dropout, which stays on in synthesis, and scores each
as training does (`SynthesisScore`), heard by pocketsphinx with a grammar of digits. Where several speakers speak, it also
counts how often the voice that was asked for is the nearest of them all (`identified`). The record gains an entry.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(sys.path.pop(0))  # this folder last: its evaluate.py is not the package of that name

import numpy as np
import torch
from recogniser import DigitRecogniser

from hfspeech.arguments import DataArguments, SpeechT5Arguments
from hfspeech.batching import SpeechT5Collator
from hfspeech.data import load_split
from hfspeech.metrics import SynthesisScore
from hfspeech.modeling.speech_generation import generate_spectrograms
from hfspeech.models.loading import quiet_transformers
from hfspeech.models.speecht5 import load_speecht5_for_inference
from hfspeech.models.vocoders import load_vocoder
from hfspeech.runs import environment, read_json, write_json
from hfspeech.spelling import TextFrontEnd
from hfspeech.voices import Voices, find_voices, load_speaker_encoder

RECORD = Path(__file__).parent / "results/voice.json"
FIGURES = ("wer", "cer", "mcd", "log_f0_rmse", "speaker_similarity", "duration_ratio")
BATCH = 16


def identified(waveforms, names, speakers, encoder):
    """Returns for each waveform whether, of all voices that occur in `names`, it lies nearest to the one it is to have."""
    candidates = sorted(set(names))
    similarity = encoder(waveforms) @ torch.stack([speakers[name] for name in candidates]).T
    return [candidates[index] == name for index, name in zip(similarity.argmax(dim=1).tolist(), names)]


def score_of(model, processor, batches, vocoder, score, seed, speakers, encoder):
    """Speaks all batches with one seed and returns what `SynthesisScore` and `identified` find."""
    rows = []
    for originals, batch, vocoded in batches:
        inputs = [batch[name] for name in ("input_ids", "attention_mask", "speaker_embeddings")]
        seeds = [1000 * seed + index for index in batch["index"]]
        spoken = generate_spectrograms(model, *inputs, seeds=seeds)
        waveforms = vocoder([one.spectrogram for one in spoken])
        for original, one, waveform, reference, true in zip(originals, spoken, waveforms, batch["waveforms"], vocoded):
            found = {"waveform": waveform, "reference": reference, "vocoded": true, "is_unfinished": one.is_unfinished}
            rows.append({**original, **found})
    names = [row["speaker"] for row in rows]
    spoken, recorded = ([row[name] for row in rows] for name in ("waveform", "reference"))
    return score(rows) | {
        "identified": identified(spoken, names, speakers, encoder),
        "identified_recordings": identified(recorded, names, speakers, encoder),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--speakers", nargs="+", help="rows of these speakers only")
    parser.add_argument("--name", required=True, help="of the entry in the record")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--output", type=Path, default=RECORD)
    args = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(1)

    model, processor, settings, speakers = load_speecht5_for_inference(args.model)
    vocoder = load_vocoder(settings.get("vocoder", "griffin_lim"))
    encoder = load_speaker_encoder(settings.get("speaker_encoder", "mel_statistics"))
    data_args = DataArguments(dataset_name=[args.dataset_name], speakers=args.speakers)
    dataset = load_split(data_args, args.split)
    voices = Voices("speaker", speakers)
    if not set(dataset.column("speaker")) <= speakers.keys():  # voices that the model has never been told of
        train = load_split(data_args, "train")
        rows = {"train": train, "test": dataset}
        voices = find_voices(rows, SpeechT5Arguments(model_name_or_path=args.model), encoder)
    collator = SpeechT5Collator(processor, TextFrontEnd(processor.tokenizer), voices, model.config)
    batches = []
    for start in range(0, len(dataset), BATCH):
        originals = [dataset[index] for index in range(start, min(start + BATCH, len(dataset)))]
        batch = collator(originals)
        true = [labels[labels[:, 0] != -100] for labels in batch["labels"]]
        batches.append(([dataset.record(index) for index in batch["index"]], batch, vocoder(true)))
    score = SynthesisScore(DigitRecogniser(), encoder, ["speaker"], "basic")
    found = [score_of(model, processor, batches, vocoder, score, seed, voices.speakers, encoder) for seed in args.seeds]
    entry = {
        "environment": environment(),
        "model": args.model,
        "dataset": args.dataset_name,
        "rows": found[0]["rows"],
        "words": found[0]["words"],
        "vocoder": vocoder.name,
        "seeds": args.seeds,
        **{
            figure: {"mean": float(np.mean([f[figure] for f in found])), "of_seed": [f[figure] for f in found]}
            for figure in FIGURES
        },
        "interval_of_first_seed": {
            name: found[0][name] for f in FIGURES for name in (f"{f}_low", f"{f}_high") if name in found[0]
        },
        "stop": {name: float(np.mean([f["stop"][name] for f in found])) for name in found[0]["stop"]},
        "wer_by_speaker": {
            name: float(np.mean([f["groups"]["speaker"][name]["wer"] for f in found]))
            for name in found[0]["groups"]["speaker"]
        },
        "ceiling": found[0]["ceiling"],
    }
    if len(entry["wer_by_speaker"]) > 1:
        of_row = np.mean([f["identified"] for f in found], axis=0)
        drawn = np.random.default_rng(0).choice(of_row, (1000, len(of_row))).mean(axis=1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        entry["identified"] = {
            "mean": float(of_row.mean()),
            "low": float(low),  # 95 %, by a bootstrap over rows
            "high": float(high),
            "recordings": float(np.mean(found[0]["identified_recordings"])),
            "chance": 1 / len(entry["wer_by_speaker"]),
        }
    models = read_json(args.output)["models"] if args.output.exists() else {}
    write_json(args.output, {"environment": entry["environment"], "models": {**models, args.name: entry}})
    for figure in FIGURES:
        print(f"{args.name}: {figure} {entry[figure]['mean']:.4f}  {[round(x, 3) for x in entry[figure]['of_seed']]}")
    print(entry["stop"], entry["wer_by_speaker"], entry["ceiling"], entry.get("identified"))


if __name__ == "__main__":
    main()
