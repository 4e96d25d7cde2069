"""EDLM: energy-based diffusion language models. The whole method, in reading order.

    Xu, Geffner, Kreis, Nie, Xu, Leskovec, Ermon, Vahdat, ICLR 2025, arXiv:2410.21357 ("the paper"),
    on top of masked diffusion (MDLM, arXiv:2406.07524) and residual energies (arXiv:2004.11714).
    `python train.py` trains the networks on a toy language, `python sample.py` draws from them.

A masked-diffusion *denoiser* fills all masked positions at once, each from a distribution of its
own, the *proposal*, so that words which must agree often do not. A *residual energy* judges whole
candidate texts: it corrects what the proposal gets wrong. Importance sampling picks among them.

Symbols and shapes, the same everywhere:

    B batch, L block length, M = L - 1 positions that can be masked, K candidates, V vocabulary,
    N positions that are True in `where`, d width, D = d / heads
    x0      Long[B, L]     clean tokens, 0..V-1; x0[:, 0] is BOS: given, never masked or scored
    mask_id = V            an input only, never an output
    x_t     Long[B, L]     x0 with some tokens replaced by mask_id
    where   Bool[B, L]     which positions are asked for; [N] rows follow its row-major order
    logits  Float[N, V]    denoiser(x_t, where), N rows; anything callable so is a denoiser
    log_q   Float[B, K]    log-probability of a candidate's masked tokens under the denoiser, nats
    energy  Float[B, K]    energy(candidates Long[B, K, L], x_t, log_q): E, low is real; E[.] a mean
    mu      the denoiser's distribution; mu_i its part for position i
    S       the masked positions, x_S is x0 with S masked; U those in S that one step reveals
    t       time: 1 all masked, 0 all clean; step j of T goes from t = 1 - j/T to s = 1 - (j+1)/T

The method in seven equations:

    (1)  forward    each token is masked with probability 1 - alpha_t, alpha_1 = 0, alpha_0 = 1
    (2)  reverse    from t to s < t a masked token is revealed with probability
                    (alpha_s - alpha_t) / (1 - alpha_t); a revealed one is carried over unchanged
    (3)  NELBO      sum over n = 1..M of (1/n) mean over |S| = n of sum_{i in S} -log mu_i(x0_i|x_S)
    (4)  EDLM       p(x0 | x_t) = mu(x0 | x_t) exp(-E(x0, x_t)) / Z(x_t)
    (5)  AR energy  E = -log p_AR(x0) + log mu(x0 | x_t)
    (6)  NCE loss   softplus(E(x0, x_t)) + softplus(-E(x0', x_t)),  x0 data, x0' ~ mu(. | x_t)
    (7)  sampling   draw k candidates from mu, keep one with probability softmax(-E); of the masked
                    positions, those that (2) reveals take its tokens               (Algorithm 1)

The *chain* is the sampler's walk (2) from t = 1 to 0. Which step reveals which position depends on
no token, so p(x0) is a mean over timetables, and -log p(x0) at most the mean of -log (Jensen): the
NELBO, negative evidence lower bound, which training lowers.

Why BOS: rotary attention sees only differences of positions; one known token gives a row of masks
a sense of place. The AR model conditions on it too, so all models score the same M tokens.
"""

import functools
import hashlib
import math
import os
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ------------ 1. The transformer ------------------------------------------------------------------


@dataclass
class Config:
    """Shape of a network."""

    vocab_size: int  # V, real tokens only
    block_size: int  # L, the longest sequence
    n_layer: int
    n_head: int
    n_embd: int  # d
    dropout: float = 0.0

    def __post_init__(self):
        *sizes, dropout = asdict(self).values()
        if not all(isinstance(size, int) and size >= 1 for size in sizes) or not 0 <= dropout < 1:
            raise ValueError(f"needs whole numbers from 1 on and 0 <= dropout < 1: {self}")
        if self.n_embd % (2 * self.n_head):  # rotary positions pair the two halves of each head
            raise ValueError(f"n_embd must be a multiple of 2 n_head = {2 * self.n_head}: {self}")

    @property
    def mask_id(self) -> int:
        """The id after the last real token: V."""
        return self.vocab_size


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turns pairs (i, i + D/2) of x Float[B, heads, L, D] by angles [L, D/2]."""
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return turned.to(x.dtype)  # the angles are float32, x may be bfloat16


class Block(nn.Module):
    """One pre-norm block: h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: Config, causal: bool):
        super().__init__()
        d = config.n_embd
        self.n_head, self.causal, self.dropout = config.n_head, causal, config.dropout
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.norm2 = nn.LayerNorm(d)
        self.mlp_in = nn.Linear(d, 4 * d)
        self.mlp_out = nn.Linear(4 * d, d)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, cache: list | None = None) -> Tensor:
        """Float[B, L, d] -> the same. cache: see `Transformer.forward`."""
        B, L, d = h.shape
        qkv = self.qkv(self.norm1(h)).view(B, L, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, L, D] each
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache:
            k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
        if cache is not None:
            cache[:] = k, v
        # one new token may look at all that is there, so it needs no causal mask
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and L > 1)
        a = self.attn_out(a.transpose(1, 2).reshape(B, L, d))  # [B, L, d]
        h = h + F.dropout(a, self.dropout, self.training)
        m = self.mlp_out(F.gelu(self.mlp_in(self.norm2(h)), approximate="tanh"))
        return h + F.dropout(m, self.dropout, self.training)


