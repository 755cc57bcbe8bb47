"""What a check saw: values beside those that were wanted."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Findings:
    """What one stage's check saw."""

    checks: list[dict[str, Any]] = field(default_factory=list)
    """{"check", "found", "wanted", "passed"} in the order of looking."""
    identity: dict[str, str] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """The checks that did not pass, one line each."""
        return [f"{c['check']}: {c['found']}, wanted {c['wanted']}" for c in self.checks if not c["passed"]]

    def equal(self, check: str, found: Any, wanted: Any) -> None:
        """Note a value that must be another one."""
        self._add(check, found, wanted, found == wanted)

    def holds(self, check: str, passed: bool, found: Any, wanted: str) -> None:
        """Note a condition."""
        self._add(check, found, wanted, bool(passed))

    def none(self, check: str, problems: Sequence[str]) -> None:
        """Note problems, of which there must be none."""
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        self._add(check, "; ".join(problems[:3]) + more if problems else "none", "no problem", not problems)

    def _add(self, check: str, found: Any, wanted: Any, passed: bool) -> None:
        self.checks.append({"check": check, "found": found, "wanted": wanted, "passed": passed})
