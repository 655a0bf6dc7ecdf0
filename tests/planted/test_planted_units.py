"""Neuron methods on a network whose every unit is known, and on controls where nothing is."""

from __future__ import annotations

import torch

import patchclamp
from patchclamp.audit import audit
from patchclamp.audit.intake import intake
from patchclamp.core.findings import Verdict
from patchclamp.data import Dataset
from patchclamp.methods.material import Material, score_for
from patchclamp.methods.neurons.ablation import Ablation, AblationResult, Group
from patchclamp.methods.neurons.activity import Activity, SiteActivity
from patchclamp.methods.neurons.redundancy import Redundancy
from patchclamp.methods.neurons.selectivity import Selectivity, SelectivityResult
from patchclamp.net import Net
from patchclamp.truth.planted_units import (
    HIDDEN,
    NOISY_CLASS,
    NUM_CLASSES,
    PlantedUnits,
    plan,
    planted_data,
    random_weights,
    shuffled_labels,
)

PLAN = plan()
SELECTIVE = {*PLAN.deciders, PLAN.noisy}


def opened(module: PlantedUnits, data: Dataset) -> tuple[Net, Material]:
    net = patchclamp.open(module.eval(), data.inputs[:3])
    return net, intake(net, data, length=32)


def activity(data: Dataset, module: PlantedUnits | None = None) -> SiteActivity:
    net, material = opened(PlantedUnits() if module is None else module, data)
    return Activity(batch_size=128).run(net, material, net.taps(HIDDEN))[0]


def selectivity(
    data: Dataset, *, shuffles: int = 199, module: PlantedUnits | None = None
) -> SelectivityResult:
    net, material = opened(PlantedUnits() if module is None else module, data)
    found = Activity(batch_size=512).run(net, material, net.taps(HIDDEN))[0]
    assert material.labels is not None
    return Selectivity(shuffles=shuffles).run(
        found.values, material.labels[found.group], found.group
    )


# ---- the network is what it says --------------------------------------------


def test_the_network_decides_right_on_every_row() -> None:
    data = planted_data(200, seed=5)
    with torch.no_grad():
        assert torch.equal(PlantedUnits()(data.inputs).argmax(1), data.labels)


def test_decoys_have_the_size_and_spread_of_deciders() -> None:
    found = activity(planted_data(4000, seed=6)).table
    for column in ("mean", "std", "active"):
        decide = found[column].gather(list(PLAN.deciders)).to_list()
        decoy = found[column].gather(list(PLAN.decoys)).to_list()
        assert torch.allclose(torch.tensor(decide), torch.tensor(decoy), rtol=0.06)


# ---- activity ---------------------------------------------------------------


def test_activity_finds_exactly_the_dead_and_the_dense_units() -> None:
    for seed in range(5):
        found = activity(planted_data(300, seed=seed)).table.with_row_index("number")
        assert tuple(found.filter(found["dead"])["number"]) == PLAN.dead
        assert tuple(found.filter(found["dense"])["number"]) == PLAN.dense


def test_activity_finds_neither_in_random_weights_with_a_bias_towards_firing() -> None:
    module = random_weights(0)
    with torch.no_grad():
        module.read.bias.fill_(0.2)
    found = activity(planted_data(300), module).table
    assert not found["dead"].any()
    assert not found["dense"].any()


# ---- redundancy -------------------------------------------------------------


