"""Makes the beginnings of a nano Whisper that hears 30 seconds, as a published one does, and the speech to train it on.

    python bench/wide_whisper.py --speech outputs/espeak_digits_8k --output_dir outputs/wide
    accelerate launch recipes/whisper_full/run.py bench/wide_whisper.yaml

In `output_dir`, `model` is the shipped nano Whisper, whose window is 5 seconds, with room for 30: what its encoder adds to
each position is a sinusoid, which only has to be continued, and the embeddings that its decoder lacks are random.
`speech` is an audiofolder of the given one's rows (assets/espeak_digits/make.py), every second one alone and the others
joined to recordings of up to 29 seconds. The recipe then trains the one on the other, padded to the full window.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor, set_seed
from transformers.models.whisper.modeling_whisper import sinusoids

NANO = Path(__file__).resolve().parents[1] / "assets/nano_whisper"
WINDOW_S = 30
LONGEST_S = 29
MAX_TARGET_POSITIONS = 128
GAP_S = 0.4  # at most, between two joined rows


def widened(nano):
    """Returns a (model, processor) of the nano's weights with a window of 30 seconds."""
    processor = WhisperProcessor.from_pretrained(nano)
    settings = processor.feature_extractor.to_dict()
    settings = {name: settings[name] for name in ("feature_size", "sampling_rate", "hop_length", "n_fft")}
    processor.feature_extractor = WhisperFeatureExtractor(chunk_length=WINDOW_S, **settings)
    narrow = WhisperForConditionalGeneration.from_pretrained(nano)
    config = narrow.config
    config.max_source_positions = processor.feature_extractor.nb_max_frames // 2
    config.max_target_positions = MAX_TARGET_POSITIONS
    set_seed(0)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = narrow.generation_config
    weights = narrow.state_dict()
    encoder, decoder = (f"model.{part}.embed_positions.weight" for part in ("encoder", "decoder"))
    weights[encoder] = sinusoids(config.max_source_positions, config.d_model)
    weights[decoder] = torch.cat([weights[decoder], model.state_dict()[decoder][len(weights[decoder]) :]])
    model.load_state_dict(weights)
    return model, processor


def join_speech(source, split, output_dir, rng):
    """Writes one split, every second row of the source alone and those between joined to recordings."""
    with open(source / split / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (output_dir / split).mkdir(parents=True)
    written, row = [("file_name", "text")], 0
    while row < len(rows):
        longest_s = 0 if len(written) % 2 else rng.uniform(5, LONGEST_S)
        pieces, texts, seconds = [], [], 0.0
        while row < len(rows) and (not pieces or seconds + float(rows[row]["duration"]) + GAP_S < longest_s):
            waveform, rate = soundfile.read(source / split / rows[row]["file_name"], dtype="float32")
            gap = np.zeros(round(rng.uniform(0, GAP_S) * rate), np.float32)
            pieces += [gap, waveform] if pieces else [waveform]
            seconds = sum(map(len, pieces)) / rate
            texts.append(rows[row]["text"])
            row += 1
        name = f"{len(written):05d}.flac"
        soundfile.write(output_dir / split / name, np.concatenate(pieces), rate)
        written.append((name, " ".join(texts)))
    with open(output_dir / split / "metadata.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(written)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speech", type=Path, required=True, help="audiofolder that assets/espeak_digits/make.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    model, processor = widened(NANO)
    model.save_pretrained(args.output_dir / "model")
    processor.save_pretrained(args.output_dir / "model")
    for number, split in enumerate(("train", "validation", "test")):
        join_speech(args.speech, split, args.output_dir / "speech", np.random.default_rng(number))


if __name__ == "__main__":
    main()
