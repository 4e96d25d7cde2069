"""Trains the three networks of EDLM, resumes, evaluates perplexity, and measures its own speed.

    python train.py                                       the toy language: data, three stages, a table
    python train.py --resume                              goes on where a stopped run left off
    python train.py --preset owt --stage denoiser         the paper's settings on OpenWebText shards
    python train.py --eval                                every estimator of perplexity, side by side
    torchrun --standalone --nproc_per_node=8 train.py --preset owt        the same run on eight GPUs

Stages: `denoiser` (masked diffusion), `ar` (the autoregressive model) and `energy` (noise-contrastive
estimation against the finished denoiser). Each writes out/<name>/<stage>.pt and rows of out/<name>/log.jsonl.

A run is a function of its settings: the data order and every random number of micro-batch m of step s are
derived from (seed, s, m). So a resumed run repeats an uninterrupted one exactly, and W processes do the same
arithmetic as one process that accumulates W micro-batches.
"""

import contextlib
import copy
import json
import math
import os
import shlex
import signal
import sys
import textwrap
import time
import zlib
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import edlm

PRESETS = {
    # Minutes on two CPU cores. A block is one story: [EOT] + 19 words + [EOT].
    "toy": dict(
        data="data/toy", block_size=21, n_layer=3, n_head=4, n_embd=64, dropout=0.0, optimizer="muon",
        lr=0.018, energy_lr=0.008, weight_decay=0.0, warmup_steps=30, lr_schedule="cosine", grad_clip=1.0, ema=0.99,
        batch_size=128, micro_batch=0, denoiser_steps=500, ar_steps=250, energy_steps=700, eval_every=200,
        save_every=200,
    ),
    # The paper's settings; width 768 because the paper's 784 does not divide into 12 heads.
    "text8": dict(
        data="data/text8", block_size=256, n_layer=12, n_head=12, n_embd=768, dropout=0.05, optimizer="adamw",
        lr=3e-4, energy_lr=3e-4, weight_decay=0.0, warmup_steps=2000, lr_schedule="cosine", grad_clip=1.0, ema=0.9999,
        batch_size=512, micro_batch=64, denoiser_steps=1_000_000, ar_steps=1_000_000, energy_steps=10_000,
        eval_every=2000, save_every=1000,
    ),
    "owt": dict(
        data="data/openwebtext", block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.1,
        optimizer="adamw", lr=3e-4, energy_lr=3e-4, weight_decay=0.0, warmup_steps=2500, lr_schedule="constant",
        grad_clip=1.0, ema=0.9999, batch_size=512, micro_batch=16, denoiser_steps=1_000_000, ar_steps=1_000_000,
        energy_steps=400_000, eval_every=1000, save_every=250,
    ),
}  # fmt: skip
STAGES = ("denoiser", "ar", "energy")
CORPORA = tuple(data.DETOKENIZERS)  # named here because a field of Settings is called data