def init_weights(module: nn.Module) -> None:
    """Normal weights of standard deviation 0.02 and zero biases, as in GPT-2."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Head(nn.Linear):
    """The layer of logits, V rounded up to 64: GPUs are slow at odd sizes, as GPT-2's V = 50257."""

    def __init__(self, config: Config):
        super().__init__(config.n_embd, math.ceil(config.vocab_size / 64) * 64)
        self.vocab_size = config.vocab_size
        init_weights(self)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states Float[..., d] -> logits Float[..., V]."""
        return super().forward(hidden)[..., : self.vocab_size]


class Transformer(nn.Module):
    """The one network behind all three models; only `causal` and what is put on top differ.

    It takes no time input: given *which* tokens are visible, the noise level says nothing more
    about the masked ones (RADD, arXiv:2406.03736). So sequences at different times share a pass.
    """

    def __init__(self, config: Config, causal: bool):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size + 1, config.n_embd)  # the last row: the mask
        self.blocks = nn.ModuleList(Block(config, causal) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        half = config.n_embd // config.n_head // 2
        frequency = 10000 ** -(torch.arange(half) / half)  # [D / 2]
        angle = torch.outer(torch.arange(config.block_size), frequency)  # [L, D / 2]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.apply(init_weights)
        for block in self.blocks:  # 2 n_layer branches add up in the residual stream
            for out in (block.attn_out, block.mlp_out):
                nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, h: Tensor, cache: list | None = None) -> Tensor:
        """Embeddings Float[B, L, d] -> hidden states Float[B, L, d].

        cache, for causal models: a list per block, at first empty, for the keys and values of the
        tokens so far, extended in place. The first call may bring many tokens, later ones one each.
        """
        start = cache[0][0].shape[2] if cache and cache[0] else 0
        end = start + h.shape[1]
        if end > len(self.cos):
            raise ValueError(f"{end} tokens do not fit into the block of {len(self.cos)}")
        for i, block in enumerate(self.blocks):
            h = block(h, self.cos[start:end], self.sin[start:end], cache[i] if cache else None)
        return self.norm(h)


# ------------ 2. Masking: the forward process -----------------------------------------------------


def alpha(t: Tensor, schedule: str = "linear") -> Tensor:
    """alpha_t, the probability that a token is still visible at time t (Float, any shape), eq. (1).

    linear: 1 - t, the paper's log-linear noise. cosine: 1 - cos(pi/2 (1 - t)), fewer reveals while
    little is known (MD4, MaskGIT). Raises ValueError for another name.
    """
    if schedule == "linear":
        return 1 - t
    if schedule == "cosine":
        return 1 - torch.cos(math.pi / 2 * (1 - t))
    raise ValueError(f"unknown schedule {schedule!r}: choose linear or cosine")


def mask_tokens(x0: Tensor, n: Tensor, *, mask_id: int, generator=None) -> Tensor:
    """Masks n Long[B] random positions of each row of x0, never position 0: x_t Long[B, L].

    Given how many tokens are masked, equation (1) makes every set of that size equally likely.
    """
    B, L = x0.shape
    noise = torch.rand(B, L - 1, device=x0.device, generator=generator)
    rank = noise.argsort(dim=1)  # a random permutation
    masked = torch.zeros_like(x0, dtype=torch.bool)
    masked[:, 1:] = rank < n[:, None]
    return x0.masked_fill(masked, mask_id)


@functools.cache
def step_weights(M: int, steps: int) -> Tensor:
    """Expected share of the M tokens that step j of T (linear) reveals while n are masked.

    Float64[T, M], entry [j, n - 1] = (n / M) r_j Binomial(n; M, 1 - alpha_t); r_j = 1 / (T - j) is
    the probability (2). Every token is revealed exactly once, so the entries sum to 1. As T grows
    the column sums tend to 1 / M, the uniform n of equation (3). Raises ValueError for T < 1.
    """
    if steps < 1:
        raise ValueError(f"a chain has at least 1 step, not {steps}")
    t = 1 - torch.arange(steps, dtype=torch.float64)[:, None] / steps  # [T, 1]
    n = torch.arange(1, M + 1, dtype=torch.float64)  # [M]
    log_choose = math.lgamma(M + 1) - torch.lgamma(n + 1) - torch.lgamma(M - n + 1)
    log_binomial = log_choose + torch.xlogy(n, t) + torch.xlogy(M - n, 1 - t)
    return log_binomial.exp() * n / M / (steps * t)  # [T, M]


def corrupt(x0: Tensor, *, mask_id: int, steps=None) -> tuple[Tensor, Tensor, Tensor]:
    """Masks as a loss wants them: (x_t Long[B, L], where masked Bool[B, L], how many Long[B]).

    A row's n is drawn by its weight in the loss, 1 / M each for (3), else the column sums of
    `step_weights`: M / n times a sum over S is unbiased. Evenly spaced quantiles: less variance.
    """
    B, M = len(x0), x0.shape[1] - 1
    quantile = (torch.rand(1) + torch.randperm(B) / B) % 1  # [B]
    share = torch.full((M,), 1 / M) if steps is None else step_weights(M, steps).sum(dim=0)
    n = torch.searchsorted(share.cumsum(dim=0).to(quantile), quantile, right=True) + 1
    n = n.clamp(max=M).to(x0.device)
    x_t = mask_tokens(x0, n, mask_id=mask_id)
    return x_t, x_t == mask_id, n


# ------------ 3. The denoiser and its NELBO -------------------------------------------------------

ROWS = {"cuda": 2048, "cpu": 64}  # of V numbers at once: they fill a GPU, and fit a CPU's cache


class Denoiser(nn.Module):
    """mu(x0 | x_t): one categorical over the V real tokens for each asked-for position.

    The mask is no output and revealed tokens are not asked for: MDLM's constraints (SUBS) hold.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, causal=False)
        self.head = Head(config)

    def forward(self, x_t: Tensor, where: Tensor) -> Tensor:
        """x_t Long[B, L], where Bool[B, L] -> logits Float[N, V]: no other rows are projected."""
        hidden = self.transformer(self.transformer.embed(x_t))  # [B, L, d]
        return self.head(hidden[where])  # [N, V]


