"""Generates, continues, fills gaps, compares and measures with the checkpoints that train.py wrote.

    python sample.py                                   plain diffusion beside EDLM, at the same number of steps
    python sample.py --energy nce --steps 16 --k 8     one setting; add --watch to see the masks go
    python sample.py --prompt "ben has a black"        continues a text
    python sample.py --infill "tom ___*3 kite."        fills gaps: ___ is one masked token, ___*3 three
    python sample.py --compare --steps 4,8 --k 2,16    quality against cost, one row per setting
    python sample.py --bench                           speed against a plain transcription of Algorithm 1

What is slow about the plain algorithm, and why `edlm.sample` draws from the same law for less, is told in
section 6 of edlm.py; `plain_algorithm_1` below is what --bench measures it against.
"""

import argparse
import math
import re
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import edlm

LOGITS_AT_ONCE = 2**28  # batches are cut so that their logits stay within 1 GiB
BENCHES = {  # shapes of the random networks of --bench
    "small": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=50257),
    "medium": dict(n_layer=6, n_head=4, n_embd=256, block_size=256, vocab_size=50257),
    "gpt2-small": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257),
}
PLAIN_STEPS_TIMED = 8  # of the plain algorithm, whose steps all cost the same


def numbers(text: str) -> list[int]:
    """'4,8,16' -> [4, 8, 16]."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {min(values)}")
    return values


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value


def parse(argv=None) -> argparse.Namespace:
    """The command line; the only place where a default lives."""
    parser = data.Parser("sample.py", __doc__)
    add = parser.add_argument
    add("--out", default="out/toy", help="folder of the checkpoints (default: out/toy)")
    add("--model", choices=("diffusion", "ar"), help="default: diffusion")
    add("--energy", choices=("none", *edlm.ENERGIES), help="what judges the candidates (default: nce, if trained)")
    add("--steps", type=numbers, help="diffusion steps T (default: 8; --bench: the block size)")
    add("--k", type=numbers, help="candidates per step (default: 16; --bench: 4)")
    add("--window", type=fraction, default=1.0, help="judge while t > 1 - window (default: 1, everywhere)")
    add("--schedule", choices=("linear", "cosine"), default="linear", help="noise schedule (default: linear)")
    add("--num", type=numbers, default=[0], help="how many texts (default: 300 on the toy language, else 4)")
    add("--seed", type=int, default=0, help="same seed and settings, same texts (default: 0)")
    add("--prompt", help="continue this text")
    add("--infill", help="fill the gaps of this text: ___ is one token, ___*5 five")
    add("--watch", action="store_true", help="print one text after every forward pass, masks visible")
    add("--json", help="also write settings, tokens, texts and figures to this file")
    add("--compare", action="store_true", help="a table over --steps, --k and energies; both may be lists: 4,8,16")
    add("--judge", help="--compare: perplexity under this causal LM too (needs the package transformers)")
    add("--bench", nargs="?", const="small", choices=BENCHES, help="measure speed (default shape: small)")
    add("--batch", type=numbers, help="texts at once (default: 1 GiB of logits; --bench, also a list: 1,8)")
    add("--max_tokens", type=int, default=edlm.MAX_TOKENS, help="tokens through the energy at once, caps its memory")
    add("--device", default="", help="cuda, mps or cpu (default: the first that is there)")
    args = parser.parse_args(argv)
    if not args.compare:
        for name in ("steps", "k"):
            if len(getattr(args, name) or []) > 1:
                parser.error(f"--{name} takes a list only with --compare")
    if args.model == "ar" and (args.infill or args.energy not in (None, "none")):
        parser.error("--model ar goes left to right: it takes neither --infill nor --energy")
    if args.prompt is not None and args.infill is not None:
        parser.error("--prompt and --infill exclude each other: put the gaps behind the prompt")
    if args.compare and args.infill is not None:
        parser.error("--compare continues a --prompt or nothing: it takes no --infill, which AR cannot do")
    if args.bench and (args.window != 1 or args.schedule != "linear"):
        parser.error("--bench measures the linear schedule with --window 1")
    if args.judge and not args.compare:
        parser.error("--judge is a column of --compare: give that too")
    if len(args.num) > 1:
        parser.error("--num is one number")
    if len(args.batch or []) > 1 and not args.bench:
        parser.error("--batch takes a list only with --bench")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must not be negative nor beyond 2**63: it is {args.seed}")
    if args.json:
        data.check_target(args.json)
    args.num = args.num[0]
    if not args.bench:
        args.steps, args.k = args.steps or [8], args.k or [16]
    return args


# ---------------------------------------------------------------------------------------------------------
# Drawing texts
# ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The checkpoints of one folder and what belongs to them."""

    models: dict
    tokenizer: object  # tiktoken.Encoding
    device: torch.device

    @property
    def config(self) -> edlm.Config:
        return next(iter(self.models.values())).config

    @property
    def is_toy(self) -> bool:
        return self.tokenizer.name == "toy"


