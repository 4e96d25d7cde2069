"""Text in, blocks of tokens out: everything EDLM needs to know about data.

    python data.py                                   the toy language, into data/toy (a second)
    python data.py FILE.txt... --out data/mytext     your own text
    python data.py openwebtext [ARCHIVE...]          OpenWebText; downloads it when no archive is given
    python data.py text8 [FILE]                      text8, the 27-character Wikipedia

The road of a text, which is also the order of this file:

    1. toy language   a tiny language in which the probability of every story is known exactly
    2. tokenizers     always a `tiktoken.Encoding`: text -> token ids 0..V-1; the mask id is V
    3. shards         files of uint16 tokens (the format of llm.c), and a meta.json that says what they are
    4. reading        `Blocks` cuts the stream into training sequences; `BatchOrder` says who reads which
    5. sources        text files and OpenWebText archives, as streams of documents
    6. preparation    documents -> tokens -> shards; can be killed at any moment, and continues
    7. download       with resume and retries
    8. command line
"""

import argparse
import contextlib
import difflib
import errno
import functools
import http.client
import itertools
import json
import lzma
import math
import os
import re
import string
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

# -----------------------------------------------------------------------------------------------
# 1. The toy language
#
# A story is a template with its slots filled. A slot that occurs twice must say the same thing
# twice: that long-range agreement is what a factorised denoiser breaks and what EDLM mends.
# {he} agrees with {name}; {she} agrees with {friend}, who is never {name}. Which template it is
# must be agreed upon too: its last two verbs belong together.

TOY_TEMPLATES = (
    "{name} has a {colour} {object}. {he} gives it to {friend} today. {she} likes the {colour} {object}.",
    "{name} has a {colour} {object}. {he} shows it to {friend} today. {she} wants the {colour} {object}.",
    "{name} has a {colour} {object}. {he} sells it to {friend} today. {she} keeps the {colour} {object}.",
)
TOY_PRONOUNS = {"ben": "he", "tom": "he", "max": "he", "ann": "she", "sue": "she", "mia": "she"}
TOY_SLOTS = {
    "name": tuple(TOY_PRONOUNS),
    "friend": tuple(TOY_PRONOUNS),
    "colour": ("black", "red", "blue", "green"),
    "object": ("boat", "ball", "kite", "book"),
}
TOY_LENGTH = 19  # tokens in every story


@functools.cache
def toy_language():
    """The whole language: a dictionary from every story (1,440 of them) to its log-probability in nats.

    The template is uniform, and so is every slot, independently, except that the friend is uniform
    over the names that are left. No two choices give the same story, so nothing needs adding up.
    """
    language = {}
    for template in TOY_TEMPLATES:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field]
        slots = [slot for slot in TOY_SLOTS if slot in fields]
        choices = itertools.product(*(TOY_SLOTS[slot] for slot in slots))
        fillings = [dict(zip(slots, values, strict=True)) for values in choices]
        fillings = [filling for filling in fillings if filling["name"] != filling["friend"]]
        for filling in fillings:
            he, she = TOY_PRONOUNS[filling["name"]], TOY_PRONOUNS[filling["friend"]]
            story = template.format(**filling, he=he, she=she)
            language[story] = -math.log(len(TOY_TEMPLATES)) - math.log(len(fillings))
    return language


def toy_stories(n, seed):
    """n independent stories, as a list of str; the same seed gives the same stories."""
    language = toy_language()
    chosen = np.random.default_rng(seed).choice(len(language), size=n, p=np.exp(list(language.values())))
    stories = list(language)
    return [stories[i] for i in chosen]


def toy_log_prob(text):
    """Exact log-probability of a text in nats; -inf if it is not a story of the language."""
    return toy_language().get(text, -math.inf)


def toy_is_valid(text):
    """True if the text is a story of the language, with every agreement kept."""
    return text in toy_language()


def toy_entropy():
    """Exact entropy of the language in nats per story: no model can score below it on average."""
    return -math.fsum(math.exp(log_p) * log_p for log_p in toy_language().values())


# -----------------------------------------------------------------------------------------------
# 2. Tokenizers

TOKENIZERS = ("gpt2", "bytes", "toy", "text8")
END_OF_TEXT = "<|endoftext|>"
TEXT8_CHARACTERS = "abcdefghijklmnopqrstuvwxyz "
# How a text is cut before it meets the vocabulary. A toy word carries the space before it, as GPT-2's
# words do; with the full stops a story is exactly TOY_LENGTH pieces.
PIECES = {"bytes": r"(?s).{1,256}", "toy": r" ?[^ .]+|\.| ", "text8": r"(?s)."}
# Documents of natural text are parted by END_OF_TEXT. Toy stories and text8 are not: without
# separators, a toy block of TOY_LENGTH + 2 tokens holds exactly one story.
SEPARATED = {"gpt2": True, "bytes": True, "toy": False, "text8": False}


