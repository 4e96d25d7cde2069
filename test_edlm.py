"""Every promise of the other five files, checked offline: `pytest`, or a part: `pytest -k sample`.

1. The method, by enumeration. A world is a random table: a categorical per position and an energy
   per completion, for every partially masked sequence (V <= 3, L <= 4). Every law, bound and
   estimator of edlm.py can be added up exactly, and is. Statistical tests use fixed seeds; beside
   each bound stands how often a correct program would miss it with a fresh seed.
2. Data: the toy language, tokenizers, shards, archives, kills and downloads.
3. The scripts as a user meets them: mistakes, exact resume, several processes, figures, and the
   README's own commands and snippets.
4. Measurements: python test_edlm.py [small|medium|gpt2-small] prints ratios of speed.
"""

import argparse
import contextlib
import functools
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
from functools import partial
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
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ==================================================================================================
# 1. The method, by enumeration of worlds small enough to list (V <= 3, L <= 4)
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
        self.log_mu = (scale * random(self.size, L, V)).log_softmax(
            dim=2
        )  # [code of x_t, i, token]
        self.E = spread * random(self.size, self.size)  # [code of x_t, code of x0]
        self.start = torch.tensor([0] + [V] * self.M)  # BOS, then masks
        self.x0s = self.completions(self.start)  # [V^M, L]
        self.calls = []  # every `where` the denoiser was asked for

    def code(self, x):
        return (x * self.base).sum(dim=-1)

    def state(self, code):
        return code // self.base % (self.V + 1)

    def completions(self, x_t):
        """All the ways to fill the masks of one x_t."""
        choices = [range(self.V) if token == self.V else [token] for token in x_t.tolist()]
        return torch.tensor(list(itertools.product(*choices)))

    def log_q(self, x0, x_t):
        """log mu(x0 | x_t), summed over the masked positions."""
        log_mu = self.log_mu[self.code(x_t)].expand(*x0.shape, self.V)
        return (log_mu.gather(-1, x0[..., None])[..., 0] * (x_t == self.V)).sum(dim=-1)

    def denoiser(self, x_t, where):
        assert where.dtype == torch.bool and where.shape == x_t.shape
        self.calls.append(where)
        return self.log_mu[self.code(x_t)][where] + 1.0  # logits need not be normalised

    def table(self, candidates, x_t, log_q):
        """The table's energy."""
        return self.E[self.code(x_t)[:, None], self.code(candidates)]

    def energy(self, candidates, x_t, log_q):
        """The same; checks what every energy is promised about its three arguments."""
        x = x_t[:, None].expand_as(candidates)
        assert ((candidates == x) | (x == self.V)).all() and (candidates < self.V).all()
        close(log_q, self.log_q(candidates, x))
        return self.table(candidates, x_t, log_q)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def zero_energy(candidates, x_t, log_q):
    return torch.zeros_like(log_q)


def masked(world, x0, S):
    """x_S: x0 with the positions S masked."""
    return x0.index_fill(0, torch.tensor(S), world.V)


# ------------ exact laws and means ----------------------------------------------------------------


@functools.cache
def proposal(world, code):
    """All completions of a state, their log mu and their energy."""
    x_t = world.state(code)
    x0 = world.completions(x_t)
    return x0, world.log_q(x0, x_t), world.E[code, world.code(x0)]


def tuples(q, values, n):
    """All n-tuples of draws from q: their probabilities, and the sums of their `values`."""
    p, total = torch.ones(1).double(), torch.zeros(1).double()
    for _ in range(n):
        p, total = (p[:, None] * q).flatten(), (total[:, None] + values).flatten()
    return p, total


@functools.cache
def choice(world, code, k, sign=1):
    """Law of the candidate kept out of k by softmax(-sign E); k = infinity is the model (4)."""
    x0, log_q, E = proposal(world, code)
    q, w = log_q.exp(), (-sign * E).exp()
    if k == INF:
        return x0, q * w / (q * w).sum()
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


@functools.cache
def reveals(M, steps, window=1.0):
    """How often the chain reveals U of the masked S: {(S, U, in the window): mean over timetables}.

    A timetable gives each position the step that reveals it, all alike. With steps None, tokens go
    one by one in any order: out of n masked one goes at the n-th smallest of M uniform times, which
    is above 1 - window if fewer than n of them are below.
    """
    mean, early = Counter(), 1 - window
    for timetable in itertools.product(range(steps or 0), repeat=M):
        for j in set(timetable):
            S = tuple(i for i, step in enumerate(timetable, 1) if step >= j)
            U = tuple(i for i in S if timetable[i - 1] == j)
            mean[S, U, j / steps < window] += steps**-M
    for order in itertools.permutations(range(1, M + 1)) if steps is None else ():
        inside = 0.0
        for n in range(1, M + 1):
            inside += math.comb(M, n - 1) * early ** (n - 1) * window ** (M - n + 1)
            for is_in, share in ((True, inside), (False, 1 - inside)):
                mean[tuple(sorted(order[:n])), order[n - 1 : n], is_in] += share / math.factorial(M)
    return mean


def sampler_bound(world, x0, steps, k, window=1.0):
    """Mean over timetables of the sum over steps of -log P_k(x0_U | x_S), equation (10)."""
    total = 0.0
    for (S, U, inside), times in reveals(world.M, steps, window).items():
        x, p = choice(world, world.code(masked(world, x0, S)).item(), k if inside else 1)
        total -= times * p[(x == x0)[:, list(U)].all(dim=1)].sum().log().item()
    return total


@functools.cache
def mean_T(world, code, n):
    """E[T_n] of Theorem 1, over all n-tuples of draws; for n = infinity its limit, log Z."""
    _, log_q, E = proposal(world, code)
    if n == INF:
        return (log_q - E).logsumexp(dim=0)
    p, total = tuples(log_q.exp(), (-E).exp(), n)
    return (p * (total / n).log()).sum()


def log_z(world, code, n, end):
    """The mean of the `end` of the bounds on log Z from n draws; "exact" claims that Z = 1."""
    if end == "exact":
        return 0.0
    T_n = mean_T(world, code, n)
    return T_n if end == "lower" else (2 * n - 1) * T_n - 2 * (n - 1) * mean_T(world, code, n - 1)


def joint_formula(world, x0, steps, n, end):
    """Equation (9): the joint cost of all of S times the share |U| / |S| of it that is revealed."""
    total = 0.0
    for (S, U, _), times in reveals(world.M, steps).items():
        x_t = masked(world, x0, S)
        code = world.code(x_t).item()
        log_p = world.log_q(x0, x_t) - world.E[code, world.code(x0)] - log_z(world, code, n, end)
        total -= times * len(U) / len(S) * log_p.item()
    return total


def exact(formula, world, rows, *arguments):
    return torch.tensor([formula(world, x0, *arguments) for x0 in rows], dtype=torch.float64)


# ------------ comparisons -------------------------------------------------------------------------


def close(a, b, atol=1e-5):
    """Equal to float32 rounding: sums of a few dozen numbers below 30 differ by less than 1e-5."""
    torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=1e-5)


def p_value(counts, law):
    """Chi-square tail probability of the counts; cells that expect fewer than 5 are pooled."""
    if counts[law == 0].any():
        return 0.0
    counts, expected = counts[law > 0].double(), law[law > 0].double() * counts.sum()
    cell = torch.where(expected < 5, 0, torch.arange(1, len(law[law > 0]) + 1))
    counts, expected = (torch.bincount(cell, x)[cell.unique()] for x in (counts, expected))
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    return torch.special.gammaincc(half, statistic / 2).item() if freedom else 1.0


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


# ------------ masks and draws ---------------------------------------------------------------------


def test_categorical_has_the_law_of_its_logits():
    """Every row has its own softmax as law, and its k draws are independent."""
    logits = torch.tensor([[0.0, 1, -1, 3], [5.0, -INF, 5, 2], [-1e4, -1e4 + 1, -1e4 - 2, -1e4]])
    drawn, log_p = edlm.categorical(logits, 60_000, generator=seeded(0))
    close(log_p, logits.double().log_softmax(dim=1).gather(1, drawn))
    for row, p in zip(drawn, logits.double().softmax(dim=1), strict=True):
        pairs = torch.bincount(4 * row[0::2] + row[1::2], minlength=16)
        assert p_value(pairs, torch.outer(p, p).flatten()) > RARE


def test_categorical_keeps_the_tail():
    """49,900 of 50,000 tokens share a mass of 1e-4 (2e-9 each), and are drawn as often as is due.

    Argmax of log p plus float32 Gumbel noise never draws one: the largest noise is 16.6, and
    log 2e-9 = -20. Due are 400 hits, with a standard deviation of 20.
    """
    p = torch.cat((torch.full((100,), (1 - 1e-4) / 100), torch.full((49_900,), 1e-4 / 49_900)))
    p = p.double()[torch.randperm(50_000, generator=seeded(0))]
    drawn, _ = edlm.categorical(p.log().repeat(4, 1), 1_000_000, generator=seeded(1))
    tail = drawn[p[drawn] < 1e-7]
    assert abs(len(tail) - 400) < 6 * 20 and len(tail.unique()) > 0.95 * len(tail)


