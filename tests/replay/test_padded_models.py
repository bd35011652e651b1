"""Models whose steps are padded: their losses, gradients and logits are those of the steps as they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.families import batch, build

# The layers of gemma2 take turns.
MODELS = {
    "llama": lambda: build("llama", lora=True, layers=1),
    "gemma2": lambda: build("gemma2", layers=2),
}


def steps_of(model, call, lengths, **extra):
    """Loss, gradients and logits of each length."""
    for length in lengths:
        given = batch(length=length, seed=length) | {k: make(length) for k, make in extra.items()}
        model.zero_grad()
        result = call(**given)
        result.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        yield result.loss.detach(), grads, result.logits.detach()


def assert_equal_steps(ours, eager, *, rtol=2e-5):
    for (loss, grads, logits), (true_loss, true_grads, true_logits) in zip(ours, eager, strict=True):
        torch.testing.assert_close(loss, true_loss, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(logits, true_logits, rtol=1e-4, atol=1e-5)
        assert grads.keys() == true_grads.keys()
        for name, grad in grads.items():
            scale = true_grads[name].abs().max().item()
            torch.testing.assert_close(grad, true_grads[name], rtol=1e-4, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("family", MODELS)
def test_a_padded_step_has_eagers_loss_gradients_and_logits(recorded, family):
    model = MODELS[family]()
    lengths = (12, 9, 14, 30)
    ours = list(steps_of(model, recorded.compile(model), lengths))
    assert_equal_steps(ours, list(steps_of(model, model, lengths)))
    assert recorded.plans[-1].reading.padding is not None, recorded.plans[-1].reading
    assert recorded.recorder.forwards == recorded.recorder.backwards == 2
    assert [inputs[-1].shape[1] for inputs in recorded.recorder.recorded] == [64]


def test_padding_that_the_user_masks_is_padded_further(recorded):
    model = build("mistral", lora=True, layers=1)

    def mask(length):
        kept = torch.ones(2, length, dtype=torch.long)
        kept[1, length - 4 :] = 0
        return kept

    lengths = (12, 9, 14, 30)
    ours = list(steps_of(model, recorded.compile(model), lengths, attention_mask=mask))
    eager = list(steps_of(model, model, lengths, attention_mask=mask))
    for _, _, logits in (*ours, *eager):
        logits[1, -4:] = 0
    assert_equal_steps(ours, eager)
    assert recorded.recorder.forwards == 2


class Tiny(nn.Module):
    """The least with a head and a loss; ``shift`` makes labels of ids."""

    def __init__(self, shift):
        super().__init__()
        self.table, self.head, self.shift = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False), shift

    def forward(self, ids):
        logits = self.head(F.silu(self.table(ids)))
        return F.cross_entropy(logits.float().view(-1, 50), self.shift(ids).view(-1))


def test_ids_that_are_their_own_labels_become_two_inputs(recorded):
    model = Tiny(lambda ids: F.pad(ids, (0, 1), value=-100)[..., 1:].contiguous())
    compiled = recorded.compile(model)
    for length in (12, 9, 14, 30):
        ids = torch.randint(50, (2, length))
        ours = torch.autograd.grad(compiled(ids), list(model.parameters()))
        torch.testing.assert_close(ours, torch.autograd.grad(model(ids), list(model.parameters())))
        del ours
    reading = recorded.plans[-1].reading
    assert len(reading.doubled) == 1
    fills = {p.position: p.fill for p in reading.padding.inputs}
    assert fills[reading.doubled[0]] is None
    assert fills[len(reading.values) - 1] == -100
    assert recorded.recorder.forwards == 2


def test_labels_that_are_computed_are_not_proven_to_be_ignored(recorded):
    compiled = recorded.compile(Tiny(lambda ids: ids + 0))
    for length in (12, 9):
        compiled(torch.randint(50, (2, length))).backward()
    assert "not proven to be ignored" in recorded.plans[-1].reading.unpaddable