@functools.cache
def get_tokenizer(name):
    """The `tiktoken.Encoding` of that name; V is its `n_vocab`, END_OF_TEXT its `eot_token`.

    gpt2: GPT-2's 50,257 sub-words (needs the network once). bytes: 256 bytes + END_OF_TEXT.
    toy: the words of the toy language. text8: a to z and space. Raises ValueError for another name,
    or when gpt2's vocabulary is neither cached nor reachable.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {name!r}: choose one of {', '.join(TOKENIZERS)}")
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise ValueError(
                "the gpt2 tokenizer must fetch its vocabulary from the network once, and could not "
                f"({type(error).__name__}): connect, or set TIKTOKEN_CACHE_DIR to a folder that holds it"
            ) from None
    if name == "bytes":
        vocabulary = [bytes([byte]) for byte in range(256)]
    elif name == "text8":
        vocabulary = [character.encode() for character in TEXT8_CHARACTERS]
    else:
        words = {word for story in toy_language() for word in re.findall(PIECES["toy"], story)}
        vocabulary = [word.encode() for word in sorted(words)]
    return tiktoken.Encoding(
        name,
        pat_str=PIECES[name],
        mergeable_ranks={token: i for i, token in enumerate(vocabulary)},
        special_tokens={END_OF_TEXT: len(vocabulary)},
    )


def encode(tokenizer, text):
    """Token ids (list of int) of a text, all of it.

    Raises ValueError, naming the culprit, if the tokenizer cannot represent the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the text {text[:40]!r} is not valid Unicode") from None
    if tokenizer.name == "text8" and (strange := set(text) - set(TEXT8_CHARACTERS)):
        raise ValueError(f"text8 has only the letters a to z and the space, not {min(strange)!r}")
    if tokenizer.name == "toy":
        known = {token.decode() for token in tokenizer.token_byte_values()}
        for word in re.findall(PIECES["toy"], text):
            if word not in known:
                near = difflib.get_close_matches(word, sorted(known), n=5, cutoff=0)
                raise ValueError(f"the toy language has no word {word!r}; it has words like {near}")
    return tokenizer.encode_ordinary(text)


def decode(tokenizer, ids):
    """Readable text of token ids: END_OF_TEXT is dropped, the mask shows as `___` (a character: `_`)."""
    pieces = []
    for token in map(int, ids):
        if token == tokenizer.n_vocab:
            small = tokenizer.name in ("bytes", "text8")
            pieces.append(b"_" if small else b" ___" if pieces else b"___")
        elif token != tokenizer.eot_token:
            pieces.append(tokenizer.decode_single_token_bytes(token))
    return b"".join(pieces).decode(errors="replace")


# -----------------------------------------------------------------------------------------------
# 3. Shards
#
# A data folder holds train_000000.bin, train_000001.bin, ..., val_000000.bin, ... and meta.json.
# meta.json is written last, so a folder that has one is complete. Until then progress.json stands
# in its place, and says how far an interrupted preparation came.

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4  # 256 int32: magic, version, number of tokens, zeros
TOKEN = np.dtype("<u2")


def sync_and_replace(file, path):
    """Close an open temporary file and give it its real name, so that `path` is whole or absent."""
    file.flush()
    os.fsync(file.fileno())  # on the disk before the new name is: a power cut must not leave it empty
    file.close()
    os.replace(file.name, path)


def write_json(path, value):
    """Replace a JSON file atomically."""
    file = open(f"{path}.tmp", "w")
    json.dump(value, file, indent=2)
    sync_and_replace(file, path)


def check_target(path):
    """Refuse a file that `write_json` could not write, before the work and not after it. Raises ValueError."""
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"cannot write {path}: it must be a file in a folder that exists")


def read_json(path, *keys):
    """Read a JSON dictionary that has these keys. Raises ValueError if it does not."""
    try:
        value = json.loads(path.read_text())
        if all(key in value for key in keys):
            return value
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{path} is damaged: remove {path.parent} and make it again")


class ShardWriter:
    """Cuts a stream of tokens into shard files of `shard_tokens` each (the last may be shorter)."""

    def __init__(self, folder, split, shard_tokens, first=0):
        self.folder, self.split, self.shard_tokens = Path(folder), split, shard_tokens
        self.shards, self.count, self.file = first, 0, None

    def write(self, tokens):
        """Write as many of the tokens as the open shard has room for, and return how many."""
        if self.file is None:
            self.file = open(self.folder / f"{self.split}_{self.shards:06d}.bin.tmp", "wb")
            self.file.seek(HEADER_BYTES)
        tokens = tokens[: self.shard_tokens - self.count]
        self.file.write(tokens.astype(TOKEN, copy=False).tobytes())
        self.count += len(tokens)
        return len(tokens)

    def finish(self):
        """Complete the open shard, if there is one."""
        if self.file is not None:
            header = np.zeros(256, dtype="<i4")
            header[:3] = MAGIC, VERSION, self.count
            self.file.seek(0)
            self.file.write(header.tobytes())
            sync_and_replace(self.file, self.folder / f"{self.split}_{self.shards:06d}.bin")
            self.shards, self.count, self.file = self.shards + 1, 0, None

    def write_all(self, tokens):
        """Write all the tokens, over as many shards as it takes."""
        while len(tokens):
            tokens = tokens[self.write(tokens) :]
            if self.count == self.shard_tokens:
                self.finish()


