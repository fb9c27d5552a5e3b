"""Our models beside nanoGPT's and nanochat's on one device: the two tables of results/speed.md.

    git clone https://github.com/karpathy/nanoGPT out/peers/nanoGPT
    git clone https://github.com/karpathy/nanochat out/peers/nanochat
    python results/beside.py nanogpt rope rnope-swa --n_layer=12 --n_embd=768 --n_head=12 \\
        --vocab_size=50304 --window=256 --optimizer=adamw --batch_size=64  # whole steps
    python results/beside.py nanogpt nanochat rnope-swa --seconds=120      # quality for the time

Without --seconds: the median time of a training step on random tokens. With it, each model trains
on the same dataset for so long after compiling, and is scored on the validation text. Each has its
own optimizer: nanoGPT's and ours go through train.py's schedule by share of the time, nanochat
through its own. The checkouts are imported as they are, and nothing of them is kept here.
"""

import contextlib
import copy
import io
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare_data
import train
from model import GPT, PRESETS, ModelConfig, UsageError, check_ranges, flag

NAMES = ("nanogpt", "nanochat", *PRESETS)


@dataclass
class BesideConfig:
    names: tuple[str, ...] = flag((), "of " + ", ".join(NAMES), positional=True)
    peers: str = flag("out/peers", "folder with the checkouts nanoGPT and nanochat")
    seconds: float = flag(0.0, "train for so long, then score; 0: time steps", least=0)
    steps: int = flag(20, "to take the median of", least=1)
    score_rows: int = flag(2048, "rows of the validation text that a score is the mean of", least=1)
    out: str = flag("", "file for the numbers, as JSON; empty: none")

    def __post_init__(self):
        check_ranges(self)
        if not self.names or set(self.names) - set(NAMES):
            raise UsageError(f"name models to compare, of {', '.join(NAMES)}")


def import_peer(folder, needed):
    """Put a checkout on the path, or say where to get it."""
    if not (folder / needed).exists():
        raise UsageError(f"{folder} holds no checkout: git clone "
                         f"https://github.com/karpathy/{folder.name} {folder}")
    sys.path.insert(0, str(folder))


def ours(name, cfg, shape, machine, peers):
    net = GPT(replace(shape, **PRESETS[name])).to(machine.device)
    compiled, optimizers = train.compile_model(net, cfg, machine), train.make_optimizers(net, cfg)

    def step(batch, share, n):
        lr = train.learning_rate(share * cfg.max_iters, cfg)
        return train.optimise(compiled, optimizers, [batch], lr, cfg, machine)

    return net, step, lambda x, y: compiled(x, y)[1], optimizers


def nanogpt(name, cfg, shape, machine, peers):
    import_peer(peers / "nanoGPT", "model.py")
    mine = sys.modules.pop("model")  # its file is called like ours
    try:
        import model as theirs
    finally:
        sys.modules["model"] = mine
    net = theirs.GPT(theirs.GPTConfig(
        block_size=shape.block_size, vocab_size=shape.vocab_size, n_layer=shape.n_layer,
        n_head=shape.n_head, n_embd=shape.n_embd, dropout=0.0, bias=False)).to(machine.device)
    optimizer = net.configure_optimizers(cfg.weight_decay, cfg.learning_rate,
                                         (cfg.beta1, cfg.beta2), machine.device.type)
    compiled = torch.compile(net) if machine.cuda else net

    def step(batch, share, n):
        lr = train.learning_rate(share * cfg.max_iters, cfg)
        return train.optimise(compiled, [optimizer], [batch], lr, cfg, machine)

    return net, step, lambda x, y: compiled(x, y)[1], [optimizer]


