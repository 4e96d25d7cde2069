"""Text in, blocks of tokens out: everything EDLM needs to know about data.

    python data.py                            the toy language, into data/toy (a second)
    python data.py FILE... --out data/mytext  your own text: plain, JSON lines, or a tar of .txt
    python data.py openwebtext [FILE...]      OpenWebText, downloaded if no file of it is given
    python data.py text8 [FILE]               text8, the 27-character Wikipedia, likewise

A file is given by its path, or by a URL from which it is downloaded. It may be packed (.xz, or a
.zip of one file).

A text (1) becomes token ids (2), which lie in shards (3). `Blocks` and `BatchOrder` read them to
train a model (4). Sections 5 to 7, from documents to shards, matter only to the commands above.
"""

import argparse
import contextlib
import functools
import http.client
import io
import itertools
import json
import lzma
import math
import os
import re
import shlex
import socket
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

# ------------ 1. The toy language -----------------------------------------------------------------
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
def toy_language() -> list[str]:
    """The whole language: its 1,440 stories, all different, each of probability 1 / 1,440."""
    choices = (TOY_TEMPLATES, TOY_NAMES, TOY_FRIENDS, TOY_COLOURS, TOY_OBJECTS)
    stories = []
    for template, name, friend, colour, thing in itertools.product(*choices):
        words = dict(name=name, friend=friend, colour=colour, object=thing)
        stories.append(template.format(**words, he=TOY_NAMES[name], she=TOY_FRIENDS[friend]))
    return stories


def toy_stories(n: int, seed: int) -> list[str]:
    """n independent stories; the same seed gives the same stories."""
    stories = toy_language()
    chosen = np.random.default_rng(seed).random(n) * len(stories)
    return [stories[int(i)] for i in chosen]


def toy_entropy() -> float:
    """Exact entropy of the language in nats per story: no model can score below it on average."""
    return math.log(len(toy_language()))


def toy_is_valid(text: str) -> bool:
    """True if the text is a story of the language, with every agreement kept."""
    return text in toy_language()


# ------------ 2. Tokenizers -----------------------------------------------------------------------

TOKENIZERS = ("gpt2", "bytes", "toy", "text8")
END_OF_TEXT = "<|endoftext|>"
# How a text is cut before it meets the vocabulary. A toy word carries the space before it, as
# GPT-2's words do; with the full stops a story is exactly TOY_LENGTH pieces.
PIECES = {"bytes": r"(?s).{1,256}", "toy": r" ?[^ .]+|\.| ", "text8": r"(?s)."}
# These have no token for some texts. And their documents are not followed by END_OF_TEXT, as those
# of natural text are: a toy block of TOY_LENGTH + 2 tokens holds exactly one story.
CLOSED = ("toy", "text8")
TOKEN = np.dtype("<u2")  # enough for all of these vocabularies
# A long text is encoded in parts, because tiktoken gives up on a million spaces. Parts that end
# between a word and white space have the same tokens as the whole text; without such a place, a
# part ends anywhere.
PARTS = re.compile(r"(?s).{1,100000}(?:(?<=\S)(?=[ \n])|\Z)|.{1,100000}")


@functools.cache
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer of that name; V is its `n_vocab`, and END_OF_TEXT its last token.

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


