"""Small sets of labelled features."""

import torch


def clusters(K, d, *, counts=None, spread=0.5, seed=0, dtype=torch.float32, offset=1.0):
    """Shuffled features `[N, d]` around random, not centred class means, and their labels `[N]`."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.as_tensor(counts if counts is not None else [20 + 3 * (k % 5) for k in range(K)])
    labels = torch.repeat_interleave(torch.arange(K), counts)
    labels = labels[torch.randperm(len(labels), generator=g)]
    centres = torch.randn(K, d, generator=g, dtype=torch.float64) + offset
    noise = torch.randn(len(labels), d, generator=g, dtype=torch.float64)
    noise *= torch.linspace(0.2, 1.0, d, dtype=torch.float64)  # anisotropic: NC1 is not the trace quotient
    return (centres[labels] + spread * noise).to(dtype), labels
