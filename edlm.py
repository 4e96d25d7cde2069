"""EDLM: energy-based diffusion language models. The whole method, in reading order.

The paper is Xu, Geffner, Kreis, Nie, Xu, Leskovec, Ermon and Vahdat, "Energy-Based Diffusion
Language Models for Text Generation", ICLR 2025, arXiv:2410.21357. It builds on masked diffusion
(MDLM, arXiv:2406.07524) and on residual energies for text (arXiv:2004.11714).

    python train.py      trains the networks on a toy language
    python sample.py     draws texts from them

Masked diffusion hides the tokens of a text behind masks and learns to put them back. A *denoiser*
fills all masks in one pass, each from a distribution of its own. So words that should agree with
each other often do not. A *residual energy* reads a whole candidate text and says how plausible it
is. EDLM lets the denoiser draft several candidates, and the energy chooses one of them. Some tokens
of that candidate are revealed; the rest is drafted again in the next step.

Symbols, the same everywhere:

    B  sequences in a batch       L  tokens in a sequence    M  = L - 1, those that can be masked
    V  tokens in the vocabulary   K  candidates (argument k)  N  positions whose logits we want
    T  steps of the sampler (argument steps)                 t  time: 1 all masked, 0 all revealed

    x0       Long[B, L]   a clean text; x0[:, 0] is BOS: given, never masked, never scored
    mask_id  = V          the id of the mask: an input only, never an output
    x_t      Long[B, L]   x0 with some of its tokens replaced by mask_id
    S        Bool[B, L]   the masked positions
    U        Bool[B, L]   those positions of S that one step of the sampler reveals
    x_{-S}                x0 with its tokens on S masked: this is x_t, written so that it names S
    x0_U                  the tokens of x0 on U
    mu                    the denoiser's distribution, from which candidates are proposed: a product
                          of mu_i over masked positions i; mu_U is the product over U
    log_q    Float[B, K]  log mu of all masked tokens of a candidate, in nats (q: the proposal)
    E        Float[B, K]  energy of a candidate; a low energy means a plausible text

A denoiser is whatever can be called as denoiser(x_t, where Bool[B, L]) and returns logits for the N
positions that are True in `where`, in row-major order: Float[N, V], or wider if the columns beyond
V have probability 0. An energy is whatever can be called as energy(candidates Long[B, K, L], x_t,
log_q) and returns Float[B, K].

The equations, in the paper's order, with numbers of our own. mean[...] is an average. "mean over
|S| = m" averages over all sets S of m of the M positions. x' is a draw from mu(. | x_t).

    (1) forward    a token is masked with probability 1 - alpha_t; alpha_1 = 0 and alpha_0 = 1
    (2) reverse    decoding goes down from t = 1 to t = 0; in a step from t to s < t, a masked token
                   is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t), and then
                   never changes again
    (3) NELBO      sum over m = 1..M of (1/m) mean over |S| = m [
                       sum over i in S of -log mu_i(x0_i | x_{-S}) ]
    (4) EDLM       p(x0 | x_t) = mu(x0 | x_t) exp(-E(x0, x_t)) / Z(x_t), with the partition function
                   Z(x_t) = mean[exp(-E(x', x_t))]
    (5) AR energy  E(x0, x_t) = -log p_AR(x0) + log mu(x0 | x_t)
    (6) NCE loss   softplus(E(x0, x_t)) + softplus(-E(x', x_t))
    (7) weights    keep one of k candidates, with probability softmax(-E)
    (8) to (10)    what perplexity means: at the head of section 7
"""

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

# ------------ 1. The transformer ------------------------------------------------------------------


@dataclass
class Config:
    """The shape of a network. Raises ValueError for sizes that do not fit together."""

    vocab_size: int  # V, without the mask
    block_size: int  # L, the longest sequence
    n_layer: int
    n_head: int
    n_embd: int  # d, the width
    dropout: float = 0.0

    def __post_init__(self):
        sizes = (self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd)
        if not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise ValueError(f"all sizes must be whole numbers from 1 on: {self}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1: {self}")
        if self.n_embd % (2 * self.n_head):  # rotary positions pair the two halves of each head
            raise ValueError(f"n_embd must be a multiple of 2 n_head = {2 * self.n_head}: {self}")

    @property
    def mask_id(self) -> int:
        """The id of the mask, V: the one after the last real token."""
        return self.vocab_size


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: rotates the pairs (i, i + D/2) of x Float[B, heads, L, D = d / heads].

    cos and sin, Float[L, D/2], are those of the angle of each pair at each position.
    """
    a, b = x.chunk(2, dim=-1)
    rotated = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return rotated.to(x.dtype)  # cos and sin are float32, x may be bfloat16


class Block(nn.Module):
    """One pre-norm block: h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: Config, causal: bool):
        super().__init__()
        d = config.n_embd
        self.n_head = config.n_head
        self.causal = causal
        self.dropout = config.dropout
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.norm2 = nn.LayerNorm(d)
        self.mlp_in = nn.Linear(d, 4 * d)
        self.mlp_out = nn.Linear(4 * d, d)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, cache: list | None = None) -> Tensor:
        """Hidden states Float[B, L, d] -> the same. `cache` is explained in Transformer.forward."""
        B, L, d = h.shape
        qkv = self.qkv(self.norm1(h)).view(B, L, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, L, D] each
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache:  # not None and not empty: keys and values of the tokens before
            k = torch.cat((cache[0], k), dim=2)
            v = torch.cat((cache[1], v), dim=2)
        if cache is not None:
            cache[:] = k, v
        # A single new token may look at everything before it, so it needs no causal mask.
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


