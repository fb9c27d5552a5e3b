"""Text in, token files out: what a corpus becomes, what is refused, and what stays behind."""

import http.server
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import prepare_data as pd
from model import UsageError, flag
from prepare_data import DataConfig, load_data, prepare

SCRIPT = Path(pd.__file__)
BYTE = pd.encoding("byte")
TEXT = "".join(f"Line {i} of a träumerei 🙂, with 12345 and more.\n" for i in range(400))
ODD = ["", "plain", TEXT, "日本 🙂🙂\r\n\t <|endoftext|> é", "\ufffe" + " " * 99]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a file's split is drawn from its path as it is named


def config(tmp_path, *dataset, **more):
    names = tuple(os.path.relpath(name) for name in dataset)
    return DataConfig(dataset=names, data_dir=str(tmp_path / "data"), **more)


def made(tmp_path, *dataset, **more):
    return load_data(prepare(config(tmp_path, *dataset, **more)))


def documents(tokens, eot=256):
    """The byte strings between the end-of-document ids. Asserts that the last one has its end."""
    assert tokens[-1] == eot
    parts = np.split(tokens, np.flatnonzero(tokens == eot) + 1)[:-1]
    return [part[:-1].astype(np.uint8).tobytes() for part in parts]


def folder_of_texts(root, n=60):
    for i in range(n):
        path = root / f"sub{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i}\n" + "some words\n" * (i * 7 % 50))
    return root


