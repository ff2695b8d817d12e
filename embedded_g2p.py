"""Text to Kokoro phonemes: Mandarin, English, and lines that mix both.

A line with any Han character is read as Mandarin, Latin words in it as English; any other line is English.
Three steps: `clean` (one spelling for each character), `speakable` (numbers, units and symbols become words),
`G2P` (words become phonemes). A number attached to a Latin word (iPhone 15, GPT-4o) takes the language of its line.
"""

import functools
import itertools
import json
import logging
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import cn2an
import jieba
from hibari.g2p import G2P as EnglishG2P
from hibari.g2p import numbers
from hibari.g2p.normalize import MONTH_NAMES
from hibari.g2p.normalize import normalize as expand_english
from misaki.tone_sandhi import ToneSandhi
from misaki.zh import ZHG2P
from misaki.zh_normalization.char_convert import t2s_dict
from pypinyin import Style, lazy_pinyin
from pypinyin.constants import PHRASES_DICT

ASSETS = Path(__file__).parent / "assets"
VOCABULARY = frozenset(json.loads((ASSETS / "vocab.json").read_text("utf-8"))["vocab"])
HANS = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
HAN = re.compile(f"[{HANS}]")
FIRST_PRIVATE = 0xE000  # these stand for Latin words whose lexicon reading is pinyin; `clean` lets none in
RUN = re.compile(f"[{HANS}]+|[\ue000-\uf8ff]|[^{HANS}\ue000-\uf8ff]+")


class LexiconError(ValueError):
    """A lexicon file that cannot be used: names the file, the line, the fault and the remedy."""


def has_han(text: str) -> bool:
    """True when the line is to be read as Mandarin."""
    return HAN.search(text) is not None


# === Clean: one spelling for each character ===

# Before normalisation, which would lose the pause of a full-width comma and the height of a superscript.
SPELLINGS = str.maketrans(
    dict.fromkeys("，、､\n", ", ") | dict.fromkeys("。｡", ". ") | dict.fromkeys("《〈「『【«", " “")
    | dict.fromkeys("》〉」』】»", "” ") | dict.fromkeys("[{", " (") | dict.fromkeys("]}", ") ")
    | dict.fromkeys("’‘`", "'") | dict.fromkeys("₋−–‐‑", "-") | dict.fromkeys("·・™®©", " ")
    | {"！": "! ", "？": "? ", "；": "; ", "…": "… ", "㎡": "m^2", "㎥": "m^3", "ß": "ss", "æ": "ae", "œ": "oe"}
    | dict(zip("⁄μøØłŁđĐı妳麽瞭藉於餘徵锺", "/uoOlLdDi你么了借于余征钟", strict=True))
)  # fmt: skip
TO_SIMPLIFIED = {ord(old): new for old, new in t2s_dict.items() if old not in "乾著"} | SPELLINGS
AMBIGUOUS = (re.compile("著(?![名作称述])(?<![名原专显论土巨编译]著)"), "着"), (re.compile("乾(?![坤隆])"), "干")
SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁻]+")
VULGAR_FRACTION = re.compile("(?=[¼-¾⅐-⅞])")
SYMBOLS = re.escape("~/\\|*#^_+=<>&@%‰$°×÷±≤≥≠≈√∞→¥€£₩₹")
NOT_SPOKEN = re.compile(rf"[^{HANS}A-Za-z0-9,.;:!?()\"'“”…—{SYMBOLS}-]+")


def clean(text: str) -> str:
    """Text in the few characters the rules know: simplified, half-width, no accents, emoji or invisible marks."""
    text = SUPERSCRIPT.sub(lambda m: "^" + m[0], VULGAR_FRACTION.sub(" ", text)).translate(TO_SIMPLIFIED)
    for pattern, simplified in AMBIGUOUS:
        text = pattern.sub(simplified, text)
    text = unicodedata.normalize("NFKD", text).translate(SPELLINGS)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf"))
    return NOT_SPOKEN.sub(" ", text.replace("...", "… ")).strip()


# === Speakable: numbers, units and symbols become words ===