def shard_length(path):
    """Number of tokens in a shard. Raises ValueError if the file is foreign or has been cut."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
    header = header[: len(header) // 4 * 4].view("<i4")
    if len(header) < 3 or tuple(header[:2]) != (MAGIC, VERSION):
        raise ValueError(f"{path} is not a token shard (magic {MAGIC}, version {VERSION})")
    expected, actual = HEADER_BYTES + TOKEN.itemsize * int(header[2]), os.path.getsize(path)
    if actual != expected:
        raise ValueError(f"{path} is damaged: {actual} bytes where its header promises {expected}; remake it")
    return int(header[2])


def begin(folder, settings):
    """Claim a folder for a preparation with these settings, and return how far it came before.

    The answer is a dictionary: `shards` complete train shards; `place`, the first document that is
    not wholly in them, with `tokens` of it that are; `documents` and `skipped` pieces before it.
    Raises ValueError if the folder is complete, or belongs to something else.
    """
    folder = Path(folder)
    if (folder / "meta.json").exists():
        raise ValueError(f"{folder} is complete already: nothing to do (choose another --out, or remove it)")
    if (folder / "progress.json").exists():
        progress = read_json(folder / "progress.json", "settings", "shards", "place")
        changed = [key for key in settings if progress["settings"].get(key) != settings[key]]
        if not changed:
            for i in range(progress["shards"]):
                shard_length(folder / f"train_{i:06d}.bin")
            return progress
        if progress["shards"]:
            raise ValueError(
                f"{folder} holds an unfinished run with another {', '.join(changed)}: repeat that command, "
                "remove the folder, or choose another --out"
            )
        for file in folder.glob("*.bin*"):  # of a run that did not get as far as one whole shard
            file.unlink()
    elif list(folder.glob("*.bin")):
        raise ValueError(f"{folder} holds token files of another origin: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    progress = dict(settings=settings, shards=0, place=[0, 0, 0], tokens=0, documents=0, skipped=0)
    write_json(folder / "progress.json", progress)
    return progress


def complete(folder, tokenizer, source, **counts):
    """Write meta.json, which makes a folder of shards complete; returns its content."""
    meta = dict(
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.n_vocab,
        eot=tokenizer.eot_token,
        separator=SEPARATED[tokenizer.name],
        source=source,
        **counts,
        complete=True,
    )
    write_json(Path(folder) / "meta.json", meta)
    (Path(folder) / "progress.json").unlink(missing_ok=True)
    return meta


def read_meta(folder):
    """The meta dictionary of a complete folder. Raises ValueError if meta.json is damaged."""
    return read_json(Path(folder) / "meta.json", "tokenizer", "vocab_size", "eot", "source")


def write_splits(folder, tokenizer, source, splits, documents, shard_tokens):
    """Make a whole data folder from token arrays in memory, `splits` = {name: uint16 array}."""
    begin(folder, dict(tokenizer=tokenizer.name, source=source, shard_tokens=shard_tokens))
    for split, tokens in splits.items():
        writer = ShardWriter(folder, split, shard_tokens)
        writer.write_all(tokens)
        writer.finish()
    counts = {f"{split}_tokens": len(tokens) for split, tokens in splits.items()}
    counts |= {f"{split}_documents": n for split, n in documents.items()}
    return complete(folder, tokenizer, source, **counts, shard_tokens=shard_tokens)


def make_toy(folder, n_train=20000, n_val=2000, seed=0):
    """Make toy shards in a folder, or leave them if they are there; returns the meta dictionary.

    Raises ValueError if the folder holds other data.
    """
    language = zlib.crc32("\n".join(toy_language()).encode())
    source = f"toy language {language:08x}, {n_train} + {n_val} stories, seed {seed}"
    if (Path(folder) / "meta.json").exists():
        meta = read_meta(folder)
        if meta["source"] != source:
            raise ValueError(f"{folder} holds other data ({meta['source']}): choose another folder")
        return meta
    tokenizer = get_tokenizer("toy")
    stories = toy_stories(n_train + n_val, seed)
    tokens = np.array([encode(tokenizer, story) for story in stories], dtype=TOKEN)  # [stories, TOY_LENGTH]
    splits = {"train": tokens[:n_train].ravel(), "val": tokens[n_train:].ravel()}
    return write_splits(folder, tokenizer, source, splits, {"train": n_train, "val": n_val}, 100_000_000)


# -----------------------------------------------------------------------------------------------
# 4. Reading


class Blocks(Dataset):
    """Training sequences of one split of a data folder.

    Item i is Long[block_size] = [EOT] + (block_size - 2) tokens of the stream + [EOT]; blocks do not
    overlap and run on from one shard to the next. Shards are memory-mapped, each process for itself.
    Attributes: `tokenizer` (its name), `vocab_size`, `eot`, `meta`.
    A nanoGPT folder (headerless train.bin and val.bin) is read as GPT-2 tokens.

    Raises FileNotFoundError if there is no data; ValueError if it is unfinished, damaged, too short
    for one block, or (toy) cut at another length than its stories.
    """

    def __init__(self, folder, split, block_size):
        folder = Path(folder)
        self.meta, files = self._open(folder, split)
        self.tokenizer, self.vocab_size, self.eot = (self.meta[k] for k in ("tokenizer", "vocab_size", "eot"))
        self.files = [path for path, _, _ in files]
        self.offsets = [offset for _, offset, _ in files]
        # Where each shard starts in the stream of all of them, and where the last one ends.
        self.starts = np.cumsum([0] + [count for _, _, count in files])
        self.maps = {}
        found = int(self.starts[-1])
        if (expected := self.meta.get(f"{split}_tokens", found)) != found:
            raise ValueError(f"{folder} lacks shards: {found} {split} tokens of the {expected} in meta.json")
        if self.tokenizer == "toy" and block_size != TOY_LENGTH + 2:
            raise ValueError(f"toy stories need a block_size of {TOY_LENGTH + 2}, not {block_size}")
        if block_size < 3:
            raise ValueError(f"block_size must be at least 3 (END_OF_TEXT at both ends), not {block_size}")
        self.block_size, self.body = block_size, block_size - 2
        if len(self) == 0:
            raise ValueError(
                f"{folder} has {found} {split} tokens, too few for one block of {block_size}: "
                "use a smaller block_size or more text"
            )

    @staticmethod
    def _open(folder, split):
        """The meta dictionary, and (path, bytes of header, number of tokens) of each file of the split."""
        if (folder / "meta.json").exists():
            meta = read_meta(folder)
            paths = sorted(folder.glob(f"{split}_*.bin"))
            files = [(path, HEADER_BYTES, shard_length(path)) for path in paths]
        elif (folder / f"{split}.bin").exists():
            path = folder / f"{split}.bin"
            meta = dict(tokenizer="gpt2", vocab_size=50257, eot=50256, separator=True, source="nanoGPT")
            files = [(path, 0, path.stat().st_size // TOKEN.itemsize)]
        elif (folder / "progress.json").exists():
            raise ValueError(f"{folder} is unfinished: run the same `python data.py` command again")
        else:
            raise FileNotFoundError(f"no token shards in {folder}: run `python data.py` (see its --help)")
        if not files:
            raise FileNotFoundError(f"{folder} has no {split} shards")
        return meta, files

    def __len__(self):
        return int(self.starts[-1]) // self.body

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        block = np.full(self.block_size, self.eot, dtype=np.int64)  # [block_size]
        filled, start = 0, i * self.body
        while filled < self.body:
            shard = int(np.searchsorted(self.starts, start + filled, side="right")) - 1
            first = start + filled - self.starts[shard]
            piece = self._map(shard)[first : first + self.body - filled]
            if piece.max() >= self.vocab_size:
                raise ValueError(
                    f"{self.files[shard]} holds token {piece.max()}, but {self.tokenizer} ends at "
                    f"{self.vocab_size - 1}: it was made with another tokenizer"
                )
            block[1 + filled : 1 + filled + len(piece)] = piece
            filled += len(piece)
        return torch.from_numpy(block)

    def _map(self, shard):
        if shard not in self.maps:
            self.maps[shard] = np.memmap(self.files[shard], TOKEN, mode="r", offset=self.offsets[shard])
        return self.maps[shard]

    def __getstate__(self):
        return self.__dict__ | {"maps": {}}  # a pickled memory map would carry the whole file


class BatchOrder:
    """Which blocks make up each batch: a pure function of the step, so an exact resume stores nothing.

    Step s takes the s-th group of `batch_size` blocks (the batch of all ranks together) from a
    permutation drawn anew each epoch from (seed, epoch); an incomplete last group is left out. The
    group is cut into micro-batches, and rank r yields number r, r + world, r + 2 world, ... of
    them: so 2 processes with one micro-batch each see what 1 process with two of them sees.

    Iterating never ends; give it to a DataLoader as `batch_sampler`. Raises ValueError if the sizes
    do not divide, or there are fewer than `batch_size` blocks.
    """

    def __init__(self, n_blocks, batch_size, micro_batch, *, seed, rank=0, world=1, start_step=0):
        if batch_size < 1 or micro_batch < 1 or batch_size % (micro_batch * world):
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of micro_batch {micro_batch} x {world} processes"
            )
        if n_blocks < batch_size:
            raise ValueError(f"the data has only {n_blocks} blocks, fewer than one batch of {batch_size}")
        self.n_blocks, self.batch_size, self.micro_batch = n_blocks, batch_size, micro_batch
        self.seed, self.rank, self.world, self.start_step = seed, rank, world, start_step

    def __iter__(self):
        steps_per_epoch = self.n_blocks // self.batch_size
        current = None
        for step in itertools.count(self.start_step):
            epoch, group = divmod(step, steps_per_epoch)
            if epoch != current:
                permutation = np.random.default_rng((self.seed, epoch)).permutation(self.n_blocks)
                current = epoch
            batch = permutation[group * self.batch_size : (group + 1) * self.batch_size]
            for first in range(self.rank * self.micro_batch, self.batch_size, self.world * self.micro_batch):
                yield batch[first : first + self.micro_batch].tolist()


def _substitute(text, *rules):
    """Apply (pattern, replacement) rules in order."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


