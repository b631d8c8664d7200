"""An exporter that remembers what it is told, in place of Ray's."""

from collections import defaultdict
from collections.abc import Mapping

from expertmesh.actors.metrics import Metric, Metrics

Labels = frozenset[tuple[str, str]]


class Recorded:
    """What was exported: values of gauges, sums of counters, observations of histograms, by name and labels."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.values: dict[tuple[str, Labels], float] = {}
        self.observed: defaultdict[str, list[float]] = defaultdict(list)
        self.metrics = Metrics(lambda metric: _Instrument(metric, self))

    def value(self, name: str, **labels: str) -> float:
        return self.values[f"expertmesh_{name}", frozenset(labels.items())]

    def series(self, name: str) -> list[dict[str, str]]:
        """Return the labels of each series of a name."""
        return [dict(labels) for known, labels in self.values if known == f"expertmesh_{name}"]


class _Instrument:
    def __init__(self, metric: Metric, recorded: Recorded) -> None:
        self._name, self._recorded = metric.name, recorded
        recorded.made.append(metric.name)

    def set(self, value: float, labels: Mapping[str, str]) -> None:
        self._recorded.values[self._name, frozenset(labels.items())] = value

    def add(self, growth: float, labels: Mapping[str, str]) -> None:
        assert growth >= 0, f"{self._name} falls by {-growth}"
        key = self._name, frozenset(labels.items())
        self._recorded.values[key] = self._recorded.values.get(key, 0.0) + growth

    def observe(self, value: float, labels: Mapping[str, str]) -> None:
        assert not labels
        self._recorded.observed[self._name].append(value)