Speak = Callable[[re.Match[str]], str] | str
HAN_DIGITS = dict(zip("0123456789.", "零一二三四五六七八九点", strict=True))
PHONE_DIGITS = HAN_DIGITS | {"1": "幺", "+": "加"}
SCALES = {"k": "thousand", "m": "million", "b": "billion"}
SCALE_ZEROS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# symbol: (Mandarin, English, English hundredth)
CURRENCIES = {
    "¥": ("元", "yuan", ""), "$": ("美元", "dollars", "cents"), "€": ("欧元", "euros", "cents"),
    "£": ("英镑", "pounds", "pence"), "₩": ("韩元", "won", ""), "₹": ("卢比", "rupees", ""),
}  # fmt: skip
# symbol: (Mandarin, English or "" where hibari knows it)
UNITS = {
    "km/h": ("公里每小时", ""), "m/s": ("米每秒", "meters per second"), "um": ("微米", "micrometers"),
    "km^2": ("平方公里", "square kilometers"), "km2": ("平方公里", "square kilometers"),
    "m^2": ("平方米", "square meters"), "m2": ("平方米", "square meters"), "m^3": ("立方米", "cubic meters"),
    "m3": ("立方米", "cubic meters"), "cm^2": ("平方厘米", "square centimeters"), "km": ("公里", ""),
    "m": ("米", "meters"), "cm": ("厘米", ""), "mm": ("毫米", ""), "nm": ("纳米", ""), "kg": ("公斤", ""),
    "g": ("克", "grams"), "mg": ("毫克", ""), "t": ("吨", "tons"), "L": ("升", "liters"), "ml": ("毫升", ""),
    "mL": ("毫升", "milliliters"), "Hz": ("赫兹", ""), "kHz": ("千赫兹", ""), "MHz": ("兆赫兹", ""),
    "GHz": ("吉赫兹", ""), "W": ("瓦", "watts"), "kW": ("千瓦", ""), "kWh": ("千瓦时", ""), "V": ("伏", "volts"),
    "mAh": ("毫安时", ""), "dB": ("分贝", "decibels"), "s": ("秒", ""), "ms": ("毫秒", ""), "min": ("分钟", ""),
    "h": ("小时", "hours"), "fps": ("帧每秒", ""), "°C": ("摄氏度", "degrees Celsius"), "°": ("度", "degrees"),
    "°F": ("华氏度", "degrees Fahrenheit"),
}  # fmt: skip
# symbol between two things: (Mandarin, English or "" where hibari knows it)
OPERATORS = {
    "+": ("加", "plus"), "=": ("等于", ""), "×": ("乘", ""), "÷": ("除以", ""), "±": ("正负", ""), ">": ("大于", ""),
    "<": ("小于", ""), "≥": ("大于等于", "at least"), "≤": ("小于等于", "at most"), "≠": ("不等于", "is not"),
    "≈": ("约等于", "about"), "√": ("根号", "the square root of"), "∞": ("无穷大", "infinity"), "→": ("到", ""),
    "&": ("和", ""), "@": ("艾特", ""),
}  # fmt: skip
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
START = r"(?<![\w.,])"  # a number starts here; also keeps a failed match from being tried again at each digit
UNIT = f"({'|'.join(re.escape(u) for u in sorted(UNITS, key=len, reverse=True))})(?![A-Za-z0-9^])"
MONEY = rf"([{''.join(CURRENCIES)}])\s?({NUMBER})(?:\s?(thousand|million|billion|trillion)\b|([kKMB])\b)?"
PHONE = (
    r"(?<![\w.,-])(?:\+\d{1,3}(?:[ -]?\(?\d{2,4}\)?){2,4}|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3,4}-\d{4}"
    r"|0\d{2,3}-\d{7,8}|1[3-9]\d{9}|\d{3}-\d{4})(?![\w-])"
)
DATE = START + r"(\d{4})([-/.])(0?[1-9]|1[0-2])\2(0?[1-9]|[12]\d|3[01])(?![\d-])"
CLOCK = START + r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?(?![\d:])"
LINK = (
    r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
    r"|(?:https?://|www\.)[\w./~%?#=&:@+-]*[\w/]"
    r"|(?<![\w.@-])(?:[\w-]+\.)+(?:com|cn|org|net|io|ai|dev|edu|gov)\b(?:/[\w./~%?#=&+-]*[\w/])?"
)