def load_run(args) -> Run:
    """Loads what is in --out; raises FileNotFoundError or ValueError with what to do."""
    device = data.pick_device(args.device)
    stages = [stage for stage in ("denoiser", "ar", "energy") if (Path(args.out) / f"{stage}.pt").exists()]
    wanted = {"ar"} if args.model == "ar" else {"denoiser"}
    if args.energy in edlm.ENERGIES:
        wanted.add(edlm.ENERGIES[args.energy][0])
    if args.compare or (args.energy is None and args.model is None):  # whatever was trained is shown
        wanted |= set(stages)
    models, tokenizer = edlm.load_models(args.out, sorted(wanted), device)
    return Run(models, data.get_tokenizer(tokenizer), device)


def start_state(run: Run, prompt: str | None, infill: str | None) -> torch.Tensor:
    """Long[L]: [EOT], given tokens, and the mask wherever a token is wanted."""
    config, tokenizer = run.config, run.tokenizer
    mask, eot = config.mask_id, tokenizer.eot_token
    if infill is None:
        given = [eot, *data.encode(tokenizer, prompt or "")]
        if len(given) >= config.block_size:
            raise ValueError(f"the prompt has {len(given) - 1} tokens, the block holds {config.block_size - 1} and "
                             "needs room for one more: shorten it")  # fmt: skip
        return torch.tensor(given + [mask] * (config.block_size - len(given)))
    tokens = [eot]
    pieces = re.split(r"_{3,}(?:\*(\d+))?", infill)  # text, count or None, text, count or None, ..., text
    words = tokenizer.name in ("gpt2", "toy")  # their tokens carry the space before a word
    for text, count in zip(pieces[::2], [*pieces[1::2], "0"], strict=True):
        gap = int(count or 1)
        tokens += data.encode(tokenizer, text.removesuffix(" ") if words and gap else text) + [mask] * gap
    if mask not in tokens:
        raise ValueError("--infill has no gap: mark one with ___, or five with ___*5")
    if len(tokens) + 1 > config.block_size:
        raise ValueError(f"the text has {len(tokens) - 1} tokens with its gaps, the block holds "
                         f"{config.block_size - 2}: shorten it")  # fmt: skip
    return torch.tensor([*tokens, eot])


@dataclass
class Drawn:
    """Texts of one setting, and what they took; forwards and rows are means per text."""

    x: torch.Tensor  # Long[num, L]
    seconds: float
    ess: float | None = None
    denoiser_forwards: float = 0.0
    energy_forwards: float = 0.0
    projected_rows: float = 0.0


