"""Synthesises spoken digit strings with espeak-ng, as an audio folder with train, validation and test splits.

    pip install espeakng-loader
    python assets/espeak_digits/make.py --output_dir digits --num_train 20000 --num_validation 200 --num_test 300

One seed makes the same samples every time, and a larger set of the same seed begins with the smaller one. Two thirds
of the rows are degraded (noise, narrow band, room, microphone, codec, level), so that what is learned from them
carries over to human recordings.
"""

import argparse
import csv
import ctypes
import zlib
from functools import cache
from importlib.util import find_spec
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import soundfile

SAMPLING_RATE = 16000
MAX_DURATION_S = 4.85  # the nano Whisper hears 5 s
NUM_PROCESSES = 2
# espeak-ng carries some state from one utterance to the next, which no call resets. Every block of rows therefore has
# a fresh process, so that the samples do not depend on which process took which rows.
ROWS_PER_PROCESS = 50
WORDS = "zero one two three four five six seven eight nine".split()

ACCENTS = "en en-us en-us-nyc en-029 en-gb-scotland en-gb-x-gbclan en-gb-x-gbcwmd en-gb-x-rp".split()
# Left out: whispers, robots and monsters, which no human recording resembles.
VARIANTS = (
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike Nguyen "
    "Reed RicishayMax RicishayMax2 RicishayMax3 Storm adam anika announcer antonio aunty belinda benjamin boris "
    "caleb david ed edward edward2 f1 f2 f3 f4 f5 grandma grandpa gustave ian iven iven2 iven3 iven4 john "
    "kaukovalta klatt klatt2 klatt3 klatt4 klatt6 linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel miguel mike2 "
    "norbert pablo paul pedro quincy rob robert sandro shelby steph steph2 steph3 travis victor zac"
).split()
TEST_ONLY_VARIANTS = "Annie Henrique Michael belinda david f4 klatt3 m6 pablo steph2".split()

OGG_COMPRESSION_LEVEL = 0.99  # Opus at about 11 kbit/s, which keeps the band up to 6 kHz


def split_of(text):
    """Returns the split a text belongs to in every set this script makes: short strings always train."""
    if len(text.split()) < 3:
        return "train"
    return {0: "validation", 1: "test", 2: "test"}.get(zlib.crc32(text.encode()) % 20, "train")


class Espeak:
    """espeak-ng through its shared library."""

    RATE, PITCH, PITCH_RANGE = 1, 3, 4  # espeak_PARAMETER

    def __init__(self):
        import espeakng_loader

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        synchronous = 2
        self.native_rate = self.library.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0)
        if self.native_rate <= 0:
            raise RuntimeError("espeak-ng did not start. Type `pip install --force-reinstall espeakng-loader`.")
        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = callback_type(self.collect)  # the library keeps no reference of its own
        self.library.espeak_SetSynthCallback(self.callback)
        self.chunks = []

    def collect(self, samples, num_samples, events):
        if samples and num_samples > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    def speak(self, text, voice, seed, rate_wpm, pitch, pitch_range):
        """Returns `text` as float samples at 16 kHz, with the silence at both ends cut off."""
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice}. Install espeakng-loader 0.2.4.")
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        for parameter, value in ((self.RATE, rate_wpm), (self.PITCH, pitch), (self.PITCH_RANGE, pitch_range)):
            self.library.espeak_SetParameter(parameter, int(value), 0)
        self.chunks.clear()
        encoded = text.encode() + b"\0"
        utf8 = 1
        self.library.espeak_Synth(encoded, len(encoded), 0, 0, 0, utf8, None, None)
        audio = np.concatenate(self.chunks).astype(np.float64) / 32768
        loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
        return resample(audio[loud[0] : loud[-1] + 1], SAMPLING_RATE / self.native_rate)


@cache
def espeak_of_this_process():
    return Espeak()


