"""Uses the checkpoints that train.py wrote: draws texts, compares ways to draw them, scores text.

    python sample.py                                   plain diffusion, and EDLM below it
    python sample.py --energy nce --steps 16 --watch   one setting; masks disappear as you look
    python sample.py --energy exact                    EDLM-coAR drawn exactly, in a few passes
    python sample.py --prompt "ben has a black"        continues a text
    python sample.py --infill "tom has a ___ kite. ___*8 likes the ___ kite."  ___*8: eight tokens
    python sample.py --compare --steps 4,8,inf --k 4,16    the figures of every combination
    python sample.py --eval --steps 4,8 --k 4,16           how likely each of them draws real text

A setting is a model with its energy, its number of steps T (inf: one token at a time), its number
of candidates k and its window. --compare draws from a setting and --eval scores text with it, under
the same name.

The figures of a setting: "passes in turn" are the network passes of one text that wait for each
other. "in all" also counts the candidates that are judged side by side. Then come the fraction of
valid stories (toy language), the perplexity of the drawn tokens under the run's AR model, the
entropy of each text's tokens, and the effective sample size (ess) of the importance weights. A
number behind +- is a standard error.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tiktoken
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import data
import edlm

BATCH_BYTES = {"cpu": 2**26, "cuda": 2**32}  # what hidden states and logits of a batch may take
SHOWN = 6  # texts of a setting that appear on the screen
ALONE = 8  # texts of a setting that --compare draws one by one, to time them
EXACT = "EDLM-coAR exact"
# Each energy: the checkpoint that it needs beside the denoiser's, and its name in the paper.
ENERGIES = {"ar": ("ar", "EDLM-AR"), "coar": ("ar", "EDLM-coAR"), "nce": ("energy", "EDLM-NCE")}

# ------------ 1. The command line -----------------------------------------------------------------


def number(text: str) -> int:
    """A flag's whole number from 1 on."""
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 2**31 - 1, not {text}")
    return int(text)


def numbers(text: str) -> list[int]:
    """A flag's list, as 4,16."""
    return [number(part) for part in text.split(",")]


def step_numbers(text: str) -> list[int | None]:
    """A flag's list of T, as 4,8,inf. inf becomes None: one token at a time."""
    return [None if part == "inf" else number(part) for part in text.split(",")]


