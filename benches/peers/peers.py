"""Times this crate beside its Python peers: one thread, f32, causal, one head, d = d_v = m = 64,
the same inputs.

Every contestant is first compared with its own formula in f64 (the first 512 and the last 64 tokens
of the very sequence that is timed) and is not timed where they differ. Rounds of all contestants
are interleaved, so that a slow spell of the machine meets all of them, and medians are reported.
The result replaces the section between the markers of docs/performance.md.
"""

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported
    os.environ[variable] = "1"

import argparse
import contextlib
import datetime
import io
import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"

D = 64  # head_dim, value_dim and the number of features
SCALE = D**-0.25  # what 1/sqrt(d) gives to each of query and key
TOLERANCE = 1e-4  # of an output, relative to the largest that the formula gives
CHUNKS = (32, 64, 128, 256)
SOFTMAX_LIMIT = 16384  # tokens up to which our exact softmax runs without --all
SLOW = 5.0  # seconds of a call from which one round is enough
BURST = 0.1  # seconds that a contestant runs in a round, at least one call
CONTEXT, STEPS, HEADS = 4096, 256, 32  # of the decode steps


# The formulas, in f64, pair by pair: what contestants are compared with.


def softmax_weights(q, k, _):
    """The weights of all pairs, up to a factor per query, and what a formula adds to their sum."""
    logits = q @ k.T * SCALE**2
    return (logits - logits.amax(1, keepdim=True)).exp(), 0


def favor_logs(x, omega):
    return SCALE * x @ omega.T - (SCALE * x).square().sum(1, keepdim=True) / 2


def favor_weights(q, k, omega):
    q, k = favor_logs(q, omega), favor_logs(k, omega)
    return (q - q.amax(1, keepdim=True)).exp() @ (k - k.amax()).exp().T, 0


def elu_weights(q, k, _):
    return (F.elu(q) + 1) @ (F.elu(k) + 1).T, 0


def performer_pytorch_weights(q, k, omega):
    """As favor_weights, with that library's maxima (of omega·x alone), its epsilon in every feature
    and that of its sums."""
    largest = (SCALE * q @ omega.T).amax(1, keepdim=True), (SCALE * k @ omega.T).amax()
    q, k = (((favor_logs(x, omega) - top).exp() + 1e-4) / D**0.5 for x, top in zip((q, k), largest))
    return q @ k.T, 1e-6 * q.sum(1, keepdim=True)


def expected(formula, q, k, v, omega, first, last):
    """Rows first..last of causal attention. The formula is given all keys, since one peer looks at
    the future ones."""
    q, k, v, omega = (x.double() for x in (q[first:last], k, v, omega))
    weights, added = formula(q, k, omega)
    weights = weights.tril(first)
    return weights @ v / (weights.sum(1, keepdim=True) + added)


def error_against(formula, inputs, found, ranges):
    """The largest deviation, relative to the largest element expected; NaN counts as infinite. The
    output `found` may be that of the last tokens only."""
    worst, start = 0.0, len(inputs[0]) - len(found)
    for first, last in ranges:
        right = expected(formula, *inputs, first, last)
        error = (
            (found[first - start : last - start].double() - right).abs().amax() / right.abs().amax()
        ).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


# Causal linear attention in torch. Factors that every key shares, or that a query gives to all its
# keys, cancel in the quotient: each query is scaled by its own largest feature, and all keys by the
# largest feature of any key so far.


class Favor:
    def __init__(self, omega):
        self.omega = (SCALE * omega).T.contiguous()

    def queries(self, q):
        logs = q @ self.omega  # |q|²/2 cancels too
        return logs.sub_(logs.amax(-1, keepdim=True)).exp_()

    def key_logs(self, k):
        return (k @ self.omega).sub_(k.square().sum(-1, keepdim=True), alpha=SCALE**2 / 2)

    def keys(self, k, shift):
        """Features of keys, and the logarithm of what was taken out, `shift` or more."""
        logs = self.key_logs(k)
        shift = max(shift, logs.amax().item())
        return logs.sub_(shift).exp_(), shift


