"""Every promise of the other five files, checked offline: `pytest` (the whole suite), `pytest -k sample` (a part).

1. The method, by enumeration. A world is a random table: one categorical per position and one energy per
   completion, for every partially masked sequence (V <= 3, L <= 4). Every law, bound and estimator of edlm.py
   can then be added up exactly, and is. Statistical tests use fixed seeds; beside each bound stands how often a
   correct program would miss it with a fresh seed.
2. Data: the toy language, tokenizers, shards, archives, kills and downloads.
3. The scripts as a user meets them: mistakes, exact resume, several processes, figures, and the README's own
   commands and snippets.
"""

import functools
import http.server
import io
import itertools
import json
import lzma
import math
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import types
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
    """Networks this small gain nothing from threads, and on a busy machine lose much by waiting for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# =======================================================================================================
# 1. The method, by enumeration of worlds small enough to list (V <= 3, L <= 4)
# =======================================================================================================

INF = float("inf")
RARE = 1e-6  # a chi-square test with this threshold fails a correct program once in a million


# ----------------------------------------------------------------------------------------------------- worlds


class World:
    """A denoiser and an energy as tables over all sequences of V tokens and the mask V, coded base V + 1."""

    def __init__(self, vocab, length, seed, scale=1.5):
        g = torch.Generator().manual_seed(seed)
        self.V, self.L, self.M = vocab, length, length - 1
        self.base = (vocab + 1) ** torch.arange(length)
        self.size = (vocab + 1) ** length
        logits = scale * torch.randn(self.size, length, vocab, generator=g, dtype=torch.float64)
        self.logp = logits.log_softmax(-1)  # [code of x_t, L, V]
        self.E = torch.randn(self.size, self.size, generator=g, dtype=torch.float64)  # [code of x_t, of x0]
        self.start = torch.tensor([0] + [vocab] * self.M)  # BOS, then masks
        self.x0s = self.completions(self.start)  # [V^M, L], and the data's probability of each:
        self.data = torch.randn(vocab**self.M, generator=g, dtype=torch.float64).softmax(0)
        self.calls = []  # every `where` the denoiser was asked for

    def code(self, x):
        return (x * self.base).sum(-1)

    def state(self, code):
        return code // self.base % (self.V + 1)

    def completions(self, x_t):
        free = (x_t == self.V).nonzero()[:, 0]
        fill = list(itertools.product(range(self.V), repeat=len(free)))
        fill = torch.tensor(fill, dtype=torch.long).view(len(fill), len(free))
        out = x_t.repeat(len(fill), 1)
        out[:, free] = fill
        return out

    def log_mu(self, x0, x_t, where=None):
        """log mu(x0 | x_t), summed over the masked positions (or `where`); any matching batch shapes."""
        lp = self.logp[self.code(x_t)].expand(*x0.shape, self.V)
        lp = lp.gather(-1, x0[..., None].clamp(max=self.V - 1))[..., 0]
        return (lp * (x_t == self.V if where is None else where)).sum(-1)

    def energy_of(self, x0, x_t):
        return self.E[self.code(x_t), self.code(x0)]

    def denoiser(self, x_t, where):
        assert where.dtype == torch.bool and where.shape == x_t.shape and not where[:, 0].any()
        self.calls.append(where.clone())
        return self.logp[self.code(x_t)][where] + 1.0  # logits need not be normalised

    def energy(self, candidates, x_t, log_q):
        """The table's energy; also checks what every energy is promised about its three arguments."""
        x = x_t[:, None].expand_as(candidates)
        assert log_q.shape == candidates.shape[:2] and (candidates < self.V).all()
        assert ((candidates == x) | (x == self.V)).all()
        close(log_q.double(), self.log_mu(candidates, x))
        return self.energy_of(candidates, x)


@functools.cache
def proposal(world, code):
    """All completions of a state with their log-probability and energy."""
    x_t = world.state(code)
    x0 = world.completions(x_t)
    return x0, world.log_mu(x0, x_t), world.energy_of(x0, x_t)


@functools.cache
def choice(world, code, k, sign=1.0):
    """Law of the completion chosen out of k draws by softmax(-sign * E); k = inf is the model itself."""
    x0, log_q, E = proposal(world, code)
    q, w = log_q.exp(), (-sign * E).exp()
    if k == INF:
        return x0, q * w / (q * w).sum()
    p_other, w_other = torch.ones(1).double(), torch.zeros(1).double()  # the other k - 1 draws, every tuple
    for _ in range(k - 1):
        p_other = (p_other[:, None] * q).flatten()
        w_other = (w_other[:, None] + w).flatten()
    return x0, k * q * (p_other * w[:, None] / (w[:, None] + w_other)).sum(1)


def subsets(items, smallest=0):
    items = list(items)
    return [s for r in range(smallest, len(items) + 1) for s in itertools.combinations(items, r)]


def masked(world, x0, positions):
    x_t = x0.clone()
    x_t[list(positions)] = world.V
    return x_t


def alpha_of(t, schedule):
    return 1 - t if schedule == "linear" else 1 - math.cos(math.pi / 2 * (1 - t))


def chain_law(world, start, steps, k=1, window=1.0, schedule="linear", sign=1.0):
    """Law of the last state, by dynamic programming over states; a vector over codes."""
    law = torch.zeros(world.size, dtype=torch.float64)
    law[world.code(start)] = 1.0
    for j in range(steps):
        a_t, a_s = alpha_of(1 - j / steps, schedule), alpha_of(1 - (j + 1) / steps, schedule)
        reveal = (a_s - a_t) / (1 - a_t) if j < steps - 1 else 1.0
        new = torch.zeros_like(law)
        for c in law.nonzero()[:, 0].tolist():
            x0, p = choice(world, c, k if j / steps < window else 1, sign)
            free = (world.state(c) == world.V).nonzero()[:, 0].tolist()
            for U in subsets(free):
                to = c + ((x0 - world.V) * world.base)[:, list(U)].sum(1)
                new.index_add_(0, to, law[c] * reveal ** len(U) * (1 - reveal) ** (len(free) - len(U)) * p)
        law = new
    return law


def p_value(x, law, world):
    """Chi-square tail probability of the drawn rows x under a law over codes."""
    counts = torch.bincount(world.code(x), minlength=world.size).double()
    if counts[law == 0].sum() > 0:
        return 0.0
    return chi_square(counts[law > 0], law[law > 0])


