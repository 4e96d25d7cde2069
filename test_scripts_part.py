"""Tests of train.py and sample.py as a user meets them: mistakes, resume, several processes, figures, README."""

import functools
import io
import json
import lzma
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

import data
import edlm
import sample
import train

ROOT = Path(__file__).parent
SMALL = "--n_layer 1 --n_embd 16 --n_head 2 --batch_size 8 --max_steps 4 --warmup_steps 2 --eval_blocks 16".split()
SMALL += "--log_every 1 --save_every 2 --eval_every 2 --device cpu".split()
STORY = next(iter(data.toy_language()))
WORDS = STORY.split(" ")
TEXT = "the cat sat on the mat, and the dog sat on the log. it was warm; nobody moved.\n\n"


# ------------------------------------------------------------------------------------------------
# What the tests share


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Networks this small gain nothing from threads, and on a busy machine lose much by waiting for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_toy(tmp_path_factory):
    """A folder of toy shards, a hundredth of the usual size."""
    folder = tmp_path_factory.mktemp("small") / "toy"
    data.make_toy(folder, n_train=200, n_val=40)
    return folder


@pytest.fixture(scope="session")
def small_bytes(tmp_path_factory):
    """A folder of byte shards."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "text.txt").write_text(TEXT * 40)
    data.prepare_text([folder / "text.txt"], folder / "bytes", tokenizer="bytes", val_docs=None, shard_tokens=10**6)
    return folder / "bytes"


def flags(folder, out, *more):
    return ["--data", str(folder), "--out", str(out), *SMALL, *map(str, more)]


@pytest.fixture(scope="session")
def toy_out(small_toy, tmp_path_factory):
    """All three stages, trained for four steps on the toy language. To be copied, not changed."""
    out = tmp_path_factory.mktemp("trained") / "toy"
    train.main(flags(small_toy, out))
    return out


@pytest.fixture(scope="session")
def bytes_out(small_bytes, tmp_path_factory):
    """All three stages, trained for four steps on bytes."""
    out = tmp_path_factory.mktemp("trained") / "bytes"
    train.main(flags(small_bytes, out, "--block_size", 32))
    return out


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_dir(here, toy_out, small_toy):
    """A working folder with a copy of the trained run in out/toy and of its data in data/small."""
    shutil.copytree(toy_out, here / "out/toy")
    shutil.copytree(small_toy, here / "data/small")
    return here


def call(script, argv):
    """Exit code of a script called as the command line calls it."""
    main = {"train.py": train.main, "sample.py": sample.main, "data.py": data.main}[script]
    try:
        data.run(script, functools.partial(main, [str(word) for word in argv]))
    except SystemExit as stop:
        return stop.code
    return 0


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


@pytest.fixture
def refused(here, capsys):
    """refused(script, argv, words): one plain line on stderr that has the words, exit code 2, nothing changed."""

    def check(script, argv, words):
        before = snapshot(here)
        capsys.readouterr()
        code = call(script, shlex.split(argv) if isinstance(argv, str) else argv)
        error = capsys.readouterr().err
        assert code == 2, (argv, error)
        assert error.startswith(f"{script}: error: ") and error.count("\n") == 1 and error.endswith("\n"), error
        assert re.search(words, error), error
        assert snapshot(here) == before, argv

    return check


def rows_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def timeless(rows):
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def assert_same(a, b, path="checkpoint"):
    """Bit-identical checkpoints, settings that say where and how they were made aside."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"settings"}:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def assert_same_run(a, b, *stages):
    """Two folders hold the same log and the same weights, optimiser states and all."""
    assert timeless(rows_of(a)) == timeless(rows_of(b))
    for stage in stages:
        assert_same(*(torch.load(out / f"{stage}.pt", weights_only=True) for out in (a, b)))


# ------------------------------------------------------------------------------------------------
# Mistakes: one plain line, exit code 2, nothing changed


SAMPLE_MISTAKES = [
    ("--stepz 4", "unrecognized arguments: --stepz"),
    ("--k 0", "--k: must be at least 1, not 0"),
    ("--steps 0", "--steps: must be at least 1, not 0"),
    ("--steps four", "--steps"),
    ("--steps 4,8", "list only with --compare"),
    ("--window 1.5", "--window: must be between 0 and 1"),
    ("--window -0.1", "--window: must be between 0 and 1"),
    ("--window nan", "--window: must be between 0 and 1"),
    ("--num 0", "--num: must be at least 1"),
    ("--num 2,3", "--num is one number"),
    ("--seed -1", "--seed"),
    (f"--seed {2**70}", "--seed"),
    ("--device banana", "no device 'banana'.*cpu"),
    ("--device cpu:x", "device"),
    ("--energy best", "--energy"),
    ("--model ar --energy nce", "neither --infill nor --energy"),
    ("--prompt ben --infill ___", "exclude each other"),
    ("--compare --infill ___", "--compare.*--infill"),
    ("--judge gpt2", "--judge.*--compare"),
    ("--prompt xyzzy", "no word 'xyzzy'"),
    ("--infill 'xyzzy ___'", "no word 'xyzzy'"),
    (["--infill", STORY], "no gap"),
    ("--infill '___*20'", "block holds 19"),
    (["--prompt", WORDS[0] + f" {WORDS[1]}" * 24], "prompt has 25 tokens.*holds 20"),
    ("--json nowhere/figures.json", "nowhere/figures.json"),
    ("--json out", "cannot write out"),
    ("--bench huge", "--bench"),
    ("--bench --steps 4,8", "list only with --compare"),
]


@pytest.mark.parametrize("argv, words", SAMPLE_MISTAKES, ids=str)
def test_sample_refuses_in_one_line(run_dir, refused, argv, words):
    refused("sample.py", argv, words)


