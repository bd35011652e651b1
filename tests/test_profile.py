"""The profile of a step: where its time goes, what bounds it, and whether the device waits for the host."""

import json
from dataclasses import replace

import pytest
import torch

import rewriter
from rewriter.kernels import (  # noqa: F401  (they define the ops)
    add_product,
    clamped_gate,
    dequantize,
    extended_product,
    gated_activation,
    layer_norm,
    rms_norm,
    rotary,
)
from rewriter.memory.machine import H200
from rewriter.profile import summarise
from rewriter.profiling.trace import busy, read
from rewriter.profiling.work import WRITTEN, operations, traffic

BF16 = "c10::BFloat16"
CARD = replace(H200, bandwidth=4e12, matrix_flops=800e12)


def call(name, start, length, *tensors, cat="cpu_op", values=None):
    """A call of the host with bf16 tensors of these shapes."""
    args = {
        "Input Dims": [list(shape) for shape in tensors],
        "Input type": [BF16 if shape else "" for shape in tensors],
        "Input Strides": [[1] * len(shape) for shape in tensors],
        "Concrete Inputs": values or [""] * len(tensors),
    }
    return {
        "ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 1, "ts": start, "dur": length, "args": args,
    }  # fmt: skip


def launch(correlation, start, name="cudaLaunchKernel"):
    args = {"correlation": correlation}
    return {"ph": "X", "cat": "cuda_runtime", "name": name, "pid": 1, "tid": 1,
            "ts": start, "dur": 1, "args": args}  # fmt: skip


def kernel(name, correlation, start, length, cat="kernel"):
    args = {"correlation": correlation, "stream": 7, "bytes": 64}
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": 7, "ts": start, "dur": length, "args": args}


def step_on_a_gpu():
    """One of each: a product, our norm, Inductor's kernel, attention, optimizer, copy, an unknown one; µs."""
    qkv = [(1, 32, 4096, 128), (1, 8, 4096, 128), (1, 8, 4096, 128)]
    # Arguments of the op: query, key, value, bias, log-sum-exp wanted, dropout, causal.
    flags = {"values": ["", "", "", "", "True", "0.", "True"]}
    events = [
        call("aten::linear", 0, 9, (4096, 4096), (4096, 4096)),
        call("aten::mm", 1, 7, (4096, 4096), (4096, 4096)),
        launch(1, 2),
        kernel("nvjet_tst_128x256", 1, 100, 200),
        call("rewriter::rms_norm", 10, 9, (8192, 4096), (4096,), (), (), (), ()),
        launch(2, 12),
        kernel("_forward", 2, 300, 50),
        call("## Call CompiledFxGraph x ##", 20, 9, cat="user_annotation"),
        launch(3, 22),
        kernel("triton_poi_fused_add_mul_3", 3, 350, 40),
        call("aten::_scaled_dot_product_cudnn_attention", 30, 9, *qkv, (), (), (), (), **flags),
        launch(4, 32),
        kernel("cudnn_generated_fort_native_sdpa", 4, 390, 400),
        call("Optimizer.step#AdamW.step", 40, 15, cat="user_annotation"),
        call("aten::_fused_adamw_", 41, 9),
        launch(5, 42),
        kernel("void at::native::multi_tensor_apply_kernel<float>(int)", 5, 1000, 30),
        launch(6, 60),
        kernel("Memcpy DtoH (Device -> Pinned)", 6, 1030, 10, cat="gpu_memcpy"),
        kernel("void some::thing<int>(float)", 99, 1040, 10),
        {"ph": "M", "name": "process_name"},
    ]
    return {"traceEvents": events}


def profiled(seconds=0.001):
    return summarise(read(step_on_a_gpu()), device="H200", seconds=seconds, steps=1, machine=CARD)


def row(profile, kind):
    (found,) = [r for r in profile.rows if r.kind == kind]
    return found


def test_every_kernel_is_named_by_the_call_that_launched_it_or_by_itself():
    found = {(r.kind, r.name): r.ms for r in profiled().rows}
    assert found == {
        ("product", "4096×4096 · 4096×4096"): pytest.approx(0.2),
        ("rewriter", "rms_norm"): pytest.approx(0.05),
        ("Inductor pointwise", "add_mul_3"): pytest.approx(0.04),
        ("attention", "scaled_dot_product_cudnn_attention"): pytest.approx(0.4),
        ("optimizer", "AdamW.step"): pytest.approx(0.03),
        ("copy", "Memcpy DtoH (Device -> Pinned)"): pytest.approx(0.01),
        ("other", "thing"): pytest.approx(0.01),
    }


def test_bounds_are_the_longer_of_bytes_and_operations():
    profile = profiled()
    product = row(profile, "product")
    assert product.operations == 2 * 4096**3 and product.bytes == 3 * 2 * 4096**2
    assert product.bound_ms == pytest.approx(1e3 * 2 * 4096**3 / CARD.matrix_flops)
    assert product.reached == pytest.approx(product.bound_ms / 0.2)
    norm = row(profile, "rewriter")
    assert norm.bytes == 2 * 8192 * 4096 * 2 + 4096 * 2
    assert norm.bound_ms == pytest.approx(1e3 * norm.bytes / CARD.bandwidth)
    assert row(profile, "other").bound_ms is None


def test_causal_attention_counts_half_and_grouped_heads_whole():
    assert row(profiled(), "attention").operations == 2 * 2 * 32 * 4096**2 * 128 / 2


def test_the_device_is_busy_while_any_kernel_runs():
    trace = read(step_on_a_gpu())
    total, pauses = busy(trace.kernels)
    assert total == 200 + 50 + 40 + 400 + 30 + 10 + 10
    assert [(length, kernel.name[:4]) for length, kernel in pauses] == [(210, "void")]
    overlapping = read({"traceEvents": [kernel("a", 1, 0, 10), kernel("b", 2, 5, 3), kernel("c", 3, 8, 4)]})
    assert busy(overlapping.kernels) == (12, [])


