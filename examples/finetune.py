"""Fine-tunes a chat model through ``model.compile(backend="rewriter")``, the first steps in eager too.

    python examples/finetune.py                                    # SmolLM2-135M and chitchat, on the CPU
    python examples/finetune.py --model ~/models/llama --data talks.jsonl --load-in-4bit --bf16 \\
        --batch-size 2 --max-length 2048 --steps 500 --output outputs/llama

The model is any local folder with a causal language model; the data any JSON Lines or Parquet file with a
column ``messages`` or ``text``. On a machine with a GPU it runs there.
"""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

from rich.console import Console


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model's folder; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--data", type=Path, help="a .jsonl or .parquet file; chitchat if not given")
    parser.add_argument("--backend", default="rewriter", help="any backend of torch.compile, or 'none'")
    parser.add_argument("--steps", type=_positive, default=20, help="optimiser steps")
    parser.add_argument("--compare", type=int, default=4, help="first steps to run in eager PyTorch too")
    parser.add_argument(
        "--beside",
        help="a backend to run these first steps too, in a process of its own, as 'inductor'; "
        "'flat' is the rewriter without regions",
    )
    parser.add_argument("--batch-size", type=_positive, default=4)
    parser.add_argument("--gradient-accumulation", type=_positive, default=1)
    parser.add_argument("--max-length", type=_positive, default=96, help="tokens in a row")
    parser.add_argument(
        "--pad-to", type=_positive, help="pad rows to a multiple of this; --max-length if not given"
    )
    parser.add_argument(
        "--held-out", type=int, default=16, help="rows to measure the loss on, before and after"
    )
    parser.add_argument("--learning-rate", type=float, help="5e-4 with LoRA, 2e-5 without, if not given")
    parser.add_argument("--rank", type=_positive, default=16, help="LoRA's rank")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA adapters")
    parser.add_argument("--load-in-4bit", action="store_true", help="NF4 base weights (bitsandbytes)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; float32 if not given")
    parser.add_argument("--prompt", default="Hey! What did you do last weekend?", help="for the two samples")
    parser.add_argument("--output", type=Path, help="a folder to save the adapter, or the model, to")
    args = parser.parse_args(argv)
    if args.full and args.load_in_4bit:
        parser.error("--full and --load-in-4bit exclude each other: 4-bit weights cannot be trained.")
    args.pad_to = args.pad_to or args.max_length
    args.learning_rate = args.learning_rate or (2e-5 if args.full else 5e-4)
    args.compare = min(args.compare, args.steps) if args.backend != "none" else 0
    if args.beside and not args.compare:
        parser.error("--beside runs the first steps by another backend too: give --backend and --compare.")
    return args


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def main() -> None:
    args = parse()
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Only now, so that --help and a mistyped option are answered at once.
    with Console().status("Loading PyTorch, transformers and PEFT"):
        from conversations import InputError
        from training import run
    try:
        run(args)
    except InputError as error:
        sys.exit(f"finetune: {error}")


if __name__ == "__main__":
    main()
