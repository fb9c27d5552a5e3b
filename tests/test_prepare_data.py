import base64
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import prepare_data as pd
from model import UsageError, flag
from prepare_data import DataConfig, download, load_data, needle_task, plant, prepare

SCRIPT = Path(pd.__file__)
BYTE = pd.encoding({"tokenizer": "byte"})
TEXT = "".join(f"Line {i} of a träumerei 🙂, with 12345 and more.\n" for i in range(400))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


class Server(http.server.ThreadingHTTPServer):
    """files: path -> bytes. `how` picks one way to misbehave; `asked` records (path, Range)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.how, self.asked = {}, "", []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass  # a client that has seen enough hangs up


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, body = self.server, self.server.files.get(self.path)
        wanted = self.headers.get("Range")
        server.asked.append((self.path, wanted))
        if body is None:
            return self.send_error(404)
        if server.how == "hang":
            time.sleep(0.5)
        start = 0
        if wanted and server.how != "no range":
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(body):
                return self.send_error(416)
            told = 0 if server.how == "wrong range" else start
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {told}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", "text/html" if server.how == "html" else "text/plain")
        if server.how != "no length":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        body = body[start:]
        self.wfile.write(body[: len(body) // 2] if server.how == "cut off" else body)
        return None


@pytest.fixture
def server():
    with Server() as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


def config(tmp_path, *paths, **more):
    return DataConfig(dataset=tuple(map(str, paths)), data_dir=str(tmp_path / "data"), **more)


def documents(tokens, eot=256):
    """The byte strings that the end-of-document ids part; asserts that the last one is closed."""
    assert tokens[-1] == eot
    return [part[1:].astype(np.uint8).tobytes()
            for part in np.split(np.concatenate(([eot], tokens)), np.flatnonzero(tokens == eot) + 1)
            ][:-1]


def folder_of_texts(root, n=60):
    for i in range(n):
        path = root / f"sub{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i} " + "word " * (i * 7 % 50) + "\n")
    return root


def hashes(folder):
    meta = load_data(folder).meta
    return meta["train_sha256"], meta["val_sha256"], meta.get("ranks")


# ---------------------------------------------------------------------------------------- shared


@dataclass
class Flags:
    runs: tuple[str, ...] = flag((), "run folders", positional=True)
    steps: int = flag(10, "how many")
    lr: float = flag(1e-3, "100% the learning rate")
    compile: bool = flag(False, "compile")
    kind: str = flag("a", "which", choices=("a", "b"))
    lengths: tuple[int, ...] = flag((1, 2), "lengths")


def test_only_flags_that_were_given_come_back():
    assert pd.parse_flags([Flags], []) == {}
    given = pd.parse_flags([Flags], ["x", "y", "--steps=1_000", "--lr", "1e-4", "--no-compile",
                                     "--lengths", "3", "4"])
    assert given == dict(runs=("x", "y"), steps=1000, lr=1e-4, compile=False, lengths=(3, 4))


def test_bytes_of_a_command_line_that_are_no_utf8_stay_what_they_are():
    enc = pd.encoding(dict(tokenizer="byte"))
    assert pd.encode(enc, os.fsdecode(b"a\xff")).tolist() == [97, 255]


def test_a_switch_may_be_written_as_nanogpt_writes_it():
    assert pd.parse_flags([Flags], ["--compile=True"]) == dict(compile=True)
    assert pd.parse_flags([Flags], ["--compile=False"]) == dict(compile=False)


def test_two_configs_share_one_command_line():
    given = pd.parse_flags([Flags, DataConfig], ["--dataset", "a", "b", "--kind=b"])
    assert given == dict(dataset=("a", "b"), kind="b")


@pytest.mark.parametrize(("argv", "told"), [
    (["--stesp=3"], "--steps"), (["--step=3"], "--steps"), (["--no-compil"], "--no-compile"),
    (["--lr=nan"], "finite"), (["--lr=inf"], "finite"), (["--steps=1.5"], "1.5"),
    (["--kind=c"], "kind"), (["--zzz"], "--help"),
])
def test_a_bad_flag_is_one_line_with_status_2(argv, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        pd.parse_flags([Flags], argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and ": error: " in err and told in err


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        pd.parse_flags([Flags], ["--help"], description="What it does")
    out = capsys.readouterr().out
    for told in ("What it does", "--steps", "(default: 10)", "100% the", "(default: 1 2)", "runs"):
        assert told in out


@pytest.mark.parametrize(("error", "status", "told"), [
    (UsageError("two\nlines"), 2, "two lines"), (KeyboardInterrupt(), 130, "interrupted")])
def test_run_main_ends_in_one_line(error, status, told, capsys):
    def main(argv):
        raise error
    with pytest.raises(SystemExit) as stopped:
        pd.run_main(main)
    err = capsys.readouterr().err
    assert stopped.value.code == status and err.count("\n") == 1 and told in err
    assert "Traceback" not in err


def test_run_main_lets_a_bug_be_seen():
    with pytest.raises(ZeroDivisionError):
        pd.run_main(lambda argv: 1 / 0)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside(tmp_path, monkeypatch):
    path = tmp_path / "file"
    pd.write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        pd.write_atomically(path, b"new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------- tokenizers


def test_byte_ids_are_the_bytes():
    assert BYTE.decode_bytes(list(range(256))) == bytes(range(256))
    assert pd.encode(BYTE, TEXT).tobytes() == TEXT.encode()
    assert BYTE.encode_ordinary(TEXT) == list(TEXT.encode())
    assert (BYTE.n_vocab, BYTE.eot_token) == (257, 256)
    assert (pd.token_bytes(BYTE) == 1).all()


@pytest.fixture(scope="module")
def bpe():
    stdlib = Path(os.__file__).parent
    source = "".join(path.read_text() for path in sorted(stdlib.glob("[a-h]*.py")))
    started = time.monotonic()
    tokens = pd.train_bpe(source, 2048)
    assert len(tokens) == 2047 and len(set(tokens)) == 2047
    meta = dict(tokenizer="bpe", ranks=[pd.base64.b64encode(t).decode() for t in tokens])
    return pd.encoding(json.loads(json.dumps(meta))), source, time.monotonic() - started


def test_bpe_is_trained_in_seconds_and_compresses(bpe):
    enc, source, seconds = bpe
    assert seconds < 15
    assert len(source.encode()) / len(pd.encode(enc, source)) > 2.8
    assert enc.eot_token == enc.n_vocab - 1 == 2047


@pytest.mark.parametrize("text", ["", "plain", TEXT, "日本 🙂🙂\r\n\t\0 <|endoftext|> é", " " * 99])
def test_bpe_gives_any_text_back(bpe, text):
    ids = pd.encode(bpe[0], text)
    assert bpe[0].decode(ids.tolist()) == text
    assert pd.token_bytes(bpe[0])[ids].sum() == len(text.encode())


@pytest.mark.parametrize(("text", "size", "merged"), [
    ("12 12 12 12", 300, []),  # digits stay single
    ("aaaa aaaa", 9999, [b"aa", b"aaaa"]),  # little text ends early
    ("ab ab ab ab cd cd", 259, [b"ab", b" ab"]),  # the most frequent pair first
])
def test_bpe_merges_as_it_should(text, size, merged):
    assert pd.train_bpe(text, size) == [bytes([i]) for i in range(256)] + merged


def test_gpt2_without_network_names_the_way_out(monkeypatch):
    def offline(name):
        raise ConnectionError("no route")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UsageError, match="TIKTOKEN_CACHE_DIR"):
        pd.encoding({"tokenizer": "gpt2"})


# ---------------------------------------------------------------------------------- local corpora


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_streaming_equals_the_whole(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(pd, "SLICE", 2000)
    text = TEXT + "\n\n  indented\n\n\n" * 40 + TEXT
    (tmp_path / "book.txt").write_text(text)
    data = load_data(prepare(config(tmp_path, tmp_path / "book.txt", tokenizer=tokenizer,
                                    bpe_vocab_size=300)))
    whole = data.enc.decode([*data.train[:-1], *data.val[:-1]])
    assert whole == text and data.train[-1] == data.val[-1] == data.enc.eot_token
    cut = len(data.enc.decode(data.train[:-1]))
    if tokenizer == "byte":
        assert data.train[:-1].tolist() == data.enc.encode_ordinary(text[:cut])
    assert 0.03 < (len(text) - cut) / len(text) < 0.05 + 0.01


def test_a_text_without_line_ends_is_split_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, "SLICE", 50)
    (tmp_path / "one.txt").write_text("é🙂" * 301)
    data = load_data(prepare(config(tmp_path, tmp_path / "one.txt")))
    train, val = documents(data.train)[0].decode(), documents(data.val)[0].decode()
    assert train + val == "é🙂" * 301 and len(val) > 20


def test_every_document_is_kept_and_closed(tmp_path):
    root = folder_of_texts(tmp_path / "texts")
    data = load_data(prepare(config(tmp_path, root)))
    found = sorted(documents(data.train) + documents(data.val))
    assert found == sorted(path.read_bytes() for path in root.rglob("*.txt"))
    assert data.meta["documents"] == 60 == data.meta["source"]["files"]
    assert data.meta["train_bytes"] == data.meta["train_tokens"] == len(data.train)
    for split in ("train", "val"):
        raw = (data.folder / f"{split}.bin").read_bytes()
        assert hashlib.sha256(raw).hexdigest() == data.meta[f"{split}_sha256"]


def test_val_opens_with_its_longest_documents(tmp_path):
    data = load_data(prepare(config(tmp_path, folder_of_texts(tmp_path / "t"), val_frac=0.3)))
    for tokens in (data.train, data.val):
        lengths = [len(document) for document in documents(tokens)]
        assert len(lengths) > 5 and lengths == sorted(lengths, reverse=True)


def test_a_files_split_does_not_depend_on_its_neighbours(tmp_path):
    root = folder_of_texts(tmp_path / "t")
    before = load_data(prepare(config(tmp_path, root, val_frac=0.3, name="a")))
    (root / "another.txt").write_text("another\n")
    after = load_data(prepare(config(tmp_path, root, val_frac=0.3, name="b")))
    assert set(documents(before.val)) <= set(documents(after.val))
    assert set(documents(before.train)) <= set(documents(after.train))


@pytest.mark.parametrize(("sizes", "share"), [
    ((300_000, 2000, 2000, 2000), 0.05), ((300_000, 2000), 0.05), ((40_000, 41_000), 0.5),
    ((300_000, 2000), 0.35),
])
def test_few_or_unlike_files_are_split_by_their_bytes(tmp_path, sizes, share):
    for n in range(12):  # names, which whole files are drawn by
        root = tmp_path / str(n)
        root.mkdir()
        for i, size in enumerate(sizes):
            (root / f"{n}-{i}.txt").write_text(f"line of {i}\n" * (size // 10))
        data = load_data(prepare(config(tmp_path, root, val_frac=share, name=f"d{n}")))
        held = len(data.val) / (len(data.train) + len(data.val))
        assert 0 < held <= min(3 * share, (1 + share) / 2)


def test_two_runs_give_the_same_bytes(tmp_path):
    root = folder_of_texts(tmp_path / "t")
    more = dict(tokenizer="bpe", bpe_vocab_size=280)
    assert hashes(prepare(config(tmp_path, root, name="a", **more))) == hashes(
        prepare(config(tmp_path, root, name="b", **more)))


def test_a_prepared_folder_is_found_and_other_settings_are_refused(tmp_path, capsys):
    root = folder_of_texts(tmp_path / "t")
    folder = prepare(config(tmp_path, root))
    before = (folder / "meta.json").stat().st_mtime_ns
    assert prepare(config(tmp_path, root)) == folder == tmp_path / "data" / "t"
    assert "already" in capsys.readouterr().out
    assert (folder / "meta.json").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="--name"):
        prepare(config(tmp_path, root, val_frac=0.2))


def test_what_another_process_made_meanwhile_is_taken_if_it_is_the_same(tmp_path, monkeypatch):
    root, real = folder_of_texts(tmp_path / "t"), pd.open_corpus

    def beaten(**more):
        def open_corpus(cfg):
            monkeypatch.setattr(pd, "open_corpus", real)
            monkeypatch.setattr(os, "getpid", lambda: 10**6)
            prepare(config(tmp_path, root, name=f"race{len(more)}", **more))
            monkeypatch.undo()
            return real(cfg)
        return open_corpus
    monkeypatch.setattr(pd, "open_corpus", beaten())
    assert prepare(config(tmp_path, root, name="race0")) == tmp_path / "data" / "race0"
    monkeypatch.setattr(pd, "open_corpus", beaten(tokenizer="bpe"))
    with pytest.raises(UsageError, match="other settings"):
        prepare(config(tmp_path, root, name="race1"))
    assert load_data(tmp_path / "data" / "race1").meta["tokenizer"] == "bpe"
    assert sorted(os.listdir(tmp_path / "data")) == ["race0", "race1"]


def test_two_processes_of_one_number_make_one_dataset_or_the_other(tmp_path, monkeypatch):
    root, real, whole = folder_of_texts(tmp_path / "t"), pd.write_tokens, []  # as in two containers

    def write_tokens(path, *args):
        monkeypatch.setattr(pd, "write_tokens", real)
        with open(path, "wb") as half:
            half.write(b"half")
            whole.append(hashes(prepare(config(tmp_path, root, val_frac=0.3))))
            half.write(b"more")
        return real(path, *args)
    monkeypatch.setattr(pd, "write_tokens", write_tokens)
    with pytest.raises(UsageError, match="other settings"):
        prepare(config(tmp_path, root))
    assert hashes(tmp_path / "data" / "t") == whole[0]
    assert os.listdir(tmp_path / "data") == ["t"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error):
    calls = []

    def stop(enc, text):
        calls.append(text)
        if len(calls) > 5:
            raise error
        return np.zeros(3, np.uint8)
    monkeypatch.setattr(pd, "encode", stop)
    with pytest.raises(UsageError if error is OSError else error):
        prepare(config(tmp_path, folder_of_texts(tmp_path / "t")))
    assert len(calls) == 6 and os.listdir(tmp_path / "data") == []


def test_binary_files_in_a_folder_are_skipped_aloud(tmp_path, capsys):
    root = folder_of_texts(tmp_path / "t", 5)
    (root / "nul").write_bytes(b"a\0b")
    (root / "latin").write_bytes(b"caf\xe9 au lait")
    (root / "empty").write_bytes(b"")
    (root / ".hidden").write_text("hidden")
    os.symlink(root / "nowhere", root / "dangling")
    meta = load_data(prepare(config(tmp_path, root))).meta
    assert meta["source"]["files"] == 5 and meta["source"]["skipped"] == 3
    assert "skipped 3 files" in capsys.readouterr().out


def test_a_folder_around_data_dir_is_read_without_it(tmp_path):
    folder_of_texts(tmp_path / "t", 5)
    folder_of_texts(tmp_path / "data" / "downloads", 3)
    assert load_data(prepare(config(tmp_path, tmp_path))).meta["source"]["files"] == 5
    link = tmp_path.with_name("link-to-" + tmp_path.name)
    link.symlink_to(tmp_path)
    again = prepare(config(tmp_path, link, name="linked"))
    assert load_data(again).meta["source"]["files"] == 5


@pytest.mark.parametrize(("content", "told"), [
    (b"a\0b" * 50, "is not text"), (b"caf\xe9 " * 50, "UTF-8"), (b"", "empty"), (None, "no file"),
    (b"ab", "too little text")])
def test_a_named_file_that_cannot_serve_is_refused(tmp_path, content, told):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=told):
        prepare(config(tmp_path, path))
    assert not (tmp_path / "data" / "file").exists()


@pytest.mark.parametrize(("more", "told"), [
    (dict(dataset=("pyton",)), "did you mean python"), (dict(dataset=("python", "x")), "one known"),
    (dict(val_frac=1.0), "val_frac"), (dict(tokenizer="bpe", bpe_vocab_size=10), "bpe_vocab_size"),
    (dict(name="../up"), "--name"), (dict(name="downloads"), "--name"),
    (dict(dataset=("fineweb10B",)), "gpt2"),
    (dict(dataset=("fineweb10B",), tokenizer="gpt2", shards=0), "--shards"),
    (dict(dataset=("pg19",), books=0), "--books"), (dict(tokenizer="words"), "gpt2"),
])
def test_settings_that_cannot_work_are_refused(tmp_path, monkeypatch, more, told):
    monkeypatch.setattr(pd, "python_files", list)
    with pytest.raises(UsageError, match=re.escape(told)):
        prepare(DataConfig(**dict(data_dir=str(tmp_path)) | more))
    assert os.listdir(tmp_path) == []


def test_python_takes_sources_people_wrote(tmp_path, monkeypatch):
    lib, site = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    for name in ("a.py", "b.py", "test/t.py", "encodings/cp1.py", "x/test_y.py", "note.txt",
                 "site-packages/p/q.py", "site-packages/p/tests/r.py",
                 "site-packages/p/_vendor/v.py"):
        (lib / name).parent.mkdir(parents=True, exist_ok=True)
        (lib / name).write_text(f"# {name}\n" * 20)
    (lib / "g.py").write_text("# This file is auto-generated, do not edit\nx = 1\n")
    monkeypatch.setattr(pd.sysconfig, "get_paths",
                        lambda: dict(stdlib=str(lib), purelib=str(site), platlib=str(site)))
    data = load_data(prepare(config(tmp_path, "python")))
    found = {doc.decode().split()[1] for doc in documents(data.train) + documents(data.val)}
    assert found == {"a.py", "b.py", "site-packages/p/q.py"}


def test_python_reads_the_real_standard_library(tmp_path, monkeypatch):
    stdlib = pd.sysconfig.get_paths()["stdlib"]
    monkeypatch.setattr(pd.sysconfig, "get_paths",
                        lambda: dict(stdlib=stdlib, purelib=stdlib, platlib=stdlib))
    data = load_data(prepare(config(tmp_path, "python")))
    assert data.folder.name == "python" and data.meta["train_tokens"] > 5e6
    assert 0.01 < data.meta["val_tokens"] / data.meta["train_tokens"] < 0.2
    assert len(documents(data.val)[0]) > 20_000
    assert any(b"class Thread" in document for document in documents(data.train[:]))


def test_python_stays_under_its_limit(monkeypatch):
    monkeypatch.setattr(pd, "PYTHON_BYTES", 1 << 20)
    assert 0.9 * (1 << 20) < sum(file.stop for file in pd.python_files()) <= 1 << 20


# ---------------------------------------------------------------------- downloads, over loopback


def test_shakespeare_comes_whole_and_is_cached(tmp_path, server, monkeypatch):
    server.files["/input.txt"] = TEXT.encode()
    monkeypatch.setitem(pd.SOURCES, "shakespeare", server.url + "/input.txt")
    monkeypatch.setitem(pd.HASHES, "shakespeare", hashlib.sha256(TEXT.encode()).hexdigest())
    data = load_data(prepare(config(tmp_path, "shakespeare")))
    assert b"".join(documents(data.train) + documents(data.val)).decode() == TEXT
    assert 0.08 < len(data.val) / len(TEXT.encode()) <= 0.1
    prepare(config(tmp_path, "shakespeare", tokenizer="bpe", bpe_vocab_size=300))
    assert len(server.asked) == 1


def archive(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as box:
        for name, content in members.items():
            box.writestr(name.replace("UP_", "../"), content)
    return path.read_bytes()


def test_enwik8_unpacks_its_one_member_and_no_other(tmp_path, server, monkeypatch):
    text = TEXT.encode()
    body = archive(tmp_path / "e.zip", UP_evil="evil", enwik8=text, other="x")
    server.files["/enwik8.zip"] = body
    monkeypatch.setitem(pd.SOURCES, "enwik8", server.url + "/enwik8.zip")
    monkeypatch.setitem(pd.HASHES, "enwik8", hashlib.sha256(body).hexdigest())
    data = load_data(prepare(config(tmp_path, "enwik8")))
    assert b"".join(documents(data.train) + documents(data.val)) == text
    assert sorted(os.listdir(tmp_path / "data/downloads/enwik8")) == ["enwik8", "enwik8.zip"]
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("case", ["no member", "no zip", "encrypted"])
def test_a_wrong_zip_is_refused_in_a_line(tmp_path, case):
    path = tmp_path / "data" / "downloads" / "enwik8" / "enwik8.zip"
    path.parent.mkdir(parents=True)
    archive(path, UP_enwik8="text")
    if case == "no zip":
        path.write_bytes(b"PK no zip")
    if case == "encrypted":
        body = bytearray(archive(path, enwik8="text"))
        body[6] |= 1  # a flag, told before the member and in the directory at the end
        body[body.index(b"PK\1\2") + 8] |= 1
        path.write_bytes(body)
    with pytest.raises(UsageError, match="delete it"):
        prepare(config(tmp_path, "enwik8"))
    assert os.listdir(path.parent) == ["enwik8.zip"]


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, "MAX_BYTES", 100)
    archive(tmp_path / "enwik8.zip", enwik8="0" * 101)
    with pytest.raises(UsageError, match="more than 100 bytes"):
        pd.unzip(tmp_path / "enwik8.zip")
    assert os.listdir(tmp_path) == ["enwik8.zip"]


def test_tinystories_are_documents(tmp_path, server, monkeypatch):
    monkeypatch.setattr(pd, "SLICE", 64)
    stories = [f"Once there was {i}.\n\nThe end of {i}." for i in range(50)]
    for part, some in (("train", stories[:40]), ("valid", stories[40:])):
        server.files[f"/ts-{part}.txt"] = "\n<|endoftext|>\n".join(some).encode()
    monkeypatch.setitem(pd.SOURCES, "tinystories", server.url + "/ts-{part}.txt")
    data = load_data(prepare(config(tmp_path, "tinystories")))
    assert [d.decode() for d in documents(data.train)] == stories[:40]
    assert [d.decode() for d in documents(data.val)] == stories[40:]


def serve_pg19(server, monkeypatch):
    for part, n in (("train", 6), ("validation", 3)):
        names = [f"{part}/{i}.txt" for i in range(n)]
        server.files[f"/{part}_files.txt"] = "\n".join(names).encode()
        server.files |= {f"/{name}": f"{name}\n".encode() * (i + 1) for i, name in enumerate(names)}
    monkeypatch.setitem(pd.SOURCES, "pg19_list", server.url + "/{part}_files.txt")
    monkeypatch.setitem(pd.SOURCES, "pg19", server.url + "/{book}")


def test_pg19_takes_some_books_and_all_of_validation(tmp_path, server, monkeypatch):
    serve_pg19(server, monkeypatch)
    data = load_data(prepare(config(tmp_path, "pg19", books=4)))
    assert len(documents(data.train)) == 4 and len(documents(data.val)) == 3
    assert documents(data.val)[0] == b"validation/2.txt\n" * 3
    more = load_data(prepare(config(tmp_path, "pg19", books=5, name="more")))
    assert set(documents(data.train)) < set(documents(more.train))


def test_a_pg19_list_cannot_lead_elsewhere(tmp_path, server, monkeypatch):
    serve_pg19(server, monkeypatch)
    server.files["/train_files.txt"] = b"train/../../../../evil.txt"
    server.files["/train/../../../../evil.txt"] = b"evil"
    prepare(config(tmp_path, "pg19"))
    assert [path.parent.name for path in tmp_path.rglob("evil.txt")] == ["pg19"]


class FakeGPT2:
    """gpt2's vocabulary needs a network: as many ids, each of two bytes."""
    name, n_vocab, eot_token = "gpt2", 50257, 50256

    def decode_single_token_bytes(self, i):
        return b"xy"


