"""EDLM: energy-based diffusion language models. The whole method, in reading order.

    Xu, Geffner, Kreis, Nie, Xu, Leskovec, Ermon, Vahdat, ICLR 2025, arXiv:2410.21357 ("the paper"), on top of
    masked diffusion (MDLM, arXiv:2406.07524) and residual energies for text (Deng et al., arXiv:2004.11714).

    python train.py      trains the three networks below on a toy language, in minutes
    python sample.py     shows plain diffusion beside EDLM

A masked-diffusion *denoiser* fills every masked position at once, each independently of the others, and so
breaks agreement between words it reveals together. A *residual energy* reads whole candidate sequences and
corrects the factorised proposal:

    (1)  forward     each token is masked with probability 1 - alpha_t, alpha_1 = 0, alpha_0 = 1
    (2)  reverse     from t to s < t a masked token is revealed with probability
                     (alpha_s - alpha_t) / (1 - alpha_t); a revealed token never changes (carry-over)
    (3)  NELBO       sum over n = 1..M of (1/n) mean over |S| = n of sum_{i in S} -log mu_i(x0_i | x_S)
    (4)  EDLM        p(x0 | x_t) = mu(x0 | x_t) exp(-E(x0, x_t)) / Z(x_t)
    (5)  AR energy   E = -log p_AR(x0) + log mu(x0 | x_t)
    (6)  NCE loss    softplus(E(x0, x_t)) + softplus(-E(x0', x_t)),  x0 data, x0' ~ mu(. | x_t)
    (7)  sampling    draw k candidates from mu, keep one with probability softmax(-E), reveal its masked
                     tokens by (2)                                                           (Algorithm 1)
    (8)  partition   E[T_n] <= log Z <~ E[(2n - 1) T_n - 2 (n - 1) T_{n-1}]                    (Theorem 1)
    (9)  joint       (3) with the sum over S replaced by -log mu(x0 | x_S) + E(x0, x_S) + log Z(x_S)
    (10) chain       -log p_U = -log mu_U(x0_U) - log E_rest[exp(-E(x0_U, rest))] + log Z, rest ~ mu

Symbols and shapes, the same everywhere:

    B batch, L block length, M = L - 1 positions that can be masked, K candidates, V vocabulary,
    N positions selected by a mask, d width
    x0      Long[B, L]     clean tokens, 0..V-1; x0[:, 0] is BOS: given, never masked, never scored
    mask_id = V            an input only, never an output
    x_t     Long[B, L]     x0 with some tokens replaced by mask_id
    where   Bool[B, L]     which positions are asked for; [N] rows follow its row-major order
    logits  Float[N, V]    denoiser(x_t, where), N rows exactly; anything callable so is a denoiser
    log_q   Float[B, K]    log-probability of a candidate's masked tokens under the denoiser, nats
    energy  Float[B, K]    energy(candidates Long[B, K, L], x_t, log_q); low means real
    mu      the denoiser's distribution;  E energy, Z its normaliser;  T_n = log mean_j exp(-E(x^(j), x_t))
            of n draws x^(j) ~ mu;  S the masked positions, x_S x0 with S masked, U in S those that one
            step reveals
    t       time           1 all masked, 0 all clean; step j of T goes from t = 1 - j/T to s = 1 - (j+1)/T

Why BOS: rotary attention sees only differences of positions, so a sequence of nothing but masks looks the
same from everywhere. One known token at the start gives it a sense of place. The AR model conditions on the
same token, so all models are scored on the same M tokens.
"""

import functools
import hashlib
import math
import os
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------
# 1. The transformer
# ---------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Shape of a network; `mask_id` is the token id after the last real one."""

    vocab_size: int  # V, real tokens only
    block_size: int  # L, the longest sequence
    n_layer: int
    n_head: int
    n_embd: int  # d
    dropout: float = 0.0

    def __post_init__(self):
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"n_embd {self.n_embd} must be a multiple of 2 * n_head = {2 * self.n_head}: "
                "rotary positions pair the two halves of each head"
            )

    @property
    def mask_id(self) -> int:
        """The id after the last real token: V."""
        return self.vocab_size


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turns each pair (first half, second half) of a head by its position's angle.

    x: Float[B, heads, L, D]; cos, sin: Float[L, D / 2].
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)   # the angles are float32


def behind(past: Tensor, new: Tensor) -> Tensor:
    """Joins keys or values: past Float[B / K, heads, P, D], each row for K rows of new Float[B, heads, L, D]."""
    past = past[:, None].expand(-1, len(new) // len(past), -1, -1, -1)             # [B / K, K, heads, P, D]
    return torch.cat((past, new.unflatten(0, past.shape[:2])), dim=3).flatten(0, 1)  # [B, heads, P + L, D]


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

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, past: tuple | None = None) -> tuple[Tensor, tuple]:
        """Float[B, L, d] -> the same, and this block's (keys, values), Float[B, heads, past + L, D] each.

        past: (keys, values) of the tokens before; with B / K rows if each is for K of the B sequences.
        """
        B, L, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(B, L, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)                            # [B, heads, L, D]
        visible = None
        if past is not None:
            k, v = behind(past[0], k), behind(past[1], v)
            if L > 1:
                visible = torch.ones(L, k.shape[2], dtype=torch.bool, device=h.device).tril(k.shape[2] - L)
        a = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=self.causal and past is None
        )
        a = self.attn_out(a.transpose(1, 2).reshape(B, L, d))                      # [B, L, d]
        h = h + F.dropout(a, self.dropout, self.training)
        m = self.mlp_out(F.gelu(self.mlp_in(self.norm2(h)), approximate="tanh"))
        return h + F.dropout(m, self.dropout, self.training), (k, v)


