"""Draws texts with the checkpoints that train.py wrote: new ones, continuations, infills.

    python sample.py                                   plain diffusion and EDLM side by side
    python sample.py --energy nce --steps 16 --watch   one setting; masks disappear as you look
    python sample.py --prompt "ben has a black"        continues a text
    python sample.py --infill "tom has a ___ kite. ___*7 likes the ___ kite."  ___*7: seven tokens
    python sample.py --compare --steps 4,8 --k 4,16    figures only, for every combination

Every setting gets one line of figures: the fraction of valid stories (toy language), perplexity of
the drawn tokens under the run's own AR model, entropy, effective sample size, forward passes per
text, seconds.
"""

import argparse
import math
import re
import shutil
import sys
import textwrap
import time
from pathlib import Path

import torch

import data
import edlm

LOGITS_AT_ONCE = 2**28  # batches are cut so that their logits stay within 1 GiB
FIGURES = dict(  # the line of figures, in order; what was not measured is left out
    valid_fraction="valid {:.3f}",
    ar_perplexity="AR ppl {:.4g}",
    judge_perplexity="judge ppl {:.4g}",
    entropy="entropy {:.2f} bits",
    ess="ess {:.1f}",
    denoiser_forwards="{:.1f} denoiser",
    energy_forwards="+ {:.0f} energy forwards",
    seconds="{:.1f} s",
)


def number(text: str) -> int:
    """One number of at least 1."""
    (value,) = data.numbers(text)
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1: {text}")
    return value


def parse(argv=None) -> argparse.Namespace:
    """The command line; the only place where a default lives."""
    parser = data.Parser("sample.py", __doc__)
    add = parser.add_argument
    add("--out", default="out/toy", help="folder of the checkpoints (default: out/toy)")
    add("--model", choices=("diffusion", "ar"), default="diffusion", help="default: diffusion")
    add("--energy", choices=("none", *edlm.ENERGIES), help="default: none beside the best trained")
    add("--steps", type=data.numbers, help="diffusion steps T, or a list (default: 8)")
    add("--k", type=data.numbers, help="candidates per step, or a list (default: 16)")
    add("--window", type=fraction, help="judge candidates while t > 1 - window (default: 1)")
    add("--schedule", choices=("linear", "cosine"), help="noise schedule (default: linear)")
    add("--num", type=number, help="how many texts (default: 300 on the toy language, else 4)")
    add("--batch", type=number, help="texts at once (default: 1 GiB of logits)")
    add("--seed", type=int, default=0, help="same seed and settings, same texts (default: 0)")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", help="continue this text")
    given.add_argument("--infill", help="fill the gaps of this text: ___ is one token, ___*5 five")
    add("--watch", action="store_true", help="show the first text as it is drawn")
    add("--compare", action="store_true", help="figures only, of AR, plain and every energy")
    add("--judge", help="perplexity under this causal LM too (needs the package transformers)")
    add("--json", help="also write settings, tokens, texts and figures to this file")
    add("--device", default="", choices=("cuda", "cpu"), help="default: cuda where there is one")
    args = parser.parse_args(argv)

    def refuse(names: str, why: str):
        for name in names.split():
            if getattr(args, name) is not None and getattr(args, name) is not False:
                parser.error(f"--{name} has no effect {why}")

    if args.model == "ar":
        refuse("energy steps k window schedule infill watch compare", "with --model ar")
    found = [stage for stage in edlm.KINDS if (Path(args.out) / f"{stage}.pt").exists()]
    if args.energy == "none" or (args.energy is None and found == ["denoiser"]):
        refuse("k window", "without an energy")
    if args.compare:
        refuse("watch", "with --compare, which shows no texts")
    if not -(2**63) <= args.seed < 2**63:
        parser.error(f"--seed must fit into 64 bits: {args.seed}")
    if args.json:
        data.check_target(args.json)
    args.steps, args.k = args.steps or [8], args.k or [16]
    args.window = 1.0 if args.window is None else args.window
    args.schedule = args.schedule or "linear"
    return args


def load(args):
    """(models, tiktoken.Encoding, device) of these settings; errors as of edlm.load_models."""
    device = edlm.pick_device(args.device)
    needed = {"ar"} if args.model == "ar" else {"denoiser"}
    if args.energy in edlm.ENERGIES:
        needed.add(edlm.ENERGIES[args.energy][0])
    welcome = {"ar"} if args.energy or args.model == "ar" else set(edlm.KINDS)
    found = {stage for stage in welcome if (Path(args.out) / f"{stage}.pt").exists()}
    stages = [stage for stage in edlm.KINDS if stage in needed | found]
    models, tokenizer = edlm.load_models(args.out, stages, device)
    return models, data.get_tokenizer(tokenizer), device


