"""Writes dijiang_block.json: the attention block of the released DiJiang code from PyTorch's own modules, in float64.

pip install numpy scipy torch
python tests/data/golden/dijiang_block.py > tests/data/golden/dijiang_block.json
"""

import json

import numpy as np
import torch
from scipy.fft import dct
from torch import nn

torch.set_default_dtype(torch.float64)
torch.manual_seed(20240328)

FORMULA = (
    "d = hidden/heads. [q_h | k_h | v_h], h = 0, 1, ... = query_key_value(x) (a Linear: x W^T + b). The first int(d*rotary_pct) columns of q_h and "
    "k_h are turned by their position: column i with column i + half, angle = position * 10000^(-i/half). phi(x) = softmax(x proj_matrix), "
    "proj_matrix = C diag(radii), C as in dct.json. o_n = sum_{m<=n} gamma_h^(n-m) (phi(q_n).phi(k_m)) v_m, "
    "gamma_h = 1 - 2^(-linspace(5, 9, heads)_h) = 1 - exp(linspace(ln 1/32, ln 1/512, heads)_h). "
    "output = dense(SiLU(x W_G) * GroupNorm([o of head 0 | o of head 1 | ...]))."
)
CONVENTIONS = (
    "All numbers are IEEE float64 in shortest round-trip form. Matrices are lists of rows; tokens are rows, the first at position 0. Weights have the "
    "names and layouts of the released checkpoints: Linear weights [outputs, inputs], W_G used as x @ W_G. GroupNorm is torch.nn.GroupNorm(d, hidden) "
    "on [tokens, hidden] (d groups of `heads` neighbouring columns, biased variance, eps 1e-5). Written by dijiang_block.py beside this file, from "
    "torch.nn.Linear, GroupNorm and SiLU. The class GPTNeoXAttention of the released code itself, run on these weights, agrees: to 1e-15 of the "
    "largest output with its tables (inv_freq, D1, D2) in float64, to 2e-7 with those tables as released, in float32. It was given each sequence "
    "as a whole: its own steps with cached keys begin the decays and the mask anew and give something else."
)


def randn(*shape, size=1.0):  # of few digits, so that the file stays small
    return torch.from_numpy(np.round((torch.randn(*shape) * size).numpy(), 3))


def rotated(x, columns):  # [heads, n, d]
    half = columns // 2
    a, b, rest = x.split([half, half, x.shape[-1] - columns], -1)
    angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)


def case(hidden, heads, rotary_pct, n):
    d = hidden // heads
    radii = randn(d)
    block = nn.ModuleDict(
        {"query_key_value": nn.Linear(hidden, 3 * hidden), "dense": nn.Linear(hidden, hidden), "group_norm": nn.GroupNorm(d, hidden)}
    )
    weights = {name: randn(*old.shape, size=1.5 / hidden**0.5 if old.ndim == 2 else 0.3) for name, old in block.state_dict().items()}
    weights["group_norm.weight"] += 1.0
    block.load_state_dict(weights)
    weights["W_G"] = randn(hidden, hidden, size=2.0 / hidden**0.5)
    weights["proj_matrix"] = torch.from_numpy(dct(np.eye(d), axis=0, norm="ortho")) @ torch.diag(radii)

    x = randn(n, hidden)
    q, k, v = block["query_key_value"](x).reshape(n, heads, 3, d).permute(2, 1, 0, 3)
    q, k = (torch.softmax(rotated(y, int(d * rotary_pct)) @ weights["proj_matrix"], -1) for y in (q, k))
    gamma = 1.0 - 2.0 ** -torch.linspace(5.0, 9.0, heads)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    decay = torch.where(distance >= 0, gamma[:, None, None] ** distance, 0.0)
    o = ((q @ k.mT) * decay) @ v
    normed = block["group_norm"](o.transpose(0, 1).reshape(n, hidden))
    output = block["dense"](nn.SiLU()(x @ weights["W_G"]) * normed)

    sizes = {"name": f"{hidden=} {heads=} {rotary_pct=} {n=}", "hidden": hidden, "heads": heads, "rotary_pct": rotary_pct, "n": n}
    arrays = {**weights, "radii": radii, "x": x, "output": output.detach()}
    return sizes | {name: array.tolist() for name, array in arrays.items()}


line = lambda value: json.dumps(value, separators=(",", ":"))
cases = [case(12, 3, 0.5, 9), case(16, 2, 0.25, 9), case(15, 3, 0.9, 9), case(6, 3, 1.0, 70)]
head = {"formula": FORMULA, "conventions": CONVENTIONS, "tolerance_f64": {"relative_to_max_abs": 1e-12}}
print(line(head)[:-1] + ',\n"cases":[\n' + ",\n".join(map(line, cases)) + "\n]}")