def shard(*ids, count=None, magic=20240520):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids) if count is None else count
    return header.tobytes() + np.array(ids, "<u2").tobytes()


def serve_fineweb(server, monkeypatch):
    server.files = {"/fineweb_val_000000.bin": shard(50256, 1, 2),
                    "/fineweb_train_000001.bin": shard(50256, 3, 4, 50256, 5),
                    "/fineweb_train_000002.bin": shard(6, 7)}
    monkeypatch.setitem(pd.SOURCES, "fineweb10B", server.url + "/fineweb_{shard}.bin")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: FakeGPT2())


def test_fineweb_shards_are_taken_as_they_are(tmp_path, server, monkeypatch):
    serve_fineweb(server, monkeypatch)
    data = load_data(prepare(config(tmp_path, "fineweb10B", tokenizer="gpt2", shards=2)))
    assert data.folder.name == "fineweb10B-gpt2"
    assert data.train.tolist() == [50256, 3, 4, 50256, 5, 6, 7]
    assert data.val.tolist() == [50256, 1, 2] and data.meta["documents"] == 3
    assert data.meta["train_bytes"] == 5 * 2 + 2 * 1


@pytest.mark.parametrize("bad", [shard(1, count=3), shard(1, 2, magic=1), b"short", shard(60000)])
def test_a_broken_shard_is_refused(tmp_path, server, monkeypatch, bad):
    serve_fineweb(server, monkeypatch)
    server.files["/fineweb_train_000001.bin"] = bad
    with pytest.raises(UsageError, match="delete it"):
        prepare(config(tmp_path, "fineweb10B", tokenizer="gpt2"))
    assert os.listdir(tmp_path / "data") == ["downloads"]