def draw(run: Run, start: torch.Tensor, num: int, args, *, model="diffusion", energy="none", steps=1, k=1) -> Drawn:
    """`num` sequences from `start`, in batches that fit into memory."""
    generator = torch.Generator(edlm.exact_device(run.device)).manual_seed(args.seed)
    L, mask_id = len(start), run.config.mask_id
    batch = args.batch[0] if args.batch else max(1, LOGITS_AT_ONCE // (run.config.vocab_size * L))
    begun, done, last_states, ess = time.perf_counter(), [], [], []
    with data.autocast(run.device):
        for i in range(0, num, batch):
            x = start.to(run.device).repeat(min(batch, num - i), 1)
            if model == "ar":
                done.append(run.models["ar"].sample(x[:, : int((start != mask_id).sum())], L, generator))
                continue
            states = edlm.sample_states(
                run.models["denoiser"], x, mask_id=mask_id, steps=steps, k=k, window=args.window,
                energy=None if energy == "none" else edlm.make_energy(energy, run.models),
                schedule=args.schedule, generator=generator, max_tokens=args.max_tokens,
            )  # fmt: skip
            for state in states:
                ess.append(state.ess)
                if args.watch and i == 0:
                    print(f"t = {state.t[0]:.3f}  {data.decode(run.tokenizer, state.x[0].tolist())}")
            done.append(state.x)
            last_states.append(state)
    drawn = Drawn(torch.cat(done).cpu(), time.perf_counter() - begun)
    if last_states:
        mean = lambda field: torch.cat([getattr(s, field) for s in last_states]).float().mean().item()  # noqa: E731
        drawn.denoiser_forwards, drawn.energy_forwards = mean("denoiser_forwards"), mean("energy_forwards")
        drawn.projected_rows = mean("projected")
        mean_ess = torch.cat(ess).nanmean().item()
        drawn.ess = None if math.isnan(mean_ess) else mean_ess
    return drawn


# ---------------------------------------------------------------------------------------------------------
# How good they are
# ---------------------------------------------------------------------------------------------------------


def texts_of(run: Run, x: torch.Tensor) -> list[str]:
    return [data.decode(run.tokenizer, row.tolist()) for row in x]


def valid_fraction(run: Run, texts: list[str]) -> float | None:
    """The share of texts that are stories of the toy language; None for other languages."""
    return sum(map(data.toy_is_valid, texts)) / len(texts) if run.is_toy else None


def unigram_entropy(x: torch.Tensor) -> float:
    """Entropy in bits of the token frequencies inside one sequence (BOS left out), mean over sequences."""
    entropies = []
    for row in x[:, 1:]:
        p = row.unique(return_counts=True)[1].double() / len(row)
        entropies.append(-(p * p.log2()).sum())
    return torch.stack(entropies).mean().item()


@torch.no_grad()
def ar_perplexity(run: Run, x: torch.Tensor) -> float:
    """exp of the mean negative log-probability per token under the run's own AR model."""
    batch = max(1, edlm.MAX_TOKENS // x.shape[1])
    with data.autocast(run.device):
        log_p = [run.models["ar"].log_prob(part.to(run.device)).sum().item() for part in x.split(batch)]
    return math.exp(-sum(log_p) / x[:, 1:].numel())


def load_judge(name: str, device):
    """An outside causal language model as a function from texts to perplexity (package transformers)."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError("--judge needs the optional package transformers: pip install transformers") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name).to(device).eval()
    except Exception as error:  # a hub, a network or a damaged folder: many kinds
        reason = data.first_line(error)[:150]
        raise ValueError(f"--judge: transformers could not load {name!r} ({reason})") from error
    longest = getattr(model.config, "max_position_embeddings", 1024)

    @torch.no_grad()
    def perplexity(texts: list[str]) -> float:
        total, count = 0.0, 0
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"][:longest]], device=device)
            if ids.shape[1] > 1:
                log_p = model(ids).logits[0, :-1].float().log_softmax(dim=-1)
                total -= log_p.gather(1, ids[0, 1:, None]).sum().item()
                count += ids.shape[1] - 1
        return math.exp(total / max(count, 1))

    return perplexity


# ---------------------------------------------------------------------------------------------------------
# What the user sees
# ---------------------------------------------------------------------------------------------------------


def show_pair(run: Run, args) -> dict:
    """No arguments: the same number of steps, plain and with the energy, side by side."""
    start, num = start_state(run, None, None), args.num or (300 if run.is_toy else 4)
    energy = "nce" if "energy" in run.models else "ar"
    steps, k = args.steps[0], args.k[0]
    plain = draw(run, start, num, args, steps=steps)
    better = draw(run, start, num, args, energy=energy, steps=steps, k=k)
    name = edlm.ENERGIES[energy][1]
    print(f"{f'plain diffusion, {steps} steps':39}| {name}, {steps} steps, k = {k}\n{'-' * 39}|{'-' * 60}")
    for left, right in list(zip(texts_of(run, plain.x), texts_of(run, better.x), strict=True))[:4]:
        for pair in side_by_side(mark(run, left), mark(run, right)):
            print(pair)
    report(run, plain, "plain diffusion")
    report(run, better, f"{name} k={k}")
    print(f"next: python sample.py --out {args.out} --energy {energy} --steps 16 --k {k} --watch   "
          "(or --energy ar, --window 0.5, --prompt, --infill, --compare)")  # fmt: skip
    return dict(figures(run, better), plain=figures(run, plain))


def mark(run: Run, text: str) -> str:
    """A text, with a word on whether it is a story where the language can say."""
    return text if not run.is_toy else text + ("  [ok]" if data.toy_is_valid(text) else "  [broken]")


def side_by_side(left: str, right: str, width: int = 38) -> list[str]:
    a, b = textwrap.wrap(left, width), textwrap.wrap(right, 60)
    rows = max(len(a), len(b))
    a, b = a + [""] * (rows - len(a)), b + [""] * (rows - len(b))
    return [f"{x:{width}} | {y}" for x, y in zip(a, b, strict=True)] + [" " * width + " |"]


def report(run: Run, drawn: Drawn, name: str) -> None:
    """One line of figures."""
    parts = [f"{name:18} {len(drawn.x)} texts in {drawn.seconds:.1f} s"]
    valid = valid_fraction(run, texts_of(run, drawn.x))
    if valid is not None:
        parts.append(f"valid {valid:.3f}")
    parts.append(f"entropy {unigram_entropy(drawn.x):.2f} bits")
    if drawn.ess is not None:
        parts.append(f"effective sample size {drawn.ess:.1f}")
    if drawn.denoiser_forwards:
        parts.append(f"{drawn.denoiser_forwards:.1f} denoiser + {drawn.energy_forwards:.0f} energy forwards a text")
    print("  ".join(parts))


def figures(run: Run, drawn: Drawn) -> dict:
    """The keys of --json; forwards and projected rows are means per text."""
    texts = texts_of(run, drawn.x)
    return dict(
        tokens=drawn.x.tolist(), texts=texts, valid_fraction=valid_fraction(run, texts),
        entropy=unigram_entropy(drawn.x), ess=drawn.ess, denoiser_forwards=drawn.denoiser_forwards,
        energy_forwards=drawn.energy_forwards, projected_rows=drawn.projected_rows, seconds=drawn.seconds,
    )  # fmt: skip


def show_one(run: Run, args) -> dict:
    """One setting: the texts, and a line of figures."""
    start = start_state(run, args.prompt, args.infill)
    model = args.model or "diffusion"
    energy = args.energy or ("nce" if "energy" in run.models and model == "diffusion" else "none")
    num = args.num or (300 if run.is_toy and args.prompt is None and args.infill is None else 4)
    drawn = draw(run, start, num, args, model=model, energy=energy, steps=args.steps[0], k=args.k[0])
    for text in texts_of(run, drawn.x)[:8]:
        print(f"{mark(run, text)}\n" + ("" if run.is_toy else "-" * 80))
    report(run, drawn, "AR" if model == "ar" else "plain diffusion" if energy == "none" else edlm.ENERGIES[energy][1])
    return figures(run, drawn)


def compare(run: Run, args) -> list[dict]:
    """--compare: AR, plain diffusion and every energy at every number of steps and candidates."""
    start, num = start_state(run, args.prompt, None), args.num or (300 if run.is_toy else 8)
    judge = load_judge(args.judge, run.device) if args.judge else None
    energies = [args.energy] if args.energy else [e for e, (stage, _) in edlm.ENERGIES.items() if stage in run.models]
    settings = [("AR", dict(model="ar"))] if "ar" in run.models else []
    for steps in args.steps:
        settings.append((f"MDLM T={steps}", dict(steps=steps)))
        settings += [(f"{edlm.ENERGIES[energy][1]} T={steps} k={k}", dict(steps=steps, energy=energy, k=k))
                     for energy in energies if energy != "none" for k in args.k]  # fmt: skip
    columns = ("valid", "AR ppl", "judge", "entropy", "ess", "denoiser", "energy", "seconds")
    print(f"{num} texts each; forwards are per text\n{'':22}" + "".join(f"{c:>10}" for c in columns))
    rows = []
    for name, setting in settings:
        drawn = draw(run, start, num, args, **setting)
        row = figures(run, drawn)
        row |= dict(name=name, ar_perplexity=ar_perplexity(run, drawn.x) if "ar" in run.models else None,
                    judge_perplexity=judge(row["texts"]) if judge else None)  # fmt: skip
        shown = ("valid_fraction", "ar_perplexity", "judge_perplexity", "entropy", "ess", "denoiser_forwards",
                 "energy_forwards", "seconds")  # fmt: skip
        print(f"{name:22}" + "".join(f"{'-' if row[key] is None else format(row[key], '.3g'):>10}" for key in shown))
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_algorithm_1(denoiser, x, *, mask_id, steps, energy=None, k=1, stop_after=None):
    """The paper's Algorithm 1 as it is written, the reference of --bench: x Long[B, L] -> Long[B, L].

    Every step computes probabilities over the whole vocabulary at every position, draws k candidates with
    Gumbel noise, judges them, and then flips a coin for each masked position. stop_after ends it early.
    """
    B, L = x.shape
    for j in range(steps if stop_after is None else min(steps, stop_after)):
        masked = x == mask_id
        p = denoiser(x, torch.ones_like(masked)).softmax(dim=-1)                            # [B L, V]
        log_p = p.log().view(B, 1, L, -1)
        noise = -torch.log(-torch.log(torch.rand(B, k, L, log_p.shape[-1], device=x.device)))
        drawn = (log_p + noise).argmax(dim=-1)                                              # [B, k, L]
        candidates = torch.where(masked[:, None], drawn, x[:, None])
        chosen = candidates[:, 0]
        if energy is not None and k > 1:
            log_q = (log_p.expand(B, k, L, -1).gather(3, drawn[..., None])[..., 0] * masked[:, None]).sum(dim=2)
            pick = (-energy(candidates, x, log_q)).softmax(dim=1).multinomial(1)            # [B, 1]
            chosen = candidates.gather(1, pick[:, :, None].expand(B, 1, L))[:, 0]
        reveal = torch.rand(B, L, device=x.device) < 1 / (steps - j)
        x = torch.where(masked & reveal, chosen, x)
    return x


def plain_ar_energy(ar, candidates, x_t, log_q):
    """The AR energy as it is written: every candidate in full, log-probabilities of the whole vocabulary."""
    x = candidates.flatten(0, 1)
    logits = ar.head(ar.transformer(ar.transformer.embed(x[:, :-1])))                       # [B k, L - 1, V]
    log_p = logits.float().log_softmax(dim=-1).gather(2, x[:, 1:, None])[..., 0]
    return log_q - log_p.sum(dim=1).view(log_q.shape)


def bare_event(denoiser, ar, x, k) -> None:
    """The transformer forwards of one event, the AR model's over k candidates, and nothing else: a floor."""
    denoiser.transformer(denoiser.transformer.embed(x))
    if k:
        ar.transformer(ar.transformer.embed(x.repeat(k, 1)[:, :-1]))


@torch.no_grad()
def bench(args) -> list[dict]:
    """--bench: `edlm.sample` against `plain_algorithm_1`, in one run on the same random weights.

    The steps of the plain algorithm all cost the same, so PLAIN_STEPS_TIMED of them are timed and scaled up.
    """
    device = data.pick_device(args.device)
    torch.manual_seed(args.seed)
    config = edlm.Config(**BENCHES[args.bench])
    denoiser = edlm.Denoiser(config).to(device).eval()
    ar = edlm.AutoregressiveLM(config).to(device).eval()
    steps, k = (args.steps or [config.block_size])[0], (args.k or [4])[0]
    print(f"{args.bench} on {device}: {BENCHES[args.bench]}, {steps} steps, k = {k} for EDLM-AR")
    print(f"{'':18}{'forwards':>10}{'rows':>12}{'seconds':>10}{'plain':>10}{'ratio':>8}{'ms/event':>10}{'bare ms':>9}")
    rows = []
    for batch in args.batch or (1, 8):
        x = torch.full((batch, config.block_size), config.mask_id, device=device)
        x[:, 0] = 0
        for name, energy, plain_energy in (
            ("MDLM", None, None),
            ("EDLM-AR", edlm.ARResidual(ar), lambda c, x_t, q: plain_ar_energy(ar, c, x_t, q)),
        ):
            setting = dict(mask_id=config.mask_id, steps=steps, k=k if energy else 1)
            ours = dict(setting, energy=energy, max_tokens=args.max_tokens)
            plain = dict(setting, energy=plain_energy, stop_after=PLAIN_STEPS_TIMED)
            with data.autocast(device):
                for _ in range(2):  # the first is a warm-up
                    bare, _, _ = data.timed(
                        lambda x=x, k=k if energy else 0: bare_event(denoiser, ar, x, k), device
                    )
                list_last(edlm.sample_states(denoiser, x[:1], **dict(ours, steps=1)))  # warm-up, of both
                plain_algorithm_1(denoiser, x[:1], **dict(plain, stop_after=1))
                states = lambda x=x, ours=ours: list_last(edlm.sample_states(denoiser, x, **ours))  # noqa: E731
                took, memory, (events, state) = data.timed(states, device)
                took_plain, memory_plain, _ = data.timed(
                    lambda x=x, plain=plain: plain_algorithm_1(denoiser, x, **plain), device
                )
            took_plain *= steps / min(steps, PLAIN_STEPS_TIMED)
            row = dict(name=name, batch=batch, forwards=events, projected_rows=int(state.projected.sum()), seconds=took,
                       plain_seconds=took_plain, ratio=took_plain / took, event_ms=1000 * took / events,
                       bare_ms=1000 * bare, peak_gib=memory, plain_peak_gib=memory_plain)  # fmt: skip
            rows.append(row)
            print(f"{name + f' batch {batch}':18}{events:10}{row['projected_rows']:12,}{took:10.2f}{took_plain:10.2f}"
                  f"{row['ratio']:8.2f}{row['event_ms']:10.1f}{row['bare_ms']:9.1f}"
                  + (f"   peak {memory:.1f} GiB, plain {memory_plain:.1f}" if memory else ""))  # fmt: skip
    full = steps * config.block_size
    print(f"plain: {steps} forwards, {full:,} rows a sequence ({min(steps, PLAIN_STEPS_TIMED)} steps timed, scaled); "
          "bare: an event's transformer forwards alone, no vocabulary")  # fmt: skip
    return rows


def list_last(states) -> tuple[int, edlm.SampleState]:
    """(number of shared forward passes, last state) of `sample_states`, keeping only one state at a time."""
    for count, state in enumerate(states):
        pass
    return count, state


def main(argv=None) -> None:
    """The command line: `python sample.py --help`."""
    args = parse(argv)
    if args.bench:
        result = dict(rows=bench(args))
    else:
        run = load_run(args)
        if args.compare:
            result = dict(rows=compare(run, args))
        elif args.model or args.energy or not (args.prompt is None and args.infill is None) or len(run.models) == 1:
            result = show_one(run, args)  # asked for, or there is nothing beside the denoiser to compare it with
        else:
            result = show_pair(run, args)
    if args.json:
        data.write_json(args.json, dict(settings=vars(args), **result))


if __name__ == "__main__":
    data.run("sample.py", main)
