"""Turns conversations into token rows whose labels cover what the assistant says, and nothing else.

A row of a data file has either ``messages``, a list of ``{"role": ..., "content": ...}``, or ``text``.
Without a file, the conversations come from the PyPI package chitchat-dataset: seven thousand talks of two.
"""

import importlib.util
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid

IGNORED = -100
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what, and what would do."""


def read(path: Path | None) -> Dataset:
    """The rows of a local JSON Lines or Parquet file, or chitchat's where ``path`` is None."""
    if path is None:
        return Dataset.from_list(_chitchat())
    if not path.is_file():
        raise InputError(f"--data: no such file: {path}")
    if path.suffix not in READERS:
        raise InputError(f"--data: {path.name} ends in {path.suffix!r}; known are {', '.join(READERS)}.")
    if path.stat().st_size == 0:
        raise InputError(f"--data: {path.name} is empty.")
    reader = READERS[path.suffix]
    try:
        rows = load_dataset(reader, data_files=str(path), split="train")
    except (DatasetGenerationError, ArrowInvalid) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"--data: {path.name} is not readable as {reader}: {cause}") from error
    if not {"messages", "text"} & set(rows.column_names):
        raise InputError(
            f"--data: {path.name} needs a column 'messages' or 'text'; it has {', '.join(rows.column_names)}."
        )
    if len(rows) == 0:
        raise InputError(f"--data: {path.name} has no rows.")
    return rows


def tokenise(rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Rows of ``input_ids`` and ``labels``, at most ``max_length`` long, at least one label in each.

    A conversation that is too long is cut between turns into several rows, each beginning with a user's turn.
    """
    chat = "messages" in rows.column_names
    if chat and not tokenizer.chat_template:
        raise InputError(
            "--model: its tokenizer has no chat template; give data with a 'text' column instead."
        )
    encode = _encode_chat if chat else _encode_text
    column = "messages" if chat else "text"

    def batch(values: dict[str, list]) -> dict[str, list]:
        encoded = [row for value in values[column] for row in encode(value, tokenizer, max_length)]
        useful = [row for row in encoded if any(label != IGNORED for label in row["labels"][1:])]
        return {name: [row[name] for row in useful] for name in ("input_ids", "labels")}

    done = rows.map(batch, batched=True, batch_size=32, remove_columns=rows.column_names, desc="Tokenising")
    if len(done) == 0:
        raise InputError(
            f"--data: nothing to learn within --max-length {max_length}: no assistant turn fits."
        )
    return done


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right to one length, a multiple of ``multiple``.

    No attention mask is made: under causal attention no token sees the padding to its right, and padding has
    no label. So the graph keeps plain causal attention.
    """

    padding: int
    multiple: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.multiple) * self.multiple

        def padded(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([row[name] + [filler] * (length - len(row[name])) for row in rows])

        return {"input_ids": padded("input_ids", self.padding), "labels": padded("labels", IGNORED)}


def _chitchat() -> list[dict[str, list[dict[str, str]]]]:
    package = importlib.util.find_spec("chitchat_dataset")
    if package is None or not package.submodule_search_locations:
        raise InputError("--data: none given, and the package chitchat-dataset is not installed.")
    file = Path(package.submodule_search_locations[0]) / "dataset.json"
    talks = []
    for talk in json.loads(file.read_text()).values():
        turns = [" ".join(line["text"] for line in turn) for turn in talk["messages"]]
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
        if len(messages) >= 2:
            talks.append({"messages": messages})
    return talks


def _encode_text(text: str, tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    ids = tokenizer(text)["input_ids"][:max_length]
    return [{"input_ids": ids, "labels": list(ids)}]


def _encode_chat(messages: list[dict], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    windows = _windows(messages, tokenizer, max_length)
    return [_with_assistant_labels(window, tokenizer, max_length) for window in windows]


def _windows(messages: list[dict], tokenizer: Any, max_length: int) -> list[list[dict]]:
    """Cut a conversation before those user turns where the next exchange would not fit any more."""
    head = messages[:1] if messages and messages[0]["role"] == "system" else []
    exchanges: list[list[dict]] = []
    for message in messages[len(head) :]:
        if message["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    windows: list[list[dict]] = []
    for exchange in exchanges:
        longer = [*windows[-1], *exchange] if windows else None
        if longer and len(tokenizer(_render(longer, tokenizer))["input_ids"]) <= max_length:
            windows[-1] = longer
        else:
            windows.append([*head, *exchange])
    return windows


def _with_assistant_labels(messages: list[dict], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Label the tokens between what the template writes before an assistant's turn, and that turn's end."""
    text = _render(messages, tokenizer)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:index], tokenizer, add_generation_prompt=True) if index else ""
        turn = _render(messages[: index + 1], tokenizer)
        if not (text.startswith(turn) and turn.startswith(before)):
            raise InputError(
                "--model: its chat template rewrites earlier turns, so that the assistant's part cannot be "
                "told; give data with a 'text' column instead."
            )
        spans.append((len(before), len(turn.rstrip())))
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = encoded["input_ids"][:max_length], encoded["offset_mapping"][:max_length]
    labels = [
        token if any(start <= first and last <= end for start, end in spans) and first < last else IGNORED
        for token, (first, last) in zip(ids, offsets, strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


def _render(messages: list[dict], tokenizer: Any, **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)
