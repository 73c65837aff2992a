import json
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import texts, tiny_tokenizer

from fastforget.matrix import upstream as module
from fastforget.matrix.upstream import load_upstream


@pytest.fixture(autouse=True)
def token_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFORGET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path, tokenizer, **settings):
    return load_upstream(path, tokenizer, **({"max_length": None} | settings))


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def targets(examples, j=0):
    return examples.tokens[j][examples.first_target[j] :].tolist()


# Targets


def test_of_a_text_every_token_but_the_first_is_a_target(tmp_path, tokenizer):
    examples = load(write(tmp_path / "a.jsonl", [{"text": "the import statement"}]), tokenizer)
    assert examples.tokens[0].tolist() == [1, *plain(tokenizer, "the import statement")]  # <s>, as the tokenizer does
    assert targets(examples) == plain(tokenizer, "the import statement")
    assert examples.texts == ["the import statement"]


def test_without_a_beginning_token_the_first_token_is_still_no_target(tmp_path, tokenizer):
    bare = tiny_tokenizer()
    bare.backend_tokenizer.post_processor = None
    examples = load(
        write(tmp_path / "a.jsonl", [{"text": "the import"}, {"prompt": "", "response": "the import"}]), bare
    )
    for j in range(2):
        assert examples.tokens[j].tolist() == plain(tokenizer, "the import")
        assert targets(examples, j) == plain(tokenizer, "the import")[1:]


@pytest.mark.parametrize("eos", [False, True])
def test_of_prompt_and_response_only_the_response_is_a_target(tmp_path, tokenizer, eos):
    # Tokenised apart: together, "im" + "port" would be the one token "import".
    path = write(tmp_path / "a.jsonl", [{"prompt": "the im", "response": "port statement"}])
    examples = load(path, tokenizer, eos=eos)
    answer = plain(tokenizer, "port statement") + [2] * eos
    assert examples.tokens[0].tolist() == [1, *plain(tokenizer, "the im"), *answer]
    assert targets(examples) == answer
    assert examples.texts == ["the import statement"]


def test_of_messages_the_last_assistant_turn_through_its_end_is_the_target(tmp_path, tokenizer):
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Bye"),
        ("assistant", " So long "),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    # What follows the last assistant turn cannot count, and is left out.
    path = write(tmp_path / "a.jsonl", [{"messages": [*messages, {"role": "user", "content": "Still there?"}]}])
    examples = load(path, tokenizer, eos=True)  # eos is for `response`; a template has its own end
    context = (
        "<|system|>Be brief.<|end|>\n<|user|>Hi<|end|>\n<|assistant|>Hello<|end|>\n<|user|>Bye<|end|>\n<|assistant|>"
    )
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert examples.tokens[0].tolist() == [*plain(tokenizer, context), *plain(tokenizer, " So long "), end]
    assert targets(examples) == [*plain(tokenizer, " So long "), end]


def test_a_template_without_an_end_keeps_the_white_space_of_the_turn(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "Hello \n"}]
    examples = load(write(tmp_path / "a.jsonl", [{"messages": messages}]), tokenizer)
    assert targets(examples) == plain(tokenizer, "Hello \n")


def test_long_examples_are_cut_on_the_right_and_counted(tmp_path, tokenizer):
    rows = [{"text": texts()[0]}, {"prompt": "a b", "response": texts()[0]}, {"text": "short"}]
    examples = load(write(tmp_path / "a.jsonl", rows), tokenizer, max_length=12)
    assert examples.truncated == 2
    assert examples.tokens[0].tolist() == tokenizer(texts()[0])["input_ids"][:12]
    context = [1, *plain(tokenizer, "a b")]
    assert examples.tokens[1].tolist() == (context + plain(tokenizer, texts()[0]))[:12]
    assert examples.targets.tolist() == [11, 12 - len(context), len(plain(tokenizer, "short"))]


# Sources


def test_every_format_gives_the_same_examples(tmp_path, tokenizer):
    lines = [text.replace("\n", " ") for text in texts()[:5]]
    rows = [{"text": line} for line in lines]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "lines.json", rows)
    (tmp_path / "array.json").write_text(json.dumps(rows))
    (tmp_path / "a.txt").write_text("\r\n\n".join(lines) + "\n\n", encoding="utf-8-sig")
    pq.write_table(pa.table({"text": lines, "other": range(5)}), tmp_path / "a.parquet")
    wanted = load(tmp_path / "a.jsonl", tokenizer)
    for name in ("lines.json", "array.json", "a.txt", "a.parquet"):
        found = load(tmp_path / name, tokenizer)
        assert (found.ids, found.texts, found.fingerprint) == (wanted.ids, wanted.texts, wanted.fingerprint), name
        assert all(np.array_equal(a, b) for a, b in zip(found.tokens, wanted.tokens, strict=True)), name


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\u0085three"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load(path, tokenizer).texts == ["one\u2028two\u0085three"]


def test_messages_in_parquet_carry_nulls_that_do_not_count(tmp_path, tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "name": "x"}]},
        {"messages": None, "text": "plain text"},
    ]
    table = pa.table({name: [row.get(name) for row in rows] for name in ("messages", "text")})
    pq.write_table(table, tmp_path / "a.parquet")
    from_parquet, from_json = (
        load(tmp_path / "a.parquet", tokenizer),
        load(write(tmp_path / "a.jsonl", rows), tokenizer),
    )
    assert from_parquet.texts == ["<|user|>Hi<|end|>\n<|assistant|>Hello<|end|>", "plain text"]
    assert from_parquet.ids == from_json.ids
    assert from_parquet.fingerprint == from_json.fingerprint


def test_a_folder_of_datasets_is_read_with_its_split(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": texts()[:3]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "rest": one.select([2])}).save_to_disk(tmp_path / "dict")
    assert load(tmp_path / "one", tokenizer).texts == texts()[:3]
    assert load(tmp_path / "dict", tokenizer, split="rest").texts == texts()[2:3]
    with pytest.raises(ValueError, match=r"split: expected one of train, rest, got test; choose a split"):
        load(tmp_path / "dict", tokenizer, split="test")


# Ids


def test_ids_are_kept_or_made_from_the_content(tmp_path, tokenizer):
    rows = [{"id": 7, "text": "a b"}, {"id": "x", "text": "a b"}, {"text": "a b"}, {"text": "c d"}, {"text": "a b"}]
    ids = load(write(tmp_path / "a.jsonl", rows), tokenizer).ids
    assert ids[:2] == ["7", "x"]
    assert len(ids[2]) == 16
    assert ids[4] == f"{ids[2]}#2"
    assert ids[3] not in ids[2]
    # The content's id does not depend on where the row stands.
    assert load(write(tmp_path / "b.jsonl", rows[3:4]), tokenizer).ids == ids[3:4]


def test_duplicate_ids_name_both_rows(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"id": 1, "text": "a b"}, {"text": "c d"}, {"id": "1", "text": "e f"}])
    with pytest.raises(
        ValueError, match=r"expected unique ids, got '1' at a\.jsonl line 1 and again at a\.jsonl line 3"
    ):
        load(path, tokenizer)


# Rows without a target


