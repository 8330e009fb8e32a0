"""Makes what the benches run on, from nothing but this repository: speech of known length, and a model of a known shape.

    python bench/material.py --duration_s 5 --num_train 2000 --shape tiny --output_dir outputs/bench/material

Speech: the clips of assets/espeak_digits, joined and cut. Model: random weights in the shape of a published Whisper,
with a tokenizer of as many entries that needs about as many tokens for a second of speech as English does; or in the
shape of the published SpeechT5, with the nano SpeechT5's tokenizer of letters. Good for measuring speed and for nothing else.
"""

import argparse
import csv
import itertools
import json
import shutil
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
import torch
from transformers import (
    GenerationConfig,
    SpeechT5Config,
    SpeechT5ForTextToSpeech,
    SpeechT5Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.whisper.tokenization_whisper import LANGUAGES

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SAMPLING_RATE = 16000
SPLITS = ("train", "validation", "test")

# The configurations of openai/whisper-tiny, -small and -large-v3.
SHAPES = {
    "tiny": {"d_model": 384, "layers": 4, "heads": 6, "num_mel_bins": 80, "vocab_size": 51865},
    "small": {"d_model": 768, "layers": 12, "heads": 12, "num_mel_bins": 80, "vocab_size": 51865},
    "large-v3": {"d_model": 1280, "layers": 32, "heads": 20, "num_mel_bins": 128, "vocab_size": 51866},
}
# "base" is the library's default configuration, which has the size of microsoft/speecht5_tts.
SPEECHT5_SHAPES = {
    "base": {},
    "tiny": {
        "hidden_size": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "decoder_layerdrop": 0.0,  # transformers fails in the step that drops all, which with two of them it will
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 512,
        "decoder_ffn_dim": 512,
        "speech_decoder_prenet_units": 64,
        "speech_decoder_postnet_units": 64,
    },
}
NUM_BYTE_PAIRS = 50257  # of OpenAI's vocabulary; special tokens, languages and timestamps follow
# The joined clips have two digits a second. A digit word is one token, two with its space; where only these words swallow
# theirs there are about 3.2 tokens a second, as in English.
WORDS_WITH_SPACE = {"zero", "one", "two", "three", "four"}
CHARACTERS_PER_SECOND = 15  # of read English, spaces included
ENGLISH_WORDS = (
    "the of and to in a is that it was for on are with as his they at be this from have or by had not river garden "
    "morning window because between thought country another children"
).split()


def make_speech(folder, duration_s, num_train, num_validation=64, num_test=64, seed=0):
    """Writes an audiofolder of utterances of exactly `duration_s` seconds, FLAC at 16 kHz, unless it is there.

    Each is some clips of assets/espeak_digits of the same split, drawn at random, joined and cut; the transcript loses
    words as the last clip loses seconds. `metadata.csv` has the columns file_name and transcription.

    Returns:
        The folder, a `Path`.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for number, (split, count) in enumerate(zip(SPLITS, (num_train, num_validation, num_test))):
        (part / split).mkdir(parents=True)
        with Pool(initializer=_read_clips, initargs=(split,)) as pool:
            jobs = [(part / split / f"{row:05d}.flac", duration_s, [seed, number, row]) for row in range(count)]
            texts = pool.starmap(_write_utterance, jobs, chunksize=50)
        with open(part / split / "metadata.csv", "w", newline="") as file:
            rows = [(path.name, text) for (path, *_), text in zip(jobs, texts)]
            csv.writer(file, lineterminator="\n").writerows([("file_name", "transcription"), *rows])
    part.rename(folder)
    return folder


def make_text_and_speech(folder, least_s, most_s, num_train, seed=0):
    """Writes a corpus for speech synthesis, FLAC at 16 kHz, unless it is there.

    As `make_speech`, but utterances last from `least_s` to `most_s` seconds, evenly spread, and their text is English
    words at `CHARACTERS_PER_SECOND`, not what is said: nobody is to learn it. `metadata.parquet` of the splits train (
    `num_train` rows), validation and test (one each) has the columns file_name, text and speaker_embeddings, a random
    vector of 512 numbers and length 1 for each row.

    Returns:
        The folder, a `Path`.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for number, (split, count) in enumerate(zip(SPLITS, (num_train, 1, 1))):
        (part / split).mkdir(parents=True)
        rng = np.random.default_rng([seed, number])
        durations_s = rng.uniform(least_s, most_s, count)
        embeddings = rng.standard_normal((count, SpeechT5Config().speaker_embedding_dim), dtype=np.float32)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        jobs = [
            (part / split / f"{row:05d}.flac", duration_s, [seed, number, row])
            for row, duration_s in enumerate(durations_s)
        ]
        with Pool(initializer=_read_clips, initargs=(split,)) as pool:
            pool.starmap(_write_utterance, jobs, chunksize=50)
        columns = {
            "file_name": [path.name for path, *_ in jobs],
            "text": [_english_like(round(CHARACTERS_PER_SECOND * duration_s), rng) for duration_s in durations_s],
            "speaker_embeddings": list(embeddings),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), part / split / "metadata.parquet")
    part.rename(folder)
    return folder


def _english_like(num_characters, rng):
    """Returns words in random order that make a text of so many characters, the last word cut."""
    words = rng.choice(ENGLISH_WORDS, num_characters)
    return " ".join(words)[:num_characters].strip()


