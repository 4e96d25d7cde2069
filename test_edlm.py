"""Every promise of the other five files, checked offline: `pytest`, or a part: `pytest -k sample`.

1. The method, by enumeration. A world is a random table, so small (V <= 3, L <= 4) that every law,
   bound and estimator of edlm.py can be added up exactly. Statistical tests use fixed seeds; beside
   each bound stands how often a correct program would miss it with a fresh seed.
2. Data: the toy language, tokenizers, shards, archives, kills and downloads.
3. The scripts as a user meets them: mistakes, exact resume, several processes, the README.
4. Measurements: python test_edlm.py [small|medium|gpt2-small] prints ratios of speed.
"""

import argparse
import contextlib
import copy
import importlib
import io
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
import threading
import time
import zipfile
from collections import Counter, defaultdict
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import edlm
import sample
import train


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Networks this small gain nothing from threads, and lose much by waiting for them."""
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


def no_opinion(x_t, where):
    """A denoiser for which all of 3 tokens are alike."""
    return torch.zeros(int(where.sum()), 3)


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
    _, *states = edlm.sample_states(no_opinion, x, **settings)
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
    assert (times[0] == 1).all() and (forwards <= masks.clamp(max=steps or 1000)).all()
    assert (states[-1].in_turn <= 2 * forwards).all()
    assert torch.equal(states[-1].in_turn - forwards, (states[-1].in_all - forwards) // k)
    assert (states[-1].in_all - forwards).sum() == k * len(asked)
    assert len(events) == len(states) - 1 and sum(map(len, events)) == forwards.sum()
    assert all(where.any(dim=1).all() and not where[:, 0].any() for where in events)
    assert projected >= masks.sum() and (projected == masks.sum()) == (k == 1 or steps == 1)
    assert all((candidates != candidates[0]).any() for candidates in asked)
    assert len(asked) <= forwards.sum() - int(steps in (1000, None)) and (len(asked) > 0) == (k > 1)
    ess = torch.cat([state.ess[~state.ess.isnan()] for state in states])
    close(ess, torch.full((len(asked),), k))  # of equal weights


def test_useless_energies_are_refused_by_row():
    """Nan, -inf for one candidate, +inf for all: by the sampler, the bound and the log Z alike.

    +inf for some only means that they never win. The bound then knows what cannot be drawn.
    """
    world = World(3, 4, seed=0)
    x = world.starts[[0, 2, 4, 1]]  # the last has BOS 1
    some = dict(mask_id=3, k=400, steps=1)
    calls = [
        lambda x, energy: edlm.sample(world.denoiser, x, energy=energy, **some),
        lambda x, energy: edlm.sampler_nelbo(world.denoiser, energy, x % 3, n=400, **some),
        lambda x, energy: edlm.log_partition_bounds(world.denoiser, energy, x, mask_id=3, n=400),
    ]

    def useless(value, candidates, x_t, log_q):
        return torch.where(x_t[:, :1] == 1, value, log_q)

    def no_zeros(candidates, x_t, log_q):
        return torch.where((candidates[..., 1:] == 0).any(dim=2), INF, 0.0)

    for value, call in itertools.product((math.nan, INF, -INF), calls):
        call(x[:3], partial(useless, value))
        with pytest.raises(ValueError, match="row 3"):
            call(x, partial(useless, value))
    start = world.start.repeat(20, 1)
    assert (calls[0](start, no_zeros)[:, 1:] != 0).all()
    bound = calls[1](torch.tensor([[0, 1, 2, 1], [0, 1, 0, 1]]), no_zeros)
    assert bound.isfinite().tolist() == [True, False] and bound[1] == INF
    lower, upper = calls[2](start, no_zeros)
    assert (lower < 0).all() and lower.isfinite().all() and upper.isfinite().all()


def test_logits_that_are_no_distribution_are_refused_by_row():
    """A denoiser that returns nan would else draw END_OF_TEXT, silently, in sampling and in NCE."""
    for bad in (math.nan, INF, -INF):
        logits = torch.zeros(70, 3)
        logits[66] = bad
        with pytest.raises(ValueError, match="row 66 of the logits"):
            edlm.categorical(logits, 2)

    def broken(x_t, where):
        return math.nan * no_opinion(x_t, where)

    world = World(3, 4, seed=0)
    with pytest.raises(ValueError, match="row 0 of the logits"):
        edlm.nce_loss(broken, zero_energy, world.x0s, mask_id=3)
    with pytest.raises(ValueError, match="row 0 of the logits"):
        edlm.sample(broken, world.start[None], mask_id=3, steps=2)
    for pair in ((broken, Tables(world, 0)), (world.denoiser, SimpleNamespace(logits=broken))):
        with pytest.raises(ValueError, match="row 0 of the logits"):
            list(edlm.sample_exact(*pair, world.start[None], mask_id=3))


def test_unused_columns_are_never_drawn_and_never_learn():
    """V = 35 has 64 columns, of which 29 have probability 0 and gradient 0, also where u is 1."""
    config = edlm.Config(35, 8, 1, 1, 8)
    denoiser = edlm.Denoiser(config)
    x0 = torch.randint(35, (16, 8), generator=seeded(0))
    logits = denoiser(x0, torch.ones_like(x0, dtype=torch.bool))
    assert logits.shape == (128, 64) and (logits.softmax(dim=1)[:, 35:] == 0).all()
    assert logits.softmax(dim=1).sum().item() == pytest.approx(128)
    edlm.nelbo(denoiser, x0, mask_id=35).mean().backward()
    head = denoiser.head
    assert (head.bias.grad[35:] == 0).all() and (head.weight.grad[35:] == 0).all()
    assert (head.bias.grad[:35] != 0).all()
    certain = torch.full((1, 64), -1e30)
    certain[0, 34] = 0.0
    tokens, log_p = edlm.categorical(certain, 100_000, generator=seeded(0))
    assert (tokens == 34).all() and (log_p == 0).all()


def test_wrong_arguments_are_refused():
    world, config = World(2, 4, seed=0), edlm.Config(2, 4, 1, 1, 8, dropout=0.5)
    denoiser, ar, nce = (cls(config) for cls in edlm.KINDS.values())  # in training mode
    tables = dict(denoiser=world.denoiser, energy=world.energy, mask_id=2)
    draw = partial(edlm.sample, **tables, x=world.start[None], steps=2)
    joint = partial(edlm.joint_nelbo, **tables, x0=world.x0s)
    bound = partial(edlm.sampler_nelbo, **tables, x0=world.x0s, n=2)
    for call, *wrong in [
        (draw, dict(k=0), dict(steps=0), dict(window=-0.1), dict(window=1.1), dict(schedule="no")),
        (edlm.alpha, dict(t=torch.ones(1), schedule="no")),
        (draw, dict(x=torch.full((1, 4), 2)), dict(denoiser=denoiser), dict(energy=nce)),
        (draw, dict(energy=edlm.ARResidual(ar))),
        (joint, dict(n=1), dict(n=2, log_partition="middle"), dict(n=2, steps=0)),
        (joint, dict(n=2, denoiser=denoiser), dict(n=2, energy=nce)),
        (bound, dict(k=2, denoiser=denoiser), dict(k=2, energy=nce)),
        (bound, dict(k=0), dict(k=3), dict(k=2, window=1.5), dict(k=2, steps=0)),
        (edlm.nce_loss, dict(denoiser=denoiser, energy=nce, x0=world.x0s, mask_id=2)),
        (ar.transformer, dict(h=torch.zeros(1, 5, 8))),  # longer than the block
        (ar.sample, dict(x=world.x0s, length=6)),
        (partial(edlm.Config, 2, 4, 1), dict(n_head=2, n_embd=10), dict(n_head=0, n_embd=8)),
        (partial(edlm.Config, 2, 4, 1, 1), dict(n_embd=8.0), dict(n_embd=8, dropout=1.0)),
    ]:
        for arguments in wrong:
            with pytest.raises(ValueError):
                call(**arguments)


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
def tiny(cls, seed=0, **changes):
    """A small network with weights so large that every part of it matters; float64 but for NCE."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=3, block_size=4, n_layer=2, n_head=2, n_embd=8) | changes
    net = cls(edlm.Config(**sizes)).eval()
    for p in net.parameters():
        p.data += torch.randn_like(p) * (0.7 if p.ndim > 1 else 0.3)
    return net if cls is edlm.NCEResidual else net.double()