class Transformer(nn.Module):
    """The network behind all three models. They differ in `causal` and in what is put on top.

    It is not told the time t. Once it is known *which* tokens are visible, the noise level says
    nothing more about the masked ones (RADD, arXiv:2406.03736). So one output stays valid for as
    long as nothing is revealed.

    Rotary attention sees only differences of positions: in a row of nothing but masks, all
    positions would look alike. The BOS token in front tells them apart. This is why it is never
    masked.
    """

    def __init__(self, config: Config, causal: bool):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size + 1, config.n_embd)  # the last row is the mask
        self.blocks = nn.ModuleList(Block(config, causal) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        half = config.n_embd // config.n_head // 2
        frequency = 10000 ** -(torch.arange(half) / half)  # [D / 2]
        angle = torch.outer(torch.arange(config.block_size), frequency)  # [L, D / 2]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.apply(init_weights)
        for block in self.blocks:  # each block adds two branches to the hidden states: scale them
            for out in (block.attn_out, block.mlp_out):
                nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, h: Tensor, caches: list | None = None) -> Tensor:
        """Embeddings Float[B, L, d] -> hidden states Float[B, L, d].

        A causal model can read a text piece by piece: a first piece of any length, then one token
        at a time. `caches` then has a list for each block, empty at first, which keeps the keys and
        values of the tokens so far. Raises ValueError for more tokens than the block has.
        """
        start = caches[0][0].shape[2] if caches and caches[0] else 0
        end = start + h.shape[1]
        if end > len(self.cos):
            raise ValueError(f"{end} tokens do not fit into the block of {len(self.cos)}")
        cos, sin = self.cos[start:end], self.sin[start:end]
        for i, block in enumerate(self.blocks):
            h = block(h, cos, sin, caches[i] if caches else None)
        return self.norm(h)


class OutputLayer(nn.Linear):
    """Makes logits, one column for each token and some columns that are never used.

    V is rounded up to a multiple of 64, because GPUs are slow at odd sizes (GPT-2: V = 50257). The
    unused columns have a bias of -1e30: their probability and their gradient are exactly 0.
    """

    def __init__(self, config: Config):
        super().__init__(config.n_embd, math.ceil(config.vocab_size / 64) * 64)
        init_weights(self)
        nn.init.constant_(self.bias[config.vocab_size :], -1e30)


# ------------ 2. Masking: the forward process, and when tokens are revealed -----------------------


def alpha(t: Tensor, schedule: str = "linear") -> Tensor:
    """alpha_t of equation (1), the probability that a token is visible at time t: Float, any shape.

    "linear" is 1 - t, the paper's log-linear noise. "cosine" is 1 - cos(pi/2 (1 - t)), which
    reveals fewer tokens while little is known. Raises ValueError for another name.
    """
    if schedule == "linear":
        return 1 - t
    if schedule == "cosine":
        return 1 - torch.cos(math.pi / 2 * (1 - t))
    raise ValueError(f"unknown schedule {schedule!r}: choose linear or cosine")


def time_of(alpha_t: Tensor, schedule: str = "linear") -> Tensor:
    """The inverse of `alpha`: the time t at which tokens are visible with probability alpha_t."""
    if schedule == "linear":
        return 1 - alpha_t
    if schedule == "cosine":
        return 1 - torch.acos(1 - alpha_t) / (math.pi / 2)
    raise ValueError(f"unknown schedule {schedule!r}: choose linear or cosine")


def mask_tokens(x0: Tensor, n: Tensor, *, mask_id: int) -> Tensor:
    """Masks n[b] random positions of row b, never position 0: x0 Long[B, L], n Long[B] -> x_t.

    This is equation (1) with a given number of masks: all sets of that size are equally likely. It
    is for notebooks; the code below masks with the S of `draw_step`.
    """
    B, L = x0.shape
    order = torch.rand(B, L - 1, device=x0.device).argsort(dim=1)  # a random permutation per row
    masked = torch.zeros_like(x0, dtype=torch.bool)
    masked[:, 1:] = order < n[:, None]
    return x0.masked_fill(masked, mask_id)


def draw_timetable(
    masked: Tensor, steps: int | None, schedule: str = "linear", generator=None
) -> Tensor:
    """When each masked token will be revealed: masked Bool[B, L] -> Float64[B, L].

    Whether a token is revealed in a step depends on no token's value, see (2). So the times of all
    reveals can be drawn before anything else. They are given as 1 - t, which grows while we decode:
    0 is the start, 1 is the end. Positions that are not masked get inf.

    Draw u uniformly, and reveal the token at the t at which alpha_t = u. At any t it is then
    visible if u <= alpha_t. This has probability alpha_t, as (1) demands. With T steps, a token
    gets the 1 - t at which its step begins: 0, 1/T, 2/T, ... steps=None is the limit of many steps,
    in which tokens are revealed one by one. Raises ValueError for steps < 1 or an unknown schedule.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"a chain has at least 1 step, not {steps}")
    u = torch.rand(masked.shape, dtype=torch.float64, device=masked.device, generator=generator)
    times = 1 - time_of(u, schedule)
    if steps is not None:
        times = (times * steps).floor().clamp(max=steps - 1) / steps
    return times.masked_fill(~masked, math.inf)


def draw_step(x0: Tensor, steps: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A random step of a chain that ends in x0: (S Bool[B, L], U Bool[B, L], when Float64[B]).

    S is masked when the step begins, and U is revealed in it. `when` is the time when it begins,
    counted from the start of decoding. The losses of the denoiser and of the NCE energy start here,
    and so do both estimators of section 7.

    We want the sum of a cost over all steps of the chain, but look at one step only. Draw a
    timetable, pick a random token, and take the step that reveals it. A step is taken with
    probability |U| / M, so we divide by that: (M / |U|) cost is unbiased.

    The denoiser's cost is a sum over i in U of terms f(i, S) = -log mu_i(x0_i | x_{-S}). Given S
    and |U|, all subsets of S of that size are equally likely to be U. So the sum of f over U is on
    average |U| / |S| times the sum of f over S. Hence M / |S| times the sum of f over S is unbiased
    too, and it varies less. A cost that is no such sum keeps M / |U|: see `sampler_nelbo`.
    """
    B, L = x0.shape
    maskable = torch.ones_like(x0, dtype=torch.bool)
    maskable[:, 0] = False
    times = draw_timetable(maskable, steps)  # [B, L]
    # Pick a token by its rank, from 0, in the order of reveals. Each row's place is uniform in
    # [0, 1). The B places are stratified, 1/B apart, so the mean over the batch varies less.
    place = (torch.randperm(B, device=x0.device) + torch.rand(1, device=x0.device)) / B
    rank = (place * (L - 1)).long().clamp(max=L - 2)
    when = times.sort(dim=1).values.gather(1, rank[:, None])  # [B, 1]
    S = (times >= when) & maskable
    U = times == when
    return S, U, when[:, 0]