def _read_clips(split):
    global clips
    with open(ASSETS / "espeak_digits" / split / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    paths = [ASSETS / "espeak_digits" / split / row["file_name"] for row in rows]
    clips = [(soundfile.read(path, dtype="float32")[0], row["text"].split()) for path, row in zip(paths, rows)]


def _write_utterance(path, duration_s, seed):
    rng, pieces, words = np.random.default_rng(seed), [], []
    missing = round(duration_s * SAMPLING_RATE)
    while missing > 0:
        audio, text = clips[rng.integers(len(clips))]
        pieces.append(audio[:missing])
        words += text[: round(len(text) * len(pieces[-1]) / len(audio))]
        missing -= len(pieces[-1])
    soundfile.write(path, np.concatenate(pieces), SAMPLING_RATE, subtype="PCM_16")
    return " ".join(words)


def make_model(folder, shape="tiny", seed=0):
    """Writes a Whisper of random weights in a published shape, with its processor, unless it is there.

    A model of random weights may end a text anywhere. Its generation config forbids the end token, so that each text is
    as long as the limit that is given, and every arm of a bench generates the same number of tokens.

    Args:
        folder: where to.
        shape: a key of `SHAPES`.
        seed: of the weights.

    Returns:
        The folder, a `Path`.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    dimensions = SHAPES[shape]
    tokenizer = make_tokenizer(dimensions["vocab_size"])
    ids = tokenizer.convert_tokens_to_ids
    shared = {
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|endoftext|>"),
        "pad_token_id": ids("<|endoftext|>"),
        "decoder_start_token_id": ids("<|startoftranscript|>"),
    }
    layers, heads, width = dimensions["layers"], dimensions["heads"], dimensions["d_model"]
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=dimensions["num_mel_bins"],
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **shared,
    )
    generation = GenerationConfig(
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": ids(f"<|{code}|>") for code in LANGUAGES if f"<|{code}|>" in tokenizer.get_vocab()},
        task_to_id={task: ids(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids("<|notimestamps|>"),
        prev_sot_token_id=ids("<|startofprev|>"),
        suppress_tokens=[ids("<|endoftext|>")],
        begin_suppress_tokens=None,
        return_timestamps=False,
        max_length=config.max_target_positions,
        **shared,
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = generation
    model.save_pretrained(part)
    extractor = WhisperFeatureExtractor(feature_size=dimensions["num_mel_bins"])
    WhisperProcessor(extractor, tokenizer).save_pretrained(part)
    part.rename(folder)
    return folder


def make_speecht5(folder, shape="base", seed=0):
    """Writes a SpeechT5 of random weights with the nano SpeechT5's processor, unless it is there.

    Args:
        folder: where to.
        shape: a key of `SPEECHT5_SHAPES`.
        seed: of the weights.

    Returns:
        The folder, a `Path`.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    processor = SpeechT5Processor.from_pretrained(ASSETS / "nano_speecht5")
    torch.manual_seed(seed)
    config = SpeechT5Config(vocab_size=len(processor.tokenizer), **SPEECHT5_SHAPES[shape])
    SpeechT5ForTextToSpeech(config).save_pretrained(part)
    processor.save_pretrained(part)
    part.rename(folder)
    return folder


def make_tokenizer(vocab_size):
    """Returns a `WhisperTokenizer` of `vocab_size` entries, in OpenAI's order, that is good at digits.

    Bytes, the pairs that the nano Whisper's tokenizer joins into digit words, pairs that no English text has, then the
    special tokens and the timestamps.
    """
    symbols = bytes_to_unicode()
    saved = json.loads((ASSETS / "nano_whisper" / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [tuple(pair) for pair in saved["model"]["merges"]]
    merges = [pair for pair in merges if pair[0] != "Ġ" or pair[1] in WORDS_WITH_SPACE]
    tokens = [*symbols.values(), *("".join(pair) for pair in merges)]
    foreign = [symbols[byte] for byte in range(128, 256)]
    pairs = itertools.product(foreign, foreign)
    triples = (("".join(pair), symbol) for pair in itertools.product(foreign, foreign) for symbol in foreign)
    filling = list(itertools.islice(itertools.chain(pairs, triples), NUM_BYTE_PAIRS - len(tokens)))
    tokens += ["".join(pair) for pair in filling]
    num_languages = vocab_size - 51865 + 99  # large-v3 has one more
    specials = ["<|startoftranscript|>", *(f"<|{code}|>" for code in list(LANGUAGES)[:num_languages])]
    specials += [
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
        "<|startofprev|>",
        "<|nospeech|>",
        "<|notimestamps|>",
    ]
    tokenizer = WhisperTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges + filling,
        extra_special_tokens=specials,
        pad_token="<|endoftext|>",
    )
    tokenizer.add_tokens([f"<|{0.02 * step:.2f}|>" for step in range(1501)], special_tokens=False)
    if len(tokenizer) != vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries and not {vocab_size}")
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--duration_s", type=float, default=5)
    parser.add_argument("--num_train", type=int, default=2000)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print(
        make_speech(args.output_dir / f"speech_{args.duration_s:g}s_{args.num_train}", args.duration_s, args.num_train)
    )
    print(make_model(args.output_dir / args.shape, args.shape))


if __name__ == "__main__":
    main()
