"""Text in, token files out: data/NAME/{train.bin, val.bin, meta.json}, and the planted facts that
ask a model to retrieve across its context.

    python prepare_data.py                                 # Python source found on this machine
    python prepare_data.py --dataset=shakespeare --tokenizer=bpe
    python prepare_data.py --dataset my_notes/ book.txt --name=mine

A .bin is a flat array of token ids (uint16, or uint32 for a vocabulary above 65536), every document
followed by the end-of-document id. meta.json says everything else, the tokenizer included.
Does NOT include: shuffling (train.py draws windows at random), filtering, deduplication.
"""

import argparse
import base64
import codecs
import difflib
import hashlib
import http.client
import json
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from model import UsageError, check_ranges, flag

# ------------------------------------------------------------------- shared by the three scripts


def finite(text):
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def parse_flags(configs, argv, description="", epilog=""):
    """The flags argv gives, as {field: value}. configs: dataclass types whose fields are flags."""
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = f"{parser.prog}: error: "
    parser.error = lambda message: parser.exit(2, start + " ".join(message.split()) + "\n")
    known, switches = ["--help"], {}  # switches: nanoGPT's --compile=False is --no-compile
    for field in chain.from_iterable(map(fields, configs)):
        default, positional = field.default, field.metadata.get("positional")
        options = {k: v for k, v in field.metadata.items() if k in ("help", "choices")}
        kind = (get_args(field.type) or (field.type,))[0]  # of X | None and tuple[X, ...]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
            on, off = f"--{field.name}", f"--no-{field.name}"
            switches |= {f"{on}=True": on, f"{on}=False": off}
        else:
            options["type"] = finite if kind is float else kind
        if isinstance(default, tuple):
            options["nargs"] = "*" if positional else "+"
            default = " ".join(map(str, default))
        told = "" if default in (None, "") else f" (default: {default})"
        options["help"] = (options["help"] + told).replace("%", "%%")
        name = field.name if positional else f"--{field.name}"
        known += parser.add_argument(name, **options).option_strings
    given, unknown = parser.parse_known_args([switches.get(word, word) for word in argv])
    if unknown:
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        hint = f"did you mean {close[0]}?" if close else "--help lists the flags"
        parser.error(f"unknown argument {name!r}: {hint}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(given).items()}


def run_main(main):
    """Run main(argv) as a script: what the user can put right is one line on stderr, status 2."""
    def stop(message, status=2):
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(status)
    with suppress(AttributeError):  # a notebook's stdout has not this, and needs it not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UsageError as error:
        stop(" ".join(str(error).split()))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(
                r"out of memory|can't allocate memory", str(error)):
            raise
        stop("out of memory: lower --batch_size (and raise --gradient_accumulation_steps), "
             "--block_size, --max_multiple or --cost_rows")
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except BrokenPipeError:
        # The reader (head, less) has left. Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ImportError as error:
        stop(f"{error}: pip install -e '.[plot,hf]' has it")
    except OSError as error:
        stop(f"{error}: make room, or choose another folder")


def write_atomically(path, data):
    """Write str or bytes so that a reader finds the old file or the new one, never a half."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def progress(label, total=None, done=0):
    """A tqdm bar of `total` bytes on a terminal; elsewhere, one line that says what begins."""
    if not sys.stderr.isatty():
        print(label, f"({total / 1e6:,.1f} MB)" if total else "", flush=True)
    return tqdm(desc=label, total=total, initial=done, unit="B", unit_scale=True, leave=False,
                disable=None)


# ------------------------------------------------------------------------------------- downloads

HUB = "https://huggingface.co/datasets"
SOURCES = {
    "shakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",  # noqa: E501
    "enwik8": "https://mattmahoney.net/dc/enwik8.zip",
    "tinystories": HUB + "/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{part}.txt",
    "pg19_list": HUB + "/deepmind/pg19/resolve/main/data/{part}_files.txt",
    "pg19": "https://storage.googleapis.com/deepmind-gutenberg/{book}",
    "fineweb10B": HUB + "/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{shard}.bin",
}
HASHES = {"shakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
          "enwik8": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"}
TIMEOUT = 30  # seconds without a byte
MAX_BYTES = 8 << 30  # of a download, or of what an archive unpacks to: its sender is not trusted


def claim(path, busy):
    """Lock a file or folder for this process. What to close, or None; UsageError(busy) if taken."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UsageError(busy) from None
    except OSError:  # a file system without locks
        pass
    return lock


def sha256_of(path):
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def download(url, path, sha256=None):
    """Fetch url to path, unless it is there, by way of path.part, which a later call resumes."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = claim(path.parent, f"another process is fetching into {path.parent}: wait for it")
    try:
        if not path.exists():  # or it was, and has just finished
            fetch_url(url, path, sha256)
    finally:
        if lock is not None:
            os.close(lock)
    return path


def fetch_url(url, path, sha256):
    """download's work, while no other process does it."""
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "nanornope", "Range": f"bytes={have}-"}
    request = urllib.request.Request(url, headers=headers)
    try:  # a ValueError below means that nothing of the part can be trusted
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            if "html" in reply.headers.get_content_type():
                raise OSError("the answer is a web page, not data")
            if reply.status != 206:
                have = 0  # the server sends the whole file, whatever was asked
            elif not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise ValueError("the server resumed at a wrong place, run again")
            length = reply.headers.get("Content-Length")
            due = have + int(length) if length else None
            bar = progress(f"fetching {path.name}", due, have)
            with part.open("ab" if have else "wb") as out, bar:
                while chunk := reply.read(1 << 18):
                    have += out.write(chunk)
                    bar.update(len(chunk))
                    if have > MAX_BYTES:
                        raise ValueError(f"it is longer than {MAX_BYTES} bytes")
        if due and have < due:
            raise OSError(f"cut off after {have} of {due} bytes, run again to resume")
        if sha256 and sha256_of(part) != sha256:
            raise ValueError(f"its sha256 is not {sha256}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        # HTTP 416: the part is as long as the file, or longer.
        if isinstance(error, ValueError) or getattr(error, "code", None) == 416:
            part.unlink(missing_ok=True)
        raise UsageError(f"cannot download {url}: {str(error) or repr(error)}; check the network, "
                         f"or put a copy of the file at {path}") from None
    os.replace(part, path)


def unzip(archive):
    """Unpack the member called as the archive is, less .zip, beside it. Returns its path."""
    path = archive.with_suffix("")
    try:
        with zipfile.ZipFile(archive) as opened:
            if opened.getinfo(path.name).file_size > MAX_BYTES:
                raise zipfile.BadZipFile(f"it unpacks to more than {MAX_BYTES} bytes")
            if not path.exists():
                write_atomically(path, opened.read(path.name))
    except (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as error:  # it is encrypted
        raise UsageError(f"{archive} is no zip of {path.name} ({error}): delete it") from None
    return path


# ------------------------------------------------------------------------------------ tokenizers

EOT = "<|endoftext|>"
# How text falls into words before merging, after GPT-4's. Digits stay single: a number is then the
# same tokens wherever it stands, and a retrieval score means the same under every vocabulary.
WORDS = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def train_bpe(text, vocab_size):
    """Byte-pair encoding (arXiv 1508.07909): the token byte strings, in order of rank, at most
    vocab_size - 1 (the last id is the end of document), fewer if no pair repeats."""
    counts = Counter(regex.findall(WORDS, text))
    # chr(i) stands for token i in a word: to merge a pair is to replace two letters by a new one.
    words, often = [word.encode().decode("latin1") for word in counts], list(counts.values())
    pairs, holders = Counter(), defaultdict(set)  # how often each pair occurs; in which words

    def count(i, sign):
        for pair in map(str.__add__, words[i], words[i][1:]):
            pairs[pair] += sign * often[i]
            holders[pair].add(i)

    for i in range(len(words)):
        count(i, 1)
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size - 1 and (most := max(pairs.values(), default=0)) > 1:
        pair = min(pair for pair, n in pairs.items() if n == most)
        for i in holders.pop(pair):  # visit only the words that hold the pair
            count(i, -1)
            words[i] = words[i].replace(pair, chr(len(tokens)))
            count(i, 1)
        tokens.append(b"".join(tokens[ord(letter)] for letter in pair))
    return tokens


def encoding(meta):
    """The tiktoken.Encoding that meta.json describes. byte: id = byte, 256 = end of document."""
    name = meta["tokenizer"]
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise UsageError(f"gpt2 fetches its vocabulary and there is no network ({error}): set "
                             "TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=byte"
                             ) from None
    if name == "byte":
        tokens = [bytes([i]) for i in range(256)]
    elif name == "bpe":
        tokens = [base64.b64decode(token) for token in meta["ranks"]]
    else:
        raise UsageError(f"unknown tokenizer {name!r}: byte, bpe or gpt2")
    return tiktoken.Encoding(name, pat_str=WORDS if name == "bpe" else "(?s:.)",
                             mergeable_ranks={token: i for i, token in enumerate(tokens)},
                             special_tokens={EOT: len(tokens)})


def encode(enc, text):
    """Token ids of text, a 1-D array. "<|endoftext|>" written in a text is ordinary text."""
    if enc.name == "byte":
        # 50 times faster than tiktoken. A shell gives bytes that are no UTF-8 as surrogates.
        return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    return enc.encode_to_numpy(text, disallowed_special=())


def token_bytes(enc):
    """(vocab_size,) int64: how many bytes each id stands for, the end of a document being one."""
    sizes = [len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)]
    sizes[enc.eot_token] = 1
    return np.array(sizes)


# --------------------------------------------------------------------------------------- corpora

KNOWN = ("python", "shakespeare", "enwik8", "tinystories", "pg19", "fineweb10B")
SLICE = 1 << 18  # bytes, or tokens of a shard, read at once
PYTHON_BYTES = 128 << 20  # what `python` takes at most: seconds, not minutes
# A vendored copy would put one file into train and val; nested site-packages are roots themselves.
PYTHON_SKIP = {"test", "tests", "testing", "idle_test", "benchmarks", "encodings", "__pycache__",
               "_vendor", "site-packages", "dist-packages"}
GENERATED = re.compile(rb"(?im)(auto|machine)(matically)?[- ]?generated"
                       rb"|^#.*(generated (by|from) |do not edit)")


@dataclass
class DataConfig:
    dataset: tuple[str, ...] = flag(("python",), f"{', '.join(KNOWN)}, or paths of files, folders")
    tokenizer: str = flag("byte", "bpe is trained here", choices=("byte", "bpe", "gpt2"))
    bpe_vocab_size: int = flag(4096, "256 bytes, merges, the end of document", least=258)
    data_dir: str = flag("data", "folder of all prepared datasets and of downloads/")
    name: str = flag("", "folder to make in data_dir (default: after dataset and tokenizer)")
    val_frac: float = flag(0.0, "share held out, where the corpus has no validation split; 0: "
                           "0.1 of shakespeare and enwik8, else 0.05", least=0, most=0.9)
    books: int = flag(200, "pg19: how many of its 28,602 training books", least=1)
    shards: int = flag(1, "fineweb10B: how many of its 103 shards of 100M training tokens", least=1,
                       most=103)


class File(NamedTuple):
    path: Path
    key: str  # names it alike on every machine: what its split is drawn from
    start: int  # bytes start..stop are meant
    stop: int


def whole(path, key=""):
    return File(path, key or path.name, 0, path.stat().st_size)


def draw(key):
    """A number from 0 to 1: random to look at, the same in every run and on every machine."""
    return int(hashlib.sha256(os.fsencode(key)).hexdigest()[:8], 16) / 2**32


def read_slices(file):
    """Yield the text of a File, in slices of about SLICE bytes that end with a line."""
    if file.stop == 0:
        raise UsageError(f"{file.path} is empty")
    decode = codecs.getincrementaldecoder("utf-8")().decode  # a slice may end inside a character
    with open(file.path, "rb") as opened:
        opened.seek(file.start)
        while chunk := opened.read(min(SLICE, file.stop - opened.tell())):
            chunk += opened.readline(min(SLICE, file.stop - opened.tell()))
            if b"\0" in chunk:
                raise UsageError(f"{file.path} is not text")
            try:
                yield decode(chunk, final=opened.tell() == file.stop)
            except UnicodeDecodeError:
                raise UsageError(f"{file.path} is not UTF-8 text") from None


def read_text(file, enc):
    """Yield the token ids of one document, slice by slice, and its end. (All readers: 1-D ids.)"""
    for text in read_slices(file):
        yield encode(enc, text)
    yield [enc.eot_token]


def read_stories(file, enc):
    """TinyStories (arXiv 2305.07759): short documents with EOT, spelled out, between them."""
    rest = ""
    for text in chain(read_slices(file), [EOT]):
        *stories, rest = (rest + text).split(EOT)
        for story in filter(None, map(str.strip, stories)):
            yield encode(enc, story)
            yield [enc.eot_token]


def read_shard(file, enc):
    """256 int32 (magic, version, token count, ...), then uint16 ids (KellerJordan/modded-nanogpt);
    an end-of-document id stands before each document, so between two."""
    header = np.fromfile(file.path, "<i4", 256).tolist()
    if header[:3] != [20240520, 1, (file.stop - 1024) // 2]:
        raise UsageError(f"{file.path} is not a whole shard of tokens: delete it, run again")
    tokens = np.memmap(file.path, "<u2", "r", offset=1024)
    if tokens.max() >= enc.n_vocab:
        raise UsageError(f"{file.path} holds ids beyond GPT-2's: delete it, run again")
    yield from np.split(tokens, range(SLICE, len(tokens), SLICE))


def is_text(file):
    """Is it UTF-8, and something in it?"""
    try:
        return all(read_slices(file))  # read it to its end: no slice is empty
    except (UsageError, OSError):
        return False


def find_files(root, label, skip):
    """Yield the visible files in root, outside folders whose name or path is in skip."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")
                         and name not in skip and os.path.realpath(f"{folder}/{name}") not in skip]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.is_file():
                yield whole(path, f"{label}/{path.relative_to(root).as_posix()}")


def python_files():
    """Source that people wrote, of the standard library and of the installed packages."""
    paths, found, files, total = sysconfig.get_paths(), [], [], 0
    # Labels without a version in them: a file stays in its split from one Python to the next.
    roots = {paths["stdlib"]: "stdlib", paths["platlib"]: "purelib", paths["purelib"]: "purelib"}
    for root, label in roots.items():
        found += find_files(Path(root).resolve(), label, PYTHON_SKIP)
    for file in sorted(found, key=lambda file: draw(file.key)):  # the limit cuts a fair sample
        if (total + file.stop <= PYTHON_BYTES and re.fullmatch(r"(?!test_).*\.py", file.path.name)
                and is_text(file) and not GENERATED.search(file.path.read_bytes()[:1000])):
            files.append(file)
            total += file.stop
    return files


def named_files(names, data_dir):
    """The named files, and the text files in named folders. Returns (files, how many skipped)."""
    files, skipped = {}, 0  # by resolved path: a file named twice is one document
    for root in map(Path, names):
        if root.is_dir():
            found = list(find_files(root, root.resolve().name, {os.path.realpath(data_dir)}))
            good = [file for file in found if is_text(file)]
            skipped += len(found) - len(good)
        elif root.is_file():
            good = [whole(root)]
        else:
            close = difflib.get_close_matches(str(root), KNOWN, n=1)
            hint = f"did you mean {close[0]}?" if close else "check the path"
            raise UsageError(f"no file, folder or known dataset is called {root}: {hint}")
        files |= {file.path.resolve(): file for file in good}
    if skipped:
        print(f"skipped {skipped} files that are empty or not UTF-8 text")
    return list(files.values()), skipped


def split_files(files, val_frac):
    """(train, val), about val_frac in val: whole files, drawn by key, or the end of the longest.

    The latter where the files are so few, or so unlike, that those drawn would be more than thrice
    that share of the text.
    """
    total = sum(file.stop for file in files)
    held_out = max(val_frac, min(draw(file.key) for file in files))  # one at least
    val = [file for file in files if draw(file.key) <= held_out]
    most = min(3 * val_frac, (1 + val_frac) / 2) * total
    if len(val) < len(files) and sum(file.stop for file in val) <= most:
        return [file for file in files if draw(file.key) > held_out], val
    *rest, file = sorted(files, key=lambda file: (file.stop, file.key))
    cut = int(file.stop - min(val_frac * total, max(val_frac, 0.5) * file.stop))
    near = np.fromfile(file.path, np.uint8, SLICE, offset=cut)
    # To the next line; where none begins nearby, out of the UTF-8 character.
    cut += re.match(rb"(?s)[^\n]*\n(?=.)|[\x80-\xbf]*", near).end()
    return [*rest, file._replace(stop=cut)], [file._replace(start=cut)]


def open_corpus(cfg):
    """Find or download what cfg names. Returns ((train, val), reader, what meta.json records)."""
    def fetch(source, **blanks):
        url = SOURCES[source].format(**blanks)
        path = Path(cfg.data_dir, "downloads", source, url.rsplit("/", 1)[1])
        path = download(url, path, HASHES.get(source))
        return whole(unzip(path) if path.suffix == ".zip" else path)

    known, source, read, val_frac, val = cfg.dataset[0], {}, read_text, 0.05, []
    if known == "python":
        files, source["python"] = python_files(), platform.python_version()
    elif known in ("shakespeare", "enwik8"):
        files, val_frac = [fetch(known)], 0.1
    elif known == "tinystories":
        files, val, read = [fetch(known, part="train")], [fetch(known, part="valid")], read_stories
    elif known == "pg19":  # whole books (arXiv 1911.05507); a larger sample holds the smaller one
        books = fetch("pg19_list", part="validation").path.read_text("utf-8", "replace").split()
        val = [fetch(known, book=book) for book in books]
        books = fetch("pg19_list", part="train").path.read_text("utf-8", "replace").split()
        files = [fetch(known, book=book) for book in sorted(books, key=draw)[:cfg.books]]
    elif known == "fineweb10B":
        files = [fetch(known, shard=f"train_{i + 1:06d}") for i in range(cfg.shards)]
        val, read = [fetch(known, shard="val_000000")], read_shard
    else:
        files, source["skipped"] = named_files(cfg.dataset, cfg.data_dir)
    if not files:
        raise UsageError(f"no text in {' '.join(cfg.dataset)}")
    source["files"] = len(files) + len(val)
    splits = (files, val) if val else split_files(files, cfg.val_frac or val_frac)
    for split in splits:
        # Longest first: a long context measured from the start of val.bin is then one real
        # document and not many short ones, wherever the corpus has one that long.
        split.sort(key=lambda file: (file.start - file.stop, file.key))
    return splits, read, source


# ----------------------------------------------------------------------------------- token files

BPE_SAMPLE = 8 << 20  # characters that a bpe vocabulary is trained on


def check_config(cfg):
    """Refuse what cannot be prepared. Returns (folder, the settings it is made from)."""
    check_ranges(cfg)
    known = [name for name in cfg.dataset if name in KNOWN]
    if not cfg.dataset or (known and len(cfg.dataset) > 1):
        raise UsageError("--dataset takes one known name, or paths only (./python is a path)")
    if known == ["fineweb10B"] and cfg.tokenizer != "gpt2":
        raise UsageError("fineweb10B comes as GPT-2 tokens: add --tokenizer=gpt2")
    tokenizer = "" if cfg.tokenizer == "byte" else f"-{cfg.tokenizer}"
    name = cfg.name or (known[0] if known else Path(cfg.dataset[0]).resolve().stem) + tokenizer
    if name != Path(name).name or name in ("", "..", "downloads"):
        raise UsageError(f"--name={name!r} cannot be a folder in {cfg.data_dir}: choose another")
    settings = asdict(cfg) | dict(dataset=known or [str(Path(p).resolve()) for p in cfg.dataset])
    del settings["name"], settings["data_dir"]
    return Path(cfg.data_dir, name), settings


def bpe_sample(files):
    """About BPE_SAMPLE characters, or all there are: one file after another, at random."""
    sample = ""
    for text in chain.from_iterable(map(read_slices, sorted(files, key=lambda f: draw(f.key)))):
        sample += text
        if len(sample) >= BPE_SAMPLE:
            break
    return sample.replace(EOT, "")


def write_tokens(path, files, read, enc, dtype):
    """Write the tokens of files to path. Returns their counts and sha256, for meta.json."""
    sizes, total = token_bytes(enc), sum(file.stop - file.start for file in files)
    counts = dict(tokens=0, bytes=0, documents=0)
    with open(path, "wb") as out, progress(f"writing {path.name}", total) as bar:
        for file in files:
            for ids in read(file, enc):
                ids = np.asarray(ids, dtype)
                out.write(ids)
                counts["tokens"] += len(ids)
                counts["bytes"] += int(sizes[ids].sum())
                counts["documents"] += int(np.count_nonzero(ids == enc.eot_token))
                bar.update(counts["bytes"] - bar.n)
    if counts["tokens"] - counts["documents"] < 2:
        raise UsageError(f"too little text: {path.stem} would hold fewer than 2 tokens")
    return counts | dict(sha256=sha256_of(path))


def check_made(folder, settings):
    """UsageError unless the dataset in folder was made from these settings."""
    made = load_data(folder).meta.get("settings", {})
    if any(made.get(name, value) != value for name, value in settings.items()):
        raise UsageError(f"{folder} has other settings: use another --name, or delete it")


def prepare(cfg):
    """Make the dataset cfg names, or find it made: whole, or not there. Returns its folder."""
    folder, settings = check_config(cfg)
    if folder.exists():
        check_made(folder, settings)
        print(f"{folder} is already made from these settings; delete it to make it anew")
        return folder
    unique = f"{os.getpid()}-{time.time_ns()}"  # two containers may have processes of one number
    making = folder.with_name(f"{folder.name}.{unique}.partial")  # renamed at the end
    meta = dict(dataset=settings["dataset"], tokenizer=cfg.tokenizer, settings=settings)
    try:
        if cfg.tokenizer == "gpt2":
            encoding(meta)  # before any download, which would be in vain without a vocabulary
        splits, read, meta["source"] = open_corpus(cfg)
        if cfg.tokenizer == "bpe":
            ranks = train_bpe(bpe_sample(splits[0]), cfg.bpe_vocab_size)
            meta["ranks"] = [base64.b64encode(token).decode() for token in ranks]
        enc = encoding(meta)
        dtype = "uint16" if enc.n_vocab <= 1 << 16 else "uint32"
        meta |= dict(vocab_size=enc.n_vocab, eot=enc.eot_token, dtype=dtype)
        making.mkdir(parents=True)
        for split, files in zip(("train", "val"), splits, strict=True):
            counts = write_tokens(making / f"{split}.bin", files, read, enc, dtype)
            meta |= {f"{split}_{name}": count for name, count in counts.items()}
        meta["documents"] = meta["train_documents"] + meta["val_documents"]
        write_atomically(making / "meta.json", json.dumps(meta, indent=1) + "\n")
        os.replace(making, folder)
    except OSError as error:
        if not folder.exists():
            raise UsageError(f"cannot make {folder}: {error}") from error
        check_made(folder, settings)  # by another process, meanwhile
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


class Data(NamedTuple):
    folder: Path
    meta: dict
    train: np.memmap  # (train_tokens,) token ids
    val: np.memmap  # (val_tokens,)
    enc: tiktoken.Encoding

    def rows(self, tokens, starts, length):
        """Stretches of train or val: (len(starts), length) token ids."""
        rows = np.stack([tokens[start : start + length] for start in starts])
        if rows.max() >= self.enc.n_vocab:
            raise UsageError(f"{self.folder} holds ids beyond its vocabulary: make it anew")
        return rows

    def __reduce__(self):  # another process opens the files, in place of a copy of their contents
        return load_data, (self.folder,)


def load_data(folder):
    """Open a prepared dataset: sizes are checked against meta.json, hashes are not (slow)."""
    folder, splits = Path(folder), ("train", "val")
    if not folder.is_dir():
        known = folder.name in KNOWN and folder.name != "fineweb10B"  # which needs more flags
        how = f" --dataset={folder.name} --data_dir={folder.parent}" if known else ""
        raise UsageError(f"there is no dataset folder {folder}: run prepare_data.py{how} first")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        enc = encoding(meta)
        if (enc.n_vocab, enc.eot_token) != (meta["vocab_size"], meta["eot"]):
            raise ValueError("meta.json contradicts its own tokenizer")
        bins = [np.memmap(folder / f"{split}.bin", meta["dtype"], "r") for split in splits]
        for split, ids in zip(splits, bins, strict=True):
            if len(ids) != meta[f"{split}_tokens"]:
                raise ValueError(f"{split}.bin holds {ids.nbytes} bytes, meta.json says otherwise")
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} is broken ({type(error).__name__}: {error}): delete the folder "
                         "and run prepare_data.py again") from None
    return Data(folder, meta, *bins, enc)


# ----------------------------------------------------------------------------- planted retrieval


class Task(NamedTuple):
    facts: list  # token ids of each fact, to stand at distinct places of the row
    turns: list  # (question, answer) token ids; the row ends in all of them, one after another
    asked: list  # for each turn, the index in facts of the fact it is about
    chains: tuple = ()  # lists of indices in facts: these stand in the row in this order

    def size(self):
        """Tokens that the facts and turns take of a row."""
        return sum(map(len, chain(self.facts, *self.turns)))


class Planted(NamedTuple):
    row: np.ndarray  # a new row, of the old one's length and dtype
    facts: list  # slices of the row, in the task's order
    asked: list  # slices: the fact that each turn is about
    answers: list  # slices, one a turn; the last of them ends the row
    tail: slice  # all the turns: what stands behind the context


LETTERS, NEW_LETTERS = "bdfgklmnprstvzaei", "chjqwxyou"  # words are made of six of them
FORMS = [("\n# The secret number of {} is ", ".\n"), ("\n# Remember, {} has ", "!\n"),
         ("\nKEY_{} = ", "\n"), ("\nBox {} holds ", ";\n")]
NEW_FORMS = [("\nTo call {} one has to dial ", ".\n"), ('\n    assert find("{}") == ', "\n")]
OPENINGS = ["\n", "\n# ", "\n    ", "\n- ", "\n// ", '\n"']
FILLERS = ["a", "the", "my", "this", "code", "key", "name", "value", "entry", "number", "item",
           "of", "line", "file", "field", "word", "index", "token", "note", "for", "has", "was"]
LINKS = [" ", " is ", " = ", "=", ": ", " -> ", '": ']
CLOSINGS = ["\n", ".\n", ";\n", "!\n", ",\n"]


def draw_form(rng, held_out=False):
    """(before, after) a number, `{}` in the first for the key: half of training's random words."""
    def one_of(items):
        return items[rng.integers(len(items))]
    if held_out:
        return one_of(NEW_FORMS)
    if rng.random() < 0.5:
        return one_of(FORMS)
    left, right = (one_of(["", one_of(FILLERS)]) for _ in range(2))
    return one_of(OPENINGS) + f"{left} {{}} {right}".strip() + one_of(LINKS), one_of(CLOSINGS)


SENTENCES = ("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back "
             "again.\n")  # RULER's haystack of repeated text
HAYSTACKS = {  # name: (encoding, tokens wanted) -> token ids
    "repeat": lambda enc, n: np.resize(encode(enc, SENTENCES), n),
    "noise": lambda enc, n: np.random.default_rng(0).integers(0, enc.n_vocab, n),
}


def random_words(rng, n, held_out=False):
    """n different words of six letters; held_out: of letters that training's words do not have."""
    letters = NEW_LETTERS if held_out else LETTERS
    base = len(letters)
    codes = rng.choice(base**6, n, replace=False).tolist()
    return ["".join(letters[code // base**i % base] for i in range(6)) for code in codes]


def random_numbers(rng, n, digits):
    """n different numbers of so many digits, as strings."""
    return [f"{x:0{digits}d}" for x in rng.choice(10**digits, n, replace=False).tolist()]


def said(enc, *parts):
    """Token ids of a text whose parts are encoded apart, so that a question can share them."""
    return np.concatenate([encode(enc, part) for part in parts])


def needle_task(enc, rng, held_out=False, n_needles=4, digits=7, questions=1):
    """Needles that each give a key a secret number, and questions for the numbers of some keys.

    held_out: keys and wording that training never sees. Source: the passkeys of RULER
    (arXiv 2404.06654), in many forms.
    """
    if n_needles < 1 or not 1 <= digits <= 18 or 10**digits < n_needles:
        raise UsageError(f"{n_needles} needles of {digits} digits cannot have different numbers")
    if not 1 <= questions <= n_needles:
        raise UsageError(f"{n_needles} facts are too few for {questions} different questions")
    words, numbers = random_words(rng, n_needles, held_out), random_numbers(rng, n_needles, digits)
    before, after = draw_form(rng, held_out)
    before = [before.format(word) for word in words]
    facts = [said(enc, *fact, after) for fact in zip(before, numbers, strict=True)]
    asked = rng.permutation(n_needles)[:questions].tolist()
    turns = [(encode(enc, before[i]), encode(enc, numbers[i])) for i in asked]
    return Task(facts, turns, asked)


def multivalue_task(enc, rng, held_out=False):
    """One key has four numbers, four others have one: all of the one's, as they come."""
    words, numbers = random_words(rng, 5, held_out), random_numbers(rng, 8, 7)
    before, after = draw_form(rng, held_out)
    keys = [before.format(word) for word in (*words[:1] * 3, *words)]
    facts = [said(enc, *fact, after) for fact in zip(keys, numbers, strict=True)]
    turns = [(encode(enc, keys[0] if i == 0 else ", "), encode(enc, numbers[i])) for i in range(4)]
    return Task(facts, turns, [0, 1, 2, 3], ([0, 1, 2, 3],))


def variables_task(enc, rng, held_out=False):
    """Two chains of assignments: the four variables that have one of the two values."""
    words, (value, other) = random_words(rng, 8, held_out), random_numbers(rng, 2, 5)
    names = [f"VAR {word}" for word in words]
    given = [value, *names[:3], other, *names[4:7]]
    facts = [said(enc, "\n", n, " = ", g, "\n") for n, g in zip(names, given, strict=True)]
    links = [f"\nWhat is {value}? ", " ", " ", " "]
    turns = [(encode(enc, q), encode(enc, n)) for q, n in zip(links, names, strict=False)]
    return Task(facts, turns, [0, 1, 2, 3], ([0, 1, 2, 3], [4, 5, 6, 7]))


def words_task(enc, rng, held_out=False):
    """A list of words, scattered: the one that is in it six times, where the others are twice."""
    words = random_words(rng, 5, held_out)
    facts = [said(enc, "\n* ", word, "\n") for word in [*words[:1] * 4, *words * 2]]
    return Task(facts, [(encode(enc, "\nMost often: "), encode(enc, words[0]))], [0])


RELATIONS = [  # fact, question in other words, answers
    ("{} lives in {}.", "Where is the home of {}?", "Rome Paris Oslo Cairo Lima Quito Delhi"),
    ("{} works as a {}.", "Which job has {}?", "baker nurse pilot judge miner tailor cook"),
    ("The pet of {} is a {}.", "What animal does {} keep?", "horse mouse goat tiger swan eel"),
]


def qa_task(enc, rng, held_out=False):
    """Six people of whom two things are told each: a question in other words than the facts."""
    people = [word.capitalize() for word in random_words(rng, 6, held_out)]
    kinds = rng.permutation(len(RELATIONS))[:2].tolist()
    facts, questions = [], []
    for told, question, values in (RELATIONS[kind] for kind in kinds):
        for person, value in zip(people, rng.permutation(values.split()).tolist(), strict=False):
            facts.append(encode(enc, f"\n{told.format(person, value)}\n"))
            questions.append((f"\n{question.format(person)} ", f"{value}."))
    asked = int(rng.integers(len(facts)))
    return Task(facts, [tuple(encode(enc, part) for part in questions[asked])], [asked])


TASKS = {  # after RULER, arXiv 2404.06654: (encoding, rng, held_out) -> Task
    "single": partial(needle_task, n_needles=1),
    "multikey": partial(needle_task, n_needles=12),
    "multiquery": partial(needle_task, n_needles=8, questions=4),
    "multivalue": multivalue_task,
    "variables": variables_task,
    "words": words_task,
    "qa": qa_task,
}


def no_room(name, room, needed):
    """The error where wordings of a task need so many tokens and a row has only `room`."""
    return UsageError(f"a row of {room} tokens cannot hold the facts and questions of {name}: "
                      f"{sorted(needed)[len(needed) // 2]} would do")


def draw_task(enc, rng, names, sizes, room, held_out=False):
    """One of the tasks called names that needs `room` tokens at most.

    sizes: how many facts, digits and questions `needle` has; those of TASKS have their own.
    Wordings differ in length: one that is too long is drawn again. UsageError where all are.
    """
    name, needed = names[rng.integers(len(names))], []
    make = TASKS.get(name, lambda *args: needle_task(*args, *sizes))
    while len(needed) < 50:
        task = make(enc, rng, held_out)
        if task.size() <= room:
            return task
        needed.append(task.size())
    raise no_room(name, room, needed)


def check_room(enc, names, sizes, room):
    """UsageError unless `room` tokens hold each of the tasks, in half its wordings or more."""
    for name in names:
        rng = np.random.default_rng(0)
        needed = sorted(draw_task(enc, rng, [name], sizes, math.inf).size() for _ in range(100))
        if needed[50] > room:
            raise no_room(name, room, needed)


def together(tasks):
    """Several tasks as one, for one row. Of those that ask alike, such as "Most often:", one."""
    facts, turns, asked, chains = [], [], [], []
    for task in {task.turns[0][0].tobytes(): task for task in tasks}.values():
        n = len(facts)  # where the indices of this one begin
        asked += [n + i for i in task.asked]
        chains += [[n + i for i in links] for links in task.chains]
        facts += task.facts
        turns += task.turns
    return Task(facts, turns, asked, tuple(chains))


def plant(row, task, rng, depth=None):
    """Overwrite parts of a row (T,) with a task's facts, and its tail with questions + answers.

    Facts never overlap and all come before the questions, in random places, and in random order
    but for the task's chains. depth 0..1 fixes the place of the fact asked about first, in tasks
    without chains: 0 opens the row, 1 ends right before the tail.
    Errors: UsageError with the length that suffices, where the row is too short.
    """
    lengths, asked = [len(fact) for fact in task.facts], task.asked[0]
    free = len(row) - task.size()  # tokens of the row that stay
    room = sum(lengths) + free  # tokens before the questions
    if free < 0:
        raise UsageError(f"a row of {len(row)} tokens cannot hold {len(lengths)} facts and the "
                         f"questions: {task.size()} are needed")
    order = rng.permutation(len(lengths)).tolist()
    for links in task.chains:
        places = sorted(order.index(i) for i in links)
        for place, i in zip(places, links, strict=True):
            order[place] = i
    gaps = rng.integers(free + 1, size=len(order)).tolist()  # free tokens left of each fact
    if depth is not None:
        if not 0 <= depth <= 1:
            raise UsageError(f"depth {depth} is not between 0 and 1")
        order.remove(asked)
        start = round(depth * (room - lengths[asked]))
        # The gap left of the fact asked about, were k of the others on its left.
        gap_after = [start - sum(lengths[i] for i in order[:k]) for k in range(len(order) + 1)]
        fits = [k for k, gap in enumerate(gap_after) if 0 <= gap <= free]
        if not fits:
            raise UsageError(f"a row of {len(row)} tokens is too tight for depth {depth}: "
                             f"{task.size() + max(lengths)} suffice")
        wanted = rng.binomial(len(order), depth)  # as if every place were as likely
        k = min(fits, key=lambda k: abs(k - wanted))
        gap = gap_after[k]
        left, right = rng.integers(gap + 1, size=k), rng.integers(gap, free + 1, len(order) - k)
        gaps = [*left.tolist(), gap, *right.tolist()]
        order.insert(k, asked)
    planted, spans, start = np.array(row), [None] * len(order), 0
    for i, gap in zip(order, sorted(gaps), strict=True):
        spans[i] = slice(start + gap, start + gap + lengths[i])
        planted[spans[i]] = task.facts[i]
        start += lengths[i]
    parts = list(chain(*task.turns))  # question, answer, question, answer, ...
    planted[room:] = np.concatenate(parts)
    ends = room + np.cumsum([len(part) for part in parts])
    answers = [slice(a, b) for a, b in ends.reshape(-1, 2).tolist()]
    return Planted(planted, spans, [spans[i] for i in task.asked], answers, slice(room, len(row)))


def main(argv):
    started = time.monotonic()
    cfg = DataConfig(**parse_flags([DataConfig], argv, __doc__))
    data = load_data(prepare(cfg))
    print(f"{data.folder}: {len(data.train):,} training and {len(data.val):,} validation tokens "
          f"({data.meta['tokenizer']}, vocabulary {data.meta['vocab_size']}), "
          f"{data.meta['documents']:,} documents, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    run_main(main)
