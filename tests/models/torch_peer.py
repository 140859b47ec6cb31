"""Times PyTorch on shapes read from standard input; prints a line of JSON for each.

Attention is the fastest of the backends of scaled_dot_product_attention that take the shape, over
contiguous keys and values (its best case: a paged cache must gather them first). Caches are emptied
and clocks warmed up as for the kernels beside which the figures stand.
"""

import json
import statistics
import sys
import time

WARM_UP_SECONDS = 0.15
SAMPLES = 21
FLUSH_BYTES = 1 << 30


def main():
    shapes = json.load(sys.stdin)
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    attend = torch.nn.functional.scaled_dot_product_attention

    def tell(answer):
        print(json.dumps(answer), flush=True)

    def room(size):
        return torch.zeros(size, dtype=torch.int8, device="cuda")

    source, target = room(FLUSH_BYTES), room(FLUSH_BYTES)

    def once(work):
        # A copy drives everything out of the caches, and reads drive out what it wrote. The device
        # is still busy with them while the work is launched: that is not timed.
        target.copy_(source)
        for _ in range(2):
            source.view(torch.float32).sum()
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def measure(work):
        begun = time.monotonic()
        once(work)
        once(work)
        while time.monotonic() - begun < WARM_UP_SECONDS:
            once(work)
        return statistics.median(once(work) for _ in range(SAMPLES))

    def noise(*shape):
        return torch.rand(*shape, dtype=torch.bfloat16, device="cuda") * 2 - 1

    def attention(batch, rows, context, q_heads, kv_heads, dim):
        q = noise(batch, q_heads, rows, dim)
        k, v = (noise(batch, kv_heads, context, dim) for _ in range(2))
        mask = None if rows in (1, context) else causal_lower_right(rows, context)
        found = {}
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
            def work():
                attend(q, k, v, attn_mask=mask, is_causal=rows == context and rows > 1,
                       enable_gqa=q_heads != kv_heads)
            try:
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    found[backend] = measure(work)
            except (RuntimeError, ValueError) as refused:
                print(f"{backend}: {refused}".splitlines()[0], file=sys.stderr)
        if not found:
            return {"seconds": None}
        best = min(found, key=found.get)
        return {"seconds": found[best], "by": best, "all": found}

    def product(m, n, k):
        x, weight = noise(m, k), noise(n, k)
        return {"seconds": measure(lambda: torch.matmul(x, weight.t()))}

    tell({"name": f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}"})
    kinds = {"attention": attention, "product": product}
    with torch.inference_mode():
        for shape in shapes:
            work = kinds[shape.pop("kind")]
            try:
                tell(work(**shape))
            except torch.cuda.OutOfMemoryError:
                tell({"seconds": None})
            torch.cuda.empty_cache()


main()