# Shared by the three corpora: a space before closing marks and before clitics, or after opening ones.
_CLOSING = (r" ([,.;:!?%)\]}]|'(?:s|m|d|re|ve|ll)\b|n't\b)", r"\1")
_OPENING = (r"([(\[{$£€#]) (?=\S)", r"\1")
_QUOTED = (r'" ([^"\n]*?) "', r'"\1"')


def detokenize_wikitext(text):
    """Undo WikiText's tokenisation.

    ` @-@ `, ` @,@ ` and ` @.@ ` join their neighbours (`two @-@ part` -> `two-part`); headings
    `= = T = =` become `== T ==`; clitics (`don 't`, `Teddy 's`), closing marks, opening brackets and
    currency signs lose their inner space; `" text "` becomes `"text"` within a line; the spaces
    around a line are dropped. `<unk>` stays: the word it stood for is lost.
    """
    return _substitute(
        text,
        (r" @([-,.])@ ", r"\1"),
        (r"(?m)^ +| +$", ""),
        (r"(?<==) (?==)", ""),
        (r"\b(\w*n) 't\b", r"\1't"),
        _QUOTED,
        _OPENING,
        _CLOSING,
    )


def detokenize_ptb(text):
    """Undo the Penn Treebank's tokenisation.

    Clitics (`do n't`, `it 's`) and plural possessives (`boys ' `) are joined; `N`, which stands for
    any number, becomes `1`; `$ 1` and `# 1` become `$1` and `#1`; `\\/` becomes `/`; `<unk>` becomes
    `?`; closing marks lose the space before them; the spaces around a line are dropped.
    """
    return _substitute(
        text,
        (r"(?m)^ +| +$", ""),
        (r"<unk>", "?"),
        (r"\\/", "/"),
        (r"\bN\b", "1"),
        (r"s ' ", "s' "),
        (r" ([,.;:!%)\]}]|'(?:s|m|d|re|ve|ll)\b|n't\b)", r"\1"),  # not `?`: it is a word here
        _OPENING,
    )