def option(help: str, default=MISSING, choices=None):
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass(kw_only=True)
class Settings:
    """Every value of a run, and so every flag. Those without a default here come from the preset."""

    data: str = option("folder of token shards; with --eval also a .txt or .jsonl file")
    block_size: int = option("tokens in a block, L")
    n_layer: int = option("transformer blocks")
    n_head: int = option("attention heads")
    n_embd: int = option("width")
    dropout: float = option("dropout while training")
    optimizer: str = option("muon (for the blocks' matrices, AdamW for the rest) or adamw", choices=("muon", "adamw"))
    lr: float = option("peak learning rate")
    energy_lr: float = option("peak learning rate of the energy, which starts from the trained denoiser")
    weight_decay: float = option("weight decay of matrices")
    warmup_steps: int = option("steps over which the learning rate rises")
    lr_schedule: str = option("constant, or cosine to zero, after the warm-up", choices=("constant", "cosine"))
    grad_clip: float = option("largest gradient norm")
    ema: float = option("decay of the weight average that is evaluated and sampled from")
    batch_size: int = option("sequences per step, over all processes and micro-batches")
    micro_batch: int = option("sequences per forward pass; 0: the batch over the processes")
    denoiser_steps: int = option("steps of the denoiser stage")
    ar_steps: int = option("steps of the ar stage")
    energy_steps: int = option("steps of the energy stage")
    eval_every: int = option("steps between evaluations on the validation shards")
    save_every: int = option("steps between checkpoints")

    stage: str = option("what to train", "all", choices=(*STAGES, "all"))
    out: str = option("folder of the run (default: out/ + the name of the data folder)", "")
    seed: int = option("seed of weights, data order and masks", 0)
    max_steps: int = option("steps of each stage, instead of the preset's", 0)
    eval_blocks: int = option("validation blocks to evaluate on, at most", 1000)
    log_every: int = option("steps between rows of log.jsonl", 10)
    resume: bool = option("continue the stages in --out that were stopped", False)
    overwrite: bool = option("train anew over what --out holds", False)
    device: str = option("cuda, mps or cpu (default: the first that is there)", "")
    compile: bool = option("torch.compile the transformer (always on CUDA; TORCH_COMPILE_DISABLE=1 prevents it)", False)

    eval: bool = option("evaluate the checkpoints in --out instead of training", False)
    energy: str = option("--eval: one energy only", "", choices=("none", *edlm.ENERGIES))
    n: int = option("--eval: draws for log Z and for the marginals", 16)
    passes: int = option("--eval: masks drawn for each validation block", 1)
    chain_steps: int = option("--eval: steps T of the chain (default: one token at a time)", 0)
    detokenize: str = option("--eval FILE: undo a corpus' own tokenisation", "", choices=CORPORA)
    json: str = option("--eval, --bench: also write the figures to this file", "")
    bench: bool = option("measure training speed against a plain step, on random weights", False)

    def __post_init__(self):
        positive = ("block_size", "n_layer", "n_head", "n_embd", "batch_size", "eval_every", "save_every",
                    "log_every", "eval_blocks", "passes", *(f"{stage}_steps" for stage in STAGES))  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("max_steps", "micro_batch", "chain_steps", "warmup_steps", "seed"):  # of most, 0 is "not given"
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"--{name} must not be negative nor beyond 2**63: it is {getattr(self, name)}")
        for name in ("lr", "energy_lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must be a number above 0, not {getattr(self, name)}")
        for name in ("dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--weight_decay must be a number of at least 0, not {self.weight_decay}")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues a run and --overwrite throws it away: give one of them")
        edlm.Config(1, self.block_size, self.n_layer, self.n_head, self.n_embd)  # refuses widths that do not divide
        if self.json:
            data.check_target(self.json)
        if self.eval and self.n < 2:
            raise ValueError(f"--n must be at least 2 (the bounds on log Z leave one draw out), not {self.n}")
        self.out = self.out or str(Path("out") / Path(self.data).stem)

    def steps(self, stage: str) -> int:
        return self.max_steps or getattr(self, f"{stage}_steps")


def parse(argv=None) -> Settings:
    """The command line: a preset, and a flag of the same name for every field of Settings."""
    presets = "\n".join(
        f"  {name}\n" + textwrap.fill("  ".join(f"{k}={v}" for k, v in values.items()), 100, initial_indent="    ",
                                     subsequent_indent="    ") for name, values in PRESETS.items()
    )  # fmt: skip
    parser = data.Parser("train.py", __doc__, epilog="presets:\n" + presets)
    parser.add_argument("--preset", default="toy", choices=PRESETS, help="source of unset values (default: toy)")
    for f in fields(Settings):
        text = f.metadata["help"] + ("" if f.default in (MISSING, "", 0, False) else f" (default: {f.default})")
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action="store_true", default=None, help=text)
        else:
            metavar = None if f.metadata["choices"] else f.type.__name__.upper()
            parser.add_argument(f"--{f.name}", type=f.type, choices=f.metadata["choices"], metavar=metavar, help=text)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    preset = PRESETS[given.pop("preset")]
    if "eval" in given and Path(given.get("data", "")).is_file():  # a text has no run of its own: take the preset's
        given.setdefault("out", str(Path("out") / Path(preset["data"]).stem))
    return Settings(**{**preset, **given})


# ---------------------------------------------------------------------------------------------------------
# Where it runs
# ---------------------------------------------------------------------------------------------------------