# ------------ 3. The denoiser and its NELBO -------------------------------------------------------

# Tables of probabilities [N, V] can be huge. They are made ROWS rows at a time: 2048 keep a GPU
# busy, 64 stay in a CPU's cache.
ROWS = {"cuda": 2048, "cpu": 64}


class Denoiser(nn.Module):
    """mu(x0 | x_t): a distribution over the V real tokens for each position that is asked for.

    The mask is no output, and revealed tokens are not asked for. These are the two constraints of
    MDLM's parameterisation (SUBS).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, causal=False)
        self.head = OutputLayer(config)

    def forward(self, x_t: Tensor, where: Tensor) -> Tensor:
        """x_t Long[B, L], where Bool[B, L] -> logits Float[N, V rounded up]."""
        hidden = self.transformer(self.transformer.embed(x_t))  # [B, L, d]
        return self.head(hidden[where])


def put_back(values: Tensor, where: Tensor) -> Tensor:
    """Values [N, ...] at the True positions of where Bool[B, L], 0 elsewhere: [B, L, ...]."""
    out = values.new_zeros(*where.shape, *values.shape[1:])
    out[where] = values
    return out


def token_log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits) of some tokens: Float[N, V], Long[N, K] -> Float[N, K], nats."""
    return logits.float().log_softmax(dim=1).gather(1, tokens)


def candidate_log_q(logits: Tensor, candidates: Tensor, where: Tensor) -> Tensor:
    """log mu of candidates Long[B, K, L], summed over where Bool[B, L]: Float[B, K], nats."""
    tokens = candidates.transpose(1, 2)[where]  # [N, K]
    return put_back(token_log_prob(logits, tokens), where).sum(dim=1)


def nelbo(denoiser, x0: Tensor, *, mask_id: int) -> Tensor:
    """The NELBO of masked diffusion, equation (3): x0 Long[B, L] -> Float[B], nats per sequence.

    The negative evidence lower bound is at least -log p(x0). The chain draws its timetable without
    looking at tokens, so p(x0) is a mean over timetables. By Jensen's inequality -log p(x0) is at
    most the mean over timetables of -log p(x0 | timetable), which is a sum over tokens.

    With many steps tokens are revealed one by one. While m are left, S is uniform among the sets of
    that size, and each token of S is the next with probability 1/m: this is (3). One random S for
    each row is enough for an unbiased estimate, see `draw_step`. The mean over a batch is the
    denoiser's training loss. The usual form of this loss has the weight 1/t. Here it is M / |S|:
    |S| / M is the share that really is masked; t is only its expected value. So it varies less.
    """
    S, _, _ = draw_step(x0)
    x_t = x0.masked_fill(S, mask_id)
    log_q = candidate_log_q(denoiser(x_t, S), x0[:, None], S)[:, 0]  # [B]
    return -log_q * (x0.shape[1] - 1) / S.sum(dim=1)


def probabilities(logits: Tensor, vocab_size: int) -> Tensor:
    """softmax(logits) without the unused columns: Float[N, V rounded up] -> Float[N, V]."""
    return logits.float().softmax(dim=1)[:, :vocab_size]


def categorical(logits: Tensor, k: int, generator=None) -> tuple[Tensor, Tensor]:
    """k independent exact draws from softmax(logits): Float[N, V] -> (tokens, log p), both [N, k].

    A uniform number is looked up in the row's cumulative sum, in float64. A token of probability 0
    is never drawn. The usual way, argmax of logits plus Gumbel noise, needs k V random numbers. In
    float32 it also lowers the temperature, silently (Zheng et al., arXiv:2409.02908).
    Raises ValueError, naming the row, for logits that are no distribution (nan, +inf, or all -inf).
    """
    u = torch.rand(len(logits), k, dtype=torch.float64, device=logits.device, generator=generator)
    u = 1 - u  # in (0, 1]: the first token whose cumulative sum reaches u has probability > 0
    rows = ROWS[logits.device.type]
    tokens, log_p, totals = [], [], []
    for some, some_u in zip(logits.split(rows), u.split(rows), strict=True):
        p = some.float().softmax(dim=1)  # [rows, V]
        cumulative = p.cumsum(dim=1, dtype=torch.float64)
        total = cumulative[:, -1:]  # 1, but for rounding
        drawn = torch.searchsorted(cumulative, some_u * total)
        drawn = drawn.clamp(max=p.shape[1] - 1)  # rows with nan end up beyond V
        tokens.append(drawn)
        log_p.append(p.gather(1, drawn).log())
        totals.append(total[:, 0])
    bad = ~torch.cat(totals).isfinite()
    if bad.any():
        row = bad.nonzero()[0].item()
        raise ValueError(f"row {row} of the logits is no distribution: nan, +inf or all -inf")
    return torch.cat(tokens), torch.cat(log_p)


def propose(logits: Tensor, x_t: Tensor, where: Tensor, k: int, generator=None):
    """k candidates: copies of x_t in which `where` is filled with independent draws from mu.

    logits [N, V], x_t Long[B, L], where Bool[B, L] -> (Long[B, k, L], log_q Float[B, k] in nats).
    """
    tokens, log_p = categorical(logits, k, generator)  # [N, k] both
    candidates = torch.where(where[:, :, None], put_back(tokens, where), x_t[:, :, None])
    return candidates.transpose(1, 2).contiguous(), put_back(log_p, where).sum(dim=1)


# ------------ 4. The autoregressive model ---------------------------------------------------------


