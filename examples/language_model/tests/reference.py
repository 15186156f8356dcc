"""The check values of the texts that come along: a forward pass in numpy, f64, independent of the
Rust one.

pip install gguf numpy tokenizers
python tests/reference.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, models, pre_tokenizers

file = GGUFReader(sys.argv[1])
weights = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in file.tensors}
value = lambda key: file.fields[key].contents()
layers, heads, kv_heads = (
    value(f"llama.{k}") for k in ("block_count", "attention.head_count", "attention.head_count_kv")
)
d, base, eps = (
    value("llama.rope.dimension_count"),
    value("llama.rope.freq_base"),
    value("llama.attention.layer_norm_rms_epsilon"),
)

merges = [tuple(m.split(" ")) for m in value("tokenizer.ggml.merges")]
tokenizer = Tokenizer(
    models.BPE({t: i for i, t in enumerate(value("tokenizer.ggml.tokens"))}, merges)
)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


def norm(x, gain):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def rotary(x):  # [n, heads, d], pairs (2i, 2i + 1)
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(0, d, 2) / d)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def losses(tokens):
    x = weights["token_embd.weight"][tokens[:-1]]
    n = len(x)
    future = np.triu(np.full((n, n), -np.inf), 1)
    for l in range(layers):
        w = lambda name: weights[f"blk.{l}.{name}.weight"]
        h = norm(x, w("attn_norm"))
        q, k, v = (h @ w(f"attn_{name}").T for name in "qkv")
        q, k, v = (
            rotary(q.reshape(n, heads, d)),
            rotary(k.reshape(n, kv_heads, d)),
            v.reshape(n, kv_heads, d),
        )
        mixed = np.empty((n, heads, d))
        for head in range(heads):
            of = head * kv_heads // heads
            scores = q[:, head] @ k[:, of].T / np.sqrt(d) + future
            p = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, head] = p @ v[:, of] / p.sum(-1, keepdims=True)
        x = x + mixed.reshape(n, -1) @ w("attn_output").T
        h = norm(x, w("ffn_norm"))
        gate = h @ w("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w("ffn_up").T)) @ w("ffn_down").T
    h = norm(x, weights["output_norm.weight"])
    logits = h @ weights.get("output.weight", weights["token_embd.weight"]).T
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[:, None]).sum(-1)) - logits[np.arange(n), tokens[1:]]


for name in ("newton_opticks", "austen_persuasion"):
    text = (Path(__file__).parent / f"../texts/{name}.txt").read_text().rstrip()
    nats = losses(tokenizer.encode(text).ids[:2049])
    print(
        f"{name}: {nats[:1024].mean():.6f} (predictions 0..1023), "
        f"{nats[1024:].mean():.6f} (1024..2047)"
    )
