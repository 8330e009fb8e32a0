"""How good is it: error rates of transcripts, and objective measures of synthesised speech, each with its interval."""

from hfspeech.metrics.synthesis import (
    SynthesisScore,
    align,
    log_f0,
    log_f0_rmse,
    mel_cepstra,
    mel_cepstral_distortion,
    repeated_and_skipped,
    stop_health,
)
from hfspeech.metrics.transcripts import (
    MIN_SPEAKERS,
    CharacterErrorRate,
    SpeechErrorRates,
    TranscriptScore,
    WordErrorRate,
    paired_difference,
    paired_ratios,
    score,
)

__all__ = [
    "MIN_SPEAKERS",
    "CharacterErrorRate",
    "SpeechErrorRates",
    "SynthesisScore",
    "TranscriptScore",
    "WordErrorRate",
    "align",
    "log_f0",
    "log_f0_rmse",
    "mel_cepstra",
    "mel_cepstral_distortion",
    "paired_difference",
    "paired_ratios",
    "repeated_and_skipped",
    "score",
    "stop_health",
]