def _rules(table: list[tuple[str, Speak]]) -> list[tuple[re.Pattern[str], Speak]]:
    """Patterns compiled with ASCII classes, so that a Han character is no word character."""
    return [(re.compile(pattern, re.ASCII), spoken) for pattern, spoken in table]


def _rewrite(text: str, rules: list[tuple[re.Pattern[str], Speak]]) -> str:
    """Text after each rule in turn."""
    for pattern, spoken in rules:
        text = pattern.sub(spoken, text)
    return text


def _link(dot: str, slash: str, at: str) -> Speak:
    """'https://example.com/a?b=1' -> 'example dot com slash a': what a person would say of an address."""

    def spoken(match: re.Match[str]) -> str:
        address = re.sub(r"^(?:https?://)?(?:www\.)?|[?#].*$", "", match[0]).rstrip("/")
        marks = str.maketrans({".": f" {dot} ", "/": f" {slash} ", "@": f" {at} "})
        return f" {re.sub('[^A-Za-z0-9]', lambda m: m[0].translate(marks) if m[0] in './@' else ' ', address)} "

    return spoken


def _by_digit(number: str) -> bool:
    """True for what nobody reads as a quantity: a leading zero, more than 16 digits."""
    whole = number.partition(".")[0]
    return len(number) > 16 or (len(whole) > 1 and whole[0] == "0")


def _han_digits(digits: str, table: dict[str, str] = HAN_DIGITS) -> str:
    """'2024' -> '二零二四'; what is no digit separates."""
    return "".join(table.get(d, " ") for d in digits)


def _han_number(number: str) -> str:
    """'1,234.5' -> '一千二百三十四点五'."""
    number = number.replace(",", "")
    return _han_digits(number) if _by_digit(number) else re.sub("^二(?=[千万亿])", "两", cn2an.an2cn(number, "low"))


def _han_model(match: re.Match[str]) -> str:
    """A number after a Latin word: three digits or more one by one unless round, as in RTX4090 but A100."""
    number = match[1]
    one_by_one = number.isdigit() and len(number) > 2 and number[-2:] != "00"
    return " " + (_han_digits(number) if one_by_one else _han_number(number))


def _han_money(match: re.Match[str]) -> str:
    """'$1.2 million' -> '一百二十万美元'."""
    symbol, number, scale, letter, han_scale = match.groups()
    zeros = SCALE_ZEROS.get(scale or SCALES.get((letter or "").lower(), ""), 0)
    amount = f"{Decimal(number.replace(',', '')).scaleb(zeros):f}"
    return _han_number(re.sub(r"(\.\d*?)0+$", r"\1", amount).rstrip(".")) + (han_scale or "") + CURRENCIES[symbol][0]


def _han_clock(match: re.Match[str]) -> str:
    """'10:30' -> '十点三十分', '08:05:30' -> '八点零五分三十秒'."""
    hour, minute, second = match.groups()
    minutes = f"{_han_number(minute)}分" if minute != "00" or second else ""
    return f"{_han_number(str(int(hour)))}点{minutes}" + (f"{_han_number(second)}秒" if second else "")


def _han_date(match: re.Match[str]) -> str:
    """'2024-03-15' -> '二零二四年三月十五日'."""
    year, _, month, day = match.groups()
    return f"{_han_digits(year)}年{_han_number(month.lstrip('0'))}月{_han_number(day.lstrip('0'))}日"


def _english_digits(digits: str) -> str:
    """'405' -> 'four zero five'; what is no digit is a breath."""
    return ", ".join(" ".join(numbers.ONES[int(d)] for d in group) for group in re.findall(r"\d+", digits))


def _cardinal(number: str) -> str:
    """'1,234.5' -> 'one thousand two hundred thirty-four point five'."""
    whole, _, fraction = number.replace(",", "").partition(".")
    words = _english_digits(whole) if _by_digit(whole) else numbers.cardinal(int(whole))
    return words.replace(",", "").replace(" and ", " ") + (f" point {_english_digits(fraction)}" if fraction else "")