def energy_name(text: str) -> str:
    """A flag's energy."""
    names = ("none", *ENERGIES, "exact")
    if text not in names and not text.startswith("hf:"):
        raise argparse.ArgumentTypeError(f"choose {', '.join(names)} or hf:NAME, not {text}")
    return text


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; the only place where a default lives."""
    parser = data.Parser(__doc__)
    add = parser.add_argument
    add("--out", default="out/toy", help="folder of the checkpoints (default: out/toy)")
    add("--device", default="", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--json", help="also write settings and figures to this file, row by row")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--watch", action="store_true", help="show the first text as it is drawn")
    what.add_argument("--compare", action="store_true", help="only the figures, of every energy")
    what.add_argument("--eval", action="store_true", help="score text instead of drawing it")

    about = "only --model matters to the AR model, and only --energy to an exact draw"
    add = parser.add_argument_group("what is drawn from or scored", about).add_argument
    add("--model", choices=("diffusion", "ar"), default="diffusion", help="default: diffusion")
    add(
        "--energy",
        type=energy_name,
        help="none, ar, coar or nce; exact: coAR, without T and k; hf:NAME: a causal LM, read by "
        "the package transformers (default: none and the best trained; to compare, all)",
    )
    add("--steps", type=step_numbers, help="T, or a list as 4,8,inf (default: 2; --eval: 2,4,8)")
    add("--k", type=numbers, help="candidates per step, or a list (default: 16; --eval: 4,16)")
    add("--window", type=float, default=1.0, help="judge while t > 1 - window (default: 1)")
    add("--schedule", choices=("linear", "cosine"), default="linear", help="default: linear")

    group = parser.add_argument_group("drawing")
    add = group.add_argument
    given = group.add_mutually_exclusive_group()
    given.add_argument("--prompt", help="continue this text")
    given.add_argument("--infill", help="fill the gaps of this text: ___ is one token, ___*5 five")
    add("--num", type=number, help="how many texts (default: 1000 on the toy language, else 4)")
    add("--batch", type=number, help="texts at once (default: what fits into a little memory)")
    add("--seed", type=int, default=0, help="same seed and flags, same texts (default: 0)")
    add("--judge", help="perplexity under this causal LM too, read by the package transformers")

    add = parser.add_argument_group("--eval").add_argument
    add("--data", help="data folder or text file (default: the validation data of the run)")
    add("--blocks", type=number, default=64, help="how many blocks are scored (default: 64)")
    add("--n", type=number, default=128, help="draws for each expectation (default: 128)")
    corpora = tuple(data.DETOKENIZERS)
    add("--detokenize", choices=corpora, help="of a text file: undo this corpus' tokenisation")

    args = parser.parse_args(argv)
    args.steps = args.steps or ([2, 4, 8] if args.eval else [2])
    args.k = args.k or ([4, 16] if args.eval else [16])
    if args.eval and args.schedule != "linear":
        parser.error("--eval bounds what is drawn with the linear --schedule only")
    if args.eval and args.n < max(2, *args.k):
        parser.error(f"--n {args.n} draws are too few: at least 2 and as many as --k are needed")
    if args.model == "ar" and args.infill is not None:
        parser.error("--model ar writes from left to right: only diffusion can --infill")
    return args


# ------------ 2. Checkpoints, and the settings to use them with -----------------------------------


@dataclass
class Run:
    """What is in the folder of a run, as far as it is needed."""

    models: dict[str, torch.nn.Module]  # by stage: denoiser, ar, energy
    config: edlm.Config  # its vocabulary and block size are those of all models
    tokenizer: tiktoken.Encoding
    device: torch.device


def load(args) -> Run:
    """Raises what `edlm.load_models` raises, and ValueError for a tokenizer of another size."""
    device = edlm.pick_device(args.device)
    needed = {"ar"} if args.model == "ar" else {"denoiser"}
    if args.energy == "exact":
        needed.add("ar")
    if args.energy in ENERGIES:
        needed.add(ENERGIES[args.energy][0])
    # The AR model judges whatever is drawn, so it is welcome where it is not needed.
    welcome = {"ar"} if args.energy or args.model == "ar" else set(edlm.KINDS)
    found = {stage for stage in welcome if (Path(args.out) / f"{stage}.pt").exists()}
    stages = [stage for stage in edlm.KINDS if stage in needed | found]
    models, name = edlm.load_models(args.out, stages, device)
    config, tokenizer = models[stages[0]].config, data.get_tokenizer(name)
    if config.vocab_size != tokenizer.n_vocab:
        sizes = f"{config.vocab_size} tokens, its tokenizer {name} has {tokenizer.n_vocab}"
        raise ValueError(f"{args.out}/{stages[0]}.pt has {sizes}: train it on tokens of data.py")
    return Run(models, config, tokenizer, device)


@dataclass(frozen=True)
class Setting:
    """One law of texts: drawn from, or asked how likely a text is."""

    model: str  # "AR", "MDLM", EXACT, or the name of an energy in the paper
    energy: Callable | None = None
    steps: int | None = None  # None: one token at a time
    k: int | None = None
    window: float = 1.0
    schedule: str = "linear"

    @property
    def name(self) -> str:
        """What its row is called in every table."""
        if self.model in ("AR", EXACT):  # they have no steps
            return self.model
        candidates = "" if self.k is None else f" k={self.k}"
        return f"{self.model} T={self.steps or 'inf'}{candidates}"


def make_energy(name: str, models: dict) -> Callable:
    """The energy called `name` in ENERGIES, out of the models that `edlm.load_models` returned."""
    if name == "nce":
        return models["energy"]
    return edlm.ARResidual(models["ar"], carry_over=name == "coar")


def load_energies(args, run: Run) -> dict[str, Callable]:
    """The energies that are asked for, by their names in the paper."""
    if args.model == "ar":
        return {}
    if args.energy and args.energy.startswith("hf:"):
        return {"EDLM-hf": OutsideLM(args.energy.removeprefix("hf:"), run).energy}
    names = [name for name, (stage, _) in ENERGIES.items() if stage in run.models]
    if args.energy:
        names = [name for name in names if name == args.energy]
    elif not (args.compare or args.eval):
        names = names[-1:]  # the best
    return {ENERGIES[name][1]: make_energy(name, run.models) for name in names}


def list_settings(args, run: Run, energies: dict[str, Callable]) -> list[Setting]:
    """What to draw from or to score with, in the order of the tables."""
    if args.model == "ar":
        return [Setting("AR")]
    several = args.compare or args.eval
    settings = []
    if several and "ar" in run.models and args.infill is None:  # AR sees nothing right of a gap
        settings.append(Setting("AR"))
    diffusion = partial(Setting, window=args.window, schedule=args.schedule)
    for steps in args.steps:
        if several or args.energy in (None, "none"):
            settings.append(diffusion("MDLM", steps=steps))
        for model, energy in energies.items():
            settings += [diffusion(model, energy, steps, k) for k in args.k]
    if args.energy == "exact" or (several and args.energy is None and "ar" in run.models):
        settings.append(Setting(EXACT))
    return settings


# ------------ 3. Drawing --------------------------------------------------------------------------


def start_state(args, run: Run) -> Tensor:
    """Long[L]: [EOT], given tokens, and the mask where one is wanted. ValueError if too long."""
    mask, eot, L = run.config.mask_id, run.tokenizer.eot_token, run.config.block_size
    words = run.tokenizer.name in ("gpt2", "toy")  # their tokens carry the space before a word

    def encode(text: str) -> list[int]:
        return data.encode(run.tokenizer, text.rstrip(" ") if words else text)

    if args.infill is None:
        tokens = [eot, *encode(args.prompt or "")]
        if len(tokens) >= L:
            raise ValueError(f"the prompt has {len(tokens) - 1} tokens, {L - 2} fit: shorten it")
        return torch.tensor(tokens + [mask] * (L - len(tokens)))
    tokens = [eot]
    *pieces, last = re.split(r"_{3,}(\*\d+|)", args.infill)  # text, gap, text, gap, ..., text
    for text, gap in zip(pieces[::2], pieces[1::2], strict=True):
        wanted = int(gap[1:] or 1) if len(gap) < 12 else L  # a number that long is refused below
        tokens += encode(text) + [mask] * min(wanted, L)
    tokens += encode(last) + [eot]
    if mask not in tokens:
        raise ValueError("--infill has no gap: mark one with ___, or five with ___*5")
    if len(tokens) > L:
        raise ValueError(f"with its gaps the text exceeds the {L - 2} tokens that fit: shorten it")
    return torch.tensor(tokens)


def states(run: Run, setting: Setting, x: Tensor, generator) -> Iterator[edlm.SampleState]:
    """The states of x Long[B, L] on its way to texts of a setting; the last one holds them."""
    mask_id, models = run.config.mask_id, run.models
    if setting.model == "AR":
        yield from ar_states(models["ar"], x, mask_id, generator)
    elif setting.model == EXACT:
        both = models["denoiser"], models["ar"]
        yield from edlm.sample_exact(*both, x, mask_id=mask_id, generator=generator)
    else:
        yield from edlm.sample_states(
            models["denoiser"],
            x,
            mask_id=mask_id,
            steps=setting.steps,
            energy=setting.energy,
            k=setting.k or 1,
            window=setting.window,
            schedule=setting.schedule,
            generator=generator,
        )


def ar_states(ar, x: Tensor, mask_id: int, generator) -> Iterator[edlm.SampleState]:
    """The AR model's texts as a single last state. Each token cost a pass over one position."""
    given = int((x[0] != mask_id).sum())
    text = ar.sample(x[:, :given], x.shape[1], generator)
    passes = torch.full((len(x),), x.shape[1] - given, device=x.device)
    zero = torch.zeros(len(x), device=x.device)
    yield edlm.SampleState(text, zero, zero / zero, passes, passes)


