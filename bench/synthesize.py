"""How fast is speech made, beside transformers' own `generate_speech`?

    python bench/synthesize.py

Both arms use one model of random weights in the shape of microsoft/speecht5_tts whose stop token is switched off, so that
both make exactly `--frames` frames for each row. Before anything is timed they are given the same dropout masks and
their spectrograms are compared; `agreement` has the largest difference, in log10 mel, beside the spectrograms' own spread,
and how far the sound of a vocoder in bf16 is from that in fp32, as a share of it (root mean square).
`frames_per_s` counts the frames of all rows from texts to spectrograms, or to waveforms in the second half, which has
fewer frames and a HiFi-GAN of random weights. 62.5 frames are a second of speech.
"""

import argparse
import time
from functools import partial
from unittest import mock

import torch
import transformers
from arms import add_common_flags, alternate, print_table, summarise, write_record

from hfspeech.modeling.speech_generation import generate_spectrograms, prenet_masks
from hfspeech.models.vocoders import HifiGan

FRAMES_PER_SECOND = 62.5
COLUMNS = [
    ("frames_per_s", "frames/s", ".0f", 1, True),
    ("times_real_time", "times real time", ".2f", 1, False),
    ("seconds", "s", ".2f", 1, False),
]
AGREEMENT_FRAMES, TOLERANCE = 60, {"stock": 0.0, "ours_fp32": 1e-4, "ours": 2e-2}
VOCODER_TOLERANCE = 0.03  # 30 dB below the sound


def make_material(num_tokens, num_rows):
    """Returns a `SpeechT5ForTextToSpeech` that never stops, a `SpeechT5HifiGan`, and the inputs of so many rows."""
    torch.manual_seed(0)
    model = transformers.SpeechT5ForTextToSpeech(transformers.SpeechT5Config()).eval()
    vocoder = transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig()).eval()
    torch.nn.init.constant_(model.speech_decoder_postnet.prob_out.bias, -100)
    input_ids = torch.randint(4, model.config.vocab_size, (num_rows, num_tokens))
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "speaker_embeddings": torch.randn(num_rows, model.config.speaker_embedding_dim),
    }
    return model, vocoder, inputs


def ours(model, vocoder, inputs, maxlenratio, **options):
    spectrograms = [
        one.spectrogram for one in generate_spectrograms(model, **inputs, maxlenratio=maxlenratio, **options)
    ]
    return vocoder(spectrograms) if vocoder else spectrograms


def stock(model, vocoder, inputs, maxlenratio):
    with torch.no_grad():
        found, lengths = model.generate_speech(
            **inputs, vocoder=vocoder, maxlenratio=maxlenratio, return_output_lengths=True
        )
    return [row[:length] for row, length in zip(found, lengths)]


def agreement(model, inputs, maxlenratio):
    """Runs all arms with the masks of one seed in each row.

    Returns:
        arm → largest difference of its spectrograms from those of stock, and `spread`, their standard deviation.
    """
    seed, calls = 0, iter(range(10**9))
    masks = prenet_masks(model.config, AGREEMENT_FRAMES, torch.Generator().manual_seed(seed))

    def bernoulli(units, p):
        return masks[: len(units), next(calls) % masks.shape[1]].to(units)

    with mock.patch.object(torch, "bernoulli", bernoulli):
        expected = stock(model, None, inputs, maxlenratio)
    seeds = [seed] * len(inputs["input_ids"])
    found = {"stock": 0.0, "spread": torch.stack(expected).std().item()}
    for arm, half_precision in (("ours_fp32", False), ("ours", True)):
        rows = ours(model, None, inputs, maxlenratio, seeds=seeds, half_precision=half_precision)
        found[arm] = max((a - b).abs().max().item() for a, b in zip(rows, expected, strict=True))
        if found[arm] > TOLERANCE[arm]:
            raise SystemExit(f"{arm} differs from stock by {found[arm]:.2g} in log10 mel: nothing was timed.")
    return found


def vocoder_agreement(vocoder, exact_vocoder):
    """Returns the difference of two vocoders' sound, as a share of that of the second."""
    spectrogram = torch.randn(AGREEMENT_FRAMES, 80, generator=torch.Generator().manual_seed(0)) - 2
    found, expected = (torch.from_numpy(one([spectrogram])[0]) for one in (vocoder, exact_vocoder))
    difference = ((found - expected).norm() / expected.norm()).item()
    if difference > VOCODER_TOLERANCE:
        raise SystemExit(f"The sound in bf16 differs from that in fp32 by {difference:.2g} of it: nothing was timed.")
    return difference


def timed(run, num_rows, num_frames, samples_per_frame, folder, seed):
    torch.manual_seed(seed)
    began = time.perf_counter()
    rows = run()
    seconds = time.perf_counter() - began
    made = [len(row) // samples_per_frame for row in rows]
    if made != [num_frames] * num_rows:
        raise SystemExit(f"{made} frames instead of {num_frames} in each row.")
    frames_per_s = num_rows * num_frames / seconds
    return {"seconds": seconds, "frames_per_s": frames_per_s, "times_real_time": frames_per_s / FRAMES_PER_SECOND}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser, "synthesize.json")
    parser.add_argument("--arms", nargs="*", choices=list(TOLERANCE), default=["ours", "ours_fp32", "stock"])
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=100, help="characters of each text")
    parser.add_argument("--frames", type=int, default=400, help="of each row: 100 characters take about so many")
    parser.add_argument(
        "--vocoder_frames", type=int, default=100, help="of each row, with the vocoder; 0: leave it out"
    )
    parser.set_defaults(shape="base")
    args = parser.parse_args()

    args.work_dir.mkdir(parents=True, exist_ok=True)
    model, vocoder, inputs = make_material(args.tokens, max(args.batch_sizes))
    our_vocoder, exact_vocoder = HifiGan("random", vocoder), HifiGan("random", vocoder)
    exact_vocoder.in_bf16 = False
    summary, measurements = {}, {}
    agreements = {"vocoder": vocoder_agreement(our_vocoder, exact_vocoder)}
    for num_rows in args.batch_sizes:
        rows = {name: values[:num_rows] for name, values in inputs.items()}
        agreements[f"batch_{num_rows}"] = agreement(model, rows, AGREEMENT_FRAMES / args.tokens)
        for with_vocoder, num_frames in ((False, args.frames), (True, args.vocoder_frames)):
            if not num_frames:
                continue
            samples_per_frame = 256 if with_vocoder else 1
            theirs, own, exact = (vocoder, our_vocoder, exact_vocoder) if with_vocoder else (None, None, None)
            ratio = num_frames / args.tokens
            runs = {
                "ours": partial(ours, model, own, rows, ratio),
                "ours_fp32": partial(ours, model, exact, rows, ratio, half_precision=False),
                "stock": partial(stock, model, theirs, rows, ratio),
            }
            arms = {name: partial(timed, runs[name], num_rows, num_frames, samples_per_frame) for name in args.arms}
            name = f"batch_{num_rows}" + ("_vocoder" if with_vocoder else "")
            measurements[name] = alternate(arms, args.rounds, args.work_dir)
            summary[name] = summarise(measurements[name], [figure for figure, *_ in COLUMNS], ["stock"])
            title = f"{num_rows} rows of {args.tokens} tokens and {num_frames} frames"
            print_table(title + (", with vocoder" if with_vocoder else ""), summary[name], COLUMNS, ["stock"])
    write_record(args.output, args, agreement=agreements, summary=summary, measurements=measurements)


if __name__ == "__main__":
    main()
