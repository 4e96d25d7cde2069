"""Makes the checkpoints that sample.py uses: trains the three networks, or imports published ones.

    python train.py                                    the toy language: data, three stages, a table
    python train.py --resume                           begins that run, or goes on where it stopped
    python train.py --preset owt --stage denoiser      the paper's settings, OpenWebText shards
    torchrun --standalone --nproc_per_node=8 train.py --preset owt        the same on eight GPUs
    python train.py --import model.safetensors --out out/mdlm       published weights become a stage

There are three stages: `denoiser` (masked diffusion), `ar` (autoregressive) and `energy`
(noise-contrastive estimation against the finished denoiser). The folder of a run holds a checkpoint
<stage>.pt and a log <stage>.jsonl of each, and settings.json.

A setting that is not typed comes from settings.json, if the command adds to a run that exists
(--resume, or one --stage of several), and else from the preset.

The randomness of micro-batch m of step s derives from (seed, s, m) alone. So a resumed run repeats
an uninterrupted one (on a CPU exactly), and W processes do what one does with W micro-batches.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

import data
import edlm

STAGES = ("denoiser", "ar", "energy")  # in this order: the energy needs the denoiser
SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "dropout")  # with the vocabulary, a Config

# ------------ 1. Settings -------------------------------------------------------------------------

# What a preset leaves out has the default of `Settings`, which is the paper's OpenWebText run.
PRESETS = {
    "toy": {  # a minute or two on two CPU cores
        "data": "data/toy",
        "block_size": 21,  # [EOT] + the 19 words of one story + [EOT]
        "n_layer": 3,
        "n_head": 4,
        "n_embd": 64,
        "dropout": 0.0,
        "optimizer": "muon",
        "lr": 0.012,
        "energy_lr": 0.003,
        "warmup_steps": 30,
        "lr_schedule": "cosine",
        "ema": 0.99,
        "batch_size": 32,
        "micro_batch": 32,
        "denoiser_steps": 800,
        "ar_steps": 300,
        "energy_steps": 800,
        "save_every": 400,
        "compile": "no",
    },
    "shakespeare": {  # a quarter of an hour on two CPU cores
        "data": "data/shakespeare",
        "block_size": 128,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "dropout": 0.0,
        "optimizer": "muon",
        "lr": 0.0045,
        "energy_lr": 0.003,
        "warmup_steps": 100,
        "lr_schedule": "cosine",
        "ema": 0.99,
        "batch_size": 16,
        "denoiser_steps": 2300,
        "ar_steps": 700,
        "energy_steps": 900,
        "save_every": 500,
        "compile": "no",
    },
    "text8": {  # the width stays 768: the paper's 784 does not divide into 12 heads
        "data": "data/text8",
        "block_size": 256,
        "dropout": 0.05,
        "warmup_steps": 2000,
        "lr_schedule": "cosine",
        "micro_batch": 64,
        "energy_steps": 10_000,
    },
    "owt": {
        "data": "data/openwebtext",
    },
}


def option(default, help: str, low=0, high=math.inf, choices=None):
    """A field of Settings: its default, its line in --help, and the values that it may take."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass(kw_only=True)
class Settings:
    """All that decides how a run turns out. Each is a flag, and a line of settings.json."""

    data: str = option("data/openwebtext", "folder of token shards")
    block_size: int = option(1024, "tokens in a block, L", 3)
    n_layer: int = option(12, "transformer blocks", 1)
    n_head: int = option(12, "attention heads", 1)
    n_embd: int = option(768, "width", 1)
    dropout: float = option(0.1, "dropout while training", 0, 1)
    optimizer: str = option("adamw", "muon is for matrices only", choices=("muon", "adamw"))
    lr: float = option(3e-4, "peak learning rate")
    energy_lr: float = option(3e-4, "peak learning rate of the energy stage")
    warmup_steps: int = option(2500, "steps over which the learning rate rises")
    lr_schedule: str = option("constant", "after the warm-up", choices=("constant", "cosine"))
    weight_decay: float = option(0.0, "share of lr by which weights shrink in a step")
    beta1: float = option(0.9, "AdamW's memory of gradients", 0, 1)
    beta2: float = option(0.999, "AdamW's memory of their squares", 0, 1)
    grad_clip: float = option(1.0, "largest gradient norm")
    ema: float = option(0.9999, "decay of the average of the weights that is kept for use", 0, 1)
    batch_size: int = option(512, "sequences per step, over all processes and micro-batches", 1)
    micro_batch: int = option(16, "sequences per forward pass, at most", 1)
    denoiser_steps: int = option(1_000_000, "steps of the denoiser stage", 1)
    ar_steps: int = option(1_000_000, "steps of the ar stage", 1)
    energy_steps: int = option(400_000, "steps of the energy stage", 1)
    save_every: int = option(250, "steps between checkpoints, each with a validation loss", 1)
    eval_blocks: int = option(1000, "validation blocks of that loss, at most", 1)
    log_every: int = option(10, "steps between rows of the log", 1)
    compile: str = option("cuda", "torch.compile the blocks", choices=("no", "cuda", "yes"))
    seed: int = option(0, "seed of weights, data order and masks", 0, 2**31)

    def __post_init__(self):
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if f.type is not str and not low <= value < high:  # nan is refused, too
                raise ValueError(f"--{f.name} must be from {low} to below {high}, not {value}")