def test_mask_tokens_is_uniform_over_subsets():
    """Exactly n masks, n differing by row, never BOS, the rest untouched, all subsets alike."""
    x0, n = torch.tensor([[0, 1, 2, 1, 0]]).repeat(60_000, 1), torch.arange(60_000) % 5
    x_t = edlm.mask_tokens(x0, n, mask_id=3, generator=seeded(0))
    hidden = x_t == 3
    assert torch.equal(hidden.sum(dim=1), n) and torch.equal(x_t[~hidden], x0[~hidden])
    subsets = torch.tensor([(0, *rest) for rest in itertools.product((0, 1), repeat=4)])
    for size in range(1, 5):
        alike = subsets[subsets.sum(dim=1) == size]
        counts = (hidden[n == size].long()[:, None] == alike).all(dim=2).sum(dim=0)
        assert counts.sum() == 12_000  # so BOS is never masked
        assert p_value(counts, torch.full((len(alike),), 1 / len(alike))) > RARE


@pytest.mark.parametrize("steps", [None, 1, 2, 5])
def test_corrupt_draws_the_sizes_as_the_loss_weighs_them(steps):
    """A size's share of the loss: the tokens that the timetables reveal out of sets of that size.

    Each row has that law; the rows of a batch are evenly spread over it, in random order.
    """
    M, B, sizes = 4, 64, []
    share = torch.zeros(M, dtype=torch.float64)
    for (S, U, _), times in reveals(M, steps).items():
        share[len(S) - 1] += times * len(U) / M
    weights = edlm.step_weights(M, 4000 if steps is None else steps).sum(dim=0)
    close(weights, share, atol=1e-3 if steps is None else 1e-12)  # many steps tend to None
    torch.manual_seed(0)
    for _ in range(1500):
        x0 = torch.zeros(B, M + 1, dtype=torch.long)
        x_t, where, n = edlm.corrupt(x0, mask_id=3, steps=steps)
        assert torch.equal(where, x_t == 3) and torch.equal(where.sum(dim=1), n)
        assert ((torch.bincount(n - 1, minlength=M) - B * share).abs() < 2).all()
        sizes.append(n)
    n = torch.stack(sizes)
    if steps != 1:
        assert p_value(torch.bincount(n[:, 0] - 1, minlength=M), share) > RARE
    alike = (n[:, 0] == n[:, 1]).double()[:, None]  # neighbours; if not shuffled, mostly the same
    assert_mean(alike, [share.square().sum()], slack=1 / B)


# ------------ the sampler -------------------------------------------------------------------------


