"""Tests of data.py: toy language, tokenizers, shards, sources, preparation, downloads, command line."""

import http.server
import io
import itertools
import json
import lzma
import math
import pickle
import re
import tarfile
import threading
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import data

SHARED = Path(__file__).parent.parent / "shared"


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Waiting for the disk guards against power cuts, which are not tested, and takes most of the time."""
    monkeypatch.setattr(data.os, "fsync", lambda descriptor: None)


# ------------------------------------------------------------------------------------------------
# Toy language


def test_toy_language_is_a_distribution_with_the_stated_entropy():
    probabilities = [math.exp(data.toy_log_prob(story)) for story in data.toy_language()]
    assert math.fsum(probabilities) == pytest.approx(1, abs=1e-12)
    # The entropy again, from the sizes of the choice sets alone: the template, and each of its slots.
    size = {slot: len(values) for slot, values in data.TOY_SLOTS.items()} | {"friend": 5}
    slots = [
        {field for field in re.findall(r"{(\w+)}", template) if field in size}
        for template in data.TOY_TEMPLATES
    ]
    n = len(data.TOY_TEMPLATES)
    expected = math.log(n) + sum(math.log(size[slot]) for chosen in slots for slot in chosen) / n
    assert n >= 3 and data.toy_entropy() == pytest.approx(expected, abs=1e-9)
    # No two choices make the same story: as many stories as choices.
    assert len(data.toy_language()) == sum(math.prod(size[slot] for slot in chosen) for chosen in slots)
    assert 3 <= min(size.values()) and max(size.values()) <= 6


def test_toy_stories_follow_the_language():
    stories = data.toy_stories(30000, seed=1)
    assert stories == data.toy_stories(30000, seed=1) != data.toy_stories(30000, seed=2)
    templates = Counter(
        next(w for w in (" has a ", " finds a ", " makes a ") if w in s) for s in stories
    )
    assert len(templates) == 3 and all(abs(n / 30000 - 1 / 3) < 0.02 for n in templates.values())
    assert -np.mean([data.toy_log_prob(story) for story in stories]) == pytest.approx(
        data.toy_entropy(), abs=0.03
    )


def test_toy_validity_notices_every_broken_agreement():
    good = "ben has a black boat. he gives the boat to ann. she likes the black boat."
    assert data.toy_is_valid(good) and data.toy_log_prob(good) == pytest.approx(-math.log(3 * 6 * 5 * 4 * 4))
    for wrong, right in [
        ("he ", "she "),
        ("gives", "sells"),
        ("likes", "keeps"),
        ("she", "he"),
        ("ann", "ben"),
        ("the black", "the red"),
    ]:
        assert not data.toy_is_valid(good.replace(wrong, right, 1)), (wrong, right)
    for bad in ("", good + " ", good[:-1], good + " " + good, good.capitalize()):
        assert data.toy_log_prob(bad) == -math.inf and not data.toy_is_valid(bad)


def test_every_toy_story_has_the_same_length_and_round_trips():
    tokenizer = data.get_tokenizer("toy")
    for story in itertools.islice(data.toy_language(), 0, None, 7):
        ids = data.encode(tokenizer, story)
        assert len(ids) == data.TOY_LENGTH and data.decode(tokenizer, ids) == story
    assert [tokenizer.decode([i]) for i in data.encode(tokenizer, "ben has a black boat.")] == [
        "ben", " has", " a", " black", " boat", ".",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("name, size", [("bytes", 257), ("text8", 28)])
def test_small_tokenizers(name, size):
    tokenizer = data.get_tokenizer(name)
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (size, size - 1)
    text = (
        "the quick brown fox jumps over the lazy dog"
        if name == "text8"
        else "Häß\n\n 世界 <|endoftext|> \0" * 99
    )
    ids = data.encode(tokenizer, text)
    assert len(ids) == len(text.encode()) and data.decode(tokenizer, ids) == text
    assert data.decode(tokenizer, [tokenizer.eot_token, *ids, size]) == text + "_"


def test_masks_and_broken_characters_are_shown():
    toy, raw = data.get_tokenizer("toy"), data.get_tokenizer("bytes")
    ids = data.encode(toy, "ben has a")
    eot, mask = toy.eot_token, toy.n_vocab
    assert data.decode(toy, torch.tensor([eot, *ids, mask, mask, eot])) == "ben has a ___ ___"
    assert data.decode(toy, [mask, *ids[1:]]) == "___ has a"
    assert data.decode(raw, [104, 257, 105, 256, 0xC3]) == "h_i\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "name, text, culprit",
    [
        ("toy", "ben has a yacht.", "' yacht'"),
        ("toy", "Ben has", "'Ben'"),
        ("toy", "ben  has", "' '"),
        ("toy", "ben has ", "' '"),
        ("text8", "Hello", "'H'"),
        ("text8", "a\n", r"'\n'"),
        ("bytes", "\ud800", "Unicode"),
    ],
)
def test_text_that_cannot_be_encoded_is_refused_by_name(name, text, culprit):
    with pytest.raises(ValueError, match=re.escape(culprit)) as error:
        data.encode(data.get_tokenizer(name), text)
    assert "\n" not in str(error.value)


def test_unknown_tokenizer_and_gpt2_without_network(monkeypatch):
    with pytest.raises(ValueError, match="choose one of gpt2, bytes, toy, text8"):
        data.get_tokenizer("gpt3")

    def offline(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(data.tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR") as error:
        data.get_tokenizer.__wrapped__("gpt2")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------
# Shards and blocks


def make_folder(folder, tokens, shard_tokens, name="bytes"):
    splits = {"train": np.asarray(tokens, dtype=data.TOKEN), "val": np.asarray(tokens[:50], dtype=data.TOKEN)}
    data.write_splits(folder, data.get_tokenizer(name), "test", splits, {"train": 1, "val": 1}, shard_tokens)
    return folder


@pytest.mark.parametrize("shard_tokens", [1, 7, 30, 1000])
def test_shards_round_trip_with_blocks_that_span_them(tmp_path, shard_tokens):
    tokens = np.random.default_rng(0).integers(0, 256, 200)
    blocks = data.Blocks(make_folder(tmp_path / "d", tokens, shard_tokens), "train", 32)
    assert (blocks.tokenizer, blocks.vocab_size, blocks.eot, len(blocks)) == ("bytes", 257, 256, 6)
    for i, block in enumerate(blocks):
        assert block.dtype == torch.int64 and block.tolist() == [256, *tokens[i * 30 : (i + 1) * 30], 256]
    assert len(list((tmp_path / "d").glob("train_*.bin"))) == math.ceil(200 / shard_tokens)
    header = np.fromfile(tmp_path / "d" / "train_000000.bin", "<i4", 256)
    assert header[:3].tolist() == [20240520, 1, min(200, shard_tokens)] and not header[3:].any()


def test_blocks_work_in_dataloader_workers_and_pickle_small(tmp_path):
    blocks = data.Blocks(make_folder(tmp_path / "d", np.arange(60000) % 256, 20000), "train", 32)
    blocks[0]
    assert len(pickle.dumps(blocks)) < 5000
    order = data.BatchOrder(len(blocks), 8, 4, seed=0)
    loaded = list(itertools.islice(DataLoader(blocks, batch_sampler=order, num_workers=2), 6))
    expected = [torch.stack([blocks[i] for i in batch]) for batch in itertools.islice(order, 6)]
    assert all(torch.equal(a, b) for a, b in zip(loaded, expected, strict=True))


def damage_cut(folder):
    file = folder / "train_000001.bin"
    file.write_bytes(file.read_bytes()[:-1])


def damage_foreign(folder):
    (folder / "train_000001.bin").write_bytes(b"\x89PNG" + bytes(3000))


def damage_empty(folder):
    (folder / "train_000001.bin").write_bytes(b"")


def damage_lost(folder):
    (folder / "train_000001.bin").unlink()


def damage_meta(folder):
    (folder / "meta.json").write_text('{"tokenizer": ')


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_cut, "train_000001.bin is damaged"),
        (damage_foreign, "train_000001.bin is not a token shard"),
        (damage_empty, "train_000001.bin is not a token shard"),
        (damage_lost, "lacks shards"),
        (damage_meta, "meta.json is damaged"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    folder = make_folder(tmp_path / "d", np.arange(200), 70)
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        data.Blocks(folder, "train", 32)
    assert "\n" not in str(error.value)


def test_blocks_say_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="python data.py"):
        data.Blocks(tmp_path / "nowhere", "train", 32)
    with pytest.raises(FileNotFoundError, match="python data.py"):
        data.Blocks(tmp_path, "train", 32)
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match="progress.json is damaged"):
        data.begin(tmp_path, {})
    with pytest.raises(ValueError, match="unfinished"):
        data.Blocks(tmp_path, "train", 32)
    folder = make_folder(tmp_path / "d", np.arange(200), 70)
    with pytest.raises(ValueError, match="50 val tokens, too few for one block of 53"):
        data.Blocks(folder, "val", 53)
    assert len(data.Blocks(folder, "val", 52)) == 1
    with pytest.raises(ValueError, match="at least 3"):
        data.Blocks(folder, "val", 2)
    with pytest.raises(FileNotFoundError, match="no test shards"):
        data.Blocks(folder, "test", 32)
    foreign = data.Blocks(make_folder(tmp_path / "e", np.full(100, 999), 70), "train", 32)
    with pytest.raises(ValueError, match="token 999, but bytes ends at 256"):
        foreign[0]


def test_nanogpt_folders_are_read(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 100).astype("<u2")
    tokens.tofile(tmp_path / "train.bin")
    blocks = data.Blocks(tmp_path, "train", 12)
    assert (blocks.tokenizer, blocks.vocab_size, blocks.eot, len(blocks)) == ("gpt2", 50257, 50256, 10)
    assert blocks[9].tolist() == [50256, *tokens[90:], 50256]


def test_toy_shards_hold_one_story_per_block(tmp_path):
    meta = data.make_toy(tmp_path / "toy", n_train=300, n_val=40, seed=3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()}
    assert data.make_toy(tmp_path / "toy", n_train=300, n_val=40, seed=3) == meta
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()}
    assert (meta["train_documents"], meta["val_tokens"], meta["separator"]) == (300, 40 * 19, False)
    blocks = data.Blocks(tmp_path / "toy", "train", data.TOY_LENGTH + 2)
    tokenizer = data.get_tokenizer("toy")
    assert [data.decode(tokenizer, block) for block in blocks] == data.toy_stories(340, 3)[:300]
    with pytest.raises(ValueError, match="block_size of 21, not 32"):
        data.Blocks(tmp_path / "toy", "train", 32)
    with pytest.raises(ValueError, match="holds other data"):
        data.make_toy(tmp_path / "toy", seed=4)


# ------------------------------------------------------------------------------------------------
# Batch order


def first(order, n):
    return list(itertools.islice(order, n))


def test_batch_order_is_a_permutation_per_epoch():
    batches = first(data.BatchOrder(23, 4, 4, seed=0), 10)  # 5 steps per epoch, 3 blocks left out
    for epoch in (batches[:5], batches[5:]):
        seen = [i for batch in epoch for i in batch]
        assert len(set(seen)) == 20 and set(seen) <= set(range(23))
    assert batches[:5] != batches[5:]
    assert (
        batches
        == first(data.BatchOrder(23, 4, 4, seed=0), 10)
        != first(data.BatchOrder(23, 4, 4, seed=1), 10)
    )


@pytest.mark.parametrize("step", [1, 4, 5, 12])
def test_batch_order_resumes_at_any_step(step):
    whole = first(data.BatchOrder(23, 4, 2, seed=0), 40)
    assert first(data.BatchOrder(23, 4, 2, seed=0, start_step=step), 8) == whole[2 * step : 2 * step + 8]


def test_batch_order_gives_ranks_what_one_process_would_see():
    alone = first(data.BatchOrder(100, 24, 4, seed=5), 24)  # 6 micro-batches per step
    for world in (2, 3, 6):
        ranks = [
            first(data.BatchOrder(100, 24, 4, seed=5, rank=r, world=world), 24 // world) for r in range(world)
        ]
        assert [batch for together in zip(*ranks, strict=True) for batch in together] == alone


def test_batch_order_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="only 3 blocks"):
        data.BatchOrder(3, 4, 4, seed=0)
    for batch, micro, world in [(4, 3, 1), (4, 4, 2), (0, 1, 1), (4, 0, 1)]:
        with pytest.raises(ValueError, match="not a multiple"):
            data.BatchOrder(100, batch, micro, seed=0, world=world)


# ------------------------------------------------------------------------------------------------
# Text files as blocks


def test_text_blocks_of_txt_and_jsonl(tmp_path):
    raw = data.get_tokenizer("bytes")
    (tmp_path / "a.txt").write_text("abcdefghij\n")
    assert data.text_blocks(tmp_path / "a.txt", raw, 7).tolist() == [
        [256, *b"abcde", 256],
        [256, *b"fghij", 256],
    ]
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n\n{"text": "de", "id": 1}\n')
    assert data.text_blocks(tmp_path / "a.jsonl", raw, 9).tolist() == [[256, *b"abc", 256, *b"de", 256, 256]]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b" \n", "is empty"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.txt", b"abc", "3 tokens, too few for one block of 8"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "abc"}\n{"text": 3}\n', "line 2"),
        ("a.jsonl", b'{"text": "abc"}\n\n{"txt": ""}\n', "line 3"),
        ("a.jsonl", b'{"text": "abc"', "line 1"),
        ("a.jsonl", b"[1]", "line 1"),
    ],
)
def test_text_blocks_refuse_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        data.text_blocks(tmp_path / name, data.get_tokenizer("bytes"), 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, tokenised, text",
    [
        (
            "wikitext",
            " = = Life = = \n a two @-@ part role , 1 @,@ 000",
            "== Life ==\na two-part role, 1,000",
        ),
        ("wikitext", 'the " Teddy \'s Story " ( 24 in ) .', 'the "Teddy\'s Story" (24 in).'),
        ("wikitext", "he didn 't say <unk> ; $ 5", "he didn't say <unk>; $5"),
        ("ptb", "it did n't rise N % to $ N in <unk>", "it didn't rise 1% to $1 in ?"),
        ("ptb", "the boys ' game \\/ it 's on", "the boys' game / it's on"),
        ("lm1b", 'He said , " I do n\'t know . "', 'He said, "I don\'t know."'),
        ("lm1b", "see http : / / a.com ( now ) -- it 's 5 % !", "see http://a.com (now) -- it's 5%!"),
    ],
)
def test_detokenizers(name, tokenised, text):
    assert data.DETOKENIZERS[name](tokenised) == text
    assert data.DETOKENIZERS[name](text) == text


# ------------------------------------------------------------------------------------------------
# Sources


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def member_xz(texts, prefix="0"):
    return lzma.compress(tar_of({f"{prefix}-{i}.txt": text for i, text in enumerate(texts)}))


def texts_of(n, seed=0):
    rng = np.random.default_rng(seed)
    return [bytes(rng.integers(97, 123, rng.integers(1, 60)).astype(np.uint8)) for _ in range(n)]


def write_archive(path, members):
    path.write_bytes(tar_of({f"openwebtext/m{i}_data.xz": member for i, member in enumerate(members)}))
    return str(path)


def read_archives(*paths, start=(0, 0, 0)):
    return list(data.archive_documents(paths.__getitem__, len(paths), start))


def test_all_openwebtext_layouts_give_the_same_documents(tmp_path):
    texts = texts_of(12)
    members = [member_xz(texts[:5]), member_xz(texts[5:])]
    outer = Path(write_archive(tmp_path / "a.tar", members))
    (tmp_path / "a.tar.xz").write_bytes(lzma.compress(outer.read_bytes()))
    (tmp_path / "m.xz").write_bytes(member_xz(texts))
    raw = tar_of({"a.txt": b"one", "b.txt": b"two"})
    (tmp_path / "two.xz").write_bytes(lzma.compress(raw[:700]) + lzma.compress(raw[700:]))  # two xz streams
    for name in ("a.tar", "a.tar.xz", "m.xz"):
        assert [text.encode() for _, text in read_archives(tmp_path / name)] == texts
    assert [text for _, text in read_archives(tmp_path / "two.xz")] == ["one", "two"]


def test_documents_are_cleaned_and_places_resume(tmp_path):
    members = [member_xz([b" a\n\n\n\n\nb\n\nc\n", b"\n\n", "é".encode()]), member_xz([b"x", b"y"])]
    path = write_archive(tmp_path / "a.tar", members)
    documents = read_archives(path, path)
    assert [text for _, text in documents] == ["a\n\nb\n\nc", "é", "x", "y"] * 2
    for i, (place, _) in enumerate(documents):
        assert read_archives(path, path, start=place) == documents[i:]


def test_damaged_members_are_skipped_and_counted(tmp_path, capsys):
    good, texts = member_xz([b"good"]), texts_of(400)
    whole = member_xz(texts)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    bad = [
        whole[: len(whole) // 2],
        bytes(flipped),
        b"not xz at all" * 99,
        member_xz([b"fine", b"\xff\xfe"]),
        b"",
    ]
    path = write_archive(tmp_path / "a.tar", [good, *bad, good])
    documents = [text for _, text in read_archives(path)]
    assert documents[0] == documents[-1] == "good" and "fine" in documents
    assert documents.count(None) == 5
    report = capsys.readouterr().err
    assert report.count("skipped") == 5 and all(f"m{i}_data.xz" in report for i in range(1, 6))
    data.main(["openwebtext", path, "--out", str(tmp_path / "o"), "--tokenizer", "bytes", "--val_docs", "1"])
    assert data.read_meta(tmp_path / "o")["skipped"] == 5
    assert "5 damaged pieces skipped" in capsys.readouterr().out


def cut(n):
    return lambda raw: raw[:n]


def spoil_header(raw):
    second = raw.index(b"openwebtext/m1")
    return raw[:second] + b"\xff" * 512 + raw[second + 512 :]


@pytest.mark.parametrize(
    "spoil, compress",
    [
        (lambda raw: b"<html>404</html>" * 100, False),
        (lambda raw: b"", False),
        (lambda raw: tar_of({"readme.md": b"hello"}), False),
        (spoil_header, False),
        (cut(1024 + 300), False),
        (cut(2048), False),  # exactly between two members
        (cut(2500), False),
        (lambda raw: lzma.compress(raw)[:-200], True),
        (lambda raw: lzma.compress(raw)[:300] + b"\0" * 50 + lzma.compress(raw)[350:], True),
    ],
)
def test_damaged_archives_are_errors_that_name_them(tmp_path, spoil, compress):
    raw = Path(
        write_archive(tmp_path / "a.tar", [member_xz(texts_of(9, seed)) for seed in range(3)])
    ).read_bytes()
    (tmp_path / "bad.tar").write_bytes(spoil(raw))
    with pytest.raises(ValueError, match="bad.tar") as error:
        read_archives(tmp_path / "bad.tar")
    assert "\n" not in str(error.value)


def test_text_files_are_split_into_documents(tmp_path):
    (tmp_path / "blank.txt").write_text("one\nstill one\n \n\n  two\n\n\n")
    (tmp_path / "marked.txt").write_text("a\n\nb<|endoftext|>c<|endoftext|>\n<|endoftext|>d")
    paths = [tmp_path / "blank.txt", tmp_path / "marked.txt"]
    documents = list(data.text_documents(paths))
    assert [text for _, text in documents] == ["one\nstill one", "two", "a\n\nb", "c", "d"]
    for i, (place, _) in enumerate(documents):
        assert list(data.text_documents(paths, place)) == documents[i:]


@pytest.mark.skipif(
    not (SHARED / "owt_layout").exists(), reason="the sample archives are not beside the repository"
)
def test_the_real_archives(tmp_path):
    paths = sorted((SHARED / "owt_layout").glob("*.tar"))
    documents = read_archives(*paths)
    assert len(documents) > 1000 and all(text and text == text.strip() for _, text in documents)
    with tarfile.open(paths[-1]) as outer:
        last = outer.extractfile(outer.getnames()[-1])
        with tarfile.open(fileobj=last, mode="r:xz") as inner:
            expected = inner.extractfile(inner.getmembers()[-1]).read().decode()
    assert re.sub(r"\n\n\n+", "\n\n", expected).strip() == documents[-1][1]


# ------------------------------------------------------------------------------------------------
# Preparation


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_prepared_shards_hold_the_documents_in_order(tmp_path):
    texts = texts_of(50)
    path = write_archive(tmp_path / "a.tar", [member_xz(texts[:20]), member_xz(texts[20:])])
    data.main(
        ["openwebtext", path, "--out", str(tmp_path / "o"), "--tokenizer", "bytes", "--val_docs", "7"]
        + ["--shard_tokens", "100"]
    )
    meta = data.read_meta(tmp_path / "o")
    stream = {"train": [*texts[:43]], "val": [*texts[43:]]}
    for split, documents in stream.items():
        expected = [token for text in documents for token in [*text, 256]]
        shards = sorted((tmp_path / "o").glob(f"{split}_*.bin"))
        found = np.concatenate([np.fromfile(shard, "<u2", offset=1024) for shard in shards])
        assert found.tolist() == expected
        assert (meta[f"{split}_tokens"], meta[f"{split}_documents"]) == (len(expected), len(documents))
        assert all(data.shard_length(shard) == 100 for shard in shards[:-1])
    assert meta["complete"] and meta["separator"] and not list((tmp_path / "o").glob("*.tmp"))
    assert not (tmp_path / "o" / "progress.json").exists()


class Killed(BaseException):
    """Stands for SIGKILL: no handler of data.py catches it, and nothing is cleaned up after it."""


@pytest.mark.parametrize("shard_tokens, val_docs", [(100, 7), (40, 30), (500, 1)])
def test_killed_at_any_rename_the_second_run_ends_with_the_same_bytes(
    tmp_path, monkeypatch, shard_tokens, val_docs
):
    texts = texts_of(60)
    members = [member_xz(texts[:15]), member_xz(texts[15:40])[:-60], member_xz([b"\xff", *texts[40:]])]
    archives = [write_archive(tmp_path / f"{name}.tar", members) for name in "ab"]
    options = dict(tokenizer="bytes", val_docs=val_docs, shard_tokens=shard_tokens, base_url="", keep=False)
    data.prepare_openwebtext(archives, tmp_path / "whole", **options)
    whole = contents(tmp_path / "whole")
    assert json.loads(whole["meta.json"])["skipped"] == 4

    real, renames, deadline = data.os.replace, [], math.inf

    def replace(source, target):
        renames.append(target)
        if len(renames) > deadline:
            raise Killed
        real(source, target)

    monkeypatch.setattr(data.os, "replace", replace)
    data.prepare_openwebtext(archives, tmp_path / "count", **options)
    n = len(renames)  # every shard, every progress.json, meta.json
    for point in sorted({0, 1, 2, *range(3, n, max(1, n // 4)), n - 2, n - 1}):
        out = tmp_path / f"killed{point}"
        renames, deadline = [], point
        with pytest.raises(Killed):
            data.prepare_openwebtext(archives, out, **options)
        assert not (out / "meta.json").exists()
        deadline = math.inf
        data.prepare_openwebtext(archives, out, **options)
        assert contents(out) == whole, point


def test_a_resumed_run_does_not_start_over(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n\n".join(text.decode() for text in texts_of(200)))
    options = dict(tokenizer="bytes", val_docs=5, shard_tokens=300)
    real, saved = data.write_json, []

    def write_json(path, value):
        real(path, value)
        saved.append(value)
        if value.get("shards") == 10:
            raise Killed

    monkeypatch.setattr(data, "write_json", write_json)
    with pytest.raises(Killed):
        data.prepare_text([tmp_path / "a.txt"], tmp_path / "o", **options)
    monkeypatch.setattr(data, "write_json", real)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").glob("train_*.bin")}
    encoded = []
    encode_array = data.encode_array
    monkeypatch.setattr(data, "encode_array", lambda t, text: encoded.append(text) or encode_array(t, text))
    meta = data.prepare_text([tmp_path / "a.txt"], tmp_path / "o", **options)
    assert len(encoded) == 200 - saved[-1]["documents"] < 150 and meta["train_documents"] == 195
    assert len(written) == 10
    assert all((tmp_path / "o" / name).stat().st_mtime_ns == when for name, when in written.items())


def test_other_settings_or_sources_are_refused_after_an_interruption(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n\n".join([name * 9] * 90))
    options = dict(tokenizer="bytes", val_docs=5, shard_tokens=100)
    monkeypatch.setattr(data, "complete", lambda *args, **more: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        data.prepare_text([tmp_path / "a.txt"], tmp_path / "o", **options)
    monkeypatch.undo()
    before = contents(tmp_path / "o")
    for change in (dict(val_docs=6), dict(shard_tokens=99)):
        with pytest.raises(ValueError, match=f"unfinished run with another {next(iter(change))}"):
            data.prepare_text([tmp_path / "a.txt"], tmp_path / "o", **options | change)
    with pytest.raises(ValueError, match="another source"):
        data.prepare_text([tmp_path / "b.txt"], tmp_path / "o", **options)
    assert contents(tmp_path / "o") == before


def test_a_mistake_before_the_first_shard_can_be_mended(tmp_path, capsys):
    (tmp_path / "bad.tar").write_text("no archive")
    good = write_archive(tmp_path / "a.tar", [member_xz(texts_of(9))])
    common = ["--out", str(tmp_path / "o"), "--tokenizer", "bytes"]
    error_of(capsys, "openwebtext", tmp_path / "bad.tar", *common)
    error_of(capsys, "openwebtext", good, *common)  # 100,000 validation documents
    data.main(["openwebtext", good, *common, "--val_docs", "2"])
    assert data.read_meta(tmp_path / "o")["train_documents"] == 7


def test_tokenisation_keeps_order_and_agrees_with_encode():
    tokenizer = data.get_tokenizer("bytes")
    texts = [text.decode() * 50 for text in texts_of(300)]
    texts[7] = None
    result = list(data.tokenize((((0, 0, i), text) for i, text in enumerate(texts)), tokenizer))
    assert [place[2] for place, _ in result] == list(range(300))
    for text, (_, tokens) in zip(texts, result, strict=True):
        assert tokens is None if text is None else tokens.tolist() == [*data.encode(tokenizer, text), 256]


def test_text8_is_split_by_character(tmp_path, capsys):
    text = "".join(np.random.default_rng(0).choice(list(data.TEXT8_CHARACTERS), 1000))
    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
        archive.writestr("text8", text)
    (tmp_path / "text8").write_text(text + "\n")
    for name in ("text8", "text8.zip"):
        data.main(
            ["text8", str(tmp_path / name), "--out", str(tmp_path / f"{name}-out"), "--shard_tokens", "300"]
        )
        found = ""
        for split, n in (("train", 900), ("val", 50), ("test", 50)):
            blocks = data.Blocks(tmp_path / f"{name}-out", split, 52)
            assert len(blocks) == n // 50
            found += "".join(data.decode(data.get_tokenizer("text8"), block) for block in blocks)
        assert found == text
    (tmp_path / "bad").write_text("Hello there " * 9)
    with pytest.raises(ValueError, match="0x48 at 0"):
        data.prepare_text8([tmp_path / "bad"], tmp_path / "o", shard_tokens=9, base_url="", keep=False)


# ------------------------------------------------------------------------------------------------
# Download


@pytest.fixture
def server(monkeypatch):
    """A local HTTP server: `files` are what it serves, `faults` what goes wrong with the next requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            fault = self.server.faults.pop(0) if self.server.faults else None
            body = self.server.files.get(self.path)
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            self.server.requests.append((self.path, int(wanted[1]) if wanted else 0))
            if body is None or isinstance(fault, int):
                return self.send_error(fault or 404)
            start = int(wanted[1]) if wanted and self.server.ranges else 0
            if wanted and start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                return self.end_headers()
            self.send_response(206 if wanted and self.server.ranges else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            rest = body[start:]
            self.wfile.write(rest[: len(rest) // 2] if fault == "cut" else b"" if fault == "drop" else rest)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.faults, server.requests, server.ranges = {}, [], [], True
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(data, "RETRY_DELAYS", (0, 0, 0))
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


BODY = np.random.default_rng(0).bytes(200_000)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("faults", [[], ["cut"], ["drop", "cut"], [500, "cut", 503], ["cut", "cut", 500]])
def test_download_survives_bad_connections(tmp_path, server, faults, ranges):
    server.files["/a.tar"], server.faults, server.ranges = BODY, list(faults), ranges
    path = data.download(f"{server.url}/a.tar", tmp_path)
    assert path.read_bytes() == BODY and [p.name for p in tmp_path.iterdir()] == ["a.tar"]
    if ranges and faults == ["cut"]:
        assert server.requests == [("/a.tar", 0), ("/a.tar", 100_000)]
    n = len(server.requests)
    assert data.download(f"{server.url}/a.tar", tmp_path) == path and len(server.requests) == n


def test_download_continues_a_part_after_a_restart(tmp_path, server):
    server.files["/a.tar"] = BODY
    (tmp_path / "a.tar.part").write_bytes(BODY[:150_000])
    assert data.download(f"{server.url}/a.tar", tmp_path).read_bytes() == BODY
    assert server.requests == [("/a.tar", 150_000)]


@pytest.mark.parametrize("part", [BODY, BODY + b"too long"])
def test_download_with_a_part_that_is_whole_or_too_long(tmp_path, server, part):
    server.files["/a.tar"] = BODY
    (tmp_path / "a.tar.part").write_bytes(part)
    assert data.download(f"{server.url}/a.tar", tmp_path).read_bytes() == BODY


def test_download_counts_failures_afresh_when_the_file_grows(tmp_path, server):
    server.files["/a.tar"], server.faults = BODY, ["cut"] * 9
    assert data.download(f"{server.url}/a.tar", tmp_path / "r").read_bytes() == BODY
    server.ranges, server.faults = False, ["cut"] * 9  # always the same half: no progress
    with pytest.raises(OSError, match="the connection ended at 100000 of 200000 bytes"):
        data.download(f"{server.url}/a.tar", tmp_path / "n")
    assert len(server.requests) == 10 + 4


def test_download_gives_up_in_one_line(tmp_path, server):
    server.files["/a.tar"] = BODY
    with pytest.raises(OSError, match="404.*--base_url"):
        data.download(f"{server.url}/b.tar", tmp_path)
    assert len(server.requests) == 1  # asking again would not help
    server.faults = ["cut"] + [500] * 9
    with pytest.raises(OSError, match="500.*run again to continue"):
        data.download(f"{server.url}/a.tar", tmp_path)
    assert (tmp_path / "a.tar.part").stat().st_size == 100_000 and not (tmp_path / "a.tar").exists()
    assert len(server.requests) == 1 + 4


def test_openwebtext_downloads_and_deletes_as_it_goes(tmp_path, server, monkeypatch, capsys):
    texts = texts_of(60)
    monkeypatch.setattr(data, "OWT_ARCHIVES", ["s0.tar", "s1.tar", "s2.tar"])
    paths = [
        write_archive(tmp_path / f"s{i}.tar", [member_xz(texts[20 * i : 20 * i + 20])]) for i in range(3)
    ]
    server.files = {f"/s{i}.tar": Path(path).read_bytes() for i, path in enumerate(paths)}
    server.faults = ["cut", 500]
    options = ["--tokenizer", "bytes", "--val_docs", "3", "--shard_tokens", "100"]
    seen = []
    real = data.download
    monkeypatch.setattr(
        data,
        "download",
        lambda url, folder: seen.append(sorted(p.name for p in folder.glob("*"))) or real(url, folder),
    )
    out = tmp_path / "o"
    data.main(["openwebtext", "--base_url", server.url, "--out", str(out), *options])
    assert not list((out / "download").iterdir())
    data.main(["openwebtext", "--base_url", server.url, "--out", str(tmp_path / "k"), "--keep", *options])
    assert sorted(p.name for p in (tmp_path / "k" / "download").iterdir()) == ["s0.tar", "s1.tar", "s2.tar"]
    data.main(["openwebtext", *paths, "--out", str(tmp_path / "local"), *options])
    for name, content in contents(tmp_path / "local").items():
        if name != "meta.json":
            assert (out / name).read_bytes() == content == (tmp_path / "k" / name).read_bytes()
    assert data.Blocks(out, "val", 10).meta["source"] == ["s0.tar", "s1.tar", "s2.tar"]


# ------------------------------------------------------------------------------------------------
# Command line


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        data.main([str(arg) for arg in argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    lines = [line for line in re.split(r"[\r\n]+", error) if line and not line.startswith("tokenising:")]
    assert len(lines) == 1 and lines[0].startswith("data.py: error: "), error
    return lines[0]


def test_command_line_errors_are_one_line_and_change_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("one\n\ntwo\n")
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes(b"caf\xe9\n\nx\n\ny\n")
    Path("not.tar").write_text("hello" * 999)
    Path("foreign").mkdir()
    Path("foreign/train_000000.bin").write_bytes(b"precious")
    before = contents("foreign")
    raw = ("--tokenizer", "bytes")
    for argv, message in [
        (["--val_doc", 3], "--val_doc"),
        (["--nonsense"], "--nonsense"),
        (["two.txt", "--tokenizer", "toy"], "toy"),
        (["toy", "--val_docs", 3], "--val_docs does not apply to toy"),
        (["text8", "--tokenizer", "bytes"], "--tokenizer does not apply to text8"),
        (["toy", "two.txt"], "two.txt"),
        (["nowhere.txt"], "no such file: nowhere.txt"),
        (["two.txt", "--val_docs", "many"], "many"),
        (["two.txt", *raw, "--val_docs", 2], "only 2 document"),
        (["two.txt", *raw, "--val_docs", 0], "at least 1"),
        (["two.txt", *raw, "--shard_tokens", 0], "at least 1"),
        (["empty.txt", *raw], "only 0 document"),
        (["latin.txt", *raw], "latin.txt is not UTF-8"),
        (["openwebtext", "not.tar", *raw], "not.tar is damaged"),
        (["text8", "two.txt", "--out", "t8"], "two.txt is not text8"),
        (["two.txt", *raw, "--out", "foreign"], "another origin"),
        (["toy", "--out", "foreign"], "another origin"),
    ]:
        assert message in error_of(capsys, *argv), argv
    assert contents("foreign") == before


def test_command_line_makes_data_and_never_overwrites_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main([])
    out = capsys.readouterr().out
    assert "20,000" in out and out.endswith("next: python train.py\n")
    data.main(["toy"])  # quietly used again
    Path("mine.txt").write_text("\n\n".join("abcdefghijklmnopqrst"))
    data.main(["mine.txt", "--tokenizer", "bytes"])
    assert capsys.readouterr().out.endswith("next: python train.py --data data/mine\n")
    meta = data.read_meta("data/mine")
    assert (meta["train_documents"], meta["val_documents"], meta["tokenizer"]) == (18, 2, "bytes")
    before = contents("data/mine")
    assert "complete already" in error_of(capsys, "mine.txt", "--tokenizer", "bytes")
    assert contents("data/mine") == before