def init_weights(module: nn.Module) -> None:
    """Normal weights of standard deviation 0.02 and zero biases, as in GPT-2."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Head(nn.Linear):
    """Hidden states Float[..., d] -> logits over the vocabulary, Float[..., V].

    Its matrix has up to 63 unused rows: products of matrices are faster, most of all on GPUs, when each row of
    the result starts at a round address, and V = 50257 is odd.
    """

    def __init__(self, config: Config):
        super().__init__(config.n_embd, math.ceil(config.vocab_size / 64) * 64)
        self.vocab_size = config.vocab_size
        init_weights(self)

    def forward(self, hidden: Tensor) -> Tensor:
        """Float[..., d] -> Float[..., V], a view without the unused columns."""
        return super().forward(hidden)[..., : self.vocab_size]


class Transformer(nn.Module):
    """The one network behind all three models; only `causal` and what is put on top differ.

    It takes no time input. Given *which* tokens are visible, the noise level says nothing more about the
    masked ones: the posterior of absorbing-state diffusion, and so the optimal denoiser, is the same at
    every t (RADD, arXiv:2406.03736). That is also what lets sequences at different times share a forward.
    """

    def __init__(self, config: Config, causal: bool):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size + 1, config.n_embd)            # the last row is the mask
        self.blocks = nn.ModuleList(Block(config, causal) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        half = config.n_embd // config.n_head // 2
        angle = torch.outer(torch.arange(config.block_size), 10000 ** -(torch.arange(half) / half))
        self.register_buffer("cos", angle.cos(), persistent=False)                 # [L, D / 2]
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.apply(init_weights)
        for block in self.blocks:  # the residual stream is a sum of 2 n_layer branches: keep its variance
            for out in (block.attn_out, block.mlp_out):
                nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, h: Tensor, past: list | None = None, keep: list | None = None) -> Tensor:
        """Embeddings Float[B, L, d] -> hidden states Float[B, L, d].

        Causal models can continue: past holds each block's (keys, values) of the tokens before these. With an
        empty list as keep, those of all tokens so far are put there for the next call.
        """
        start = past[0][0].shape[2] if past else 0
        if start + h.shape[1] > len(self.cos):
            raise ValueError(f"{start + h.shape[1]} tokens do not fit into the block of {len(self.cos)}")
        cos, sin = self.cos[start : start + h.shape[1]], self.sin[start : start + h.shape[1]]
        for i, block in enumerate(self.blocks):
            h, keys_values = block(h, cos, sin, past[i] if past else None)
            if keep is not None:
                keep.append(keys_values)
        return self.norm(h)


# ---------------------------------------------------------------------------------------------------------
# 2. Masking: the forward process
# ---------------------------------------------------------------------------------------------------------


def alpha(t: Tensor, schedule: str = "linear") -> Tensor:
    """alpha_t, the probability that a token is still visible at time t (Float, any shape).

    linear: 1 - t, the paper's log-linear noise. cosine: 1 - cos(pi/2 (1 - t)), which reveals few tokens
    while little is known and more later (MD4, MaskGIT). Raises ValueError for another name.
    """
    if schedule == "linear":
        return 1 - t
    if schedule == "cosine":
        return 1 - torch.cos(math.pi / 2 * (1 - t))
    raise ValueError(f"unknown schedule {schedule!r}: choose linear or cosine")


def mask_tokens(x0: Tensor, n: Tensor, *, mask_id: int, generator: torch.Generator | None = None) -> Tensor:
    """Masks n random positions of each row, never position 0: x0 Long[B, L], n Long[B] -> x_t Long[B, L].

    Given how many tokens are masked, equation (1) makes every set of that size equally likely.
    """
    B, L = x0.shape
    rank = torch.rand(B, L - 1, device=x0.device, generator=generator).argsort(dim=1)  # a random permutation
    masked = torch.zeros_like(x0, dtype=torch.bool)
    masked[:, 1:] = rank < n[:, None]
    return x0.masked_fill(masked, mask_id)


def mask_counts(B: int, M: int, *, steps: int | None = None) -> Tensor:
    """How many of M positions to mask: n Long[B] on the CPU, each row alone a draw from p(n), n = 1..M.

    Equation (3) weighs a set of n masked tokens by 1/n and sums n losses over it, so n is uniform. A chain
    of `steps` steps of the linear schedule weighs it as `step_weights` says. The rows, in random order, take
    evenly spaced points of one random offset (stratified sampling): less variance in the batch mean.
    """
    u = (torch.rand(1) + torch.randperm(B) / B) % 1                                # [B]
    if steps is None:
        return (u * M).long().clamp(max=M - 1) + 1
    edges = step_weights(M, steps).sum(dim=0).cumsum(dim=0)                        # [M]
    return torch.searchsorted(edges.to(u), u, right=True).clamp(max=M - 1) + 1


@functools.cache
def step_weights(M: int, steps: int) -> Tensor:
    """Share of the loss that step j of a T-step linear chain charges to sets of n masked tokens.

    Float64[T, M], entry [j, n - 1] = (n / M) r_j Binomial(n; M, 1 - alpha_t), with r_j the probability of
    equation (2), 1 / (T - j) here. Every token is revealed exactly once, so the entries sum to 1. As T
    grows the column sums tend to 1 / M: the uniform n of the continuous-time NELBO. ValueError for T < 1.
    """
    if steps < 1:
        raise ValueError(f"a chain has at least 1 step, not {steps}")
    t = 1 - torch.arange(steps, dtype=torch.float64)[:, None] / steps              # [T, 1]
    n = torch.arange(1, M + 1, dtype=torch.float64)                                # [M]
    log_choose = math.lgamma(M + 1) - torch.lgamma(n + 1) - torch.lgamma(M - n + 1)
    log_binomial = log_choose + torch.xlogy(n, t) + torch.xlogy(M - n, 1 - t)      # [T, M]
    return log_binomial.exp() * n / M / (steps * t)


# ---------------------------------------------------------------------------------------------------------
# 3. The denoiser and its NELBO
# ---------------------------------------------------------------------------------------------------------


def selected(where: Tensor, count: int | None = None) -> Tensor:
    """Flat positions b L + i of the True entries of where Bool[B, L], in row-major order: Long[N].

    Without a count the CPU must wait for the GPU to say how many there are; with count = N nothing waits (and
    nothing checks it).
    """
    if count is None:
        return where.flatten().nonzero()[:, 0]
    return torch.nonzero_static(where.flatten(), size=count)[:, 0]


def spread(values: Tensor, index: Tensor, B: int, L: int) -> Tensor:
    """Puts values [N, ...] back at their flat positions (see `selected`), 0 elsewhere: [B, L, ...]."""
    return values.new_zeros(B * L, *values.shape[1:]).index_copy(0, index, values).unflatten(0, (B, L))


class Denoiser(nn.Module):
    """mu(x0 | x_t): one categorical over the V real tokens for each asked-for position.

    The two constraints of MDLM hold by construction: the mask is no output, and revealed tokens are copied
    because nobody asks for them.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, causal=False)
        self.head = Head(config)

    def forward(self, x_t: Tensor, where: Tensor, count: int | None = None) -> Tensor:
        """x_t Long[B, L], where Bool[B, L] -> logits Float[N, V]; only those N rows are projected.

        count: N, if the caller knows it (see `selected`).
        """
        hidden = self.transformer(self.transformer.embed(x_t))                     # [B, L, d]
        return self.head(hidden.flatten(0, 1)[selected(where, count)])             # [N, V]


