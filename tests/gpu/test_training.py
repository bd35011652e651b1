"""Twenty steps of a model of Llama-3.1-8B's shape, 8 layers, NF4 and LoRA: the losses are eager's."""

import pytest
import torch

import rewriter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_twenty_steps_have_eagers_losses_to_bf16_noise():
    from examples.benchmarks.models import build

    model = build(layers=8, quantised=True, device="cuda", tiny=False)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    eager = losses_of(model, model)
    model.load_state_dict(start, strict=False)
    with rewriter.inspect() as report:
        ours = losses_of(model, torch.compile(model, backend="rewriter"))
    counts = report.counts()
    assert counts["norm"] == 17 and counts["rotary"] == 8 and counts["attention"] == 8
    assert counts["lora"] == 56 and counts["gated_mlp"] == 8 and counts["lm_head_loss"] == 1
    noise = torch.finfo(torch.bfloat16).eps / 4
    for step, (a, b) in enumerate(zip(ours, eager, strict=True)):
        assert abs(a - b) <= noise * b, f"step {step}: loss {a}, eager's {b}"
    assert eager[-1] < eager[0]


def losses_of(model, call, steps: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(128256, (2, 2048), generator=generator).cuda() for _ in range(4)]
    losses = []
    for step in range(steps):
        ids = batches[step % 4]
        with torch.autocast("cuda", torch.bfloat16):
            loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses
