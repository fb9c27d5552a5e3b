"""Text in, token files out: data/NAME/{train.bin, val.bin, meta.json}.

    python prepare_data.py                                    # Python source found on this machine
    python prepare_data.py --dataset shakespeare --tokenizer=gpt2
    python prepare_data.py --dataset my_notes/ book.txt --name=mine

A .bin is a flat array of token ids, uint16 or, for large vocabularies, uint32. The end-of-document
id follows every document, and the longest documents come first: a long context is then one
document, where there is one.
Does NOT include: shuffling (train.py draws rows at random), filtering, deduplication.
"""

import argparse
import difflib
import hashlib
import http.client
import json
import os
import random
import re
import shlex
import socket
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import tiktoken
from tqdm import tqdm

from model import UsageError, check, check_ranges, flag, warn

# ---- Text to tokens ----------------------------------------------------------------------------


class PretrainedTokenizer:
    """A tokenizer that transformers reads, with the few methods that we use of tiktoken's."""

    def __init__(self, name):
        from transformers import AutoTokenizer
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        try:
            self.theirs = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # transformers raises many kinds
            why = " ".join(str(error).split())[:200]
            raise UsageError(f"{name} has no tokenizer that transformers reads: {why}") from None
        self.name = name
        # In most vocabularies, as in GPT-2's, a token is spelled with a character for each byte.
        self.byte = {}
        backend = getattr(self.theirs, "backend_tokenizer", None)
        if "ByteLevel" in str(getattr(backend, "decoder", "")):
            self.byte = {character: n for n, character in bytes_to_unicode().items()}
        self.added = self.theirs.get_added_vocab()  # spelled as they are
        ids = set(self.theirs.get_vocab().values())
        # Of a folder without a tokenizer's files, transformers makes one of special tokens alone.
        check(ids - set(self.theirs.all_special_ids), f"{name} has no tokenizer, or an empty one")
        self.n_vocab = max(ids) + 1  # there may be ids without a token
        self.eot_token = self.theirs.eos_token_id
        check(self.eot_token is not None,
              f"the tokenizer of {name} names no end-of-document token: set its eos_token")
        self.first = self.theirs.encode("")[:1]  # the token that its texts begin with, if any

    def encode_to_numpy(self, text, **options):
        ids = self.theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        return np.array(ids, int)

    def decode(self, ids):
        return self.theirs.decode(ids)

    def decode_single_token_bytes(self, i):
        token = self.theirs.convert_ids_to_tokens(i) or ""
        if set(token) <= self.byte.keys() and token not in self.added:
            return bytes(self.byte[character] for character in token)
        if re.fullmatch("<0x..>", token):  # so SentencePiece spells a byte, and a space as ▁
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()


def pretrained_tokenizer(enc):
    """The encoding as a tokenizer of transformers, with the same ids."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    if isinstance(enc, PretrainedTokenizer):
        return enc.theirs
    converter = TikTokenConverter(enc._mergeable_ranks, enc._pat_str)
    converter.load_tiktoken_bpe = lambda ranks: ranks  # it expects a file of them
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(),
                                   eos_token=enc.decode([enc.eot_token]))


def locate(name):
    """A folder by its whole path, which holds from anywhere; another name, on the hub, as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def encoding(name):
    """The tokenizer "byte" (id = byte, 256 = end of document), "gpt2", or one of transformers'.

    Of those, name is a folder or an id on the hub, like ORGANISATION/NAME.
    """
    if name == "byte":
        return tiktoken.Encoding(
            name,
            pat_str=r"[\s\S]",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256})
    if "/" in name:
        return PretrainedTokenizer(name)
    check(name == "gpt2", f"--tokenizer={name}: choose byte or gpt2, or give the path of a folder, "
          "or an ORGANISATION/NAME on the hub, that transformers reads")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # ValueError: a proxy sent a page of its own
        raise UsageError(
            f"cannot fetch the gpt2 vocabulary ({error}): "
            "set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=byte"
        ) from None


def encode(enc, text):
    """Token ids of text, a 1-D array. "<|endoftext|>" in a text is ordinary text."""
    # A shell hands over bytes that are not UTF-8 as surrogates.
    raw = text.encode(errors="surrogateescape")
    if enc.name == "byte":
        return np.frombuffer(raw, np.uint8)  # many times faster than tiktoken
    return enc.encode_to_numpy(raw.decode(errors="replace"), disallowed_special=())


@cache
def token_sizes(enc):
    """(vocabulary,) how many bytes each id stands for."""
    sizes = [len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)]
    sizes[enc.eot_token] = 1
    return np.array(sizes)


def count_bytes(enc, ids):
    """How many bytes ids stand for. An end of document counts as one."""
    return int(token_sizes(enc)[ids].sum())


# ---- Texts -------------------------------------------------------------------------------------

# Texts are held in memory: a corpus too large for that should come as tokens, as fineweb10B does.
SLICE = 1 << 20  # characters encoded at once


def read_text(path):
    """The text of a file. UsageError unless it is UTF-8."""
    raw = path.read_bytes()
    check(raw, f"{path} is empty")
    try:
        text = raw.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    check("\0" not in text, f"{path} is not text: it holds NUL bytes")
    return text


def find_files(path, key, seen, real=None):
    """Yield (key, path) of the visible files at or below path, each once. Links are followed.

    real: path without links. Pass it if it is known: os.path.realpath is slow.
    """
    real = real or os.path.realpath(path)
    if real in seen:
        return
    seen.add(real)
    if os.path.isfile(path):
        yield key, path
        return
    try:
        children = sorted(os.scandir(path), key=attrgetter("name"))
    except OSError:  # some folders may not be read, and some links lead nowhere
        return
    for child in children:
        if not child.name.startswith("."):
            known = None if child.is_symlink() else os.path.join(real, child.name)
            yield from find_files(path / child.name, f"{key}/{child.name}", seen, known)


def fixed_random(purpose, key):
    """A number from 0 to 1 for a key: the same on every machine, another for another purpose."""
    return random.Random(os.fsencode(f"{purpose} {key}")).random()


