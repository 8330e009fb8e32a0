"""Datasets of any origin as rows of one schema, filtered with an account and checked for leaks."""

from hfspeech.data.loading import SpeechSplits, load_speech, load_split
from hfspeech.data.rows import SpeechDataset

__all__ = ["SpeechDataset", "SpeechSplits", "load_speech", "load_split"]
