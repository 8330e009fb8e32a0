"""Makes the beginnings of a nano Whisper with a window of 30 seconds, which is what published ones have.

    python bench/wide_whisper.py --output_dir outputs/wide

It has the weights of the shipped nano Whisper, whose window is 5 seconds: what an encoder adds to each position is a
sinusoid, which only has to be continued. `bench/wide_whisper.yaml` then trains it, padded to the full window.
"""

import argparse
from pathlib import Path

from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.modeling_whisper import sinusoids

NANO = Path(__file__).resolve().parents[1] / "assets/nano_whisper"
WINDOW_S = 30


def widened(nano):
    """Returns (model, processor) with the weights of the model in a folder and a window of 30 seconds."""
    processor = WhisperProcessor.from_pretrained(nano)
    settings = {name: getattr(processor.feature_extractor, name) for name in ("feature_size", "hop_length", "n_fft")}
    processor.feature_extractor = WhisperFeatureExtractor(chunk_length=WINDOW_S, **settings)
    narrow = WhisperForConditionalGeneration.from_pretrained(nano)
    config = narrow.config
    config.max_source_positions = processor.feature_extractor.nb_max_frames // 2
    model = WhisperForConditionalGeneration(config)
    positions = sinusoids(config.max_source_positions, config.d_model)
    model.load_state_dict({**narrow.state_dict(), "model.encoder.embed_positions.weight": positions})
    model.generation_config = narrow.generation_config
    return model, processor


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    output_dir = parser.parse_args().output_dir
    for part in widened(NANO):
        part.save_pretrained(output_dir)


if __name__ == "__main__":
    main()