def _counted(number: str, plural: str) -> str:
    """'1', 'square meters' -> 'one square meter'."""
    return f"{_cardinal(number)} {re.sub(r's(?= |$)', '', plural, count=1) if number == '1' else plural}"


def _english_money(match: re.Match[str]) -> str:
    """'$3.50' -> 'three dollars and fifty cents', '$1.2M' -> 'one point two million dollars'."""
    symbol, number, scale, letter = match.groups()
    _, name, hundredth = CURRENCIES[symbol]
    scale = scale or SCALES.get((letter or "").lower())
    whole, _, cents = number.partition(".")
    if scale or not hundredth or len(cents) not in (0, 2):
        return f"{_cardinal(number)} {scale or ''} {name}"
    return _counted(whole, name) + (f" and {_counted(str(int(cents)), hundredth)}" if cents.strip("0") else "")


def _english_date(match: re.Match[str]) -> str:
    """'2024/3/15' -> 'March fifteenth, 2024'."""
    year, _, month, day = match.groups()
    return f"{MONTH_NAMES[int(month) - 1]} {numbers.ordinal(int(day))}, {year}"


ZH_RULES = _rules([
    (LINK, _link("点", "斜杠", "艾特")),
    (PHONE, lambda m: _han_digits(m[0], PHONE_DIGITS)),
    (DATE, _han_date),
    (r"(:\d\d)\s?[-~]\s?(?=\d{1,2}:\d\d)", r"\1到"),
    (CLOCK, _han_clock),
    (MONEY + r"\s?(百万|千万|[千万亿])?", _han_money),
    (rf"{START}(\d{{4}})\s?[-~]\s?(\d{{4}})(?=\s?年)", lambda m: f"{_han_digits(m[1])}到{_han_digits(m[2])}"),
    (r"(?<!\d)(1\d{3}|20\d{2})\s?(?=年)", lambda m: _han_digits(m[1])),
    (r"(?<!\d)(\d0)(?=后)", lambda m: _han_digits(m[1])),
    (r"(?<!\d)((?:1\d|20)\d0)s\b", lambda m: f"{_han_digits(m[1])}年代"),
    (r"(?<!\d)(\d{3,4})(?=[pP]\b)", lambda m: _han_digits(m[1])),
    (r"(?<!\d)(\d+)(?:st|nd|rd|th)\b", r"第\1"),
    (rf"(?<![\w.,^-])({NUMBER}[%°C万亿元年月日号点岁]*)\s?[-~]\s?(?=\d)", r"\1到"),
    (r"(?<![\w.,^)-])-(?=\d)", "负"),
    (rf"{START}({NUMBER})\s?:\s?({NUMBER})", r"\1比\2"),
    (r"(?<![\w./])(\d{1,9})/(\d{1,9})(?![\w/])", lambda m: f"{_han_number(m[2])}分之{_han_number(m[1])}"),
    (rf"负({NUMBER})\s?(?=°C|摄氏度)", r"零下\1"),
    (rf"({NUMBER})\s?%", r"百分之\1"),
    (rf"({NUMBER})\s?‰", r"千分之\1"),
    (rf"{START}({NUMBER})\s?{UNIT}", lambda m: m[1] + UNITS[m[2]][0]),
    (r"\^([23])(?!\d)", lambda m: {"2": "平方", "3": "立方"}[m[1]]),
    (r"\^(-?)(\d+)", lambda m: f"的{m[1] and '负'}{_han_number(m[2])}次方"),
    (r"~\s?(?=\d)", "约"),
    (r"#(\d+)", r"\1号"),
    (rf"(\d)\+(?=[{HANS}])", r"\1多"),
    (r"(?<=\d)\s?[xX]\s?(?=\d)", "乘"),
    (r"(?<![\d.])2(?=\s?(?:[个只本张条次位名件台辆家场周天年倍块种瓶杯顿份句遍岁克千万亿]|公[斤里]|小时|分钟))", "两"),
    (r"\d+(?:\.\d+){2,}", lambda m: _han_digits(m[0])),
    (r"(?<=[A-Za-z])[-_]?(\d+(?:\.\d+)?)", _han_model),
    (r"(?<=[A-Z]) (\d{4})(?!\d)", _han_model),
    (NUMBER, lambda m: _han_number(m[0])),
    (r"(?<=[A-Za-z])&(?=[A-Za-z])", " and "),
    *[(rf"(?<=[^\s,.;:!?(])\s?{re.escape(o)}\s?(?=[^\s,.;:!?)])", zh) for o, (zh, _) in OPERATORS.items()],
    (r"(?<=[A-Za-z]{2})\.(?=[a-z]{2})", "点"),
    (rf"(?<=[{HANS}])\s?-\s?|\s?-\s?(?=[{HANS}])|[{SYMBOLS}]+", " "),
    (rf"(?<=[{HANS}])\s?(?=[A-Za-z])|(?<=[A-Za-z'])\s?(?=[{HANS}])", " "),
    (r"(?<![A-Za-z'.])([a-z])(?![A-Za-z'.])", lambda m: m[1].upper()),
])  # fmt: skip
EN_RULES = _rules([
    (LINK, _link("dot", "slash", "at")),
    (PHONE, lambda m: ("plus " if m[0][0] == "+" else "") + _english_digits(m[0])),
    (DATE, _english_date),
    (MONEY, _english_money),
    (rf"{START}({NUMBER})\s?{UNIT}", lambda m: _counted(m[1], UNITS[m[2]][1]) if UNITS[m[2]][1] else m[0]),
    (r"(?<=\d)\s?~\s?(?=\d)|(?<=:\d\d)\s?-\s?(?=\d{1,2}:)", " to "),
    (rf"{START}(\d{{1,2}}):(\d)(?![\d:])", r"\1 to \2"),
    (r"\^([23])(?!\d)", lambda m: {"2": " squared", "3": " cubed"}[m[1]]),
    (r"(?<=\w) ?\^ ?(-?\d+)", r" to the power of \1"),
    (r"(?<=\d/\d)(?=\.(?!\d))", " "),  # hibari knows no fraction before a full stop
    (r"(?<=\d)\s?[xX]\s?(?=\d)", " times "),
    *[(re.escape(o), f" {en} ") for o, (_, en) in OPERATORS.items() if en and o != "+"],
    (r"(?<=\w)\s?\+\s?(?=\w)", " plus "),
])  # fmt: skip
EN_NUMBER_RULES = _rules([
    (r"(?<!\d)(\d{1,9})(?:st|nd|rd|th)\b", lambda m: numbers.ordinal(int(m[1]))),
    (r"(?<!\d)((?:1\d|20)\d0|\d0)s\b", lambda m: re.sub("y$", "ie", numbers.year(int(m[1]))) + "s"),
    (r"\s?%", " percent"),
    (r"(?<![\w)-])-(?=\d)", "minus "),
    (r"\d+(?:\.\d+){2,}", lambda m: " point ".join(map(_english_digits, m[0].split(".")))),
    (r"(?<=[A-Za-z])[-_]?(?=\d)|(?<=\d)[-_]?(?=[A-Za-z])", " "),
    (r"(?<![\d.,])(1[1-9]\d\d|20\d\d)(?![\d.,]?\d)", lambda m: numbers.year(int(m[1]))),
    (r"(?<=[A-Z] )(\d{4})(?!\d)", lambda m: numbers.year(int(m[1]))),
    (r"(?<=\d)[:/-](?=\d)", " "),
    (NUMBER, lambda m: _cardinal(m[0])),
    (r"(?<=[A-Za-z]{2})\.(?=[a-z]{2})", " dot "),
    (rf"(?! ?[&@] ?)[{SYMBOLS}]+", " "),
    (r"(?<= )([b-hj-z])(?= |$)", lambda m: m[1].upper()),
])  # fmt: skip
TIDY_RULES = _rules([
    (r"\s+", " "),
    (r" (?=[,.;:!?…)”])", ""),
    (r"(?<![A-Z])([,.;:!?…])(?: ?[,.;:!?…])+", r"\1"),
    (rf"(?<=[,;:!?…])(?=[\w{HANS}])", " "),
])  # fmt: skip