@torch.no_grad()
@pytest.mark.parametrize("carry_over", [True, False])
def test_ar_residual(carry_over):
    """mu exp(-E) is p_AR of the masked tokens (coAR: Z = 1) or of all (Z = 1 if all are masked)."""
    world, ar = World(3, 4, seed=3), tiny(edlm.AutoregressiveLM)
    energy = edlm.ARResidual(ar, carry_over)
    for code in range(0, world.size, 4):  # all with BOS 0
        x_t, (x0, log_q, _) = world.state(code), world.proposal(code)
        log_p = (log_q - energy(x0[None], x_t[None], log_q[None]))[0]
        close(log_p, (ar.log_prob(x0) * (x_t == 3 if carry_over else 1)).sum(dim=1))
        if carry_over or (x_t[1:] == 3).all():
            close(log_p.exp().sum(), torch.tensor(1.0))


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
    denoiser = tiny(edlm.Denoiser, dropout=0.5).float()
    energy = edlm.NCEResidual.from_denoiser(denoiser)
    x0 = torch.randint(3, (64, 4), generator=seeded(0))

    def tied(candidates, x_t, log_q):
        return energy(candidates, x_t, log_q) + 0 * log_q

    loss = edlm.nce_loss(denoiser, tied, x0, mask_id=3)
    assert loss.item() == pytest.approx(2 * math.log(2))
    loss.backward()
    assert all(p.grad is None for p in denoiser.parameters())
    assert energy.mlp_out.weight.grad.abs().max() > 0