def token_log_prob(logits: Tensor, x0: Tensor, where: Tensor) -> Tensor:
    """log mu_i(x0_i | x_t) in nats: logits Float[N, V], x0 Long[B, L] -> Float[B, L], 0 where not asked."""
    index = selected(where, len(logits))
    log_mu = -F.cross_entropy(logits.float(), x0.flatten()[index], reduction="none")        # [N]
    return spread(log_mu, index, *x0.shape)


def nelbo(denoiser, x0: Tensor, *, mask_id: int, n: Tensor | None = None) -> Tensor:
    """The continuous-time NELBO of masked diffusion, equation (3): Float[B], nats per sequence.

    One random mask per row: n uniform, then a random set of n positions; the row's value M / n * sum of
    cross-entropies is an unbiased draw. The time integral is already done, so no 1/t weight is left to
    blow up the variance. Differentiable: this is also the training loss. n: Long[B], how many tokens of each
    row to mask, if they were drawn by `mask_counts` before.
    """
    M = x0.shape[1] - 1
    n = (mask_counts(len(x0), M) if n is None else n).to(x0.device, non_blocking=True)
    x_t = mask_tokens(x0, n, mask_id=mask_id)
    where = x_t == mask_id
    return -token_log_prob(denoiser(x_t, where), x0, where).sum(dim=1) * M / n     # [B]


def elements_at_once(device: torch.device) -> int:
    """Size of the pieces in which [N, V] numbers are worked on where not all are kept: a CPU's cache, or GPU memory."""
    return 2**23 if device.type == "cpu" else 2**27


def exact_device(device: torch.device) -> torch.device:
    """Where to draw for a model on `device`: exact sampling needs float64, which Apple's GPU does not have."""
    return torch.device("cpu") if device.type == "mps" else device