@pytest.fixture
def gpt2(monkeypatch):
    """A vocabulary of GPT-2's size and name, without the network: bytes first, then pairs."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes([7, i // 256, i % 256]): 256 + i for i in range(50000)}
    made = tiktoken.Encoding(
        "gpt2", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: made)
    return made


# ---- Tokenizers


@pytest.mark.parametrize("name", ["byte", "gpt2"])
@pytest.mark.parametrize("text", ODD, ids=range(5))
def test_a_tokenizer_gives_any_text_back(gpt2, name, text):
    enc = pd.encoding(name)
    ids = pd.encode(enc, text)
    assert ids.ndim == 1 and enc.decode(ids.tolist()) == text
    assert pd.count_bytes(enc, ids) == len(text.encode())


def test_a_byte_is_its_own_id_and_a_document_ends_in_256():
    assert (BYTE.n_vocab, BYTE.eot_token) == (257, 256)
    assert pd.encode(BYTE, TEXT).tobytes() == TEXT.encode()
    assert BYTE.encode_ordinary("é\n") == list("é\n".encode())
    assert pd.count_bytes(BYTE, np.array([256, 97, 256])) == 3


def test_bytes_of_a_shell_that_are_not_utf8_survive(gpt2):
    text = os.fsdecode(b"a\xff")
    assert pd.encode(BYTE, text).tolist() == [97, 255]
    assert gpt2.decode(pd.encode(gpt2, text).tolist()) == "a\ufffd"


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("hash mismatch")])
def test_gpt2_without_its_vocabulary_names_the_ways_out(monkeypatch, error):
    def offline(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UsageError, match="TIKTOKEN_CACHE_DIR.*--tokenizer=byte"):
        pd.encoding("gpt2")


def test_another_tokenizer_is_refused():
    with pytest.raises(UsageError, match="--tokenizer=bpe: choose byte or gpt2"):
        pd.encoding("bpe")


# ---- From files to documents


def test_every_document_is_kept_and_closed_and_long_ones_come_first(tmp_path):
    root = folder_of_texts(tmp_path / "texts", 300)
    data = made(tmp_path, root, val_frac=0.3)
    splits = [documents(data.train), documents(data.val)]
    assert sorted(splits[0] + splits[1]) == sorted(p.read_bytes() for p in root.rglob("*.txt"))
    for split in splits:
        lengths = [len(document) for document in split]
        assert lengths == sorted(lengths, reverse=True)


def test_text_and_its_cut_rejoin_whatever_the_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, "SLICE", 1000)
    path = tmp_path / "book.txt"
    path.write_bytes((TEXT + "\r\n\n  indented <|endoftext|>\n" * 40 + TEXT).encode())
    data = made(tmp_path, path)
    train, val = documents(data.train)[0], documents(data.val)[0]
    assert train + val == path.read_bytes()
    assert train.endswith(b"\n"), "the cut is at a line end"
    assert 0.04 < len(val) / path.stat().st_size <= 0.05


def test_a_text_without_line_ends_is_cut_between_characters(tmp_path):
    (tmp_path / "one.txt").write_text("é🙂" * 301)
    data = made(tmp_path, tmp_path / "one.txt")
    train, val = documents(data.train)[0].decode(), documents(data.val)[0].decode()
    assert train + val == "é🙂" * 301 and len(val) == 30


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert documents(made(tmp_path, tmp_path / "bom.txt").train)[0].startswith(b"Line 0")


@pytest.mark.parametrize(("content", "told"), [
    (TEXT.encode("utf-16"), "bad.txt is not UTF-8 text: save it as UTF-8"),
    ("“smart” café\n".encode("cp1252"), "bad.txt is not UTF-8 text: save it as UTF-8"),
    (b"a\0b" * 50, "is not text"), (b"", "is empty"),
    (b"x", "too little text"),  # a valid file, but not enough to split
    (None, "is no file, no folder"),
])
def test_a_named_file_that_cannot_serve_is_refused(tmp_path, content, told):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=told):
        prepare(config(tmp_path, path))
    assert os.listdir(tmp_path / "data") == []


def test_a_file_of_one_byte_is_a_document(tmp_path):
    root = folder_of_texts(tmp_path / "t", 5)
    (root / "one.txt").write_bytes(b"x")
    assert b"x" in documents(made(tmp_path, root).train)


def test_what_is_not_text_in_a_folder_is_skipped_and_counted(tmp_path, capsys):
    root = folder_of_texts(tmp_path / "t", 5)
    (root / "nul").write_bytes(b"a\0b")
    (root / "latin").write_bytes(b"caf\xe9 au lait")
    (root / "empty").write_bytes(b"")
    (root / ".hidden").write_text("hidden")
    (root / "dangling").symlink_to(root / "nowhere")
    data = made(tmp_path, root)
    assert "skipped 3 files" in capsys.readouterr().out
    assert b"hidden" not in data.train.astype(np.uint8).tobytes()


def test_linked_folders_are_followed_once_and_loops_end(tmp_path):
    root = folder_of_texts(tmp_path / "t", 6)
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "linked.txt").write_text("only by a link\n" * 20)
    (root / "link").symlink_to(other)
    (root / "again").symlink_to(other)
    (root / "loop").symlink_to(root)
    texts = pd.read_named(["t", "t", "t/sub0/0.txt"], "data").values()
    assert sum("only by a link" in text for text in texts) == 1
    assert len(texts) == 7, "a file that is named twice is one document"


def test_a_folder_that_may_not_be_read_costs_no_other_file(tmp_path, monkeypatch):
    root = folder_of_texts(tmp_path / "t", 6)
    (root / "closed").mkdir()
    (root / "zz.txt").write_text("after the closed folder\n")
    really = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return really(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "after the closed folder\n" in pd.read_named(["t"], "data").values()


def test_from_the_root_of_the_file_system_each_file_comes_once(tmp_path, monkeypatch):
    root = folder_of_texts(tmp_path / "t", 6)
    (root / "zz").symlink_to(root / "sub0")
    really = os.scandir

    def scandir(path):  # as if the folder t were the only one from / on
        children = really(path)
        if Path(path) in root.parents:
            return [child for child in children if Path(child.path) in [root, *root.parents]]
        return children

    monkeypatch.setattr(os, "scandir", scandir)
    assert len(list(pd.find_files(Path("/"), "all", set()))) == 6


def test_a_folder_around_the_datasets_is_read_without_them(tmp_path):
    folder_of_texts(tmp_path / "t", 5)
    folder_of_texts(tmp_path / "data" / "downloads", 50)
    assert len(documents(made(tmp_path, tmp_path).train)) == 5


# ---- What is held out


def share(data):
    return len(data.val) / (len(data.train) + len(data.val))


@pytest.mark.parametrize("val_frac", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("sizes", [(900,), (900, 9), (400, 410), (99,) * 40, (3000, *[5] * 9)])
def test_the_share_held_out_is_kept_with_few_and_unlike_files(sizes, val_frac):
    texts = {f"{i}.txt": f"one line of {i:5}\n" * n for i, n in enumerate(sizes)}
    train, val = pd.split_texts(texts, val_frac)
    held_out = sum(map(len, val))
    assert 0.6 * val_frac <= held_out / (held_out + sum(map(len, train))) < 1.4 * val_frac
    assert sorted("".join([*train, *val])) == sorted("".join(texts.values()))


def test_a_file_stays_in_its_split_whatever_its_neighbours():
    texts = {f"{i}.txt": f"{i}\n" * 100 for i in range(3000)}
    train, val = map(set, pd.split_texts(texts, 0.05))
    fewer = {key: text for key, text in texts.items() if int(text.split()[0]) % 3}
    some_train, some_val = map(set, pd.split_texts(fewer, 0.05))
    assert len(some_val) > 50 and some_train < train and some_val < val


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The python corpus of a machine with 3,000 files of a kilobyte."""
    lib = tmp_path / "python3.99"
    lib.mkdir()
    for i in range(3000):
        (lib / f"m{i}.py").write_text(f"x = {i}\n" * (900 // len(f"x = {i}\n")))
    monkeypatch.setattr(pd.sysconfig, "get_path", lambda place: str(lib))
    return lib


def test_which_files_are_taken_says_nothing_about_what_is_held_out(tmp_path, library, monkeypatch):
    everything = made(tmp_path, "python", name="everything")
    monkeypatch.setattr(pd, "PYTHON_SIZE", 900_000)  # a third of the text
    data = made(tmp_path, "python")
    train, val = set(documents(data.train)), set(documents(data.val))
    assert 0.98 * 900_000 < len(data.train) + len(data.val) < 903_000
    assert 0.035 < share(data) < 0.065 and 0.04 < share(everything) < 0.06
    assert len(val) > 30 and not train & val
    assert train < set(documents(everything.train)) and val < set(documents(everything.val))


@pytest.mark.parametrize("venv", [False, True])
def test_python_takes_sources_people_wrote(tmp_path, monkeypatch, venv):
    """The same, by the same keys, in a virtual environment, where packages are the base's."""
    lib = tmp_path / "lib"
    site = tmp_path / "venv" / "site-packages" if venv else lib / "site-packages"
    site.mkdir(parents=True)
    wanted = {"a.py", "b.py", "testimony.py", "site-packages/p/q.py"}
    others = {"test/t.py", "encodings/cp1.py", "x/test_y.py", "note.txt", "x/tests/y.py"}
    others |= {"site-packages/p/tests/r.py", "site-packages/p/_vendor/v.py", "__pycache__/c.pyc"}
    for name in wanted | others:
        (lib / name).parent.mkdir(parents=True, exist_ok=True)
        (lib / name).write_text(f"# {name}\n" * 20)
    (lib / "g.py").write_text("# This file is auto-generated, do not edit\nx = 1\n")
    (lib / "latin.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr(pd.sysconfig, "get_path", lambda p: str(lib if p == "stdlib" else site))
    found = pd.read_python()
    assert {text.split()[1] for text in found.values()} == wanted
    assert set(found) == {"lib/a.py", "lib/b.py", "lib/testimony.py", "lib/p/q.py"}


def test_python_is_there_on_this_machine_and_main_tells_its_size(tmp_path, monkeypatch, capsys):
    stdlib = pd.sysconfig.get_path("stdlib")
    monkeypatch.setattr(pd.sysconfig, "get_path", lambda place: stdlib + "/email")
    pd.main([f"--data_dir={tmp_path}"])
    last = capsys.readouterr().out.splitlines()[-1]
    number = r"[\d,]+"
    told = (
        rf"{tmp_path}/python: {number} training and {number} validation tokens "
        rf"\(byte, vocabulary 257\), validation \d\.\d%, {number} documents, [\d.]+ s"
    )
    assert re.fullmatch(told, last)
    assert 0.03 < share(load_data(tmp_path / "python")) < 0.07


# ---- Downloads, from a server on this machine


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.asked.append(self.path)
        body = server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        if server.how == "silent":
            time.sleep(0.5)
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if server.how == "html" else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if server.how == "cut off" else body)
        return None


class Server(http.server.ThreadingHTTPServer):
    """files: {path: bytes}; how: one way to misbehave; asked: the paths that were asked for."""

    files, how = {}, ""

    def handle_error(self, *_):
        pass  # a client that has seen enough hangs up


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server(("127.0.0.1", 0), Handler) as made:
        made.asked = []
        made.url = f"http://127.0.0.1:{made.server_port}"
        for name in ("SHAKESPEARE", "PG19", "PG19_BOOKS", "FINEWEB"):
            monkeypatch.setattr(pd, name, made.url)
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


def test_shakespeare_is_fetched_once(tmp_path, server):
    server.files = {"/input.txt": TEXT.encode()}
    data = made(tmp_path, "shakespeare")
    assert b"".join(documents(data.train) + documents(data.val)).decode() == TEXT
    made(tmp_path, "shakespeare", name="again", val_frac=0.1)
    assert server.asked == ["/input.txt"]
    left = [path.name for path in (tmp_path / "data" / "downloads").rglob("*.*t*")]
    assert [name for name in left if "127" not in name] == ["input.txt"]


@pytest.mark.parametrize(
    ("how", "told"), [("cut off", "retrieval incomplete"), ("html", "web page"), ("silent", "time")]
)
def test_a_bad_answer_is_one_line_and_leaves_nothing(tmp_path, server, monkeypatch, how, told):
    monkeypatch.setattr(pd, "TIMEOUT", 0.1)
    server.files, server.how = {"/input.txt": TEXT.encode()}, how
    with pytest.raises(UsageError, match=told) as stopped:
        prepare(config(tmp_path, "shakespeare"))
    assert server.url in str(stopped.value)
    assert not list(tmp_path.rglob("input.txt*"))


@pytest.mark.parametrize(("port", "told"), [("", "404"), ("1", "refused")])
def test_no_answer_says_where_a_copy_may_be_put(tmp_path, server, monkeypatch, port, told):
    if port:
        monkeypatch.setattr(pd, "SHAKESPEARE", f"http://127.0.0.1:{port}")
    with pytest.raises(UsageError, match=f"{told}.*put the file at .*input.txt"):
        prepare(config(tmp_path, "shakespeare"))


def serve_pg19(server):
    for part, n in (("train", 6), ("validation", 3)):
        names = [f"{part}/{i}.txt" for i in range(n)]
        server.files |= {f"/{name}": f"{name}\n".encode() * (i + 1) for i, name in enumerate(names)}
        server.files[f"/{part}_files.txt"] = "\n".join(names).encode()


def test_pg19_takes_some_books_and_all_of_validation(tmp_path, server):
    server.files = {}
    serve_pg19(server)
    data = made(tmp_path, "pg19", books=4)
    more = made(tmp_path, "pg19", books=5, name="more")
    train, val = documents(data.train), documents(data.val)
    assert len(train) == 4 and val[0] == b"validation/2.txt\n" * 3 and len(val) == 3
    assert set(train) < set(documents(more.train)), "a larger sample holds the smaller one"


def test_a_list_of_pg19_cannot_lead_elsewhere(tmp_path, server):
    server.files = {}
    serve_pg19(server)
    server.files["/train_files.txt"] += b"\ntrain/../../../evil.txt\nhttp://evil/train/x.txt\n"
    prepare(config(tmp_path, "pg19"))
    assert not [path for path in server.asked if "evil" in path or ".." in path]


def shard(*ids, count=None, magic=20240520):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids) if count is None else count
    return header.tobytes() + np.array(ids, "<u2").tobytes()


def test_fineweb_shards_are_taken_as_they_are(tmp_path, server, gpt2):
    server.files = {
        "/fineweb_val_000000.bin": shard(50256, 1, 2),
        "/fineweb_train_000001.bin": shard(50256, 3, 4, 50256, 5),
        "/fineweb_train_000002.bin": shard(6, 7, 300),
    }
    data = made(tmp_path, "fineweb10B", tokenizer="gpt2", shards=2)
    assert data.folder.name == "fineweb10B-gpt2"
    assert data.train.tolist() == [50256, 3, 4, 50256, 5, 6, 7, 300]
    assert data.val.tolist() == [50256, 1, 2] and data.meta["train_bytes"] == 7 + 3
    assert (data.meta["train_documents"], data.meta["val_documents"]) == (2, 1)


@pytest.mark.parametrize("bad", [shard(1, count=3), shard(1, 2, magic=1), b"short", shard(60000)])
def test_a_broken_shard_is_refused(tmp_path, server, gpt2, bad):
    server.files = {"/fineweb_train_000001.bin": bad, "/fineweb_val_000000.bin": shard(1, 2)}
    with pytest.raises(UsageError, match="delete it"):
        prepare(config(tmp_path, "fineweb10B", tokenizer="gpt2"))
    assert os.listdir(tmp_path / "data") == ["downloads"]


# ---- Token files


@pytest.mark.parametrize(("more", "told"), [
    (dict(dataset=("pyton",)), "none of python"), (dict(val_frac=0.9), "--val_frac"),
    (dict(val_frac=float("nan")), "--val_frac"), (dict(name="../up"), "--name"),
    (dict(name="downloads"), "--name"), (dict(dataset=("/",)), "--name"),
    (dict(dataset=("fineweb10B",)), "--tokenizer=gpt2"), (dict(shards=104), "--shards"),
    (dict(books=0), "--books"), (dict(tokenizer="words"), "--tokenizer"),
])
def test_settings_that_cannot_work_are_refused(tmp_path, monkeypatch, more, told):
    with pytest.raises(UsageError, match=re.escape(told)):
        prepare(DataConfig(**dict(data_dir=str(tmp_path / "data")) | more))


def test_a_dataset_is_kept_and_other_settings_are_refused(tmp_path, capsys):
    root = folder_of_texts(tmp_path / "t")
    folder = prepare(config(tmp_path, root))
    before = (folder / "train.bin").stat()
    assert prepare(config(tmp_path, root)) == folder == tmp_path / "data" / "t"
    assert "move it away to make it anew" in capsys.readouterr().out
    with pytest.raises(UsageError, match="other settings: use another --name, or move it away"):
        prepare(config(tmp_path, root, val_frac=0.2))
    assert (folder / "train.bin").stat() == before


def test_two_runs_give_the_same_bytes(tmp_path):
    root = folder_of_texts(tmp_path / "t")
    one = made(tmp_path, root).meta
    command = [sys.executable, SCRIPT, "--dataset", root.name, "--name=again"]
    subprocess.run(command, env=os.environ | dict(PYTHONHASHSEED="1"), check=True)
    assert one == load_data(tmp_path / "data" / "again").meta and len(one["val_sha256"]) == 64


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_a_run_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    calls = []

    def stop(enc, text):
        calls.append(text)
        if len(calls) > 5:
            raise error
        return np.zeros(3, np.uint8)

    monkeypatch.setattr(pd, "encode", stop)
    with pytest.raises(error):
        prepare(config(tmp_path, folder_of_texts(tmp_path / "t")))
    assert len(calls) == 6 and os.listdir(tmp_path / "data") == []


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_no_dataset(tmp_path, kill):
    slow = (
        "import time, prepare_data as p; e = p.encode\n"
        "p.encode = lambda *a: (print('busy', flush=True), time.sleep(.2)) and e(*a)\n"
        "p.run_main(p.main)"
    )
    root = folder_of_texts(tmp_path / "t")
    command = [sys.executable, "-c", slow, "--dataset", root, f"--data_dir={tmp_path / 'data'}"]
    pipe = subprocess.PIPE
    run = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=SCRIPT.parent)
    while "busy" not in run.stdout.readline():
        pass
    run.send_signal(kill)
    _, told = run.communicate()
    assert not (tmp_path / "data" / "t").exists()
    if kill == signal.SIGINT:
        assert run.returncode == 130 and told == "-c: interrupted\n"
        assert os.listdir(tmp_path / "data") == []
    assert len(made(tmp_path, root).train) > 0, "the next run makes it"


