"""Writes the nano Whisper's configuration, tokenizer and feature extractor; the weights come from training.

    python assets/nano_whisper/make_config.py --output_dir assets/nano_whisper

A stock Whisper in everything but size: 3 encoder and 2 decoder layers of width 128, a window of 5 seconds, and a
byte-level vocabulary in which each digit word is one token.
"""

import argparse

from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

DIGITS = "zero one two three four five six seven eight nine".split()
WINDOW_S = 5
HOP_LENGTH = 320  # samples at 16 kHz: a mel frame every 20 ms, an encoder position every 40 ms


def make_tokenizer():
    """Returns a byte-level BPE tokenizer with one token for each digit word, with and without a leading space."""
    vocab = {symbol: index for index, symbol in enumerate(bytes_to_unicode().values())}
    merges = []
    for word in DIGITS:
        for symbols in (["Ġ", *word], list(word)):
            while len(symbols) > 1:
                # Right to left, so that " four" and "four" share their merges but " " is added last.
                pair = (symbols[-2], symbols[-1])
                symbols[-2:] = ["".join(pair)]
                if pair not in merges:
                    merges.append(pair)
                    vocab.setdefault("".join(pair), len(vocab))
    specials = ["<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>"]
    specials += ["<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokenizer = WhisperTokenizer(
        vocab=vocab, merges=merges, extra_special_tokens=specials, pad_token="<|endoftext|>", language="en"
    )
    tokenizer.add_tokens([f"<|{0.02 * step:.2f}|>" for step in range(WINDOW_S * 50 + 1)], special_tokens=False)
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True)
    output_dir = parser.parse_args().output_dir

    tokenizer = make_tokenizer()
    extractor = WhisperFeatureExtractor(chunk_length=WINDOW_S, hop_length=HOP_LENGTH)
    ids = tokenizer.convert_tokens_to_ids
    shared = {
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|endoftext|>"),
        "pad_token_id": ids("<|endoftext|>"),
        "decoder_start_token_id": ids("<|startoftranscript|>"),
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_source_positions=extractor.nb_max_frames // 2,
        max_target_positions=64,
        dropout=0.0,
        architectures=["WhisperForConditionalGeneration"],
        **shared,
    ).save_pretrained(output_dir)
    GenerationConfig(
        is_multilingual=True,
        lang_to_id={"<|en|>": ids("<|en|>")},
        task_to_id={"transcribe": ids("<|transcribe|>"), "translate": ids("<|translate|>")},
        no_timestamps_token_id=ids("<|notimestamps|>"),
        prev_sot_token_id=ids("<|startofprev|>"),
        language="en",
        task="transcribe",
        return_timestamps=False,
        max_length=64,
        **shared,
    ).save_pretrained(output_dir)
    WhisperProcessor(extractor, tokenizer).save_pretrained(output_dir)


if __name__ == "__main__":
    main()
