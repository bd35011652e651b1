"""How long the planner searches, of what it is asked for a model: CPU time, without tracing the model.

    python examples/benchmarks/search_times.py                 # a minute and a half on a CPU

QLoRA with NF4, r=32, an H200's rates. Prints for each budget the seconds of the search, those of the step
that is foreseen, and by how much of it another plan might at most be faster. Set OMP_NUM_THREADS=1: threads
that wait count as CPU time.
"""

import argparse
import time
from dataclasses import replace

import torch
from plans import GIB, whole

from rewriter.foresee.question import Question
from rewriter.memory.budgets import usable_bytes
from rewriter.memory.machine import H200
from rewriter.memory.plan import Infeasible
from rewriter.memory.planner import roomy

# A model's shape, tokens, and cards in GiB.
CASES = [("8b", 50_000, (12, 24, 40)), ("8b", 8_192, (9, 16)), ("70b", 32_768, (64, 80))]
HOST = 104


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["8b", "70b"])
    for shape, tokens, cards in CASES:
        if shape not in parser.parse_args().models:
            continue
        bf16 = torch.bfloat16
        asked = Question(whole(shape), 32, "nf4", bf16, bf16, 1, cards[-1] * GIB, HOST * GIB, H200)
        problems, _ = asked.problems(tokens)
        for card in cards:
            within = [replace(problem, device_budget=usable_bytes(card * GIB)) for problem in problems]
            start = time.process_time()
            try:
                found = roomy(within)
                said = f"a step of {found.seconds:.4f} s, at most {found.slack / found.seconds:.2%} too long"
            except Infeasible as error:
                said = str(error)
            spent = time.process_time() - start
            print(f"{shape:>4s} {tokens:>7,} tokens {card:>3d} GiB  {spent:.2f} s  {said}", flush=True)


if __name__ == "__main__":
    main()