@torch.no_grad()
def test_chunks_and_company_change_nothing(monkeypatch):
    """Every candidate is judged alone: one at a time they get the same energies as together."""
    x_t = torch.tensor([[0, 3, 1, 3], [2, 3, 3, 3], [1, 0, 3, 2]])
    drawn = torch.randint(3, (3, 6, 4), generator=seeded(0))
    x0 = torch.where(x_t[:, None] == 3, drawn, x_t[:, None])
    log_q, logits = torch.randn(3, 6, generator=seeded(1)), torch.randn(9, 3, generator=seeded(2))
    energies = tiny(edlm.NCEResidual), edlm.ARResidual(tiny(edlm.AutoregressiveLM), True)
    results = []
    for tokens, rows in ((1, 1), (20, 4), (10**6, 10**6)):
        monkeypatch.setattr(edlm, "JUDGED_TOKENS", tokens)
        monkeypatch.setitem(edlm.ROWS, "cpu", rows)
        judged = [edlm.in_chunks(energy, x0, x_t, log_q) for energy in energies]
        results.append([*judged, *edlm.categorical(logits, 50, generator=seeded(3))])
    for got, whole in zip(results[0] + results[1], 2 * results[2], strict=True):
        close(got, whole, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prompts", [[[0], [1]], [[2, 1]]])
def test_ar_model_is_causal_normalised_and_samples_its_own_law(prompts):
    """`sample` has a cache; prompts have one or two tokens, and differ within a batch."""
    ar, world, given = tiny(edlm.AutoregressiveLM), World(3, 4, seed=0), len(prompts[0])
    out = ar.sample(torch.tensor(prompts).repeat(20_000, 1), 4, generator=seeded(0))
    for i, prompt in enumerate(prompts):
        x = world.completions(torch.tensor(prompt + [3] * (4 - given)))
        log_p, law = ar.log_prob(x), torch.zeros(world.size, dtype=torch.float64)
        for j in range(1, 4):  # what comes later moves nothing; BOS costs nothing
            other = torch.cat((x[:, :j], (x[:, j:] + 1) % 3), dim=1)
            close(ar.log_prob(other)[:, :j], log_p[:, :j])
        law[world.code(x)] = log_p[:, given:].double().sum(dim=1).exp()
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


@torch.no_grad()
def test_ar_logits_are_those_of_log_prob():
    ar = tiny(edlm.AutoregressiveLM)
    x = torch.randint(3, (6, 4), generator=seeded(0))
    where = torch.rand(6, 4, generator=seeded(1)) < 0.5
    where[:, 0] = False
    log_p = edlm.token_log_prob(ar.logits(x, where), x[where][:, None])[:, 0]
    close(log_p, ar.log_prob(x)[where])


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not op.is_view:  # a view of the weights is not new
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize("name", sample.ENERGIES)
def test_nothing_as_large_as_all_logits_is_held(name, monkeypatch):
    """200 candidates need no tensor larger than the denoiser's [N, V] logits, which one needs too.

    The AR model makes ROWS rows at a time.
    """
    config, V, N, rows = edlm.Config(3000, 16, 1, 2, 8), 3008, 30, 10  # V with its padding
    ar, denoiser = edlm.AutoregressiveLM(config).eval(), edlm.Denoiser(config).eval()
    models = dict(ar=ar, energy=edlm.NCEResidual.from_denoiser(denoiser).eval())
    monkeypatch.setitem(edlm.ROWS, "cpu", rows)
    monkeypatch.setattr(edlm, "JUDGED_TOKENS", 256)
    x = torch.full((2, 16), config.mask_id).index_fill(1, torch.tensor(0), 0)
    settings = dict(mask_id=config.mask_id, steps=2, energy=sample.make_energy(name, models))
    for k in (1, 200):
        with Largest() as largest:
            edlm.sample(denoiser, x, k=k, **settings)
        assert rows * V <= largest.numbers <= N * V


# ------------ 2. Data: toy language, tokenizers, shards, archives, kills, downloads ---------------


@pytest.fixture
def gpt2():
    """GPT-2's tokenizer, if its vocabulary is at hand: set TIKTOKEN_CACHE_DIR."""
    try:
        return data.get_tokenizer("gpt2")
    except ValueError as error:
        pytest.skip(str(error))


def refused(message, call, *args, **options):
    """The call raises what `data.run` prints: a plain line with this in it."""
    with pytest.raises((ValueError, OSError), match=message) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


def contents(folder="."):
    """All files in a folder, by their paths in it."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stream(folder, split):
    """All tokens of a split, by numpy alone."""
    shards = sorted(Path(folder).glob(f"{split}_*.bin"))
    return np.concatenate([np.fromfile(shard, "<u2", offset=1024) for shard in shards]).tolist()


def prepare(out, files, source="text", **options):
    """What `python data.py` does for these files, to bytes if not told otherwise."""
    settings = dict(data.SOURCES[source], files=files, tokenizer="bytes")
    settings.update(options)
    data.prepare(out, **settings)


def three_files(folder):
    """Three source files of 21 documents, all different, of 5 bytes and END_OF_TEXT each."""
    paths = [folder / f"{name}.txt" for name in "abc"]
    for path in paths:
        path.write_text("\n\n".join(f"{path.stem}{number:04}" for number in range(21)))
    return paths


def test_data_toy_language_is_a_distribution_with_the_stated_entropy():
    # By hand: 3 templates, 6 names, 5 friends, 4 colours, 4 objects, no two choices the same story.
    assert len(set(data.toy_language())) == len(data.toy_language()) == 3 * 6 * 5 * 4 * 4
    assert data.toy_entropy() == pytest.approx(math.log(1440), abs=1e-9)
    counts = Counter(data.toy_stories(30000, seed=1))
    # Each is expected 20.8 +- 4.6 times: a false alarm in 1e6 seeds.
    assert set(counts) == set(data.toy_language()) and max(counts.values()) < 20.8 + 7 * 4.6
    good = "ben has a black boat. he gives it to eva today. she likes the black boat."
    assert data.toy_is_valid(good) and not data.toy_is_valid(good.replace("the black", "the red"))


def test_data_toy_shards_hold_one_story_per_block(tmp_path):
    data.make_toy(tmp_path, n_train=300, n_val=40, seed=3)
    tokenizer, stories = data.get_tokenizer("toy"), data.toy_stories(340, seed=3)
    for split, expected in {"train": stories[:300], "val": stories[300:]}.items():
        blocks = data.Blocks(tmp_path, split, data.TOY_LENGTH + 2)
        assert [data.decode(tokenizer, block) for block in blocks] == expected
    refused("block_size of 21, not 32", data.Blocks, tmp_path, "train", 32)


def test_data_tokenizers_round_trip_show_masks_and_refuse_unknown_words():
    texts = {"bytes": "Häß\n\n 世界 <|endoftext|> \0" * 99, "text8": "the fox", "toy": "ben has a"}
    for name, size, mask in (("bytes", 257, "_"), ("text8", 28, "_"), ("toy", 35, " ___")):
        tokenizer = data.get_tokenizer(name)
        assert tokenizer.n_vocab == tokenizer.eot_token + 1 == size
        ids = data.encode(tokenizer, texts[name])
        assert data.decode(tokenizer, torch.tensor(ids)) == texts[name]
        shown = data.decode(tokenizer, [size - 1, *ids, size, size, size - 1])
        assert shown == texts[name] + 2 * mask
    documents = data.tokenize(["ben has", "ben has a yacht."], tokenizer, "a.txt")
    refused("a.txt, document 2: the toy tokenizer has no word ' yacht'", list, documents)


def test_data_blocks_cut_the_stream_and_span_shards(tmp_path):
    prepare(tmp_path / "o", three_files(tmp_path))
    tokens, blocks = stream(tmp_path / "o", "train"), data.Blocks(tmp_path / "o", "train", 32)
    expected = [[256, *tokens[i * 30 : (i + 1) * 30], 256] for i in range(len(tokens) // 30)]
    assert [block.tolist() for block in blocks] == expected and len(blocks) == 12
    header = np.fromfile(tmp_path / "o" / "train_000.bin", "<i4", 256)  # as llm.c reads it
    assert header.tolist() == [20240520, 1, 126] + [0] * 253


def test_data_folders_that_are_damaged_or_do_not_fit_are_refused(tmp_path):
    folder, paths = tmp_path / "o", three_files(tmp_path)
    prepare(folder, paths)
    before = contents(folder)
    paths[0].write_text(paths[0].read_text().upper())  # another source of the same name and size
    refused("holds shards of another source", prepare, folder, paths)
    assert contents(folder) == before
    refused("12 tokens, too few for one block of 15", data.Blocks, folder, "val", 15)
    data.write_shard(folder / "train_000.bin", [np.full(126, 999, data.TOKEN)])
    blocks = data.Blocks(folder, "train", 32)
    refused("token 999, unknown to bytes", blocks.__getitem__, 0)
    os.truncate(folder / "train_001.bin", 1100)
    refused("train_001.bin is missing or damaged: run the", data.Blocks, folder, "train", 32)
    (folder / "meta.json").write_text('{"tokeni')
    refused("meta.json is damaged or not made by", data.Blocks, folder, "train", 32)
    (folder / "meta.json").rename(folder / "meta.pkl")  # nanoGPT's name for another vocabulary
    (folder / "train_000.bin").rename(folder / "train.bin")
    refused("meta.pkl.*--tokenizer bytes", data.Blocks, folder, "train", 32)


def first(order, n):
    return list(itertools.islice(order, n))


def test_data_batch_order_is_a_permutation_per_epoch_and_resumes_at_any_step():
    whole = first(data.BatchOrder(23, 4, 2, seed=0), 40)  # 5 steps an epoch, 3 blocks left out
    for epoch in (whole[:10], whole[10:20]):
        assert len(set(sum(epoch, []))) == 20 and set(sum(epoch, [])) <= set(range(23))
    assert whole[:10] != whole[10:20] and whole != first(data.BatchOrder(23, 4, 2, seed=1), 40)
    for step in (1, 4, 5, 12):
        rest = first(data.BatchOrder(23, 4, 2, seed=0, start_step=step), 8)
        assert rest == whole[2 * step : 2 * step + 8]
    refused("not a multiple", data.BatchOrder, 23, 4, 3, seed=0)


@pytest.mark.parametrize(
    "content, texts",
    [
        ("one\nstill one\n \n\n  two\n\n\n", ["one\nstill one", "two"]),
        ("a\n\nb\n <|endoftext|> \nc\n<|endoftext|>\n\n", ["a\n\nb", "c"]),
    ],
)
def test_data_is_framed_alike_for_training_and_for_evaluation(tmp_path, content, texts):
    """Documents end at blank lines, or at lines of END_OF_TEXT, which is also put behind each."""
    path, tokenizer, expected = tmp_path / "a.txt", data.get_tokenizer("bytes"), []
    path.write_text(content)
    prepare(tmp_path / "o", [path])
    for text in texts:
        expected += [*text.encode(), 256]
    assert stream(tmp_path / "o", "train") + stream(tmp_path / "o", "val") == expected
    blocks, tokens = data.text_blocks(path, tokenizer, 5)
    whole = len(expected) // 3 * 3  # what is left over at the end makes no block
    assert blocks[:, 1:-1].flatten().tolist() == expected[:whole] and tokens == len(expected)
    blocks, tokens = data.text_blocks(path, tokenizer, 999)  # one block, as long as it needs
    assert blocks.tolist() == [[256, *expected, 256]] and tokens == len(expected)


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(text):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("folder/file", text)
    return buffer.getvalue()


def archive(*members):
    """An archive as OpenWebText has them, of compressed archives of these lists of texts."""
    files = {}
    for number, texts in enumerate(members):
        inner = tar_of({f"{i}.txt": text.encode() for i, text in enumerate(texts)})
        files[f"openwebtext/m{number}_data.xz"] = lzma.compress(inner)
    return tar_of(files)


TEXTS = ["Häß und\nmehr", "世界", 'a "b"']


def test_data_is_read_in_the_forms_that_people_have(tmp_path):
    path, plain = tmp_path / "the name does not matter", "\n\n".join(TEXTS)
    for content in [
        ("\ufeff" + plain.replace("\n", "\r\n")).encode(),
        lzma.compress(plain.encode()),
        zip_of(plain),
        "\n".join(json.dumps(dict(n=1, text=text)) for text in TEXTS).encode() + b"\n\n",
        archive(TEXTS[:2], TEXTS[2:]),
    ]:
        path.write_bytes(content)
        assert list(data.read_text(path)) == TEXTS


def test_data_that_cannot_be_read_is_refused_with_a_way_out(tmp_path):
    path, whole = tmp_path / "file", archive(TEXTS, TEXTS)
    for content, message in {
        "UTF-16".encode("utf-16"): "not UTF-8 text.*iconv",
        b'{"text": "a"}\n{"text": "b': "line 2: each line of JSON must be",
        lzma.compress(b"random " * 99)[:-9]: "damaged, cut or locked",
        whole.replace(b"openwebtext/m1", b"\xff" * 14): "damaged, cut or locked",  # a bad header
    }.items():
        path.write_bytes(content)
        refused(f"file.* {message}", lambda: list(data.read_text(path)))


def test_data_detokenizers_undo_the_tokenisation_of_a_corpus(tmp_path):
    path = tmp_path / "a.txt"
    for corpus, tokenised, text in [
        ("wikitext", "= = It = = \n he didn 't @-@ 1 @,@ 0", "== It ==\nhe didn't-1,0"),
        ("ptb", "it did n't rise N % in <unk> \\/ ( boys ' )", "it didn't rise 1% in ? / (boys')"),
        ("lm1b", 'He : " http : / / a.com ( now ) ! "', 'He: "http://a.com (now)!"'),
    ]:
        path.write_text(tokenised)
        blocks, _ = data.text_blocks(path, data.get_tokenizer("bytes"), 3, corpus)
        assert blocks[:-1, 1].tolist() == [*text.encode()]


def test_data_of_text8_is_split_by_character(tmp_path):
    text = "".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz "), 1000))
    path, out, tokenizer = tmp_path / "text8", tmp_path / "o", data.get_tokenizer("text8")
    path.write_text(text + "\n")  # the plain file is read as its zip is
    prepare(out, [path], "text8", tokenizer="text8")
    assert data.decode(tokenizer, stream(out, "train")) == text[:900]
    assert data.decode(tokenizer, stream(out, "val")) == text[950:]


def test_data_held_back_are_the_last_documents_or_a_tenth_of_the_tokens():
    assert data.place_cut(range(0, 201, 10), val_docs=3) == 170
    assert data.place_cut(range(0, 201, 10), val_docs=0) == 180
    assert data.place_cut([0, 5, 100], val_docs=0) == 90  # no document ends near nine tenths


class Killed(BaseException):
    """Stands for SIGKILL: no handler catches it, so nothing is cleaned up after it."""


@pytest.mark.parametrize("point, left", [(0, "abc"), (1, "abc"), (2, "bc"), (3, "c"), (4, "c")])
def test_data_killed_at_a_rename_ends_with_the_same_bytes(tmp_path, monkeypatch, point, left):
    """The renames: meta.json, two shards, the validation shard, the last shard.

    When the command is repeated, a file that has its whole shard is not read again.
    """
    out, whole, real, calls, read = tmp_path / "o", tmp_path / "w", os.replace, [], []
    paths = three_files(tmp_path)
    prepare(whole, paths)

    def killed(source, target):
        calls.append(target)
        if len(calls) > point:
            raise Killed
        real(source, target)

    def recorded(path):
        read.append(path.stem)
        return data.read_text(path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        prepare(out, paths)
    refused("is missing|no train tokens", data.Blocks, out, "train", 10)
    prepare(out, paths, read=recorded)
    assert contents(out) == contents(whole) and read == [*left]
    os.truncate(out / "train_001.bin", 1100)
    prepare(out, paths, read=recorded)
    assert contents(out) == contents(whole) and read == [*left, "b"]


def test_data_is_downloaded_again_if_damaged_and_never_if_complete(tmp_path):
    path, out = tmp_path / "s0.tar", tmp_path / "o"
    download = partial(prepare, out, [path.as_uri()], "openwebtext", val_docs=3)  # no server needed
    refused("cannot download.*run again", download)
    path.write_bytes(archive(TEXTS * 9)[:1000])
    refused("s0.tar is damaged.*run again to fetch it again", download)
    path.write_bytes(archive(TEXTS * 9))
    download()
    path.unlink()
    download()
    assert len(stream(out, "val")) == sum(len(text.encode()) + 1 for text in TEXTS)


def test_data_run_hides_no_fault():
    with pytest.raises(KeyError):
        data.run({}.popitem)


# ------------ 3. The scripts, as a user meets them ------------------------------------------------

ROOT = Path(__file__).parent
SHORT = "--batch_size 8 --max_steps 6 --warmup_steps 2 --log_every 1 --save_every 2"
SMALL = f"{SHORT} --n_layer 1 --n_embd 16 --n_head 2 --dropout 0.1"
FRESH = f"train.py --data data/small --out new {SMALL}"
RESUME = "train.py --resume --out out/toy"
TEXT = "the cat sat on the mat, and the dog sat on the log. it was warm; nobody moved.\n\n"


def call(command):
    """Exit code of a command line that starts with the name of a script, run on the CPU.

    Only there are results equal to the bit.
    """
    script, *argv = shlex.split(command)
    main = {"train.py": train.main, "sample.py": sample.main, "data.py": data.main}[script]
    if script != "data.py":
        argv += ["--device", "cpu"]
    try:
        data.run(partial(main, argv))
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with small data, and all three stages of a toy and of a byte model in out/."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(folder):
        Path("text.txt").write_text(TEXT * 20)
        data.make_toy("data/small", n_train=36, n_val=16)  # 4 steps an epoch, 4 blocks over
        prepare("data/bytes", ["text.txt"])
        assert call(f"{FRESH} --out out/toy") == 0
        assert call(f"{FRESH} --out out/bytes --data data/bytes --block_size 32") == 0
    return folder


@pytest.fixture
def here(tmp_path, runs, monkeypatch):
    """A working folder with a copy of `runs`, on a machine without the package transformers."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edlm, "token_log_prob", edlm.token_log_prob)  # --compile replaces it
    monkeypatch.setitem(sys.modules, "transformers", None)


def saved(out, stage):
    """All that a stage wrote, but for the speeds in its log."""
    content = torch.load(f"{out}/{stage}.pt", weights_only=True)
    del content["training"]["log_bytes"]
    content["log"] = [json.loads(line) for line in open(f"{out}/{stage}.jsonl")]
    for row in content["log"]:
        row.pop("tokens_per_second", None)
    return content


def assert_alike(out, other, rel):
    """Two runs logged the same, but for rounding. Last comes the loss of the final weights."""
    for stage in train.STAGES:
        rows = zip(saved(out, stage)["log"], saved(other, stage)["log"], strict=True)
        assert all(row == pytest.approx(other_row, rel=rel) for row, other_row in rows)


def refuses(capsys, command, words):
    """One plain line on stderr that has the words, exit code 2, nothing changed on disk."""
    before = contents()
    capsys.readouterr()
    code, error = call(command), capsys.readouterr().err.split("\r")[-1]  # after a progress bar
    lines = [line for line in error.split("\n") if line and "%|" not in line]
    assert code == 2 and len(lines) == 1 and len(error) < 400, (code, error)
    assert lines[0].startswith("error: ") and re.search(words, error), error
    assert before == contents()


@pytest.mark.parametrize(
    "command, words",
    [
        ("data.py nothing.txt", "'nothing.txt' is no file"),
        ("data.py text.txt --tokenizer bytes --out data/small", "another source"),
        ("train.py --stepz 4", "--stepz"),
        (f"{FRESH} --lr nan", "--lr must be from 0"),
        (f"{FRESH} --data nothing", "no train tokens in nothing: run `python data.py"),
        (f"{FRESH} --stage energy", "no checkpoint new/denoiser.pt: run python train.py"),
        (f"{FRESH} --out out/toy --stage ar", "ar.pt exists: --resume, --overwrite, or"),
        (f"{RESUME} --stage ar --data data/bytes", "ar.pt was made with tokenizer toy, not bytes"),
        (f"{RESUME} --max_steps 8", "energy.pt corrects this denoiser as it is"),
        ("sample.py --energy nse", "choose none, ar, coar, nce, exact or hf:NAME"),
        ("sample.py --judge gpt2", "pip install transformers"),
        (f"sample.py --prompt 'ben{' has' * 19}'", "prompt has 20 tokens, 19 fit"),
        ("sample.py --eval --data data/bytes", "holds bytes tokens, out/toy needs toy"),
        ("sample.py --eval --n 4 --k 8", "at least 2 and as many as --k"),
    ],
)
def test_mistakes_end_in_one_line_and_change_nothing(here, capsys, command, words):
    refuses(capsys, command, words)


def test_train_and_sample_refuse_damaged_files_and_other_denoisers(here, capsys):
    for path in ("out/bytes/denoiser.pt", "out/bytes/settings.json"):
        os.truncate(path, os.path.getsize(path) // 2)
        refuses(capsys, "train.py --resume --out out/bytes", f"{path} is damaged")
    path = Path("out/bytes/ar.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # a bit of the weights: only the checksums can tell
    path.write_bytes(content)
    refuses(capsys, "sample.py --out out/bytes --model ar", f"{path} is damaged")
    assert call(f"{FRESH} --out out/toy --overwrite --stage denoiser --seed 1") == 0
    refuses(capsys, f"{RESUME} --stage energy --max_steps 8", "energy.pt was made with denoiser")
    refuses(capsys, "sample.py --energy nce", "energy.pt corrects another denoiser")


class TestTrain:
    """train.py as its user meets it: settings, exact resume, processes, logs."""

    def test_settings_of_the_run_are_kept_and_flags_win(self, here):
        before, log = contents(), saved("out/toy", "ar")["log"]
        assert call(RESUME) == 0 and contents() == before  # all is finished
        assert call(f"{RESUME} --stage ar --max_steps 8 --lr 0.001") == 0
        longer, path = saved("out/toy", "ar")["log"], "out/toy/settings.json"
        assert longer[: len(log)] == log
        assert [row["step"] for row in longer[len(log) :]] == [7, 8, 8]
        settings = json.loads(before[path])
        settings.update(denoiser_steps=8, ar_steps=8, energy_steps=8, lr=0.001)
        assert settings == json.loads(contents()[path])

    @pytest.mark.parametrize(
        "stage, module, name, act, ends, words",
        [
            ("energy", torch, "save", Killed(), None, ""),
            ("denoiser", train, "train_step", signal.SIGINT, 130, "--resume --out new"),
            ("ar", torch, "save", OSError(28, "disk full"), 2, "could not write .*disk full"),
        ],
    )
    def test_stopped_and_resumed_is_bit_identical(
        self, here, capsys, monkeypatch, stage, module, name, act, ends, words
    ):
        """The third call of a function fails, or sends a signal to this process."""
        shutil.copytree("out/toy", "new")
        Path(f"new/{stage}.pt").unlink()
        real, calls, code = getattr(module, name), itertools.count(1), None

        def patched(*args):
            if next(calls) == 3:
                if isinstance(act, BaseException):
                    raise act
                os.kill(os.getpid(), act)
            return real(*args)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(module, name, patched)
            code = call(f"{FRESH} --stage {stage}")
        assert code == ends and re.search(words, capsys.readouterr().err)
        assert code is None or not list(Path("new").glob("*.tmp"))
        with open(f"new/{stage}.jsonl", "a") as log:
            log.write('{"step": 5, "tok')  # half a row, as a buffer would leave
        assert call(f"train.py --resume --out new --stage {stage}") == 0
        resumed, whole = (saved(out, stage) for out in ("new", "out/toy"))
        dump = partial(json.dumps, default=torch.Tensor.tolist)
        assert hash(dump(resumed)) == hash(dump(whole))  # pytest would print a megabyte of texts

    def test_trains_outside_the_main_thread(self, here):
        thread = threading.Thread(target=call, args=[FRESH])
        thread.start()
        thread.join()
        assert_alike("new", "out/toy", rel=1e-3)  # sums may be cut into other parts there

    def test_a_run_that_diverges_keeps_its_checkpoint(self, here, capsys, monkeypatch):
        content, real = Path("out/toy/ar.pt").read_bytes(), train.training_loss
        monkeypatch.setattr(train, "training_loss", lambda *args: real(*args) * math.nan)
        assert call(f"{RESUME} --max_steps 8 --stage ar") == 2
        assert "nan at step 7; the last checkpoint is kept" in capsys.readouterr().err
        assert Path("out/toy/ar.pt").read_bytes() == content

    def test_two_processes_do_what_one_does(self, here):
        """They add up in another order, so their numbers differ by rounding.

        That is 6e-8 for each of B L d = 2,700 terms at most, 2e-4 of their sizes; 2e-3 is allowed,
        as they cancel. Other masks, or no division by 2, make 1e-2.
        """
        command = f"{FRESH} --optimizer adamw --lr 0.001 --energy_lr 0.001 --micro_batch 2"
        assert call(f"{command} --out one") == 0
        torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
        argv = shlex.split(f"{torchrun} {ROOT}/{command} --device cpu")
        ended = subprocess.run(argv, capture_output=True, text=True)
        assert ended.returncode == 0 and ended.stdout.count("perplexity") == 1, ended.stderr
        assert_alike("one", "new", rel=2e-3)

    @pytest.mark.parametrize(
        "stage, guessing, peak", [("ar", math.log(35), "lr"), ("energy", 2 * BIT, "energy_lr")]
    )
    def test_rows_of_the_log(self, here, stage, guessing, peak):
        rows = saved("out/toy", stage)["log"]
        steps = [row for row in rows if "loss" in row]
        assert [row["step"] for row in rows if "val_loss" in row] == [2, 4, 6]
        assert [row["tokens"] for row in steps] == [step * 8 * 21 for step in range(1, 7)]
        assert steps[0]["loss"] == pytest.approx(guessing, rel=0.05)
        # warm-up of two steps, then a cosine that would reach 0 at step 6
        shape = [0.5, 1, *((1 + math.cos(math.pi * i / 4)) / 2 for i in range(4))]
        lr = [share * train.PRESETS["toy"][peak] for share in shape]
        assert [row["lr"] for row in steps] == pytest.approx(lr)

    @torch.no_grad()
    def test_the_table_has_the_validation_loss_of_the_saved_weights(self, here, capsys):
        assert call(RESUME) == 0
        line = re.search(r"^AR +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.M)
        ar, _ = edlm.load_checkpoint("out/toy/ar.pt")
        x0 = torch.stack(list(data.Blocks("data/small", "val", 21)))
        nats = -ar.log_prob(x0).sum(dim=1).mean().item() / 20
        shown = [float(value) for value in line.groups()]
        assert shown == pytest.approx([nats, math.exp(nats)], abs=6e-4)

    def test_averages_of_weights_and_micro_batches(self, here):
        """The average is decay * average + (1 - decay) * weights, decay = min(ema, n / (9 + n))."""
        average, argv = None, f"{FRESH} --stage ar --lr_schedule constant --ema 0.15 --dropout 0"
        for n in range(3):
            assert call(f"{argv} --max_steps {n + 1}" + " --resume" * (n > 0)) == 0
            content, decay = saved("new", "ar"), min(0.15, n / (9 + n))
            now = content["training"]["model"]["head.weight"]
            average = decay * average + (1 - decay) * now if n else now
            assert torch.allclose(content["weights"]["head.weight"], average, atol=1e-7), n
        # AR has no random masks: cut into micro-batches or not, a step is the same but for rounding
        assert call(f"{argv} --max_steps 3 --micro_batch 2 --out cut") == 0
        rows = [saved(out, "ar")["log"][-2] for out in ("cut", "new")]
        assert rows[0] == pytest.approx(rows[1], rel=1e-3)

    def test_every_micro_batch_has_its_own_random_numbers(self, here, monkeypatch):
        seeds, real = set(), torch.manual_seed
        monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeds.add(seed), real(seed)))
        assert call(f"{FRESH} --stage ar --micro_batch 2") == 0
        assert len(seeds) == 1 + 6 * 4  # the weights and the validation have seed 0

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has none before 2.9")
    @pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 128)])
    def test_muon_is_torchs_but_for_rounding(self, shape):
        """Torch's iterates in bfloat16, and ours ends 0.8% from it; 2% of the way is allowed.

        Without Nesterov's step, or with four iterations, it is 19% or more.
        """
        grads, moved = torch.randn(5, 2, *shape, generator=seeded(0)), []
        torchs = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
        for make in (train.Muon, torchs):
            params = [torch.nn.Parameter(torch.ones(shape)) for _ in range(2)]
            optimizer = make(params, lr=0.02, weight_decay=0.1)
            for pair in grads:
                for p, grad in zip(params, pair, strict=True):
                    p.grad = grad.clone()
                optimizer.step()
            moved.append(1 - torch.stack([p.detach() for p in params]))
        assert (moved[0] - moved[1]).norm() < 0.02 * moved[1].norm()

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    @pytest.mark.parametrize("compile", ["no", "yes"])
    def test_cuda_trains_resumes_samples_and_scores(self, here, compile):
        for command in [
            f"{FRESH} --max_steps 3 --compile {compile}",
            f"train.py --resume --out new --stage ar --max_steps 5 --compile {compile}",
            "sample.py --out new --num 2",
            "sample.py --eval --out new --data data/small --steps 2 --k 2 --n 4",
        ]:
            argv = [sys.executable, *shlex.split(f"{ROOT}/{command}")]
            ended = subprocess.run(argv, capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr
        for stage in train.STAGES:  # dropout differs; the first loss is that of guessing
            rows = [saved(out, stage)["log"][0]["loss"] for out in ("new", "out/toy")]
            assert rows[0] == pytest.approx(rows[1], rel=0.02)


def figures(command):
    """The rows that a command writes to --json, by their names."""
    assert call(f"{command} --json rows.json") == 0
    rows = json.loads(Path("rows.json").read_text())["rows"]
    return {row.get("name") or row["model"]: row for row in rows}


@pytest.mark.parametrize("energy", ["none", "ar", "coar", "nce", "exact"])
def test_sample_figures_of_every_energy(here, capsys, monkeypatch, energy):
    read, real = Counter(), edlm.Transformer.forward

    def counted(self, h, caches=None):
        read[self] += len(h)
        return real(self, h, caches)

    monkeypatch.setattr(edlm.Transformer, "forward", counted)
    monkeypatch.setattr(data, "toy_is_valid", lambda text: len(text) % 2 == 0)
    (row,) = figures(f"sample.py --energy {energy} --num 6 --steps 4 --k 3 --window 0.5").values()
    in_all = read.total() - 6  # texts that a network read, but for the AR perplexity
    assert row["passes_in_all"] == pytest.approx(in_all / 6)
    drafted = next(iter(read.values()))  # by the denoiser, which is always the first
    judged = in_all - drafted if energy in sample.ENERGIES else 0
    in_turn = in_all - judged + judged / 3  # three candidates side by side are one pass
    assert row["passes_in_turn"] == pytest.approx(in_turn / 6) and row["passes_in_turn_error"] >= 0
    assert 1 <= row["ess"] < 3.01 if judged else row["ess"] is None
    if energy == "exact":  # behind the denoiser's pass, all AR passes but the last find a refusal
        refused = 20 * (1 - row["acceptance"])
        assert row["passes_in_turn"] - 2 <= refused <= row["passes_in_turn"] - 1
    x, tokenizer = torch.tensor(row["tokens"]), data.get_tokenizer("toy")
    assert x.shape == (6, 21) and (x[:, 0] == tokenizer.eot_token).all()
    assert row["texts"] == [data.decode(tokenizer, tokens) for tokens in row["tokens"]]
    shares = torch.stack([tokens.bincount(minlength=36) / 20 for tokens in x[:, 1:]])
    entropy = -torch.xlogy(shares, shares).sum(dim=1) / math.log(2)
    assert row["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert row["entropy_error"] == pytest.approx(entropy.std().item() / 6**0.5, rel=1e-4)
    ar, _ = edlm.load_checkpoint("out/toy/ar.pt")
    cost = -ar.log_prob(x).sum(dim=1) / 20
    perplexity = cost.mean().exp().item()
    assert row["ar_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    error = perplexity * cost.std().item() / 6**0.5
    assert row["ar_perplexity_error"] == pytest.approx(error, rel=1e-3)
    right = [len(text) % 2 == 0 for text in row["texts"]]
    assert row["valid_fraction"] == sum(right) / 6
    shown = capsys.readouterr().out
    for text, valid in zip(row["texts"], right, strict=True):
        assert f"[{'ok' if valid else 'broken'}]" in re.search(f".*{re.escape(text)}", shown)[0]


def test_sample_settings_and_seeds_decide_what_is_drawn(here):
    command, nce = "sample.py --num 4", "EDLM-NCE T=2 k=16"
    default, again = figures(command), figures(command)
    assert list(default) == ["MDLM T=2", nce] and again[nce]["tokens"] == default[nce]["tokens"]
    for flag in ("--seed 1", "--window 0.5", "--schedule cosine"):
        changed = figures(f"{command} --energy nce {flag}")
        assert changed[nce]["tokens"] != default[nce]["tokens"]
    rows = figures("sample.py --compare --steps inf --k 2 --num 2")
    assert rows["AR"]["passes_in_turn"] == rows["MDLM T=inf"]["passes_in_turn"] == 20


def test_sample_keeps_what_is_given(here):
    tokenizer = data.get_tokenizer("toy")
    for command, given, length in [
        ("--model ar --prompt 'ben has a red'", "ben has a red", 21),
        ("--prompt 'ben has a red '", "ben has a red", 21),  # red carries no space behind it
        ("--energy exact --infill 'ben has ___ red'", "ben has ? red", 6),
        ("--infill 'ben ____*2 red'", "ben ? ? red", 6),
    ]:
        for row in figures(f"sample.py --num 3 {command}").values():
            for tokens in row["tokens"]:
                words = [data.decode(tokenizer, [token]).strip() for token in tokens[1:5]]
                assert all(a in ("?", b) for a, b in zip(given.split(), words, strict=True))
                assert len(tokens) == length


def test_eval_table(here, capsys):
    rows = figures("sample.py --eval --n 8 --k 1,2 --steps 2,4")  # of the data in settings.json
    assert "scored 304 of 304 tokens of data/small\n" in capsys.readouterr().out
    kinds = ("EDLM-AR", "EDLM-coAR", "EDLM-NCE")
    bounds = {f"{name} T={T} k={k}" for name in kinds for T in (2, 4) for k in (1, 2)}
    joint = {f"{name} joint, log Z {end}" for name in kinds[::2] for end in ("lower", "upper")}
    joint.add("EDLM-coAR joint, log Z exact")
    exact = {"AR", "EDLM-coAR exact"}
    assert rows.pop("language (floor)")["nats_per_token"] == pytest.approx(math.log(1440) / 20)
    assert set(rows) == {"MDLM", "MDLM T=2", "MDLM T=4"} | bounds | joint | exact
    nats = {name: row["nats_per_token"] for name, row in rows.items()}
    for name, row in rows.items():
        what = "exact" if name in exact else "estimate" if name in joint else "bound"
        assert row["what"] == what and row["perplexity"] == pytest.approx(math.exp(nats[name]))
        assert ("with_quarter_n" in row) == ("gain" in row) == (name in bounds)
    for name in kinds[::2]:  # log p = ... - log Z: its lower end gives the lower loss
        assert nats[f"{name} joint, log Z lower"] <= nats[f"{name} joint, log Z upper"]
    for name in bounds:  # one candidate is no choice: with the same masks, not even noise is left
        T = name.split()[1]
        gain, error = rows[name]["gain"], rows[name]["gain_standard_error"]
        assert gain == pytest.approx(nats[f"MDLM {T}"] - nats[name], abs=1e-6)
        assert (error == 0) == (gain == 0) == name.endswith("k=1")
    ar, _ = edlm.load_checkpoint("out/toy/ar.pt")
    x = torch.stack(list(data.Blocks("data/small", "val", 21)))
    cost = -ar.log_prob(x).sum(dim=1).double() / 20
    assert nats["AR"] == nats["EDLM-coAR exact"] == pytest.approx(cost.mean().item(), rel=1e-5)
    assert rows["AR"]["standard_error"] == pytest.approx(cost.std().item() / 4, rel=1e-4)


def test_eval_of_a_text_file(here, capsys):
    Path("val.txt").write_text(TEXT * 2)
    (row,) = figures("sample.py --eval --model ar --out out/bytes --data val.txt").values()
    assert "scored 150 of 158 tokens of val.txt\n" in capsys.readouterr().out
    nats = row["nats_per_token"] * 31  # of a block: 30 characters and the end of text
    assert row["bits_per_byte"] == pytest.approx(nats / 30 / math.log(2))


class Outside(torch.nn.Module):
    """Both parts of a causal LM: a token for every two characters, its law a table of bigrams."""

    eos_token_id, bos_token_id = 50256, 0
    device, config = torch.device("cpu"), SimpleNamespace(vocab_size=50257)
    from_pretrained = classmethod(lambda cls, name: cls())

    def forward(self, given, add_special_tokens=True):
        if isinstance(given, str):
            assert not add_special_tokens
            return {"input_ids": [ord(character) for character in given[::2]]}
        return SimpleNamespace(logits=self.logits(given))

    @staticmethod
    def logits(ids):  # [B, L] -> [B, L, V]: what position i says of token i + 1
        return 3 * torch.sin(ids[:, :, None] + torch.arange(50257) * (1 + ids[:, :, None]))

    @classmethod
    def cost(cls, ids):
        table = cls.logits(torch.tensor([ids]))[0].log_softmax(dim=1)
        return -sum(table[i, ids[i + 1]].item() for i in range(len(ids) - 1))


@pytest.fixture
def outside(monkeypatch):
    """A package transformers whose only model is `Outside`."""
    fake = SimpleNamespace(AutoTokenizer=Outside, AutoModelForCausalLM=Outside)
    monkeypatch.setitem(sys.modules, "transformers", fake)


def assert_outside_energy(tokenizer, rows, read):
    """The energy of rows of our tokens is log q minus log p of the ids that the model reads."""
    lm = sample.OutsideLM("any", sample.Run({}, None, tokenizer, torch.device("cpu")))
    candidates, log_q = torch.tensor([rows]), -torch.arange(1.0, 1 + len(rows))[None]
    E = lm.energy(candidates, torch.full_like(candidates[:, 0], tokenizer.n_vocab), log_q)
    cost = torch.tensor([[Outside.cost(ids) for ids in read]])
    torch.testing.assert_close(E, log_q + cost, rtol=1e-4, atol=1e-3)


def test_sample_outside_energy_reads_text(outside):
    """END_OF_TEXT inside becomes the model's own; the one that ends the block is not scored."""
    eot, end = 256, 50256
    assert_outside_energy(
        data.get_tokenizer("bytes"),
        rows=[
            [eot, *b"abcdef?", eot],
            [eot, *b"abc", eot, eot, *b"zz", eot],
            [eot, 97, 255, *b"bcdef", eot],
        ],
        read=[[0, *b"ace?"], [0, *b"ac", end, end, *b"z"], [0, *b"abdf"]],
    )


def test_sample_outside_energy_passes_gpt2_ids(outside, gpt2, monkeypatch):
    """Where both sides have GPT-2's tokenizer. No text has these ids: " a", "b" is another token"""
    monkeypatch.setattr(sample.OutsideLM, "encode", lambda self, text: data.encode(gpt2, text))
    rows = [[50256, 257, 65, 50256, 50256], [50256, 40000, 3, 7, 50256]]
    assert_outside_energy(gpt2, rows, read=rows)


def test_sample_outside_energy_of_a_real_causal_lm(tmp_path):
    """A random GPT-2 of the package transformers, whose own loss shifts tokens against logits."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate([*alphabet, "<end>"])}
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own = dict(bos_token="<end>", eos_token="<end>")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level, **own)
    torch.manual_seed(0)
    shape = dict(vocab_size=257, n_positions=128, n_embd=16, n_layer=1, n_head=2)
    config = transformers.GPT2Config(initializer_range=0.5, **shape)
    model = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    tokenizer = data.get_tokenizer("toy")
    stories = data.toy_stories(3, seed=0)
    rows = [[tokenizer.eot_token, *data.encode(tokenizer, s), tokenizer.eot_token] for s in stories]
    lm = sample.OutsideLM(str(tmp_path), sample.Run({}, None, tokenizer, torch.device("cpu")))
    E = lm.energy(torch.tensor([rows]), torch.tensor(rows[:1]), torch.zeros(1, 3))
    ids = [torch.tensor([[256, *theirs(story)["input_ids"]]]) for story in stories]
    with torch.no_grad():
        costs = [model(x, labels=x).loss.item() * (x.shape[1] - 1) for x in ids]
    assert E[0].tolist() == pytest.approx(costs, rel=1e-4) and len(set(map(len, stories))) > 1


def test_sample_and_eval_with_an_outside_model(here, outside):
    (row,) = figures("sample.py --energy hf:any --judge any --num 2 --steps 2 --k 2").values()
    assert row["name"] == "EDLM-hf T=2 k=2" and 1 <= row["ess"] <= 2
    read = [[0, *map(ord, text[::2])] for text in row["texts"]]
    tokens = sum(len(ids) - 1 for ids in read)
    perplexity = math.exp(sum(map(Outside.cost, read)) / tokens)
    assert row["judge_perplexity"] == pytest.approx(perplexity, rel=1e-3)
    rows = figures("sample.py --eval --data data/small --energy hf:any --steps 2 --k 2 --n 2")
    assert rows["EDLM-hf T=2 k=2"]["gain"] != 0


SHRUNK = {  # the first pattern that is found in a command says what makes it small
    r"^sample.py.* --eval": "--blocks 4 --n 16",
    r"^sample.py": "--num 2",
    r"^data.py openwebtext": "archive.tar --val_docs 4 --tokenizer bytes",
    r"^data.py text8": "text8.zip",
    r"^data.py": "",
    r" --resume": "--eval_blocks 4",
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
        Path(name).write_text(TEXT * 40)
    Path("text8.zip").write_bytes(zip_of("the quick brown fox jumps over the lazy dog " * 600))
    Path("archive.tar").write_bytes(archive([TEXT] * 40))
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
    figures = importlib.import_module("figures")
    shutil.copytree(ROOT / "assets", "assets")
    monkeypatch.setattr(figures, "__file__", str(Path("assets/figures.py").absolute()))
    table = "--compare --steps 2,inf --k 4,16 --num 2 --json out/compare.json"
    assert call(f"sample.py {table}") == 0
    story = figures.toy_block(data.get_tokenizer("toy"), figures.STORY)[0]
    step = story, story.repeat(4, 1), torch.tensor([-1.0, 3.0, 0.5, 2.0]), 0
    monkeypatch.setattr(figures, "draw_step", lambda models, tokenizer: step)
    for path in Path("assets").glob("*.svg"):
        path.unlink()
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


class TestTrainImport:
    """Published weights as checkpoints of ours."""

    @torch.no_grad()
    @pytest.mark.parametrize("kind", edlm.KINDS)
    def test_published_networks_say_what_they_said(self, tmp_path, monkeypatch, kind):
        """From all three kinds of file. One has other weights beside its EMA's, and an attack.

        This is also what holds our networks to a formula written out again, for random weights.
        """
        monkeypatch.chdir(tmp_path)
        w = published(kind)
        names = [name for name in w if "inv_freq" not in name]
        live = w | {name: w[name] + 1 for name in names}
        if kind == "energy":  # EDLM's, which also holds its denoiser
            live = {name.replace("backbone", "backbone.ebm"): live[name] for name in live}
            live |= {name.replace("backbone.", ""): live[name] for name in live}
            live |= published("denoiser")
        cached = defaultdict(dict, now={"%Y": "2024"})  # as OmegaConf has it
        foreign = [Attack(), np.float64(1), tmp_path, cached]
        content = dict(state_dict=live, ema=dict(shadow_params=[w[name] for name in names]))
        torch.save(content | dict(hyper_parameters=foreign), "last.ckpt")
        torch.save(w, "pytorch_model.bin")
        pytest.importorskip("safetensors.torch").save_file(w, "model.safetensors")
        x_t = torch.randint(11, (2, 7), generator=seeded(0))
        x0, where = x_t % 10, torch.rand(2, 7, generator=seeded(1)) < 0.5
        want = unfolded(w, kind, x0 if kind == "ar" else x_t, x0)
        for path in ("last.ckpt", "pytorch_model.bin", "model.safetensors"):
            net = train.convert(train.read_published(path), 7)
            if kind == "energy":
                close(net(x0[:, None], x_t, None)[:, 0], want, atol=1e-6)
            elif kind == "ar":
                log_p = want[:, :-1].gather(2, x0[:, 1:, None])[..., 0]
                close(net.log_prob(x0), F.pad(log_p, (1, 0)), atol=1e-6)
            else:
                log_mu = net(x_t, where).log_softmax(dim=1)
                close(log_mu[:, :10], want[where], atol=1e-6)
                assert (log_mu[:, 10:] < -1e29).all()
        assert not net.training and not Path("ran").exists()

    def test_other_files_are_refused_and_nothing_in_a_pickle_runs(
        self, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.chdir(tmp_path)
        w = published("denoiser")
        torch.save(dict(w, new=Attack()), "attack.bin")
        pytest.importorskip("safetensors.torch").save_file(w, "cut.safetensors")
        os.truncate("cut.safetensors", os.path.getsize("cut.safetensors") // 2)
        del w["backbone.blocks.0.norm1.weight"]
        torch.save(w, "less.bin")
        for path in ("attack.bin", "less.bin", "cut.safetensors"):
            refuses(capsys, f"train.py --import {path} --out new", f"{path} is no published")
        assert not Path("ran").exists()
        torch.save(published("denoiser"), "small.bin")
        refuses(capsys, "train.py --import small.bin --out new", "made with vocab_size 10,")

    def test_published_weights_become_a_run(self, gpt2, tmp_path, monkeypatch, capsys):
        """An energy is trained on top, a stage is fine-tuned by its name, and the run is scored."""
        monkeypatch.chdir(tmp_path)
        for split in ("train", "val"):
            np.arange(2000, dtype="<u2").tofile(f"{split}.bin")  # as nanoGPT has them
        command = "train.py --out new --block_size 12 --data . --import"
        for kind in edlm.KINDS:
            torch.save(published(kind, V=50257), f"{kind}.bin")
            assert call(f"{command} {kind}.bin") == 0
            refuses(capsys, f"{command} {kind}.bin", f"new/{kind}.pt exists: --overwrite")
        before, finished = edlm.load_models("new", edlm.KINDS)[0]["ar"], contents()
        assert call("train.py --resume --out new") == 0 and contents() == finished
        assert call(f"train.py --stage energy --out new --overwrite {SHORT}") == 0
        assert call(f"train.py --stage ar --resume --out new --lr 1e-7 {SHORT}") == 0
        tuned = edlm.load_models("new", edlm.KINDS)[0]["ar"]  # all three fit together
        for a, b in zip(tuned.parameters(), before.parameters(), strict=True):
            assert not torch.equal(a, b) and torch.allclose(a, b, atol=1e-5)
        assert call("sample.py --eval --data . --out new --blocks 4 --k 2 --steps 2 --n 2") == 0


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
    assert all(0 < row["optimizer_share"] and 0 < row["of_matmul"] for row in training)
    text = capsys.readouterr().out
    for row in sampling + training:
        assert row["ratio"] == pytest.approx(row["plain"] / row["seconds"]) and row["name"] in text


@pytest.mark.parametrize("stage", ["denoiser", "ar"])
def test_plain_references_compute_the_same(stage):
    """The plain loss and its gradients, for the same masks."""
    run = new_run(stage, edlm.Config(30, 8, 1, 2, 16), train.Settings(), torch.device("cpu"))
    net, results = run.model.double(), []
    x0 = torch.randint(30, (16, 8), generator=seeded(0))
    for loss in (train.training_loss, plain_loss):
        torch.manual_seed(1)
        value = loss(run, net, x0)
        results.append([value.detach(), *torch.autograd.grad(value, net.parameters())])
    for ours, plain in zip(*results, strict=True):
        close(ours, plain)


def test_plain_energy_losses_have_the_same_mean():
    """They draw their negatives in different ways, so only their means over 600 are the same."""
    run = new_run("energy", edlm.Config(30, 8, 1, 2, 16), train.Settings(), torch.device("cpu"))
    torch.nn.init.normal_(run.model.mlp_out.weight)  # an energy that tells texts apart
    x0, losses = torch.randint(30, (64, 8), generator=seeded(0)), []
    torch.manual_seed(0)
    with torch.no_grad():
        for loss in (train.training_loss, plain_loss):
            values = [loss(run, run.model, x0) for _ in range(600)]
            losses.append(torch.stack(values).double())
    error = sum(standard_error(values).square() for values in losses).sqrt()
    assert abs(losses[0].mean() - losses[1].mean()) < 6 * error  # by chance not: 2e-9


def test_plain_ar_energy_computes_the_same():
    ar = edlm.AutoregressiveLM(edlm.Config(30, 8, 1, 2, 16)).double()
    candidates = torch.randint(30, (3, 4, 8), generator=seeded(0))
    asked = candidates, torch.full((3, 8), 30), torch.randn(3, 4, generator=seeded(1))
    close(edlm.ARResidual(ar)(*asked), plain_ar_energy(ar, *asked))


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
