from __future__ import annotations

import re

import pytest

from k2cli.ui.chat.markdown import MarkdownStyler

ANSWER = """# Title
Some **bold** text, `code **not bold**` and 2 * 3 ** 4.

```python
x = "# no heading" ** 2
```
巴黎 **重要** end *"""


def styled(text: str, size: int) -> str:
    styler = MarkdownStyler()
    return "".join(styler.push(text[i : i + size]) for i in range(0, len(text), size)) + (
        styler.finish()
    )


def test_the_text_itself_is_never_changed_and_pieces_do_not_matter() -> None:
    whole = styled(ANSWER, len(ANSWER))
    assert re.sub(r"\x1b\[[0-9;]*m", "", whole) == ANSWER
    for size in (1, 2, 3, 7):
        assert styled(ANSWER, size) == whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("a **b** c", "a \x1b[1m**b**\x1b[0m c"),
        ("`x`", "\x1b[36m`x`\x1b[0m"),
        ("# T\nx", "\x1b[1m# T\x1b[0m\nx"),
        ("```\nx\n```\ny", "\x1b[36m```\nx\n```\x1b[0m\ny"),
        # A marker that is never closed ends with its line.
        ("**a\nb", "\x1b[1m**a\x1b[0m\nb"),
    ],
)
def test_styles(text: str, expected: str) -> None:
    assert styled(text, 1) == expected