def encode_part(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """Token ids of a part of a text, uint16[n]. Raises as `encode` does."""
    if tokenizer.name in CLOSED:
        known = {token.decode() for token in tokenizer.token_byte_values()}
        for piece in re.findall(PIECES[tokenizer.name], text):
            if piece not in known:
                hint = ": a toy word carries one space before it" if " " in piece else ""
                raise ValueError(f"the {tokenizer.name} tokenizer has no word {piece!r}{hint}")
    try:
        # Not encode_ordinary: without a Python object per token, threads do not queue for the lock.
        return tokenizer.encode_to_numpy(text, disallowed_special=()).astype(TOKEN)
    except UnicodeEncodeError:
        raise ValueError(f"the text {text[:40]!r} is not valid Unicode") from None


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """Token ids of all of a text. Raises ValueError, naming what cannot be a token."""
    ids = []
    for part in PARTS.findall(text):
        ids.extend(encode_part(tokenizer, part).tolist())
    return ids


def decode(tokenizer: tiktoken.Encoding, ids: Iterable[int]) -> str:
    """Text of token ids: END_OF_TEXT is dropped, a mask shows as `___` (a character's as `_`)."""
    pieces = []
    for token in map(int, ids):
        if token == tokenizer.n_vocab:
            small = tokenizer.name in ("bytes", "text8")
            pieces.append(b"_" if small else b" ___" if pieces else b"___")
        elif token != tokenizer.eot_token:
            pieces.append(tokenizer.decode_single_token_bytes(token))
    return b"".join(pieces).decode(errors="replace")


# ------------ 3. Shards ---------------------------------------------------------------------------
#
# A data folder holds meta.json, written first; train_000.bin, train_001.bin, ..., the shards of the
# source files; and val_000.bin. It is complete when all of them are there.

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4  # 256 int32: magic, version, tokens, zeros


def write_json(path: str | Path, value: object) -> None:
    """Replace a JSON file, all or nothing; makes the folder that it lies in."""
    target = Path(path).resolve()  # where a link leads: the link itself stays
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_file():  # /dev/null must not be replaced
        raise ValueError(f"{path} is a folder or a device: choose another file")
    part = target.with_name(f"{target.name}.{os.getpid()}.tmp")  # no other process writes this one
    part.write_text(json.dumps(value, indent=2))
    os.replace(part, target)


def shard_path(folder: str | Path, split: str, number: int) -> Path:
    """Where the shard of a source file lies."""
    return Path(folder) / f"{split}_{number:03d}.bin"


def shard_tokens(path: Path) -> int | None:
    """How many tokens a shard has; None if it is missing, cut or not a shard."""
    if not path.exists():
        return None
    tokens = (path.stat().st_size - HEADER_BYTES) // TOKEN.itemsize
    whole = np.fromfile(path, "<i4", 3).tolist() == [MAGIC, VERSION, tokens]
    return tokens if whole else None


def write_shard(
    path: Path, arrays: Iterable[np.ndarray], val_path: Path | None = None, val_docs: int = 0
) -> None:
    """Write a shard of uint16 arrays, one for each document.

    If `val_path` is given, what `place_cut` holds back goes into that shard instead. Raises
    ValueError for more tokens than an int32 can count.
    """
    ends = array("q", [0])  # how many tokens there are up to the end of each document
    with open(f"{path}.tmp", "wb+") as shard:
        shard.seek(HEADER_BYTES)
        for tokens in arrays:
            shard.write(tokens)
            ends.append(ends[-1] + len(tokens))
        count = place_cut(ends, val_docs) if val_path else ends[-1]
        if count >= 2**31:
            raise ValueError(f"{count} tokens are too many for {path}: cut its source in two")
        if val_path:
            shard.seek(HEADER_BYTES + count * TOKEN.itemsize)
            write_shard(val_path, [np.fromfile(shard, TOKEN)])
            shard.truncate(HEADER_BYTES + count * TOKEN.itemsize)
        shard.seek(0)
        shard.write(np.array([MAGIC, VERSION, count], dtype="<i4"))
    os.replace(f"{path}.tmp", path)


def place_cut(ends: Sequence[int], val_docs: int) -> int:
    """How many tokens are to train on, of documents between these numbers of tokens.

    All but those of the last `val_docs` documents. If that is 0, about nine tenths: up to the end
    of a document, if one ends between 85% and 95%.
    """
    if val_docs >= len(ends) - 1:
        fault = f"the last file has {len(ends) - 1} documents, none left to train on"
        raise ValueError(f"{fault}: lower --val_docs, or 0 for a tenth of the tokens")
    if val_docs:
        return ends[-1 - val_docs]
    target = ends[-1] * 9 // 10
    nearest = min(ends, key=lambda end: abs(end - target))
    if abs(nearest - target) <= ends[-1] / 20:
        return nearest
    say("no document ends near nine tenths of the last file: the cut is in the middle of one")
    return target


def read_meta(folder: str | Path) -> dict:
    """The content of a folder's meta.json."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
    except ValueError:
        meta = None
    if isinstance(meta, dict) and {"tokenizer", "vocab_size", "source"} <= set(meta):
        return meta
    raise ValueError(f"{path} is damaged or not made by data.py: choose another folder")


def claim(folder: str | Path, meta: dict) -> None:
    """Write the meta.json that says what is to be in a folder, before anything else is in it.

    Raises ValueError if the folder holds shards of something else. Only --val_docs may change, up
    to when the last file is finished: a number that was too large must not block the folder.
    """
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file: choose another --out")
    path = Path(folder) / "meta.json"
    old = read_meta(folder) if path.exists() else {}
    if old == meta:
        return
    unfinished = not shard_path(folder, "val", 0).exists()
    goes_on = unfinished and old | {"val_docs": meta["val_docs"]} == meta
    if any(Path(folder).glob("*.bin")) and not goes_on:
        other = "shards of another source, tokenizer or --val_docs"
        raise ValueError(f"{folder} holds {other}: choose another --out")
    write_json(path, meta)


# ------------ 4. Reading --------------------------------------------------------------------------


def open_split(folder: str | Path, split: str) -> tuple[dict, list[tuple[Path, int, int]]]:
    """(meta dictionary, [(path, bytes of header, tokens) of each shard]); split is train or val.

    A nanoGPT folder (headerless train.bin and val.bin) is read as GPT-2 tokens. Raises as `Blocks`.
    """
    folder = Path(folder)
    plain = folder / f"{split}.bin"
    if not (folder / "meta.json").exists():
        if folder.is_file():
            raise ValueError(f"{folder} is a file: run `python data.py {folder}` first")
        if not plain.exists():
            raise FileNotFoundError(f"no {split} tokens in {folder}: run `python data.py --help`")
        if (folder / "meta.pkl").exists():
            # A pickle can run any program, so the vocabulary in it is not read.
            advice = "give data.py the text, with --tokenizer bytes"
            raise ValueError(f"{folder} has a vocabulary of its own (meta.pkl): {advice}")
        meta = dict(tokenizer="gpt2", vocab_size=50257, source=["nanoGPT"])
        return meta, [(plain, 0, plain.stat().st_size // TOKEN.itemsize)]
    meta, shards = read_meta(folder), []
    for number in range(len(meta["source"]) if split == "train" else 1):
        path = shard_path(folder, split, number)
        tokens = shard_tokens(path)
        if tokens is None:
            again = "run the same data.py command again"
            raise FileNotFoundError(f"{path} is missing or damaged: {again}")
        shards.append((path, HEADER_BYTES, tokens))
    return meta, shards


def check_block_size(tokenizer: str, block_size: int) -> None:
    """Raises ValueError for a length that blocks of this tokenizer cannot have."""
    if tokenizer == "toy" and block_size != TOY_LENGTH + 2:
        raise ValueError(f"toy stories need a block_size of {TOY_LENGTH + 2}, not {block_size}")
    if block_size < 3:
        raise ValueError(f"block_size must be at least 3 (END_OF_TEXT twice), not {block_size}")


class Blocks:
    """Training sequences of one split of a data folder, for a DataLoader.

    Item i is Long[block_size] = [EOT] + (block_size - 2) tokens of the stream + [EOT]. Blocks do
    not overlap, and run on from one shard to the next. Raises FileNotFoundError if data are missing
    or damaged; ValueError if they are another program's, or do not fit the block size.
    """

    def __init__(self, folder: str | Path, split: str, block_size: int):
        self.meta, self.shards = open_split(folder, split)
        self.tokenizer, self.vocab_size = self.meta["tokenizer"], self.meta["vocab_size"]
        self.eot, self.block_size = self.vocab_size - 1, block_size
        check_block_size(self.tokenizer, block_size)
        tokens = sum(tokens for _, _, tokens in self.shards)
        self.length = tokens // (block_size - 2)
        if self.length == 0:
            few = f"the {split} split of {folder} has {tokens} tokens"
            raise ValueError(f"{few}, too few for one block of {block_size}: lower --block_size")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Tensor:
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
            folder = path.parent
            raise ValueError(f"{folder} holds token {block.max()}, unknown to {self.tokenizer}")
        return torch.from_numpy(block)


class BatchOrder:
    """Which blocks make up each batch: a function of the step, so an exact resume stores nothing.

    Step s takes the s-th group of `batch_size` blocks (the batch of all ranks together) from a
    permutation drawn anew each epoch; an incomplete last group is left out. Rank r yields number r,
    r + world, r + 2 world, ... of its micro-batches: so 2 processes see what 1 process would see.
    """

    def __init__(
        self,
        n_blocks: int,
        batch_size: int,
        micro_batch: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
    ):
        if batch_size < 1 or micro_batch < 1 or batch_size % (micro_batch * world):
            parts = f"micro_batch {micro_batch} x {world} processes"
            raise ValueError(f"batch_size {batch_size} is not a multiple of {parts}")
        if n_blocks < batch_size:
            raise ValueError(f"only {n_blocks} blocks, less than a batch of {batch_size}")
        self.n_blocks, self.batch_size, self.micro_batch = n_blocks, batch_size, micro_batch
        self.seed, self.rank, self.world, self.start_step = seed, rank, world, start_step

    def __iter__(self) -> Iterator[list[int]]:
        steps = self.n_blocks // self.batch_size  # in an epoch
        epoch, first = divmod(self.start_step, steps)
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.n_blocks)
            groups = order[: steps * self.batch_size].reshape(steps, -1, self.micro_batch)
            for group in groups[first:]:  # [micro-batches of all ranks, micro_batch]
                yield from group[self.rank :: self.world].tolist()
            epoch, first = epoch + 1, 0


# ------------ 5. Documents ------------------------------------------------------------------------
#
# A document is a text that stands for itself: an article, a web page, a paragraph. The content of a
# file says how its documents are told apart; its name does not matter.

# What the readers below raise for a damaged file (RuntimeError: a zip that asks for a password).
DAMAGE = EOFError, RuntimeError, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error
ARCHIVED = "one in each .txt file of the archive"
JSON_LINES = "one in each line of JSON"
MARKED = f"parted by lines of {END_OF_TEXT}"
PARAGRAPHS = "parted by blank lines"


class Unreadable(ValueError):
    """A file has not the content that it should have. If it was downloaded, it is fetched again."""


@contextlib.contextmanager
def open_source(path: str | Path) -> Iterator[BinaryIO]:
    """A source file as a stream of bytes, unpacked.

    Raises Unreadable, here or while the stream is read, if the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            start = file.peek(8)
            if start.startswith(b"PAR1"):
                advice = 'write it as JSON lines with a field "text" (pandas can)'
                raise Unreadable(f"{path} is a Parquet file, which is not read here: {advice}")
            if start.startswith(b"PK\3\4"):
                archive = zipfile.ZipFile(file)
                members = [item for item in archive.infolist() if not item.is_dir()]
                if len(members) != 1:
                    fault = f"is a zip of {len(members)} files"
                    raise Unreadable(f"{path} {fault}: unpack it, and give its texts")
                yield archive.open(members[0])
            elif start.startswith(b"\xfd7zXZ\0"):
                yield lzma.open(file)
            else:
                yield file
    except UnicodeError as error:
        advice = "convert it (iconv -f ENCODING -t UTF-8), or unpack it"
        raise Unreadable(f"{path} is not UTF-8 text ({error.reason}): {advice}") from None
    except DAMAGE as error:
        raise Unreadable(f"{path} is damaged, cut or locked ({error}): get another copy") from None


def text_lines(stream: BinaryIO) -> Iterator[str]:
    """The lines of a UTF-8 text, whatever its line ends; a byte order mark is dropped."""
    return io.TextIOWrapper(stream, "utf-8-sig")


def tell_apart(path: str | Path) -> str:
    """How the documents of a file are told apart: ARCHIVED, JSON_LINES, MARKED or PARAGRAPHS."""
    with open_source(path) as stream, contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(stream.read(tarfile.BLOCKSIZE), "utf-8", "replace")
        return ARCHIVED
    with open_source(path) as stream:
        lines = map(str.strip, text_lines(stream))
        first = next(filter(None, lines), "")
        with contextlib.suppress(ValueError):
            if isinstance(json.loads(first), dict):
                return JSON_LINES
        return MARKED if first == END_OF_TEXT or END_OF_TEXT in lines else PARAGRAPHS


def read_documents(path: str | Path, way: str) -> Iterator[str]:
    """The documents of a file, stripped, not empty; `way` as `tell_apart` says."""
    with open_source(path) as stream:
        if way == ARCHIVED:
            documents = tar_documents(stream)
        elif way == JSON_LINES:
            documents = json_documents(text_lines(stream), path)
        else:
            documents = parted(text_lines(stream), END_OF_TEXT if way == MARKED else "")
        yield from filter(None, map(str.strip, documents))


def parted(lines: Iterator[str], separator: str) -> Iterator[str]:
    """The texts between the lines that hold nothing but the separator."""
    document = []
    for line in lines:
        if line.strip() == separator:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def json_documents(lines: Iterator[str], path: str | Path) -> Iterator[str]:
    """The field "text" of each line."""
    for number, line in enumerate(lines, start=1):
        try:
            text = json.loads(line)["text"] if line.strip() else ""
            yield text.encode(errors="replace").decode()  # JSON can hold halves of a character
        except (ValueError, TypeError, KeyError, AttributeError):
            needed = 'an object with a text in its field "text"'
            raise Unreadable(f"{path}, line {number}: each line of JSON must be {needed}") from None


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


def tar_documents(stream: BinaryIO) -> Iterator[str]:
    """The .txt files of a tar archive, and of the .xz archives in it, as OpenWebText has them."""
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo) as archive:
        for item in filter(tarfile.TarInfo.isfile, archive):
            if item.name.endswith(".txt"):
                text = archive.extractfile(item).read().decode(errors="replace")
                yield re.sub(r"\n{3,}", "\n\n", text)
            elif item.name.endswith(".xz"):
                yield from tar_documents(lzma.open(archive.extractfile(item)))


