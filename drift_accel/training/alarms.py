"""Signs of trouble in a run's records: each is said once, in one line that says what to do.

Alarms are a function of the records alone, so that whoever reads metrics.jsonl later finds the same ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

COLLAPSED_DIVERSITY = 0.1
HEALTHY_DIVERSITY = 0.3
FULL_FLOOR = 0.95
STARVED_SHARE = 0.3
LOSS_TOLERANCE = 1.02
VANISHED_LOSS = 0.5

Record = Mapping[str, float]


@dataclass(frozen=True)
class Alarm:
    """name: one of ALARMS; step: the record that completed it; line: what was seen and what to do."""

    name: str
    step: int
    line: str

    def __str__(self) -> str:
        return f"ALARM {self.name} at step {self.step}: {self.line}"


# What each one watches for; the numbers of records in a row before it is said.
ALARMS = {
    "diversity_collapse": ("generated samples of a class are (nearly) all the same", 3),
    "floor": ("nearly all pairs sit on the affinity's floor at the largest temperature: the drift sees no neighbours", 3),
    "loss_range": ("a key's loss is outside what normalised fields can give", 1),
    "data_starvation": ("the device waits for data", 3),
}


class AlarmWatch:
    """Goes through the records of a run in order.

    max_key_loss: largest loss that a key can have, None where it has no bound (see `loss_bound`). warmup_steps: until then
    samples
    may still be all the same, as an untrained generator's are.
    """

    def __init__(self, *, max_key_loss: float | None = None, warmup_steps: int = 0, is_generator: bool = True):
        self._max_key_loss, self._warmup_steps, self.is_generator = max_key_loss, warmup_steps, is_generator
        self._was_diverse, self._seen = False, 0
        self._in_a_row = dict.fromkeys(ALARMS, 0)
        self.active: dict[str, Alarm] = {}

    def check(self, record: Record) -> list[Alarm]:
        """The alarms that this record completes; one that goes on is not said again, one that ended may come back."""
        rules: dict[str, Callable[[Record], str | None]] = {
            "diversity_collapse": self._diversity,
            "floor": self._floor,
            "loss_range": self._loss,
            "data_starvation": self._data,
        }
        raised = []
        for name, rule in rules.items():
            line = rule(record)
            if line is None:
                self._in_a_row[name] = 0
                self.active.pop(name, None)
                continue
            self._in_a_row[name] += 1
            if self._in_a_row[name] == ALARMS[name][1]:
                self.active[name] = Alarm(name, int(record["step"]), line)
                raised.append(self.active[name])
        self._seen += 1
        return raised

    def _diversity(self, record: Record) -> str | None:
        # The output's own diversity, too: an encoder's norms blow rounding errors up until a constant looks diverse.
        ratios = [_number(record, name) for name in ("diversity_ratio", "diversity_ratio/global")]
        ratio = min((value for value in ratios if value is not None), default=None)
        if ratio is None:
            return None
        self._was_diverse = self._was_diverse or ratio > HEALTHY_DIVERSITY
        if ratio >= COLLAPSED_DIVERSITY or not (self._was_diverse or record["step"] > self._warmup_steps):
            return None
        return (
            f"samples of a class differ {ratio:.3f} times as much as real ones (healthy: above {HEALTHY_DIVERSITY}): lower "
            "optimizer.lr, raise batch.generated, and look at the samples"
        )

    def _floor(self, record: Record) -> str | None:
        shares = {name: value for name, value in record.items() if name.startswith("floor_share_") and "/" not in name}
        if not shares:
            return None
        largest = max(shares, key=lambda name: float(name.removeprefix("floor_share_")))
        share = _number(record, largest)
        if share is None or share <= FULL_FLOOR:
            return None
        temperature = largest.removeprefix("floor_share_")
        return (
            f"{share:.1%} of the pairs are on the floor at temperature {temperature}: generated and real samples are too far "
            "apart; "
            "check that data and encoder belong together, add a larger temperature to drift.temperatures"
        )

    def _loss(self, record: Record) -> str | None:
        if self._max_key_loss is None:
            return None
        wrong = {
            name.partition("/")[2]: _number(record, name)
            for name in record
            if name.startswith("key_loss/") and not 0 <= _number(record, name, default=-1.0) <= self._max_key_loss
        }
        mean = _number(record, "key_loss")
        # A single key may have no field (the deviation within a map of one location), and an untrained generator's many.
        if not wrong and mean is not None and mean < VANISHED_LOSS and record["step"] > max(self._warmup_steps, 1):
            return (
                f"the mean loss of a key is {mean:.4g}: the fields have vanished (healthy: above 1); features or samples are "
                "constant, look at scale/KEY and the encoder"
            )
        if not wrong:
            return None
        key, loss = next(iter(wrong.items()))
        shown = "not finite" if loss is None else f"{loss:.4g}"
        more = f" and {len(wrong) - 1} more keys" if len(wrong) > 1 else ""
        return (
            f"key {key} has a loss of {shown}{more}, outside [0, {self._max_key_loss:.4g}], which normalised fields cannot have: "
            "the statistics are not those of this batch; report it with config.yaml"
        )

    def _data(self, record: Record) -> str | None:
        share = _number(record, "data_wait_share")
        if share is None or self._seen == 0 or share <= STARVED_SHARE:  # a start has its first batch still to draw
            return None
        return (
            f"{share:.0%} of the time goes into waiting for data (healthy: below 5 %): put the cache on a local disk, set "
            "data.in_memory, or give each process more processor cores"
        )


def loss_bound(num_temperatures: int, *, field: str, reduction: str, statistics: str) -> float | None:
    """The largest loss of a key: fields of mean square 1 each, T of them summed, have at most T^2; alone, T together.

    None where statistics are another step's, or losses are sums over locations.
    """
    if reduction == "paper" or statistics == "lagged":
        return None
    return LOSS_TOLERANCE * (num_temperatures if field == "per_temperature" else num_temperatures**2)


def watch_for(config) -> AlarmWatch:
    """The watch of a trainer's configuration; the drift's alarms belong to generators alone."""
    drift = getattr(config, "drift", None)
    bound = None
    if drift is not None:
        options = {"field": drift.field, "reduction": drift.reduction, "statistics": config.statistics}
        bound = loss_bound(len(drift.temperatures), **options)
    return AlarmWatch(max_key_loss=bound, warmup_steps=config.optimizer.warmup_steps, is_generator=drift is not None)


def _number(record: Record, name: str, default: float | None = None) -> float | None:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) < float("inf") else default
