"""`hfspeech transcribe`: what recordings of any length say, as text, JSON or subtitles."""

import contextlib
import json
import sys
from pathlib import Path

from tqdm import tqdm

from hfspeech.audio import BadAudio, decode, duration_s
from hfspeech.cli import AUDIO_SUFFIXES
from hfspeech.errors import UserError
from hfspeech.inference import transcribe
from hfspeech.models.loading import enough_memory, quiet_transformers
from hfspeech.models.whisper import load_for_inference
from hfspeech.runs import claim_folder

SUBTITLE_S = 8.0  # longest subtitle, so that it can be read at a glance


def run(args):
    """Transcribes the recordings; returns the exit code, 1 if one of them could not be read."""
    files = _audio_files(args.files)
    if args.format in ("srt", "vtt") and len(files) > 1 and not args.output_dir:
        raise UserError(f"{len(files)} recordings need a {args.format} file each: say where with --output_dir FOLDER.")
    if args.output_dir:
        claim_folder(args.output_dir)

    quiet_transformers()
    model, processor = load_for_inference(args.model, args.model_revision, args.language, args.task)
    broken, good, durations_s = [], [], {}
    for path in files:
        with contextlib.suppress(BadAudio, UserError):  # decoding says it again, and louder
            durations_s[path] = duration_s(path)
    bar = tqdm(total=round(sum(durations_s.values())), unit=" s", unit_scale=True, desc="transcribing", disable=None)

    def waveforms():
        for path in files:
            try:
                waveform = decode(path, processor.feature_extractor.sampling_rate)
            except (BadAudio, UserError) as reason:
                broken.append(path)
                bar.write(f"{path}: {reason}", file=sys.stderr)
                continue
            good.append(path)
            yield waveform

    found = transcribe(
        model,
        processor,
        waveforms(),
        args.batch_size,
        max_piece_s=SUBTITLE_S if args.format in ("srt", "vtt") else None,
        timestamps=args.timestamps,
        encoder_window=args.encoder_window,
        on_progress=bar.update,
    )
    with enough_memory(), bar:
        for number, segments in enumerate(found):
            path = good[number]
            if args.output_dir:
                target = args.output_dir / f"{files[path]}.{_FORMATS[args.format][0]}"
                _write(target, _FORMATS[args.format][1](path, segments))
            else:
                text = _FORMATS[args.format][1](path, segments)
                bar.clear()
                print(f"{path}: {text}" if args.format == "text" and len(files) > 1 else text, end="", flush=True)
    if broken:
        print(f"{len(broken)} of {len(files)} recordings could not be read.", file=sys.stderr)
    return 1 if broken else 0


def _audio_files(paths):
    """Returns recording → name of its output without suffix, for files and, recursively, for folders of them."""
    files = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"{path} holds no recording ({', '.join(AUDIO_SUFFIXES)}): give another folder.")
            files.update({p: p.relative_to(path).with_suffix("") for p in inside})
        elif path.exists():
            files[path] = Path(path.stem)
        else:
            raise UserError(f"There is no file or folder {path}: check its path (from here, {Path.cwd()}).")
    owners = {}
    for path, name in files.items():
        if name in owners:
            raise UserError(f"{owners[name]} and {path} would both be called {name}: transcribe them one by one.")
        owners[name] = path
    return files


def _as_text(path, segments):
    return " ".join(segment["text"] for segment in segments) + "\n"


def _as_json(path, segments):
    result = {"file": str(path), "text": _as_text(path, segments).strip(), "segments": segments}
    return json.dumps(result, ensure_ascii=False) + "\n"


def _as_srt(path, segments):
    return "".join(
        f"{number}\n{_clock(segment['start_s'], ',')} --> {_clock(segment['end_s'], ',')}\n{segment['text']}\n\n"
        for number, segment in enumerate(segments, 1)
    )


def _as_vtt(path, segments):
    cues = (f"{_clock(s['start_s'], '.')} --> {_clock(s['end_s'], '.')}\n{s['text']}\n\n" for s in segments)
    return "WEBVTT\n\n" + "".join(cues)


_FORMATS = {"text": ("txt", _as_text), "json": ("json", _as_json), "srt": ("srt", _as_srt), "vtt": ("vtt", _as_vtt)}


def _clock(seconds, point):
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def _write(path, text):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"Cannot write {path} ({error.strerror}): free some space, or choose another place with --output_dir."
        ) from None
