"""How far PyTorch's scaled_dot_product_attention in bf16 is off float64, on inputs distributed as
the checks' own: keys and values evenly in (-1, 1), queries in (-6, 6), all rounded to bf16.

usage: python3 kernels/checks/sdpa_error.py
Prints for each shape the largest and the root-mean-square error of the output, the worst of several
draws. The figures stand in src/accuracy.rs, which holds our kernels against them.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Query heads, key heads, head size, rows, context: rows are the last of the context.
SHAPES = [(2, 1, 128, 192, 192), (2, 1, 64, 192, 192), (2, 1, 128, 16, 700), (8, 1, 128, 1, 1300)]


def draw(shape, size, generator, device):
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    return (values * size).to(torch.bfloat16).to(device)


def errors(shape, seed, device):
    q_heads, kv_heads, dim, rows, context = shape
    generator = torch.Generator().manual_seed(seed)
    q = draw((1, q_heads, rows, dim), 6, generator, device)
    k, v = (draw((1, kv_heads, context, dim), 1, generator, device) for _ in range(2))
    k, v = (t.repeat_interleave(q_heads // kv_heads, 1) for t in (k, v))
    # Row r sees keys up to its own position.
    mask = torch.ones(rows, context, dtype=torch.bool, device=device).tril(context - rows)
    scores = q.double() @ k.double().transpose(-1, -2) / dim**0.5
    wanted = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.double()
    attention = torch.nn.functional.scaled_dot_product_attention
    if rows == context:
        # The kernels that have no mask but the causal one are the ones to compare with.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            got = attention(q, k, v, is_causal=True)
    else:
        got = attention(q, k, v, attn_mask=None if rows == 1 else mask)
    off = (got.double() - wanted).abs()
    return off.max().item(), off.square().mean().sqrt().item()


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"PyTorch {torch.__version__} on {device}")
    for shape in SHAPES:
        all_errors = [errors(shape, seed, device) for seed in range(8)]
        worst, rms = (max(column) for column in zip(*all_errors))
        print(f"{shape}: {worst:.2e} {rms:.2e}")


if __name__ == "__main__":
    main()
