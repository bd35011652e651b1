"""Options are validated before any work, and errors say what is known."""

import copy
import pickle
from typing import Any

import pytest
import torch

import rewriter
from rewriter.options import OptionError, Options, parse_budget
from rewriter.passes import pass_names


def parse(mode=None, **given):
    return Options.parse(given, mode, pass_names())


def test_without_options_everything_runs_through_inductor():
    chosen = parse()
    assert chosen == Options()
    assert chosen.lowering == "inductor"
    assert all(chosen.runs(name) for name in pass_names())


@pytest.mark.parametrize(
    ("given", "bytes_"),
    [
        ("24GB", 24 * 10**9),
        ("22GiB", 22 * 2**30),
        ("22 gib", 22 * 2**30),
        ("1.5GB", 1_500_000_000),
        (24_000_000_000, 24_000_000_000),
        (2.4e10, 24_000_000_000),
        (0.9, 0.9),
        (1.0, 1.0),
        (None, None),
    ],
)
def test_a_budget_is_bytes_a_size_or_a_fraction(given, bytes_):
    assert parse_budget("memory_budget", given) == bytes_
    assert parse(memory_budget=given, host_budget=given) == Options(memory_budget=bytes_, host_budget=bytes_)


@pytest.mark.parametrize("value", ["24", "lots", "24GBs", "-1GB", -5, 1.5, True, False, [1], float("nan")])
@pytest.mark.parametrize("name", ["memory_budget", "host_budget"])
def test_a_malformed_budget_is_an_error_with_the_forms_that_are_understood(name, value):
    with pytest.raises(OptionError, match=rf"option '{name}' is .*give bytes .* a size .* or a fraction"):
        parse(**{name: value})


@pytest.mark.parametrize("value", [0, 0.0, "0GB"])
def test_no_host_memory_may_be_asked_for_and_no_device_memory_may_not(value):
    assert parse(host_budget=value).host_budget == 0
    with pytest.raises(OptionError, match="option 'memory_budget' is .*give bytes"):
        parse(memory_budget=value)


@pytest.mark.parametrize(
    ("value", "way_out"), [(24, "24GB"), (24.0, "24GB"), (24_000, "24000MB"), (2**20 - 1, "1048575B")]
)
def test_a_number_of_few_bytes_is_an_error_with_the_unit_that_was_meant(value, way_out):
    for name in ("memory_budget", "host_budget"):
        with pytest.raises(OptionError, match=rf'{name}\' is {int(value)}, which is .* bytes.*"{way_out}"'):
            parse(**{name: value})
    assert parse(memory_budget=2**20, host_budget="24B") == Options(memory_budget=2**20, host_budget=24)


def test_planning_is_turned_off_by_a_word():
    assert parse(memory_budget="off").memory_budget == "off"
    with pytest.raises(OptionError, match='or "off" to plan nothing'):
        parse(memory_budget="none")
    with pytest.raises(OptionError, match="option 'host_budget' is 'off'"):
        parse(host_budget="off")


def test_an_unknown_option_is_an_error_with_the_nearest_name():
    with pytest.raises(
        OptionError, match="unknown option 'memory_buget'; did you mean 'memory_budget'"
    ) as caught:
        parse(memory_buget="24GB")
    assert (
        "Known: cuda_graphs, host_budget, lowering, max_tokens, memory_budget, passes, regions, verify."
        in str(caught.value)
    )


def test_an_unknown_option_reaches_the_user_of_torch_compile():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend="rewriter", options={"memroy_budget": "24GB"})
    with pytest.raises(Exception, match="did you mean 'memory_budget'"):
        compiled(torch.ones(2))


def test_an_unknown_pass_is_an_error_with_the_nearest_name():
    with pytest.raises(OptionError, match="unknown pass 'nrom'; did you mean 'norm'"):
        parse(passes=["nrom"])
    with pytest.raises(OptionError, match="unknown pass '-gated'.*Known: .*gated_mlp"):
        parse(passes=["-gated"])


@pytest.mark.parametrize("value", ["norm", [1], 3])
def test_passes_are_a_list_of_names(value):
    with pytest.raises(OptionError, match=r"option 'passes' is .*; give a list of names, as \[\"norm\"\]"):
        parse(passes=value)


def test_passes_run_alone_or_are_left_out():
    assert [n for n in pass_names() if parse(passes=["norm"]).runs(n)] == ["norm"]
    assert "norm" not in [n for n in pass_names() if parse(passes=["-norm"]).runs(n)]
    assert not any(parse(passes=["norm", "-norm"]).runs(n) for n in pass_names())
    assert all(parse(passes=None).runs(n) for n in pass_names())


def test_an_empty_list_of_passes_is_none():
    assert not any(parse(passes=[]).runs(n) for n in pass_names())
    torch._dynamo.reset()
    with rewriter.inspect() as report:
        options = {"lowering": "eager", "passes": []}
        torch.compile(torch.nn.LayerNorm(8), backend="rewriter", options=options)(torch.randn(2, 8))
    assert not report.counts() and not report.graphs[0].passes


@pytest.mark.parametrize("value", [1, "yes", None])
def test_verify_is_true_or_false(value):
    with pytest.raises(OptionError, match="option 'verify' is True or False"):
        parse(verify=value)


def test_cuda_graphs_are_on_unless_turned_off():
    assert parse().cuda_graphs and not parse(cuda_graphs=False).cuda_graphs
    with pytest.raises(OptionError, match="option 'cuda_graphs' is True or False"):
        parse(cuda_graphs="no")


def test_an_unknown_lowering_or_mode_is_an_error():
    with pytest.raises(OptionError, match="unknown lowering 'inducto'; did you mean 'inductor'"):
        parse(lowering="inducto")
    with pytest.raises(OptionError, match="unknown mode 'max-autotun'; did you mean 'max-autotune'"):
        parse(mode="max-autotun")


def test_a_pass_left_out_leaves_its_operations_as_they_were():
    torch._dynamo.reset()
    options = {"lowering": "eager", "passes": ["-norm"]}
    with rewriter.inspect() as report:
        torch.compile(torch.nn.LayerNorm(8), backend="rewriter", options=options)(torch.randn(2, 8))
    assert "norm" not in report.counts()


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_modes_of_inductor_are_taken(mode):
    assert parse(mode=mode).mode == mode


@pytest.mark.parametrize("given", [["norm"], "memory_budget", 5])
def test_options_that_are_no_dictionary_are_an_error_that_shows_one(given):
    with pytest.raises(OptionError, match='options is .*give a dictionary, as {"memory_budget": "24GB"}'):
        Options.parse(given, None, pass_names())


def test_a_name_that_is_no_text_is_an_unknown_option():
    with pytest.raises(OptionError, match="unknown option 3. Known: "):
        Options.parse({3: 4}, None, pass_names())


def test_the_package_in_the_place_of_the_backends_name_is_told_with_the_name():
    torch._dynamo.reset()
    backend: Any = rewriter
    with pytest.raises(Exception, match="is the package, not a backend; give its name, backend='rewriter'"):
        torch.compile(torch.nn.LayerNorm(8), backend=backend)(torch.randn(2, 8))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])
def test_the_package_is_pickled_and_copied_by_its_name(again):
    assert again(rewriter) is rewriter