def start_processes(name: str) -> tuple[torch.device, int, int]:
    """(device, rank, number of processes); joins the process group if torchrun started us."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and name in ("", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = data.pick_device(name)
    if world == 1:
        return device, 0, 1
    if device.type == "cuda":  # gloo too: flags then pass between the CPUs, and no GPU is waited for
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return device, dist.get_rank(), world


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a number that the loop looks at between steps; a second one ends at once."""

    def __init__(self):
        self.number = 0
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(self, number, frame):
        if self.number and number == signal.SIGINT:  # schedulers repeat SIGTERM, also while we save
            raise KeyboardInterrupt
        self.number = number

    def restore(self):
        """Gives both signals back their usual meaning."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM also reach the process that reads ahead; its parent still needs it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def agree(flag: bool, world: int) -> bool:
    """True on every rank if it is true on one of them."""
    if world == 1:
        return flag
    flag = torch.tensor(float(flag))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def mean_over_ranks(value: torch.Tensor, world: int) -> float:
    if world > 1:
        dist.all_reduce(value)
    return float(value) / world


# ---------------------------------------------------------------------------------------------------------
# Optimisation
# ---------------------------------------------------------------------------------------------------------


def make_optimizers(model, s: Settings, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon on the matrices inside the blocks and AdamW on embeddings, norms and heads."""
    inside = {p for p in model.transformer.blocks.parameters() if p.dim() == 2} if s.optimizer == "muon" else set()
    rest = [p for p in model.parameters() if p not in inside]
    groups = [
        dict(params=[p for p in rest if p.dim() >= 2], weight_decay=s.weight_decay),
        dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0),
    ]
    optimizers = [torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.999), fused=device.type != "mps")]
    if inside:
        matrices = [p for p in model.parameters() if p in inside]
        # "match_rms_adamw" scales Muon's orthogonal step to the size of an AdamW step: one lr serves both
        muon = torch.optim.Muon(matrices, lr=s.lr, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def learning_rate(s: Settings, stage: str, step: int) -> float:
    """Linear warm-up, then constant or a cosine to zero at the stage's last step."""
    peak, last = s.energy_lr if stage == "energy" else s.lr, s.steps(stage)
    warm = min(1.0, (step + 1) / max(1, s.warmup_steps))
    if s.lr_schedule == "constant":
        return peak * warm
    done = max(0, step - s.warmup_steps) / max(1, last - s.warmup_steps)
    return peak * warm * (1 + math.cos(math.pi * min(1.0, done))) / 2


def ema_decay(decay: float, step: int) -> float:
    """Rises from 0 to `decay` over the first updates: else a short run's average would keep its random start."""
    return min(decay, step / (9 + step))


# ---------------------------------------------------------------------------------------------------------
# What a run keeps: the newest two checkpoints of each stage, and a log
# ---------------------------------------------------------------------------------------------------------


def checkpoint_path(out, stage: str) -> Path:
    return Path(out) / f"{stage}.pt"


def previous_path(out, stage: str) -> Path:
    return Path(out) / f"{stage}.previous.pt"


def has_checkpoint(out, stage: str) -> bool:
    return checkpoint_path(out, stage).exists() or previous_path(out, stage).exists()


def load_newest(out, stage: str, device):
    """(model, checkpoint) to resume from: the newest, or with a message the one before if that is damaged."""
    newest, previous = checkpoint_path(out, stage), previous_path(out, stage)
    try:
        return edlm.load_checkpoint(newest, device)
    except (ValueError, FileNotFoundError) as error:
        if not previous.exists():
            raise
        reason = error if newest.exists() else f"{newest} is missing (a save was cut short)"
        print(f"{reason}; resuming from {previous} instead", file=sys.stderr)
        return edlm.load_checkpoint(previous, device)


def save_stage(s: Settings, stage: str, model, ema, optimizers, step: int, extra: dict) -> None:
    """Saves averaged weights and training state; the newest becomes the previous once its successor is whole.

    At every moment <stage>.pt is a whole checkpoint: the old one gets its second name before it loses the first.
    """
    path, previous = checkpoint_path(s.out, stage), previous_path(s.out, stage)
    fresh = path.with_suffix(".fresh.pt")
    optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
    training = dict(step=step, settings=asdict(s), model=model.state_dict(), optimizers=optimizer_states)
    with open(log_path(s), "a") as log:
        os.fsync(log.fileno())  # no power cut shall leave a checkpoint with a gap in the log before it
    edlm.save_checkpoint(fresh, ema, training=training, **extra)
    if path.exists():
        link = previous.with_suffix(".tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links: for an instant, only --resume finds the checkpoint
            link = path
        os.replace(link, previous)
    os.replace(fresh, path)


def check_same_run(s: Settings, stage: str, saved: dict, path) -> None:
    """A resumed run must be the same run: refuses a setting that changes what one step computes."""
    before, settings = saved["step"], saved["settings"]
    planned = settings["max_steps"] or settings[f"{stage}_steps"]
    if s.lr_schedule == "cosine" and before < planned != s.steps(stage):  # a finished stage may be prolonged
        raise ValueError(f"{path} is at step {before} of a cosine schedule that ends at {planned}, not at "
                         f"{s.steps(stage)}: resume with the same --max_steps, or choose another --out")  # fmt: skip
    decisive = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "optimizer", "lr", "energy_lr", "weight_decay",
                "warmup_steps", "lr_schedule", "grad_clip", "ema", "batch_size", "micro_batch", "seed")  # fmt: skip
    for name in decisive:
        if getattr(s, name) != settings[name]:
            raise ValueError(f"{path} was trained with --{name} {settings[name]}, not {getattr(s, name)}: "
                             "resume with the same, or choose another --out")  # fmt: skip


def log_path(s: Settings) -> Path:
    return Path(s.out) / "log.jsonl"


def write_log(s: Settings, rank: int, **row) -> None:
    if rank == 0:
        with open(log_path(s), "a") as file:
            file.write(json.dumps(row) + "\n")


def make_room(s: Settings, stage: str, step: int) -> None:
    """Readies --out for the stage to go on behind `step`; with --overwrite the run that was there goes.

    All of it at once: what is left of an old run must not be taken for the new one's when that is resumed.
    """
    os.makedirs(s.out, exist_ok=True)
    stages = STAGES[STAGES.index(stage) :] if s.overwrite and s.stage == "all" else (stage,)
    for anew in stages:
        if s.overwrite:
            checkpoint_path(s.out, anew).unlink(missing_ok=True)
            previous_path(s.out, anew).unlink(missing_ok=True)
        trim_log(s, anew, step)


def trim_log(s: Settings, stage: str, step: int) -> None:
    """Drops rows of the stage behind `step`: they will be written again."""
    if not log_path(s).exists():
        return
    rows = [line for line in log_path(s).read_text().splitlines() if keep_row(line, stage, step)]
    temporary = open(log_path(s).with_suffix(".tmp"), "w")
    temporary.writelines(row + "\n" for row in rows)
    data.sync_and_replace(temporary, log_path(s))


def keep_row(line: str, stage: str, step: int) -> bool:
    """False for a row that will be written again, or that a killed run left half written."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return row["stage"] != stage or row["step"] <= step


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------


def build(stage: str, config: edlm.Config, tokenizer: str, s: Settings, device):
    """A new model of the stage, and for `energy` also the frozen denoiser that it corrects, else None."""
    if stage == "denoiser":
        return edlm.Denoiser(config).to(device), None
    if stage == "ar":
        return edlm.AutoregressiveLM(config).to(device), None
    denoiser, content = edlm.load_checkpoint(checkpoint_path(s.out, "denoiser"), device)
    have = (content["tokenizer"], denoiser.config.vocab_size, denoiser.config.block_size)
    need = (tokenizer, config.vocab_size, config.block_size)
    if have != need:
        raise ValueError(
            f"{checkpoint_path(s.out, 'denoiser')} has (tokenizer, vocabulary, block) {have}, {s.data} {need}: "
            "train a denoiser on this data first"
        )
    return edlm.NCEResidual.from_denoiser(denoiser).to(device), denoiser.requires_grad_(False)


def training_loss(stage: str, net, denoiser, x0: torch.Tensor) -> torch.Tensor:
    """The scalar a stage minimises: nats per token, or the NCE loss (2 ln 2 = 1.386 where it cannot tell)."""
    B, M = len(x0), x0.shape[1] - 1
    if stage == "ar":
        return -net(x0).sum(dim=1).mean() / M
    n = edlm.mask_counts(B, M)
    count = sum(n.tolist())  # known on the CPU: no GPU need be asked, and waited for, how many rows to project
    if stage == "denoiser":
        mask_id = getattr(net, "module", net).config.mask_id
        return edlm.nelbo(partial(net, count=count), x0, mask_id=mask_id, n=n).mean() / M
    return edlm.nce_loss(partial(denoiser, count=count), net, x0, mask_id=denoiser.config.mask_id, n=n)


@torch.no_grad()
def validation_loss(stage: str, model, denoiser, blocks, s: Settings, device) -> float:
    """The training loss on the first --eval_blocks validation blocks, with the same masks every time."""
    values = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), data.autocast(device):
        for i, x0 in enumerate(batches(blocks, s.eval_blocks, model.config)):
            torch.manual_seed(i)
            values.append((len(x0), training_loss(stage, model, denoiser, x0.to(device)).item()))
    return sum(n * value for n, value in values) / sum(n for n, _ in values)


def can_compile(device) -> bool:
    """Whether torch.compile works here (it needs a C++ compiler, on CUDA Triton too); if not, says why."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        return True
    except Exception as error:  # of many kinds
        reason = data.first_line(error)[:120]
        print(f"torch.compile does not work here ({reason}): going on without it", file=sys.stderr)
        return False


def compiled_graphs() -> int:
    """How many graphs torch.compile has built in this process. It grows when shapes vary, which they should not."""
    return torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


def batches(blocks, limit: int, config: edlm.Config):
    """The first `limit` blocks in batches whose logits stay within 2**27 numbers."""
    size = min(256, max(1, 2**27 // (config.vocab_size * config.block_size)))
    return DataLoader(torch.utils.data.Subset(blocks, range(min(limit, len(blocks)))), batch_size=size)


def corpus_name(blocks: data.Blocks) -> str:
    """What the blocks were cut from, in a few characters: another number of them would come in another order."""
    return f"{len(blocks)} blocks of {zlib.crc32(json.dumps(blocks.meta['source']).encode()):08x}"


def seed_of(seed: int, step: int, part: int) -> int:
    """One random stream for each (run, step, micro-batch): nothing to save, nothing to restore."""
    return hash((seed, step, part)) % 2**63  # of integers: the same in every Python process


def start_or_resume(s: Settings, stage: str, blocks, device):
    """(model, frozen denoiser or None, ema, optimizers, step, facts to save beside the weights)."""
    config = edlm.Config(blocks.vocab_size, s.block_size, s.n_layer, s.n_head, s.n_embd, s.dropout)
    torch.manual_seed(s.seed)
    model, denoiser = build(stage, config, blocks.tokenizer, s, device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)  # the average of the weights, see `ema_decay`
    optimizers = make_optimizers(model, s, device)
    extra = dict(tokenizer=blocks.tokenizer, corpus=corpus_name(blocks))
    if denoiser is not None:
        extra["denoiser"] = edlm.fingerprint(denoiser)
    step = 0
    if s.resume and has_checkpoint(s.out, stage):
        averaged, checkpoint = load_newest(s.out, stage, device)
        saved = checkpoint.get("training")
        if saved is None:
            raise ValueError(f"{checkpoint_path(s.out, stage)} holds no training state to resume: use --overwrite")
        check_same_run(s, stage, saved, checkpoint_path(s.out, stage))
        for fact, here in extra.items():
            if (there := checkpoint.get(fact)) != here:
                raise ValueError(f"{checkpoint_path(s.out, stage)} belongs to another {fact} ({there}, here {here}): "
                                 f"train it anew with --stage {stage} --overwrite")  # fmt: skip
        ema.load_state_dict(averaged.state_dict())
        step = saved["step"]
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    return model, denoiser, ema, optimizers, step, extra


def train_stage(s: Settings, stage: str, device, rank: int, world: int, stop: StopSignal) -> bool:
    """Trains one stage to its last step. True if it got there, False if a signal stopped it before."""
    blocks = data.Blocks(s.data, "train", s.block_size)
    validation = data.Blocks(s.data, "val", s.block_size)
    model, denoiser, ema, optimizers, step, extra = start_or_resume(s, stage, blocks, device)
    last = s.steps(stage)
    if step >= last:
        return True

    order = data.BatchOrder(
        len(blocks), s.batch_size, s.micro_batch, seed=s.seed, rank=rank, world=world, start_step=step
    )
    on_gpu = device.type == "cuda"
    loader = iter(DataLoader(blocks, batch_sampler=order, pin_memory=on_gpu, num_workers=int(on_gpu),
                             worker_init_fn=ignore_signals))  # fmt: skip
    accumulate = s.batch_size // (s.micro_batch * world)
    compiled = (s.compile or on_gpu) and can_compile(device)
    if compiled:  # shapes are fixed in the transformer: only the head sees the varying number of masks
        model.transformer.compile(dynamic=False)
        if denoiser is not None:
            denoiser.transformer.compile(dynamic=False)
    net = model
    if world > 1:
        net = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    net.train()
    if rank == 0:
        make_room(s, stage, step)  # only now, when every setting has been tried
    peak = matmul_rate(device) if on_gpu else None
    shown, mark, graphs = {}, (step, time.perf_counter()), compiled_graphs()
    bar = tqdm(total=last, initial=step, desc=f"{stage:8}", unit="step", disable=rank > 0, mininterval=0.5)
    with bar:  # closed before a message is printed
        while step < last:
            rate = learning_rate(s, stage, step)
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = rate
            loss = torch.zeros((), device=device)
            for i in range(accumulate):
                x0 = next(loader).to(device, non_blocking=True)
                torch.manual_seed(seed_of(s.seed, step, i * world + rank))
                with net.no_sync() if world > 1 and i < accumulate - 1 else contextlib.nullcontext():
                    with data.autocast(device):
                        part = training_loss(stage, net, denoiser, x0) / accumulate
                    part.backward()
                loss += part.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average = get_ema_multi_avg_fn(ema_decay(s.ema, step))
            average(list(ema.parameters()), list(model.parameters()), None)
            step += 1
            bar.update()

            stopping = agree(stop.number > 0, world)
            if step % s.log_every == 0 or step % s.save_every == 0 or step == last or stopping:
                loss = mean_over_ranks(loss, world)
                if not math.isfinite(loss + norm):  # a bad gradient is in the weights already: neither may be saved
                    raise ValueError(
                        f"{stage}: the loss is {loss:g}, its gradient norm {norm:g} at step {step}; the last good "
                        "checkpoint is kept. Train anew with a lower --lr in another --out, or check the data"
                    )
                now = time.perf_counter()
                speed = (step - mark[0]) * s.batch_size * s.block_size / (now - mark[1])
                mark = (step, now)
                shown |= dict(loss=f"{loss:.3f}", tok_s=f"{speed:,.0f}")
                shown |= gpu_figures(model, stage, speed / world, peak)
                shown |= dict(graphs=compiled_graphs() - graphs) if compiled else {}
                write_log(s, rank, stage=stage, step=step, tokens=step * s.batch_size * s.block_size, loss=loss,
                          lr=rate, grad_norm=float(norm), tokens_per_second=round(speed))  # fmt: skip
            if rank == 0 and (step % s.eval_every == 0 or step == last):
                held_out = validation_loss(stage, ema, denoiser, validation, s, device)
                shown |= dict(val=f"{held_out:.3f}")
                write_log(s, rank, stage=stage, step=step, val_loss=held_out)
            bar.set_postfix(shown, refresh=False)
            if rank == 0 and (step % s.save_every == 0 or step == last or stopping):
                save_stage(s, stage, model, ema, optimizers, step, extra)
            if mark[0] == step:
                mark = (step, time.perf_counter())  # evaluating and saving are not training speed
            if stopping and step < last:
                if world > 1:
                    dist.barrier()  # nobody leaves, and so ends the others, before rank 0 has saved
                return False
    if rank == 0 and compiled:
        print(f"{stage}: {compiled_graphs() - graphs} compiled graphs")
    return True


def gpu_figures(model, stage: str, tokens_per_second: float, peak: float | None) -> dict:
    """For the progress bar on CUDA: memory, and the share of the measured matmul rate that training reaches.

    The share is left out for the energy, whose steps also run the frozen denoiser.
    """
    if peak is None:
        return {}
    figures = dict(mem=f"{torch.cuda.max_memory_allocated() / 2**30:.1f}GiB")
    if stage in PROJECTED:
        flops = flops_per_token(model.config, PROJECTED[stage]) * tokens_per_second
        figures["mfu"] = f"{flops / peak:.0%}"
    return figures


def train(s: Settings) -> None:
    """All asked-for stages in order, then the table. Never overwrites a run that it was not told to."""
    stages = STAGES if s.stage == "all" else (s.stage,)
    for stage in stages:
        if has_checkpoint(s.out, stage) and not (s.resume or s.overwrite):
            raise ValueError(f"{checkpoint_path(s.out, stage)} is there already: --resume to continue it, "
                             "--overwrite to train anew, or another --out")  # fmt: skip
    device, rank, world = start_processes(s.device)
    if rank == 0 and s.data == PRESETS["toy"]["data"]:
        data.make_toy(s.data)
    if world > 1:
        dist.barrier()
    s = replace(s, micro_batch=s.micro_batch or max(1, s.batch_size // world))
    data.Blocks(s.data, "val", s.block_size)  # a bad data folder is refused before anything is written
    stop = StopSignal()
    if rank == 0:
        print(f"{s.data} -> {s.out} on {device}" + (f" and {world - 1} more" if world > 1 else ""))
    for stage in stages:
        if world > 1:
            dist.barrier()  # the energy reads the denoiser that rank 0 has just saved
        try:
            finished = train_stage(s, stage, device, rank, world, stop)
        except RuntimeError as error:  # what the others get when one process dies
            if world == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            print(f"rank {rank}: cannot go on, most likely because another process ended "
                  f"({data.first_line(error)[:150]}). The last checkpoint is kept: start again with --resume",
                  file=sys.stderr)  # fmt: skip
            raise SystemExit(1) from None
        if not finished:
            if rank == 0:
                again = shlex.join([word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")])
                launch = "python" if world == 1 else f"torchrun --standalone --nproc_per_node={world}"
                print(f"stopped and saved; go on with: {launch} train.py {again} --resume", file=sys.stderr)
            raise SystemExit(128 + stop.number if stop.number else 1)
    if world > 1:
        dist.barrier()  # gloo's threads let go of the last flags while we wait; at exit that would abort the process
    stop.restore()
    if rank == 0:
        print_table(evaluate(replace(s, passes=8), device, energies=()))
        run = shlex.join(["--data", s.data, "--out", s.out])
        print(f"next: python sample.py --out {shlex.quote(s.out)}    python train.py --eval {run}")
    if world > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------
# Perplexity
# ---------------------------------------------------------------------------------------------------------


def evaluation_blocks(s: Settings, tokenizer: str, config: edlm.Config):
    """Validation shards, or a text file cut into blocks by the checkpoints' tokenizer."""
    if Path(s.data).is_file():
        encoding = data.get_tokenizer(tokenizer)
        return data.text_blocks(s.data, encoding, config.block_size, s.detokenize or None)
    blocks = data.Blocks(s.data, "val", config.block_size)
    if blocks.tokenizer != tokenizer:
        raise ValueError(f"{s.data} holds {blocks.tokenizer} tokens, the checkpoints in {s.out} need {tokenizer}")
    return blocks


def estimators(models: dict, energies, s: Settings) -> list[tuple]:
    """A row of the table each: (name, what the number is, x0 Long[B, L] -> Float[B] nats per sequence)."""
    rows = []
    if "ar" in models:
        rows.append(("AR", "exact NLL", lambda x0: -models["ar"].log_prob(x0).sum(dim=1)))
    if "denoiser" not in models:
        return rows
    denoiser = models["denoiser"]
    mask_id = denoiser.config.mask_id
    chain = dict(mask_id=mask_id, n=s.n, steps=s.chain_steps or None)
    rows.append(("MDLM", "bound", partial(edlm.joint_nelbo, denoiser, no_energy, log_partition="exact", **chain)))
    for name in energies:
        energy = edlm.make_energy(name, models)
        for end in ("exact",) if name == "coar" else ("lower", "upper"):
            joint = partial(edlm.joint_nelbo, denoiser, energy, log_partition=end, **chain)
            rows.append((f"{edlm.ENERGIES[name][1]} joint, log Z {end}", "estimate", joint))
        rows.append((f"{edlm.ENERGIES[name][1]} chain", "bound", partial(edlm.chain_nelbo, denoiser, energy, **chain)))
    return rows


def no_energy(candidates, x_t, log_q):
    """E = 0: EDLM without a correction is the factorised denoiser, and its joint estimate the NELBO."""
    return torch.zeros_like(log_q)


@torch.no_grad()
def evaluate(s: Settings, device, energies) -> list[dict]:
    """Rows of the perplexity table for the checkpoints in --out. Every model sees the same masks."""
    needed = {"denoiser"} | {edlm.ENERGIES[name][0] for name in energies} if energies else set()
    needed |= {stage for stage in ("denoiser", "ar") if has_checkpoint(s.out, stage)}  # rows of their own
    stages = [stage for stage in STAGES if stage in needed] or ["denoiser"]
    models, tokenizer = edlm.load_models(s.out, stages, device)
    config = next(iter(models.values())).config
    blocks = evaluation_blocks(s, tokenizer, config)
    rows = []
    if isinstance(blocks, data.Blocks) and blocks.tokenizer == "toy":
        rows.append(table_row("language (floor)", "exact", torch.tensor([data.toy_entropy()]), config, tokenizer))
    loader = batches(blocks, s.eval_blocks, config)
    for name, what, score in estimators(models, energies, s):
        nats = 0.0
        with tqdm(total=s.passes * len(loader), desc=name[:32], leave=False) as bar, data.autocast(device):
            for part in range(s.passes):
                values = []
                for i, x0 in enumerate(loader):
                    torch.manual_seed(seed_of(s.seed, i, part))
                    values.append(score(x0=x0.to(device)).cpu().double())
                    bar.update()
                nats += torch.cat(values) / s.passes                               # [sequences]
        rows.append(table_row(name, what, nats, config, tokenizer))
    return rows


def table_row(name: str, what: str, nats: torch.Tensor, config: edlm.Config, tokenizer: str) -> dict:
    """Means over sequences of nats Float[N]; the error is the standard error of the mean.

    Perplexity is per scored token, of which a block has L - 1. Bits per character spread a block's bits over
    its L - 2 characters: the end-of-text token after them is not one.
    """
    M = config.block_size - 1
    mean = nats.mean().item()
    error = nats.std().item() / len(nats) ** 0.5 if len(nats) > 1 else 0.0
    row = dict(model=name, what=what, nats_per_token=mean / M, standard_error=error / M,
               perplexity=math.exp(mean / M), sequences=len(nats), tokens=len(nats) * M)  # fmt: skip
    if tokenizer in ("bytes", "text8"):
        row["bits_per_character"] = mean / (M - 1) / math.log(2)
    return row


def print_table(rows: list[dict]) -> None:
    characters = "bits_per_character" in rows[-1]
    print(f"\n{'':36} {'':10} nats per token      perplexity" + ("   bits/char" if characters else ""))
    for r in rows:
        error = f"+- {r['standard_error']:.4f}" if r["standard_error"] else ""
        bits = f"{r['bits_per_character']:12.3f}" if characters else ""
        print(f"{r['model']:36} {r['what']:10} {r['nats_per_token']:8.4f} {error:10} {r['perplexity']:10.3f}{bits}")
    print(f"{rows[-1]['sequences']:,} sequences, {rows[-1]['tokens']:,} tokens scored\n")


def run_evaluation(s: Settings) -> None:
    """--eval: the table on the screen, and with --json in a file."""
    if s.energy == "none":
        energies = []
    elif s.energy:
        energies = [s.energy]
    else:
        energies = [name for name, (stage, _) in edlm.ENERGIES.items() if has_checkpoint(s.out, stage)]
    rows = evaluate(s, data.pick_device(s.device), energies)
    print_table(rows)
    if s.json:
        data.write_json(s.json, dict(settings=asdict(s), rows=rows))


# ---------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------


PROJECTED = {"denoiser": 0.5, "ar": 1.0}  # share of positions that reach the vocabulary in a training step


def flops_per_token(config: edlm.Config, projected: float) -> float:
    """Floating-point operations of one training step per token of the block: 3 times the forward pass.

    Forward, counting a multiply-add as 2: 24 d^2 per block for its four matrices, 4 L d for scores and sums
    of full attention, and 2 d V for the `projected` share of positions that reach the vocabulary.
    """
    d, L = config.n_embd, config.block_size
    return 3 * (config.n_layer * (24 * d * d + 4 * L * d) + 2 * d * config.vocab_size * projected)


def measure(work, device, repeats: int) -> tuple[float, float]:
    """(median seconds, peak GiB on CUDA else 0) of work(), after one call to warm up."""
    runs = [data.timed(work, device)[:2] for _ in range(repeats + 1)][1:]
    return sorted(took for took, _ in runs)[repeats // 2], max(memory for _, memory in runs)


def matmul_rate(device, repeats: int = 5) -> float:
    """Floating-point operations per second of one large matrix product, bf16 on CUDA, float32 elsewhere."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / measure(lambda: a @ b, device, repeats)[0]


def plain_loss(net: edlm.Denoiser, x0: torch.Tensor) -> torch.Tensor:
    """The reference for --bench: the same loss, but with every position projected onto the vocabulary."""
    n = edlm.mask_counts(len(x0), x0.shape[1] - 1).to(x0.device)
    x_t = edlm.mask_tokens(x0, n, mask_id=net.config.mask_id)
    logits = net.head(net.transformer(net.transformer.embed(x_t)))                 # [B, L, V]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), x0.flatten(), reduction="none").view_as(x0)
    return ((loss * (x_t == net.config.mask_id)).sum(dim=1) / n).mean()


def bench(s: Settings) -> None:
    """--bench: a denoiser step as this file trains it, against a plain step, on random weights and tokens.

    --micro_batch sequences (2 if that is 0), --max_steps timed steps (default 5). The plain step projects every
    position and leaves the optimiser's and the compiler's options at torch's defaults.
    """
    device = data.pick_device(s.device)
    vocab = {"toy": data.get_tokenizer("toy").n_vocab, "text8": 28}.get(Path(s.data).stem, 50257)
    config = edlm.Config(vocab, s.block_size, s.n_layer, s.n_head, s.n_embd, s.dropout)
    x0 = torch.randint(0, vocab, (s.micro_batch or 2, s.block_size), device=device)
    rows = []
    for name in ("this project", "plain step"):
        torch.manual_seed(s.seed)
        denoiser = edlm.Denoiser(config).to(device)
        if name == "plain step":
            optimizers, loss = [torch.optim.AdamW(denoiser.parameters(), lr=s.lr)], plain_loss
        else:
            optimizers, loss = make_optimizers(denoiser, s, device), partial(training_loss, "denoiser", denoiser=None)
            if (s.compile or device.type == "cuda") and can_compile(device):
                denoiser.transformer.compile(dynamic=False)
        step = partial(bench_step, denoiser, loss, optimizers, x0, s, device)
        took, memory = measure(step, device, s.max_steps or 5)
        rows.append(dict(step=name, seconds=took, tokens_per_second=x0.numel() / took, peak_gib=memory or None))
        del denoiser, optimizers
    flops = flops_per_token(config, PROJECTED["denoiser"])
    peak = matmul_rate(device)
    for row in rows:
        row["matmul_share"] = flops * row["tokens_per_second"] / peak
        memory = "" if row["peak_gib"] is None else f"   peak {row['peak_gib']:.1f} GiB"
        print(f"{row['step']:14} {row['seconds']:8.3f} s/step {row['tokens_per_second']:10,.0f} tokens/s "
              f"{row['matmul_share']:6.0%} of the matmul rate{memory}")  # fmt: skip
    ratio = rows[1]["seconds"] / rows[0]["seconds"]
    print(f"ratio {ratio:.2f}; {flops / 1e6:,.0f} MFLOP per token are needed; measured matmul rate "
          f"{peak / 1e9:,.0f} GFLOP/s; {compiled_graphs()} compiled graphs")  # fmt: skip
    if s.json:
        facts = dict(ratio=ratio, flops_per_token=flops, matmul_flops=peak)
        data.write_json(s.json, dict(settings=asdict(s), rows=rows, compiled_graphs=compiled_graphs(), **facts))


def bench_step(denoiser, loss, optimizers, x0, s: Settings, device) -> None:
    """Forward, backward, clip, update."""
    with data.autocast(device):
        value = loss(net=denoiser, x0=x0)
    value.backward()
    torch.nn.utils.clip_grad_norm_(denoiser.parameters(), s.grad_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def main(argv=None) -> None:
    """The command line: `python train.py --help`."""
    s = parse(argv)
    if s.bench:
        bench(s)
    elif s.eval:
        run_evaluation(s)
    else:
        train(s)


if __name__ == "__main__":
    data.run("train.py", main)