def speakable(text: str, respell: Callable[[str], str] = str) -> str:
    """The text as words: '3.14%' in a Chinese line becomes '百分之三点一四'; respell is the lexicon's turn."""
    text = respell(clean(text))
    if has_han(text):
        text = _rewrite(text, ZH_RULES)
    else:
        text = _rewrite(expand_english(_rewrite(text, EN_RULES)), EN_NUMBER_RULES)
    return _rewrite(text, TIDY_RULES).strip()


# === Mandarin readings ===

NEUTRAL = frozenset(ToneSandhi().must_neural_tone_words)  # words whose last syllable has no tone: 朋友, 东西
COUNT = "零一二三四五六七八九十百千万亿两几数每第"
# Readings of single characters where no phrase decides; the first that fits wins.
POLYPHONES = tuple((re.compile(pattern), reading) for pattern, reading in (
    (f"(?<=[{COUNT}])行(?![人动业走程])", "hang2"),
    ("(?<=[^块片亩在的这那此本当土])地(?=[^方区点址面球位图铁板理带步下上产震域形势道名质])", "de5"),
    ("得(?=了?[奖分病到])", "de2"),
    ("(?<=[我你他她它们就还都也总可必非不家人])得(?=[去来要把先有在等再想找多跟给看做走吃])", "dei3"),
    ("(?<=[^获取所赢夺心])得(?=[^到了奖分出])", "de5"),
    (f"(?<=[{COUNT}])只", "zhi1"),
    (f"为(?=[{COUNT}])", "wei2"),
    ("(?<=[称成作视变分])为", "wei2"),
    ("(?<=[不得])了", "liao3"),
    ("还(?=[了钱给债款清书])", "huan2"),
    ("(?<![行校部市局科院队会船家组班村乡县省店社厂处首州团师司])长(?![得出成大])", "chang2"),
    ("重(?=[新来复做写试启])", "chong2"),
    ("谁", "shei2"),
    ("(?<=[^的了])干(?=[^什嘛活啥])", "gan1"),
))  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _phones(syllable: str) -> str:
    """'hang2' -> 'xa↗ŋ'; nothing for what is no syllable."""
    try:
        return ZHG2P.py2ipa(syllable)
    except (ValueError, KeyError, AssertionError):
        return ""