def chi_square(counts, probs):
    """Tail probability of the counts; cells expecting fewer than 5 are pooled."""
    counts, expected = counts.double(), probs.double() * counts.sum()
    small = expected < 5
    if small.any():
        counts = torch.cat([counts[~small], counts[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(counts) - 1.0, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item() if freedom > 0 else 1.0


# -------------------------------------------------------------------------------------- enumerated estimators


@functools.cache
def counts_of(n, values):
    """All ways n draws can fall on `values` outcomes, with log multinomial coefficients."""
    bars = list(itertools.combinations(range(n + values - 1), values - 1))
    bars = torch.tensor(bars, dtype=torch.long).view(len(bars), values - 1)
    ends = torch.cat([torch.full((len(bars), 1), -1), bars, torch.full((len(bars), 1), n + values - 1)], 1)
    c = (ends.diff(dim=1) - 1).double()
    return c, math.lgamma(n + 1) - torch.lgamma(c + 1).sum(1)


def mean_T(log_q, E, n):
    """E[T_n], T_n = log mean of exp(-E) over n draws from q, from all outcomes (n = inf: its limit)."""
    if n == INF:
        return (log_q - log_q.logsumexp(0) - E).logsumexp(0)
    c, coefficient = counts_of(n, len(E))
    T = ((c / n).log() - E).logsumexp(1)
    return ((coefficient + c @ (log_q - log_q.logsumexp(0))).exp() * T).sum()


@functools.cache
def log_z(world, code, n, which):
    if which == "exact":
        return 0.0
    _, log_q, E = proposal(world, code)
    if n == INF or which == "lower":
        return mean_T(log_q, E, n)
    return (2 * n - 1) * mean_T(log_q, E, n) - 2 * (n - 1) * mean_T(log_q, E, n - 1)


def step_weights(steps, n, M):
    """(weight of one given mask set of size n, reveal probability) of every step of the linear chain."""
    for j in range(steps):
        t = 1 - j / steps
        yield t**n * (1 - t) ** (M - n), 1 / (steps - j)


def joint_truth(world, x0, n, steps, which):
    """The paper's estimator: reveal probability times joint cost; in continuous time 1/n for size n."""
    total = 0.0
    for S in subsets(range(1, world.L), 1):
        x_t = masked(world, x0, S)
        log_p = world.log_mu(x0, x_t) - world.energy_of(x0, x_t)
        log_p -= log_z(world, world.code(x_t).item(), n, which)
        if steps is None:
            weight = 1 / len(S) / math.comb(world.M, len(S))
        else:
            weight = sum(w * r for w, r in step_weights(steps, len(S), world.M))
        total -= weight * log_p
    return float(total)


def chain_truth(world, x0, n, steps):
    """The chain bound: a step that reveals U pays -log p_U(x0_U | x_t), with n draws per expectation."""
    total = 0.0
    for S in subsets(range(1, world.L), 1):
        x_t = masked(world, x0, S)
        code = world.code(x_t).item()
        cands, log_q, E = proposal(world, code)
        for U in subsets(S, 1):
            if steps is None:
                weight = 1 / len(S) / math.comb(world.M, len(S)) if len(U) == 1 else 0.0
            else:
                u, s = len(U), len(S)
                weight = sum(w * r**u * (1 - r) ** (s - u) for w, r in step_weights(steps, s, world.M))
            if weight:
                keep = (cands[:, list(U)] == x0[list(U)]).all(1)
                where = torch.zeros(world.L, dtype=torch.bool)
                where[list(U)] = True
                cost = log_z(world, code, n, "upper") - mean_T(log_q[keep], E[keep], n)
                total += weight * (cost - world.log_mu(x0, x_t, where))
    return float(total)


def chain_nll(world, steps):
    """Exact -log p(x0) of the chain that steps with the model itself, for every row of world.x0s."""
    return -chain_law(world, world.start, steps, INF)[world.code(world.x0s)].log()


def per_row(estimate, x0s, repeats, seed=0):
    """`repeats` independent draws of an estimator for every row of x0s: Float[repeats, rows]."""
    torch.manual_seed(seed)
    return estimate(x0s.repeat(repeats, 1)).double().view(repeats, len(x0s))


def assert_mean(draws, truth, slack=1e-5):
    """Every column's mean lies within 6 standard errors of the truth (false alarm: 2e-9 per column)."""
    z = (draws.mean(0) - torch.as_tensor(truth, dtype=torch.float64)).abs() - slack
    error = draws.std(0) / len(draws) ** 0.5
    assert (z <= 6 * error).all(), f"mean {draws.mean(0)}, truth {truth}, standard error {error}"


def close(a, b, atol=1e-5):
    """Equal to float32 rounding."""
    torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=1e-5)


def zero_energy(candidates, x_t, log_q):
    return torch.zeros_like(log_q)


class TableAR:
    """An autoregressive model as a table: any conditional probability for any prefix."""

    def __init__(self, vocab, length, seed=0, logp=None):
        g = torch.Generator().manual_seed(seed)
        self.config = SimpleNamespace(vocab_size=vocab, mask_id=vocab, block_size=length)
        self.base = (vocab + 1) ** torch.arange(length)
        if logp is None:
            logp = torch.randn((vocab + 1) ** length, length, vocab, generator=g).double().log_softmax(-1)
        self.logp = logp  # [code of the prefix, position, V]

    def log_prob(self, x):
        prefix = (x * self.base).cumsum(-1)[..., :-1]  # code of x_<i
        i = torch.arange(1, x.shape[-1])
        return F.pad(self.logp[prefix, i].gather(-1, x[..., 1:, None])[..., 0], (1, 0))

    def candidate_log_prob(self, candidates, where):
        return (self.log_prob(candidates) * where[:, None]).sum(-1)


def co_ar_world(vocab, length, ar, seed=0, carry_over=True):
    """A random denoiser with the AR residual energy, tabulated from its definition."""
    world = World(vocab, length, seed)
    for c in range(world.size):
        x_t = world.state(torch.tensor(c))
        if x_t[0] == vocab:
            continue
        x0 = world.completions(x_t)
        score = ar.log_prob(x0).detach().double()
        score = score * (x_t == vocab) if carry_over else score
        world.E[c, world.code(x0)] = world.log_mu(x0, x_t) - score.sum(-1)
    return world


def exact_world(vocab, length, data, seed=0):
    """Exact marginals of `data` as denoiser, log mu - log q as energy: p(x0 | x_t) is the posterior."""
    world = World(vocab, length, seed)
    world.data = data
    for c in range(world.size):
        x_t = world.state(torch.tensor(c))
        keep = ((world.x0s == x_t) | (x_t == vocab)).all(1)
        if x_t[0] != 0 or data[keep].sum() == 0:
            continue
        x0, q = world.x0s[keep], data[keep] / data[keep].sum()
        marginals = (F.one_hot(x0, vocab).double() * q[:, None, None]).sum(0)
        world.logp[c] = marginals.clamp(min=math.exp(-60)).log().log_softmax(-1)
        world.E[c, world.code(x0)] = (world.log_mu(x0, x_t) - q.log()).clamp(max=60)
    return world


def two_bits():
    return exact_world(2, 3, torch.tensor([0.5, 0, 0, 0.5], dtype=torch.float64))


BITS = math.log(2)


# ------------------------------------------------------------------------------------------------ the sampler


def start_rows(world):
    """Unconditional with two different BOS, a prompt, an infilling, and a row with nothing to do."""
    V, rows = world.V, world.start.repeat(5, 1)
    rows[1, 0] = 1
    rows[2, 1] = 1
    rows[3, -1] = V - 1
    rows[4, 1:] = 1
    return rows


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(world, starts, repeats, seed=1, **kw):
    """`repeats` samples from every start row, the rows of all starts interleaved in one batch."""
    x = starts.repeat(repeats, 1)
    given = x != world.V
    before = x.clone()
    out = edlm.sample(world.denoiser, x, mask_id=world.V, generator=seeded(seed), **kw)
    assert torch.equal(x, before), "the start state was overwritten"
    assert torch.equal(out[given], x[given]) and (out < world.V).all()
    return out.view(repeats, len(starts), world.L).transpose(0, 1)


PLAIN = [
    (3, 3, 1, "linear"), (2, 4, 2, "linear"), (3, 4, 2, "linear"), (3, 3, 3, "linear"),
    (2, 4, 3, "cosine"), (3, 4, 2, "cosine"), (2, 4, 64, "linear"), (3, 3, 64, "cosine"),
]  # fmt: skip


@pytest.mark.parametrize("vocab,length,steps,schedule", PLAIN)
def test_plain_sampler_has_the_law_of_the_chain(vocab, length, steps, schedule):
    """k = 1 draws from the step-by-step chain for few and many steps, for five different starts in one batch;
    an energy changes nothing at k = 1. False alarm 8 cases x 2 x 4 x 1e-6."""
    world = World(vocab, length, seed=steps)
    starts = start_rows(world)
    for energy in (None, world.energy):
        out = draw(world, starts, 5000, steps=steps, schedule=schedule, energy=energy, k=1)
        for i, start in enumerate(starts):
            assert p_value(out[i], chain_law(world, start, steps, schedule=schedule), world) > RARE
    other = starts[0].clone()  # the same rows are told apart from another row's law
    other[0] = 1
    assert p_value(out[0], chain_law(world, other, steps, schedule=schedule), world) < RARE


def test_number_of_steps_and_schedule_matter_to_the_law():
    """The chi-square above has the power to tell 1, 2, 3 steps and the two schedules apart."""
    world = World(3, 3, seed=7, scale=3.0)
    out = draw(world, world.start[None], 60_000, steps=3, schedule="cosine")[0]
    assert p_value(out, chain_law(world, world.start, 3, schedule="cosine"), world) > RARE
    for wrong in [(1, "linear"), (2, "linear"), (3, "linear"), (2, "cosine"), (4, "cosine"), (64, "cosine")]:
        assert p_value(out, chain_law(world, world.start, wrong[0], schedule=wrong[1]), world) < RARE, wrong


WEIGHTED = [
    (3, 3, 1, 2, 1.0, "linear"), (2, 4, 2, 2, 1.0, "linear"), (3, 4, 3, 2, 1.0, "linear"),
    (3, 3, 1, 3, 1.0, "linear"), (2, 4, 2, 3, 0.5, "linear"), (2, 4, 3, 3, 1.0, "cosine"),
    (3, 3, 3, 3, 0.5, "linear"), (2, 4, 4, 2, 0.5, "cosine"), (2, 4, 64, 3, 1.0, "linear"),
    (2, 4, 64, 2, 0.5, "linear"),
]  # fmt: skip


@pytest.mark.parametrize("vocab,length,steps,k,window,schedule", WEIGHTED)
def test_importance_sampler_has_the_enumerated_law(vocab, length, steps, k, window, schedule):
    """k candidates weighted by softmax(-E) inside the window, plain steps outside, against the sum over all
    k-tuples; softmax(+E), no weights and (for half a window) the whole window are all detected.
    False alarm 10 cases x 4 x 1e-6."""
    world = World(vocab, length, seed=10 * steps + k)
    world.E *= 2
    starts = start_rows(world)
    out = draw(world, starts, 8000, steps=steps, schedule=schedule, energy=world.energy, k=k, window=window)
    for i, start in enumerate(starts):
        assert p_value(out[i], chain_law(world, start, steps, k, window, schedule), world) > RARE
    wrong = [(k, window, -1.0), (1, window, 1.0)] + ([(k, 1.0, 1.0)] if window < 1 else [])
    for kk, ww, sign in wrong:
        assert p_value(out[0], chain_law(world, starts[0], steps, kk, ww, schedule, sign), world) < RARE


def test_window_ends_at_the_right_step():
    """With so many positions that every step reveals some (false alarm < 1e-15), the energy is asked in
    exactly the steps with j/T < window, and there x_t has the expected share of masks."""
    V, cases = 3, [(w, 10, 400) for w in (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)] + [(0.07, 100, 5000)]
    for window, T, L in cases:
        seen = set()

        def energy(candidates, x_t, log_q, seen=seen):
            seen.add(int((x_t == V).sum()))
            return torch.zeros_like(log_q)

        x = torch.full((1, L), V)
        x[0, 0] = 0
        args = dict(mask_id=V, steps=T, energy=energy, k=2, window=window, generator=seeded(0))
        edlm.sample(lambda x_t, where: torch.zeros(int(where.sum()), V), x, **args)
        assert len(seen) == round(window * T)
        for j, masks in enumerate(sorted(seen, reverse=True)):  # binomial, within six standard deviations
            assert abs(masks - (L - 1) * (1 - j / T)) <= 6 * ((L - 1) * (j / T) * (1 - j / T)) ** 0.5


def test_states_go_from_start_to_sample_and_only_reveal():
    """sample_states begins at the start, ends at what `sample` returns, never changes or hides a token."""
    world = World(3, 4, seed=5)
    x = start_rows(world).repeat(8, 1)
    for kw in (dict(steps=3), dict(steps=64), dict(steps=5, energy=world.energy, k=3, window=0.5)):
        args = dict(mask_id=3, **kw)
        states = [s.x.clone() for s in edlm.sample_states(world.denoiser, x, generator=seeded(3), **args)]
        assert torch.equal(states[0], x)
        assert torch.equal(states[-1], edlm.sample(world.denoiser, x, generator=seeded(3), **args))
        assert (states[-1] < 3).all() and len(states) > 1
        for a, b in itertools.pairwise(states):
            assert torch.equal(a[a < 3], b[a < 3])


def test_steps_that_reveal_nothing_cost_nothing():
    """At most min(steps, masked) forwards per row, none for a row with nothing due; at k = 1 each position is
    projected once; the reported costs are those seen by the denoiser and the energy, which is not asked where the
    choice makes no difference."""
    world = World(2, 7, seed=0)
    x = start_rows(world).repeat(4, 1)
    due = (x == 2).sum(1)
    judged = []

    def energy(candidates, x_t, log_q):
        judged.append(candidates)
        return torch.zeros_like(log_q)

    for steps, k in itertools.product((1, 3, 1000), (1, 4)):
        world.calls.clear()
        judged.clear()
        args = dict(mask_id=2, steps=steps, energy=energy, k=k, generator=seeded(steps))
        states = list(edlm.sample_states(world.denoiser, x, **args))
        assert all(where.any(1).all() for where in world.calls)
        last, asked = states[-1], sum(int(where.sum()) for where in world.calls)
        assert (last.denoiser_forwards <= due.clamp(max=steps)).all() and (last.projected >= due).all()
        assert last.denoiser_forwards.sum() == sum(len(where) for where in world.calls)
        assert last.projected.sum() == asked and (asked == due.sum()) == (k == 1 or steps == 1)
        assert (last.energy_forwards <= last.denoiser_forwards * k).all() and (last.energy_forwards % k == 0).all()
        assert last.energy_forwards.sum() == k * sum(map(len, judged))
        assert all((c != c[:, :1]).any(dim=(1, 2)).all() for c in judged) and (k == 1) == (not judged)
        assert steps < 1000 or last.energy_forwards.sum() < last.denoiser_forwards.sum() * k or k == 1
        ess = torch.cat([s.ess[~s.ess.isnan()] for s in states])
        assert len(ess) * k == last.energy_forwards.sum() or k == 1
        torch.testing.assert_close(ess, torch.full_like(ess, k))  # equal weights


def test_sampler_refuses_wrong_arguments():
    """A wrong k, steps, window or schedule is a ValueError, before anything is computed."""
    world = World(2, 3, seed=0)
    good = dict(mask_id=2, steps=2, energy=world.energy, k=2, window=0.5)
    for bad in (dict(k=0), dict(steps=0), dict(window=-0.1), dict(window=1.1), dict(schedule="square")):
        with pytest.raises(ValueError):
            edlm.sample(world.denoiser, world.start[None], **{**good, **bad})
    assert not world.calls


def test_alpha():
    """Both schedules are the formulas, from 1 (nothing masked) at t = 0 to 0 at t = 1."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(edlm.alpha(t, "linear"), 1 - t)
    torch.testing.assert_close(edlm.alpha(t, "cosine"), 1 - torch.cos(math.pi / 2 * (1 - t)))


# -------------------------------------------------------------------------------- categorical draws and masks


def test_categorical_has_the_law_of_its_logits():
    """Every row has its own softmax as law, independent along k (chi-square on pairs). False alarm 6e-6."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 3.0], [5.0, -INF, 5.0, 2.0], [-1e4, -1e4 + 1, -1e4 - 2, -1e4]])
    draws, log_p = edlm.categorical(logits, 60_000, generator=seeded(0))
    close(log_p, logits.double().log_softmax(-1).gather(1, draws))
    for row, d in zip(logits.double().softmax(-1), draws, strict=True):
        assert (row[d] > 0).all()
        assert chi_square(torch.bincount(d, minlength=4)[row > 0], row[row > 0]) > RARE
        pair = torch.bincount(4 * d[0::2] + d[1::2], minlength=16)
        both = (row[:, None] * row).flatten()
        assert chi_square(pair[both > 0], both[both > 0]) > RARE


def test_categorical_keeps_the_tail():
    """50,000 tokens, 1e-4 of the mass on 49,900 of them (2e-9 each): drawn within 5 standard errors of 1e-4
    (false alarm 6e-7). The 32-bit Gumbel trick draws none: argmax(log p - log(-log(torch.rand))) gave 0 tail
    tokens in 200,000 draws where 20 are due, its largest noise being 16.6 and log 2e-9 = -20."""
    head, tail = 100, 49_900
    p = torch.cat([torch.full((head,), (1 - 1e-4) / head), torch.full((tail,), 1e-4 / tail)]).double()
    p = p[torch.randperm(head + tail, generator=seeded(0))]
    draws, _ = edlm.categorical(p.log().float().repeat(4, 1), 1_000_000, generator=seeded(1))
    hits = (p[draws] < 1e-7).sum().item()
    assert abs(hits - 400) < 5 * 20, hits
    rare = draws[p[draws] < 1e-7]
    assert rare.unique().numel() > 0.95 * hits  # spread over the tail, not stuck on a few values


def test_mask_tokens_is_uniform_over_subsets():
    """Exactly n masks per row, n differing by row, never BOS, the rest untouched, all subsets alike.
    False alarm 5e-6."""
    x0 = torch.tensor([[0, 1, 2, 1, 0]]).repeat(60_000, 1)
    n = torch.arange(60_000) % 5  # 0..4
    x_t = edlm.mask_tokens(x0, n, mask_id=3, generator=seeded(0))
    hidden = x_t == 3
    assert torch.equal(hidden.sum(1), n) and not hidden[:, 0].any()
    assert torch.equal(x_t[~hidden], x0[~hidden])
    for size in range(5):
        codes = (hidden[n == size].long() * 2 ** torch.arange(5)).sum(1)
        sets = torch.tensor([sum(2**i for i in S) for S in subsets(range(1, 5)) if len(S) == size])
        seen = torch.bincount(codes, minlength=32)[sets]
        assert seen.sum() == len(codes)
        assert chi_square(seen, torch.full((len(sets),), 1 / len(sets))) > RARE


# ------------------------------------------------------------------------------------------------- estimators


def nelbo_integral(world, x0):
    """The 1/t form, by Gauss-Legendre quadrature (exact: the integrand is a polynomial in t)."""
    total = 0.0
    for node, w in zip(*np.polynomial.legendre.leggauss(8), strict=True):
        t = (1 + node) / 2
        for S in subsets(range(1, world.L), 1):
            density = t ** len(S) * (1 - t) ** (world.M - len(S))
            total -= w / 2 / t * density * float(world.log_mu(x0, masked(world, x0, S)))
    return total


def test_nelbo_is_the_count_form_and_the_integral():
    """The mean of `nelbo` is the sum over mask sets with weight 1/n, which is the integral over t."""
    world = World(3, 4, seed=2)
    world.E.zero_()
    count = [joint_truth(world, x0, 2, None, "exact") for x0 in world.x0s]
    assert count == pytest.approx([nelbo_integral(world, x0) for x0 in world.x0s], abs=1e-9)
    assert_mean(per_row(lambda x: edlm.nelbo(world.denoiser, x, mask_id=3), world.x0s, 4000), count)


def test_order_of_rows_does_not_matter():
    """Rows of the same x0 side by side are as good as scattered: an estimator's mean over rows and its
    standard error stay true (evaluation batches are often sorted)."""
    world = World(3, 4, seed=4)
    world.E.zero_()
    for steps in (None, 2):
        truth = [joint_truth(world, x0, 2, steps, "exact") for x0 in world.x0s[:4]]
        torch.manual_seed(0)
        x0, args = world.x0s[:4].repeat_interleave(4000, 0), dict(n=2, steps=steps, log_partition="exact")
        draws = edlm.joint_nelbo(world.denoiser, zero_energy, x0, mask_id=3, **args)
        assert_mean(draws.double().view(4, 4000).T, truth)


def test_theorem_1_brackets_log_z():
    """For every mask of three random worlds E[T_n] rises to log Z, E[(2n-1) T_n - 2(n-1) T_{n-1}] falls to it
    (from some n on: the theorem is asymptotic), and the gap shrinks like 1/n."""
    for world in (World(2, 3, seed=s) for s in (0, 1, 5)):
        for S in subsets((1, 2), 1):
            z = partial(log_z, world, world.code(masked(world, world.x0s[1], S)).item())
            lower = [z(n, "lower") for n in (2, 4, 8, 16, 32)]
            upper = [z(n, "upper") for n in (8, 16, 32)]
            assert all(a < b < z(INF, "upper") for a, b in itertools.pairwise(lower))
            assert all(a > b > z(INF, "upper") for a, b in itertools.pairwise(upper))
            assert upper[-1] - lower[-1] < 0.5 * (upper[0] - lower[2])


@pytest.mark.parametrize("n", [2, 3, 4])
def test_log_partition_bounds_have_the_enumerated_means(n):
    """Both bounds are unbiased for their enumerated expectations, for different masks in one batch, and exact
    where nothing is masked."""
    world = World(3, 4, seed=n)
    sets = [(1, 2, 3), (1,), (2, 3), (1, 3)]
    x_t = torch.stack([masked(world, world.x0s[5 * i], S) for i, S in enumerate(sets)])
    bounds = partial(edlm.log_partition_bounds, world.denoiser, world.energy, mask_id=3, n=n)
    torch.manual_seed(0)
    lower, upper = bounds(x_t.repeat(8000, 1))
    codes = [world.code(x).item() for x in x_t]
    assert_mean(lower.double().view(-1, 4), [log_z(world, c, n, "lower") for c in codes])
    assert_mean(upper.double().view(-1, 4), [log_z(world, c, n, "upper") for c in codes])
    full = world.x0s[3:5]
    for bound in bounds(full):
        close(bound, -world.energy_of(full, full))


def test_log_partition_bounds_are_computed_in_log_space():
    """Energies moved by +-1e4 (where exp is 0 or infinite) move both bounds by exactly that, same draws."""
    world = World(3, 4, seed=0)
    x_t = world.start.repeat(50, 1)

    def bounds(shift):
        torch.manual_seed(3)
        args = (world.denoiser, lambda c, x, q: world.energy(c, x, q) + shift, x_t)
        return torch.stack(edlm.log_partition_bounds(*args, mask_id=3, n=5)).double()

    for shift in (1e4, -1e4):
        torch.testing.assert_close(bounds(shift), bounds(0.0) - shift, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, None])
def test_joint_and_chain_nelbo_equal_their_enumerated_formulas(steps):
    """For every x0 of a random 3 x 3 world the mean over draws is the formula, finite n included; the
    chain bound and the joint estimate are told apart."""
    world, n = World(3, 4, seed=4), 3
    world.E *= 2  # a large spread, so that a wrong law of the revealed subset shows
    rows = world.x0s[::5]
    args = dict(mask_id=3, n=n, steps=steps)
    joint = partial(edlm.joint_nelbo, world.denoiser, world.energy, **args)
    for which in ("upper", "lower", "exact"):
        truth = [joint_truth(world, x0, n, steps, which) for x0 in rows]
        assert_mean(per_row(partial(joint, log_partition=which), rows, 4000), truth)
    draws = per_row(partial(edlm.chain_nelbo, world.denoiser, world.energy, **args), rows, 20_000)
    assert_mean(draws, [chain_truth(world, x0, n, steps) for x0 in rows])
    if steps != 1:
        with pytest.raises(AssertionError):
            assert_mean(draws, [joint_truth(world, x0, n, steps, "upper") for x0 in rows])


@pytest.mark.parametrize("steps", [1, 2, 5, None])
def test_zero_energy_gives_the_factorised_nelbo(steps):
    """With E = 0 and the same seed both estimators agree row by row to rounding, with `nelbo` in continuous
    time, and their mean is the enumerated factorised T-step bound."""
    world = World(3, 4, seed=6)
    x0 = world.x0s.repeat(3000, 1)
    rows = []
    for estimator in (edlm.joint_nelbo, edlm.chain_nelbo):
        torch.manual_seed(0)
        rows.append(estimator(world.denoiser, zero_energy, x0, mask_id=3, n=2, steps=steps).double())
    close(rows[0], rows[1])
    if steps is None:
        torch.manual_seed(0)
        close(rows[0], edlm.nelbo(world.denoiser, x0, mask_id=3))
    world.E.zero_()
    truth = [joint_truth(world, x, 2, steps, "exact") for x in world.x0s]
    assert truth == pytest.approx([chain_truth(world, x, INF, steps) for x in world.x0s], abs=1e-9)
    assert_mean(rows[1].view(3000, -1), truth)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_chain_nelbo_is_never_below_the_truth(seed, steps):
    """Random 3 x 3 worlds and data: the enumerated bound (n = inf and n = 4) is at least the exact NLL of the
    enumerated chain, and the estimator's mean matches the bound (6 standard errors)."""
    world = World(3, 4, seed=100 + seed)
    nll = (world.data * chain_nll(world, steps)).sum()
    bound = sum(d * chain_truth(world, x, INF, steps) for d, x in zip(world.data, world.x0s, strict=True))
    finite = sum(d * chain_truth(world, x, 4, steps) for d, x in zip(world.data, world.x0s, strict=True))
    assert nll - 1e-9 <= bound <= finite + 1e-9
    x0 = world.x0s[torch.multinomial(world.data, 30_000, replacement=True, generator=seeded(seed))]
    torch.manual_seed(seed)
    draws = edlm.chain_nelbo(world.denoiser, world.energy, x0, mask_id=3, n=4, steps=steps).double()
    assert_mean(draws[:, None], [finite])
    assert draws.mean() + 6 * draws.std() / len(draws) ** 0.5 >= nll


@pytest.mark.parametrize("steps", [1, 2, 4, None])
def test_chain_nelbo_of_the_exact_posterior_is_the_entropy(steps):
    """Exact marginals and E = log mu - log q: bound = entropy of the data at n = inf; the estimator at n = 32
    matches its enumeration, which is within 0.02 nats of it. The joint formula is below the entropy."""
    data = torch.tensor([0.4, 0.15, 0.1, 0.35], dtype=torch.float64)
    world = exact_world(2, 3, data)
    entropy = -(data * data.log()).sum().item()

    def average(f):
        return sum(d * f(x) for d, x in zip(data.tolist(), world.x0s, strict=True))

    assert average(lambda x: chain_truth(world, x, INF, steps)) == pytest.approx(entropy, abs=1e-9)
    truth = [chain_truth(world, x, 32, steps) for x in world.x0s]
    assert abs(sum(d * v for d, v in zip(data.tolist(), truth, strict=True)) - entropy) < 0.02
    estimate = partial(edlm.chain_nelbo, world.denoiser, world.energy, mask_id=2, n=32, steps=steps)
    assert_mean(per_row(estimate, world.x0s, 4000), truth)
    if steps != 1:
        assert average(lambda x: joint_truth(world, x, INF, steps, "exact")) < entropy - 0.02


TWO_BITS = {1: 1.0, 2: 0.75, 4: 0.625, 16: 0.53125, 64: 0.5078125}


@pytest.mark.parametrize("steps", TWO_BITS)
def test_two_equal_bits(steps):
    """Entropy 1 bit, exact posterior: chain and bound say 1 bit, the joint formula TWO_BITS[steps]."""
    world = two_bits()
    x0 = world.x0s[[0, 3]]
    nll = chain_nll(world, steps)[[0, 3]] / BITS
    assert nll.tolist() == pytest.approx([1.0, 1.0], abs=1e-9)
    assert chain_truth(world, x0[0], INF, steps) / BITS == pytest.approx(1.0, abs=1e-9)
    assert joint_truth(world, x0[0], INF, steps, "upper") / BITS == pytest.approx(TWO_BITS[steps], abs=1e-9)
    joint = partial(edlm.joint_nelbo, world.denoiser, world.energy, mask_id=2, n=64, steps=steps)
    draws = per_row(partial(joint, log_partition="exact"), x0, 20_000) / BITS
    assert_mean(draws, [TWO_BITS[steps]] * 2)
    draws = per_row(joint, x0, 2000) / BITS
    assert_mean(draws, [joint_truth(world, x0[0], 64, steps, "upper") / BITS] * 2)
    chain = partial(edlm.chain_nelbo, world.denoiser, world.energy, mask_id=2, n=64, steps=steps)
    assert_mean(per_row(chain, x0, 2000) / BITS, [1.0] * 2, slack=0.03)  # finite n: at most 0.03 bits above


# ------------------------------------------------------------------------------------------ residual energies


CO_AR_BITS = {1: 1.0, 2: 1.193, 4: 1.300, 16: 1.385, 64: 1.408}


@pytest.mark.parametrize("steps", CO_AR_BITS)
def test_co_ar_on_two_equal_bits(steps):
    """coAR's joint estimate is the AR model's NLL (1 bit) for every T, but its chain's true NLL grows with T;
    `chain_nelbo` agrees with the enumerated bound and is not below the truth."""
    logp = torch.full((27, 3, 2), math.log(0.5), dtype=torch.float64)
    for bit in (0, 1):
        logp[3 * bit, 2] = torch.tensor([0.0, -60.0] if bit == 0 else [-60.0, 0.0])
    ar = TableAR(2, 3, logp=logp)
    world = co_ar_world(2, 3, ar)
    x0 = world.x0s[[0, 3]]
    nll = chain_nll(world, steps)[[0, 3]].mean() / BITS
    assert nll.item() == pytest.approx(CO_AR_BITS[steps], abs=6e-4)
    energy = edlm.ARResidual(ar, carry_over=True)
    args = dict(mask_id=2, n=64, steps=steps)
    joint = partial(edlm.joint_nelbo, world.denoiser, energy, log_partition="exact", **args)
    assert_mean(per_row(joint, x0, 10_000) / BITS, [1.0, 1.0])
    draws = per_row(lambda x: edlm.chain_nelbo(world.denoiser, energy, x, **args), x0, 2000) / BITS
    assert_mean(draws, [chain_truth(world, x, 64, steps) / BITS for x in x0])
    assert draws.mean() + 6 * draws.std() / draws.numel() ** 0.5 >= nll


@pytest.mark.parametrize("steps", [1, 2, 5, None])
def test_co_ar_joint_estimate_is_the_ar_likelihood(steps):
    """For a random AR table, any denoiser and every x0: mean of the joint estimate = -log p_AR(x0)."""
    ar = TableAR(3, 4, seed=1)
    world = World(3, 4, seed=1)
    energy = edlm.ARResidual(ar, carry_over=True)
    args = dict(mask_id=3, n=2, steps=steps, log_partition="exact")
    draws = per_row(lambda x: edlm.joint_nelbo(world.denoiser, energy, x, **args), world.x0s, 6000)
    assert_mean(draws, -ar.log_prob(world.x0s).sum(-1))


def tiny(cls, seed=0, **kw):
    torch.manual_seed(seed)
    config = edlm.Config(**{**dict(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=8), **kw})
    net = cls(config).eval()
    with torch.no_grad():  # large weights: every part of the network matters to the output
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.7 if p.ndim > 1 else 0.3) + (p.ndim == 1) * p)
    return net