class AutoregressiveLM(nn.Module):
    """p_AR(x) = product over i of p(x_i | x_<i): the same transformer, causal.

    It is the baseline, and the judge in the AR energy (5).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, causal=True)
        self.head = OutputLayer(config)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x_i | x_<i) in nats: x Long[B, L] -> Float[B, L], 0 at position 0 (BOS)."""
        B, L = x.shape
        hidden = self.transformer(self.transformer.embed(x[:, :-1]))  # token i is read off i - 1
        hidden = hidden.flatten(0, 1)  # [B M, d]
        targets = x[:, 1:].flatten()[:, None]  # [B M, 1]
        # Training needs all logits at once. Otherwise they are made a few rows at a time, so that
        # [B, L, V] numbers are never held.
        rows = len(targets) if torch.is_grad_enabled() else ROWS[x.device.type]
        pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
        log_p = torch.cat([token_log_prob(self.head(h), token) for h, token in pieces])
        return F.pad(log_p.view(B, L - 1), (1, 0))

    forward = log_prob  # what a wrapper for training on several GPUs calls

    def logits(self, x: Tensor, where: Tensor) -> Tensor:
        """Logits of p(x_i | x_<i) for the positions i in `where`, which never is 0.

        x Long[B, L], where Bool[B, L] -> Float[N, V rounded up]: called like a denoiser.
        """
        hidden = self.transformer(self.transformer.embed(x[:, :-1]))  # [B, M, d]
        return self.head(hidden[where[:, 1:]])

    @torch.no_grad()
    def sample(self, x: Tensor, length: int, generator=None) -> Tensor:
        """Continues x Long[B, P], which is BOS and any prompt, to Long[B, length], token by token.

        Keys and values are cached, so a new token costs one position. Raises ValueError if the
        length - 1 tokens that it reads do not fit into the block.
        """
        caches = [[] for _ in self.transformer.blocks]
        new = x
        while x.shape[1] < length:
            hidden = self.transformer(self.transformer.embed(new), caches)[:, -1]  # [B, d]
            new, _ = categorical(self.head(hidden), 1, generator)  # [B, 1]
            x = torch.cat((x, new), dim=1)
        return x


# ------------ 5. Residual energies ----------------------------------------------------------------


class ARResidual:
    """EDLM-AR, equation (5): the AR model judges, and the denoiser's own opinion is taken out.

    Put into (4), this cancels mu: p(x0 | x_t) is p_AR(x0), normalised over the texts that agree
    with x_t. Z is the AR model's probability of the visible tokens, which nobody can compute.

    carry_over=True is EDLM-coAR: only masked tokens are scored, not those carried over from x_t.
    Now mu exp(-E) is the product over masked i of p_AR(x0_i | x0_<i). It sums to exactly 1: Z = 1.
    """

    def __init__(self, ar: AutoregressiveLM, carry_over: bool = False):
        self.ar = ar
        self.carry_over = carry_over

    @property
    def training(self) -> bool:
        """Whether the AR model is in training mode."""
        return self.ar.training

    def __call__(self, candidates: Tensor, x_t: Tensor, log_q: Tensor) -> Tensor:
        """candidates Long[B, K, L], x_t Long[B, L], log_q Float[B, K] -> E Float[B, K], nats."""
        log_p = self.ar.log_prob(candidates.flatten(0, 1)).view(candidates.shape)  # [B, K, L]
        if self.carry_over:
            masked = x_t == self.ar.config.mask_id
            log_p = log_p.where(masked[:, None], 0)
        return log_q - log_p.sum(dim=2)


class NCEResidual(nn.Module):
    """EDLM-NCE: a bidirectional transformer reads x0 and x_t together and answers with one number.

    A linear layer from 2d to d joins the two embeddings of a position; it is written as its two
    halves. The hidden states are averaged over positions, and a small MLP turns them into a number.
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
        """A new energy with the denoiser's transformer. It reads x0 alone at first, and says 0."""
        energy = cls(denoiser.config)
        energy.transformer.load_state_dict(denoiser.transformer.state_dict())
        nn.init.eye_(energy.join_x0.weight)
        nn.init.zeros_(energy.join_x0.bias)
        nn.init.zeros_(energy.join_xt.weight)
        nn.init.zeros_(energy.mlp_out.weight)
        return energy

    def forward(self, candidates: Tensor, x_t: Tensor, log_q: Tensor) -> Tensor:
        """candidates Long[B, K, L], x_t Long[B, L] -> E Float[B, K]; log_q is not used."""
        embed = self.transformer.embed
        h = self.join_x0(embed(candidates)) + self.join_xt(embed(x_t))[:, None]  # [B, K, L, d]
        h = h.flatten(0, 1).float()  # float32, so that the residual stream stays float32
        h = self.transformer(h)  # [B K, L, d]
        # bfloat16 would leave two or three digits of E, so the rest is done in float32.
        with torch.autocast(h.device.type, enabled=False):
            h = h.float().mean(dim=1)  # [B K, d]
            return self.mlp_out(F.relu(self.mlp_in(h))).view(candidates.shape[:2])


def check_eval(**models) -> None:
    """Raises ValueError for a model in training mode: with dropout on, it is another model."""
    for name, model in models.items():
        if getattr(model, "training", False):
            raise ValueError(f"the {name} is in training mode: call its .eval() first")


def nce_loss(denoiser, energy, x0: Tensor, *, mask_id: int) -> Tensor:
    """Noise-contrastive estimation, equation (6): x0 Long[B, L] -> a scalar, the batch mean.

    The energy learns to tell a true text from a false one. The true one is x0. The false one is
    what the frozen denoiser draws for the masks of the same x_t. With the best possible energy,
    exp(-E) is the data's p(x0 | x_t) divided by mu(x0 | x_t). Then (4) is the data's distribution,
    and Z = 1.

    Raises ValueError if the denoiser is in training mode: it must draw as it will when sampling.
    """
    check_eval(denoiser=denoiser)
    S, _, _ = draw_step(x0)
    x_t = x0.masked_fill(S, mask_id)
    with torch.no_grad():
        logits = denoiser(x_t, S)
        false, _ = propose(logits, x_t, S, 1)
        candidates = torch.cat((x0[:, None], false), dim=1)  # [B, 2, L]
        log_q = candidate_log_q(logits, candidates, S)  # for energies that use it; ours does not
    e_true, e_false = energy(candidates, x_t, log_q).unbind(dim=1)  # [B] each
    return (F.softplus(e_true) + F.softplus(-e_false)).mean()


# ------------ 6. Decoding by importance sampling --------------------------------------------------


