"""Intervals, nulls and calibration on data drawn from a known law."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchclamp.methods.neurons.selectivity import Selectivity, clustered_deviation
from patchclamp.methods.statistics import bootstrap_mean, permutation_null, wilson
from patchclamp.methods.trust.calibration import Calibration
from patchclamp.methods.trust.performance import frequency_loss, token_loss

Z95 = 1.959963984540054


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grouped(seed: int, *, num_groups: int, size: int, shift: float) -> tuple[Tensor, ...]:
    """Rows in groups that share an effect and a label: (values, labels, groups)."""
    g = generator(seed)
    groups = torch.arange(num_groups).repeat_interleave(size)
    of_group = torch.arange(num_groups) % 2
    shared = torch.randn(num_groups, generator=g) + shift * of_group
    values = shared[groups] + torch.randn(num_groups * size, generator=g)
    return values, of_group[groups], groups


def area(values: Tensor, member: Tensor) -> float:
    inside, outside = values[member], values[~member]
    return float((inside[:, None] > outside).double().mean())


def covers(values: Tensor, labels: Tensor, groups: Tensor, truth: float) -> bool:
    deviation = float(clustered_deviation(values[:, None], labels == 1, groups)[0])
    return abs(area(values, labels == 1) - truth) <= Z95 * deviation


def test_the_clustered_interval_covers_and_the_naive_one_does_not() -> None:
    truth = 0.5 * (1 + math.erf(1.0 / 2 / math.sqrt(2)))  # Phi(shift / sd of the difference)
    clustered = naive = 0
    for seed in range(100):
        values, labels, groups = grouped(seed, num_groups=60, size=8, shift=1.0)
        clustered += covers(values, labels, groups, truth)
        naive += covers(values, labels, torch.arange(values.numel()), truth)
    assert 88 <= clustered <= 99
    assert naive < 75


def test_the_clustered_interval_covers_where_groups_hold_both_classes() -> None:
    """A shared effect then cancels within a group, and the naive interval is too wide."""
    num_groups, size = 50, 6
    wide = covered = 0
    for seed in range(100):
        g = generator(seed)
        groups = torch.arange(num_groups).repeat_interleave(size)
        labels = torch.arange(num_groups * size) % 2
        shared = torch.randn(num_groups, generator=g)
        values = shared[groups] + 0.5 * torch.randn(labels.numel(), generator=g) + 0.8 * labels
        # Rows of two groups: the shift over the deviation sqrt(2 * 1.25) of the difference.
        between = 0.5 * (1 + math.erf(0.8 / math.sqrt(2.5) / math.sqrt(2)))
        within = 0.5 * (1 + math.erf(0.8 / math.sqrt(0.5) / math.sqrt(2)))
        truth = between + (within - between) / num_groups
        covered += covers(values, labels, groups, truth)
        clustered = clustered_deviation(values[:, None], labels == 1, groups)[0]
        rows = torch.arange(labels.numel())
        wide += bool(clustered_deviation(values[:, None], labels == 1, rows)[0] > clustered)
    assert 88 <= covered <= 99
    assert wide >= 95


def false_families(kind: str, *, cut: bool = False) -> float:
    """Share of 40 data sets without any truth in which some unit is called selective.

    Args:
        kind: "rows": independent; "texts": groups with one label each and a shared effect;
            "tokens": slow values and slow labels within each group.
        cut: forget the groups, which is wrong for dependent rows.
    """
    passed = 0
    for seed in range(40):
        g = generator(seed)
        num_groups, size = (160, 1) if kind == "rows" else (24, 12)
        groups = torch.arange(num_groups).repeat_interleave(size)
        num = groups.numel()
        values = torch.randn(num, 8, generator=g)
        labels = torch.randint(0, 3, (num,), generator=g)
        if kind == "texts":
            labels = (torch.arange(num_groups) % 3)[groups]
            values = 0.3 * values + torch.randn(num_groups, 8, generator=g)[groups]
        if kind == "tokens":
            runs = torch.arange(num) // 4
            labels = torch.randint(0, 3, (num // 4,), generator=g)[runs]
            values = 0.3 * values + torch.randn(num // 4, 8, generator=g)[runs]
        result = Selectivity(shuffles=39, seed=seed).run(
            values, labels, torch.arange(num) if cut else groups
        )
        passed += bool((result.p_family <= 0.05).any())
    return passed / 40


def test_the_family_wise_error_is_kept_on_independent_rows() -> None:
    assert false_families("rows") <= 0.1


def test_the_family_wise_error_is_kept_on_labelled_texts() -> None:
    assert false_families("texts") <= 0.1


def test_the_family_wise_error_is_kept_on_dependent_tokens() -> None:
    assert false_families("tokens") <= 0.1


def test_a_null_that_forgets_the_groups_would_break_it() -> None:
    assert false_families("texts", cut=True) > 0.3


def test_units_of_labelled_texts_are_found() -> None:
    """All rows of a group have one label: turning labels within groups would change nothing."""
    values, labels, groups = grouped(0, num_groups=60, size=5, shift=4.0)
    result = Selectivity(shuffles=99).run(values[:, None], labels, groups)
    assert float(result.p_family[0]) == 0.01
    assert result.null_high < 0.8


# ---- calibration ------------------------------------------------------------


def answers(seed: int, num: int, *, sharpen: float) -> tuple[Tensor, Tensor]:
    """Probabilities of three classes and labels drawn from them before sharpening."""
    g = generator(seed)
    logits = 1.5 * torch.randn(num, 3, generator=g)
    labels = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    return (sharpen * logits).softmax(1), labels


def alarms(num_runs: int, *, sharpen: float) -> int:
    raised = 0
    for seed in range(num_runs):
        result = Calibration(draws=300, seed=seed).run(*answers(seed, 300, sharpen=sharpen))
        assert result.null.high is not None
        raised += result.error > result.null.high
    return raised


def test_perfect_calibration_raises_hardly_an_alarm() -> None:
    """The limit is the null's 97.5%: 2.5 alarms in 100 are expected."""
    assert alarms(100, sharpen=1.0) <= 8