@torch.no_grad()
def plain_algorithm_1(
    denoiser, x, *, mask_id, steps, energy=None, k=1, window=1.0, schedule="linear", stop_after=None
):
    """The paper's Algorithm 1 as it is written: x Long[B, L] -> Long[B, L].

    Each step computes probabilities over the whole vocabulary at all positions, draws k candidates
    with Gumbel noise, judges them, and flips a coin for each masked position. The measurements let
    it stop early.
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


def start_rows(world):
    """Two different BOS, a prompt, an infilling, and a row with nothing to do."""
    rows = world.start.repeat(5, 1)
    rows[1, 0] = rows[2, 1] = 1
    rows[3, -1] = world.V - 1
    rows[4, 1:] = 1
    return rows


LAWS = [  # V, L, steps, k, window, schedule
    (3, 3, 1, 1, 1.0, "linear"),
    (3, 4, 3, 1, 1.0, "linear"),
    (3, 4, 2, 1, 1.0, "cosine"),
    (2, 4, 16, 1, 1.0, "linear"),
    (3, 3, 1, 3, 1.0, "linear"),
    (3, 4, 3, 2, 1.0, "linear"),
    (2, 4, 3, 3, 1.0, "cosine"),
    (3, 3, 3, 3, 0.5, "linear"),
    (2, 4, 4, 2, 0.5, "cosine"),
    (2, 4, 16, 3, 0.5, "linear"),
]


@pytest.mark.parametrize("V, L, steps, k, window, schedule", LAWS)
@pytest.mark.parametrize("sampler", [edlm.sample, plain_algorithm_1])
def test_sampler_has_the_law_of_algorithm_1(sampler, V, L, steps, k, window, schedule):
    """`sample` and the plain algorithm draw from the enumerated chain, whatever they start from.

    Five rows with five laws share each batch. The test has the power to refuse softmax(+E), no
    energy, another window, one step more and the other schedule.
    """
    world = World(V, L, seed=10 * steps + k, scale=2.5, spread=2.0)
    settings = dict(steps=steps, k=k, window=window, schedule=schedule)
    starts = start_rows(world)
    x = starts.repeat(8000, 1)
    before, given = x.clone(), x != V
    torch.manual_seed(0)
    out = sampler(world.denoiser, x, mask_id=V, energy=world.energy, **settings)
    assert torch.equal(x, before), "the start state was overwritten"
    assert torch.equal(out[given], x[given]) and (out < V).all()
    codes = world.code(out).view(8000, 5)
    counts = [torch.bincount(column, minlength=world.size) for column in codes.T]
    for start, count in zip(starts, counts, strict=True):
        assert p_value(count, chain_law(world, start, **settings)) > RARE
    wrong = [dict(sign=-1), dict(k=1)] if k > 1 else []
    wrong += [dict(window=1.0)] if window < 1 else []
    wrong += [dict(steps=steps + 1)] if steps < 4 else []
    wrong += (
        [dict(schedule={"linear": "cosine", "cosine": "linear"}[schedule])] if steps > 1 else []
    )
    right, refused = chain_law(world, world.start, **settings), 0
    for change in wrong:
        law = chain_law(world, world.start, **{**settings, **change})
        if (law - right).abs().sum() / 2 > 0.1:  # nearer laws take more draws to tell apart
            assert p_value(counts[0], law) < RARE, change
            refused += 1
    assert refused or k == 1 or window < 1


@pytest.mark.parametrize("window, T", [(0.0, 10), (0.1, 10), (0.3, 10), (1.0, 10), (0.07, 100)])
def test_window_ends_at_the_right_step(window, T):
    """The energy is asked in exactly the steps with j / T < window; x_t has 1 - j / T of its masks.

    There are so many positions that every step reveals some (by chance not: 1e-15).
    """
    seen, V, M = set(), 3, 50 * T
    x = torch.full((1, M + 1), V).index_fill(1, torch.tensor(0), 0)

    def energy(candidates, x_t, log_q):
        seen.add(int((x_t[0] == V).sum()))
        return torch.zeros_like(log_q)

    settings = dict(mask_id=V, steps=T, energy=energy, k=2, window=window, generator=seeded(0))
    edlm.sample(lambda x_t, where: torch.zeros(int(where.sum()), V), x, **settings)
    assert len(seen) == round(window * T)
    for j, masks in enumerate(sorted(seen, reverse=True)):  # binomial
        assert abs(masks - M * (1 - j / T)) <= 6 * (M * j / T * (1 - j / T)) ** 0.5


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_states_only_reveal_and_steps_that_reveal_nothing_cost_nothing(steps, k):
    """States lead from the start to what `sample` returns; a row's time falls when it is changed.

    At most min(steps, masked) forwards for each row. Without a choice each position is projected
    once, and the energy is not asked where the choice makes no difference.
    """
    world, judged = World(2, 6, seed=0), []
    x = start_rows(world).repeat(4, 1)

    def energy(candidates, x_t, log_q):
        judged.extend(candidates.view(-1, k, world.L))
        return torch.zeros_like(log_q)

    go = partial(edlm.sample_states, world.denoiser, x, mask_id=2, steps=steps, energy=energy, k=k)
    states = [*go(generator=seeded(0))]
    events, asked, masks = list(world.calls), list(judged), (x == 2).sum(dim=1)
    last = edlm.sample(*go.args, **go.keywords, generator=seeded(0))
    assert torch.equal(states[0].x, x) and torch.equal(states[-1].x, last) and (last < 2).all()
    assert (states[0].t == 1).all() and (states[-1].t >= 0).all()
    for a, b in itertools.pairwise(states):
        assert torch.equal(a.x[a.x < 2], b.x[a.x < 2])
        assert torch.equal(b.t < a.t, (b.x != a.x).any(dim=1))
    forwards = (torch.stack([state.t for state in states]).diff(dim=0) < 0).sum(dim=0)
    assert len(events) == len(states) - 1 and (forwards <= masks.clamp(max=steps)).all()
    assert sum(map(len, events)) == forwards.sum()
    assert all(where.any(dim=1).all() and not where[:, 0].any() for where in events)
    projected = sum(int(where.sum()) for where in events)
    assert projected >= masks.sum() and (projected == masks.sum()) == (k == 1 or steps == 1)
    assert all((candidates != candidates[0]).any() for candidates in asked)
    assert len(asked) <= forwards.sum() - int(steps == 1000) and (len(asked) > 0) == (k > 1)
    ess = torch.cat([state.ess[~state.ess.isnan()] for state in states])
    close(ess, torch.full((len(asked),), k))  # of equal weights


def test_useless_energies_are_refused_by_row():
    """Nan, or +inf for all candidates; +inf for some of them only means that they never win."""
    world = World(3, 4, seed=0)
    x = start_rows(world)[[0, 2, 4, 1]]  # the last has BOS 1
    go = partial(edlm.sample, world.denoiser, mask_id=3, generator=seeded(0))
    for value in (math.nan, INF):
        energy = lambda c, x_t, log_q: torch.where(x_t[:, :1] == 1, value, log_q)  # noqa: B023, E731
        go(x[:3], energy=energy, steps=2, k=8)
        with pytest.raises(ValueError, match="row 3"):
            go(x, energy=energy, steps=2, k=8)
    energy = lambda c, x_t, log_q: torch.where((c[..., 1:] == 0).any(dim=2), INF, 0.0)  # noqa: E731
    assert (go(world.start.repeat(20, 1), energy=energy, steps=1, k=400)[:, 1:] != 0).all()


def test_wrong_arguments_are_refused():
    """Of the sampler at the call, before a state is asked for; of all before a network has run."""
    world, config = World(2, 4, seed=0), edlm.Config(2, 4, 1, 1, 8, dropout=0.5)
    denoiser, ar, nce = map(lambda cls: cls(config), edlm.KINDS.values())  # in training mode
    good = dict(denoiser=world.denoiser, x=world.start[None], mask_id=2, steps=2, energy=nce.eval())
    changes = [dict(k=0), dict(steps=0), dict(window=-0.1), dict(window=1.1), dict(schedule="no")]
    changes += [dict(x=torch.full((1, 4), 2)), dict(denoiser=denoiser)]
    changes += [dict(energy=edlm.ARResidual(ar)), dict(energy=edlm.NCEResidual(config))]
    calls = [partial(edlm.sample_states, **{**good, **change}) for change in changes]
    judge = (world.denoiser, world.energy, world.x0s)
    for name, change in [
        ("log_partition_bounds", dict(n=1)),
        ("joint_nelbo", dict(n=2, log_partition="middle")),
        ("joint_nelbo", dict(n=2, steps=0)),
        ("sampler_nelbo", dict(n=2, k=0)),
        ("sampler_nelbo", dict(n=2, k=3)),
        ("sampler_nelbo", dict(n=2, k=2, window=1.5)),
        ("sampler_nelbo", dict(n=2, k=2, steps=0)),
    ]:
        calls.append(partial(getattr(edlm, name), *judge, mask_id=2, **change))
    for sizes in [(2, 4, 0, 1, 8), (2.5, 4, 1, 1, 8), (2, 4, 1, 2, 10), (2, 4, 1, 1, 8, 1.0)]:
        calls.append(partial(edlm.Config, *sizes))
    calls += [
        partial(edlm.nce_loss, denoiser, nce, world.x0s, mask_id=2),
        partial(edlm.alpha, torch.ones(1), "no"),
        partial(ar.transformer, torch.zeros(1, 5, 8)),  # longer than the block
        partial(ar.sample, world.x0s, 5),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()
    assert not world.calls
    with pytest.raises(ValueError):
        edlm.joint_nelbo(*judge, mask_id=2, n=1)


# ------------ the estimators ----------------------------------------------------------------------


def test_nelbo_is_the_count_form_the_integral_and_the_one_by_one_chain():
    """Equation (3) weighs S by 1 / (n C(M, n)): the integral of t^n (1 - t)^(M - n) / t over t."""
    world, M = World(3, 4, seed=2), 3
    t, dt = (a / 2 for a in np.polynomial.legendre.leggauss(8))  # exact for polynomials
    for n in range(1, M + 1):
        integral = (dt * (t + 0.5) ** (n - 1) * (0.5 - t) ** (M - n)).sum()
        assert integral == pytest.approx(1 / (n * math.comb(M, n)))
    truth = torch.zeros(len(world.x0s), dtype=torch.float64)
    for n in range(1, M + 1):
        for S in itertools.combinations(range(1, M + 1), n):
            x_t = world.x0s.index_fill(1, torch.tensor(S), world.V)
            truth -= world.log_q(world.x0s, x_t) / (n * math.comb(M, n))
    close(exact(sampler_bound, world, world.x0s, None, 1), truth, atol=1e-12)
    assert_mean(per_row(partial(edlm.nelbo, world.denoiser, mask_id=3), world.x0s, 4000), truth)


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_theorem_1_brackets_log_z(seed):
    """E[T_n] rises to log Z, and E[(2n-1) T_n - 2(n-1) T_{n-1}] falls to it from some n on."""
    world = World(2, 3, seed)
    for S in [(1,), (2,)]:
        code = world.code(masked(world, world.x0s[1], S)).item()
        lower, upper = ([log_z(world, code, n, e) for n in (6, 10, 18)] for e in ("lower", "upper"))
        assert lower[0] < lower[1] < lower[2] < mean_T(world, code, INF) < upper[2]
        assert upper[0] > upper[1] > upper[2] and upper[2] - lower[2] < (upper[0] - lower[0]) / 2


@pytest.mark.parametrize("n", [2, 3])
def test_log_partition_bounds_have_the_enumerated_means(n):
    """For different masks in one batch; exact where nothing is masked; computed in log space."""
    world = World(3, 4, seed=n)
    sets = [(1, 2, 3), (1,), (2, 3), (1, 3)]
    x_t = torch.stack([masked(world, world.x0s[5 * i], S) for i, S in enumerate(sets)])

    def bounds(x, shift=0.0):
        torch.manual_seed(0)
        energy = lambda *arguments: world.energy(*arguments) + shift  # noqa: E731
        pair = edlm.log_partition_bounds(world.denoiser, energy, x, mask_id=3, n=n)
        return torch.stack(pair).double()

    draws = bounds(x_t.repeat(8000, 1)).view(2, -1, 4)
    for end, values in zip(("lower", "upper"), draws, strict=True):
        assert_mean(values, [log_z(world, code, n, end) for code in world.code(x_t).tolist()])
    full = world.x0s[3:5]
    close(bounds(full), -world.E[world.code(full), world.code(full)].expand(2, 2))
    for shift in (1e4, -1e4):  # its exp is 0 or infinite; as a float32 it is rounded to 1e-3
        close(bounds(x_t, shift), bounds(x_t) - shift, atol=2e-3)


@pytest.mark.parametrize("end", ["upper", "lower", "exact"])
@pytest.mark.parametrize("steps", [1, 2, 4, None])
def test_joint_nelbo_equals_its_enumerated_formula(steps, end):
    """For rows of a random world the mean over draws is equation (9), finite n included."""
    world = World(3, 4, seed=4, spread=2.0)
    settings = dict(mask_id=3, n=3, steps=steps, log_partition=end)
    joint = partial(edlm.joint_nelbo, world.denoiser, world.energy, **settings)
    rows = world.x0s[::5]
    assert_mean(per_row(joint, rows, 4000), exact(joint_formula, world, rows, steps, 3, end))


@pytest.mark.parametrize("steps", [1, 2, 5, None])
def test_one_candidate_or_a_constant_energy_is_the_factorised_bound(steps):
    """sampler_nelbo with k = 1, no energy or E = 0 is `nelbo` (of T steps) for the same masks."""
    world = World(3, 4, seed=6)
    rows = world.x0s[::4]

    def draws(estimator, *energy, **settings):
        return per_row(
            partial(estimator, world.denoiser, *energy, mask_id=3, **settings), rows, 3000
        )

    bound = draws(edlm.sampler_nelbo, world.energy, k=1, n=3, steps=steps)
    assert_mean(bound, exact(sampler_bound, world, rows, steps, 1))
    for energy in (None, zero_energy):
        close(draws(edlm.sampler_nelbo, energy, k=3, n=3, steps=steps), bound, atol=1e-4)
    close(draws(edlm.joint_nelbo, zero_energy, n=2, steps=steps), bound, atol=1e-4)
    if steps is None:
        close(draws(edlm.nelbo), bound)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, None])
@pytest.mark.parametrize("window", [1.0, 0.5])
def test_sampler_nelbo_is_the_enumerated_bound(window, steps, k):
    """Never below the exact bound for n = k, and within 0.5% of it for n = 200, row by row.

    Different rows share a batch; energies have both signs. What the rivals change is measured
    against k = 1 for the same masks, whose mean is known exactly: that leaves less variance.
    """
    world = World(3, 4, seed=8)
    rows = world.x0s[::6]
    truth, plain = (exact(sampler_bound, world, rows, steps, K, window) for K in (k, 1))
    assert (truth - plain).abs().max() > 0.04 * truth.mean()  # or the test could not fail

    def change(n, repeats, energy):
        settings = dict(mask_id=3, n=n, steps=steps, window=window)
        bound = partial(edlm.sampler_nelbo, world.denoiser, energy, **settings)
        with_rivals, without = (per_row(partial(bound, k=K), rows, repeats) for K in (k, 1))
        return with_rivals - without

    loose = change(k, 3000, world.energy)
    assert (loose.mean(dim=0) >= truth - plain - 6 * standard_error(loose)).all()
    tight = change(200, 800, world.table)
    assert_mean(tight, truth - plain, slack=0.005 * truth)
    mean = tight.mean(dim=1, keepdim=True)
    assert_mean(mean, [(truth - plain).mean()], slack=0.005 * truth.mean())
    assert standard_error(mean) < 0.005 * truth.mean() < loose.mean() - tight.mean()


@pytest.mark.parametrize("steps, window", [(1, 1.0), (2, 1.0), (3, 1.0), (3, 0.5)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_sampler_bound_is_above_the_likelihood_of_what_is_drawn(k, steps, window):
    """Jensen: -log of a mean over timetables <= the mean of -log; equal for the one of T = 1.

    The left side is the law of Algorithm 1 from `chain_law`, which knows nothing of timetables.
    """
    for seed in range(3):
        world = World(3, 4, seed=100 + seed, spread=2.0)
        law = chain_law(world, world.start, steps, k, window)[world.code(world.x0s)]
        above = exact(sampler_bound, world, world.x0s, steps, k, window) + law.log()
        assert above.abs().max() < 1e-9 if steps == 1 else above.min() > 1e-6


def two_bits():
    """Two fair bits, always equal: the truth is 1 bit. Exact marginals; (4) is the posterior."""
    world = World(2, 3, seed=0)
    world.log_mu[:] = -BIT
    for bit in (0, 1):  # one sees the other
        certain = torch.tensor([-60.0, -60.0]).index_fill(0, torch.tensor(bit), 0.0).double()
        world.log_mu[world.code(torch.tensor([0, bit, 2])), 2] = certain
        world.log_mu[world.code(torch.tensor([0, 2, bit])), 1] = certain
    world.E.zero_()
    world.E[world.code(world.start), world.code(world.x0s)] = torch.tensor(
        [-BIT, 60, 60, -BIT]
    ).double()
    return world, world.x0s[[0, 3]]


TWO_BITS = {1: 1.0, 2: 0.75, 4: 0.625, 16: 0.53125, 64: 0.5078125}


@pytest.mark.parametrize("steps", TWO_BITS)
def test_joint_formula_of_two_equal_bits(steps):
    """The ideal chain (k infinite) needs 1 bit for every T; the joint formula claims fewer."""
    world, x0 = two_bits()
    ideal = -chain_law(world, world.start, steps, INF)[world.code(x0)].log() / BIT
    assert ideal.tolist() == pytest.approx([1.0, 1.0])
    formula = exact(joint_formula, world, x0, steps, INF, "exact") / BIT
    assert formula.tolist() == pytest.approx([TWO_BITS[steps]] * 2)
    settings = dict(mask_id=2, n=2, steps=steps, log_partition="exact")
    joint = partial(edlm.joint_nelbo, world.denoiser, world.energy, **settings)
    assert_mean(per_row(joint, x0, 10_000) / BIT, formula)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_sampler_of_two_equal_bits(k):
    """In one step each is drawn with 1 - log2(1 - 2^-k) bits, and sampler_nelbo says so."""
    world, x0 = two_bits()
    bits = 1 - math.log2(1 - 2**-k)
    law = -chain_law(world, world.start, 1, k)[world.code(x0)].log() / BIT
    assert law.tolist() == pytest.approx([bits, bits])
    settings = dict(mask_id=2, k=k, n=400, steps=1)
    bound = partial(edlm.sampler_nelbo, world.denoiser, world.energy, **settings)
    assert_mean(per_row(bound, x0, 100) / BIT, [bits] * 2, slack=0.005)


# ------------ energies and networks ---------------------------------------------------------------


def tiny(cls, seed=0, **changes):
    """A small network with weights so large that every part of it matters; float64 but for NCE."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=3, block_size=4, n_layer=2, n_head=2, n_embd=8) | changes
    net = cls(edlm.Config(**sizes)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.7 if p.ndim > 1 else 0.3) + (p.ndim == 1) * p)
    return net if cls is edlm.NCEResidual else net.double()


