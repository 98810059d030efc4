"""FedASK: factor the mean product from random sketches of it (Wen et al., NeurIPS 2025).

With the mean product D = Σ p_i s B_iA_i (out, in), normal Ω (in, rank + p) and the over-sampling p:

    Y = D Ω,  Q = qr(Y) (out, rank + p),  P = QᵀD = U S Vᵀ (rank + p, in)
    s · lora_B · lora_A = Q U S Vᵀ, its first rank directions, √S in each factor

Where D has no more than rank + p directions, QQᵀD is D, and these are FlexLoRA's factors; otherwise
they are near them. In the paper a round has two exchanges: clients send B_iA_iΩ, receive
Q, and send QᵀB_iA_i, so the server adds up sketches and sees no factor. A round here has one: the
clients send their factors, and the server takes both sketches of the mean, which are the sums of
the clients' sketches. So this does not protect what clients send, the traffic differs, and the
noise of differential privacy, for which the paper trains lora_B alone, is left out. Ω is drawn in
each round; in the authors' code once, and p is 0 there. The rest is as in FlexLoRA, also for
clients of different ranks, of which the paper has none. arXiv:2507.09990, Algorithm 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rolora.algorithm.adapter import layer_of, role_of
from rolora.algorithm.factors import factors, products_and_head, without_dead_directions
from rolora.algorithm.method import Method, Reduce, ServerState
from rolora.errors import ConfigError
from rolora.methods import flexlora


def method(*, oversampling: int = 4) -> Method:
    """``oversampling``: p, how many columns a sketch has more than the rank."""
    if oversampling < 0:
        raise ConfigError(f"fedask: oversampling must be at least 0, not {oversampling}")

    def aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        mean, before = dict(reduce(project=products_and_head)), server.adapter
        bases = {}
        for name in [name for name in mean if role_of(name) == "delta"]:
            matrix, up = mean[name].double(), f"{layer_of(name)}.lora_B.weight"
            width = min(before[up].shape[1] + oversampling, *matrix.shape)
            probes = torch.randn(matrix.shape[1], width, generator=rng, dtype=matrix.dtype)
            bases[up] = torch.linalg.qr(matrix @ probes).Q
            mean[name] = (bases[up].mT @ matrix).to(mean[name].dtype)
        found = factors(mean, before)
        ups = {up: (basis @ found[up].double()).to(found[up]) for up, basis in bases.items()}
        return replace(server, adapter=without_dead_directions(before | found | ups, before))

    return replace(flexlora.method(), name="fedask", aggregate=aggregate)
