"""What came of a run: figures, and whether everything held."""

import statistics
from dataclasses import dataclass, field

from recovery.chaos.plan import Kind


@dataclass
class Done:
    """One fault as it was made. `lifted`: when it was over, which is where the time to converge begins."""

    kind: Kind
    target: str
    at: float
    lifted: float | None = None
    converged: float | None = None
    """When all was well again."""

    @property
    def took_s(self) -> float | None:
        """Seconds from the end of the fault until all was well."""
        return self.converged - self.lifted if self.converged is not None and self.lifted is not None else None


@dataclass
class Report:
    """The result. `broken` holds one sentence for each thing that did not hold."""

    seed: int
    seconds: float
    home: str
    faults: list[Done] = field(default_factory=list)
    not_possible: tuple[Kind, ...] = ()
    execs: int = 0
    repairs: int = 0
    overlaps: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    budget_breaks: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Per part: the largest memory in bytes and the most descriptors."""
    final: str = ""
    """Why not all was well at the end; empty when it was."""

    @property
    def broken(self) -> tuple[str, ...]:
        """Everything that did not hold."""
        final = (f"at the end: {self.final}",) if self.final else ()
        return (*self.overlaps, *self.lost, *self.budget_breaks, *self.unwanted, *self.growing, *final)

    @property
    def held(self) -> bool:
        """Whether everything held."""
        return not self.broken

    def times(self) -> list[float]:
        """Seconds to converge, of every fault that was followed by a time in which all was well."""
        return _took(self.faults)

    def of(self, kind: Kind) -> list[Done]:
        """The faults of one kind."""
        return [done for done in self.faults if done.kind is kind]

    def as_dict(self) -> dict[str, object]:
        """For scripts."""
        times = self.times()
        return {
            "held": self.held,
            "seed": self.seed,
            "seconds": self.seconds,
            "faults": {kind.value: _figures(mine) for kind in Kind if (mine := self.of(kind))},
            "server_starts": self.execs,
            "repairs": self.repairs,
            "converge_median_s": round(statistics.median(times), 2) if times else None,
            "converge_worst_s": round(max(times), 2) if times else None,
            "overlaps": len(self.overlaps),
            "lost_repairs": len(self.lost),
            "budget_breaks": len(self.budget_breaks),
            "unwanted_starts": len(self.unwanted),
            "broken": list(self.broken),
            "not_possible_here": [kind.value for kind in self.not_possible],
            "largest": {name: {"memory_bytes": memory, "descriptors": fds} for name, (memory, fds) in self.sizes.items()},
        }

    def lines(self) -> list[str]:
        """For people."""
        out = [f"seed {self.seed}, {self.seconds:.0f} s of faults", "", f"{'fault':<30} {'times':>5} {'median s':>9} {'worst s':>8}"]
        for kind in Kind:
            mine = self.of(kind)
            took = _took(mine)
            if mine:
                median, worst = (f"{statistics.median(took):.1f}", f"{max(took):.1f}") if took else ("-", "-")
                out.append(f"{kind.value:<30} {len(mine):>5} {median:>9} {worst:>8}")
        times = self.times()
        if times:
            out.append(f"{'all':<30} {len(self.faults):>5} {statistics.median(times):>9.1f} {max(times):>8.1f}")
        if self.not_possible:
            out.append(f"not possible here: {', '.join(kind.value for kind in self.not_possible)}")
        out += ["", f"server starts {self.execs}, repairs {self.repairs}"]
        for name, (memory, fds) in sorted(self.sizes.items()):
            out.append(f"{name:<20} at most {memory / 2**20:6.1f} MiB" + (f", {fds} descriptors" if fds else ""))
        counts = {
            "overlaps": self.overlaps,
            "lost repairs": self.lost,
            "budget breaks": self.budget_breaks,
            "unwanted starts": self.unwanted,
        }
        out += ["", ", ".join(f"{len(found)} {name}" for name, found in counts.items())]
        out += [f"  {line}" for line in self.broken]
        out.append("everything held" if self.held else f"NOT everything held; what there is to look at is in {self.home}")
        return out


def _took(faults: list[Done]) -> list[float]:
    return [took for done in faults if (took := done.took_s) is not None]


def _figures(faults: list[Done]) -> dict[str, object]:
    """How often, how often all was well again afterwards, and the seconds that took, each."""
    took = _took(faults)
    return {"times": len(faults), "survived": len(took), "took_s": [round(each, 2) for each in sorted(took)]}