@torch.no_grad()
@pytest.mark.parametrize("carry_over", [True, False])
def test_ar_residual(carry_over):
    """mu exp(-E) is p_AR of the masked tokens (coAR: Z = 1) or of all (EDLM-AR), at every x_t.

    And coAR's joint estimate is the AR likelihood identically: of each x0, for any number of steps.
    """
    world, ar = World(3, 4, seed=3), tiny(edlm.AutoregressiveLM)
    x_t = torch.stack([world.state(code) for code in range(0, world.size, 4)])  # all with BOS 0
    hidden = (x_t == 3)[:, None]
    x0 = torch.where(hidden, world.x0s, x_t[:, None])  # [B, K, L], each completion 3^(given) times
    log_q = world.log_q(x0, x_t[:, None])
    E = edlm.ARResidual(ar, carry_over)(x0, x_t, log_q)
    log_p = ar.log_prob(x0.flatten(0, 1)).view(x0.shape)
    close(log_q - E, (log_p * hidden if carry_over else log_p).sum(dim=2))
    Z = (log_q - E).double().exp().sum(dim=1) / 3.0 ** (3 - hidden.sum(dim=(1, 2)))
    close(Z if carry_over else Z[hidden[:, 0].sum(dim=1) == 3], torch.ones(64 if carry_over else 1))
    if carry_over:
        world.E[world.code(x_t)[:, None], world.code(x0)] = E.double()
        for steps in (1, 2, 5, None):
            joint = exact(joint_formula, world, world.x0s, steps, 0, "exact")
            close(joint, -ar.log_prob(world.x0s).sum(dim=1))


def test_nce_optimum_is_the_log_ratio():
    """Energy as a free table: the expected gradient is 0 at E = log mu - log q(x0 | x_t).

    One above it every cell's is positive, one below negative (by 6 standard errors), and an
    upside-down energy is no optimum.
    """
    world = World(3, 3, seed=9, scale=0.7)
    data = torch.randn(9, generator=seeded(0)).double().softmax(dim=0)
    best = torch.full_like(world.E, INF)
    for code in range(0, world.size, 4):  # all with BOS 0
        x_t = world.state(code)
        x0 = world.completions(x_t)
        q = data[((world.x0s == x_t) | (x_t == 3)).all(dim=1)]  # in the same order
        if (x_t == 3).any():
            best[code, world.code(x0)] = world.log_q(x0, x_t) - (q / q.sum()).log()
    cells = best.isfinite()

    def z_scores(E):
        world.E, gradients = E.where(cells, 0).requires_grad_(), []
        for seed in range(60):
            torch.manual_seed(seed)
            x0 = world.x0s[torch.multinomial(data, 2000, replacement=True)]
            loss = edlm.nce_loss(world.denoiser, world.table, x0, mask_id=3)
            gradients.append(torch.autograd.grad(loss, world.E)[0][cells])
        gradients = torch.stack(gradients)
        return gradients.mean(dim=0) / standard_error(gradients)

    assert z_scores(best).abs().max() < 6
    assert z_scores(best + 1).min() > 6 and z_scores(best - 1).max() < -6
    assert z_scores(-best).abs().max() > 6


def test_nce_loss_trains_the_energy_only():
    """From a denoiser the energy starts at 0, so the loss at 2 log 2; only the energy learns."""
    denoiser = tiny(edlm.Denoiser, dropout=0.5).float()
    energy = edlm.NCEResidual.from_denoiser(denoiser)
    x0 = torch.randint(3, (64, 4), generator=seeded(0))
    loss = edlm.nce_loss(denoiser, energy, x0, mask_id=3)
    assert loss.item() == pytest.approx(2 * math.log(2))
    loss.backward()
    assert all(p.grad is None for p in denoiser.parameters())
    assert energy.mlp_out.weight.grad.abs().max() > 0


@torch.no_grad()
def test_chunks_and_company_change_nothing(monkeypatch):
    """Every candidate is judged alone: one at a time they get the same energies as together."""
    x_t = torch.tensor([[0, 3, 1, 3], [2, 3, 3, 3], [1, 0, 3, 2]])
    x0 = torch.where(
        x_t[:, None] == 3, torch.randint(3, (3, 6, 4), generator=seeded(0)), x_t[:, None]
    )
    log_q, logits = torch.randn(3, 6, generator=seeded(1)), torch.randn(9, 3, generator=seeded(2))
    ar, nce = tiny(edlm.AutoregressiveLM), tiny(edlm.NCEResidual)

    def results(tokens, rows):
        monkeypatch.setattr(edlm, "JUDGED_TOKENS", tokens)
        monkeypatch.setattr(edlm, "ROWS", rows)
        energies = (edlm.in_chunks(e, x0, x_t, log_q) for e in (nce, edlm.ARResidual(ar, True)))
        return *energies, *edlm.categorical(logits, 50, generator=seeded(3))

    for tokens, rows in ((1, 1), (20, 4)):
        for got, whole in zip(results(tokens, rows), results(10**6, 10**6), strict=True):
            close(got, whole, atol=1e-4)


def plain_forward(w, h, n_head, causal):
    """Embeddings Float64[L, d] -> hidden states, one sequence and one head at a time.

    A rotary pair is a complex number, turned by its position: (q turned by i) times the conjugate
    of (k turned by j) depends on i - j alone, and its real part is their product.
    """
    norm = lambda h, name: F.layer_norm(h, h.shape[1:], w[name + "weight"], w[name + "bias"])  # noqa: E731
    L, D = len(h), h.shape[1] // n_head
    angle = torch.outer(torch.arange(L).double(), 10000.0 ** (-2 * torch.arange(D // 2) / D))
    future = torch.ones(L, L).triu(1).bool() & causal
    for b in sorted({name.split("norm1")[0] for name in w if "norm1" in name}):
        qkv, heads = (norm(h, b + "norm1.") @ w[b + "qkv.weight"].T).view(L, 3, n_head, D), []
        for q, k, v in qkv.permute(2, 1, 0, 3):
            q, k = (torch.complex(*x.chunk(2, dim=1)) * torch.exp(1j * angle) for x in (q, k))
            score = (q @ k.conj().T).real / math.sqrt(D)
            heads.append(score.masked_fill(future, -INF).softmax(dim=1) @ v)
        h = h + torch.cat(heads, dim=1) @ w[b + "attn_out.weight"].T
        m = norm(h, b + "norm2.") @ w[b + "mlp_in.weight"].T + w[b + "mlp_in.bias"]
        m = m / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3)))
        h = h + m @ w[b + "mlp_out.weight"].T + w[b + "mlp_out.bias"]
    return norm(h, "transformer.norm.")


