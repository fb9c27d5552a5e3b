"""Our models beside nanoGPT's and nanochat's on one device: two tables of results/speed.md.

    git clone https://github.com/karpathy/nanoGPT out/peers/nanoGPT
    git clone https://github.com/karpathy/nanochat out/peers/nanochat
    git -C out/peers/nanoGPT checkout 3adf61e
    git -C out/peers/nanochat checkout 92d63d4
    python results/beside.py nanogpt rope --n_layer=12 --n_embd=768 --n_head=12 \\
        --vocab_size=50304 --optimizer=adamw --batch_size=64          # whole steps
    python results/beside.py nanogpt rnope-swa --seconds=120          # quality for the time

Without --seconds: the median time of a training step on random tokens. With it, each model trains
on one dataset for so long after compiling, and is scored on the validation text. nanoGPT's and ours
go through train.py's schedule by share of the time, with the flags given; nanochat has its own
optimizer and schedules. The checkouts are imported as they are; nothing of them is kept here.
"""

import contextlib
import copy
import io
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare_data
import train
from model import GPT, PRESETS, ModelConfig, UsageError, check_ranges, flag

PEERS = {"nanogpt": ("nanoGPT", "model.py"), "nanochat": ("nanochat", "nanochat/gpt.py")}
NAMES = (*PEERS, *PRESETS)
SHARES = 10**6  # of the time: what a schedule takes for its steps


