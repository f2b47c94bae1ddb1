"""What happened in one epoch of an optimizer, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from shoal.utils import figures


@dataclass(frozen=True)
class EpochReport:
    """One epoch of this peer.

    :param epoch: the one that has ended
    :param peers: of the swarm, this one included
    :param samples: of the swarm, as far as this peer knows
    :param local_samples: of this peer
    :param loss: mean of what the closures returned, weighted by samples; None: there was no closure
    :param gradients: "averaged"; "own": this peer's own mean; "skipped": no update; "delayed": under way in the
      background; "none": with local updates, and for auxiliaries whose round failed
    :param failure: why gradients were not averaged; None: they were, or there was nobody else
    :param state: "averaged" or "failed"; "delayed"; "equal": all members had the same parameters; "none": not due
    :param late: what became of delayed work of earlier epochs since the report before, in words as above, under
      "gradients" and "state". Bytes count in the epoch in which a round has ended
    :param seconds: "epoch": since the end of the one before; "gradients": its round, search included; "update":
      optimizer's step and what of the round of parameters was waited for
    """

    epoch: int
    peers: int
    samples: int
    local_samples: int
    loss: float | None = None
    gradients: Literal["averaged", "own", "skipped", "delayed", "none"] = "none"
    failure: str | None = None
    state: Literal["averaged", "failed", "delayed", "equal", "none"] = "none"
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    late: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under flat names such as "seconds/gradients", for wandb, TensorBoard or MLflow."""
        values = asdict(self)
        groups = {name: values.pop(name) for name in ("seconds", "late")}
        return values | {
            f"{name}/{key}": value for name, group in groups.items() for key, value in group.items()
        }

    def __str__(self) -> str:
        loss = "" if self.loss is None else f", loss {self.loss:.4g}"
        times = ", ".join(f"{phase} {figures.duration(value)}" for phase, value in self.seconds.items())
        late = ", ".join(f"{what} {became}" for what, became in self.late.items())
        return (
            f"epoch {self.epoch}: {self.peers} peers, {self.samples} samples ({self.local_samples} own){loss}; "
            f"gradients {self.gradients}, state {self.state}; "
            f"{late and f'of earlier epochs {late}; '}{times}; "
            f"{self.bytes_sent} bytes sent, {self.bytes_received} received"
        )


def number_of(loss: Any) -> float | None:
    """What a closure returned, if it is one number."""
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        loss = loss.item()
    return float(loss) if isinstance(loss, int | float) else None
