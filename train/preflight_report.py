"""Report of `preflight`, as a table and as JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from repvgg_jax.text_table import text_table

from .chips import GIB
from .compiled import Cost
from .fitting import Compiled, Largest
from .recipe import Recipe
from .roofline import Roofline, roofline
from .targets import Target


@dataclasses.dataclass(frozen=True)
class Report:
    """Results of `preflight`.

    Attributes:
      target: machine that the step was compiled for.
      chips: number of its chips.
      recipe: recipe of the run.
      asked: step at the batch size of the recipe.
      largest: largest batch that fits; None if it was not searched for.
    """

    target: Target
    chips: int
    recipe: Recipe
    asked: Compiled
    largest: Largest | None

    def summary(self) -> Mapping[str, Any]:
        """Return the report as a JSON object; figures of a step that could not be compiled are null."""
        asked, cost = self.asked, self.asked.cost
        assert self.target.chip.hbm is not None
        limits = None if cost is None else self._roofline(cost)
        fitting = self.largest.fitting if self.largest else None
        return {
            "target": self.target.name,
            "chips": self.chips,
            "compiled": cost is not None,
            "fits": asked.fits(self.target.usable),
            "hbm_gib_per_chip": round(self.target.chip.hbm / GIB, 2),
            "peak_gib_per_chip": round(asked.peak / GIB, 3) if asked.peak else None,
            "tflop_per_step_per_chip": None if cost is None else round(cost.flops / 1e12, 4),
            "gb_per_step_per_chip": None if cost is None else round(cost.traffic / 1e9, 3),
            "collectives": None
            if cost is None
            else {"number": int(cost.collectives), "bytes": int(cost.collective_bytes)},
            "roofline_images_per_second": None if limits is None else round(self._batch(asked) / limits.seconds),
            "bound": None if limits is None else limits.bound,
            "usable_gib_per_chip": round(self.target.usable / GIB, 2),
            "batch_size": self._batch(asked),
            "largest_batch_size": self._batch(fitting) if fitting else None,
            "compile_seconds": round(asked.seconds, 1),
        }

    def lines(self) -> list[str]:
        """Return the report as lines of a table."""
        asked, chip = self.asked, self.target.chip
        assert chip.hbm is not None
        fits, usable = asked.fits(self.target.usable), self.target.usable
        needs = f"{_gib(asked.peak)} GiB" if asked.peak else "more than the chip has"
        verdict = "fits" if fits else "DOES NOT FIT"
        rows = [
            ("target", f"{self.target.name}: {self.chips} chips ({self.target.family.chip})"),
            ("batch", f"{self._batch(asked)}, {asked.per_chip} on each chip"),
            ("peak memory", f"{needs} of {_gib(usable)} GiB usable on each chip: {verdict}"),
            ("chip's memory", f"{_gib(chip.hbm)} GiB; {self.target.usable_note}"),
        ]
        rows += self._memory_rows(asked) + self._cost_rows(asked)
        rows += [("compile time", f"{asked.seconds:.0f} s")]
        if self.largest is not None:
            rows += [("largest batch", self._largest(self.largest))]
        return text_table(rows)

    def _memory_rows(self, asked: Compiled) -> list[tuple[str, str]]:
        if asked.memory is None:
            return [("", "as reported by the compiler, which could not make it fit")]
        ahead = self.recipe.input.prefetch
        names = {
            "state": "weights, BN statistics, optimizer, averages",
            "batch": "images and labels of the step",
            "prefetched": f"{ahead} more {'batch' if ahead == 1 else 'batches'} (--prefetch)",
            "temporaries": "activations, gradients, workspaces",
            "program": "compiled code",
        }
        sizes = dataclasses.asdict(asked.memory)
        return [(f"  {name}", f"{_gib(sizes[name])} GiB  {what}") for name, what in names.items() if sizes[name]]

    def _cost_rows(self, asked: Compiled) -> list[tuple[str, str]]:
        if asked.cost is None:
            return []
        cost, chip, limits = asked.cost, self.target.chip, self._roofline(asked.cost)
        assert chip.hbm_bandwidth is not None
        assert chip.link is not None
        dtype = self.recipe.model.dtype
        peak = f"{chip.peak(dtype) / 1e12:.4g} TFLOP/s"
        far = self.target.per_node is not None and self.chips > self.target.per_node and chip.network is not None
        links = f"{chip.link / 1e9:.4g} GB/s" + (f", {(chip.network or 0) / 1e9:.4g} between nodes" if far else "")
        network = f"{int(cost.collectives)}, {cost.collective_bytes / 1e9:.3f} GB"
        return [
            ("arithmetic", f"{cost.flops / 1e12:.3f} TFLOP per step and chip: {_ms(limits.compute)} at {peak}"),
            (
                "memory traffic",
                f"{cost.traffic / 1e9:.2f} GB per step and chip: {_ms(limits.memory)} at "
                f"{chip.hbm_bandwidth / 1e9:.4g} GB/s",
            ),
            ("collectives", f"{network} per step and chip: {_ms(limits.network)} at {links}"),
            ("bound", limits.bound),
            ("roofline", f"{self._batch(asked) / limits.seconds:.0f} images/s at most, on all chips together"),
        ]

    def _largest(self, largest: Largest) -> str:
        if largest.fitting is None:
            return "not even one image per chip fits" if self._one_failed(largest) else "no batch that fits was found"
        size = f"{self._batch(largest.fitting)}, {largest.fitting.per_chip} on each chip, " + (
            f"{_gib(largest.fitting.peak)} GiB, compiled to check"
        )
        if not largest.memory_limit:
            return f"{size}; limited by the number of training images"
        return size + (f"; {self._batch(largest.failing)} does not fit" if largest.failing else "")

    def _one_failed(self, largest: Largest) -> bool:
        return largest.failing is not None and largest.failing.per_chip == self.recipe.optimizer.accumulate

    def _batch(self, compiled: Compiled) -> int:
        return compiled.per_chip * self.chips

    def _roofline(self, cost: Cost) -> Roofline:
        return roofline(self.target, self.chips, cost, self.recipe.model.dtype)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"