@pytest.mark.parametrize("val_frac", [0.05, 0.3])
def test_what_another_process_made_meanwhile_is_taken_if_it_is_the_same(
    tmp_path, monkeypatch, val_frac
):
    root, real = folder_of_texts(tmp_path / "t"), pd.write_tokens

    def write_tokens(path, *args):
        monkeypatch.setattr(pd, "write_tokens", real)
        prepare(config(tmp_path, root, val_frac=val_frac))
        return real(path, *args)

    monkeypatch.setattr(pd, "write_tokens", write_tokens)
    if val_frac == 0.05:
        prepare(config(tmp_path, root))
    else:
        with pytest.raises(UsageError, match="other settings"):
            prepare(config(tmp_path, root))
    assert os.listdir(tmp_path / "data") == ["t"]
    assert load_data(tmp_path / "data" / "t").meta["val_frac"] == val_frac


@pytest.mark.parametrize("spoil", [
    lambda f: (f / "val.bin").unlink(), lambda f: os.truncate(f / "train.bin", 10),
    lambda f: os.truncate(f / "train.bin", 11), lambda f: (f / "val.bin").write_bytes(b""),
    lambda f: (f / "meta.json").unlink(), lambda f: (f / "meta.json").write_text("{"),
    lambda f: (f / "meta.json").write_text("[]"), lambda f: (f / "meta.json").write_text("{}"),
])
def test_a_spoiled_dataset_is_refused_in_a_line(tmp_path, spoil):
    folder = prepare(config(tmp_path, folder_of_texts(tmp_path / "t")))
    spoil(folder)
    told = "t is no prepared dataset, or is broken .*: use another --name"
    with pytest.raises(UsageError, match=told) as stopped:
        load_data(folder)
    assert "\n" not in str(stopped.value)