def put_back(values: Tensor, where: Tensor) -> Tensor:
    """Values [N, ...] at the True positions of where Bool[B, L], 0 elsewhere: [B, L, ...]."""
    out = values.new_zeros(*where.shape, *values.shape[1:])
    out[where] = values
    return out


def candidate_log_q(logits: Tensor, candidates: Tensor, where: Tensor) -> Tensor:
    """log mu of candidates Long[B, K, L], summed over where Bool[B, L]: log_q Float[B, K], nats."""
    tokens = candidates.transpose(1, 2)[where]  # [N, K]
    log_mu = logits.float().log_softmax(dim=1).gather(1, tokens)  # [N, K]
    return put_back(log_mu, where).sum(dim=1)


def nelbo(denoiser, x0: Tensor, *, mask_id: int) -> Tensor:
    """The continuous-time NELBO of masked diffusion, equation (3): Float[B], nats per sequence.

    As T grows tokens go one by one in random order, whatever alpha: with n left S is uniform, and
    the next i uniform in S: the 1/n of (3). One draw per row: n uniform in 1..M, S uniform, M / n
    times the sum over S. No 1/t is left to blow up the variance. Also the training loss.
    """
    x_t, where, n = corrupt(x0, mask_id=mask_id)
    log_q = candidate_log_q(denoiser(x_t, where), x0[:, None], where)  # [B, 1]
    return -log_q[:, 0] * (x0.shape[1] - 1) / n


def categorical(logits: Tensor, k: int, generator=None) -> tuple[Tensor, Tensor]:
    """k independent exact draws from each row of logits Float[N, V]: (tokens, log p), both [N, k].

    The inverse of one float64 cumulative sum per row serves all k draws. The usual argmax of logits
    plus Gumbel noise needs k V random numbers and, in float32, can never draw the rarest tokens:
    its noise ends near 16.6, a silent drop in temperature (Zheng et al., arXiv:2409.02908).
    """
    u = torch.rand(len(logits), k, dtype=torch.float64, device=logits.device, generator=generator)
    tokens, log_prob = [], []
    size = ROWS[logits.device.type]
    for rows, u_rows in zip(logits.split(size), u.split(size), strict=True):
        p = rows.float().softmax(dim=1)  # [rows, V]
        cdf = p.cumsum(dim=1, dtype=torch.float64)
        u_rows = u_rows * cdf[:, -1:]  # which is 1, but for rounding
        tokens.append(torch.searchsorted(cdf, u_rows, right=True).clamp(max=p.shape[1] - 1))
        log_prob.append(p.gather(1, tokens[-1]).log())
    return torch.cat(tokens), torch.cat(log_prob)


def propose(logits: Tensor, x_t: Tensor, where: Tensor, k: int, generator=None):
    """k copies of x_t with `where` filled by independent draws: (Long[B, k, L], log_q [B, k])."""
    tokens, log_mu = categorical(logits, k, generator)  # [N, k]
    candidates = torch.where(where[:, :, None], put_back(tokens, where), x_t[:, :, None])
    return candidates.transpose(1, 2).contiguous(), put_back(log_mu, where).sum(dim=1)


# ------------ 4. The autoregressive model ---------------------------------------------------------


class AutoregressiveLM(nn.Module):
    """p_AR(x) = prod_i p(x_i | x_<i): the same transformer, causal. Baseline, and energy (5)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, causal=True)
        self.head = Head(config)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x_i | x_<i) in nats: x Long[B, L] -> Float[B, L], 0 at position 0 (BOS is given).

        No [B, L, V] tensor is held: logits are made ROWS at a time, in training again going back.
        """
        B, L = x.shape
        hidden = self.transformer(self.transformer.embed(x[:, :-1]))  # token i is read off i - 1

        def _score(hidden, target):
            logits = self.head(hidden).float()  # [rows, V]; cross_entropy would write as many again
            return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(dim=1)

        if torch.is_grad_enabled():
            _score = functools.partial(checkpoint, _score, use_reentrant=False)
        both = hidden.flatten(0, 1), x[:, 1:].flatten()
        log_p = torch.cat([*map(_score, *(part.split(ROWS[x.device.type]) for part in both))])
        return F.pad(log_p.view(B, L - 1), (1, 0))

    forward = log_prob  # what a training wrapper calls

    @torch.no_grad()
    def sample(self, x: Tensor, length: int, generator=None) -> Tensor:
        """Continues x Long[B, P] (BOS and any prompt) to Long[B, length], one exact draw at a time.

        Each new token costs one position. Raises ValueError if it has to read more than a block.
        """
        cache, new = [[] for _ in self.transformer.blocks], x
        while x.shape[1] < length:
            hidden = self.transformer(self.transformer.embed(new), cache)[:, -1]  # [B, d]
            new, _ = categorical(self.head(hidden), 1, generator)  # [B, 1]
            x = torch.cat((x, new), dim=1)
        return x


# ------------ 5. Residual energies ----------------------------------------------------------------


