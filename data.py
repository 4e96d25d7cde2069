"""Text in, blocks of tokens out: everything EDLM needs to know about data.

    python data.py                            the toy language, into data/toy (a second)
    python data.py FILE... --out data/mytext  your own text
    python data.py openwebtext [ARCHIVE...]   OpenWebText, downloaded if no archive is given
    python data.py text8 [ZIP]                text8, the 27-character Wikipedia, likewise

A file is given by its path, or by a URL from which it is downloaded.

The order of this file: a text (1) becomes token ids 0..V-1 (2), which lie in shards (3), where
`Blocks` and `BatchOrder` find what a model is trained on (4). Documents of other kinds (5) and how
they become shards (6) matter only to the commands above (7).
"""

import argparse
import functools
import itertools
import json
import lzma
import math
import os
import re
import socket
import sys
import tarfile
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# 1. The toy language
#
# A story is a template with its slots filled. A slot that occurs twice must say the same thing
# twice: that long-range agreement is what a factorised denoiser breaks and what EDLM mends. {he}
# agrees with {name}, {she} with {friend}; the last two verbs belong together. No two words have to
# differ (friends have other names): that takes a small network far longer to learn than agreement.

TOY_TEMPLATES = tuple(
    "{name} has a {colour} {object}. {he} VERB it to {friend} today. {she} ".replace("VERB", verb)
    + f"{last} the {{colour}} {{object}}."
    for verb, last in (("gives", "likes"), ("shows", "wants"), ("sells", "keeps"))
)
TOY_NAMES = {"ben": "he", "tom": "he", "max": "he", "ann": "she", "sue": "she", "mia": "she"}
TOY_FRIENDS = {"leo": "he", "dan": "he", "eva": "she", "zoe": "she", "ivy": "she"}
TOY_COLOURS = ("black", "red", "blue", "green")
TOY_OBJECTS = ("boat", "ball", "kite", "book")
TOY_LENGTH = 19  # tokens in every story


@functools.cache
def toy_language():
    """The whole language: its 1,440 stories, all different, each of probability 1 / 1,440."""
    choices = (TOY_TEMPLATES, TOY_NAMES, TOY_FRIENDS, TOY_COLOURS, TOY_OBJECTS)
    stories = []
    for template, name, friend, colour, thing in itertools.product(*choices):
        words = dict(name=name, friend=friend, colour=colour, object=thing)
        stories.append(template.format(**words, he=TOY_NAMES[name], she=TOY_FRIENDS[friend]))
    return stories


def toy_stories(n, seed):
    """n independent stories, as a list of str; the same seed gives the same stories."""
    stories = toy_language()
    chosen = np.random.default_rng(seed).random(n) * len(stories)
    return [stories[int(i)] for i in chosen]


def toy_entropy():
    """Exact entropy of the language in nats per story: no model can score below it on average."""
    return math.log(len(toy_language()))


def toy_is_valid(text):
    """True if the text is a story of the language, with every agreement kept."""
    return text in toy_language()


# --------------------------------------------------------------------------------------------------
# 2. Tokenizers

TOKENIZERS = ("gpt2", "bytes", "toy", "text8")
END_OF_TEXT = "<|endoftext|>"
# How a text is cut before it meets the vocabulary. A toy word carries the space before it, as
# GPT-2's words do; with the full stops a story is exactly TOY_LENGTH pieces.
PIECES = {"bytes": r"(?s).{1,256}", "toy": r" ?[^ .]+|\.| ", "text8": r"(?s)."}
# These have no token for some texts. And their documents are not followed by END_OF_TEXT, as those
# of natural text are: a toy block of TOY_LENGTH + 2 tokens holds exactly one story.
CLOSED = ("toy", "text8")


