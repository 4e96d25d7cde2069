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
import io
import itertools
import json
import lzma
import math
import os
import pickle
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import data
import edlm
import sample
import train


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Networks this small gain nothing from threads, and lose much by waiting for them."""
    torch.set_num_threads(1)


# ==================================================================================================
# 1. The method, by enumeration of worlds small enough to list
# ==================================================================================================

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


@pytest.mark.parametrize("steps", [None, 1, 2, 5])
def test_masks_and_reveals_are_drawn_as_the_loss_weighs_them(steps):
    """S and U are as likely as a token is to be revealed so: |U| / M of their share of timetables.

    The rows of a batch are spread evenly over the sizes of S, in random order; BOS is never in S.
    """
    M, B, window, draws, sizes = 4, 64, 0.4, [], []
    law, share = torch.zeros(2, 32, 32), torch.zeros(M + 1, dtype=torch.float64)
    for (S, U, inside), times in reveals(M, steps, window).items():
        law[int(inside), sum(2**i for i in S), sum(2**i for i in U)] += times * len(U) / M
        share[len(S)] += times * len(U) / M
    weights = edlm.step_weights(M, 4000 if steps is None else steps).sum(dim=0)
    close(weights, share[1:], atol=1e-3 if steps is None else 1e-12)  # many steps tend to None
    torch.manual_seed(0)
    x0, bits = torch.randint(3, (B, M + 1)), 2 ** torch.arange(M + 1)
    for _ in range(1500):
        x_t, hidden, n = edlm.corrupt(x0, mask_id=3, steps=steps)
        revealed, inside = edlm.draw_reveal(hidden, n, steps, window)
        assert torch.equal(x_t, x0.masked_fill(hidden, 3)) and torch.equal(hidden.sum(dim=1), n)
        assert ((torch.bincount(n, minlength=M + 1) - B * share).abs() < 2).all()
        S, U = ((which * bits).sum(dim=1) for which in (hidden, revealed))
        draws.append(1024 * inside + 32 * S + U)
        sizes.append(n)
    draws, sizes = torch.stack(draws), torch.stack(sizes)  # [1500, B] both
    assert all(p_value(codes, law.flatten()) > RARE for codes in (draws[:, 0], draws.flatten()))
    alike = (sizes[:, :1] == sizes[:, 1:2]).double()  # neighbours; unshuffled, nearly always alike
    assert_mean(alike, [share.square().sum()], slack=1 / B)


# ------------ the sampler -------------------------------------------------------------------------
@torch.no_grad()
def plain_algorithm_1(
    denoiser, x, *, mask_id, steps, energy=None, k=1, window=1.0, schedule="linear", stop_after=None
):
    """The paper's Algorithm 1 as it is written: x Long[B, L] -> Long[B, L].

    Each step has probabilities over the vocabulary at all positions, Gumbel noise for each of the k
    candidates, and a coin for each masked position. The measurements let it stop early.
    """
    B, L = x.shape
    for j in range(steps)[:stop_after]:
        t, s = 1 - j / steps, 1 - (j + 1) / steps
        hidden, judged = x == mask_id, energy is not None and k > 1 and t > 1 - window
        K = k if judged else 1
        log_mu = denoiser(x, torch.ones_like(hidden)).softmax(dim=1).log().view(B, 1, L, -1)
        gumbel = -torch.log(-torch.log(torch.rand(B, K, *log_mu.shape[2:], device=x.device)))
        drawn = (log_mu + gumbel).argmax(dim=3)  # [B, K, L]
        candidates = torch.where(hidden[:, None], drawn, x[:, None])
        chosen = candidates[:, 0]
        if judged:
            each = log_mu.expand(B, K, L, -1).gather(3, drawn[..., None])[..., 0]
            log_q = (each * hidden[:, None]).sum(dim=2)  # [B, K]
            pick = (-energy(candidates, x, log_q)).softmax(dim=1).multinomial(1)  # [B, 1]
            chosen = candidates[torch.arange(B), pick[:, 0]]
        a_t, a_s = visible(t, schedule), visible(s, schedule)
        reveal = torch.rand(B, L, device=x.device) < (a_s - a_t) / (1 - a_t)
        x = torch.where(hidden & reveal, chosen, x)
    return x


@pytest.mark.parametrize("V, L, k, window", [(3, 4, 1, 1.0), (3, 3, 3, 1.0), (2, 4, 2, 0.5)])
@pytest.mark.parametrize("steps, schedule", [(1, "linear"), (3, "cosine"), (16, "linear")])
@pytest.mark.parametrize("sampler", [edlm.sample, plain_algorithm_1])
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
    denoiser = lambda x_t, where: torch.zeros(int(where.sum()), V)  # noqa: E731
    _, *states = edlm.sample_states(denoiser, x, **settings)
    judged = [not state.ess.isnan() for state in states]
    assert judged == [j < round(window * T) for j in range(T)]


@pytest.mark.parametrize("steps, k", [*itertools.product([1, 3, 1000], [1, 4])])
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
    assert (times[0] == 1).all() and (forwards <= masks.clamp(max=steps)).all()
    assert len(events) == len(states) - 1 and sum(map(len, events)) == forwards.sum()
    assert all(where.any(dim=1).all() and not where[:, 0].any() for where in events)
    assert projected >= masks.sum() and (projected == masks.sum()) == (k == 1 or steps == 1)
    assert all((candidates != candidates[0]).any() for candidates in asked)
    assert len(asked) <= forwards.sum() - int(steps == 1000) and (len(asked) > 0) == (k > 1)
    ess = torch.cat([state.ess[~state.ess.isnan()] for state in states])
    close(ess, torch.full((len(asked),), k))  # of equal weights


def test_useless_energies_are_refused_by_row():
    """Nan, or +inf for all candidates; +inf for some of them only means that they never win."""
    world = World(3, 4, seed=0)
    x = world.starts[[0, 2, 4, 1]]  # the last has BOS 1
    go = partial(edlm.sample, world.denoiser, mask_id=3, steps=1, k=400, generator=seeded(0))
    for value in (math.nan, INF):
        energy = lambda c, x_t, log_q: torch.where(x_t[:, :1] == 1, value, log_q)  # noqa: B023, E731
        go(x[:3], energy=energy)
        with pytest.raises(ValueError, match="row 3"):
            go(x, energy=energy)
    energy = lambda c, x_t, log_q: torch.where((c[..., 1:] == 0).any(dim=2), INF, 0.0)  # noqa: E731
    assert (go(world.start.repeat(20, 1), energy=energy)[:, 1:] != 0).all()


def test_wrong_arguments_are_refused():
    """By `sample_states` at the call, before a state is asked for."""
    world, config = World(2, 4, seed=0), edlm.Config(2, 4, 1, 1, 8, dropout=0.5)
    denoiser, ar, nce = (cls(config) for cls in edlm.KINDS.values())  # in training mode
    tables = dict(denoiser=world.denoiser, energy=world.energy, mask_id=2)
    draw = partial(edlm.sample_states, **tables, x=world.start[None], steps=2)
    joint = partial(edlm.joint_nelbo, **tables, x0=world.x0s)
    bound = partial(edlm.sampler_nelbo, **tables, x0=world.x0s, n=2)
    for call, *wrong in [
        (draw, dict(k=0), dict(steps=0), dict(window=-0.1), dict(window=1.1), dict(schedule="no")),
        (draw, dict(x=torch.full((1, 4), 2)), dict(denoiser=denoiser), dict(energy=nce)),
        (draw, dict(energy=edlm.ARResidual(ar))),
        (joint, dict(n=1), dict(n=2, log_partition="middle"), dict(n=2, steps=0)),
        (bound, dict(k=0), dict(k=3), dict(k=2, window=1.5), dict(k=2, steps=0)),
        (edlm.nce_loss, dict(denoiser=denoiser, energy=nce, x0=world.x0s, mask_id=2)),
        (ar.transformer, dict(h=torch.zeros(1, 5, 8))),  # longer than the block
        (ar.sample, dict(x=world.x0s, length=5)),
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
    energy = lambda *arguments: world.energy(*arguments) + shift  # noqa: E731
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
    table = lambda c, x_t, log_q: world.E[world.code(x_t)[:, None], world.code(c)]  # noqa: E731
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


@pytest.mark.parametrize("negatives, ranking", [(1, False), (3, False), (3, True)])
def test_nce_optimum_is_the_log_ratio(negatives, ranking):
    """Energy as a free table: the expected gradient is 0 at E = log mu - log q(x0 | x_t).

    One above it every cell's is positive, but ranking leaves a constant free; at E = 0 it leads
    towards the optimum. Beyond 6 standard errors of 100 means: by chance 3e-8; below 3: 1e-7.
    """
    world = World(3, 3, seed=9, scale=0.7)
    data = torch.randn(9, generator=seeded(0)).double().softmax(dim=0)
    best = torch.full_like(world.E, INF)
    for code in range(0, world.size, 4):  # all with BOS 0
        x_t, (x0, log_q, _) = world.state(code), world.proposal(code)
        q = data[((world.x0s == x_t) | (x_t == 3)).all(dim=1)]  # in the same order
        if len(x0) > 1:
            best[code, world.code(x0)] = log_q - (q / q.sum()).log()
    cells, form = best.isfinite(), dict(mask_id=3, negatives=negatives, ranking=ranking)
    nce_loss = partial(edlm.nce_loss, world.denoiser, world.energy, **form)

    def z_scores(E):
        world.E, gradients = E.where(cells, 0).requires_grad_(), []
        torch.manual_seed(0)
        for drawn in torch.multinomial(data, 100_000, replacement=True).split(1000):
            loss = nce_loss(x0=world.x0s[drawn])
            gradients.append(torch.autograd.grad(loss, world.E)[0][cells])
        gradients = torch.stack(gradients)
        return gradients.mean(dim=0) / standard_error(gradients)

    above, at_zero = z_scores(best + 1), z_scores(0 * best)
    assert z_scores(best).abs().max() < 6
    assert above.abs().max() < 6 if ranking else above.min() > 3
    assert at_zero.abs().max() > 6 and (at_zero * best[cells].sign()).max() < 6


def test_nce_loss_trains_the_energy_only():
    """From a denoiser the energy starts at 0, so the loss at 2 log 2; only the energy learns."""
    denoiser = tiny(edlm.Denoiser, dropout=0.5).float()
    energy = edlm.NCEResidual.from_denoiser(denoiser)
    x0 = torch.randint(3, (64, 4), generator=seeded(0))
    tied = lambda c, x_t, log_q: energy(c, x_t, log_q) + 0 * log_q  # noqa: E731
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
        monkeypatch.setattr(edlm, "ROWS", rows)
        judged = [edlm.in_chunks(energy, x0, x_t, log_q) for energy in energies]
        results.append([*judged, *edlm.categorical(logits, 50, generator=seeded(3))])
    for got, whole in zip(results[0] + results[1], 2 * results[2], strict=True):
        close(got, whole, atol=1e-4)


def plain_forward(w, h, n_head, causal):
    """Embeddings Float64[L, d] -> hidden states; a rotary pair is a complex number, turned."""
    norm = lambda name: F.layer_norm(h, h.shape[1:], w[name + ".weight"], w[name + ".bias"])  # noqa: E731
    L, D = len(h), h.shape[1] // n_head
    angle = torch.outer(torch.arange(L).double(), 10000.0 ** (-2 * torch.arange(D // 2) / D))
    future = torch.ones(L, L).triu(1).bool() & causal
    for block in sorted({name.split("norm1")[0] for name in w if "norm1" in name}):
        qkv, heads = plain_linear(w, norm(block + "norm1"), block + "qkv").view(L, 3, n_head, D), []
        for q, k, v in qkv.permute(2, 1, 0, 3):
            q, k = (torch.complex(*x.chunk(2, dim=1)) * torch.exp(1j * angle) for x in (q, k))
            score = (q @ k.conj().T).real / math.sqrt(D)
            heads.append(score.masked_fill(future, -INF).softmax(dim=1) @ v)
        h = h + plain_linear(w, torch.cat(heads, dim=1), block + "attn_out")
        m = plain_linear(w, norm(block + "norm2"), block + "mlp_in")
        m = m / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3)))
        h = h + plain_linear(w, m, block + "mlp_out")
    return norm("transformer.norm")


def plain_linear(w, h, name):
    return h @ w[name + ".weight"].T + w.get(name + ".bias", 0)


@torch.no_grad()
@pytest.mark.parametrize("cls", [edlm.Denoiser, edlm.AutoregressiveLM, edlm.NCEResidual])
def test_networks_equal_a_plain_forward(cls):
    """Embeddings, rotary positions, norms, (causal) attention, GELU, heads, written out again."""
    net = tiny(cls, vocab_size=5, block_size=7, n_embd=12)
    w = {name: value.double() for name, value in net.state_dict().items()}
    x_t = torch.tensor([[0, 5, 2, 4, 5, 1, 3], [1, 1, 5, 5, 5, 0, 2]])
    x0, where = x_t % 5, torch.rand(2, 7, generator=seeded(0)) < 0.5
    e0, e_t = w["transformer.embed.weight"][x0], w["transformer.embed.weight"][x_t]
    causal = cls is edlm.AutoregressiveLM
    h = e0 if causal else e_t
    if cls is edlm.NCEResidual:
        h = plain_linear(w, e0, "join_x0") + plain_linear(w, e_t, "join_xt")
    h = torch.stack([plain_forward(w, row, 2, causal) for row in h])
    if cls is edlm.NCEResidual:
        E = plain_linear(w, plain_linear(w, h.mean(dim=1), "mlp_in").relu(), "mlp_out")
        return close(net(x0[:, None], x_t, torch.zeros(2, 1)), E, atol=1e-4)  # in float32
    logits = plain_linear(w, h, "head")[..., :5]  # unused rows pad the vocabulary
    if causal:
        log_p = logits.log_softmax(dim=2)[:, :-1].gather(2, x0[:, 1:, None])[..., 0]
        return close(net.log_prob(x0), F.pad(log_p, (1, 0)))
    close(net(x_t, where), logits[where])  # in row-major order


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


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not op.is_view:  # a view of the weights is not new
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize("name", edlm.ENERGIES)
def test_nothing_as_large_as_all_logits_is_held(name, monkeypatch):
    """200 candidates need no tensor larger than the denoiser's [N, V] logits, which one needs too.

    The AR model makes ROWS rows at a time, and keeps none for the backward pass.
    """
    config, V, N, rows = edlm.Config(3000, 16, 1, 2, 8), 3008, 30, 10  # V with its padding
    ar, denoiser = edlm.AutoregressiveLM(config).eval(), edlm.Denoiser(config).eval()
    models = dict(ar=ar, energy=edlm.NCEResidual.from_denoiser(denoiser).eval())
    monkeypatch.setattr(edlm, "ROWS", rows)
    monkeypatch.setattr(edlm, "JUDGED_TOKENS", 256)
    x = torch.full((2, 16), config.mask_id).index_fill(1, torch.tensor(0), 0)
    settings = dict(mask_id=config.mask_id, steps=2, energy=edlm.make_energy(name, models))
    for k in (1, 200):
        with Largest() as largest:
            edlm.sample(denoiser, x, k=k, **settings)
        assert rows * V <= largest.numbers <= N * V
    kept, keep = [], lambda value: kept.append(value.numel()) or value
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        ar.log_prob(x % 3000).sum().backward()
    assert largest.numbers <= rows * V and 0 < sum(kept) < N * V


# ==================================================================================================
# 2. Data: toy language, tokenizers, shards, archives, kills, downloads
# ==================================================================================================

SHARED = Path(__file__).parent.parent / "shared"


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Waiting for the disk guards against power cuts, which are not tested, and takes time."""
    monkeypatch.setattr(data.os, "fsync", lambda descriptor: None)