def nanochat(name, cfg, shape, machine, peers):
    """With the schedules of its scripts/base_train.py, by share of the time; no windows."""
    import_peer(peers / "nanochat", "nanochat/gpt.py")
    from nanochat.gpt import GPT as Theirs
    from nanochat.gpt import GPTConfig

    heads = max(1, shape.n_embd // 128)  # of 128, its default
    with torch.device("meta"):
        net = Theirs(GPTConfig(
            sequence_len=shape.block_size, vocab_size=shape.vocab_size, n_layer=shape.n_layer,
            n_head=heads, n_kv_head=heads, n_embd=shape.n_embd, window_pattern="L"))
    net.to_empty(device=machine.device)
    net.init_weights()
    # Its rates are for 2^19 tokens a step; its decay for a d12 trained on 12 tokens a weight, here
    # for the 200M tokens that two minutes are.
    s = math.sqrt(cfg.batch_size * shape.block_size / 2**19)
    decay = 0.28 * s * 12 * (12 * 12 * 768**2 + 32768 * 768) / 2e8
    optimizer = net.setup_optimizer(unembedding_lr=0.008 * s, embedding_lr=0.3 * s,
                                    scalar_lr=0.5 * s, matrix_lr=0.02 * s, weight_decay=decay)
    compiled = torch.compile(net, dynamic=False) if machine.cuda else net

    def step(batch, share, n):
        left = min(1.0, (1 - share) / 0.65)  # of the warm-down, its last 65 %
        lr = (n + 1) / 40 if n < 40 else left + (1 - left) * 0.05
        momentum = 0.85 + 0.12 * n / 400 if n < 400 else 0.90 + 0.07 * left
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = decay * (1 + math.cos(math.pi * share)) / 2
        loss = compiled(*batch)
        loss.backward()
        optimizer.step()
        net.zero_grad(set_to_none=True)
        return loss.detach()

    return net, step, compiled, [optimizer]


def time_steps(contender, draw, cfg, about, machine):
    """Seconds of a step, the median of some after three."""
    net, step, _, _ = contender
    batch, times = draw(cfg.batch_size), []
    for n in range(3 + about.steps):
        if n == 3 and machine.cuda:
            torch.cuda.reset_peak_memory_stats()
        began = machine.clock()
        step(batch, 0.5, n)
        times.append(machine.clock() - began)
    median = float(np.median(times[3:]))
    return dict(step_ms=median * 1e3, tokens_per_second=batch[0].numel() / median,
                peak_gb=torch.cuda.max_memory_allocated() / 1e9 if machine.cuda else None)


def train_for(contender, draw, score, cfg, about, machine):
    """Train for about.seconds of the clock after compiling, then score."""
    net, step, loss, optimizers = contender
    kept = copy.deepcopy([net.state_dict(), *(o.state_dict() for o in optimizers)])
    step(draw(cfg.batch_size), 0.0, 0)  # compiles; then all is put back, the optimizers' state too
    score(loss)
    for thing, state in zip([net, *optimizers], kept, strict=True):
        thing.load_state_dict(state)
    began, n, spent = machine.clock(), 0, 0.0
    while spent < about.seconds:
        step(draw(cfg.batch_size), min(1.0, spent / about.seconds), n)
        n += 1
        # Asking for the time waits for the device: only now and then, guessed in between.
        spent = machine.clock() - began if n % 10 == 0 or n < 10 else spent * (n + 1) / n
    spent = machine.clock() - began
    tokens = n * cfg.batch_size * draw.T
    return dict(seconds=spent, steps=n, tokens=tokens, tokens_per_second=tokens / spent,
                bits_per_byte=score(loss))


def main(argv):
    kinds = [BesideConfig, train.TrainConfig, ModelConfig]
    given = prepare_data.parse_flags(kinds, argv, __doc__)
    about = BesideConfig(**{k: given.pop(k) for k in list(given) if hasattr(BesideConfig, k)})
    machine = train.Machine(given.get("device", "auto"), given.get("dtype", "auto"))
    cfg, shape = train.settle(dict(vocab_size=320) | given)
    cfg = replace(cfg, warmup_iters=max(1, cfg.max_iters // 50))  # 2 % of the time
    T, device = shape.block_size, machine.device
    if about.seconds:
        data = train.open_dataset(cfg, T)
        texts = [torch.from_numpy(np.array(t)).to(device) for t in (data.train, data.val)]
        scale = data.meta["val_tokens"] / data.meta["val_bytes"] / math.log(2)
    generator = torch.Generator(device)

    def rows_at(text, starts):
        rows = text[starts[:, None] + torch.arange(T + 1, device=device)].long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def draw(rows):
        if not about.seconds:
            shapes = rows, T
            return tuple(torch.randint(shape.vocab_size, shapes, device=device) for _ in "xy")
        most = len(texts[0]) - T - 1
        return rows_at(texts[0], torch.randint(most, (rows,), device=device, generator=generator))

    @torch.no_grad()
    def score(loss):
        starts = torch.linspace(0, len(texts[1]) - T - 1, about.score_rows, device=device).long()
        nats = 0.0
        for part in starts.split(cfg.batch_size):
            with machine.autocast():
                nats += loss(*rows_at(texts[1], part)).item() * len(part)
        return nats / len(starts) * scale

    draw.T, found = T, []
    for name in about.names:
        torch.manual_seed(cfg.seed)
        generator.manual_seed(cfg.seed)
        torch.compiler.reset()
        make = dict(nanogpt=nanogpt, nanochat=nanochat).get(name, ours)
        with contextlib.redirect_stdout(io.StringIO()):  # they tell of their parameter groups
            contender = make(name, cfg, shape, machine, Path(about.peers))
        measured = (train_for(contender, draw, score, cfg, about, machine) if about.seconds
                    else time_steps(contender, draw, cfg, about, machine))
        row = dict(name=name, parameters=sum(p.numel() for p in contender[0].parameters()))
        found.append(row | measured)
        print(json.dumps(found[-1]), flush=True)
        del contender
    if about.out:
        how = dict(command=" ".join(sys.argv), device=machine.name, torch=torch.__version__)
        text = json.dumps(how | dict(rows=found), indent=1)
        prepare_data.write_atomically(Path(about.out), text)


if __name__ == "__main__":
    prepare_data.run_main(main)