@torch.no_grad()
@pytest.mark.parametrize("cls", [edlm.Denoiser, edlm.AutoregressiveLM, edlm.NCEResidual])
def test_networks_equal_a_plain_forward(cls):
    """Embeddings, rotary positions, norms, attention, GELU and heads, written out again."""
    net = tiny(cls, vocab_size=5, block_size=7, n_embd=12)
    w = {name: value.double() for name, value in net.state_dict().items()}
    x_t = torch.tensor([[0, 5, 2, 4, 5, 1, 3], [1, 1, 5, 5, 5, 0, 2]])
    x0, where = x_t % 5, torch.rand(2, 7, generator=seeded(0)) < 0.5
    e0, e_t = w["transformer.embed.weight"][x0], w["transformer.embed.weight"][x_t]
    if cls is edlm.NCEResidual:  # in float32
        e_t = e0 @ w["join_x0.weight"].T + w["join_x0.bias"] + e_t @ w["join_xt.weight"].T
        got = net(x0[:, None], x_t, torch.zeros(2, 1))
    causal = cls is edlm.AutoregressiveLM
    h = torch.stack([plain_forward(w, row, 2, causal) for row in (e0 if causal else e_t)])
    if cls is edlm.NCEResidual:
        hidden = (h.mean(dim=1) @ w["mlp_in.weight"].T + w["mlp_in.bias"]).clamp(min=0)
        return close(got, hidden @ w["mlp_out.weight"].T, atol=1e-4)
    logits = (h @ w["head.weight"].T + w["head.bias"])[..., :5]  # unused rows pad the vocabulary
    if causal:
        log_p = logits.log_softmax(dim=2)[:, :-1].gather(2, x0[:, 1:, None])[..., 0]
        return close(net.log_prob(x0), F.pad(log_p, (1, 0)))
    seen = []
    net.head.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    close(net(x_t, where), logits[where])  # row-major, and no other row is projected
    assert seen == [where.sum()]


@torch.no_grad()
def test_ar_log_prob_is_causal_and_normalised():
    """It adds up to 1 over all sequences; BOS costs nothing; a token moves no earlier one."""
    ar, x = tiny(edlm.AutoregressiveLM), World(3, 4, seed=0).x0s
    log_p = ar.log_prob(x)
    assert (log_p[:, 0] == 0).all()
    close(log_p.double().sum(dim=1).exp().sum(), torch.tensor(1.0))
    for i in range(4):
        other = x.index_copy(1, torch.tensor([i]), (x[:, i : i + 1] + 1) % 3)
        moved = (ar.log_prob(other) - log_p).abs().amax(dim=0)
        assert (moved[:i] < 1e-5).all() and (moved[max(i, 1) :] > 1e-3).all()


@torch.no_grad()
@pytest.mark.parametrize("prompts", [[[0], [1]], [[2, 1]]])
def test_ar_sample_with_cache_has_the_law_of_log_prob(prompts):
    """Prompts of one or two tokens, different ones in a batch."""
    ar, world = tiny(edlm.AutoregressiveLM), World(3, 4, seed=0)
    out = ar.sample(torch.tensor(prompts).repeat(20_000, 1), 4, generator=seeded(0))
    for i, prompt in enumerate(prompts):
        x = world.completions(torch.tensor(prompt + [3] * (4 - len(prompt))))
        p = ar.log_prob(x)[:, len(prompt) :].double().sum(dim=1).exp()
        drawn = torch.bincount(world.code(out[i :: len(prompts)]), minlength=world.size)
        assert (
            p_value(drawn, torch.zeros(world.size).double().index_add(0, world.code(x), p)) > RARE
        )


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
    """64 candidates need no tensor larger than the denoiser's [N, V] logits, which one needs too.

    The AR model holds ROWS rows at most, in training as well.
    """
    config, V, N, rows = edlm.Config(3000, 16, 1, 2, 8), 3008, 30, 10  # V with its padding
    ar, denoiser = edlm.AutoregressiveLM(config).eval(), edlm.Denoiser(config).eval()
    models = dict(ar=ar, energy=edlm.NCEResidual.from_denoiser(denoiser).eval())
    monkeypatch.setattr(edlm, "ROWS", rows)
    monkeypatch.setattr(edlm, "JUDGED_TOKENS", 64)
    x = torch.full((2, 16), config.mask_id).index_fill(1, torch.tensor(0), 0)
    settings = dict(mask_id=config.mask_id, steps=2, energy=edlm.make_energy(name, models))
    for k in (1, 64):
        with Largest() as largest:
            edlm.sample(denoiser, x, k=k, **settings)
        assert rows * V <= largest.numbers <= N * V
    with Largest() as largest:
        ar.log_prob(x % 3000).sum().backward()
    assert largest.numbers <= rows * V


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
SHORT = "--batch_size 8 --max_steps 6 --warmup_steps 2 --eval_blocks 16 --device cpu "
SHORT += "--log_every 1 --save_every 2 --eval_every 2"
SMALL = f"{SHORT} --n_layer 1 --n_embd 16 --n_head 2 --dropout 0.1"
FRESH = f"train.py --data data/small --out new {SMALL}"
AGAIN = f"{FRESH} --out out/toy --overwrite"
RESUME = "train.py --resume --out out/toy"
LONGER = f"{RESUME} --max_steps 8"
EVAL = "train.py --eval --out out/toy --data data/small"
TABLE = "train.py --eval --device cpu --n 8 --k 1,2 --steps 2,4"
WATCH = "sample.py --out out/bytes --energy none --steps 100 --num 2 --watch"
STORY = next(iter(data.toy_language()))
TEXT = "the cat sat on the mat, and the dog sat on the log. it was warm; nobody moved.\n\n"


def call(command):
    """Exit code of a command line that starts with the name of a script."""
    script, *argv = shlex.split(command)
    main = {"train.py": train.main, "sample.py": sample.main, "data.py": data.main}[script]
    try:
        data.run(script, partial(main, argv))
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
        data.make_toy("data/other", n_train=36, n_val=16, seed=1)
        data.prepare_text("data/bytes", ["text.txt"], tokenizer="bytes")
        assert call(f"{FRESH} --out out/toy") == 0
        assert call(f"{FRESH} --out out/bytes --data data/bytes --block_size 32") == 0
    return folder