def test_redundancy_finds_exactly_the_planted_pairs() -> None:
    result = Redundancy().run(activity(planted_data(400, seed=1)).values)
    found = {(a, b): c for a, b, c in result.pairs.iter_rows()}
    assert found.keys() == PLAN.pairs.keys()
    for pair, correlation in PLAN.pairs.items():
        assert abs(found[pair] - correlation) < 1e-5
    moving = PLAN.num_units - len(PLAN.dead)
    assert (result.num_pairs, result.num_tested) == (2, moving * (moving - 1) // 2)
    assert result.null_max < 0.5


def test_redundancy_finds_no_pair_when_observations_are_shuffled() -> None:
    values = activity(planted_data(400, seed=1)).values
    order = torch.rand(values.shape).argsort(0)
    result = Redundancy().run(values.gather(0, order))
    assert result.num_pairs == 0
    assert result.closest is not None
    assert result.closest < 0.95


def test_the_closest_pair_of_independent_units_is_within_its_null() -> None:
    """The 95% quantile of the null is passed by about one draw in twenty."""
    passed = 0
    for seed in range(40):
        values = torch.randn(60, 12, generator=torch.Generator().manual_seed(seed))
        result = Redundancy(shuffles=40, seed=seed).run(values)
        assert result.closest is not None
        passed += result.closest > result.null_max
    assert passed <= 6


# ---- selectivity ------------------------------------------------------------


def test_selectivity_finds_every_planted_unit_and_its_class() -> None:
    result = selectivity(planted_data(480, separation=2.0, seed=2))
    for c, unit in enumerate(PLAN.deciders):
        assert int(result.best[unit]) == c
        assert float(result.auroc[unit]) == 1.0
    assert int(result.best[PLAN.noisy]) == NOISY_CLASS
    assert all(float(result.p_family[u]) <= 0.05 for u in SELECTIVE)


def test_selectivity_finds_nothing_in_the_decoys_and_the_rest() -> None:
    passed = [0] * PLAN.num_units
    for seed in range(10):
        result = selectivity(planted_data(240, seed=10 + seed), shuffles=59)
        for unit in range(PLAN.num_units):
            passed[unit] += float(result.p_family[unit]) <= 0.05
    others = [n for unit, n in enumerate(passed) if unit not in SELECTIVE]
    assert sum(others) <= 3, "no more than one family in twenty, over ten families"
    assert all(passed[unit] == 10 for unit in PLAN.deciders)


def test_dead_units_sit_at_chance() -> None:
    result = selectivity(planted_data(240, seed=3), shuffles=19)
    for unit in PLAN.dead:
        assert float(result.auroc[unit]) == 0.5
        assert float(result.p[unit]) == 1.0


def test_the_interval_of_the_noisy_unit_covers_its_true_area() -> None:
    """A 95% interval covers in 95 of 100 data sets; over 400, give or take 1.1."""
    module, covered = PlantedUnits(), 0
    for seed in range(400):
        data = planted_data(400, seed=seed)
        with torch.no_grad():
            values = module.act(module.read(data.inputs))[:, [PLAN.noisy]]
        assert data.labels is not None
        result = Selectivity(shuffles=1).run(values, data.labels, torch.arange(400))
        assert int(result.best[0]) == NOISY_CLASS
        covered += float(result.low[0]) <= PLAN.noisy_area <= float(result.high[0])
    assert 0.91 <= covered / 400 <= 0.98


def test_shuffled_labels_pass_no_more_often_than_the_level_says() -> None:
    families = 0
    for seed in range(40):
        data = shuffled_labels(planted_data(160, seed=seed), seed=1000 + seed)
        families += bool((selectivity(data, shuffles=39).p_family <= 0.05).any())
    assert families / 40 <= 0.1


def test_random_weights_and_shuffled_labels_together_claim_nothing() -> None:
    families = 0
    for seed in range(20):
        data = shuffled_labels(planted_data(160, seed=seed), seed=2000 + seed)
        result = selectivity(data, shuffles=39, module=random_weights(seed))
        families += bool((result.p_family <= 0.05).any())
    assert families <= 3


# ---- ablation ---------------------------------------------------------------


def group(name: str, units: tuple[int, ...]) -> Group:
    return Group(
        name=name,
        kind="unit group",
        members={HIDDEN: units},
        pool={HIDDEN: tuple(range(PLAN.num_units))},
    )


def ablated(data: Dataset, module: PlantedUnits, *, seed: int = 0) -> AblationResult:
    net, material = opened(module, data)
    groups = [
        group("deciders", PLAN.deciders),
        group("decoys", PLAN.decoys),
        group("fillers", PLAN.fillers[:NUM_CLASSES]),
    ]
    method = Ablation(num_nulls=99, batch_size=512, seed=seed)
    return method.run(net, material, score_for(net, material), groups)


def test_ablation_finds_the_deciders_and_clears_the_decoys() -> None:
    deciders, decoys, fillers = ablated(planted_data(120), PlantedUnits()).done
    assert deciders.null.high is not None
    assert deciders.interval.low > deciders.null.high
    assert deciders.null.p == 0.01
    for other in (decoys, fillers):
        assert other.effect == 0.0
        assert other.null.p is not None
        assert other.null.p > 0.5
    assert deciders.null == decoys.null.__class__(**{**vars(decoys.null), "p": deciders.null.p}), (
        "groups of one kind, size and pool share their random groups"
    )


def test_the_effect_of_the_deciders_is_that_of_guessing() -> None:
    """Without them every row gets the same logits, those of the mean unit."""
    data = planted_data(400, seed=4)
    deciders = ablated(data, PlantedUnits()).done[0]
    assert data.labels is not None
    with torch.no_grad():
        module = PlantedUnits()
        plain = torch.nn.functional.cross_entropy(module(data.inputs), data.labels)
        mean = module.act(module.read(data.inputs))[:, list(PLAN.deciders)].mean(0)
        logits = (module.head.weight[:, list(PLAN.deciders)] @ mean).expand(400, -1)
        without = torch.nn.functional.cross_entropy(logits, data.labels)
    assert abs(deciders.effect - float(without - plain)) < 1e-5


def test_in_random_weights_no_group_is_claimed_more_than_chance_allows() -> None:
    """Three groups in each of 15 networks, of which one in twenty may pass."""
    values = []
    for seed in range(15):
        data = shuffled_labels(planted_data(40, seed=seed), seed)
        net, material = opened(random_weights(seed), data)
        groups = [group("deciders", PLAN.deciders), group("decoys", PLAN.decoys)]
        method = Ablation(num_nulls=39, batch_size=64, seed=seed)
        done = method.run(net, material, score_for(net, material), groups).done
        values += [i.null.p for i in done]
    assert all(p is not None for p in values)
    assert sum(p is not None and p <= 0.05 for p in values) <= 5
    assert max(p or 0 for p in values) > 0.5


# ---- the audit finds them too -------------------------------------------------


def test_an_audit_of_the_planted_network_says_what_is_planted() -> None:
    data = planted_data(240, separation=2.0, seed=7)
    document = audit(PlantedUnits().eval(), data, example_inputs=data.inputs[:3], budget_seconds=60)
    found = {f.id: f for f in document.findings}
    assert found["performance/accuracy"].effect == 1.0
    dead = found["units/dead"]
    assert dead.verdict is Verdict.DOES_NOT_HOLD
    assert dead.effect == len(PLAN.dead) / PLAN.num_units
    assert found["units/redundant"].verdict is Verdict.HOLDS
    assert "2 of" in found["units/redundant"].caveats[0]
    best = next(f for f in document.findings if f.id.startswith(f"units/selective/{HIDDEN}/"))
    assert int(best.id.rsplit("/", 1)[1]) in PLAN.deciders
    assert best.verdict is Verdict.HOLDS
    share = found["units/selective"].effect
    assert share is not None
    assert round(share * PLAN.num_units) == len(SELECTIVE)


def test_an_audit_under_shuffled_labels_does_not_claim_selective_units() -> None:
    data = shuffled_labels(planted_data(240, seed=7), seed=8)
    document = audit(PlantedUnits().eval(), data, example_inputs=data.inputs[:3], budget_seconds=60)
    found = {f.id: f for f in document.findings}
    assert found["performance/accuracy"].verdict is Verdict.DOES_NOT_HOLD
    assert found["units/selective"].verdict is not Verdict.HOLDS
