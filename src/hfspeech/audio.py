"""Recordings: decode them to 16 kHz mono, find the broken ones, read their duration, write them."""

import io
import os
import re
import stat
import struct
from fractions import Fraction

import numpy as np

from hfspeech.errors import UserError

SAMPLING_RATE = 16000
NOT_AUDIO = "not an audio file that libsndfile or FFmpeg can read"

# Block of samples read at once; FLAC fails at the block where the file was cut, which tells how much was there.
_BLOCK = 1 << 16
# Programs that write to a pipe leave a data size of this order in the header: it says nothing about the real one.
_STREAMED_SIZE = 0x7FFFF000
# A FLAC that was written to a pipe has no length in its header, where libsndfile says that it has more than these frames.
_UNKNOWN = 1 << 53
# What a header may claim: lower than telephones or higher than studios is a mistake, and would cost gigabytes.
_RATES = range(1000, 384_001)
# The resampler's filter grows with the terms of the ratio of two rates; those in use have smaller ones.
_LARGEST_TERM = 640
# Bytes at the beginning that hold the header of an ordinary WAV or FLAC file.
_HEAD = 4096
# How audio begins that FFmpeg may know better than libsndfile. It would also read playlists, and fetch what they name.
_STARTS = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM", b".snd", b"caff", b"wvpk", b"MAC ", b"ID3", b"\xff\xfb")
# A manifest rounds its times, so a segment may end this much after the recording does.
_SEGMENT_SLACK_S = 0.1


class BadAudio(Exception):
    """A recording that cannot be used; the message is a short reason such as `0 samples`."""


def decode(audio, sampling_rate=SAMPLING_RATE, offset_s=None, num_s=None):
    """Decodes a recording, or a segment of it, to mono at one sampling rate.

    WAV, FLAC, MP3, OGG and Opus need no system package (soundfile brings libsndfile); M4A, AAC and WebM go
    through torchcodec, which needs FFmpeg. Channels are averaged.

    Args:
        audio: the file's bytes, or its path.
        sampling_rate: of the result, in Hz.
        offset_s: start of the segment in seconds; None for the beginning.
        num_s: length of the segment in seconds; None for all that follows.

    Returns:
        float32 array of shape (samples,).

    Raises:
        BadAudio: the recording is empty, truncated, silent (all samples are zero), not finite or not audio. A file
            cut exactly between two Ogg pages, or an MP3 without a Xing header, cannot be told from a whole one.
        UserError: the format needs FFmpeg and torchcodec, and they are not there.
    """
    with _open(audio) as file:
        if file is None:
            waveform, from_rate = _decode_with_ffmpeg(audio)
            if offset_s is not None or num_s is not None:
                start = round((offset_s or 0) * from_rate)
                waveform = waveform[start : None if num_s is None else start + round(num_s * from_rate)]
        else:
            waveform, from_rate = _read(file, offset_s, num_s), file.samplerate
    if len(waveform) == 0:
        raise BadAudio("0 samples")
    if num_s is not None and len(waveform) < (num_s - _SEGMENT_SLACK_S) * from_rate:
        raise BadAudio(f"the segment of {num_s:g} s at {offset_s or 0:g} s ends after the recording does")
    if not np.isfinite(waveform).all():
        raise BadAudio("NaN or infinite samples")
    if not waveform.any():
        raise BadAudio("all samples are zero")
    return _resample(waveform, from_rate, sampling_rate)


def _resample(waveform, from_rate, to_rate):
    """Brings a waveform to another rate; a ratio such as 44,101 to 16,000 is rounded, by less than 1 in 1,000."""
    if from_rate == to_rate:
        return waveform
    import torch
    import torchaudio.functional

    ratio = Fraction(from_rate, to_rate).limit_denominator(_LARGEST_TERM)
    return torchaudio.functional.resample(torch.from_numpy(waveform), ratio.numerator, ratio.denominator).numpy()