def resample(audio, factor):
    """Stretches `audio` to `factor` times its samples by cutting or padding its spectrum."""
    num_samples = max(round(len(audio) * factor), 1)
    # Silence at the end keeps the circular transform from wrapping the last sample onto the first.
    margin = 256
    padded = np.pad(audio, (margin, margin))
    num_padded = num_samples + round(2 * margin * factor)
    stretched = np.fft.irfft(np.fft.rfft(padded), num_padded) * num_padded / len(padded)
    start = round(margin * factor)
    return stretched[start : start + num_samples]


def draw_text(rng, split):
    while True:
        num_words = rng.integers(1 if split == "train" else 3, 7)
        text = " ".join(rng.choice(WORDS, num_words))
        if split_of(text) == split:
            return text


def draw_voice(rng, split):
    held_out = split == "test" and rng.random() < 0.5
    variants = TEST_ONLY_VARIANTS if held_out else [name for name in VARIANTS if name not in TEST_ONLY_VARIANTS]
    return f"{rng.choice(ACCENTS)}+{rng.choice(variants)}"


def speak_digits(espeak, rng, text, voice, degraded):
    """Returns one reading of `text`: connected speech, or single words with gaps, silence before and after."""
    pitch, pitch_range = rng.uniform(20, 80), rng.uniform(10, 90)
    isolated, commas = rng.random() < 0.5, rng.random() < 0.3
    rate_wpm = np.exp(rng.uniform(np.log(90), np.log(300)))
    speaker_factor = rng.uniform(0.85, 1.18) if degraded and rng.random() < 0.5 else 1.0
    lead_s, tail_s, gap_s = rng.uniform(0, 0.4), rng.uniform(0, 0.4), rng.uniform(0, 0.4)
    seed = int(rng.integers(1, 2**31))
    while True:
        if isolated:
            # Each word is a recording of its own: another rate, pitch, loudness and distance to its neighbour.
            pieces = []
            for word in text.split():
                spoken = espeak.speak(
                    word,
                    voice,
                    seed,
                    min(rate_wpm * rng.uniform(0.85, 1.2), 400),
                    pitch + rng.uniform(-8, 8),
                    pitch_range,
                )
                pieces += [spoken * rng.uniform(0.6, 1), np.zeros(int(gap_s * rng.uniform(0, 1) * SAMPLING_RATE))]
            speech = np.concatenate(pieces[:-1])
        else:
            spelled = text.replace(" ", ", ") if commas else text
            speech = espeak.speak(spelled, voice, seed, min(rate_wpm, 400), pitch, pitch_range)
        speech = resample(speech, speaker_factor)
        audio = np.pad(speech, (int(lead_s * SAMPLING_RATE), int(tail_s * SAMPLING_RATE)))
        if len(audio) < MAX_DURATION_S * SAMPLING_RATE:
            return audio
        rate_wpm, lead_s, tail_s, gap_s = rate_wpm * 1.15, lead_s * 0.7, tail_s * 0.7, gap_s * 0.7


def noise(rng, num_samples):
    """Returns white, pink, brown or humming noise of unit power."""
    kind = rng.choice(["white", "pink", "brown", "hum"])
    if kind == "hum":
        time_s = np.arange(num_samples) / SAMPLING_RATE
        mains_hz = rng.choice([50, 60])
        waves = sum(
            rng.uniform(0, 1) / k * np.sin(2 * np.pi * (k * mains_hz * time_s + rng.random())) for k in range(1, 8)
        )
        result = waves + 0.1 * np.std(waves) * rng.standard_normal(num_samples)
    else:
        exponent = {"white": 0.0, "pink": 0.5, "brown": 1.0}[kind]
        spectrum = np.fft.rfft(rng.standard_normal(num_samples))
        frequency_hz = np.fft.rfftfreq(num_samples, 1 / SAMPLING_RATE)
        result = np.fft.irfft(spectrum / np.maximum(frequency_hz, 20.0) ** exponent, num_samples)
    return result / np.sqrt(np.mean(result**2))


