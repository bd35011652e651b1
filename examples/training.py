"""The run itself: load, a few eager steps, compile, train, compare, and say what came of it."""

import argparse
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from checkpoint import load
from conversations import Collator, InputError, read, tokenise
from curves import Curve, comparison
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from progress import StepBar
from rich.console import Console
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

import rewriter
from rewriter.huggingface import prepare

SEED = 7
console = Console()


def run(args: argparse.Namespace) -> None:
    console.rule("Loading")
    model, tokenizer, train, held_out = prepared(args)
    start = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    millions = sum(value.numel() for value in start.values()) / 1e6
    console.print(f"{model.device.type}: {millions:.1f} million weights to train, on {len(train)} rows")
    answers = [answer(model, tokenizer, args.prompt)]
    collator = Collator(tokenizer.pad_token_id, args.pad_to)

    console.rule("Training")
    curves: list[tuple[str, Curve]] = []
    if args.compare:
        bar = StepBar("eager", args.steps, console, stop_after=args.compare)
        trainer_for(model, train, held_out, collator, args, bar).train()
        curves.append(("eager", bar.curve))
        with torch.no_grad():
            for name, value in start.items():
                model.get_parameter(name).copy_(value)
    if args.backend != "none":
        compile_by(model, args.backend)
    bar = StepBar(args.backend, args.steps, console, first="compiling")
    trainer = trainer_for(model, train, held_out, collator, args, bar)
    losses = [trainer.evaluate()["eval_loss"]]
    trainer.train()
    losses.append(trainer.evaluate()["eval_loss"])
    answers.append(answer(model, tokenizer, args.prompt))
    curves.append((args.backend, bar.curve))
    if args.beside:
        curves.append((args.beside, in_another_process(first_steps, args, args.beside)))
    if len(curves) > 1:
        console.print(comparison(curves))
    if args.backend == "rewriter":
        console.rule("Report")
        print(rewriter.report())

    console.rule("Result")
    console.print(f"held-out loss: {losses[0]:.3f} before, {losses[1]:.3f} after {args.steps} steps")
    console.print(
        f"asked: {args.prompt}", f"before: {answers[0]}", f"after: {answers[1]}", sep="\n", markup=False
    )
    if args.output:
        trainer.save_model(str(args.output))
        tokenizer.save_pretrained(args.output)
        console.print(f"saved to {args.output}")


def prepared(args: argparse.Namespace) -> tuple[Any, Any, Dataset, Dataset]:
    """Model and tokenizer, rows to train on and rows held out: the same ones for the same arguments."""
    rows = read(args.data)
    model, tokenizer = load(args.model, dtype=base_dtype(args), four_bit=args.load_in_4bit)
    train, held_out = split(rows, tokenizer, args)
    set_seed(SEED)
    if not args.full:
        adapters = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
        model = get_peft_model(model, adapters)
    print(prepare(model))
    return model, tokenizer, train, held_out


def compile_by(model: Any, backend: str) -> None:
    """By a backend of torch.compile; ``flat`` is the rewriter without regions, one graph of all layers."""
    if backend == "flat":
        model.compile(backend="rewriter", options={"regions": False})
    else:
        model.compile(backend=backend)


def first_steps(args: argparse.Namespace, backend: str) -> Curve:
    """The first steps of the run by another backend, from the same weights, batches and schedule."""
    model, tokenizer, train, held_out = prepared(args)
    compile_by(model, backend)
    bar = StepBar(backend, args.steps, console, first=f"compiling by {backend}", stop_after=args.compare)
    collator = Collator(tokenizer.pad_token_id, args.pad_to)
    trainer_for(model, train, held_out, collator, args, bar).train()
    return bar.curve


def in_another_process(function: Callable[..., Curve], *arguments: Any) -> Curve:
    """One backend's compiled code, caches and settings stay out of another's timing."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def base_dtype(args: argparse.Namespace) -> torch.dtype:
    """Frozen weights are as wide as the products; trained ones stay in float32, under autocast."""
    return torch.bfloat16 if args.bf16 and not args.full else torch.float32


def split(rows: Dataset, tokenizer: Any, args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Rows to train on and rows held out, of different conversations; no more than the run will read."""
    wanted = args.steps * args.batch_size * args.gradient_accumulation
    rows = rows.shuffle(seed=SEED)
    if len(rows) <= args.held_out:
        raise InputError(f"--held-out {args.held_out} leaves nothing of {len(rows)} rows to train on.")
    held_out = tokenise(rows.take(args.held_out), tokenizer, args.max_length)
    rest = rows.skip(args.held_out)
    train = tokenise(rest.take(min(wanted, len(rest))), tokenizer, args.max_length)
    return train, held_out.take(min(args.held_out, len(held_out)))


class EagerEvaluation(Trainer):
    """Evaluates in eager PyTorch: a graph for it alone would take longer to compile than its rows take."""

    @torch.compiler.set_stance("force_eager")
    def evaluate(self, *args: Any, **settings: Any) -> dict[str, float]:
        return super().evaluate(*args, **settings)


def trainer_for(
    model: Any,
    train: Dataset,
    held_out: Dataset,
    collator: Collator,
    args: argparse.Namespace,
    bar: StepBar,
    **more: Any,
) -> Trainer:
    """A Trainer whose seed, order of batches and schedule are the same every time; it shows only ``bar``."""
    settings = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=SEED,
        disable_tqdm=True,
        **more,
    )
    trainer = EagerEvaluation(
        model=model,
        args=settings,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=[bar],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.compiler.set_stance("force_eager")
def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model says to ``prompt``, word by likeliest word."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    training = model.training
    output = model.eval().generate(
        **inputs, max_new_tokens=40, do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id
    )
    model.train(training)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
