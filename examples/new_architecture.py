"""Teaches the compiler a norm that it does not know, of a made-up architecture, and proves it.

The norm has a learnable floor: ``y = weight · x / sqrt(mean(x²) + exp(floor))``. Compiled as it is, the
report lists it among what was not rewritten. The ten lines between the rulers teach it: the model's own
words, and what to put in their place. Here that is plain PyTorch with a backward of its own, which saves the
input and one number a row where autograd saves several fp32 copies of the input; a Triton kernel goes in
likewise.

    python examples/new_architecture.py
"""

import torch
from torch import Tensor, nn

import rewriter

torch.manual_seed(0)
# AOTAutograd without Inductor, which compiles this in a second; leave the option out to train.
QUICK = {"lowering": "eager"}


class FloorNorm(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.floor = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.floor.float().exp())
        return self.weight * h.to(x.dtype)


class Model(nn.Module):
    """A toy language model of (batch, tokens) ids: per layer a norm and a linear, added to the residual."""

    def __init__(self, vocabulary: int = 256, hidden: int = 64, layers: int = 4):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(
            nn.Sequential(FloorNorm(hidden), nn.Linear(hidden, hidden)) for _ in range(layers)
        )
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        logits = self.head(x)[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


class FusedFloorNorm(torch.autograd.Function):
    """Saves ``x`` and one fp32 number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
        least = floor.float().exp()
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + least)
        ctx.save_for_backward(x, weight, floor, rstd)
        return weight * (x.float() * rstd).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, floor, rstd = ctx.saved_tensors
        normal, dnormal = x.float() * rstd, dy.float() * weight.float()
        along = dnormal * normal
        dx = rstd * (dnormal - normal * along.mean(-1, keepdim=True))
        dweight = (dy.float() * normal).flatten(0, -2).sum(0)
        dfloor = -0.5 * (along.sum(-1, keepdim=True) * rstd.square()).sum() * floor.float().exp()
        return dx.to(x.dtype), dweight.to(weight.dtype), dfloor.to(floor.dtype)


def train(model: nn.Module, ids: Tensor, *, steps: int = 3) -> list[float]:
    """The losses of a few steps, compiled by the rewriter."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend="rewriter", options=QUICK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = compiled(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def new_model() -> Model:
    torch.manual_seed(0)
    return Model().to(torch.bfloat16)


ids = torch.randint(0, 256, (2, 32))
before = train(new_model(), ids)
print(f"Before:\n{rewriter.report()}\n")


# ── the lesson ──────────────────────────────────────────────────────────────────────────────────────────────
def fused_floor_norm(x, weight, floor):
    return FusedFloorNorm.apply(x, weight, floor)


@rewriter.rewrite(to=fused_floor_norm)
def floor_norm(x, weight, floor):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + floor.float().exp())
    return weight * h.to(x.dtype)


# ────────────────────────────────────────────────────────────────────────────────────────────────────────────

hidden = torch.randn(4, 16, 64, dtype=torch.bfloat16)
weight, floor = torch.randn(64, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
print(f"Checked:\n{rewriter.check(floor_norm, hidden, weight, floor)}\n")

after = train(new_model(), ids)
print(f"After:\n{rewriter.report()}\n")
for step, losses in enumerate(zip(before, after, strict=True)):
    print(f"step {step}: loss {losses[0]:.4f} before, {losses[1]:.4f} after")
assert rewriter.report().counts()["floor_norm"] == 4
torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=1e-3, atol=0.0)
