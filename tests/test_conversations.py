"""The demo's data: labels on the assistant's words alone, cuts between turns, one-line errors."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from conversations import IGNORED, Collator, InputError, read, tokenise  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, so that every cut can be read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    fast.chat_template = TEMPLATE
    return fast


def talk(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def written(tmp_path, rows, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def rows_of(tmp_path, tokenizer, messages, max_length=1000):
    return list(tokenise(read(written(tmp_path, [{"messages": messages}])), tokenizer, max_length))


def test_labels_cover_what_the_assistant_says_and_its_end(tmp_path, tokenizer):
    (row,) = rows_of(tmp_path, tokenizer, talk("hi", "hello there", "bye", "so long", system="be kind"))
    assert labelled(row, tokenizer) == "hello there</s>so long</s>"
    assert all(label in (IGNORED, token) for token, label in zip(*row.values(), strict=True))


def test_a_long_conversation_is_cut_before_a_users_turn_and_keeps_its_system_message(tmp_path, tokenizer):
    messages = talk("a" * 20, "b" * 20, "c" * 20, "d" * 20, "e" * 20, "f" * 20, system="s")
    rows = rows_of(tmp_path, tokenizer, messages, max_length=160)
    texts = [tokenizer.decode(row["input_ids"]) for row in rows]
    assert len(rows) == 2
    assert all(text.startswith("<system>s</s>\n<user>") for text in texts)
    assert "".join(labelled(row, tokenizer) for row in rows).count("</s>") == 3


def test_rows_without_an_assistants_word_are_left_out(tmp_path, tokenizer):
    path = written(tmp_path, [{"messages": talk("only a question")}, {"messages": talk("one", "two")}])
    assert len(tokenise(read(path), tokenizer, 1000)) == 1
    with pytest.raises(InputError, match="nothing to learn within --max-length 4"):
        tokenise(read(path), tokenizer, 4)


def test_text_rows_are_labelled_throughout(tmp_path, tokenizer):
    rows = tokenise(read(written(tmp_path, [{"text": "abcdef"}])), tokenizer, 4)
    assert rows[0]["labels"] == rows[0]["input_ids"] and len(rows[0]["labels"]) == 4


def test_parquet_is_read_like_json_lines(tmp_path, tokenizer):
    rows = read(written(tmp_path, [{"text": "abc"}]))
    rows.to_parquet(tmp_path / "data.parquet")
    assert read(tmp_path / "data.parquet")["text"] == ["abc"]


def test_padding_goes_right_to_a_multiple_and_has_no_labels():
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = Collator(padding=9, multiple=4)(rows)
    assert torch.equal(batch["input_ids"], torch.tensor([[1, 2, 3, 9], [4, 9, 9, 9]]))
    assert torch.equal(batch["labels"][1], torch.tensor([4, IGNORED, IGNORED, IGNORED]))


def test_the_default_conversations_alternate_between_user_and_assistant():
    messages = read(None)[0]["messages"]
    assert [m["role"] for m in messages[:2]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "no such file: .*gone.jsonl"),
        ("data.csv", "a,b", "data.csv ends in '.csv'; known are .json, .jsonl, .parquet"),
        ("data.jsonl", '{"question": "why?"}\n', "needs a column 'messages' or 'text'; it has question"),
        ("data.jsonl", "not json\n", "not readable as json"),
        ("data.parquet", "not parquet\n", "not readable as parquet"),
        ("data.jsonl", "", "data.jsonl"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_template_is_refused_for_chat(tmp_path, tokenizer):
    tokenizer.chat_template = None
    try:
        with pytest.raises(InputError, match="no chat template"):
            rows_of(tmp_path, tokenizer, talk("hi", "ho"))
    finally:
        tokenizer.chat_template = TEMPLATE


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}"
    try:
        with pytest.raises(InputError, match="rewrites earlier turns"):
            rows_of(tmp_path, tokenizer, talk("hi", "ho", "he", "ha"))
    finally:
        tokenizer.chat_template = TEMPLATE
