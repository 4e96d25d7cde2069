"""Trains the three networks of EDLM, resumes them, and evaluates perplexity.

    python train.py                                    the toy language: data, three stages, a table
    python train.py --resume --out out/toy             goes on where a stopped run left off
    python train.py --eval --steps 4,8 --k 4,16        how likely sample.py is to draw real text
    python train.py --preset owt --stage denoiser      the paper's settings, OpenWebText shards
    torchrun --standalone --nproc_per_node=8 train.py --preset owt        the same on eight GPUs

Stages: `denoiser` (masked diffusion), `ar` (autoregressive), `energy` (noise-contrastive estimation
against the finished denoiser). Each writes out/<name>/<stage>.pt and <stage>.jsonl.

The randomness of micro-batch m of step s derives from (seed, s, m) alone. So a resumed run repeats
an uninterrupted one (on a CPU exactly), and W processes do what one does with W micro-batches.
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import signal
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset

import data
import edlm

STAGES = tuple(edlm.KINDS)  # denoiser, ar, energy
CORPORA = tuple(data.DETOKENIZERS)  # named here because a field of Settings is called data
SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "dropout")  # with the vocabulary, a Config

# Settings has the paper's OpenWebText run; a preset says what differs from it.
LAPTOP = dict(optimizer="muon", warmup_steps=30, lr_schedule="cosine", ema=0.99, dropout=0.0)
PRESETS = {
    # Minutes on two CPU cores. A block is one story: [EOT] + 19 words + [EOT].
    "toy": dict(LAPTOP, data="data/toy", block_size=21, n_layer=3, n_head=4, n_embd=64)
    | dict(lr=0.018, energy_lr=0.003, batch_size=128, micro_batch=128, save_every=200)
    | dict(denoiser_steps=500, ar_steps=200, energy_steps=400),
    "shakespeare": dict(LAPTOP, data="data/shakespeare", block_size=128, n_layer=3, n_head=6)
    | dict(n_embd=192, lr=0.012, energy_lr=0.006, batch_size=16)
    | dict(denoiser_steps=1900, ar_steps=600, energy_steps=450),
    # Width 768, because the paper's 784 does not divide into 12 heads.
    "text8": dict(data="data/text8", block_size=256, dropout=0.05, micro_batch=64)
    | dict(warmup_steps=2000, lr_schedule="cosine", energy_steps=10_000),
    "owt": dict(data="data/openwebtext"),
}


def option(help: str, default, low=1, high=2**31, choices=None):
    """A field of Settings: its help line, its default, and the values it may take."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass(kw_only=True)