def importance_weights(E: Tensor) -> Tensor:
    """Equation (7), softmax(-E) over the candidates: Float[..., K] -> Float[..., K]."""
    return (-E.float()).softmax(dim=-1)


@torch.no_grad()
def sample_plain(
    denoiser, x, *, mask_id, steps, energy=None, k=1, window=1.0, schedule="linear"
) -> Tensor:
    """Algorithm 1 of the paper, as it is written: x Long[B, L] -> Long[B, L].

    In each step the denoiser fills all masks, k times, and the energy keeps one of the k texts. For
    each mask a coin then decides whether it takes its token from that text. The rest of the text is
    thrown away, and drafted again in the next step.

    x holds BOS, any given tokens, and mask_id where a token is wanted. The energy judges the steps
    inside the window: those that begin while 1 - t < window. So window = 1 means all steps.
    `sample` draws from the same law in less time. It also takes steps=None and a generator.
    """
    for j in range(steps):
        t, s = torch.tensor([1 - j / steps, 1 - (j + 1) / steps])
        judged = energy is not None and j / steps < window
        masked = x == mask_id
        candidates, log_q = propose(denoiser(x, masked), x, masked, k if judged else 1)
        chosen = candidates[:, 0]
        if judged:
            pick = importance_weights(energy(candidates, x, log_q)).multinomial(1)  # [B, 1]
            chosen = candidates.take_along_dim(pick[:, :, None], dim=1)[:, 0]
        alpha_t, alpha_s = alpha(t, schedule), alpha(s, schedule)
        coin = torch.rand(x.shape, device=x.device) < (alpha_s - alpha_t) / (1 - alpha_t)  # (2)
        x = torch.where(masked & coin, chosen, x)
    return x


# A first reading can go on with section 7. It uses two functions from here: `in_chunks` calls the
# energy piece by piece, and `check_energies` refuses energies that have no softmax.
#
# What follows draws from the same law as `sample_plain`, and saves time:
#
# 1. Steps that reveal nothing are skipped. The timetable of all reveals is drawn first
#    (`draw_timetable`), so each sequence can go straight to its next step that reveals a token.
#    Sequences at different times share a forward pass.
# 2. Logits are computed for few positions. Without a judge only the tokens in U are drawn. That is
#    the same law, because under mu the positions are independent.
# 3. If all k candidates agree on U, none is judged: whichever is kept, the step reveals the same.

JUDGED_TOKENS = 2**14  # tokens that go through the energy in one call