TRAIN_MISTAKES = [
    ("--stepz 4", "unrecognized arguments"),
    ("--preset imagenet", "--preset.*imagenet.*toy"),
    ("--stage all,ar", "--stage"),
    ("--n_layer 1.5", "--n_layer"),
    *((f"--{name} 0", f"--{name} must be at least 1") for name in ("batch_size", "n_layer", "n_embd", "n_head")),
    ("--block_size 0", "--block_size must be at least 1"),
    ("--block_size 22", "block_size of 21"),
    ("--denoiser_steps 0", "--denoiser_steps must be at least 1"),
    ("--max_steps -1", "--max_steps"),
    ("--micro_batch -4", "--micro_batch"),
    ("--micro_batch 3", "batch_size 8 is not a multiple of micro_batch 3"),
    ("--batch_size 1000", "200 blocks, fewer than one batch of 1000"),
    ("--n_embd 15", "n_embd 15 must be a multiple"),
    ("--n_head 3", "n_embd 16 must be a multiple of 2 \\* n_head = 6"),
    ("--dropout 1.5", "--dropout"),
    ("--dropout nan", "--dropout"),
    ("--lr -1", "--lr"),
    ("--lr nan", "--lr"),
    ("--lr fast", "--lr"),
    ("--weight_decay -1", "--weight_decay"),
    ("--grad_clip 0", "--grad_clip"),
    ("--ema 1", "--ema"),
    ("--seed -3", "--seed"),
    ("--device banana", "no device"),
    ("--resume --overwrite", "one of them"),
    ("--stage energy", "run python train.py first"),
    ("--eval", "no checkpoint new/denoiser.pt: run python train.py first"),
    ("--eval --n 1", "--n must be at least 2"),
    ("--eval --chain_steps -1", "--chain_steps"),
    ("--eval --json nowhere/table.json", "nowhere/table.json"),
    ("--bench --json nowhere/table.json", "nowhere/table.json"),
    ("--data nothing", "no token shards in nothing: run `python data.py`"),
]


@pytest.mark.parametrize("argv, words", TRAIN_MISTAKES, ids=str)
def test_train_refuses_in_one_line(run_dir, refused, argv, words):
    refused("train.py", [*flags("data/small", "new"), *shlex.split(argv)], words)


def test_an_existing_run_is_not_overwritten(run_dir, refused):
    refused("train.py", flags("data/small", "out/toy"), "--resume.*--overwrite.*--out")
    refused("train.py", flags("data/small", "out/toy", "--stage", "ar"), "ar.pt is there already")
    refused("train.py", flags("data/small", "out/toy", "--resume", "--lr", 1), "trained with --lr 0[.0-9]+, not 1.0")


def test_no_checkpoint_yet(here, refused):
    refused("sample.py", "", "no checkpoint out/toy/denoiser.pt: run python train.py first")
    refused("sample.py", "--model ar", "no checkpoint out/toy/ar.pt: run python train.py first")
    refused("train.py", "--eval", "no checkpoint out/toy/denoiser.pt: run python train.py first")


@pytest.mark.parametrize("name", ["ar", "nce"])
def test_an_energy_that_was_not_trained(run_dir, refused, name):
    stage = edlm.ENERGIES[name][0]
    (run_dir / f"out/toy/{stage}.pt").unlink()
    (run_dir / f"out/toy/{stage}.previous.pt").unlink()
    refused("sample.py", f"--energy {name}", f"no checkpoint out/toy/{stage}.pt: run python train.py first")
    evaluate = flags("data/small", "out/toy", "--eval", "--energy", name)
    refused("train.py", evaluate, f"no checkpoint out/toy/{stage}.pt: run python train.py first")


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a checkpoint"])
def test_a_damaged_checkpoint(run_dir, refused, damage):
    path = run_dir / "out/toy/denoiser.pt"
    path.write_bytes(damage(path.read_bytes()))
    refused("sample.py", "", "out/toy/denoiser.pt is damaged")
    refused("train.py", flags("data/small", "out/toy", "--eval"), "out/toy/denoiser.pt is damaged")
    path.with_name("denoiser.previous.pt").unlink()
    refused("train.py", flags("data/small", "out/toy", "--resume"), "out/toy/denoiser.pt is damaged")


def test_a_checkpoint_of_another_tokenizer(run_dir, refused, small_bytes):
    argv = flags(small_bytes, "out/toy", "--block_size", 21)
    refused("train.py", [*argv, "--eval"], "holds bytes tokens, the checkpoints in out/toy need toy")
    refused("train.py", [*argv, "--resume"], "denoiser.pt belongs to another tokenizer|knows .* tokens|trained")
    for stage in ("ar.pt", "energy.pt", "ar.previous.pt", "energy.previous.pt"):
        (run_dir / "out/toy" / stage).unlink()
    refused("train.py", [*argv, "--stage", "energy"], "train a denoiser on this data first")
    other = edlm.AutoregressiveLM(edlm.Config(28, 21, 1, 2, 16))
    edlm.save_checkpoint(run_dir / "out/toy/ar.pt", other, tokenizer="text8")
    refused("sample.py", "--energy ar", "train both on the same data")


def test_same_vocabulary_but_another_tokenizer(run_dir, refused):
    """The name counts, not only the number of tokens."""
    model, content = edlm.load_checkpoint(run_dir / "out/toy/denoiser.pt")
    edlm.save_checkpoint(run_dir / "out/toy/denoiser.pt", model, tokenizer="text8", training=content["training"])
    for name in ("ar.pt", "energy.pt", "ar.previous.pt", "energy.previous.pt", "denoiser.previous.pt"):
        (run_dir / "out/toy" / name).unlink()
    refused("train.py", flags("data/small", "out/toy", "--eval"), "toy tokens.*need text8")
    refused("train.py", flags("data/small", "out/toy", "--resume"), "another tokenizer")
    refused("train.py", flags("data/small", "out/toy", "--stage", "energy"), "text8")


def test_bad_data_folders(run_dir, refused):
    (run_dir / "empty").mkdir()
    refused("train.py", flags("empty", "new"), "no token shards in empty: run `python data.py`")
    shard = run_dir / "data/small/train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused("train.py", flags("data/small", "new"), "train_000000.bin is damaged")


def test_an_energy_of_another_denoiser(run_dir, refused, small_toy):
    assert call("train.py", flags(small_toy, "out/toy", "--stage", "denoiser", "--overwrite", "--seed", 1)) == 0
    message = "energy.pt belongs to another denoiser: train it anew with --stage energy --overwrite"
    refused("sample.py", "--energy nce", message)
    refused("train.py", flags(small_toy, "out/toy", "--eval"), message)
    # The same settings, but other data: the energy is not continued against a denoiser that it never saw.
    shutil.copy(run_dir / "out/toy/energy.pt", run_dir / "energy.pt")
    content = torch.load(run_dir / "energy.pt", weights_only=True)
    content["training"]["settings"]["seed"] = 1
    torch.save(content, run_dir / "out/toy/energy.pt")
    resume = flags(small_toy, "out/toy", "--resume", "--stage", "energy", "--seed", 1)
    refused("train.py", resume, "another denoiser .*--stage energy --overwrite")


