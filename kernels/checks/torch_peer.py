"""Times PyTorch on shapes read from standard input; prints one JSON object.

Attention is the fastest of the backends of scaled_dot_product_attention that take the shape, over
contiguous keys and values (its best case: a paged cache must gather them first).
"""

import json
import statistics
import sys
import time

BUDGET_SECONDS = 240
SAMPLES = 15


def main():
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def measure(work):
        for _ in range(2):
            work()
        times = []
        for _ in range(SAMPLES):
            flush.zero_()
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def noise(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

    def attention(batch, rows, context, q_heads, kv_heads, dim):
        q = noise(batch, q_heads, rows, dim)
        k, v = (noise(batch, kv_heads, context, dim) for _ in range(2))
        mask = None if rows in (1, context) else causal_lower_right(rows, context)
        best = None
        for backend in (
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        ):
            def work():
                with sdpa_kernel(backend):
                    torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, attn_mask=mask, is_causal=rows == context and rows > 1,
                        enable_gqa=q_heads != kv_heads,
                    )
            try:
                seconds = measure(work)
            except RuntimeError:
                continue  # this backend does not take the shape
            best = seconds if best is None else min(best, seconds)
        return best

    def product(m, n, k):
        x, weight = noise(m, k), noise(n, k)
        return measure(lambda: torch.matmul(x, weight.t()))

    kinds = {"attention": attention, "product": product}
    started, found = time.monotonic(), []
    for shape in json.load(sys.stdin):
        if time.monotonic() - started > BUDGET_SECONDS:
            found.append(None)
            continue
        work = kinds[shape.pop("kind")]
        try:
            found.append(work(**shape))
        except torch.cuda.OutOfMemoryError:
            found.append(None)
        torch.cuda.empty_cache()
    name = f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    print(json.dumps({"name": name, "seconds": found}))


main()
