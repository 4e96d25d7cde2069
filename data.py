"""Text in, blocks of tokens out: everything EDLM needs to know about data.

    python data.py                                 the toy language, into data/toy (a second)
    python data.py FILE... --out data/mytext       your own text: .txt, or .jsonl of {"text": ...}
    python data.py openwebtext [ARCHIVE...]        OpenWebText, downloaded if no archive is given
    python data.py text8 [FILE]                    text8, the 27-character Wikipedia

The road of a text, which is also the order of this file:

    1. toy language   a tiny language in which the probability of every story is known exactly
    2. tokenizers     always a `tiktoken.Encoding`: text -> token ids 0..V-1; the mask id is V
    3. shards         files of uint16 tokens (the format of llm.c), and a meta.json that claims them
    4. reading        `Blocks` cuts the stream into training sequences; `BatchOrder` orders them
    5. documents      of text files (and their evaluation) and of OpenWebText archives
    6. preparation    documents -> tokens -> shards, one source file after the other
    7. command line   and what the scripts share: `Parser`, `progress`, `run`
"""

import argparse
import functools
import http.client
import itertools
import json
import lzma
import math
import os
import re
import socket
import sys
import tarfile
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

# --------------------------------------------------------------------------------------------------
# 1. The toy language
#
# A story is a template with its slots filled. A slot that occurs twice must say the same thing
# twice: that long-range agreement is what a factorised denoiser breaks and what EDLM mends. {he}
# agrees with {name}; {she} with {friend}, who is never {name}; the last two verbs belong together.

TOY_TEMPLATES = tuple(
    "{name} has a {colour} {object}. {he} VERB it to {friend} today. {she} ".replace("VERB", verb)
    + f"{last} the {{colour}} {{object}}."
    for verb, last in (("gives", "likes"), ("shows", "wants"), ("sells", "keeps"))
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
    """The whole language: a dictionary from every story (1,440 of them) to its log-probability.

    In nats. The template is uniform, and so is every slot, independently, except that the friend is
    uniform over the names that are left. No two choices give the same story.
    """
    fillings = [
        dict(zip(TOY_SLOTS, values, strict=True))
        for values in itertools.product(*TOY_SLOTS.values())
    ]
    fillings = [filling for filling in fillings if filling["name"] != filling["friend"]]
    log_p = -math.log(len(TOY_TEMPLATES)) - math.log(len(fillings))
    language = {}
    for template, filling in itertools.product(TOY_TEMPLATES, fillings):
        he, she = TOY_PRONOUNS[filling["name"]], TOY_PRONOUNS[filling["friend"]]
        language[template.format(**filling, he=he, she=she)] = log_p
    return language


def toy_stories(n, seed):
    """n independent stories, as a list of str; the same seed gives the same stories."""
    stories, log_p = zip(*toy_language().items(), strict=True)
    chosen = np.random.default_rng(seed).choice(len(stories), size=n, p=np.exp(log_p))
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


# --------------------------------------------------------------------------------------------------
# 2. Tokenizers

TOKENIZERS = ("gpt2", "bytes", "toy", "text8")
END_OF_TEXT = "<|endoftext|>"
TEXT8_CHARACTERS = "abcdefghijklmnopqrstuvwxyz "
# How a text is cut before it meets the vocabulary. A toy word carries the space before it, as
# GPT-2's words do; with the full stops a story is exactly TOY_LENGTH pieces.
PIECES = {"bytes": r"(?s).{1,256}", "toy": r" ?[^ .]+|\.| ", "text8": r"(?s)."}
# Documents of natural text are followed by END_OF_TEXT. Toy stories and text8 are not: without
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
                f"({type(error).__name__}): connect, or set TIKTOKEN_CACHE_DIR to where it lies"
            ) from None
    stories = " ".join(toy_language())
    vocabulary = {
        "bytes": [bytes([byte]) for byte in range(256)],
        "toy": [
            word.encode() for word in sorted({*re.findall(PIECES["toy"], stories), *TOY_PRONOUNS})
        ],
        "text8": [character.encode() for character in TEXT8_CHARACTERS],
    }[name]
    ranks = {token: i for i, token in enumerate(vocabulary)}
    end = {END_OF_TEXT: len(vocabulary)}
    return tiktoken.Encoding(name, pat_str=PIECES[name], mergeable_ranks=ranks, special_tokens=end)


