"""Our models beside nanoGPT's and nanochat's on one device: two tables of results/speed.md.

    git clone https://github.com/karpathy/nanoGPT out/peers/nanoGPT
    git clone https://github.com/karpathy/nanochat out/peers/nanochat
    git -C out/peers/nanoGPT checkout 3adf61e
    git -C out/peers/nanochat checkout 92d63d4
    python results/beside.py nanogpt rope --n_layer=12 --n_embd=768 --n_head=12 \\
        --vocab_size=50304 --optimizer=adamw --batch_size=64          # whole steps
    python results/beside.py nanogpt rnope-swa --seconds=120          # quality for the time

Without --seconds: the median time of a training step on random tokens. With it, each model trains
on the plain text of one dataset (as with train.py --repeat_frac=0) for so long after compiling, and
is scored on the validation text. nanoGPT and ours go through train.py's schedule by share of the
time; nanochat has its own optimizer and schedules. The checkouts are imported as they are; nothing
of them is kept here.
"""

import copy
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bench import clock_steps, take_step

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare_data
import train
from model import GPT, PRESETS, ModelConfig, check, check_ranges, flag

PEERS = {"nanogpt": "nanoGPT/model.py", "nanochat": "nanochat/nanochat/gpt.py"}
NAMES = (*PEERS, *PRESETS)
SHARES = 10**6  # of the time: what train.py's schedule takes for its steps