def reverberate(rng, audio):
    """Adds the tail of a small room: noise that decays by 60 dB in 0.1 to 0.4 s, 3 to 15 dB under the direct sound."""
    rt60_s = rng.uniform(0.1, 0.4)
    time_s = np.arange(int(rt60_s * SAMPLING_RATE)) / SAMPLING_RATE
    tail = rng.standard_normal(len(time_s)) * 10 ** (-3 * time_s / rt60_s)
    tail *= 10 ** (-rng.uniform(3, 15) / 20) / np.sqrt(np.sum(tail**2))
    num_samples = len(audio) + len(tail)
    wet = np.fft.irfft(np.fft.rfft(audio, num_samples) * np.fft.rfft(tail, num_samples), num_samples)
    return audio + wet[: len(audio)]


def shape_spectrum(rng, audio, max_frequency_hz):
    """Tilts the spectrum by up to 6 dB an octave around 1 kHz and cuts everything above `max_frequency_hz`."""
    frequency_hz = np.fft.rfftfreq(len(audio), 1 / SAMPLING_RATE)
    octaves = np.log2(np.clip(frequency_hz, 100, 6000) / 1000)
    gain = 10 ** (rng.uniform(-6, 6) * octaves / 20)
    gain *= 1 / (1 + np.exp((frequency_hz - max_frequency_hz) / 40))
    return np.fft.irfft(np.fft.rfft(audio) * gain, len(audio))


def mu_law(audio):
    """Codes and decodes with 8 bits a sample, as a telephone line does (ITU-T G.711 with mu = 255)."""
    peak = np.abs(audio).max()
    coded = np.sign(audio) * np.log1p(255 * np.abs(audio) / peak) / np.log(256)
    coded = np.round(coded * 127) / 127
    return peak * np.sign(coded) * (256 ** np.abs(coded) - 1) / 255


def degrade(rng, audio):
    if rng.random() < 0.4:
        audio = reverberate(rng, audio)
    snr_db = rng.uniform(10, 45)
    audio = audio + np.sqrt(np.mean(audio**2)) * 10 ** (-snr_db / 20) * noise(rng, len(audio))
    narrow_band = rng.random() < 0.75
    audio = shape_spectrum(rng, audio, rng.uniform(3400, 3950) if narrow_band else 7900)
    if rng.random() < 0.15:
        audio = mu_law(audio)
    return audio


def make_row(job):
    """Writes one utterance and returns its metadata row."""
    folder, split, number, seed, extension = job
    rng = np.random.default_rng([seed, ["train", "validation", "test"].index(split), number])
    text, voice, degraded = draw_text(rng, split), draw_voice(rng, split), rng.random() < 2 / 3
    audio = speak_digits(espeak_of_this_process(), rng, text, voice, degraded)
    if degraded:
        audio = degrade(rng, audio)
    audio *= np.exp(rng.uniform(np.log(0.05 if degraded else 0.5), np.log(0.95))) / np.abs(audio).max()
    file_name = f"{number:05d}.{extension}"
    coding = {"subtype": "OPUS", "compression_level": OGG_COMPRESSION_LEVEL} if extension == "ogg" else {}
    soundfile.write(Path(folder) / split / file_name, audio, SAMPLING_RATE, format=extension.upper(), **coding)
    return file_name, text, voice, f"{len(audio) / SAMPLING_RATE:.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_train", type=int, default=600)
    parser.add_argument("--num_validation", type=int, default=60)
    parser.add_argument("--num_test", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=["flac", "ogg"], default="flac")
    args = parser.parse_args()
    if find_spec("espeakng_loader") is None:
        raise SystemExit("The package espeakng-loader is missing. Install it with `pip install espeakng-loader`.")

    with Pool(NUM_PROCESSES, maxtasksperchild=1) as pool:
        for split in ("train", "validation", "test"):
            (args.output_dir / split).mkdir(parents=True, exist_ok=True)
            numbers = range(getattr(args, f"num_{split}"))
            jobs = [(args.output_dir, split, number, args.seed, args.format) for number in numbers]
            rows = pool.map(make_row, jobs, chunksize=ROWS_PER_PROCESS)
            with open(args.output_dir / split / "metadata.csv", "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([("file_name", "text", "speaker", "duration"), *rows])
            print(f"{split}: {len(rows)} utterances, {sum(float(row[3]) for row in rows) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