def duration_s(audio):
    """Reads the duration of a recording in seconds from its header, without decoding it.

    Args:
        audio: the file's bytes, or its path.

    Raises:
        BadAudio: the header shows that the recording is empty, truncated or not audio.
        UserError: the format needs FFmpeg and torchcodec, and they are not there.
    """
    seconds = _plain_duration_s(*_head(audio))
    if seconds is not None:
        return seconds
    with _open(audio) as file:
        if file is None:
            seconds = _ffmpeg_decoder(audio).metadata.duration_seconds
            if not seconds:
                waveform, rate = _decode_with_ffmpeg(audio)
                seconds = len(waveform) / rate
            return float(seconds)
        num_frames = sum(map(len, _blocks(file))) if file.frames >= _UNKNOWN else file.frames
        if num_frames == 0:
            raise BadAudio("0 samples")
        return num_frames / file.samplerate


def sampling_rate_of(audio):
    """Reads a recording's own sampling rate in Hz from its header; None where only FFmpeg can tell.

    Args:
        audio: the file's bytes, or its path.

    Raises:
        BadAudio, UserError: as `duration_s`.
    """
    with _open(audio) as file:
        return file and file.samplerate


def log_mel_spectrogram(waveform, feature_extractor):
    """Returns the spectrogram that SpeechT5 learns to write: what its feature extractor makes, many times faster.

    Args:
        waveform: float array or tensor of shape (samples,) at the extractor's sampling rate.
        feature_extractor: `SpeechT5FeatureExtractor`.

    Returns:
        float32 tensor of shape (1 + samples // hop, num_mel_bins): log10 of the mel magnitudes, at least
        log10(mel_floor).

    Source: `transformers.audio_utils.spectrogram` as `SpeechT5FeatureExtractor` calls it.
    """
    import torch

    e = feature_extractor
    waveform = torch.as_tensor(waveform).double()  # in single precision the softest bands drown in rounding
    if len(waveform) <= e.n_fft // 2:  # too short to be mirrored at its ends
        waveform = torch.nn.functional.pad(waveform, (0, e.n_fft // 2 + 1 - len(waveform)))
    window, mel_filters = torch.as_tensor(e.window), torch.as_tensor(e.mel_filters)
    magnitudes = torch.stft(
        waveform, e.n_fft, e.sample_stride, e.sample_size, window, center=True, pad_mode="reflect", return_complex=True
    ).abs()
    return (magnitudes.T @ mel_filters).clamp(min=e.mel_floor).log10().float()


def write(path, waveform, sampling_rate=SAMPLING_RATE):
    """Writes a waveform (floats in [-1, 1], shape (samples,)) to a file, in the format that its suffix names.

    Args:
        path: such as `answer.wav`; folders on the way are made.
        waveform: array or tensor of shape (samples,).
        sampling_rate: in Hz.

    Raises:
        UserError: the suffix names no format that libsndfile writes.
    """
    import soundfile

    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    suffix = os.path.splitext(path)[1].lstrip(".").upper()
    format, subtype = ("OGG", "OPUS") if suffix == "OPUS" else (suffix, None)
    if format not in soundfile.available_formats():
        raise UserError(f"{path}: cannot write audio with the suffix .{suffix.lower()}; use .wav, .flac or .mp3.")
    waveform = np.asarray(waveform)
    with soundfile.SoundFile(path, "w", sampling_rate, 1, format=format, subtype=subtype) as file:
        for start in range(0, len(waveform), _BLOCK):  # libsndfile crashes on minutes of Vorbis at once
            file.write(waveform[start : start + _BLOCK])


class _open:
    """Opens a recording with libsndfile as a context; gives None where it is FFmpeg's turn."""

    def __init__(self, audio):
        self.audio = audio
        self.file = None

    def __enter__(self):
        import soundfile

        head, size = _head(self.audio)
        if head[:4] == b"OggS":
            _check_last_ogg_page(self.audio, size)
        try:
            is_path = isinstance(self.audio, (str, os.PathLike))
            self.file = soundfile.SoundFile(os.fspath(self.audio) if is_path else _Content(self.audio))
        except soundfile.LibsndfileError:
            known = head[:4] in (b"RIFF", b"RF64", b"fLaC", b"OggS")
            if known and size < 4096:
                raise BadAudio(f"truncated: only {size} bytes") from None
            container = _ffmpeg_container(head)
            if container is None and (_torchcodec() is None or not head.startswith(_STARTS)):
                raise BadAudio(NOT_AUDIO) from None
            if _torchcodec() is None:
                raise UserError(
                    f"{container} audio needs FFmpeg and torchcodec: install them with "
                    "`apt install ffmpeg` (or `conda install ffmpeg`, `brew install ffmpeg`) and "
                    "`pip install torchcodec`, or convert the files to FLAC."
                ) from None
            return None
        try:
            _check_header(self.file)
        except BadAudio:
            self.file.close()
            raise
        return self.file

    def __exit__(self, *_):
        if self.file is not None:
            self.file.close()


class _Content(io.BytesIO):
    """Bytes in which a damaged header may send libsndfile before the beginning: it stays where it is."""

    def seek(self, offset, whence=os.SEEK_SET):
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _head(audio):
    """Returns the first bytes of a recording, and how many it has in all."""
    if isinstance(audio, (bytes, bytearray, memoryview)):
        head, size = bytes(audio[:_HEAD]), len(audio)
    elif audio is None:
        raise BadAudio("neither bytes nor a path")
    else:
        try:
            status = os.stat(audio)
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                raise BadAudio("not a file")
            with open(audio, "rb", buffering=0) as file:
                head, size = file.read(_HEAD), status.st_size
        except (FileNotFoundError, ValueError):  # or a name that no file can have
            raise BadAudio("no such file") from None
        except OSError as error:
            raise BadAudio(f"cannot be read ({error.strerror})") from None
    if size == 0:
        raise BadAudio("0 bytes")
    return head, size


def _plain_duration_s(head, size):
    """Reads the duration of an ordinary whole WAV or FLAC file, ten times as fast as libsndfile; None for any other.

    The layouts: the RIFF chunks `fmt ` and `data`; RFC 9639, section 8 (FLAC's STREAMINFO).
    """
    if head[:4] == b"RIFF" and head[8:16] == b"WAVEfmt " and len(head) >= 44:
        start = 12
        while head[start : start + 4] != b"data":
            (chunk_size,) = struct.unpack_from("<I", head, start + 4)
            start += 8 + chunk_size + chunk_size % 2
            if start + 8 > len(head) or head[start : start + 4] not in (b"data", b"LIST", b"fact", b"PEAK"):
                return None
        (riff_size,), (data_size,) = struct.unpack_from("<I", head, 4), struct.unpack_from("<I", head, start + 4)
        tag, channels, rate, _, frame_size, bits = struct.unpack_from("<HHIIHH", head, 20)
        is_pcm = (tag, bits) in ((1, 8), (1, 16), (1, 24), (1, 32), (3, 32)) and 8 * frame_size == channels * bits > 0
        is_whole = riff_size + 8 == size and start + 8 + data_size <= size
        if is_pcm and is_whole and rate in _RATES and data_size >= frame_size:
            return data_size // frame_size / rate
    elif head[:4] == b"fLaC" and head[5:8] == b"\0\0\x22":  # the first block is STREAMINFO, of 34 bytes
        start, is_last = 4, False
        while not is_last and start + 4 <= len(head):
            is_last = head[start] >= 0x80
            start += 4 + int.from_bytes(head[start + 1 : start + 4], "big")
        rate_to_frames = int.from_bytes(head[18:26], "big")  # 20 bits of rate, 8 of channels and depth, 36 of frames
        rate, num_frames = rate_to_frames >> 44, rate_to_frames & ((1 << 36) - 1)
        if is_last and start < size and rate in _RATES and num_frames:
            return num_frames / rate
    return None


def _check_header(file):
    """Finds what libsndfile notes but forgives: a data chunk that is longer than the file (WAV, W64, RF64, AIFF)."""
    _check_rate(file.samplerate)
    log = file.extra_info
    if found := re.search(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", log):
        says, has = (int(group) for group in found.groups())
        if has < says < _STREAMED_SIZE:
            samples = round(says * file.frames / has) if has else says
            raise BadAudio(f"truncated: header says {samples} samples, {file.frames} decoded")
    if found := re.search(r"frame count (\d+) does not match value from 'ds64' chunk of (\d+)", log):
        raise BadAudio(f"truncated: header says {found[2]} samples, {found[1]} decoded")
    if "riff : " in log and re.search(r"riff : \d+ \(should be", log):
        raise BadAudio("truncated: the file is shorter than its header says")


def _check_rate(rate):
    if rate not in _RATES:
        raise BadAudio(f"a sampling rate of {rate} Hz, which is not one of speech")


def _check_last_ogg_page(audio, size):
    """Raises BadAudio if the last Ogg page is incomplete; libsndfile reads such a file as if it ended earlier.

    The page's layout is in RFC 3533, section 6: 27 bytes, then the number of segments named in the last of them,
    then the segments, each as long as its entry says. A page has at most 65,307 bytes.
    """
    if isinstance(audio, (bytes, bytearray, memoryview)):
        tail = bytes(audio[-65_307:])
    else:
        with open(audio, "rb") as file:
            file.seek(max(0, size - 65_307))
            tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    num_segments = page[26] if len(page) > 26 else 0
    page_size = 27 + num_segments + sum(page[27 : 27 + num_segments])
    if len(page) < 27 + num_segments or len(page) < page_size:
        raise BadAudio("truncated: the last Ogg page is incomplete")


def _read(file, offset_s, num_s):
    """Reads a segment of an open SoundFile as mono float32 at the file's own rate."""
    blocks = list(_blocks(file, offset_s, num_s))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def _blocks(file, offset_s=None, num_s=None):
    """Yields a segment of an open SoundFile block by block, so that memory goes by what is there and not what is said."""
    import soundfile

    start = round((offset_s or 0) * file.samplerate)
    if start >= file.frames > 0:
        raise BadAudio(f"the segment at {offset_s:g} s starts after the recording ends")
    wanted = file.frames - start if num_s is None else min(round(num_s * file.samplerate), file.frames - start)
    if file.frames >= _UNKNOWN:  # soundfile seeks to the end of what it has read, which libsndfile cannot find there
        file.seekable = lambda: False
    num_read, block_size = 0, max(1, _BLOCK // file.channels)
    try:
        if start:
            file.seek(start)
        while num_read < wanted:
            block = file.read(min(block_size, wanted - num_read), dtype="float32", always_2d=True)
            if len(block) == 0:
                break
            num_read += len(block)
            yield block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
    except soundfile.LibsndfileError:
        raise BadAudio(f"truncated: header says {file.frames} samples, {start + num_read} decoded") from None
    if num_read < wanted and file.frames < _UNKNOWN:
        raise BadAudio(f"truncated: header says {file.frames} samples, {start + num_read} decoded")


def _ffmpeg_container(head):
    """Names the format of a file that only FFmpeg reads, from its first bytes; None if they say nothing."""
    if head[4:8] == b"ftyp":
        return "M4A/MP4"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "WebM"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "AAC"
    if head[:16] == bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"):
        return "WMA"
    return "AMR" if head[:5] == b"#!AMR" else None


def _torchcodec():
    """Returns torchcodec's AudioDecoder, or None where it or FFmpeg is missing."""
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, RuntimeError, OSError):
        return None
    return AudioDecoder


def _ffmpeg_decoder(audio):
    try:
        return _torchcodec()(bytes(audio) if isinstance(audio, (bytearray, memoryview)) else audio, num_channels=1)
    except (RuntimeError, ValueError):
        raise BadAudio(NOT_AUDIO) from None


def _decode_with_ffmpeg(audio):
    try:
        samples = _ffmpeg_decoder(audio).get_all_samples()
    except RuntimeError as error:
        raise BadAudio(f"truncated or damaged ({str(error).splitlines()[0]})") from None
    _check_rate(samples.sample_rate)
    return samples.data.mean(dim=0).numpy(), samples.sample_rate