def test_a_missing_dataset_is_refused_with_its_command(tmp_path):
    with pytest.raises(UsageError, match="no dataset folder .* --dataset PATH --name=mine first"):
        load_data(tmp_path / "mine")
    with pytest.raises(UsageError, match=f"--dataset=pg19 --data_dir={tmp_path} first"):
        load_data(tmp_path / "pg19")
    with pytest.raises(UsageError, match=f"--dataset=pg19 '--data_dir={tmp_path}/my data' first"):
        load_data(tmp_path / "my data" / "pg19")


def test_data_gives_rows_and_pickles_by_its_folder(tmp_path):
    data = made(tmp_path, folder_of_texts(tmp_path / "t"))
    rows = data.rows(data.train, [0, 5], 7)
    assert rows.shape == (2, 7) and (rows[1] == data.train[5:12]).all()
    with pytest.raises(UsageError, match="beyond its vocabulary"):
        data.rows(np.full(9, 257, np.uint16), [0], 9)
    packed = pickle.dumps(data)
    assert len(packed) < 1000 and (pickle.loads(packed).val == data.val).all()


# ---- Flags and errors


@dataclass
class Flags:
    runs: tuple[str, ...] = flag((), "run folders", positional=True)
    steps: int = flag(10, "how many", group="other")
    batch_size: int | None = flag(None, "rows a step")
    lr: float = flag(1e-3, "100% the learning rate")
    compile: bool = flag(False, "compile")
    kind: str = flag("a", "which", choices=("a", "b"))
    lengths: tuple[int, ...] = flag((1, 2), "lengths")