@functools.cache
def get_tokenizer(name):
    """The `tiktoken.Encoding` of that name; V is its `n_vocab`, and END_OF_TEXT its last token.

    gpt2: 50,257 sub-words. bytes: all 256. toy: the words of the toy language. text8: a to z and
    space. Raises ValueError for another name, or if gpt2 is neither cached nor reachable.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {name!r}: choose one of {', '.join(TOKENIZERS)}")
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            advice = "connect once, or set TIKTOKEN_CACHE_DIR to where its vocabulary lies"
            raise ValueError(f"cannot fetch gpt2 ({type(error).__name__}): {advice}") from None
    if name == "bytes":
        vocabulary = [bytes([byte]) for byte in range(256)]
    elif name == "text8":
        vocabulary = [character.encode() for character in "abcdefghijklmnopqrstuvwxyz "]
    else:
        words = {word for story in toy_language() for word in re.findall(PIECES["toy"], story)}
        vocabulary = [word.encode() for word in sorted(words)]
    ranks = {token: i for i, token in enumerate(vocabulary)}
    end = {END_OF_TEXT: len(vocabulary)}
    return tiktoken.Encoding(name, pat_str=PIECES[name], mergeable_ranks=ranks, special_tokens=end)


def encode_array(tokenizer, text):
    """Token ids of a text as an integer array [n]; raises as `encode` does."""
    if tokenizer.name in CLOSED:
        known = {token.decode() for token in tokenizer.token_byte_values()}
        pieces = re.findall(PIECES[tokenizer.name], text)
        if strange := [piece for piece in pieces if piece not in known]:
            raise ValueError(f"the {tokenizer.name} tokenizer has no word {strange[0]!r}")
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
# A data folder holds meta.json, written first; train_000.bin, train_001.bin, ..., the shards of the
# source files; and val_000.bin, written last, so that a folder that has it is complete.

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4  # 256 int32: magic, version, tokens, zeros
TOKEN = np.dtype("<u2")


def write_json(path, value):
    """Replace a JSON file, all or nothing."""
    Path(f"{path}.tmp").write_text(json.dumps(value, indent=2))
    os.replace(f"{path}.tmp", path)


def check_target(path):
    """Raises ValueError for a file that `write_json` could not write: before the work is done."""
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"cannot write {path}: it must be a file in a folder that exists")


def read_meta(folder):
    """The meta dictionary of a folder. Raises ValueError if meta.json is damaged."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
        size = 50257 if meta["tokenizer"] == "gpt2" else get_tokenizer(meta["tokenizer"]).n_vocab
        if meta["vocab_size"] == size and meta["source"] and isinstance(meta["source"], list):
            return meta
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged or not ours: move it away and make {folder} again")


def claim(folder, meta):
    """Write the meta.json that says what is to be in a folder, before anything else is in it.

    Raises ValueError if the folder holds shards of another claim, or of nobody's.
    """
    path = Path(folder) / "meta.json"
    there = read_meta(folder) if path.exists() else None  # raises if it is not ours
    if not any(path.parent.glob("*.bin")):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, meta)
    elif there != meta:
        other = "shards of another source, tokenizer or --val_docs"
        raise ValueError(f"{folder} holds {other}: remove it, or choose another --out")


def write_shard(path, documents, held_back=0):
    """Write a shard of an iterable of uint16 arrays; returns the last `held_back`, left out of it.

    Raises ValueError if no others are left, or too many tokens for the int32 that counts them.
    """
    held, count = deque(), 0
    with open(f"{path}.tmp", "wb") as shard:
        shard.seek(HEADER_BYTES)
        for tokens in documents:
            held.append(tokens)
            if len(held) > held_back:
                shard.write(held[0].tobytes())
                count += len(held.popleft())
        if not count:
            raise ValueError(f"{len(held)} documents, none left for {path}: lower --val_docs")
        if count >= 2**31:
            raise ValueError(f"{count} tokens are too many for {path}: cut its source in two")
        shard.seek(0)
        shard.write(np.array([MAGIC, VERSION, count], dtype="<i4").tobytes())
    os.replace(f"{path}.tmp", path)
    return held


# --------------------------------------------------------------------------------------------------
# 4. Reading


