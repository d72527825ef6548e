"""Prints the best rate of bf16 matrix products seen here, in operations per second: python -m trainers.rate."""

import time

import torch


def main() -> None:
    """Multiply large matrices again and again; the best time counts, for whatever else runs only slows them down."""
    on_gpu = torch.cuda.is_available()
    size = 8192 if on_gpu else 2048
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda" if on_gpu else "cpu") for _ in range(2))
    best = float("inf")
    for _ in range(40):
        started = time.perf_counter()
        a @ b
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    print(2 * size**3 / best)


if __name__ == "__main__":
    main()
