"""Exact-enumeration tests of edlm.py: every law, bound and estimator against a world small enough to list.

A world is a random table: one categorical per position and one energy per completion, for every partially
masked sequence. Everything the method promises about it can be added up, and is. Statistical tests use fixed
seeds; beside each bound stands how often a correct program would miss it with a fresh seed.
"""

import functools
import itertools
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import edlm

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
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
    projected once; the reported costs are those seen by the denoiser."""
    world = World(2, 7, seed=0)
    x = start_rows(world).repeat(4, 1)
    due = (x == 2).sum(1)
    for steps, k in itertools.product((1, 3, 1000), (1, 4)):
        world.calls.clear()
        args = dict(mask_id=2, steps=steps, energy=zero_energy, k=k, generator=seeded(steps))
        states = list(edlm.sample_states(world.denoiser, x, **args))
        assert all(where.any(1).all() for where in world.calls)
        last, asked = states[-1], sum(int(where.sum()) for where in world.calls)
        assert (last.denoiser_forwards <= due.clamp(max=steps)).all() and (last.projected >= due).all()
        assert last.denoiser_forwards.sum() == sum(len(where) for where in world.calls)
        assert last.projected.sum() == asked and (asked == due.sum()) == (k == 1 or steps == 1)
        assert torch.equal(last.energy_forwards, last.denoiser_forwards * (k if k > 1 else 0))
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
    return np.stack([w["head.weight"] @ norm(h, "transformer.norm") + w["head.bias"] for h in hs])


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
    for name in ("PROJECTION_ELEMENTS", "CDF_ELEMENTS", "MAX_TOKENS"):
        monkeypatch.setattr(edlm, name, 1)
    for a, b in zip(whole, results(1), strict=True):
        close(a, b)
