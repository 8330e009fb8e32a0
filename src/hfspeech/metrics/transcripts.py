"""Word and character error rates, overall and by group, with the interval that says how far to trust them."""

import datasets
import evaluate
import jiwer
import numpy as np

from hfspeech.errors import UserError
from hfspeech.text import normalizer as normalizer_named

# Below this many speakers a resample is too often one speaker many times over: docs/metrics.md has the simulation.
MIN_SPEAKERS = 5

_INPUTS = """
Args:
    predictions (list of str): what was recognised, one text for each row.
    references (list of str): what was said, in the same order.
    normalizer (str or callable): laid over both sides first; see hfspeech.text.normalizer. Default: "none".
"""


class _Metric(evaluate.Metric):
    """A metric of two texts for each row."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )


class WordErrorRate(_Metric):
    """Word error rate: (substitutions + insertions + deletions) / reference words, over all rows together.

    Works offline, unlike `evaluate.load("wer")`, and gives the same rate. A row with an empty reference adds its
    insertions.

    >>> WordErrorRate().compute(predictions=["a b x"], references=["a b c d"])
    {'wer': 0.5, 'substitutions': 1, 'insertions': 0, 'deletions': 1, 'hits': 2}

    Raises:
        UserError: there is no row, or no reference holds a word.
    """

    def _compute(self, predictions, references, normalizer="none"):
        rate, counts = total_rate(jiwer.process_words, predictions, references, normalizer)
        return {"wer": rate, **counts}


class CharacterErrorRate(_Metric):
    """Character error rate: like the word error rate, but over characters (code points), spaces included.

    The rate to look at for languages written without spaces between words.

    >>> CharacterErrorRate().compute(predictions=["abx"], references=["abcd"])
    {'cer': 0.5, 'substitutions': 1, 'insertions': 0, 'deletions': 1, 'hits': 2}

    Raises:
        UserError: there is no row, or no reference holds a character.
    """

    def _compute(self, predictions, references, normalizer="none"):
        rate, counts = total_rate(jiwer.process_characters, predictions, references, normalizer)
        return {"cer": rate, **counts}


class SpeechErrorRates(_Metric):
    """Everything that `score` returns, for rows that come in batches: `add_batch(…)`, then `compute(speakers=…)`.

    `compute` takes the other arguments of `score`, with one entry for each row in the order in which rows were added.
    """

    def _compute(self, predictions, references, **options):
        return score(predictions, references, **options)


class TranscriptScore:
    """Scores rows of transcripts with `score`; what `SpeechTrainer` and `hfspeech evaluate` take as their metric.

    Args:
        processor: `WhisperProcessor`, for its language and its table of English spellings.
        group_columns: columns whose values get an error rate each, or None.
        name: text normaliser, as in `hfspeech.text.normalizer`; `auto` follows the language.

    Calling it with a list of rows (dicts with `text`, `prediction`, perhaps `speaker`, and the group columns) returns
    what `score` returns.
    """

    def __init__(self, processor, group_columns=None, name="auto"):
        tokenizer = processor.tokenizer
        language = "en" if tokenizer.task == "translate" else tokenizer.language or "en"  # of the text, not the speech
        self.normalizer = normalizer_named(name, language, tokenizer)
        self.group_columns = group_columns or []

    def __call__(self, rows):
        return score(
            [row["prediction"] for row in rows],
            [row["text"] for row in rows],
            speakers=[row.get("speaker") for row in rows],
            groups={column: [row.get(column) for row in rows] for column in self.group_columns},
            normalizer=self.normalizer,
        )


def score(
    predictions,
    references,
    speakers=None,
    groups=None,
    normalizer="basic",
    num_resamples=1000,
    seed=0,
    confidence=0.95,
) -> dict:
    """Measures how well `predictions` match `references`: overall, by group, raw and normalised, with intervals.

    Every rate is a fraction (0.153 for 15.3 %): the errors of all rows divided by their reference words. It can exceed
    1, because insertions count.

    The interval is a percentile bootstrap of that ratio. Whole speakers are drawn with replacement, since the rows of
    one speaker go right or wrong together; where fewer than `MIN_SPEAKERS` are known, or some row names none, single
    rows are drawn. The second interval speaks for *these* speakers only and is usually too narrow for new ones;
    `interval` says which one it is.

    Args:
        predictions: recognised texts, one for each row.
        references: spoken texts, in the same order.
        speakers: the speaker of each row, or None.
        groups: column name → the value of each row in that column, such as `{"accent": [...], "speaker": [...]}`.
        normalizer: a name from `hfspeech.text.normalizer`, or any function from text to text.
        num_resamples: bootstrap resamples; 1000 make the ends of the interval steady to a few per cent of its width.
        seed: the same seed gives the same interval.
        confidence: share of repeated tests whose interval would hold the true rate.

    Returns:
        - `wer`, `wer_low`, `wer_high`, `cer`, `cer_low`, `cer_high`: normalised rates and their intervals;
        - `substitutions`, `insertions`, `deletions`, `hits`, `words`: normalised words; `words` are reference words;
        - `rows`, and `empty_references`: rows whose reference holds nothing once normalised (their insertions count);
        - `raw_wer`, `raw_cer`: with case and punctuation as written (normaliser `none`);
        - `interval`: "bootstrap over N speakers" or "bootstrap over N rows"; `normalizer`: its name;
        - `groups`: column → value → the six rates, `rows`, `words` and `interval` of the rows with that value. Rates
          are None where the group has no reference word, bounds where a single row adds to the rate. Rows without a
          value are gathered under "unknown".

    Raises:
        UserError: there is no row, no reference holds a word, the lists differ in length, or an entry is not a text.

    Sources: Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation";
    whole speakers as blocks: Liu and Peng 2020, "Statistical testing on ASR performance via blockwise bootstrap".
    """
    groups = groups or {}
    speakers = None if speakers is None else list(speakers)
    _check(predictions, references, speakers=speakers, **groups)
    _check_resampling(num_resamples, confidence)
    clean, name = _resolve(normalizer)
    texts = _apply(clean, predictions), _apply(clean, references)
    words, characters = _align(jiwer.process_words, *texts), _align(jiwer.process_characters, *texts)
    _check_references(words)
    errors = np.hstack([_errors_and_lengths(words), _errors_and_lengths(characters)])
    hits, substitutions, insertions, deletions = words.sum(axis=0).tolist()

    def rates(rows):
        known = None if speakers is None else [speakers[row] for row in rows]
        return _rates(errors[rows], known, num_resamples, seed, confidence)

    return {
        **rates(range(len(references))),
        "substitutions": substitutions,
        "insertions": insertions,
        "deletions": deletions,
        "hits": hits,
        "empty_references": int((errors[:, 1] == 0).sum()),
        "raw_wer": total_rate(jiwer.process_words, predictions, references, "none")[0],
        "raw_cer": total_rate(jiwer.process_characters, predictions, references, "none")[0],
        "normalizer": name,
        "groups": {
            column: {value: rates(rows) for value, rows in rows_by_value(values).items()}
            for column, values in groups.items()
        },
    }


def paired_difference(
    predictions_a,
    predictions_b,
    references,
    speakers=None,
    normalizer="basic",
    num_resamples=1000,
    seed=0,
    confidence=0.95,
    metric="wer",
) -> dict:
    """Says whether system A makes fewer errors than system B on the same rows.

    Both systems are measured on the same resamples, so what makes a row hard for both cancels out; that finds
    differences which two overlapping intervals hide. Whole speakers are drawn where `score` would draw them.

    Args:
        predictions_a, predictions_b: what the systems recognised, one text for each row.
        metric: `wer` or `cer`.
        references, speakers, normalizer, num_resamples, seed, confidence: as in `score`.

    Returns:
        - `difference`: rate of A minus rate of B, a fraction: negative means A is better; `low` and `high`: its interval;
        - `p_value`: two-sided. Twice the smaller of (1 + resamples where the difference is not above 0) and (1 +
          those where it is not below 0), over 1 + all resamples, and 1 at most: the interval of that confidence would
          just touch 0. The 1 counts the test itself among the resamples, so that no p-value is 0. Like the interval it
          is somewhat too small below 20 speakers (`docs/metrics.md`);
        - `p_a_better`: share of resamples in which A has the lower rate, ties counted half; `interval` as in `score`.

    Raises:
        UserError: as `score`.

    Sources: Bisani and Ney 2004, where `p_a_better` is called the probability of improvement; the 1 in the p-value:
    Davison and Hinkley 1997, "Bootstrap methods and their application", section 4.2.
    """
    _check(predictions_a, references, predictions_b=predictions_b, speakers=speakers)
    _check(predictions_b, references)
    _check_resampling(num_resamples, confidence)
    clean, _ = _resolve(normalizer)
    process = {"wer": jiwer.process_words, "cer": jiwer.process_characters}[metric]
    a, b = (
        _align(process, _apply(clean, predictions), _apply(clean, references))
        for predictions in (predictions_a, predictions_b)
    )
    _check_references(a)
    counts = np.hstack([_errors_and_lengths(a), _errors_and_lengths(b)])
    return paired_ratios(counts, speakers, num_resamples, seed, confidence)


def paired_ratios(counts, speakers=None, num_resamples=1000, seed=0, confidence=0.95):
    """Compares two ratios of sums over the same rows; `paired_difference` has the result and the test.

    Args:
        counts: numbers of shape (rows, 4): numerator and denominator of A, and of B. For two means the denominators are 1.
        speakers, num_resamples, seed, confidence: as in `score`.
    """
    units, interval = _resampling_units(counts, speakers)
    drawn = _resample(units, num_resamples, seed)
    drawn = drawn[(drawn[:, 1] > 0) & (drawn[:, 3] > 0)]
    difference = drawn[:, 0] / drawn[:, 1] - drawn[:, 2] / drawn[:, 3]
    total = counts.sum(axis=0)
    low, high = _bounds(difference, confidence)
    least = min((difference <= 0).sum(), (difference >= 0).sum())
    return {
        "difference": float(total[0] / total[1] - total[2] / total[3]),
        "low": low,
        "high": high,
        "p_value": min(1.0, float(2 * (1 + least) / (1 + len(difference)))),
        "p_a_better": float((difference < 0).mean() + (difference == 0).mean() / 2),
        "interval": interval,
    }


def total_rate(process, predictions, references, normalizer):
    """Returns the error rate over all rows together, and the counts behind it, as a dict.

    Args:
        process: `jiwer.process_words` or `jiwer.process_characters`.
        predictions, references: as for `score`.
        normalizer: as for `score`.

    Raises:
        UserError: as `score`.
    """
    clean, _ = _resolve(normalizer)
    _check(predictions, references)
    counts = _align(process, _apply(clean, predictions), _apply(clean, references))
    _check_references(counts)
    hits, substitutions, insertions, deletions = counts.sum(axis=0).tolist()
    rate = (substitutions + insertions + deletions) / (hits + substitutions + deletions)
    return rate, dict(substitutions=substitutions, insertions=insertions, deletions=deletions, hits=hits)


def _apply(clean, texts):
    return [clean(text) for text in texts]


def _align(process, predictions, references):
    """Returns hits, substitutions, insertions and deletions of each row: integers of shape (rows, 4)."""
    columns = {"equal": 0, "substitute": 1, "insert": 2, "delete": 3}
    counts = np.zeros((len(references), 4), dtype=np.int64)
    for row, chunks in enumerate(process(references, predictions).alignments):
        for chunk in chunks:
            length = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
            counts[row, columns[chunk.type]] += length
    return counts


def _errors_and_lengths(counts):
    hits, substitutions, insertions, deletions = counts.T
    return np.stack([substitutions + insertions + deletions, hits + substitutions + deletions], axis=1)


def _rates(errors, speakers, num_resamples, seed, confidence):
    """Rates and intervals of some rows, from their word errors, words, character errors and characters."""
    (wer, cer), interval = ratios(errors, speakers, num_resamples, seed, confidence)
    result = {}
    for name, (rate, low, high) in (("wer", wer), ("cer", cer)):
        result |= {name: rate, f"{name}_low": low, f"{name}_high": high}
    return {**result, "words": int(errors[:, 1].sum()), "rows": len(errors), "interval": interval}


def ratios(counts, speakers=None, num_resamples=1000, seed=0, confidence=0.95):
    """Returns ratios of sums over rows with their bootstrap intervals; the resampling is that of `score`.

    Args:
        counts: numbers of shape (rows, 2 * ratios): numerator and denominator of the first ratio, of the second, and
            so on. A mean over the rows where something is known has a denominator of 1 there and 0 elsewhere.
        speakers, num_resamples, seed, confidence: as for `score`.

    Returns:
        (for each ratio (value, low, high), the name of the interval as in `score`). The value is None where the
        denominators sum to 0, the bounds also where one row or speaker alone adds to the ratio.
    """
    units, interval = _resampling_units(counts, speakers)
    drawn = _resample(units, num_resamples, seed)
    result = []
    for column in range(0, counts.shape[1], 2):
        numerator, length = counts[:, column : column + 2].sum(axis=0).tolist()
        spread = drawn[drawn[:, column + 1] > 0]  # a resample of nothing but empty references has no rate
        bounds = None, None
        if length and units[:, column : column + 2].any(axis=1).sum() > 1:
            bounds = _bounds(spread[:, column] / spread[:, column + 1], confidence)
        result.append((numerator / length if length else None, *bounds))
    return result, interval


def _resampling_units(counts, speakers):
    """Sums the counts of each speaker if there are enough of them, and names what an interval is resampled over."""
    if speakers is not None and not any(_is_missing(speaker) for speaker in speakers):
        names, of_row = np.unique([str(speaker) for speaker in speakers], return_inverse=True)
        if len(names) >= MIN_SPEAKERS:
            units = np.zeros((len(names), counts.shape[1]), dtype=counts.dtype)
            np.add.at(units, of_row, counts)
            return units, f"bootstrap over {len(names)} speakers"
    return counts, f"bootstrap over {len(counts)} rows"


def _resample(units, num_resamples, seed):
    """Draws as many units as there are, with replacement, and returns their sums: shape (num_resamples, columns)."""
    rng = np.random.default_rng(seed)
    block = max(1, 2**22 // len(units))  # bounds the matrix of draws to 32 MiB
    sizes = [min(block, num_resamples - start) for start in range(0, num_resamples, block)]
    shares = np.full(len(units), 1 / len(units))
    return np.concatenate([rng.multinomial(len(units), shares, size=size) @ units for size in sizes])


def _bounds(values, confidence):
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def rows_by_value(values):
    """Returns value → the numbers of the rows that have it, in order; rows without one are under "unknown"."""
    rows = {}
    for row, value in enumerate(values):
        rows.setdefault("unknown" if _is_missing(value) else str(value), []).append(row)
    return dict(sorted(rows.items()))


def _is_missing(value):
    return value is None or value == "" or value != value  # the last one is how tables mark an empty cell: NaN


def _resolve(normalizer):
    clean = normalizer if callable(normalizer) else normalizer_named(normalizer)
    return clean, getattr(clean, "__name__", type(clean).__name__)


def _check(predictions, references, **columns):
    for name, values in {"predictions": predictions, **columns}.items():
        if values is not None and len(values) != len(references):
            raise UserError(
                f"Scoring needs one entry for each row: {len(references)} references, but {len(values)} in {name}."
            )
    if len(references) == 0:
        raise UserError("There is nothing to score: the list of references is empty; check which split was loaded.")
    for name, texts in (("prediction", predictions), ("reference", references)):
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"Row {row}: the {name} is {text!r}, not a text; use an empty string for silence.")


def _check_resampling(num_resamples, confidence):
    if num_resamples < 100:
        raise UserError(f"num_resamples is {num_resamples}, too few for an interval: use 1000, and at least 100.")
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}, but must lie between 0 and 1: use 0.95 for 95 %.")


def _check_references(counts):
    if _errors_and_lengths(counts)[:, 1].sum() == 0:
        raise UserError(
            f"All {len(counts)} references are empty after normalising, so there is no error rate: "
            "check the text column, or choose another normalizer."
        )