class ARResidual:
    """EDLM-AR, equation (5): the AR model judges, the denoiser's own opinion is taken out.

    carry_over=True is EDLM-coAR: the tokens carried over from x_t are not scored. What is left,
    mu(x0 | x_t) exp(-E) = prod over masked i of p_AR(x0_i | x0_<i), sums to exactly 1 over the
    candidates: Z = 1. With False, Z is the AR probability of the tokens already revealed.
    """

    def __init__(self, ar: AutoregressiveLM, carry_over: bool = False):
        self.ar, self.carry_over = ar, carry_over

    @property
    def training(self) -> bool:
        """Whether the AR model is in training mode."""
        return self.ar.training

    def __call__(self, candidates: Tensor, x_t: Tensor, log_q: Tensor) -> Tensor:
        """candidates Long[B, K, L], x_t Long[B, L], log_q Float[B, K] -> Float[B, K], nats."""
        log_p = self.ar.log_prob(candidates.flatten(0, 1)).view(candidates.shape)
        if self.carry_over:
            log_p = log_p.where((x_t == self.ar.config.mask_id)[:, None], 0)
        return log_q - log_p.sum(dim=2)


class NCEResidual(nn.Module):
    """EDLM-NCE: a bidirectional transformer reads x0 and x_t together and answers with one number.

    A position's two embeddings are joined by a linear layer from 2d to d, written as its two
    halves. Hidden states are averaged over positions, and two more layers make a number of them.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, causal=False)
        self.join_x0 = nn.Linear(config.n_embd, config.n_embd)
        self.join_xt = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.mlp_in = nn.Linear(config.n_embd, config.n_embd)
        self.mlp_out = nn.Linear(config.n_embd, 1, bias=False)

    @classmethod
    def from_denoiser(cls, denoiser: Denoiser) -> "NCEResidual":
        """A new energy that starts as the denoiser's transformer, reads x0 alone, and says 0."""
        energy = cls(denoiser.config)
        energy.transformer.load_state_dict(denoiser.transformer.state_dict())
        nn.init.eye_(energy.join_x0.weight)
        for zero in (energy.join_x0.bias, energy.join_xt.weight, energy.mlp_out.weight):
            nn.init.zeros_(zero)
        return energy

    def forward(self, candidates: Tensor, x_t: Tensor, log_q: Tensor) -> Tensor:
        """candidates Long[B, K, L], x_t Long[B, L] -> energy Float[B, K]; log_q is not used."""
        embed = self.transformer.embed
        h = self.join_x0(embed(candidates)) + self.join_xt(embed(x_t))[:, None]  # [B, K, L, d]
        h = self.transformer(h.flatten(0, 1).float()).mean(dim=1)  # [B K, d], summed in float32
        with torch.autocast(h.device.type, enabled=False):  # bfloat16 would leave three digits
            return self.mlp_out(F.relu(self.mlp_in(h))).view(candidates.shape[:2])


def check_eval(**models) -> None:
    """Raises ValueError for a model in training mode: its dropout would make it another model."""
    for name, model in models.items():
        if getattr(model, "training", False):
            raise ValueError(f"the {name} is in training mode: call its model's .eval() first")


def nce_loss(denoiser, energy, x0: Tensor, *, mask_id: int) -> Tensor:
    """Noise-contrastive estimation, equation (6): a scalar, mean over the batch; no unit.

    Real or not? The positive is x0 with its own x_t, the negative is a draw of the frozen denoiser
    for the same x_t. At the optimum exp(-E) is the data's p(x0 | x_t) over mu(x0 | x_t), which
    makes (4) the true posterior. Raises ValueError if the denoiser, which must draw as it will
    when sampling, is in training mode.
    """
    check_eval(denoiser=denoiser)
    x_t, where, _ = corrupt(x0, mask_id=mask_id)
    with torch.no_grad():
        logits = denoiser(x_t, where)
        fake, _ = propose(logits, x_t, where, 1)
        candidates = torch.cat((x0[:, None], fake), dim=1)  # [B, 2, L]
        log_q = candidate_log_q(logits, candidates, where)
    e_real, e_fake = energy(candidates, x_t, log_q).unbind(dim=1)  # [B] each
    return (F.softplus(e_real) + F.softplus(-e_fake)).mean()


# ------------ 6. Decoding by importance sampling --------------------------------------------------
# Algorithm 1 of the paper:
#
#     x = [BOS, mask, ..., mask]
#     for step j = 0 .. T-1, from t = 1 - j/T to s = 1 - (j+1)/T:
#         mu = denoiser(x)                                       V probabilities at all L positions
#         k' = k if t > 1 - window else 1
#         draw candidates x^(1) .. x^(k') from mu                every masked position on its own
#         w_i = exp(-E(x^(i), x)) / (the sum of this over all k')     equation (7)
#         choose one candidate y, x^(i) with probability w_i
#         each masked position of x becomes y's with probability (alpha_s - alpha_t) / (1 - alpha_t)
#     return x
#
# What follows draws from the same law for less. Whether a token is revealed in a step depends on no
# token's value, so the timetable of all reveals is drawn first (`reveal_clock`) and steps that
# reveal nothing are skipped; rows of a batch may then stand at different times in one forward pass.
# Only positions that will be revealed, or that the judge must read, reach the vocabulary (`where`).
# And candidates that agree on all tokens due need no judge: whichever is chosen reveals the same.

JUDGED_TOKENS = 2**14  # tokens that go through the energy in one call


def importance_weights(energy: Tensor) -> Tensor:
    """softmax(-E) over candidates, equation (7): energy Float[B, K] -> weights Float[B, K]."""
    return (-energy.float()).softmax(dim=1)


