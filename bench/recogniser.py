"""A recogniser that has nothing to do with what is measured: pocketsphinx with its own model, told to expect digits."""

import tempfile
from pathlib import Path

import numpy as np

GRAMMAR = """#JSGF V1.0;
grammar digits;
public <string> = ( zero | one | two | three | four | five | six | seven | eight | nine )+ ;
"""


class DigitRecogniser:
    """Writes down digit strings. Its grammar lets nonsense come out as digits, so nonsense scores 90 to 100 % WER.

    Calling it with a list of float32 waveforms (16 kHz) returns a list of texts.
    """

    def __init__(self):
        from pocketsphinx import Config, Decoder

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "digits.gram"
            path.write_text(GRAMMAR)
            self.decoder = Decoder(Config(jsgf=str(path), loglevel="FATAL"))

    def __call__(self, waveforms):
        return [self._hear(waveform) for waveform in waveforms]

    def _hear(self, waveform):
        # Half a second of a quiet room around the words, 64 dB under full scale; digital silence misleads it.
        samples = np.pad(np.clip(waveform, -1, 1) * 32767, 8000)
        samples = samples + 20 * np.random.default_rng(0).standard_normal(len(samples))
        samples = samples.clip(-32768, 32767).astype(np.int16)
        self.decoder.start_utt()
        self.decoder.process_raw(samples.tobytes(), full_utt=True)
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return found.hypstr if found else ""