@dataclass
class BesideConfig:
    names: tuple[str, ...] = flag((), "of " + ", ".join(NAMES), positional=True)
    peers: str = flag("out/peers", "folder with the checkouts nanoGPT and nanochat")
    seconds: float = flag(0.0, "train for so long, then score; 0: time steps", least=0)
    steps: int = flag(20, "to take the median of, without --seconds", least=1)
    data: str = flag("data/python", "prepared dataset to train on, with --seconds")
    score_rows: int = flag(2048, "rows of validation text that a score is the mean of", least=1)
    batch_size: int = flag(32, "rows of a step", least=1)
    optimizer: str = flag("muon", "of our hidden matrices", choices=("muon", "adamw"))
    learning_rate: float = flag(2e-3, "peak, but for nanochat", above=0)
    seed: int = flag(1, "of weights and rows", least=0, most=2**63 - 1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = flag("auto", "bfloat16 on CUDA if auto", choices=("auto", "float32", "bfloat16"))
    out: str = flag("", "file for the numbers, as JSON; empty: none")

    def __post_init__(self):
        check_ranges(self)
        if not self.names or set(self.names) - set(NAMES):
            raise UsageError(f"name models to compare, of {', '.join(NAMES)}")
        for name in set(self.names) & set(PEERS):
            folder = Path(self.peers) / PEERS[name][0]
            if not (folder / PEERS[name][1]).exists():
                raise UsageError(f"{folder} holds no checkout: git clone "
                                 f"https://github.com/karpathy/{folder.name} {folder}")


@contextlib.contextmanager
def importing(folder, *hidden):
    """Import from a checkout, whose modules may be called like ours; leave no trace of the path."""
    mine = {name: sys.modules.pop(name) for name in hidden}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.update(mine)


class Text:
    """A dataset: rows of train, drawn on the device so that no model waits, and scores on val."""

    def __init__(self, data, T, machine):
        self.data, self.T, self.machine = data, T, machine
        # int32, since indexing a uint16 tensor is not to be had on every device.
        self.train = torch.from_numpy(np.array(data.train, np.int32)).to(machine.device)
        self.generator = torch.Generator(machine.device)

    def draw(self, n):
        most, device = len(self.train) - self.T - 1, self.train.device
        starts = torch.randint(most, (n, 1), device=device, generator=self.generator)
        rows = self.train[starts + torch.arange(self.T + 1, device=device)].long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def score(self, loss, n, batch_size):
        """Bits per byte of n rows of val, up to whole batches. loss(x, y): mean nats of a batch."""
        cfg = train.TrainConfig(batch_size=batch_size, eval_iters=-(-n // batch_size))
        nats = train.evaluate(lambda *xy: (None, loss(*xy)), self.data, cfg, self.T, self.machine)
        return train.bits_per_byte(nats, self.data.meta)


# A contender: (model, optimizers, step(batch, share of the time gone, steps so far), loss(x, y)).


def recipe(cfg):
    """What train.py's functions go by: 2 % of the time to warm up, then a cosine."""
    return train.TrainConfig(optimizer=cfg.optimizer, learning_rate=cfg.learning_rate,
                             max_iters=SHARES, warmup_iters=SHARES // 50)


def contend(net, optimizers, compiled, about, machine):
    """A contender under train.py's autocast, clipping and schedule. about: a recipe."""
    def step(batch, share, n):
        lr = train.learning_rate(share * SHARES, about)
        return train.optimise(compiled, optimizers, [batch], lr, about, machine)

    return net, optimizers, step, lambda x, y: compiled(x, y)[1]


def ours(cfg, shape, machine):
    net, about = GPT(shape).to(machine.device), recipe(cfg)
    compiled = train.compile_model(net, about, machine)
    return contend(net, train.make_optimizers(net, about), compiled, about, machine)


def nanogpt(cfg, shape, machine):
    with importing(Path(cfg.peers) / "nanoGPT", "model"):
        from model import GPT as Theirs
        from model import GPTConfig
    net = Theirs(GPTConfig(
        block_size=shape.block_size, vocab_size=shape.vocab_size, n_layer=shape.n_layer,
        n_head=shape.n_head, n_embd=shape.n_embd, dropout=0.0, bias=False)).to(machine.device)
    about = recipe(cfg)
    optimizer = net.configure_optimizers(about.weight_decay, about.learning_rate,
                                         (about.beta1, about.beta2), machine.device.type)
    return contend(net, [optimizer], torch.compile(net) if machine.cuda else net, about, machine)


def nanochat_schedule(share, n):
    """base_train.py's, by share of the time: factor on the rates, Muon's momentum, on its decay."""
    left = min(1.0, (1 - share) / 0.65)  # of the last 65 %, in which the rates fall
    rate = (n + 1) / 40 if n < 40 else left + (1 - left) * 0.05
    momentum = 0.85 + 0.12 * n / 400 if n < 400 else 0.90 + 0.07 * left
    return rate, momentum, (1 + math.cos(math.pi * share)) / 2


def nanochat(cfg, shape, machine):
    """All layers full: without FlashAttention-3 its windows are masks, and slower than none."""
    os.environ["NANOCHAT_DTYPE"] = str(machine.dtype)[6:]
    with importing(Path(cfg.peers) / "nanochat"):
        from nanochat.gpt import GPT as Theirs
        from nanochat.gpt import GPTConfig
    heads, T = shape.n_embd // 128, shape.block_size
    with torch.device("meta"):
        net = Theirs(GPTConfig(
            sequence_len=T, vocab_size=shape.vocab_size, n_layer=shape.n_layer, n_head=heads,
            n_kv_head=heads, n_embd=shape.n_embd, window_pattern="L"))
    net.to_empty(device=machine.device)
    net.init_weights()
    # Its rates are for 2^19 tokens a step, its decay for a d12 that sees 12 tokens a weight: here
    # it sees 200M in two minutes, as 25M parameters do on an H100.
    s, seen = math.sqrt(cfg.batch_size * T / 2**19), 2e8 * (cfg.seconds or 120) / 120
    decay = 0.28 * s * 12 * (12 * 12 * 768**2 + 32768 * 768) / seen
    optimizer = net.setup_optimizer(unembedding_lr=0.008 * s, embedding_lr=0.3 * s,
                                    scalar_lr=0.5 * s, matrix_lr=0.02 * s, weight_decay=decay)
    compiled = torch.compile(net, dynamic=False) if machine.cuda else net

    def step(batch, share, n):
        rate, momentum, share_of_decay = nanochat_schedule(share, n)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = momentum, decay * share_of_decay
        loss = compiled(*batch)
        loss.backward()
        optimizer.step()
        net.zero_grad(set_to_none=True)
        return loss.detach()

    def loss(x, y):
        with torch.autocast(machine.device.type, enabled=False):  # it casts on its own
            return compiled(x, y)

    return net, [optimizer], step, loss


def time_steps(contender, batch, cfg, machine):
    step = partial(contender[2], batch, 0.5, 0)
    median, _, peak = train.clock_steps(step, machine, least=cfg.steps, seconds=0)
    return dict(step_ms=median * 1e3, tokens_per_second=batch[0].numel() / median, peak_gb=peak)


def warm_up(contender, text, cfg):
    """Compile all that training and scoring need, then put the model and its optimizers back."""
    net, optimizers, step, loss = contender
    things = [net, *optimizers]
    kept = copy.deepcopy([thing.state_dict() for thing in things])
    step(text.draw(cfg.batch_size), 0.0, 0)
    text.score(loss, cfg.score_rows, cfg.batch_size)
    for thing, state in zip(things, kept, strict=True):
        thing.load_state_dict(state)


def train_for(contender, text, cfg, machine):
    """Train for cfg.seconds of the clock after compiling, then score."""
    _, _, step, loss = contender
    warm_up(contender, text, cfg)
    began, n, spent = machine.clock(), 0, 0.0
    while spent < cfg.seconds:
        step(text.draw(cfg.batch_size), spent / cfg.seconds, n)
        n += 1
        # The clock waits for the device: it is read now and then, and guessed in between.
        read = n < 10 or n % 10 == 0
        spent = machine.clock() - began if read else spent * n / (n - 1)
    spent, tokens = machine.clock() - began, n * cfg.batch_size * text.T
    return dict(seconds=spent, steps=n, tokens=tokens, tokens_per_second=tokens / spent,
                bits_per_byte=text.score(loss, cfg.score_rows, cfg.batch_size))


def main(argv):
    given = prepare_data.parse_flags([BesideConfig, ModelConfig], argv, __doc__)
    cfg = BesideConfig(**{f.name: given.pop(f.name) for f in fields(BesideConfig)
                          if f.name in given})
    machine = train.Machine(cfg.device, cfg.dtype)
    data = prepare_data.load_data(Path(cfg.data)) if cfg.seconds else None
    known = data.meta["vocab_size"] if data else 320
    given = dict(vocab_size=train.padded(known)) | given
    if data and given["vocab_size"] < known:
        raise UsageError(f"{cfg.data} has {known} token ids: drop --vocab_size")
    # All of them now: a wrong flag is to fail before minutes of training. Peers take the sizes.
    shapes = [ModelConfig(**PRESETS.get(name, dict(pattern="R")) | given) for name in cfg.names]
    if data and (least := min(len(data.train) - 1, len(data.val))) <= shapes[0].block_size:
        raise UsageError(f"{cfg.data} has room for rows of {least} tokens: lower --block_size")
    if cfg.out and Path(cfg.out).is_dir():
        raise UsageError(f"--out={cfg.out} is a folder: name a file")
    if "nanochat" in cfg.names and shapes[0].n_embd % 128:
        raise UsageError(f"--n_embd={shapes[0].n_embd}: nanochat has heads of 128")
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    rows, text = [], data and Text(data, shapes[0].block_size, machine)
    for name, shape in zip(cfg.names, shapes, strict=True):
        torch.manual_seed(cfg.seed)
        torch.compiler.reset()
        make = dict(nanogpt=nanogpt, nanochat=nanochat).get(name, ours)
        with contextlib.redirect_stdout(io.StringIO()):  # they tell of their groups of weights
            contender = make(cfg, shape, machine)
        if text:
            text.generator.manual_seed(cfg.seed)
            found = train_for(contender, text, cfg, machine)
        else:
            at_random = partial(torch.randint, shape.vocab_size, device=machine.device)
            batch = [at_random((cfg.batch_size, shape.block_size)) for _ in "xy"]
            found = time_steps(contender, batch, cfg, machine)
        parameters = sum(p.numel() for p in contender[0].parameters())
        rows.append(dict(name=name, parameters=parameters) | found)
        print(json.dumps(rows[-1]), flush=True)
        if cfg.out:
            how = dict(command=" ".join(sys.argv), device=machine.name, torch=torch.__version__,
                       settings=asdict(cfg), sizes=given, rows=rows)
            prepare_data.write_atomically(Path(cfg.out), json.dumps(how, indent=1))
        del contender


if __name__ == "__main__":
    prepare_data.run_main(main)