@dataclass
class BesideConfig:
    names: tuple[str, ...] = flag((), "of " + ", ".join(NAMES), positional=True)
    peers: str = flag("out/peers", "folder with the checkouts nanoGPT and nanochat")
    seconds: float = flag(0.0, "train for so long, then score; 0: time steps")
    steps: int = flag(20, "to take the median of, without --seconds", least=1)
    data: str = flag("data/python", "prepared dataset to train on, with --seconds")
    score_rows: int = flag(2048, "rows of validation text that a score is the mean of", least=1)
    batch_size: int = flag(32, "rows of a step", least=1)
    optimizer: str = flag("muon", "of our hidden matrices", choices=("muon", "adamw"))
    learning_rate: float = flag(train.TrainConfig.learning_rate, "peak of ours; nanoGPT has 2e-3")
    seed: int = flag(1, "of weights and rows", most=2**32 - 1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = flag("auto", "bfloat16 where the GPU has it", choices=train.DTYPES)
    out: str = flag("", "file for the numbers, as JSON; empty: none")

    def __post_init__(self):
        check_ranges(self)
        known = self.names and set(self.names) <= set(NAMES)
        check(known, f"name models to compare, of {', '.join(NAMES)}")
        for name in set(self.names) & set(PEERS):
            path = Path(self.peers, PEERS[name])
            repository = PEERS[name].split("/")[0]
            url = f"https://github.com/karpathy/{repository}"
            check(path.exists(), f"no {path}: git clone {url} {self.peers}/{repository}")
        check(
            not self.out or not Path(self.out).is_dir(),
            f"--out={self.out} is a folder: name a file",
        )


# ---- The text -----------------------------------------------------------------------------------


class Text:
    """A dataset: plain rows of train, drawn on the device so that no model waits, and val."""

    def __init__(self, data, T, machine):
        self.data = data
        self.T = T
        self.machine = machine
        tokens = np.array(data.train, np.int32)  # not every device can index uint16
        self.train = torch.from_numpy(tokens).to(machine.device)
        self.generator = torch.Generator(machine.device)

    def draw(self, n):
        """Inputs and targets of n rows, int64 (n, T) each."""
        device = self.train.device
        most = len(self.train) - self.T - 1
        starts = torch.randint(most, (n, 1), device=device, generator=self.generator)
        rows = self.train[starts + torch.arange(self.T + 1, device=device)].long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    @torch.no_grad()
    def score(self, model, n, batch_size):
        """Bits per byte of n evenly spaced rows of val, up to whole batches."""
        batches = math.ceil(n / batch_size)
        starts = np.linspace(0, len(self.data.val) - self.T - 1, batches * batch_size)
        nats = 0.0
        for some in starts.astype(int).reshape(batches, batch_size):
            rows = self.data.rows(self.data.val, some, self.T + 1)
            nats += train.sum_losses(model, rows, self.T, self.machine).item()
        return train.bits_per_byte(nats / len(starts), self.data.meta)


# ---- The contenders -----------------------------------------------------------------------------


class Contender(NamedTuple):
    model: torch.nn.Module
    optimizers: list
    loss: Callable  # (inputs, targets) -> (anything, mean nats), as a model of ours is called
    step: Callable  # (batch, share of the time gone, steps done): a training step


def recipe(cfg):
    """What train.py's functions go by: 2 % of the time to warm up, then a cosine."""
    return train.TrainConfig(
        optimizer=cfg.optimizer,
        learning_rate=cfg.learning_rate,
        max_iters=SHARES,
        warmup_iters=SHARES // 50,
    )


def follow_recipe(model, compiled, optimizers, about, machine):
    """A contender under train.py's autocast, clipping and schedule. about: a recipe."""

    def step(batch, share, n):
        lr = train.learning_rate(share * SHARES, about)
        train.set_rate(optimizers, lr)
        take_step(compiled, optimizers, batch, machine)

    return Contender(model, optimizers, compiled, step)


def ours(cfg, config, machine):
    model = GPT(config).to(machine.device)
    about = recipe(cfg)
    compiled = train.compile_model(model, about, machine)
    return follow_recipe(model, compiled, train.make_optimizers(model, about), about, machine)


@contextmanager
def importing(folder, *hidden):
    """Import from a checkout, whose modules may be called like ours; leave no trace of it."""
    mine = {name: sys.modules.pop(name) for name in hidden}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.update(mine)


def nanogpt(cfg, config, machine):
    """Its own AdamW and decays. Its own rate, 6e-4, is for 124M parameters: 2e-3 here."""
    with importing(Path(cfg.peers, "nanoGPT"), "model"):
        from model import GPT as Theirs
        from model import GPTConfig
    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    sizes = {name: getattr(config, name) for name in sizes}
    model = Theirs(GPTConfig(**sizes, dropout=0.0, bias=False)).to(machine.device)
    about = replace(recipe(cfg), learning_rate=2e-3)
    optimizer = model.configure_optimizers(
        0.1, about.learning_rate, (0.9, 0.95), machine.device.type
    )
    compiled = torch.compile(model) if machine.cuda else model
    return follow_recipe(model, compiled, [optimizer], about, machine)


def nanochat_schedule(share, n):
    """base_train.py's, by share of the time: factor on the rates, Muon's momentum, on its decay."""
    left = min(1.0, (1 - share) / 0.65)  # of the last 65 %, in which the rates fall
    rate = (n + 1) / 40 if n < 40 else left + (1 - left) * 0.05
    momentum = 0.85 + 0.12 * n / 400 if n < 400 else 0.90 + 0.07 * left
    return rate, momentum, (1 + math.cos(math.pi * share)) / 2


def nanochat_optimizer(model, cfg, T):
    """(optimizer, Muon's decay). Its rates are for 2^19 tokens a step, and go by the root."""
    scale = math.sqrt(cfg.batch_size * T / 2**19)
    # Its decay is for a d12 that sees 12 tokens a weight. Here the model sees 200M tokens in two
    # minutes, as 25M parameters do on an H100.
    seen = 2e8 * (cfg.seconds or 120) / 120
    decay = 0.28 * scale * 12 * (12 * 12 * 768**2 + 32768 * 768) / seen
    rates = dict(unembedding_lr=0.008, embedding_lr=0.3, scalar_lr=0.5, matrix_lr=0.02)
    rates = {name: rate * scale for name, rate in rates.items()}
    return model.setup_optimizer(**rates, weight_decay=decay), decay


def nanochat(cfg, config, machine):
    """All layers full: without FlashAttention-3 its windows are masks, and slower than none."""
    os.environ["NANOCHAT_DTYPE"] = str(machine.dtype).removeprefix("torch.")
    with importing(Path(cfg.peers, "nanochat")):
        from nanochat.gpt import GPT as Theirs
        from nanochat.gpt import GPTConfig
    heads = config.n_embd // 128
    with torch.device("meta"):
        model = Theirs(
            GPTConfig(
                sequence_len=config.block_size,
                vocab_size=config.vocab_size,
                n_layer=config.n_layer,
                n_head=heads,
                n_kv_head=heads,
                n_embd=config.n_embd,
                window_pattern="L",
            )
        )
    model.to_empty(device=machine.device)
    model.init_weights()
    optimizer, decay = nanochat_optimizer(model, cfg, config.block_size)
    compiled = torch.compile(model, dynamic=False) if machine.cuda else model

    def step(batch, share, n):
        rate, momentum, decay_factor = nanochat_schedule(share, n)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = decay * decay_factor
        compiled(*batch).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    def loss(x, y):
        with torch.autocast(machine.device.type, enabled=False):  # it casts on its own
            return None, compiled(x, y)

    return Contender(model, [optimizer], loss, step)


# ---- Measuring ----------------------------------------------------------------------------------


def time_steps(contender, batch, cfg, machine):
    step = partial(contender.step, batch, 0.5, 0)
    median, _, peak = clock_steps(step, machine, cfg.steps)
    return dict(step_ms=median * 1e3, tokens_per_second=batch[0].numel() / median, peak_gb=peak)


def warm_up(contender, text, cfg):
    """Compile all that training and scoring need, then put the model and its optimizers back."""
    things = [contender.model, *contender.optimizers]
    kept = copy.deepcopy([thing.state_dict() for thing in things])
    contender.step(text.draw(cfg.batch_size), 0.0, 0)
    text.score(contender.loss, cfg.batch_size, cfg.batch_size)
    for thing, state in zip(things, kept, strict=True):
        thing.load_state_dict(state)


def train_for(contender, text, cfg, machine):
    """Train for cfg.seconds of the clock after compiling, then score."""
    warm_up(contender, text, cfg)
    began = machine.clock()
    steps = 0
    spent = 0.0
    while spent < cfg.seconds:
        contender.step(text.draw(cfg.batch_size), spent / cfg.seconds, steps)
        steps += 1
        # The clock waits for the device: it is read now and then, and guessed in between.
        if steps < 10 or steps % 10 == 0:
            spent = machine.clock() - began
        else:
            spent *= steps / (steps - 1)
    spent = machine.clock() - began
    tokens = steps * cfg.batch_size * text.T
    bits = text.score(contender.loss, cfg.score_rows, cfg.batch_size)
    return dict(
        seconds=spent,
        steps=steps,
        tokens=tokens,
        tokens_per_second=tokens / spent,
        bits_per_byte=bits,
    )


# ---- The command --------------------------------------------------------------------------------


def open_text(cfg, configs, machine):
    """The dataset to train on. UsageError where it does not fit the models, which are alike."""
    data = prepare_data.load_data(cfg.data)
    T = configs[0].block_size
    least = min(len(data.train) - 1, len(data.val))
    check(least > T, f"{cfg.data} has room for rows of {least} tokens: lower --block_size")
    size = data.meta["vocab_size"]
    check(
        size <= configs[0].vocab_size,
        f"{cfg.data} has {size} token ids: use --vocab_size={math.ceil(size / 64) * 64}",
    )
    return Text(data, T, machine)


def measure(name, config, text, cfg, machine):
    """A row of the table."""
    torch.manual_seed(cfg.seed)
    torch.compiler.reset()
    make = dict(nanogpt=nanogpt, nanochat=nanochat).get(name, ours)
    with redirect_stdout(io.StringIO()):  # they tell of their groups of weights
        contender = make(cfg, config, machine)
    row = dict(name=name, parameters=sum(p.numel() for p in contender.model.parameters()))
    if text:
        text.generator.manual_seed(cfg.seed)
        return row | train_for(contender, text, cfg, machine)
    shape = (cfg.batch_size, config.block_size)
    batch = [torch.randint(config.vocab_size, shape, device=machine.device) for _ in "xy"]
    return row | time_steps(contender, batch, cfg, machine)


def main(argv):
    groups = {"comparison": BesideConfig, "model": ModelConfig}
    given = prepare_data.parse_flags(groups, argv, __doc__)
    mine = {name: given.pop(name) for name in list(given) if hasattr(BesideConfig, name)}
    cfg = BesideConfig(**mine)
    machine = train.Machine(cfg.device, cfg.dtype)
    sizes = dict(vocab_size=320) | given  # 257 bytes, up to a multiple of 64
    # All of them now: a wrong flag fails before minutes of training. Peers take the sizes.
    presets = [PRESETS.get(name, dict(pattern="R")) for name in cfg.names]
    configs = [ModelConfig(**preset | sizes) for preset in presets]
    check(
        "nanochat" not in cfg.names or configs[0].n_embd % 128 == 0,
        f"--n_embd={configs[0].n_embd}: nanochat has heads of 128",
    )
    text = open_text(cfg, configs, machine) if cfg.seconds else None
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, config in zip(cfg.names, configs, strict=True):
        rows.append(measure(name, config, text, cfg, machine))
        print(json.dumps(rows[-1]), flush=True)
        if cfg.out:
            about = dict(
                command=shlex.join(sys.argv),
                device=machine.name,
                torch=torch.__version__,
                revision=train.git_revision(),
                settings=asdict(cfg),
                sizes=given,
                rows=rows,
            )
            prepare_data.write_atomically(cfg.out, json.dumps(about, indent=1))


if __name__ == "__main__":
    prepare_data.run_main(main)
