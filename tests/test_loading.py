"""Loading: every format and row form, and every way in which a row can be bad."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_fast.loading import (
    DataError,
    Example,
    Preference,
    Prompt,
    load_examples,
    load_preferences,
    load_prompts,
)

PAIRS = [
    {"prompt": "Hi,\nthere?", "chosen": 'Hello "you".', "rejected": "No.", "margin": 0.5},
    {"prompt": "Grüße?", "chosen": "Hallo, Welt", "rejected": "…", "margin": None},
]
LOADED = [
    Preference("Hi,\nthere?", 'Hello "you".', "No.", 0.5),
    Preference("Grüße?", "Hallo, Welt", "…", None),
]
TURN = "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: C?"


def jsonl(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows in the format that the suffix names."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix == ".csv":
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        jsonl(plain, rows)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return path


def message(load: Any, source: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(source)
    return str(caught.value)


@pytest.mark.parametrize(
    "suffix", ["jsonl", "json", "jsonl.gz", "json.gz", "csv", "csv.gz", "parquet"]
)
def test_every_format_gives_the_rows_written(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"pairs.{suffix}", PAIRS)
    assert load_preferences(path) == LOADED
    assert load_preferences(str(path)) == LOADED


def test_rows_in_memory_load_like_a_file() -> None:
    assert load_preferences(PAIRS) == LOADED
    assert load_preferences(iter(PAIRS)) == LOADED


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert [prompt.text for prompt in load_prompts(path)] == ["a", "b"]
    table = tmp_path / "p.csv"
    table.write_bytes(b"\xef\xbb\xbfprompt\r\na\r\n\r\nb\r\n")
    assert [prompt.text for prompt in load_prompts(table)] == ["a", "b"]


def test_a_csv_field_may_be_longer_than_the_csv_module_allows_by_default(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    text = "x" * (limit + 1)
    (tmp_path / "long.csv").write_text(f"text\n{text}\n")
    assert load_examples(tmp_path / "long.csv") == [Example("", text)]
    assert csv.field_size_limit() == limit


def test_transcripts_are_cut_at_the_last_answer() -> None:
    row = {"chosen": f"{TURN}\n\nAssistant: Yes.", "rejected": f"{TURN}\n\nAssistant: No."}
    prompt = f"{TURN}\n\nAssistant:"
    assert load_preferences([row]) == [Preference(prompt, " Yes.", " No.", None)]
    assert load_examples([row]) == [Example(prompt, " Yes.")]
    assert load_prompts([row]) == [Prompt(prompt, {"chosen": " Yes.", "rejected": " No."})]


def test_examples_come_from_completions_texts_and_chosen_answers() -> None:
    assert load_examples([{"prompt": "a", "completion": "b"}]) == [Example("a", "b")]
    assert load_examples([{"text": "abc"}]) == [Example("", "abc")]
    assert load_examples(["abc"]) == [Example("", "abc")]
    assert load_examples(PAIRS[:1]) == [Example("Hi,\nthere?", 'Hello "you".')]


def test_further_keys_of_a_prompt_are_its_columns() -> None:
    rows = [{"prompt": "a", "answer": 1, "tags": []}, {"prompt": "b", "answer": None, "tags": [2]}]
    first, second = load_prompts(rows)
    assert first == Prompt("a", {"answer": 1, "tags": []})
    assert second == Prompt("b", {"answer": None, "tags": [2]})
    assert load_prompts(["a"]) == [Prompt("a", {})]


def test_loaded_records_load_again() -> None:
    prompts = load_prompts([{"prompt": "a", "answer": 1}])
    examples, texts = load_examples([{"prompt": "a", "completion": "b"}]), load_examples(["t"])
    assert load_prompts(prompts) == prompts
    assert load_examples(examples) == examples
    assert load_examples(texts) == texts
    assert load_preferences(LOADED) == LOADED


GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
BAD_PAIRS = [
    ('{"prompt": "p", "chosen"', ["not JSON", '\'{"prompt": "p", "chosen"\'', "one JSON object"]),
    ('["p", "c"]', ["of type list", "['p', 'c']", "expected an object"]),
    ('"p"', ["the string 'p'", "write an object"]),
    ({"prompt": "p", "chosen": "c"}, ["no rejected", "{prompt, chosen}", "add the key"]),
    ({**GOOD, "chosen": None}, ["no chosen", "{prompt, rejected}", "add the key"]),
    ({**GOOD, "chosen": 3}, ["chosen is of type int", "(3)", "expected text"]),
    ({**GOOD, "chosen": [{"role": "user"}]}, ["of type list", "'role'", "chat template"]),
    ({**GOOD, "prompt": " \n"}, ["prompt is empty", r"' \n'", "remove the row"]),
    ({**GOOD, "chosen": ""}, ["chosen is empty", "''", "remove the row"]),
    ({**GOOD, "rejected": "\t"}, ["rejected is empty", r"'\t'", "remove the row"]),
    ({**GOOD, "rejected": "c"}, ["chosen and rejected are equal", "'c'", "remove the row"]),
    ({**GOOD, "chosen": "x\ud800"}, ["half of a surrogate pair", r"'x\ud800'", "remove it"]),
    ('{"prompt": "p", "chosen": "c", "rejected": "r", "margin": NaN}', ["margin is nan", "finite"]),
    ({**GOOD, "margin": "1"}, ["margin is '1'", "expected a number"]),
    ({**GOOD, "margin": True}, ["margin is True", "expected a number"]),
]


@pytest.mark.parametrize(("row", "parts"), BAD_PAIRS)
def test_a_bad_pair_is_named_by_line_value_and_remedy(
    tmp_path: Path, row: Any, parts: list[str]
) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", [GOOD, GOOD, row, GOOD])
    text = message(load_preferences, path)
    assert text.startswith(f"{path}:3: ")
    assert all(part in text for part in parts), text


TRANSCRIPT = {"chosen": f"{TURN}\n\nAssistant: Y", "rejected": f"{TURN}\n\nAssistant: N"}
BAD_TRANSCRIPTS = [
    ("chosen", "Yes.", ["chosen holds no '\\n\\nAssistant:'", "'Yes.'", "key prompt"]),
    ("chosen", f"{TURN}!\n\nAssistant: Y", ["differ", "character 37", "'!' against ''"]),
    ("chosen", f"{TURN}\n\nAssistant: ", ["chosen is empty", "' '", "remove the row"]),
    ("rejected", f"{TURN}\n\nAssistant:\n", ["rejected is empty", r"'\n'", "remove the row"]),
    ("rejected", f"{TURN}\n\nAssistant: Y", ["are equal", "' Y'", "remove the row"]),
]


@pytest.mark.parametrize(("key", "text", "parts"), BAD_TRANSCRIPTS)
def test_a_bad_pair_of_transcripts_is_named(key: str, text: str, parts: list[str]) -> None:
    found = message(load_preferences, [TRANSCRIPT, {**TRANSCRIPT, key: text}])
    assert found.startswith("row 2: ")
    assert all(part in found for part in parts), found


def test_transcripts_without_a_question_are_refused() -> None:
    row = {"chosen": "\n\nAssistant: Y", "rejected": "\n\nAssistant: N"}
    assert "the prompt before the last answer is empty ('')" in message(load_prompts, [row])


def test_prompts_do_not_need_good_answers() -> None:
    row = {"chosen": f"{TURN}\n\nAssistant: ", "rejected": f"{TURN}\n\nAssistant: N"}
    assert load_prompts([row])[0].text == f"{TURN}\n\nAssistant:"


BAD_EXAMPLES = [
    ({"prompt": "p"}, ["nothing to train on", "{prompt}", "{prompt, completion}"]),
    ({"completion": "c"}, ["no prompt", "{completion}", "add the key"]),
    ({"prompt": "p", "completion": " "}, ["completion is empty", "' '"]),
    ({"text": ""}, ["text is empty", "''"]),
    ({"text": "t", "prompt": "p", "completion": "c"}, ["both", "{text}", "drop the keys"]),
]


@pytest.mark.parametrize(("row", "parts"), BAD_EXAMPLES)
def test_a_bad_example_is_named(row: dict[str, Any], parts: list[str]) -> None:
    text = message(load_examples, [row])
    assert text.startswith("row 1: ")
    assert all(part in text for part in parts), text


def test_text_is_no_prompt() -> None:
    text = message(load_prompts, [{"text": "t"}])
    assert (
        text == "row 1: has no prompt, only {text}; add the key prompt; rename text to prompt "
        "if it is one"
    )


def test_strings_are_no_preferences() -> None:
    assert "row 1: is of type str ('a'); expected an object" in message(load_preferences, ["a"])


def test_the_first_row_of_another_form_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "mixed.jsonl", [{"text": "a"}, {"text": "b"}, GOOD])
    text = message(load_examples, path)
    assert text.startswith(f"{path}:3: has the keys {{prompt, chosen, rejected}}, but {path}:1 ")
    assert "{text}" in text and "same keys" in text


def test_a_missing_column_of_a_prompt_is_named() -> None:
    text = message(load_prompts, [{"prompt": "a", "answer": 1}, {"prompt": "b"}])
    assert text.startswith("row 2: has the keys {prompt}, but row 1 has {prompt, answer}")


def test_all_rows_are_checked_and_the_further_bad_ones_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", [GOOD, "{", GOOD, {**GOOD, "chosen": ""}, "[]"])
    text = message(load_preferences, path)
    assert text.startswith(f"{path}:2: not JSON")
    assert text.endswith("(2 more bad rows: 4, 5)")


def test_bad_rows_are_skipped_only_on_demand_and_with_a_warning(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", [GOOD, "{", GOOD, {**GOOD, "chosen": ""}])
    with pytest.warns(UserWarning, match=r"skipped 2 of 4 rows: .*pairs.jsonl:2: not JSON"):
        assert load_preferences(path, bad_rows="skip") == [Preference("p", "c", "r", None)] * 2
    with pytest.raises(DataError, match="bad_rows='drop' is unknown; choose 'error' or 'skip'"):
        load_preferences(path, bad_rows="drop")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_bad_utf8_is_named_by_line_and_byte(tmp_path: Path, suffix: str) -> None:
    content = b'{"prompt": "a"}\n{"prompt": "b\xff"}\n'
    path = tmp_path / f"p.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    text = message(load_prompts, path)
    assert text == f"{path}:2: not UTF-8 (byte 0xff at byte 14 of the line); save the file as UTF-8"


def test_csv_rows_are_named_by_the_line_they_begin_at(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a\nb\n\nc",d\n\n"e\nf",\ng,h\n')
    assert message(load_examples, path).startswith(f"{path}:7: completion is empty ('')")


BAD_CSV = [
    ("prompt\na\nb,c\n", 3, ["2 fields", "names 1 (prompt)", '"..."']),
    ('prompt\na\n"b\nc\n', 3, ["not CSV", "unexpected end of data"]),
    ('prompt\n"a"b\n', 2, ["not CSV", "expected after"]),
    ("prompt,prompt\na,b\n", 1, ["names {prompt} twice", "rename"]),
    ("prompt\na\nb\ufffd\udcff\n", 3, ["not UTF-8", "0xff"]),
]


@pytest.mark.parametrize(("content", "line", "parts"), BAD_CSV)
def test_a_broken_csv_is_named_by_line(
    tmp_path: Path, content: str, line: int, parts: list[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    text = message(load_prompts, path)
    assert text.startswith(f"{path}:{line}: ")
    assert all(part in text for part in parts), text


def test_a_margin_of_a_csv_must_be_a_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected,margin\np,c,r,1e-1\np,c,r,\np,c,r,much\n")
    assert message(load_preferences, path) == f"{path}:4: margin is 'much'; expected a number"
    path.write_text("prompt,chosen,rejected,margin\np,c,r,1e-1\np,c,r,\n")
    assert [pair.margin for pair in load_preferences(path)] == [0.1, None]


def test_parquet_rows_are_named_by_number(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": " "}])
    assert message(load_prompts, path).startswith(f"{path}: row 3: prompt is empty (' ')")
    path.write_bytes(b"PAR1 no more")
    assert f"{path}: not readable as Parquet after row 0" in message(load_prompts, path)


def test_a_cut_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 100)[:-9])
    assert f"{path}: not a whole gzip file" in message(load_prompts, path)
    path.write_bytes(b'{"prompt": "a"}\n')
    assert "rename it if it is not compressed" in message(load_prompts, path)


def test_a_source_that_is_no_source_is_refused(tmp_path: Path) -> None:
    class DataFrame(list[str]):
        """Iterates over the names of its columns, as the one of pandas does."""

        def iterrows(self) -> None: ...

    other = tmp_path / "rows.txt"
    other.touch()
    cases: list[tuple[Any, list[str]]] = [
        ("no/such.jsonl", ["'no/such.jsonl' is no file", "give the path", ".parquet"]),
        ("Anthropic/hh-rlhf", ["is no file", "datasets.load_dataset(name, split='train')"]),
        (str(tmp_path), ["is a folder", "give the path"]),
        (other, [str(other), "unknown suffix '.txt'", ".jsonl"]),
        ({"train": PAIRS}, ["of type dict", "data['train']"]),
        (DataFrame(PAIRS[0]), ["of type DataFrame", "to_dict('records')"]),
        (7, ["the data is 7", "iterable of rows"]),
    ]
    for source, parts in cases:
        text = message(load_preferences, source)
        assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("load", "what"),
    [(load_prompts, "prompts"), (load_examples, "examples"), (load_preferences, "preferences")],
)
def test_an_empty_source_is_refused(tmp_path: Path, load: Any, what: str) -> None:
    path = jsonl(tmp_path / "none.jsonl", ["", " "])
    assert message(load, path).startswith(f"no {what} in {path}; give at least one")
    assert message(load, []).startswith(f"no {what} in the given rows; give at least one")


HH = Path(__file__).parents[1] / ".." / "shared" / "data" / "hh_harmless_train.jsonl.gz"


@pytest.mark.skipif(not HH.is_file(), reason="shared data folder not found")
def test_bad_rows_of_real_transcripts_are_found_and_all_others_loaded() -> None:
    text = message(load_preferences, HH)
    assert text.startswith(f"{HH}:398: chosen is empty (' ')")
    assert text.endswith("(5 more bad rows: 572, 844, 857, 921, 1323)")
    with pytest.warns(UserWarning, match="skipped 6 of 1500 rows"):
        pairs = load_preferences(HH, bad_rows="skip")
    assert len(pairs) == 1494
    for pair in pairs:
        assert pair.prompt.startswith("\n\nHuman:") and pair.prompt.endswith("\n\nAssistant:")
        assert "\n\nHuman:" not in pair.chosen + pair.rejected