def detokenize_lm1b(text):
    """Undo the One Billion Word benchmark's tokenisation.

    Clitics (`it 's`, `do n't`), closing marks, opening brackets and currency signs lose their inner
    space; `" text "` becomes `"text"` within a line; ` -- ` stays; `http : / / ` becomes `http://`.
    """
    return _substitute(text, (r"(https?) : / / ?", r"\1://"), _QUOTED, _OPENING, _CLOSING)


DETOKENIZERS = {"wikitext": detokenize_wikitext, "ptb": detokenize_ptb, "lm1b": detokenize_lm1b}


def text_blocks(path, tokenizer, block_size, detokenize=None):
    """All whole blocks of a text file, framed as by `Blocks`: Long[N, block_size].

    FILE.jsonl holds one {"text": ...} per line, joined as in shards (END_OF_TEXT after each, where
    the tokenizer parts documents); any other file is one stream. `detokenize` is a key of
    DETOKENIZERS. Raises ValueError for a bad line, text the tokenizer cannot encode, or too little.
    """
    if detokenize is not None and detokenize not in DETOKENIZERS:
        raise ValueError(f"unknown detokenizer {detokenize!r}: choose one of {', '.join(DETOKENIZERS)}")
    if tokenizer.name == "toy" and block_size != TOY_LENGTH + 2:
        raise ValueError(f"toy stories need a block_size of {TOY_LENGTH + 2}, not {block_size}")
    undo = DETOKENIZERS.get(detokenize, str)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    tokens = []
    if Path(path).suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                tokens += encode(tokenizer, undo(_jsonl_text(path, number, line)))
                tokens += [tokenizer.eot_token] * SEPARATED[tokenizer.name]
    else:
        tokens = encode(tokenizer, undo(text.strip()))
    if not tokens:
        raise ValueError(f"{path} is empty")
    body = block_size - 2
    n = len(tokens) // body if body > 0 else 0
    if n == 0:
        raise ValueError(f"{path} has {len(tokens)} tokens, too few for one block of {block_size}")
    blocks = torch.full((n, block_size), tokenizer.eot_token)  # [N, block_size]
    blocks[:, 1:-1] = torch.tensor(tokens[: n * body]).view(n, body)
    return blocks


def _jsonl_text(path, number, line):
    try:
        return json.loads(line)["text"].strip()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{path}, line {number}: expected a JSON object {{"text": "..."}}') from None


# -----------------------------------------------------------------------------------------------
# 5. Sources
#
# A source yields (place, text). The place, (file, member, document), says where to start reading
# again; a damaged piece is yielded with the text None, so that whoever counts knows of it.


