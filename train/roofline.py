"""Lower limit of a step's time at the chips' published peak rates."""

import dataclasses

from .compiled import Cost
from .targets import Target


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower limits of a step's time, in seconds, from arithmetic, memory and network, which may overlap entirely."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """Lower limit of a step's time: the largest of the three."""
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """Name of the largest of the three: "compute", "memory" or "network"."""
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name])


def roofline(target: Target, chips: int, cost: Cost, dtype: str) -> Roofline:
    """Return the lower limits of a step's time at the chips' published peak rates.

    Collectives are taken as ring all-reduces: each of n chips sends `2 (n - 1) / n` times their bytes. GPUs first
    reduce inside each node, so each of a node's n GPUs sends an n-th of the bytes through its network port.
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
