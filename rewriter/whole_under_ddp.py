"""Graphs stay whole under DDP.

Dynamo cuts the graph of a model in ``DistributedDataParallel`` where a bucket of gradients is full, so that
a backend that compiles one backward for all of it would not hold gradients back. Regions are autograd nodes
of their own, and send theirs as they come. Cut, layers that repeat would be in different graphs, and each
graph's memory would be planned as if it were alone.

A program that is one graph (no layers that repeat, or ``regions=False``) sends everything when its backward
ends: autograd has the gradients of a compiled backward when that returns, all at once. Whether a program has
regions is known only when Dynamo has decided, so that this is left to who trains such a model:
``torch._dynamo.config.optimize_ddp = "ddp_optimizer"`` cuts as before, and the pieces are rewritten.

The setting is the process's, so that other backends' graphs stay whole too: right, and sent later.
"""


def keep_graphs_whole() -> None:
    """From now on; a choice other than Dynamo's default is left as it is."""
    from torch._dynamo import config

    if config.optimize_ddp is True:
        config.optimize_ddp = False
