"""LoRA-A²: alternate the factors, send only the directions that moved most (Koo et al., ACL 2025).

Odd rounds train lora_B, even ones lora_A, as in RoLoRA. Of the rank-one pieces of all layers a
client sends those with the largest ‖Δb_j‖·‖a_j‖ (or ‖b_j‖·‖Δa_j‖): a share ``keep`` of them, or as
many as its rank allows. What is not sent counts as unchanged, so the average is exact; a median
would take it for a vote not to move. The paper chooses before training and trains only what it will
send; here the choice comes after training. arXiv:2410.22815.
"""

from __future__ import annotations

import torch

from rolora.algorithm.adapter import AdapterState, ClientInfo, partner_of, pieces
from rolora.algorithm.method import Method
from rolora.errors import ConfigError
from rolora.methods import rolora


def method(*, keep: float = 0.5) -> Method:
    """``keep`` in (0, 1]: the share of rank-one pieces that a client of full rank sends."""
    if not 0 < keep <= 1:
        raise ConfigError(f"lora_a2: keep must be in (0, 1], not {keep}")
    turns = rolora.method()

    def upload(received: AdapterState, trained: AdapterState, client: ClientInfo) -> AdapterState:
        scores, moving = {}, trained.only(turns.shared(client.round) - {"head"})
        for name, tensor in moving.items():
            other = partner_of(name)
            step = pieces(name, tensor - received[name]).norm(dim=1)
            scores[name] = step * pieces(other, trained[other]).norm(dim=1)
        every = torch.cat([*scores.values()]).sort(descending=True).values
        least = every[max(min(round(keep * len(every)), client.rank * len(scores)), 1) - 1]
        sent = {}
        for name, tensor in moving.items():
            chosen = (scores[name] >= least)[:, None]
            both = pieces(name, tensor), pieces(name, received[name])
            sent[name] = pieces(name, torch.where(chosen, *both)).contiguous()
        return trained | sent

    return Method(
        name="lora_a2",
        trainable=turns.trainable,
        shared=turns.shared,
        upload=upload,
        heterogeneous_ranks=True,
        sparse_upload=True,
    )