def refused(message, call, *args, **options):
    """The call raises what `data.run` prints: a plain line with this in it."""
    with pytest.raises((ValueError, OSError), match=message) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def stream(folder, split):
    """All tokens of a split, by numpy alone."""
    shards = sorted(Path(folder).glob(f"{split}_*.bin"))
    return np.concatenate([np.fromfile(shard, "<u2", offset=1024) for shard in shards]).tolist()


# ---------------------------------------------- toy language, tokens


def test_toy_language_is_a_distribution_with_the_stated_entropy():
    probabilities = [math.exp(data.toy_log_prob(story)) for story in data.toy_language()]
    assert math.fsum(probabilities) == pytest.approx(1, abs=1e-12)
    # By hand: 3 templates, 6 names, 5 friends, 4 colours, 4 objects, no two choices the same story.
    assert len(probabilities) == 3 * 6 * 5 * 4 * 4
    assert data.toy_entropy() == pytest.approx(math.log(1440), abs=1e-9)


def test_toy_stories_follow_the_language():
    stories = data.toy_stories(30000, seed=1)
    assert stories == data.toy_stories(30000, seed=1) != data.toy_stories(30000, seed=2)
    templates = Counter(story.split()[6] for story in stories)
    # 0.02 is 7 standard deviations: a false alarm in 1e11 seeds.
    assert set(templates) == {"gives", "shows", "sells"}
    assert all(abs(n / 30000 - 1 / 3) < 0.02 for n in templates.values())


GOOD = "ben has a black boat. he gives it to ann today. she likes the black boat."
BROKEN = [("he ", "she "), ("gives", "sells"), ("likes", "keeps"), ("she", "he"), ("ann", "ben")]


def test_toy_validity_notices_every_broken_agreement():
    assert data.toy_is_valid(GOOD)
    broken = [GOOD.replace(*pair, 1) for pair in [*BROKEN, ("the black", "the red")]]
    for bad in (*broken, "", GOOD + " ", GOOD[:-1], GOOD + " " + GOOD, GOOD.capitalize()):
        assert data.toy_log_prob(bad) == -math.inf and not data.toy_is_valid(bad)


def test_every_toy_story_has_the_same_length_and_round_trips():
    tokenizer = data.get_tokenizer("toy")
    for story in itertools.islice(data.toy_language(), 0, None, 7):
        ids = data.encode(tokenizer, story)
        assert len(ids) == data.TOY_LENGTH and data.decode(tokenizer, ids) == story


@pytest.mark.parametrize(
    "name, size, text",
    [("bytes", 257, "Häß\n\n 世界 <|endoftext|> \0" * 99), ("text8", 28, "the quick brown fox")],
)
def test_small_tokenizers(name, size, text):
    tokenizer = data.get_tokenizer(name)
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (size, size - 1)
    ids = data.encode(tokenizer, text)
    assert len(ids) == len(text.encode()) and data.decode(tokenizer, ids) == text
    assert data.decode(tokenizer, [tokenizer.eot_token, *ids, size]) == text + "_"


def test_masks_and_broken_characters_are_shown():
    toy, raw = data.get_tokenizer("toy"), data.get_tokenizer("bytes")
    ids, eot, mask = data.encode(toy, "ben has a"), toy.eot_token, toy.n_vocab
    assert data.decode(toy, torch.tensor([eot, *ids, mask, mask, eot])) == "ben has a ___ ___"
    assert data.decode(toy, [mask, *ids[1:]]) == "___ has a"
    assert data.decode(raw, [104, 257, 105, 256, 0xC3]) == "h_i\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "name, text, culprit",
    [
        ("toy", "ben has a yacht.", "' yacht'"),
        ("toy", "ben  has", "' '"),
        ("text8", "a\n", r"'\n'"),
        ("bytes", "\ud800", "Unicode"),
    ],
)
def test_text_that_cannot_be_encoded_is_refused_by_name(name, text, culprit):
    refused(re.escape(culprit), data.encode, data.get_tokenizer(name), text)


def test_unknown_tokenizer_and_gpt2_without_network(monkeypatch):
    refused("choose one of gpt2, bytes, toy, text8", data.get_tokenizer, "gpt3")

    def offline(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(data.tiktoken, "get_encoding", offline)
    refused("TIKTOKEN_CACHE_DIR", data.get_tokenizer.__wrapped__, "gpt2")


# ---------------------------------------------- shards and blocks


def make_folder(folder, tokens, shard_tokens):
    data.claim(folder, data.get_tokenizer("bytes"), ["test"])
    tokens = np.asarray(tokens, dtype=data.TOKEN)
    data.write_shards(folder, "train", 0, [tokens], shard_tokens)
    data.write_shards(folder, "val", 0, [tokens[:50]], shard_tokens)
    return folder


@pytest.mark.parametrize("shard_tokens", [1, 7, 30, 1000])
def test_shards_round_trip_with_blocks_that_span_them(tmp_path, shard_tokens):
    tokens = np.random.default_rng(0).integers(0, 256, 200)
    blocks = data.Blocks(make_folder(tmp_path, tokens, shard_tokens), "train", 32)
    assert (blocks.tokenizer, blocks.vocab_size, blocks.eot, len(blocks)) == ("bytes", 257, 256, 6)
    for i, block in enumerate(blocks):
        assert block.dtype == torch.int64
        assert block.tolist() == [256, *tokens[i * 30 : (i + 1) * 30], 256]
    assert len(list(tmp_path.glob("train_*.bin"))) == math.ceil(200 / shard_tokens)
    header = np.fromfile(tmp_path / "train_000_0000.bin", "<i4", 256)  # as llm.c reads it
    assert header[:3].tolist() == [20240520, 1, min(200, shard_tokens)]


def test_blocks_work_in_dataloader_workers_and_pickle_small(tmp_path):
    blocks = data.Blocks(make_folder(tmp_path, np.arange(60000) % 256, 20000), "train", 32)
    blocks[0]
    assert len(pickle.dumps(blocks)) < 5000
    order = data.BatchOrder(len(blocks), 8, 4, seed=0)
    loaded = list(itertools.islice(DataLoader(blocks, batch_sampler=order, num_workers=2), 6))
    expected = [torch.stack([blocks[i] for i in batch]) for batch in itertools.islice(order, 6)]
    assert all(torch.equal(a, b) for a, b in zip(loaded, expected, strict=True))


META = dict(tokenizer="bytes", vocab_size=257, eot=256, source=["test"])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train_000_0001.bin", lambda old: old[:-1], "train_000_0001.bin is damaged"),
        (
            "train_000_0001.bin",
            lambda old: b"\x89PNG" + bytes(3000),
            "train_000_0001.bin is damaged",
        ),
        ("train_000_0001.bin", lambda old: b"", "train_000_0001.bin is damaged"),
        ("train_000_0001.bin", lambda old: None, "lacks train shards of test: run the same"),
        ("train_000_0002.bin", lambda old: None, "lacks train shards of test: run the same"),
        ("val_000_0000.bin", lambda old: None, "unfinished: run the same"),
        *(
            ("meta.json", lambda old, bad=bad: bad.encode(), "meta.json is damaged")
            for bad in (
                '{"tokenizer": ',
                "[]",
                "\x00",
                "[" * 99999,
                json.dumps(META | dict(vocab_size="257")),
                json.dumps(META | dict(vocab_size=True)),
                json.dumps(META | dict(eot=257)),
                json.dumps(META | dict(tokenizer=["bytes"])),
                json.dumps(META | dict(source="test")),
                json.dumps(META | dict(source=[])),
                json.dumps(META | dict(source=[3])),
            )
        ),
    ],
)
def test_damaged_folders_are_refused(tmp_path, name, content, message):
    make_folder(tmp_path, np.arange(200), 70)
    new = content((tmp_path / name).read_bytes())
    (tmp_path / name).unlink()
    if new is not None:
        (tmp_path / name).write_bytes(new)
    refused(message, data.Blocks, tmp_path, "train", 32)