def test_text_files_that_cannot_be_evaluated(run_dir, refused):
    (run_dir / "empty.txt").write_text(" \n")
    (run_dir / "short.txt").write_text(" ".join(WORDS[:3]))
    (run_dir / "strange.txt").write_text("the quick brown fox " * 30)
    (run_dir / "bad.jsonl").write_text(json.dumps(dict(text=STORY)) + "\nnot json\n")
    for name, words in (("empty.txt", "is empty"), ("short.txt", "too few for one block of 21"),
                        ("strange.txt", "no word"), ("bad.jsonl", "line 2"),
                        ("missing.txt", "missing.txt")):  # fmt: skip
        refused("train.py", ["--eval", "--data", name, "--out", "out/toy", "--device", "cpu"], words)


def test_judges_that_cannot_be_loaded(run_dir, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("sample.py", "--compare --judge gpt2-large", "pip install transformers")

    def unreachable(name):
        raise OSError("cannot find it\nin many\nlines")

    auto = types.SimpleNamespace(from_pretrained=unreachable)
    fake = types.SimpleNamespace(AutoTokenizer=auto, AutoModelForCausalLM=auto)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    refused("sample.py", "--compare --judge nobody/nothing", "could not load 'nobody/nothing' .cannot find it.$")


def test_gpt2_without_a_network(run_dir, refused, monkeypatch):
    import requests
    import tiktoken.registry

    def no_network(*args, **kwargs):
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "get", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    (run_dir / "cache").mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(run_dir / "cache"))
    edlm.save_checkpoint(run_dir / "out/denoiser.pt", edlm.Denoiser(edlm.Config(50257, 8, 1, 1, 2)), tokenizer="gpt2")
    (run_dir / "my.txt").write_text(TEXT * 10)
    data.get_tokenizer.cache_clear()
    try:
        refused("sample.py", "--out out --energy none", "TIKTOKEN_CACHE_DIR")
        refused("train.py", "--eval --out out --data my.txt", "TIKTOKEN_CACHE_DIR")
        refused("data.py", "my.txt", "TIKTOKEN_CACHE_DIR")
    finally:
        data.get_tokenizer.cache_clear()


