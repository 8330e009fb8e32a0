"""Measures how often a 95 % interval of the error rate holds the true rate, by how many speakers were tested.

    python docs/interval_coverage.py    # about a minute; writes docs/interval_coverage.json

Simulated: speakers whose error rates scatter around 15 % by 10 points, 20 rows of 10 words each.
"""

from pathlib import Path

import numpy as np

from hfspeech.metrics import score
from hfspeech.runs import environment, write_json

TRUE_WER, SCATTER, ROWS, WORDS = 0.15, 0.10, 20, 10
SPEAKERS = [2, 3, 5, 10, 20, 40]
TESTS = 200


def simulate(rng, num_speakers):
    """Returns predictions, references and speakers of one test; errors are substitutions."""
    total = TRUE_WER * (1 - TRUE_WER) / SCATTER**2 - 1  # of the beta distribution with that mean and deviation
    rates = rng.beta(TRUE_WER * total, (1 - TRUE_WER) * total, size=num_speakers)
    wrong = rng.random((num_speakers, ROWS, WORDS)) < rates[:, None, None]
    predictions = [" ".join("x" if w else "a" for w in row) for speaker in wrong for row in speaker]
    return predictions, [" ".join("a" * WORDS)] * len(predictions), np.repeat(np.arange(num_speakers), ROWS).tolist()


def coverage(num_speakers, by_speaker):
    """Returns the share of tests whose interval holds the true rate."""
    rng, held = np.random.default_rng(num_speakers), 0
    for test in range(TESTS):
        predictions, references, speakers = simulate(rng, num_speakers)
        found = score(
            predictions, references, speakers if by_speaker else None, normalizer="none", num_resamples=500, seed=test
        )
        held += found["wer_low"] <= TRUE_WER <= found["wer_high"]
    return held / TESTS


def main():
    import hfspeech.metrics.transcripts

    hfspeech.metrics.transcripts.MIN_SPEAKERS = 2  # to see what happens where the rule would already draw rows
    result = {
        "environment": environment(),
        "tests": TESTS,
        "by_speaker": {str(n): coverage(n, True) for n in SPEAKERS},
        "by_row": {str(n): coverage(n, False) for n in SPEAKERS},
    }
    write_json(Path(__file__).with_suffix(".json"), result)


if __name__ == "__main__":
    main()
