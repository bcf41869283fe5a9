"""Whether a run packs its micro-batches."""

from __future__ import annotations

from rlhf_toolkit.distributed.collectives import on_main
from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.attention import packing_obstacle
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.whole_model import WholeModel
from rlhf_toolkit.texts import say


def packs(wanted: str, model: SharedBase | WholeModel) -> bool:
    """Whether micro-batches are packed: as ``update.packing``, ``wanted``, says, and only where the model can. Prints
    what was chosen."""
    obstacle = packing_obstacle(model.causal_lm)
    if wanted == "on" and obstacle is not None:
        raise ModelError(f"update.packing=on, but {obstacle}; set it to auto or off")
    chosen = wanted != "off" and obstacle is None
    reason = f" ({obstacle})" if wanted == "auto" and obstacle is not None else ""
    words = "packed, shared prefixes once" if chosen else f"padded rows{reason}"
    on_main(lambda: say(f"micro-batches: {words}"))
    return chosen