BODY = bytes(range(256)) * 40


@pytest.fixture
def fetch(server, tmp_path):
    server.files["/file"] = BODY

    def run(**more):
        return download(server.url + "/file", tmp_path / "sub" / "file", **more).read_bytes()
    return run


def test_a_cut_off_download_resumes_where_it_stopped(server, tmp_path, fetch):
    server.how = "cut off"
    with pytest.raises(UsageError, match=f"{len(BODY) // 2} of {len(BODY)} bytes.*resume"):
        fetch()
    assert os.listdir(tmp_path / "sub") == ["file.part"]
    server.how = ""
    assert fetch(sha256=hashlib.sha256(BODY).hexdigest()) == BODY
    assert server.asked[-1] == ("/file", f"bytes={len(BODY) // 2}-")
    assert os.listdir(tmp_path / "sub") == ["file"]


@pytest.mark.parametrize(("how", "part", "tries"), [
    ("no range", b"stale", 1), ("wrong range", b"stale", 2), ("", BODY + b"more", 2),
    ("no length", b"", 1)])
def test_a_part_that_cannot_be_resumed_starts_over(server, tmp_path, fetch, how, part, tries):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file.part").write_bytes(part)
    server.how = how
    if tries == 2:
        with pytest.raises(UsageError, match="run again|416"):
            fetch()
    assert fetch() == BODY


