"""The least time that a step can take at chips' published peaks."""

import dataclasses

from .compiled import Cost
from .targets import Target


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time that a step can take, in seconds, by each of what limits it; they may overlap entirely."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """What limits it."""
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name])


def roofline(target: Target, chips: int, cost: Cost, dtype: str) -> Roofline:
    """Return a step's times at the chips' published peaks.

    Collectives are all-reduces in rings: each chip sends `2 (n - 1) / n` times their bytes. GPUs first reduce inside
    each node, so that an n-th of the bytes goes over each one's network port.
    """
    chip = target.chip
    assert chip.hbm_bandwidth is not None
    assert chip.link is not None
    near = chips if target.per_node is None else target.per_node
    network = 2 * (near - 1) / near * cost.collective_bytes / chip.link
    far = chips // near
    if far > 1:
        assert chip.network is not None
        network += 2 * (far - 1) / far * cost.collective_bytes / near / chip.network
    return Roofline(cost.flops / chip.peak(dtype), cost.traffic / chip.hbm_bandwidth, network)