def split_texts(texts, val_frac):
    """(train, val) of texts {key: text}: about val_frac are in val, each drawn by its key alone.

    Where texts are so few or so unlike that their share would be far off, val is the end of each.
    """
    train = []
    val = []
    for key, text in texts.items():
        split = val if fixed_random("split", key) < val_frac else train
        split.append(text)
    wanted = val_frac * sum(map(len, texts.values()))
    if abs(sum(map(len, val)) - wanted) < wanted / 3:
        return train, val
    train = []
    val = []
    for text in texts.values():
        cut = round(len(text) * (1 - val_frac))
        cut = max(cut, text.find("\n", cut, (cut + len(text)) // 2) + 1)  # a line end, if near
        train.append(text[:cut])
        val.append(text[cut:])
    return train, val


# ---- Corpora -----------------------------------------------------------------------------------

KNOWN = ("python", "shakespeare", "pg19", "fineweb10B")
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare"
PG19 = "https://huggingface.co/datasets/deepmind/pg19/resolve/main/data"
PG19_BOOKS = "https://storage.googleapis.com/deepmind-gutenberg"
FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"
TIMEOUT = 30  # seconds without a byte
PYTHON_SIZE = 128 << 20  # characters, the last file may pass it: seconds, not minutes
# Not tests, which repeat themselves; nor tables of code points, nor vendored copies of libraries,
# which would stand in train and in val.
PYTHON = re.compile(
    r"(?!.*/((tests?|testing|idle_test|benchmarks|encodings|_vendor)/|test_[^/]*$)).*\.py"
)
GENERATED = re.compile(
    r"(?im)(auto|machine)(matically)?[- ]?generated|^#.*(generated (by|from) |do not edit)"
)


@dataclass
class DataConfig:
    dataset: tuple[str, ...] = flag(("python",), f"{', '.join(KNOWN)}, or paths of files, folders")
    tokenizer: str = flag("byte", "byte, gpt2, or a folder or hub id that transformers reads")
    data_dir: str = flag("data", "folder of the datasets and of downloads/")
    name: str = flag("", "folder to make in data_dir; if not given, DATASET or DATASET-gpt2")
    val_frac: float = flag(0.05, "share of the text that validates", least=0.001, most=0.5)
    books: int = flag(200, "pg19: how many of its 28,602 training books", least=1)
    shards: int = flag(1, "fineweb10B: training shards of 100M tokens", least=1, most=103)


@contextmanager
def atomic_path(path):
    """A temporary path for a file or a folder, renamed to path at the end, gone after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:
        making = Path(beside, path.name)
        yield making
        os.replace(making, path)


def download(data_dir, url):
    """The path in data_dir/downloads of the file at url, which is fetched once."""
    path = Path(data_dir, "downloads", *url.split("/")[-2:])
    if path.exists():
        return path
    print(f"fetching {url}", flush=True)
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with atomic_path(path) as making:
            _, headers = urllib.request.urlretrieve(url, making)
            check("html" not in headers.get_content_type(), f"{url} sent a web page, not data")
    except (OSError, http.client.HTTPException) as error:
        raise UsageError(
            f"cannot download {url} ({error}): check the network, or put the file at {path}"
        ) from None
    return path


def read_python():
    """{key: text} of source that people wrote, in the packages and in the standard library."""
    paths = {}
    seen = set()
    for place in ("purelib", "platlib", "stdlib"):
        # No key holds a version, nor what depends on a virtual environment: a file stays in its
        # split from one Python to the next.
        for key, path in find_files(Path(sysconfig.get_path(place)), "lib", seen):
            paths.setdefault(re.sub("/(site|dist)-packages/", "/", key), path)
    texts = {}
    room = PYTHON_SIZE
    for key in sorted(filter(PYTHON.fullmatch, paths), key=partial(fixed_random, "choose")):
        with suppress(UsageError, OSError):
            text = read_text(paths[key])
            if not GENERATED.search(text[:1000]):
                texts[key] = text
                room -= len(text)
        if room < 0:
            break
    return texts


def read_named(names, data_dir):
    """{key: text} of the files called names, and of those in folders so called that are text."""
    texts = {}
    skipped = 0
    seen = {os.path.realpath(data_dir)}  # it never reads what it wrote
    for root in map(Path, names):
        joined = str(root) in KNOWN and not root.exists()
        check(not joined, f"{root} is a dataset of its own: name it alone, without other texts")
        check(root.exists(), f"{root} is no file, no folder and none of {', '.join(KNOWN)}")
        for key, path in find_files(root, str(root), seen):
            try:
                texts[key] = read_text(path)
            except (UsageError, OSError):
                if path == root:
                    raise
                skipped += 1
    check(texts, f"no text in {' '.join(names)}: files have to be UTF-8, and outside {data_dir}")
    if skipped:
        print(f"skipped {skipped} files that are empty or not UTF-8 text")
    return texts


def read_books(part, fetch):
    """Yield the books of a part of pg19 (arXiv 1911.05507); the first are a fair sample."""
    # This pattern cannot lead elsewhere, whatever the list holds.
    names = re.findall(rf"{part}/\d+\.txt", read_text(fetch(f"{PG19}/{part}_files.txt")))
    for name in sorted(names, key=partial(fixed_random, "choose")):
        yield read_text(fetch(f"{PG19_BOOKS}/{name}"))


def read_shards(names, fetch):
    """Yield the ids of each shard: 256 int32 (magic, version, count, ...), then uint16 ids.

    An end of document stands before each document. Source: KellerJordan/modded-nanogpt.
    """
    for name in names:
        path = fetch(f"{FINEWEB}/fineweb_{name}.bin")
        header = np.fromfile(path, "<i4", 3).tolist()
        ids = np.fromfile(path, "<u2")[512:]
        check(header == [20240520, 1, len(ids)] and ids.max() < 50257,
              f"{path} is not a whole shard of GPT-2 tokens: delete it, run again")
        yield ids


def warn_of_loss(enc, text):
    """Tell of a tokenizer whose tokens stand for more or fewer bytes than the text has."""
    size = len(text.encode())
    counted = count_bytes(enc, encode(enc, text))
    if abs(counted - size) > size / 100:
        warn(f"the tokens that {enc.name} makes of {size:,} bytes stand for {counted:,}: it loses "
             "or changes some, so bits per byte are not exact")


def encode_all(texts, enc):
    """Yield the ids of texts, the longest first, and an end of document after each."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    if longest_first:
        warn_of_loss(enc, longest_first[0][:10_000])
    for text in tqdm(longest_first, leave=False, disable=None):
        for start in range(0, len(text), SLICE):
            yield encode(enc, text[start : start + SLICE])
        yield np.array([enc.eot_token])


def read_corpus(cfg, enc):
    """(train, val) of what cfg.dataset names, each an iterator over arrays of ids."""
    fetch = partial(download, cfg.data_dir)
    match cfg.dataset:
        case ["fineweb10B"]:
            check(enc.name == "gpt2", "fineweb10B comes as GPT-2 tokens: add --tokenizer=gpt2")
            train = [f"train_{i + 1:06d}" for i in range(cfg.shards)]
            return read_shards(train, fetch), read_shards(["val_000000"], fetch)
        case ["pg19"]:
            train = islice(read_books("train", fetch), cfg.books)
            return encode_all(train, enc), encode_all(read_books("validation", fetch), enc)
        case ["python"]:
            texts = read_python()
        case ["shakespeare"]:
            texts = {"shakespeare": read_text(fetch(f"{SHAKESPEARE}/input.txt"))}
        case _:
            texts = read_named(cfg.dataset, cfg.data_dir)
    train, val = split_texts(texts, cfg.val_frac)
    return encode_all(train, enc), encode_all(val, enc)


# ---- Token files -------------------------------------------------------------------------------


def token_dtype(enc):
    return "uint16" if enc.n_vocab <= 2**16 else "uint32"


def write_tokens(path, arrays, enc):
    """Write arrays of ids to path. Returns what meta.json says about them."""
    print(f"writing {path.name}", flush=True)
    split = path.stem
    counts = Counter()
    with open(path, "wb") as out:
        for ids in arrays:
            out.write(ids.astype(token_dtype(enc)))
            counts[f"{split}_tokens"] += len(ids)
            counts[f"{split}_bytes"] += count_bytes(enc, ids)
            counts[f"{split}_documents"] += int((ids == enc.eot_token).sum())
    check(counts[f"{split}_tokens"] > 2,
          f"too little text: {path.name} would be empty, or nearly")
    counts[f"{split}_sha256"] = hashlib.sha256(np.memmap(path)).hexdigest()
    return counts


def write_dataset(cfg, folder, settings):
    """Write the token files of cfg and meta.json to folder, which appears when all are written."""
    enc = encoding(settings["tokenizer"])
    meta = settings | dict(vocab_size=enc.n_vocab, eot=enc.eot_token, dtype=token_dtype(enc),
                           source=f"read by Python {sys.version.split()[0]}")
    with atomic_path(folder) as making:
        making.mkdir()
        train, val = read_corpus(cfg, enc)
        meta |= write_tokens(making / "train.bin", train, enc)
        meta |= write_tokens(making / "val.bin", val, enc)
        Path(making, "meta.json").write_text(json.dumps(meta, indent=1))


def prepare(cfg):
    """Make the dataset that cfg names, or find it made. Returns its folder, always whole."""
    started = time.monotonic()
    check_ranges(cfg)
    dataset = [name if name in KNOWN else str(Path(name).resolve()) for name in cfg.dataset]
    tokenizer = cfg.tokenizer
    if tokenizer not in ("byte", "gpt2"):
        tokenizer = locate(tokenizer)
    name = cfg.name or f"{Path(dataset[0]).stem}-{Path(tokenizer).name}".removesuffix("-byte")
    check(re.fullmatch(r"(?!downloads$)\w[\w. -]*", name),
          f"--name={name!r} cannot be a folder in {cfg.data_dir}: choose another")
    folder = Path(cfg.data_dir, name)
    settings = asdict(cfg) | dict(dataset=dataset, tokenizer=tokenizer)
    del settings["name"], settings["data_dir"]
    if folder.exists():
        print(f"{folder} is there already: move it away to make it anew")
    else:
        try:
            write_dataset(cfg, folder, settings)
        except OSError:
            if not folder.exists():  # or else another process has made it meanwhile
                raise
    _, meta, train, val = load_data(folder)
    check(settings.items() <= meta.items(),
          f"{folder} has other settings: use another --name, or move it away")
    print(
        f"{folder}: {len(train):,} training and {len(val):,} validation tokens "
        f"({meta['tokenizer']}, vocabulary {meta['vocab_size']}), "
        f"validation {len(val) / (len(train) + len(val)):.1%}, "
        f"{meta['train_documents'] + meta['val_documents']:,} documents, "
        f"{time.monotonic() - started:.1f} s",
        flush=True,
    )
    return folder


class Data(NamedTuple):
    folder: Path
    meta: dict
    train: np.ndarray  # (train_tokens,) token ids
    val: np.ndarray  # (val_tokens,)

    def rows(self, tokens, starts, length):
        """Stretches of train or val: (len(starts), length) token ids."""
        rows = np.stack([tokens[start : start + length] for start in starts])
        check(rows.max() < self.meta["vocab_size"],
              f"{self.folder} holds ids beyond its vocabulary: delete it, make it anew")
        return rows

    def __reduce__(self):  # to pickle: a worker process opens the files itself
        return load_data, (self.folder,)


def load_data(folder):
    """Open a prepared dataset. Sizes are checked against meta.json; hashes are not (slow)."""
    folder = Path(folder)
    how = f"run prepare_data.py --dataset PATH --name={folder.name} first"
    if folder.name in KNOWN:
        flags = [f"--dataset={folder.name}", f"--data_dir={folder.parent}"]
        how = f"run prepare_data.py {shlex.join(flags)} first"
    check(folder.is_dir(), f"there is no dataset folder {folder}: {how}")
    try:
        meta = json.loads(Path(folder, "meta.json").read_text())
        train = np.memmap(folder / "train.bin", meta["dtype"], "r")
        val = np.memmap(folder / "val.bin", meta["dtype"], "r")
        sizes = [len(train), len(val)]
        check(sizes == [meta["train_tokens"], meta["val_tokens"]], f"its tokens are {sizes}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} is no prepared dataset, or is broken ({error!r}): use another --name, or "
            "move it away and run prepare_data.py again"
        ) from None
    return Data(folder, meta, train, val)


def encode_files(names, enc, data_dir):
    """The texts of files and folders as a Data that stands in memory alone, all of it `train`."""
    texts = read_named(names, data_dir)
    ids = np.concatenate([ids.astype(token_dtype(enc)) for ids in encode_all(texts.values(), enc)])
    return Data(Path(names[0]), dict(vocab_size=enc.n_vocab), ids, ids[:0])


# ---- Dataclasses to flags, errors to one line --------------------------------------------------


def parse_flags(configs, argv, description, epilog=""):
    """The flags that argv gives, {field: value}. configs: {group title: dataclass of flags}."""
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = partial(check, False)
    group = cache(parser.add_argument_group)
    names = ["--help"]
    switches = {}  # nanoGPT's --compile=False is --no-compile
    for title, config in configs.items():
        for field in fields(config):
            rules = field.metadata
            default = field.default
            name = f"--{field.name}"
            kind = [*get_args(field.type), field.type][0]  # X of X | None and of tuple[X, ...]
            options = dict(type=kind, choices=rules.get("choices"))
            if kind is bool:
                options = dict(action=argparse.BooleanOptionalAction)
                switches |= {f"{name}=True": name, f"{name}=False": f"--no-{field.name}"}
            if isinstance(default, tuple):
                options["nargs"] = "+"
                default = " ".join(map(str, default))
            if rules.get("positional"):
                options["nargs"] = "*"
                name = field.name
            told = f"{rules['help']} (default: {default})".replace("%", "%%")
            options["help"] = re.sub(r" \(default: (None)?\)", "", told)
            where = group(rules.get("group", title))
            names += where.add_argument(name, **options).option_strings
    given, unknown = parser.parse_known_args([switches.get(word, word) for word in argv])
    if unknown:
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(name, names, cutoff=0.7)
        hint = f"did you mean {close[0]}?" if close else "--help lists the flags"
        parser.error(f"unknown argument {name!r}: {hint}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(given).items()}


def run_main(main):
    """Run main(argv) as a script. What the user can put right is one line, with status 2."""
    status = 2
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        return
    except BrokenPipeError:
        os._exit(1)  # the reader (head, less) has left: sys.exit would flush stdout once more
    except KeyboardInterrupt:
        message = "interrupted"
        status = 130
    except ImportError as error:
        message = f"{error}: pip install -e '.[plot,hf]' has it"
    except (UsageError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not re.search("MemoryError|out of memory|allocate memory", repr(error)):
            raise
        message = ("out of memory: lower --batch_size, --block_size, --samples, --max_multiple, or "
                   "take a smaller model")
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def write_atomically(path, text):
    """Write text so that a reader finds the old file or the new one, never a half."""
    with atomic_path(path) as making:
        making.write_text(text, "utf-8")


def main(argv):
    prepare(DataConfig(**parse_flags({"data": DataConfig}, argv, __doc__)))


if __name__ == "__main__":
    run_main(main)