@pytest.mark.parametrize(("how", "more", "told"), [
    ("html", {}, "web page"), ("", dict(sha256="0" * 64), "sha256"), ("cut off", {}, "cut off"),
])
def test_a_bad_answer_is_one_line_that_names_the_url(server, tmp_path, fetch, how, more, told):
    server.how = how
    with pytest.raises(UsageError, match=told) as stopped:
        fetch(**more)
    line = str(stopped.value)
    assert server.url in line and str(tmp_path / "sub" / "file") in line and "\n" not in line
    assert not (tmp_path / "sub" / "file").exists()
    assert (tmp_path / "sub" / "file.part").exists() == (told == "cut off")


def test_bytes_of_a_shell_that_are_no_text_do_not_stop_a_tokenizer():
    bpe = pd.encoding(dict(tokenizer="bpe", ranks=[base64.b64encode(bytes([i])).decode()
                                                   for i in range(256)]))
    assert bytes(pd.encode(bpe, "a\udcff").tolist()) == "a\ufffd".encode()


def test_two_processes_do_not_fetch_one_file_into_each_other(server, tmp_path, fetch):
    (tmp_path / "sub").mkdir()
    part = tmp_path / "sub" / "file.part"
    part.write_bytes(BODY[:100])
    lock = pd.claim(part.parent, "busy")  # another one's
    with pytest.raises(UsageError, match="another process is fetching"):
        fetch()
    assert part.read_bytes() == BODY[:100]
    os.close(lock)
    assert fetch() == BODY