def test_rows_without_targets_are_refused_by_id_or_skipped(tmp_path, tokenizer):
    rows = [
        {"id": "kept", "text": "some text"},
        {"id": "empty", "text": ""},
        {"id": "no-answer", "prompt": "question", "response": ""},
        {"id": "long-prompt", "prompt": texts()[0], "response": "answer"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    message = r"got 3 rows without one: empty \(a\.jsonl line 2\), no-answer .*, long-prompt .*; remove .*--skip-empty"
    with pytest.raises(ValueError, match=message):
        load(path, tokenizer, max_length=16)
    examples = load(path, tokenizer, max_length=16, skip_empty=True)
    assert examples.ids == ["kept"]
    assert examples.skipped == ["empty", "no-answer", "long-prompt"]
    assert examples.truncated == 0  # what is left out is not counted as cut
    with pytest.raises(ValueError, match="expected at least one row with a target token, got none"):
        load(write(tmp_path / "b.jsonl", rows[1:3]), tokenizer, skip_empty=True)


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "expected at least one row, got none"),
        ("empty.txt", "\n \n", "expected at least one row, got none"),
        ("array.json", "[]", "expected at least one row, got none"),
        ("bad.jsonl", '{"text": "a b"}\n{"text": ', r"bad\.jsonl line 2: expected a JSON object, got Expecting value"),
        ("bad.json", '[{"text": 1', r"expected JSON, got .* in .*bad\.json; correct the file"),
        ("list.jsonl", '["a"]', "line 1: expected a JSON object, got list"),
        (
            "none.jsonl",
            '{"body": "a b"}',
            "line 1: expected text, or prompt and response, or messages, got none of them",
        ),
        ("both.jsonl", '{"text": "a", "prompt": "b", "response": "c"}', "got prompt, response, text"),
        ("half.jsonl", '{"prompt": "b", "response": null}', "got prompt; correct the row"),
        ("type.jsonl", '{"text": 3}', "line 1: expected text to be a string, got int"),
        ("id.jsonl", '{"text": "a b", "id": 1.5}', r"expected id to be a string or an integer, got 1\.5"),
        ("roles.jsonl", '{"messages": ["hi"]}', "expected messages to be a list of objects with role and content"),
        ("user.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "expected an assistant turn .* got none"),
        ("data.csv", "text\na b\n", r"expected a file ending in \.jsonl, \.json, \.parquet, \.txt, got .*data\.csv"),
        ("torn.parquet", "PAR1 and then nothing", r"cannot read .*torn\.parquet"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, tokenizer, token_cache, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / name, tokenizer)
    assert str(caught.value).startswith("upstream: ")
    assert not token_cache.exists()


def test_more_bad_sources_are_refused_by_name(tmp_path, tokenizer):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"cannot read .*latin\.txt: .*write it again, text as UTF-8"):
        load(tmp_path / "latin.txt", tokenizer)
    with pytest.raises(ValueError, match=r"expected an existing file, got .*absent\.jsonl; check the path"):
        load(tmp_path / "absent.jsonl", tokenizer)
    pq.write_table(pa.table({"body": ["a b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="expected a column named text, prompt and response, or messages, got body"):
        load(tmp_path / "a.parquet", tokenizer)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"cannot load the data set .*folder"):
        load(tmp_path / "folder", tokenizer)


def test_chat_templates_that_do_not_fit_are_refused_by_row(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}],
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match=r"a\.jsonl line 1: expected a chat template that renders the turns before"):
        load(path, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"line 1: the base's chat template cannot render .*roles must alternate"):
        load(path, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"line 1: the base's chat template cannot render .*write prompt and response"):
        load(path, tokenizer)


def test_eos_needs_an_end_of_sequence_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos: expected a tokenizer with an end-of-sequence token, got none"):
        load(write(tmp_path / "a.jsonl", [{"text": "a b"}]), tokenizer, eos=True)


# The cache


def test_the_same_content_is_tokenised_once(tmp_path, tokenizer, token_cache, monkeypatch):
    calls = []
    real = module._tokenise
    monkeypatch.setattr(module, "_tokenise", lambda *args: calls.append(1) or real(*args))
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts()[:4]])
    first = load(path, tokenizer, max_length=20)
    path.rename(tmp_path / "b.jsonl")
    again = load(tmp_path / "b.jsonl", tokenizer, max_length=20)
    assert len(calls) == 1
    assert all(np.array_equal(a, b) for a, b in zip(first.tokens, again.tokens, strict=True))
    assert (first.truncated, first.ids) == (again.truncated, again.ids)
    load(tmp_path / "b.jsonl", tokenizer, max_length=19)
    load(tmp_path / "b.jsonl", tokenizer, max_length=20, eos=True)
    load(tmp_path / "b.jsonl", tiny_tokenizer(vocabulary=400), max_length=20)
    assert len(calls) == 4
    for file in token_cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert all(
        np.array_equal(a, b)
        for a, b in zip(first.tokens, load(tmp_path / "b.jsonl", tokenizer, max_length=20).tokens, strict=True)
    )
    assert len(calls) == 5


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTFORGET_CACHE", str(tmp_path / "file" / "cache"))
    path = write(tmp_path / "a.jsonl", [{"text": "a b"}])
    with pytest.warns(UserWarning, match="token cache could not be written"):
        assert load(path, tokenizer).texts == ["a b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setenv("FASTFORGET_CACHE", str(tmp_path / "cache"))
        load(path, tokenizer)


def test_an_empty_prompt_and_response_has_no_target(tmp_path, tokenizer):
    path = write(
        tmp_path / "a.jsonl", [{"prompt": "", "response": "", "id": "nothing"}, {"prompt": "a", "response": " b"}]
    )
    with pytest.raises(ValueError, match="nothing"):
        load(path, tokenizer)
    assert len(load(path, tokenizer, skip_empty=True).ids) == 1