def in_chunks(energy, candidates: Tensor, x_t: Tensor, log_q: Tensor) -> Tensor:
    """energy(candidates, x_t, log_q), Float[B, K], for at most JUDGED_TOKENS tokens at a time."""
    B, K, L = candidates.shape
    texts = candidates.view(B * K, 1, L)
    x_t = x_t.repeat_interleave(K, dim=0)
    log_q = log_q.view(B * K, 1)
    size = max(1, JUDGED_TOKENS // L)
    pieces = zip(texts.split(size), x_t.split(size), log_q.split(size), strict=True)
    return torch.cat([energy(*piece) for piece in pieces]).view(B, K)


def check_energies(E: Tensor, rows) -> None:
    """Raises ValueError if softmax(-E) over K candidates is not defined, for E Float[B, ..., K].

    +inf for some of the K only means that they are never kept. +inf for all of them, -inf and nan
    are refused. E may hold only some rows of a batch: rows[b] is what the message calls row b.
    """
    lowest = E.amin(dim=-1).view(len(E), -1)  # nan if there is a nan
    bad = ~lowest.isfinite().all(dim=1)
    if bad.any():
        row = int(rows[bad.nonzero()[0].item()])
        raise ValueError(f"row {row}: energies are nan, -inf, or +inf for all candidates")


@dataclass
class SampleState:
    """What `sample_states` and `sample_exact` yield."""

    x: Tensor  # Long[B, L]
    t: Tensor  # Float[B], the time each row has reached (`sample_exact`: the share still masked)
    ess: Tensor  # Float[B], effective sample size 1 / (sum of w^2); nan where none was judged
    in_turn: Tensor  # Long[B], passes so far in sequence; judging k candidates counts as one
    in_all: Tensor  # Long[B], all passes so far; judging k candidates counts as k
    refused: Tensor | None = None  # Long[B], rounds of `sample_exact` that ended in a refusal


def check_start(x: Tensor, mask_id: int, **models) -> None:
    """Raises ValueError for a start state or for models that no sampler can begin with."""
    if (x[:, 0] == mask_id).any():
        raise ValueError("x[:, 0] must be BOS: it is given to every model and cannot be masked")
    check_eval(**models)


def choose(denoiser, energy, x_t, U, inside, rows, *, mask_id, k, generator):
    """Tokens for the positions U of x_t Long[B, L]: (chosen Long[B, L], ess Float[B]).

    `inside` Bool[B] says which rows are in the window, `rows` Long[B] how errors name them.
    """
    # The energy reads whole texts: rows inside the window have all their masks filled.
    where = torch.where(inside[:, None], x_t == mask_id, U)
    candidates, log_q = propose(denoiser(x_t, where), x_t, where, k, generator)  # [B, k, L]
    # log_q is complete for the rows inside, and not used for the others
    chosen = candidates[:, 0].clone()  # the rows that are judged are overwritten below
    ess = torch.full((len(x_t),), math.nan, device=x_t.device)
    differ = (candidates != candidates[:, :1]) & U[:, None]  # [B, k, L]
    judged = inside & differ.any(dim=(1, 2))
    if judged.any():
        few = candidates[judged]
        E = in_chunks(energy, few, x_t[judged], log_q[judged])
        check_energies(E, rows[judged])
        pick, _ = categorical(-E, 1, generator)  # equation (7)
        chosen[judged] = few.take_along_dim(pick[:, :, None], dim=1)[:, 0]
        ess[judged] = 1 / importance_weights(E).square().sum(dim=1)
    return chosen, ess


@torch.no_grad()
def sample_states(
    denoiser, x, *, mask_id, steps, energy=None, k=1, window=1.0, schedule="linear", generator=None
):
    """`sample`, as an iterator over SampleState: the start, then the state after each event.

    An event is one forward pass of the denoiser. In it, every row that still has masks goes to its
    own next step that reveals a token. Arguments and errors are those of `sample`.
    """
    if k < 1 or not 0 <= window <= 1:
        raise ValueError(f"needs k >= 1 and 0 <= window <= 1: got {k}, {window}")
    check_start(x, mask_id, denoiser=denoiser, energy=energy)
    if energy is None or window == 0:
        k = 1
    times = draw_timetable(x == mask_id, steps, schedule, generator)  # [B, L]
    t = torch.ones(len(x), device=x.device)
    in_turn = in_all = torch.zeros(len(x), dtype=torch.long, device=x.device)
    yield SampleState(x, t, torch.full_like(t, math.nan), in_turn, in_all)
    while (unfinished := times.isfinite().any(dim=1)).any():  # Bool[B]
        rows = unfinished.nonzero()[:, 0]
        now = times[rows].min(dim=1).values  # [rows]
        U = times[rows] == now[:, None]  # [rows, L]
        inside = (now < window) & (k > 1)
        chosen, row_ess = choose(
            denoiser, energy, x[rows], U, inside, rows, mask_id=mask_id, k=k, generator=generator
        )
        x, t = x.clone(), t.clone()
        x[rows] = torch.where(U, chosen, x[rows])
        t[rows] = (1 - now - (1 / steps if steps else 0)).float()  # the end of the step
        times[rows] = times[rows].masked_fill(U, math.inf)
        ess = torch.full_like(t, math.nan)
        ess[rows] = row_ess
        judged = ess.isfinite()
        in_turn = in_turn + unfinished + judged
        in_all = in_all + unfinished + k * judged
        yield SampleState(x, t, ess, in_turn, in_all)


def sample(
    denoiser, x, *, mask_id, steps, energy=None, k=1, window=1.0, schedule="linear", generator=None
) -> Tensor:
    """Draws from EDLM (Algorithm 1): x Long[B, L], mask_id where a token is wanted -> Long[B, L].

    If all but BOS is masked, this is unconditional sampling. Tokens given at the start are a
    prompt; tokens given anywhere make it infilling. Given tokens never change. Inside the window,
    where t > 1 - window, the energy judges k candidates in each step. With k = 1, no energy or
    window = 0 this is plain diffusion (MDLM). steps=None reveals one token at a time.

    The law is that of the chain of `steps` steps; the batch size does not change it. The denoiser
    makes a pass for each step that reveals a token. A torch.Generator must live on the model's
    device. Raises ValueError for arguments out of range, a masked x[:, 0], a model in training
    mode, logits that are no distribution, and energies that `check_energies` refuses.
    """
    settings = dict(steps=steps, energy=energy, k=k, window=window, schedule=schedule)
    for state in sample_states(denoiser, x, mask_id=mask_id, generator=generator, **settings):
        last = state
    return last.x


@torch.no_grad()
def sample_exact(denoiser, ar, x, *, mask_id, generator=None):
    """Draws from (4) of EDLM-coAR exactly: yields SampleState; the last one holds the texts.

    For EDLM-coAR, (4) is the product over masked i of p_AR(x0_i | x0_<i), and Z = 1. So it can be
    drawn from exactly, without k, weights or T, by speculative decoding: the denoiser drafts, and
    the AR model corrects. Each masked token i of x Long[B, L] is drafted from q_i = mu_i. Then, in
    rounds, until all is revealed:

    - The AR model reads the drafts. p_i is its distribution of token i, given those on the left.
    - Draft i is kept with probability min(1, p_i / q_i). Otherwise it is refused: a draw from the
      positive part of p_i - q_i, normalised, replaces it. Given what was read on its left, token i
      now has the law p_i.
    - All tokens up to and including the first refusal are revealed. All on their left was kept as
      it was read, so their p_i is the right one.
    - Each token further right was tested against a p_i that is now out of date, because a token on
      its left has been replaced. But it has the law p_i, which is known. So it is a draft of the
      next round, with this p_i as its q_i.

    Given tokens never change. A masked token is drawn without looking at given tokens on its right.
    In `sample`, what one step reveals is given in all later ones, and may stand to the right of a
    mask. So with T > 1 `sample` has another law, even for large k.
    `ar` has a method `logits`, as AutoregressiveLM has. Raises ValueError for a masked x[:, 0], a
    model in training mode, and logits that are no distribution.
    """
    check_start(x, mask_id, denoiser=denoiser, ar=ar)
    passes = torch.zeros(len(x), dtype=torch.long, device=x.device)
    refusals = passes
    nan = torch.full(passes.shape, math.nan, device=x.device)
    S = x == mask_id
    wanted = S.sum(dim=1).clamp(min=1)
    yield SampleState(x, S.sum(dim=1) / wanted, nan, passes, passes, refusals)
    q = probabilities(denoiser(x, S), mask_id)  # [N, V], and mask_id = V
    draft = categorical(q.log(), 1, generator)[0]  # [N, 1]
    passes = passes + S.any(dim=1)
    while (unfinished := S.any(dim=1)).any():  # Bool[B]
        read = x.masked_scatter(S, draft)[unfinished]
        p = probabilities(ar.logits(read, S[unfinished]), mask_id)  # [N, V]
        passes = passes + unfinished
        u = torch.rand(draft.shape, device=x.device, generator=generator)
        refused = ~(u * q.gather(1, draft) < p.gather(1, draft))[:, 0]  # [N], True for nan too
        rest = (p[refused] - q[refused]).clamp(min=0)
        empty = rest.sum(dim=1, keepdim=True) == 0  # p equals q up to rounding
        rest = torch.where(empty, p[refused], rest)
        draft[refused] = categorical(rest.log(), 1, generator)[0]
        refused = put_back(refused, S)  # [B, L]
        before = refused.cumsum(dim=1) - refused.long()  # refusals to the left of each position
        settled = S & (before == 0)  # up to and including the first refusal
        refusals = refusals + (refused & settled).sum(dim=1)
        x = torch.where(settled, x.masked_scatter(S, draft), x)
        still = ~settled[S]  # p, q and the drafts have a row for each True of S
        q, draft = p[still], draft[still]
        S = S & ~settled
        yield SampleState(x, S.sum(dim=1) / wanted, nan, passes, passes, refusals)


# ------------ 7. What perplexity means ------------------------------------------------------------
# Perplexity is exp(nats per token). Two different numbers have been given this name.
#
#     (8)  partition   with A_n = log of the mean of exp(-E(x', x_t)) over n draws x' from mu:
#                      mean[A_n] <= log Z <= mean[(2n - 1) A_n - 2 (n - 1) A_{n-1}]
#                      The first holds for every n, the second once n is large enough.
#     (9)  joint       sum over m = 1..M of (1/m) mean over |S| = m [
#                          -log mu(x0 | x_{-S}) + E(x0, x_{-S}) + log Z(x_{-S}) ]
#     (10) sampler     a step that reveals U out of S costs -log P_k(x0_U | x_{-S}), where
#                      P_k(x0_U | x_{-S}) = mu_U(x0_U) mean[ k w_1 / (w_1 + ... + w_k) ]
#                      and w_i is exp(-E) of candidate i. The mean is over k draws from mu. In the
#                      first one, the tokens on U are replaced by x0_U.
#
# The joint formula (9) is the paper's, and its tables report it. It is the NELBO (3) with
# -log p(x0 | x_t) of (4) in place of -log mu. It is for many steps: each step reveals one token,
# and is charged the share 1 / |S| of -log p(x0 | x_t). With T steps, a step may reveal several
# tokens, and is charged the share |U| / |S|. The true cost of revealing U is -log of the *marginal*
# probability of x0_U. If the tokens of S are independent, as under mu, the share equals the true
# cost on average over U. With an energy they depend on each other, and the share is wrong.
#
# Example: two fair bits that are always equal. Their entropy is 1 bit. The energy is the best one,
# so (4) is the data's distribution, and a chain that draws from (4) in each step is exact. With
# T = 2 steps, each bit is revealed in the first one with probability 1/2. A sum a + b stands for a
# bits charged in the first step and b in the second:
#
#     first step reveals   probability   the joint formula charges   the true cost
#     both bits                1/4           1   + 0  =  1             1 + 0  =  1
#     one of them              1/2           1/2 + 0  =  1/2           1 + 0  =  1
#     none of them             1/4           0   + 1  =  1             0 + 1  =  1
#     mean                                              3/4 bit                  1 bit
#
# In the middle row, the first bit that is revealed also tells the other one. The joint formula
# charges 1/2 bit for it, and then nothing for the other one, because it is certain. So with
# T = 2 it reports 3/4 bit. As T grows the middle row becomes certain, and the report falls to 1/2
# bit, the value of (9). But the mean of -log p is never below the entropy, for any distribution p.
#
# The sampler's cost (10) is that of the very law `sample` draws from. Of k candidates, the first is
# x0 on U with probability mu_U(x0_U), and it is then kept with probability w_1 / (w_1 + ... + w_k).
# Any of the k can be the one, hence the factor k. k = 1 is the NELBO of a chain of T steps. For k
# to infinity, P_k tends to the marginal of (4).


def log_mean_exp(a: Tensor) -> Tensor:
    """The log of the mean of exp(a) over the last dimension."""
    return a.logsumexp(dim=-1) - math.log(a.shape[-1])


@torch.no_grad()
def log_partition_bounds(denoiser, energy, x_t: Tensor, *, mask_id: int, n: int):
    """Estimates log Z(x_t) by (8): x_t Long[B, L] -> (lower, upper), Float[B] each, in nats.

    `lower` is A_n from n draws. Its mean is at most log Z (Jensen's inequality). `upper` is the
    paper's Theorem 1, with A_{n-1} averaged over the n ways to leave one draw out. For large n the
    mean of A_n is about log Z - c/n, which makes the mean of `upper` about log Z + c/n.

    At small n `upper` is no upper bound. If exp(-E) is 1000 for one text in a hundred and 1 for the
    others, log Z is 2.40. The mean of `upper` is 0.23, 0.89, 2.15, 2.99 and 2.53 for n = 2, 8, 32,
    128 and 512. `upper` is +inf for a row in which only one draw has a finite energy.
    Raises ValueError for n < 2 and for energies that `check_energies` refuses.
    """
    check_eval(denoiser=denoiser, energy=energy)
    if n < 2:
        raise ValueError(f"the bounds on log Z leave one of n >= 2 draws out: n is {n}")
    S = x_t == mask_id
    draws, log_q = propose(denoiser(x_t, S), x_t, S, n)
    E = in_chunks(energy, draws, x_t, log_q)
    check_energies(E, range(len(E)))
    log_w = -E.double()  # [B, n]; the factor 2n - 1 multiplies rounding errors
    A_n = log_mean_exp(log_w)  # [B]
    left_out = torch.eye(n, dtype=torch.bool, device=E.device)
    others = log_w[:, None].expand(-1, n, n).masked_fill(left_out, -math.inf)  # [B, n, n]
    A_less = (others.logsumexp(dim=2) - math.log(n - 1)).mean(dim=1)
    upper = (2 * n - 1) * A_n - 2 * (n - 1) * A_less
    return A_n.float(), upper.float()


@torch.no_grad()
def joint_nelbo(
    denoiser, energy, x0: Tensor, *, mask_id: int, n: int, steps=None, log_partition: str = "upper"
) -> Tensor:
    """The paper's perplexity estimator, equation (9): x0 Long[B, L] -> Float[B], nats per sequence.

    This is no bound on any likelihood; the head of this section says why. It is one random draw a
    row, unbiased except for the error in log Z. steps=None is (9); with T steps, a step is charged
    the share |U| / |S|.

    log_partition says what stands for log Z: the "lower" or the "upper" end of (8) from n draws, or
    "exact", which is 0 and needs no draws: for EDLM-coAR. At small n even "upper" is too low, and
    the perplexity comes out too good: see `log_partition_bounds`. Raises ValueError for another
    log_partition, for steps < 1, and what `log_partition_bounds` raises.
    """
    check_eval(denoiser=denoiser, energy=energy)
    if log_partition not in ("upper", "lower", "exact"):
        raise ValueError(f"log_partition must be upper, lower or exact, not {log_partition!r}")
    S, _, _ = draw_step(x0, steps)
    x_t = x0.masked_fill(S, mask_id)
    log_q = candidate_log_q(denoiser(x_t, S), x0[:, None], S)  # [B, 1]
    log_p = (log_q - energy(x0[:, None], x_t, log_q))[:, 0]  # [B]
    if log_partition != "exact":
        lower, upper = log_partition_bounds(denoiser, energy, x_t, mask_id=mask_id, n=n)
        log_p = log_p - (lower if log_partition == "lower" else upper)
    return -log_p * (x0.shape[1] - 1) / S.sum(dim=1)


@torch.no_grad()
def sampler_nelbo(
    denoiser, energy, x0: Tensor, *, mask_id: int, k: int, n: int, steps=None, window: float = 1.0
) -> Tensor:
    """An upper bound, from (10), on -log p(x0) under `sample`: Float[B], nats per sequence.

    What is bounded: `sample` from BOS and masks, with the same energy, k, window and steps (None:
    one token at a time) and the linear schedule. Each row of x0 Long[B, L] gets one random draw,
    whose mean is the bound. k = 1 or no energy gives the NELBO of a chain of T steps.

    Why it is an upper bound: by Jensen's inequality, twice. The timetable is random, as in `nelbo`;
    this gap stays. And the mean in (10) is estimated by an average of n terms, whose log is too low
    on average; this gap closes as n grows. Term i puts x0_U into draw i. Its rivals are the next
    k - 1 draws, in a circle: for n = 4 and k = 3, the rivals of term 3 are draws 4 and 1.

    What it costs: one denoiser pass and 2n energies a row. Raises ValueError unless 1 <= k <= n and
    0 <= window <= 1, for steps < 1, a model in training mode, and energies that `check_energies`
    refuses for the k candidates of a term.
    """
    check_eval(denoiser=denoiser, energy=energy)
    if not 1 <= k <= n or not 0 <= window <= 1:
        raise ValueError(f"needs 1 <= k <= n and 0 <= window <= 1: got {k}, {n}, {window}")
    M = x0.shape[1] - 1
    S, U, when = draw_step(x0, steps)
    inside = when < window  # as in `sample_states`
    x_t = x0.masked_fill(S, mask_id)
    logits = denoiser(x_t, S)
    log_q0 = candidate_log_q(logits, x0[:, None], S)[:, 0]  # [B]
    # -log mu_U of (10) is a sum over tokens: S may stand for U, see `draw_step`
    bound = -log_q0 * M / S.sum(dim=1)
    if energy is None or k == 1 or not inside.any():
        return bound
    draws, log_q = propose(logits, x_t, S, n)  # [B, n, L]
    with_x0 = torch.where(U[:, None], x0[:, None], draws)
    log_q_x0 = candidate_log_q(logits, with_x0, S)
    x_t = x_t[inside]
    E_draws = in_chunks(energy, draws[inside], x_t, log_q[inside])  # [rows inside, n]
    E_first = in_chunks(energy, with_x0[inside], x_t, log_q_x0[inside])
    rivals = (torch.arange(n)[:, None] + torch.arange(1, k)) % n  # [n, k - 1]
    E = torch.cat((E_first[:, :, None], E_draws[:, rivals]), dim=2)  # [rows inside, n, k]
    check_energies(E, inside.nonzero()[:, 0])
    log_share = log_mean_exp(math.log(k) + (-E).log_softmax(dim=2)[:, :, 0])
    bound[inside] -= log_share * M / U[inside].sum(dim=1)  # no sum over tokens: M / |U|
    return bound


# ------------ 8. Not the method: devices and checkpoints ------------------------------------------

KINDS = {"denoiser": Denoiser, "ar": AutoregressiveLM, "energy": NCEResidual}


def pick_device(name: str = "") -> torch.device:
    """torch.device "cuda" or "cpu", by default cuda where there is one; else ValueError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA GPU on this machine: use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def autocast(device: torch.device):
    """A context: bfloat16 on GPUs that have it in hardware, float32 elsewhere."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's weights. An energy remembers its denoiser by it."""
    weights = b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:16]