class Settings:
    """Every value of a run, and so every flag."""

    data: str = option("folder of token shards; with --eval also a text file", "data/openwebtext")
    block_size: int = option("tokens in a block, L", 1024)
    n_layer: int = option("transformer blocks", 12)
    n_head: int = option("attention heads", 12)
    n_embd: int = option("width", 768)
    dropout: float = option("dropout while training", 0.1, 0, 1)
    optimizer: str = option("muon is for matrices only", "adamw", choices=("muon", "adamw"))
    lr: float = option("peak learning rate", 3e-4, 1e-9, 10)
    energy_lr: float = option("peak learning rate of the energy stage", 3e-4, 1e-9, 10)
    warmup_steps: int = option("steps over which the learning rate rises", 2500, 0)
    lr_schedule: str = option("after the warm-up", "constant", choices=("constant", "cosine"))
    grad_clip: float = option("largest gradient norm", 1.0, 1e-9, 1e9)
    ema: float = option("decay of the weight average that is kept for use", 0.9999, 0, 1)
    batch_size: int = option("sequences per step, over all processes and micro-batches", 512)
    micro_batch: int = option("sequences per forward pass, at most", 16)
    max_steps: int = option("steps of every stage, instead of the next three", 0, 0)
    denoiser_steps: int = option("steps of the denoiser stage", 1_000_000)
    ar_steps: int = option("steps of the ar stage", 1_000_000)
    energy_steps: int = option("steps of the energy stage", 400_000)
    save_every: int = option("steps between checkpoints, each with a validation loss", 250)
    log_every: int = option("steps between rows of the log", 10)
    stage: str = option("what to train", "all", choices=(*STAGES, "all"))
    seed: int = option("seed of weights, data order and masks", 0, 0)
    eval_blocks: int = option("validation blocks to evaluate on; --eval: 64 if not given", 1000)
    out: str = option("folder of the run (default: out/ + the name of the data folder)", "")
    resume: bool = option("continue the run in --out, with its own settings", False)
    overwrite: bool = option("train anew over what --out holds", False)
    device: str = option("default: cuda where there is one", "", choices=("", "cuda", "cpu"))
    eval: bool = option("evaluate the checkpoints in --out instead of training", False)
    passes: int = option("--eval: masks drawn for each validation block", 1)
    steps: tuple = option("--eval: numbers of decoding steps T, as 2,4,8", (2, 4, 8))
    k: tuple = option("--eval: numbers of candidates, as 4,16", (4, 16))
    n: int = option("--eval: draws for each expectation over candidates", 128, 2)
    detokenize: str = option("--eval of a text: undo a corpus' tokens", "", choices=("", *CORPORA))
    json: str = option("--eval: also write the table to this file", "")
    import_: str = option("make a stage of --out of this published file, tokenizer gpt2", "")

    def __post_init__(self):
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            number = f.type in (int, float)
            choices = f.metadata["choices"] or [value]
            right = isinstance(value, (int, float) if f.type is float else f.type)
            if not right or value not in choices or (number and not low <= value < high):
                limits = f"at least {low} and below {high}" if number else choices
                raise ValueError(f"--{f.name} must be {f.type.__name__} of {limits}, not {value!r}")
        if self.eval and max(self.k) > self.n:
            raise ValueError(f"--n {self.n} draws are too few for --k {max(self.k)}")
        if self.resume and (self.overwrite or self.import_):
            raise ValueError("--resume continues a run, --overwrite and --import begin one anew")


def parse(argv=None) -> Settings:
    """The command line: a preset, and a flag of the same name for every field of Settings.

    What is not given comes from the checkpoints in --out (--resume and --eval: the whole run;
    --stage energy: the denoiser's shape), else from the preset, else from Settings.
    """
    presets = "\n\n".join(textwrap.fill(f"preset {n}: {v}", 100) for n, v in PRESETS.items())
    parser = data.Parser("train.py", __doc__, epilog=presets, argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=PRESETS, help="default: that of this --data, or toy")
    for f in fields(Settings):
        text = f.metadata["help"] + (f" (default: {f.default})" if f.default else "")
        form = dict(type=data.numbers if f.type is tuple else f.type, metavar=f.type.__name__)
        form |= dict(choices=f.metadata["choices"]) if f.metadata["choices"] else {}
        form = dict(action="store_true") if f.type is bool else form
        parser.add_argument("--" + f.name.rstrip("_"), dest=f.name, help=text, **form)
    given = vars(parser.parse_args(argv))
    named = [n for n, p in PRESETS.items() if p["data"] == given.get("data", "").rstrip("/")]
    named = ["owt"] if given.get("import_") else [*named, "toy"]  # for the block of the published
    values = PRESETS[given.pop("preset", named[0])]
    source = given.get("data", values["data"])
    source = values["data"] if Path(source).is_file() else source  # a text has no run of its own
    evaluates = ("passes", "steps", "k", "n", "detokenize", "json")
    used = (*evaluates, "eval", "eval_blocks", "data", "out", "device")
    where = "with" if "eval" in given else "without"
    if idle := [n for n in given if (n in evaluates if where == "without" else n not in used)]:
        parser.error(f"--{idle[0].rstrip('_')} has no effect {where} --eval")
    if "eval" in given:
        given.setdefault("eval_blocks", 64)  # bounds cost 2 n energies a block
    if given.get("max_steps"):
        given |= {f"{stage}_steps": given["max_steps"] for stage in STAGES}
    given.setdefault("out", str(Path("out") / Path(source).name))
    if "resume" in given or "eval" in given:
        values = values | saved_settings(given["out"], "resume" in given)
    elif given.get("stage") == "energy":
        denoiser, _ = edlm.load_checkpoint(checkpoint_path(given["out"], "denoiser"))
        values = values | {name: getattr(denoiser.config, name) for name in SHAPE}
    return Settings(**(values | given))


