"""Collects everything that is wrong with input files, to tell it all at once."""

from __future__ import annotations

from megatron_klear.errors import DataError

SHOWN_PROBLEMS = 20
"""Problems told one by one; of the others only the number."""


class Problems:
    """Problems found so far.

    Args:
        subject: what is being read, for the head of the message.
        limit: most problems to tell one by one.
    """

    def __init__(self, subject: str, limit: int = SHOWN_PROBLEMS) -> None:
        self._subject = subject
        self._limit = limit
        self._shown: list[str] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, where: str, what: str) -> None:
        """Note a problem.

        Args:
            where: file and line, or what else finds it.
            what: what was found and what is allowed.
        """
        self._count += 1
        if len(self._shown) < self._limit:
            self._shown.append(f"{where}: {what}")

    def raise_if_any(self, advice: str = "") -> None:
        """Stop if anything is wrong.

        Args:
            advice: last line of the message: what to change.

        Raises:
            DataError: with all problems up to the limit, and the number of the others.
        """
        if not self._count:
            return
        head = "1 problem" if self._count == 1 else f"{self._count} problems"
        lines = [f"{head} with {self._subject}:", *(f"  - {text}" for text in self._shown)]
        if self._count > len(self._shown):
            lines.append(f"  ... and {self._count - len(self._shown)} more")
        if advice:
            lines.append(advice)
        raise DataError("\n".join(lines))
