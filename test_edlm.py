"""Every promise of the other five files, checked offline: `pytest`, or a part: `pytest -k sample`.

1. The method, by enumeration. A world is a random table, so small (V <= 3, L <= 4) that every law,
   bound and estimator of edlm.py can be added up exactly. Statistical tests use fixed seeds; beside
   each bound stands how often a correct program would miss it with a fresh seed.
2. Data, and 3. training, sampling and scoring, as a user meets them; published weights.
4. Measurements: python test_edlm.py [small|medium|gpt2-small] prints ratios of speed.
"""

import argparse
import contextlib
import copy
import itertools
import json
import lzma
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import edlm
import sample
import train

if __name__ != "__main__":  # networks this small gain nothing from threads, and wait for them
    torch.set_num_threads(1)

# ------------ 1. The method, by enumeration of worlds small enough to list ------------------------

INF = math.inf
BIT = math.log(2)
RARE = 2e-7  # below it lies one in 5 million p-values of a correct program; some 110 are tested


class World:
    """A denoiser and an energy as random tables over all sequences of V tokens and the mask V.

    A sequence is looked up by its code: its number in base V + 1.
    """

    def __init__(self, V, L, seed, scale=1.5, spread=1.0):
        random = partial(torch.randn, generator=seeded(seed), dtype=torch.float64)
        self.V, self.L, self.M, self.size = V, L, L - 1, (V + 1) ** L
        self.base = (V + 1) ** torch.arange(L)
        self.log_mu = (scale * random(self.size, L, V)).log_softmax(dim=2)  # [code of x_t, i, v]
        self.E = spread * random(self.size, self.size)  # [code of x_t, code of x0]
        self.start = torch.tensor([0] + [V] * self.M)  # BOS, then masks
        self.x0s = self.completions(self.start)  # [V^M, L]
        self.starts = self.start.repeat(5, 1)  # two BOS, a prompt, an infilling, nothing to do
        self.starts[1, 0] = self.starts[2, 1] = self.starts[4, 1:] = 1
        self.starts[3, -1] = V - 1
        self.calls = []  # every `where` the denoiser was asked for

    def code(self, x):
        return (x * self.base).sum(dim=-1)

    def state(self, code):
        return code // self.base % (self.V + 1)

    def masked(self, x0, S):
        """x_S: x0 with the positions S masked."""
        return x0.index_fill(-1, torch.tensor(S).long(), self.V)

    def completions(self, x_t):
        """All the ways to fill the masks of one x_t."""
        choices = [range(self.V) if token == self.V else [token] for token in x_t.tolist()]
        return torch.tensor(list(itertools.product(*choices)))

    def log_q(self, x0, x_t):
        """log mu(x0 | x_t), summed over the masked positions."""
        log_mu = self.log_mu[self.code(x_t)].expand(*x0.shape, self.V)
        return (log_mu.gather(-1, x0[..., None])[..., 0] * (x_t == self.V)).sum(dim=-1)

    def proposal(self, code):
        """All completions of a state, their log mu and their energy."""
        x_t = self.state(code)
        x0 = self.completions(x_t)
        return x0, self.log_q(x0, x_t), self.E[code, self.code(x0)]

    def denoiser(self, x_t, where):
        self.calls.append(where)
        return self.log_mu[self.code(x_t)][where] + 1.0  # logits need not be normalised

    def energy(self, candidates, x_t, log_q):
        """The table's; checks what every energy is promised about its three arguments."""
        x = x_t[:, None].expand_as(candidates)
        assert ((candidates == x) | (x == self.V)).all() and (candidates < self.V).all()
        close(log_q, self.log_q(candidates, x))
        return self.E[self.code(x), self.code(candidates)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def zero_energy(candidates, x_t, log_q):
    return torch.zeros_like(log_q)


def tuples(q, values, n):
    """All n-tuples of draws from q: their probabilities, and the sums of their `values`."""
    p, total = torch.ones(1).double(), torch.zeros(1).double()
    for _ in range(n):
        p, total = (p[:, None] * q).flatten(), (total[:, None] + values).flatten()
    return p, total


@cache
def choice(world, code, k, sign=1):
    """Law of the candidate kept out of k by softmax(-sign E)."""
    x0, log_q, E = world.proposal(code)
    q, w = log_q.exp(), (-sign * E).exp()
    p, rivals = tuples(q, w, k - 1)
    return x0, k * q * (p * w[:, None] / (w[:, None] + rivals)).sum(dim=1)


def visible(t, schedule):
    return 1 - t if schedule == "linear" else 1 - math.cos(math.pi / 2 * (1 - t))


def chain_law(world, start, steps, k=1, window=1.0, schedule="linear", sign=1):
    """Exact law of Algorithm 1's last state, a vector over codes: step by step, coin by coin."""
    law = torch.zeros(world.size).double().index_fill(0, world.code(start), 1.0)
    for j in range(steps):
        a_t, a_s = visible(1 - j / steps, schedule), visible(1 - (j + 1) / steps, schedule)
        r = (a_s - a_t) / (1 - a_t)
        new = torch.zeros_like(law)
        for code in law.nonzero()[:, 0].tolist():
            x0, p = choice(world, code, k if j / steps < window else 1, sign)
            S = (world.state(code) == world.V).nonzero()[:, 0].tolist()
            for coins in itertools.product((0, 1), repeat=len(S)):
                U = list(itertools.compress(S, coins))
                to = code + ((x0 - world.V) * world.base)[:, U].sum(dim=1)
                new.index_add_(0, to, law[code] * r ** len(U) * (1 - r) ** (len(S) - len(U)) * p)
        law = new
    return law


@cache
def reveals(M, steps, window=1.0):
    """How often the chain reveals U of the masked S: {(S, U, in the window): mean over timetables}.

    A timetable gives each position its step, all alike. With steps None, tokens go one by one in
    any order: out of n masked one goes at the n-th smallest of M uniform times, which is above
    1 - window if fewer than n of them are below.
    """
    mean, early, free = Counter(), 1 - window, itertools.product(range(steps or 0), repeat=M)
    timetables = list(free if steps else itertools.permutations(range(M)))
    for timetable in timetables:
        for j in set(timetable):
            S = tuple(i for i, step in enumerate(timetable, 1) if step >= j)
            U = tuple(i for i in S if timetable[i - 1] == j)
            below = (math.comb(M, i) * early**i * window ** (M - i) for i in range(len(S)))
            inside = sum(below) if steps is None else float(j / steps < window)
            mean[S, U, True] += inside / len(timetables)
            mean[S, U, False] += (1 - inside) / len(timetables)
    return mean


def sampler_bound(world, rows, steps, k, window=1.0):
    """Mean over timetables of the sum over steps of -log P_k(x0_U | x_S), equation (10)."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    for (S, U, inside), times in reveals(world.M, steps, window).items():
        for i, code in enumerate(world.code(world.masked(rows, S)).tolist()):
            x, p = choice(world, code, k if inside else 1)
            total[i] -= times * p[(x == rows[i])[:, list(U)].all(dim=1)].sum().log()
    return total


@cache
def log_z(world, code, n, end="lower"):
    """Mean over all n-tuples of draws of one `end` of (8); n = INF: log Z; "exact" claims Z = 1."""
    if end == "exact":
        return 0.0
    if end == "upper":
        return (2 * n - 1) * log_z(world, code, n) - 2 * (n - 1) * log_z(world, code, n - 1)
    _, log_q, E = world.proposal(code)
    if n == INF:
        return (log_q - E).logsumexp(dim=0).item()
    p, total = tuples(log_q.exp(), (-E).exp(), n)
    return (p * (total / n).log()).sum().item()


def joint_formula(world, rows, steps, n, end):
    """Equation (9): the joint cost of all of S times the share |U| / |S| of it that is revealed."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    for (S, U, _), times in reveals(world.M, steps).items():
        x_t = world.masked(rows, S)
        codes = world.code(x_t)
        log_Z = torch.tensor([log_z(world, code, n, end) for code in codes.tolist()])
        log_p = world.log_q(rows, x_t) - world.E[codes, world.code(rows)] - log_Z
        total -= times * len(U) / len(S) * log_p
    return total


def close(a, b, atol=1e-5):
    """Equal to float32 rounding: sums of a few dozen numbers below 30 differ by less than 1e-5."""
    torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=1e-5)


def p_value(drawn, law):
    """Chi-square tail probability of the codes drawn; cells that expect fewer than 5 are pooled."""
    counts, expected = torch.bincount(drawn, minlength=len(law)), law.double() * len(drawn)
    if counts[law == 0].any():
        return 0.0
    own = expected >= 5
    counts, expected = (torch.cat((x[own], x[~own].sum()[None])) for x in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected.clamp(min=5)).sum()  # the pool may expect less
    return torch.special.gammaincc(own.sum().double() / 2, statistic / 2).item()


def per_row(estimate, x0s, repeats):
    """`repeats` independent draws of an estimator for every row of x0s: Float64[repeats, rows]."""
    torch.manual_seed(0)
    return estimate(x0s.repeat(repeats, 1)).double().view(repeats, len(x0s))


def standard_error(draws):
    return draws.std(dim=0) / len(draws) ** 0.5


def assert_mean(draws, truth, slack=1e-5):
    """Every column's mean is within 6 standard errors of the truth (by chance not: 2e-9)."""
    difference = (draws.mean(dim=0) - torch.as_tensor(truth, dtype=torch.float64)).abs()
    assert (difference <= 6 * standard_error(draws) + slack).all(), (draws.mean(dim=0), truth)