def test_blocks_say_what_is_missing(tmp_path):
    refused("python data.py", data.Blocks, tmp_path, "train", 32)
    folder = make_folder(tmp_path / "d", np.arange(200), 70)
    refused("50 tokens, too few for one block of 53", data.Blocks, folder, "val", 53)
    assert len(data.Blocks(folder, "val", 52)) == 1
    refused("at least 3", data.Blocks, folder, "val", 2)
    refused("lacks test shards", data.Blocks, folder, "test", 32)
    foreign = data.Blocks(make_folder(tmp_path / "e", np.full(100, 999), 70), "train", 32)
    refused("token 999, but bytes ends at 256", foreign.__getitem__, 0)


def test_nanogpt_folders_are_read(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 100).astype("<u2")
    tokens.tofile(tmp_path / "train.bin")
    blocks = data.Blocks(tmp_path, "train", 12)
    assert (blocks.tokenizer, blocks.vocab_size, blocks.eot) == ("gpt2", 50257, 50256)
    assert len(blocks) == 10 and blocks[9].tolist() == [50256, *tokens[90:], 50256]


def test_toy_shards_hold_one_story_per_block(tmp_path):
    data.make_toy(tmp_path, n_train=300, n_val=40, seed=3)
    before = contents(tmp_path)
    data.make_toy(tmp_path, n_train=300, n_val=40, seed=3)
    assert contents(tmp_path) == before
    tokenizer, stories = data.get_tokenizer("toy"), []
    for split in ("train", "val"):
        blocks = data.Blocks(tmp_path, split, data.TOY_LENGTH + 2)
        stories.append([data.decode(tokenizer, block) for block in blocks])
    assert stories == [data.toy_stories(340, 3)[:300], data.toy_stories(340, 3)[300:]]
    refused("block_size of 21, not 32", data.Blocks, tmp_path, "train", 32)
    refused("made with another", data.make_toy, tmp_path, seed=4)


def first(order, n):
    return list(itertools.islice(order, n))


def test_batch_order_is_a_permutation_per_epoch():
    batches = first(data.BatchOrder(23, 4, 4, seed=0), 10)  # 5 steps an epoch, 3 blocks left out
    for epoch in (batches[:5], batches[5:]):
        seen = [i for batch in epoch for i in batch]
        assert len(set(seen)) == 20 and set(seen) <= set(range(23))
    assert batches[:5] != batches[5:]
    assert batches != first(data.BatchOrder(23, 4, 4, seed=1), 10)


@pytest.mark.parametrize("step", [1, 4, 5, 12])
def test_batch_order_resumes_at_any_step(step):
    whole = first(data.BatchOrder(23, 4, 2, seed=0), 40)
    rest = first(data.BatchOrder(23, 4, 2, seed=0, start_step=step), 8)
    assert rest == whole[2 * step : 2 * step + 8]