def default_batch(run: Run, L: int) -> int:
    """How many texts of length L are worked on at once: as many as BATCH_BYTES hold."""
    hidden, logits = 16 * run.config.n_embd, 2 * run.config.vocab_size  # floats of a token
    return max(1, BATCH_BYTES[run.device.type] // (4 * (hidden + logits) * L))


def draw(
    run: Run, setting: Setting, start: Tensor, num: int, batch: int, seed: int, watch=None
) -> tuple[Tensor, dict]:
    """`num` texts Long[num, L] of a setting, and the figures that say what they took.

    `start` Long[L] is where every text begins. `watch`, if there is one, is called with each state
    of the first batch.
    """
    generator = torch.Generator(run.device).manual_seed(seed % 2**63)
    ends, ess = [], []
    begun = time.perf_counter()
    with edlm.autocast(run.device):
        for first in range(0, num, batch):
            x = start.to(run.device).repeat(min(batch, num - first), 1)
            for state in states(run, setting, x, generator):
                ess.append(state.ess)
                if watch and first == 0:
                    watch(state)
            ends.append(state)
    x = torch.cat([end.x for end in ends]).cpu()  # waits for a GPU: only now is the time over
    row = dict(seconds_per_text=(time.perf_counter() - begun) / num)
    in_turn = torch.cat([end.in_turn for end in ends])
    row["passes_in_turn"], row["passes_in_turn_error"] = mean_and_error(in_turn)
    in_all = torch.cat([end.in_all for end in ends])
    row["passes_in_all"], row["passes_in_all_error"] = mean_and_error(in_all)
    ess = torch.cat(ess)
    row["ess"] = ess.nanmean().item() if ess.isfinite().any() else None
    if setting.model == EXACT:  # a token is an accepted draft, or was drawn when one was refused
        refused = sum(end.refused.sum().item() for end in ends)
        row["acceptance"] = 1 - refused / (num * (start == run.config.mask_id).sum().item())
    return x, row


def printable(tokenizer: tiktoken.Encoding, row: Tensor) -> str:
    """The text of Long[L], without what could steer a terminal."""
    text = data.decode(tokenizer, row.tolist())
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


class Screen:
    """Shows the first text of each state, over the one that it showed before."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.above = 0  # lines that the last text took

    def __call__(self, state: edlm.SampleState) -> None:
        """Shows a state. Where there is no terminal it is printed below the last one."""
        text = f"t = {state.t[0]:.3f}  {printable(self.tokenizer, state.x[0])}"
        if not sys.stdout.isatty():
            print(text)
            return
        columns, rows = shutil.get_terminal_size()
        lines = []
        for line in text.split("\n"):
            lines += textwrap.wrap(line, columns - 1) or [""]
        lines = lines[: rows - 2]  # the cursor cannot go back above the top of the screen
        back = f"\x1b[{self.above}F" if self.above else ""
        print(back + "\x1b[J" + "\n".join(lines), flush=True)
        self.above = len(lines)
        time.sleep(0.1)  # for the eye


# ------------ 4. How good the texts are -----------------------------------------------------------


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean of values [N] and its standard error, which a single value does not have."""
    values = values.double()
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else None
    return values.mean().item(), error


def perplexity(log_p: Tensor, tokens: Tensor) -> tuple[float, float | None]:
    """exp of the nats per token, and its standard error: of log p Float[N] of texts of tokens [N].

    Nats per token are a ratio r of two means. Its error is that of the mean of log p + r tokens.
    """
    total = tokens.sum().clamp(min=1)
    r = -log_p.double().sum() / total
    _, error = mean_and_error((log_p + r * tokens) * len(tokens) / total)
    value = r.exp().item()  # inf, where math.exp would overflow
    return value, None if error is None else error * value


def ar_perplexity(run: Run, x: Tensor, drawn: Tensor) -> tuple[float, float | None]:
    """Perplexity of the drawn tokens, at positions Bool[L] of x Long[N, L], under the AR model."""
    log_p = []
    with edlm.autocast(run.device), torch.no_grad():
        for part in x.split(default_batch(run, x.shape[1])):
            log_prob = run.models["ar"].log_prob(part.to(run.device)).cpu()
            log_p.append(log_prob[:, drawn].double().sum(dim=1))
    return perplexity(torch.cat(log_p), drawn.sum().repeat(len(x)))


def unigram_entropy(x: Tensor) -> Tensor:
    """Bits of entropy of the token frequencies in each sequence, without BOS: Float[N]."""
    shares = [row.unique(return_counts=True)[1].double() / len(row) for row in x[:, 1:]]
    return torch.stack([-(p * p.log2()).sum() for p in shares])


class OutsideLM:
    """A causal language model that nobody here trained, read by the optional package transformers.

    With --judge it is asked about the texts that were drawn, with --energy hf:NAME while drawing.
    """

    def __init__(self, name: str, run: Run):
        """Raises ValueError if there is no such package or model, or it has no end of text."""
        try:
            import transformers
        except ImportError:
            reason = "a causal LM from outside needs the package: pip install transformers"
            raise ValueError(reason) from None
        try:
            self.theirs = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name)
        except Exception as error:  # a hub, a network or a damaged folder: many kinds
            reason = str(error).strip().split("\n")[0][:150]
            raise ValueError(f"transformers could not load {name!r} ({reason})") from error
        self.name, self.ours = name, run.tokenizer
        self.model = model.float().to(run.device).eval()
        self.longest = getattr(model.config, "max_position_embeddings", None) or 1024
        self.end = self.theirs.eos_token_id
        if self.end is None:
            raise ValueError(f"{name} has no token for the end of a text")
        begin = self.theirs.bos_token_id
        self.begin = self.end if begin is None else begin
        self.same_ids = False
        if self.ours.name == "gpt2" and self.end == self.ours.eot_token:
            probe = "A probe: 1,024 naïve tokens\n\n  of  GPT-2's."
            self.same_ids = self.encode(probe) == data.encode(self.ours, probe)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without what this tokenizer would put around it."""
        return self.theirs(text, add_special_tokens=False)["input_ids"]

    def ids(self, tokens: list[int]) -> list[int]:
        """What this model reads for a sequence of ours, with BOS in front."""
        if self.same_ids:
            return tokens
        framed = tokens[-1] == self.ours.eot_token  # every block ends so: it says nothing
        ids, piece = [self.begin], []
        for token in tokens[1 : len(tokens) - framed]:
            if token == self.ours.eot_token:
                ids += [*self.encode(data.decode(self.ours, piece)), self.end]
                piece = []
            else:
                piece.append(token)
        return ids + self.encode(data.decode(self.ours, piece))

    @torch.no_grad()
    def log_prob(self, rows: list[list[int]]) -> Tensor:
        """log p of each row of ids given its first one: Float[rows]. ValueError if one is long."""
        longest = max(map(len, rows))
        if longest > self.longest:
            has = f"a text to be judged has {longest} tokens"
            raise ValueError(f"{has}, {self.name} reads {self.longest}")
        device, log_p = self.model.device, []
        logits_bytes = 8 * longest * self.model.config.vocab_size  # of a row
        at_once = max(1, BATCH_BYTES[device.type] // logits_bytes)
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            length = torch.tensor([len(row) for row in part], device=device)
            width = length.max().item()
            # No token sees what stands to its right, so padding there changes nothing.
            padded = [row + [self.end] * (width - len(row)) for row in part]
            ids = torch.tensor(padded, device=device)  # [rows, width]
            logits = self.model(ids).logits[:, :-1].float()  # what position i says of token i + 1
            target = ids[:, 1:, None]
            scores = logits.gather(2, target)[:, :, 0] - logits.logsumexp(dim=2)
            real = torch.arange(1, width, device=device) < length[:, None]
            log_p.append(scores.where(real, 0).sum(dim=1))
        return torch.cat(log_p)

    def energy(self, candidates: Tensor, x_t: Tensor, log_q: Tensor) -> Tensor:
        """E = log_q - log p, equation (5) with this model for p_AR: Float[B, K], nats.

        Where both sides have GPT-2's tokenizer, ids are passed as they are, and this is EDLM-AR.
        Otherwise a candidate becomes text, which is tokenised anew. END_OF_TEXT between documents
        becomes this model's own; the one that ends a block is not scored. This is not exact. A text
        has many spellings in tokens, and log p is that of one of them. All bytes that are not UTF-8
        become the same substitute. So p is close to this model's law of texts, but not equal to it.
        The sampler, and the bound of --eval, are right all the same: they take any energy.
        """
        rows = [self.ids(tokens) for tokens in candidates.flatten(0, 1).tolist()]
        return log_q - self.log_prob(rows).view(log_q.shape)

    def perplexity(self, texts: list[str]) -> tuple[float, float | None]:
        """Perplexity of texts, each cut where this model cannot read on, and its standard error."""
        rows = [[self.begin, *self.encode(text)][: self.longest] for text in texts]
        return perplexity(self.log_prob(rows).cpu(), torch.tensor([len(row) - 1 for row in rows]))


# ------------ 5. Draw and look --------------------------------------------------------------------

# The columns of a table: (title, key of the value, key of its standard error, format).
FIGURES = (
    ("", "name", None, ""),
    ("passes in turn", "passes_in_turn", "passes_in_turn_error", ".2f"),
    ("in all", "passes_in_all", "passes_in_all_error", ".1f"),
    ("s alone", "seconds_alone", "seconds_alone_error", ".2g"),
    ("s in batch", "seconds_per_text", None, ".2g"),
    ("valid", "valid_fraction", "valid_fraction_error", ".3f"),
    ("AR ppl", "ar_perplexity", "ar_perplexity_error", ".3f"),
    ("judge ppl", "judge_perplexity", "judge_perplexity_error", ".3f"),
    ("entropy", "entropy", "entropy_error", ".3f"),
    ("ess", "ess", None, ".1f"),
    ("accepted", "acceptance", None, ".2f"),
)
SCORES = (
    ("", "model", None, ""),
    ("", "what", None, ""),
    ("nats/token", "nats_per_token", "standard_error", ".4f"),
    ("perplexity", "perplexity", None, ".3f"),
    ("bits/character", "bits_per_character", None, ".3f"),
    ("bits/byte", "bits_per_byte", None, ".3f"),
    ("gain over MDLM", "gain", "gain_standard_error", ".4f"),
    ("with n/4", "with_quarter_n", None, ".4f"),
)


def print_table(rows: list[dict], columns: tuple) -> None:
    """Rows on the screen. A column that no row has is left out."""
    columns = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    table = [[title for title, *_ in columns]]
    for row in rows:
        cells = []
        for _, key, error, form in columns:
            value = "" if row.get(key) is None else format(row[key], form)
            cells.append(value if row.get(error) is None else f"{value} +- {row[error]:{form}}")
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print(first.ljust(widths[0]), *aligned, sep="  ")
    print()


def write_rows(args, rows: list[dict]) -> None:
    """Brings --json, if it is given, up to date. Every row is written before it is shown."""
    if args.json:
        data.write_json(args.json, {"settings": vars(args), "rows": rows})


def time_alone(run: Run, settings: list[Setting], start: Tensor, seed: int) -> Tensor:
    """Seconds that single texts of every setting take: Float[settings, ALONE].

    The settings take turns, so that a slow moment of the machine does not fall on one of them.
    """
    rounds = []
    for i in data.progress(range(ALONE + 1), desc="one by one", leave=False, delay=1):
        drawn = [draw(run, setting, start, 1, 1, seed + i) for setting in settings]
        rounds.append([figures["seconds_per_text"] for _, figures in drawn])
    return torch.tensor(rounds[1:]).T  # the first round also pays for what happens only once


def measure(args, run: Run, setting: Setting, start: Tensor, num: int, judge) -> tuple:
    """Draws from a setting: (texts Long[num, L], what is known of them, as --json has it)."""
    row = dict(name=setting.name, model=setting.model, num=num)
    row.update(steps=setting.steps, k=setting.k, window=setting.window)
    batch = args.batch or default_batch(run, len(start))
    watch = Screen(run.tokenizer) if args.watch else None
    if args.compare and run.device.type == "cuda":  # its first call also pays for the memory
        draw(run, setting, start, min(num, batch), batch, args.seed)
    x, figures = draw(run, setting, start, num, batch, args.seed, watch)
    row.update(figures)
    texts = [data.decode(run.tokenizer, tokens) for tokens in x.tolist()]
    if is_toy(run, start):
        valid = torch.tensor([data.toy_is_valid(text) for text in texts])
        row["valid_fraction"], row["valid_fraction_error"] = mean_and_error(valid)
    row["entropy"], row["entropy_error"] = mean_and_error(unigram_entropy(x))
    if "ar" in run.models:
        drawn = start == run.config.mask_id
        row["ar_perplexity"], row["ar_perplexity_error"] = ar_perplexity(run, x, drawn)
    if judge:
        row["judge_perplexity"], row["judge_perplexity_error"] = judge.perplexity(texts)
    row.update(tokens=x.tolist(), texts=texts)
    return x, row


def is_toy(run: Run, start: Tensor) -> bool:
    """Whether the texts can be right or wrong: whole stories of the toy language can."""
    return run.tokenizer.name == "toy" and len(start) == run.config.block_size


def draw_all(args, run: Run) -> None:
    """Draws from every setting. Shows texts as they come, and then the figures in a table."""
    start = start_state(args, run)
    toy = is_toy(run, start)
    num = args.num or (1000 if toy and args.prompt is None else 4)
    judge = OutsideLM(args.judge, run) if args.judge else None
    settings = list_settings(args, run, load_energies(args, run))
    print(f"{num} texts of every setting on {run.device}\n")
    rows = []
    alone = time_alone(run, settings, start, args.seed) if args.compare else None
    bar = data.progress(settings, disable=not args.compare, leave=False, delay=1)
    for i, setting in enumerate(bar):
        x, row = measure(args, run, setting, start, num, judge)
        if args.compare:
            row["seconds_alone"], row["seconds_alone_error"] = mean_and_error(alone[i])
        rows.append(row)
        write_rows(args, rows)
        if args.compare:
            continue
        print(setting.name)
        for text, tokens in zip(row["texts"][:SHOWN], x, strict=False):
            mark = "-" * 80 + "\n"
            if toy:
                mark = "[ok]      " if data.toy_is_valid(text) else "[broken]  "
            print(mark + printable(run.tokenizer, tokens))
        print()
    print_table(rows, FIGURES)
    if not args.compare:
        print("next: --energy exact, --watch, --steps 4, --prompt, --infill, --compare or --eval")


# ------------ 6. How likely a text is -------------------------------------------------------------


def held_out(args, run: Run) -> Subset:
    """The blocks to score, each Long[L]: of --data, else of the run's own validation data."""
    source, own = args.data, run.tokenizer.name
    if source is None:
        try:
            source = json.loads((Path(args.out) / "settings.json").read_text())["data"]
        except (OSError, ValueError, KeyError, TypeError):
            reason = f"{args.out} has no settings.json that names its data"
            raise ValueError(f"{reason}: give --data FOLDER or FILE") from None
    L = run.config.block_size
    if Path(source).is_file():
        blocks, tokens = data.text_blocks(source, run.tokenizer, L, args.detokenize)
    else:
        blocks = data.Blocks(source, "val", L)
        if blocks.tokenizer != own:
            raise ValueError(f"{source} holds {blocks.tokenizer} tokens, {args.out} needs {own}")
        tokens = sum(shard[2] for shard in blocks.shards)
    blocks = Subset(blocks, range(min(args.blocks, len(blocks))))
    scored = len(blocks) * (len(blocks[0]) - 2)  # a block has END_OF_TEXT at both ends
    print(f"scored {scored:,} of {tokens:,} tokens of {source}\n")
    return blocks


