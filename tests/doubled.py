"""An autograd function as a user may write one: Dynamo nests two graphs for each call."""

import torch


class Doubled(torch.autograd.Function):
    """Twice its input."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2
