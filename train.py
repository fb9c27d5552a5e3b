"""Train one model of model.py, on one device or on many under torchrun.

    python train.py                                      # RNoPE-SWA on the default text
    python train.py --preset=rope                        # the baseline, everything else equal
    python train.py --init_from=out/rnope-swa --long_rows=8192  # the paper's second stage, on a GPU
    torchrun --standalone --nproc_per_node=8 train.py --gradient_accumulation_steps=8
    python train.py --bench=rope,rnope-swa --bench_lengths=1024,8192  # speed, nothing is trained

A run lives in out/NAME: config.json (how it was made), log.jsonl (what it did) and ckpt.pt (where
it stands). The batch of a step is a pure function of the seed and the step, so
resuming needs no position in the data, and N processes see the batches that one would.
"""

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import prepare_data
from model import GPT, PRESETS, ModelConfig, UsageError, check_ranges, flag, path_taken

ASKED = ("needle", *prepare_data.TASKS)
SCALES = {  # defaults that fit the machine; flags given beat them
    "cpu": dict(
        n_layer=4, n_head=4, n_embd=128, block_size=256, window=32, batch_size=8, eval_iters=16,
        max_iters=1500, warmup_iters=60, learning_rate=4e-3, needles=1, needle_digits=2,
    ),
    "gpu": dict(),  # the dataclasses' own defaults: 25M parameters
}  # fmt: skip