def estimators(run: Run, settings: list[Setting], energies: dict, n: int) -> list[tuple]:
    """A row of the table each: (name, what it is, function of x0, its setting if it has one).

    The functions give nats per sequence, Float[B].
    """

    def ar_nats(x0: Tensor) -> Tensor:
        return -run.models["ar"].log_prob(x0).sum(dim=1)

    denoiser = run.models.get("denoiser")
    mask = dict(mask_id=run.config.mask_id)
    rows = []
    if denoiser:
        rows.append(("MDLM", "bound", partial(edlm.nelbo, denoiser, **mask), None))
    for setting in settings:
        if setting.model in ("AR", EXACT):  # from masks alone, the exact sampler draws AR's law
            rows.append((setting.name, "exact", ar_nats, setting))
            continue
        chain = dict(k=setting.k or 1, n=n, steps=setting.steps, window=setting.window)
        bound = partial(edlm.sampler_nelbo, denoiser, setting.energy, **mask, **chain)
        rows.append((setting.name, "bound", bound, setting))
    for model, energy in energies.items():
        for end in ("exact",) if model == "EDLM-coAR" else ("lower", "upper"):
            joint = partial(edlm.joint_nelbo, denoiser, energy, log_partition=end, n=n, **mask)
            rows.append((f"{model} joint, log Z {end}", "estimate", joint, None))
    return rows