def test_categorical_has_the_law_of_its_logits():
    """Every row has its own softmax as law, and its k draws are independent.

    The tail too: 49,900 of 50,000 tokens share a mass of 1e-4 (2e-9 each); due are 400 hits, with a
    standard deviation of 20. Gumbel noise in float32 is 16.6 at most, and log 2e-9 = -20: no hit.
    """
    logits = torch.tensor([[0.0, 1, -1, 3], [5.0, -INF, 5, 2], [-1e4, -1e4 + 1, -1e4 - 2, -1e4]])
    drawn, log_p = edlm.categorical(logits, 60_000, generator=seeded(0))
    close(log_p, logits.double().log_softmax(dim=1).gather(1, drawn))
    for row, p in zip(drawn, logits.double().softmax(dim=1), strict=True):
        assert p_value(4 * row[0::2] + row[1::2], torch.outer(p, p).flatten()) > RARE
    p = torch.cat((torch.full((100,), (1 - 1e-4) / 100), torch.full((49_900,), 1e-4 / 49_900)))
    p = p.double()[torch.randperm(50_000, generator=seeded(0))]
    drawn, _ = edlm.categorical(p.log().repeat(4, 1), 1_000_000, generator=seeded(1))
    tail = drawn[p[drawn] < 1e-7]
    assert abs(len(tail) - 400) < 6 * 20 and len(tail.unique()) > 0.95 * len(tail)