def list_settings(args, models) -> list[dict]:
    """What to draw, in order: each with a name, and for diffusion with steps, energy and k."""
    if args.model == "ar":
        return [dict(name="AR")]
    also_ar = args.compare and "ar" in models and args.infill is None  # it goes left to right
    settings = [dict(name="AR")] if also_ar else []
    trained = [name for name, (stage, _) in edlm.ENERGIES.items() if stage in models]
    energies = [args.energy] if args.energy else ["none", *trained[0 if args.compare else -1 :]]
    for steps in args.steps:
        for name in energies:
            if name == "none":
                settings.append(dict(name=f"MDLM T={steps}", steps=steps))
                continue
            energy, title = edlm.make_energy(name, models), f"{edlm.ENERGIES[name][1]} T={steps}"
            settings += [
                dict(name=f"{title} k={k}", steps=steps, k=k, energy=energy) for k in args.k
            ]
    return settings


# ------------ What is given ----------------------------------------------------------------------


def start_state(args, config: edlm.Config, tokenizer) -> torch.Tensor:
    """Long[L]: [EOT], given tokens, and the mask where one is wanted. ValueError if too long."""
    mask, eot, L = config.mask_id, tokenizer.eot_token, config.block_size
    if args.infill is None:
        tokens = [eot, *data.encode(tokenizer, args.prompt or "")]
        if len(tokens) >= L:
            raise ValueError(f"the prompt has {len(tokens) - 1} tokens, {L - 2} fit: shorten it")
        return torch.tensor(tokens + [mask] * (L - len(tokens)))
    tokens = [eot]
    *pieces, last = re.split(r"_{3,}(\*\d+|)", args.infill)  # text, count, text, count, ..., text
    words = tokenizer.name in ("gpt2", "toy")  # their tokens carry the space before a word
    for text, count in zip(pieces[::2], pieces[1::2], strict=True):
        gap = int(count[1:] or 1) if len(count) < 12 else L  # a count that long is refused below
        tokens += data.encode(tokenizer, text.removesuffix(" ") if words else text)
        tokens += [mask] * min(gap, L)
    tokens += data.encode(tokenizer, last) + [eot]
    if mask not in tokens:
        raise ValueError("--infill has no gap: mark one with ___, or five with ___*5")
    if len(tokens) > L:
        raise ValueError(f"with its gaps the text exceeds the {L - 2} tokens that fit: shorten it")
    return torch.tensor(tokens)


# ------------ Drawing -----------------------------------------------------------------------------


def printable(tokenizer, row: torch.Tensor) -> str:
    """The text of Long[L], without what could steer a terminal."""
    text = data.decode(tokenizer, row.tolist())
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def show(text: str, above: int) -> int:
    """Draws a text over the `above` lines drawn before, returns how many it took.

    Where there is no terminal it is printed below the last one.
    """
    if not sys.stdout.isatty():
        print(text)
        return 0
    columns, rows = shutil.get_terminal_size()
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, columns - 1) or [""]]
    lines = lines[: rows - 2]  # the cursor cannot go back above the top of the screen
    back = f"\x1b[{above}F" if above else ""
    print(back + "\x1b[J" + "\n".join(lines), flush=True)
    time.sleep(0.1)  # for the eye
    return len(lines)