def test_a_file_that_another_process_just_fetched_is_taken(server, tmp_path, fetch, monkeypatch):
    def claim(path, busy):
        (tmp_path / "sub" / "file").write_bytes(b"theirs")
    monkeypatch.setattr(pd, "claim", claim)
    assert fetch() == b"theirs" and not server.asked
    assert os.listdir(tmp_path / "sub") == ["file"]


def test_a_server_that_never_ends_is_cut_off(server, tmp_path, fetch, monkeypatch):
    monkeypatch.setattr(pd, "MAX_BYTES", len(BODY) - 1)
    with pytest.raises(UsageError, match="longer than"):
        fetch()
    assert not list((tmp_path / "sub").iterdir())


def test_a_silent_server_is_given_up(server, fetch, monkeypatch):
    monkeypatch.setattr(pd, "TIMEOUT", 0.1)
    server.how = "hang"
    with pytest.raises(UsageError, match="timed out"):
        fetch()


def test_a_missing_page_and_a_closed_port_are_told(server, tmp_path):
    with pytest.raises(UsageError, match="404"):
        download(server.url + "/none", tmp_path / "x")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UsageError, match="refused.*check the network"):
        download(f"http://127.0.0.1:{port}/x", tmp_path / "x")


# -------------------------------------------------------------------------------------- load_data