def encode_array(tokenizer, text):
    """Token ids of a text as an integer array [n]; raises as `encode` does."""
    if tokenizer.name == "text8" and (strange := set(text) - set(TEXT8_CHARACTERS)):
        raise ValueError(f"text8 has only the letters a to z and the space, not {min(strange)!r}")
    if tokenizer.name == "toy":
        known = {token.decode() for token in tokenizer.token_byte_values()}
        if strange := [word for word in re.findall(PIECES["toy"], text) if word not in known]:
            words = ", ".join(sorted(known)).replace(" ,", "")
            raise ValueError(f"the toy language has no word {strange[0]!r}; it has {words}")
    try:
        # Not encode_ordinary: without a Python object per token, threads do not queue for the lock.
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        raise ValueError(f"the text {text[:40]!r} is not valid Unicode") from None


def encode(tokenizer, text):
    """Token ids (list of int) of all of a text. Raises ValueError, naming what cannot be one."""
    return encode_array(tokenizer, text).tolist()


def decode(tokenizer, ids):
    """Text of token ids: END_OF_TEXT is dropped, a mask shows as `___` (a character's as `_`)."""
    pieces = []
    for token in map(int, ids):
        if token == tokenizer.n_vocab:
            small = tokenizer.name in ("bytes", "text8")
            pieces.append(b"_" if small else b" ___" if pieces else b"___")
        elif token != tokenizer.eot_token:
            pieces.append(tokenizer.decode_single_token_bytes(token))
    return b"".join(pieces).decode(errors="replace")


# --------------------------------------------------------------------------------------------------
# 3. Shards
#
# A data folder holds meta.json, written first; train_000_0000.bin, train_000_0001.bin, ..., the
# shards of source file 0; train_001_0000.bin, ..., those of file 1; and val_000_0000.bin, ...,
# written last, so that a folder that has them is complete.

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4  # 256 int32: magic, version, tokens, number of shards of this file, zeros
TOKEN = np.dtype("<u2")
SHARD_TOKENS = 100_000_000


def sync_and_replace(file, path):
    """Close an open temporary file and give it its real name: `path` is whole, or as it was."""
    file.flush()
    os.fsync(file.fileno())  # on the disk before the new name is: a power cut must not empty it
    file.close()
    os.replace(file.name, path)


def write_json(path, value):
    """Replace a JSON file, all or nothing."""
    file = open(f"{path}.tmp", "w")
    json.dump(value, file, indent=2)
    sync_and_replace(file, path)


def check_target(path):
    """Raises ValueError for a file that `write_json` could not write: before the work is done."""
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"cannot write {path}: it must be a file in a folder that exists")