def parse(*argv):
    return pd.parse_flags({"first": Flags, "second": DataConfig}, argv, "What it does", "The end")


def test_only_flags_that_were_given_come_back():
    assert parse() == {}
    argv = ["x", "y", "--steps=1_000", "--lr", "1e-4", "--batch_size=3"]
    assert parse(*argv, "--lengths", "3", "4", "--dataset", "a", "b") == dict(
        runs=("x", "y"), steps=1000, lr=1e-4, batch_size=3, lengths=(3, 4), dataset=("a", "b")
    )


@pytest.mark.parametrize("word", ["--compile", "--compile=True", "--no-compile", "--compile=False"])
def test_a_switch_may_be_written_as_nanogpt_writes_it(word):
    assert parse(word) == dict(compile=word in ("--compile", "--compile=True"))


@pytest.mark.parametrize(("word", "told"), [
    ("--batch", "unknown argument '--batch': did you mean --batch_size?"),
    ("--stesp=3", "did you mean --steps?"), ("--no-compil", "did you mean --no-compile?"),
    ("--zzz", "--help lists the flags"),
    ("--lr=fast", "invalid float value"), ("--steps=1.5", "1.5"), ("--kind=c", "kind"),
])
def test_a_bad_flag_is_refused(word, told):
    with pytest.raises(UsageError, match=re.escape(told)):
        parse(word)