def read_text(path: str | Path) -> Iterator[str]:
    """The documents of a file of texts; then says how many, and how they were told apart."""
    way, count = tell_apart(path), 0
    for count, document in enumerate(read_documents(path, way), start=1):
        yield document
    if count:
        say(f"{path}: {count:,} document{'' if count == 1 else 's'}, {way}")


def read_openwebtext(path: str | Path) -> Iterator[str]:
    """The documents of a file of OpenWebText. Plain text is refused: it is an error page."""
    if tell_apart(path) not in (ARCHIVED, JSON_LINES):
        raise Unreadable(f"{path} is neither a tar archive nor JSON lines, as OpenWebText is")
    yield from read_text(path)


def read_text8(path: str | Path) -> Iterator[str]:
    """The parts of text8 that published models are trained (90%) and tested (the last 5%) on."""
    with open_source(path) as stream:
        text = "".join(text_lines(stream)).strip("\n")
    strange = re.search("[^a-z ]", text)
    if strange:
        fault = f"which has only a to z and spaces: it holds {strange[0]!r}"
        raise Unreadable(f"{path} is not text8, {fault}")
    if text:
        yield text[: len(text) * 90 // 100]
        yield text[len(text) * 95 // 100 :]


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


def text_blocks(
    path: str | Path, tokenizer: tiktoken.Encoding, block_size: int, corpus: str | None = None
) -> tuple[Tensor, int]:
    """Blocks of a text file as its shards would give them, and how many tokens the text has.

    The blocks are Long[N, block_size]; of a shorter text, one block as long as it needs. `corpus`
    picks the rules of DETOKENIZERS that are applied to each document.
    """
    check_block_size(tokenizer.name, block_size)
    documents = read_documents(path, tell_apart(path))
    for pattern, replacement in DETOKENIZERS[corpus] if corpus else ():
        documents = map(functools.partial(re.sub, pattern, replacement), documents)
    tokens = np.concatenate([*tokenize(documents, tokenizer, path)])
    size = min(block_size - 2, len(tokens))
    n = len(tokens) // size
    body = tokens[: n * size].reshape(n, size)
    framed = np.pad(body, ((0, 0), (1, 1)), constant_values=tokenizer.eot_token)
    return torch.from_numpy(framed.astype(np.int64)), len(tokens)


# ------------ 6. Preparation ----------------------------------------------------------------------
#
# A shard gets its name when all of its source file is tokenised, and that file is never read again.
# So a run can be killed at any moment and repeated: it ends with the same bytes.


def tokenize(
    documents: Iterable[str], tokenizer: tiktoken.Encoding, source: str | Path
) -> Iterator[np.ndarray]:
    """uint16 tokens of each document, and END_OF_TEXT unless the vocabulary is CLOSED, in order.

    All cores encode, while this thread reads on. Raises ValueError, naming the source and the
    document, for what cannot be a token.
    """
    end = np.array([] if tokenizer.name in CLOSED else [tokenizer.eot_token], TOKEN)

    def collect(number: int, parts: list[Future]) -> np.ndarray:
        try:
            return np.concatenate([*(part.result() for part in parts), end])
        except ValueError as error:
            raise ValueError(f"{source}, document {number}: {error}") from None

    number = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = deque()
        for number, text in enumerate(documents, start=1):
            parts = [pool.submit(encode_part, tokenizer, part) for part in PARTS.findall(text)]
            waiting.append((number, parts))
            if len(waiting) > 1000:
                yield collect(*waiting.popleft())
        while waiting:
            yield collect(*waiting.popleft())
    if number == 0:
        raise Unreadable(f"{source} has no text")


def prepare(
    out: str | Path,
    files: list[str | Path],
    read: Callable[[Path], Iterable[str]],
    tokenizer: str,
    val_docs: int,
) -> None:
    """Turn files, given by path or URL, into a folder of shards; `place_cut` explains `val_docs`.

    A download is deleted when its shard is whole, or if it cannot be read. Raises ValueError for a
    file that cannot be read, or a folder with other data.
    """
    if val_docs < 0:
        raise ValueError(f"--val_docs must be at least 0, not {val_docs}")
    encoding, val_shard = get_tokenizer(tokenizer), shard_path(out, "val", 0)
    settings = dict(tokenizer=tokenizer, vocab_size=encoding.n_vocab, val_docs=val_docs)
    claim(out, dict(source=[fingerprint(file) for file in files]) | settings)
    for number, file in enumerate(files):
        shard, last = shard_path(out, "train", number), number == len(files) - 1
        remote = "://" in str(file)
        path = Path(out) / f"download_{Path(file).name}" if remote else Path(file)
        if shard_tokens(shard) is None or (last and shard_tokens(val_shard) is None):
            if remote and not path.exists():
                download(file, path)
            documents = progress(read(path), desc=path.name, unit=" documents")
            tokens = tokenize(documents, encoding, path)
            try:
                write_shard(shard, tokens, val_shard if last else None, val_docs)
            except Unreadable as error:
                if not remote:
                    raise
                path.unlink()
                raise ValueError(f"{error} (from {file}: run again to fetch it again)") from None
        if remote:
            path.unlink(missing_ok=True)


def fingerprint(file: str | Path) -> str:
    """What tells a file from another: name, size and checksum of the first megabyte; or its URL."""
    if not Path(file).is_file():
        return str(file)
    with open(file, "rb") as content:
        start = zlib.crc32(content.read(1 << 20))
    return f"{Path(file).name}, {os.path.getsize(file)} bytes, {start:08x}"


def download(url: str, path: Path) -> None:
    """Fetch a URL to a path. Raises OSError, and makes no such file, if not all of it arrives."""
    say(f"downloading {url}")
    socket.setdefaulttimeout(60)  # urllib sets none, and would wait for ever for a silent server
    with progress(desc=path.name, unit="B", unit_scale=True) as bar:

        def show(number: int, size: int, total: int) -> None:
            bar.total = total if total > 0 else None
            bar.update(size)

        try:
            urllib.request.urlretrieve(url, f"{path}.tmp", show)
        except (OSError, http.client.HTTPException, ValueError) as error:
            advice = "run again, or give a file that you have"
            raise OSError(f"cannot download {url} ({error}): {advice}") from None
    os.replace(f"{path}.tmp", path)


def make_toy(out: str | Path, n_train: int = 20000, n_val: int = 2000, seed: int = 0) -> None:
    """Make toy shards in a folder, unless it has them."""
    stories = toy_stories(n_train + n_val, seed)
    prepare(out, [f"{len(stories)} toy stories of seed {seed}"], lambda _: stories, "toy", n_val)


OWT_URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets"
OWT = [f"{OWT_URL}/urlsf_subset{i:02d}.tar" for i in range(21)]
TEXT8 = ["http://mattmahoney.net/dc/text8.zip"]
SOURCES = {  # what `prepare` is given, where the command line does not say otherwise
    "openwebtext": dict(read=read_openwebtext, files=OWT, tokenizer="gpt2", val_docs=100_000),
    "text8": dict(read=read_text8, files=TEXT8, tokenizer="text8", val_docs=1),
    "text": dict(read=read_text, tokenizer="gpt2", val_docs=0),
}


# ------------ 7. Command line ---------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags, with descriptions as they stand, and with ValueErrors."""

    def __init__(self, description: str, **more):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False, **more)

    def error(self, message: str):
        raise ValueError(message)


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A tqdm progress bar, redrawn twice a second on a terminal, twice a minute in a log."""
    pace = 0.5 if sys.stderr.isatty() else 30
    defaults = dict(mininterval=pace, maxinterval=max(10, pace), dynamic_ncols=True)
    return tqdm(iterable, **defaults | options)


def say(message: str) -> None:
    """A line on stderr, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


def run(main: Callable[[], None]) -> None:
    """Calls main(); a mistake of the user becomes one plain line on stderr, and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as in `python data.py | head -1`: nobody wants the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell says it
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.strerror}: {error.filename or 'the output'}"
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def report(out: str) -> None:
    """Prints what a folder holds, and what to do next."""
    counts = {}
    for split in ("train", "val"):
        meta, shards = open_split(out, split)
        counts[split] = sum(tokens for _, _, tokens in shards)
        print(f"{out}: {counts[split]:,} {meta['tokenizer']} tokens to {split}")
    if not counts["train"] / 200 < counts["val"] < counts["train"]:
        print("note: a lopsided split. The end of the last file is held back: see --val_docs")
    presets = {"data/shakespeare": "shakespeare", "data/text8": "text8", "data/openwebtext": "owt"}
    flags = f"--data {shlex.quote(out)}"
    if out in presets:
        flags = f"--preset {presets[out]}"
    elif meta["tokenizer"] != "toy":
        flags += " --block_size 128 --n_layer 4 --n_embd 128 --batch_size 32"
    print(f"next: python train.py {flags}")


def main(argv: list[str] | None = None) -> None:
    """Makes the folder that the command line asks for; says what is in it and what to do next."""
    parser = Parser(__doc__.partition("\n\nA file")[0])
    text = "toy (default), openwebtext, text8, or a text file"
    parser.add_argument("source", nargs="?", default="toy", help=text)
    parser.add_argument("files", nargs="*", help="files of that source, or more text files")
    parser.add_argument("--out", help="folder to make (default: data/ and the name of the source)")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, help="default: gpt2 (text8: text8)")
    text = "last documents, to validate (openwebtext: 100000; text8: 1; 0: a tenth of the tokens)"
    parser.add_argument("--val_docs", type=int, help=text)
    args = parser.parse_args(argv)
    out = args.out or f"data/{Path(args.source).stem}"
    source, files = args.source, args.files
    if source not in ("toy", "openwebtext", "text8"):
        source, files = "text", [args.source, *files]
    for file in files:
        if "://" not in file and not os.path.isfile(file):
            raise ValueError(f"{file!r} is no file, and not toy, openwebtext or text8")
    given = dict(files=files, tokenizer=args.tokenizer, val_docs=args.val_docs)
    given = {flag: value for flag, value in given.items() if value not in (None, [])}
    if source != "toy":
        prepare(out, **SOURCES[source] | given)
    elif given:
        raise ValueError(f"toy is made in one way only: leave out {', '.join(given)}")
    else:
        make_toy(out)
    report(out)


if __name__ == "__main__":
    run(main)