def read_meta(folder):
    """The checked meta dictionary of a folder. Raises ValueError if meta.json is damaged."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
        sizes = (meta["eot"], meta["vocab_size"], 2**16)
        good = meta["tokenizer"] in TOKENIZERS and all(type(n) is int for n in sizes)
        good = good and 0 <= sizes[0] < sizes[1] <= sizes[2] and type(meta["source"]) is list
        if good and meta["source"] and all(type(name) is str for name in meta["source"]):
            return meta
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged or not ours: remove {folder} and make it again")


def claim(folder, encoding, source, **settings):
    """Write the meta.json that says what is to be in a folder, before anything else is in it.

    `source` is a list with the name of each source file. A folder claimed in the same words is
    continued. Raises ValueError if the folder holds shards of another claim, or of nobody's.
    """
    meta = dict(tokenizer=encoding.name, vocab_size=encoding.n_vocab, eot=encoding.eot_token)
    meta |= dict(source=source) | settings
    path = Path(folder) / "meta.json"
    before = read_meta(folder) if path.exists() else {}
    if changed := [key for key in meta if before.get(key) != meta[key]]:
        if any(path.parent.glob("*.bin")):
            other = f"made with another {changed[0]}" if before else "of another origin"
            raise ValueError(f"{folder} holds shards {other}: remove it, or choose another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, meta)


def write_shards(folder, split, file, documents, shard_tokens):
    """The shards of source file number `file`, of an iterable of uint16 arrays; returns how many.

    Each has `shard_tokens` tokens, the last perhaps fewer. They get their names when all are whole.
    """
    files, counts = [], []
    for tokens in documents:
        while len(tokens):
            if not counts or counts[-1] == shard_tokens:
                path = Path(folder) / f"{split}_{file:03d}_{len(files):04d}.bin.tmp"
                files.append(open(path, "wb"))
                files[-1].seek(HEADER_BYTES)
                counts.append(0)
            part = tokens[: shard_tokens - counts[-1]]
            files[-1].write(part.tobytes())
            counts[-1] += len(part)
            tokens = tokens[len(part) :]
    for shard, count in zip(files, counts, strict=True):
        shard.seek(0)
        shard.write(np.array([MAGIC, VERSION, count, len(files)], dtype="<i4").tobytes())
        sync_and_replace(shard, shard.name.removesuffix(".tmp"))
    return len(files)


def shards_of(folder, split, file):
    """(path, bytes of header, tokens) of each shard of a source file; [] if one is not there.

    Raises ValueError if one is foreign or has been cut.
    """
    found, expected = [], 1
    while len(found) < expected:
        path = Path(folder) / f"{split}_{file:03d}_{len(found):04d}.bin"
        if not path.exists():
            return []
        with open(path, "rb") as shard:
            header = np.frombuffer(shard.read(16).ljust(16, b"\0"), dtype="<i4")
        magic, version, tokens, expected = map(int, header)
        size = HEADER_BYTES + TOKEN.itemsize * tokens
        if (magic, version) != (MAGIC, VERSION) or expected < 1 or path.stat().st_size != size:
            raise ValueError(
                f"{path} is damaged: remove it, and run the same data.py command again"
            )
        found.append((path, HEADER_BYTES, tokens))
    return found


# --------------------------------------------------------------------------------------------------
# 4. Reading


def open_split(folder, split):
    """(meta dictionary, what `shards_of` says of all files) of one split; raises as `Blocks` does.

    A nanoGPT folder (headerless train.bin and val.bin) is read as GPT-2 tokens.
    """
    plain, again = Path(folder) / f"{split}.bin", "run the same `python data.py` command again"
    if not (Path(folder) / "meta.json").exists():
        if not plain.exists():
            raise FileNotFoundError(f"no tokens in {folder}: run `python data.py` (see its --help)")
        meta = dict(tokenizer="gpt2", vocab_size=50257, eot=50256, source=["nanoGPT"])
        return meta, [(plain, 0, plain.stat().st_size // TOKEN.itemsize)]
    meta = read_meta(folder)
    if not shards_of(folder, "val", 0):
        raise ValueError(f"{folder} is unfinished: {again}")
    files = range(len(meta["source"]) if split == "train" else 1)
    shards = [shards_of(folder, split, file) for file in files]
    if [] in shards:
        name = meta["source"][shards.index([])]
        raise FileNotFoundError(f"{folder} lacks {split} shards of {name}: {again}")
    return meta, sum(shards, [])


def count_blocks(where, tokenizer, tokens, block_size):
    """How many blocks that many tokens give. Raises ValueError if none, or of a wrong length."""
    if tokenizer == "toy" and block_size != TOY_LENGTH + 2:
        raise ValueError(f"toy stories need a block_size of {TOY_LENGTH + 2}, not {block_size}")
    if block_size < 3:
        raise ValueError(f"block_size must be at least 3 (END_OF_TEXT twice), not {block_size}")
    if tokens < block_size - 2:
        raise ValueError(f"{where} has {tokens} tokens, too few for one block of {block_size}")
    return tokens // (block_size - 2)


class Blocks(Dataset):
    """Training sequences of one split of a data folder.

    Item i is Long[block_size] = [EOT] + (block_size - 2) tokens of the stream + [EOT]. Blocks do
    not overlap, and run on from one shard to the next, which each process maps into its memory.
    Attributes: `tokenizer` (its name), `vocab_size`, `eot`, `meta`.

    Raises FileNotFoundError if there is no data or a shard is lost; ValueError if it is unfinished,
    damaged, too short for one block, or (toy) cut at another length than its stories.
    """

    def __init__(self, folder, split, block_size):
        self.meta, self.shards = open_split(folder, split)
        self.tokenizer, self.vocab_size = self.meta["tokenizer"], self.meta["vocab_size"]
        self.eot, self.block_size, self.maps = self.meta["eot"], block_size, {}
        # Where each shard starts in the stream of all of them, and where the last one ends.
        self.starts = np.cumsum([0] + [tokens for _, _, tokens in self.shards])
        where, tokens = f"the {split} split of {folder}", int(self.starts[-1])
        self.length = count_blocks(where, self.tokenizer, tokens, block_size)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        start, end = i * (self.block_size - 2), (i + 1) * (self.block_size - 2)
        first, last = np.searchsorted(self.starts, (start, end - 1), side="right") - 1
        body = []
        for shard in range(first, last + 1):
            path, offset, _ = self.shards[shard]
            if shard not in self.maps:
                self.maps[shard] = np.memmap(path, TOKEN, mode="r", offset=offset)
            begin = self.starts[shard]
            body.append(self.maps[shard][max(0, start - begin) : end - begin])
        block = np.concatenate([[self.eot], *body, [self.eot]]).astype(np.int64)  # [block_size]
        if block.max() >= self.vocab_size:
            vocabulary = f"{self.tokenizer} ends at {self.vocab_size - 1}"
            raise ValueError(f"{path} is damaged: it holds token {block.max()}, but {vocabulary}")
        return torch.from_numpy(block)

    def __getstate__(self):
        return self.__dict__ | {"maps": {}}  # a pickled memory map would carry the whole file


class BatchOrder:
    """Which blocks make up each batch: a function of the step, so an exact resume stores nothing.

    Step s takes the s-th group of `batch_size` blocks (the batch of all ranks together) from a
    permutation drawn anew each epoch from (seed, epoch); an incomplete last group is left out. The
    group is cut into micro-batches, and rank r yields number r, r + world, r + 2 world, ... of
    them: so 2 processes with one micro-batch each see what 1 process with two of them sees.

    Iterating never ends; give it to a DataLoader as `batch_sampler`. Raises ValueError if the sizes
    do not divide, or there are fewer than `batch_size` blocks.
    """

    def __init__(self, n_blocks, batch_size, micro_batch, *, seed, rank=0, world=1, start_step=0):
        if batch_size < 1 or micro_batch < 1 or batch_size % (micro_batch * world):
            parts = f"micro_batch {micro_batch} x {world} processes"
            raise ValueError(f"batch_size {batch_size} is not a multiple of {parts}")
        if n_blocks < batch_size:
            raise ValueError(
                f"the data has only {n_blocks} blocks, less than a batch of {batch_size}"
            )
        self.n_blocks, self.batch_size, self.micro_batch = n_blocks, batch_size, micro_batch
        self.seed, self.rank, self.world, self.start_step = seed, rank, world, start_step

    def __iter__(self):
        current, stride = None, self.world * self.micro_batch
        for step in itertools.count(self.start_step):
            epoch, group = divmod(step, self.n_blocks // self.batch_size)
            if epoch != current:
                permutation = np.random.default_rng((self.seed, epoch)).permutation(self.n_blocks)
                current = epoch
            batch = permutation[group * self.batch_size : (group + 1) * self.batch_size]
            for first in range(self.rank * self.micro_batch, self.batch_size, stride):
                yield batch[first : first + self.micro_batch].tolist()


# --------------------------------------------------------------------------------------------------
# 5. Documents


def text_documents(path):
    """The documents (stripped, not empty) of a text file, read line by line.

    Those of FILE.jsonl are one {"text": ...} a line; those of any other file are parted by
    END_OF_TEXT if there is any, else by blank lines. Raises ValueError if the file is not so.
    """
    try:
        with open(path, encoding="utf-8") as file:
            if Path(path).suffix == ".jsonl":
                texts = jsonl_texts(path, file)
            else:
                marked = any(END_OF_TEXT in line for line in file)
                file.seek(0)
                cuts = (re.split(f"({re.escape(END_OF_TEXT)})", line) for line in file)
                parts = itertools.chain.from_iterable(cuts) if marked else file
                between = END_OF_TEXT.__eq__ if marked else lambda line: not line.strip()
                groups = itertools.groupby(parts, between)
                texts = ("".join(document) for apart, document in groups if not apart)
            yield from filter(None, map(str.strip, texts))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def jsonl_texts(path, lines):
    """The text of each line of a .jsonl file. Raises ValueError, naming the line, without one."""
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)["text"] + "" if line.strip() else ""
        except (ValueError, KeyError, TypeError, RecursionError):
            wanted = 'expected a JSON object {"text": "..."}'
            raise ValueError(f"{path}, line {number}: {wanted}") from None


# How three corpora were tokenised, undone by (pattern, replacement) rules in order. They share: no
# space before a closing mark or a clitic, after an opening one, or inside a pair of quotes.
_CLOSING = (r" ([,.;:!?%)\]}]|'(?:s|m|d|re|ve|ll)\b|n't\b)", r"\1")
_OPENING = (r"([(\[{$£€#]) (?=\S)", r"\1")
_QUOTED = (r'" ([^"\n]*?) "', r'"\1"')
_MARGINS = (r"(?m)^ +| +$", "")
# `two @-@ part` -> `two-part`; `= = T = =` -> `== T ==`; `don 't` -> `don't`; <unk> stays
_WIKITEXT = (r" @([-,.])@ ", r"\1"), _MARGINS, (r"(?<==) (?==)", ""), (r"\b(\w*n) 't\b", r"\1't")
# <unk> -> `?`, a word, which keeps its space; `\/` -> `/`; N (a number) -> 1; `boys ' ` -> `boys' `
_PTB = _MARGINS, (r"<unk>", "?"), (r"\\/", "/"), (r"\bN\b", "1"), (r"s ' ", "s' ")
_PTB_CLOSING = (_CLOSING[0].replace("?%", "%"), r"\1")
_LM1B = (r"(https?) : / / ?", r"\1://")


def _substitute(rules, text):
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


DETOKENIZERS = {
    "wikitext": functools.partial(_substitute, (*_WIKITEXT, _QUOTED, _OPENING, _CLOSING)),
    "ptb": functools.partial(_substitute, (*_PTB, _PTB_CLOSING, _OPENING)),
    "lm1b": functools.partial(_substitute, (_LM1B, _QUOTED, _OPENING, _CLOSING)),
}


def text_blocks(path, tokenizer, block_size, detokenize=None):
    """All whole blocks of a text file, Long[N, block_size], just as its shards would give them.

    `detokenize` is a key of DETOKENIZERS, applied to each document. Raises ValueError for a file
    that is not what `text_documents` expects, text the tokenizer cannot encode, or too little.
    """
    if detokenize not in (None, *DETOKENIZERS):
        known = ", ".join(DETOKENIZERS)
        raise ValueError(f"unknown detokenizer {detokenize!r}: choose one of {known}")
    documents = map(DETOKENIZERS.get(detokenize, str), text_documents(path))
    tokens = np.concatenate([*tokenize(documents, tokenizer), np.array([], TOKEN)])
    n = count_blocks(path, tokenizer.name, len(tokens), block_size)
    body = tokens[: n * (block_size - 2)].astype(np.int64).reshape(n, block_size - 2)
    return torch.from_numpy(np.pad(body, ((0, 0), (1, 1)), constant_values=tokenizer.eot_token))


DAMAGE = (tarfile.TarError, lzma.LZMAError, EOFError, UnicodeDecodeError)


class StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a bad header for the end, and loses what follows. This one raises."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise  # the proper end
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def archive_documents(path, damaged):
    """The documents (cleaned, not empty) of one OpenWebText archive.

    All the layouts in use are nested streams, and are read as such: a tar of .xz members
    (urlsf_subset00.tar), the same compressed once more (openwebtext.tar.xz), or one such member
    (urlsf_subset00-1_data.xz, a compressed tar of .txt). A damaged member or document is left out,
    reported, and added to the list `damaged`; a damaged archive is a ValueError.
    """

    def walk(file):
        stream = lzma.open(file) if file.peek(6).startswith(b"\xfd7zXZ\0") else file
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo) as archive:
            for item in filter(tarfile.TarInfo.isfile, archive):
                try:
                    if item.name.endswith(".txt"):
                        text = archive.extractfile(item).read().decode()
                        yield re.sub(r"\n{3,}", "\n\n", text).strip()
                    elif item.name.endswith(".xz"):
                        yield from walk(archive.extractfile(item))
                except DAMAGE as error:
                    damaged.append(item.name)
                    tqdm.write(f"{path}: {item.name}: damaged ({error}), skipped", sys.stderr)

    try:
        with open(path, "rb") as file:
            yield from filter(None, walk(file))
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and fetch it again") from None


# --------------------------------------------------------------------------------------------------
# 6. Preparation
#
# The source file is the unit: its shards get their names when all of it is tokenised, and a file
# that has its shards is never read again. So a run can be killed at any moment and repeated: it
# loses one file's work at most, and ends with the same bytes.

OWT_URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets"
OWT_ARCHIVES = [f"urlsf_subset{i:02d}.tar" for i in range(21)]
TEXT8_URL = "http://mattmahoney.net/dc"


def tokenize(documents, tokenizer):
    """uint16 tokens of each document, END_OF_TEXT after it where documents are SEPARATED, in order.

    On all cores: tiktoken lets go of Python's lock, so while its threads work through some groups
    of documents, this one reads (and decompresses) the next.
    """
    end = [tokenizer.eot_token] * SEPARATED[tokenizer.name]

    def encode_group(texts):
        return [np.append(encode_array(tokenizer, text), end).astype(TOKEN) for text in texts]

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting, group, size = deque(), [], 0
        for text in documents:
            group.append(text)
            size += len(text)
            if size >= 100_000:  # characters: handing so many to a thread costs nothing
                waiting.append(pool.submit(encode_group, group))
                group, size = [], 0
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        waiting.append(pool.submit(encode_group, group))
        while waiting:
            yield from waiting.popleft().result()


def all_but_last(n, arrays, held):
    """All arrays but the last n, which stay in the deque `held`."""
    for tokens in arrays:
        held.append(tokens)
        if len(held) > n:
            yield held.popleft()


def prepare(out, paths, read, source, *, base_url="", keep=True, **options):
    """Turn files into a folder of shards; the last documents of the last file are for validation.

    `read(path)` iterates over the documents of a file, and `source` names the files. The options,
    written to meta.json, are tokenizer, val_docs and shard_tokens. With a base_url, each file is
    downloaded when it is needed, and deleted when its shards are whole, unless `keep`. Raises
    ValueError if the folder is another's, or a file has too few documents.
    """
    options = dict(tokenizer="gpt2", val_docs=100_000, shard_tokens=SHARD_TOKENS) | options
    val_docs, shard_tokens = options["val_docs"], options["shard_tokens"]
    if val_docs < 1 or not 1 <= shard_tokens < 2**31:
        raise ValueError("val_docs and shard_tokens must be at least 1, shard_tokens below 2^31")
    encoding = get_tokenizer(options["tokenizer"])
    claim(out, encoding, source, **options)
    for file, path in enumerate(map(Path, paths)):
        last = file == len(paths) - 1
        if not shards_of(out, "train", file) or (last and not shards_of(out, "val", 0)):
            if base_url:
                download(base_url, path)
            tokens = tokenize(progress(read(path), desc=path.name, unit=" documents"), encoding)
            train = all_but_last(val_docs if last else 0, tokens, held := deque())
            if not write_shards(out, "train", file, train, shard_tokens):
                few = f"{path} has {len(held)} documents, none of them left for training"
                raise ValueError(f"{few}: lower --val_docs ({val_docs}), or leave the file out")
            write_shards(out, "val", 0, held, shard_tokens)
        if not keep:
            path.unlink(missing_ok=True)


def fingerprint(path):
    """Name and checksum of the first megabyte, to notice that a run goes on with another file.

    Not of the whole, so that an archive found damaged can be fetched again and the run continued.
    """
    with open(path, "rb") as file:
        return f"{Path(path).name} {zlib.crc32(file.read(1 << 20)):08x}"


def make_toy(folder, n_train=20000, n_val=2000, seed=0):
    """Make toy shards in a folder, or leave them; raises ValueError if it holds other data."""
    language = zlib.crc32("\n".join(toy_language()).encode())
    source = [f"toy language {language:08x}, {n_train} + {n_val} stories, seed {seed}"]
    stories = functools.partial(toy_stories, n_train + n_val, seed)
    prepare(folder, ["toy"], lambda path: stories(), source, tokenizer="toy", val_docs=n_val)


def prepare_text(out, paths, *, val_docs=None, **options):
    """Text files to shards. val_docs None is a tenth of the last file's documents, at least one."""
    source = [f"{fingerprint(path)} {os.path.getsize(path)} bytes" for path in paths]
    if val_docs is None:
        val_docs = max(1, sum(1 for _ in text_documents(paths[-1])) // 10)
    prepare(out, paths, text_documents, source, val_docs=val_docs, **options)


def prepare_openwebtext(out, paths, *, base_url=OWT_URL, keep=False, **options):
    """OpenWebText archives, downloaded if there are none, to shards; returns the damage count."""
    damaged = []
    read = functools.partial(archive_documents, damaged=damaged)
    if paths:
        prepare(out, paths, read, [fingerprint(path) for path in paths], **options)
    else:
        paths = [Path(out) / name for name in OWT_ARCHIVES]
        prepare(out, paths, read, OWT_ARCHIVES, base_url=base_url, keep=keep, **options)
    return len(damaged)


def prepare_text8(out, paths, shard_tokens=SHARD_TOKENS, base_url=TEXT8_URL, keep=False):
    """text8 (a file, or a zip of it) to shards of characters: 90% train, 5% val, 5% test."""
    if len(paths) > 1 or not 1 <= shard_tokens < 2**31:
        raise ValueError("text8 is one file, and its shards have 1 to 2^31 - 1 tokens")
    path = Path(paths[0]) if paths else Path(out) / "text8.zip"
    source = [fingerprint(path) if paths else path.name]
    claim(out, get_tokenizer("text8"), source, shard_tokens=shard_tokens)
    if all(shards_of(out, split, 0) for split in ("train", "test", "val")):
        return
    if not paths:
        download(base_url, path)
    try:
        zipped = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None
        text = zipped.read(zipped.namelist()[0]) if zipped else path.read_bytes()
    except (zipfile.BadZipFile, zlib.error, EOFError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or locked ({error}): fetch it again") from None
    # One byte is one token, so a table of 256 entries encodes 100 million of them at once.
    table = np.full(256, len(TEXT8_CHARACTERS), dtype=TOKEN)
    table[list(TEXT8_CHARACTERS.encode())] = range(len(TEXT8_CHARACTERS))
    tokens = table[np.frombuffer(text.rstrip(b"\n"), dtype=np.uint8)]
    if len(tokens) < 20 or tokens.max() == len(TEXT8_CHARACTERS):
        raise ValueError(f"{path} is not text8: it is short, or not all a to z and space")
    train, val = len(tokens) * 90 // 100, len(tokens) * 95 // 100
    splits = {"train": tokens[:train], "test": tokens[val:], "val": tokens[train:val]}
    for split, part in splits.items():
        write_shards(out, split, 0, [part], shard_tokens)
    if not paths and not keep:
        path.unlink()


def download(base_url, path):
    """Fetch the file of that name to a path, unless it is there. Raises OSError, in one line."""
    if path.exists():
        return
    url, part = f"{base_url.rstrip('/')}/{path.name}", Path(f"{path}.part")
    for leftover in path.parent.glob(f"{part.name}*"):  # of a run that was killed
        leftover.unlink()
    socket.setdefaulttimeout(60)  # torch sets none, and would wait for ever for a silent server
    print(f"downloading {url}", file=sys.stderr)
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
            size = int(answer.headers.get("Content-Length", -1))
        torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
        if size not in (-1, part.stat().st_size):  # torch takes a lost connection for the end
            raise OSError(f"the connection ended at {part.stat().st_size} of {size} bytes")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(
            f"cannot download {url} ({first_line(error)}): run again to continue"
        ) from None
    os.replace(part, path)


# --------------------------------------------------------------------------------------------------
# 7. Command line


class Parser(argparse.ArgumentParser):
    """argparse with one plain line for an error, no abbreviated flags, texts as they stand."""

    def __init__(self, prog, description, **more):
        more |= dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, description=description, **more)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def progress(iterable=None, **options):
    """A tqdm progress bar, redrawn twice a second on a terminal, twice a minute in a log."""
    pace = 0.5 if sys.stderr.isatty() else 30
    defaults = dict(mininterval=pace, maxinterval=max(10, pace), dynamic_ncols=True)
    return tqdm(iterable, **defaults | options)


def numbers(text):
    """'4,8,16' -> (4, 8, 16): a type for flags. ArgumentTypeError below 1 or from 2**31 on."""
    values = tuple(int(part) for part in text.split(","))
    if not 1 <= min(values) <= max(values) < 2**31:
        raise argparse.ArgumentTypeError(f"must lie between 1 and 2**31: {text}")
    return values


def first_line(error):
    """What an exception says, without the many lines that torch and others add."""
    return str(error).strip().split("\n")[0]


LARGE = "not enough memory|can't allocate memory|DefaultCPUAllocator|out of memory|overflow"


def run(prog, main, hint=""):
    """Calls main(); a user's mistake becomes one plain line on stderr and exit code 2.

    That is a ValueError or OSError, and a number too large for the memory or the machine.
    hint: what to add to the word that it was interrupted.
    """
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted{hint}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, MemoryError, OverflowError, RuntimeError) as error:
        message = first_line(error)
        if not isinstance(error, (ValueError, OSError)):
            if isinstance(error, RuntimeError) and not re.search(LARGE, str(error), re.IGNORECASE):
                raise
            message = "out of memory, or a number is too large: lower --batch_size, --k, --n ..."
        print(f"{prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


# How each source is prepared, and the flags it takes; another flag is refused.
SOURCES = {
    "toy": (lambda out, files: make_toy(out), ""),
    "text8": (prepare_text8, "shard_tokens base_url keep"),
    "openwebtext": (prepare_openwebtext, "tokenizer val_docs shard_tokens base_url keep"),
    "text": (prepare_text, "tokenizer val_docs shard_tokens"),
}


def make(argv):
    """Makes the folder that the command line asks for; says what is in it and what to do next."""
    parser = Parser("data.py", __doc__.partition("\n\nThe road")[0])
    sources = "toy (default) | text8 [FILE] | openwebtext [ARCHIVE...] | FILE..."
    parser.add_argument("source", nargs="*", default=["toy"], help=sources)
    parser.add_argument("--out", help="folder to make (default: data/ and the name of the source)")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), help="default: gpt2")
    text = "last documents, for validation (openwebtext 100000, text a tenth of the last file)"
    parser.add_argument("--val_docs", type=int, help=text)
    parser.add_argument("--shard_tokens", type=int, help="tokens per shard (default 100000000)")
    parser.add_argument("--base_url", help="where to download from, for a mirror")
    parser.add_argument("--keep", action="store_true", default=None, help="keep the downloads")
    options = vars(parser.parse_args(argv))
    files, out = options.pop("source"), options.pop("out")
    out = out or f"data/{Path(files[0]).stem}"
    source = files.pop(0) if files[0] in ("toy", "text8", "openwebtext") else "text"
    options = {flag: value for flag, value in options.items() if value is not None}
    prepare_source, flags = SOURCES[source]
    for flag in options.keys() - set(flags.split()):
        parser.error(f"--{flag} does not apply to {source}")
    for file in files:
        if source == "toy" or not os.path.isfile(file):
            parser.error(f"no such file: {file} (sources are toy, text8, openwebtext, and files)")
    damaged = prepare_source(out, files, **options)
    print(f"{out}: {damaged} damaged pieces were skipped" if damaged else f"{out}:")
    for split in ["train", "val"] + ["test"] * (source == "text8"):
        meta, shards = open_split(out, split)
        tokens = sum(tokens for _, _, tokens in shards)
        print(f"  {split}: {tokens:,} {meta['tokenizer']} tokens in {len(shards)} shards")
    small = f" --data {out} --block_size 128 --n_layer 4 --n_embd 128 --batch_size 32"
    preset = {"toy": "", "text": small, "openwebtext": f" --preset owt --data {out}"}
    print("next: python train.py" + preset.get(source, f" --preset text8 --data {out}"))


def main(argv=None):
    """The command line: `python data.py --help`."""
    run("data.py", lambda: make(argv), hint=": run the same command again to continue")


if __name__ == "__main__":
    main()