PEAK_FLOPS = {  # dense bf16, from the vendors' datasheets; for MFU
    "H200": 989e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


@dataclass
class TrainConfig:
    preset: str = flag("rnope-swa", "named set of model flags", choices=tuple(PRESETS))
    scale: str = flag("auto", "named set of defaults", choices=("auto", *SCALES))
    dataset: str = flag("python", "folder under data_dir that prepare_data.py wrote")
    data_dir: str = flag("data", "where prepared datasets are")
    out_dir: str = flag("", "folder of the run; empty: out/PRESET, or PATTERN, numbered if taken")
    init_from: str = flag("", "run whose weights to start from, with a new schedule (stage two)")
    resume: bool = flag(False, "go on with out_dir, or the newest run, where it stopped")
    batch_size: int = flag(32, "rows of a micro-batch, per process", least=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches of a step, of all ranks", least=1)
    max_iters: int = flag(1000, "optimiser steps", least=1)
    needle_frac: float = flag(0.8, "share of rows with facts and questions", least=0, most=1)
    tasks: str = flag("needle", "what they ask: " + ",".join(ASKED), each=ASKED)
    needles: int = flag(4, "needle: facts planted in such a row", least=1)
    needle_questions: int = flag(0, "needle: facts asked for at the row's end; 0: all", least=0)
    needle_digits: int = flag(7, "needle: length of the number that each fact states", least=1)
    long_rows: int = flag(0, "tokens of a row in a second stage's long steps; 0: none", least=0)
    long_frac: float = flag(0.5, "share of steps that are long, interleaved", least=0, most=1)
    optimizer: str = flag("muon", "for the hidden matrices", choices=("muon", "adamw"))
    learning_rate: float = flag(2e-3, "peak learning rate", above=0)
    min_lr: float = flag(0.0, "learning rate at the end; 0: a tenth of the peak", least=0)
    warmup_iters: int = flag(30, "steps of linear warm-up", least=0)
    weight_decay: float = flag(0.1, "on matrices only", least=0)
    beta1: float = flag(0.9, "AdamW", least=0, most=0.9999)
    beta2: float = flag(0.95, "AdamW", least=0, most=0.9999)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no clipping", least=0)
    eval_interval: int = flag(500, "steps between evaluations, each followed by a save", least=1)
    eval_iters: int = flag(10, "batches of an evaluation, at one batch_size the same", least=1)
    log_interval: int = flag(10, "steps between lines of log.jsonl", least=1)
    seed: int = flag(1337, "of the weights, the batches, the facts", least=0, most=2**63 - 1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = flag("auto", "bfloat16 on CUDA if auto", choices=("auto", "float32", "bfloat16"))
    compile: bool = flag(True, "torch.compile, on CUDA only")
    bench: str = flag("", "presets to time instead of training, e.g. rope,rnope-swa")
    bench_lengths: str = flag("", "context lengths to time, e.g. 1024,8192; empty: block_size")
    bench_paths: str = flag("", "attention paths to time, e.g. mask,blocks; empty: --attention")

    def __post_init__(self):
        check_ranges(self)
        if self.min_lr > self.learning_rate:
            raise UsageError(f"--min_lr={self.min_lr}: above --learning_rate={self.learning_rate}")
        if self.tasks != "needle" and not self.needle_frac:
            raise UsageError(f"--tasks={self.tasks} plants nothing: add --needle_frac=0.8, or so")
        if self.needle_questions > self.needles:
            raise UsageError(f"--needle_questions={self.needle_questions}: above "
                             f"--needles={self.needles}")

    def asking(self):
        """What draw_task wants to know: the names of the tasks, and the sizes of `needle`."""
        questions = self.needle_questions or self.needles
        return self.tasks.split(","), (self.needles, self.needle_digits, questions)


# What may differ when a run is resumed: none of it changes what the next step computes.
RESUMABLE = {"resume", "out_dir", "data_dir", "device", "compile", "eval_interval", "eval_iters",
             "log_interval"}

SETTLED = dict(scale="auto", dtype="auto")  # what asks for a choice: the choice is what is saved

STOPS = (signal.SIGINT, signal.SIGTERM)  # the step at hand is finished, checked and saved, first


class Machine:
    """This process among its peers: rank, world, device, and the autocast to compute under."""

    def __init__(self, device="auto", dtype="auto"):
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.main = self.rank == 0
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            device = "mps" if torch.backends.mps.is_available() else device
        if device == "cuda" and self.world > 1:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device).item()  # which the device meta has not
        except (RuntimeError, AssertionError):
            raise UsageError(f"--device={device} is not to be had here: use --device=cpu") from None
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.set_float32_matmul_precision("high")
            self.device = torch.device("cuda", self.device.index or 0)
            torch.cuda.set_device(self.device)
        self.name = torch.cuda.get_device_name(self.device) if self.cuda else self.device.type
        if self.world > 1 and not dist.is_initialized():
            mine = self.device if self.cuda else None  # or NCCL guesses which GPU a rank has
            dist.init_process_group("nccl" if self.cuda else "gloo", device_id=mine)
        half = dtype == "bfloat16" or (dtype == "auto" and self.cuda)
        self.dtype = torch.bfloat16 if half else torch.float32

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def put(self, *arrays):
        """Rows of token ids from the host, as int64 tensors on the device."""
        tensors = (torch.from_numpy(a.astype(np.int64)) for a in arrays)
        pinned = (t.pin_memory() if self.cuda else t for t in tensors)
        return [t.to(self.device, non_blocking=self.cuda) for t in pinned]

    def total(self, tensor):
        """Sum over the processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def clock(self):
        """Seconds, told once the device has done all that was asked of it."""
        if self.cuda:
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def peak_flops(self):
        """Dense bf16 FLOP/s of all devices together, or None where the device is not known."""
        peak = [flops for known, flops in PEAK_FLOPS.items() if known in self.name]
        return peak[0] * self.world if peak else None


def settle(given, base=None):
    """Flags given -> (TrainConfig, ModelConfig): they beat the preset, which beats the scale.

    base, the ModelConfig of the run that --init_from names, stands in the place of the preset.
    """
    scale = given.get("scale", "auto")
    if scale == "auto":
        scale = "gpu" if Machine(given.get("device", "auto")).cuda else "cpu"
    preset = PRESETS.get(given.get("preset", TrainConfig.preset), {})
    flags = SCALES.get(scale, {}) | (asdict(base) if base else preset) | given | dict(scale=scale)
    cfg, model = (kind(**{f.name: flags[f.name] for f in fields(kind) if f.name in flags})
                  for kind in (TrainConfig, ModelConfig))
    T, long = model.block_size, cfg.long_rows
    if long and (long % T or cfg.batch_size * T % long):
        raise UsageError(f"--long_rows={long}: it must be a multiple of the {T} tokens of a short "
                         f"row, and divide the {cfg.batch_size * T} of a micro-batch")
    return cfg, model


# ---- Batches ------------------------------------------------------------------------------------


def step_shape(step, cfg, T):
    """(rows, tokens of each) of a step's micro-batches: as many tokens, long step or not."""
    if int((step + 1) * cfg.long_frac) > int(step * cfg.long_frac) and cfg.long_rows:
        return cfg.batch_size * T // cfg.long_rows, cfg.long_rows
    return cfg.batch_size, T


def make_batch(data, cfg, T, step, micro):
    """Rows of training text, some with planted facts: two arrays (rows, tokens), inputs, targets.

    A long row has the facts and questions of the T-token rows it stands for, so the share of the
    tokens that ask for retrieval is the same at every length (but for `words`: once a row). A
    pure function of (cfg.seed, step, micro), whoever asks and whenever; another one with init_from.
    """
    rng, asking = np.random.default_rng((cfg.seed, step, micro, bool(cfg.init_from))), cfg.asking()
    count, length = step_shape(step, cfg, T)
    rows = data.rows(data.train, rng.integers(0, len(data.train) - length, count), length + 1)
    for r, n in enumerate(rng.binomial(length // T, cfg.needle_frac, count).tolist()):
        if n:
            tasks = [prepare_data.draw_task(data.enc, rng, *asking, T) for _ in range(n)]
            rows[r] = prepare_data.plant(rows[r], prepare_data.together(tasks), rng).row
    return rows[:, :-1], rows[:, 1:]


def produce(reader, writer, data, cfg, T, steps, micros):
    """The process behind prefetch: send the batches, each as soon as the one before is taken."""
    reader.close()  # then only the loop holds it: should that be gone, sending fails, and ends this
    with suppress(BrokenPipeError):
        try:
            for step in steps:
                for micro in micros:
                    writer.send(make_batch(data, cfg, T, step, micro))
        except UsageError as error:
            writer.send(error)


def prefetch(data, cfg, T, steps, micros):
    """Yield make_batch's of all micro-batches of all steps, which another process makes ahead.

    A thread would hold the interpreter's lock, which the loop needs to launch a step's kernels.
    """
    reader, writer = multiprocessing.Pipe(duplex=False)
    job = reader, writer, data, cfg, T, steps, micros
    worker = multiprocessing.Process(target=produce, args=job, daemon=True)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    worker.start()  # deaf to Ctrl-C, as that is for the loop, whose step needs its batch
    for number, handler in handlers.items():
        signal.signal(number, handler)
    writer.close()
    try:
        for _ in range(len(steps) * len(micros)):
            batch = reader.recv()
            if isinstance(batch, UsageError):
                raise batch
            yield batch
    except (EOFError, OSError):  # OSError: in the middle of a batch
        raise UsageError("the process that makes the batches has died, perhaps for want of memory: "
                         "go on with --resume") from None
    finally:
        reader.close()
        worker.kill()
        worker.join()


@torch.no_grad()
def evaluate(model, data, cfg, T, machine):
    """Mean loss in nats per token over fixed, evenly spaced windows of val, shared by the ranks."""
    n = min(cfg.eval_iters * cfg.batch_size, max(1, len(data.val) // T))  # rows of all ranks
    starts = np.linspace(0, len(data.val) - T - 1, n).astype(int)[machine.rank :: machine.world]
    total = torch.zeros((), device=machine.device)
    for i in range(0, len(starts), cfg.batch_size):
        rows = data.rows(data.val, starts[i : i + cfg.batch_size], T + 1)
        with machine.autocast():
            total += model(*machine.put(rows[:, :-1], rows[:, 1:]))[1] * len(rows)
    return machine.total(total).item() / n


def bits_per_byte(nats, meta):
    """Of the validation text that meta.json tells of, whose tokens cost so many nats on average."""
    return nats / math.log(2) * (meta["val_tokens"] / meta["val_bytes"])


# ---- Optimisation -------------------------------------------------------------------------------


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon with one pass over all matrices of a shape, in place of one over each.

    The hidden matrices are many and small: one by one, the thousand kernels of a step take as long
    to launch as the rest of it takes to run. One group of parameters, all of which have gradients;
    Nesterov momentum, and steps of the size of AdamW's (arXiv 2502.16982).
    """

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        alike = defaultdict(list)  # gate, up and down are alike, but for a transposition
        for p in group["params"]:
            alike[tuple(sorted(p.shape))].append(p)
        for (short, long), params in alike.items():
            grads = [p.grad for p in params]
            moments = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, moments, group["momentum"])
            x = torch.stack([u.mT if len(u) > short else u for u in updates])
            x = x if x.device.type == "cpu" else x.bfloat16()  # on many a CPU 15 times slower
            x /= x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
            a, b, c = group["ns_coefficients"]  # Newton-Schulz: all singular values go towards 1
            for _ in range(group["ns_steps"]):
                gram = x @ x.mT
                gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
                x = torch.baddbmm(x, gram, x, beta=a)
            both = zip(x.float(), params, strict=True)
            updates = [u.mT if len(p) > short else u for u, p in both]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"] * 0.2 * math.sqrt(long))


def make_optimizers(model, cfg):
    """AdamW, or Muon for the hidden matrices, at one learning rate. Decay is on matrices only."""
    lr, decay, betas = cfg.learning_rate, cfg.weight_decay, (cfg.beta1, cfg.beta2)
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
    groups = [dict(params=[model.wte.weight], weight_decay=decay),
              dict(params=[p for p in model.parameters() if p.dim() == 1], weight_decay=0.0)]
    if cfg.optimizer == "adamw":
        groups.append(dict(params=hidden, weight_decay=decay))
    fused = model.wte.weight.device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
    return [BatchedMuon(hidden, lr, decay), adamw] if cfg.optimizer == "muon" else [adamw]


def compile_model(model, cfg, machine):
    """torch.compile where it is asked for and pays. fullgraph: a graph break is an error."""
    if cfg.compile and machine.cuda and sys.platform != "win32":  # no Triton there
        # DDP would cut the graph into buckets: no faster (results/ddp.json), and no fullgraph.
        torch._dynamo.config.optimize_ddp = False
        return torch.compile(model, fullgraph=True, dynamic=False)
    return model


def learning_rate(step, cfg):
    """Of a step: linear warm-up, then a cosine down to min_lr."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    t = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    least = cfg.min_lr or cfg.learning_rate / 10
    return least + (cfg.learning_rate - least) * (1 + math.cos(math.pi * t)) / 2


def optimise(model, optimizers, batches, lr, cfg, machine):
    """One step over this process's micro-batches [(x, y), ...]. Its mean loss, on the device."""
    loss = 0
    for n, (x, y) in enumerate(batches, 1):
        # Gradients are averaged over the processes once, with the last micro-batch.
        last = n == len(batches) or machine.world == 1
        with nullcontext() if last else model.no_sync():
            with machine.autocast():
                part = model(x, y)[1] / len(batches)
            part.backward()
        loss = loss + part.detach()
    if cfg.grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss


# ---- Runs: what is kept of them -----------------------------------------------------------------


def save_checkpoint(folder, model, optimizers, cfg, meta, step, best):
    """Write ckpt.pt beside, then rename: never a half. meta: what meta.json says of the text."""
    state = dict(step=step, best_val_loss=best, model_config=asdict(model.config),
                 train_config=asdict(cfg), model=model.state_dict(), meta=meta,
                 optimizers=[o.state_dict() for o in optimizers])
    beside = folder / "ckpt.pt.tmp"
    try:
        torch.save(state, beside)
        os.replace(beside, folder / "ckpt.pt")
    except (OSError, RuntimeError) as e:
        beside.unlink(missing_ok=True)
        raise UsageError(f"could not write {folder / 'ckpt.pt'} ({str(e).splitlines()[0]}): make "
                         "room and use --resume; the checkpoint before is intact") from None


def newest_run(root="out"):
    """The folder under root whose checkpoint was written last."""
    runs = sorted(Path(root).glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UsageError(f"no run in {root}/: train one with python train.py, or name its folder")
    return runs[-1].parent


def load_checkpoint(folder):
    """The dict that save_checkpoint wrote, on the CPU; nothing in it is executed."""
    path = Path(folder) / "ckpt.pt"
    if not path.is_file():
        near = Path("out") / folder
        hint = f"; did you mean {near}?" if (near / "ckpt.pt").is_file() else ""
        raise UsageError(f"{path} is missing: {folder} holds no run, or none saved yet{hint}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["flags"] = state["model_config"] | state["train_config"]  # as they were saved
        state["model_config"] = ModelConfig(**state["model_config"])
        state["train_config"] = TrainConfig(**state["train_config"])
        if not {"step", "best_val_loss", "model", "optimizers", "meta"} <= set(state):
            raise KeyError
    except Exception as e:  # torch.load raises many kinds; each means the same to the user
        why = str(e).splitlines()[0][:100] if str(e) else type(e).__name__
        raise UsageError(f"{path} is not a checkpoint of this version of train.py, or is damaged "
                         f"({why})") from None
    return state


def load_weights(model, state, source):
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise UsageError(f"the weights of {source} do not fit: only flags that change no shape may "
                         "differ, e.g. --block_size, --window, --rope_theta, --log_scale") from None


def load_run(folder, device="cpu", **override):
    """A trained run, ready to use: (GPT, TrainConfig, meta). override: fields of ModelConfig."""
    state = load_checkpoint(folder)
    model = GPT(replace(state["model_config"], **override))
    load_weights(model, state, folder)
    return model.to(device).eval(), state["train_config"], state["meta"]


def choose_out_dir(cfg, pattern):
    """A folder for a new run: never one that holds another run's checkpoint."""
    if cfg.out_dir:
        if (Path(cfg.out_dir) / "ckpt.pt").exists():
            raise UsageError(f"{cfg.out_dir} holds a run: add --resume, or name another --out_dir")
        return Path(cfg.out_dir)
    own = cfg.preset if PRESETS[cfg.preset]["pattern"] == pattern else pattern
    name, n = Path("out") / own, 2
    while (name / "config.json").exists() or (name / "ckpt.pt").exists():
        name, n = Path("out") / f"{own}-{n}", n + 1
    return name


def describe(cfg, model, machine):
    """What config.json says of a run: its flags, and what else it takes to do it again."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    revision = ""
    with suppress(OSError, subprocess.SubprocessError):
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    return dict(train=asdict(cfg), model=asdict(model.config), parameters=model.num_params(),
                layers=model.plan(), command=" ".join(sys.argv), git=revision or None,
                device=machine.name, processes=machine.world, torch=torch.__version__)


class Log:
    """log.jsonl, and what the user sees: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, path, step, cfg, machine, tokens, flops):
        self.path, self.cfg, self.machine, self.shown = path, cfg, machine, 0.0
        self.tokens, self.flops, self.peak = tokens, flops, machine.peak_flops()
        bare = not machine.main or not sys.stderr.isatty()
        self.bar = tqdm(total=cfg.max_iters, initial=step, unit="step", disable=bare)
        if machine.main:
            old = path.read_text().splitlines() if step and path.exists() else []
            # Steps after the checkpoint will be done again: their lines would come twice.
            # The last line of a run that was cut off may be half a line.
            kept = (x for x in old if x.endswith("}") and json.loads(x)["step"] <= step)
            prepare_data.write_atomically(path, "".join(x + "\n" for x in kept))

    def write(self, text, passing=False, **record):
        """Show text; a passing one only every few seconds. A record goes to log.jsonl, always."""
        if not self.machine.main:
            return
        if record:
            with self.path.open("a") as f:
                f.write(json.dumps(record) + "\n")
        if not passing:
            self.bar.write(text, file=sys.stdout)
        elif not self.bar.disable:
            short = text.split(" | ", 1)[1].split(" | eta")[0]  # the bar tells the rest
            self.bar.set_postfix_str(short, refresh=False)
        elif time.time() - self.shown > 5:
            print(text, flush=True)
            self.shown = time.time()

    def step(self, step, loss, lr, rate):
        """rate: tokens per second, None where no whole step has been timed."""
        text = f"step {step:5d}/{self.cfg.max_iters} | loss {loss:.4f} | lr {lr:.1e}"
        if rate:
            text += f" | {rate / 1e3:.0f}k tok/s"
            text += f" | mfu {rate * self.flops / self.peak:.0%}" if self.peak else ""
            if self.machine.cuda:
                text += f" | {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
            text += f" | eta {(self.cfg.max_iters - step) * self.tokens / rate / 60:.1f}m"
        self.write(text, passing=True, step=step, loss=loss, lr=lr, tokens_per_second=rate)

    def validation(self, step, loss, bits):
        text = f"step {step:5d}/{self.cfg.max_iters} | val loss {loss:.4f} | "
        self.write(text + f"{bits:.4f} bits per byte", step=step, val_loss=loss, bits_per_byte=bits)


# ---- The loop -----------------------------------------------------------------------------------


def open_dataset(cfg, T):
    """The prepared dataset, long enough for the rows; the default one is made if missing."""
    folder = Path(cfg.data_dir) / cfg.dataset
    if cfg.dataset == "python" and not folder.exists() and int(os.environ.get("RANK", 0)) == 0:
        prepare_data.prepare(prepare_data.DataConfig(data_dir=cfg.data_dir))
    if dist.is_initialized():
        dist.barrier()
    data = prepare_data.load_data(folder)
    longest = (cfg.long_rows, "long_rows") if cfg.long_rows > T else (T, "block_size")
    for split, (least, name) in (("train", longest), ("val", (T, "block_size"))):
        n = len(getattr(data, split))
        if n <= least:
            raise UsageError(f"{folder}/{split}.bin has {n} tokens: too few for --{name}={least}")
    return data


def padded(vocab_size):
    """Rows for the embedding: a multiple of 64 keeps the head's matmuls well aligned."""
    return -(-vocab_size // 64) * 64


def begin(given):
    """Flags -> (machine, cfg, data, model, optimizers, step, best): all that the loop needs."""
    if given.get("resume") and given.get("init_from"):
        raise UsageError("--resume goes on with a run, --init_from starts another: choose one")
    resumed = (given.get("out_dir") or str(newest_run())) if given.get("resume") else ""
    source = resumed or given.get("init_from")
    state = load_checkpoint(source) if source else None
    if resumed:
        cfg, model_cfg = replace(state["train_config"], out_dir=resumed), state["model_config"]
        saved = state["flags"]
        unsaid = sorted({*asdict(cfg), *asdict(model_cfg)} - {*saved})
        if unsaid:
            raise UsageError(f"{resumed} does not say {', '.join(unsaid)}: another version of "
                             "train.py made it. Start a second stage from it, with --init_from")
        for name, value in given.items():
            if name in ("n_kv_head", "ffn_dim"):  # 0 stands for a number
                value = getattr(replace(model_cfg, **{name: value}), name)
            if name not in RESUMABLE and value not in (saved[name], SETTLED.get(name)):
                raise UsageError(f"--{name}={value} contradicts {resumed}, made with "
                                 f"{saved[name]!r}: drop it, or start a second stage with "
                                 f"--init_from={resumed}")
        cfg = replace(cfg, **{k: v for k, v in given.items() if k in RESUMABLE - {"resume"}})
    else:
        if state:  # a second stage goes on with the same text and task, unless told otherwise
            first = asdict(state["train_config"])
            if given.get("preset", first["preset"]) != first["preset"]:
                raise UsageError(f"--preset: {source} is {first['preset']} and stays so")
            kept = ("preset", "dataset", "data_dir", "tasks")
            given = {k: v for k, v in first.items() if k in kept or k.startswith("needle")} | given
        cfg, model_cfg = settle(given, state and state["model_config"])
    machine = Machine(cfg.device, cfg.dtype)
    T = model_cfg.block_size
    # A path that is not to be had is refused here, before there is a folder.
    path_taken(model_cfg.attention, machine.device, machine.dtype, model_cfg.head_dim)
    data = open_dataset(cfg, T)
    if cfg.needle_frac:
        prepare_data.check_room(data.enc, *cfg.asking(), T)
    if not state and "vocab_size" not in given:
        model_cfg = replace(model_cfg, vocab_size=padded(data.meta["vocab_size"]))
    if data.meta["vocab_size"] > model_cfg.vocab_size:
        raise UsageError(f"{data.folder} has {data.meta['vocab_size']} token ids, the model only "
                         f"{model_cfg.vocab_size}: use the run's own text, or drop --vocab_size")
    for key in ("train_sha256",) if resumed else ("tokenizer", "ranks"):
        if state and data.meta.get(key) != state["meta"].get(key):
            raise UsageError(f"{data.folder} is not the text, or tokens, that {source} learnt from")
    if cfg.gradient_accumulation_steps % machine.world:
        raise UsageError(f"--gradient_accumulation_steps={cfg.gradient_accumulation_steps}: it must"
                         f" be a multiple of {machine.world}, the number of processes")
    if not resumed:
        out_dir = str(choose_out_dir(cfg, model_cfg.pattern))
        cfg = replace(cfg, out_dir=out_dir, dtype=str(machine.dtype)[6:])
        if machine.world > 1:
            dist.barrier()  # before rank 0 makes the folder, and it is taken
    torch.manual_seed(cfg.seed)
    model = GPT(model_cfg).to(machine.device)
    optimizers = make_optimizers(model, cfg)
    if state:
        load_weights(model, state, source)
    if not resumed:
        return machine, cfg, data, model, optimizers, 0, math.inf
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return machine, cfg, data, model, optimizers, state["step"], state["best_val_loss"]


def train(given):
    """Train by these flags. -> (folder of the run, number of the signal that stopped it, or 0)."""
    machine, cfg, data, model, optimizers, step, best = begin(given)
    folder, T, lock = Path(cfg.out_dir), model.config.block_size, None
    if machine.main:
        folder.mkdir(parents=True, exist_ok=True)
        lock = prepare_data.claim(folder, f"another process trains in {folder}: name another "
                                          "--out_dir")
        if not step:
            about = json.dumps(describe(cfg, model, machine), indent=2)
            prepare_data.write_atomically(folder / "config.json", about)
        print(f"{folder}: preset {cfg.preset}, scale {cfg.scale}, {model.num_params() / 1e6:.2f}M "
              f"parameters, {machine.world} x {machine.name} in {str(machine.dtype)[6:]}, "
              f"{cfg.optimizer}, text {data.folder}\nlayers  {model.plan()}"
              + (f"\nresumed at step {step}" if step else ""), flush=True)
    compiled = compile_model(model, cfg, machine)
    if machine.world > 1:
        ids = [machine.device.index] if machine.cuda else None
        compiled = DistributedDataParallel(compiled, device_ids=ids)

    mine = range(machine.rank, cfg.gradient_accumulation_steps, machine.world)  # micro-batches
    tokens = cfg.batch_size * T * cfg.gradient_accumulation_steps  # of a step
    long = cfg.long_frac if cfg.long_rows else 0
    flops = (1 - long) * model.flops_per_token(T) + long * model.flops_per_token(cfg.long_rows or T)
    log = Log(folder / "log.jsonl", step, cfg, machine, tokens, flops)
    stopped, handlers = [], {}

    def note(number, frame):
        stopped.append(number)
        signal.signal(number, handlers[number])  # a second one is not to be waited for

    for number in STOPS:
        handlers[number] = signal.signal(number, note)
    began = clock = time.time()
    done, stop, lengths = 0, False, set()  # done: steps since the clock was read
    batches = prefetch(data, cfg, T, range(step, cfg.max_iters), mine)
    try:
        while step < cfg.max_iters and not stop:
            start, lr = time.time(), learning_rate(step, cfg)
            micros = [machine.put(*next(batches)) for _ in mine]
            loss = optimise(compiled, optimizers, micros, lr, cfg, machine)
            step, done = step + 1, done + 1
            log.bar.update()
            length = micros[0][0].size(1)
            if length not in lengths:
                machine.clock()  # the first step of a length compiles: it is timed apart
                log.write(f"first step of {length}-token rows took {time.time() - start:.1f} s")
                lengths.add(length)
                clock, done = time.time(), 0
            stop = machine.world == 1 and len(stopped) > 0
            due = step % cfg.eval_interval == 0 or step == cfg.max_iters
            if due or stop or step % cfg.log_interval == 0:
                # Ranks must agree on when to stop, so they do it where they speak to each other.
                signals = loss.new_tensor(float(len(stopped)))
                mean, stop = (machine.total(torch.stack((loss, signals))) / machine.world).tolist()
                check_finite("loss", mean, step, folder)
                log.step(step, mean, lr, done * tokens / (time.time() - clock) if done else None)
                if due or stop:  # the loss is of the weights before this step: are these sound?
                    asked = cfg if due else replace(cfg, eval_iters=1)
                    val = evaluate(model, data, asked, T, machine)
                    check_finite("validation loss", val, step, folder)
                    if due:
                        best = min(best, val)
                        log.validation(step, val, bits_per_byte(val, data.meta))
                    if machine.main:
                        save_checkpoint(folder, model, optimizers, cfg, data.meta, step, best)
                clock, done = time.time(), 0
    except RuntimeError as e:
        gone = r"onnection|closed by peer|[Tt]imed? ?out|NCCL"
        if machine.world == 1 or not re.search(gone, str(e)):
            raise
        raise UsageError(f"rank {machine.rank} lost another process at step {step} "
                         f"({str(e).splitlines()[0]}): see what that one said, then --resume "
                         f"--out_dir={folder}") from None
    finally:
        batches.close()
        log.bar.close()
        if lock is not None:
            os.close(lock)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    cut = step < cfg.max_iters  # here or, its signal not being told, on another rank
    if machine.main:
        print(f"stopped at step {step}: python train.py --resume --out_dir={folder} goes on" if cut
              else f"done in {time.time() - began:.0f} s: python sample.py {folder}")
    if machine.world > 1:
        dist.destroy_process_group()
        # Gloo's threads may need the GIL to let go of the last tensors, and freeing the DDP model
        # waits for them with the GIL held: some runs never ended (pytorch/pytorch#56297).
        time.sleep(0.5)
    return folder, (stopped or [signal.SIGTERM])[0] if cut else 0


def check_finite(name, value, step, folder):
    if not math.isfinite(value):
        raise UsageError(f"the {name} is {value} at step {step}: {folder} keeps the last good "
                         "checkpoint, if there was one; start again with a lower --learning_rate")


def bench(given):
    """Time whole training steps for each length, attention path and preset asked for.

    Prints a table: tokens/s (median step), MFU, peak memory, and the speed over that of full
    attention (preset rope) at this length and path, beside the most that counting FLOPs allows.
    """
    machine = Machine(given.get("device", "auto"), given.get("dtype", "auto"))
    if machine.world > 1:
        raise UsageError("--bench times one process: run it without torchrun")
    given = dict(vocab_size=320) | given  # what training on bytes takes
    cfg, base = settle(given | dict(preset=given["bench"].split(",")[0]))
    if not re.fullmatch(r"(\d+(,\d+)*)?", cfg.bench_lengths):
        raise UsageError(f"--bench_lengths={cfg.bench_lengths}: give numbers, as in 1024,8192")
    lengths = [int(n) for n in (cfg.bench_lengths or str(base.block_size)).split(",")]
    # All of them now: a wrong name is to fail before minutes of timing, not after.
    jobs = [settle(given | dict(block_size=T, attention=path, preset=preset)) for T in lengths
            for path in (cfg.bench_paths or base.attention).split(",")
            for preset in sorted(cfg.bench.split(","), key=lambda name: name != "rope")]
    for _, model_cfg in jobs:
        path_taken(model_cfg.attention, machine.device, machine.dtype, model_cfg.head_dim)
    folder = Path(cfg.out_dir) if cfg.out_dir else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    about = dict(command=" ".join(sys.argv), device=machine.name, torch=torch.__version__)
    budget = cfg.batch_size * base.block_size  # tokens of a step, in whole rows, one at least
    print(f"{machine.name}, {str(machine.dtype)[6:]}, torch {torch.__version__}, {cfg.optimizer}\n")
    print("| T | rows | path | preset | window | tok/s | MFU | peak GB | x rope | FLOPs allow |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    found, rope = [], {}
    bar = tqdm(jobs, "timing", disable=not sys.stderr.isatty(), leave=False)
    for cfg, model_cfg in bar:
        T = model_cfg.block_size
        if bar.disable and found:  # a line here before a bad input's own would be one too many
            print(f"timing {cfg.preset} at {T} tokens", file=sys.stderr, flush=True)
        row = dict(T=T, rows=max(1, budget // T), path=model_cfg.attention, preset=cfg.preset)
        row |= dict(window=model_cfg.window) | time_steps(cfg, model_cfg, row["rows"], machine)
        same = T, row["path"]
        full = rope.setdefault(same, row) if cfg.preset == "rope" else rope.get(same)
        if full:
            row["x_rope"] = row["tokens_per_second"] / full["tokens_per_second"]
            row["flops_allow"] = full["flops_per_token"] / row["flops_per_token"]
        found.append(row)
        if folder:  # beside an older one, until all is timed
            text = json.dumps(about | dict(rows=found), indent=1)
            prepare_data.write_atomically(folder / "bench.partial.json", text)
        cells = [str(row[key]) for key in ("T", "rows", "path", "preset", "window")]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}" if row["mfu"] else "-"]
        more = (row.get(key) for key in ("peak_gb", "x_rope", "flops_allow"))
        cells += ["-" if number is None else f"{number:.2f}" for number in more]
        bar.write("| " + " | ".join(cells) + " |", file=sys.stdout)
        sys.stdout.flush()
    if folder:
        os.replace(folder / "bench.partial.json", folder / "bench.json")


def clock_steps(step, machine, least, seconds):
    """Time calls of step: `least` of them or more, until they are `seconds` in all.

    -> (median, first one's, peak GB or None). Two before them compile and fill the allocator.
    """
    times = []
    while len(times) < 2 + least or sum(times[2:]) < seconds:
        began = machine.clock()
        step()
        times.append(machine.clock() - began)
        if len(times) == 2 and machine.cuda:
            torch.cuda.reset_peak_memory_stats()
    peak = torch.cuda.max_memory_allocated() / 1e9 if machine.cuda else None
    return float(np.median(times[2:])), times[0], peak


def time_steps(cfg, model_cfg, rows, machine, seconds=3.0):
    """Median time of a training step on `rows` rows of random tokens, as a dict for bench."""
    torch.manual_seed(cfg.seed)
    torch.compiler.reset()
    model = GPT(model_cfg).to(machine.device)
    compiled, optimizers = compile_model(model, cfg, machine), make_optimizers(model, cfg)
    shape = rows, model_cfg.block_size + 1
    tokens = np.random.default_rng(0).integers(0, model_cfg.vocab_size, shape)
    batch = [machine.put(tokens[:, :-1], tokens[:, 1:])]
    step, first, peak = clock_steps(
        lambda: optimise(compiled, optimizers, batch, cfg.learning_rate, cfg, machine),
        machine, least=3, seconds=seconds)
    rate, flops = rows * model_cfg.block_size / step, model.flops_per_token(model_cfg.block_size)
    return dict(tokens_per_second=rate, step_seconds=step, first_step_seconds=first,
                flops_per_token=flops, mfu=rate * flops / (machine.peak_flops() or math.inf),
                peak_gb=peak)


def main(argv):
    described = "\n".join(f"  --scale={k}: {v or 'the defaults above'}" for k, v in SCALES.items())
    given = prepare_data.parse_flags([TrainConfig, ModelConfig], argv, __doc__, epilog=described)
    if given.get("bench"):
        return bench(given)
    folder, signalled = train(given)
    if signalled:
        sys.exit(128 + signalled)  # as a shell counts it: `train && sample` is not to go on
    return folder


if __name__ == "__main__":
    prepare_data.run_main(main)