def split_documents(path):
    """The documents of a text file, read line by line.

    They are parted by END_OF_TEXT if there is any, else by blank lines. Raises ValueError if the
    file is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            marked = any(END_OF_TEXT in line for line in file)
        with open(path, encoding="utf-8") as file:
            document = []
            for line in itertools.chain(file, [END_OF_TEXT if marked else ""]):
                ends_here = marked or not line.strip()
                *ended, rest = line.split(END_OF_TEXT) if marked else [line] + [""] * ends_here
                for part in ended:
                    document.append(part)
                    if text := "".join(document).strip():
                        yield text
                    document.clear()
                document.append(rest)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def text_documents(paths, start=(0, 0, 0)):
    """(place, text) of every document of the text files, from a place on."""
    for a, path in enumerate(paths):
        for d, text in enumerate(split_documents(path) if a >= start[0] else ()):
            if (a, 0, d) >= start:
                yield (a, 0, d), text


DAMAGE = (tarfile.TarError, lzma.LZMAError, EOFError)


class StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a bad header for the end of the archive, and loses what follows. This one raises."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise  # the proper end
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def open_tar(file):
    """A forward-only tar reader over a binary file, which may be xz-compressed and may itself be a stream."""
    if file.peek(6).startswith(b"\xfd7zXZ\0"):
        file = lzma.open(file)
    return tarfile.open(fileobj=file, mode="r|", tarinfo=StrictTarInfo)


def member_texts(archive, member):
    """The bytes of each document of an archive member: a .txt is one, an .xz is a tar of them."""
    file = archive.extractfile(member)
    if member.name.endswith(".txt"):
        yield file.read()
    else:
        with open_tar(file) as inner:
            for item in inner:
                if item.isfile() and item.name.endswith(".txt"):
                    yield inner.extractfile(item).read()


def archive_documents(fetch, n_archives, start=(0, 0, 0)):
    """(place, text) of every document of OpenWebText archives, from a place on.

    `fetch(a)` is the path of archive a. All the layouts in use are nested streams, and are read as
    such: a tar of .xz members (urlsf_subset00.tar), the same compressed once more
    (openwebtext.tar.xz), or one such member (urlsf_subset00-1_data.xz, a compressed tar of .txt).
    A damaged member or document is reported and yielded as None; a damaged archive is a ValueError.
    """
    for a in range(start[0], n_archives):
        path = fetch(a)
        found = False
        try:
            with open(path, "rb") as file, open_tar(file) as archive:
                members = (item for item in archive if item.isfile() and item.name.endswith((".xz", ".txt")))
                for m, member in enumerate(members):
                    found = True
                    if (a, m) < start[:2]:
                        continue
                    for d, text in readable_texts(path, archive, member):
                        if (a, m, d) >= start:
                            yield (a, m, d), text
        except DAMAGE as error:
            raise ValueError(f"{path} is damaged or no archive ({error}): delete it and fetch it again") from None
        if not found:
            raise ValueError(f"{path} holds no .xz or .txt member: it is not an OpenWebText archive")


def readable_texts(path, archive, member):
    """(number, cleaned text) of the non-empty documents of a member; the text is None for a damaged piece."""
    d = -1
    try:
        for d, raw in enumerate(member_texts(archive, member)):
            try:
                text = re.sub(r"\n{3,}", "\n\n", raw.decode()).strip()
            except UnicodeDecodeError:
                tqdm.write(f"{path}: {member.name}: document {d} is not UTF-8, skipped", sys.stderr)
                text = None
            if text != "":
                yield d, text
    except DAMAGE as error:
        tqdm.write(f"{path}: {member.name}: damaged ({error}), skipped from document {d + 1} on", sys.stderr)
        yield d + 1, None


# -----------------------------------------------------------------------------------------------
# 6. Preparation


def tokenize(documents, tokenizer):
    """(place, uint16 tokens) for each (place, text), in order, on all cores; a text of None stays None.

    tiktoken lets go of Python's lock, so while its threads work through some groups of documents,
    this one reads (and decompresses) the next.
    """

    def encode_group(group):
        return [(place, None if text is None else encode_array(tokenizer, text)) for place, text in group]

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for group in groups(documents):
            waiting.append(pool.submit(encode_group, group))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def groups(documents, characters=100_000):
    """Lists of consecutive documents, long enough that handing one to a thread costs nothing."""
    group, size = [], 0
    for place, text in documents:
        group.append((place, text))
        size += len(text or "")
        if size >= characters:
            yield group
            group, size = [], 0
    yield group


def encode_array(tokenizer, text):
    """uint16 tokens of a document and the END_OF_TEXT after it."""
    # encode_to_numpy rather than encode_ordinary: no Python object per token, so threads do not queue
    tokens = tokenizer.encode_to_numpy(text, disallowed_special=())
    return np.append(tokens, tokenizer.eot_token).astype(TOKEN)


def prepare(folder, documents, source, *, tokenizer, val_docs, shard_tokens, on_shard=lambda place: None):
    """Turn documents into a folder of shards, the last `val_docs` documents being validation.

    `documents(start)` iterates over (place, text) from a place on, `source` names them, and
    `on_shard(place)` is called when everything before a place is safely on disk. Killed at any
    moment and called again with the same arguments, it continues after the last complete shard
    and ends with the same bytes. Returns the meta dictionary. Raises ValueError if there are not
    more than `val_docs` documents, or the folder is complete or was begun with other arguments.
    """
    if val_docs < 1 or shard_tokens < 1:
        raise ValueError(f"val_docs and shard_tokens must be at least 1, not {val_docs} and {shard_tokens}")
    encoding = get_tokenizer(tokenizer)
    settings = dict(tokenizer=tokenizer, val_docs=val_docs, shard_tokens=shard_tokens, source=source)
    progress = begin(folder, settings)
    on_shard(progress["place"])
    n_train, skipped, done = progress["documents"], progress["skipped"], progress["tokens"]
    writer = ShardWriter(folder, "train", shard_tokens, first=progress["shards"])
    train_tokens = writer.shards * shard_tokens

    # A delay line: a document goes to training once val_docs others have come after it, and what
    # is left in the line at the end is validation. So one pass over the source is enough.
    line = deque()
    arriving = tokenize(documents(tuple(progress["place"])), encoding)
    with tqdm(desc="tokenising", unit="tok", unit_scale=True, initial=train_tokens) as bar:
        for place, tokens in arriving:
            if tokens is None:
                skipped += 1
                continue
            bar.update(len(tokens))
            line.append((place, skipped, tokens))
            if len(line) <= val_docs:
                continue
            place, skipped_before, tokens = line.popleft()
            while done < len(tokens):
                written = writer.write(tokens[done:])
                done, train_tokens = done + written, train_tokens + written
                if writer.count == shard_tokens:
                    writer.finish()
                    progress |= dict(shards=writer.shards, place=place, tokens=done)
                    progress |= dict(documents=n_train, skipped=skipped_before)
                    write_json(Path(folder) / "progress.json", progress)
                    on_shard(place)
            n_train, done = n_train + 1, 0
    if n_train == 0:
        raise ValueError(
            f"only {len(line)} document(s), and the last {val_docs} are for validation: "
            f"give a --val_docs below {len(line)}"
        )
    writer.finish()
    val = ShardWriter(folder, "val", shard_tokens)
    for _, _, tokens in line:
        val.write_all(tokens)
    val.finish()
    return complete(
        folder,
        encoding,
        source,
        train_tokens=train_tokens,
        val_tokens=sum(len(tokens) for _, _, tokens in line),
        train_documents=n_train,
        val_documents=len(line),
        skipped=skipped,
        shard_tokens=shard_tokens,
    )


def fingerprint(path):
    """Name and checksum of the first megabyte, to notice that a run is continued on another file.

    Not of the whole, so that an archive found damaged can be fetched again and the run continued.
    """
    with open(path, "rb") as file:
        return f"{Path(path).name} {zlib.crc32(file.read(1 << 20)):08x}"


def prepare_text(paths, out, *, val_docs, **options):
    """Text files to shards; val_docs None means a tenth of the documents. Returns the meta dictionary."""
    if val_docs is None:
        val_docs = max(1, sum(1 for _ in text_documents(paths)) // 10)
    source = [f"{fingerprint(path)} {os.path.getsize(path)} bytes" for path in paths]
    return prepare(out, functools.partial(text_documents, paths), source, val_docs=val_docs, **options)


def prepare_openwebtext(archives, out, *, base_url, keep, **options):
    """OpenWebText archives to shards; with none given, the 21 are downloaded, one when it is needed.

    A downloaded archive is deleted as soon as its tokens are safely on disk, unless `keep`.
    Returns the meta dictionary.
    """
    downloads = Path(out) / "download"

    if archives:
        read = functools.partial(archive_documents, archives.__getitem__, len(archives))
        return prepare(out, read, [fingerprint(path) for path in archives], **options)

    def fetch(a):
        return download(f"{base_url.rstrip('/')}/{OWT_ARCHIVES[a]}", downloads)

    def delete_used(place):
        for name in OWT_ARCHIVES[: 0 if keep else place[0]]:
            (downloads / name).unlink(missing_ok=True)

    read = functools.partial(archive_documents, fetch, len(OWT_ARCHIVES))
    meta = prepare(out, read, OWT_ARCHIVES, on_shard=delete_used, **options)
    delete_used((len(OWT_ARCHIVES), 0, 0))
    return meta


def prepare_text8(paths, out, *, shard_tokens, base_url, keep):
    """text8 to shards of characters: 90% train, 5% val, 5% test. Returns the meta dictionary."""
    if len(paths) > 1:
        raise ValueError(f"text8 is one file, not {len(paths)}")
    path = Path(paths[0]) if paths else download(f"{base_url.rstrip('/')}/text8.zip", Path(out) / "download")
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                text = archive.read(archive.namelist()[0])
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and fetch it again") from None
    else:
        text = path.read_bytes()
    text = text.rstrip(b"\n")
    tokenizer = get_tokenizer("text8")
    # One byte is one token, so a table of 256 entries encodes 100 million of them at once.
    table = np.full(256, tokenizer.n_vocab, dtype=TOKEN)
    table[np.frombuffer(TEXT8_CHARACTERS.encode(), dtype=np.uint8)] = encode(tokenizer, TEXT8_CHARACTERS)
    tokens = table[np.frombuffer(text, dtype=np.uint8)]
    if (tokens == tokenizer.n_vocab).any():
        at = int((tokens == tokenizer.n_vocab).argmax())
        raise ValueError(f"{path} is not text8: byte {text[at]:#04x} at {at} is neither a to z nor a space")
    train, val = len(tokens) * 90 // 100, len(tokens) * 95 // 100
    if train == 0 or train == val:
        raise ValueError(f"{path} has only {len(tokens)} characters, too few to split")
    splits = {"train": tokens[:train], "val": tokens[train:val], "test": tokens[val:]}
    source = [fingerprint(path)]
    meta = write_splits(out, tokenizer, source, splits, dict.fromkeys(splits, 1), shard_tokens)
    if not paths and not keep:
        path.unlink()
    return meta


# -----------------------------------------------------------------------------------------------
# 7. Download

OWT_URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets"
TEXT8_URL = "http://mattmahoney.net/dc"
OWT_ARCHIVES = [f"urlsf_subset{i:02d}.tar" for i in range(21)]
RETRY_DELAYS = (1, 2, 4, 8, 16, 32, 64)  # seconds


def download(url, folder):
    """Fetch a file into a folder and return its path; a whole one already there is not fetched again.

    What has arrived waits in NAME.part and is continued, now or after a restart. A lost connection, a
    short answer or a server error (5xx) is tried again after each of RETRY_DELAYS, counted afresh
    whenever the file has grown. Raises OSError when they are used up, or the server refuses (4xx).
    """
    path = Path(folder) / url.rsplit("/", 1)[1]
    part = path.with_name(path.name + ".part")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    failures, most = 0, 0
    while True:
        try:
            _fetch_rest(url, part)
            os.replace(part, path)
            return path
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", 500)
            reason = str(error) or type(error).__name__
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
        if 400 <= code < 500 and code not in (408, 416, 429):
            raise OSError(f"cannot download {url}: {reason} (check the address, or give --base_url)")
        size = part.stat().st_size if part.exists() else 0
        failures, most = (0, size) if size > most else (failures, most)
        if failures == len(RETRY_DELAYS):
            raise OSError(f"cannot download {url}: {reason}; what has arrived is kept, run again to continue")
        time.sleep(RETRY_DELAYS[failures])
        failures += 1


def _fetch_rest(url, part):
    """One attempt to append what is missing to a partial file. Raises OSError if it is still not whole."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing left of this range: the file is whole, or was another one
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
        raise
    with response:
        if response.status != 206:  # the server ignores ranges and starts again
            have = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise OSError("the server sent another part of the file than was asked for")
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True) as bar,
        ):
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            if total is not None and file.tell() != total:
                raise OSError(f"the connection ended at {file.tell()} of {total} bytes")