@pytest.mark.parametrize("kind", ["table", "network"])
@pytest.mark.parametrize("carry_over", [True, False])
def test_ar_residual_and_its_normaliser(kind, carry_over):
    """Every state of the world, in one batch and by mask: the energy equals its definition; the sum of
    mu exp(-E) over completions is 1 for coAR, and p_AR of the observed tokens for EDLM-AR."""
    V, L = 3, 4
    ar = TableAR(V, L, seed=3) if kind == "table" else tiny(edlm.AutoregressiveLM, vocab_size=V, block_size=L)
    world = co_ar_world(V, L, ar, seed=3, carry_over=carry_over)
    states = [s for s in map(world.state, torch.arange(world.size)) if s[0] == 1]
    x0 = [world.completions(s) for s in states]
    K = V ** (L - 1)
    padded = torch.stack([c[torch.arange(K) % len(c)] for c in x0])  # [B, K, L], repeated where fewer
    x_t = torch.stack(states)
    log_q = world.log_mu(padded, x_t[:, None].expand_as(padded))
    with torch.no_grad():
        energy = edlm.ARResidual(ar, carry_over=carry_over)
        E = energy(padded, x_t, log_q).double()
        close(E, world.energy_of(padded, x_t[:, None]))
        for S in subsets(range(1, L)):  # rows that differ in what they give, not where
            alike = ((x_t == V) == (masked(world, world.x0s[0], S) == V)).all(1)
            close(energy(padded[alike], x_t[alike], log_q[alike]), E[alike])
        for i, c in enumerate(x0):
            total = (log_q[i, : len(c)] - E[i, : len(c)]).exp().sum().item()
            z = 1.0 if carry_over else ar.log_prob(c).double().sum(-1).exp().sum().item()
            assert total == pytest.approx(z, rel=1e-4)


def test_nce_optimum_is_the_log_ratio():
    """Energy as a free table: the expected gradient of `nce_loss` is 0 at E = log mu - log q(x0 | x_t); one
    above it every cell is positive, one below negative (|t| < 7, 27 cells: false alarm 1e-7)."""
    V, L, batches = 3, 3, 64
    world = World(V, L, seed=9, scale=0.7)
    best = torch.zeros_like(world.E)
    possible = torch.zeros(world.size, world.size, dtype=torch.bool)
    for c in range(world.size):
        x_t = world.state(torch.tensor(c))
        keep = ((world.x0s == x_t) | (x_t == V)).all(1)
        if x_t[0] == 0 and (x_t[1:] == V).any():
            x0, q = world.x0s[keep], world.data[keep] / world.data[keep].sum()
            best[c, world.code(x0)] = world.log_mu(x0, x_t) - q.log()
            possible[c, world.code(x0)] = True

    def gradients(E):
        world.E = E.clone().requires_grad_()
        out = []
        for b in range(batches):
            torch.manual_seed(b)
            x0 = world.x0s[torch.multinomial(world.data, 2000, replacement=True)]
            loss = edlm.nce_loss(world.denoiser, world.energy, x0, mask_id=V)
            assert loss.shape == ()
            out.append(torch.autograd.grad(loss, world.E)[0])
        grads = torch.stack(out)
        assert (grads[:, ~possible] == 0).all()
        grads = grads[:, possible]
        return grads.mean(0) / (grads.std(0) / batches**0.5 + 1e-12)

    assert gradients(best).abs().max() < 7
    assert gradients(best + 1).min() > 7
    assert gradients(best - 1).max() < -7
    assert gradients(-best).abs().max() > 7  # an upside-down energy is not a stationary point


def test_estimators_refuse_wrong_arguments():
    """The bounds leave one draw out: n < 2 is a ValueError; so are an unknown log_partition and no steps."""
    world = World(2, 3, seed=0)
    a, x0 = (world.denoiser, world.energy), world.x0s
    for call in (
        lambda: edlm.log_partition_bounds(*a, world.start[None], mask_id=2, n=1),
        lambda: edlm.joint_nelbo(*a, x0, mask_id=2, n=1),
        lambda: edlm.chain_nelbo(*a, x0, mask_id=2, n=1),
        lambda: edlm.joint_nelbo(*a, x0, mask_id=2, n=2, log_partition="middle"),
        lambda: edlm.joint_nelbo(*a, x0, mask_id=2, n=2, steps=0),
        lambda: edlm.chain_nelbo(*a, x0, mask_id=2, n=2, steps=0),
    ):
        with pytest.raises(ValueError):
            call()


# --------------------------------------------------------------------------------------------------- networks


def all_sequences(V, L, bos=0):
    return torch.tensor([(bos, *rest) for rest in itertools.product(range(V), repeat=L - 1)])


@torch.no_grad()
def test_ar_log_prob_is_causal_and_normalised():
    """exp(sum of log_prob) adds up to 1 over all sequences, BOS costs nothing, and a changed token moves no
    earlier log-probability but its own and later ones."""
    ar = tiny(edlm.AutoregressiveLM, n_layer=2, n_head=2)
    x = all_sequences(3, 4)
    lp = ar.log_prob(x)
    assert (lp[:, 0] == 0).all()
    assert lp.double().sum(1).exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    for i in range(4):
        y = x.clone()
        y[:, i] = (y[:, i] + 1) % 3
        moved = (ar.log_prob(y) - lp).abs()
        assert (moved[:, :i] < 1e-6).all()
        assert (moved[:, max(i, 1) :].amax(0) > 1e-3).all()


@torch.no_grad()
def test_ar_sample_with_cache_has_the_law_of_log_prob():
    """Cached sampling from two different prompts of length 1 and one of length 2. False alarm 3e-6."""
    ar = tiny(edlm.AutoregressiveLM, n_layer=2, n_head=2)
    R = 20_000
    out = ar.sample(torch.tensor([[0], [1]]).repeat(R, 1), 4, generator=seeded(0))
    longer = ar.sample(torch.tensor([[2, 1]]).repeat(R, 1), 4, generator=seeded(1))
    assert out.shape == (2 * R, 4) and (longer[:, :2] == torch.tensor([2, 1])).all()
    for rows, prompt in ((out[0::2], [0]), (out[1::2], [1]), (longer, [2, 1])):
        x = all_sequences(3, 4, bos=prompt[0])
        x = x[(x[:, : len(prompt)] == torch.tensor(prompt)).all(1)]
        law = ar.log_prob(x)[:, len(prompt) :].double().sum(1).exp()
        code = (rows * 3 ** torch.arange(4)).sum(1)
        counts = torch.bincount(code, minlength=81)[(x * 3 ** torch.arange(4)).sum(1)]
        assert counts.sum() == R
        assert chi_square(counts, law / law.sum()) > RARE


@torch.no_grad()
def test_denoiser_projects_what_is_asked_and_no_more():
    """Logits are the rows `where` asks of an all-positions forward, row-major; the head sees no others; batch
    rows do not mix; every visible token moves a masked position (attention is bidirectional)."""
    net = tiny(edlm.Denoiser, n_layer=2, n_head=2)
    x_t = torch.tensor([[0, 3, 1, 3], [2, 3, 3, 3], [1, 0, 3, 2]])
    everywhere = net(x_t, torch.ones_like(x_t, dtype=torch.bool)).view(3, 4, 3)
    seen = []
    net.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    for seed in range(5):
        where = torch.rand(3, 4, generator=seeded(seed)) < 0.5
        close(net(x_t, where), everywhere[where])
        assert seen[-1] == where.sum()
    alone = torch.cat([net(x_t[i : i + 1], x_t[i : i + 1] == 3) for i in range(3)])
    close(alone, everywhere[x_t == 3])
    for i in (0, 1, 3):
        y = x_t[2:].clone()
        y[0, i] = (y[0, i] + 1) % 3
        assert (net(y, y == 3) - everywhere[2, 2]).abs().max() > 1e-3