def test_help_names_every_flag_with_its_default_in_groups(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    out = capsys.readouterr().out
    for told in ("What it does", "The end", "(default: 10)", "100% the", "(default: 1 2)", "runs"):
        assert told in out
    assert not re.search(r"default:\s+(None)?\)", out)
    order = [out.index(name) for name in ("first:\n", "other:\n", "second:\n")]
    assert stopped.value.code == 0 and order == sorted(order)


@pytest.mark.parametrize(("error", "status", "told"), [
    (UsageError("two\nlines"), 2, "two lines"), (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 2, "out of memory: lower --batch_size"),
    (RuntimeError("CUDA out of memory. Tried to"), 2, "out of memory: lower --batch_size"),
    (OSError(28, "No space left on device"), 2, "No space left"),
    (ModuleNotFoundError("No module named 'matplotlib'"), 2, "plot"),
])
def test_run_main_ends_in_one_line(error, status, told, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as stopped:
        pd.run_main(main)
    err = capsys.readouterr().err
    assert stopped.value.code == status and err.count("\n") == 1 and told in err


@pytest.mark.parametrize("error", [ZeroDivisionError, ValueError, RuntimeError])
def test_run_main_lets_a_bug_be_seen(error):
    def main(argv):
        raise error("a bug")

    with pytest.raises(error):
        pd.run_main(main)


def test_a_script_tells_a_bad_flag_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x/prepare_data.py", "--nam=x"])
    with pytest.raises(SystemExit) as stopped:
        pd.run_main(pd.main)
    told = "prepare_data.py: unknown argument '--nam': did you mean --name?\n"
    assert stopped.value.code == 2 and capsys.readouterr().err == told


def test_a_script_ends_quietly_when_its_reader_leaves():
    loud = "import prepare_data as p; p.run_main(lambda argv: [print(i) for i in range(99999)])"
    command = f"{sys.executable} -c '{loud}' | head -1"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=SCRIPT.parent)
    assert (run.stdout, run.stderr) == ("0\n", "")


def test_a_failed_write_leaves_the_old_file_and_nothing_beside(tmp_path, monkeypatch):
    path = tmp_path / "file"
    pd.write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        pd.write_atomically(str(path), "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_meta_says_what_the_files_hold(tmp_path):
    data = made(tmp_path, folder_of_texts(tmp_path / "t"))
    meta = json.loads((data.folder / "meta.json").read_text())
    assert (meta["dtype"], meta["vocab_size"], meta["eot"]) == ("uint16", 257, 256)
    assert meta["tokenizer"] == "byte" and meta["dataset"] == [str(tmp_path / "t")]
    assert meta["val_tokens"] == meta["val_bytes"] == len(data.val)
    assert meta["train_documents"] == len(documents(data.train))
    assert meta["val_documents"] == len(documents(data.val))


def test_no_text_is_told_with_what_a_text_is(tmp_path):
    (tmp_path / "empty").mkdir()
    for names, told in (
        ((str(tmp_path / "empty"),), "no text in .*: files have to be UTF-8, and outside"),
        (("python", str(tmp_path)), "python is a dataset of its own"),
    ):
        with pytest.raises(UsageError, match=told):
            pd.prepare(pd.DataConfig(dataset=names, data_dir=str(tmp_path / "data")))