def _pinyin(word: str) -> list[str]:
    """One syllable with tone digit for each character, '' where there is none; 儿 and the like lose their tone."""
    syllables = lazy_pinyin(word, Style.TONE3, neutral_tone_with_five=True, errors=lambda odd: [""] * len(odd))
    if word in NEUTRAL or (len(word) > 1 and word[-1] == "儿"):
        syllables[-1] = syllables[-1][:-1] + "5"
    return syllables


def has_reading(character: str) -> bool:
    """Whether a character is Han with a reading that the network can say; some thousand rare ones have none."""
    return has_han(character) and any(map(_phones, _pinyin(clean(character))))


def _third_tones(words: list[list[str]]) -> None:
    """Of two third tones in a row the first rises: first inside words, then between, so that 我/很好 keeps its 我."""
    before: list[str] = [""]
    for word in words:
        for i, (syllable, after) in enumerate(itertools.pairwise(word)):
            if syllable.endswith("3") and after.endswith("3"):
                word[i] = syllable[:-1] + "2"
        if before[-1].endswith("3") and word[0].endswith("3"):
            before[-1] = before[-1][:-1] + "2"
        before = word


def _bu_and_yi(characters: str, syllables: list[str], word_ends: set[int]) -> None:
    """不 and 一 take their tone from the next syllable; 一 in numbers, ordinals and at a word's end keeps its own."""
    for i, (character, after) in enumerate(itertools.pairwise(characters)):
        before, tone = characters[i - 1 : i], syllables[i + 1][-1:]
        counting = before in "零一二三四五六七八九十百千万亿第" if before else False
        counting = counting or after in "零一二三四五六七八九点月号楼班级季" or before + character + after == "月一日"
        if character in "不一" and before == after:
            syllables[i] = syllables[i][:-1] + "5"
        elif character == "不":
            syllables[i] = "bu2" if tone == "4" else "bu4"
        elif character == "一":
            syllables[i] = "yi1" if counting or i in word_ends else "yi2" if tone in ("4", "5") else "yi4"