def plain_forward(w, x, n_head, causal):
    """The whole network in numpy float64, one sequence, one position and one head at a time."""

    d = w["head.weight"].shape[1]

    def norm(h, name):
        h = (h - h.mean()) / np.sqrt(h.var() + 1e-5)
        return h * w[name + ".weight"] + w[name + ".bias"]

    def turn(v, position):  # half-split rotary: v[i] and v[i + D/2] are one complex number
        D = len(v)
        z = v[: D // 2] + 1j * v[D // 2 :]
        z = z * np.exp(1j * position * 10000.0 ** (-2 * np.arange(D // 2) / D))
        return np.concatenate([z.real, z.imag])

    hs = [w["transformer.embed.weight"][i] for i in x]
    layers = 1 + max(int(name.split(".")[2]) for name in w if ".blocks." in name)
    for b in (f"transformer.blocks.{i}." for i in range(layers)):
        qkv = [(w[b + "qkv.weight"] @ norm(h, b + "norm1")).reshape(3, n_head, d // n_head) for h in hs]
        out = []
        for i in range(len(x)):
            heads = []
            for a in range(n_head):
                js = range(i + 1) if causal else range(len(x))
                score = np.array([turn(qkv[i][0, a], i) @ turn(qkv[j][1, a], j) for j in js])
                p = np.exp((score - score.max()) / math.sqrt(d // n_head))
                heads.append(sum(pj * qkv[j][2, a] for pj, j in zip(p / p.sum(), js, strict=True)))
            h = hs[i] + w[b + "attn_out.weight"] @ np.concatenate(heads)
            m = w[b + "mlp_in.weight"] @ norm(h, b + "norm2") + w[b + "mlp_in.bias"]
            m = m / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3)))
            out.append(h + w[b + "mlp_out.weight"] @ m + w[b + "mlp_out.bias"])
        hs = out
    V = len(w["transformer.embed.weight"]) - 1  # the head has unused rows behind these
    return np.stack([w["head.weight"][:V] @ norm(h, "transformer.norm") + w["head.bias"][:V] for h in hs])


@torch.no_grad()
@pytest.mark.parametrize("cls", [edlm.Denoiser, edlm.AutoregressiveLM])
def test_transformer_equals_a_plain_forward(cls):
    """Rotary positions, norms, attention, GELU and head against a plain reimplementation, to 1e-5."""
    net = tiny(cls, vocab_size=5, block_size=7, n_layer=2, n_head=2, n_embd=12)
    weights = {name: value.double().numpy() for name, value in net.state_dict().items()}
    x = torch.tensor([[0, 5, 2, 4, 5, 1, 3], [1, 1, 5, 5, 5, 0, 2]])
    x = x if cls is edlm.Denoiser else x % 5
    causal = cls is edlm.AutoregressiveLM
    want = torch.tensor(np.stack([plain_forward(weights, row.tolist(), 2, causal) for row in x]))
    if not causal:
        got = net(x, torch.ones_like(x, dtype=torch.bool)).view(2, 7, 5)
    else:
        want = want.log_softmax(-1)[:, :-1].gather(-1, x[:, 1:, None])[..., 0]
        got = net.log_prob(x)[:, 1:]
    close(got.double(), want)


def test_nce_energy_judges_every_candidate_alone():
    """A candidate has the same energy in any company; the energy depends on x0 and on x_t at every position;
    one made from a denoiser starts at 0 and can be trained."""
    net = tiny(edlm.NCEResidual, n_layer=2, n_head=2)
    x_t = torch.tensor([[0, 3, 1, 3], [2, 3, 3, 3], [1, 0, 3, 2]])
    x0 = torch.where(x_t[:, None] == 3, torch.randint(3, (3, 6, 4), generator=seeded(0)), x_t[:, None])
    log_q = torch.zeros(3, 6)
    E = net(x0, x_t, log_q)
    alone = torch.stack([net(x0[b : b + 1, j : j + 1], x_t[b : b + 1], log_q[:1, :1])[0, 0]
                         for b in range(3) for j in range(6)])  # fmt: skip
    close(E, alone.view(3, 6))
    order = torch.randperm(6, generator=seeded(1))
    close(net(x0[:, order], x_t, log_q), E[:, order])
    for i in range(4):
        for which in (0, 1):
            pair = [x0.clone(), x_t.clone()]
            pair[which][..., i] = (pair[which][..., i] + 1) % 3
            assert (net(*pair, log_q) - E).abs().min() > 1e-6
    fresh = edlm.NCEResidual.from_denoiser(tiny(edlm.Denoiser))
    assert (fresh(x0, x_t, log_q) == 0).all()
    edlm.nce_loss(tiny(edlm.Denoiser, 1), fresh, x0[:, 0], mask_id=3).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in fresh.parameters())


def test_nce_loss_trains_the_energy_only_against_a_frozen_denoiser():
    """No gradient reaches the denoiser, and one left in training mode (dropout on) is refused."""
    denoiser = tiny(edlm.Denoiser, dropout=0.5)
    energy = tiny(edlm.NCEResidual, 1)
    x0 = torch.randint(3, (8, 4), generator=seeded(0))
    edlm.nce_loss(denoiser, energy, x0, mask_id=3).backward()
    assert all(p.grad is None for p in denoiser.parameters())
    with pytest.raises(ValueError):
        edlm.nce_loss(denoiser.train(), energy, x0, mask_id=3)


def test_chunks_change_nothing(monkeypatch):
    """Projection, cumulative sums and energies done in pieces of one give the same numbers and gradients."""
    ar, denoiser = tiny(edlm.AutoregressiveLM, n_layer=2), tiny(edlm.Denoiser)
    energy, x = edlm.ARResidual(ar), torch.tensor([[0, 3, 3, 3], [1, 3, 0, 3], [2, 3, 3, 1]])

    def results(max_tokens):
        args = dict(mask_id=3, steps=3, energy=energy, k=5, generator=seeded(0), max_tokens=max_tokens)
        drawn = edlm.sample(denoiser, x, **args)
        ar.zero_grad()
        log_p = ar.log_prob(x % 3)
        log_p.sum().backward()
        torch.manual_seed(0)
        chain = edlm.chain_nelbo(denoiser, energy, x % 3, mask_id=3, n=3, steps=4)
        return [drawn, log_p.detach(), chain, *(p.grad.clone() for p in ar.parameters())]

    whole = results(10**6)
    monkeypatch.setattr(edlm, "MAX_TOKENS", 1)
    monkeypatch.setattr(edlm, "elements_at_once", lambda device: 1)
    for a, b in zip(whole, results(1), strict=True):
        close(a, b)


def test_log_prob_of_a_vocabulary_in_pieces(monkeypatch):
    """Values and gradients of log p are those of one softmax over all of V, whatever is held at once."""
    torch.manual_seed(0)
    ar = edlm.AutoregressiveLM(edlm.Config(200, 6, 1, 2, 8)).double()
    ar.head.bias.data.normal_()
    hidden, target = torch.randn(30, 8, dtype=torch.float64, requires_grad=True), torch.randint(0, 200, (30,))
    cotangent, results = torch.randn(30, dtype=torch.float64), []
    for pieces in (0, 1, 3, 4):
        if pieces:
            at_once = 30 * (-(-200 // pieces) + 63)
            monkeypatch.setattr(edlm, "elements_at_once", lambda device, at_once=at_once: at_once)
            log_p = ar._project(hidden, target)
        else:
            log_p = ar.head(hidden).log_softmax(dim=1).gather(1, target[:, None])[:, 0]
        gradients = torch.autograd.grad((log_p * cotangent).sum(), [hidden, ar.head.weight, ar.head.bias])
        results.append([log_p.detach(), *gradients])
    for other in results[1:]:
        for got, true in zip(other, results[0], strict=True):
            close(got, true)
    assert ar._project(hidden[:0], target[:0]).shape == (0,)
    assert (ar._project(hidden, target.clamp(min=200)) == -math.inf).all()  # no word of the vocabulary


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.parameters:
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("energy", ["ar", "coar", "nce"])
def test_many_candidates_need_no_larger_tensor_than_one(energy, monkeypatch):
    """64 candidates never make anything larger than the one [N, V] tensor of logits that a single one needs."""
    config = edlm.Config(3000, 16, 1, 2, 8)
    torch.manual_seed(0)
    ar, denoiser = edlm.AutoregressiveLM(config).eval(), edlm.Denoiser(config).eval()
    energy = edlm.NCEResidual.from_denoiser(denoiser) if energy == "nce" else edlm.ARResidual(ar, energy == "coar")
    monkeypatch.setattr(edlm, "elements_at_once", lambda device: 2 * 15 * 3000)
    x = torch.full((2, 16), 3000)
    x[:, 0] = 0
    for k in (1, 64):
        with Largest() as largest:
            largest.parameters = {p.untyped_storage().data_ptr() for m in (ar, denoiser) for p in m.parameters()}
            edlm.sample(denoiser, x, mask_id=3000, steps=2, energy=energy, k=k, max_tokens=64)
        assert largest.numbers <= 2 * 15 * 3008


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the operations after which a CPU must wait for a GPU: those whose result's size or use depends on data."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        indices = [a for a in args[1] if a is not None] if name in ("index", "index_put", "index_put_") else []
        if name in ("nonzero", "masked_select", "_local_scalar_dense", "masked_scatter_backward") or any(
            index.dtype == torch.bool for index in indices
        ):
            self.seen.add(name)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_training_step_never_waits_for_the_device(stage):
    """No operation of forward and backward needs a number back from the GPU. (Sampling does, at every event.)"""
    config = edlm.Config(70, 12, 1, 2, 16)
    denoiser = edlm.Denoiser(config).eval().requires_grad_(stage == "denoiser")
    energy = edlm.NCEResidual.from_denoiser(denoiser)
    net = dict(denoiser=denoiser, ar=edlm.AutoregressiveLM(config), energy=energy)[stage]
    x0 = torch.randint(0, 70, (5, 12))
    with Waits() as waits:
        train.training_loss(stage, net, denoiser, x0).backward()
    assert all(p.grad is not None for p in net.parameters()) and not waits.seen
    with Waits() as waits:
        denoiser(x0, x0 < 9)
    assert waits.seen == {"nonzero"}  # the mode sees what it is there to see


# =======================================================================================================
# 2. Data: toy language, tokenizers, shards, archives, downloads
# =======================================================================================================

SHARED = Path(__file__).parent.parent / "shared"


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Waiting for the disk guards against power cuts, which are not tested, and takes most of the time."""
    monkeypatch.setattr(data.os, "fsync", lambda descriptor: None)


# ------------------------------------------------------------------------------------------------
# Toy language


def test_toy_language_is_a_distribution_with_the_stated_entropy():
    probabilities = [math.exp(data.toy_log_prob(story)) for story in data.toy_language()]
    assert math.fsum(probabilities) == pytest.approx(1, abs=1e-12)
    # The entropy again, from the sizes of the choice sets alone: the template, and each of its slots.
    size = {slot: len(values) for slot, values in data.TOY_SLOTS.items()} | {"friend": 5}
    slots = [
        {field for field in re.findall(r"{(\w+)}", template) if field in size}
        for template in data.TOY_TEMPLATES
    ]
    n = len(data.TOY_TEMPLATES)
    expected = math.log(n) + sum(math.log(size[slot]) for chosen in slots for slot in chosen) / n
    assert n >= 3 and data.toy_entropy() == pytest.approx(expected, abs=1e-9)
    # No two choices make the same story: as many stories as choices.
    assert len(data.toy_language()) == sum(math.prod(size[slot] for slot in chosen) for chosen in slots)
    assert 3 <= min(size.values()) and max(size.values()) <= 6


def test_toy_stories_follow_the_language():
    stories = data.toy_stories(30000, seed=1)
    assert stories == data.toy_stories(30000, seed=1) != data.toy_stories(30000, seed=2)
    templates = Counter(
        next(w for w in (" gives ", " shows ", " sells ") if w in s) for s in stories
    )
    assert len(templates) == 3 and all(abs(n / 30000 - 1 / 3) < 0.02 for n in templates.values())
    assert -np.mean([data.toy_log_prob(story) for story in stories]) == pytest.approx(
        data.toy_entropy(), abs=0.03
    )


def test_toy_validity_notices_every_broken_agreement():
    good = "ben has a black boat. he gives it to ann today. she likes the black boat."
    assert data.toy_is_valid(good) and data.toy_log_prob(good) == pytest.approx(-math.log(3 * 6 * 5 * 4 * 4))
    for wrong, right in [
        ("he ", "she "),
        ("gives", "sells"),
        ("likes", "keeps"),
        ("she", "he"),
        ("ann", "ben"),
        ("the black", "the red"),
    ]:
        assert not data.toy_is_valid(good.replace(wrong, right, 1)), (wrong, right)
    for bad in ("", good + " ", good[:-1], good + " " + good, good.capitalize()):
        assert data.toy_log_prob(bad) == -math.inf and not data.toy_is_valid(bad)


def test_every_toy_story_has_the_same_length_and_round_trips():
    tokenizer = data.get_tokenizer("toy")
    for story in itertools.islice(data.toy_language(), 0, None, 7):
        ids = data.encode(tokenizer, story)
        assert len(ids) == data.TOY_LENGTH and data.decode(tokenizer, ids) == story
    assert [tokenizer.decode([i]) for i in data.encode(tokenizer, "ben has a black boat.")] == [
        "ben", " has", " a", " black", " boat", ".",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("name, size", [("bytes", 257), ("text8", 28)])
def test_small_tokenizers(name, size):
    tokenizer = data.get_tokenizer(name)
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (size, size - 1)
    text = (
        "the quick brown fox jumps over the lazy dog"
        if name == "text8"
        else "Häß\n\n 世界 <|endoftext|> \0" * 99
    )
    ids = data.encode(tokenizer, text)
    assert len(ids) == len(text.encode()) and data.decode(tokenizer, ids) == text
    assert data.decode(tokenizer, [tokenizer.eot_token, *ids, size]) == text + "_"


def test_masks_and_broken_characters_are_shown():
    toy, raw = data.get_tokenizer("toy"), data.get_tokenizer("bytes")
    ids = data.encode(toy, "ben has a")
    eot, mask = toy.eot_token, toy.n_vocab
    assert data.decode(toy, torch.tensor([eot, *ids, mask, mask, eot])) == "ben has a ___ ___"
    assert data.decode(toy, [mask, *ids[1:]]) == "___ has a"
    assert data.decode(raw, [104, 257, 105, 256, 0xC3]) == "h_i\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "name, text, culprit",
    [
        ("toy", "ben has a yacht.", "' yacht'"),
        ("toy", "Ben has", "'Ben'"),
        ("toy", "ben  has", "' '"),
        ("toy", "ben has ", "' '"),
        ("text8", "Hello", "'H'"),
        ("text8", "a\n", r"'\n'"),
        ("bytes", "\ud800", "Unicode"),
    ],
)
def test_text_that_cannot_be_encoded_is_refused_by_name(name, text, culprit):
    with pytest.raises(ValueError, match=re.escape(culprit)) as error:
        data.encode(data.get_tokenizer(name), text)
    assert "\n" not in str(error.value)


def test_unknown_tokenizer_and_gpt2_without_network(monkeypatch):
    with pytest.raises(ValueError, match="choose one of gpt2, bytes, toy, text8"):
        data.get_tokenizer("gpt3")

    def offline(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(data.tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR") as error:
        data.get_tokenizer.__wrapped__("gpt2")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------
# Shards and blocks


def make_folder(folder, tokens, shard_tokens, name="bytes"):
    splits = {"train": np.asarray(tokens, dtype=data.TOKEN), "val": np.asarray(tokens[:50], dtype=data.TOKEN)}
    data.write_splits(folder, data.get_tokenizer(name), "test", splits, {"train": 1, "val": 1}, shard_tokens)
    return folder


@pytest.mark.parametrize("shard_tokens", [1, 7, 30, 1000])
def test_shards_round_trip_with_blocks_that_span_them(tmp_path, shard_tokens):
    tokens = np.random.default_rng(0).integers(0, 256, 200)
    blocks = data.Blocks(make_folder(tmp_path / "d", tokens, shard_tokens), "train", 32)
    assert (blocks.tokenizer, blocks.vocab_size, blocks.eot, len(blocks)) == ("bytes", 257, 256, 6)
    for i, block in enumerate(blocks):
        assert block.dtype == torch.int64 and block.tolist() == [256, *tokens[i * 30 : (i + 1) * 30], 256]
    assert len(list((tmp_path / "d").glob("train_*.bin"))) == math.ceil(200 / shard_tokens)
    header = np.fromfile(tmp_path / "d" / "train_000000.bin", "<i4", 256)
    assert header[:3].tolist() == [20240520, 1, min(200, shard_tokens)] and not header[3:].any()


def test_blocks_work_in_dataloader_workers_and_pickle_small(tmp_path):
    blocks = data.Blocks(make_folder(tmp_path / "d", np.arange(60000) % 256, 20000), "train", 32)
    blocks[0]
    assert len(pickle.dumps(blocks)) < 5000
    order = data.BatchOrder(len(blocks), 8, 4, seed=0)
    loaded = list(itertools.islice(DataLoader(blocks, batch_sampler=order, num_workers=2), 6))
    expected = [torch.stack([blocks[i] for i in batch]) for batch in itertools.islice(order, 6)]
    assert all(torch.equal(a, b) for a, b in zip(loaded, expected, strict=True))


def damage_cut(folder):
    file = folder / "train_000001.bin"
    file.write_bytes(file.read_bytes()[:-1])


def damage_foreign(folder):
    (folder / "train_000001.bin").write_bytes(b"\x89PNG" + bytes(3000))


def damage_empty(folder):
    (folder / "train_000001.bin").write_bytes(b"")


def damage_lost(folder):
    (folder / "train_000001.bin").unlink()


def damage_meta(folder):
    (folder / "meta.json").write_text('{"tokenizer": ')


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_cut, "train_000001.bin is damaged"),
        (damage_foreign, "train_000001.bin is not a token shard"),
        (damage_empty, "train_000001.bin is not a token shard"),
        (damage_lost, "lacks shards"),
        (damage_meta, "meta.json is damaged"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    folder = make_folder(tmp_path / "d", np.arange(200), 70)
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        data.Blocks(folder, "train", 32)
    assert "\n" not in str(error.value)


def test_blocks_say_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="python data.py"):
        data.Blocks(tmp_path / "nowhere", "train", 32)
    with pytest.raises(FileNotFoundError, match="python data.py"):
        data.Blocks(tmp_path, "train", 32)
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match="progress.json is damaged"):
        data.begin(tmp_path, {})
    with pytest.raises(ValueError, match="unfinished"):
        data.Blocks(tmp_path, "train", 32)
    folder = make_folder(tmp_path / "d", np.arange(200), 70)
    with pytest.raises(ValueError, match="50 val tokens, too few for one block of 53"):
        data.Blocks(folder, "val", 53)
    assert len(data.Blocks(folder, "val", 52)) == 1
    with pytest.raises(ValueError, match="at least 3"):
        data.Blocks(folder, "val", 2)
    with pytest.raises(FileNotFoundError, match="no test shards"):
        data.Blocks(folder, "test", 32)
    foreign = data.Blocks(make_folder(tmp_path / "e", np.full(100, 999), 70), "train", 32)
    with pytest.raises(ValueError, match="token 999, but bytes ends at 256"):
        foreign[0]


def test_nanogpt_folders_are_read(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 100).astype("<u2")
    tokens.tofile(tmp_path / "train.bin")
    blocks = data.Blocks(tmp_path, "train", 12)
    assert (blocks.tokenizer, blocks.vocab_size, blocks.eot, len(blocks)) == ("gpt2", 50257, 50256, 10)
    assert blocks[9].tolist() == [50256, *tokens[90:], 50256]


def test_toy_shards_hold_one_story_per_block(tmp_path):
    meta = data.make_toy(tmp_path / "toy", n_train=300, n_val=40, seed=3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()}
    assert data.make_toy(tmp_path / "toy", n_train=300, n_val=40, seed=3) == meta
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()}
    assert (meta["train_documents"], meta["val_tokens"], meta["separator"]) == (300, 40 * 19, False)
    blocks = data.Blocks(tmp_path / "toy", "train", data.TOY_LENGTH + 2)
    tokenizer = data.get_tokenizer("toy")
    assert [data.decode(tokenizer, block) for block in blocks] == data.toy_stories(340, 3)[:300]
    with pytest.raises(ValueError, match="block_size of 21, not 32"):
        data.Blocks(tmp_path / "toy", "train", 32)
    with pytest.raises(ValueError, match="holds other data"):
        data.make_toy(tmp_path / "toy", seed=4)


# ------------------------------------------------------------------------------------------------
# Batch order


def first(order, n):
    return list(itertools.islice(order, n))


def test_batch_order_is_a_permutation_per_epoch():
    batches = first(data.BatchOrder(23, 4, 4, seed=0), 10)  # 5 steps per epoch, 3 blocks left out
    for epoch in (batches[:5], batches[5:]):
        seen = [i for batch in epoch for i in batch]
        assert len(set(seen)) == 20 and set(seen) <= set(range(23))
    assert batches[:5] != batches[5:]
    assert (
        batches
        == first(data.BatchOrder(23, 4, 4, seed=0), 10)
        != first(data.BatchOrder(23, 4, 4, seed=1), 10)
    )


@pytest.mark.parametrize("step", [1, 4, 5, 12])
def test_batch_order_resumes_at_any_step(step):
    whole = first(data.BatchOrder(23, 4, 2, seed=0), 40)
    assert first(data.BatchOrder(23, 4, 2, seed=0, start_step=step), 8) == whole[2 * step : 2 * step + 8]


def test_batch_order_gives_ranks_what_one_process_would_see():
    alone = first(data.BatchOrder(100, 24, 4, seed=5), 24)  # 6 micro-batches per step
    for world in (2, 3, 6):
        ranks = [
            first(data.BatchOrder(100, 24, 4, seed=5, rank=r, world=world), 24 // world) for r in range(world)
        ]
        assert [batch for together in zip(*ranks, strict=True) for batch in together] == alone


def test_batch_order_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="only 3 blocks"):
        data.BatchOrder(3, 4, 4, seed=0)
    for batch, micro, world in [(4, 3, 1), (4, 4, 2), (0, 1, 1), (4, 0, 1)]:
        with pytest.raises(ValueError, match="not a multiple"):
            data.BatchOrder(100, batch, micro, seed=0, world=world)


# ------------------------------------------------------------------------------------------------
# Text files as blocks


def test_text_blocks_of_txt_and_jsonl(tmp_path):
    raw = data.get_tokenizer("bytes")
    (tmp_path / "a.txt").write_text("abcdefghij\n")
    assert data.text_blocks(tmp_path / "a.txt", raw, 7).tolist() == [
        [256, *b"abcde", 256],
        [256, *b"fghij", 256],
    ]
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n\n{"text": "de", "id": 1}\n')
    assert data.text_blocks(tmp_path / "a.jsonl", raw, 9).tolist() == [[256, *b"abc", 256, *b"de", 256, 256]]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b" \n", "is empty"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.txt", b"abc", "3 tokens, too few for one block of 8"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "abc"}\n{"text": 3}\n', "line 2"),
        ("a.jsonl", b'{"text": "abc"}\n\n{"txt": ""}\n', "line 3"),
        ("a.jsonl", b'{"text": "abc"', "line 1"),
        ("a.jsonl", b"[1]", "line 1"),
    ],
)
def test_text_blocks_refuse_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        data.text_blocks(tmp_path / name, data.get_tokenizer("bytes"), 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, tokenised, text",
    [
        (
            "wikitext",
            " = = Life = = \n a two @-@ part role , 1 @,@ 000",
            "== Life ==\na two-part role, 1,000",
        ),
        ("wikitext", 'the " Teddy \'s Story " ( 24 in ) .', 'the "Teddy\'s Story" (24 in).'),
        ("wikitext", "he didn 't say <unk> ; $ 5", "he didn't say <unk>; $5"),
        ("ptb", "it did n't rise N % to $ N in <unk>", "it didn't rise 1% to $1 in ?"),
        ("ptb", "the boys ' game \\/ it 's on", "the boys' game / it's on"),
        ("lm1b", 'He said , " I do n\'t know . "', 'He said, "I don\'t know."'),
        ("lm1b", "see http : / / a.com ( now ) -- it 's 5 % !", "see http://a.com (now) -- it's 5%!"),
    ],
)
def test_detokenizers(name, tokenised, text):
    assert data.DETOKENIZERS[name](tokenised) == text
    assert data.DETOKENIZERS[name](text) == text


# ------------------------------------------------------------------------------------------------
# Sources


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def member_xz(texts, prefix="0"):
    return lzma.compress(tar_of({f"{prefix}-{i}.txt": text for i, text in enumerate(texts)}))


def texts_of(n, seed=0):
    rng = np.random.default_rng(seed)
    return [bytes(rng.integers(97, 123, rng.integers(1, 60)).astype(np.uint8)) for _ in range(n)]


def write_archive(path, members):
    path.write_bytes(tar_of({f"openwebtext/m{i}_data.xz": member for i, member in enumerate(members)}))
    return str(path)


def read_archives(*paths, start=(0, 0, 0)):
    return list(data.archive_documents(paths.__getitem__, len(paths), start))


def test_all_openwebtext_layouts_give_the_same_documents(tmp_path):
    texts = texts_of(12)
    members = [member_xz(texts[:5]), member_xz(texts[5:])]
    outer = Path(write_archive(tmp_path / "a.tar", members))
    (tmp_path / "a.tar.xz").write_bytes(lzma.compress(outer.read_bytes()))
    (tmp_path / "m.xz").write_bytes(member_xz(texts))
    raw = tar_of({"a.txt": b"one", "b.txt": b"two"})
    (tmp_path / "two.xz").write_bytes(lzma.compress(raw[:700]) + lzma.compress(raw[700:]))  # two xz streams
    for name in ("a.tar", "a.tar.xz", "m.xz"):
        assert [text.encode() for _, text in read_archives(tmp_path / name)] == texts
    assert [text for _, text in read_archives(tmp_path / "two.xz")] == ["one", "two"]


def test_documents_are_cleaned_and_places_resume(tmp_path):
    members = [member_xz([b" a\n\n\n\n\nb\n\nc\n", b"\n\n", "é".encode()]), member_xz([b"x", b"y"])]
    path = write_archive(tmp_path / "a.tar", members)
    documents = read_archives(path, path)
    assert [text for _, text in documents] == ["a\n\nb\n\nc", "é", "x", "y"] * 2
    for i, (place, _) in enumerate(documents):
        assert read_archives(path, path, start=place) == documents[i:]


def test_damaged_members_are_skipped_and_counted(tmp_path, capsys):
    good, texts = member_xz([b"good"]), texts_of(400)
    whole = member_xz(texts)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    bad = [
        whole[: len(whole) // 2],
        bytes(flipped),
        b"not xz at all" * 99,
        member_xz([b"fine", b"\xff\xfe"]),
        b"",
    ]
    path = write_archive(tmp_path / "a.tar", [good, *bad, good])
    documents = [text for _, text in read_archives(path)]
    assert documents[0] == documents[-1] == "good" and "fine" in documents
    assert documents.count(None) == 5
    report = capsys.readouterr().err
    assert report.count("skipped") == 5 and all(f"m{i}_data.xz" in report for i in range(1, 6))
    data.main(["openwebtext", path, "--out", str(tmp_path / "o"), "--tokenizer", "bytes", "--val_docs", "1"])
    assert data.read_meta(tmp_path / "o")["skipped"] == 5
    assert "5 damaged pieces skipped" in capsys.readouterr().out


def cut(n):
    return lambda raw: raw[:n]


def spoil_header(raw):
    second = raw.index(b"openwebtext/m1")
    return raw[:second] + b"\xff" * 512 + raw[second + 512 :]


@pytest.mark.parametrize(
    "spoil, compress",
    [
        (lambda raw: b"<html>404</html>" * 100, False),
        (lambda raw: b"", False),
        (lambda raw: tar_of({"readme.md": b"hello"}), False),
        (spoil_header, False),
        (cut(1024 + 300), False),
        (cut(2048), False),  # exactly between two members
        (cut(2500), False),
        (lambda raw: lzma.compress(raw)[:-200], True),
        (lambda raw: lzma.compress(raw)[:300] + b"\0" * 50 + lzma.compress(raw)[350:], True),
    ],
)
def test_damaged_archives_are_errors_that_name_them(tmp_path, spoil, compress):
    raw = Path(
        write_archive(tmp_path / "a.tar", [member_xz(texts_of(9, seed)) for seed in range(3)])
    ).read_bytes()
    (tmp_path / "bad.tar").write_bytes(spoil(raw))
    with pytest.raises(ValueError, match="bad.tar") as error:
        read_archives(tmp_path / "bad.tar")
    assert "\n" not in str(error.value)


def test_text_files_are_split_into_documents(tmp_path):
    (tmp_path / "blank.txt").write_text("one\nstill one\n \n\n  two\n\n\n")
    (tmp_path / "marked.txt").write_text("a\n\nb<|endoftext|>c<|endoftext|>\n<|endoftext|>d")
    paths = [tmp_path / "blank.txt", tmp_path / "marked.txt"]
    documents = list(data.text_documents(paths))
    assert [text for _, text in documents] == ["one\nstill one", "two", "a\n\nb", "c", "d"]
    for i, (place, _) in enumerate(documents):
        assert list(data.text_documents(paths, place)) == documents[i:]


@pytest.mark.skipif(
    not (SHARED / "owt_layout").exists(), reason="the sample archives are not beside the repository"
)
def test_the_real_archives(tmp_path):
    paths = sorted((SHARED / "owt_layout").glob("*.tar"))
    documents = read_archives(*paths)
    assert len(documents) > 1000 and all(text and text == text.strip() for _, text in documents)
    with tarfile.open(paths[-1]) as outer:
        last = outer.extractfile(outer.getnames()[-1])
        with tarfile.open(fileobj=last, mode="r:xz") as inner:
            expected = inner.extractfile(inner.getmembers()[-1]).read().decode()
    assert re.sub(r"\n\n\n+", "\n\n", expected).strip() == documents[-1][1]


# ------------------------------------------------------------------------------------------------
# Preparation


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_prepared_shards_hold_the_documents_in_order(tmp_path):
    texts = texts_of(50)
    path = write_archive(tmp_path / "a.tar", [member_xz(texts[:20]), member_xz(texts[20:])])
    data.main(
        ["openwebtext", path, "--out", str(tmp_path / "o"), "--tokenizer", "bytes", "--val_docs", "7"]
        + ["--shard_tokens", "100"]
    )
    meta = data.read_meta(tmp_path / "o")
    stream = {"train": [*texts[:43]], "val": [*texts[43:]]}
    for split, documents in stream.items():
        expected = [token for text in documents for token in [*text, 256]]
        shards = sorted((tmp_path / "o").glob(f"{split}_*.bin"))
        found = np.concatenate([np.fromfile(shard, "<u2", offset=1024) for shard in shards])
        assert found.tolist() == expected
        assert (meta[f"{split}_tokens"], meta[f"{split}_documents"]) == (len(expected), len(documents))
        assert all(data.shard_length(shard) == 100 for shard in shards[:-1])
    assert meta["complete"] and meta["separator"] and not list((tmp_path / "o").glob("*.tmp"))
    assert not (tmp_path / "o" / "progress.json").exists()


class Killed(BaseException):
    """Stands for SIGKILL: no handler of data.py catches it, and nothing is cleaned up after it."""


@pytest.mark.parametrize("shard_tokens, val_docs", [(100, 7), (40, 30), (500, 1)])
def test_killed_at_any_rename_the_second_run_ends_with_the_same_bytes(
    tmp_path, monkeypatch, shard_tokens, val_docs
):
    texts = texts_of(60)
    members = [member_xz(texts[:15]), member_xz(texts[15:40])[:-60], member_xz([b"\xff", *texts[40:]])]
    archives = [write_archive(tmp_path / f"{name}.tar", members) for name in "ab"]
    options = dict(tokenizer="bytes", val_docs=val_docs, shard_tokens=shard_tokens, base_url="", keep=False)
    data.prepare_openwebtext(archives, tmp_path / "whole", **options)
    whole = contents(tmp_path / "whole")
    assert json.loads(whole["meta.json"])["skipped"] == 4

    real, renames, deadline = data.os.replace, [], math.inf

    def replace(source, target):
        renames.append(target)
        if len(renames) > deadline:
            raise Killed
        real(source, target)

    monkeypatch.setattr(data.os, "replace", replace)
    data.prepare_openwebtext(archives, tmp_path / "count", **options)
    n = len(renames)  # every shard, every progress.json, meta.json
    for point in sorted({0, 1, 2, *range(3, n, max(1, n // 4)), n - 2, n - 1}):
        out = tmp_path / f"killed{point}"
        renames, deadline = [], point
        with pytest.raises(Killed):
            data.prepare_openwebtext(archives, out, **options)
        assert not (out / "meta.json").exists()
        deadline = math.inf
        data.prepare_openwebtext(archives, out, **options)
        assert contents(out) == whole, point


def test_a_resumed_run_does_not_start_over(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n\n".join(text.decode() for text in texts_of(200)))
    options = dict(tokenizer="bytes", val_docs=5, shard_tokens=300)
    real, saved = data.write_json, []

    def write_json(path, value):
        real(path, value)
        saved.append(value)
        if value.get("shards") == 10:
            raise Killed

    monkeypatch.setattr(data, "write_json", write_json)
    with pytest.raises(Killed):
        data.prepare_text([tmp_path / "a.txt"], tmp_path / "o", **options)
    monkeypatch.setattr(data, "write_json", real)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").glob("train_*.bin")}
    encoded = []
    encode_array = data.encode_array
    monkeypatch.setattr(data, "encode_array", lambda t, text: encoded.append(text) or encode_array(t, text))
    meta = data.prepare_text([tmp_path / "a.txt"], tmp_path / "o", **options)
    assert len(encoded) == 200 - saved[-1]["documents"] < 150 and meta["train_documents"] == 195
    assert len(written) == 10
    assert all((tmp_path / "o" / name).stat().st_mtime_ns == when for name, when in written.items())


def test_other_settings_or_sources_are_refused_after_an_interruption(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n\n".join([name * 9] * 90))
    options = dict(tokenizer="bytes", val_docs=5, shard_tokens=100)
    monkeypatch.setattr(data, "complete", lambda *args, **more: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        data.prepare_text([tmp_path / "a.txt"], tmp_path / "o", **options)
    monkeypatch.undo()
    before = contents(tmp_path / "o")
    for change in (dict(val_docs=6), dict(shard_tokens=99)):
        with pytest.raises(ValueError, match=f"unfinished run with another {next(iter(change))}"):
            data.prepare_text([tmp_path / "a.txt"], tmp_path / "o", **options | change)
    with pytest.raises(ValueError, match="another source"):
        data.prepare_text([tmp_path / "b.txt"], tmp_path / "o", **options)
    assert contents(tmp_path / "o") == before


def test_a_mistake_before_the_first_shard_can_be_mended(tmp_path, capsys):
    (tmp_path / "bad.tar").write_text("no archive")
    good = write_archive(tmp_path / "a.tar", [member_xz(texts_of(9))])
    common = ["--out", str(tmp_path / "o"), "--tokenizer", "bytes"]
    error_of(capsys, "openwebtext", tmp_path / "bad.tar", *common)
    error_of(capsys, "openwebtext", good, *common)  # 100,000 validation documents
    data.main(["openwebtext", good, *common, "--val_docs", "2"])
    assert data.read_meta(tmp_path / "o")["train_documents"] == 7


def test_tokenisation_keeps_order_and_agrees_with_encode():
    tokenizer = data.get_tokenizer("bytes")
    texts = [text.decode() * 50 for text in texts_of(300)]
    texts[7] = None
    result = list(data.tokenize((((0, 0, i), text) for i, text in enumerate(texts)), tokenizer))
    assert [place[2] for place, _ in result] == list(range(300))
    for text, (_, tokens) in zip(texts, result, strict=True):
        assert tokens is None if text is None else tokens.tolist() == [*data.encode(tokenizer, text), 256]


def test_text8_is_split_by_character(tmp_path, capsys):
    text = "".join(np.random.default_rng(0).choice(list(data.TEXT8_CHARACTERS), 1000))
    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
        archive.writestr("text8", text)
    (tmp_path / "text8").write_text(text + "\n")
    for name in ("text8", "text8.zip"):
        data.main(
            ["text8", str(tmp_path / name), "--out", str(tmp_path / f"{name}-out"), "--shard_tokens", "300"]
        )
        found = ""
        for split, n in (("train", 900), ("val", 50), ("test", 50)):
            blocks = data.Blocks(tmp_path / f"{name}-out", split, 52)
            assert len(blocks) == n // 50
            found += "".join(data.decode(data.get_tokenizer("text8"), block) for block in blocks)
        assert found == text
    (tmp_path / "bad").write_text("Hello there " * 9)
    with pytest.raises(ValueError, match="0x48 at 0"):
        data.prepare_text8([tmp_path / "bad"], tmp_path / "o", shard_tokens=9, base_url="", keep=False)
    whole = (tmp_path / "text8.zip").read_bytes()
    (tmp_path / "spoilt.zip").write_bytes(whole[:60] + bytes([whole[60] ^ 255]) + whole[61:])
    with pytest.raises(ValueError, match="spoilt.zip is damaged"):
        data.prepare_text8([tmp_path / "spoilt.zip"], tmp_path / "o", shard_tokens=9, base_url="", keep=False)


# ------------------------------------------------------------------------------------------------
# Download


@pytest.fixture
def server(monkeypatch):
    """A local HTTP server: `files` are what it serves, `faults` what goes wrong with the next requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            fault = self.server.faults.pop(0) if self.server.faults else None
            body = self.server.files.get(self.path)
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            self.server.requests.append((self.path, int(wanted[1]) if wanted else 0))
            if body is None or isinstance(fault, int):
                return self.send_error(fault or 404)
            start = int(wanted[1]) if wanted and self.server.ranges else 0
            if wanted and start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                return self.end_headers()
            self.send_response(206 if wanted and self.server.ranges else 200)
            if wanted and self.server.ranges:
                start -= 100 * (fault == "elsewhere")
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            rest = body[start:]
            self.wfile.write(rest[: len(rest) // 2] if fault == "cut" else b"" if fault == "drop" else rest)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.faults, server.requests, server.ranges = {}, [], [], True
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(data, "RETRY_DELAYS", (0, 0, 0))
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


BODY = np.random.default_rng(0).bytes(200_000)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("faults", [[], ["cut"], ["drop", "cut"], [500, "cut", 503], ["cut", "elsewhere"]])
def test_download_survives_bad_connections(tmp_path, server, faults, ranges):
    server.files["/a.tar"], server.faults, server.ranges = BODY, list(faults), ranges
    path = data.download(f"{server.url}/a.tar", tmp_path)
    assert path.read_bytes() == BODY and [p.name for p in tmp_path.iterdir()] == ["a.tar"]
    if ranges and faults == ["cut"]:
        assert server.requests == [("/a.tar", 0), ("/a.tar", 100_000)]
    n = len(server.requests)
    assert data.download(f"{server.url}/a.tar", tmp_path) == path and len(server.requests) == n


def test_download_continues_a_part_after_a_restart(tmp_path, server):
    server.files["/a.tar"] = BODY
    (tmp_path / "a.tar.part").write_bytes(BODY[:150_000])
    assert data.download(f"{server.url}/a.tar", tmp_path).read_bytes() == BODY
    assert server.requests == [("/a.tar", 150_000)]


@pytest.mark.parametrize("part", [BODY, BODY + b"too long"])
def test_download_with_a_part_that_is_whole_or_too_long(tmp_path, server, part):
    server.files["/a.tar"] = BODY
    (tmp_path / "a.tar.part").write_bytes(part)
    assert data.download(f"{server.url}/a.tar", tmp_path).read_bytes() == BODY


def test_download_counts_failures_afresh_when_the_file_grows(tmp_path, server):
    server.files["/a.tar"], server.faults = BODY, ["cut"] * 9
    assert data.download(f"{server.url}/a.tar", tmp_path / "r").read_bytes() == BODY
    server.ranges, server.faults = False, ["cut"] * 9  # always the same half: no progress
    with pytest.raises(OSError, match="the connection ended at 100000 of 200000 bytes"):
        data.download(f"{server.url}/a.tar", tmp_path / "n")
    assert len(server.requests) == 10 + 4


def test_a_full_disk_is_not_the_network(tmp_path, server, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    server.files["/a.tar"] = BODY
    monkeypatch.setattr(data.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        data.download(f"{server.url}/a.tar", tmp_path)
    assert len(server.requests) == 1


def test_download_gives_up_in_one_line(tmp_path, server):
    server.files["/a.tar"] = BODY
    with pytest.raises(OSError, match="404.*--base_url"):
        data.download(f"{server.url}/b.tar", tmp_path)
    assert len(server.requests) == 1  # asking again would not help
    server.faults = ["cut"] + [500] * 9
    with pytest.raises(OSError, match="500.*run again to continue"):
        data.download(f"{server.url}/a.tar", tmp_path)
    assert (tmp_path / "a.tar.part").stat().st_size == 100_000 and not (tmp_path / "a.tar").exists()
    assert len(server.requests) == 1 + 4


def test_openwebtext_downloads_and_deletes_as_it_goes(tmp_path, server, monkeypatch, capsys):
    texts = texts_of(60)
    monkeypatch.setattr(data, "OWT_ARCHIVES", ["s0.tar", "s1.tar", "s2.tar"])
    paths = [
        write_archive(tmp_path / f"s{i}.tar", [member_xz(texts[20 * i : 20 * i + 20])]) for i in range(3)
    ]
    server.files = {f"/s{i}.tar": Path(path).read_bytes() for i, path in enumerate(paths)}
    server.faults = ["cut", 500]
    options = ["--tokenizer", "bytes", "--val_docs", "3", "--shard_tokens", "100"]
    seen = []
    real = data.download
    monkeypatch.setattr(
        data,
        "download",
        lambda url, folder: seen.append(sorted(p.name for p in folder.glob("*"))) or real(url, folder),
    )
    out = tmp_path / "o"
    data.main(["openwebtext", "--base_url", server.url, "--out", str(out), *options])
    assert not list((out / "download").iterdir())
    data.main(["openwebtext", "--base_url", server.url, "--out", str(tmp_path / "k"), "--keep", *options])
    assert sorted(p.name for p in (tmp_path / "k" / "download").iterdir()) == ["s0.tar", "s1.tar", "s2.tar"]
    data.main(["openwebtext", *paths, "--out", str(tmp_path / "local"), *options])
    for name, content in contents(tmp_path / "local").items():
        if name != "meta.json":
            assert (out / name).read_bytes() == content == (tmp_path / "k" / name).read_bytes()
    assert data.Blocks(out, "val", 10).meta["source"] == ["s0.tar", "s1.tar", "s2.tar"]


# ------------------------------------------------------------------------------------------------
# Command line


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        data.main([str(arg) for arg in argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    lines = [line for line in re.split(r"[\r\n]+", error) if line and not line.startswith("tokenising:")]
    assert len(lines) == 1 and lines[0].startswith("data.py: error: "), error
    return lines[0]


def test_command_line_errors_are_one_line_and_change_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("one\n\ntwo\n")
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes(b"caf\xe9\n\nx\n\ny\n")
    Path("not.tar").write_text("hello" * 999)
    Path("foreign").mkdir()
    Path("foreign/train_000000.bin").write_bytes(b"precious")
    before = contents("foreign")
    raw = ("--tokenizer", "bytes")
    for argv, message in [
        (["--val_doc", 3], "--val_doc"),
        (["--nonsense"], "--nonsense"),
        (["two.txt", "--tokenizer", "toy"], "toy"),
        (["toy", "--val_docs", 3], "--val_docs does not apply to toy"),
        (["text8", "--tokenizer", "bytes"], "--tokenizer does not apply to text8"),
        (["toy", "two.txt"], "two.txt"),
        (["nowhere.txt"], "no such file: nowhere.txt"),
        (["two.txt", "--val_docs", "many"], "many"),
        (["two.txt", *raw, "--val_docs", 2], "only 2 document"),
        (["two.txt", *raw, "--val_docs", 0], "at least 1"),
        (["two.txt", *raw, "--shard_tokens", 0], "at least 1"),
        (["empty.txt", *raw], "only 0 document"),
        (["latin.txt", *raw], "latin.txt is not UTF-8"),
        (["openwebtext", "not.tar", *raw], "not.tar is damaged"),
        (["text8", "two.txt", "--out", "t8"], "two.txt is not text8"),
        (["two.txt", *raw, "--out", "foreign"], "another origin"),
        (["toy", "--out", "foreign"], "another origin"),
    ]:
        assert message in error_of(capsys, *argv), argv
    assert contents("foreign") == before


def test_command_line_makes_data_and_never_overwrites_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main([])
    out = capsys.readouterr().out
    assert "20,000" in out and out.endswith("next: python train.py\n")
    data.main(["toy"])  # quietly used again
    Path("mine.txt").write_text("\n\n".join("abcdefghijklmnopqrst"))
    data.main(["mine.txt", "--tokenizer", "bytes"])
    assert capsys.readouterr().out.split("next: ")[-1].startswith("python train.py --data data/mine --block_size")
    meta = data.read_meta("data/mine")
    assert (meta["train_documents"], meta["val_documents"], meta["tokenizer"]) == (18, 2, "bytes")
    before = contents("data/mine")
    assert "complete already" in error_of(capsys, "mine.txt", "--tokenizer", "bytes")
    assert contents("data/mine") == before


# =======================================================================================================
# 3. The scripts, as a user meets them
# =======================================================================================================

ROOT = Path(__file__).parent
SMALL = "--n_layer 1 --n_embd 16 --n_head 2 --batch_size 8 --max_steps 4 --warmup_steps 2 --eval_blocks 16".split()
SMALL += "--log_every 1 --save_every 2 --eval_every 2 --device cpu".split()
STORY = next(iter(data.toy_language()))
WORDS = STORY.split(" ")
TEXT = "the cat sat on the mat, and the dog sat on the log. it was warm; nobody moved.\n\n"


# ------------------------------------------------------------------------------------------------
# What the tests share


@pytest.fixture(scope="session")
def small_toy(tmp_path_factory):
    """A folder of toy shards, a hundredth of the usual size."""
    folder = tmp_path_factory.mktemp("small") / "toy"
    data.make_toy(folder, n_train=200, n_val=40)
    return folder


@pytest.fixture(scope="session")
def small_bytes(tmp_path_factory):
    """A folder of byte shards."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "text.txt").write_text(TEXT * 40)
    data.prepare_text([folder / "text.txt"], folder / "bytes", tokenizer="bytes", val_docs=None, shard_tokens=10**6)
    return folder / "bytes"


def flags(folder, out, *more):
    return ["--data", str(folder), "--out", str(out), *SMALL, *map(str, more)]


@pytest.fixture(scope="session")
def toy_out(small_toy, tmp_path_factory):
    """All three stages, trained for four steps on the toy language. To be copied, not changed."""
    out = tmp_path_factory.mktemp("trained") / "toy"
    train.main(flags(small_toy, out))
    return out


@pytest.fixture(scope="session")
def bytes_out(small_bytes, tmp_path_factory):
    """All three stages, trained for four steps on bytes."""
    out = tmp_path_factory.mktemp("trained") / "bytes"
    train.main(flags(small_bytes, out, "--block_size", 32))
    return out


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_dir(here, toy_out, small_toy):
    """A working folder with a copy of the trained run in out/toy and of its data in data/small."""
    shutil.copytree(toy_out, here / "out/toy")
    shutil.copytree(small_toy, here / "data/small")
    return here


def call(script, argv):
    """Exit code of a script called as the command line calls it."""
    main = {"train.py": train.main, "sample.py": sample.main, "data.py": data.main}[script]
    try:
        data.run(script, functools.partial(main, [str(word) for word in argv]))
    except SystemExit as stop:
        return stop.code
    return 0


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


@pytest.fixture
def refused(here, capsys):
    """refused(script, argv, words): one plain line on stderr that has the words, exit code 2, nothing changed."""

    def check(script, argv, words):
        before = snapshot(here)
        capsys.readouterr()
        code = call(script, shlex.split(argv) if isinstance(argv, str) else argv)
        error = capsys.readouterr().err
        assert code == 2, (argv, error)
        assert error.startswith(f"{script}: error: ") and error.count("\n") == 1 and error.endswith("\n"), error
        assert re.search(words, error), error
        assert snapshot(here) == before, argv

    return check


def rows_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def timeless(rows):
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def assert_same(a, b, path="checkpoint"):
    """Bit-identical checkpoints, settings that say where and how they were made aside."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"settings"}:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def assert_same_run(a, b, *stages):
    """Two folders hold the same log and the same weights, optimiser states and all."""
    assert timeless(rows_of(a)) == timeless(rows_of(b))
    for stage in stages:
        assert_same(*(torch.load(out / f"{stage}.pt", weights_only=True) for out in (a, b)))


# ------------------------------------------------------------------------------------------------
# Mistakes: one plain line, exit code 2, nothing changed


SAMPLE_MISTAKES = [
    ("--stepz 4", "unrecognized arguments: --stepz"),
    ("--k 0", "--k: must be at least 1, not 0"),
    ("--steps 0", "--steps: must be at least 1, not 0"),
    ("--steps four", "--steps"),
    ("--steps 4,8", "list only with --compare"),
    ("--window 1.5", "--window: must be between 0 and 1"),
    ("--window -0.1", "--window: must be between 0 and 1"),
    ("--window nan", "--window: must be between 0 and 1"),
    ("--num 0", "--num: must be at least 1"),
    ("--num 2,3", "--num is one number"),
    ("--batch 0", "--batch: must be at least 1"),
    ("--batch 2,3", "list only with --bench"),
    ("--seed -1", "--seed"),
    (f"--seed {2**70}", "--seed"),
    ("--device banana", "no device 'banana'.*cpu"),
    ("--device cpu:x", "device"),
    ("--energy best", "--energy"),
    ("--model ar --energy nce", "neither --infill nor --energy"),
    ("--prompt ben --infill ___", "exclude each other"),
    ("--compare --infill ___", "--compare.*--infill"),
    ("--judge gpt2", "--judge.*--compare"),
    ("--prompt xyzzy", "no word 'xyzzy'"),
    ("--infill 'xyzzy ___'", "no word 'xyzzy'"),
    (["--infill", STORY], "no gap"),
    ("--infill '___*20'", "block holds 19"),
    (["--prompt", WORDS[0] + f" {WORDS[1]}" * 24], "prompt has 25 tokens.*holds 20"),
    ("--json nowhere/figures.json", "nowhere/figures.json"),
    ("--json out", "cannot write out"),
    ("--bench huge", "--bench"),
    ("--bench --steps 4,8", "list only with --compare"),
    ("--bench --window 0.5", "--bench measures.*--window 1"),
]


@pytest.mark.parametrize("argv, words", SAMPLE_MISTAKES, ids=str)
def test_sample_refuses_in_one_line(run_dir, refused, argv, words):
    refused("sample.py", argv, words)


TRAIN_MISTAKES = [
    ("--stepz 4", "unrecognized arguments"),
    ("--preset imagenet", "--preset.*imagenet.*toy"),
    ("--stage all,ar", "--stage"),
    ("--n_layer 1.5", "--n_layer"),
    *((f"--{name} 0", f"--{name} must be at least 1") for name in ("batch_size", "n_layer", "n_embd", "n_head")),
    ("--block_size 0", "--block_size must be at least 1"),
    ("--block_size 22", "block_size of 21"),
    ("--denoiser_steps 0", "--denoiser_steps must be at least 1"),
    ("--max_steps -1", "--max_steps"),
    ("--micro_batch -4", "--micro_batch"),
    ("--micro_batch 3", "batch_size 8 is not a multiple of micro_batch 3"),
    ("--batch_size 1000", "200 blocks, fewer than one batch of 1000"),
    ("--n_embd 15", "n_embd 15 must be a multiple"),
    ("--n_head 3", "n_embd 16 must be a multiple of 2 \\* n_head = 6"),
    ("--dropout 1.5", "--dropout"),
    ("--dropout nan", "--dropout"),
    ("--lr -1", "--lr"),
    ("--lr nan", "--lr"),
    ("--lr fast", "--lr"),
    ("--weight_decay -1", "--weight_decay"),
    ("--grad_clip 0", "--grad_clip"),
    ("--ema 1", "--ema"),
    ("--seed -3", "--seed"),
    ("--device banana", "no device"),
    ("--resume --overwrite", "one of them"),
    ("--stage energy", "run python train.py first"),
    ("--eval", "no checkpoint new/denoiser.pt: run python train.py first"),
    ("--eval --n 1", "--n must be at least 2"),
    ("--eval --chain_steps -1", "--chain_steps"),
    ("--eval --json nowhere/table.json", "nowhere/table.json"),
    ("--bench --json nowhere/table.json", "nowhere/table.json"),
    ("--data nothing", "no token shards in nothing: run `python data.py`"),
]


@pytest.mark.parametrize("argv, words", TRAIN_MISTAKES, ids=str)
def test_train_refuses_in_one_line(run_dir, refused, argv, words):
    refused("train.py", [*flags("data/small", "new"), *shlex.split(argv)], words)


def test_an_existing_run_is_not_overwritten(run_dir, refused):
    refused("train.py", flags("data/small", "out/toy"), "--resume.*--overwrite.*--out")
    refused("train.py", flags("data/small", "out/toy", "--stage", "ar"), "ar.pt is there already")
    refused("train.py", flags("data/small", "out/toy", "--resume", "--lr", 1), "trained with --lr 0[.0-9]+, not 1.0")
    refused("train.py", flags("data/small", "out/toy", "--resume", "--micro_batch", 4), "--micro_batch 8, not 4")


def test_no_checkpoint_yet(here, refused):
    refused("sample.py", "", "no checkpoint out/toy/denoiser.pt: run python train.py first")
    refused("sample.py", "--model ar", "no checkpoint out/toy/ar.pt: run python train.py first")
    refused("train.py", "--eval", "no checkpoint out/toy/denoiser.pt: run python train.py first")


@pytest.mark.parametrize("name", ["ar", "nce"])
def test_an_energy_that_was_not_trained(run_dir, refused, name):
    stage = edlm.ENERGIES[name][0]
    (run_dir / f"out/toy/{stage}.pt").unlink()
    (run_dir / f"out/toy/{stage}.previous.pt").unlink()
    refused("sample.py", f"--energy {name}", f"no checkpoint out/toy/{stage}.pt: run python train.py first")
    evaluate = flags("data/small", "out/toy", "--eval", "--energy", name)
    refused("train.py", evaluate, f"no checkpoint out/toy/{stage}.pt: run python train.py first")


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a checkpoint"])
def test_a_damaged_checkpoint(run_dir, refused, damage):
    path = run_dir / "out/toy/denoiser.pt"
    path.write_bytes(damage(path.read_bytes()))
    refused("sample.py", "", "out/toy/denoiser.pt is damaged")
    refused("train.py", flags("data/small", "out/toy", "--eval"), "out/toy/denoiser.pt is damaged")
    path.with_name("denoiser.previous.pt").unlink()
    refused("train.py", flags("data/small", "out/toy", "--resume"), "out/toy/denoiser.pt is damaged")


def test_a_checkpoint_of_another_tokenizer(run_dir, refused, small_bytes):
    argv = flags(small_bytes, "out/toy", "--block_size", 21)
    refused("train.py", [*argv, "--eval"], "holds bytes tokens, the checkpoints in out/toy need toy")
    refused("train.py", [*argv, "--resume"], "denoiser.pt belongs to another tokenizer|knows .* tokens|trained")
    for stage in ("ar.pt", "energy.pt", "ar.previous.pt", "energy.previous.pt"):
        (run_dir / "out/toy" / stage).unlink()
    refused("train.py", [*argv, "--stage", "energy"], "train a denoiser on this data first")
    other = edlm.AutoregressiveLM(edlm.Config(28, 21, 1, 2, 16))
    edlm.save_checkpoint(run_dir / "out/toy/ar.pt", other, tokenizer="text8")
    refused("sample.py", "--energy ar", "train both on the same data")


def test_same_vocabulary_but_another_tokenizer(run_dir, refused):
    """The name counts, not only the number of tokens."""
    model, content = edlm.load_checkpoint(run_dir / "out/toy/denoiser.pt")
    edlm.save_checkpoint(run_dir / "out/toy/denoiser.pt", model, tokenizer="text8", training=content["training"])
    for name in ("ar.pt", "energy.pt", "ar.previous.pt", "energy.previous.pt", "denoiser.previous.pt"):
        (run_dir / "out/toy" / name).unlink()
    refused("train.py", flags("data/small", "out/toy", "--eval"), "toy tokens.*need text8")
    refused("train.py", flags("data/small", "out/toy", "--resume"), "another tokenizer")
    refused("train.py", flags("data/small", "out/toy", "--stage", "energy"), "text8")


def test_bad_data_folders(run_dir, refused):
    (run_dir / "empty").mkdir()
    refused("train.py", flags("empty", "new"), "no token shards in empty: run `python data.py`")
    shard = run_dir / "data/small/train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused("train.py", flags("data/small", "new"), "train_000000.bin is damaged")


def test_an_energy_of_another_denoiser(run_dir, refused, small_toy):
    assert call("train.py", flags(small_toy, "out/toy", "--stage", "denoiser", "--overwrite", "--seed", 1)) == 0
    message = "energy.pt belongs to another denoiser: train it anew with --stage energy --overwrite"
    refused("sample.py", "--energy nce", message)
    refused("train.py", flags(small_toy, "out/toy", "--eval"), message)
    # The same settings, but other data: the energy is not continued against a denoiser that it never saw.
    shutil.copy(run_dir / "out/toy/energy.pt", run_dir / "energy.pt")
    content = torch.load(run_dir / "energy.pt", weights_only=True)
    content["training"]["settings"]["seed"] = 1
    torch.save(content, run_dir / "out/toy/energy.pt")
    resume = flags(small_toy, "out/toy", "--resume", "--stage", "energy", "--seed", 1)
    refused("train.py", resume, "another denoiser .*--stage energy --overwrite")


def test_text_files_that_cannot_be_evaluated(run_dir, refused):
    (run_dir / "empty.txt").write_text(" \n")
    (run_dir / "short.txt").write_text(" ".join(WORDS[:3]))
    (run_dir / "strange.txt").write_text("the quick brown fox " * 30)
    (run_dir / "bad.jsonl").write_text(json.dumps(dict(text=STORY)) + "\nnot json\n")
    for name, words in (("empty.txt", "is empty"), ("short.txt", "too few for one block of 21"),
                        ("strange.txt", "no word"), ("bad.jsonl", "line 2"),
                        ("missing.txt", "missing.txt")):  # fmt: skip
        refused("train.py", ["--eval", "--data", name, "--out", "out/toy", "--device", "cpu"], words)


def test_judges_that_cannot_be_loaded(run_dir, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("sample.py", "--compare --judge gpt2-large", "pip install transformers")

    def unreachable(name):
        raise OSError("cannot find it\nin many\nlines")

    auto = types.SimpleNamespace(from_pretrained=unreachable)
    fake = types.SimpleNamespace(AutoTokenizer=auto, AutoModelForCausalLM=auto)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    refused("sample.py", "--compare --judge nobody/nothing", "could not load 'nobody/nothing' .cannot find it.$")


def test_gpt2_without_a_network(run_dir, refused, monkeypatch):
    import requests
    import tiktoken.registry

    def no_network(*args, **kwargs):
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "get", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    (run_dir / "cache").mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(run_dir / "cache"))
    edlm.save_checkpoint(run_dir / "out/denoiser.pt", edlm.Denoiser(edlm.Config(50257, 8, 1, 1, 2)), tokenizer="gpt2")
    (run_dir / "my.txt").write_text(TEXT * 10)
    data.get_tokenizer.cache_clear()
    try:
        refused("sample.py", "--out out --energy none", "TIKTOKEN_CACHE_DIR")
        refused("train.py", "--eval --out out --data my.txt", "TIKTOKEN_CACHE_DIR")
        refused("data.py", "my.txt", "TIKTOKEN_CACHE_DIR")
    finally:
        data.get_tokenizer.cache_clear()


@pytest.mark.parametrize("script", ["train.py", "sample.py", "data.py"])
def test_help_is_readable(script, here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert call(script, ["--help"]) == 0
    text = capsys.readouterr().out
    assert f"python {script}" in text and max(map(len, text.splitlines())) <= 120
    if script == "train.py":
        assert all(f"{name}={value}" in text for name, value in train.PRESETS["owt"].items())


# ------------------------------------------------------------------------------------------------
# Killed and resumed. A helper process imports torch once and forks for every run.

SIGNAL_AT = """
def signal_at(module, name, n, number=signal.SIGKILL, before=lambda *args, **kwargs: None):
    real, calls = getattr(module, name), []
    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            before(*args, **kwargs)
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)
    setattr(module, name, patched)
"""
ZYGOTE = f"""
import json, os, signal, sys, traceback
sys.path.insert(0, sys.argv[1])
import torch
import torch._dynamo  # the optimisers import it when first used, which takes longer than a small run
import data, edlm, train

torch.set_num_threads(1)
{SIGNAL_AT}
for line in sys.stdin:
    argv, patch, output = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(2, 1)
            sys.argv[1:] = argv
            exec(patch)
            data.run("train.py", train.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def zygote():
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    process = subprocess.Popen([sys.executable, "-c", ZYGOTE, str(ROOT)], env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def launch(zygote, tmp_path):
    """launch(argv, patch): (exit code, screen) of train.py in a process of its own, with `patch` run before."""

    def start(argv, patch=""):
        zygote.stdin.write(json.dumps([[str(word) for word in argv], patch, str(tmp_path / "screen")]) + "\n")
        zygote.stdin.flush()
        code = int(zygote.stdout.readline())
        return code, (tmp_path / "screen").read_text()

    return start


RESUMABLE = ["--max_steps", 6, "--dropout", 0.1]


@pytest.fixture(scope="session")
def uninterrupted(zygote, small_toy, tmp_path_factory):
    """The denoiser and the energy trained without a break, in the helper process like all that are compared."""
    out = tmp_path_factory.mktemp("uninterrupted")
    for stage in ("denoiser", "energy"):
        argv = flags(small_toy, out, "--stage", stage, *RESUMABLE)
        zygote.stdin.write(json.dumps([argv, "", str(out / "screen")]) + "\n")
        zygote.stdin.flush()
        assert zygote.stdout.readline() == "0\n", (out / "screen").read_text()
    return out


def only(out, folder, stage):
    """A copy of a run with one stage alone."""
    folder.mkdir(exist_ok=True)
    shutil.copy(out / f"{stage}.pt", folder)
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["stage"] == stage))
    return folder


HALF_A_CHECKPOINT = """
import io
def half(content, file):
    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
save = torch.save
signal_at(torch, "save", 2, before=half)
"""
HALF_A_ROW = """
def half(s, rank, **row):
    with open(train.log_path(s), "a") as file:
        file.write(json.dumps(row)[:20])
signal_at(train, "write_log", 5, before=half)
"""
# Saves rename three files, the first save two: NAME.tmp -> fresh, newest -> previous, fresh -> newest.
KILLS = {
    "before any checkpoint": "signal_at(train, 'write_log', 2)",
    "after a checkpoint": "signal_at(train, 'write_log', 6)",
    "in a row of the log": HALF_A_ROW,
    "in a checkpoint": HALF_A_CHECKPOINT,
    "before the checkpoint is on the disk": "signal_at(os, 'fsync', 4)",
    "first checkpoint, before it has its name": "signal_at(os, 'replace', 2)",
    "before the first rename": "signal_at(os, 'replace', 3)",
    "before the second rename": "signal_at(os, 'replace', 4)",
    "between newest and previous": "signal_at(os, 'replace', 5)",
    "in the last save": "signal_at(os, 'replace', 8)",
    "in validation": "signal_at(train, 'validation_loss', 2)",
}


@pytest.mark.parametrize("when", KILLS)
def test_killed_and_resumed_is_bit_identical(when, launch, small_toy, uninterrupted, tmp_path):
    argv = flags(small_toy, tmp_path / "run", "--stage", "denoiser", *RESUMABLE)
    code, screen = launch(argv, KILLS[when])
    assert code == -9, screen
    if (tmp_path / "run/denoiser.previous.pt").exists():  # once there was a checkpoint, there always is one
        edlm.load_checkpoint(tmp_path / "run/denoiser.pt")
    code, screen = launch([*argv, "--resume"])
    assert code == 0, screen
    assert_same_run(tmp_path / "run", only(uninterrupted, tmp_path / "expected", "denoiser"), "denoiser")


def test_without_hard_links_a_kill_between_two_renames_is_mended(launch, small_toy, uninterrupted, tmp_path):
    argv = flags(small_toy, tmp_path / "run", "--stage", "denoiser", *RESUMABLE)
    no_links = "def link(*names): raise OSError('not supported')\nos.link = link\n"
    assert launch(argv, no_links + "signal_at(os, 'replace', 5)")[0] == -9
    assert not (tmp_path / "run/denoiser.pt").exists()
    code, screen = launch([*argv, "--resume"], no_links)
    assert code == 0 and re.search("denoiser.pt is missing.*resuming from .*denoiser.previous.pt", screen), screen
    assert_same_run(tmp_path / "run", only(uninterrupted, tmp_path / "expected", "denoiser"), "denoiser")


def test_other_data_is_not_resumed(run_dir, refused):
    for n_train, seed in ((220, 0), (200, 1)):
        data.make_toy(f"data/{n_train}-{seed}", n_train=n_train, n_val=40, seed=seed)
        refused("train.py", flags(f"data/{n_train}-{seed}", "out/toy", "--resume"), "belongs to another corpus")


def test_killed_energy_is_bit_identical(launch, small_toy, uninterrupted, tmp_path):
    out = only(uninterrupted, tmp_path / "run", "denoiser")
    argv = flags(small_toy, out, "--stage", "energy", *RESUMABLE)
    assert launch(argv, "signal_at(train, 'write_log', 5)")[0] == -9
    assert launch([*argv, "--resume"])[0] == 0
    assert_same_run(out, uninterrupted, "denoiser", "energy")


def test_a_damaged_newest_checkpoint_falls_back(launch, small_toy, uninterrupted, tmp_path):
    argv = flags(small_toy, tmp_path / "run", "--stage", "denoiser", *RESUMABLE)
    assert launch(argv, "signal_at(train, 'write_log', 8)")[0] == -9
    newest = tmp_path / "run/denoiser.pt"
    assert torch.load(newest, weights_only=True)["training"]["step"] == 4
    newest.write_bytes(newest.read_bytes()[:5000])
    code, screen = launch([*argv, "--resume"])
    assert code == 0 and re.search("denoiser.pt is damaged.*resuming from .*denoiser.previous.pt", screen), screen
    assert_same_run(tmp_path / "run", only(uninterrupted, tmp_path / "expected", "denoiser"), "denoiser")


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_save_and_say_how_to_go_on(name, code, launch, small_toy, uninterrupted, tmp_path):
    argv = flags(small_toy, tmp_path / "run", "--stage", "denoiser", *RESUMABLE)
    got, screen = launch([*argv, "--overwrite"], f"signal_at(train, 'write_log', 4, signal.{name})")
    assert got == code and "Traceback" not in screen, screen
    steps = torch.load(tmp_path / "run/denoiser.pt", weights_only=True)["training"]["step"]
    assert 0 < steps < 6
    again = re.search("stopped and saved; go on with: python train.py (.*)", screen)[1]
    got, screen = launch(shlex.split(again))
    assert got == 0, screen
    assert_same_run(tmp_path / "run", only(uninterrupted, tmp_path / "expected", "denoiser"), "denoiser")


@pytest.mark.parametrize("error", ["RuntimeError('PytorchStreamWriter failed')", "OSError(28, 'No space left')"])
def test_a_full_disk_leaves_the_old_checkpoint(error, launch, small_toy, uninterrupted, tmp_path):
    patch = f"""
save, calls = torch.save, []
def full(content, file):
    calls.append(1)
    if len(calls) == 2:
        file.write(b"some")
        raise {error}
    save(content, file)
torch.save = full
"""
    argv = flags(small_toy, tmp_path / "run", "--stage", "denoiser", *RESUMABLE)
    code, screen = launch(argv, patch)
    assert code == 2 and "Traceback" not in screen
    assert re.search("train.py: error: could not write .*denoiser", screen.splitlines()[-1]), screen
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"denoiser.pt", "log.jsonl"}
    assert edlm.load_checkpoint(tmp_path / "run/denoiser.pt")[1]["training"]["step"] == 2
    assert launch([*argv, "--resume"])[0] == 0
    assert_same_run(tmp_path / "run", only(uninterrupted, tmp_path / "expected", "denoiser"), "denoiser")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_and_keeps_the_last_good_checkpoint(what, launch, small_toy, tmp_path):
    # the square root of 0 is 0 but has no slope: a finite loss with a gradient that is not a number
    no_slope = "value + (sum(p.sum() for p in net.parameters()) * 0).sqrt()"
    broken = {"loss": "value * float('nan')", "gradient": no_slope}[what]
    patch = f"""
real, calls = train.training_loss, []
def broken(stage, net, denoiser, x0):
    value = real(stage, net, denoiser, x0)
    calls.append(net.training)
    return {broken} if sum(calls) == 4 and net.training else value
train.training_loss = broken
"""
    code, screen = launch(flags(small_toy, tmp_path / "run", "--stage", "denoiser", *RESUMABLE), patch)
    assert code == 2 and "Traceback" not in screen
    assert re.search("nan at step 4; the last good checkpoint is kept", screen.splitlines()[-1]), screen
    model, checkpoint = edlm.load_checkpoint(tmp_path / "run/denoiser.pt")
    assert checkpoint["training"]["step"] == 2 and all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------
# Two processes


def torchrun(argv, patch=""):
    """Two processes of train.py, with `patch` run in both before; the ended torchrun."""
    script = f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport data, edlm, train\n"
    script += f"rank = int(os.environ['RANK'])\n{SIGNAL_AT}\n{patch}\ndata.run('train.py', train.main)\n"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    command += [sys.executable, "-c", script, *argv]
    return subprocess.run(command, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True)


def assert_nearly_same_run(a, b, tolerance, stages=train.STAGES):
    """Two folders hold the same log and weights, but for the order in which numbers were summed."""
    one, two = rows_of(a), rows_of(b)
    assert [(row["stage"], row["step"], row.keys()) for row in two] == [(r["stage"], r["step"], r.keys()) for r in one]
    for row, other in zip(one, two, strict=True):
        for key in row.keys() & {"loss", "val_loss", "grad_norm", "lr", "tokens"}:
            assert row[key] == pytest.approx(other[key], rel=tolerance), (row, other)
    for stage in stages:
        weights, others = (torch.load(out / f"{stage}.pt", weights_only=True)["weights"] for out in (a, b))
        for name in weights:
            torch.testing.assert_close(weights[name], others[name], rtol=0, atol=tolerance)


# Muon rounds to bf16 inside, which makes a difference in the last bit of a float32 sum larger.
@pytest.mark.parametrize("optimizer, micro_batch, tolerance", [("adamw", 2, 1e-5), ("muon", 4, 3e-4)])
def test_two_processes_do_what_one_does(optimizer, micro_batch, tolerance, launch, small_toy, tmp_path):
    def argv(name):
        more = ("--optimizer", optimizer, "--micro_batch", micro_batch, "--dropout", 0.1)
        return flags(small_toy, tmp_path / name, *more)

    ended = torchrun(argv("two"))
    assert ended.returncode == 0, ended.stderr
    assert launch(argv("one"))[0] == 0
    # Only one process writes: no row twice, no file that the other run has not.
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}
    assert ended.stdout.count("perplexity") == 1
    assert_nearly_same_run(tmp_path / "one", tmp_path / "two", tolerance)


def test_a_signal_stops_all_processes_and_they_resume(launch, small_toy, tmp_path):
    """SIGTERM for one of them: all stop after the same step, one saves, and the resumed run is the same run."""

    def argv(name):
        more = ("--stage", "denoiser", "--optimizer", "adamw", "--micro_batch", 2)
        return flags(small_toy, tmp_path / name, *more)

    ended = torchrun(argv("stopped"), "if rank == 1: signal_at(train, 'learning_rate', 3, signal.SIGTERM)")
    assert ended.returncode != 0 and "stopped and saved; go on with: torchrun" in ended.stderr, ended.stderr
    assert torch.load(tmp_path / "stopped/denoiser.pt", weights_only=True)["training"]["step"] == 3
    ended = torchrun([*argv("stopped"), "--resume"])
    assert ended.returncode == 0 and launch(argv("whole"))[0] == 0, ended.stderr
    assert_nearly_same_run(tmp_path / "stopped", tmp_path / "whole", 1e-5, ["denoiser"])


def test_a_dead_process_ends_the_other_with_a_message(small_toy, tmp_path):
    dies = "if rank == 1: signal_at(train, 'learning_rate', 4)"
    ended = torchrun(flags(small_toy, tmp_path / "run", "--stage", "denoiser", "--micro_batch", 2), dies)
    assert ended.returncode != 0
    assert re.search("rank 0: cannot go on.*another process ended.*--resume", ended.stderr), ended.stderr
    assert torch.load(tmp_path / "run/denoiser.pt", weights_only=True)["training"]["step"] == 2


def test_compiled_training_does_not_recompile(small_toy, tmp_path, monkeypatch, capsys):
    """The number of masked tokens varies from step to step, and no graph depends on it. (Compiled to itself: what
    a compiler would make of the graphs takes long and is not ours to test.)"""
    compiling = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **how: compiling(net, backend="eager", **how))
    monkeypatch.setattr(train, "can_compile", lambda device: True)
    counts = []
    for steps in (2, 5):
        torch._dynamo.reset()
        train.main(flags(small_toy, tmp_path / str(steps), "--compile", "--max_steps", steps))
        graphs = re.findall(r"(\w+): (\d+) compiled graphs", capsys.readouterr().out)
        assert [stage for stage, _ in graphs] == list(train.STAGES)
        assert all(1 <= int(n) <= 4 for _, n in graphs), graphs  # forward and backward, two networks at most
        counts.append(graphs)
    assert counts[0] == counts[1]


def test_without_a_compiler_training_goes_on(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nmany lines")

    monkeypatch.setattr(torch, "compile", broken)
    assert not train.can_compile(torch.device("cpu"))
    assert "does not work here (no C++ compiler): going on without it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "cuda", "cuda:1"])
def test_the_gpu_that_was_asked_for(name, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    device = data.pick_device(name)
    assert chosen == [device] and device == torch.device("cuda", 1 if name == "cuda:1" else 0)


# ------------------------------------------------------------------------------------------------
# What training writes


def test_log_rows(toy_out):
    rows = rows_of(toy_out)
    for stage in train.STAGES:
        steps = [row for row in rows if row["stage"] == stage and "loss" in row]
        assert [row["step"] for row in steps] == [1, 2, 3, 4]
        for row in steps:
            assert row.keys() == {"stage", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"}
            assert row["tokens"] == row["step"] * 8 * 21 and row["grad_norm"] > 0 and row["tokens_per_second"] > 0
        # warm-up of two steps, then a cosine that would reach 0 at step 4
        peak = train.PRESETS["toy"]["energy_lr" if stage == "energy" else "lr"]
        assert [row["lr"] / peak for row in steps] == pytest.approx([0.5, 1, 1, 0.5])
        held_out = [row for row in rows if row["stage"] == stage and "val_loss" in row]
        assert [row["step"] for row in held_out] == [2, 4]
    # near the start: uniform guesses of words, and no idea of what is real
    uniform = math.log(data.get_tokenizer("toy").n_vocab)
    first = {row["stage"]: row["loss"] for row in reversed(rows) if "loss" in row}
    assert first["ar"] == pytest.approx(uniform, rel=0.05) and first["energy"] == pytest.approx(2 * math.log(2))


def test_validation_is_on_fixed_masks_and_leaves_the_random_state(toy_out, small_toy):
    model, _ = edlm.load_checkpoint(toy_out / "denoiser.pt")
    s = train.parse(flags(small_toy, "unused"))
    blocks = data.Blocks(small_toy, "val", 21)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = train.validation_loss("denoiser", model, None, blocks, s, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
    assert a == train.validation_loss("denoiser", model, None, blocks, s, torch.device("cpu"))
    # It is also the last row of the log: what is saved for use is the weight average that was evaluated.
    last = [row["val_loss"] for row in rows_of(toy_out) if row["stage"] == "denoiser" and "val_loss" in row][-1]
    assert a == pytest.approx(last, rel=1e-5)


def test_what_is_saved_for_use_is_the_average(toy_out):
    checkpoint = torch.load(toy_out / "denoiser.pt", weights_only=True)
    vocab = data.get_tokenizer("toy").n_vocab
    shape = dict(vocab_size=vocab, block_size=21, n_layer=1, n_head=2, n_embd=16)
    assert checkpoint["config"] == dict(shape, dropout=train.PRESETS["toy"]["dropout"])
    weights, model = checkpoint["weights"], checkpoint["training"]["model"]
    assert weights.keys() == model.keys()
    assert not torch.equal(weights["transformer.embed.weight"], model["transformer.embed.weight"])


def test_the_weight_average_is_the_recursion(small_toy, tmp_path):
    """Saved every step, the average is decay * average + (1 - decay) * weights, decay min(ema, n / (9 + n))."""
    average = None
    for step in (1, 2, 3):
        argv = flags(small_toy, tmp_path / "run", "--stage", "ar", "--lr_schedule", "constant", "--ema", 0.15)
        train.main([*argv, "--max_steps", str(step), "--resume"])
        checkpoint = torch.load(tmp_path / "run/ar.pt", weights_only=True)
        now = checkpoint["training"]["model"]["head.weight"]
        decay = min(0.15, (step - 1) / (8 + step))
        average = now if average is None else decay * average + (1 - decay) * now
        assert torch.allclose(checkpoint["weights"]["head.weight"], average, atol=1e-7), step


def test_resume_skips_what_is_finished_and_continues_with_more_steps(run_dir, capsys):
    before = {stage: (run_dir / f"out/toy/{stage}.pt").read_bytes() for stage in train.STAGES}
    rows = rows_of("out/toy")
    assert call("train.py", flags("data/small", "out/toy", "--resume")) == 0
    assert before == {stage: (run_dir / f"out/toy/{stage}.pt").read_bytes() for stage in train.STAGES}
    assert rows_of("out/toy") == rows
    assert call("train.py", flags("data/small", "out/toy", "--resume", "--stage", "ar", "--max_steps", 6)) == 0
    new = [row for row in rows_of("out/toy") if row not in rows]
    assert [row["step"] for row in new if "loss" in row] == [5, 6] and {row["stage"] for row in new} == {"ar"}


def test_overwrite_leaves_nothing_of_the_old_run(run_dir, launch):
    """Killed before its first checkpoint, a new run must not go on as the old one when it is resumed."""
    argv = flags("data/small", "out/toy", "--lr", 0.001)
    argv[1], argv[3] = str(run_dir / "data/small"), str(run_dir / "out/toy")
    assert launch([*argv, "--overwrite"], "signal_at(train, 'write_log', 2)")[0] == -9
    code, screen = launch([*argv, "--resume"])
    assert code == 0, screen
    fresh = [argv[0], argv[1], "--out", str(run_dir / "fresh"), *argv[4:]]
    assert launch(fresh)[0] == 0
    assert_same_run(run_dir / "out/toy", run_dir / "fresh", *train.STAGES)


def test_a_new_denoiser_beside_an_old_energy_ends_well(run_dir, capsys):
    """The energy does not fit any more, but nobody asked for it yet: it is refused when it is used."""
    assert call("train.py", flags("data/small", "out/toy", "--stage", "denoiser", "--overwrite", "--seed", 1)) == 0
    assert "MDLM" in capsys.readouterr().out


def test_micro_batches_add_up_to_the_batch(small_toy, tmp_path):
    """AR has no random masks: cut in two or not, a step is the same."""
    for name, micro in (("whole", 8), ("halves", 4)):
        train.main(flags(small_toy, tmp_path / name, "--stage", "ar", "--micro_batch", micro))
    a, b = ([row["loss"] for row in rows_of(tmp_path / name) if "loss" in row] for name in ("whole", "halves"))
    assert a == pytest.approx(b, rel=1e-4)


def test_first_row_is_the_loss_of_the_first_batch(small_toy, toy_out):
    """The logged AR loss, computed again from the seed, the order of the data and the first weights alone."""
    blocks = data.Blocks(small_toy, "train", 21)
    torch.manual_seed(0)
    ar = edlm.AutoregressiveLM(edlm.Config(blocks.vocab_size, 21, 1, 2, 16))
    batch = next(iter(data.BatchOrder(len(blocks), 8, 8, seed=0)))
    loss = -ar.log_prob(torch.stack([blocks[i] for i in batch])).sum() / (8 * 20)
    logged = next(row["loss"] for row in rows_of(toy_out) if row["stage"] == "ar")
    assert loss.item() == pytest.approx(logged, rel=1e-5)


# ------------------------------------------------------------------------------------------------
# sample.py


def sampled(*argv):
    """The content of --json after sample.py, in the current folder."""
    assert call("sample.py", ["--device", "cpu", *argv, "--json", "figures.json"]) == 0
    return json.loads(Path("figures.json").read_text())


KEYS = {"settings", "tokens", "texts", "valid_fraction", "entropy", "ess", "denoiser_forwards", "energy_forwards",
        "seconds"}  # fmt: skip


@pytest.mark.parametrize("energy", ["none", "ar", "coar", "nce"])
def test_every_energy_gives_the_promised_figures(run_dir, energy, capsys):
    got = sampled("--energy", energy, "--num", 6, "--steps", 4, "--k", 3)
    assert got.keys() >= KEYS
    assert got["settings"]["energy"] == energy and got["settings"]["steps"] == [4]
    tokens = torch.tensor(got["tokens"])
    tokenizer = data.get_tokenizer("toy")
    assert tokens.shape == (6, 21) and (tokens[:, 0] == tokenizer.eot_token).all() and tokens.max() < tokenizer.n_vocab
    assert got["texts"] == [data.decode(tokenizer, row) for row in got["tokens"]]
    assert got["valid_fraction"] == sum(map(data.toy_is_valid, got["texts"])) / 6
    counts = [Counter(row[1:]).values() for row in got["tokens"]]
    assert got["entropy"] == pytest.approx(sum(-n / 20 * math.log2(n / 20) for row in counts for n in row) / 6)
    assert 0 < got["denoiser_forwards"] <= 4
    if energy == "none":
        assert got["ess"] is None and got["energy_forwards"] == 0
    else:
        assert 1 <= got["ess"] <= 3.0001 and 0 < got["energy_forwards"] <= 3 * got["denoiser_forwards"]
    assert got["texts"][0] in capsys.readouterr().out


def test_seeds(run_dir):
    a, b, c = (sampled("--energy", "nce", "--num", 4, "--seed", seed)["tokens"] for seed in (3, 3, 4))
    assert a == b != c


def test_forwards_never_exceed_the_masked_tokens(run_dir):
    got = sampled("--energy", "none", "--num", 5, "--steps", 500)
    assert 15 < got["denoiser_forwards"] <= 20
    assert sampled("--energy", "none", "--num", 5, "--steps", 2)["denoiser_forwards"] <= 2


def test_window_zero_asks_no_energy(run_dir):
    full, half, none = (
        sampled("--energy", "nce", "--num", 8, "--window", w)["energy_forwards"] for w in ("1", "0.5", "0")
    )
    assert none == 0 < half < full


@pytest.mark.parametrize("model", ["diffusion", "ar"])
def test_a_prompt_is_kept(run_dir, model):
    prompt = " ".join(WORDS[:4])
    got = sampled("--prompt", prompt, "--model", model, "--num", 3, "--steps", 3)
    given = data.encode(data.get_tokenizer("toy"), prompt)
    assert all(row[1:5] == given for row in got["tokens"]) and all(t.startswith(prompt) for t in got["texts"])
    assert len({tuple(row) for row in got["tokens"]}) > 1


def test_gaps_are_counted_and_the_rest_is_kept(run_dir):
    run = sample.load_run(sample.parse(["--device", "cpu"]))
    mask, tokenizer = run.config.mask_id, run.tokenizer
    a, b, c, d, e, f, g = [word for word in WORDS if "." not in word][:7]
    words = data.encode(tokenizer, " ".join((a, b, c, d, e, f, g)))
    assert len(words) == 7
    for text, where in (
        (f"{a} {b} ___ {d} {e} {f} {g}", [2]),
        (f"{a} ___*3 {e} {f} {g}", [1, 2, 3]),
        (f"___ {b} {c} {d} {e} {f} ___", [0, 6]),
        (f"{a} {b} {c} ____ {e} ___*2", [3, 5, 6]),
    ):
        expected = [mask if i in where else word for i, word in enumerate(words)]
        assert sample.start_state(run, None, text).tolist() == [tokenizer.eot_token, *expected, tokenizer.eot_token]
    got = sampled("--infill", f"{a} ___*3 {e} {f} {g}", "--num", 3)
    for row in got["tokens"]:
        assert len(row) == 9 and row[1] == words[0] and row[5:8] == words[4:] and mask not in row


def test_autoregressive_samples(run_dir):
    got = sampled("--model", "ar", "--num", 3)
    assert got["denoiser_forwards"] == got["energy_forwards"] == 0 and len(got["tokens"]) == 3
    assert all(len(row) == 21 for row in got["tokens"])
    assert got["tokens"] == sampled("--model", "ar", "--num", 3)["tokens"]


def test_watch_shows_masks_until_there_are_none(run_dir, capsys):
    assert call("sample.py", "--energy nce --steps 4 --num 2 --watch --device cpu".split()) == 0
    states = [line for line in capsys.readouterr().out.splitlines() if line.startswith("t = ")]
    masks = [line.count("___") for line in states]
    assert masks[0] == 20 and masks[-1] == 0 and masks == sorted(masks, reverse=True) and len(states) > 2
    times = [float(line.split()[2]) for line in states]
    assert times[0] == 1 and times == sorted(times, reverse=True)


def test_compare_has_a_row_for_every_setting(run_dir, capsys):
    got = sampled("--compare", "--steps", "2,4", "--k", "2,3", "--num", 5)
    energies = [f"{name} T={steps} k={k}" for steps in (2, 4)
                for name in ("EDLM-AR", "EDLM-coAR", "EDLM-NCE") for k in (2, 3)]  # fmt: skip
    assert sorted(row["name"] for row in got["rows"]) == sorted(["AR", "MDLM T=2", "MDLM T=4", *energies])
    assert all(len(row["tokens"]) == 5 and row["ar_perplexity"] > 1 for row in got["rows"])
    run = sample.load_run(sample.parse(["--device", "cpu"]))
    x = torch.tensor(got["rows"][0]["tokens"])
    expected = math.exp(-run.models["ar"].log_prob(x).sum().item() / (5 * 20))
    assert got["rows"][0]["ar_perplexity"] == pytest.approx(expected, rel=1e-4)
    table = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(row['name'])} ", table, re.M) for row in got["rows"])


def test_a_judge_scores_its_own_tokens(run_dir, monkeypatch):
    """A judge that gives every next character probability 1/5: perplexity 5 whatever is judged."""

    class Judge:
        config = types.SimpleNamespace(max_position_embeddings=64)
        to = eval = lambda self, *args: self

        def __call__(self, ids):
            return types.SimpleNamespace(logits=torch.zeros(*ids.shape, 5))

    def tokenizer(text):
        return {"input_ids": [ord(character) % 5 for character in text]}

    fake = types.SimpleNamespace(
        AutoTokenizer=types.SimpleNamespace(from_pretrained=lambda name: tokenizer),
        AutoModelForCausalLM=types.SimpleNamespace(from_pretrained=lambda name: Judge()),
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    got = sampled("--compare", "--steps", "2", "--k", "2", "--num", 2, "--judge", "five", "--energy", "nce")
    assert [row["judge_perplexity"] for row in got["rows"]] == pytest.approx([5.0] * 3, rel=1e-4)


def test_no_arguments_show_both_side_by_side(run_dir, capsys):
    got = sampled("--num", 30)
    text = capsys.readouterr().out
    assert len(re.findall(r"valid \d\.\d+", text)) == 2 and "effective sample size" in text and " | " in text
    assert text.splitlines()[-1].startswith("next: python sample.py")
    assert got.keys() >= KEYS and got["plain"]["energy_forwards"] == 0 < got["energy_forwards"]
    assert got["plain"]["tokens"] != got["tokens"] and len(got["tokens"]) == 30
    # and what it says to do next works
    following = re.match(r"next: python sample.py (.*?)   ", text.splitlines()[-1])[1]
    assert call("sample.py", [*shlex.split(following), "--num", "2", "--device", "cpu"]) == 0


def test_a_denoiser_alone_can_be_sampled(here, toy_out, capsys):
    (here / "out/toy").mkdir(parents=True)
    shutil.copy(toy_out / "denoiser.pt", here / "out/toy")
    got = sampled("--num", 4)
    assert got["ess"] is None and len(got["texts"]) == 4


def test_bytes_have_no_valid_fraction(here, bytes_out, capsys):
    got = sampled("--out", bytes_out, "--num", 2, "--steps", 4, "--k", 2)
    assert got["valid_fraction"] is None and "valid" not in capsys.readouterr().out
    got = sampled("--out", bytes_out, "--num", 2, "--steps", 4, "--infill", "the ___*3 sat")
    assert all(re.fullmatch("the .* sat", text, re.S) for text in got["texts"])
    assert all(len(row) == 2 + len("the xyz sat") for row in got["tokens"])


def test_sampling_benchmark(here, monkeypatch, capsys):
    tiny = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=30)
    monkeypatch.setattr(sample, "BENCHES", {"small": tiny})
    got = sampled("--bench", "--batch", "1,2")
    text = capsys.readouterr().out
    assert [(row["name"], row["batch"]) for row in got["rows"]] == [
        ("MDLM", 1), ("EDLM-AR", 1), ("MDLM", 2), ("EDLM-AR", 2),
    ]  # fmt: skip
    for row in got["rows"]:
        assert row["ratio"] == pytest.approx(row["plain_seconds"] / row["seconds"]) and row["ratio"] > 0
        assert row["projected_rows"] >= row["batch"] * 7 and f"{row['ratio']:.2f}" in text
    # without an energy every masked token is projected exactly once
    assert [row["projected_rows"] for row in got["rows"] if row["name"] == "MDLM"] == [7, 14]


def test_the_examples_of_the_docstring_run(run_dir, monkeypatch):
    tiny = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=30)
    monkeypatch.setattr(sample, "BENCHES", {"small": tiny})
    examples = re.findall(r"^    python sample\.py(.*?)  ", sample.__doc__, re.M)  # two spaces end the command
    for example in examples:
        assert call("sample.py", [*shlex.split(example), "--device", "cpu", "--num", "2"]) == 0, example
    assert len(examples) == 6


def table_world(vocab, length, seed):
    """A denoiser and an energy that are tables over every possible input."""
    torch.manual_seed(seed)
    base = (vocab + 1) ** torch.arange(length)
    logits = 2 * torch.randn((vocab + 1) ** length, length, vocab)
    energies = 1.5 * torch.randn((vocab + 1) ** length, (vocab + 1) ** length)

    def denoiser(x_t, where):
        return logits[(x_t * base).sum(dim=1)][where]

    def energy(candidates, x_t, log_q):
        return energies[(candidates * base).sum(dim=2), (x_t * base).sum(dim=1)[:, None]]

    return denoiser, energy, lambda x: (x * base).sum(dim=1)


@pytest.mark.parametrize("k, steps, with_energy", [(1, 1, False), (1, 2, False), (2, 2, True), (3, 3, True)])
def test_the_plain_algorithm_has_the_same_law(k, steps, with_energy):
    """The reference of the benchmark draws from the law of edlm.sample: two-sample chi-square."""
    vocab, length, n = 2, 4, 20000
    denoiser, energy, code = table_world(vocab, length, seed=k)
    x = torch.full((n, length), vocab)
    x[:, 0] = 0
    settings = dict(mask_id=vocab, steps=steps, k=k, energy=energy if with_energy else None)
    torch.manual_seed(1)
    counts = [torch.bincount(code(draw(denoiser, x, **settings)), minlength=81).double()
              for draw in (edlm.sample, sample.plain_algorithm_1)]  # fmt: skip
    seen = (counts[0] + counts[1]) > 0
    a, b = counts[0][seen], counts[1][seen]
    assert len(a) == vocab ** (length - 1)
    statistic = ((a - b) ** 2 / (a + b)).sum()
    p_value = torch.special.gammaincc(torch.tensor((len(a) - 1) / 2, dtype=torch.float64), statistic / 2)
    assert p_value > 1e-6


def test_the_plain_ar_energy_is_the_ar_energy(toy_out):
    models, _ = edlm.load_models(toy_out, ["ar"])
    torch.manual_seed(0)
    candidates, log_q = torch.randint(models["ar"].config.vocab_size, (3, 4, 21)), torch.randn(3, 4)
    candidates[:, :, 0] = data.get_tokenizer("toy").eot_token
    x_t = torch.full((3, 21), models["ar"].config.mask_id)
    with torch.no_grad():
        ours = edlm.ARResidual(models["ar"])(candidates, x_t, log_q)
        assert torch.allclose(ours, sample.plain_ar_energy(models["ar"], candidates, x_t, log_q), atol=1e-3)


# ------------------------------------------------------------------------------------------------
# train.py --eval and --bench


def evaluated(out, *argv):
    argv = ["--eval", "--out", out, "--device", "cpu", "--json", "table.json", *argv]
    assert call("train.py", argv) == 0
    return {row["model"]: row for row in json.loads(Path("table.json").read_text())["rows"]}


def test_the_table_of_perplexities(run_dir, capsys):
    rows = evaluated("out/toy", "--data", "data/small", "--n", 4, "--chain_steps", 4)
    assert set(rows) == {
        "language (floor)", "AR", "MDLM", "EDLM-coAR joint, log Z exact",
        *(f"{name} joint, log Z {end}" for name in ("EDLM-AR", "EDLM-NCE") for end in ("lower", "upper")),
        *(f"{name} chain" for name in ("EDLM-AR", "EDLM-coAR", "EDLM-NCE")),
    }  # fmt: skip
    floor = rows["language (floor)"]
    assert floor["nats_per_token"] == pytest.approx(data.toy_entropy() / 20, rel=1e-5)
    for name, row in rows.items():
        assert row["perplexity"] == pytest.approx(math.exp(row["nats_per_token"]))
        assert row["what"] == ("exact" if "floor" in name else "exact NLL" if name == "AR" else
                               "estimate" if "joint" in name else "bound")  # fmt: skip
        if name != "language (floor)":
            assert row["sequences"] == 40 and row["tokens"] == 800 and row["standard_error"] > 0
    # log p = ... - log Z: the lower end of log Z gives the lower loss
    for name in ("EDLM-AR", "EDLM-NCE"):
        lower, upper = (rows[f"{name} joint, log Z {end}"]["nats_per_token"] for end in ("lower", "upper"))
        assert upper >= lower
    ar, _ = edlm.load_checkpoint("out/toy/ar.pt")
    blocks = data.Blocks("data/small", "val", 21)
    with torch.no_grad():
        expected = -ar.log_prob(torch.stack([blocks[i] for i in range(40)])).sum().item() / 800
    assert rows["AR"]["nats_per_token"] == pytest.approx(expected, rel=1e-5)
    table = capsys.readouterr().out
    assert all(name in table for name in rows) and "bits/char" not in table
    assert evaluated("out/toy", "--data", "data/small", "--n", 4, "--chain_steps", 4) == rows


def test_one_energy_or_none(run_dir):
    common = ("--data", "data/small", "--n", 2, "--eval_blocks", 10)
    assert set(evaluated("out/toy", *common, "--energy", "none")) == {"language (floor)", "AR", "MDLM"}
    rows = evaluated("out/toy", *common, "--energy", "coar")
    assert set(rows) == {"language (floor)", "AR", "MDLM", "EDLM-coAR joint, log Z exact", "EDLM-coAR chain"}
    assert rows["AR"]["sequences"] == 10


def test_text_files_are_evaluated(here, bytes_out):
    texts = ["don 't stop @-@ gap , he said . " * 4, "teddy 's hat " * 5]
    (here / "my.txt").write_text(texts[0] + texts[1])
    (here / "my.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    argv = ("--energy", "none", "--data")
    plain, lines = (evaluated(bytes_out, *argv, name) for name in ("my.txt", "my.jsonl"))
    assert plain["AR"]["sequences"] == len((texts[0] + texts[1]).strip()) // 30
    assert lines["AR"]["sequences"] == (sum(len(text.strip()) for text in texts) + 2) // 30
    undone = evaluated(bytes_out, *argv, "my.txt", "--detokenize", "wikitext")
    assert undone["AR"]["sequences"] == len(data.detokenize_wikitext((texts[0] + texts[1]).strip())) // 30
    for row in (*plain.values(), *undone.values()):
        nats = row["nats_per_token"] * 31  # of a block: 30 characters and the end of text
        assert row["bits_per_character"] == pytest.approx(nats / 30 / math.log(2))


def test_a_text_file_is_judged_by_the_run_of_the_preset(run_dir):
    (run_dir / "my.jsonl").write_text("".join(json.dumps(dict(text=s)) + "\n" for s in data.toy_stories(5, seed=1)))
    argv = ["--eval", "--data", "my.jsonl", "--energy", "none", "--device", "cpu", "--json", "table.json"]
    assert call("train.py", argv) == 0
    assert json.loads(Path("table.json").read_text())["rows"][0]["sequences"] == 5


def test_training_benchmark(here, capsys, monkeypatch):
    monkeypatch.setattr(train, "matmul_rate", lambda device: 1e9)
    argv = "--bench --n_layer 1 --n_embd 16 --n_head 2 --block_size 16 --max_steps 2 --device cpu --json bench.json"
    assert call("train.py", argv.split()) == 0
    figures = json.loads((here / "bench.json").read_text())
    ours, plain = figures["rows"]
    assert figures["ratio"] == pytest.approx(plain["seconds"] / ours["seconds"])
    assert f"ratio {figures['ratio']:.2f}" in capsys.readouterr().out
    assert ours["tokens_per_second"] == pytest.approx(32 / ours["seconds"])
    vocab = data.get_tokenizer("toy").n_vocab
    assert figures["flops_per_token"] == 3 * (24 * 16**2 + 4 * 16 * 16 + 2 * 16 * vocab * 0.5)


def test_the_plain_step_has_the_same_loss(toy_out, small_toy):
    denoiser, _ = edlm.load_checkpoint(toy_out / "denoiser.pt")
    blocks = data.Blocks(small_toy, "train", 21)
    x0 = torch.stack([blocks[i] for i in range(16)])
    torch.manual_seed(3)
    plain = train.plain_loss(denoiser, x0)
    torch.manual_seed(3)
    ours = edlm.nelbo(denoiser, x0, mask_id=denoiser.config.mask_id).mean() / 20
    assert plain.item() == pytest.approx(ours.item(), rel=1e-5)
    slopes = [torch.autograd.grad(loss, denoiser.parameters()) for loss in (plain, ours)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*slopes, strict=True))


# ------------------------------------------------------------------------------------------------
# README.md: its commands and its Python, at a small size


def code_blocks(language):
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def small_downloads(folder):
    """What data.download would fetch: an OpenWebText archive or text8, a thousandth of the size."""

    def fetch(url, into):
        path = Path(into) / url.rsplit("/", 1)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("text8", "the quick brown fox jumps over the lazy dog " * 600)
            return path
        with tarfile.open(path, "w") as outer:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(20):
                    page = tarfile.TarInfo(f"{path.stem}-{i}.txt")
                    text = (TEXT.strip() + f" page {i}.").encode() * 3
                    page.size = len(text)
                    tar.addfile(page, io.BytesIO(text))
            packed = lzma.compress(inner.getvalue())
            member = tarfile.TarInfo(f"openwebtext/{path.stem}_data.xz")
            member.size = len(packed)
            outer.addfile(member, io.BytesIO(packed))
        return path

    return fetch


def shrink(script, argv):
    """Flags that make a command of the README small; the last of two equal flags counts."""
    if script == "data.py":
        return ["--val_docs", "4", "--tokenizer", "bytes"] if "openwebtext" in argv else []
    if script == "sample.py":
        return ["--device", "cpu"] + ([] if "--bench" in argv else ["--num", "2"])
    small = [*SMALL, "--max_steps", "2", "--n", "2"]
    if "--preset" in argv or "--data" in argv:
        small += ["--block_size", "32", "--micro_batch", "4"]
    return small


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="there is no README.md yet")
def test_readme_commands_run(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(data, "download", small_downloads(run_dir))
    monkeypatch.setattr(data, "OWT_ARCHIVES", ["urlsf_subset00.tar", "urlsf_subset01.tar"])
    monkeypatch.setattr(train, "matmul_rate", lambda device: 1e9)
    tiny = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=30)
    monkeypatch.setattr(sample, "BENCHES", dict.fromkeys(sample.BENCHES, tiny))
    real = data.make_toy
    monkeypatch.setattr(data, "make_toy", lambda folder: real(folder, n_train=200, n_val=40))
    data.make_toy("data/toy")
    (run_dir / "mytext.txt").write_text(TEXT * 40)
    lines = "\n".join(code_blocks("bash")).replace("\\\n", " ").splitlines()
    ran = 0
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["python"] and words[1] in ("train.py", "sample.py", "data.py"):
            if "--judge" in words:
                continue  # needs a package and a network
            fresh = words[1] == "train.py" and not {"--eval", "--bench", "--resume"} & set(words)
            again = ["--overwrite"] if fresh else []
            code = call(words[1], [*words[2:], *shrink(words[1], words), *again])
            assert code == 0, (line, capsys.readouterr().err)
            ran += 1
    assert ran > 3


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="there is no README.md yet")
def test_readme_python_runs(run_dir, capsys):
    if any("matplotlib" in block for block in code_blocks("python")):
        pytest.importorskip("matplotlib").use("Agg")
    data.make_toy("data/toy", n_train=200, n_val=40)
    namespace = {}
    for block in code_blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace and capsys.readouterr().out
