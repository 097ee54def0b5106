"""Factored bandits: invariants of their statistics, unbiased matching, elimination and return, regret that flattens."""

from __future__ import annotations

import json

import numpy as np
import pytest

from secateur._internal.errors import SecateurError
from secateur.allocation.search.bandit import FactoredBandit, log_f
from secateur.allocation.search.baselines import FactorUCB, JointUCB, SuccessiveElimination, Uniform

RANK_ONE = np.outer([0.9, 0.5, 0.4, 0.3], [0.9, 0.6, 0.2])


def additive(sizes, seed=0):
    """A table of each factor's part."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.linspace(0, 1, size)) / len(sizes) for size in sizes]


def mean_of(parts, played):
    return sum(part[played[..., factor]] for factor, part in enumerate(parts))


def play(player, mean, rounds, noise, seed=0, most=None):
    """Cumulative pseudo-regret after every round."""
    rng = np.random.default_rng(seed)
    best, regret = mean["best"], []
    while player.rounds < rounds:
        asked = player.ask(most)
        true = mean["of"](asked)
        if true.ndim == 2:  # a duel
            player.tell(true[:, 0] - true[:, 1] + noise * rng.standard_normal(len(asked)))
            regret.extend(2 * best - true.sum(1))
        else:
            player.tell(true + noise * rng.standard_normal(len(asked)))
            regret.extend(best - true)
    return np.cumsum(regret)[:rounds]


def rank_one():
    return {"of": lambda played: RANK_ONE[played[..., 0], played[..., 1]], "best": 0.81}


def sum_of(parts):
    return {"of": lambda played: mean_of(parts, played), "best": sum(part.max() for part in parts)}


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("sizes", [(4, 3), (2, 5, 3), (7,)])
def test_statistics_are_antisymmetric_grow_and_leave_ghost_arms_alone(sizes, dueling):
    bandit, mean = FactoredBandit(sizes, dueling=dueling, seed=1), sum_of(additive(sizes))
    before = bandit.matches.copy()
    for _ in range(30):
        play(bandit, mean, bandit.rounds + 1, 0.3, seed=bandit.rounds)
        assert np.allclose(bandit.difference, -bandit.difference.transpose(0, 2, 1))
        assert np.array_equal(bandit.matches, bandit.matches.transpose(0, 2, 1))
        assert (bandit.matches >= before).all()
        before = bandit.matches.copy()
    for factor, size in enumerate(sizes):
        assert not bandit.matches[factor, size:].any()
        assert not bandit.plays[factor, size:].any()
    assert bandit.plays.sum(1).tolist() == [bandit.rounds * (2 if dueling else 1)] * len(sizes)


@pytest.mark.parametrize("dueling", [False, True])
def test_in_a_block_every_active_arm_is_played_at_least_once(dueling):
    bandit, mean = FactoredBandit((5, 3, 2), radius=0.5, dueling=dueling), sum_of(additive((5, 3, 2)))
    shorter = 0
    for _ in range(300):
        asked = bandit.ask()
        counts = bandit.active.sum(1)
        assert len(asked) == counts.max()
        shorter += len(asked) < 5
        for side in (asked[:, 0], asked[:, 1]) if dueling else (asked,):
            for factor, active in enumerate(bandit.active):
                played = np.bincount(side[:, factor], minlength=5)
                assert (played[active] >= 1).all()
                assert played[~active].sum() == 0
        assert np.array_equal(bandit.ask(), asked)
        true = mean["of"](asked)
        bandit.tell(true[:, 0] - true[:, 1] if dueling else true)
    assert shorter > 100


@pytest.mark.parametrize("dueling", [False, True])
def test_a_block_that_dwells_is_near_the_favourite_and_plays_every_active_arm(dueling):
    bandit, mean = FactoredBandit((5, 3, 2), radius=0.5, dueling=dueling, dwell=4), sum_of(additive((5, 3, 2)))
    out = 0
    for number in range(300):
        bandit.favourite = np.array([number % 5, number % 3, -1])
        asked = bandit.ask()
        assert len(asked) == 4 * bandit.active.sum(1).max() or bandit.active.sum() == 3
        looks = [int(factor) for factor in bandit.best()]
        for side in (asked[:, 0], asked[:, 1]) if dueling else (asked,):
            for factor, active in enumerate(bandit.active):
                played = np.bincount(side[:, factor], minlength=5)
                assert (played[active] >= 1).all() and played[~active].sum() == 0
                stay = bandit.favourite[factor]
                if stay < 0 or not active[stay]:
                    out, stay = out + 1, looks[factor]
                assert played[stay] > 0.7 * len(side)
        true = mean["of"](asked)
        bandit.tell(true[:, 0] - true[:, 1] if dueling else true)
    assert out > 300  # beside those that never had one, favourites that were ruled out


def test_one_factor_is_successive_elimination():
    one, other = FactoredBandit((5,), radius=1), SuccessiveElimination((5,), radius=1)
    parts = [np.array([0.1, 0.9, 0.5, 0.3, 0.2])]
    for player in (one, other):
        play(player, sum_of(parts), 3000, 0.2)
    assert one.best().tolist() == other.best().tolist() == [1]
    assert one.active.sum() == len(other.left) == 1


def test_without_noise_the_best_combination_is_left():
    sizes = (4, 3, 5)
    parts = additive(sizes, seed=3)
    bandit = FactoredBandit(sizes, radius=1)
    play(bandit, sum_of(parts), 30_000, 0, most=1000)
    assert bandit.active.sum(1).tolist() == [1, 1, 1]
    assert bandit.best().tolist() == [part.argmax() for part in parts]


@pytest.mark.parametrize("dwell", [1, 3])
@pytest.mark.parametrize("dueling", [False, True])
def test_matching_is_unbiased_whatever_the_others_play(dueling, dwell):
    """Of an additive problem, the mean of D/N is the difference of the parts."""
    sizes, found = (3, 4, 2), []
    parts = additive(sizes, seed=1)
    for seed in range(200):
        bandit = FactoredBandit(
            sizes, radius=1e9, dueling=dueling, dwell=dwell, seed=seed
        )  # nothing is ever eliminated
        play(bandit, sum_of(parts), 60, 0.3, seed=seed)
        found.append(bandit.difference / np.maximum(bandit.matches, 1))
    mean, error = np.mean(found, 0), np.std(found, 0) / len(found) ** 0.5
    for factor, part in enumerate(parts):
        size = len(part)
        expected = part[:, None] - part[None, :]
        assert np.abs(mean[factor, :size, :size] - expected).max() < 5 * error.max()


def test_with_identifiability_alone_the_best_arm_is_ahead_by_its_least_gap():
    found = []
    for seed in range(200):
        bandit = FactoredBandit((4, 3), radius=1e9, seed=seed)
        play(bandit, rank_one(), 60, 0.3, seed=seed)
        found.append(bandit.difference / np.maximum(bandit.matches, 1))
    mean = np.mean(found, 0)
    least = (RANK_ONE[0][None] - RANK_ONE).min(1)  # over what the other plays
    assert (mean[0, 0, 1:4] > least[1:]).all()


def test_what_was_eliminated_comes_back_in_time_and_soon_goes_again():
    bandit = FactoredBandit((4, 3), radius=1)
    play(bandit, rank_one(), 5000, 0.3)
    assert bandit.active.sum() == 2
    bandit.rounds *= 10**6
    assert bandit._active_at(bandit.rounds).sum() > 2
    returned = play(bandit, rank_one(), bandit.rounds + 2000, 0.3)
    assert bandit.active.sum() == 2
    assert returned[-1] < 400


def test_the_regret_of_a_rank_one_problem_flattens():
    regret = play(FactoredBandit((4, 3)), rank_one(), 60_000, 0.3, most=10**6)
    assert 800 < regret[1_999] < 1_200
    late, uniform = regret[-1] - regret[19_999], (0.81 - RANK_ONE.mean()) * 40_000
    assert late < 0.05 * uniform
    tuned = play(FactoredBandit((4, 3), radius=0.5), rank_one(), 60_000, 0.3, most=10**6)
    assert tuned[-1] < regret[-1] / 5


def test_rounds_that_are_planned_at_once_change_nothing():
    ends = []
    for most in (None, 10**6):
        bandit = FactoredBandit((3, 2), radius=0.5, seed=2)
        noise = np.random.default_rng(0).standard_normal(20_000)
        parts = additive((3, 2))
        blocks = 0
        while bandit.rounds < 10_000:
            asked = bandit.ask(most)
            bandit.tell(mean_of(parts, asked) + 0.3 * noise[bandit.rounds : bandit.rounds + len(asked)])
            blocks += 1
        ends.append((blocks, bandit.difference))
    assert ends[1][0] < ends[0][0] / 5
    assert np.array_equal(ends[0][1], ends[1][1])


def test_a_duel_finds_what_its_cardinal_twin_finds():
    parts = additive((4, 4, 3), seed=5)
    twins = [FactoredBandit((4, 4, 3), radius=1, dueling=dueling) for dueling in (False, True)]
    for bandit in twins:
        play(bandit, sum_of(parts), 20_000, 0.3, most=1000)
    assert twins[0].best().tolist() == twins[1].best().tolist() == [part.argmax() for part in parts]
    assert twins[0].active.sum() == twins[1].active.sum() == 3


def test_noise_that_all_combinations_share_is_no_matter_in_a_duel():
    """The same mini-batch for both: what makes it hard or easy cancels."""
    parts = additive((4, 3), seed=5)
    rng = np.random.default_rng(0)
    duel, plain = FactoredBandit((4, 3), radius=1, dueling=True), FactoredBandit((4, 3), radius=1)
    for _ in range(600):
        asked = duel.ask()
        shared = 5 * rng.standard_normal((len(asked), 1))
        true = mean_of(parts, asked) + shared
        duel.tell(true[:, 0] - true[:, 1])
        asked = plain.ask()
        plain.tell(mean_of(parts, asked) + 5 * rng.standard_normal(len(asked)))
    assert duel.best().tolist() == [part.argmax() for part in parts]
    error = [np.abs(b.gaps()[0] - (parts[0].max() - parts[0])).max() for b in (duel, plain)]
    assert error[0] < error[1] / 5


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize(("waiting", "dwell"), [(False, 1), (True, 1), (True, 2)])
def test_what_is_resumed_from_json_goes_on_bit_for_bit(dueling, waiting, dwell):
    mean = sum_of(additive((4, 3)))
    whole = FactoredBandit((4, 3), radius=1, dueling=dueling, dwell=dwell, seed=7)
    whole.favourite = np.array([2, 1])
    play(whole, mean, 500, 0.3)
    if waiting:
        whole.ask()
    again = FactoredBandit.from_json(whole.to_json())
    for bandit in (whole, again):
        play(bandit, mean, 900, 0.3, seed=9)
    assert whole.to_json() == again.to_json()


def test_the_table_tells_what_was_learned():
    parts = [np.array([0.1, 0.5]), np.array([0.4, 0.0, 0.2])]
    bandit = FactoredBandit((2, 3), radius=1)
    assert bandit.table()[0] == {"factor": 0, "arm": 0, "gap": 0.0, "plays": 0, "active": True}
    assert bandit.table()[1]["gap"] is None
    play(bandit, sum_of(parts), 3000, 0.1)
    rows = {(row["factor"], row["arm"]): row for row in bandit.table()}
    assert rows[0, 0]["gap"] == pytest.approx(0.4, abs=0.1)
    assert rows[1, 1]["gap"] == pytest.approx(0.4, abs=0.1)
    assert [key for key, row in rows.items() if row["active"]] == [(0, 1), (1, 0)]
    assert json.loads(json.dumps(bandit.table())) == bandit.table()


def test_what_is_known_of_rewards_need_not_be_learned_and_may_change():
    parts = additive((4, 3), seed=1)
    costs = np.array([[0.0, 0.3, 0.1, 0.2], [0.2, 0.0, 0.4, 9.9]])  # the last is no arm
    told, known = FactoredBandit((4, 3), radius=1e9, seed=3), FactoredBandit((4, 3), radius=1e9, seed=4)
    known.known = -costs
    for _ in range(1500):
        asked = told.ask()
        told.tell(mean_of(parts, asked) - costs[0][asked[:, 0]] - costs[1][asked[:, 1]])
        known.tell(mean_of(parts, known.ask()))
    assert np.allclose(told.gaps(), known.gaps(), atol=0.03, equal_nan=True)
    total = [part - cost[: len(part)] for part, cost in zip(parts, costs, strict=True)]
    assert known.best().tolist() == told.best().tolist() == [part.argmax() for part in total]
    for bandit, settled in ((known, [part.argmax() for part in total]), (known, [part.argmax() for part in parts])):
        bandit.radius = 0.5
        assert bandit._active_at(bandit.rounds).argmax(1).tolist() == settled
        bandit.known = np.zeros((2, 4))
    known.active = known._active_at(known.rounds)
    assert known.best().tolist() == [part.argmax() for part in parts]
    assert known.means()[0, parts[0].argmax()][parts[0].argmin()] == pytest.approx(np.ptp(parts[0]), abs=0.05)


@pytest.mark.parametrize("make", [FactorUCB, JointUCB, SuccessiveElimination])
def test_the_others_learn_too(make):
    parts = additive((3, 3), seed=2)
    player = make((3, 3), spread=0.5)
    regret = play(player, sum_of(parts), 6_000, 0.3)
    assert player.best().tolist() == [part.argmax() for part in parts]
    assert regret[-1] < 0.5 * play(Uniform((3, 3)), sum_of(parts), 6_000, 0.3, most=100)[-1]


def test_the_logarithm_is_never_below_one():
    assert [log_f(t) for t in (0, 1, 2)] == [1, 1, pytest.approx(1.2867, abs=1e-3)]
    assert log_f(10**6) == pytest.approx(np.log(10**6 + 1) + 2 * np.log(np.log(10**6 + 1)))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([], {}, "at least one factor"),
        ([3, 0], {}, "factor 1 has 0 arms"),
        ([3, 1], {}, "factor 1 has one arm: there is nothing to choose"),
        ([2.5], {}, "factor 0 has 2.5 arms"),
        ([2], {"radius": 0}, "radius=0: a number above 0"),
        ([2], {"spread": float("inf")}, "spread=inf"),
        ([2], {"bounds": (1, 0)}, "the least and the largest reward"),
        ([2], {"bounds": 1}, "bounds=1: the least and the largest reward"),
        ([2], {"bounds": ("a", "b")}, "the least and the largest reward"),
        ([2], {"bounds": (0, 1), "spread": 7.0}, "give one of them"),
        ([2], {"dwell": 0}, "dwell=0: a whole number from 1 on"),
        ([2], {"dwell": 1.5}, "dwell=1.5: a whole number"),
        ([2], {"dueling": "no"}, "dueling='no': true or false"),
        ([2], {"seed": -1}, "seed=-1: a whole number from 0 on"),
        (5, {}, "sizes=5: the number of arms of every factor"),
    ],
)
def test_bad_input_is_told(sizes, options, message):
    with pytest.raises(SecateurError, match=message):
        FactoredBandit(sizes, **options)


def test_what_was_asked_for_may_be_written_over():
    one, other = (FactoredBandit((3, 2), bounds=(0, 1)) for _ in range(2))
    plays = one.ask()
    plays[:] = 0
    one.tell([0.1, 0.5, 0.9])
    other.ask()
    other.tell([0.1, 0.5, 0.9])
    assert one.to_json() == other.to_json()
    assert (
        FactoredBandit((3, 2), bounds=np.array([0.0, 1.0])).to_json() == FactoredBandit((3, 2), bounds=(0, 1)).to_json()
    )


def test_bad_rewards_are_told_and_change_nothing():
    bandit = FactoredBandit((3, 2), bounds=(0, 1))
    with pytest.raises(SecateurError, match="nothing is played"):
        bandit.tell([0.5])
    asked = bandit.ask()
    before = bandit.to_json()
    for rewards, message in (
        ([0.5, np.nan, 0.5], "NaN or infinite is not"), ([0.5, 0.5], "3 rewards are expected"),
        (["a", 0.5, 0.5], "one number a combination"), ([[1], [1, 2], [1]], "one number a combination"),
        ([0.5, 1.5, 0.5], r"1.5 is outside of \[0, 1\]"), ([[0.5], [0.5], [0.5]], "finite rewards"),
    ):  # fmt: skip
        with pytest.raises(SecateurError, match=message):
            bandit.tell(rewards)
    assert bandit.to_json() == before
    assert np.array_equal(bandit.ask(), asked)
    with pytest.raises(SecateurError, match="too many"):
        JointUCB([10] * 7)


@pytest.mark.parametrize("damage", [{"plays": [[1]]}, {"sizes": [1]}, {"rng": {}}, {"difference": "x"}])
def test_damaged_states_are_told(damage):
    state = json.loads(FactoredBandit((3, 2)).to_json())
    with pytest.raises(SecateurError):
        FactoredBandit.from_json(json.dumps(state | damage))