@pytest.mark.parametrize("script", ["train.py", "sample.py", "data.py"])
def test_help_is_readable(script, here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert call(script, ["--help"]) == 0
    text = capsys.readouterr().out
    assert f"python {script}" in text and max(map(len, text.splitlines())) <= 120
    if script == "train.py":
        assert all(f"{name}={value}" in text for name, value in train.PRESETS["owt"].items())


# ------------------------------------------------------------------------------------------------
# Killed and resumed. A helper process imports torch once and forks for every run.

ZYGOTE = """
import json, os, signal, sys, traceback
sys.path.insert(0, sys.argv[1])
import torch
import torch._dynamo  # the optimisers import it when first used, which takes longer than a small run
import data, edlm, train

torch.set_num_threads(1)

def signal_at(module, name, n, number=signal.SIGKILL, before=lambda *args, **kwargs: None):
    real, calls = getattr(module, name), []
    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            before(*args, **kwargs)
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)
    setattr(module, name, patched)

for line in sys.stdin:
    argv, patch, output = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(2, 1)
            sys.argv[1:] = argv
            exec(patch)
            data.run("train.py", train.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def zygote():
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    process = subprocess.Popen([sys.executable, "-c", ZYGOTE, str(ROOT)], env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def launch(zygote, tmp_path):
    """launch(argv, patch): (exit code, screen) of train.py in a process of its own, with `patch` run before."""

    def start(argv, patch=""):
        zygote.stdin.write(json.dumps([[str(word) for word in argv], patch, str(tmp_path / "screen")]) + "\n")
        zygote.stdin.flush()
        code = int(zygote.stdout.readline())
        return code, (tmp_path / "screen").read_text()

    return start


RESUMABLE = ["--max_steps", 6, "--dropout", 0.1]


@pytest.fixture(scope="session")
def uninterrupted(zygote, small_toy, tmp_path_factory):
    """The denoiser and the energy trained without a break, in the helper process like all that are compared."""
    out = tmp_path_factory.mktemp("uninterrupted")
    for stage in ("denoiser", "energy"):
        argv = flags(small_toy, out, "--stage", stage, *RESUMABLE)
        zygote.stdin.write(json.dumps([argv, "", str(out / "screen")]) + "\n")
        zygote.stdin.flush()
        assert zygote.stdout.readline() == "0\n", (out / "screen").read_text()
    return out


def only(out, folder, stage):
    """A copy of a run with one stage alone."""
    folder.mkdir(exist_ok=True)
    shutil.copy(out / f"{stage}.pt", folder)
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["stage"] == stage))
    return folder


HALF_A_CHECKPOINT = """
import io
def half(content, file):
    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
save = torch.save
signal_at(torch, "save", 2, before=half)
"""
HALF_A_ROW = """
def half(s, rank, **row):
    with open(train.log_path(s), "a") as file:
        file.write(json.dumps(row)[:20])
signal_at(train, "write_log", 5, before=half)
"""
# Saves rename three files, the first save two: NAME.tmp -> fresh, newest -> previous, fresh -> newest.
KILLS = {
    "before any checkpoint": "signal_at(train, 'write_log', 2)",
    "after a checkpoint": "signal_at(train, 'write_log', 6)",
    "in a row of the log": HALF_A_ROW,
    "in a checkpoint": HALF_A_CHECKPOINT,
    "before the checkpoint is on the disk": "signal_at(os, 'fsync', 2)",
    "first checkpoint, before it has its name": "signal_at(os, 'replace', 2)",
    "before the first rename": "signal_at(os, 'replace', 3)",
    "before the second rename": "signal_at(os, 'replace', 4)",
    "between newest and previous": "signal_at(os, 'replace', 5)",
    "in the last save": "signal_at(os, 'replace', 8)",
    "in validation": "signal_at(train, 'validation_loss', 2)",
}


@pytest.mark.parametrize("when", KILLS)
def test_killed_and_resumed_is_bit_identical(when, launch, small_toy, uninterrupted, tmp_path):
    argv = flags(small_toy, tmp_path / "run", "--stage", "denoiser", *RESUMABLE)
    code, screen = launch(argv, KILLS[when])
    assert code == -9, screen
    code, screen = launch([*argv, "--resume"])
    assert code == 0, screen
    assert_same_run(tmp_path / "run", only(uninterrupted, tmp_path / "expected", "denoiser"), "denoiser")


def test_killed_energy_is_bit_identical(launch, small_toy, uninterrupted, tmp_path):
    out = only(uninterrupted, tmp_path / "run", "denoiser")
    argv = flags(small_toy, out, "--stage", "energy", *RESUMABLE)
    assert launch(argv, "signal_at(train, 'write_log', 5)")[0] == -9
    assert launch([*argv, "--resume"])[0] == 0
    assert_same_run(out, uninterrupted, "denoiser", "energy")


def test_a_damaged_newest_checkpoint_falls_back(launch, small_toy, uninterrupted, tmp_path):
    argv = flags(small_toy, tmp_path / "run", "--stage", "denoiser", *RESUMABLE)
    assert launch(argv, "signal_at(train, 'write_log', 8)")[0] == -9
    newest = tmp_path / "run/denoiser.pt"
    assert torch.load(newest, weights_only=True)["training"]["step"] == 4
    newest.write_bytes(newest.read_bytes()[:5000])
    code, screen = launch([*argv, "--resume"])
    assert code == 0 and re.search("denoiser.pt is damaged.*resuming from .*denoiser.previous.pt", screen), screen
    assert_same_run(tmp_path / "run", only(uninterrupted, tmp_path / "expected", "denoiser"), "denoiser")


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_save_and_say_how_to_go_on(name, code, launch, small_toy, uninterrupted, tmp_path):
    argv = flags(small_toy, tmp_path / "run", "--stage", "denoiser", *RESUMABLE)
    got, screen = launch([*argv, "--overwrite"], f"signal_at(train, 'write_log', 4, signal.{name})")
    assert got == code and "Traceback" not in screen, screen
    steps = torch.load(tmp_path / "run/denoiser.pt", weights_only=True)["training"]["step"]
    assert 0 < steps < 6
    again = re.search("stopped and saved; go on with: python train.py (.*)", screen)[1]
    got, screen = launch(shlex.split(again))
    assert got == 0, screen
    assert_same_run(tmp_path / "run", only(uninterrupted, tmp_path / "expected", "denoiser"), "denoiser")


@pytest.mark.parametrize("error", ["RuntimeError('PytorchStreamWriter failed')", "OSError(28, 'No space left')"])
def test_a_full_disk_leaves_the_old_checkpoint(error, launch, small_toy, uninterrupted, tmp_path):
    patch = f"""
save, calls = torch.save, []
def full(content, file):
    calls.append(1)
    if len(calls) == 2:
        file.write(b"some")
        raise {error}
    save(content, file)
torch.save = full
"""
    argv = flags(small_toy, tmp_path / "run", "--stage", "denoiser", *RESUMABLE)
    code, screen = launch(argv, patch)
    assert code == 2 and "Traceback" not in screen
    assert re.search("train.py: error: could not write .*denoiser", screen.splitlines()[-1]), screen
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"denoiser.pt", "log.jsonl"}
    assert edlm.load_checkpoint(tmp_path / "run/denoiser.pt")[1]["training"]["step"] == 2
    assert launch([*argv, "--resume"])[0] == 0
    assert_same_run(tmp_path / "run", only(uninterrupted, tmp_path / "expected", "denoiser"), "denoiser")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_and_keeps_the_last_good_checkpoint(what, launch, small_toy, tmp_path):
    # the square root of 0 is 0 but has no slope: a finite loss with a gradient that is not a number
    no_slope = "value + (sum(p.sum() for p in net.parameters()) * 0).sqrt()"
    broken = {"loss": "value * float('nan')", "gradient": no_slope}[what]
    patch = f"""
real, calls = train.training_loss, []
def broken(stage, net, denoiser, x0):
    value = real(stage, net, denoiser, x0)
    calls.append(net.training)
    return {broken} if sum(calls) == 4 and net.training else value
train.training_loss = broken
"""
    code, screen = launch(flags(small_toy, tmp_path / "run", "--stage", "denoiser", *RESUMABLE), patch)
    assert code == 2 and "Traceback" not in screen
    assert re.search("nan at step 4; the last good checkpoint is kept", screen.splitlines()[-1]), screen
    model, checkpoint = edlm.load_checkpoint(tmp_path / "run/denoiser.pt")
    assert checkpoint["training"]["step"] == 2 and all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------
# Two processes


def test_two_processes_do_what_one_does(launch, small_toy, tmp_path):
    def argv(name):
        return flags(small_toy, tmp_path / name, "--micro_batch", 4, "--dropout", 0.1)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "train.py"), *argv("two")]
    ended = subprocess.run(command, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert launch(argv("one"))[0] == 0
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    # Only one process writes: no row twice, no file that the other run has not.
    assert [(row["stage"], row["step"], row.keys()) for row in two] == [(r["stage"], r["step"], r.keys()) for r in one]
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}
    assert ended.stdout.count("perplexity") == 1
    for a, b in zip(one, two, strict=True):
        for key in a.keys() & {"loss", "val_loss", "grad_norm", "lr", "tokens"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a, b)
    for stage in train.STAGES:
        a, b = (torch.load(tmp_path / f"{name}/{stage}.pt", weights_only=True)["weights"] for name in ("one", "two"))
        for name in a:
            assert torch.allclose(a[name], b[name], atol=1e-4), (stage, name, (a[name] - b[name]).abs().max())


# ------------------------------------------------------------------------------------------------
# What training writes


def test_log_rows(toy_out):
    rows = rows_of(toy_out)
    for stage in train.STAGES:
        steps = [row for row in rows if row["stage"] == stage and "loss" in row]
        assert [row["step"] for row in steps] == [1, 2, 3, 4]
        for row in steps:
            assert row.keys() == {"stage", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"}
            assert row["tokens"] == row["step"] * 8 * 21 and row["grad_norm"] > 0 and row["tokens_per_second"] > 0
        # warm-up of two steps, then a cosine that would reach 0 at step 4
        assert [row["lr"] / train.PRESETS["toy"]["lr"] for row in steps] == pytest.approx([0.5, 1, 1, 0.5])
        held_out = [row for row in rows if row["stage"] == stage and "val_loss" in row]
        assert [row["step"] for row in held_out] == [2, 4]
    # near the start: uniform guesses of words, and no idea of what is real
    uniform = math.log(data.get_tokenizer("toy").n_vocab)
    first = {row["stage"]: row["loss"] for row in reversed(rows) if "loss" in row}
    assert first["ar"] == pytest.approx(uniform, rel=0.05) and first["energy"] == pytest.approx(2 * math.log(2))


def test_validation_is_on_fixed_masks_and_leaves_the_random_state(toy_out, small_toy):
    model, _ = edlm.load_checkpoint(toy_out / "denoiser.pt")
    s = train.parse(flags(small_toy, "unused"))
    blocks = data.Blocks(small_toy, "val", 21)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = train.validation_loss("denoiser", model, None, blocks, s, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
    assert a == train.validation_loss("denoiser", model, None, blocks, s, torch.device("cpu"))
    # It is also the last row of the log: what is saved for use is the weight average that was evaluated.
    last = [row["val_loss"] for row in rows_of(toy_out) if row["stage"] == "denoiser" and "val_loss" in row][-1]
    assert a == pytest.approx(last, rel=1e-5)


def test_what_is_saved_for_use_is_the_average(toy_out):
    checkpoint = torch.load(toy_out / "denoiser.pt", weights_only=True)
    vocab = data.get_tokenizer("toy").n_vocab
    shape = dict(vocab_size=vocab, block_size=21, n_layer=1, n_head=2, n_embd=16)
    assert checkpoint["config"] == dict(shape, dropout=train.PRESETS["toy"]["dropout"])
    weights, model = checkpoint["weights"], checkpoint["training"]["model"]
    assert weights.keys() == model.keys()
    assert not torch.equal(weights["transformer.embed.weight"], model["transformer.embed.weight"])


def test_the_weight_average_is_the_recursion(small_toy, tmp_path):
    """Saved every step, the average is decay * average + (1 - decay) * weights, decay min(ema, (1+n)/(10+n))."""
    average = None
    for step in (1, 2, 3):
        argv = flags(small_toy, tmp_path / "run", "--stage", "ar", "--lr_schedule", "constant", "--ema", 0.15)
        train.main([*argv, "--max_steps", str(step), "--resume"])
        checkpoint = torch.load(tmp_path / "run/ar.pt", weights_only=True)
        now = checkpoint["training"]["model"]["head.weight"]
        decay = min(0.15, step / (9 + step))
        average = now if average is None else decay * average + (1 - decay) * now
        assert torch.allclose(checkpoint["weights"]["head.weight"], average, atol=1e-7), step


def test_resume_skips_what_is_finished_and_continues_with_more_steps(run_dir, capsys):
    before = {stage: (run_dir / f"out/toy/{stage}.pt").read_bytes() for stage in train.STAGES}
    rows = rows_of("out/toy")
    assert call("train.py", flags("data/small", "out/toy", "--resume")) == 0
    assert before == {stage: (run_dir / f"out/toy/{stage}.pt").read_bytes() for stage in train.STAGES}
    assert rows_of("out/toy") == rows
    assert call("train.py", flags("data/small", "out/toy", "--resume", "--stage", "ar", "--max_steps", 6)) == 0
    new = [row for row in rows_of("out/toy") if row not in rows]
    assert [row["step"] for row in new if "loss" in row] == [5, 6] and {row["stage"] for row in new} == {"ar"}


def test_overwrite_leaves_nothing_of_the_old_run(run_dir, launch):
    """Killed before its first checkpoint, a new run must not go on as the old one when it is resumed."""
    argv = flags("data/small", "out/toy", "--lr", 0.001)
    argv[1], argv[3] = str(run_dir / "data/small"), str(run_dir / "out/toy")
    assert launch([*argv, "--overwrite"], "signal_at(train, 'write_log', 2)")[0] == -9
    code, screen = launch([*argv, "--resume"])
    assert code == 0, screen
    fresh = [argv[0], argv[1], "--out", str(run_dir / "fresh"), *argv[4:]]
    assert launch(fresh)[0] == 0
    assert_same_run(run_dir / "out/toy", run_dir / "fresh", *train.STAGES)


def test_a_new_denoiser_beside_an_old_energy_ends_well(run_dir, capsys):
    """The energy does not fit any more, but nobody asked for it yet: it is refused when it is used."""
    assert call("train.py", flags("data/small", "out/toy", "--stage", "denoiser", "--overwrite", "--seed", 1)) == 0
    assert "MDLM" in capsys.readouterr().out


def test_micro_batches_add_up_to_the_batch(small_toy, tmp_path):
    """AR has no random masks: cut in two or not, a step is the same."""
    for name, micro in (("whole", 8), ("halves", 4)):
        train.main(flags(small_toy, tmp_path / name, "--stage", "ar", "--micro_batch", micro))
    a, b = ([row["loss"] for row in rows_of(tmp_path / name) if "loss" in row] for name in ("whole", "halves"))
    assert a == pytest.approx(b, rel=1e-4)


def test_first_row_is_the_loss_of_the_first_batch(small_toy, toy_out):
    """The logged AR loss, computed again from the seed, the order of the data and the first weights alone."""
    blocks = data.Blocks(small_toy, "train", 21)
    torch.manual_seed(0)
    ar = edlm.AutoregressiveLM(edlm.Config(blocks.vocab_size, 21, 1, 2, 16))
    batch = next(iter(data.BatchOrder(len(blocks), 8, 8, seed=0)))
    loss = -ar.log_prob(torch.stack([blocks[i] for i in batch])).sum() / (8 * 20)
    logged = next(row["loss"] for row in rows_of(toy_out) if row["stage"] == "ar")
    assert loss.item() == pytest.approx(logged, rel=1e-5)


# ------------------------------------------------------------------------------------------------
# sample.py


def sampled(*argv):
    """The content of --json after sample.py, in the current folder."""
    assert call("sample.py", ["--device", "cpu", *argv, "--json", "figures.json"]) == 0
    return json.loads(Path("figures.json").read_text())


KEYS = {"settings", "tokens", "texts", "valid_fraction", "entropy", "ess", "denoiser_forwards", "energy_forwards",
        "seconds"}  # fmt: skip


@pytest.mark.parametrize("energy", ["none", "ar", "coar", "nce"])
def test_every_energy_gives_the_promised_figures(run_dir, energy, capsys):
    got = sampled("--energy", energy, "--num", 6, "--steps", 4, "--k", 3)
    assert got.keys() >= KEYS
    assert got["settings"]["energy"] == energy and got["settings"]["steps"] == [4]
    tokens = torch.tensor(got["tokens"])
    tokenizer = data.get_tokenizer("toy")
    assert tokens.shape == (6, 21) and (tokens[:, 0] == tokenizer.eot_token).all() and tokens.max() < tokenizer.n_vocab
    assert got["texts"] == [data.decode(tokenizer, row) for row in got["tokens"]]
    assert got["valid_fraction"] == sum(map(data.toy_is_valid, got["texts"])) / 6
    counts = [Counter(row[1:]).values() for row in got["tokens"]]
    assert got["entropy"] == pytest.approx(sum(-n / 20 * math.log2(n / 20) for row in counts for n in row) / 6)
    assert 0 < got["denoiser_forwards"] <= 4
    if energy == "none":
        assert got["ess"] is None and got["energy_forwards"] == 0
    else:
        assert 1 <= got["ess"] <= 3.0001 and got["energy_forwards"] == pytest.approx(3 * got["denoiser_forwards"])
    assert got["texts"][0] in capsys.readouterr().out


def test_seeds(run_dir):
    a, b, c = (sampled("--energy", "nce", "--num", 4, "--seed", seed)["tokens"] for seed in (3, 3, 4))
    assert a == b != c


def test_forwards_never_exceed_the_masked_tokens(run_dir):
    got = sampled("--energy", "none", "--num", 5, "--steps", 500)
    assert 15 < got["denoiser_forwards"] <= 20
    assert sampled("--energy", "none", "--num", 5, "--steps", 2)["denoiser_forwards"] <= 2


def test_window_zero_asks_no_energy(run_dir):
    full, half, none = (
        sampled("--energy", "nce", "--num", 8, "--window", w)["energy_forwards"] for w in ("1", "0.5", "0")
    )
    assert none == 0 < half < full


@pytest.mark.parametrize("model", ["diffusion", "ar"])
def test_a_prompt_is_kept(run_dir, model):
    prompt = " ".join(WORDS[:4])
    got = sampled("--prompt", prompt, "--model", model, "--num", 3, "--steps", 3)
    given = data.encode(data.get_tokenizer("toy"), prompt)
    assert all(row[1:5] == given for row in got["tokens"]) and all(t.startswith(prompt) for t in got["texts"])
    assert len({tuple(row) for row in got["tokens"]}) > 1


def test_gaps_are_counted_and_the_rest_is_kept(run_dir):
    run = sample.load_run(sample.parse(["--device", "cpu"]))
    mask, tokenizer = run.config.mask_id, run.tokenizer
    a, b, c, d, e, f, g = [word for word in WORDS if "." not in word][:7]
    words = data.encode(tokenizer, " ".join((a, b, c, d, e, f, g)))
    assert len(words) == 7
    for text, where in (
        (f"{a} {b} ___ {d} {e} {f} {g}", [2]),
        (f"{a} ___*3 {e} {f} {g}", [1, 2, 3]),
        (f"___ {b} {c} {d} {e} {f} ___", [0, 6]),
        (f"{a} {b} {c} ____ {e} ___*2", [3, 5, 6]),
    ):
        expected = [mask if i in where else word for i, word in enumerate(words)]
        assert sample.start_state(run, None, text).tolist() == [tokenizer.eot_token, *expected, tokenizer.eot_token]
    got = sampled("--infill", f"{a} ___*3 {e} {f} {g}", "--num", 3)
    for row in got["tokens"]:
        assert len(row) == 9 and row[1] == words[0] and row[5:8] == words[4:] and mask not in row


def test_autoregressive_samples(run_dir):
    got = sampled("--model", "ar", "--num", 3)
    assert got["denoiser_forwards"] == got["energy_forwards"] == 0 and len(got["tokens"]) == 3
    assert all(len(row) == 21 for row in got["tokens"])
    assert got["tokens"] == sampled("--model", "ar", "--num", 3)["tokens"]


def test_watch_shows_masks_until_there_are_none(run_dir, capsys):
    assert call("sample.py", "--energy nce --steps 4 --num 2 --watch --device cpu".split()) == 0
    states = [line for line in capsys.readouterr().out.splitlines() if line.startswith("t = ")]
    masks = [line.count("___") for line in states]
    assert masks[0] == 20 and masks[-1] == 0 and masks == sorted(masks, reverse=True) and len(states) > 2
    times = [float(line.split()[2]) for line in states]
    assert times[0] == 1 and times == sorted(times, reverse=True)


def test_compare_has_a_row_for_every_setting(run_dir, capsys):
    got = sampled("--compare", "--steps", "2,4", "--k", "2,3", "--num", 5)
    energies = [f"{name} T={steps} k={k}" for steps in (2, 4)
                for name in ("EDLM-AR", "EDLM-coAR", "EDLM-NCE") for k in (2, 3)]  # fmt: skip
    assert sorted(row["name"] for row in got["rows"]) == sorted(["AR", "MDLM T=2", "MDLM T=4", *energies])
    assert all(len(row["tokens"]) == 5 and row["ar_perplexity"] > 1 for row in got["rows"])
    run = sample.load_run(sample.parse(["--device", "cpu"]))
    x = torch.tensor(got["rows"][0]["tokens"])
    expected = math.exp(-run.models["ar"].log_prob(x).sum().item() / (5 * 20))
    assert got["rows"][0]["ar_perplexity"] == pytest.approx(expected, rel=1e-4)
    table = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(row['name'])} ", table, re.M) for row in got["rows"])


def test_a_judge_scores_its_own_tokens(run_dir, monkeypatch):
    """A judge that gives every next character probability 1/5: perplexity 5 whatever is judged."""

    class Judge:
        config = types.SimpleNamespace(max_position_embeddings=64)
        to = eval = lambda self, *args: self

        def __call__(self, ids):
            return types.SimpleNamespace(logits=torch.zeros(*ids.shape, 5))

    def tokenizer(text):
        return {"input_ids": [ord(character) % 5 for character in text]}

    fake = types.SimpleNamespace(
        AutoTokenizer=types.SimpleNamespace(from_pretrained=lambda name: tokenizer),
        AutoModelForCausalLM=types.SimpleNamespace(from_pretrained=lambda name: Judge()),
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    got = sampled("--compare", "--steps", "2", "--k", "2", "--num", 2, "--judge", "five", "--energy", "nce")
    assert [row["judge_perplexity"] for row in got["rows"]] == pytest.approx([5.0] * 3, rel=1e-4)


def test_no_arguments_show_both_side_by_side(run_dir, capsys):
    got = sampled("--num", 30)
    text = capsys.readouterr().out
    assert len(re.findall(r"valid \d\.\d+", text)) == 2 and "effective sample size" in text and " | " in text
    assert text.splitlines()[-1].startswith("next: python sample.py")
    assert got.keys() >= KEYS and got["plain"]["energy_forwards"] == 0 < got["energy_forwards"]
    assert got["plain"]["tokens"] != got["tokens"] and len(got["tokens"]) == 30
    # and what it says to do next works
    following = re.match(r"next: python sample.py (.*?)   ", text.splitlines()[-1])[1]
    assert call("sample.py", [*shlex.split(following), "--num", "2", "--device", "cpu"]) == 0


def test_a_denoiser_alone_can_be_sampled(here, toy_out, capsys):
    (here / "out/toy").mkdir(parents=True)
    shutil.copy(toy_out / "denoiser.pt", here / "out/toy")
    got = sampled("--num", 4)
    assert got["ess"] is None and len(got["texts"]) == 4


def test_bytes_have_no_valid_fraction(here, bytes_out, capsys):
    got = sampled("--out", bytes_out, "--num", 2, "--steps", 4, "--k", 2)
    assert got["valid_fraction"] is None and "valid" not in capsys.readouterr().out
    got = sampled("--out", bytes_out, "--num", 2, "--steps", 4, "--infill", "the ___*3 sat")
    assert all(re.fullmatch("the .* sat", text, re.S) for text in got["texts"])
    assert all(len(row) == 2 + len("the xyz sat") for row in got["tokens"])


def test_sampling_benchmark(here, monkeypatch, capsys):
    tiny = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=30)
    monkeypatch.setattr(sample, "BENCHES", {"small": tiny})
    got = sampled("--bench", "--batch", "1,2")
    text = capsys.readouterr().out
    assert [(row["name"], row["batch"]) for row in got["rows"]] == [
        ("MDLM", 1), ("EDLM-AR", 1), ("MDLM", 2), ("EDLM-AR", 2),
    ]  # fmt: skip
    for row in got["rows"]:
        assert row["ratio"] == pytest.approx(row["plain_seconds"] / row["seconds"]) and row["ratio"] > 0
        assert row["projected_rows"] >= row["batch"] * 7 and f"{row['ratio']:.2f}" in text
    # without an energy every masked token is projected exactly once
    assert [row["projected_rows"] for row in got["rows"] if row["name"] == "MDLM"] == [7, 14]


def test_the_examples_of_the_docstring_run(run_dir, monkeypatch):
    tiny = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=30)
    monkeypatch.setattr(sample, "BENCHES", {"small": tiny})
    examples = re.findall(r"^    python sample\.py(.*?)  ", sample.__doc__, re.M)  # two spaces end the command
    for example in examples:
        assert call("sample.py", [*shlex.split(example), "--device", "cpu", "--num", "2"]) == 0, example
    assert len(examples) == 6


def table_world(vocab, length, seed):
    """A denoiser and an energy that are tables over every possible input."""
    torch.manual_seed(seed)
    base = (vocab + 1) ** torch.arange(length)
    logits = 2 * torch.randn((vocab + 1) ** length, length, vocab)
    energies = 1.5 * torch.randn((vocab + 1) ** length, (vocab + 1) ** length)

    def denoiser(x_t, where):
        return logits[(x_t * base).sum(dim=1)][where]

    def energy(candidates, x_t, log_q):
        return energies[(candidates * base).sum(dim=2), (x_t * base).sum(dim=1)[:, None]]

    return denoiser, energy, lambda x: (x * base).sum(dim=1)


@pytest.mark.parametrize("k, steps, with_energy", [(1, 1, False), (1, 2, False), (2, 2, True), (3, 3, True)])
def test_the_plain_algorithm_has_the_same_law(k, steps, with_energy):
    """The reference of the benchmark draws from the law of edlm.sample: two-sample chi-square."""
    vocab, length, n = 2, 4, 20000
    denoiser, energy, code = table_world(vocab, length, seed=k)
    x = torch.full((n, length), vocab)
    x[:, 0] = 0
    settings = dict(mask_id=vocab, steps=steps, k=k, energy=energy if with_energy else None)
    torch.manual_seed(1)
    counts = [torch.bincount(code(draw(denoiser, x, **settings)), minlength=81).double()
              for draw in (edlm.sample, sample.plain_algorithm_1)]  # fmt: skip
    seen = (counts[0] + counts[1]) > 0
    a, b = counts[0][seen], counts[1][seen]
    assert len(a) == vocab ** (length - 1)
    statistic = ((a - b) ** 2 / (a + b)).sum()
    p_value = torch.special.gammaincc(torch.tensor((len(a) - 1) / 2, dtype=torch.float64), statistic / 2)
    assert p_value > 1e-6


def test_the_plain_ar_energy_is_the_ar_energy(toy_out):
    models, _ = edlm.load_models(toy_out, ["ar"])
    torch.manual_seed(0)
    candidates, log_q = torch.randint(models["ar"].config.vocab_size, (3, 4, 21)), torch.randn(3, 4)
    candidates[:, :, 0] = data.get_tokenizer("toy").eot_token
    x_t = torch.full((3, 21), models["ar"].config.mask_id)
    with torch.no_grad():
        ours = edlm.ARResidual(models["ar"])(candidates, x_t, log_q)
        assert torch.allclose(ours, sample.plain_ar_energy(models["ar"], candidates, x_t, log_q), atol=1e-3)


# ------------------------------------------------------------------------------------------------
# train.py --eval and --bench


def evaluated(out, *argv):
    argv = ["--eval", "--out", out, "--device", "cpu", "--json", "table.json", *argv]
    assert call("train.py", argv) == 0
    return {row["model"]: row for row in json.loads(Path("table.json").read_text())["rows"]}


def test_the_table_of_perplexities(run_dir, capsys):
    rows = evaluated("out/toy", "--data", "data/small", "--n", 4, "--chain_steps", 4)
    assert set(rows) == {
        "language (floor)", "AR", "MDLM", "EDLM-coAR joint, log Z exact",
        *(f"{name} joint, log Z {end}" for name in ("EDLM-AR", "EDLM-NCE") for end in ("lower", "upper")),
        *(f"{name} chain" for name in ("EDLM-AR", "EDLM-coAR", "EDLM-NCE")),
    }  # fmt: skip
    floor = rows["language (floor)"]
    assert floor["nats_per_token"] == pytest.approx(data.toy_entropy() / 20, rel=1e-5)
    for name, row in rows.items():
        assert row["perplexity"] == pytest.approx(math.exp(row["nats_per_token"]))
        assert row["what"] == ("exact" if "floor" in name else "exact NLL" if name == "AR" else
                               "estimate" if "joint" in name else "bound")  # fmt: skip
        if name != "language (floor)":
            assert row["sequences"] == 40 and row["tokens"] == 800 and row["standard_error"] > 0
    # log p = ... - log Z: the lower end of log Z gives the lower loss
    for name in ("EDLM-AR", "EDLM-NCE"):
        lower, upper = (rows[f"{name} joint, log Z {end}"]["nats_per_token"] for end in ("lower", "upper"))
        assert upper >= lower
    ar, _ = edlm.load_checkpoint("out/toy/ar.pt")
    blocks = data.Blocks("data/small", "val", 21)
    with torch.no_grad():
        expected = -ar.log_prob(torch.stack([blocks[i] for i in range(40)])).sum().item() / 800
    assert rows["AR"]["nats_per_token"] == pytest.approx(expected, rel=1e-5)
    table = capsys.readouterr().out
    assert all(name in table for name in rows) and "bits/char" not in table
    assert evaluated("out/toy", "--data", "data/small", "--n", 4, "--chain_steps", 4) == rows


def test_one_energy_or_none(run_dir):
    common = ("--data", "data/small", "--n", 2, "--eval_blocks", 10)
    assert set(evaluated("out/toy", *common, "--energy", "none")) == {"language (floor)", "AR", "MDLM"}
    rows = evaluated("out/toy", *common, "--energy", "coar")
    assert set(rows) == {"language (floor)", "AR", "MDLM", "EDLM-coAR joint, log Z exact", "EDLM-coAR chain"}
    assert rows["AR"]["sequences"] == 10


def test_text_files_are_evaluated(here, bytes_out):
    texts = ["don 't stop @-@ gap , he said . " * 4, "teddy 's hat " * 5]
    (here / "my.txt").write_text(texts[0] + texts[1])
    (here / "my.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    argv = ("--energy", "none", "--data")
    plain, lines = (evaluated(bytes_out, *argv, name) for name in ("my.txt", "my.jsonl"))
    assert plain["AR"]["sequences"] == len((texts[0] + texts[1]).strip()) // 30
    assert lines["AR"]["sequences"] == (sum(len(text.strip()) for text in texts) + 2) // 30
    undone = evaluated(bytes_out, *argv, "my.txt", "--detokenize", "wikitext")
    assert undone["AR"]["sequences"] == len(data.detokenize_wikitext((texts[0] + texts[1]).strip())) // 30
    for row in (*plain.values(), *undone.values()):
        nats = row["nats_per_token"] * 31  # of a block: 30 characters and the end of text
        assert row["bits_per_character"] == pytest.approx(nats / 30 / math.log(2))


def test_a_text_file_is_judged_by_the_run_of_the_preset(run_dir):
    (run_dir / "my.jsonl").write_text("".join(json.dumps(dict(text=s)) + "\n" for s in data.toy_stories(5, seed=1)))
    argv = ["--eval", "--data", "my.jsonl", "--energy", "none", "--device", "cpu", "--json", "table.json"]
    assert call("train.py", argv) == 0
    assert json.loads(Path("table.json").read_text())["rows"][0]["sequences"] == 5


def test_training_benchmark(here, capsys, monkeypatch):
    monkeypatch.setattr(train, "matmul_rate", lambda device: 1e9)
    argv = "--bench --n_layer 1 --n_embd 16 --n_head 2 --block_size 16 --max_steps 2 --device cpu --json bench.json"
    assert call("train.py", argv.split()) == 0
    figures = json.loads((here / "bench.json").read_text())
    ours, plain = figures["rows"]
    assert figures["ratio"] == pytest.approx(plain["seconds"] / ours["seconds"])
    assert f"ratio {figures['ratio']:.2f}" in capsys.readouterr().out
    assert ours["tokens_per_second"] == pytest.approx(32 / ours["seconds"])
    vocab = data.get_tokenizer("toy").n_vocab
    assert figures["flops_per_token"] == 3 * (24 * 16**2 + 4 * 16 * 16 + 2 * 16 * vocab * 0.5)


def test_the_plain_step_has_the_same_loss(toy_out, small_toy):
    denoiser, _ = edlm.load_checkpoint(toy_out / "denoiser.pt")
    blocks = data.Blocks(small_toy, "train", 21)
    x0 = torch.stack([blocks[i] for i in range(16)])
    torch.manual_seed(3)
    plain = train.plain_loss(denoiser, x0)
    torch.manual_seed(3)
    ours = edlm.nelbo(denoiser, x0, mask_id=denoiser.config.mask_id).mean() / 20
    assert plain.item() == pytest.approx(ours.item(), rel=1e-5)
    slopes = [torch.autograd.grad(loss, denoiser.parameters()) for loss in (plain, ours)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*slopes, strict=True))


# ------------------------------------------------------------------------------------------------
# README.md: its commands and its Python, at a small size


def code_blocks(language):
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def small_downloads(folder):
    """What data.download would fetch: an OpenWebText archive or text8, a thousandth of the size."""

    def fetch(url, into):
        path = Path(into) / url.rsplit("/", 1)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("text8", "the quick brown fox jumps over the lazy dog " * 600)
            return path
        with tarfile.open(path, "w") as outer:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(20):
                    page = tarfile.TarInfo(f"{path.stem}-{i}.txt")
                    text = (TEXT.strip() + f" page {i}.").encode() * 3
                    page.size = len(text)
                    tar.addfile(page, io.BytesIO(text))
            packed = lzma.compress(inner.getvalue())
            member = tarfile.TarInfo(f"openwebtext/{path.stem}_data.xz")
            member.size = len(packed)
            outer.addfile(member, io.BytesIO(packed))
        return path

    return fetch


def shrink(script, argv):
    """Flags that make a command of the README small; the last of two equal flags counts."""
    if script == "data.py":
        return ["--val_docs", "4", "--tokenizer", "bytes"] if "openwebtext" in argv else []
    if script == "sample.py":
        return ["--device", "cpu"] + ([] if "--bench" in argv else ["--num", "2"])
    small = [*SMALL, "--max_steps", "2", "--n", "2"]
    if "--preset" in argv or "--data" in argv:
        small += ["--block_size", "32", "--micro_batch", "4"]
    return small


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="there is no README.md yet")
def test_readme_commands_run(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(data, "download", small_downloads(run_dir))
    monkeypatch.setattr(data, "OWT_ARCHIVES", ["urlsf_subset00.tar", "urlsf_subset01.tar"])
    monkeypatch.setattr(train, "matmul_rate", lambda device: 1e9)
    tiny = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=30)
    monkeypatch.setattr(sample, "BENCHES", dict.fromkeys(sample.BENCHES, tiny))
    real = data.make_toy
    monkeypatch.setattr(data, "make_toy", lambda folder: real(folder, n_train=200, n_val=40))
    data.make_toy("data/toy")
    (run_dir / "mytext.txt").write_text(TEXT * 40)
    lines = "\n".join(code_blocks("bash")).replace("\\\n", " ").splitlines()
    ran = 0
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["python"] and words[1] in ("train.py", "sample.py", "data.py"):
            if "--judge" in words:
                continue  # needs a package and a network
            fresh = words[1] == "train.py" and not {"--eval", "--bench", "--resume"} & set(words)
            again = ["--overwrite"] if fresh else []
            code = call(words[1], [*words[2:], *shrink(words[1], words), *again])
            assert code == 0, (line, capsys.readouterr().err)
            ran += 1
    assert ran > 3


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="there is no README.md yet")
def test_readme_python_runs(run_dir, capsys):
    if any("matplotlib" in block for block in code_blocks("python")):
        pytest.importorskip("matplotlib").use("Agg")
    namespace = {}
    for block in code_blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace and capsys.readouterr().out