def in_chunks(energy, candidates: Tensor, x_t: Tensor, log_q: Tensor) -> Tensor:
    """energy(candidates, x_t, log_q), Float[B, K], JUDGED_TOKENS tokens (or one text) at a time."""
    B, K, L = candidates.shape
    pairs = candidates.view(B * K, 1, L), x_t.repeat_interleave(K, dim=0), log_q.view(B * K, 1)
    chunks = zip(*(part.split(max(1, JUDGED_TOKENS // L)) for part in pairs), strict=True)
    return torch.cat([energy(*chunk) for chunk in chunks]).view(B, K)


def reveal_clock(masked: Tensor, steps: int, schedule: str = "linear", generator=None) -> Tensor:
    """The step that will reveal each masked position: masked Bool[B, L] -> Long[B, L].

    A token is visible at the end of step j with probability alpha there, whatever it says:
    inverting this distribution function draws the whole timetable. `steps` where nothing is masked.
    """
    s = 1 - torch.arange(1, steps + 1, dtype=torch.float64, device=masked.device) / steps
    u = torch.rand(masked.shape, dtype=torch.float64, device=masked.device, generator=generator)
    step = torch.searchsorted(alpha(s, schedule), u, right=True).clamp(max=steps - 1)
    return step.masked_fill(~masked, steps)


@dataclass
class SampleState:
    """What `sample_states` yields. An event was a forward pass for the rows whose t fell."""

    x: Tensor  # Long[B, L]
    t: Tensor  # Float[B], the time each row has reached: from 1 to 0
    ess: Tensor  # Float[B], effective sample size 1 / sum w^2, nan where no energy was asked


def sample_states(
    denoiser, x, *, mask_id, steps, energy=None, k=1, window=1.0, schedule="linear", generator=None
):
    """`sample`, as an iterator of SampleState: the start, then the state after each event.

    An event is one forward pass, shared by all rows that still have something to reveal; each moves
    on to its own next step that reveals a token. Arguments and errors are those of `sample`.
    """
    if steps < 1 or k < 1 or not 0 <= window <= 1:
        raise ValueError(f"needs steps >= 1, k >= 1, 0 <= window <= 1: got {steps}, {k}, {window}")
    if (x[:, 0] == mask_id).any():
        raise ValueError("x[:, 0] must be BOS: it is given to every model and cannot be masked")
    check_eval(denoiser=denoiser, energy=energy)
    clock = reveal_clock(x == mask_id, steps, schedule, generator)  # [B, L]
    judged_steps = 0 if energy is None or k == 1 else window * steps  # the first ones
    return _events(denoiser, energy, x, clock, mask_id, steps, k, judged_steps, generator)


@torch.no_grad()
def _events(denoiser, energy, x, clock, mask_id, steps, k, judged_steps, generator):
    """The states of `sample_states`, which itself is no generator: bad arguments raise at once."""
    t = torch.ones(len(x), device=x.device)
    yield SampleState(x, t, torch.full_like(t, math.nan))
    while len(rows := (clock < steps).any(dim=1).nonzero()[:, 0]):  # finished rows have left
        x_t, step = x[rows], clock[rows].min(dim=1).values  # each row's next event
        due = clock[rows] == step[:, None]  # [rows, L]
        inside = step < judged_steps  # [rows]
        where = due | (inside[:, None] & (x_t == mask_id))
        candidates, log_q = propose(denoiser(x_t, where), x_t, where, k, generator)
        chosen, ess = candidates[:, 0].clone(), torch.full_like(t, math.nan)
        differ = ((candidates != candidates[:, :1]).any(dim=1) & due).any(dim=1)
        judged = inside & differ
        if judged.any():
            few, asked = candidates[judged], rows[judged]
            weights = importance_weights(in_chunks(energy, few, x_t[judged], log_q[judged]))
            if (bad := weights.isnan().any(dim=1)).any():
                raise ValueError(f"row {asked[bad][0]}: its energies are nan or all infinite")
            pick, _ = categorical(weights.log(), 1, generator)  # [judged, 1]
            chosen[judged] = few.take_along_dim(pick[:, :, None], dim=1)[:, 0]
            ess[asked] = 1 / weights.square().sum(dim=1)
        x, t = x.clone(), t.clone()
        x[rows] = torch.where(due, chosen, x_t)
        t[rows] = 1 - (step + 1) / steps
        clock = clock.masked_fill(x != mask_id, steps)
        yield SampleState(x, t, ess)


def sample(
    denoiser, x, *, mask_id, steps, energy=None, k=1, window=1.0, schedule="linear", generator=None
) -> Tensor:
    """Draws from EDLM (Algorithm 1): x Long[B, L], mask_id where a token is wanted -> Long[B, L].

    All masks after BOS is unconditional sampling, tokens first a prompt, tokens anywhere infilling;
    given tokens never change. Plain diffusion (MDLM) is k = 1, no energy, or window = 0. With an
    energy and k > 1, k candidates are judged in the steps with t > 1 - window.

    Takes at most min(steps, masked tokens) forward passes a sequence. The law is that of the chain
    of `steps` steps, for any batch size, up to rounding. A torch.Generator must live on the model's
    device. Raises ValueError for steps < 1, k < 1, window outside [0, 1], an unknown schedule, a
    masked x[:, 0], a model in training mode, and energies of a row that are nan or all infinite.
    """
    settings = dict(steps=steps, energy=energy, k=k, window=window, schedule=schedule)
    for state in sample_states(denoiser, x, mask_id=mask_id, generator=generator, **settings):
        last = state
    return last.x


# ------------ 7. What perplexity means ------------------------------------------------------------
# Perplexity is exp(nats / M). As an argument and in (8) n counts draws; in (3), |S|: `n_masked`.
#     (8)  partition   Z = E_mu[exp(-E)], T_n = log mean of exp(-E(., x_t)) over n draws of mu:
#                      E[T_n] <= log Z, and <= E[(2n - 1) T_n - 2 (n - 1) T_{n-1}] for large n
#     (9)  joint       (3) with -log mu(x0 | x_S) + E(x0, x_S) + log Z(x_S) for its inner sum
#     (10) sampler     P_k(x0_U | x_S) = mu_U(x0_U) E[ k w_1 / (w_1 + ... + w_k) ],  w = exp(-E),
#                      w_1 that of x0 on U and a draw of mu on the rest, the others of k - 1 draws:
#                      k times the probability that draw 1 has x0 on U and is kept
#
# The NELBO (3) charges a token -log mu_i for being revealed on its own. With an energy, the tokens
# of one step depend on each other, and two different numbers can be meant:
#   joint (9)     the paper's formula and its published tables. It charges the joint cost of all
#                 masked tokens times the share that is revealed, but revealing U costs -log of the
#                 *marginal* of U. The two agree only for a product. Two bits that are always equal
#                 have 1 bit; with the exact posterior (9) says 0.75 for T = 2 and tends to 0.5.
#   sampler (10)  charges each step the probability with which `sample`, with its T steps and k
#                 candidates, reveals U: a bound on -log of the very law that is drawn from. The two
#                 bits in one step: one of k candidates has them equal with probability 1 - 2^-k, so
#                 it takes 1 - log2(1 - 2^-k) bits, 2, 1.42, 1.09 for k = 1, 2, 4, and tends to 1.
# k = 1 is the NELBO of the T-step chain, k to infinity the chain that draws from (4) itself.


def log_mean_exp(a: Tensor) -> Tensor:
    """log mean_j exp(a_j) over the last dimension."""
    return a.logsumexp(dim=-1) - math.log(a.shape[-1])


@torch.no_grad()
def log_partition_bounds(denoiser, energy, x_t: Tensor, *, mask_id: int, n: int):
    """Estimates log Z(x_t) of (4) by (8): x_t Long[B, L] -> (lower, upper), Float[B] each, nats.

    lower = T_n of n draws; E[T_n] <= log Z by Jensen. upper (Theorem 1) averages T_{n-1} over the n
    ways to leave one out: E[T_n] ~ log Z - c/n makes it log Z + c/n. Raises ValueError for n < 2.
    """
    if n < 2:
        raise ValueError(f"the bounds on log Z leave one of n >= 2 draws out: n is {n}")
    where = x_t == mask_id
    candidates, log_q = propose(denoiser(x_t, where), x_t, where, n)
    log_w = -in_chunks(energy, candidates, x_t, log_q).double()  # 2n - 1 multiplies rounding errors
    T_n = log_mean_exp(log_w)  # [B]
    left_out = torch.eye(n, dtype=torch.bool, device=log_w.device)
    others = log_w[:, None].expand(-1, n, n).masked_fill(left_out, -math.inf)  # [B, n, n]
    T_less = (others.logsumexp(dim=2) - math.log(n - 1)).mean(dim=1)
    upper = (2 * n - 1) * T_n - 2 * (n - 1) * T_less
    return T_n.to(log_q), upper.to(log_q)


@torch.no_grad()
def joint_nelbo(
    denoiser, energy, x0: Tensor, *, mask_id: int, n: int, steps=None, log_partition: str = "upper"
) -> Tensor:
    """The paper's perplexity estimator, equation (9): Float[B], nats per sequence.

    One draw per row, unbiased but for log Z, of the formula for a chain of `steps` steps (None:
    continuous time). log_partition: "upper" or "lower" end of (8) from n draws, or "exact": log Z =
    0, true of EDLM-coAR only. Not a bound on any likelihood: see the head of this section. Raises
    ValueError for another log_partition, n < 2 with a bound, or steps < 1.
    """
    if log_partition not in ("upper", "lower", "exact"):
        raise ValueError(f"log_partition must be upper, lower or exact, not {log_partition!r}")
    x_t, where, n_masked = corrupt(x0, mask_id=mask_id, steps=steps)
    log_q = candidate_log_q(denoiser(x_t, where), x0[:, None], where)  # [B, 1]
    log_p = (log_q - energy(x0[:, None], x_t, log_q))[:, 0]  # [B]
    if log_partition != "exact":
        lower, upper = log_partition_bounds(denoiser, energy, x_t, mask_id=mask_id, n=n)
        log_p = log_p - (lower if log_partition == "lower" else upper)
    return -log_p * (x0.shape[1] - 1) / n_masked


def draw_reveal(where: Tensor, n_masked: Tensor, steps: int | None, window: float):
    """A step of the chain, given S: (U that it reveals Bool[B, L], is it in the window Bool[B]).

    An empty U costs nothing, so none is drawn: U is one uniform member of S, and each other with
    probability r_j. Any of U may be that one, so P(U) = |U| (1/n) r_j^(|U|-1) (1-r_j)^(n-|U|), the
    chain's times |U| / (n r_j). (n, j) come by `step_weights`, the chain's times n r_j / M. In all
    |U| / M, undone by M / |U| in `sampler_nelbo`. In continuous time tokens go one by one, and
    such a step's time is the n-th smallest of M uniform reveal times.
    """
    B, L = where.shape
    u = torch.rand(B, L, device=where.device).masked_fill(~where, 2.0)
    revealed = F.one_hot(u.argmin(dim=1), L).bool()  # one uniform member of S
    if steps is None:
        t = torch.distributions.Beta(n_masked.float(), (L - n_masked).float()).sample()
        return revealed, t > 1 - window
    weights = step_weights(L - 1, steps).T.to(where.device)[n_masked - 1]  # [B, T]
    step = torch.multinomial(weights, 1)  # [B, 1]
    revealed |= where & (torch.rand(B, L, device=where.device) < 1 / (steps - step))
    return revealed, step[:, 0] < window * steps


@torch.no_grad()
def sampler_nelbo(
    denoiser, energy, x0: Tensor, *, mask_id: int, k: int, n: int, steps=None, window: float = 1.0
) -> Tensor:
    """A bound on -log of the probability with which `sample` draws x0: Float[B], nats per sequence.

    One unbiased draw per row of a bound for the linear schedule with `steps` steps (None: one token
    at a time) and k candidates inside the window. The expectation in (10) is estimated by a mean of
    n terms, whose log is too low on average (Jensen): an upper bound, which closes as n grows. Term
    i puts x0 on U of draw i; its rivals are the next k - 1 draws, cyclically (k <= n, so never i
    itself). Costs a denoiser forward and 2n energies a row. k = 1 or no energy: `nelbo` for the
    same masks. Raises ValueError unless 1 <= k <= n, 0 <= window <= 1 and steps >= 1.
    """
    if not 1 <= k <= n or not 0 <= window <= 1:
        raise ValueError(f"needs 1 <= k <= n and 0 <= window <= 1: got {k}, {n}, {window}")
    M = x0.shape[1] - 1
    x_t, where, n_masked = corrupt(x0, mask_id=mask_id, steps=steps)
    revealed, inside = draw_reveal(where, n_masked, steps, window)
    logits = denoiser(x_t, where)
    # M / n * sum over S has the mean of M / |U| * sum over U (U favours no i in S), less variance
    bound = -candidate_log_q(logits, x0[:, None], where)[:, 0] * M / n_masked
    if energy is None or k == 1:
        return bound
    candidates, log_q = propose(logits, x_t, where, n)
    clamped = torch.where(revealed[:, None], x0[:, None], candidates)  # x0 on U, draws on the rest
    log_w = -in_chunks(energy, candidates, x_t, log_q)  # [B, n]
    log_w1 = -in_chunks(energy, clamped, x_t, candidate_log_q(logits, clamped, where))
    rivals = (torch.arange(n)[:, None] + torch.arange(1, k)) % n  # [n, k - 1]
    log_sum = torch.logaddexp(log_w1, log_w[:, rivals].logsumexp(dim=2))  # [B, n]
    log_share = log_mean_exp(math.log(k) + log_w1 - log_sum)  # [B]
    return bound - log_share.where(inside, 0) * M / revealed.sum(dim=1)


# ------------ 8. Not the method, stop reading here: devices, checkpoints, runs --------------------


def pick_device(name: str = "") -> torch.device:
    """torch.device "cuda" or "cpu", by default cuda where there is one. ValueError if it is not."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA GPU on this machine: use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def autocast(device: torch.device):
    """bfloat16 on CUDA, plain float32 elsewhere: a context."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


KINDS = {"denoiser": Denoiser, "ar": AutoregressiveLM, "energy": NCEResidual}


def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's weights: how an energy remembers the denoiser that it corrects."""
    weights = b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:16]


def save_checkpoint(path, model: nn.Module, *, tokenizer: str, **extra) -> None:
    """Writes weights, config, tokenizer name and `extra` (training state) of one of our models.

    The file appears whole, by a rename, or OSError is raised and an older one is still there.
    """
    kind = {cls: name for name, cls in KINDS.items()}[type(model)]
    content = dict(kind=kind, config=asdict(model.config), tokenizer=tokenizer)
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(content, weights=model.state_dict(), **extra), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}") from error


def load_checkpoint(path, device="cpu") -> tuple[nn.Module, dict]:
    """Reads a checkpoint: (the model in evaluation mode on `device`, all else that was saved).

    Raises FileNotFoundError if there is none and ValueError if it is damaged or something else.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint {path}: run python train.py first")
    try:
        if zipfile.ZipFile(path).testzip():  # torch does not look at the checksums
            raise ValueError("a checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        n_layer = sum(name.endswith("norm1.weight") for name in content["weights"])
        if content["config"]["n_layer"] != n_layer:  # building a billion blocks would take for ever
            raise ValueError(f"it has {n_layer} blocks")
        model = KINDS[content["kind"]](Config(**content["config"]))
        model.load_state_dict(content.pop("weights"))
        if not isinstance(content["tokenizer"], str):
            raise TypeError("the tokenizer has no name")
    except Exception as error:  # torch raises many kinds for a cut or foreign file
        reason = f"{path} is damaged or no checkpoint of ours ({type(error).__name__}: {error})"
        raise ValueError(reason.split("\n")[0][:200]) from error
    if not all(weight.isfinite().all() for weight in model.state_dict().values()):
        raise ValueError(f"{path} has weights that are not finite: the run diverged, train anew")
    return model.to(device).eval(), content


# energy: (the checkpoint it needs beside the denoiser's, its name in the paper)
ENERGIES = {"ar": ("ar", "EDLM-AR"), "coar": ("ar", "EDLM-coAR"), "nce": ("energy", "EDLM-NCE")}


def load_models(folder, stages, device="cpu") -> tuple[dict, str]:
    """The checkpoints <folder>/<stage>.pt of a run: ({stage: model}, tokenizer name).

    Raises what `load_checkpoint` raises, and ValueError if they do not belong together.
    """
    models, first = {}, None
    for stage in stages:
        path = Path(folder) / f"{stage}.pt"
        models[stage], content = load_checkpoint(path, device)
        config = models[stage].config
        facts = (content["tokenizer"], config.vocab_size, config.block_size)
        first = first or facts
        if content["kind"] != stage or facts != first:
            is_not = f"{path} is a {content['kind']} for {facts}, {stages[0]}.pt is for {first}"
            raise ValueError(f"{is_not} (tokenizer, V, L): train both on the same data")
        denoiser = models.get("denoiser") if stage == "energy" else None
        if denoiser and content.get("denoiser") != fingerprint(denoiser):
            raise ValueError(f"{path} corrects another denoiser: --stage energy --overwrite")
    return models, first[0]


def make_energy(name: str, models: dict):
    """The energy called `name` in ENERGIES, out of what `load_models` returned."""
    if name == "nce":
        return models["energy"]
    return ARResidual(models["ar"], carry_over=name == "coar")


# ------------ 9. Published weights ----------------------------------------------------------------

RENAMED = {"output_layer.": "", "linear": "head", "norm_final": "transformer.norm"}  # in this order
RENAMED |= {"vocab_embed.embedding": "transformer.embed.weight", "vocab_proj": "join_x0"}
RENAMED |= {"blocks": "transformer.blocks", "attn_qkv": "qkv", "sigma_map.mlp": "cond"}
RENAMED |= {"energy_head": "mlp", "mlp.0": "mlp_in", "mlp.2": "mlp_out"}


class _Inert:  # stands for all that a pickle names but tensors and plain containers
    __init__ = __setstate__ = lambda self, *args: None


def read_published(path) -> dict[str, Tensor]:
    """A file's tensors, float64, under our names: its EMA's if it has one, of EDLM the energy's."""
    size = os.path.getsize(path)
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        content = load_file(path)
    else:
        if sum(part.file_size for part in zipfile.ZipFile(path).infolist()) > size:
            raise ValueError("its parts claim more bytes than it has")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        known = {name: _Inert for name in names} | {"collections.defaultdict": lambda *factory: {}}
        with torch.serialization.safe_globals([(known[name], name) for name in known]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    w = content.get("state_dict", content)
    w = {name.removeprefix("backbone."): value for name, value in w.items()}
    w = {name.removeprefix("ebm."): w[name] for name in w if name.startswith("ebm.")} or w
    if content.get("ema"):  # a list in the order of the parameters, which inv_freq is not
        names = [name for name in w if name != "rotary_emb.inv_freq"]
        w |= zip(names, content["ema"]["shadow_params"], strict=True)
    for name, value in w.items():
        size -= value.nbytes  # a tensor may repeat its bytes, and two may share them
        if size < 0 or not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{name} is not made of finite floats, or larger than the file")
    for theirs, ours in RENAMED.items():
        w = {name.replace(theirs, ours): value.double() for name, value in w.items()}
    return w


@torch.no_grad()
def load_reference(path, block_size: int = 1024) -> nn.Module:
    """A published MDLM, AR or EDLM-NCE network as ours, L = block_size; ValueError for other files.

    What adaptive norms make of noise level 0, the only one they see, goes into norms and outputs.
    """
    try:
        w = read_published(path)
        c = len(w.get("cond.0.bias", ()))  # numbers that stand for the noise level: AR has none
        kind = "energy" if "join_x0.bias" in w else "denoiser" if c else "ar"
        rows, d = w["transformer.embed.weight"].shape
        head_size = 2 * len(w.pop("rotary_emb.inv_freq", range(32)))
        n_layer = sum(name.endswith("norm1.weight") for name in w)
        config = Config(rows - 1, block_size, n_layer, d // head_size, d - d % head_size)
        w = {name.replace("weight", "bias"): torch.zeros(d) for name in w if "norm" in name} | w
        with torch.device("meta"):  # names and shapes are checked before memory is taken
            model = KINDS[kind](config)
            if kind == "energy":  # linear, mean over positions, linear are one linear
                w["mlp_in.bias"] += w["mlp_in.weight"] @ w.pop("head.bias")
                w["mlp_in.weight"] = w["mlp_in.weight"].view(d, d) @ w.pop("head.weight")
                w["join_xt.weight"], w["join_x0.weight"] = w["join_x0.weight"].chunk(2, dim=1)
            else:  # without the mask's row, with the unused ones of `Head`
                added = len(model.head.bias) - config.vocab_size
                w["head.weight"] = F.pad(w["head.weight"][:-1], (0, 0, 0, added))
                w["head.bias"] = F.pad(w["head.bias"][:-1], (0, added))
            if c:
                model.cond = nn.Sequential(nn.Linear(256, c), nn.SiLU(), nn.Linear(c, c), nn.SiLU())
                model.adaLN_modulation = nn.Linear(c, 2 * d)
                for block in model.transformer.blocks:
                    block.adaLN_modulation = nn.Linear(c, 6 * d)
            model.load_state_dict(w, assign=True)
    except ImportError:
        raise ValueError(f"to read {path}: pip install safetensors") from None
    except Exception as error:  # of many kinds
        raise ValueError(f"{path} is no published network: {error!r:.150}") from error
    if c:
        cond = model.cond((torch.arange(256) < 128).double())  # 128 cosines and 128 sines of 0
        parts = [(model.transformer.norm, nn.Identity(), model.adaLN_modulation(cond).view(2, d))]
        for block in model.transformer.blocks:
            attention, mlp = block.adaLN_modulation(cond).view(2, 3, d)
            parts += [(block.norm1, block.attn_out, attention), (block.norm2, block.mlp_out, mlp)]
        for norm, out, (shift, scale, *gate) in parts:
            norm.weight.mul_(1 + scale)
            norm.bias.mul_(1 + scale).add_(shift)
            for parameter in out.parameters():  # [d, ...] or [d]
                parameter.transpose(0, -1).mul_(*gate)
    ready = KINDS[kind](config)
    ready.load_state_dict(model.state_dict(), strict=False)  # all but the layers folded away
    return ready.eval()