# === Lexicon: readings of the deployment's own words ===


def load_lexicon(path: Path) -> dict[str, str]:
    """Word to reading, both cleaned; raises LexiconError with the line of the first fault."""
    entries = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as fault:
        raise LexiconError(f"{path}: cannot be read ({fault.strerror}); name a readable UTF-8 file") from fault
    for number, raw in enumerate(lines, 1):
        try:
            line = raw.decode("utf-8-sig").strip()
            if line and not line.startswith("#"):
                word, reading = _lexicon_entry(line)
                entries[word] = reading
        except UnicodeDecodeError as fault:
            raise LexiconError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from fault
        except LexiconError as fault:
            raise LexiconError(f"{path}, line {number}: {fault}") from None
    return entries


def _lexicon_entry(line: str) -> tuple[str, str]:
    """'重庆 = chong2 qing4' -> its two sides, checked."""
    word, _, reading = re.sub("[\t=]", "\t", line, count=1).partition("\t")
    word, reading = clean(word).lower(), clean(reading.replace("ü", "v").replace("u:", "v"))
    syllables = reading.split()
    toneless = [s for s in syllables if not _is_pinyin(s)]
    bare = toneless == syllables and _all_han(word) and all(_is_pinyin(s + "1") for s in syllables)
    faults = {
        f"{line!r} is no entry; write: word = reading": not word or not reading,
        f"{reading!r} cannot be spoken; write pinyin with tone digits, letters or characters": not (
            has_han(reading) or re.search("[A-Za-z]", reading)
        ),
        f"{' '.join(toneless)!r} is no pinyin; write each syllable with its tone digit, as in chong2 qing4": bare
        or 0 < len(toneless) < len(syllables),
        f"{len(syllables)} syllables for {word!r}; write one for each of its {len(word)} characters": not toneless
        and _all_han(word)
        and len(word) != len(syllables),
    }
    for fault, present in faults.items():
        if present:
            raise LexiconError(fault)
    return word, reading


def _is_pinyin(syllable: str) -> bool:
    """True for 'chong2', 'lv4'."""
    return re.fullmatch("[a-z]+[1-5]", syllable) is not None and _phones(syllable) != ""


def _all_han(text: str) -> bool:
    """True when the text is Han characters and nothing else."""
    return re.fullmatch(f"[{HANS}]+", text) is not None


# === G2P ===

LEXICON_FREQUENCY = 10**6  # jieba prefers the word to any other cut
PAUSES = " ,.;:!?…()\"“”—'-"
SPACE_BEFORE_PAUSE = re.compile(" (?=[,.;:!?…)”])")
LETTER_A = re.compile(r"^A$|\bA(?=[ -]+[A-Z]\b)|(?<=\b[A-Z][ -])A\b")
# In a Mandarin voice a bare p is heard as b: the p, t, k that English breathes on are written as Mandarin's.
BREATHED = re.compile("(?<![^ ])[ptk](?=[ˈˌɑɔəɛɜɪʊʌæiuAIOWYQɹlwj])|(?<=[^ s])[ptk](?=ˈ)")
LONG_WORD = re.compile(r"\S{40}(?=\S)")  # hibari's time grows with the cube of a word's length


