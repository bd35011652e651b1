"""Names what a kernel or a call of the host is for, so that a step is a table of some lines."""

from dataclasses import dataclass

from rewriter.profiling.trace import Call, Kernel
from rewriter.profiling.work import factors, is_attention

_COPIES = {f"aten::{n}" for n in ("copy_", "_to_copy", "clone", "contiguous", "fill_", "zero_", "cat")}
_PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitkreduce")
_ATTENTION = ("flash", "fmha", "sdpa", "cudnn")
_FAMILIES = {
    "poi": "pointwise",
    "per": "reductions",
    "red": "reductions",
    "tem": "products",
    "for": "pointwise",
}


@dataclass(frozen=True)
class Label:
    """What a line of the table is for: ``kind`` groups lines, ``owner`` is the call whose work it is."""

    kind: str
    name: str
    owner: Call | None = None


def label_of(kernel: Kernel) -> Label:
    """By the call that launched it, and by its own name where none did or where that says nothing."""
    if kernel.call is not None:
        label = label_of_call(kernel.call)
        if label.kind not in ("other", "compiled"):
            return label
    if kernel.copied:
        return Label("copy", kernel.name, kernel.call)
    lower = kernel.name.lower()
    if lower.startswith("triton_"):
        return _inductor(kernel.name, kernel.call)
    if any(word in lower for word in _ATTENTION):
        return Label("attention", _short(kernel.name), kernel.call)
    if any(word in lower for word in _PRODUCTS):
        return Label("product", _short(kernel.name), kernel.call)
    named = kernel.call is not None and label_of_call(kernel.call).kind == "other"
    return Label("other", _short(kernel.call.name if kernel.call and named else kernel.name), kernel.call)


def label_of_call(call: Call) -> Label:
    """By the outermost of our ops or the optimizer around it, else by the call itself."""
    around = list(call.upwards())
    for outer in reversed(around):
        if outer.name.startswith("Optimizer.step"):
            return Label("optimizer", outer.name.rpartition("#")[2], outer)
        if outer.name.startswith("rewriter::"):
            name = outer.name.removeprefix("rewriter::")
            return Label("attention" if name.startswith("attention") else "rewriter", name, outer)
    for inner in around:
        shapes = factors(inner)
        if shapes is not None:
            return Label("product", " · ".join("×".join(map(str, shape)) for shape in shapes), inner)
        if is_attention(inner):
            return Label("attention", inner.name.removeprefix("aten::_"), inner)
    if call.name.startswith("triton_"):
        return _inductor(call.name, call)
    if call.name.startswith(("Torch-Compiled", "CompiledFunction", "## Call Compiled")):
        return Label("compiled", "compiled code, its kernels within", call)
    if call.name in _COPIES:
        return Label("copy", call.name.removeprefix("aten::"), call)
    return Label("other", _short(call.name), call)


def _inductor(name: str, call: Call | None) -> Label:
    family = _FAMILIES.get(name.removeprefix("triton_")[:3], "kernels")
    return Label(f"Inductor {family}", name.removeprefix("triton_")[4:].removeprefix("fused_"), call)


def _short(name: str) -> str:
    """Without C++'s return type, template arguments and namespaces."""
    head = name.partition("<")[0].removeprefix("void ").strip()
    return head if head.startswith("autograd") else head.rpartition("::")[2] or name[:60]