@pytest.fixture
def folder(tmp_path):
    return prepare(config(tmp_path, folder_of_texts(tmp_path / "t"), tokenizer="bpe",
                          bpe_vocab_size=270))


@pytest.mark.parametrize(("spoil", "told"), [
    (lambda f: (f / "val.bin").unlink(), "val.bin"),
    (lambda f: os.truncate(f / "train.bin", 10), "holds 10 bytes"),
    (lambda f: (f / "val.bin").write_bytes(b""), "empty file"),
    (lambda f: (f / "meta.json").unlink(), "meta.json"),
    (lambda f: (f / "meta.json").write_text("{"), "broken"),
    (lambda f: (f / "meta.json").write_text("[]"), "broken"),
    (lambda f: (f / "meta.json").write_text("{}"), "broken"),
    (lambda f: (f / "meta.json").write_text((f / "meta.json").read_text().replace(
        '"vocab_size": ', '"vocab_size": 9')), "contradicts"),
])
def test_a_spoiled_dataset_is_refused_in_a_line(folder, spoil, told):
    load_data(folder)
    spoil(folder)
    with pytest.raises(UsageError, match=told) as stopped:
        load_data(folder)
    assert "\n" not in str(stopped.value)


def test_a_missing_dataset_is_refused(tmp_path):
    with pytest.raises(UsageError, match="run prepare_data.py first"):
        load_data(tmp_path / "none")


# ---------------------------------------------------------------------------------------- planted


def occurrences(row, ids):
    windows = np.lib.stride_tricks.sliding_window_view(row, len(ids))
    return np.flatnonzero((windows == ids).all(1)).tolist()