class G2P:
    """Text to phonemes. Construct once, call from any thread; nothing is written but jieba's cache in cache_dir."""

    def __init__(self, lexicon_file: Path | None = None, cache_dir: Path | None = None):
        """Loads everything, so that the first call is as fast as the next; raises LexiconError."""
        self._english = EnglishG2P()
        self._english("zzyzx")  # loads the network for unknown words, which otherwise waits for the first need
        self._jieba = _load_jieba(cache_dir)
        self._readings: dict[str, list[str]] = {}  # Han word, or a private character, to its syllables
        self._respellings: dict[str, str] = {}
        for word, reading in load_lexicon(ASSETS / "lexicon.txt").items():
            self._learn(word, reading)
        for word, reading in load_lexicon(lexicon_file).items() if lexicon_file else ():
            self._learn(word, reading)
            if _all_han(word):
                self._jieba.add_word(word, LEXICON_FREQUENCY)
        words = "|".join(re.escape(word) for word in sorted(self._respellings, key=len, reverse=True))
        self._respelled = re.compile(f"(?<![A-Za-z0-9])(?:{words})(?![A-Za-z0-9])", re.IGNORECASE)

    def __call__(self, text: str) -> str:
        """Phonemes in Kokoro's alphabet; '' when there is nothing to speak."""
        text = self.speakable(text)
        phonemes = "".join(self._run(run, has_han(text)) for run in RUN.findall(text))
        phonemes = SPACE_BEFORE_PAUSE.sub("", " ".join("".join(c for c in phonemes if c in VOCABULARY).split()))
        return phonemes if any(c.isalpha() for c in phonemes) else ""

    def speakable(self, text: str) -> str:
        """The text as words, with the lexicon's respellings."""
        return speakable(text, lambda line: self._respelled.sub(lambda m: self._respellings[m[0].lower()], line))

    def pinyin(self, text: str) -> list[str]:
        """The syllables of the text's Han characters as they are spoken: ['ni2', 'hao3']."""
        runs = [run for run in RUN.findall(self.speakable(text)) if has_han(run)]
        return [syllable for run in runs for word in self._syllables(run) for syllable in word]

    def _learn(self, word: str, reading: str) -> None:
        """Files an entry: a Han word is looked up after the cut, all else is replaced in the text."""
        syllables = reading.split() if _is_pinyin(reading.split()[0]) else _pinyin(reading) if _all_han(reading) else []
        if _all_han(word) and len(syllables) == len(word):
            self._readings[word] = syllables
        elif syllables and not has_han(reading):
            private = chr(FIRST_PRIVATE + len(self._respellings))
            self._readings[private] = syllables
            self._respellings[word] = private
        else:
            self._respellings[word] = reading

    def _run(self, run: str, among_han: bool) -> str:
        """Phonemes of a stretch in one script; Mandarin with a space after each word, as Kokoro learnt it."""
        if has_han(run):
            return " ".join("".join(map(_phones, word)) for word in self._syllables(run))
        if run in self._readings:
            return f" {''.join(map(_phones, self._readings[run]))} "
        english = self._latin(run)
        return BREATHED.sub(r"\g<0>ʰ", english) if among_han else english

    def _syllables(self, run: str) -> list[list[str]]:
        """Syllables by word, after polyphones and tone sandhi."""
        words = list(self._jieba.cut(run, HMM=False))
        ends = list(itertools.accumulate(map(len, words)))
        spans = [slice(end - len(word), end) for word, end in zip(words, ends, strict=True)]
        decided = {
            i for word, span in zip(words, spans, strict=True) if word in self._readings or word in PHRASES_DICT
            for i in range(span.start, span.stop)
        }  # fmt: skip
        syllables = [s for word in words for s in self._readings.get(word) or _pinyin(word)]
        for pattern, reading in POLYPHONES:
            for i in {match.start() for match in pattern.finditer(run)} - decided:
                syllables[i] = reading
                decided.add(i)
        _bu_and_yi(run, syllables, {span.stop - 1 for span in spans if span.stop - span.start > 1})
        by_word = [syllables[span] for span in spans]
        _third_tones(by_word)
        return by_word

    def _latin(self, run: str) -> str:
        """Phonemes of Latin words; the marks around them stay as pauses."""
        body = run.strip(PAUSES)
        if not body:
            return run
        head, _, tail = run.partition(body)
        body = LETTER_A.sub("[A](/ˈA/)", body)  # hibari's own markup; a client's brackets are gone by now
        return head + self._english(LONG_WORD.sub(r"\g<0> ", body), normalize_text=False) + tail


def _load_jieba(cache_dir: Path | None) -> jieba.Tokenizer:
    """A segmenter of our own with its dictionary loaded; without cache_dir it writes no file."""
    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    if cache_dir:
        cache_dir.mkdir(parents=True, exist_ok=True)
        segmenter.tmp_dir = str(cache_dir)
        segmenter.initialize()
    else:
        segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
        segmenter.initialized = True
    return segmenter
