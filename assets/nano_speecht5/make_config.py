"""Writes the nano SpeechT5's configuration, tokenizer and feature extractor; the weights come from training.

    python assets/nano_speecht5/make_config.py --output_dir assets/nano_speecht5

A stock SpeechT5 in everything but size: 2 encoder and 3 decoder layers of width 128, and a tokenizer of small letters.
"""

import argparse
import io
import tempfile
from pathlib import Path

import sentencepiece
from transformers import SpeechT5Config, SpeechT5FeatureExtractor, SpeechT5Processor, SpeechT5Tokenizer

CHARACTERS = "abcdefghijklmnopqrstuvwxyz',.?!-"


def make_tokenizer():
    """Returns a character tokenizer whose special tokens have the ids that SpeechT5's configuration expects."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{c} {c}{c}" for c in CHARACTERS]),
        model_writer=model,
        model_type="char",
        vocab_size=4 + 1 + len(CHARACTERS),
        character_coverage=1.0,
        normalization_rule_name="identity",
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spm_char.model"
        path.write_bytes(model.getvalue())
        return SpeechT5Tokenizer(str(path))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True)
    output_dir = parser.parse_args().output_dir

    tokenizer = make_tokenizer()
    SpeechT5Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        hidden_dropout=0.05,
        attention_dropout=0.05,
        activation_dropout=0.05,
        positional_dropout=0.05,
        speech_decoder_prenet_units=128,
        speech_decoder_postnet_layers=3,
        speech_decoder_postnet_units=128,
        speech_decoder_postnet_dropout=0.1,
        reduction_factor=2,
        max_text_positions=200,
        max_speech_positions=400,
        architectures=["SpeechT5ForTextToSpeech"],
    ).save_pretrained(output_dir)
    SpeechT5Processor(SpeechT5FeatureExtractor(), tokenizer).save_pretrained(output_dir)


if __name__ == "__main__":
    main()