@pytest.mark.parametrize("name", ["byte", "bpe"])
@pytest.mark.parametrize("depth", [None, 0, 0.3, 1])
def test_needles_are_where_they_say_and_never_overlap(bpe, name, depth):
    enc = BYTE if name == "byte" else bpe[0]
    for seed in range(50):
        rng = np.random.default_rng(seed)
        task = needle_task(enc, rng, questions=1 + seed % 4, held_out=seed % 2 == 1)
        row = np.full(600, enc.eot_token, np.uint16)
        planted = plant(row, task, rng, depth)
        assert planted.row.dtype == row.dtype and planted.row.shape == row.shape
        assert (row == enc.eot_token).all(), "the row given must not change"
        for span, fact in zip(planted.facts, task.facts, strict=True):
            assert (planted.row[span] == fact).all() and len(fact) == span.stop - span.start
            assert span.stop <= planted.tail.start
        ordered = sorted(planted.facts, key=lambda span: span.start)
        assert all(a.stop <= b.start for a, b in zip(ordered, ordered[1:], strict=False))
        outside = np.ones(600, bool)
        for span in (*planted.facts, planted.tail):
            outside[span] = False
        assert (planted.row[outside] == enc.eot_token).all()
        at = planted.tail.start
        for (question, answer), span in zip(task.turns, planted.answers, strict=True):
            assert (planted.row[at : span.start] == question).all()
            assert (planted.row[span] == answer).all()
            at = span.stop
        assert at == planted.tail.stop == 600
        assert planted.asked == [planted.facts[i] for i in task.asked]
        for (_, answer), said, fact in zip(
            task.turns, planted.answers, planted.asked, strict=True
        ):
            found = occurrences(planted.row, answer)
            assert len(found) == 2 and found[1] == said.start
            assert fact.start < found[0] < fact.stop
        if depth is not None:
            room = planted.tail.start - len(task.facts[task.asked[0]])
            assert planted.asked[0].start == round(depth * room)


def test_held_out_questions_share_no_key_and_no_wording_with_the_trained_ones():
    def parts(held_out):
        forms, keys = set(), set()
        for seed in range(300):
            task = needle_task(BYTE, np.random.default_rng(seed), held_out=held_out)
            facts = [BYTE.decode(fact.tolist()) for fact in task.facts]
            same = os.path.commonprefix(facts)  # all of a task have one form
            keys |= {fact[len(same) :][:6] for fact in facts}
            forms |= {re.sub(r"\d{7}", "#", same + fact[len(same) + 6 :]) for fact in facts}
        return forms, keys

    (old, keys), (new, new_keys) = parts(False), parts(True)
    assert len(new) == len(pd.NEW_FORMS) and len(old) > 100 and not old & new
    assert len(keys) > 1000 < len(new_keys) and not keys & new_keys
    assert set("".join(new_keys)) == set(pd.NEW_LETTERS) != set("".join(keys))


def by_key(text):
    """The numbers of the key that the last line asks for, in their order: the next one due."""
    line = text[text.rindex("\n") :]
    key, *given = re.split(r"\d{7}", line)
    return re.findall(re.escape(key) + r"(\d{7})", text[: -len(line)])[len(given)]


def by_chain(text):
    facts = re.findall(r"\n(VAR \w{6}) = (\d{5}|VAR \w{6})\n", text)
    value, given = re.search(r"\nWhat is (\d{5})\? (.*)$", text).groups()
    for _ in range(given.count("VAR") + 1):
        (value,) = (name for name, said in facts if said == value)
    return value


def by_count(text):
    ((word, n), (_, second), *_) = Counter(re.findall(r"\n\* (\w{6})\n", text)).most_common()
    assert (n, second) == (6, 2)
    return word


def by_person(text):
    question = text[text.rindex("\n") + 1 :].strip()
    for fact, asked, _ in pd.RELATIONS:
        person = re.fullmatch(re.escape(asked).replace(r"\{\}", r"(\w+)"), question)
        if person:
            fact = re.escape(fact.format(person[1], "#")).replace(r"\#", r"(\w+)")
            return re.search(rf"\n{fact}\n", text)[1] + "."
    raise AssertionError(question)


ORACLES = dict.fromkeys(pd.TASKS, by_key) | dict(variables=by_chain, words=by_count, qa=by_person)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("name", pd.TASKS)
def test_every_answer_can_be_read_from_its_row(name, held_out):
    """An oracle that sees what stands before an answer, and nothing else, gives all of them."""
    answers = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        task, row = pd.TASKS[name](BYTE, rng, held_out), np.full(1000, ord("."), np.uint16)
        planted = plant(row, task, rng)
        spans = sorted((span.start, span.stop) for span in (*planted.facts, planted.tail))
        assert all(a <= b for (_, a), (b, _) in zip(spans, spans[1:], strict=False))
        for fact, span in zip(task.facts, planted.facts, strict=True):
            assert (planted.row[span] == fact).all()
        for links in task.chains:
            assert all(planted.facts[a].stop <= planted.facts[b].start
                       for a, b in zip(links, links[1:], strict=False))
        for span, (_, answer), fact in zip(planted.answers, task.turns, task.asked, strict=True):
            before, said = (BYTE.decode(x.tolist()) for x in (planted.row[: span.start], answer))
            assert ORACLES[name](before) == said and said in BYTE.decode(task.facts[fact].tolist())
            answers.append(said)
    # No answer is a good guess: whoever always gives the commonest is right as often as chance.
    assert Counter(answers).most_common(1)[0][1] / len(answers) < (0.15 if name == "qa" else 0.03)


