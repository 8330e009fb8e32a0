"""The text side of speech synthesis: text as it is spoken, and the characters that a tokenizer can take."""

from hfspeech.spelling.characters import add_characters
from hfspeech.spelling.front_end import TextFrontEnd, unknown_characters, unknown_report
from hfspeech.spelling.speller import spell_out

__all__ = ["TextFrontEnd", "add_characters", "spell_out", "unknown_characters", "unknown_report"]