class Elu:
    def queries(self, q):
        return (
            q.clamp(max=0).exp_().add_(q.clamp(min=0))
        )  # elu + 1; F.elu takes more than ten times as long

    def keys(self, k, _):
        return self.queries(k), 0.0


def batched(features, q, k, v, chunk):
    """All chunks at once; a column of ones beside the values gives the denominators."""
    n = len(q)
    ones = torch.cat([v, v.new_ones(n, 1)], 1).view(-1, chunk, D + 1)
    queries = features.queries(q).view(-1, chunk, D)
    keys = features.keys(k, -math.inf)[0].view(-1, chunk, D)
    states = (keys.mT @ ones).cumsum_(0)
    out = (queries @ keys.mT).tril_() @ ones
    out[1:].baddbmm_(queries[1:], states[:-1])
    return (out[..., :D] / out[..., D:]).view(n, D)


def loop(features, q, k, v, chunk):
    """Chunk by chunk, in buffers that stay in the cache."""
    queries, (keys, _) = features.queries(q), features.keys(k, -math.inf)
    out, state, total = torch.empty_like(v), v.new_zeros(D, D), v.new_zeros(D, 1)
    scores, mask = v.new_empty(chunk, chunk), v.new_ones(chunk, chunk).tril_()
    for q, k, v, o in zip(*(x.split(chunk) for x in (queries, keys, v, out))):
        torch.mm(q, k.T, out=scores).mul_(mask)
        denominator = scores.sum(1, keepdim=True).addmm_(q, total)
        torch.mm(scores, v, out=o).addmm_(q, state).div_(denominator)
        state.addmm_(k.T, v)
        total.add_(k.sum(0).unsqueeze(1))
    return out


def segments(features, q, k, v, chunk):
    """The chunks of 1024 tokens at once, segment by segment: few calls, and all of them work in the
    cache."""
    count = 1024 // chunk
    out, shift = torch.empty_like(v), -math.inf
    ones, states = v.new_ones(count, chunk, D + 1), v.new_zeros(count + 1, D, D + 1)
    for q, k, v, o in zip(*(x.view(-1, chunk, D).split(count) for x in (q, k, v, out))):
        here = len(q)
        queries, (keys, new_shift) = features.queries(q), features.keys(k, shift)
        if new_shift > shift:
            states[0] *= math.exp(shift - new_shift)
            shift = new_shift
        ones[:here, :, :D] = v
        torch.bmm(keys.mT, ones[:here], out=states[1 : here + 1])
        states[: here + 1].cumsum_(0)
        sums = (queries @ keys.mT).tril_().bmm(ones[:here]).baddbmm_(queries, states[:here])
        torch.div(sums[..., :D], sums[..., D:], out=o)
        states[0] = states[here]
    return out


def fastest_chunked(features, q, k, v):
    """The fastest of the three above over chunk sizes: its name and a function of the inputs."""

    def candidate(variant, chunk):
        call = lambda: variant(features, q, k, v, chunk)
        seconds = [timed(call)[0] for _ in range(4)][1:]
        return min(seconds), f"{variant.__name__}, chunks of {chunk}", call

    candidates = [
        candidate(variant, chunk) for variant in (batched, loop, segments) for chunk in CHUNKS
    ]
    return min(candidates, key=lambda candidate: candidate[0])[1:]


# Decode steps in torch. Each takes tokens that are already views of their own and returns the
# outputs.


def decode_linear(features, state, shift, tokens):
    outs = []
    for q, k, ones in tokens:  # [1, D], and the value with a one
        query, (key, new_shift) = features.queries(q), features.keys(k, shift)
        if new_shift > shift:
            state *= math.exp(shift - new_shift)
            shift = new_shift
        sums = query @ state.addmm_(key.T, ones)
        outs.append(sums[:, :D] / sums[:, D:])
    return outs