def checkpoint_path(out, stage: str) -> Path:
    return Path(out) / f"{stage}.pt"


def saved_settings(out, resume: bool) -> dict:
    """The settings with which the newest checkpoint of a run was trained; {} if it was imported."""
    paths = [path for stage in STAGES if (path := checkpoint_path(out, stage)).exists()]
    if not paths:
        raise FileNotFoundError(f"no checkpoint in {out}: run python train.py --out {out} first")
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    _, content = edlm.load_checkpoint(newest)
    names = [f.name for f in fields(Settings)]
    try:
        saved = content["training"]["settings"] if resume or "training" in content else None
        return {} if saved is None else {name: saved[name] for name in names[: names.index("out")]}
    except (TypeError, KeyError) as error:
        raise ValueError(f"{newest} is damaged or was imported: no settings to resume") from error


# ------------ What is minimised, and how ----------------------------------------------------------


def training_loss(stage: str, net, denoiser, x0: torch.Tensor) -> torch.Tensor:
    """The scalar of a stage: nats per token, or the NCE loss."""
    mask_id = (denoiser or getattr(net, "module", net)).config.mask_id
    if stage == "energy":
        return edlm.nce_loss(denoiser, net, x0, mask_id=mask_id)
    nats = edlm.nelbo(net, x0, mask_id=mask_id) if stage == "denoiser" else -net(x0).sum(dim=1)
    return nats.mean() / (x0.shape[1] - 1)


