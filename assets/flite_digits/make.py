"""Synthesises spoken digit strings with flite's voices, as an audio folder with train, validation and test splits.

    apt-get install flite
    python assets/flite_digits/make.py --output_dir digits --num_train 500
    python assets/flite_digits/make.py --output_dir voice --clean --voices slt --num_train 200
    python assets/flite_digits/make.py --output_dir crowd --clean --voices rms awb --factors 0.8 1 1.25 --num_train 2000

One voice speaks in the test split only: its rows have the condition `new voice`, all others `seen voice`. With `--clean`
the recordings are as a voice is recorded to be synthesised: one rate and pitch, no noise, no silence around the words.
`--factors` makes several speakers of each voice, as smaller and larger people would speak: pitch and formants times each.
"""

import argparse
import csv
import itertools
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

SAMPLING_RATE = 16000
MAX_DURATION_S = 4.85  # the nano Whisper hears 5 s
WORDS = "zero one two three four five six seven eight nine".split()
NATURAL_F0_HZ = {"slt": 180, "rms": 88, "kal16": 105, "awb": 115}  # rms ignores the pitch it is asked for
# The Scottish voice is the held-out one: the others are American, so it is new in speaker and in accent.
NEW_VOICE = "awb"
OGG_COMPRESSION_LEVEL = 0.95  # Opus at about 20 kbit/s
CLEAN_COMPRESSION_LEVEL = 0.9  # and at about 30 kbit/s
PEAK = 0.7
EDGE = 800  # samples of silence that clean recordings keep: 50 ms


def split_of(text):
    """Returns the split a text belongs to in every set of digit strings: short strings always train."""
    if len(text.split()) < 3:
        return "train"
    return {0: "validation", 1: "test", 2: "test"}.get(zlib.crc32(text.encode()) % 20, "train")


def draw_text(rng, split):
    while True:
        text = " ".join(rng.choice(WORDS, rng.integers(2, 7)))
        if split_of(text) == split:
            return text


def speak(text, voice, duration_stretch, f0_hz):
    """Returns `text` as float samples at 16 kHz."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        features = [f"duration_stretch={duration_stretch:.3f}", f"int_f0_target_mean={f0_hz:.1f}"]
        settings = [word for feature in features for word in ("--setf", feature)]
        subprocess.run(["flite", "-voice", voice, *settings, "-t", text, "-o", file.name], check=True)
        audio, sampling_rate = soundfile.read(file.name)
    if sampling_rate != SAMPLING_RATE:
        raise SystemExit(f"flite's voice {voice} speaks at {sampling_rate} Hz and not at 16000. Install flite 2.2.")
    return audio


def add_room_noise(rng, audio):
    """Adds pink noise 20 to 35 dB under the speech."""
    spectrum = np.fft.rfft(rng.standard_normal(len(audio)))
    frequency_hz = np.fft.rfftfreq(len(audio), 1 / SAMPLING_RATE)
    noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(frequency_hz, 20)), len(audio))
    snr_db = rng.uniform(20, 35)
    return audio + noise * np.sqrt(np.mean(audio**2) / np.mean(noise**2)) * 10 ** (-snr_db / 20)


def make_row(folder, split, number, seed, new_voice):
    """Writes one utterance and returns its metadata row."""
    rng = np.random.default_rng([seed, ["train", "validation", "test"].index(split), number])
    text = draw_text(rng, split)
    voice = NEW_VOICE if new_voice else str(rng.choice([name for name in NATURAL_F0_HZ if name != NEW_VOICE]))
    spelled = text.replace(" ", ", ") if rng.random() < 0.25 else text
    duration_stretch, f0_hz = rng.uniform(0.85, 1.4), NATURAL_F0_HZ[voice] * rng.uniform(0.9, 1.12)
    silence = rng.integers(0, 4000, 2)
    while True:
        audio = np.pad(speak(spelled, voice, duration_stretch, f0_hz), silence)
        if len(audio) < MAX_DURATION_S * SAMPLING_RATE:
            break
        spelled, duration_stretch = text, duration_stretch * 0.85
    audio = add_room_noise(rng, audio)
    audio *= rng.uniform(0.3, 0.9) / np.abs(audio).max()
    file_name = write_opus(folder, number, audio, OGG_COMPRESSION_LEVEL)
    condition = "new voice" if new_voice else "seen voice"
    return file_name, text, voice, f"{len(audio) / SAMPLING_RATE:.3f}", condition


def make_clean_row(folder, split, number, seed, speakers):
    """Writes one utterance of one of the speakers, (voice, factor), without any variation; returns its metadata row."""
    rng = np.random.default_rng([seed, ["train", "validation", "test"].index(split), number])
    text, (voice, factor) = draw_text(rng, split), speakers[number % len(speakers)]
    audio = speak(text, voice, factor, NATURAL_F0_HZ[voice])
    if factor != 1:  # played faster, and spoken as much slower
        audio = resample(torch.from_numpy(audio), round(factor * SAMPLING_RATE), SAMPLING_RATE).numpy()
    loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
    audio = audio[max(loud[0] - EDGE, 0) : loud[-1] + EDGE]
    audio *= PEAK / np.abs(audio).max()
    file_name = write_opus(folder, number, audio, CLEAN_COMPRESSION_LEVEL)
    speaker = voice if factor == 1 else f"{voice} x {factor:g}"
    return file_name, text, speaker, f"{len(audio) / SAMPLING_RATE:.3f}"


def write_opus(folder, number, audio, compression_level):
    """Writes one recording and returns the name of its file."""
    file_name = f"{number:05d}.ogg"
    soundfile.write(
        folder / file_name, audio, SAMPLING_RATE, format="OGG", subtype="OPUS", compression_level=compression_level
    )
    return file_name


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_train", type=int, default=500)
    parser.add_argument("--num_validation", type=int, default=60)
    parser.add_argument("--num_test", type=int, default=100, help="test rows of the seen voices")
    parser.add_argument("--num_test_new_voice", type=int, default=60, help="test rows of the held-out voice")
    parser.add_argument("--clean", action="store_true", help="recordings to learn a voice from: nothing varies")
    parser.add_argument(
        "--voices", nargs="+", choices=NATURAL_F0_HZ, default=["slt"], help="voices of clean recordings"
    )
    parser.add_argument(
        "--factors", nargs="+", type=float, default=[1.0], help="of pitch and formants of clean recordings"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if shutil.which("flite") is None:
        raise SystemExit("The command flite is missing. Install it with `apt-get install flite`.")

    new_voices = {
        "train": [False] * args.num_train,
        "validation": [False] * args.num_validation,
        "test": [False] * args.num_test + [True] * args.num_test_new_voice * (not args.clean),
    }
    for split, flags in new_voices.items():
        folder = args.output_dir / split
        folder.mkdir(parents=True, exist_ok=True)
        header = ("file_name", "text", "speaker", "duration", "condition")
        if args.clean:
            header = header[:4]
            speakers = list(itertools.product(args.voices, args.factors))
            rows = [make_clean_row(folder, split, number, args.seed, speakers) for number in range(len(flags))]
        else:
            rows = [make_row(folder, split, number, args.seed, flag) for number, flag in enumerate(flags)]
        with open(folder / "metadata.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
        print(f"{split}: {len(rows)} utterances, {sum(float(row[3]) for row in rows) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