@pytest.mark.parametrize("world", [2, 3, 6])
def test_batch_order_gives_ranks_what_one_process_would_see(world):
    alone = first(data.BatchOrder(100, 24, 4, seed=5), 24)  # 6 micro-batches per step
    orders = [data.BatchOrder(100, 24, 4, seed=5, rank=r, world=world) for r in range(world)]
    ranks = [first(order, 24 // world) for order in orders]
    assert [batch for together in zip(*ranks, strict=True) for batch in together] == alone


@pytest.mark.parametrize("sizes", [(3, 4, 4, 1), (99, 4, 3, 1), (99, 4, 4, 2), (99, 0, 1, 1)])
def test_batch_order_refuses_sizes_that_do_not_fit(sizes):
    *sizes, world = sizes
    refused("only 3 blocks|not a multiple", data.BatchOrder, *sizes, seed=0, world=world)


# ---------------------------------------------- documents


@pytest.mark.parametrize(
    "name, content, documents",
    [
        ("blank.txt", "one\nstill one\n \n\n  two\n\n\n", ["one\nstill one", "two"]),
        ("marked.txt", "a\n\nb<|endoftext|>c<|endoftext|>\n<|endoftext|>d", ["a\n\nb", "c", "d"]),
        (
            "a.jsonl",
            '{"text": "a\\n\\nb "}\n\n{"text": ""}\n{"text": "c", "id": 1}\n',
            ["a\n\nb", "c"],
        ),
    ],
)
def test_a_text_is_framed_alike_for_training_and_for_evaluation(tmp_path, name, content, documents):
    path, raw = tmp_path / name, data.get_tokenizer("bytes")
    path.write_text(content)
    assert list(data.text_documents(path)) == documents
    data.prepare_text(tmp_path / "o", [path], tokenizer="bytes", val_docs=1)
    expected = [token for text in documents for token in [*text.encode(), 256]]
    assert stream(tmp_path / "o", "train") + stream(tmp_path / "o", "val") == expected
    blocks = data.text_blocks(path, raw, 3)
    assert blocks[:, 1].tolist() == expected and (blocks[:, [0, 2]] == 256).all()
    wider = data.text_blocks(path, raw, 5)  # what is left over at the end makes no block
    assert wider[:, 1:-1].flatten().tolist() == expected[: len(expected) // 3 * 3]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b" \n", "0 tokens, too few"),
        ("a.txt", b"abc", "4 tokens, too few for one block of 8"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "abc"}\n{"text": 3}\n', "line 2"),
        ("a.jsonl", b'{"text": "abc"}\n\n{"txt": ""}\n', "line 3"),
        ("a.jsonl", b'{"text": "abc"', "line 1"),
        ("a.jsonl", b"[1]", "line 1"),
    ],
)
def test_text_blocks_refuse_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    refused(message, data.text_blocks, tmp_path / name, data.get_tokenizer("bytes"), 8)


@pytest.mark.parametrize(
    "name, tokenised, text",
    [
        (
            "wikitext",
            " = = Life = = \n a two @-@ part , 1 @,@ 000",
            "== Life ==\na two-part, 1,000",
        ),
        ("wikitext", 'the " Teddy \'s Story " ( 24 in ) .', 'the "Teddy\'s Story" (24 in).'),
        ("wikitext", "he didn 't say <unk> ; $ 5", "he didn't say <unk>; $5"),
        ("ptb", "it did n't rise N % to $ N in <unk>", "it didn't rise 1% to $1 in ?"),
        ("ptb", "the boys ' game \\/ it 's on", "the boys' game / it's on"),
        ("lm1b", 'He said , " I do n\'t know . "', 'He said, "I don\'t know."'),
        ("lm1b", "see http : / / a.com ( now ) -- 5 % !", "see http://a.com (now) -- 5%!"),
    ],
)
def test_detokenizers(tmp_path, name, tokenised, text):
    assert data.DETOKENIZERS[name](text) == text
    raw, path = data.get_tokenizer("bytes"), tmp_path / "a.txt"
    path.write_text(tokenised)
    assert data.text_blocks(path, raw, 3, name)[:-1, 1].tolist() == [*text.encode()]


# ---------------------------------------------- archives


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def member_xz(texts):
    return lzma.compress(tar_of({f"{i}.txt": text for i, text in enumerate(texts)}))


def texts_of(n, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, n)
    return [bytes(rng.integers(97, 123, length).astype(np.uint8)) for length in lengths]


def archive(path, members):
    path.write_bytes(tar_of({f"openwebtext/m{i}_data.xz": one for i, one in enumerate(members)}))
    return path


def test_all_openwebtext_layouts_give_the_same_cleaned_documents(tmp_path):
    texts = [b" a\n\n\n\n\nb\n\nc\n", b"\n\n", "é".encode(), *texts_of(9)]
    outer = archive(tmp_path / "a.tar", [member_xz(texts[:5]), member_xz(texts[5:])])
    (tmp_path / "a.tar.xz").write_bytes(lzma.compress(outer.read_bytes()))
    raw = lzma.decompress(member_xz(texts))
    (tmp_path / "two.xz").write_bytes(lzma.compress(raw[:700]) + lzma.compress(raw[700:]))
    for name in ("a.tar", "a.tar.xz", "two.xz"):
        documents = list(data.archive_documents(tmp_path / name, []))
        assert documents == ["a\n\nb\n\nc", "é", *(text.decode() for text in texts[3:])]


def test_damaged_members_are_skipped_and_counted(tmp_path, capsys):
    good, whole = member_xz([b"good"]), member_xz(texts_of(400))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    bad = [whole[: len(whole) // 2], bytes(flipped), b"not xz at all" * 99]
    bad += [member_xz([b"\xff\xfe", b"fine"]), b""]
    path = archive(tmp_path / "a.tar", [good, *bad, good])
    documents = list(data.archive_documents(path, damaged := []))
    assert documents[0] == documents[-1] == "good" and "fine" in documents and len(damaged) == 5
    assert capsys.readouterr().err.count("skipped") == 5
    out = ["--out", str(tmp_path / "o"), "--tokenizer", "bytes", "--val_docs", "1"]
    data.main(["openwebtext", str(path), *out])
    assert "5 damaged pieces were skipped" in capsys.readouterr().out


SPOILT = {
    "html": lambda raw: b"<html>404</html>" * 100,
    "empty": lambda raw: b"",
    "header": lambda raw: raw.replace(b"openwebtext/m1", b"\xff" * 14),
    "between members": lambda raw: raw[:2048],
    "in a member": lambda raw: raw[:1324],
    "in a header": lambda raw: raw[:2500],
    "xz cut": lambda raw: lzma.compress(raw)[:-200],
    "xz zeros": lambda raw: lzma.compress(raw)[:300] + bytes(50) + lzma.compress(raw)[350:],
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_damaged_archives_are_errors_that_name_them(tmp_path, spoil):
    path = archive(tmp_path / "bad.tar", [member_xz(texts_of(9, seed)) for seed in range(3)])
    path.write_bytes(spoil(path.read_bytes()))
    refused("bad.tar is damaged", lambda: list(data.archive_documents(path, [])))


@pytest.mark.skipif(not (SHARED / "owt_layout").exists(), reason="no sample archives beside this")
def test_the_real_archives():
    path = sorted((SHARED / "owt_layout").glob("*.tar"))[-1]
    documents = list(data.archive_documents(path, damaged := []))
    assert len(documents) > 500 and not damaged and all(documents)
    with tarfile.open(path) as outer:
        last = outer.extractfile(outer.getnames()[-1])
        with tarfile.open(fileobj=last, mode="r:xz") as inner:
            expected = inner.extractfile(inner.getmembers()[-1]).read().decode()
    assert re.sub(r"\n\n\n+", "\n\n", expected).strip() == documents[-1]


# ---------------------------------------------- preparation


def test_prepared_shards_hold_the_documents_in_order(tmp_path):
    texts = texts_of(300)
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_bytes(b"\n\n".join(texts[:200]))
    paths[1].write_bytes(b"\n\n".join(texts[200:]))
    data.prepare_text(tmp_path / "o", paths, tokenizer="bytes", shard_tokens=100)
    tokens = {"train": texts[:290], "val": texts[290:]}  # a tenth of the last file
    for split, documents in tokens.items():
        assert stream(tmp_path / "o", split) == [t for text in documents for t in [*text, 256]]


class Killed(BaseException):
    """Stands for SIGKILL: no handler of data.py catches it, and nothing is cleaned up after it."""


@pytest.mark.parametrize("shard_tokens, val_docs", [(100, 7), (500, 1)])
def test_killed_at_any_rename_the_second_run_ends_with_the_same_bytes(
    tmp_path, monkeypatch, shard_tokens, val_docs
):
    texts = texts_of(40)
    members = [member_xz(texts[:15]), member_xz(texts[15:])[:-60], member_xz([b"\xff", *texts])]
    paths = [archive(tmp_path / f"{name}.tar", members) for name in "abc"]
    options = dict(tokenizer="bytes", val_docs=val_docs, shard_tokens=shard_tokens)
    data.prepare_openwebtext(tmp_path / "whole", paths, **options)
    whole, real, renames = contents(tmp_path / "whole"), os.replace, []

    def replace(source, target):
        renames.append(target)
        if len(renames) > point:
            raise Killed
        real(source, target)

    points = {0, 1, 2, *range(3, len(whole), len(whole) // 6), len(whole) - 1}
    for point in sorted(points):  # meta.json and the shards are renamed once each
        out = tmp_path / f"killed{point}"
        renames.clear()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(data.os, "replace", replace)
            data.prepare_openwebtext(out, paths, **options)
        refused("unfinished|no tokens", data.Blocks, out, "train", 10)
        data.prepare_openwebtext(out, paths, **options)
        assert contents(out) == whole, point


def test_a_killed_process_keeps_the_finished_files(tmp_path):
    paths = [tmp_path / f"{name}.txt" for name in "abc"]
    for path in paths:
        path.write_bytes(b"\n\n".join(texts_of(50)))
    options = dict(tokenizer="bytes", val_docs=5, shard_tokens=300)
    data.prepare_text(tmp_path / "whole", paths, **options)
    code = f"""
import os, data
real = data.text_documents
def read(path):
    for n, text in enumerate(real(path)):
        if path.name == "c.txt" and n == 20:
            os.kill(os.getpid(), {int(signal.SIGKILL)})
        yield text
data.text_documents = read
data.prepare_text("o", ["a.txt", "b.txt", "c.txt"], **{options})
"""
    environment = os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)}
    died = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert died.returncode == -signal.SIGKILL
    kept = {name: content for name, content in contents(tmp_path / "o").items() if "_00" in name}
    assert {name[:9] for name in kept} == {"train_000", "train_001"}
    read, real = [], data.text_documents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "text_documents", lambda path: read.append(path) or real(path))
        data.prepare_text(tmp_path / "o", paths, **options)
    assert read == paths[2:] and contents(tmp_path / "o") == contents(tmp_path / "whole")
    # A shard that was lost later is made again by the same command, and nothing else is.
    (tmp_path / "o" / "train_001_0001.bin").unlink()
    data.prepare_text(tmp_path / "o", paths, **options)
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


def test_other_settings_or_sources_are_refused_and_nothing_is_deleted(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n\n".join([name * 9] * 90))
    out, paths, good = tmp_path / "o", [tmp_path / "a.txt"], dict(tokenizer="bytes", val_docs=5)
    out.mkdir()
    (out / "mine.bin.old").write_bytes(b"precious")
    (out / "train_mine.bin.tmp").write_bytes(b"precious")
    # Before the first shard a mistake can be mended.
    refused("lower --val_docs", data.prepare_text, out, paths, tokenizer="bytes", val_docs=90)
    data.prepare_text(out, paths, **good)
    before = contents(out)
    assert before["mine.bin.old"] == before["train_mine.bin.tmp"] == b"precious"
    for change in (dict(val_docs=6), dict(shard_tokens=99), dict(tokenizer="gpt2")):
        refused(f"another {[*change][0]}", data.prepare_text, out, paths, **good | change)
    refused("another source", data.prepare_text, out, [tmp_path / "b.txt"], **good)
    assert contents(out) == before


def test_tokenisation_keeps_order_over_many_groups():
    tokenizer = data.get_tokenizer("bytes")
    texts = [text.decode() * 900 for text in texts_of(99)]
    found = list(data.tokenize(iter(texts), tokenizer))
    assert [tokens.tolist() for tokens in found] == [[*text.encode(), 256] for text in texts]


def test_text8_is_split_by_character(tmp_path):
    text = "".join(np.random.default_rng(0).choice(list(data.TEXT8_CHARACTERS), 1000))
    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as file:
        file.writestr("text8", text)
    (tmp_path / "text8").write_text(text + "\n")
    for name in ("text8", "text8.zip"):
        data.prepare_text8(tmp_path / f"{name}-out", [tmp_path / name], shard_tokens=300)
        ids = [stream(tmp_path / f"{name}-out", split) for split in ("train", "val", "test")]
        assert [len(split) for split in ids] == [900, 50, 50]
        assert data.decode(data.get_tokenizer("text8"), sum(ids, [])) == text
    whole = bytearray((tmp_path / "text8.zip").read_bytes())
    spoilt, locked = whole.copy(), whole.copy()
    spoilt[60] ^= 255
    locked[locked.index(b"PK\x01\x02") + 8] |= 1  # the flag of an encrypted member
    empty = b"PK\x05\x06" + bytes(18)
    damaged = {bytes(spoilt): "bad is damaged", empty: "bad is damaged"}
    reasons = damaged | {b"Hello " * 9: "not text8", bytes(locked): "encrypted"}
    for bad, message in reasons.items():
        (tmp_path / "bad").write_bytes(bad)
        refused(message, data.prepare_text8, tmp_path / "o", [tmp_path / "bad"])


# ---------------------------------------------- downloads and command line


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A folder that urllib and torch.hub take for the network: file:// URLs need no server."""
    monkeypatch.setattr(data, "OWT_ARCHIVES", ["s0.tar", "s1.tar"])
    (tmp_path / "web").mkdir()
    for i in range(2):
        archive(tmp_path / "web" / f"s{i}.tar", [member_xz(texts_of(20, seed=i))])
    return tmp_path / "web"


def test_openwebtext_downloads_one_archive_at_a_time(tmp_path, web, monkeypatch):
    options = dict(tokenizer="bytes", val_docs=3, base_url=web.as_uri())
    out, seen, real = tmp_path / "o", [], torch.hub.download_url_to_file

    def fetch(url, part, **more):
        seen.append(sorted(path.name for path in out.iterdir()))
        if len(seen) == 2:
            raise ConnectionResetError("reset\nby peer")
        if len(seen) == 3:
            return Path(part).write_bytes(b"cut short")
        return real(url, part, **more)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    refused("reset.*run again to continue", data.prepare_openwebtext, out, [], **options)
    (out / "s1.tar.part.12.partial").write_bytes(b"left by a kill")
    refused("ended at 9 of .*run again", data.prepare_openwebtext, out, [], **options)
    data.prepare_openwebtext(out, [], **options)
    assert seen == [["meta.json"]] + [["meta.json", "train_000_0000.bin"]] * 3
    data.prepare_openwebtext(tmp_path / "kept", [], keep=True, **options)
    kept = contents(tmp_path / "kept")
    assert all(kept.pop(name) == (web / name).read_bytes() for name in data.OWT_ARCHIVES)
    assert kept == contents(out) and len(kept) == 4
    shutil.rmtree(web)
    data.prepare_openwebtext(out, [], **options)  # complete: the network is not asked
    refused("cannot download", data.prepare_openwebtext, tmp_path / "p", [], **options)


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        data.main([str(arg) for arg in argv])
    error = capsys.readouterr().err
    lines = [line for line in re.split(r"[\r\n]+", error) if line and "documents [" not in line]
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("data.py: error: "), error
    return lines[0]


def test_command_line_errors_are_one_line_and_change_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in {"two": b"one\n\ntwo\n", "empty": b"", "latin": b"caf\xe9\n\nx\n"}.items():
        Path(f"{name}.txt").write_bytes(content)
    Path("not.tar").write_text("hello" * 999)
    Path("foreign").mkdir()
    Path("foreign/train_000000.bin").write_bytes(b"precious")
    before, raw = contents("foreign"), ("--tokenizer", "bytes")
    for argv, message in [
        (["--val_doc", 3], "--val_doc"),
        (["two.txt", "--tokenizer", "toy"], "toy"),
        (["toy", "--val_docs", 3], "--val_docs does not apply to toy"),
        (["text8", "--tokenizer", "bytes"], "--tokenizer does not apply to text8"),
        (["toy", "two.txt"], "two.txt"),
        (["nowhere.txt"], "no such file: nowhere.txt"),
        (["two.txt", "--val_docs", "many"], "many"),
        (["two.txt", *raw, "--val_docs", 2], "2 documents, none of them left"),
        (["two.txt", *raw, "--val_docs", 10**20], "2 documents, none of them left"),
        (["two.txt", *raw, "--val_docs", 0], "at least 1"),
        (["two.txt", *raw, "--shard_tokens", 0], "at least 1"),
        (["two.txt", *raw, "--shard_tokens", 10**30], "below 2^31"),
        (["empty.txt", *raw], "0 documents"),
        (["latin.txt", *raw], "latin.txt is not UTF-8"),
        (["openwebtext", "not.tar", *raw], "not.tar is damaged"),
        (["text8", "two.txt", "--out", "t8"], "two.txt is not text8"),
        (["two.txt", *raw, "--out", "foreign"], "another origin"),
        (["toy", "--out", "foreign"], "another origin"),
    ]:
        assert message in error_of(capsys, *argv), argv
    assert contents("foreign") == before


def test_command_line_makes_data_and_never_makes_it_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main([])
    out = capsys.readouterr().out
    assert "train: 380,000 toy tokens" in out and out.endswith("next: python train.py\n")
    Path("mine.txt").write_text("\n\n".join("abcdefghijklmnopqrst"))
    data.main(["mine.txt", "--tokenizer", "bytes"])
    assert "next: python train.py --data data/mine --block_size" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in Path("data").rglob("*")}
    data.main([])
    data.main(["mine.txt", "--tokenizer", "bytes"])
    assert before == {path: path.stat().st_mtime_ns for path in Path("data").rglob("*")}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OverflowError("int too large"),
        torch.OutOfMemoryError("CUDA\nout of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_large_is_one_line_and_a_fault_of_the_program_is_not_hidden(error, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stopped:
        data.run("x.py", fail)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith("x.py: error: out of memory, or")
    assert message.count("\n") == 1
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        data.run("x.py", fail)


def test_progress_writes_little_into_a_log(monkeypatch):
    written = {}
    for terminal in (True, False):
        log = io.StringIO()
        log.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", log)
        bar = data.progress(total=1000)
        # A clock that advances a second a call, so that no test has to wait.
        bar._time, bar.last_print_t, bar.start_t = itertools.count().__next__, 0, 0
        for _ in range(1000):
            bar.update()
        bar.close()
        written[terminal] = len(log.getvalue())
    assert written[False] < 20_000 and written[True] > 5 * written[False]


# ==================================================================================================
# 3. The scripts, as a user meets them
# ==================================================================================================

ROOT = Path(__file__).parent
SHORT = "--batch_size 8 --max_steps 6 --warmup_steps 2 --eval_blocks 16 --k 2,3 "
SHORT += "--log_every 1 --save_every 2 --eval_every 2 --n 8 --steps 2,4 --device cpu"
SMALL = f"{SHORT} --n_layer 1 --n_embd 16 --n_head 2 --dropout 0.1"
FRESH = f"train.py --data data/small --out new {SMALL}"
AGAIN = f"{FRESH} --out out/toy --overwrite"
RESUME = "train.py --resume --out out/toy"
EVAL = "train.py --eval --out out/toy --data data/small"
STORY = next(iter(data.toy_language()))
WORDS = STORY.split(" ")
TEXT = "the cat sat on the mat, and the dog sat on the log. it was warm; nobody moved.\n\n"


# ---------------------------------------------- what the tests share


def call(command, *more):
    """Exit code of a command line that starts with the name of a script."""
    script, *argv = [*shlex.split(command), *map(str, more)]
    try:
        main = {"train.py": train.main, "sample.py": sample.main, "data.py": data.main}[script]
        data.run(script, partial(main, argv))
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with data/small (toy), data/bytes, and all three stages of each in out/."""
    folder, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(folder):
        Path("text.txt").write_text(TEXT * 20)
        data.make_toy("data/small", n_train=36, n_val=16)  # 4 steps an epoch, 4 blocks over
        data.prepare_text("data/bytes", ["text.txt"], tokenizer="bytes")
        assert call(f"{FRESH} --out out/toy") == 0
        assert call(f"{FRESH} --out out/bytes --data data/bytes --block_size 32") == 0
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def here(tmp_path, runs, monkeypatch):
    """A working folder with a copy of `runs`, on a machine without a GPU."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def saved(path):
    return torch.load(path, weights_only=True)


def rows_of(out, stage):
    rows = map(json.loads, Path(out, f"{stage}.jsonl").read_text().splitlines())
    return [{k: row[k] for k in row if k != "tokens_per_second"} for row in rows]


def assert_same(a, b, at="checkpoint"):
    """Bit-identical, but for the settings (how it was called) and the digits of the speed."""
    assert type(a) is type(b), at
    if isinstance(a, dict | list | tuple):
        assert len(a) == len(b), at
        for key in a if isinstance(a, dict) else range(len(a)):
            if key not in ("settings", "log_bytes"):
                assert_same(a[key], b[key], f"{at}/{key}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, at


def assert_same_stage(a, b, stage):
    assert rows_of(a, stage) == rows_of(b, stage)
    assert_same(saved(f"{a}/{stage}.pt"), saved(f"{b}/{stage}.pt"))


# ---------------------------------------------- mistakes


def refuses(capsys, command, words):
    """One plain line on stderr that has the words, exit code 2, nothing changed on disk."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    capsys.readouterr()
    code, error = call(command), capsys.readouterr().err.split("\r")[-1]  # after a progress bar
    lines = error.split("\n")
    lines = [line for line in lines if line and "%|" not in line and "step/s" not in line]
    assert code == 2 and len(lines) == 1 and len(error) < 400, (code, error)
    assert lines[0].startswith(command.split()[0] + ": error: ") and re.search(words, error), error
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


# of these the message names the first flag
FLAGS = {
    "sample.py": """--stepz 4; --k 0; --steps four; --steps ''; --steps 4,; --num 2,3; --num 0;
        --steps 99999999999999999999999; --batch -1; --window 1.5; --window nan; --seed ten;
        --seed 99999999999999999999; --device banana; --device cuda; --energy best;
        --watch --model ar; --energy nce --model ar; --infill ___ --model ar; --k 4 --model ar;
        --window 0 --model ar; --watch --compare; --k 8 --energy none; --window 0 --energy none;
        --infill ___ --prompt ben; --infill ''; --n 4""",
    FRESH: """--stepz 4; --stage ar,energy; --n_layer 1.5; --n_layer 0; --batch_size 0; --lr nan;
        --max_steps -1; --dropout 1.5; --lr inf; --lr -1; --ema 1; --nce both; --negatives 0;
        --seed 99999999999999999999999; --device cuda; --device banana; --preset imagenet;
        --resume --overwrite --out out/toy; --energy best; --k 0; --n 1; --optimizer sgd""",
    AGAIN: """--dropout 0.3 --stage energy; --n_layer 2 --stage energy; --block_size 22;
        --micro_batch 3; --n_head 3""",
}
FLAGS = [
    (f"{script} {flag.strip()}", flag) for script in FLAGS for flag in FLAGS[script].split(";")
]
MISTAKES = {
    "sample.py --json nowhere/figures.json": "cannot write nowhere/figures.json",
    f"{EVAL} --json out": "cannot write out",
    "sample.py --prompt xyzzy": "no word 'xyzzy'",
    f"sample.py --infill '{STORY}'": "no gap",
    "sample.py --infill '___*20'": "exceeds the 19 tokens",
    "sample.py --infill '___*99999999999'": "exceeds the 19 tokens",
    "sample.py --infill '___*99999999999999999999999999'": "exceeds the 19 tokens",
    f"sample.py --prompt '{'ben' + ' has' * 19}'": "prompt has 20 tokens, 19 fit",
    # these ask for terabytes, which fails at once
    "sample.py --energy nce --k 2000000000": "out of memory",
    f"{EVAL} --n 999999999": "out of memory",
    f"{AGAIN} --n_embd 2000000000": "out of memory",
    f"{EVAL} --n 4 --k 8": "--n 4 must be at least the largest --k, 8",
    "sample.py --out new": "no checkpoint new/denoiser.pt: run python train.py",
    "sample.py --out new --model ar": "no checkpoint new/ar.pt: run python train.py",
    "train.py --eval --out new": "no checkpoint in new: run python train.py",
    "train.py --resume --out new": "no checkpoint in new: run python train.py",
    f"{FRESH} --stage energy": "no checkpoint new/denoiser.pt: run python train.py",
    f"{FRESH} --data nothing": "no tokens in nothing: run `python data.py`",
    f"{FRESH} --out text.txt": "text.txt",
    f"{FRESH} --out out/toy": "denoiser.pt exists: --resume, --overwrite, or another --out",
    f"{FRESH} --out out/toy --stage ar": "ar.pt exists",
    f"{RESUME} --data data/bytes --block_size 32 --max_steps 8": "made with|was made",
    f"{RESUME} --data data/other --max_steps 8": "made with corpus",
    f"{EVAL} --data data/bytes": "holds bytes tokens, out/toy needs toy",
    f"{EVAL} --data empty.txt": "too few for one block of 21",
    f"{EVAL} --data text.txt": "no word 'the'",
    f"{EVAL} --data bad.jsonl": "line 2",
    f"{EVAL} --data missing.txt": "missing.txt",
    "sample.py --judge gpt2-large": "pip install transformers",
    "sample.py --out out --num 2": "TIKTOKEN_CACHE_DIR",
}


@pytest.mark.parametrize("command, words", [*FLAGS, *MISTAKES.items()], ids=str)
def test_mistakes_end_in_one_line(here, capsys, monkeypatch, command, words):
    def unreachable(name):
        raise OSError("no network")

    Path("empty.txt").write_text(" \n")
    Path("bad.jsonl").write_text(json.dumps(dict(text=STORY)) + "\nnot json\n")
    if "other" in command:
        data.make_toy("data/other", n_train=36, n_val=16, seed=1)
    if "--num 2" in command:
        tiny = edlm.Denoiser(edlm.Config(50257, 8, 1, 1, 2))
        edlm.save_checkpoint("out/denoiser.pt", tiny, tokenizer="gpt2")
        monkeypatch.setattr(data.tiktoken, "get_encoding", unreachable)
        data.get_tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    names_flag = (command, words) in FLAGS
    refuses(capsys, command, words.split()[0].lstrip("-") if names_flag else words)


def edit(path, change):
    """Applies 'a.b = value' (or 'a.b = gone', or '= multiply 2') to the content of a checkpoint."""
    content = inner = saved(path)
    keys, value = change.split(" = ")
    *keys, last = [int(key) if key.isdigit() else key for key in keys.split("/")]
    for key in keys:
        inner = inner[key]
    inner[last] = eval(value, dict(torch=torch, old=inner[last]))
    if inner[last] == "gone":
        del inner[last]
    torch.save(content, path)


BYTES = {
    "cut": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "foreign": lambda b: b"not a checkpoint",
    "flipped": lambda b: b[:2000] + bytes(500) + b[2500:],
}
DAMAGE = """weights/head.weight = old * float('nan'); config = 'gone'; config/n_layer = '1';
    kind = 'g';
    config/dropout = None; config = [1, 2]; config/n_embd = 32; tokenizer = 5;
    tokenizer = 'text8'"""
DAMAGE_TO_RESUME = """training/step = 'gone'; training/step = 'four'; training/optimizers = 'gone';
    training/optimizers = old[:1]; training/model = 'gone'; training = [1, 2]; training = 'gone';
    training/settings = 5; training/settings/lr = 'fast'; training/log_bytes = None;
    training/optimizers/0/state/0/exp_avg = torch.zeros(3);
    training/optimizers/0/state/0/exp_avg_sq = 'gone';
    training/optimizers/1/state/0/momentum_buffer = torch.zeros(3)"""
DAMAGE, DAMAGE_TO_RESUME = (re.split(r";\s+", text) for text in (DAMAGE, DAMAGE_TO_RESUME))


@pytest.mark.parametrize("what", [*BYTES, *DAMAGE, *DAMAGE_TO_RESUME])
def test_damaged_checkpoints_are_refused(here, capsys, what):
    path, words = Path("out/toy/denoiser.pt"), "out/toy/denoiser.pt|--lr must be|denoiser.pt is for"
    for stage in ("ar", "energy"):
        Path(f"out/toy/{stage}.pt").unlink()
    if what in BYTES:
        path.write_bytes(BYTES[what](path.read_bytes()))
    else:
        edit(path, what)
    if what not in DAMAGE_TO_RESUME and "text8" not in what:
        refuses(capsys, "sample.py --energy none", words)
        refuses(capsys, f"{FRESH} --stage energy --out out/toy", words)
    refuses(capsys, f"{RESUME} --max_steps 8", words)


def test_checkpoints_that_do_not_belong_together_are_refused(here, capsys):
    shutil.copy("out/bytes/ar.pt", "out/toy/ar.pt")
    refuses(capsys, "sample.py --energy ar", "toy/ar.pt is .*bytes.*same data")
    shutil.copy("out/toy/denoiser.pt", "out/toy/ar.pt")
    refuses(capsys, "sample.py --model ar", "ar.pt is an? denoiser")
    Path("out/toy/ar.pt").unlink()
    refuses(capsys, "sample.py --energy coar", "no checkpoint out/toy/ar.pt: run python train.py")
    refuses(capsys, f"{EVAL} --energy coar", "no checkpoint out/toy/ar.pt: run python train.py")
    assert call(f"{AGAIN} --stage denoiser --seed 1") == 0
    for command in ("sample.py --energy nce", EVAL, f"{RESUME} --stage energy --max_steps 8"):
        refuses(capsys, command, "energy.pt (was made with|corrects another) denoiser.*--overwrite")


@pytest.mark.parametrize("damage", ["cut", "lost", "unfinished", "[1, 2]", '{"source": 5}'])
def test_damaged_data_is_refused(here, capsys, damage):
    train_shard, val_shard = sorted(Path("data/small").glob("*.bin"))
    if damage == "cut":
        train_shard.write_bytes(train_shard.read_bytes()[:-100])
    elif damage in ("lost", "unfinished"):
        (train_shard if damage == "lost" else val_shard).unlink()
    else:
        Path("data/small/meta.json").write_text(damage)
    for command in (FRESH, AGAIN, f"{RESUME} --max_steps 8"):
        refuses(capsys, command, "data/small")


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_is_readable(capsys, monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "100")
    assert call(f"{script} --help") == 0
    text = capsys.readouterr().out
    assert f"python {script}" in text and max(map(len, text.splitlines())) <= 100
    assert script == "sample.py" or "'energy_steps': 10000" in text  # every preset, every value


# ---------------------------------------------- stopped and resumed

TORCH_SAVE = torch.save


def kill(*args):
    raise Killed


def half_a_checkpoint(content, file):
    TORCH_SAVE(content, whole := io.BytesIO())
    file.write(whole.getvalue()[:3000])
    kill()


def full_disk(content, file):
    file.write(b"some")
    raise OSError(28, "No space left on device")


# name: (function, which call, what happens instead, exit code, words on stderr)
STOPS = {
    "before the first save": (train, "save", 1, kill, Killed, ""),
    "before a save": (train, "save", 2, kill, Killed, ""),
    "in a save": (torch, "save", 2, half_a_checkpoint, Killed, ""),
    "after a save": (train, "learning_rate", 5, kill, Killed, ""),
    "in the second epoch": (train, "learning_rate", 6, kill, Killed, ""),
    "SIGTERM": (train, "learning_rate", 4, 15, 143, "go on with --resume --out new"),
    "SIGINT": (train, "learning_rate", 4, 2, 130, "go on with --resume --out new"),
    "full disk": (torch, "save", 2, full_disk, 2, "could not write .*No space left"),
    "nan": (train, "training_loss", 5, math.nan, 2, "nan.* at step 4; the last checkpoint is kept"),
}


def at_call(patch, module, name, n, act):
    """The n-th call of module.name does `act`, raises that signal first, or is times that nan."""
    real, calls = getattr(module, name), []

    def patched(*args):
        calls.append(1)
        if len(calls) == n and callable(act):
            return act(*args)
        if len(calls) == n and isinstance(act, int):
            os.kill(os.getpid(), act)
        return real(*args) * act if len(calls) == n and act != act else real(*args)

    patch.setattr(module, name, patched)


@pytest.mark.parametrize("stage", train.STAGES)
@pytest.mark.parametrize("stop", STOPS)
def test_stopped_and_resumed_is_bit_identical(here, capsys, monkeypatch, stop, stage):
    *where, ends, words = STOPS[stop]
    command = f"{FRESH} --stage {stage}"
    if stage == "energy":
        Path("new").mkdir()
        shutil.copy("out/toy/denoiser.pt", "new")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_call(patch, *where)
        code = pytest.raises(Killed, call, command).type if ends is Killed else call(command)
    assert code == ends and re.search(words, capsys.readouterr().err)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    if stop == "before the first save":
        assert call(command) == 0
    else:
        edlm.load_checkpoint(f"new/{stage}.pt")  # once there was a checkpoint, there always is one
        assert ends is Killed or not list(Path("new").glob("*.tmp"))
        assert call("train.py --resume --out new") == 0
    assert_same_stage("new", "out/toy", stage)


SCRIPT = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import data, train
rank, calls = int(os.environ.get("RANK", 0)), []
def stopping(function, when, number):
    def patched(*args):
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), number)
        return function(*args)
    return patched
"""


def run(*words, patch=""):
    """train.py in a process of its own, after a patch."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    script = ["-c", f"{SCRIPT}{patch}\ndata.run('train.py', train.main)"]
    words = [word for part in words for word in (script if part == "SCRIPT" else part.split())]
    return subprocess.run(words, env=environment, capture_output=True, text=True)


def test_sigkill_and_resumed_is_bit_identical(here):
    patch = "os.replace = stopping(os.replace, 5, signal.SIGKILL)"  # in the second save of `ar`
    ended = run(sys.executable, "SCRIPT", FRESH.removeprefix("train.py"), patch=patch)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    with open("new/ar.jsonl", "a") as log:
        log.write('{"step": 5, "tok')  # half a row, as a buffer would leave
    assert saved("new/ar.pt")["training"]["step"] == 2 and Path("new/ar.pt.tmp").exists()
    assert call("train.py --resume --out new") == 0
    for stage in train.STAGES:
        assert_same_stage("new", "out/toy", stage)


def test_two_processes_do_what_one_does_and_stop_together(here):
    """SIGTERM for one of them: both stop after the same step, one saves, and they go on as one.

    One and two processes differ in the order of sums: a float32 rounding, 6e-8, for each of at most
    B L d = 2,700 terms is 2e-4 of the sum of their absolute values, and more of the sum where they
    cancel: 2e-3 is allowed. Other masks, or a missing division by 2, would make 1e-2 and more.
    """
    argv = f"{FRESH} --optimizer adamw --lr 0.001 --energy_lr 0.001 --micro_batch 2 --k 2"
    argv = argv.replace("train.py", "").replace("--n 8", "")  # torchrun takes --n for its own
    two = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
    patch = "if rank: train.learning_rate = stopping(train.learning_rate, 3, signal.SIGTERM)"
    ended = run(f"{two} --no-python {sys.executable}", "SCRIPT", argv, patch=patch)
    assert ended.returncode != 0 and "go on with --resume --out new" in ended.stderr, ended.stderr
    assert saved("new/denoiser.pt")["training"]["step"] == 3
    ended = run(f"{two} {ROOT}/train.py --resume --out new")
    assert ended.returncode == 0 and ended.stdout.count("perplexity") == 1, ended.stderr
    assert call(f"train.py {argv} --out one") == 0
    assert {path.name for path in Path("one").iterdir()} == {p.name for p in Path("new").iterdir()}
    for stage in train.STAGES:
        for row, other in zip(rows_of("one", stage), rows_of("new", stage), strict=True):
            assert row == pytest.approx(other, rel=2e-3)
        a, b = (saved(f"{out}/{stage}.pt")["weights"] for out in ("one", "new"))
        apart = sum((a[name] - b[name]).square().sum() for name in a)
        assert apart.sqrt() < 2e-3 * sum(a[name].square().sum() for name in a).sqrt()


def test_settings_come_from_the_checkpoint_and_flags_win(here, monkeypatch):
    before = {path: path.read_bytes() for path in Path("out/toy").iterdir()}
    assert call(RESUME) == 0  # all is finished
    assert before == {path: path.read_bytes() for path in Path("out/toy").iterdir()}
    log = rows_of("out/toy", "ar")
    assert call(f"{RESUME} --stage ar --max_steps 8 --lr 0.001") == 0
    longer = rows_of("out/toy", "ar")
    assert longer[: len(log)] == log and [row["step"] for row in longer[len(log) :]] == [7, 8, 8]
    settings = saved("out/toy/ar.pt")["training"]["settings"]
    assert (settings["n_embd"], settings["lr"], settings["max_steps"]) == (16, 0.001, 8)
    # the energy's shape is the denoiser's, also where it is recorded
    more = f"--overwrite --data data/small {SHORT}"
    assert call(f"train.py --stage energy --out out/toy {more}") == 0
    settings = saved("out/toy/energy.pt")["training"]["settings"]
    assert (settings["dropout"], settings["n_layer"], settings["n_embd"]) == (0.1, 1, 16)
    # killed before its first checkpoint, a new run must not go on as the old one
    at_call(monkeypatch, train, "save", 1, kill)
    pytest.raises(Killed, call, AGAIN)
    assert not list(Path("out/toy").glob("*.pt"))


# ---------------------------------------------- what training writes


def test_rows_of_the_log(here):
    uniform = math.log(data.get_tokenizer("toy").n_vocab)
    for stage, start, peak in (("ar", uniform, "lr"), ("energy", math.log(4), "energy_lr")):
        rows = [json.loads(line) for line in open(f"out/toy/{stage}.jsonl")]
        steps = [row for row in rows if "loss" in row]
        assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
        assert steps[0]["loss"] == pytest.approx(start, rel=0.05)
        keys = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"}
        batch = 8 if stage == "ar" else 4  # with three negatives each, half as many blocks
        tokens = [row["step"] * batch * 21 for row in steps]
        assert [row["tokens"] for row in steps] == tokens
        assert all(row.keys() == keys for row in steps)
        # warm-up of two steps, then a cosine that would reach 0 at step 6
        lr = [0.5, 1, *((1 + math.cos(math.pi * i / 4)) / 2 for i in range(4))]
        peak = train.PRESETS["toy"][peak]
        assert [row["lr"] / peak for row in steps] == pytest.approx(lr)
        assert [row["step"] for row in rows if row.keys() == {"step", "val_loss"}] == [2, 4, 6]
    # Validation has fixed masks and leaves the random state alone. What is saved for use is what
    # was evaluated, the average of the weights.
    model, _ = edlm.load_checkpoint("out/toy/denoiser.pt")
    s, averaged = train.parse(shlex.split(FRESH)[1:]), SimpleNamespace(ema=model, denoiser=None)
    state, blocks = torch.get_rng_state(), data.Blocks("data/small", "val", 21)
    loss = train.validation_loss("denoiser", averaged, blocks, s, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert loss == pytest.approx(rows_of("out/toy", "denoiser")[-1]["val_loss"], rel=1e-5)


def test_averages_of_weights_and_micro_batches(here):
    """The average is decay * average + (1 - decay) * weights; decay is min(ema, n / (9 + n))."""
    average, argv = None, f"{FRESH} --stage ar --lr_schedule constant --ema 0.15 --dropout 0"
    for n in range(3):
        assert call(f"{argv} --max_steps {n + 1}" + " --resume" * (n > 0)) == 0
        now = saved("new/ar.pt")["training"]["model"]["head.weight"]
        decay = min(0.15, n / (9 + n))
        average = now if average is None else decay * average + (1 - decay) * now
        assert torch.allclose(saved("new/ar.pt")["weights"]["head.weight"], average, atol=1e-7), n
    # AR has no random masks: cut into micro-batches or not, a step is the same but for rounding
    assert call(f"{argv} --max_steps 3 --micro_batch 2 --out cut") == 0
    cut, whole = ([row.get("loss") for row in rows_of(out, "ar")] for out in ("cut", "new"))
    assert [loss for loss in cut if loss] == pytest.approx([x for x in whole if x], rel=1e-3)


# ---------------------------------------------- sample.py


def sampled(command, *more):
    """The rows of --json after sample.py."""
    assert call(f"sample.py --json figures.json {command}", *more) == 0
    return json.loads(Path("figures.json").read_text())["rows"]


@pytest.mark.parametrize("energy", ["none", "ar", "coar", "nce"])
def test_figures_of_every_energy(here, capsys, monkeypatch, energy):
    counts = {edlm.Denoiser: 0, edlm.ARResidual: 0, edlm.NCEResidual: 0}
    for cls, name in zip(counts, ("forward", "__call__", "forward"), strict=True):

        def counted(self, x, *args, cls=cls, real=getattr(cls, name)):
            counts[cls] += x[..., 0].numel()
            return real(self, x, *args)

        monkeypatch.setattr(cls, name, counted)
    monkeypatch.setattr(data, "toy_is_valid", lambda text: len(text) % 2 == 0)
    more = "" if energy == "none" else "--k 3 --window 0.5"
    (row,) = sampled(f"--energy {energy} --num 6 --steps 4 {more}")
    denoised, *judged = counts.values()
    assert row["denoiser_forwards"] == pytest.approx(denoised / 6) and 0 < denoised <= 6 * 4
    assert row["energy_forwards"] == pytest.approx(sum(judged) / 6)
    assert (row["ess"] is None and not sum(judged)) if energy == "none" else 1 <= row["ess"] < 3.01
    x, tokenizer = torch.tensor(row["tokens"]), data.get_tokenizer("toy")
    assert x.shape == (6, 21) and (x[:, 0] == tokenizer.eot_token).all()
    assert row["texts"] == [data.decode(tokenizer, tokens) for tokens in row["tokens"]]
    shares = [tokens.bincount() / 20 for tokens in x[:, 1:]]
    entropy = sum(-torch.xlogy(share, share).sum() for share in shares).item() / 6 / math.log(2)
    assert row["entropy"] == pytest.approx(entropy, rel=1e-5) and row["seconds"] > 0
    ar, _ = edlm.load_checkpoint("out/toy/ar.pt")
    perplexity = math.exp(-ar.log_prob(x).sum().item() / (6 * 20))
    assert row["ar_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    valid, shown = [len(text) % 2 == 0 for text in row["texts"]], capsys.readouterr().out
    assert row["valid_fraction"] == sum(valid) / 6 and f"valid {sum(valid) / 6:.3f}" in shown
    for text, good in list(zip(row["texts"], valid, strict=True))[:4]:
        assert re.search(rf"\[{'ok' if good else 'broken'}\] +{re.escape(text)}\n", shown)


def test_default_compare_and_seeds(here, capsys):
    assert [row["name"] for row in sampled("--num 4")] == ["MDLM T=8", "EDLM-NCE T=8 k=16"]
    command = "--compare --steps 2,4 --k 2,3 --num 2 --seed"
    rows, again, other = (sampled(command, seed) for seed in (3, 3, 4))
    names = [f"{n} T={T} k={k}" for _, n in edlm.ENERGIES.values() for T in (2, 4) for k in (2, 3)]
    assert sorted(row["name"] for row in rows) == sorted(["AR", "MDLM T=2", "MDLM T=4", *names])
    assert (
        [r["tokens"] for r in rows] == [r["tokens"] for r in again] != [r["tokens"] for r in other]
    )
    shown = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(row['name'])} .* valid", shown, re.M) for row in rows)
    assert "next: " in shown and rows[0]["texts"][0] not in shown
    (row,) = sampled("--energy none --num 4 --steps 500")
    assert 15 < row["denoiser_forwards"] <= 20  # never more than the masked tokens
    for stage in ("ar", "energy"):
        Path(f"out/toy/{stage}.pt").unlink()
    assert [row["name"] for row in sampled("--num 4")] == ["MDLM T=8"]  # a denoiser alone


def test_given_tokens_are_kept(here, capsys):
    given = data.encode(data.get_tokenizer("toy"), " ".join(WORDS[:4]))
    for more in ("--model ar", "--steps 3"):
        for row in sampled(f"--num 3 {more} --prompt", " ".join(WORDS[:4])):
            assert all(tokens[1:5] == given and len(tokens) == 21 for tokens in row["tokens"])
    assert "[broken]" in capsys.readouterr().out
    for text in ("ben has ___ red", "ben ____*2 red", "___ has ___ red", "ben has a ___", "___*4"):
        for row in sampled("--num 2 --infill", text):
            pattern = re.sub(
                r" ?_+(\*\d)?", lambda gap: r" ?(\S+ ?)" + f"{{{(gap[1] or '*1')[1:]}}}", text
            )
            assert all(
                re.fullmatch(pattern, " ".join(re.findall(r"[a-z]+|\.", t))) for t in row["texts"]
            )
            assert row["valid_fraction"] is None and all(len(x) == 6 for x in row["tokens"])
    shown = capsys.readouterr().out
    assert "broken" not in shown and "valid" not in shown  # no verdict where none is possible
    (row,) = sampled("--out out/bytes --energy none --num 2 --infill", "the ___*3 sat")
    assert all(len(tokens) == 2 + len("the xyz sat") for tokens in row["tokens"])
    assert all(text.startswith("the ") and text.endswith(" sat") for text in row["texts"])


def test_watch_redraws_in_place_and_control_characters_stay_out(here, capsys, monkeypatch):
    command = "sample.py --out out/bytes --energy none --steps 6 --num 2 --watch"
    assert call(command) == 0
    shown = capsys.readouterr().out
    assert all(c.isprintable() for c in shown.replace("\n", ""))  # a byte model draws any byte
    states = re.split(r"^t = ", shown, flags=re.M)[1:]
    masks = [state.split("\n\n")[0].count("_") for state in states]
    times = [float(state.split()[0]) for state in states]
    assert masks == sorted(masks, reverse=True) and masks[0] == 31 and len(set(masks)) > 2
    assert times == sorted(times, reverse=True) and (times[0], times[-1]) == (1, 0)

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((40, 24)))
    master, slave = pty.openpty()
    received = io.BytesIO()

    def read():
        with contextlib.suppress(OSError):  # the other side was closed
            while received.write(os.read(master, 4096)):
                pass

    reader = threading.Thread(target=read)
    reader.start()
    with open(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert call(command) == 0
    reader.join()
    screen = [""]  # what a terminal shows in the end
    for part in re.split(r"(\x1b\[\d*[FJ]|\r\n)", received.getvalue().decode()):
        if part == "\r\n":
            screen.append("")
        elif re.fullmatch(r"\x1b\[\d+F", part):
            screen[-1 - int(part[2:-1]) :] = [""]
        elif part != "\x1b[J":
            assert "\x1b" not in part
            screen[-1] += part
    states = [line for line in screen if line.startswith("t = ")]
    assert len(states) == 1 and states[0].startswith("t = 0.000")
    assert sum("denoiser" in line for line in screen) == 1


def test_a_judge_scores_its_own_tokens(here, monkeypatch):
    """A judge with a token for every two characters, each costing its number in nats."""

    class Judge:
        config = SimpleNamespace(max_position_embeddings=30)
        to = eval = lambda self, *args: self

        def __call__(self, ids, labels):
            return SimpleNamespace(loss=scale * ids[:, 1:].float().mean())

    def tokens(text):
        return {"input_ids": [ord(character) % 3 for character in text[::2]]}

    fakes = (
        SimpleNamespace(from_pretrained=lambda name, fake=fake: fake) for fake in (tokens, Judge())
    )
    names = ("AutoTokenizer", "AutoModelForCausalLM")
    fake = SimpleNamespace(**dict(zip(names, fakes, strict=True)))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    for scale in (1, 1e4):  # noqa: B007
        (row,) = sampled("--energy none --steps 2 --num 3 --judge mine")
        ids = [tokens(text)["input_ids"][1:30] for text in row["texts"]]
        expected = math.exp(sum(map(sum, ids)) / sum(map(len, ids))) if scale == 1 else math.inf
        assert row["judge_perplexity"] == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------- train.py --eval


def evaluated(command):
    more = "--device cpu --n 8 --k 1,2 --steps 2,4"
    assert call(f"train.py --eval --json table.json {more} {command}") == 0
    return {row["model"]: row for row in json.loads(Path("table.json").read_text())["rows"]}


def test_the_table_of_perplexities(here, capsys, monkeypatch):
    monkeypatch.setitem(train.PRESETS["toy"], "data", "data/small")  # its floor is known
    rows = evaluated("--out out/toy")
    kinds = ("EDLM-AR", "EDLM-coAR", "EDLM-NCE")
    bounds = {f"{name} T={T} k={k}" for name in kinds for T in (2, 4) for k in (1, 2)}
    joint = {f"{name} joint, log Z {end}" for name in kinds[::2] for end in ("lower", "upper")}
    joint |= {"EDLM-coAR joint, log Z exact"}
    plain = {"language (floor)", "AR", "MDLM", "MDLM T=2", "MDLM T=4"}
    assert set(rows) == bounds | joint | plain
    nats = {name: row["nats_per_token"] for name, row in rows.items()}
    for name, row in rows.items():
        exact = name in ("AR", "language (floor)")
        assert row["what"] == ("exact" if exact else "estimate" if name in joint else "bound")
        assert row["perplexity"] == pytest.approx(math.exp(nats[name]))
        assert "floor" in name or (row["sequences"], row["tokens"]) == (16, 320)
        assert ("with_quarter_n" in row) == (name in bounds) and "bits_per_character" not in row
    assert nats["language (floor)"] == pytest.approx(data.toy_entropy() / 20)
    for name in kinds[::2]:  # log p = ... - log Z: its lower end gives the lower loss
        assert nats[f"{name} joint, log Z lower"] <= nats[f"{name} joint, log Z upper"]
    for T in (2, 4):  # the same masks, and one candidate is no choice
        assert nats[f"EDLM-NCE T={T} k=1"] == nats[f"MDLM T={T}"]
    ar, _ = edlm.load_checkpoint("out/toy/ar.pt")
    blocks = data.Blocks("data/small", "val", 21)
    cost = -ar.log_prob(torch.stack([blocks[i] for i in range(16)])).sum(dim=1).double() / 20
    assert nats["AR"] == pytest.approx(cost.mean().item(), rel=1e-5)
    assert rows["AR"]["standard_error"] == pytest.approx(cost.std().item() / 4, rel=1e-4)
    shown = capsys.readouterr().out
    assert all(name in shown for name in rows)
    # one energy only; a text is evaluated by the run of the preset
    monkeypatch.undo()
    os.chdir(here)
    Path("my.jsonl").write_text((json.dumps(dict(text=STORY)) + "\n") * 5)
    rows = evaluated("--data my.jsonl --energy coar --eval_blocks 3")
    coar = {name for name in bounds | joint if "coAR" in name}
    assert set(rows) == coar | plain - {"language (floor)"}
    assert rows["AR"]["sequences"] == 3
    # a run that diverged: inf, not an overflow
    for stage in ("denoiser", "ar"):
        edit(f"out/toy/{stage}.pt", "weights/head.weight = old * 1e7")
    rows = evaluated("--out out/toy --data data/small --energy none")
    assert rows["AR"]["perplexity"] == rows["MDLM"]["perplexity"] == math.inf
    assert sampled("--energy none --num 2")[0]["ar_perplexity"] > 1


def test_text_files_are_framed_as_their_shards(here):
    texts = ["don 't stop @-@ gap , he said . " * 4, "teddy 's\nhat " * 5, "the end . " * 9]
    Path("my.txt").write_text("\n\n \n".join(texts))
    Path("my.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    command = "--out out/bytes --energy none --data"
    plain, lines = evaluated(f"{command} my.txt"), evaluated(f"{command} my.jsonl")
    length = sum(len(text.strip()) + 1 for text in texts)  # each with an end of text
    assert plain == lines and plain["AR"]["sequences"] == length // 30
    for row in plain.values():
        nats = row["nats_per_token"] * 31  # of a block: 30 characters and the end of text
        assert row["bits_per_character"] == pytest.approx(nats / 30 / math.log(2))
    undone = evaluated(f"{command} my.txt --detokenize wikitext")
    assert undone["AR"]["nats_per_token"] != plain["AR"]["nats_per_token"]


# ---------------------------------------------- README.md: its commands and its Python, made small


def code_blocks(language):
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def small_download(base_url, path):
    """What `data.download` would fetch: an archive or text8, a thousandth of the size."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("text8", "the quick brown fox jumps over the lazy dog " * 600)
        return
    pages = {f"{i}.txt": TEXT.encode() for i in range(40)}
    for name, files in (("inner", pages), (path, ("1_data.xz",))):
        with tarfile.open(name, "w") as tar:
            for file in files:
                content = pages.get(file) or lzma.compress(Path("inner").read_bytes())
                member = tarfile.TarInfo(file)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def shrink(name, words):
    """Flags that make a command small; of two equal flags the last counts."""
    if name != "train.py":
        openwebtext = "--val_docs 4 --tokenizer bytes" if "openwebtext" in words else ""
        return "--num 2" if name == "sample.py" else openwebtext
    if {"--eval", "--resume"} & set(words):
        return "--eval_blocks 4 --n 16 --device cpu"
    block = " --block_size 32 --micro_batch 4" if {"--preset", "--data"} & set(words) else ""
    return f"{SMALL}{block} --overwrite"


def test_readme_commands_run(here, monkeypatch, capsys):
    shutil.rmtree("out")
    make_toy, done = data.make_toy, 0
    monkeypatch.setattr(data, "make_toy", lambda out: make_toy(out, n_train=36, n_val=16))
    monkeypatch.setattr(data, "download", small_download)
    monkeypatch.setattr(data, "OWT_ARCHIVES", ["urlsf_subset00.tar", "urlsf_subset01.tar"])
    Path("mytext.txt").write_text(TEXT * 40)
    Path("other.txt").write_text(TEXT * 4)
    for line in "\n".join(code_blocks("bash")).replace("\\\n", " ").split("\n"):
        for command in re.split(r" && |; ", line.split(" #")[0]):
            python, name, *words = [*shlex.split(command), "", ""][
                : max(2, len(shlex.split(command)))
            ]
            scripts = ("train.py", "sample.py", "data.py")
            if python == "python" and name in scripts and "--judge" not in words:
                code = call(f"{shlex.join([name, *words])} {shrink(name, words)}")
                assert code == 0, (line, capsys.readouterr().err)
                done += 1
    assert done > 3


def test_readme_python_runs(here, capsys):
    shutil.copytree("data/small", "data/toy")
    names = {}
    for block in code_blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names and capsys.readouterr().out
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


# ==================================================================================================
# 4. Measurements of speed, each a ratio in one run to a plain reference on the same random weights
# ==================================================================================================

SHAPES = {
    "small": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=50257),
    "medium": dict(n_layer=6, n_head=4, n_embd=256, block_size=256, vocab_size=50257),
    "gpt2-small": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257),
}
PLAIN_STEPS = 8  # of the plain algorithm are timed and scaled up: all its steps cost the same


def timed(work, device, repeats=1):
    """(median seconds, peak GiB on CUDA else 0, result) of work(), which has run once before."""
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
    """`sample` beside plain_algorithm_1 and beside bare forwards, for MDLM and EDLM-AR: rows."""
    torch.manual_seed(0)
    denoiser = edlm.Denoiser(config).to(device).eval()
    ar = edlm.AutoregressiveLM(config).to(device).eval()
    x = torch.full((batch, config.block_size), config.mask_id, device=device)
    x[:, 0] = 0
    stop, rows = min(steps, PLAIN_STEPS), []
    ar_energies = edlm.ARResidual(ar), partial(plain_ar_energy, ar)
    for name, K, energies in (("MDLM", 1, (None, None)), ("EDLM-AR", k, ar_energies)):
        settings = dict(mask_id=config.mask_id, k=K)
        ours = partial(count_events, denoiser, x, energy=energies[0], **settings)
        plain = partial(plain_algorithm_1, denoiser, x, energy=energies[1], **settings)
        bare = partial(bare_event, denoiser, ar, x, K)
        ours(steps=1)  # each runs once before it is timed
        plain(steps=steps, stop_after=1)
        bare()
        seconds, peak, events = timed(partial(ours, steps=steps), device)
        some, plain_peak, _ = timed(partial(plain, steps=steps, stop_after=stop), device)
        floor, _, _ = timed(bare, device, repeats=5)
        row = dict(name=f"{name}, batch {batch}", forwards=events, seconds=seconds)
        row |= dict(plain=some * steps / stop, ratio=some * steps / stop / seconds)
        row |= dict(event_ms=1000 * seconds / events, bare_ms=1000 * floor)
        rows.append(row | (dict(peak_gib=peak, plain_gib=plain_peak) if peak else {}))
    return rows


def our_loss(denoiser, x0):
    """The loss as train.py has it, nats per token."""
    return edlm.nelbo(denoiser, x0, mask_id=denoiser.config.mask_id).mean() / (x0.shape[1] - 1)


def plain_loss(denoiser, x0):
    """The same for the same masks, but every position is projected onto the vocabulary."""
    x_t, where, n = edlm.corrupt(x0, mask_id=denoiser.config.mask_id)
    logits = denoiser(x_t, torch.ones_like(where)).float()  # [B L, V]
    loss = F.cross_entropy(logits, x0.flatten(), reduction="none").view_as(x0)
    return ((loss * where).sum(dim=1) / n).mean()


def train_step(denoiser, loss, optimizer, x0):
    """Forward, backward, clip, update."""
    with edlm.autocast(x0.device):
        value = loss(denoiser, x0)
    value.backward()
    torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measure_training(config, device, batch):
    """A denoiser step as train.py does it beside a plain step with torch's defaults: rows."""
    x0 = torch.randint(0, config.vocab_size, (batch, config.block_size), device=device)
    rows = []
    for name in ("plain step", "this project") + ("compiled",) * (device.type == "cuda"):
        torch.manual_seed(0)
        denoiser, plain = edlm.Denoiser(config).to(device), name == "plain step"
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-4, fused=None if plain else True)
        if name == "compiled":
            denoiser.transformer.compile(dynamic=False)
        step = partial(train_step, denoiser, plain_loss if plain else our_loss, optimizer, x0)
        step()
        seconds, peak, _ = timed(step, device, repeats=5)
        ratio = rows[0]["seconds"] / seconds if rows else 1.0
        row = dict(name=f"{name}, batch {batch}", seconds=seconds, ratio=ratio)
        row |= dict(tokens_per_s=x0.numel() / seconds)
        rows.append(row | (dict(peak_gib=peak) if peak else {}))
    return rows


def print_table(title, rows):
    print(f"\n{title}\n{'':24}" + "".join(f"{column:>13}" for column in list(rows[0])[1:]))
    for name, *values in (row.values() for row in rows):
        print(f"{name:24}" + "".join(f"{value:>13,.4g}" for value in values), flush=True)


def test_measurements_at_a_tiny_size(monkeypatch, capsys):
    """Both tables come out, with their ratios; without a choice a step is an event at most."""
    tiny = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=30)
    monkeypatch.setitem(SHAPES, "small", tiny)
    sampling, training = main(["--batch", "1,2", "--device", "cpu", "--steps", "4"])
    names = [f"{name}, batch {batch}" for batch in (1, 2) for name in ("MDLM", "EDLM-AR")]
    assert [row["name"] for row in sampling] == names and len(training) == 4
    for row in sampling:
        assert row["ratio"] == pytest.approx(row["plain"] / row["seconds"])
        assert 1 <= row["forwards"] <= 4 and row["bare_ms"] > 0
    for plain, ours in zip(training[::2], training[1::2], strict=True):
        assert ours["ratio"] == pytest.approx(plain["seconds"] / ours["seconds"])
    text = capsys.readouterr().out
    assert all(name in text for name in names) and text.count("ratio") == 2


def test_plain_references_compute_the_same():
    """The plain loss and its gradients for the same masks; the plain AR energy."""
    config = edlm.Config(30, 8, 1, 2, 16)
    torch.manual_seed(0)
    denoiser, ar = edlm.Denoiser(config).double(), edlm.AutoregressiveLM(config).double()
    x0, results = torch.randint(30, (16, 8)), []
    for loss in (our_loss, plain_loss):
        torch.manual_seed(1)
        value = loss(denoiser, x0)
        results.append([value.detach(), *torch.autograd.grad(value, denoiser.parameters())])
    for ours, plain in zip(*results, strict=True):
        close(ours, plain)
    candidates, log_q = torch.randint(30, (3, 4, 8)), torch.randn(3, 4)
    asked = candidates, torch.full((3, 8), config.mask_id), log_q
    close(edlm.ARResidual(ar)(*asked), plain_ar_energy(ar, *asked))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measures speed, as ratios to plain references.")
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    add = parser.add_argument
    add("shape", nargs="?", default="small", choices=SHAPES)
    add("--batch", type=numbers, default=[1, 8], help="texts at once, or a list (default: 1,8)")
    add("--steps", type=int, help="diffusion steps T (default: the block size)")
    add("--k", type=int, default=4, help="candidates of EDLM-AR (default: 4)")
    add("--device", default="", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args(argv)
    device, config = edlm.pick_device(args.device), edlm.Config(**SHAPES[args.shape])
    steps = args.steps or config.block_size
    print(f"{args.shape} on {device}: {config}, {steps} steps, k = {args.k} for EDLM-AR")
    with edlm.autocast(device):
        sampled = [measure_sampling(config, device, batch, steps, args.k) for batch in args.batch]
    trained = [measure_training(config, device, batch) for batch in args.batch]
    sampling, training = sum(sampled, []), sum(trained, [])
    print_table(f"sampling ({PLAIN_STEPS} plain steps timed, scaled to {steps})", sampling)
    print_table("training the denoiser", training)
    return sampling, training


if __name__ == "__main__":
    main()