@torch.no_grad()
def score_blocks(name: str, score, blocks, s: Settings, device) -> torch.Tensor:
    """score(x0=...) of the first --eval_blocks blocks: Float64[blocks], means over --passes."""
    part = Subset(blocks, list(range(min(s.eval_blocks, len(blocks)))) * s.passes)
    loader = DataLoader(part, batch_size=max(1, 4096 // len(blocks[0])))  # 4096 tokens at once
    values = []
    for i, x0 in enumerate(data.progress(loader, desc=name, leave=False, delay=1)):
        torch.manual_seed(i)  # the same masks every time
        with edlm.autocast(device):
            values.append(score(x0=x0.to(device)).cpu().double())
    return torch.cat(values).view(s.passes, -1).mean(dim=0)


def make_optimizers(model, s: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon on the matrices inside the blocks and AdamW on embeddings, norms and heads."""
    muon = [p for p in model.transformer.blocks.parameters() if p.dim() == 2]
    muon = muon if s.optimizer == "muon" else []
    rest = [p for p in model.parameters() if all(p is not other for other in muon)]
    optimizers = [torch.optim.AdamW(rest, lr=s.lr, weight_decay=0, fused=True)]
    if muon:  # "match_rms_adamw" scales its step to the size of an AdamW step: one lr for both
        form = dict(weight_decay=0, adjust_lr_fn="match_rms_adamw")
        optimizers.append(torch.optim.Muon(muon, lr=s.lr, **form))
    return optimizers


def learning_rate(s: Settings, stage: str, step: int) -> float:
    """Linear warm-up, then constant or a cosine to zero at the stage's last step."""
    peak = s.energy_lr if stage == "energy" else s.lr
    warm = min(1.0, (step + 1) / max(1, s.warmup_steps))
    done = max(0, step - s.warmup_steps) / max(1, getattr(s, f"{stage}_steps") - s.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return peak * warm * (cosine if s.lr_schedule == "cosine" else 1)


# ------------ A run: begun, trained, stopped, resumed ---------------------------------------------


@dataclass
class Run:
    """What one stage trains, as far as it has come."""

    model: torch.nn.Module
    ema: torch.nn.Module  # the average of its weights: what is evaluated, saved and sampled from
    denoiser: torch.nn.Module | None  # frozen, for the energy stage
    optimizers: list
    facts: dict  # what the weights belong to, saved beside them
    step: int = 0
    log_bytes: int = 0  # length of the log at that step


def begin(s: Settings, stage: str, blocks: data.Blocks, device) -> Run:
    """A stage at its first step, or where --resume finds it. ValueError if it fits not together."""
    config = edlm.Config(blocks.vocab_size, *(getattr(s, name) for name in SHAPE))
    facts = dict(tokenizer=blocks.tokenizer, corpus=[len(blocks), *blocks.meta["source"]])
    torch.manual_seed(s.seed)
    denoiser = None
    if stage == "energy":
        path = checkpoint_path(s.out, "denoiser")
        denoiser, content = edlm.load_checkpoint(path, device)
        expected = asdict(config) | dict(tokenizer=blocks.tokenizer)
        check_same(path, content | asdict(denoiser.config), expected)
        denoiser.requires_grad_(False)
        facts["denoiser"] = edlm.fingerprint(denoiser)
        model = edlm.NCEResidual.from_denoiser(denoiser).to(device)
    else:
        model = edlm.KINDS[stage](config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    run = Run(model, ema, denoiser, make_optimizers(model, s), facts)
    if s.resume and (path := checkpoint_path(s.out, stage)).exists():
        averaged, content = edlm.load_checkpoint(path)
        check_same(path, content | asdict(averaged.config), asdict(config) | facts)
        run.ema.load_state_dict(averaged.state_dict())
        restore(run, path, content)
    return run


def check_same(path, have: dict, want: dict) -> None:
    """Raises ValueError, naming the fact, if a checkpoint has another shape, corpus or denoiser."""
    for name, value in want.items():
        if have.get(name) != value:
            had = f"{path} was made with {name} {have.get(name)}, not {value}"
            raise ValueError(f"{had}: take that, or train anew with --overwrite")


def restore(run: Run, path, content: dict) -> None:
    """Puts weights and optimisers back to where the checkpoint was written."""
    try:
        saved = content["training"]
        run.model.load_state_dict(saved["model"])
        for optimizer, state in zip(run.optimizers, saved["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # their options come from the settings
            optimizer.load_state_dict(dict(state=state["state"], param_groups=groups))
            params = [p for group in optimizer.param_groups for p in group["params"]]
            keys = {tuple(optimizer.state[p]) for p in params}
            entries = ((p, *item) for p in params for item in optimizer.state[p].items())
            fits = (t.shape == (() if key == "step" else p.shape) for p, key, t in entries)
            if len(keys) != 1 or keys == {()} or not all(fits):  # optimisers do not check
                raise ValueError("the optimiser's state does not fit the weights")
        run.step, run.log_bytes = saved["step"], saved["log_bytes"]
        if not all(type(n) is int and 0 <= n < 2**63 for n in (run.step, run.log_bytes)):
            raise ValueError("its step or log_bytes is no count")
    except Exception as error:  # of many kinds
        raise ValueError(f"{path} is damaged ({data.first_line(error)[:100]})") from error


def save(run: Run, s: Settings, stage: str, log) -> None:
    """Writes the averaged weights and what a resumed run needs, once the log is on the disk."""
    log.flush()
    os.fsync(log.fileno())
    training = dict(step=run.step, log_bytes=log.tell(), settings=asdict(s))
    training |= dict(model=run.model.state_dict())
    training |= dict(optimizers=[optimizer.state_dict() for optimizer in run.optimizers])
    edlm.save_checkpoint(checkpoint_path(s.out, stage), run.ema, training=training, **run.facts)


def train_stage(s: Settings, stage: str, device, rank: int, world: int, caught: list) -> bool:
    """Trains one stage to its last step. True if it got there, False if a signal stopped it."""
    blocks, held_out = (data.Blocks(s.data, split, s.block_size) for split in ("train", "val"))
    run, last = begin(s, stage, blocks, device), getattr(s, f"{stage}_steps")
    if run.step >= last:
        return True
    if stage == "denoiser" and s.resume and (path := checkpoint_path(s.out, "energy")).exists():
        if edlm.load_checkpoint(path)[1].get("denoiser") == edlm.fingerprint(run.ema):
            raise ValueError(f"{path} corrects this denoiser as it is: move it away to go on")
    model, on_gpu = run.model, device.type == "cuda"
    micro = min(s.micro_batch, max(1, s.batch_size // world))
    accumulate = s.batch_size // (micro * world)
    part = dict(seed=s.seed, rank=rank, world=world, start_step=run.step)
    order = data.BatchOrder(len(blocks), s.batch_size, micro, **part)
    loader = iter(DataLoader(blocks, batch_sampler=order, pin_memory=on_gpu))
    if on_gpu:  # shapes are fixed in the transformer: only the head sees the number of masks vary
        for network in filter(None, (model, run.denoiser)):
            network.transformer.compile(dynamic=False)
    net = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    net.train()
    if s.overwrite and rank == 0:  # later stages too: they must not be taken for the new run's
        for later in STAGES[STAGES.index(stage) :] if s.stage == "all" else (stage,):
            checkpoint_path(s.out, later).unlink(missing_ok=True)
    Path(s.out).mkdir(parents=True, exist_ok=True)
    log = open(os.devnull if rank > 0 else Path(s.out) / f"{stage}.jsonl", "a")
    if rank == 0:  # the log goes no further than the checkpoint
        log.truncate(min(run.log_bytes, log.tell()))
    bar = dict(total=last, initial=run.step, desc=f"{stage:8}", unit="step", disable=rank > 0)
    held_out_loss = lambda x0: training_loss(stage, run.ema, run.denoiser, x0).expand(len(x0))
    shown, since, stopped = {}, (run.step, time.perf_counter()), False
    with log, data.progress(**bar) as bar:
        while run.step < last and not stopped:
            rate = learning_rate(s, stage, run.step)
            for group in (group for each in run.optimizers for group in each.param_groups):
                group["lr"] = rate
            loss = torch.zeros((), device=device)
            for i in range(accumulate):
                x0 = next(loader).to(device, non_blocking=True)
                stream = (s.seed, run.step, i * world + rank)
                torch.manual_seed(hash(stream) % 2**63)  # integers hash alike in every process
                whole = world == 1 or i == accumulate - 1  # gradients are exchanged once a step
                with contextlib.nullcontext() if whole else net.no_sync():
                    with edlm.autocast(device):
                        part = training_loss(stage, net, run.denoiser, x0) / accumulate
                    part.backward()
                loss += part.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            # the decay rises from 0: else a short run's average would keep its random start
            average = get_ema_multi_avg_fn(min(s.ema, run.step / (9 + run.step)))
            average(list(run.ema.parameters()), list(model.parameters()), None)
            run.step += 1
            bar.update()

            saving = run.step % s.save_every == 0 or run.step == last
            stopped = bool(caught) and world == 1
            if saving or stopped or run.step % s.log_every == 0:
                sums = torch.stack((loss / world, loss.new_tensor(len(caught))))
                if world > 1:
                    dist.all_reduce(sums)  # so all processes stop after the same step
                loss, stopped = sums[0].item(), sums[1].item() > 0
                if not math.isfinite(loss + norm):  # a bad gradient is in the weights already
                    what = f"loss {loss:g}, gradient norm {norm:g} at step {run.step}"
                    raise ValueError(f"{stage}: {what}; the last checkpoint is kept: lower --lr")
                tokens, now = s.batch_size * s.block_size, time.perf_counter()
                speed = (run.step - since[0]) * tokens / (now - since[1])
                shown |= dict(loss=f"{loss:.3f}", tok_s=f"{speed:,.0f}")
                if on_gpu:
                    shown |= dict(mem=f"{torch.cuda.max_memory_allocated() / 2**30:.1f}GiB")
                row = dict(step=run.step, tokens=run.step * tokens, loss=loss, lr=rate)
                row |= dict(grad_norm=float(norm), tokens_per_second=round(speed))
                log.write(json.dumps(row) + "\n")
                since = (run.step, time.perf_counter())
            if rank == 0 and saving:
                loss = score_blocks("validation", held_out_loss, held_out, s, device).mean().item()
                shown |= dict(val=f"{loss:.3f}")
                log.write(json.dumps(dict(step=run.step, val_loss=loss)) + "\n")
            bar.set_postfix(shown, refresh=False)
            if rank == 0 and (saving or stopped):
                save(run, s, stage, log)
    return run.step == last


def start_processes(name: str) -> tuple[torch.device, int, int]:
    """(device, rank, number of processes); joins the process group if torchrun started us."""
    device, world = edlm.pick_device(name), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return device, 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), world


@contextlib.contextmanager
def caught_signals():
    """Collects Ctrl-C and SIGTERM in a list for the loop to see, so that it can save and stop."""
    caught, handlers = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(s: Settings) -> None:
    """All asked-for stages in order, then the table. Never overwrites a run unless told to."""
    stages = STAGES if s.stage == "all" else (s.stage,)
    old = [path for stage in stages if (path := checkpoint_path(s.out, stage)).exists()]
    if old and not (s.resume or s.overwrite):
        raise ValueError(f"{old[0]} exists: --resume, --overwrite, or another --out")
    device, rank, world = start_processes(s.device)
    if rank == 0 and s.data == PRESETS["toy"]["data"]:
        data.make_toy(s.data)
    if world > 1:
        dist.barrier()
    if rank == 0:
        print(f"{s.data} -> {s.out} on {device}" + f" and {world - 1} more" * (world > 1))
    with caught_signals() as caught:
        for stage in stages:
            finished = train_stage(s, stage, device, rank, world, caught)
            if world > 1:
                dist.barrier()  # rank 0 has saved: now the next stage may read it
            if not finished:
                break
    if rank == 0 and finished:
        print_table(evaluate(replace(s, passes=8, steps=()), device))
        print(f"next: python sample.py --out {s.out}    python train.py --eval --out {s.out}")
    if world > 1:
        dist.barrier()  # nobody leaves before rank 0: torch would end the others
        dist.destroy_process_group()
    if not finished:
        if rank == 0:
            print(f"stopped and saved: go on with --resume --out {s.out}", file=sys.stderr)
        raise SystemExit(128 + (caught[0] if caught else signal.SIGTERM))


# ------------ Perplexity --------------------------------------------------------------------------


def estimators(models: dict, s: Settings) -> list[tuple]:
    """A row of the table each: (name, what it is, function of x0, candidates k where n decides).

    The functions give nats per sequence, Float[B]; without --steps there is no row with an energy.
    """
    rows, denoiser = [], models.get("denoiser")
    if "ar" in models:
        rows.append(("AR", "exact", lambda x0: -models["ar"].log_prob(x0).sum(dim=1), None))
    if denoiser is None:
        return rows
    form = dict(mask_id=denoiser.config.mask_id)
    rows.append(("MDLM", "bound", partial(edlm.nelbo, denoiser, **form), None))
    trained = {name: title for name, (stage, title) in edlm.ENERGIES.items() if stage in models}
    judges = {title: edlm.make_energy(name, models) for name, title in trained.items()}
    form["n"] = s.n
    for T in s.steps:
        bound = partial(edlm.sampler_nelbo, denoiser, steps=T, **form)
        rows.append((f"MDLM T={T}", "bound", partial(bound, energy=None, k=1), None))
        for k, (title, energy) in itertools.product(s.k, judges.items()):
            rows.append((f"{title} T={T} k={k}", "bound", partial(bound, energy=energy, k=k), k))
    for title, energy in judges.items() if s.steps else ():
        for end in ("exact",) if title == "EDLM-coAR" else ("lower", "upper"):
            joint = partial(edlm.joint_nelbo, denoiser, energy=energy, log_partition=end, **form)
            rows.append((f"{title} joint, log Z {end}", "estimate", joint, None))
    return rows


@torch.no_grad()
def evaluate(s: Settings, device) -> list[dict]:
    """Rows of the perplexity table for the checkpoints in --out. ValueError if data do not fit."""
    found = [x for x in STAGES if checkpoint_path(s.out, x).exists() and (s.steps or x != "energy")]
    models, tokenizer = edlm.load_models(s.out, found, device)
    config, is_text, rows = models[found[0]].config, Path(s.data).is_file(), []
    if is_text:
        encoding = data.get_tokenizer(tokenizer)
        blocks = data.text_blocks(s.data, encoding, config.block_size, s.detokenize or None)
    else:
        blocks = data.Blocks(s.data, "val", config.block_size)
        if blocks.tokenizer != tokenizer:
            raise ValueError(f"{s.data} holds {blocks.tokenizer} tokens, {s.out} needs {tokenizer}")
    if tokenizer == "toy" and not is_text:
        floor = torch.tensor([data.toy_entropy()])
        rows.append(table_row("language (floor)", "exact", floor, config, tokenizer))
    for name, what, score, k in estimators(models, s):
        once = replace(s, passes=1) if what == "exact" else s  # it has no masks to draw again
        nats = score_blocks(name, score, blocks, once, device)
        rows.append(table_row(name, what, nats, config, tokenizer))
        if k and k <= s.n // 4:  # does the bound still fall?
            nats = score_blocks(f"{name}, n/4", partial(score, n=s.n // 4), blocks, s, device)
            rows[-1]["with_quarter_n"] = nats.mean().item() / (config.block_size - 1)
    return rows


def table_row(name, what, nats: torch.Tensor, config: edlm.Config, tokenizer: str) -> dict:
    """Means over blocks of nats Float[blocks], their standard error, perplexity per scored token.

    Bits per character spread a block's bits over its L - 2 characters, without the end of text.
    """
    M = config.block_size - 1
    nats = nats.double() / M
    error = nats.std().item() / len(nats) ** 0.5 if len(nats) > 1 else 0.0
    row = dict(model=name, what=what, nats_per_token=nats.mean().item(), standard_error=error)
    row |= dict(perplexity=nats.mean().exp().item(), sequences=len(nats), tokens=len(nats) * M)
    if tokenizer in ("bytes", "text8"):
        row["bits_per_character"] = nats.mean().item() * M / (M - 1) / math.log(2)
    return row


def print_table(rows: list[dict]) -> None:
    """The table on the screen."""
    columns = dict(sequences=",", nats_per_token=".4f", standard_error=".4f", perplexity=".3f")
    columns |= dict(bits_per_character=".3f", with_quarter_n=".4f")
    columns = {key: form for key, form in columns.items() if any(key in row for row in rows)}
    print("\n" + " " * 40 + "".join(f"{key.replace('_', ' '):>20}" for key in columns))
    for row in rows:
        cells = (format(row[key], form) if row.get(key) else "" for key, form in columns.items())
        print(f"{row['model']:31}{row['what']:9}" + "".join(f"{cell:>20}" for cell in cells))
    print()


def import_weights(s: Settings) -> None:
    """Published weights as a finished stage of --out; an energy needs its denoiser there first."""
    model, facts = edlm.load_reference(s.import_, s.block_size), dict(tokenizer="gpt2")
    check_same(s.import_, asdict(model.config), dict(vocab_size=50257))  # GPT-2's
    stage = next(name for name in STAGES if type(model) is edlm.KINDS[name])
    if (path := checkpoint_path(s.out, stage)).exists() and not s.overwrite:
        raise ValueError(f"{path} exists: --overwrite, or another --out")
    if stage == "energy":
        denoiser, _ = edlm.load_checkpoint(checkpoint_path(s.out, "denoiser"))
        facts["denoiser"] = edlm.fingerprint(denoiser)
    path.parent.mkdir(parents=True, exist_ok=True)
    edlm.save_checkpoint(path, model, **facts)
    print(f"{s.import_} -> {path}")


def main(argv=None) -> None:
    """The command line: `python train.py --help`."""
    s = parse(argv)
    if not s.eval:
        return import_weights(s) if s.import_ else train(s)
    if s.json:
        data.check_target(s.json)
    rows = evaluate(s, edlm.pick_device(s.device))
    print_table(rows)
    if s.json:
        data.write_json(s.json, dict(settings=asdict(s), rows=rows))


if __name__ == "__main__":
    data.run("train.py", main)
