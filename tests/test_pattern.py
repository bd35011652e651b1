"""Declaring a pattern: what it becomes, and the errors that name what is wrong with it."""

import pytest
import torch
import torch.nn.functional as F

import rewriter
from rewriter import PatternError, maybe, registry
from rewriter.passes import pass_names
from rewriter.pattern import declare, same, source_line


def op(x, weight, eps, scale=1.0):
    return x


def norm(x, weight, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def test_a_pattern_stays_callable():
    x, weight = torch.randn(2, 4), torch.randn(4)
    torch.testing.assert_close(declare(norm, to=op)(x, weight, 1e-6), norm(x, weight, 1e-6))


def test_a_pattern_knows_its_name_holes_size_and_line():
    pattern = declare(norm, to=op, scale=2.0)
    assert (pattern.name, pattern.holes, pattern.size) == ("norm", ("x", "weight", "eps"), 6)
    assert pattern.constants == {"scale": 2.0}
    assert pattern.line.rpartition("/")[2].startswith("test_pattern.py:")


def test_every_operation_of_a_pattern_knows_its_line():
    first = norm.__code__.co_firstlineno
    root = declare(norm, to=op).root
    assert source_line(root) == f"{__file__}:{first + 1}"


def test_an_argument_that_the_replacement_does_not_know_is_named_with_the_nearest():
    def pattern(x, wieght, eps):
        return norm(x, wieght, eps)

    with pytest.raises(PatternError, match="`wieght` is no argument of `op`; did you mean `weight`?"):
        declare(pattern, to=op)


def test_a_constant_that_the_replacement_does_not_know_is_named():
    with pytest.raises(PatternError, match="`zzz` is no argument of `op`; it takes x, weight, eps, scale"):
        declare(norm, to=op, zzz=1)


def test_an_argument_that_is_missing_is_named():
    def pattern(x, weight):
        return x * weight

    with pytest.raises(PatternError, match="pattern: `op` needs `eps`, which is neither a parameter nor"):
        declare(pattern, to=op)


def test_a_parameter_that_nothing_could_bind_is_named():
    def pattern(x, weight, eps):
        return x * weight

    with pytest.raises(PatternError, match="parameter `eps` is not used in the pattern"):
        declare(pattern, to=op)


@pytest.mark.parametrize(
    "function",
    [lambda x, eps=1: x + eps, lambda *x: x[0] + 1, lambda x, *, eps: x + eps, lambda **x: x["a"] + 1],
    ids=["default", "variadic", "keyword-only", "keywords"],
)
def test_a_parameter_that_is_not_plain_is_refused(function):
    with pytest.raises(PatternError, match="must be a plain positional one"):
        declare(function, to=lambda x, eps: x)


def test_a_pattern_that_branches_on_values_is_refused():
    with pytest.raises(PatternError, match="cannot be traced without example inputs"):
        declare(lambda x: x if x.sum() > 0 else -x, to=lambda x: x)


@pytest.mark.parametrize("result", [lambda x: x, lambda x: 3 if x is None else None, lambda x: (x + 1, 2)])
def test_a_pattern_returns_what_it_computes(result):
    with pytest.raises(PatternError, match="a pattern returns what it computes|is not used"):
        declare(result, to=lambda x: x)


def test_further_results_must_be_on_the_way_to_the_first():
    with pytest.raises(PatternError, match="its first result must be computed from the others"):
        declare(lambda x: (x + 1, x * 2), to=lambda x: x)


def test_a_replacement_that_is_no_function_is_refused():
    with pytest.raises(PatternError, match="plus: `to` is 3; give the function that replaces the pattern"):
        rewriter.rewrite(to=3, name="plus")(lambda x: x + 1)  # pyright: ignore[reportArgumentType]


def test_a_guard_that_is_no_function_is_refused():
    with pytest.raises(
        PatternError, match=r"plus: `where` is 'wide'; .* rewriter.require\(condition, reason\)"
    ):
        declare(lambda x: x + 1, to=lambda x: x, where="wide", name="plus")  # pyright: ignore[reportArgumentType]


def test_a_replacement_whose_parameters_are_unknown_is_refused():
    with pytest.raises(PatternError, match="the parameters of `erf` are unknown; wrap it in a function"):
        declare(lambda x: x + 1, to=torch.erf)


def test_a_decorator_without_what_replaces_the_pattern_says_how_it_is_written():
    def norm_of_mine(x):
        return torch.sin(x)

    form = r"write @rewriter.rewrite\(to=\.\.\.\)"
    with pytest.raises(PatternError, match=f"got `norm_of_mine` and not what replaces a pattern; {form}"):
        rewriter.rewrite(norm_of_mine)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PatternError, match=f"`to` is missing; {form}"):
        rewriter.rewrite()
    with pytest.raises(PatternError, match="norm_of_mine: `name` is 3; give a string"):
        rewriter.rewrite(to=norm_of_mine, name=3)(norm_of_mine)  # pyright: ignore[reportArgumentType]


def test_maybe_takes_its_function_first():
    with pytest.raises(PatternError, match="`x` is no function; give it first, as maybe"):
        declare(lambda x, p: maybe(x, F.dropout, p), to=lambda x, p: x)
    with pytest.raises(PatternError, match="`3` is no function"):
        maybe(3, torch.ones(2))  # pyright: ignore[reportArgumentType]


def test_maybe_applies_its_function_unless_an_argument_is_none():
    x = torch.randn(4)
    assert maybe(torch.mul, x, None) is x
    torch.testing.assert_close(maybe(torch.mul, x, 2.0), x * 2)
    assert maybe(F.dropout, x, None, True) is x


def test_a_users_pattern_is_a_pass_of_its_name_until_it_is_removed():
    pattern = rewriter.rewrite(to=op, name="my_pattern")(norm)
    assert pass_names()[0] == "my_pattern"
    registry.remove(pattern)
    assert "my_pattern" not in pass_names()


def test_a_pattern_of_the_name_of_a_pass_of_the_package_is_refused():
    with pytest.raises(PatternError, match="'norm' is a pass of the package, .* give the pattern another"):
        rewriter.rewrite(to=op, name="norm")(norm)
    assert pass_names().count("norm") == 1


def test_a_pattern_declared_again_replaces_the_older_one():
    first = rewriter.rewrite(to=op, name="again")(norm)
    second = rewriter.rewrite(to=op, name="again")(norm)
    assert [p for p in registry.user_patterns() if p.name == "again"] == [second]
    assert first is not second
    registry.remove(second)


def test_numbers_are_the_same_by_value_and_booleans_are_no_numbers():
    assert same(1, 1.0) and same((1, [2.0]), (1.0, [2])) and same(slice(0, 2), slice(0, 2))
    assert not same(True, 1) and not same(1, 2) and not same(None, 0) and not same((1,), (1, 2))


def test_tensors_are_the_same_by_identity():
    x = torch.ones(2)
    assert same(x, x) and not same(x, x.clone())
