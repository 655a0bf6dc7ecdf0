"""The words of a property file, and where in the file each of them stands."""

from __future__ import annotations

import re

from patchclamp.core.errors import PropertyError

_WORD = re.compile(r';[^\r\n]*|[()]|"[^"]*"|[^\s();"\[\]]+(?:\s*\[[^\]()]*\])?|\S')
_LINE = re.compile(r"\r\n|\r|\n")


class Tokens:
    """Parentheses, words, and words with an index (`X[0, 3]`, one token) in order.

    Places are found again from the text when an error needs them: files have millions of
    tokens and most have no error.
    """

    def __init__(self, text: str, name: str) -> None:
        self._text, self._name = text, name
        self.words: list[str] = [word for word in _WORD.findall(text) if word[0] != ";"]

    def error(
        self,
        at: int,
        what: str,
        *,
        got: str | None = None,
        expected: str | None = None,
        nearest: str | None = None,
        hint: str | None = None,
    ) -> PropertyError:
        """An error at token number `at`, or at the end of the file."""
        line, column = self.place(at)
        return PropertyError(
            f"'{self._name}', line {line}, column {column}: {what}",
            got=got,
            expected=expected,
            nearest=nearest,
            hint=hint,
        )

    def failure(self, what: str, *, hint: str | None = None) -> PropertyError:
        """An error of the whole file."""
        return PropertyError(f"'{self._name}': {what}", hint=hint)

    def place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1, of token number `at`, or of the end of the file."""
        offset = len(self._text)
        number = -1
        for match in _WORD.finditer(self._text):
            number += match[0][0] != ";"
            if number == at:
                offset = match.start()
                break
        breaks = [match.end() for match in _LINE.finditer(self._text, 0, offset)]
        return len(breaks) + 1, offset - (breaks[-1] if breaks else 0) + 1

    def unclosed(self) -> int | None:
        """The last parenthesis that is opened and not closed."""
        opened: list[int] = []
        for number, word in enumerate(self.words):
            if word == "(":
                opened.append(number)
            elif word == ")" and opened:
                opened.pop()
        return opened[-1] if opened else None