def decode_linear_heads(features, state, shift, tokens):
    """The same for many heads at once: tokens [heads, 1, D], a shift for each head."""
    outs = []
    for q, k, ones in tokens:
        query, logs = features.queries(q), features.key_logs(k)
        new_shift = torch.maximum(shift, logs.amax(-1, keepdim=True))
        state.mul_(torch.exp(shift - new_shift))
        shift = new_shift
        key = logs.sub_(shift).exp_()
        sums = query @ state.baddbmm_(key.mT, ones)
        outs.append(sums[..., :D] / sums[..., D:])
    return outs


def decode_softmax(cache, length, tokens):
    """SDPA over a key-value cache with room for what comes: cache [2, 1, 1, room, D]."""
    outs = []
    for q, k, v in tokens:  # [1, D]
        cache[0, 0, 0, length], cache[1, 0, 0, length] = k[0], v[0]
        length += 1
        keys, values = cache[0, :, :, :length], cache[1, :, :, :length]
        outs.append(F.scaled_dot_product_attention(q.view(1, 1, 1, D), keys, values))
    return outs


# The crate's side.


class Server:
    """benches/peers.rs, built and running in a directory of its own."""

    def __init__(self, directory):
        command = ["cargo", "bench", "--bench", "peers", "--no-run", "--message-format=json"]
        built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if built.returncode != 0:
            sys.exit("cargo could not build the server; its messages are above")
        messages = [json.loads(line) for line in built.stdout.splitlines() if line.startswith("{")]
        executables = [
            m["executable"]
            for m in messages
            if m.get("target", {}).get("name") == "peers" and m["executable"]
        ]
        if not executables:
            sys.exit("cargo built no executable named peers")
        self.directory = Path(directory)
        self.process = subprocess.Popen(
            [executables[-1], "--serve"],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *request):
        self.process.stdin.write(" ".join(map(str, request)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if not answer or answer.startswith("error"):
            raise RuntimeError(f"the server's answer to {request}: {answer or 'none'}")
        return answer

    def load(self, q, k, v, omega):
        for name, array in (("q", q), ("k", k), ("v", v), ("omega", omega)):
            array.numpy().astype("<f4").tofile(self.directory / f"{name}.bin")
        self.ask("load", ".", len(q), D)

    def output(self, kind, request="write"):
        self.ask(request, kind, "out.bin")
        return torch.from_numpy(np.fromfile(self.directory / "out.bin", dtype="<f4").reshape(-1, D))

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


# Measuring.


@dataclass
class Contestant:
    name: str
    computes: str
    formula: Callable
    burst: Callable[[int], float]  # seconds per call over so many calls
    output: Callable[[], torch.Tensor]  # of the last burst, [n, D]
    error: float = math.nan
    first: float = math.nan  # seconds of the call that was checked
    seconds: list = field(default_factory=list)
    refused: str = ""

    def is_wrong(self):
        """Whether the page must not be written: off its formula, or ours and unable to run. A peer
        may be missing."""
        return self.error > TOLERANCE or bool(self.refused and self.name.startswith("dijiang"))

    @property
    def median(self):
        return statistics.median(self.seconds) if self.seconds else math.nan


def timed(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def torch_contestant(name, computes, formula, call):
    last = []

    def burst(repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            out = call()
        seconds = (time.perf_counter() - start) / repeats
        last[:] = [out]
        return seconds

    return Contestant(name, computes, formula, burst, lambda: last.pop().reshape(-1, D))


def server_contestant(server, name, computes, formula, kind):
    burst = lambda repeats: float(server.ask("run", kind, repeats))
    return Contestant(name, computes, formula, burst, lambda: server.output(kind))


def check(contestant, inputs, ranges):
    """Runs it once against its formula; one that fails, in whatever way, is refused with the
    reason."""
    try:
        contestant.first = contestant.burst(1)
        contestant.error = error_against(contestant.formula, inputs, contestant.output(), ranges)
        if contestant.error > TOLERANCE:
            contestant.refused = f"not timed: {contestant.error:.1e} off its formula"
    except Exception as problem:  # a peer may fail in any way; the others go on
        contestant.refused = f"cannot run: {type(problem).__name__}: {problem}".splitlines()[0]
    say(f"  {contestant.name}: {contestant.refused or f'{contestant.error:.1e} from its formula'}")


def interleave(contestants, rounds):
    fit = [c for c in contestants if not c.refused]
    for r in range(rounds):
        for c in fit:
            if r == 0 or c.first < SLOW:
                c.seconds.append(c.burst(max(1, min(1000, math.ceil(BURST / c.first)))))


def performer_pytorch(omega):
    """FastAttention with our omega. Its CUDA kernel is not there on a CPU, and it says so and takes
    its own fallback."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from performer_pytorch import FastAttention

        attention = FastAttention(
            dim_heads=D, nb_features=D, causal=True, no_projection=False
        ).eval()
    attention.projection_matrix.copy_(omega)
    return lambda q, k, v: attention(*(x.view(1, 1, -1, D) for x in (q, k, v)))


def failing(problem):
    def call(*_):
        raise problem

    return call


def forward_contestants(server, n, q, k, v, omega, everything):
    """Those of whole sequences; times are given as multiples of that of `linear`."""
    favor_name, favor = fastest_chunked(Favor(omega), q, k, v)
    elu_name, elu = fastest_chunked(Elu(), q, k, v)
    try:
        performer = performer_pytorch(omega)
    except Exception as problem:  # not installed, or does not import with this Python
        performer = failing(problem)
    q4, k4, v4 = (x.view(1, 1, n, D) for x in (q, k, v))
    sdpa = lambda: F.scaled_dot_product_attention(q4, k4, v4, is_causal=True)
    softmax = "exact softmax"
    contestants = {
        "linear": server_contestant(server, "dijiang, linear", "FAVOR+", favor_weights, "linear"),
        "torch linear": torch_contestant(f"torch, {favor_name}", "FAVOR+", favor_weights, favor),
        "performer": torch_contestant(
            "performer-pytorch, without its CUDA kernel",
            "another function: FAVOR+ with epsilons, keys scaled by a maximum over future ones too",
            performer_pytorch_weights,
            lambda: performer(q, k, v),
        ),
        "elu": server_contestant(
            server, "dijiang, elu + 1", "another map: elu + 1", elu_weights, "elu"
        ),
        "torch elu": torch_contestant(
            f"torch, elu + 1, {elu_name}", "another map: elu + 1", elu_weights, elu
        ),
        "softmax": server_contestant(
            server, "dijiang, softmax", softmax, softmax_weights, "softmax"
        ),
        "sdpa": torch_contestant(f"torch SDPA ({sdpa_backend()})", softmax, softmax_weights, sdpa),
    }
    if n > SOFTMAX_LIMIT and not everything:
        del contestants["softmax"]
    return contestants


def sdpa_backend():
    x = torch.zeros(1, 1, 64, D)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return "flash kernel"  # torch takes it wherever it can
    except RuntimeError:
        return "no flash kernel here"


def decode_contestants(server, q, k, v, omega):
    """Single tokens after a context, which is not timed; the tokens are the first of the context
    again."""
    favor = Favor(omega)
    keys, shift = favor.keys(k, -math.inf)
    with_one = torch.cat([v, v.new_ones(len(v), 1)], 1)
    state = keys.T @ with_one
    one = lambda x: list(x[:STEPS].unsqueeze(1).unbind())
    heads = lambda x: list(x[:STEPS].view(STEPS, 1, 1, -1).repeat(1, HEADS, 1, 1).unbind())
    state_heads, shift_heads = state.expand(HEADS, -1, -1), torch.full((HEADS, 1, 1), shift)
    room = torch.zeros(STEPS, D)
    cache = torch.stack([torch.cat([x, room]) for x in (k, v)]).view(2, 1, 1, -1, D)
    tokens = {
        "one": list(zip(one(q), one(k), one(with_one))),
        "heads": list(zip(heads(q), heads(k), heads(with_one))),
        "softmax": list(zip(one(q), one(k), one(v))),
    }

    def ours(name, computes, formula, kind):
        burst = lambda _: float(server.ask("decode", kind, STEPS))
        return Contestant(
            name, computes, formula, burst, lambda: server.output(kind, "write-decode")
        )

    def torchs(name, computes, formula, prepare, call, count=1):
        last = []

        def burst(_):
            fresh = prepare()
            seconds, outs = timed(lambda: call(fresh))
            last[:] = [torch.stack([out.view(count, D)[-1] for out in outs])]
            return seconds / STEPS / count

        return Contestant(name, computes, formula, burst, lambda: last.pop())

    return {
        "linear": ours("dijiang, linear", "FAVOR+", favor_weights, "linear"),
        "torch linear": torchs(
            "torch, linear",
            "FAVOR+",
            favor_weights,
            state.clone,
            lambda s: decode_linear(favor, s, shift, tokens["one"]),
        ),
        "torch heads": torchs(
            f"torch, linear, {HEADS} heads at once, per head",
            "FAVOR+",
            favor_weights,
            state_heads.clone,
            lambda s: decode_linear_heads(favor, s, shift_heads, tokens["heads"]),
            HEADS,
        ),
        "softmax": ours("dijiang, softmax", "exact softmax", softmax_weights, "softmax"),
        "sdpa": torchs(
            "torch SDPA over a cache",
            "exact softmax",
            softmax_weights,
            cache.clone,
            lambda c: decode_softmax(c, len(k), tokens["softmax"]),
        ),
    }


# Reporting.


def say(line):
    print(line, file=sys.stderr, flush=True)


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def table(contestants, unit, factor, rate):
    head = [
        "contestant",
        "computes",
        f"{unit}, median (least to most)",
        "time ÷ ours, linear",
        "error",
        "rounds",
    ]
    if rate:
        head.insert(3, "tokens/s")
    lines = [row(*head), row(*["---", "---"] + ["---:"] * (len(head) - 2))]
    base = contestants["linear"].median
    for c in contestants.values():
        if c.refused:
            lines.append(row(c.name, c.computes, c.refused, *["–"] * (len(head) - 3)))
            continue
        figure = lambda seconds: (
            f"{seconds * factor:.3g}" if seconds * factor < 1000 else f"{seconds * factor:.0f}"
        )
        cells = [f"{figure(c.median)} ({figure(min(c.seconds))} to {figure(max(c.seconds))})"]
        if rate:
            cells.append(f"{rate / c.median:,.0f}".replace(",", " "))
        cells += [
            f"{c.median / base:.2f}" if base == base else "–",
            f"{c.error:.0e}",
            str(len(c.seconds)),
        ]
        lines.append(row(c.name, c.computes, *cells))
    return lines


def ratio(contestants, ours, theirs, what):
    """The sentence of a pair that computes the same, if both were timed."""
    pair = [
        contestants[name].median if name in contestants else math.nan for name in (ours, theirs)
    ]
    return (
        [f"- {what}: ours takes {pair[0] / pair[1]:.2f} × torch's time."]
        if all(x == x for x in pair)
        else []
    )


def machine():
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor() or platform.machine(),
    )
    rustc = subprocess.run(
        ["rustc", "--version"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ).stdout.split()[1]
    flags = os.environ.get("RUSTFLAGS")
    return (
        f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()} in torch; "
        f"torch {torch.__version__}, Python {platform.python_version()}, rustc {rustc}"
        + (f" with RUSTFLAGS `{flags}`" if flags else "")
    )


def measure(options):
    """The lines of the section, and the names of contestants for which it must not be written."""
    lines, wrong = [], []
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        server = Server(directory)
        generator = torch.Generator().manual_seed(options.seed)
        normal = lambda n: torch.randn(3, n, D, generator=generator)
        # FAVOR+'s directions: orthogonal, with the lengths of Gaussian vectors
        rotation, lengths = torch.linalg.qr(normal(D)[0])[0], normal(D)[0].norm(dim=1, keepdim=True)
        omega = (rotation * lengths).contiguous()
        for n in options.sizes:
            say(f"{n} tokens")
            q, k, v = normal(n)
            server.load(q, k, v, omega)
            contestants = forward_contestants(server, n, q, k, v, omega, options.all)
            ranges = [(0, min(n, 512)), (max(0, n - 64), n)]
            for c in contestants.values():
                check(c, (q, k, v, omega), ranges)
            wrong += [c.name for c in contestants.values() if c.is_wrong()]
            interleave(contestants.values(), options.rounds)
            lines += ["", f"### {n} tokens", "", *table(contestants, "ms", 1e3, n), ""]
            lines += ratio(contestants, "linear", "torch linear", "FAVOR+, the same map")
            lines += ratio(contestants, "elu", "torch elu", "elu + 1")
            lines += ratio(contestants, "softmax", "sdpa", "Exact softmax")
            if any(len(c.seconds) == 1 < options.rounds for c in contestants.values()):
                lines += [f"- One round where a call takes more than {SLOW:.0f} s."]
            if "softmax" not in contestants:
                lines += [
                    f"- Our exact softmax is left out above {SOFTMAX_LIMIT} tokens "
                    "(`--all` runs it)."
                ]

        say(f"decode steps after {CONTEXT} tokens")
        q, k, v = normal(CONTEXT)
        server.load(q, k, v, omega)
        contestants = decode_contestants(server, q, k, v, omega)
        whole = [torch.cat([x, x[:STEPS]]) for x in (q, k, v)]
        for c in contestants.values():
            check(c, (*whole, omega), [(CONTEXT, CONTEXT + STEPS)])
        wrong += [c.name for c in contestants.values() if c.is_wrong()]
        interleave(contestants.values(), options.rounds)
        server.close()
    lines += [
        "",
        f"### A decode step after {CONTEXT} tokens",
        "",
        *table(contestants, "µs", 1e6, 0),
        "",
    ]
    lines += ratio(contestants, "linear", "torch linear", "FAVOR+, one head")
    lines += ratio(contestants, "linear", "torch heads", f"FAVOR+, per head of {HEADS}")
    lines += ratio(contestants, "softmax", "sdpa", "Exact softmax")
    lines += [
        f"- {STEPS} steps in a round, one head. A step in torch is a dozen calls of almost "
        f"nothing, whose overhead {HEADS} heads at once share; our figure is of one head, whose "
        "state stays in the cache."
    ]
    return lines, wrong


def section(options, measured):
    command = shlex.join(["python", "benches/peers/peers.py", *sys.argv[1:]])
    intro = [
        "## Beside Python peers",
        "",
        "One thread, f32, causal, one head, d = d_v = m = 64, standard normal inputs, medians of "
        f"{options.rounds} interleaved rounds. Every contestant was first compared with its own "
        "formula in f64; *error* is the largest deviation found, relative to the largest output. "
        "*torch* rows are written by hand, the fastest of three ways and four chunk sizes.",
        "",
        f"*`{command}`, {datetime.date.today()}, {machine()}.*",
    ]
    return "\n".join(folded(line) for line in [*intro, *measured])


def folded(line):
    """A line of prose at no more than 100 columns; a row of a table as it is."""
    indent = "  " if line.startswith("- ") else ""
    fold = lambda text: textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return line if line.startswith("|") else fold(line)


def write(text):
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Performance\n"
    if BEGIN in page and END in page:
        before, after = page.split(BEGIN, 1)[0], page.split(END, 1)[1]
    else:
        before, after = page.rstrip("\n") + "\n\n", "\n"
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[2048, 8192, 65536], help="tokens, multiples of 256"
    )
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, default 7")
    parser.add_argument("--seed", type=int, default=1, help="of the inputs and the projection")
    parser.add_argument(
        "--all", action="store_true", help=f"our exact softmax above {SOFTMAX_LIMIT} tokens too"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print only; leave docs/performance.md alone"
    )
    options = parser.parse_args()
    if options.rounds < 1 or any(n < 256 or n % 256 for n in options.sizes):
        parser.error("sizes must be multiples of 256, and rounds at least 1")
    return options


def main():
    options = arguments()
    torch.set_num_threads(1)
    measured, wrong = measure(options)
    text = section(options, measured)
    print(text)
    if wrong:
        sys.exit(
            "nothing is written, since these are off their formula or cannot run: "
            + "; ".join(wrong)
        )
    if not options.dry_run:
        write(text)


if __name__ == "__main__":
    main()