def parse(argv=None) -> tuple[argparse.Namespace, Settings]:
    """The command line: what this command is to do, and the settings of the run."""
    presets = [f"preset {name}: {json.dumps(values)}" for name, values in PRESETS.items()]
    parser = data.Parser(__doc__, epilog="\n\n".join(presets))
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="settings of a new run (default: toy)")
    add("--out", help="folder of the run (default: out/ and the name of the data folder)")
    add("--stage", choices=(*STAGES, "all"), default="all", help="what to train (default: all)")
    add("--resume", action="store_true", help="go on with the run in --out, or begin it")
    add("--overwrite", action="store_true", help="train anew over what --out holds")
    add("--device", choices=("cuda", "cpu"), default="", help="default: cuda where there is one")
    add("--import", dest="file", help="make a stage of --out of this published file (GPT-2 tokens)")
    add("--max_steps", type=int, help="sets denoiser_steps, ar_steps and energy_steps")
    for f in fields(Settings):
        choices, text = f.metadata["choices"], f"{f.metadata['help']} (preset owt: {f.default})"
        metavar = None if choices else f.type.__name__
        form = dict(type=f.type, choices=choices, metavar=metavar, help=text)
        add(f"--{f.name}", default=argparse.SUPPRESS, **form)
    args = parser.parse_args(argv)
    if args.resume and (args.overwrite or args.file):
        raise ValueError("--resume continues a run; --overwrite and --import begin one anew")
    typed = {f.name: getattr(args, f.name) for f in fields(Settings) if f.name in args}
    if args.max_steps is not None:
        for stage in STAGES:
            typed.setdefault(f"{stage}_steps", args.max_steps)
    values = PRESETS[args.preset or ("owt" if args.file else "toy")]
    corpus = Path(typed.get("data", values["data"])).resolve().name
    args.out = args.out or f"out/{corpus}"
    return args, Settings(**(values | saved_settings(args) | typed))