def categorical(logits: Tensor, k: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """k independent exact draws from each row of logits Float[N, V]: tokens Long[N, k], log-probs [N, k].

    The inverse of one float64 cumulative sum per row serves all k draws. The usual argmax of logits plus
    Gumbel noise needs k V random numbers and, in float32, can never draw the rarest tokens: its noise ends
    near 16.6, a silent drop in temperature (Zheng et al., arXiv:2409.02908).
    """
    N, V = logits.shape
    tokens = torch.empty(N, k, dtype=torch.long, device=logits.device)
    log_prob = torch.empty(N, k, device=logits.device)
    device = exact_device(logits.device)
    u = torch.rand(N, k, dtype=torch.float64, device=device, generator=generator)
    rows = max(1, elements_at_once(device) // V)
    for i in range(0, N, rows):
        p = logits[i : i + rows].to(device).float().softmax(dim=1)                 # [rows, V]
        cdf = p.cumsum(dim=1, dtype=torch.float64)
        drawn = torch.searchsorted(cdf, u[i : i + rows] * cdf[:, -1:], right=True).clamp(max=V - 1)
        tokens[i : i + rows] = drawn.to(tokens.device)
        log_prob[i : i + rows] = (p.gather(1, drawn) / cdf[:, -1:]).log().to(log_prob)
    return tokens, log_prob


def propose(logits: Tensor, x_t: Tensor, where: Tensor, k: int, generator=None) -> tuple[Tensor, Tensor]:
    """k completions of x_t at `where`, tokens independent of each other: Long[B, k, L], log_q Float[B, k]."""
    (B, L), index = x_t.shape, selected(where, len(logits))
    tokens, log_prob = categorical(logits, k, generator)                           # [N, k]
    candidates = x_t.flatten()[:, None].repeat(1, k).index_copy(0, index, tokens)  # [B L, k]
    return candidates.view(B, L, k).transpose(1, 2).contiguous(), spread(log_prob, index, B, L).sum(dim=1)


def candidate_log_q(logits: Tensor, candidates: Tensor, where: Tensor) -> Tensor:
    """log_q Float[B, K] of given candidates Long[B, K, L] under logits Float[N, V] at `where` Bool[B, L]."""
    index = selected(where, len(logits))
    tokens = candidates.transpose(1, 2).flatten(0, 1)[index]                       # [N, K]
    log_mu = logits.float().log_softmax(dim=1).gather(1, tokens)
    return spread(log_mu, index, *where.shape).sum(dim=1)


# ---------------------------------------------------------------------------------------------------------
# 4. The autoregressive model
# ---------------------------------------------------------------------------------------------------------


class AutoregressiveLM(nn.Module):
    """p_AR(x) = prod_i p(x_i | x_<i), with the same transformer, causal. The baseline, and energy (5)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, causal=True)
        self.head = Head(config)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x_i | x_<i), nats, float32: x Long[B, L] -> Float[B, L], 0 at position 0 (BOS is given)."""
        B, L = x.shape
        hidden = self.transformer(self.transformer.embed(x[:, :-1]))               # token i is read off i - 1
        log_p = self._project(hidden.flatten(0, 1), x[:, 1:].flatten())            # [B (L - 1)]
        return F.pad(log_p.view(B, L - 1), (1, 0))

    forward = log_prob  # what a training wrapper calls

    def candidate_log_prob(self, candidates: Tensor, where: Tensor) -> Tensor:
        """The sum over `where` of log p(x_i | x_<i), for K candidates of each row at the least cost.

        candidates Long[B, K, L] that share x[:, 0]; where Bool[B, L], False at position 0 -> Float[B, K],
        nats. The tokens before the first at which candidates of any row disagree are read and scored once per
        row (their keys and values are handed to the K), and nothing is read behind the last asked-for token.
        """
        B, K, L = candidates.shape
        last = int((where.any(dim=0) * torch.arange(L, device=where.device)).max().clamp(min=1))
        same = (candidates == candidates[:, :1]).all(dim=1).all(dim=0)             # [L]
        shared = min(int(same.long().cumprod(dim=0).sum()), last)                  # at least BOS

        def read(tokens, past=None, keep=None):
            """[..., P] -> hidden states [..., P, d]."""
            hidden = self.transformer(self.transformer.embed(tokens.flatten(0, -2)), past, keep)
            return hidden.unflatten(0, tokens.shape[:-1])

        def score(hidden, tokens, where):
            """[..., P, d], [..., P], [..., P] -> [...]: the sum of log-probabilities at `where`."""
            log_p = self._project(hidden[where], tokens[where])
            return torch.zeros(where.shape, device=where.device).masked_scatter(where, log_p).sum(dim=-1)

        if shared <= last // 16:  # so short a past saves less than plain causal attention over everything
            first, once, hidden = 1, 0, read(candidates[:, :, :last])              # [B, K, last, d]
        else:
            past = []
            prefix = read(candidates[:, 0, :shared], keep=past)                    # [B, shared, d]
            first, once = shared, score(prefix[:, :-1], candidates[:, 0, 1:shared], where[:, 1:shared])[:, None]
            hidden = prefix[:, None, -1:].expand(B, K, 1, -1)                      # foresees token `shared`
            if shared < last:
                hidden = torch.cat((hidden, read(candidates[:, :, shared:last], past)), dim=2)
        asked = where[:, None, first : last + 1].expand(B, K, -1)
        return once + score(hidden, candidates[:, :, first : last + 1], asked)

    def _project(self, hidden: Tensor, target: Tensor) -> Tensor:
        """log p(target) = its logit - log sum exp of all V: hidden Float[N, d], target Long[N] -> Float[N].

        The vocabulary goes by in pieces (their log sum exps have a log sum exp again), so that [N, V] logits are
        never held. In training each piece is computed again in the backward pass instead of being kept. Under
        autocast single logits carry its rounding; all sums are float32.
        """
        V = self.config.vocab_size

        def piece(start, weight, bias):
            """Of these columns: log sum exp of the logits, and the target's if it is one of them, else -inf."""
            logits = F.linear(hidden, weight, bias)[:, : V - start].float()        # without the head's unused rows
            column = target - start
            inside = (column >= 0) & (column < logits.shape[1])
            chosen = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            return logits.logsumexp(dim=1), chosen.where(inside, -math.inf)

        if torch.is_grad_enabled():
            piece = functools.partial(checkpoint, piece, use_reentrant=False, preserve_rng_state=False)
        columns = max(1, elements_at_once(hidden.device) // max(1, len(target)) // 64) * 64
        weights, biases = self.head.weight.split(columns), self.head.bias.split(columns)
        log_sums, chosen = zip(*map(piece, range(0, V, columns), weights, biases), strict=True)
        return torch.stack(chosen).amax(dim=0) - torch.stack(log_sums).logsumexp(dim=0)

    @torch.no_grad()
    def sample(self, x: Tensor, length: int, generator: torch.Generator | None = None) -> Tensor:
        """Continues x Long[B, P] (BOS and any prompt) to Long[B, length], one exact draw at a time.

        Keys and values of what was read are kept, so each new token costs one position. Raises ValueError
        if `length` is more than the block, or less than the prompt.
        """
        if not x.shape[1] <= length <= self.config.block_size:
            raise ValueError(f"length {length} is not between the prompt's {x.shape[1]} tokens and the block's "
                             f"{self.config.block_size}")  # fmt: skip
        past, new = None, x
        while x.shape[1] < length:
            keep = []
            hidden = self.transformer(self.transformer.embed(new), past, keep)     # [B, 1 or P, d]
            past = keep
            new, _ = categorical(self.head(hidden[:, -1]), 1, generator)           # [B, 1]
            x = torch.cat((x, new), dim=1)
        return x


# ---------------------------------------------------------------------------------------------------------
# 5. Residual energies
# ---------------------------------------------------------------------------------------------------------


class ARResidual:
    """EDLM-AR, equation (5): the autoregressive model judges, the denoiser's own opinion is taken out.

    carry_over=True is EDLM-coAR: only masked tokens are scored by the AR model. Then
    mu(x0 | x_t) exp(-E) = prod over masked i of p_AR(x0_i | x0_<i), which sums to exactly 1 over the
    candidates: Z = 1. With False, Z is the AR probability of the tokens already revealed.
    """

    def __init__(self, ar: AutoregressiveLM, carry_over: bool = False):
        self.ar, self.carry_over = ar, carry_over

    def __call__(self, candidates: Tensor, x_t: Tensor, log_q: Tensor) -> Tensor:
        """candidates Long[B, K, L], x_t Long[B, L], log_q Float[B, K] -> energy Float[B, K], nats."""
        where = x_t == self.ar.config.mask_id
        if not self.carry_over:
            where = torch.ones_like(where)
            where[:, 0] = False
        return log_q - self.ar.candidate_log_prob(candidates, where)


class NCEResidual(nn.Module):
    """EDLM-NCE: a bidirectional transformer reads x0 and x_t together and answers with one number.

    The two embeddings of a position are joined by a linear layer from 2d to d. It is written as its two
    halves, so that x_t is embedded once for all candidates. Hidden states are averaged over positions.
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
        """A new energy that starts as the denoiser's transformer reading x0 alone, and says 0 of everything."""
        energy = cls(denoiser.config)
        energy.transformer.load_state_dict(denoiser.transformer.state_dict())
        nn.init.eye_(energy.join_x0.weight)
        nn.init.zeros_(energy.join_x0.bias)
        nn.init.zeros_(energy.join_xt.weight)
        nn.init.zeros_(energy.mlp_out.weight)
        return energy

    def forward(self, candidates: Tensor, x_t: Tensor, log_q: Tensor) -> Tensor:
        """candidates Long[B, K, L], x_t Long[B, L] -> energy Float[B, K]; log_q is not used."""
        embed = self.transformer.embed
        h = self.join_x0(embed(candidates)) + self.join_xt(embed(x_t))[:, None]    # [B, K, L, d]
        h = self.transformer(h.flatten(0, 1).float()).mean(dim=1)                  # [B K, d]
        with torch.autocast(h.device.type, enabled=False):  # bf16 would leave the answer three digits
            return self.mlp_out(F.relu(self.mlp_in(h))).view(candidates.shape[:2])  # [B, K]


def nce_loss(denoiser, energy, x0: Tensor, *, mask_id: int, n: Tensor | None = None) -> Tensor:
    """Noise-contrastive estimation, equation (6): a scalar, mean over the batch.

    Real or not? The positive is x0 with its own x_t, the negative one draw of the frozen denoiser for the
    same x_t; n as in `nelbo`. At the optimum exp(-E) is the data's p(x0 | x_t) over mu(x0 | x_t): (4) is the
    true posterior. Raises ValueError if the denoiser is in training mode: its dropout would draw negatives from another
    model than the one that proposes when sampling.
    """
    if getattr(denoiser, "training", False):
        raise ValueError("the denoiser must be frozen: call denoiser.eval() before nce_loss")
    n = mask_counts(len(x0), x0.shape[1] - 1) if n is None else n
    x_t = mask_tokens(x0, n.to(x0.device, non_blocking=True), mask_id=mask_id)
    where = x_t == mask_id
    with torch.no_grad():
        logits = denoiser(x_t, where)
        negatives, log_q = propose(logits, x_t, where, 1)
        pair = torch.cat((x0[:, None], negatives), dim=1)                          # [B, 2, L]
        log_q = torch.cat((candidate_log_q(logits, x0[:, None], where), log_q), dim=1)      # [B, 2]
    e_real, e_fake = energy(pair, x_t, log_q).unbind(dim=1)
    return (F.softplus(e_real) + F.softplus(-e_fake)).mean()


# ---------------------------------------------------------------------------------------------------------
# 6. Decoding by importance sampling (Algorithm 1)
# ---------------------------------------------------------------------------------------------------------

# Algorithm 1 as printed visits every step, computes all V probabilities at all L positions, and judges k whole
# sequences each time. The same law costs less: the steps that reveal something are drawn up front
# (`reveal_clock`), and rows of a batch share a forward pass at different times; only tokens that are due, and
# those that their judge must see, reach the vocabulary (`where`); k draws share one cumulative sum
# (`categorical`); candidates that agree on all that is due need no judge.

MAX_TOKENS = 2**14  # tokens that go through the energy in one call


def importance_weights(energy: Tensor) -> Tensor:
    """softmax(-E) over candidates, equation (7): energy Float[B, K] -> weights Float[B, K]."""
    return (-energy.float()).softmax(dim=1)


def in_chunks(energy, candidates: Tensor, x_t: Tensor, log_q: Tensor, max_tokens: int) -> Tensor:
    """energy(candidates, x_t, log_q), Float[B, K], at most max_tokens tokens (or one sequence) a call.

    The candidates of a row stay together as far as that goes: energies may share work among them.
    """
    B, K, L = candidates.shape
    k = min(K, max(1, max_tokens // L))
    b = min(B, max(1, max_tokens // (k * L)))
    rows = [slice(i, i + b) for i in range(0, B, b)]
    cols = [slice(j, j + k) for j in range(0, K, k)]
    return torch.cat(
        [torch.cat([energy(candidates[r, c], x_t[r], log_q[r, c]) for c in cols], dim=1) for r in rows]
    )


def reveal_clock(masked: Tensor, steps: int, schedule: str = "linear", generator=None) -> Tensor:
    """The step in which each masked position will be revealed: masked Bool[B, L] -> Long[B, L].

    When a token is revealed (equation 2) does not depend on what any token says, so the whole timetable
    can be drawn before the first forward pass: since alpha_1 = 0, P(step <= j) is alpha at the end of step
    j. Steps in which a row has nothing to reveal then cost it nothing. `steps` where nothing is masked.
    """
    device = exact_device(masked.device)
    s = 1 - torch.arange(1, steps + 1, dtype=torch.float64, device=device) / steps
    u = torch.rand(masked.shape, dtype=torch.float64, device=device, generator=generator)
    step = torch.searchsorted(alpha(s, schedule), u, right=True)
    return step.clamp(max=steps - 1).to(masked.device).masked_fill(~masked, steps)


@dataclass
class SampleState:
    """What `sample_states` yields: every row's sequence, its own time and what it has cost so far."""

    x: Tensor  # Long[B, L]
    t: Tensor  # Float[B], the time each row has reached: 1 at the start, 0 only once all is revealed
    ess: Tensor  # Float[B], effective sample size 1 / sum w^2 of this event's weights, nan where none were judged
    denoiser_forwards: Tensor  # Long[B], sequences through the denoiser so far
    energy_forwards: Tensor  # Long[B], candidates through the energy so far
    projected: Tensor  # Long[B], rows through the denoiser's vocabulary projection so far


@torch.no_grad()
def sample_states(
    denoiser,
    x: Tensor,
    *,
    mask_id: int,
    steps: int,
    energy=None,
    k: int = 1,
    window: float = 1.0,
    schedule: str = "linear",
    generator: torch.Generator | None = None,
    max_tokens: int = MAX_TOKENS,
):
    """`sample`, as a generator of SampleState: the start, then the state after each event.

    An event is one forward pass, shared by all rows that still have something to reveal; each such row
    moves on to its own next step that reveals a token. Arguments and errors are those of `sample`.
    """
    if steps < 1 or k < 1 or not 0 <= window <= 1:
        raise ValueError(f"needs steps >= 1, k >= 1, 0 <= window <= 1: got {steps}, {k}, {window}")
    if (x[:, 0] == mask_id).any():
        raise ValueError("x[:, 0] must be BOS: it is given to every model and cannot be masked")
    if energy is None or window == 0:
        k = 1
    clock = reveal_clock(x == mask_id, steps, schedule, generator)                 # [B, L]
    nothing = torch.full((len(x),), float("nan"), device=x.device)
    zero = torch.zeros_like(x[:, 0])
    state = SampleState(x, torch.ones_like(nothing), nothing, zero, zero, zero)
    yield state
    while len(rows := (clock < steps).any(dim=1).nonzero()[:, 0]):                 # finished rows have left
        x_t, step = state.x[rows], clock[rows].min(dim=1).values                   # each row's next event
        due = clock[rows] == step[:, None]
        inside = (step < window * steps) & (k > 1)
        where = due | (inside[:, None] & (x_t == mask_id))
        candidates, log_q = propose(denoiser(x_t, where), x_t, where, k, generator)
        chosen, ess = candidates[:, 0].clone(), nothing.clone()                    # [rows, L], [B]
        differ = ((candidates != candidates[:, :1]).any(dim=1) & due).any(dim=1)   # else any will do
        judged = (inside & differ).nonzero()[:, 0]
        if len(judged):
            few = candidates[judged]
            weights = importance_weights(in_chunks(energy, few, x_t[judged], log_q[judged], max_tokens))
            pick, _ = categorical(weights.log(), 1, generator)                     # log: it wants logits
            chosen[judged] = few[torch.arange(len(few), device=x.device), pick[:, 0]]
            ess[rows[judged]] = 1 / weights.square().sum(dim=1)
        state = SampleState(
            x=state.x.index_copy(0, rows, torch.where(due, chosen, x_t)),
            t=state.t.index_copy(0, rows, 1 - (step + 1) / steps),
            ess=ess,
            denoiser_forwards=state.denoiser_forwards.index_add(0, rows, torch.ones_like(rows)),
            energy_forwards=state.energy_forwards.index_add(0, rows[judged], torch.full_like(judged, k)),
            projected=state.projected.index_add(0, rows, where.sum(dim=1)),
        )
        clock[rows] = clock[rows].masked_fill(due, steps)
        yield state


def sample(
    denoiser, x: Tensor, *, mask_id: int, steps: int, energy=None, k: int = 1, window: float = 1.0,
    schedule: str = "linear", generator: torch.Generator | None = None, max_tokens: int = MAX_TOKENS,
) -> Tensor:  # fmt: skip
    """Draws from EDLM (Algorithm 1): x Long[B, L] with mask_id wherever a token is wanted -> Long[B, L].

    All masks after BOS is unconditional sampling, tokens first a prompt, tokens anywhere infilling; given
    tokens never change. Plain diffusion (MDLM) is k = 1, no energy, or window = 0. With an energy and k > 1,
    k candidates are judged in the steps with t > 1 - window, unless they agree on all tokens due, at most
    max_tokens tokens at a time.

    At most min(steps, masked tokens) forward passes a sequence, however large `steps` is. The law is that
    of the chain of `steps` steps, for any batch size; only floating-point rounding stands between. Raises
    ValueError for steps < 1, k < 1, window outside [0, 1], an unknown schedule or a masked x[:, 0]. Models
    must be in evaluation mode; a generator must live on the model's device (on the CPU for Apple's GPU).

    >>> x = torch.full((4, 21), mask_id); x[:, 0] = bos             # four empty sequences
    >>> edlm.sample(denoiser, x, mask_id=mask_id, steps=8, energy=edlm.ARResidual(ar), k=16)
    """
    for state in sample_states(
        denoiser, x, mask_id=mask_id, steps=steps, energy=energy, k=k, window=window, schedule=schedule,
        generator=generator, max_tokens=max_tokens,
    ):  # fmt: skip
        pass
    return state.x


# ---------------------------------------------------------------------------------------------------------
# 7. What perplexity means
# ---------------------------------------------------------------------------------------------------------
# The NELBO (3) charges a token -log mu_i for being revealed on its own. With an energy, p(x0 | x_t) is not a
# product, and two different numbers can be meant:
#   joint (9)   the paper's formula and its published tables. It charges the joint cost of all masked tokens
#               times the share of them that is revealed, though a step that reveals U costs -log p_U, the
#               *marginal* of U. The two agree only for a product. Two bits that are always equal: the truth
#               is 1 bit; with the exact posterior (9) says 0.75 for two steps, and tends to 0.5.
#   chain (10)  charges each step the marginal it really used: a bound on the negative log-likelihood of the
#               chain that draws exactly from (4) under the linear schedule, the law that `sample` tends to as
#               k grows (window = 1).


def log_mean_exp(a: Tensor) -> Tensor:
    """T_n = log mean_j exp(a_j) over the last dimension."""
    return a.logsumexp(dim=-1) - math.log(a.shape[-1])


def bounds_from_energies(energy: Tensor) -> tuple[Tensor, Tensor]:
    """Theorem 1 (8) from energies Float[B, n] of n draws of the denoiser: (lower, upper), Float[B] each.

    lower = T_n, with E[T_n] <= log Z by Jensen. upper = (2n - 1) T_n - 2 (n - 1) T_{n-1}, with T_{n-1}
    averaged over the n ways to leave one draw out; its mean is above log Z for n large enough.
    """
    B, n = energy.shape
    if n < 2:
        raise ValueError(f"the bounds on log Z leave one of n draws out: n is {n}, must be at least 2")
    log_w = -energy.to(exact_device(energy.device), torch.float64)  # 2n - 1 would multiply rounding errors
    T_n = log_mean_exp(log_w)
    left_out = torch.eye(n, dtype=torch.bool, device=log_w.device)
    others = log_w[:, None].expand(B, n, n).masked_fill(left_out, -math.inf)       # [B, n, n]
    T_less = (others.logsumexp(dim=2) - math.log(n - 1)).mean(dim=1)
    upper = (2 * n - 1) * T_n - 2 * (n - 1) * T_less
    return T_n.to(energy.device, energy.dtype), upper.to(energy.device, energy.dtype)


def draw_and_judge(energy, logits: Tensor, x_t: Tensor, where: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """n draws of the denoiser, Long[B, n, L], and their energies, Float[B, n]."""
    candidates, log_q = propose(logits, x_t, where, n)
    return candidates, in_chunks(energy, candidates, x_t, log_q, MAX_TOKENS)


@torch.no_grad()
def log_partition_bounds(denoiser, energy, x_t: Tensor, *, mask_id: int, n: int) -> tuple[Tensor, Tensor]:
    """Estimates log Z(x_t) of equation (4) from both sides: x_t Long[B, L] -> (lower, upper), Float[B], nats.

    See `bounds_from_energies`, of which n denoiser draws per row are the input. Raises ValueError for n < 2.
    """
    where = x_t == mask_id
    _, energies = draw_and_judge(energy, denoiser(x_t, where), x_t, where, n)
    return bounds_from_energies(energies)


@torch.no_grad()
def joint_nelbo(
    denoiser, energy, x0: Tensor, *, mask_id: int, n: int, steps: int | None = None, log_partition="upper"
) -> Tensor:
    """The paper's perplexity estimator, equation (9): Float[B], nats per sequence.

    One unbiased draw per row of the formula for a chain of `steps` steps (None: continuous time).
    log_partition: "upper" or "lower" end of (8) from n draws, or "exact": log Z = 0, true of EDLM-coAR and of
    no energy only (n is then unused). Not a bound on the sampler's likelihood: see the head of this section.
    Raises ValueError for another log_partition, n < 2 with a bound, or steps < 1.
    """
    if log_partition not in ("upper", "lower", "exact"):
        raise ValueError(f"log_partition must be upper, lower or exact, not {log_partition!r}")
    M = x0.shape[1] - 1
    n_masked = mask_counts(len(x0), M, steps=steps).to(x0.device)
    x_t = mask_tokens(x0, n_masked, mask_id=mask_id)
    where = x_t == mask_id
    logits = denoiser(x_t, where)
    log_q = candidate_log_q(logits, x0[:, None], where)                            # [B, 1]
    log_p = (log_q - energy(x0[:, None], x_t, log_q))[:, 0]                        # [B]
    if log_partition != "exact":
        _, energies = draw_and_judge(energy, logits, x_t, where, n)
        lower, upper = bounds_from_energies(energies)
        log_p = log_p - (lower if log_partition == "lower" else upper)
    return -log_p * M / n_masked


@torch.no_grad()
def chain_nelbo(denoiser, energy, x0: Tensor, *, mask_id: int, n: int, steps: int | None = None) -> Tensor:
    """A bound on the negative log-likelihood of the T-step chain that draws from (4): Float[B], nats.

    A step that reveals U of the masked S costs (10), both expectations over the denoiser's draws (n each,
    the same ones; T_n for the first and the upper end of (8) for log Z, so that the estimate errs upward
    once n is large enough for (8); raises ValueError for n < 2). Weighing a step by |U|, as the sum
    over tokens does, makes U one uniform member of S plus every other with the step's reveal probability;
    for steps=None that probability is 0: one token at a time, any-order autoregression by the EBM.
    The factorised part is averaged over all of S, so a zero energy gives `nelbo` for the same masks.
    """
    B, L = x0.shape
    M = L - 1
    counts = mask_counts(B, M, steps=steps)                                        # [B]
    n_masked = counts.to(x0.device)
    x_t = mask_tokens(x0, n_masked, mask_id=mask_id)
    where = x_t == mask_id
    logits = denoiser(x_t, where)
    log_mu = token_log_prob(logits, x0, where)                                     # [B, L]
    candidates, energies = draw_and_judge(energy, logits, x_t, where, n)
    _, log_z = bounds_from_energies(energies)

    u = torch.rand(B, L, device=x0.device).masked_fill(~where, 2.0)
    revealed = F.one_hot(u.argmin(dim=1), L).bool()                                # one uniform member of S
    if steps is not None:
        step = torch.multinomial(step_weights(M, steps).T[counts - 1], 1).to(x0.device)  # [B, 1]
        revealed |= where & (torch.rand(B, L, device=x0.device) < 1 / (steps - step))
    # x0 on U, the proposal's draw on the rest, and the proposal's probability of both
    clamped = torch.where(revealed[:, None], x0[:, None], candidates)
    log_q = candidate_log_q(logits, clamped, where)
    log_rest = log_mean_exp(-in_chunks(energy, clamped, x_t, log_q, MAX_TOKENS))   # [B]
    return -log_mu.sum(dim=1) * M / n_masked + (log_z - log_rest) * M / revealed.sum(dim=1)


# ---------------------------------------------------------------------------------------------------------
# 8. Checkpoints
# ---------------------------------------------------------------------------------------------------------

KINDS = {"denoiser": Denoiser, "ar": AutoregressiveLM, "energy": NCEResidual}


def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's weights: how an energy remembers the denoiser that it corrects."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_checkpoint(path, model: nn.Module, *, tokenizer: str, **extra) -> None:
    """Writes weights, config, tokenizer name and `extra` (training state: tensors and plain values).

    The file appears whole or not at all: it is written under a temporary name, flushed to disk and renamed.
    Raises OSError if it cannot be written (an older file at `path` is then still there) and ValueError for
    anything but the three models of this file.
    """
    kind = next((name for name, cls in KINDS.items() if isinstance(model, cls)), None)
    if kind is None:
        raise ValueError(f"cannot save a {type(model).__name__}: give the bare model, one of {', '.join(KINDS)}")
    content = dict(
        kind=kind, config=asdict(model.config), tokenizer=tokenizer, weights=model.state_dict(), **extra
    )
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        raise OSError(f"could not write {path}: {error}") from error


def load_checkpoint(path, device="cpu") -> tuple[nn.Module, dict]:
    """Reads a checkpoint: (the model in evaluation mode on `device`, everything else that was saved).

    Raises FileNotFoundError if there is none and ValueError if it is damaged or something else.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint {path}: run python train.py first")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        model = KINDS[content["kind"]](Config(**content["config"]))
        model.load_state_dict(content.pop("weights"))
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # torch raises many kinds for a cut or foreign file
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:120]
        raise ValueError(f"{path} is damaged or not a checkpoint of this project ({reason})") from error
    return model.to(device).eval(), content


# energy: (the checkpoint it needs beside the denoiser's, its name in the paper)
ENERGIES = {"ar": ("ar", "EDLM-AR"), "coar": ("ar", "EDLM-coAR"), "nce": ("energy", "EDLM-NCE")}


def load_models(folder, stages, device="cpu") -> tuple[dict, str]:
    """The checkpoints <folder>/<stage>.pt of a run: ({stage: model}, tokenizer name).

    Raises what `load_checkpoint` raises, and ValueError if they do not belong together: another tokenizer,
    vocabulary or block, or an energy that was trained against another denoiser.
    """
    models, first = {}, None
    for stage in stages:
        path = os.path.join(folder, f"{stage}.pt")
        models[stage], content = load_checkpoint(path, device)
        if content["kind"] != stage:
            raise ValueError(f"{path} holds a model of kind {content['kind']}: it was renamed or copied by mistake")
        config = models[stage].config
        facts = (content["tokenizer"], config.vocab_size, config.block_size)
        first = first or facts
        if facts != first:
            raise ValueError(f"{path} has (tokenizer, vocabulary, block) {facts}, {stages[0]}.pt {first}: "
                             "train both on the same data")  # fmt: skip
        if stage == "energy" and "denoiser" in models and content.get("denoiser") != fingerprint(models["denoiser"]):
            raise ValueError(f"{path} belongs to another denoiser: train it anew with --stage energy --overwrite")
    return models, first[0]


def make_energy(name: str, models: dict):
    """The energy called `name` in ENERGIES, out of what `load_models` returned."""
    if name == "nce":
        return models["energy"]
    return ARResidual(models["ar"], carry_over=name == "coar")