@pytest.fixture
def here(tmp_path, runs, monkeypatch):
    """A working folder with a copy of `runs`, on a machine without GPU and without transformers."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "transformers", None)


def snapshot():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def saved(out, stage):
    """All that a stage wrote, but for how it was called and the speeds in its log."""
    content = torch.load(f"{out}/{stage}.pt", weights_only=True)
    del content["training"]["settings"], content["training"]["log_bytes"]
    rows = map(json.loads, Path(out, f"{stage}.jsonl").read_text().splitlines())
    content["log"] = [{k: row[k] for k in row if k != "tokens_per_second"} for row in rows]
    return content


def refuses(capsys, command, words):
    """One plain line on stderr that has the words, exit code 2, nothing changed on disk."""
    before = snapshot()
    capsys.readouterr()
    code, error = call(command), capsys.readouterr().err.split("\r")[-1]  # after a progress bar
    lines = [line for line in error.split("\n") if line and "%|" not in line]
    assert code == 2 and len(lines) == 1 and len(error) < 400, (code, error)
    assert lines[0].startswith(command.split()[0] + ": error: ") and re.search(words, error), error
    assert before == snapshot()


MISTAKES = {  # what follows which start of a command, and the message, if not the first flag's name
    ("sample.py", ""): """--stepz 4; --k 0; --steps four; --steps ''; --num 2,3; --batch -1;
        --steps 99999999999999999999999; --seed 99999999999999999999; --window nan; --device cuda;
        --watch --model ar; --k 4 --model ar; --watch --compare; --window 0 --energy none;
        --infill ___ --prompt ben; --judge gpt2""",
    (FRESH, ""): """--stepz 4; --stage ar,energy; --n_layer 0; --lr nan; --lr -1; --ema 1; --n 1;
        --seed 99999999999999999999999; --device cuda; --resume --overwrite --out out/toy""",
    (AGAIN, ""): "--dropout 0.3 --stage energy; --block_size 22; --micro_batch 3; --n_head 3",
    (EVAL, ""): "--n 4 --k 8; --k 0; --energy best",
    ("sample.py", "cannot write nowhere/figures.json"): "--json nowhere/figures.json",
    (EVAL, "cannot write out"): "--json out",
    ("sample.py", "prompt has 20 tokens, 19 fit"): f"--prompt 'ben{' has' * 19}'",
    ("sample.py", "no gap"): f"--infill '{STORY}'",
    ("sample.py", "exceeds the 19 tokens"): "--infill ___*99999999999999999999999999",
    # these ask for terabytes, which fails at once
    ("", "out of memory"): f"""sample.py --energy nce --k 2000000000; {EVAL} --n 999999999;
        {AGAIN} --n_embd 2000000000""",
    ("", "no checkpoint (in )?new.*: run python train.py"): f"""sample.py --out new;
        train.py --resume --out new; {FRESH} --stage energy""",
    (FRESH, "ar.pt exists: --resume, --overwrite, or another --out"): "--out out/toy --stage ar",
    (FRESH, "text.txt"): "--out text.txt",
    (FRESH, "no tokens in nothing: run `python data.py`"): "--data nothing",
    (LONGER, "made with corpus"): "--data data/other",
    (EVAL, "holds bytes tokens, out/toy needs toy"): "--data data/bytes",
    (EVAL, "no word 'the'"): "--data text.txt",
}
MISTAKES = {
    f"{start} {rest}".strip(): words or rest.split()[0].strip("-")
    for (start, words), text in MISTAKES.items()
    for rest in re.split(r";\s+", text)
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_end_in_one_line(here, capsys, command):
    refuses(capsys, command, MISTAKES[command])


def edit(path, change):
    """Runs a statement on the `path` of a file, or on the content `c` of a checkpoint."""
    if "path" in change:
        return exec(change, dict(path=path, os=os))
    content = torch.load(path, weights_only=True)
    exec(change, dict(c=content, t=content["training"], torch=torch))
    torch.save(content, path)


TRAIN = (FRESH, AGAIN, LONGER)
USE = ("sample.py --energy none", f"{FRESH} --stage energy --out out/toy", LONGER)
DAMAGE = {  # the commands that refuse which file after what
    (TRAIN, "data/small/train_000_0000.bin"): "os.truncate(path, 500); path.unlink()",
    (TRAIN, "data/small/meta.json"): """path.write_text("[]"); path.write_text('{"source": 5}')""",
    (USE, "out/toy/denoiser.pt"): """path.write_bytes(b"foreign"); path.write_bytes(b"");
        path.write_bytes(bytes(500) + path.read_bytes()[500:]); os.truncate(path, 5000);
        c["weights"]["head.weight"][0] = torch.nan; c["config"] = [1, 2]; c["tokenizer"] = 5;
        c["config"]["n_layer"] = "1"; c["config"]["n_embd"] = 32; c["kind"] = "g"; del c["kind"]""",
    ((LONGER,), "out/toy/denoiser.pt"): """del t["step"]; t["step"] = "four"; del t["model"];
        t["optimizers"].pop(); del c["training"]; c["training"] = [1, 2]; c["tokenizer"] = "text8";
        t["settings"] = 5; t["settings"]["lr"] = "fast"; t["log_bytes"] = None;
        del t["optimizers"][0]["state"][0]["exp_avg_sq"];
        t["optimizers"][1]["state"][0]["momentum_buffer"] = torch.zeros(3)""",
}
DAMAGE = [(change, *where) for where, text in DAMAGE.items() for change in re.split(r";\s+", text)]


@pytest.mark.parametrize("change, commands, path", DAMAGE, ids=str)
def test_damaged_files_are_refused(here, capsys, change, commands, path):
    edit(Path(path), change)
    for command in commands:
        refuses(capsys, command, f"{Path(path).parent}|--lr must be")


def test_checkpoints_that_do_not_belong_together_are_refused(here, capsys):
    shutil.copy("out/bytes/ar.pt", "out/toy/ar.pt")
    refuses(capsys, "sample.py --energy ar", "toy/ar.pt is .*bytes.*same data")
    shutil.copy("out/toy/denoiser.pt", "out/toy/ar.pt")
    refuses(capsys, "sample.py --model ar", "ar.pt is an? denoiser")
    Path("out/toy/ar.pt").unlink()
    refuses(capsys, f"{EVAL} --energy coar", "no checkpoint out/toy/ar.pt: run python train.py")
    assert call(f"{AGAIN} --stage denoiser --seed 1") == 0
    for command in ("sample.py --energy nce", EVAL, f"{LONGER} --stage energy"):
        refuses(capsys, command, "energy.pt (was made with|corrects another) denoiser.*--overwrite")


def start(command, module, name, n, act, **environment):
    """A process in which the n-th call of module.name sends those signals, fails or gives a nan."""
    real, calls = getattr(module, name), []

    def patched(*args):
        calls.append(args)
        if len(calls) != n:
            return real(*args)
        if act is math.nan:
            return real(*args) * act
        if isinstance(act, OSError):
            raise act
        for number in act:
            os.kill(os.getpid(), number)
        return real(*args)

    def work():
        os.environ.update(environment)
        setattr(module, name, patched)
        handlers = [signal.getsignal(number) for number in (2, 15)]
        code = call(command)
        sys.exit(code if handlers == [signal.getsignal(number) for number in (2, 15)] else 99)

    process = torch.multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


FULL = OSError(28, "No space left on device")
STOPS = {  # (function, which call, what happens), exit code, words on stderr
    "before the first save": ((train, "save", 1, [9]), -9, ""),
    "in a save": ((torch, "save", 2, [9]), -9, ""),
    "in the second epoch": ((train, "learning_rate", 6, [9]), -9, ""),
    "SIGTERM, repeated": ((train, "learning_rate", 4, [15, 15]), 143, "--resume --out new"),
    "SIGINT": ((train, "learning_rate", 4, [2]), 130, "go on with --resume --out new"),
    "SIGINT, impatient": ((train, "learning_rate", 4, [2, 2]), 130, "interrupted"),
    "full disk": ((torch, "save", 2, FULL), 2, "could not write .*No space left"),
    "nan": ((train, "training_loss", 5, math.nan), 2, "nan.* step 4; the last checkpoint is kept"),
}


@pytest.mark.parametrize("stage", train.STAGES)
@pytest.mark.parametrize("stop", STOPS)
def test_stopped_and_resumed_is_bit_identical(here, capfd, stop, stage):
    where, ends, words = STOPS[stop]
    command = f"{FRESH} --stage {stage}"
    shutil.copytree("out/toy", "new")
    Path(f"new/{stage}.pt").unlink()
    process = start(command, *where)
    process.join()
    assert process.exitcode == ends and re.search(words, capfd.readouterr().err)
    assert ends == -9 or not list(Path("new").glob("*.tmp"))
    if "first" not in stop:
        edlm.load_checkpoint(f"new/{stage}.pt")  # once there was a checkpoint, there always is one
    with open(f"new/{stage}.jsonl", "a") as log:
        log.write('{"step": 5, "tok')  # half a row, as a buffer would leave
    assert call(command if "first" in stop else "train.py --resume --out new") == 0
    a, b = (json.dumps(saved(x, stage), default=torch.Tensor.tolist) for x in ("new", "out/toy"))
    assert hash(a) == hash(b)  # not the texts: a megabyte each


def test_two_processes_do_what_one_does_and_stop_together(here):
    """SIGTERM for one of them: both stop after the same step, one saves, and they go on as one.

    Sums are in another order than in one: with 6e-8 for each of at most B L d = 2,700 terms, 2e-4
    of their sizes. 2e-3 is allowed, as they cancel; other masks, or no division by 2, make 1e-2.
    """
    command = f"{FRESH} --optimizer adamw --lr 0.001 --energy_lr 0.001 --micro_batch 2"
    assert call(f"{command} --out one") == 0
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), WORLD_SIZE="2")
    shared |= dict(TORCHELASTIC_USE_AGENT_STORE="True")  # as torchrun does
    where = (train, "learning_rate")
    processes = [start(command, *where, 4 - r, [15] * r, RANK=str(r), **shared) for r in range(2)]
    for process in processes:
        process.join(120)
        process.kill()  # if it waits for the other
    assert [process.exitcode for process in processes] == [143, 143]
    assert saved("new", "denoiser")["training"]["step"] == 3
    two = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
    resume = shlex.split(f"{two} {ROOT}/train.py --resume --out new")
    ended = subprocess.run(resume, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.count("perplexity") == 1, ended.stderr
    for stage in train.STAGES:  # the last row is the validation loss of the final weights
        for row, other in zip(saved("one", stage)["log"], saved("new", stage)["log"], strict=True):
            assert row == pytest.approx(other, rel=2e-3)


def test_settings_come_from_the_checkpoint_and_flags_win(here):
    before, log = snapshot(), saved("out/toy", "ar")["log"]
    assert call(RESUME) == 0 and snapshot() == before  # all is finished
    assert call(f"{RESUME} --stage ar --max_steps 8 --lr 0.001") == 0
    longer, settings = saved("out/toy", "ar")["log"], train.saved_settings("out/toy", resume=True)
    assert longer[: len(log)] == log and [row["step"] for row in longer[len(log) :]] == [7, 8, 8]
    assert (settings["n_embd"], settings["lr"], settings["max_steps"]) == (16, 0.001, 8)
    # the energy's shape is the denoiser's, also where it is recorded
    shape = "--stage energy --out out/toy --overwrite --data data/small"
    assert call(f"train.py {shape} {SHORT}") == 0
    settings = train.saved_settings("out/toy", resume=True)
    assert (settings["dropout"], settings["n_layer"], settings["n_embd"]) == (0.1, 1, 16)
    # killed before its first checkpoint, a new run must not go on as the old one
    start(AGAIN, train, "save", 1, [9]).join()
    assert not list(Path("out/toy").glob("*.pt"))


def test_rows_of_the_log(here):
    # the loss of guessing; with three negatives each, half as many blocks
    stages = (("ar", 8, math.log(36), "lr"), ("energy", 4, math.log(4), "energy_lr"))
    for stage, batch, start, peak in stages:
        rows = [json.loads(line) for line in open(f"out/toy/{stage}.jsonl")]
        steps = [row for row in rows if "loss" in row]
        keys = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"}
        assert all(row.keys() == keys for row in steps)
        assert [row["step"] for row in rows if row.keys() == {"step", "val_loss"}] == [2, 4, 6]
        assert [row["tokens"] for row in steps] == [step * batch * 21 for step in range(1, 7)]
        assert steps[0]["loss"] == pytest.approx(start, rel=0.05)
        # warm-up of two steps, then a cosine that would reach 0 at step 6
        shape = [0.5, 1, *((1 + math.cos(math.pi * i / 4)) / 2 for i in range(4))]
        lr = [share * train.PRESETS["toy"][peak] for share in shape]
        assert [row["lr"] for row in steps] == pytest.approx(lr)
    # Validation has fixed masks and leaves the random state alone. What is saved for use is what
    # was evaluated, the average of the weights.
    model, _ = edlm.load_checkpoint("out/toy/denoiser.pt")
    s, averaged = train.parse(shlex.split(FRESH)[1:]), SimpleNamespace(ema=model, denoiser=None)
    state, blocks = torch.get_rng_state(), data.Blocks("data/small", "val", 21)
    loss = train.validation_loss("denoiser", averaged, blocks, s, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert loss == pytest.approx(saved("out/toy", "denoiser")["log"][-1]["val_loss"], rel=1e-5)


def test_averages_of_weights_and_micro_batches(here):
    """The average is decay * average + (1 - decay) * weights, decay = min(ema, n / (9 + n))."""
    average, argv = None, f"{FRESH} --stage ar --lr_schedule constant --ema 0.15 --dropout 0"
    for n in range(3):
        assert call(f"{argv} --max_steps {n + 1}" + " --resume" * (n > 0)) == 0
        now, decay = saved("new", "ar")["training"]["model"]["head.weight"], min(0.15, n / (9 + n))
        average = decay * average + (1 - decay) * now if n else now
        assert torch.allclose(saved("new", "ar")["weights"]["head.weight"], average, atol=1e-7), n
    assert len({train.seed_of(*part) for part in itertools.product(range(3), repeat=3)}) == 27
    # AR has no random masks: cut into micro-batches or not, a step is the same but for rounding
    assert call(f"{argv} --max_steps 3 --micro_batch 2 --out cut") == 0
    assert saved("cut", "ar")["log"][-2] == pytest.approx(saved("new", "ar")["log"][-2], rel=1e-3)


def figures(command):
    """The rows that a command writes to --json, by their names."""
    assert call(f"{command} --json rows.json") == 0
    rows = json.loads(Path("rows.json").read_text())["rows"]
    return {row.get("name") or row["model"]: row for row in rows}


class Judge(torch.nn.Module):
    """Both parts of a causal LM with a token for every two characters, its number what it costs."""

    config = SimpleNamespace(max_position_embeddings=30)
    from_pretrained = classmethod(lambda cls, name: cls())

    def forward(self, given, labels=None):
        if isinstance(given, str):
            return {"input_ids": [ord(character) % 3 for character in given[::2]]}
        return SimpleNamespace(loss=labels[:, 1:].float().mean())


@pytest.mark.parametrize("energy", ["none", "ar", "coar", "nce"])
def test_figures_of_every_energy(here, capsys, monkeypatch, energy):
    texts = Counter()  # that went through each network
    calls = {edlm.Denoiser: "forward", edlm.ARResidual: "__call__", edlm.NCEResidual: "forward"}
    for cls, name in calls.items():

        def counted(self, x, *args, cls=cls, real=getattr(cls, name)):
            texts[cls] += x[..., 0].numel()
            return real(self, x, *args)

        monkeypatch.setattr(cls, name, counted)
    monkeypatch.setattr(data, "toy_is_valid", lambda text: len(text) % 2 == 0)
    fake = SimpleNamespace(AutoTokenizer=Judge, AutoModelForCausalLM=Judge)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    more = "" if energy == "none" else "--k 3 --window 0.5"
    command = f"sample.py --energy {energy} --judge mine --num 6 --steps 4 {more}"
    (row,) = figures(command).values()
    denoised = texts.pop(edlm.Denoiser)
    assert row["denoiser_forwards"] == pytest.approx(denoised / 6) and 0 < denoised <= 6 * 4
    assert row["energy_forwards"] == pytest.approx(texts.total() / 6)
    assert (row["ess"] is None and not row["energy_forwards"]) or 1 <= row["ess"] < 3.01
    x, tokenizer = torch.tensor(row["tokens"]), data.get_tokenizer("toy")
    assert x.shape == (6, 21) and (x[:, 0] == tokenizer.eot_token).all()
    assert row["texts"] == [data.decode(tokenizer, tokens) for tokens in row["tokens"]]
    shares = torch.stack([tokens.bincount(minlength=36) / 20 for tokens in x[:, 1:]])
    entropy = -torch.xlogy(shares, shares).sum().item() / 6 / math.log(2)
    assert row["entropy"] == pytest.approx(entropy, rel=1e-5) and row["seconds"] > 0
    ar, _ = edlm.load_checkpoint("out/toy/ar.pt")
    perplexity = math.exp(-ar.log_prob(x).sum().item() / (6 * 20))
    assert row["ar_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    costs = [Judge()(text)["input_ids"][1:30] for text in row["texts"]]
    perplexity = math.exp(sum(map(sum, costs)) / sum(map(len, costs)))
    assert row["judge_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    valid, shown = sum(len(text) % 2 == 0 for text in row["texts"]) / 6, capsys.readouterr().out
    assert row["valid_fraction"] == valid and f"valid {valid:.3f}" in shown
    for text in row["texts"][:4]:
        assert re.search(rf"{'broken' if len(text) % 2 else 'ok'}\] +{re.escape(text)}\n", shown)


def test_default_compare_and_seeds(here, capsys):
    default, nce = figures("sample.py --num 4"), "EDLM-NCE T=8 k=16"
    assert list(default) == ["MDLM T=8", nce]
    for flag in ("--window 0.5", "--schedule cosine"):
        changed = figures(f"sample.py --num 4 --energy nce {flag}")
        assert changed[nce]["tokens"] != default[nce]["tokens"]
    command = "sample.py --compare --steps 2,4 --k 2,3 --num 2 --seed"
    rows, again, other = (figures(f"{command} {seed}") for seed in (3, 3, 4))
    names = [f"{n} T={T} k={k}" for _, n in edlm.ENERGIES.values() for T in (2, 4) for k in (2, 3)]
    assert sorted(rows) == sorted(["AR", "MDLM T=2", "MDLM T=4", *names])
    shown = capsys.readouterr().out
    for name, row in rows.items():
        assert row["tokens"] == again[name]["tokens"] != other[name]["tokens"]
        assert re.search(rf"^{re.escape(name)} .* valid", shown, re.M)
    assert "next: " in shown and rows["AR"]["texts"][0] not in shown
    for stage in ("ar", "energy"):
        Path(f"out/toy/{stage}.pt").unlink()
    (row,) = figures("sample.py --num 4 --steps 500").values()  # a denoiser alone
    assert row["name"] == "MDLM T=500" and 15 < row["denoiser_forwards"] <= 20


def test_given_tokens_are_kept(here, capsys):
    tokenizer = data.get_tokenizer("toy")
    commands = {
        "--model ar --prompt 'ben has a red'": "ben has a red",
        "--steps 3 --prompt 'ben has a red'": "ben has a red",
        "--infill 'ben has ___ red'": "ben has ? red",
        "--infill 'ben ____*2 red'": "ben ? ? red",
        "--infill '___ has a ___'": "? has a ?",
    }
    for command, given in commands.items():
        prompt = "--prompt" in command
        for row in figures(f"sample.py --num 3 {command}").values():
            for tokens in row["tokens"]:
                words = [data.decode(tokenizer, [token]).strip() for token in tokens[1:5]]
                assert all(a in ("?", b) for a, b in zip(given.split(), words, strict=True))
                assert len(tokens) == (21 if prompt else 6) and max(tokens) < tokenizer.n_vocab
        shown = capsys.readouterr().out
        assert ("[broken]" in shown) == ("valid" in shown) == prompt  # else there is no verdict
    (row,) = figures("sample.py --out out/bytes --energy none --infill 'the ___*3 sat'").values()
    assert all(x[1:5] == [*b"the "] and x[8:-1] == [*b" sat"] for x in row["tokens"])


def test_watch_prints_lines_or_redraws_in_place(here, capfd, monkeypatch):
    assert call(WATCH) == 0
    shown = capfd.readouterr().out
    assert all(c.isprintable() for c in shown.replace("\n", ""))  # a byte model draws any byte
    states = re.split(r"^t = ", shown, flags=re.M)[1:]
    times = [float(state.split()[0]) for state in states]
    assert times == sorted(times, reverse=True) and times[0] == 1 and len(times) > 3
    assert states[0].count("_") == 31
    # on a terminal of 20 columns, with Ctrl-C seconds before the end
    monkeypatch.setenv("COLUMNS", "20")
    received = b""

    def read(terminal):
        nonlocal received
        before, received = received, received + os.read(terminal, 4096)
        if before.count(b"t = ") < 3 <= received.count(b"t = "):
            os.write(terminal, b"\x03")
        return received[len(before) :]

    status = pty.spawn([sys.executable, str(ROOT / "sample.py"), *shlex.split(WATCH)[1:]], read)
    assert os.waitstatus_to_exitcode(status) == 130
    first, *states = re.split(r"\x1b\[(\d+)F\x1b\[J", received.decode())
    states = [first.split("\x1b[J")[1], *states]  # state, how far back over it, state, back, ...
    assert len(states) >= 5
    for state, back in zip(states[::2], states[1::2], strict=False):
        assert state.startswith("t = ") and state.count("\r\n") == int(back) > 1
        assert max(map(len, state.split("\r\n"))) < 20
    assert "\x1b" not in "".join(states)  # the cursor was not hidden, nor the screen changed
    assert states[-1].endswith("\r\nsample.py: interrupted\r\n")


def test_the_table_of_perplexities(here, capsys):
    shutil.copytree("data/small", "data/toy")
    rows = figures(TABLE)
    kinds = ("EDLM-AR", "EDLM-coAR", "EDLM-NCE")
    bounds = {f"{name} T={T} k={k}" for name in kinds for T in (2, 4) for k in (1, 2)}
    joint = {f"{name} joint, log Z {end}" for name in kinds[::2] for end in ("lower", "upper")}
    joint |= {"EDLM-coAR joint, log Z exact"}
    plain, floor = {"AR", "MDLM", "MDLM T=2", "MDLM T=4"}, rows.pop("language (floor)")
    assert floor["nats_per_token"] == pytest.approx(data.toy_entropy() / 20)
    assert set(rows) == bounds | joint | plain
    shown, nats = capsys.readouterr().out, {name: rows[name]["nats_per_token"] for name in rows}
    for name, row in rows.items():
        assert row["what"] == {"AR": "exact"}.get(name, "estimate" if name in joint else "bound")
        assert row["perplexity"] == pytest.approx(math.exp(nats[name])) and name in shown
        assert (row["sequences"], row["tokens"]) == (16, 320)
        assert ("with_quarter_n" in row) == (name in bounds) and "bits_per_character" not in row
    for name in kinds[::2]:  # log p = ... - log Z: its lower end gives the lower loss
        assert nats[f"{name} joint, log Z lower"] <= nats[f"{name} joint, log Z upper"]
    for T in (2, 4):  # the same masks, and one candidate is no choice
        assert nats[f"EDLM-NCE T={T} k=1"] == nats[f"MDLM T={T}"]
    ar, _ = edlm.load_checkpoint("out/toy/ar.pt")
    x = torch.stack(list(data.Blocks("data/small", "val", 21)))
    cost = -ar.log_prob(x).sum(dim=1).double() / 20
    assert nats["AR"] == pytest.approx(cost.mean().item(), rel=1e-5)
    assert rows["AR"]["standard_error"] == pytest.approx(cost.std().item() / 4, rel=1e-4)
    # one energy only, of a text, which is evaluated by the run of the preset
    Path("my.jsonl").write_text((json.dumps(dict(text=STORY)) + "\n") * 5)
    rows = figures(f"{TABLE} --data my.jsonl --energy coar --eval_blocks 3")
    assert set(rows) == plain | {name for name in bounds | joint if "coAR" in name}
    assert rows["AR"]["sequences"] == 3
    # of a run that diverged, inf instead of an overflow
    edit(Path("out/toy/ar.pt"), "c['weights']['head.weight'] *= 1e7")
    assert figures(f"{TABLE} --energy none")["AR"]["perplexity"] == math.inf


def test_a_text_file_is_evaluated_as_its_shards(here):
    Path("val.txt").write_text(TEXT * 2)  # the last tenth of text.txt
    command = f"{TABLE} --out out/bytes --energy none --data"
    rows = figures(f"{command} val.txt")
    assert rows == figures(f"{command} data/bytes") and rows["AR"]["sequences"] == 5
    for row in rows.values():
        nats = row["nats_per_token"] * 31  # of a block: 30 characters and the end of text
        assert row["bits_per_character"] == pytest.approx(nats / 30 / math.log(2))
    Path("val.txt").write_text("don 't stop @-@ gap , he said . " * 9)
    plain, undone = (figures(f"{command} val.txt{x}") for x in ("", " --detokenize wikitext"))
    assert undone["AR"]["nats_per_token"] != plain["AR"]["nats_per_token"]


SHRUNK = {  # the first pattern that is found in a command says what makes it small
    r"^sample.py": "--num 2",
    r"^data.py openwebtext": "archive.tar --val_docs 4 --tokenizer bytes",
    r"^data.py text8": "letters.txt",
    r"^data.py": "",
    r" --(eval|resume)": "--eval_blocks 4 --n 16 --device cpu",
    r" --(preset|data)": f"{SMALL} --block_size 32 --micro_batch 4 --overwrite",
    r"^train.py": f"{SMALL} --overwrite",
}


def code_blocks(language):
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_readme_commands_and_help_run(here, monkeypatch, capsys):
    shutil.rmtree("out")
    monkeypatch.setattr(data, "make_toy", partial(data.make_toy, n_train=36, n_val=16))
    for name in ("mytext.txt", "other.txt"):  # the reader's own files, and instead of downloads
        Path(name).write_text(TEXT * 40)
    Path("letters.txt").write_text("the quick brown fox jumps over the lazy dog " * 600)
    with tarfile.open("archive.tar", "w") as archive:
        for i in range(40):
            archive.add("text.txt", f"{i}.txt")
    lines = re.sub(r" #.*|\\\n", "", "\n".join(code_blocks("bash")))
    commands = re.findall(r"^(?:.*&& )?python ((?:train|sample|data)\.py\b.*)", lines, re.M)
    assert len(commands) > 10
    for command in commands:
        more = next(flags for pattern, flags in SHRUNK.items() if re.search(pattern, command))
        assert call(f"{command} {more}") == 0, (command, capsys.readouterr().err)
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "100")
    assert call("train.py --help") == call("sample.py --help") == 0
    text = capsys.readouterr().out
    assert "'energy_steps': 10000" in text and max(map(len, text.splitlines())) <= 100


def test_readme_python_runs_and_links_exist(here, capsys):
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
    shutil.copytree("data/small", "data/toy")
    names = {}
    for block in code_blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names and capsys.readouterr().out


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
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
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
def measure_sampling(config, device, batches, steps, k):
    """`sample` beside plain_algorithm_1 and beside bare forwards, for MDLM and EDLM-AR: rows."""
    torch.manual_seed(0)
    denoiser = edlm.Denoiser(config).to(device).eval()
    ar = edlm.AutoregressiveLM(config).to(device).eval()
    pairs = {
        "MDLM": (1, None, None),
        "EDLM-AR": (k, edlm.ARResidual(ar), functools.partial(plain_ar_energy, ar)),
    }
    rows = []
    for batch in batches:
        x = torch.full((batch, config.block_size), config.mask_id, device=device)
        x[:, 0] = 0
        for name, (k, energy, plain_energy) in pairs.items():
            settings = dict(mask_id=config.mask_id, steps=steps, k=k)
            ours = functools.partial(count_events, denoiser, energy=energy, **settings)
            plain = functools.partial(plain_algorithm_1, denoiser, energy=plain_energy, **settings)
            bare = functools.partial(bare_event, denoiser, ar, x, k)
            ours(x, steps=1)  # each runs once before it is timed
            plain(x, stop_after=1)
            bare()
            bare_seconds, _, _ = timed(bare, device, repeats=5)
            seconds, peak, events = timed(lambda ours=ours, x=x: ours(x), device)
            stop = min(steps, PLAIN_STEPS)
            plain_seconds, plain_peak, _ = timed(
                lambda plain=plain, x=x, stop=stop: plain(x, stop_after=stop), device
            )
            plain_seconds *= steps / stop
            ratio, event = plain_seconds / seconds, 1000 * seconds / events
            row = dict(name=f"{name}, batch {batch}", forwards=events, seconds=seconds)
            row |= dict(
                plain=plain_seconds, ratio=ratio, event_ms=event, bare_ms=1000 * bare_seconds
            )
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


def flops_per_token(config):
    """Multiplications and additions that a denoiser's training step needs for a token of the block.

    Forward, a multiply-add as 2: 24 d^2 for a block's four matrices, 4 L d for scores and sums of
    attention, 2 d V for the half of the positions that is masked. Backward costs twice that.
    """
    d, L = config.n_embd, config.block_size
    return 3 * (config.n_layer * (24 * d * d + 4 * L * d) + d * config.vocab_size)


def matmul_rate(device):
    """Operations per second of one large matrix product: bfloat16 on CUDA, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    a @ b
    return 2 * size**3 / timed(lambda: a @ b, device, repeats=5)[0]