def draw(models, tokenizer, device, start: torch.Tensor, num: int, args, setting: dict) -> dict:
    """`num` texts of one setting, in batches that fit into memory, and what they took.

    A dictionary: x Long[num, L], seconds, ess (mean effective sample size, None without an energy),
    denoiser_forwards and energy_forwards (means per text).
    """
    config = next(iter(models.values())).config
    generator = torch.Generator(device).manual_seed(args.seed)
    batch = args.batch or max(1, LOGITS_AT_ONCE // (config.vocab_size * len(start)))
    begun, parts, ess, forwards, judged, above = time.perf_counter(), [], [], 0, 0, 0
    with edlm.autocast(device):
        for i in range(0, num, batch):
            x = start.to(device).repeat(min(batch, num - i), 1)
            if setting["name"] == "AR":
                given = int((start != config.mask_id).sum())
                parts.append(models["ar"].sample(x[:, :given], len(start), generator))
                continue
            chain = {key: setting[key] for key in ("steps", "k", "energy") if key in setting}
            chain |= dict(mask_id=config.mask_id, window=args.window, schedule=args.schedule)
            t = torch.ones(len(x), device=device)
            for state in edlm.sample_states(models["denoiser"], x, generator=generator, **chain):
                forwards += (state.t < t).sum().item()
                judged += state.ess.isfinite().sum().item()
                ess.append(state.ess)
                t = state.t
                if args.watch and i == 0:
                    above = show(f"t = {t[0]:.3f}  {printable(tokenizer, state.x[0])}", above)
            parts.append(state.x)
    took = dict(x=torch.cat(parts).cpu(), seconds=time.perf_counter() - begun)
    took |= dict(
        denoiser_forwards=forwards / num, energy_forwards=judged * setting.get("k", 0) / num
    )
    return took | dict(ess=torch.cat(ess).nanmean().item() if judged else None)


# ------------ How good they are -------------------------------------------------------------------


def unigram_entropy(x: torch.Tensor) -> float:
    """Bits of entropy of the token frequencies in a sequence (without BOS), mean over sequences."""
    shares = [row.unique(return_counts=True)[1].double() / len(row) for row in x[:, 1:]]
    return torch.stack([-(p * p.log2()).sum() for p in shares]).mean().item()


@torch.no_grad()
def ar_perplexity(ar, x: torch.Tensor, drawn: torch.Tensor, device) -> float:
    """exp of the mean negative log-probability, under the AR model, of the drawn tokens Bool[L]."""
    pieces = x.split(max(1, edlm.JUDGED_TOKENS // x.shape[1]))
    with edlm.autocast(device):
        log_p = torch.cat([ar.log_prob(piece.to(device))[:, drawn.to(device)] for piece in pieces])
    return log_p.double().mean().neg().exp().item()


def load_judge(name: str, device):
    """An outside causal language model (package transformers): a function, texts to perplexity."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--judge needs the optional package: pip install transformers") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name).to(device).eval()
    except Exception as error:  # a hub, a network or a damaged folder: many kinds
        reason = data.first_line(error)[:150]
        raise ValueError(f"--judge: transformers could not load {name!r} ({reason})") from error
    longest = getattr(model.config, "max_position_embeddings", 1024)

    @torch.no_grad()
    def perplexity(texts: list[str]) -> float:
        nats, count = 0.0, 0
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"][:longest]], device=device)
            if (scored := ids.shape[1] - 1) > 0:
                nats += model(ids, labels=ids).loss.item() * scored
                count += scored
        return torch.tensor(nats / count).exp().item() if count else math.nan

    return perplexity


def run(args) -> list[dict]:
    """Draws and shows every setting; returns a row of figures for each, as --json writes them."""
    models, tokenizer, device = load(args)
    config = next(iter(models.values())).config
    start = start_state(args, config, tokenizer)
    # only a whole story can be right or wrong
    toy = tokenizer.name == "toy" and len(start) == config.block_size
    num = args.num or (300 if toy and args.prompt is None and args.infill is None else 4)
    judge = load_judge(args.judge, device) if args.judge else None
    print(f"{num} texts of every setting on {device}; forward passes are per text\n")
    rows = []
    for setting in list_settings(args, models):
        row = draw(models, tokenizer, device, start, num, args, setting)
        x = row.pop("x")
        texts = [data.decode(tokenizer, tokens) for tokens in x.tolist()]
        valid = [data.toy_is_valid(text) for text in texts] if toy else None
        drawn = start == config.mask_id
        row |= dict(
            name=setting["name"],
            tokens=x.tolist(),
            texts=texts,
            valid_fraction=sum(valid) / num if toy else None,
            entropy=unigram_entropy(x),
            ar_perplexity=ar_perplexity(models["ar"], x, drawn, device) if "ar" in models else None,
            judge_perplexity=judge(texts) if judge else None,
        )
        rows.append(row)
        if not args.compare:
            for i in range(min(num, 4)):
                mark = "" if valid is None else "[ok]      " if valid[i] else "[broken]  "
                print(
                    mark
                    + printable(tokenizer, x[i])
                    + ("" if tokenizer.name == "toy" else "\n" + "-" * 80)
                )
        line = [form.format(row[key]) for key, form in FIGURES.items() if row[key] is not None]
        print(
            f"{row['name']:18}", *line, sep="  ", end="\n" if args.compare else "\n\n", flush=True
        )
    return rows


def main(argv=None) -> None:
    """The command line: `python sample.py --help`."""
    args = parse(argv)
    rows = run(args)
    if args.json:
        data.write_json(args.json, dict(settings=vars(args), rows=rows))
    if len(rows) == 2:
        print(
            "next: --watch, --energy ar, --steps 16, --prompt, --infill or --compare (see --help)"
        )


if __name__ == "__main__":
    data.run("sample.py", main)