# -----------------------------------------------------------------------------------------------
# 8. Command line

# What each source takes, with its defaults; a flag that does not apply is refused.
SOURCES = {
    "toy": dict(out="data/toy"),
    "text8": dict(out="data/text8", shard_tokens=100_000_000, base_url=TEXT8_URL, keep=False),
    "openwebtext": dict(
        out="data/openwebtext",
        tokenizer="gpt2",
        val_docs=100_000,
        shard_tokens=100_000_000,
        base_url=OWT_URL,
        keep=False,
    ),
    "text": dict(out=None, tokenizer="gpt2", val_docs=None, shard_tokens=100_000_000),
}


class Parser(argparse.ArgumentParser):
    """argparse with one plain line for an error, no abbreviated flags, and its texts as they are written."""

    def __init__(self, prog, description, **more):
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=prog, description=description, allow_abbrev=False, formatter_class=plain, **more
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def pick_device(name=""):
    """torch.device of that name, or the first there is of cuda, mps, cpu. Raises ValueError if it is not there."""
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ("", "cuda", *there) or (name == "cuda" and len(there) == 1):
        raise ValueError(f"no device {name!r} on this machine: choose from {', '.join(there)}")
    device = torch.device("cuda:0" if name == "cuda" else name or there[0])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def autocast(device):
    """bf16 on CUDA, plain float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def timed(work, device):
    """(seconds, peak GiB on CUDA else 0, result) of work()."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begun, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0, result