def test_several_tasks_in_a_row_are_answered_one_by_one():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        names = rng.permutation(list(pd.TASKS))[:4].tolist()
        task = pd.together([pd.TASKS[name](BYTE, rng) for name in names])
        planted = plant(np.full(4000, ord("."), np.uint16), task, rng)
        turns = [name for name in names for _ in pd.TASKS[name](BYTE, rng).turns]
        assert len(turns) == len(planted.answers)
        for name, span in zip(turns, planted.answers, strict=True):
            before = BYTE.decode(planted.row[: span.start].tolist())
            assert ORACLES[name](before) == BYTE.decode(planted.row[span].tolist())


@pytest.mark.parametrize("name", pd.TASKS)
def test_the_same_seed_gives_the_same_task(name):
    def made(seed):
        task = pd.TASKS[name](BYTE, np.random.default_rng(seed))
        return [fact.tolist() for fact in task.facts], task.asked
    assert made(5) == made(5) != made(6)


def test_question_and_answer_repeat_the_asked_fact(bpe):
    for enc in (BYTE, bpe[0]):
        task = needle_task(enc, np.random.default_rng(1), questions=3)
        assert len(set(task.asked)) == len(task.turns) == 3
        for (question, answer), asked in zip(task.turns, task.asked, strict=True):
            told = np.concatenate((question, answer))
            assert (task.facts[asked][: len(told)] == told).all()
            assert enc.decode(answer).isdigit() and len(enc.decode(answer)) == 7
        assert len({enc.decode(fact) for fact in task.facts}) == 4


def test_depth_0_opens_the_row_and_depth_1_ends_before_the_question():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        task = needle_task(BYTE, rng)
        length = sum(map(len, task.facts)) + sum(map(len, task.turns[0]))
        row = np.zeros(length, np.uint16)  # not one token to spare
        assert plant(row, task, rng, 0).asked[0].start == 0
        planted = plant(row, task, rng, 1)
        assert planted.asked[0].stop == planted.tail.start
        plant(row, task, rng)


def test_the_same_seed_plants_the_same_row():
    def made(seed):
        rng = np.random.default_rng(seed)
        return plant(np.zeros(500, np.uint16), needle_task(BYTE, rng), rng).row.tolist()
    assert made(3) == made(3) != made(4)


def test_a_short_row_is_told_the_length_that_suffices():
    rng = np.random.default_rng(0)
    task = needle_task(BYTE, rng)
    with pytest.raises(UsageError, match=r"(\d+) are needed") as stopped:
        plant(np.zeros(100, np.uint16), task, rng)
    plant(np.zeros(int(re.search(r"(\d+) are", str(stopped.value))[1]), np.uint16), task, rng)
    longest = max(map(len, task.facts))
    tight = sum(map(len, task.facts)) + sum(map(len, task.turns[0]))
    with pytest.raises(UsageError, match=f"{tight + longest} suffice"):
        plant(np.zeros(tight, np.uint16), task, rng, 0.5)
    for _ in range(300):
        plant(np.zeros(tight + longest, np.uint16), task, rng, rng.random())
    with pytest.raises(UsageError, match="different"):
        needle_task(BYTE, rng, n_needles=11, digits=1)
    with pytest.raises(UsageError, match="4 facts are too few for 5"):
        needle_task(BYTE, rng, questions=5)
    with pytest.raises(UsageError, match="depth"):
        plant(np.zeros(900, np.uint16), task, rng, 1.5)


def test_needles_reach_everywhere():
    rng, starts = np.random.default_rng(0), []
    for _ in range(400):
        row = np.zeros(4000, np.uint16)
        starts.append(plant(row, needle_task(BYTE, rng), rng).asked[0].start)
    counts, _ = np.histogram(starts, 4, (0, 4000))
    assert counts.min() > 60 and len({start // 100 for start in starts}) > 35


def test_planting_is_fast_at_any_length():
    rng = np.random.default_rng(0)
    row, long = np.zeros(1024, np.uint16), np.zeros(4_000_000, np.uint16)
    started = time.monotonic()
    for _ in range(300):
        plant(row, needle_task(BYTE, rng), rng)
    assert (time.monotonic() - started) / 300 < 1e-3
    started = time.monotonic()
    plant(long, needle_task(BYTE, rng), rng, 0.5)
    assert time.monotonic() - started < 0.2


# -------------------------------------------------------------------------------------------- CLI


def test_the_script_makes_a_dataset_and_refuses_in_one_line(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)

    def run(*argv):
        return subprocess.run([sys.executable, SCRIPT, *argv], cwd=tmp_path, capture_output=True,
                              text=True)
    made = run("--dataset", "book.txt", "--tokenizer=bpe", "--bpe_vocab_size=300")
    assert made.returncode == 0 and made.stderr == ""
    assert made.stdout.splitlines()[-1].startswith("data/book-bpe: ")
    for argv, told in ((["--dataset=none.txt"], "none.txt"), (["--datset=x"], "--dataset")):
        refused = run(*argv)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert refused.stderr.startswith("prepare_data.py: ") and told in refused.stderr