def test_over_confidence_raises_the_alarm() -> None:
    assert alarms(10, sharpen=2.0) == 10


def test_under_confidence_raises_the_alarm() -> None:
    assert alarms(10, sharpen=0.4) == 10


def test_the_null_expects_the_error_that_perfect_calibration_shows() -> None:
    errors, nulls = [], []
    for seed in range(60):
        result = Calibration(draws=100, seed=seed).run(*answers(seed, 300, sharpen=1.0))
        errors.append(result.error)
        nulls.append(result.null.mean)
    mean_error, mean_null = sum(errors) / 60, sum(nulls) / 60
    assert abs(mean_error - mean_null) < 0.1 * mean_null


# ---- shared statistics --------------------------------------------------------


def test_wilson_covers_near_its_level() -> None:
    """Exact coverage at this share and size, by summing the binomial law."""
    num, share = 40, 0.3
    coverage = sum(
        math.comb(num, k) * share**k * (1 - share) ** (num - k)
        for k in range(num + 1)
        if wilson(k, num).low <= share <= wilson(k, num).high
    )
    assert 0.93 <= coverage <= 0.97


def test_the_bootstrap_interval_of_a_mean_covers_near_its_level() -> None:
    covered = 0
    for seed in range(100):
        values = torch.randn(60, generator=generator(seed)).exp()  # skewed, mean sqrt(e)
        interval = bootstrap_mean(values, seed=seed, num=400)
        covered += interval.low <= math.exp(0.5) <= interval.high
    assert 82 <= covered <= 99


def test_permutation_p_values_are_uniform_without_an_effect() -> None:
    values = []
    for seed in range(200):
        drawn = torch.randn(40, generator=generator(seed))
        values.append(permutation_null(float(drawn[0]), drawn[1:], "draws").p or 0.0)
    p = torch.tensor(values)
    for level in (0.05, 0.25, 0.5, 0.75):
        assert abs(float((p <= level).double().mean()) - level) < 0.1
    assert min(values) == 0.025  # 1 / (1 + 39): never zero


# ---- the baseline of language models ----------------------------------------


def test_the_frequency_baseline_sees_no_token_of_the_row_it_judges() -> None:
    """A row of a token that no other row holds is as surprising as an unseen token may be."""
    tokens = torch.tensor([[0, 1, 1, 1], [0, 2, 2, 2], [0, 3, 3, 3]])
    vocabulary = 10
    losses = frequency_loss(tokens, vocabulary)
    unseen = -math.log((2 / vocabulary) / (6 + 2))  # six tokens of two kinds in the other rows
    assert torch.allclose(losses, torch.full((3,), unseen, dtype=torch.float64))


def test_what_a_row_says_changes_the_baseline_of_other_rows_only() -> None:
    tokens = torch.randint(0, 9, (6, 20), generator=generator(0))
    before = frequency_loss(tokens, 9)
    shuffled = tokens.clone()
    shuffled[2, 1:] = shuffled[2, 1:].flip(0)
    assert torch.allclose(frequency_loss(shuffled, 9), before)
    changed = tokens.clone()
    changed[2, 1:] = 8
    after = frequency_loss(changed, 9)
    others = torch.tensor([0, 1, 3, 4, 5])
    assert bool((after[others] != before[others]).all())


def test_the_baseline_is_fair_where_tokens_are_independent() -> None:
    """No network can beat the entropy of independent tokens, and the baseline comes near it."""
    share = torch.tensor([0.5, 0.25, 0.125, 0.125])
    tokens = torch.multinomial(share.expand(200, 4), 33, replacement=True, generator=generator(1))
    entropy = float(-(share * share.log()).sum())
    result = token_loss(torch.full((200,), entropy), tokens, vocabulary=4, seed=0)
    assert abs(result.baseline.mean - entropy) < 0.03


def test_padding_makes_the_baseline_no_easier() -> None:
    tokens = torch.randint(1, 9, (12, 10), generator=generator(2))
    plain = frequency_loss(tokens, 9)
    padded = torch.cat([tokens, torch.zeros(12, 30, dtype=torch.long)], 1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, 10:] = False
    assert torch.allclose(frequency_loss(padded, 9, mask), plain)
    assert bool((frequency_loss(padded, 9) < plain).all())
