"""Texts on which models and tokenizers are compared."""

from __future__ import annotations

import random

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "The quick brown fox",
    "1 + 1 =",
    "Once upon a time",
    "Translate 'good morning' to French.",
    "List three primary colors.",
    "Who wrote Romeo and Juliet?",
    "Explain photosynthesis briefly.",
    "import numpy as np\n",
    "你好，世界",
    "Why is the sky blue?",
    "Tell me a joke.",
    "SELECT * FROM users WHERE",
    "In 1969, humans",
    "The opposite of hot is",
    "What is 17 times 23?",
    "Name a mammal that can fly.",
    "Roses are red,",
    "Water boils at",
    "The largest planet is",
    "Dear Sir or Madam,",
    "How do I sort a list in Python?",
)

TEXTS = (
    *PROMPTS,
    "It's what they'll've said; I'D, WE'RE, you'Ve  and the machine's 'S'T",
    "北京是中国的首都。Mixed中文and English，２０２５年１０月",
    "日本語のひらがなとカタカナ、한국어 텍스트",
    "class A(B):\n    def f(self, x: int = 0x1F) -> None:\n\t\treturn x**2  # ok\r\n\r\n",
    "🙂🚀👩‍👩‍👧‍👦🇫🇷 emoji 👍🏽!!",
    "  leading,   inner    and trailing   \n\n\n \t\t \n",
    "\u00a0\u2003\u3000\u200b\u0085\u2028x\u2029",
    "Ελληνικά Русский العربية हिन्दी ไทย Ǆǅǆ ŉ ß ſ",
    "1234567890 3.14159 1,000,000 ½²٣ Ⅷ",
    "é e\u0301 ﬁ İstanbul \U00020000㐀〇々",
    "",
    " ",
    "\n",
)

_ALPHABETS = (
    "abc XYZ", "  \n\r\t", "0123456789", "你好世界法国的首都是", "'s't're've'm'll'd'S'T",
    "éàüñçÅß", "🙂🚀👩‍👩‍👧‍👦🇫🇷", "{}[]()<>=+-*/_.,:;!?\"'`~@#$%^&|\\",
    "أهلاहिन्दीไทย", "한국어日本語ひらカタ", "\u00a0\u2003\u3000\u200b\u0085", "ǅǈ〇々〆㐀豈",
)  # fmt: skip


def random_text(source: random.Random) -> str:
    """Draw a mixture of scripts, spaces and marks, or of any characters."""
    length = source.randrange(1, 50)
    if source.random() < 0.7:
        return "".join(source.choice(source.choice(_ALPHABETS)) for _ in range(length))
    points = (
        source.randrange(0x110000 if source.random() < 0.5 else 0x3000) for _ in range(length)
    )
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