@torch.no_grad()
def score_blocks(name: str, score: Callable, blocks: Subset, device) -> Tensor:
    """score(x0=...) of every block, in nats per sequence: Float64[blocks]."""
    loader = DataLoader(blocks, batch_size=max(1, 4096 // len(blocks[0])))  # 4096 tokens at once
    nats = []
    for i, x0 in enumerate(data.progress(loader, desc=name, leave=False, delay=1)):
        torch.manual_seed(i)  # every row meets the same masks, so rows can be compared in pairs
        with edlm.autocast(device):
            nats.append(score(x0=x0.to(device)).cpu().double())
    return torch.cat(nats)


def score_row(name: str, what: str, nats: Tensor, M: int, tokenizer: tiktoken.Encoding) -> dict:
    """A row of the table, from nats Float[blocks] of the M scored tokens of each block."""
    mean, error = mean_and_error(nats / M)
    row = dict(model=name, what=what, nats_per_token=mean, standard_error=error)
    row["perplexity"] = torch.tensor(mean).exp().item()  # inf, where math.exp would overflow
    row.update(sequences=len(nats), tokens=len(nats) * M)
    if tokenizer.name in ("bytes", "text8"):
        # The last of the M tokens is END_OF_TEXT, which is no character of the text.
        unit = "byte" if tokenizer.name == "bytes" else "character"
        row[f"bits_per_{unit}"] = mean * M / (M - 1) / math.log(2)
    return row


def score_all(args, run: Run) -> None:
    """Says how likely each setting is to draw the text that is scored."""
    blocks = held_out(args, run)
    M = len(blocks[0]) - 1
    energies = load_energies(args, run)
    settings = list_settings(args, run, energies)
    rows, plain = [], {}
    if run.tokenizer.name == "toy" and isinstance(blocks.dataset, data.Blocks):
        floor = torch.tensor([data.toy_entropy()])
        rows.append(score_row("language (floor)", "exact", floor, M, run.tokenizer))
    for name, what, score, setting in estimators(run, settings, energies, args.n):
        nats = score_blocks(name, score, blocks, run.device)
        row = score_row(name, what, nats, M, run.tokenizer)
        if setting and setting.model == "MDLM":
            plain[setting.steps] = nats
        if setting and setting.energy:
            difference = (plain[setting.steps] - nats) / M
            row["gain"], row["gain_standard_error"] = mean_and_error(difference)
            fewer = args.n // 4
            if setting.k <= fewer:  # does the bound still fall as n grows?
                nats = score_blocks(f"{name}, n/4", partial(score, n=fewer), blocks, run.device)
                row["with_quarter_n"] = nats.mean().item() / M
        rows.append(row)
        write_rows(args, rows)
    print_table(rows, SCORES)


def main(argv: list[str] | None = None) -> None:
    """The command line: `python sample.py --help`."""
    args = parse(argv)
    if int(os.environ.get("RANK", 0)) > 0:
        return  # torchrun started several of us, and one is enough
    work = score_all if args.eval else draw_all
    work(args, load(args))


if __name__ == "__main__":
    data.run(main)