def open_split(folder, split):
    """(meta dictionary, [(path, bytes of header, tokens) of each shard]); split is train or val.

    A nanoGPT folder (headerless train.bin and val.bin) is read as GPT-2 tokens. Raises as `Blocks`.
    """
    plain, again = Path(folder) / f"{split}.bin", "run the same data.py command again"
    if not (Path(folder) / "meta.json").exists():
        if plain.exists():
            meta = dict(tokenizer="gpt2", vocab_size=50257, source=["nanoGPT"])
            return meta, [(plain, 0, plain.stat().st_size // TOKEN.itemsize)]
        raise FileNotFoundError(f"no tokens in {folder}: run `python data.py` (see its --help)")
    meta, shards = read_meta(folder), []
    for number in range(len(meta["source"]) if split == "train" else 1):
        path = Path(folder) / f"{split}_{number:03d}.bin"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: {again}")
        tokens = (path.stat().st_size - HEADER_BYTES) // TOKEN.itemsize
        if np.fromfile(path, "<i4", 3).tolist() != [MAGIC, VERSION, tokens]:
            raise ValueError(f"{path} is damaged: remove it, and {again}")
        shards.append((path, HEADER_BYTES, tokens))
    return meta, shards


def count_blocks(where, tokenizer, tokens, block_size):
    """How many blocks that many tokens give. Raises ValueError if none, or of a wrong length."""
    if tokenizer == "toy" and block_size != TOY_LENGTH + 2:
        raise ValueError(f"toy stories need a block_size of {TOY_LENGTH + 2}, not {block_size}")
    if block_size < 3:
        raise ValueError(f"block_size must be at least 3 (END_OF_TEXT twice), not {block_size}")
    if tokens < block_size - 2:
        raise ValueError(f"{where} has {tokens} tokens, too few for one block of {block_size}")
    return tokens // (block_size - 2)


class Blocks:
    """Training sequences of one split of a data folder, for a DataLoader.

    Item i is Long[block_size] = [EOT] + (block_size - 2) tokens of the stream + [EOT]. Blocks do
    not overlap, and run on from one shard to the next. Attributes: `tokenizer` (its name),
    `vocab_size`, `eot`, `meta`. Raises FileNotFoundError if data are missing; ValueError if they
    are damaged, too short for one block, or (toy) cut at another length than its stories.
    """

    def __init__(self, folder, split, block_size):
        self.meta, self.shards = open_split(folder, split)
        self.tokenizer, self.vocab_size = self.meta["tokenizer"], self.meta["vocab_size"]
        self.eot, self.block_size = self.vocab_size - 1, block_size
        where, tokens = f"the {split} split of {folder}", sum(shard[2] for shard in self.shards)
        self.length = count_blocks(where, self.tokenizer, tokens, block_size)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        start, end = i * (self.block_size - 2), (i + 1) * (self.block_size - 2)
        body = []
        for path, header, tokens in self.shards:  # start and end count from this shard's first
            if start < tokens and end > 0:
                first, last = max(start, 0), min(end, tokens)
                offset = header + TOKEN.itemsize * first
                body.append(np.fromfile(path, TOKEN, last - first, offset=offset))
            start, end = start - tokens, end - tokens
        block = np.concatenate([[self.eot], *body, [self.eot]]).astype(np.int64)  # [block_size]
        if block.max() >= self.vocab_size:
            raise ValueError(
                f"{path.parent} holds token {block.max()}, unknown to {self.tokenizer}"
            )
        return torch.from_numpy(block)


class BatchOrder:
    """Which blocks make up each batch: a function of the step, so an exact resume stores nothing.

    Step s takes the s-th group of `batch_size` blocks (the batch of all ranks together) from a
    permutation drawn anew each epoch; an incomplete last group is left out. Rank r yields number r,
    r + world, r + 2 world, ... of its micro-batches: so 2 processes see what 1 process would see.
    Never ends; a DataLoader takes it as `batch_sampler`. ValueError for sizes that do not fit.
    """

    def __init__(self, n_blocks, batch_size, micro_batch, *, seed, rank=0, world=1, start_step=0):
        if batch_size < 1 or micro_batch < 1 or batch_size % (micro_batch * world):
            parts = f"micro_batch {micro_batch} x {world} processes"
            raise ValueError(f"batch_size {batch_size} is not a multiple of {parts}")
        if n_blocks < batch_size:
            raise ValueError(f"only {n_blocks} blocks, less than a batch of {batch_size}")
        self.n_blocks, self.batch_size, self.micro_batch = n_blocks, batch_size, micro_batch
        self.seed, self.rank, self.world, self.start_step = seed, rank, world, start_step

    def __iter__(self):
        steps = self.n_blocks // self.batch_size  # in an epoch
        epoch, first = divmod(self.start_step, steps)
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.n_blocks)
            groups = order[: steps * self.batch_size].reshape(steps, -1, self.micro_batch)
            for group in groups[first:]:  # [micro-batches of all ranks, micro_batch]
                yield from group[self.rank :: self.world].tolist()
            epoch, first = epoch + 1, 0


# --------------------------------------------------------------------------------------------------
# 5. Documents


def text_documents(path):
    """The documents (stripped, not empty) of a text file, read line by line.

    They are parted by END_OF_TEXT if there is any, else by blank lines. ValueError if not UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            marked = any(END_OF_TEXT in line for line in file)
            file.seek(0)
            cuts = (re.split(f"({re.escape(END_OF_TEXT)})", line) for line in file)
            parts = itertools.chain.from_iterable(cuts) if marked else file
            between = END_OF_TEXT.__eq__ if marked else lambda line: not line.strip()
            groups = itertools.groupby(parts, between)
            texts = ("".join(document).strip() for apart, document in groups if not apart)
            yield from filter(None, texts)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


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
DETOKENIZERS = {
    "wikitext": (*_WIKITEXT, _QUOTED, _OPENING, _CLOSING),
    "ptb": (*_PTB, _PTB_CLOSING, _OPENING),
    "lm1b": (_LM1B, _QUOTED, _OPENING, _CLOSING),
}


def text_blocks(path, tokenizer, block_size, corpus=None):
    """All whole blocks of a text file, Long[N, block_size], just as its shards would give them.

    The rules of DETOKENIZERS for `corpus`, if it is one, are applied to each document. Raises
    ValueError for a file that is not text, text the tokenizer cannot encode, or too little.
    """
    documents = text_documents(path)
    for pattern, replacement in DETOKENIZERS[corpus] if corpus else ():
        documents = map(functools.partial(re.sub, pattern, replacement), documents)
    tokens = np.concatenate([*tokenize(documents, tokenizer), np.array([], TOKEN)])
    n = count_blocks(path, tokenizer.name, len(tokens), block_size)
    body = tokens[: n * (block_size - 2)].astype(np.int64).reshape(n, block_size - 2)
    return torch.from_numpy(np.pad(body, ((0, 0), (1, 1)), constant_values=tokenizer.eot_token))


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


def archive_documents(path):
    """The documents (cleaned, not empty) of one OpenWebText archive.

    All layouts in use are nested streams, and read as such: a tar of .xz (urlsf_subset00.tar), the
    same compressed once more (openwebtext.tar.xz), or one of those .xz, a compressed tar of .txt. A
    damaged member or document is left out and counted; a damaged archive is a ValueError.
    """
    damage = (tarfile.TarError, lzma.LZMAError, EOFError, UnicodeDecodeError)
    damaged = []

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
                except damage as error:
                    damaged.append(item.name)
                    tqdm.write(f"{path}: {item.name}: damaged ({error}), skipped", sys.stderr)

    try:
        with open(path, "rb") as file:
            yield from filter(None, walk(file))
    except damage as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and fetch it again") from None
    if damaged:
        tqdm.write(f"{path}: {len(damaged)} damaged pieces were skipped", sys.stderr)


def text8_documents(path):
    """Hundredths of text8 (zipped): the first 90, and the last 5 for validation.

    Published models are trained and tested on these. Raises ValueError for a damaged file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read("text8").decode().strip("\n")
        if not text:
            raise ValueError("it is empty")
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and fetch it again") from None
    size = math.ceil(len(text) / 100)
    hundredths = [text[start : start + size] for start in range(0, len(text), size)]
    yield from hundredths[:90] + hundredths[95:]


# --------------------------------------------------------------------------------------------------
# 6. Preparation
#
# The source file is the unit: its shard gets its name when all of it is tokenised, and a file that
# has its shard is never read again. So a run can be killed at any moment and repeated: it loses one
# file's work at most, and ends with the same bytes.


def tokenize(documents, tokenizer):
    """uint16 tokens of each document, and END_OF_TEXT unless the vocabulary is CLOSED, in order.

    On all cores: tiktoken lets go of Python's lock, so this thread reads (and decompresses) on.
    """
    end = [] if tokenizer.name in CLOSED else [tokenizer.eot_token]

    def encode_document(text):
        return np.append(encode_array(tokenizer, text), end).astype(TOKEN)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = deque()
        for text in documents:
            waiting.append(pool.submit(encode_document, text))
            if len(waiting) > 1000:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def prepare(out, files, read, tokenizer, val_docs):
    """Turn files, given by path or URL, into a folder of shards.

    `read(path)` iterates over the documents of a file. The last `val_docs` of the last file (0: a
    tenth of them) are for validation. A URL is downloaded when it is needed, and that file deleted
    when its shard is whole. ValueError if the folder is another's, or there are too few documents.
    """
    if val_docs < 0:
        raise ValueError(f"--val_docs must be at least 0, not {val_docs}")
    encoding, val_shard = get_tokenizer(tokenizer), Path(out) / "val_000.bin"
    settings = dict(tokenizer=tokenizer, vocab_size=encoding.n_vocab, val_docs=val_docs)
    claim(out, dict(source=[fingerprint(file) for file in files]) | settings)
    for number, file in enumerate(files):
        shard, last = Path(out) / f"train_{number:03d}.bin", number == len(files) - 1
        remote = "://" in str(file)
        path = Path(out) / f"download_{Path(file).name}" if remote else Path(file)
        if not shard.exists() or (last and not val_shard.exists()):
            if remote and not path.exists():
                download(file, path)
            held_back = 0
            if last:
                held_back = val_docs or sum(1 for _ in read(path)) // 10 or 1
            documents = progress(read(path), desc=path.name, unit=" documents")
            held = write_shard(shard, tokenize(documents, encoding), held_back)
            if last:
                write_shard(val_shard, held)
        if remote:
            path.unlink(missing_ok=True)


def fingerprint(file):
    """What tells a file from another: name, size and checksum of the first megabyte; or its URL."""
    if not Path(file).is_file():
        return str(file)
    with open(file, "rb") as content:
        start = zlib.crc32(content.read(1 << 20))
    return f"{Path(file).name}, {os.path.getsize(file)} bytes, {start:08x}"


def download(url, path):
    """Fetch a URL to a path; raises OSError, in one line.

    torch takes a lost connection for the end of a file; whoever reads the file finds it damaged.
    """
    socket.setdefaulttimeout(60)  # torch sets none, and would wait for ever for a silent server
    print(f"downloading {url}", file=sys.stderr)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
    except OSError as error:
        raise OSError(f"cannot download {url}: {first_line(error)}; run again to go on") from None


def make_toy(out, n_train=20000, n_val=2000, seed=0):
    """Make toy shards in a folder, or leave them; raises ValueError if it holds other data."""
    stories = toy_stories(n_train + n_val, seed)
    prepare(out, [f"{len(stories)} toy stories of seed {seed}"], lambda _: stories, "toy", n_val)


OWT_URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets"
OWT = [f"{OWT_URL}/urlsf_subset{i:02d}.tar" for i in range(21)]
TEXT8 = ["http://mattmahoney.net/dc/text8.zip"]
SOURCES = {  # what `prepare` is given, where the command line does not say otherwise
    "openwebtext": dict(read=archive_documents, files=OWT, tokenizer="gpt2", val_docs=100_000),
    "text8": dict(read=text8_documents, files=TEXT8, tokenizer="text8", val_docs=5),
    "text": dict(read=text_documents, tokenizer="gpt2", val_docs=0),
}


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


def run(prog, main):
    """Calls main(); a user's mistake, or too large a number, becomes one plain line and exit 2."""
    large = "not enough memory|can't allocate memory|DefaultCPUAllocator|out of memory|overflow"
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, MemoryError, OverflowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(large, str(error), re.IGNORECASE):
            raise
        message = "out of memory, or a number is too large: lower --batch_size, --k, --n ..."
        if isinstance(error, (ValueError, OSError)):
            message = first_line(error)
        print(f"{prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def main(argv=None):
    """Makes the folder that the command line asks for; says what is in it and what to do next."""
    parser = Parser("data.py", __doc__.partition("\n\nA file")[0])
    text = "toy (default), openwebtext, text8, or a text file"
    parser.add_argument("source", nargs="?", default="toy", help=text)
    parser.add_argument("files", nargs="*", help="archives, a zip, or more text files")
    parser.add_argument("--out", help="folder to make (default: data/ and the name of the source)")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, help="default: gpt2 (text8: text8)")
    text = "last documents, for validation (openwebtext: 100000; text8: 5; text, or 0: a tenth)"
    parser.add_argument("--val_docs", type=int, help=text)
    given = vars(parser.parse_args(argv)).items()
    given = {flag: value for flag, value in given if value not in (None, [])}
    source = given.pop("source")
    out = given.pop("out", f"data/{Path(source).stem}")
    if source not in ("toy", "openwebtext", "text8"):
        source, given["files"] = "text", [source, *given.get("files", [])]
    for file in given.get("files", []):
        if "://" not in file and not os.path.isfile(file):
            parser.error(f"no such file: {file} (sources are toy, openwebtext, text8, and files)")
    if source != "toy":
        prepare(out, **SOURCES[source] | given)
    elif given:
        parser.error(f"toy is made in one way only: --out alone can be chosen, not {[*given][0]}")
    else:
        make_toy(out)
    for split in ("train", "val"):
        meta, shards = open_split(out, split)
        tokens = sum(tokens for _, _, tokens in shards)
        print(f"{out}: {tokens:,} {meta['tokenizer']} tokens to {split} in {len(shards)} shards")
    # train.py has presets for these folders
    known = out in ("data/toy", "data/shakespeare", "data/openwebtext", "data/text8")
    small = " --block_size 128 --n_layer 4 --n_embd 128 --batch_size 32"
    print(f"next: python train.py --data {out}" + ("" if known else small))


if __name__ == "__main__":
    run("data.py", main)
