"""Training data from files and from memory, every row checked before training starts.

A source is a path (JSON lines or CSV, each also gzipped, or Parquet) or an iterable of dicts
(a `datasets.Dataset` is one), of plain strings, or of records that were loaded before. Row forms:

    {prompt, chosen, rejected[, margin]}   a preference
    {chosen, rejected}                     a preference as two transcripts in the form of HH-RLHF
    {prompt, completion}                   an example
    {text}                                 an example that is trained on from its first token
    {prompt}                               a prompt; further keys become columns of the reward

A source holds one form. Rows of files are named by the line they begin at, all others by their
number, counted from 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from os.path import commonprefix
from typing import Any, TypeVar

from rlhf_fast._rows import DataError, Source, kind, names, rows_of, short

__all__ = ["DataError", "Example", "Preference", "Prompt", "Source"]
__all__ += ["load_examples", "load_preferences", "load_prompts"]

ASSISTANT = "\n\nAssistant:"
"""What the last answer of an HH-RLHF transcript begins with (github.com/anthropics/hh-rlhf)."""

_Record = TypeVar("_Record")
_Values = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt to answer; `columns` holds the row's other keys, passed to reward functions."""

    text: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One text to imitate; with an empty `prompt` every token of `completion` is trained on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the better one first; `margin` says by how much, if known."""

    prompt: str
    chosen: str
    rejected: str
    margin: float | None


def load_prompts(
    source: Source,
    *,
    bad_rows: str = "error",
    check: Callable[[Prompt], object] | None = None,
) -> list[Prompt]:
    """Loads prompts from rows with a `prompt`, from HH transcripts, or from plain strings.

    Of a pair of transcripts the shared part is the prompt, and the two answers are its columns
    `chosen` and `rejected`. Only the prompt is checked: columns are the reward function's matter.

    Args:
        source: A path or an iterable, see the module's docstring.
        bad_rows: "error" refuses the source, "skip" leaves bad rows out with a warning.
        check: Called with each record; a `ValueError` that it raises makes the row a bad one.

    Raises:
        DataError: For a source that cannot be read, is empty, or has a bad row.
    """
    return _load(source, "prompts", "prompt", _prompt_form, _prompt, bad_rows, check)


def load_examples(
    source: Source,
    *,
    bad_rows: str = "error",
    check: Callable[[Example], object] | None = None,
) -> list[Example]:
    """Loads examples for SFT; of preferences the chosen answers, of plain strings the texts.

    Args and errors are those of `load_prompts`.
    """
    return _load(source, "examples", "text", _example_form, _example, bad_rows, check)


def load_preferences(
    source: Source,
    *,
    bad_rows: str = "error",
    check: Callable[[Preference], object] | None = None,
) -> list[Preference]:
    """Loads preference pairs; transcripts are cut at the last `ASSISTANT` of each.

    The prompt keeps `ASSISTANT`, the answers keep the space that follows it. Args and errors are
    those of `load_prompts`.
    """
    return _load(source, "preferences", None, _preference_form, _preference, bad_rows, check)


def _load(
    source: Source,
    what: str,
    string_key: str | None,
    form_of: Callable[[_Values], tuple[str, ...]],
    convert: Callable[[_Values], _Record],
    bad_rows: str,
    check: Callable[[_Record], object] | None,
) -> list[_Record]:
    if bad_rows not in ("error", "skip"):
        raise DataError(f"bad_rows={bad_rows!r} is unknown; choose 'error' or 'skip'")
    name, rows = rows_of(source)
    records: list[_Record] = []
    errors: list[tuple[str, ValueError]] = []
    first: tuple[str, tuple[str, ...]] | None = None
    for place, row in rows:
        try:
            values = _values(row, string_key)
            form = form_of(values)
            first = first or (place, form)
            if form != first[1]:
                raise DataError(
                    f"has the keys {names(form)}, but {first[0]} has {names(first[1])}; "
                    "give every row of a source the same keys"
                )
            record = convert(values)
            if check is not None:
                check(record)
            records.append(record)
        except ValueError as error:
            errors.append((place, error))
    if errors:
        summary = f"{errors[0][0]}: {errors[0][1]}"
        if len(errors) > 1:
            places = [place.removeprefix(f"{name}:").strip() for place, _ in errors[1:6]]
            dots = ", ..." if len(errors) > 6 else ""
            summary += f" ({len(errors) - 1} more bad rows: {', '.join(places)}{dots})"
        if bad_rows == "error":
            raise DataError(summary)
        total = len(errors) + len(records)
        warnings.warn(f"skipped {len(errors)} of {total} rows: {summary}", stacklevel=3)
    if not records:
        raise DataError(f"no {what} in {name}; give at least one usable row")
    return records


# What a row means.


def _prompt_form(values: _Values) -> tuple[str, ...]:
    columns = tuple(sorted((key for key in values if key != "prompt"), key=str))
    if values.get("prompt") is not None:
        return ("prompt", *columns)
    if values.get("chosen") is not None and values.get("rejected") is not None:
        return columns
    hint = "; rename text to prompt if it is one" if "text" in values else ""
    raise DataError(f"has no prompt, only {_given(values)}; add the key prompt{hint}")


def _prompt(values: _Values) -> Prompt:
    if values.get("prompt") is not None:
        columns = {key: value for key, value in values.items() if key != "prompt"}
        return Prompt(_text(values, "prompt"), columns)
    prompt, chosen, rejected = _split_transcripts(values)
    columns = {key: value for key, value in values.items() if key != "prompt"}
    return Prompt(prompt, columns | {"chosen": chosen, "rejected": rejected})


def _example_form(values: _Values) -> tuple[str, ...]:
    forms = ("prompt", "completion"), ("text",), ("chosen", "rejected")
    marks = [form for form in forms if values.get(form[-1]) is not None]
    if len(marks) > 1:
        raise DataError(
            f"has both {names(marks[0])} and {names(marks[1])}; drop the keys not to be trained on"
        )
    if not marks:
        raise DataError(
            f"has nothing to train on, only {_given(values)}; "
            "give {prompt, completion}, {text} or {prompt, chosen, rejected}"
        )
    return _preference_form(values) if marks[0] == forms[2] else _required(values, *marks[0])


def _example(values: _Values) -> Example:
    if values.get("text") is not None:
        return Example("", _text(values, "text"))
    if values.get("completion") is not None:
        return Example(_text(values, "prompt"), _text(values, "completion"))
    preference = _preference(values)
    return Example(preference.prompt, preference.chosen)


def _preference_form(values: _Values) -> tuple[str, ...]:
    required = _required(values, "chosen", "rejected")
    return required if values.get("prompt") is None else ("prompt", *required)


def _preference(values: _Values) -> Preference:
    if values.get("prompt") is None:
        prompt, chosen, rejected = _split_transcripts(values)
        _not_empty("chosen", chosen)
        _not_empty("rejected", rejected)
    else:
        prompt, chosen, rejected = (_text(values, k) for k in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise DataError(
            f"chosen and rejected are equal ({short(chosen)}); a pair needs two different "
            "answers, remove the row"
        )
    margin = values.get("margin")
    if margin is None:
        return Preference(prompt, chosen, rejected, None)
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise DataError(f"margin is {short(margin)}; expected a number")
    if not math.isfinite(margin):
        raise DataError(f"margin is {margin}; expected a finite number")
    return Preference(prompt, chosen, rejected, float(margin))


def _split_transcripts(values: _Values) -> tuple[str, str, str]:
    parts = {}
    for key in ("chosen", "rejected"):
        before, mark, answer = _text(values, key).rpartition(ASSISTANT)
        if not mark:
            raise DataError(
                f"{key} holds no {ASSISTANT!r} ({short(values[key])}), so its prompt cannot be "
                "told from its answer; give the prompt in a key prompt of its own"
            )
        parts[key] = before, answer
    (prompt, chosen), (other, rejected) = parts["chosen"], parts["rejected"]
    if prompt != other:
        at = len(commonprefix([prompt, other]))
        raise DataError(
            f"the transcripts differ before their last {ASSISTANT!r}, at character {at} "
            f"({short(prompt[at:])} against {short(other[at:])}); both must answer one prompt, "
            "remove or correct the row"
        )
    _not_empty("the prompt before the last answer", prompt)
    return prompt + ASSISTANT, chosen, rejected


def _values(row: object, string_key: str | None) -> _Values:
    if isinstance(row, DataError):
        raise row
    if isinstance(row, str) and string_key is not None:
        return {string_key: row}
    if isinstance(row, Prompt):
        return {"prompt": row.text, **row.columns}
    if isinstance(row, Example) and not row.prompt:
        return {"text": row.completion}
    if isinstance(row, Example | Preference):
        return asdict(row)
    if not isinstance(row, Mapping):
        raise DataError(f"is {kind(row)} ({short(row)}); expected an object with named values")
    return row


def _given(values: _Values) -> str:
    return names(key for key, value in values.items() if value is not None)


def _required(values: _Values, *keys: str) -> tuple[str, ...]:
    if missing := [key for key in keys if values.get(key) is None]:
        raise DataError(f"has no {' and no '.join(missing)}, only {_given(values)}; add the key")
    return keys


def _text(values: _Values, key: str) -> str:
    value = values[key]
    if not isinstance(value, str):
        hint = " (a chat template makes text of a list of messages)"
        raise DataError(
            f"{key} is {kind(value)} ({short(value)}); expected text"
            f"{hint if isinstance(value, list) else ''}"
        )
    _not_empty(key, value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{key} holds half of a surrogate pair ({short(value)}), which no tokenizer takes; "
            "remove it"
        ) from error
    return value


def _not_empty(name: str, value: str) -> None:
    if not value.strip():
        raise DataError(f"{name} is empty ({short(value)}); write some text or remove the row")