@pytest.mark.parametrize("steps", [None, 1, 2, 3, 5])
def test_draw_step_has_the_law_that_the_losses_weigh(steps):
    """S, U and the window are as likely as |U| / M times their share of the timetables.

    The ranks of a batch are spread evenly and in random order. BOS is never in S.
    """
    M, B, window = 4, 64, 0.4
    law = torch.zeros(2, 32, 32)
    for (S, U, inside), times in reveals(M, steps, window).items():
        law[int(inside), sum(2**i for i in S), sum(2**i for i in U)] += times * len(U) / M
    torch.manual_seed(0)
    x0, bits, draws, sizes = torch.randint(3, (B, M + 1)), 2 ** torch.arange(M + 1), [], []
    for _ in range(1500):
        S, U, when = edlm.draw_step(x0, steps)
        inside = when < window
        draws.append(1024 * inside + 32 * (S * bits).sum(dim=1) + (U * bits).sum(dim=1))
        sizes.append(S.sum(dim=1))
    draws, sizes = torch.stack(draws), torch.stack(sizes)  # [1500, B] both
    assert all(p_value(codes, law.flatten()) > RARE for codes in (draws[:, 0], draws.flatten()))
    if steps is None:  # each number of masks comes B / M = 16 times in every batch
        assert all(torch.bincount(row).tolist() == [0, *[B // M] * M] for row in sizes)
        alike = (sizes[:, :1] == sizes[:, 1:2]).double()  # unshuffled, nearly always alike
        assert_mean(alike, [1 / M], slack=1 / B)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_time_of_is_the_inverse_of_alpha(schedule):
    """And each step of a timetable has the probability (2): chi-square, 5 steps, 2e-7."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    close(edlm.time_of(edlm.alpha(t, schedule), schedule), t)
    masked = torch.ones(1, 20_000, dtype=torch.bool)
    when = edlm.draw_timetable(masked, 5, schedule, seeded(0))
    ends = torch.tensor([visible(1 - j / 5, schedule) for j in range(6)])
    assert p_value((when[0] * 5).round().long(), ends.diff()) > RARE


# ------------ the sampler -------------------------------------------------------------------------
@pytest.mark.parametrize("V, L, k, window", [(3, 4, 1, 1.0), (3, 3, 3, 1.0), (2, 4, 2, 0.5)])
@pytest.mark.parametrize("steps, schedule", [(1, "linear"), (3, "cosine"), (16, "linear")])
@pytest.mark.parametrize("sampler", [edlm.sample, edlm.sample_plain])
def test_sampler_has_the_law_of_algorithm_1(sampler, steps, schedule, V, L, k, window):
    """`sample` and the plain algorithm draw from the enumerated chain, whatever they start from.

    Five rows with five laws share each batch. The test has the power to refuse softmax(+E), no
    energy, another window, one step more and the other schedule, where they change the law.
    """
    world = World(V, L, seed=7, scale=2.5, spread=2.0)
    settings = dict(steps=steps, k=k, window=window, schedule=schedule)
    x = world.starts.repeat(8000, 1)
    given, before = x != V, x.clone()
    torch.manual_seed(0)
    out = sampler(world.denoiser, x, mask_id=V, energy=world.energy, **settings)
    assert torch.equal(x, before) and torch.equal(out[given], x[given]) and (out < V).all()
    codes = world.code(out).view(8000, 5)
    laws = [chain_law(world, start, **settings) for start in world.starts]
    assert all(p_value(*pair) > RARE for pair in zip(codes.T, laws, strict=True))
    other = "linear" if schedule == "cosine" else "cosine"
    changes = [dict(k=1), dict(window=1.0), dict(steps=steps + 1), dict(schedule=other)]
    wrong = [chain_law(world, world.start, **settings | c) for c in (dict(sign=-1), *changes)]
    far = [law for law in wrong if (law - laws[0]).abs().sum() / 2 > 0.1]  # nearer: more draws
    assert all(p_value(codes[:, 0], law) < RARE for law in far) and (far or k == 1)


@pytest.mark.parametrize("window, T", [(0.0, 10), (0.1, 10), (0.3, 10), (1.0, 10), (0.07, 100)])
def test_window_ends_at_the_right_step(window, T):
    """The energy is asked in exactly the steps with j / T < window.

    There are so many positions that every step reveals some (by chance not: 1e-15).
    """
    V, x = 3, torch.full((1, 50 * T), 3).index_fill(1, torch.tensor(0), 0)
    settings = dict(mask_id=V, steps=T, energy=zero_energy, k=2, window=window, generator=seeded(0))
    _, *states = edlm.sample_states(lambda x, where: torch.zeros(where.sum(), V), x, **settings)
    judged = [not state.ess.isnan() for state in states]
    assert judged == [j < round(window * T) for j in range(T)]
    assert states[-1].in_turn.item() == T + sum(judged)
    assert states[-1].in_all.item() == T + 2 * sum(judged)


@pytest.mark.parametrize("steps, k", [*itertools.product([1, 3, 1000, None], [1, 4])])
def test_states_only_reveal_and_steps_that_reveal_nothing_cost_nothing(steps, k):
    """States lead from the start to what `sample` returns; a row's time falls when it is changed.

    At most min(steps, masked) forwards for each row. Without a choice each position is projected
    once, and the energy is not asked where the choice makes no difference.
    """
    world, judged = World(2, 6, seed=0), []
    x = world.starts.repeat(4, 1)

    def energy(candidates, x_t, log_q):
        judged.extend(candidates.view(-1, k, world.L))
        return torch.zeros_like(log_q)

    settings = dict(mask_id=2, steps=steps, energy=energy, k=k)
    states = [*edlm.sample_states(world.denoiser, x, generator=seeded(0), **settings)]
    events, asked, masks = [*world.calls], [*judged], (x == 2).sum(dim=1)
    last = edlm.sample(world.denoiser, x, generator=seeded(0), **settings)
    assert torch.equal(states[0].x, x) and torch.equal(states[-1].x, last) and (last < 2).all()
    for a, b in itertools.pairwise(states):
        assert torch.equal(a.x[a.x < 2], b.x[a.x < 2])
        assert torch.equal(b.t < a.t, (b.x != a.x).any(dim=1))
    times = torch.stack([state.t for state in states])
    forwards, projected = (times.diff(dim=0) < 0).sum(dim=0), sum(map(torch.sum, events))
    assert (forwards <= masks.clamp(max=steps or 1000)).all()
    assert sum(map(len, events)) == forwards.sum()
    assert projected >= masks.sum() and (projected == masks.sum()) == (k == 1 or steps == 1)
    assert all((candidates != candidates[0]).any() for candidates in asked)
    assert (len(asked) > 0) == (k > 1)
    assert (states[-1].in_all - forwards).sum() == k * len(asked)
    ess = torch.cat([state.ess[~state.ess.isnan()] for state in states])
    close(ess, torch.full((len(asked),), k))  # of equal weights


def test_useless_energies_and_logits_are_refused_by_row():
    """They would else be drawn from, silently. But +inf only means that a candidate never wins."""
    world = World(3, 4, seed=0)
    x = world.starts[[0, 4, 1]]  # the second is complete, the last has BOS 1

    def energy(candidates, x_t, log_q):
        E = torch.where(candidates[..., 1] == 0, INF, 0.0)
        return torch.where(x_t[:, :1] == 1, math.nan, E)

    settings = dict(mask_id=3, energy=energy, k=400, steps=1)
    torch.manual_seed(0)
    assert (edlm.sample(world.denoiser, x[:2], **settings)[:, 1] != 0).all()
    with pytest.raises(ValueError, match="row 2: energies"):
        edlm.sample(world.denoiser, x, **settings)
    with pytest.raises(ValueError, match="row 2: energies"):
        edlm.sampler_nelbo(world.denoiser, x0=x % 3, n=400, **settings)
    logits = torch.zeros(70, 3).index_fill(0, torch.tensor(66), math.nan)
    with pytest.raises(ValueError, match="row 66 of the logits"):
        edlm.categorical(logits, 2)


def test_wrong_arguments_are_refused():
    """One that is out of range, a masked BOS, and networks in training mode."""
    world, config = World(2, 4, seed=0), edlm.Config(2, 4, 1, 1, 8)
    denoiser, ar, nce = (cls(config) for cls in edlm.KINDS.values())
    tables = dict(denoiser=world.denoiser, energy=world.energy, mask_id=2)
    draw = partial(edlm.sample, **tables, x=world.start[None], steps=2)
    bound = partial(edlm.sampler_nelbo, **tables, x0=world.x0s, n=2, k=2)
    for call, wrong in [
        (draw, dict(k=0)),
        (draw, dict(x=torch.full((1, 4), 2))),
        (draw, dict(energy=edlm.ARResidual(ar))),
        (bound, dict(k=3)),
        (bound, dict(energy=nce)),
        (partial(edlm.nce_loss, denoiser, nce, world.x0s), dict(mask_id=2)),
    ]:
        with pytest.raises(ValueError):
            call(**wrong)


# ------------ the estimators ----------------------------------------------------------------------
@pytest.mark.parametrize("shift, n", [*itertools.product([0.0, 1e4, -1e4], [2, 3])])
def test_log_partition_bounds_have_the_enumerated_means(shift, n):
    """For different masks in one batch, in log space: exp(1e4) is infinite, 1e4 precise to 1e-3.

    And Theorem 1: E[T_n] rises to log Z, the other end falls to it for n large enough.
    """
    world = World(3, 4, seed=n)
    sets = [(1, 2, 3), (1,), (2, 3), (1, 3), ()]
    x_t = torch.stack([world.masked(world.x0s[5 * i], S) for i, S in enumerate(sets)])

    def energy(*arguments):
        return world.energy(*arguments) + shift

    torch.manual_seed(0)
    ends = edlm.log_partition_bounds(world.denoiser, energy, x_t.repeat(8000, 1), mask_id=3, n=n)
    for end, draws in zip(("lower", "upper"), ends, strict=True):
        truth = [log_z(world, code, n, end) - shift for code in world.code(x_t).tolist()]
        assert_mean(draws.double().view(8000, -1), truth, slack=2e-3 if shift else 1e-5)
    code = world.code(x_t[1]).item()
    lower, upper = ([log_z(world, code, m, e) for m in (4, 7, 11)] for e in ("lower", "upper"))
    assert lower[0] < lower[1] < lower[2] < log_z(world, code, INF) < upper[2] < upper[1]


@pytest.mark.parametrize("end", ["upper", "lower", "exact"])
@pytest.mark.parametrize("steps", [1, 4, None])
def test_joint_nelbo_equals_its_enumerated_formula(steps, end):
    """For rows of a random world the mean over draws is equation (9), finite n included."""
    world = World(3, 4, seed=4, spread=2.0)
    settings = dict(mask_id=3, n=3, steps=steps, log_partition=end)
    joint = partial(edlm.joint_nelbo, world.denoiser, world.energy, **settings)
    rows = world.x0s[::5]
    assert_mean(per_row(joint, rows, 4000), joint_formula(world, rows, steps, 3, end))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, None])
@pytest.mark.parametrize("window", [1.0, 0.5])
def test_sampler_nelbo_is_the_enumerated_bound(window, steps, k):
    """Never below the exact bound for n = k, and within 0.5% of it for n = 200, row by row.

    k = 1, no energy and E = 0 give the factorised bound, for T = infinity `nelbo`, for the same
    masks. What rivals change is measured against it: its mean is known, and less variance is left.
    The exact bound lies above -log of the law of `chain_law`, which knows nothing of timetables:
    -log of a mean over them <= the mean of -log (Jensen), with equality for the one of T = 1.
    """
    world = World(3, 4, seed=8)
    rows = world.x0s[::6]
    truth, plain = (sampler_bound(world, rows, steps, K, window) for K in (k, 1))
    if steps:
        above = truth + chain_law(world, world.start, steps, k, window)[world.code(rows)].log()
        assert above.abs().max() < 1e-9 if steps == 1 else above.min() > 1e-6

    def draws(k, n, repeats, energy=world.energy):
        settings = dict(mask_id=3, k=k, n=n, steps=steps, window=window)
        bound = partial(edlm.sampler_nelbo, world.denoiser, energy, **settings)
        return per_row(bound, rows, repeats)

    factorised = draws(1, 3, 3000)
    if k == 1:
        for energy in (None, zero_energy):
            close(draws(3, 3, 3000, energy), factorised, atol=1e-4)
        if steps is None:
            close(per_row(partial(edlm.nelbo, world.denoiser, mask_id=3), rows, 3000), factorised)
        return assert_mean(factorised, plain)

    def table(candidates, x_t, log_q):  # without the checks of world.energy, which take long
        return world.E[world.code(x_t)[:, None], world.code(candidates)]

    loose = draws(k, k, 3000) - factorised
    tight = draws(k, 200, 1000, table) - draws(1, 200, 1000)
    assert (loose.mean(dim=0) >= truth - plain - 6 * standard_error(loose)).all()
    assert_mean(tight, truth - plain, slack=0.005 * truth)
    mean = tight.mean(dim=1, keepdim=True)
    assert_mean(mean, [(truth - plain).mean()], slack=0.005 * truth.mean())
    assert standard_error(mean) < 0.005 * truth.mean()


@pytest.mark.parametrize("T, bits, k", [(1, 1, 1), (2, 3 / 4, 2), (64, 65 / 128, 4)])
def test_two_equal_bits(T, bits, k):
    """Two fair bits, always equal: the truth is 1 bit. Exact marginals, and (4) is the posterior.

    The joint formula claims fewer. In one step `sample` draws each of the two texts with
    1 - log2(1 - 2^-k) bits, and sampler_nelbo says so. Then two free bits, of which the energy
    judges one: that would show a draw that is its own rival.
    """
    world = World(2, 3, seed=0)
    x0, E = world.x0s[[0, 3]], torch.tensor([-1.0, 60, 60, -1], dtype=torch.float64)
    world.log_mu[:], world.E[:] = -BIT, 0.0
    world.E[world.code(world.start), world.code(world.x0s)] = BIT * E
    for b in (0, 1):  # one bit shows the other
        certain = torch.tensor([-60.0 * b, -60.0 * (1 - b)], dtype=torch.float64)
        world.log_mu[world.code(torch.tensor([[0, b, 2], [0, 2, b]]))] = certain
    tables = dict(denoiser=world.denoiser, energy=world.energy, mask_id=2)
    joint = dict(tables, n=2, steps=T, log_partition="exact")
    draws = per_row(lambda rows: edlm.joint_nelbo(x0=rows, **joint), x0, 10_000)
    assert_mean(draws / BIT, [bits] * 2)
    sampler = dict(tables, k=k, n=400, steps=1)
    draws = per_row(lambda rows: edlm.sampler_nelbo(x0=rows, **sampler), x0, 100)
    assert_mean(draws / BIT, [1 - math.log2(1 - 2**-k)] * 2, slack=0.005)
    world.log_mu[:], world.E[:] = -BIT, 60.0 * world.state(torch.arange(world.size)[:, None])[:, 2]
    draws = per_row(lambda rows: edlm.sampler_nelbo(x0=rows, k=3, n=100, **tables), x0[:1], 8000)
    assert_mean(draws, sampler_bound(world, x0[:1], None, 3), slack=0.01)


# ------------ energies and networks ---------------------------------------------------------------
def tiny(cls):
    """A small network in float64, with weights so large that every part of it matters."""
    torch.manual_seed(0)
    net = cls(edlm.Config(3, 4, 2, 2, 8)).eval()
    for p in net.parameters():
        p.data += torch.randn_like(p) * (0.7 if p.ndim > 1 else 0.3)
    return net.double()


@torch.no_grad()
@pytest.mark.parametrize("carry_over", [True, False])
def test_ar_residual(carry_over, monkeypatch):
    """mu exp(-E) is p_AR of the masked tokens (coAR: Z = 1) or of all (Z = 1 if all are masked).

    Every candidate is judged alone: in pieces of five they get the same energies as together.
    """
    world, ar = World(3, 4, seed=3), tiny(edlm.AutoregressiveLM)
    energy = edlm.ARResidual(ar, carry_over)
    monkeypatch.setattr(edlm, "JUDGED_TOKENS", 20)
    for code in range(0, world.size, 4):  # all with BOS 0
        x_t, (x0, log_q, _) = world.state(code), world.proposal(code)
        asked = x0[None], x_t[None], log_q[None]
        log_p = (log_q - edlm.in_chunks(energy, *asked))[0]
        close(log_p, (ar.log_prob(x0) * (x_t == 3 if carry_over else 1)).sum(dim=1))
        if carry_over or (x_t[1:] == 3).all():
            close(log_p.exp().sum(), torch.tensor(1.0))
        if not carry_over:  # the plain reference of section 4
            close(plain_ar_energy(ar, *asked), energy(*asked))


def test_nce_optimum_is_the_log_ratio():
    """Energy as a free table: the expected gradient is 0 at E = log mu - log q(x0 | x_t).

    One above it every cell's is positive; at E = 0 it leads towards the optimum. Beyond 6 standard
    errors of 100 means: by chance 3e-8; below 3: 1e-7.
    """
    world = World(3, 3, seed=9, scale=0.7)
    data = torch.randn(9, generator=seeded(0)).double().softmax(dim=0)
    best = torch.full_like(world.E, INF)
    for code in range(0, world.size, 4):  # all with BOS 0
        x_t, (x0, log_q, _) = world.state(code), world.proposal(code)
        q = data[((world.x0s == x_t) | (x_t == 3)).all(dim=1)]  # in the same order
        if len(x0) > 1:
            best[code, world.code(x0)] = log_q - (q / q.sum()).log()
    cells, nce_loss = best.isfinite(), partial(edlm.nce_loss, world.denoiser, world.energy)

    def z_scores(E):
        world.E, gradients = E.where(cells, 0).requires_grad_(), []
        torch.manual_seed(0)
        for drawn in torch.multinomial(data, 100_000, replacement=True).split(1000):
            loss = nce_loss(world.x0s[drawn], mask_id=3)
            gradients.append(torch.autograd.grad(loss, world.E)[0][cells])
        gradients = torch.stack(gradients)
        return gradients.mean(dim=0) / standard_error(gradients)

    above, at_zero = z_scores(best + 1), z_scores(0 * best)
    assert z_scores(best).abs().max() < 6
    assert above.min() > 3
    assert at_zero.abs().max() > 6 and (at_zero * best[cells].sign()).max() < 6


def test_nce_loss_trains_the_energy_only():
    """From a denoiser the energy starts at 0, so the loss at 2 log 2; only the energy learns."""
    denoiser = tiny(edlm.Denoiser).float()
    energy = edlm.NCEResidual.from_denoiser(denoiser)

    def tied(candidates, x_t, log_q):
        return energy(candidates, x_t, log_q) + 0 * log_q

    loss = edlm.nce_loss(denoiser, tied, torch.tensor([[0, 1, 2, 1]] * 64), mask_id=3)
    assert loss.item() == pytest.approx(2 * BIT)
    loss.backward()
    assert all(p.grad is None for p in denoiser.parameters())
    assert energy.mlp_out.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("prompts", [[[0], [1]], [[2, 1]]])
def test_ar_model_is_causal_normalised_and_samples_its_own_law(prompts):
    """`sample` has a cache; prompts have one or two tokens, and differ within a batch."""
    ar, world, given = tiny(edlm.AutoregressiveLM), World(3, 4, seed=0), len(prompts[0])
    out = ar.sample(torch.tensor(prompts).repeat(20_000, 1), 4, generator=seeded(0))
    for i, prompt in enumerate(prompts):
        x = world.completions(torch.tensor(prompt + [3] * (4 - given)))
        log_p, law = ar.log_prob(x), torch.zeros(world.size, dtype=torch.float64)
        where = torch.rand(x.shape, generator=seeded(1)) < torch.tensor([0, 0.5, 0.5, 0.5])
        asked = edlm.token_log_prob(ar.logits(x, where), x[where][:, None])
        close(asked[:, 0], log_p[where])
        for j in range(1, 4):  # what comes later moves nothing; BOS costs nothing
            other = torch.cat((x[:, :j], (x[:, j:] + 1) % 3), dim=1)
            close(ar.log_prob(other)[:, :j], log_p[:, :j])
        law[world.code(x)] = log_p[:, given:].double().sum(dim=1).exp()
        # the 61 columns of logits that are never used have no share in the sum
        close(torch.stack((law.sum(), log_p[:, 0].abs().max())), torch.tensor([1.0, 0.0]))
        assert p_value(world.code(out[i :: len(prompts)]), law) > RARE


class Tables:
    """An AR model as a table: logits of x_i by the code of x_<i (masks on the rest)."""

    def __init__(self, world, seed):
        self.world = world
        shape = world.size, world.L, world.V
        self.log_p = 1.5 * torch.randn(shape, generator=seeded(seed), dtype=torch.float64)

    def logits(self, x, where):
        assert (x < self.world.V).all() and not where[:, 0].any()
        position = torch.arange(self.world.L)
        before = torch.where(position < position[:, None], x[:, None], self.world.V)  # [B, i, L]
        return self.log_p[self.world.code(before), position][where]

    def law(self, start):
        """p(x0 | x_t): the product over masked i of p(x_i | x_<i), a vector over codes."""
        x = self.world.completions(start)
        after_bos = (torch.arange(self.world.L) > 0).expand_as(x)
        log_p = self.logits(x, after_bos)
        log_p = log_p.log_softmax(dim=1).gather(1, x[:, 1:].reshape(-1, 1)).view(len(x), -1)
        masked = (start == self.world.V)[1:]
        law = torch.zeros(self.world.size, dtype=torch.float64)
        law[self.world.code(x)] = log_p.where(masked, 0).sum(dim=1).exp()
        return law


@pytest.mark.parametrize("zeros", ["none", "in mu", "in p_AR", "alike"])
def test_sample_exact_draws_from_the_ar_model(zeros):
    """For random tables, from every kind of start, five rows with five laws in one batch.

    With zeros in mu where p_AR has mass, and the other way round. Where both are alike no draft is
    refused. The test has the power to refuse the proposal's own law.
    """
    world = World(3, 4, seed=5, scale=1.5)
    ar = Tables(world, seed=6)
    impossible = torch.rand(world.log_mu.shape, generator=seeded(7)) < 0.3
    impossible &= ~impossible.all(dim=2, keepdim=True)
    if zeros == "in mu":
        world.log_mu[impossible] = -INF
    if zeros == "in p_AR":
        ar.log_p[impossible] = -INF
    if zeros == "alike":  # tables that do not look at the text
        world.log_mu[:] = ar.log_p[:] = ar.log_p[:1]
    torch.manual_seed(0)
    x = world.starts.repeat(8000, 1)
    states = [*edlm.sample_exact(world.denoiser, ar, x, mask_id=3)]
    out = states[-1].x
    assert torch.equal(out[x != 3], x[x != 3]) and (out < 3).all()
    codes = world.code(out).view(8000, 5)
    laws = [ar.law(start) for start in world.starts]
    assert all(abs(law.sum() - 1) < 1e-9 for law in laws)
    assert all(p_value(*pair) > RARE for pair in zip(codes.T, laws, strict=True))
    if zeros == "alike":
        assert (states[-1].refused == 0).all() and len(states) == 2
    else:
        assert p_value(codes[:, 0], chain_law(world, world.start, 1)) < RARE
    for a, b in itertools.pairwise(states):  # one refusal a round, or the row is finished
        assert torch.equal(a.x[a.x < 3], b.x[a.x < 3]) and (b.refused - a.refused <= 1).all()
        still = (a.x == 3).any(dim=1)
        assert torch.equal(b.in_turn > a.in_turn, still)
        assert ((b.refused > a.refused) | ~(b.x == 3).any(dim=1)).all()


def test_nothing_as_large_as_all_logits_is_held(monkeypatch):
    """200 candidates need no module's output to be larger than the denoiser's logits [N, V]."""
    config, sizes = edlm.Config(3000, 16, 1, 2, 8), []
    V, N, rows = 3008, 30, 10  # V with its padding
    denoiser, ar = edlm.Denoiser(config).eval(), edlm.AutoregressiveLM(config).eval()
    for module in (*denoiser.modules(), *ar.modules()):
        module.register_forward_hook(lambda module, given, made: sizes.append(made.numel()))
    monkeypatch.setitem(edlm.ROWS, "cpu", rows)
    monkeypatch.setattr(edlm, "JUDGED_TOKENS", 256)
    x = torch.full((2, 16), config.mask_id).index_fill(1, torch.tensor(0), 0)
    edlm.sample(denoiser, x, mask_id=3000, steps=2, energy=edlm.ARResidual(ar), k=200)
    assert rows * V in sizes and max(sizes) <= N * V


# ------------ 2. Data -----------------------------------------------------------------------------

ROOT = Path(__file__).parent
SHORT = "--batch_size 8 --max_steps 6 --warmup_steps 2 --log_every 1 --save_every 2"
SMALL = f"{SHORT} --n_layer 1 --n_embd 16 --n_head 2 --dropout 0.1"
FRESH = f"train.py --data data/small --out new {SMALL}"
RESUME = "train.py --resume --out out/toy"
BYTES = "data.py texts/a.txt texts/b.txt texts/c.txt --tokenizer bytes --out"
needs_gpt2 = pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="no vocabulary")


def call(command):
    """Exit code of a script's command line, on the CPU: only there are results equal to the bit."""
    script, *argv = shlex.split(command)
    main = {"train.py": train.main, "sample.py": sample.main, "data.py": data.main}[script]
    if script != "data.py":
        argv += ["--device", "cpu"]
    try:
        data.run(partial(main, argv))
    except SystemExit as stop:
        return stop.code or 0
    return 0


def contents(folder="."):
    """All files in a folder, by their paths in it."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refuses(capsys, command, words):
    """One plain line on stderr that has the words, exit code 2, nothing changed on disk."""
    before = contents()
    capsys.readouterr()
    assert call(command) == 2
    error = capsys.readouterr().err.split("\r")[-1].lstrip()  # behind a progress bar
    assert re.fullmatch(f"error: .*{words}.*\n", error) and len(error) < 400, error
    assert before == contents()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with three texts, their shards, small toy data, and all stages of a toy run."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(folder):
        Path("texts").mkdir()
        for name in "abc":  # 42 documents each, all different, of 5 bytes
            documents = [f"{name}{i:04}" for i in range(42)]
            Path(f"texts/{name}.txt").write_text("\n\n".join(documents))
        assert call(f"{BYTES} data/bytes") == 0
        data.make_toy("data/small", n_train=36, n_val=16)  # 4 steps an epoch, 4 blocks over
        assert call(f"{FRESH} --out out/toy") == 0
    return folder


@pytest.fixture
def here(tmp_path, runs, monkeypatch):
    """A working folder with a copy of `runs`, on a machine without the package transformers."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edlm, "token_log_prob", edlm.token_log_prob)  # --compile replaces it
    monkeypatch.setitem(sys.modules, "transformers", None)


def test_data_toy_language_is_a_distribution_with_the_stated_entropy():
    # By hand: 3 templates, 6 names, 5 friends, 4 colours, 4 objects, no two choices the same story.
    assert len(set(data.toy_language())) == len(data.toy_language()) == 3 * 6 * 5 * 4 * 4
    assert data.toy_entropy() == pytest.approx(math.log(1440), abs=1e-9)
    counts = Counter(data.toy_stories(30000, seed=1))
    # Each is expected 20.8 +- 4.6 times: a false alarm in 1e6 seeds.
    assert len(counts) == 1440 and max(counts.values()) < 20.8 + 7 * 4.6
    good = "ben has a black boat. he gives it to eva today. she likes the black boat."
    assert data.toy_is_valid(good) and not data.toy_is_valid(good.replace("the black", "the red"))


def test_data_blocks_cut_the_stream_and_span_shards(here):
    """Documents end with END_OF_TEXT. A text to score is cut alike, its tokenisation undone."""
    documents = [[*f"{name}{i:04}".encode(), 256] for name in "abc" for i in range(42)]
    stream = sum(documents, [])
    expected = [[256, *stream[i * 30 : (i + 1) * 30], 256] for i in range(24)]
    assert [block.tolist() for block in data.Blocks("data/bytes", "train", 32)] == expected
    (held_out,) = data.Blocks("data/bytes", "val", 26)  # about a tenth of the last file
    assert held_out.tolist() == [256, *stream[-24:], 256]
    header = np.fromfile("data/bytes/train_000.bin", "<i4", 256)  # as llm.c reads it
    assert header.tolist() == [20240520, 1, 252] + [0] * 253
    tokenizer = data.get_tokenizer("bytes")
    scored, tokens = data.text_blocks("texts/a.txt", tokenizer, 32)
    assert scored.tolist() == expected[:8] and tokens == 252
    Path("wiki").write_text("= = It = = \n he didn 't @-@ 1 @,@ 0")
    (scored,), _ = data.text_blocks("wiki", tokenizer, 99, "wikitext")
    assert data.decode(tokenizer, scored) == "== It ==\nhe didn't-1,0"


def test_data_batches_are_a_permutation_per_epoch():
    order = data.BatchOrder(23, 4, 2, seed=0)  # 5 steps an epoch, 3 blocks left out
    whole = [*itertools.islice(order, 20)]
    for epoch in (whole[:10], whole[10:]):
        assert len(set(sum(epoch, []))) == 20 and set(sum(epoch, [])) <= set(range(23))
    assert whole[:10] != whole[10:]


def test_data_is_read_in_the_forms_that_people_have(here):
    texts = ["Häß und\nmehr", "世界", 'a "b"']
    plain, marked = "\n\n".join(texts), "\n<|endoftext|>\n".join(texts)
    Path("plain/in").mkdir(parents=True)
    Path("plain/in/it").write_bytes(("\ufeff" + plain.replace("\n", "\r\n")).encode())
    shutil.make_archive("packed", "zip", "plain")
    Path("packed.xz").write_bytes(lzma.compress(plain.encode()))
    Path("marked").write_text(marked)
    Path("lines").write_text("\n".join(json.dumps(dict(n=1, text=text)) for text in texts))
    for path in ("plain/in/it", "packed.zip", "packed.xz", "marked", "lines"):
        assert list(data.read_text(path)) == texts
    shutil.make_archive("archives/texts", "xztar", "texts")
    shutil.make_archive("openwebtext", "tar", "archives")
    texts = [Path(f"texts/{name}.txt").read_text() for name in "abc"]
    assert list(data.read_text("openwebtext.tar")) == texts
    Path("text8").write_text("a" * 90 + "b" * 5 + "c" * 5)
    assert list(data.read_text8("text8")) == ["a" * 90, "c" * 5]  # to train and to validate


class Killed(BaseException):
    """Stands for SIGKILL: no handler catches it, so nothing is cleaned up after it."""


def test_data_killed_at_a_rename_ends_with_the_same_bytes(here, monkeypatch, capsys):
    """When the command is repeated, a file that has its whole shard is not read again."""
    rename = os.replace

    def killed(source, target):
        if Path(target).name == "train_001.bin":
            raise Killed
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        call(f"{BYTES} new")
    refuses(capsys, "train.py --data new", "train_001.bin is missing or damaged: run the")
    finished = os.stat("new/train_000.bin")
    assert call(f"{BYTES} new") == 0 and contents("new") == contents("data/bytes")
    assert os.stat("new/train_000.bin").st_mtime_ns == finished.st_mtime_ns
    path = Path("texts/a.txt")
    path.write_text(path.read_text().upper())  # another source of the same name and size
    refuses(capsys, f"{BYTES} new", "holds shards of another source")


def test_data_is_downloaded_again_if_damaged_and_never_if_complete(here, capsys):
    path = Path("s0.tar").absolute()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add("texts")
    command = f"data.py openwebtext {path.as_uri()} --tokenizer bytes --val_docs 1 --out new"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"texts/b", b"\xff" * 7))  # tarfile would take it for the end
    assert call(command) == 2 and "run again to fetch it again" in capsys.readouterr().err
    path.write_bytes(content)
    assert call(command) == 0
    path.unlink()
    assert call(command) == 0


# ------------ 3. Training, sampling, scoring and the README ---------------------------------------
def test_mistakes_end_in_one_line_and_change_nothing(here, capsys):
    for command, words in {
        "train.py --stepz 4": "unrecognized arguments: --stepz 4",
        f"{FRESH} --out out/toy --stage ar": "ar.pt exists: --resume, --overwrite, or",
        f"{RESUME} --stage ar --data data/bytes": "ar.pt was made with tokenizer toy, not bytes",
        f"{RESUME} --max_steps 8": "energy.pt corrects this denoiser as it is",
        "sample.py --prompt 'ben has a yacht'": "the toy tokenizer has no word ' yacht'",
        "sample.py --eval --data data/bytes": "holds bytes tokens, out/toy needs toy",
    }.items():
        refuses(capsys, command, words)
    assert call(f"{FRESH} --out out/toy --overwrite --stage denoiser --seed 1") == 0
    refuses(capsys, f"{RESUME} --stage energy --max_steps 8", "energy.pt was made with denoiser")
    refuses(capsys, "sample.py --energy nce", "energy.pt corrects another denoiser")
    path = Path("out/toy/ar.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # a bit of the weights: only the checksums can tell
    path.write_bytes(content)
    refuses(capsys, RESUME, "ar.pt is damaged")


def saved(out, stage):
    """All that a stage wrote, but for the speeds in its log."""
    content = torch.load(f"{out}/{stage}.pt", weights_only=True)
    del content["training"]["log_bytes"]
    content["log"] = [json.loads(line) for line in open(f"{out}/{stage}.jsonl")]
    for row in content["log"]:
        row.pop("tokens_per_second", None)
    return content


def test_train_goes_on_with_a_finished_run(here, capsys):
    """Settings that are typed win over the run's. The table has the loss of the saved weights."""
    before, settings = contents(), json.loads(Path("out/toy/settings.json").read_text())
    assert call(RESUME) == 0 and contents() == before  # there is nothing left to do
    line = re.search(r"^AR +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.M)
    ar, _ = edlm.load_checkpoint("out/toy/ar.pt")
    x0 = torch.stack(list(data.Blocks("data/small", "val", 21)))
    nats = -ar.log_prob(x0).sum(dim=1).mean().item() / 20
    shown = [float(value) for value in line.groups()]
    assert shown == pytest.approx([nats, math.exp(nats)], abs=6e-4)
    assert call(f"{RESUME} --stage ar --max_steps 8 --lr 0.001") == 0
    rows = [row for row in saved("out/toy", "ar")["log"] if "loss" in row]
    assert [row["step"] for row in rows] == [*range(1, 9)]
    rates = [0.012 / 2, 0.001 / 4]  # the first of two warm-up steps; two thirds down the cosine
    assert [rows[0]["lr"], rows[6]["lr"]] == pytest.approx(rates)
    settings.update(denoiser_steps=8, ar_steps=8, energy_steps=8, lr=0.001)
    assert settings == json.loads(Path("out/toy/settings.json").read_text())


@pytest.mark.parametrize(
    "stage, module, name, act, ends",
    [
        ("energy", torch, "save", Mock(side_effect=Killed), None),
        ("ar", torch, "save", Mock(side_effect=OSError(28, "disk full")), 2),
        ("denoiser", train, "train_step", partial(signal.raise_signal, signal.SIGINT), 130),
    ],
)
def test_train_resumes_to_the_bit(here, monkeypatch, stage, module, name, act, ends):
    """It is killed, cannot write or is told to stop, when it calls a function the third time."""
    shutil.copytree("out/toy", "new")
    Path(f"new/{stage}.pt").unlink()
    real, calls, code = getattr(module, name), itertools.count(1), None

    def patched(*args):
        if next(calls) == 3:
            act()
        return real(*args)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(module, name, patched)
        code = call(f"{FRESH} --stage {stage}")
    assert code == ends
    with open(f"new/{stage}.jsonl", "a") as log:
        log.write('{"step": 5, "tok')  # half a row, as a buffer would leave
    assert call(f"train.py --resume --out new --stage {stage}") == 0
    resumed, whole = (saved(out, stage) for out in ("new", "out/toy"))
    dump = partial(json.dumps, default=torch.Tensor.tolist)
    assert hash(dump(resumed)) == hash(dump(whole))  # pytest would print a megabyte of texts


def test_train_in_two_processes_does_what_one_does(here):
    """But for rounding: 2e-3 is allowed. Other masks, or no division by 2, make 1e-2."""
    command = f"{FRESH} --optimizer adamw --lr 0.001 --energy_lr 0.001 --micro_batch 2"
    assert call(f"{command} --out one") == 0
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
    argv = shlex.split(f"{torchrun} {ROOT}/{command} --device cpu")
    ended = subprocess.run(argv, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.count("perplexity") == 1, ended.stderr
    for stage in train.STAGES:
        rows = zip(saved("one", stage)["log"], saved("new", stage)["log"], strict=True)
        assert all(one == pytest.approx(two, rel=2e-3) for one, two in rows)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has none before 2.9")
def test_train_muon_is_torchs_but_for_rounding():
    """Torch's is in bfloat16, 0.8% from ours. Without Nesterov's step the two are 19% apart."""
    grads, moved = torch.randn(5, 96, 32, generator=seeded(0)), []
    for make in (train.Muon, partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")):
        p = torch.nn.Parameter(torch.ones(96, 32))
        optimizer = make([p], lr=0.02, weight_decay=0.1)
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()
        moved.append(1 - p.detach())
    assert (moved[0] - moved[1]).norm() < 0.02 * moved[1].norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compile", ["no", "yes"])
def test_cuda_trains_resumes_samples_and_scores(here, compile):
    for command in [
        f"{FRESH} --max_steps 3 --compile {compile}",
        f"train.py --resume --out new --stage ar --max_steps 5 --compile {compile}",
        "sample.py --out new --num 2",
        "sample.py --eval --out new --data data/small --steps 2 --k 2 --n 4",
    ]:
        argv = [sys.executable, *shlex.split(f"{ROOT}/{command}")]
        assert subprocess.run(argv).returncode == 0
    for stage in train.STAGES:  # dropout differs; the first loss is that of guessing
        rows = [saved(out, stage)["log"][0]["loss"] for out in ("new", "out/toy")]
        assert rows[0] == pytest.approx(rows[1], rel=0.02)


def figures(command):
    """The rows that a command writes to --json, by their names."""
    assert call(f"{command} --json rows.json") == 0
    rows = json.loads(Path("rows.json").read_text())["rows"]
    return {row.get("name") or row["model"]: row for row in rows}


@pytest.mark.parametrize("energy", ["none", "ar", "coar", "nce", "exact"])
def test_sample_figures_of_every_energy(here, monkeypatch, energy):
    """Passes are counted here in the transformers; the rest follows from the tokens drawn."""
    read, real = Counter(), edlm.Transformer.forward

    def counted(self, h, caches=None):
        read[self] += len(h)
        return real(self, h, caches)

    monkeypatch.setattr(edlm.Transformer, "forward", counted)
    monkeypatch.setattr(data, "toy_is_valid", lambda text: len(text) % 2 == 0)
    (row,) = figures(f"sample.py --energy {energy} --num 6 --steps 4 --k 3 --window 0.5").values()
    in_all = read.total() - 6  # texts that a network read, but for the AR perplexity
    drafted = next(iter(read.values()))  # by the denoiser, which is always the first
    judged = in_all - drafted if energy in sample.ENERGIES else 0
    in_turn = in_all - judged + judged / 3  # three candidates side by side are one pass
    assert row["passes_in_all"] == pytest.approx(in_all / 6)
    assert row["passes_in_turn"] == pytest.approx(in_turn / 6)
    assert 1 <= row["ess"] < 3.01 if judged else row["ess"] is None
    if energy == "exact":  # behind the denoiser's pass, all AR passes but the last find a refusal
        refused = 20 * (1 - row["acceptance"])
        assert row["passes_in_turn"] - 2 <= refused <= row["passes_in_turn"] - 1
    x = torch.tensor(row["tokens"])
    assert row["valid_fraction"] == sum(len(text) % 2 == 0 for text in row["texts"]) / 6
    shares = torch.stack([tokens.bincount(minlength=36) / 20 for tokens in x[:, 1:]])
    entropy = -torch.xlogy(shares, shares).sum(dim=1) / BIT
    assert row["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    ar, _ = edlm.load_checkpoint("out/toy/ar.pt")
    cost = -ar.log_prob(x).sum(dim=1).detach() / 20
    perplexity = cost.mean().exp().item()
    assert row["ar_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    error = perplexity * standard_error(cost).item()
    assert row["ar_perplexity_error"] == pytest.approx(error, rel=1e-3)


def test_sample_flags_and_seeds_decide_what_is_drawn(here):
    command = "sample.py --energy nce --num 4"
    rows = [figures(command + flag)["EDLM-NCE T=2 k=16"] for flag in ("", "", " --seed 1")]
    assert rows[0]["tokens"] == rows[1]["tokens"] != rows[2]["tokens"]
    for flags, given in {
        "--model ar --prompt 'ben has a red'": "ben has a red.*",
        "--energy exact --infill 'ben ___*2 red'": "ben.* red",
    }.items():
        (row,) = figures(f"sample.py --num 3 {flags}").values()
        assert all(re.fullmatch(given, text) for text in row["texts"])


@torch.no_grad()
def test_eval_table(here, capsys):
    """What is known of its rows: the floor, the AR model's, and where a choice gains nothing."""
    rows = figures("sample.py --eval --n 8 --k 1,2 --steps 2,4")  # of the data in settings.json
    assert "scored 304 of 304 tokens of data/small\n" in capsys.readouterr().out
    nats = {name: row["nats_per_token"] for name, row in rows.items()}
    assert nats["language (floor)"] == pytest.approx(math.log(1440) / 20)
    for name, T, k in itertools.product(("EDLM-AR", "EDLM-coAR", "EDLM-NCE"), (2, 4), (1, 2)):
        row = rows[f"{name} T={T} k={k}"]
        gain = nats[f"MDLM T={T}"] - row["nats_per_token"]
        assert row["what"] == "bound" and row["gain"] == pytest.approx(gain, abs=1e-6)
        assert (row["gain"] == 0) == (row["gain_standard_error"] == 0) == (k == 1)  # same masks
    assert nats["EDLM-NCE joint, log Z lower"] <= nats["EDLM-NCE joint, log Z upper"]
    ar, _ = edlm.load_checkpoint("out/toy/ar.pt")
    x = torch.stack(list(data.Blocks("data/small", "val", 21)))
    cost = -ar.log_prob(x).sum(dim=1).double() / 20
    assert nats["AR"] == nats["EDLM-coAR exact"] == pytest.approx(cost.mean().item(), rel=1e-5)
    assert rows["AR"]["standard_error"] == pytest.approx(standard_error(cost).item(), rel=1e-4)
    assert rows["AR"]["perplexity"] == pytest.approx(math.exp(nats["AR"]))
    row = sample.score_row("", "", torch.tensor([42.0]), 21, data.get_tokenizer("bytes"))
    assert row["bits_per_byte"] == pytest.approx(42 / 20 / BIT)  # END_OF_TEXT is no byte


class Outside(torch.nn.Module):
    """Both parts of a causal LM: a token for every two characters, its law a table of bigrams."""

    eos_token_id, bos_token_id = 50256, 0
    device, config = torch.device("cpu"), SimpleNamespace(vocab_size=50257)
    from_pretrained = classmethod(lambda cls, name: cls())

    def forward(self, given, add_special_tokens=True):
        if isinstance(given, str):
            assert not add_special_tokens
            return {"input_ids": [ord(character) for character in given[::2]]}
        table = 3 * torch.sin(given[:, :, None] + torch.arange(50257) * (1 + given[:, :, None]))
        return SimpleNamespace(logits=table)  # what position i says of token i + 1


def outside_lm(monkeypatch, tokenizer, name="any", model=Outside):
    """The causal LM called `name`, from a package transformers that reads models by `model`."""
    fake = SimpleNamespace(AutoTokenizer=Outside, AutoModelForCausalLM=model)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    return sample.OutsideLM(name, sample.Run({}, None, tokenizer, torch.device("cpu")))


OURS = [256, *b"abcdef?", 256], [256, *b"abc", 256, 256, *b"zz", 256]
THEIRS = [0, *b"ace?"], [0, *b"ac", 50256, 50256, *b"z"]  # the end of the block is not scored
IDS = [50256, 257, 65, 50256], [50256, 40000, 3, 50256]  # " a" and "b": " ab" would be one token


@pytest.mark.parametrize(
    "name, ours, theirs",
    [("bytes", OURS, THEIRS), pytest.param("gpt2", IDS, IDS, marks=needs_gpt2)],
)
def test_sample_with_an_outside_energy(here, monkeypatch, name, ours, theirs):
    """It reads text, with an END_OF_TEXT of its own, or GPT-2's ids as they are."""
    tokenizer, log_q = data.get_tokenizer(name), torch.tensor([[-1.0, -2.0]])
    if name == "gpt2":
        encode = staticmethod(partial(data.encode, tokenizer))
        monkeypatch.setattr(sample.OutsideLM, "encode", encode)
    lm = outside_lm(monkeypatch, tokenizer)
    log_p = log_q - lm.energy(torch.tensor([ours]), None, log_q)
    for ids, value in zip(theirs, log_p[0], strict=True):
        table = Outside()(torch.tensor([ids])).logits[0].log_softmax(dim=1)
        known = sum(table[i, ids[i + 1]].item() for i in range(len(ids) - 1))
        assert value.item() == pytest.approx(known, rel=1e-4)
    (row,) = figures("sample.py --energy hf:any --judge any --num 2 --steps 2 --k 2").values()
    assert 1 <= row["ess"] < 2.01 and row["judge_perplexity"] > 1


def test_sample_with_a_real_causal_lm(tmp_path, monkeypatch):
    """A random GPT-2 of the package transformers: its own loss shifts tokens against logits."""
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=50257, n_positions=128, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(initializer_range=0.5, **shape))
    gpt2.save_pretrained(tmp_path)
    tokenizer, stories = data.get_tokenizer("toy"), data.toy_stories(3, seed=0)
    eot = tokenizer.eot_token
    rows = [[eot, *data.encode(tokenizer, story), eot] for story in stories]
    real = transformers.AutoModelForCausalLM
    lm = outside_lm(monkeypatch, tokenizer, str(tmp_path), real)
    E = lm.energy(torch.tensor([rows]), None, torch.zeros(1, 3))
    read = [torch.tensor([[0, *map(ord, story[::2])]]) for story in stories]
    with torch.no_grad():
        costs = [gpt2.eval()(ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in read]
    assert E[0].tolist() == pytest.approx(costs, rel=1e-4)
    assert len({len(ids[0]) for ids in read}) > 1  # so that some are padded


SHRUNK = {  # the first pattern that is found in a command says what makes it small
    r"^sample.py.* --eval": "--blocks 4 --n 16",
    r"^sample.py": "--num 2",
    r"^data.py openwebtext": "texts.tar --val_docs 1 --tokenizer bytes",
    r"^data.py text8": "text8",
    r"^data.py": "",
    r" --(preset|data)": f"{SMALL} --block_size 32 --micro_batch 4 --overwrite",
    r"^train.py": f"{SMALL} --overwrite",
}


def code_blocks(language):
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_readme_commands_and_help_run(here, monkeypatch, capsys):
    shutil.rmtree("out")
    monkeypatch.setattr(data, "make_toy", partial(data.make_toy, n_train=36, n_val=16))
    lines = re.sub(r" #.*|\\\n", "", "\n".join(code_blocks("bash")))
    commands = re.findall(r"^(?:.*&& )?python ((?:train|sample|data)\.py\b.*)", lines, re.M)
    inline = re.findall(r"`python (sample\.py\b[^`]*)`", (ROOT / "README.md").read_text())
    commands += {command for command in inline if "hf:" not in command}
    for name in re.findall(r"\S+\.txt\b", "\n".join(commands)):
        Path(name).write_text("the cat sat on the mat, and the dog on the log.\n\n" * 60)
    Path("text8").write_text("the quick brown fox jumps over the lazy dog " * 600)
    shutil.make_archive("texts", "tar", "texts")
    assert len(commands) > 10
    for command in commands:
        more = next(flags for pattern, flags in SHRUNK.items() if re.search(pattern, command))
        assert call(f"{command} {more}") == 0, (command, capsys.readouterr().err)
    for script in ("data.py", "train.py", "sample.py"):
        assert call(f"{script} --help") == 0


def test_readme_python_runs_and_links_exist(here, capsys):
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []
    tests = re.findall(r"def (test_\w+)", Path(__file__).read_text())
    assert set(re.findall(r"`(test_\w+)`", text)) <= set(tests)
    shutil.copytree("data/small", "data/toy")
    Path("page.py").write_text("\n".join(code_blocks("python")))
    assert "edlm" in runpy.run_path("page.py") and capsys.readouterr().out


def test_readme_pictures_are_drawn(here, monkeypatch):
    """All but the hero's step, which takes a trained energy to be found: another stands for it."""
    monkeypatch.syspath_prepend(str(ROOT / "assets"))
    import figures

    shutil.copytree(ROOT / "assets", "assets", ignore=shutil.ignore_patterns("*.svg"))
    monkeypatch.setattr(figures, "__file__", str(Path("assets/figures.py").absolute()))
    assert call("sample.py --compare --steps 2,inf --k 4,16 --num 2 --json out/compare.json") == 0
    story = figures.toy_block(data.get_tokenizer("toy"), figures.STORY)[0]
    step = story, story.repeat(4, 1), torch.tensor([-1.0, 3.0, 0.5, 2.0]), 0
    monkeypatch.setattr(figures, "draw_step", lambda models, tokenizer: step)
    figures.main()
    names = {path.name for path in Path("assets").glob("*.svg")}
    shown = re.findall(r"\(assets/(\w+\.svg)\)", (ROOT / "README.md").read_text())
    assert names == set(shown) and len(shown) == 5
    for name in names:
        assert ElementTree.parse(f"assets/{name}").getroot().tag.endswith("svg")


# ------------ published weights -------------------------------------------------------------------
def published(kind, V=10, d=16, c=6):
    """Random weights, all of them, under the published names and in their order."""
    block = {"norm1": [d], "attn_qkv": [3 * d, d], "attn_out": [d, d], "norm2": [d]}
    block.update({"mlp.0": [4 * d, d], "mlp.2": [d, 4 * d], "adaLN_modulation": [6 * d, c]})
    shapes = {"vocab_embed": [V + 1, d], "sigma_map.mlp.0": [c, 256], "sigma_map.mlp.2": [c, c]}
    for i in (0, 1):
        shapes.update({f"blocks.{i}.{name}": shape for name, shape in block.items()})
    shapes["output_layer.norm_final"] = [d]
    shapes["output_layer.linear"] = [d, d] if kind == "energy" else [V + 1, d]
    shapes["output_layer.adaLN_modulation"] = [2 * d, c]
    if kind == "energy":
        shapes.update({"vocab_proj": [d, 2 * d], "energy_head.0": [d, d], "energy_head.2": [1, d]})
    w, g = {"backbone.rotary_emb.inv_freq": 10000 ** -(torch.arange(4) / 4)}, seeded(0)
    for name, shape in shapes.items():
        if kind == "ar" and re.search("sigma|adaLN", name):
            continue
        weight = "embedding" if name == "vocab_embed" else "weight"
        w[f"backbone.{name}.{weight}"] = torch.randn(shape, generator=g) / 4
        if re.search("mlp|linear|adaLN|proj|head.0", name):
            w[f"backbone.{name}.bias"] = torch.randn(shape[0], generator=g)
    return w


def unfolded(w, kind, x, x0):
    """The published forward pass in float64: log-probabilities [B, L, V], or the energy [B]."""
    w = {name.removeprefix("backbone."): value.double() for name, value in w.items()}

    def linear(name, h):
        return F.linear(h, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(name, h):
        return F.layer_norm(h, (16,)) * w[f"{name}.weight"]

    def constants(name, n):
        """Shift, scale and gate, twice for a block, at noise level 0."""
        if kind == "ar":
            return [0, 0, 1, 0, 0, 1][:n]
        level = torch.cat((torch.zeros(128).cos(), torch.zeros(128).sin())).double()
        level = linear("sigma_map.mlp.2", F.silu(linear("sigma_map.mlp.0", level)))
        return linear(f"{name}.adaLN_modulation", F.silu(level)).chunk(n)

    h, e0 = w["vocab_embed.embedding"][x], w["vocab_embed.embedding"][x0]
    h = linear("vocab_proj", torch.cat((h, e0), dim=2)) if kind == "energy" else h
    angle = torch.outer(torch.arange(x.shape[1]), w["rotary_emb.inv_freq"])  # [L, 4]
    for b in ("blocks.0", "blocks.1"):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = constants(b, 6)
        qkv = linear(f"{b}.attn_qkv", norm(f"{b}.norm1", h) * (1 + scale_a) + shift_a)
        q, k, v = qkv.unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)  # [B, heads, L, 8] each
        turned = (torch.complex(*z.chunk(2, dim=3)) * torch.exp(1j * angle) for z in (q, k))
        q, k = (torch.cat((z.real, z.imag), dim=3) for z in turned)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=kind == "ar").transpose(1, 2)
        h = h + gate_a * linear(f"{b}.attn_out", a.flatten(2))
        m = linear(f"{b}.mlp.0", norm(f"{b}.norm2", h) * (1 + scale_m) + shift_m)
        h = h + gate_m * linear(f"{b}.mlp.2", F.gelu(m, approximate="tanh"))
    shift, scale = constants("output_layer", 2)
    h = linear("output_layer.linear", norm("output_layer.norm_final", h) * (1 + scale) + shift)
    if kind == "energy":
        return linear("energy_head.2", F.relu(linear("energy_head.0", h.mean(dim=1))))[:, 0]
    return h[..., :-1].log_softmax(dim=2)


class Attack:
    """An object whose pickle creates the file `ran` when it is read."""

    def __reduce__(self):
        return open, ("ran", "w")


@torch.no_grad()
@pytest.mark.parametrize("kind", edlm.KINDS)
def test_import_of_published_networks_that_say_what_they_said(tmp_path, monkeypatch, kind):
    """By their forward pass, for random weights. One file has others, too, and an attack."""
    monkeypatch.chdir(tmp_path)
    w = published(kind)
    names = [name for name in w if "inv_freq" not in name]
    live = w | {name: w[name] + 1 for name in names}
    if kind == "energy":  # EDLM's, which also holds its denoiser
        live = {name.replace("backbone", "backbone.ebm"): live[name] for name in live}
        live |= published("denoiser")
    foreign = [Attack(), defaultdict(dict, now={"%Y": "2024"})]  # as OmegaConf has it
    content = dict(state_dict=live, ema=dict(shadow_params=[w[name] for name in names]))
    torch.save(content | dict(hyper_parameters=foreign), "last.ckpt")
    pytest.importorskip("safetensors.torch").save_file(w, "model.safetensors")
    x_t = torch.randint(11, (2, 7), generator=seeded(0))
    x0, where = x_t % 10, torch.rand(2, 7, generator=seeded(1)) < 0.5
    want = unfolded(w, kind, x0 if kind == "ar" else x_t, x0)
    for path in ("last.ckpt", "model.safetensors"):
        net = train.convert(train.read_published(path), 7)
        if kind == "energy":
            close(net(x0[:, None], x_t, None)[:, 0], want, atol=1e-6)
        elif kind == "ar":
            log_p = want[:, :-1].gather(2, x0[:, 1:, None])[..., 0]
            close(net.log_prob(x0), F.pad(log_p, (1, 0)), atol=1e-6)
        else:
            log_mu = net(x_t, where).log_softmax(dim=1)
            close(log_mu[:, :10], want[where], atol=1e-6)
    assert not net.training and not Path("ran").exists()


def test_imported_weights_become_a_run(tmp_path, monkeypatch, capsys):
    """An energy is trained on top, a stage is fine-tuned by its name, other files are refused."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        np.arange(2000, dtype="<u2").tofile(f"{split}.bin")  # as nanoGPT has them
    for kind in edlm.KINDS:
        torch.save(published(kind, V=50257), f"{kind}.bin")
        command = f"train.py --out new --block_size 12 --data . --import {kind}.bin"
        assert call(command) == 0
    refuses(capsys, command, "new/energy.pt exists: --overwrite")
    before, _ = edlm.load_models("new", edlm.KINDS)
    assert call(f"train.py --stage energy --out new --overwrite {SHORT}") == 0
    assert call(f"train.py --stage ar --resume --out new --lr 1e-7 {SHORT}") == 0
    after, _ = edlm.load_models("new", edlm.KINDS)  # all three fit together
    for a, b in zip(after["ar"].parameters(), before["ar"].parameters(), strict=True):
        assert not torch.equal(a, b) and torch.allclose(a, b, atol=1e-5)
    torch.save(published("energy") | published("ar"), "mixed.bin")
    refuses(capsys, "train.py --import mixed.bin --out other", "mixed.bin is no published network")


# ------------ 4. Measurements of speed: ratios in one run to plain references -------------------

SHAPES = {
    "small": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=50257),
    "medium": dict(n_layer=6, n_head=4, n_embd=256, block_size=256, vocab_size=50257),
    "gpt2-small": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257),
}
# The plain chain is timed with so few steps and scaled up: a step of a longer one costs about this.
PLAIN_STEPS = 8


def timed(work, device, repeats=5, warm_up=None):
    """(median seconds, peak GiB on CUDA else 0, result) of work(), after a first run or warm_up."""
    (warm_up or work)()
    seconds, on_gpu = [], device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        begun = time.perf_counter()
        result = work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return sorted(seconds)[repeats // 2], peak, result


def plain_ar_energy(ar, candidates, x_t, log_q):
    """Equation (5) as it is written: every candidate in full, all logits at once."""
    x = candidates.flatten(0, 1)
    logits = ar.head(ar.transformer(ar.transformer.embed(x[:, :-1])))  # [B k, L - 1, V]
    log_p = logits.float().log_softmax(dim=2).gather(2, x[:, 1:, None])[..., 0]
    return log_q - log_p.sum(dim=1).view(log_q.shape)


def bare_event(denoiser, ar, x, k):
    """An event's forwards of the transformers alone, the AR model's over k candidates: a floor."""
    denoiser.transformer(denoiser.transformer.embed(x))
    if k > 1:
        ar.transformer(ar.transformer.embed(x.repeat(k, 1)[:, :-1]))


def count_events(denoiser, x, **settings):
    return sum(1 for _ in edlm.sample_states(denoiser, x, **settings)) - 1  # less the start


@torch.no_grad()
def measure_sampling(config, device, batch, steps, k):
    """`sample` beside edlm.sample_plain and beside bare forwards, for MDLM and EDLM-AR: rows."""
    torch.manual_seed(0)
    denoiser = edlm.Denoiser(config).to(device).eval()
    ar = edlm.AutoregressiveLM(config).to(device).eval()
    x = torch.full((batch, config.block_size), config.mask_id, device=device)
    x[:, 0] = 0
    few, rows = min(steps, PLAIN_STEPS), []
    for name, K, energy, plain_energy in (
        ("MDLM", 1, None, None),
        ("EDLM-AR", k, edlm.ARResidual(ar), partial(plain_ar_energy, ar)),
    ):
        settings = dict(mask_id=config.mask_id, k=K)
        ours = partial(count_events, denoiser, x, steps=steps, energy=energy, **settings)
        plain = partial(edlm.sample_plain, denoiser, x, steps=few, energy=plain_energy, **settings)
        one_step = partial(ours, steps=1)
        seconds, peak, events = timed(ours, device, repeats=1, warm_up=one_step)
        some, plain_peak, _ = timed(plain, device, repeats=1)
        floor, _, _ = timed(partial(bare_event, denoiser, ar, x, K), device)
        row = dict(name=f"{name}, batch {batch}", forwards=events, seconds=seconds)
        row["plain"] = some * steps / few
        row["ratio"] = row["plain"] / seconds
        row.update(event_ms=1000 * seconds / events, bare_ms=1000 * floor)
        if peak:
            row.update(peak_gib=peak, plain_gib=plain_peak)
        rows.append(row)
    return rows


def plain_loss(run, net, x0):
    """`train.training_loss` for the same masks, with logits of all positions and all at once."""
    if run.stage == "ar":
        logits = net.head(net.transformer(net.transformer.embed(x0[:, :-1]))).float()
        return F.cross_entropy(logits.flatten(0, 1), x0[:, 1:].flatten())
    S, _, _ = edlm.draw_step(x0)
    x_t = x0.masked_fill(S, net.config.mask_id)
    everywhere = torch.ones_like(S)
    if run.stage == "denoiser":
        loss = F.cross_entropy(net(x_t, everywhere).float(), x0.flatten(), reduction="none")
        return ((loss.view_as(x0) * S).sum(dim=1) / S.sum(dim=1)).mean()
    with torch.no_grad():
        log_mu = run.denoiser(x_t, everywhere).float().log_softmax(dim=1)  # [B L, V]
        gumbel = -torch.log(-torch.log(torch.rand_like(log_mu)))
        drawn = (log_mu + gumbel).argmax(dim=1).view_as(x0)
    fake = torch.where(S, drawn.clamp(max=net.config.mask_id - 1), x0)
    e_real, e_fake = (net(x[:, None], x_t, None)[:, 0] for x in (x0, fake))
    return (F.softplus(e_real) + F.softplus(-e_fake)).mean()


def plain_step(run, optimizer, x0):
    """Forward, backward, clip, update, with torch's defaults."""
    with edlm.autocast(x0.device):
        loss = plain_loss(run, run.model, x0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def optimizer_steps(run):
    for optimizer in run.optimizers:
        optimizer.step()


def new_run(stage, config, settings, device):
    """A stage as `train.begin` makes it, with random weights, and no files."""
    torch.manual_seed(0)
    net, denoiser = edlm.KINDS[stage](config).to(device), None
    if stage == "energy":
        denoiser = edlm.Denoiser(config).to(device).eval().requires_grad_(False)
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizers = train.make_optimizers(net, settings)
    return train.Run(stage, 10**6, net, average, denoiser, optimizers, {}, net)


def measure_training(config, device, batch, settings):
    """A step of each stage as train.py makes it, beside a plain one: rows."""
    x0 = torch.randint(0, config.vocab_size, (batch, config.block_size), device=device)
    rate, rows = train.matmul_rate(device), []
    for stage in train.STAGES:
        run = new_run(stage, config, settings, device)
        adamw = torch.optim.AdamW(run.model.parameters(), lr=3e-4)
        plain_seconds, plain_peak, _ = timed(partial(plain_step, run, adamw, x0), device)
        run = new_run(stage, config, settings, device)
        train.prepare_networks(run, settings, device)
        seconds, peak, _ = timed(partial(train.train_step, run, settings, [x0]), device)
        train.training_loss(run, run.model, x0).backward()  # gradients for the optimisers
        update, _, _ = timed(partial(optimizer_steps, run), device)
        row = dict(name=f"{stage}, batch {batch}", seconds=seconds, plain=plain_seconds)
        row.update(ratio=plain_seconds / seconds, optimizer_share=update / seconds)
        row["tokens_per_s"] = x0.numel() / seconds
        row["of_matmul"] = train.operations(stage, config) * row["tokens_per_s"] / rate
        if peak:
            row.update(peak_gib=peak, plain_gib=plain_peak)
        rows.append(row)
    return rows


def print_table(title, rows):
    print(f"\n{title}\n{'':24}" + "".join(f"{column:>16}" for column in list(rows[0])[1:]))
    for name, *values in (row.values() for row in rows):
        print(f"{name:24}" + "".join(f"{value:>16,.4g}" for value in values))


def test_measurements_at_a_tiny_size(monkeypatch, capsys):
    """Both tables come out, with their ratios; a step is a forward pass at most."""
    tiny = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=30)
    monkeypatch.setitem(SHAPES, "small", tiny)
    sampling, training = main(["--batch", "1,2", "--device", "cpu", "--steps", "4"])
    assert len(sampling) == 2 * 2 and len(training) == 2 * 3
    assert all(1 <= row["forwards"] <= 4 and row["bare_ms"] > 0 for row in sampling)
    text = capsys.readouterr().out
    for row in sampling + training:
        assert row["ratio"] == pytest.approx(row["plain"] / row["seconds"]) and row["name"] in text


@pytest.mark.parametrize("stage", train.STAGES)
def test_plain_references_do_what_train_does(stage):
    """Two steps from the same weights with the same masks, and the average of the weights."""
    settings = train.Settings(warmup_steps=0)
    config, cpu = edlm.Config(30, 8, 1, 2, 16), torch.device("cpu")
    ours, plain = (new_run(stage, config, settings, cpu) for _ in range(2))
    if stage == "energy":  # sure of token 7, so that both draw the same negatives
        ours.denoiser.head.bias[7] = plain.denoiser.head.bias[7] = 100
    adamw = torch.optim.AdamW(plain.model.parameters(), lr=settings.lr, weight_decay=0)
    x0 = torch.randint(30, (64, 8), generator=seeded(0))
    flat = torch.nn.utils.parameters_to_vector
    weights = [flat(ours.model.transformer.parameters())]
    for step in range(2):
        loss, _ = train.train_step(ours, settings, [x0])
        weights.append(flat(ours.model.transformer.parameters()))
        torch.manual_seed(hash((settings.seed, step, 0)) % 2**63)
        close(loss, plain_step(plain, adamw, x0))
    tolerance = 1e-3 * (weights[2] - weights[0]).norm()
    assert (weights[2] - flat(plain.model.transformer.parameters())).norm() < tolerance
    average = 0.1 * weights[1] + 0.9 * weights[2]  # the decay of the second step is 1 / (9 + 1)
    assert (average - flat(ours.average.transformer.parameters())).norm() < tolerance


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measures speed, as ratios to plain references.")
    add = parser.add_argument
    add("shape", nargs="?", default="small", choices=SHAPES)
    add("--batch", type=sample.numbers, default=(1, 8), help="texts at once: a list (default: 1,8)")
    add("--steps", type=int, help="diffusion steps T (default: the block size)")
    add("--k", type=int, default=4, help="candidates of EDLM-AR (default: 4)")
    add("--optimizer", default="muon", help="of the training steps: muon or adamw (default: muon)")
    add("--compile", default="cuda", help="blocks in training: no, cuda or yes (default: cuda)")
    add("--device", default="", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args(argv)
    device, config = edlm.pick_device(args.device), edlm.Config(**SHAPES[args.shape])
    settings = train.Settings(optimizer=args.optimizer, compile=args.compile)
    steps = args.steps or config.block_size
    print(f"{args.shape} on {device}: {config}, {steps} steps, k = {args.k} for EDLM-AR")
    sampling, training = [], []
    for batch in args.batch:
        with edlm.autocast(device):
            sampling += measure_sampling(config, device, batch, steps, args.k)
    for batch in args.batch:  # afterwards: --compile would speed up sampling, too
        training += measure_training(config, device, batch, settings)
    print_table(f"sampling ({PLAIN_STEPS} plain steps timed, scaled to {steps})", sampling)
    print_table(f"training, {args.optimizer} (plain: AdamW)", training)
    return sampling, training


if __name__ == "__main__":
    main()