def saved_settings(args) -> dict:
    """settings.json of --out if this command adds to the run there, else {}."""
    path = Path(args.out, "settings.json")
    asked = () if args.file else asked_stages(args)  # an import adds to any run that is there
    others = [stage for stage in STAGES if stage not in asked]
    adds = args.resume or any(checkpoint_path(args.out, stage).exists() for stage in others)
    if not adds or not path.exists():
        return {}
    try:
        values = json.loads(path.read_bytes())
        Settings(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or of another version: {error}") from error
    return values


def asked_stages(args) -> tuple:
    return STAGES if args.stage == "all" else (args.stage,)


def checkpoint_path(out, stage: str) -> Path:
    return Path(out, f"{stage}.pt")


def log_path(out, stage: str) -> Path:
    return Path(out, f"{stage}.jsonl")


# ------------ 2. What is minimised, and how -------------------------------------------------------


def training_loss(run: "Run", net, x0: torch.Tensor) -> torch.Tensor:
    """The scalar that a stage minimises: nats per token, or the NCE loss of the energy."""
    mask_id = run.model.config.mask_id
    if run.stage == "energy":
        return edlm.nce_loss(run.denoiser, net, x0, mask_id=mask_id)
    if run.stage == "ar":
        nats = -net(x0).sum(dim=1)  # [B]
    else:
        nats = edlm.nelbo(net, x0, mask_id=mask_id)  # [B]
    return nats.mean() / (x0.shape[1] - 1)


def orthogonalise(G: torch.Tensor) -> torch.Tensor:
    """About U V^T of every matrix U S V^T in Float[n, rows, columns].

    Five steps of a polynomial in X X^T push all singular values near 1. They need not get closer:
    this one is tuned to raise small ones fast.
    """
    # a CPU without bfloat16 instructions emulates them, 60 times slower than it computes in float32
    X = G.bfloat16() if G.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else G
    tall = X.shape[1] > X.shape[2]
    X = X.mT if tall else X  # the smaller side makes the smaller X X^T
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # now no singular value is above 1
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Momentum for matrices, its update made orthogonal (Jordan et al. 2024): few steps get far.

    All directions of a matrix are learnt alike fast, also those with small gradients. The update
    has the size of an AdamW step (Liu et al., arXiv:2502.16982), so both share one learning rate.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = defaultdict(list)  # matrices of one shape share their products
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, params in alike.items():
                updates = torch.stack([self.momentum_of(p, group["momentum"]) for p in params])
                size = group["lr"] * 0.2 * math.sqrt(max(shape))
                for p, update in zip(params, orthogonalise(updates), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)

    def momentum_of(self, p: torch.Tensor, momentum: float) -> torch.Tensor:
        """The average of p's gradients so far, a step ahead of itself (Nesterov)."""
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def make_optimizers(model, s: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon on the matrices inside the blocks and AdamW on embeddings, norms and heads."""
    matrices = []
    if s.optimizer == "muon":
        matrices = [p for p in model.transformer.blocks.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    form = dict(lr=s.lr, weight_decay=s.weight_decay)
    optimizers = [torch.optim.AdamW(rest, betas=(s.beta1, s.beta2), fused=True, **form)]
    if matrices:
        optimizers.append(Muon(matrices, **form))
    return optimizers


def learning_rate(s: Settings, stage: str, step: int) -> float:
    """Linear warm-up, then constant or a cosine that falls to zero when the stage ends."""
    peak = s.energy_lr if stage == "energy" else s.lr
    if step < s.warmup_steps:
        return peak * (step + 1) / s.warmup_steps
    if s.lr_schedule == "constant":
        return peak
    last = getattr(s, f"{stage}_steps")
    done = (step - s.warmup_steps) / max(1, last - s.warmup_steps)
    return peak * (1 + math.cos(math.pi * min(1.0, done))) / 2


# ------------ 3. A stage: begun or resumed, stepped, validated, saved -----------------------------


@dataclass
class Run:
    """What one stage trains, as far as it has come."""

    stage: str
    last: int  # the number of its last step
    model: torch.nn.Module
    average: torch.nn.Module  # of its weights: what is validated, saved and sampled from
    denoiser: torch.nn.Module | None  # frozen, for the energy stage
    optimizers: list
    facts: dict  # what the weights belong to, saved beside them
    net: torch.nn.Module  # the model, or what shares it with the other processes
    step: int = 0
    log_bytes: int = 0  # length of the log at that step


def begin(args, s: Settings, stage: str, blocks: data.Blocks, device) -> Run:
    """A stage at its first step, or where --resume finds it.

    Raises ValueError if the data, the settings and the checkpoints do not belong together.
    """
    config = edlm.Config(blocks.vocab_size, *(getattr(s, name) for name in SHAPE))
    facts = dict(tokenizer=blocks.tokenizer)
    torch.manual_seed(s.seed)
    denoiser = None
    if stage == "energy":
        path = checkpoint_path(args.out, "denoiser")
        denoiser, content = edlm.load_checkpoint(path, device)
        check_same(path, content | asdict(denoiser.config), facts | asdict(config))
        denoiser.requires_grad_(False)
        facts["denoiser"] = edlm.fingerprint(denoiser)
        model = edlm.NCEResidual.from_denoiser(denoiser).to(device)
    else:
        model = edlm.KINDS[stage](config).to(device)
    facts["corpus"] = [len(blocks), *blocks.meta["source"]]  # the source files' names and sizes
    facts["optimizer"] = s.optimizer
    average = copy.deepcopy(model).eval().requires_grad_(False)
    last = getattr(s, f"{stage}_steps")
    optimizers = make_optimizers(model, s)
    run = Run(stage, last, model, average, denoiser, optimizers, facts, net=model)
    path = checkpoint_path(args.out, stage)
    if args.resume and path.exists():
        restore(run, path)
    return run


def check_same(path, have: dict, want: dict) -> None:
    """Raises ValueError, naming the fact, if a checkpoint has another shape, corpus or denoiser."""
    for name, value in want.items():
        if have.get(name) != value:
            had = f"{path} was made with {name} {have.get(name)}, not {value}"
            raise ValueError(f"{had}: take that, or begin anew with --overwrite or another --out")


def restore(run: Run, path: Path) -> None:
    """Puts weights, optimisers and counts back to where the checkpoint was written."""
    saved, content = edlm.load_checkpoint(path)
    # facts that the checkpoint lacks count as the same: published weights have no corpus
    have = run.facts | content | asdict(saved.config)
    check_same(path, have, run.facts | asdict(run.model.config))
    run.average.load_state_dict(saved.state_dict())
    run.model.load_state_dict(saved.state_dict())
    if "training" not in content:
        return
    training = content["training"]
    run.model.load_state_dict(training["model"])
    for optimizer, state in zip(run.optimizers, training["optimizers"], strict=True):
        # weight decay and betas come from the settings: they may have been typed anew
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(dict(state=state["state"], param_groups=groups))
    run.step, run.log_bytes = training["step"], training["log_bytes"]


def save(run: Run, path: Path, log) -> None:
    """Writes the averaged weights and what a resumed run needs, once the log is on the disk."""
    log.flush()
    os.fsync(log.fileno())
    training = dict(
        step=run.step,
        log_bytes=log.tell(),
        model=run.model.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in run.optimizers],
    )
    edlm.save_checkpoint(path, run.average, training=training, **run.facts)


def train_step(run: Run, s: Settings, micro_batches: list) -> tuple[torch.Tensor, torch.Tensor]:
    """One update of the weights and of their average: (loss, gradient norm before clipping).

    A micro-batch is Long[B, L]. The loss is the mean over those of this process.
    """
    rank, world = processes()
    mean = torch.zeros((), device=micro_batches[0].device)
    for i, x0 in enumerate(micro_batches):
        stream = (s.seed, run.step, i * world + rank)
        torch.manual_seed(hash(stream) % 2**63)  # integers hash alike in every process
        # several processes exchange their gradients once a step, in the last backward pass
        last_one = world == 1 or i == len(micro_batches) - 1
        with contextlib.nullcontext() if last_one else run.net.no_sync():
            with edlm.autocast(x0.device):
                loss = training_loss(run, run.net, x0) / len(micro_batches)
            loss.backward()
        mean += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), s.grad_clip)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, run.stage, run.step)
        optimizer.step()
        optimizer.zero_grad()
    update_average(run, s.ema)
    run.step += 1
    return mean, norm


@torch.no_grad()
def update_average(run: Run, decay: float) -> None:
    """Moves the averaged weights a little towards the new ones."""
    # the decay rises from 0, so that the random start is forgotten, in short runs too
    decay = min(decay, run.step / (9 + run.step))
    move = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)  # all tensors in one call
    move(list(run.average.parameters()), list(run.model.parameters()), None)


@torch.no_grad()
def validate(run: Run, s: Settings, held_out: data.Blocks, device) -> dict:
    """The loss of the averaged weights on the first --eval_blocks validation blocks: a log row."""
    part = Subset(held_out, range(min(s.eval_blocks, len(held_out))))
    loader = DataLoader(part, batch_size=max(1, 2048 // s.block_size))  # 2048 tokens at once
    losses, sizes = [], []
    for i, x0 in enumerate(data.progress(loader, desc="validation", leave=False, delay=1)):
        torch.manual_seed(i)  # the same masks every time
        with edlm.autocast(device):
            losses.append(training_loss(run, run.average, x0.to(device)).item())
        sizes.append(len(x0))
    losses, sizes = torch.tensor(losses), torch.tensor(sizes)
    mean = (losses * sizes).sum() / sizes.sum()
    row = dict(step=run.step, val_loss=mean.item())
    if len(losses) > 1:
        row["standard_error"] = losses.std().item() / math.sqrt(len(losses))
    return row


# ------------ 4. The loop -------------------------------------------------------------------------


def train_stage(args, s: Settings, stage: str, device, caught: list) -> bool:
    """Trains one stage to its last step. True if it got there, False if a signal stopped it."""
    blocks = data.Blocks(s.data, "train", s.block_size)
    held_out = data.Blocks(s.data, "val", s.block_size)
    run = begin(args, s, stage, blocks, device)
    if run.step >= run.last:
        return True
    check_energy(args, run)
    batches = read_batches(run, s, blocks, device)
    prepare_networks(run, s, device)
    with open_log(args, s, run) as log:
        train_loop(run, s, batches, held_out, log, checkpoint_path(args.out, stage), caught)
    return run.step == run.last


def train_loop(run: Run, s: Settings, batches, held_out, log, path: Path, caught: list) -> None:
    """Steps, rows of the log, validations and checkpoints, until the last step or a signal."""
    rank, world = processes()
    shown, since = {}, (run.step, time.perf_counter())
    form = dict(total=run.last, initial=run.step, desc=f"{run.stage:8}", unit="step")
    with data.progress(disable=rank > 0, **form) as bar:
        for micro_batches in batches:
            loss, norm = train_step(run, s, micro_batches)
            bar.update()
            saving = run.step % s.save_every == 0 or run.step == run.last
            due = saving or run.step % s.log_every == 0  # the same steps in every process
            if not due and not (caught and world == 1):
                continue
            loss, stopping = over_processes(loss, caught)
            row = make_row(run, s, loss, norm.item(), since)
            log.write(json.dumps(row) + "\n")
            shown |= dict(loss=f"{loss:.3f}", tok_s=f"{row['tokens_per_second']:,}")
            if norm.is_cuda:
                shown["matmul"] = f"{row['share_of_matmul_rate']:.0%}"
                shown["mem"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}GiB"
            if rank == 0 and saving:
                result = validate(run, s, held_out, norm.device)
                log.write(json.dumps(result) + "\n")
                shown["val"] = f"{result['val_loss']:.3f}"
            bar.set_postfix(shown, refresh=False)
            if rank == 0 and (saving or stopping):
                save(run, path, log)
            if stopping:
                return
            since = (run.step, time.perf_counter())  # the speed is that of training alone


def read_batches(run: Run, s: Settings, blocks: data.Blocks, device):
    """An iterator over the steps left to do: this process's micro-batches, a list of Long[B, L]."""
    rank, world = processes()
    size = min(s.micro_batch, max(1, s.batch_size // world))
    place = dict(rank=rank, world=world, start_step=run.step)
    order = data.BatchOrder(len(blocks), s.batch_size, size, seed=s.seed, **place)
    loader = iter(DataLoader(blocks, batch_sampler=order, pin_memory=device.type == "cuda"))
    count = s.batch_size // (size * world)
    return (
        [next(loader).to(device, non_blocking=True) for _ in range(count)]
        for _ in range(run.step, run.last)
    )


def check_energy(args, run: Run) -> None:
    """Raises ValueError if training on would change the denoiser that an energy.pt belongs to."""
    path = checkpoint_path(args.out, "energy")
    if run.stage == "denoiser" and args.resume and path.exists():
        _, content = edlm.load_checkpoint(path)
        if content.get("denoiser") == edlm.fingerprint(run.average):
            raise ValueError(f"{path} corrects this denoiser as it is: move it away to go on")


def prepare_networks(run: Run, s: Settings, device) -> None:
    """Compiles what is slow if that is wanted, and lets several processes share the model."""
    run.model.train()
    if s.compile == "yes" or (s.compile == "cuda" and device.type == "cuda"):
        print("the first steps take up to a minute: the blocks are compiled")
        for network in filter(None, (run.model, run.denoiser)):
            for block in network.transformer.blocks:
                block.compile(dynamic=False)  # the sizes in a block hardly ever change
        # without it the table [N, V] of probabilities goes to memory and back several times
        edlm.token_log_prob = torch.compile(edlm.token_log_prob)
    if processes()[1] > 1:
        run.net = DistributedDataParallel(run.model, broadcast_buffers=False)


@functools.cache  # measured once is enough
def matmul_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product, in the number format of the training."""
    size = 8192 if device.type == "cuda" else 2048
    seconds = []
    with edlm.autocast(device):
        a = torch.randn(size, size, device=device)
        a = a @ a  # now it has that format
        for _ in range(5):
            begun = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for a GPU
            seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def operations(stage: str, config: edlm.Config) -> float:
    """Operations of the matrix products of a training step, for each token.

    A backward pass takes two of them for each one of the forward pass. The energy reads two texts,
    and the denoiser that drafts one of them is not trained.
    """
    d = config.n_embd
    blocks = config.n_layer * (24 * d * d + 4 * config.block_size * d)
    logits = 2 * d * config.vocab_size
    denoiser = blocks + logits / 2  # half of the positions are masked, on average
    if stage == "energy":
        return 6 * blocks + denoiser
    return 3 * (denoiser if stage == "denoiser" else blocks + logits)


def open_log(args, s: Settings, run: Run):
    """The log, to write on. Now the run has begun, so its folder is made ready too."""
    if processes()[0] > 0:
        return open(os.devnull, "w")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.overwrite:  # later stages too: they must not be taken for the new run's
        asked = asked_stages(args)
        for stage in asked[asked.index(run.stage) :]:
            checkpoint_path(args.out, stage).unlink(missing_ok=True)
            log_path(args.out, stage).unlink(missing_ok=True)
    data.write_json(Path(args.out, "settings.json"), asdict(s))
    log = open(log_path(args.out, run.stage), "a")
    log.truncate(min(run.log_bytes, log.tell()))  # it goes no further than the checkpoint
    return log


def over_processes(loss: torch.Tensor, caught: list) -> tuple[float, bool]:
    """(the mean loss, whether one was told to stop): so all of them stop after the same step."""
    sums = torch.stack((loss, loss.new_tensor(len(caught))))
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss_sum, signals = sums.tolist()
    return loss_sum / processes()[1], signals > 0


def make_row(run: Run, s: Settings, loss: float, norm: float, since: tuple) -> dict:
    """A row of the log; since: a step and its time. Raises ValueError if the run has diverged."""
    if not math.isfinite(loss + norm):  # a bad gradient is in the weights already
        what = f"loss {loss:g}, gradient norm {norm:g} at step {run.step}"
        raise ValueError(f"{run.stage}: {what}; the last checkpoint is kept: lower --lr")
    step, begun = since
    tokens = s.batch_size * s.block_size  # of a step
    speed = (run.step - step) * tokens / (time.perf_counter() - begun)
    row = dict(
        step=run.step,
        tokens=run.step * tokens,
        loss=loss,
        lr=learning_rate(s, run.stage, run.step - 1),
        grad_norm=norm,
        tokens_per_second=round(speed),
    )
    device = next(run.model.parameters()).device
    if device.type == "cuda":
        best = matmul_rate(device) * processes()[1]
        share = speed * operations(run.stage, run.model.config) / best
        row["share_of_matmul_rate"] = round(share, 3)
    return row


# ------------ 5. All stages, one process or many --------------------------------------------------


def processes() -> tuple[int, int]:
    """(the number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start_processes(name: str) -> torch.device:
    """The device of this process, which joins the others if torchrun started it."""
    device = edlm.pick_device(name)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def barrier() -> None:
    """Waits for the other processes."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def caught_signals():
    """Collects Ctrl-C and SIGTERM in a list for the loop to see, so that it can save and stop.

    A second Ctrl-C ends at once, but not under torchrun, which passes on the one it has received.
    Outside the main thread Python allows no handlers: none is set.
    """
    caught, handlers = [], {}

    def catch(number, frame):
        if number == signal.SIGINT and number in caught and not dist.is_initialized():
            raise KeyboardInterrupt
        caught.append(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(args, s: Settings) -> None:
    """All asked-for stages in order, then the table."""
    stages = stages_to_do(args)
    device = start_processes(args.device)
    rank, world = processes()
    if rank == 0:
        if s.data == PRESETS["toy"]["data"]:
            data.make_toy(s.data)
        print(f"{s.data} -> {args.out} on {device}" + f" and {world - 1} more" * (world > 1))
    barrier()
    finished = True
    with caught_signals() as caught:
        for stage in stages:
            finished = finished and train_stage(args, s, stage, device, caught)
            barrier()  # rank 0 has saved: now the next stage may read it
    if rank == 0 and finished:
        print_table(args.out, s)
    if world > 1:
        barrier()  # nobody leaves before rank 0: torch would end the others
        dist.destroy_process_group()
    if not finished:
        if rank == 0:
            again = f"--resume --out {args.out}" + f" --stage {args.stage}" * (args.stage != "all")
            print(f"stopped and saved: go on with {again}", file=sys.stderr)
        raise SystemExit(128 + (caught[0] if caught else signal.SIGTERM))


def stages_to_do(args) -> list[str]:
    """The stages that this command trains. Raises ValueError if it would overwrite one untold.

    Published weights count as a finished stage, unless their stage is asked for by its name.
    """
    stages = []
    for stage in asked_stages(args):
        path = checkpoint_path(args.out, stage)
        if path.exists() and not (args.resume or args.overwrite):
            raise ValueError(f"{path} exists: --resume, --overwrite, or another --out")
        if path.exists() and args.resume and args.stage == "all":
            _, content = edlm.load_checkpoint(path)
            if "training" not in content:
                continue
        stages.append(stage)
    return stages


def print_table(out: str, s: Settings) -> None:
    """The last validation losses of the two language models, beside the entropy of the toy's."""
    print(f"\n{'validation':20}{'nats per token':>20}{'perplexity':>14}")
    if data.Blocks(s.data, "val", s.block_size).tokenizer == "toy":
        floor = data.toy_entropy() / (s.block_size - 1)
        print(f"{'language (floor)':20}{floor:>10.4f}{math.exp(floor):>24.3f}")
    for stage, name in (("ar", "AR"), ("denoiser", "MDLM (bound)")):
        path = log_path(out, stage)
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [row for row in map(json.loads, lines) if "val_loss" in row]
        for row in rows[-1:]:
            nats, error = row["val_loss"], row.get("standard_error")
            known = "" if error is None else f" +- {error:.4f}"
            print(f"{name:20}{nats:>10.4f}{known:10}{math.exp(nats):>14.3f}")
    print(f"\nnext: python sample.py --out {out}    python sample.py --eval --out {out}")


# ------------ 6. Published weights ----------------------------------------------------------------
# The networks of MDLM, its AR baseline and EDLM-NCE are ours, but for two things that fold away.
# (a) Adaptive norms. Each norm is followed by h * (1 + scale) + shift, and each branch of a block
#     is multiplied by a gate before it is added. All three are linear in the embedded noise level,
#     so that one network can act differently at different levels. But the published networks are
#     always given level 0. So scale, shift and gate are constants, and constants can be multiplied
#     into the weights: scale and shift into the norm, the gate into the branch's last layer.
# (b) EDLM's energy applies a linear layer, averages over positions, and applies another linear
#     layer. Averaging is linear, so the two layers are one.

NAMES = {  # parts of their names and what we call them, replaced in this order
    "output_layer.": "",
    "linear": "head",
    "norm_final": "transformer.norm",
    "vocab_embed.embedding": "transformer.embed.weight",
    "vocab_proj": "join_x0",
    "blocks": "transformer.blocks",
    "attn_qkv": "qkv",
    "energy_head": "mlp",
    "mlp.0": "mlp_in",
    "mlp.2": "mlp_out",
}


class Inert:
    """Stands for every class that a pickle names, except tensors and plain containers."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def read_published(path) -> dict[str, torch.Tensor]:
    """The tensors of a file: the average (EMA) if it has one, and of EDLM's those of the energy."""
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        content = load_file(path)
    else:  # a pickle may name any function for the reader to call: here all are inert
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        inert = {name: Inert for name in names} | {"collections.defaultdict": lambda *_: {}}
        with torch.serialization.safe_globals([(cls, name) for name, cls in inert.items()]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    w = content.get("state_dict", content)
    w = {name.removeprefix("backbone."): value for name, value in w.items()}
    energy = {name.removeprefix("ebm."): w[name] for name in w if name.startswith("ebm.")}
    w = energy or w
    if content.get("ema"):  # a list in the order of the parameters, which inv_freq is not
        names = [name for name in w if name != "rotary_emb.inv_freq"]
        w |= zip(names, content["ema"]["shadow_params"], strict=True)
    return w


def rename(w: dict) -> dict:
    """Published tensors under our names, in float64."""
    renamed = {}
    for name, value in w.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = value.double()
    return renamed


def fold_energy_head(w: dict) -> None:
    """(b): one linear layer of two. And the layer that joins two embeddings becomes two halves."""
    w["mlp_in.bias"] += w["mlp_in.weight"] @ w.pop("head.bias")
    w["mlp_in.weight"] = w["mlp_in.weight"] @ w.pop("head.weight")
    w["join_xt.weight"], w["join_x0.weight"] = w["join_x0.weight"].chunk(2, dim=1)


def fold_adaptive_norms(w: dict, n_layer: int) -> None:
    """(a): scale, shift and gate at noise level 0 are multiplied into the weights around them."""

    def linear(name: str, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, w.pop(f"{name}.weight"), w.pop(f"{name}.bias"))

    def fold(norm: str, shift: torch.Tensor, scale: torch.Tensor) -> None:
        w[f"{norm}.weight"] *= 1 + scale  # in place: a tensor of another shape is an error
        w[f"{norm}.bias"] = shift  # the published norms have no bias

    level = (torch.arange(256) < 128).double()  # 128 cosines of 0, then 128 sines of 0
    level = F.silu(linear("sigma_map.mlp_out", F.silu(linear("sigma_map.mlp_in", level))))
    for block in (f"transformer.blocks.{i}" for i in range(n_layer)):
        constants = linear(f"{block}.adaLN_modulation", level).chunk(6)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = constants
        fold(f"{block}.norm1", shift_a, scale_a)
        fold(f"{block}.norm2", shift_m, scale_m)
        w[f"{block}.attn_out.weight"] *= gate_a[:, None]
        w[f"{block}.mlp_out.weight"] *= gate_m[:, None]
        w[f"{block}.mlp_out.bias"] *= gate_m
    fold("transformer.norm", *linear("adaLN_modulation", level).chunk(2))


def convert(w: dict, block_size: int) -> torch.nn.Module:
    """Published tensors as a network of ours, for blocks of that size."""
    w = rename(w)
    rows, d = w["transformer.embed.weight"].shape  # the last row is the mask's
    head_size = 2 * len(w.pop("rotary_emb.inv_freq", range(32)))  # 64 where it is not told
    n_layer = sum(name.endswith("norm1.weight") for name in w)
    config = edlm.Config(rows - 1, block_size, n_layer, d // head_size, d)
    if "join_x0.weight" in w:
        kind = "energy"
        fold_energy_head(w)
    else:
        kind = "denoiser" if "sigma_map.mlp_in.weight" in w else "ar"
        # without the mask's row, and with the unused ones of edlm.OutputLayer
        unused = -config.vocab_size % 64
        w["head.weight"] = F.pad(w["head.weight"][:-1], (0, 0, 0, unused))
        w["head.bias"] = F.pad(w["head.bias"][:-1], (0, unused), value=-1e30)
    if kind == "ar":
        w |= {name.replace("weight", "bias"): torch.zeros(d) for name in w if "norm" in name}
    else:
        fold_adaptive_norms(w, n_layer)
    model = edlm.KINDS[kind](config)
    model.load_state_dict(w)  # raises an error if a name or a shape is another
    if not all(value.isfinite().all() for value in model.parameters()):
        raise ValueError("some weights are not finite")
    return model.eval()


def import_weights(args, s: Settings) -> None:
    """Published weights as a finished stage of --out; an energy needs its denoiser there first."""
    try:
        model = convert(read_published(args.file), s.block_size)
    except ImportError:
        raise ValueError(f"to read {args.file}: pip install safetensors") from None
    except Exception as error:  # of many kinds: there is no end of other files
        raise ValueError(f"{args.file} is no published network: {error!r:.150}") from error
    check_same(args.file, asdict(model.config), dict(vocab_size=50257))  # GPT-2's
    stage = next(name for name in STAGES if type(model) is edlm.KINDS[name])
    path = checkpoint_path(args.out, stage)
    if path.exists() and not args.overwrite:
        raise ValueError(f"{path} exists: --overwrite, or another --out")
    facts = dict(tokenizer="gpt2")
    if stage == "energy":
        denoiser_path = checkpoint_path(args.out, "denoiser")
        denoiser, _ = edlm.load_checkpoint(denoiser_path)
        check_same(denoiser_path, asdict(denoiser.config), asdict(model.config))
        facts["denoiser"] = edlm.fingerprint(denoiser)
    path.parent.mkdir(parents=True, exist_ok=True)
    log_path(args.out, stage).unlink(missing_ok=True)  # it would be that of other weights
    shape = {name: getattr(model.config, name) for name in SHAPE}
    data.write_json(path.with_name("settings.json"), asdict(s) | shape)
    edlm.save_checkpoint(path, model, **facts)
    print(f"{args.file} -> {path}")


def main(argv=None) -> None:
    """The command line: `python train.py --help`."""
    args, s = parse(argv)
    if args.file:
        import_weights(args, s)
    else:
        train(args, s)


if __name__ == "__main__":
    data.run(main)
