"""Bad clients, to measure how a run withstands them: the attacks by name.

An installed package adds an attack by an entry point of the group ``rolora.attacks``, which names a
function of keyword-only options that returns an ``Attack``.
"""

from rolora.registry import Registry, attributes

NO_ATTACK = "none"

ATTACKS = Registry(
    kind="attack",
    group="rolora.attacks",
    own=attributes(
        "rolora.attacks",
        {
            "forged": (
                *("sign_flip", "scale", "gauss", "nan", "mimic", "alie", "ipm", "weight_lie"),
                *("a_only", "b_only", "rank_collapse", "dormant_factor"),
            ),
            "poisoned": ("label_flip", "backdoor"),
        },
    ),
)
