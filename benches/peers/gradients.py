"""Forward and backward passes of this crate beside torch's autograd, on one CPU thread.

    python benches/peers/gradients.py [--rounds 7] [--lengths 2048 8192]

FAVOR+ in chunks as torch runs it, with autograd; torch's own exact attention (SDPA); and the
crate's linear and exact attention. Gradients by the keys are compared before anything is believed;
rounds are interleaved, and medians and their ratios printed. It needs what peers.py needs.
"""

import argparse
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
from peers import D, SCALE, Server, machine


def chunked(q, k, v, omega, chunk):
    """FAVOR+ with all chunks at once, which autograd can go through."""
    n = len(q)
    logs_q = q @ (SCALE * omega).T
    logs_k = k @ (SCALE * omega).T - k.square().sum(-1, keepdim=True) * (SCALE**2 / 2)
    queries = (logs_q - logs_q.detach().amax(-1, keepdim=True)).exp().view(-1, chunk, len(omega))
    keys = (logs_k - logs_k.detach().amax()).exp().view(-1, chunk, len(omega))
    ones = torch.cat([v, v.new_ones(n, 1)], 1).view(-1, chunk, D + 1)
    states = (keys.mT @ ones).cumsum(0)
    states = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
    out = (queries @ keys.mT).tril() @ ones + queries @ states
    return (out[..., :D] / out[..., D:]).reshape(n, D)


def softmax(q, k, v):
    q, k, v = (x.view(1, 1, len(x), D) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0]


def with_gradients(forward, inputs, cotangent):
    """Seconds of a forward and a backward pass, and the gradient by the keys."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    start = time.perf_counter()
    forward(*leaves).backward(cotangent)
    return time.perf_counter() - start, leaves[1].grad


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, default 7")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    print(machine())
    with tempfile.TemporaryDirectory() as directory:
        server = Server(directory)
        for n in options.lengths:
            q, k = (torch.randn(n, D) * 0.35 for _ in range(2))
            v, omega = torch.randn(n, D), torch.randn(D, D)
            server.load(q, k, v, omega)
            inputs = (q, k, v)
            times = {
                chunk: min(
                    with_gradients(lambda *x: chunked(*x, omega, chunk), inputs, v)[0]
                    for _ in range(3)
                )
                for chunk in (32, 64, 128, 256)
            }
            chunk = min(times, key=times.get)
            theirs = {
                "linear": (f"torch, FAVOR+ in chunks of {chunk}", lambda *x: chunked(*x, omega, chunk)),
                "softmax": ("torch, SDPA", softmax),
            }
            for kind, (name, forward) in theirs.items():
                server.ask("train", kind, 1)
                ours = server.output(kind, "write-train")
                exact = with_gradients(forward, [x.double() for x in inputs], v.double())[1] \
                    if kind == "softmax" else with_gradients(forward, inputs, v)[1].double()
                error = ((ours - exact).abs().max() / exact.abs().max()).item()
                if not error < 1e-3:
                    raise SystemExit(f"{kind}, n = {n}: the gradients differ by {error:.1e}")
            seconds = {(kind, side): [] for kind in theirs for side in ("theirs", "ours")}
            for _ in range(options.rounds):
                for kind, (_, forward) in theirs.items():
                    seconds[kind, "theirs"].append(with_gradients(forward, inputs, v)[0])
                    seconds[kind, "ours"].append(float(server.ask("train", kind, 3)))
            median = {key: statistics.median(values) for key, values in seconds.items()}
            for kind, (name, _) in theirs.items():
                ours, their = median[kind, "ours"] * 1e3, median[kind, "theirs"] * 1e3
                print(
                    f"n = {n}, forward + backward: {name} {their:.2f} ms, "
                    f"{kind} here {ours:.2f} ms, ratio {their / ours:.2f}"
                )
            ratio = median["softmax", "theirs"] / median["linear", "ours"]
            print(f"n = {n}: SDPA by linear here, ratio {ratio:.1f}")
        server.close()


if __name__ == "__main__":
    main()