def measure_training(config, device, batch, repeats=5):
    """A denoiser step as train.py does it beside a plain step with torch's defaults: rows."""
    x0 = torch.randint(0, config.vocab_size, (batch, config.block_size), device=device)
    rate, rows = matmul_rate(device), []
    for name in ("plain step", "this project") + ("compiled",) * (device.type == "cuda"):
        torch.manual_seed(0)
        denoiser, plain = edlm.Denoiser(config).to(device), name == "plain step"
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-4, fused=None if plain else True)
        if name == "compiled":
            denoiser.transformer.compile(dynamic=False)
        loss = plain_loss if plain else our_loss
        step = functools.partial(train_step, denoiser, loss, optimizer, x0)
        step()
        seconds, peak, _ = timed(step, device, repeats)
        speed, ratio = x0.numel() / seconds, rows[0]["seconds"] / seconds if rows else 1.0
        row = dict(name=f"{name}, batch {batch}", seconds=seconds, tokens_per_s=speed, ratio=ratio)
        row |= dict(of_matmul=flops_per_token(config) * speed / rate)
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
    monkeypatch.setattr(sys.modules[__name__], "matmul_rate", lambda device: 1e9)
    sampling, training = main(["--batch", "1,2", "--device", "cpu", "--steps", "4"])
    names = [f"{name}, batch {batch}" for batch in (1, 2) for name in ("MDLM", "EDLM-AR")]
    assert [row["name"] for row in sampling] == names and len(training) == 4
    for row in sampling:
        assert row["ratio"] == pytest.approx(row["plain"] / row["seconds"])
        assert 1 <= row["forwards"] <= 4 and row["bare_ms"] > 0
    for plain, ours in zip(training[::2], training[1::2], strict=True):
        assert ours["ratio"] == pytest.approx(plain["seconds"] / ours["seconds"])
        flops = 3 * (24 * 16**2 + 4 * 8 * 16 + 2 * 16 * 30 * 0.5)
        assert ours["of_matmul"] == pytest.approx(flops * ours["tokens_per_s"] / 1e9)
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
    x_t = torch.full((3, 8), config.mask_id)
    ours = edlm.ARResidual(ar)(candidates, x_t, log_q)
    close(ours, plain_ar_energy(ar, candidates, x_t, log_q))


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
        sampling = measure_sampling(config, device, args.batch, steps, args.k)
    print_table(f"sampling ({PLAIN_STEPS} plain steps timed, scaled to {steps})", sampling)
    training = [row for batch in args.batch for row in measure_training(config, device, batch)]
    print_table("training the denoiser", training)
    return sampling, training


if __name__ == "__main__":
    main()
