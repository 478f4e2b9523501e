"""Made-up texts that break the rules for documents in every way; the same ones on every machine.

tests/filters/decisions.json has what datatrove's filters decide on each of the first 380.
"""

from __future__ import annotations

import hashlib
import random

COMMON = [
    *("the", "be", "to", "of", "and", "that", "have", "with", "a", "in", "it", "for", "not", "on", "he", "as", "you"),
    *("do", "at", "this", "but", "his", "by", "from", "they", "we", "say", "her", "she"),
]
GREEK = ["και", "το", "να", "του", "της", "με", "από", "στο", "είναι", "για", "που", "δεν"]


def texts(count: int) -> list[str]:
    choose = random.Random(6)
    rare = ["".join(choose.choices("etaoinshrdlucmfwyp", k=choose.randrange(2, 12))) for _ in range(700)]
    makers = (
        prose,
        prose,
        prose,
        repeated_lines,
        repeated_words,
        bullets,
        ellipses,
        symbols,
        code,
        policies,
        menu,
        strange,
    )
    return [choose.choice(makers)(choose, rare) for _ in range(count)]


def sentence(choose: random.Random, rare: list[str], common: float = 0.5) -> str:
    words = [choose.choice(COMMON if choose.random() < common else rare) for _ in range(choose.randrange(4, 16))]
    return " ".join(words).capitalize() + choose.choice([".", ".", "!", "?", '."', ""])


def prose(choose: random.Random, rare: list[str]) -> str:
    common = choose.choice([0.02, 0.3, 0.5])
    lines = [sentence(choose, rare, common) for _ in range(choose.randrange(1, 22))]
    ends = choose.choice([" ", "\n", "\n\n"])
    return ends.join(lines)


def repeated_lines(choose: random.Random, rare: list[str]) -> str:
    lines = [sentence(choose, rare) for _ in range(12)]
    lines += choose.choices(lines[:3], k=choose.randrange(0, 9))
    choose.shuffle(lines)
    return choose.choice(["\n", "\n\n"]).join(lines)


def repeated_words(choose: random.Random, rare: list[str]) -> str:
    phrase = " ".join(choose.choices(rare, k=choose.choice([2, 4, 6, 7, 8, 8, 9, 10])))
    parts = [sentence(choose, rare) for _ in range(14)]
    for _ in range(choose.randrange(2, 6)):
        parts.insert(choose.randrange(len(parts)), phrase)
    return " ".join(parts)


def bullets(choose: random.Random, rare: list[str]) -> str:
    return "\n".join(choose.choice(["- ", "• ", "- ", " - ", "• "]) + sentence(choose, rare) for _ in range(12))


def ellipses(choose: random.Random, rare: list[str]) -> str:
    often = choose.random()
    return "\n".join(
        sentence(choose, rare) + (choose.choice(["...", "…"]) if choose.random() < often else "") for _ in range(12)
    )


def symbols(choose: random.Random, rare: list[str]) -> str:
    words = sentence(choose, rare).split() * 1 + [word for _ in range(9) for word in sentence(choose, rare).split()]
    sign = choose.choice(["#", "...", "123", "--", "4.5"])
    return " ".join(word if choose.random() < 0.85 else choose.choice([sign, sign + word]) for word in words)


def code(choose: random.Random, rare: list[str]) -> str:
    lines = [f"def {word}(x): return {choose.randrange(99)}." for word in choose.sample(rare, 8)]
    return "\n".join(
        [*lines, *choose.choices(["if (x) { y = 1; } to be.", "Enable javascript, please do.", "x = [1, 2]"], k=3)]
    )


def policies(choose: random.Random, rare: list[str]) -> str:
    lines = [sentence(choose, rare) for _ in range(choose.randrange(4, 12))]
    lines += choose.sample(
        [
            "This site uses cookies to be good.",
            "Read the Privacy Policy now.",
            "Lorem ipsum dolor sit amet.",
            "It was so [12] and so [citation needed] there.",
            "Short one.",
            "a" * 1001 + " is a long word.",
        ],
        2,
    )
    choose.shuffle(lines)
    return "\n".join(lines)


def menu(choose: random.Random, rare: list[str]) -> str:
    lines = [" ".join(choose.choices(rare, k=choose.randrange(1, 5))).title() for _ in range(choose.randrange(8, 30))]
    return "\n".join([*lines, *(sentence(choose, rare) for _ in range(choose.randrange(0, 12)))])


def strange(choose: random.Random, rare: list[str]) -> str:
    kind = choose.randrange(5)
    if kind == 0:
        return " ".join(choose.choices(GREEK, k=80)) + "."
    if kind == 1:
        return " ".join(choose.choice(rare) * choose.randrange(2, 4) for _ in range(90)) + "."
    if kind == 2:
        return " ".join(choose.choices(["a", "b", "c", "to", "x", "y", "of"], k=80)) + "."
    if kind == 3:
        return " ".join(choose.choices([*COMMON, *(str(number) for number in range(1000, 1040))], k=120)) + "."
    return "\n".join(f"{choose.choice(COMMON)} {'x'.join(choose.choices(rare, k=9))}." for _ in range(60))


def digest(text: str) -> str:
    """The beginning of the sha256 of a text, by which decisions.json knows it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
