"""Operations and bytes of a call, from the shapes that the profiler recorded; None where they do not tell.

A product's and an attention's operations are PyTorch's own count (``torch.utils.flop_counter``), halved where
attention is causal. Bytes are the fewest: every tensor read once, every result written once. A trace holds
arguments and no results; of the package's own ops ``WRITTEN`` says what these are like.
"""

import math

import torch

from rewriter.profiling.trace import Call

_TYPES = {
    "c10::BFloat16": torch.bfloat16,
    "c10::Half": torch.float16,
    "float": torch.float32,
    "double": torch.float64,
    "long int": torch.int64,
    "long": torch.int64,
    "int": torch.int32,
    "unsigned char": torch.uint8,
    "signed char": torch.int8,
    "bool": torch.bool,
}
# What an op writes, as multiples of its arguments' bytes; small results are left out, and ops that are bound
# by their products have no line.
WRITTEN: dict[str, tuple[tuple[str, float], ...]] = {
    "rms_norm": (("x", 1),),
    "add_rms_norm": (("x", 2),),
    "rms_norm_backward": (("x", 1),),
    "layer_norm": (("x", 1),),
    "add_layer_norm": (("x", 2),),
    "layer_norm_backward": (("x", 1),),
    "rotary": (("q", 1), ("k", 1)),
    "rotary_backward": (("dq", 1), ("dk", 1)),
    "rotary_one": (("x", 1),),
    "rotary_one_backward": (("dy", 1),),
    "gated_activation": (("gate", 1),),
    "gated_activation_backward": (("gate", 1), ("up", 1)),
    "gated_activation_packed": (("gate_up", 0.5),),
    "gated_activation_packed_backward": (("gate_up", 1),),
    "gated_activation_backward_with_result_": (("gate", 1), ("up", 1), ("grad", 1)),
    "gated_activation_packed_backward_with_result_": (("gate_up", 1), ("grad", 1)),
    "dropped": (("x", 1),),
    "clamped_gate": (("gate_up", 0.5),),
    "clamped_gate_backward": (("gate_up", 1),),
    "dequantize_4bit": (("data", 4),),  # two values of two bytes for each byte
    "dequantize_4bit_extended": (("data", 4),),
    "extended": (("x", 1),),
    "add_product_": (("total", 1),),
    "fold_columns_": (("wide", 1),),
}
# The arguments that are multiplied.
_FACTORS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}


def factors(call: Call) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The shapes of the two matrices, or batches of them, that the call multiplies."""
    space, _, name = call.name.partition("::")
    if space != "aten" or name not in _FACTORS or not call.dims:
        return None
    first, second = (tuple(call.dims[i]) for i in _FACTORS[name])
    return first, second


def operations(call: Call) -> float | None:
    """Floating-point operations of a product or an attention."""
    shapes = factors(call)
    if shapes is not None:
        (*batch, rows, inner), columns = shapes[0], shapes[1][-1]
        return 2.0 * math.prod(batch) * rows * inner * columns
    return _attention_operations(call)


def _attention_operations(call: Call) -> float | None:
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    if not is_attention(call) or not call.dims:
        return None
    forward = not call.name.endswith("_backward")
    q, k, v = call.dims[0:3] if forward else call.dims[1:4]
    # Keys and values of grouped attention count once for each head of the queries.
    k, v = ([*x[:1], q[1], *x[2:]] for x in (k, v))
    count = sdpa_flop_count(q, k, v) if forward else sdpa_backward_flop_count(q, q, k, v)
    return count / 2 if _is_causal(call) else count


def is_attention(call: Call) -> bool:
    return call.name.startswith("aten::_scaled_dot_product_")


def _is_causal(call: Call) -> bool:
    schema = getattr(torch.ops.aten, call.name.removeprefix("aten::")).default._schema
    index = [argument.name for argument in schema.arguments].index("is_causal")
    return call.values[index] == "True"


def traffic(call: Call) -> int | None:
    """Fewest bytes that the call moves through memory."""
    shapes = factors(call)
    if shapes is not None:
        (*batch, rows, _), columns = shapes[0], shapes[1][-1]
        read = _FACTORS[call.name.removeprefix("aten::")]
        result = math.prod(batch) * rows * columns * _element(call, read[0])
        return sum(_bytes(call, i) for i in read) + result
    if not call.dims:
        return None
    arguments = sum(_bytes(call, i) for i in range(len(call.dims)))
    if call.name.startswith("triton_"):
        return arguments  # of Inductor's kernels these are what they read and what they write
    op = call.name.removeprefix("rewriter::")
    if op == call.name or op not in WRITTEN:
        return None
    names = [a.name for a in getattr(torch.ops.rewriter, op).default._schema.arguments]
    return arguments + sum(int(_bytes(call, names.index(a)) * times) for a, times in WRITTEN[op])


def _element(call: Call, index: int) -> int:
    return _TYPES[call.types[index]].itemsize if call.types[index] in _TYPES else 0


def _bytes(call: Call, index: int) -> int:
    """Of an argument: nothing where it is no tensor, once what a stride of zero repeats."""
    if call.types[index] not in _TYPES:
        return 0
    shape = call.dims[index]
    strides = call.strides[index] if call.strides else [1] * len(shape)
    sizes = (size for size, stride in zip(shape, strides, strict=True) if stride)
    return math.prod(sizes) * _element(call, index)
