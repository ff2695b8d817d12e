"""Text to utterances: where a text may be cut with the least to hear, the first utterance short."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

PARAGRAPH, SENTENCE, CLAUSE, QUOTED, JOINT, WORD = 5, 4, 3, 2, 1, 0  # how strong a break in the text is
# what is heard there, at speed 1
PAUSE_S = {PARAGRAPH: 0.55, SENTENCE: 0.32, CLAUSE: 0.16, QUOTED: 0.2, JOINT: 0.03, WORD: 0.03}
FIRST_SYLLABLES, FULL_SYLLABLES = 14, 56  # of the first utterance and of the longest: about 3 s and 13 s of speech
FIRST_STEPS = (8, FIRST_SYLLABLES, 28)  # of the first one: few, so that texts are cut alike and found in the cache
FIRST_AUDIO_S = 0.6  # patience for it
GROWTH = 1.5  # of each next one: equal texts at once then end within 1.3 times of each other
PAIRS = ("“”", "「」", "『』", "《》", "（）", r"\(\)", '""')
QUOTE = re.compile("|".join(f"{a}[^{a}{b}\n]{{1,200}}{b}" for a, b in (re.findall(r"\\?.", pair) for pair in PAIRS)))
ABBREVIATION = re.compile(
    r"\b(?:(?:Dr|Mr|Mrs|Ms|Prof|St|Jr|Sr|vs|etc|approx|Gen|Sen|Rep|Lt|Col|Capt|Inc|Ltd|Co|Corp|dept|est)\.(?!\s*$)"
    r"|(?:No|Nos|Fig|Figs|Vol|pp|p|Ch|Sec|Art)\.(?=\s*\d)|(?:[A-Za-z]\.)+(?!\s*$))\s*",
    re.IGNORECASE,
)
# Where a text without marks is cut with the least to hear: before these words, and after these particles.
JOINTS = (
    r"\s+(?=(?:and|but|or|so|which|who|that|because|when|while|where|if|after|before|until|although|though|since|than"
    r"|with|without|for|from|into|through|between|during|under|over|by|in|on|at)\b)"
    "|(?=而且|但是|因为|所以|然后|并且|如果|或者|以及|虽然|不过|于是|只要|只有|无论|同时|我们|你们|[他她它]们|大家|这[个些样]"
    "|那[个些样]|[今明昨]天|现在|已经|可以|可能|应该|没有|不是|就是|还是)"
    "|(?<=的)(?!时候|话|确|士)(?<!目的)|(?<=了)(?!解|不|得|[吗吧呢的])|(?<=着)(?![急火手想重名落陆眼迷凉的])"
    "|(?<=过)(?![去程来年分度于敏时期滤渡后了的])"
)
SPACE = r"[^\S\n]*"
AFTER = rf"[\"'”’）)」』》】\]]*(?=\s|$|[\u2e80-\U0003ffff]){SPACE}"  # closing quotes belong to the sentence they end
BREAK = re.compile(
    rf"(?P<paragraph>\s*\n\s*)|(?P<sentence>[。！？…；]+[”’）)」』》】]*{SPACE}|(?<![.!?;])[.!?;]++{AFTER})"
    rf"|(?P<clause>[，、：—]+{SPACE}|[,:]{AFTER}|\s[-–—]+\s)|(?P<joint>{JOINTS})|(?P<word>\s+)"
)
STRENGTH = {"paragraph": PARAGRAPH, "sentence": SENTENCE, "clause": CLAUSE, "joint": JOINT, "word": WORD}


class Utterance(NamedTuple):
    """One unit of text to speak, and the pause after it in seconds at speed 1."""

    text: str
    pause_s: float


def syllables(character: str) -> float:
    """Rough length of a character in syllables: CJK and digits one, a letter or a space a third."""
    return 1.0 if character >= "\u2e80" or character.isdigit() else 0.3


def count_syllables(text: str) -> float:
    """Rough length of a text in syllables."""
    return sum(map(syllables, text))


def first_length(pace_s: float) -> float:
    """Return how long a first utterance may be, in syllables, where each takes so many seconds to make."""
    return max((step for step in FIRST_STEPS if step * pace_s <= FIRST_AUDIO_S), default=FIRST_STEPS[0])


def find_breaks(text: str) -> list[tuple[int, int]]:
    """Return (position, strength) of each place where text may be cut; weaker in quotes and after abbreviations."""
    abbreviated = {m.end() for m in ABBREVIATION.finditer(text)}
    quoted = [False] * (len(text) + 1)
    for m in QUOTE.finditer(text):
        quoted[m.start() + 1 : m.end()] = [True] * (m.end() - m.start() - 1)
    found = []
    for m in BREAK.finditer(text):
        strength = STRENGTH[m.lastgroup or "word"]
        if strength in (SENTENCE, CLAUSE):
            strength = WORD if m.end() in abbreviated else QUOTED if quoted[m.end()] else strength
        found.append((m.end(), strength))
    return found


def split_utterances(
    text: str, first: float = FIRST_SYLLABLES, full: float = FULL_SYLLABLES, usual: float = FULL_SYLLABLES
) -> list[Utterance]:
    """Split text at its natural breaks: a short utterance first, then longer and longer ones up to about `usual`.

    One is longer, up to `full`, only where no sentence or clause ends sooner.
    """
    reach = [0.0, *itertools.accumulate(map(syllables, text))]
    utterances, marks, start, limit = [], find_breaks(text), 0, min(first, full, usual)
    while start < len(text):
        marks = [mark for mark in marks if mark[0] > start]
        sizes = (min(full, limit * times) for times in (1, 2, 2.5))
        near, far, awaited = (bisect_right(reach, reach[start] + size) - 1 for size in sizes)
        end, strength = choose_break(marks, near, far, awaited, len(text)) or (whole_words(text, start, far), WORD)
        if piece := " ".join(text[start:end].split()):
            utterances.append(Utterance(piece, PAUSE_S[strength]))
        start, limit = end, min(full, usual, limit * GROWTH)
    return utterances


def split_to_fit(utterances: list[Utterance], fits: Callable[[str], bool]) -> Iterator[Utterance]:
    """Yield the utterances, those that do not fit the engine split again at half the length.

    One by one, as asking takes a model time: it writes numbers out and counts tokens.
    """
    for utterance in utterances:
        if fits(utterance.text) or len(utterance.text) == 1:
            yield utterance
            continue
        halves = split_utterances(utterance.text, full=count_syllables(utterance.text) / 2)
        *parts, last = split_to_fit(halves, fits)
        yield from (*parts, Utterance(last.text, utterance.pause_s))


def split_sentences(text: str) -> list[str]:
    """Cut text after each sentence, inside quotes too."""
    ends = [m.end() for m in BREAK.finditer(text) if m.lastgroup in ("paragraph", "sentence")]
    return [text[start:end].strip() for start, end in itertools.pairwise([0, *ends, len(text)])]


def choose_break(
    marks: list[tuple[int, int]], near: int, far: int, awaited: int, length: int
) -> tuple[int, int] | None:
    """Return the strongest, then latest break up to `near`; else the first clause up to `awaited`, which leaves no
    short rest; else the strongest, then latest up to `far`, rather past `near` than before it."""
    paragraph = next((end for end, strength in marks if strength == PARAGRAPH), length)
    clauses = [(end, strength) for end, strength in marks if strength >= CLAUSE and end <= min(awaited, paragraph)]
    close = [mark for mark in clauses if mark[0] <= near]
    if paragraph <= near:
        return paragraph, PARAGRAPH
    if close:
        return max(close, key=lambda mark: (mark[1], mark[0]))
    if clauses or paragraph <= awaited:
        return clauses[0] if clauses else (paragraph, PARAGRAPH)
    within = (mark for mark in marks if mark[0] <= far)
    return max(within, key=lambda mark: (mark[0] > near, mark[1], mark[0]), default=None)


def whole_words(text: str, start: int, end: int) -> int:
    """Move `end` back so that it cuts no Latin word or number, unless that would leave nothing."""
    word = re.search(r"[A-Za-z0-9.,:'-]+\Z", text[start:end])
    inside = word and re.match(r"[A-Za-z0-9]", text[end : end + 1])
    return start + word.start() if word and inside and word.start() > 0 else max(end, start + 1)