def test_a_step_that_waits_for_the_host_is_told_so_with_the_op_it_waits_for():
    profile = profiled(seconds=0.002)
    assert profile.idle == pytest.approx(1 - 0.74 / 2)
    assert "stands still for 63% of a step: it waits for the host" in profile.verdict
    assert "Longest before AdamW.step" in profile.verdict


def test_a_busy_step_names_what_is_farthest_from_its_bound():
    profile = profiled(seconds=0.00074)
    assert profile.idle == pytest.approx(0)
    assert "never idle" in profile.verdict
    assert "Farthest from its bound is scaled_dot_product_cudnn_attention" in profile.verdict


def test_what_a_cuda_graph_launches_goes_by_its_own_names_and_has_no_bounds():
    events = [
        call("_ReplayBackward", 0, 9),
        launch(1, 2, "cudaGraphLaunch"),
        kernel("nvjet_tst_128x256", 1, 100, 200),
        kernel("_forward", 1, 300, 50),
        call("aten::mm", 20, 9, (4096, 4096), (4096, 4096)),
        launch(2, 21),
        kernel("nvjet_tst_128x256", 2, 350, 200),
    ]
    shown = summarise(read({"traceEvents": events}), device="H200", seconds=1e-3, steps=1, machine=CARD)
    assert {(r.kind, r.name, r.bound_ms is None) for r in shown.rows} == {
        ("product", "nvjet_tst_128x256", True),
        ("other", "_forward", True),
        ("product", "4096×4096 · 4096×4096", False),
    }
    assert (shown.launches, shown.recorded) == (3, 2)
    assert "for each of 1 launches" in shown.verdict
    assert "2 launches are those of CUDA graphs" in shown.verdict and '"cuda_graphs": False' in shown.verdict


def test_a_step_that_is_idle_for_a_moment_is_not_called_never_idle():
    assert "stands still for 3% of a step: a step takes what" in profiled(seconds=0.000763).verdict


def test_figures_are_for_one_step():
    one = profiled()
    two = summarise(read(step_on_a_gpu()), device="H200", seconds=0.001, steps=2, machine=CARD)
    for a, b in zip(one.rows, two.rows, strict=True):
        assert (b.ms, b.calls) == (pytest.approx(a.ms / 2), a.calls / 2)
        assert b.reached == (a.reached and pytest.approx(a.reached))
    assert two.launches == one.launches / 2 == 3.5


def test_the_table_shows_each_op_and_the_verdict_and_becomes_json():
    profile = profiled()
    text = str(profile)
    assert "H200: 1.00 ms a step, GPU busy 0.74, 7 launches" in text
    assert "4.00 TB/s, 800 TFLOP/s" in text
    assert "rms_norm" in text and profile.verdict.split(":")[0] in text
    assert max(map(len, text.splitlines())) <= 110
    data = json.loads(json.dumps(profile.to_dict()))
    assert data["rows"][0]["name"] == "scaled_dot_product_cudnn_attention"
    assert data["verdict"] == profile.verdict


def test_small_lines_of_a_kind_become_one():
    events = [kernel("triton_poi_fused_add_0", 0, 0, 1000)]
    events += [kernel(f"triton_poi_fused_mul_{i}", i, 1000 + i, 1) for i in range(1, 6)]
    profile = summarise(read({"traceEvents": events}), device="H200", seconds=1e-3, steps=1, machine=CARD)
    assert len(profile.rows) == 6
    assert "5 others" in str(profile) and "mul_3" not in str(profile)


def test_every_op_whose_results_are_weighed_exists_and_has_those_arguments():
    for name, results in WRITTEN.items():
        known = {argument.name for argument in getattr(torch.ops.rewriter, name).default._schema.arguments}
        assert {argument for argument, _ in results} <= known


def test_work_that_shapes_do_not_tell_is_left_open():
    trace = read({"traceEvents": [call("aten::mul", 0, 1, (4, 4), (4, 4)), call("aten::mm", 2, 1)]})
    assert [operations(c) for c in trace.calls] == [None, None]
    assert [traffic(c) for c in trace.calls] == [None, None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the host's table is shown where there is no GPU")
def test_without_a_gpu_the_hosts_own_calls_are_the_table():
    weight = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = torch.optim.AdamW([weight])

    def step():
        (torch.randn(8, 64) @ weight).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    profile = rewriter.profile(step, steps=2, warmup=1)
    products = [r for r in profile.rows if r.kind == "product"]
    assert {r.name for r in products} == {"8×64 · 64×64", "64×8 · 8×64"}
    assert all(r.calls == 1 and r.operations == 2 * 8 * 64 * 64 for r in products)
    assert row(profile, "optimizer").name == "AdamW.step"
    assert profile.wall_ms > 0 and "host's own calls" in str(profile)


def test_the_result_of_a_step_instead_of_the_step_is_an_error_that_shows_how():
    with pytest.raises(TypeError, match=r"step is of type Tensor.*profile\(lambda: train\(batch\)\)"):
        rewriter.profile(torch.zeros(()))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "steps is 0; give a whole number from 1 on"),
        ({"steps": "3"}, "steps is '3'; give a whole number"),
        ({"steps": 2.0}, "steps is 2.0; give"),
        ({"warmup": -1}, "warmup is -1; give a whole number from 0 on"),
    ],
)
def test_a_number_of_steps_that_is_none_is_an_error(given, said):
    with pytest.raises(ValueError, match=said):
        rewriter.profile(lambda: None, **given)