def save_checkpoint(path, model: nn.Module, *, tokenizer: str, **extra) -> None:
    """Writes weights, config, tokenizer name and `extra` (training state) of one of our models.

    Raises OSError if the file cannot be written; an older one is then still there.
    """
    kind = next(name for name, cls in KINDS.items() if type(model) is cls)
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

    Raises FileNotFoundError if there is none, and ValueError if it is damaged or not ours.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint {path}: run python train.py first")
    try:
        if zipfile.ZipFile(path).testzip():  # torch does not look at the checksums
            raise ValueError("a checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        model = KINDS[content["kind"]](Config(**content["config"]))
        model.load_state_dict(content.pop("weights"))
    except Exception as error:  # torch raises many kinds for a cut or foreign file
        reason = f"{path} is damaged or no checkpoint of ours ({type(error).__name__}: {error})"
        raise ValueError(reason.split("\n")[0][:200]) from error
    return model.to(device).eval(), content


def load_models(folder, stages, device="cpu") -> tuple[dict, str]:
    """The checkpoints <folder>/<stage>.pt of a run: ({stage: model}, tokenizer name).

    Raises what `load_checkpoint` raises, and ValueError if they do not belong together.
    """
    models, data = {}, None
    for stage in stages:
        path = Path(folder) / f"{stage}.pt"
        models[stage], content = load_checkpoint(path, device)
        config = models[stage].config
        facts = content["tokenizer"], config.vocab_size, config.block_size
        data = data or facts
        if content["kind"] != stage or facts != data:
            is_not = f"{path} is a {content['kind']} for {facts}, not a {stage} for {data}"
            raise ValueError(f"{is_not} (tokenizer, V, L): train both on the same data")
        if stage == "energy" and "denoiser" in models:
            if content.get("denoiser") != fingerprint(models["denoiser"]):
                raise ValueError(f"{path} corrects another denoiser: --stage energy --overwrite")
    return models, data[0]