def first_line(error):
    """What an exception says, without the many lines that torch and others add."""
    return str(error).strip().split("\n")[0]


def run(prog, main, hint=""):
    """Calls main(); a user's mistake (ValueError, OSError) becomes one plain line on stderr and exit code 2.

    hint: what to add to the word that it was interrupted.
    """
    try:
        main()
    except torch.OutOfMemoryError:
        print(f"{prog}: error: out of GPU memory: lower --micro_batch, or --batch or --max_tokens", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted{hint}", file=sys.stderr)
        sys.exit(130)


def parse(argv):
    """(source, files, options) of a command line, the options filled from SOURCES."""
    parser = Parser("data.py", __doc__.partition("\n\nThe road")[0], argument_default=argparse.SUPPRESS)
    sources = "toy (default) | text8 [FILE] | openwebtext [ARCHIVE...] | FILE.txt..."
    parser.add_argument("source", nargs="*", default=[], help=sources)
    parser.add_argument("--out", help="folder to make (default: data/ and the name of the source)")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), help="default: gpt2")
    parser.add_argument(
        "--val_docs", type=int, help="last documents, kept for validation (owt 100000, text 1/10)"
    )
    parser.add_argument("--shard_tokens", type=int, help="tokens per shard file (default: 100000000)")
    parser.add_argument("--base_url", help="where to download from, for a mirror")
    parser.add_argument("--keep", action="store_true", help="keep what was downloaded")
    given = vars(parser.parse_args(argv))
    files = given.pop("source") or ["toy"]
    source = files.pop(0) if files[0] in ("toy", "text8", "openwebtext") else "text"
    for flag in given:
        if flag not in SOURCES[source]:
            parser.error(f"--{flag} does not apply to {source}")
    for file in files:
        if source == "toy" or not os.path.isfile(file):
            parser.error(f"no such file: {file} (sources are toy, text8, openwebtext, and text files)")
    options = SOURCES[source] | given
    options["out"] = options["out"] or f"data/{Path(files[0]).stem}"
    return source, files, options


def main(argv=None):
    """The command line: `python data.py --help`."""
    run("data.py", lambda: make(argv), hint=": run the same command again to continue")


def make(argv):
    """Makes the folder that the command line asks for, and says what is in it and what to do next."""
    source, files, options = parse(argv)
    out = options["out"]
    if source == "toy":
        meta = make_toy(out)
    elif source == "text8":
        meta = prepare_text8(files, **options)
    elif source == "openwebtext":
        meta = prepare_openwebtext(files, **options)
    else:
        meta = prepare_text(files, **options)
    shards = len(list(Path(out).glob("*_[0-9]*.bin")))
    skipped = f", {meta['skipped']} damaged pieces skipped" if meta.get("skipped") else ""
    print(f"{out}: {meta['tokenizer']} tokens in {shards} shards{skipped}")
    for split in ("train", "val", "test"):
        if f"{split}_tokens" in meta:
            print(f"  {split}: {meta[f'{split}_tokens']:,} tokens, {meta[f'{split}_documents']:,} documents")
    small = f" --data {out} --block_size 128 --n_layer 4 --n_embd 128 --batch_size 32"
    presets = dict(toy="", text8=" --preset text8", openwebtext=" --preset owt", text=small)
    print("next: python train.py" + presets[source] + (f" --data {out}" if source in ("text8", "openwebtext") else ""))


if __name__ == "__main__":
    main()
