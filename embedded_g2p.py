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
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path

import cn2an
import jieba
from hibari.g2p import G2P as EnglishG2P
from hibari.g2p import numbers
from hibari.g2p.normalize import MONTH_NAMES, ROMAN_CARDINAL, ROMAN_ORDINAL
from hibari.g2p.normalize import normalize as expand_english
from misaki.tone_sandhi import ToneSandhi
from misaki.zh import ZHG2P
from misaki.zh_normalization.char_convert import t2s_dict
from pypinyin import Style, lazy_pinyin
from pypinyin.constants import PHRASES_DICT

ASSETS = Path(__file__).parent / "assets"
VOCABULARY: dict[str, int] = json.loads((ASSETS / "vocab.json").read_text("utf-8"))["vocab"]  # phoneme -> token
HANS = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
HAN = re.compile(f"[{HANS}]")
FIRST_PRIVATE = 0xE000  # these stand for Latin words whose lexicon reading is pinyin; `clean` lets none in
RUN = re.compile(f"[{HANS}]+|[\ue000-\uf8ff]|[^{HANS}\ue000-\uf8ff]+")


class LexiconError(ValueError):
    """A lexicon file that cannot be used: names the file, the line, the fault and the remedy."""


def has_han(text: str) -> bool:
    """True when the line is to be read as Mandarin."""
    return HAN.search(text) is not None


# === Names: what symbols are called ===

# symbol or code, before or after the amount: (Mandarin, English, English hundredth)
CURRENCIES = {
    "¥": ("元", "yuan", ""), "$": ("美元", "dollars", "cents"), "€": ("欧元", "euros", "cents"),
    "£": ("英镑", "pounds", "pence"), "₩": ("韩元", "won", ""), "₹": ("卢比", "rupees", ""),
    "₽": ("卢布", "rubles", ""), "₿": ("比特币", "bitcoins", ""), "¢": ("美分", "cents", ""),
    "US$": ("美元", "US dollars", "cents"), "HK$": ("港元", "Hong Kong dollars", "cents"),
    "NT$": ("新台币", "Taiwan dollars", ""), "A$": ("澳元", "Australian dollars", "cents"),
    "C$": ("加元", "Canadian dollars", "cents"), "CA$": ("加元", "Canadian dollars", "cents"),
    "S$": ("新元", "Singapore dollars", "cents"), "USD": ("美元", "US dollars", "cents"), "RMB": ("元", "yuan", ""),
    "EUR": ("欧元", "euros", "cents"), "GBP": ("英镑", "pounds", "pence"), "CNY": ("元", "yuan", ""),
    "HKD": ("港元", "Hong Kong dollars", "cents"), "JPY": ("日元", "yen", ""),
}  # fmt: skip
# symbol after a number: (Mandarin, English); hibari knows more, such as lb and GB
UNITS = {
    "um": ("微米", "micrometers"), "km^2": ("平方公里", "square kilometers"), "km2": ("平方公里", "square kilometers"),
    "m^2": ("平方米", "square meters"), "m2": ("平方米", "square meters"), "m^3": ("立方米", "cubic meters"),
    "m3": ("立方米", "cubic meters"), "cm^2": ("平方厘米", "square centimeters"),
    "cm^3": ("立方厘米", "cubic centimeters"), "km": ("公里", "kilometers"), "m": ("米", "meters"),
    "cm": ("厘米", "centimeters"), "mm": ("毫米", "millimeters"), "nm": ("纳米", "nanometers"),
    "kg": ("公斤", "kilograms"), "g": ("克", "grams"), "mg": ("毫克", "milligrams"), "ug": ("微克", "micrograms"),
    "t": ("吨", "tons"), "L": ("升", "liters"), "dL": ("分升", "deciliters"), "ml": ("毫升", "milliliters"),
    "mL": ("毫升", "milliliters"), "Hz": ("赫兹", "hertz"), "kHz": ("千赫兹", "kilohertz"),
    "MHz": ("兆赫兹", "megahertz"), "GHz": ("吉赫兹", "gigahertz"), "W": ("瓦", "watts"), "kW": ("千瓦", "kilowatts"),
    "kWh": ("千瓦时", "kilowatt hours"), "V": ("伏", "volts"), "mAh": ("毫安时", "milliamp hours"),
    "ohm": ("欧姆", "ohms"), "kohm": ("千欧", "kilohms"), "Mohm": ("兆欧", "megohms"), "dB": ("分贝", "decibels"),
    "s": ("秒", "seconds"), "s^2": ("二次方秒", "seconds squared"), "ms": ("毫秒", "milliseconds"),
    "us": ("微秒", "microseconds"), "min": ("分钟", "minutes"), "h": ("小时", "hours"),
    "mmHg": ("毫米汞柱", "millimeters of mercury"), "mmol": ("毫摩尔", "millimoles"), "mA": ("毫安", "milliamps"),
    "kcal": ("千卡", "kilocalories"), "tsp": ("茶匙", "teaspoons"), "tbsp": ("汤匙", "tablespoons"),
    "fps": ("帧每秒", "frames per second"), "°C": ("摄氏度", "degrees Celsius"), "°": ("度", "degrees"),
    "°F": ("华氏度", "degrees Fahrenheit"),
}  # fmt: skip
# what may follow the slash of $5/month, besides a unit: (Mandarin, English)
PER = {
    "second": ("秒", "second"), "sec": ("秒", "second"), "minute": ("分钟", "minute"), "hour": ("小时", "hour"),
    "hr": ("小时", "hour"), "day": ("天", "day"), "night": ("晚", "night"), "week": ("周", "week"),
    "month": ("月", "month"), "mo": ("月", "month"), "year": ("年", "year"), "yr": ("年", "year"),
    "person": ("人", "person"), "user": ("用户", "user"), "piece": ("件", "piece"), "lb": ("磅", "pound"),
}  # fmt: skip
PER_HAN = "年|月|日|天|周|晚|小时|时|分钟?|秒|人|户|次|个|件|台|瓶|只|张|本|节|公?斤|吨|克|升|公里|平方?米?|米|间"
PER_HAN += "|度|股|桶|盎司|亩|盒|包|箱|套|位|千克|立方米"
# symbol between two things: (Mandarin, English or "" where hibari knows it)
OPERATORS = {
    "+": ("加", "plus"), "=": ("等于", ""), "×": ("乘", ""), "÷": ("除以", ""), "±": ("正负", ""), ">": ("大于", ""),
    "<": ("小于", ""), "≥": ("大于等于", "at least"), "≤": ("小于等于", "at most"), "≠": ("不等于", "is not"),
    "≈": ("约等于", "about"), "√": ("根号", "the square root of"), "∞": ("无穷大", "infinity"), "→": ("到", ""),
    "⇒": ("推出", "implies"), "∈": ("属于", "is in"), "∪": ("并", "union"), "∩": ("交", "intersection"),
    "∝": ("正比于", "is proportional to"), "∫": ("积分", "the integral of"), "∠": ("角", "angle"),
    "&": ("和", ""), "@": ("艾特", ""),
}  # fmt: skip
GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "ο": "omicron", "π": "pi", "ρ": "rho",
    "σ": "sigma", "ς": "sigma", "τ": "tau", "υ": "upsilon", "φ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega",
}  # fmt: skip


# === Clean: one spelling for each character ===

# Before normalisation, which would lose the pause of a full-width comma and the height of a superscript.
SPELLINGS = str.maketrans(
    dict.fromkeys("，、､\n", ", ") | dict.fromkeys("。｡", ". ") | dict.fromkeys("《〈「『【«", " “")
    | dict.fromkeys("》〉」』】»", "” ") | dict.fromkeys("[{", " (") | dict.fromkeys("]}", ") ")
    | dict.fromkeys("’‘`", "'") | dict.fromkeys("₋−–‐‑", "-") | dict.fromkeys("·・™®©", " ")
    | {"！": "! ", "？": "? ", "；": "; ", "…": "… ", "㎡": "m^2", "㎥": "m^3", "ß": "ss", "æ": "ae", "œ": "oe"}
    | dict(zip("⁄øØłŁđĐı∆∑妳麽瞭藉於餘徵锺", "/oOlLdDiΔΣ你么了借于余征钟", strict=True))
)  # fmt: skip
TO_SIMPLIFIED = {ord(old): new for old, new in t2s_dict.items() if old not in "乾著"} | SPELLINGS
AMBIGUOUS = (re.compile("著(?![名作称述])(?<![名原专显论土巨编译]著)"), "着"), (re.compile("乾(?![坤隆])"), "干")
SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁻]+")
VULGAR_FRACTION = re.compile("(?=[¼-¾⅐-⅞])")
SYMBOLS = re.escape("~/\\|*#^_%‰°" + "".join(OPERATORS) + "".join(c for c in CURRENCIES if len(c) == 1))
MICRO, OHM = re.compile("μ(?=[A-Za-z])"), re.compile(r"(?<=[\dkM])\s?Ω")
GREEK_LETTER = re.compile("(?<![α-ω])[α-ω](?![α-ω])", re.IGNORECASE)  # in a word of them no letter has its own name
NOT_SPOKEN = re.compile(rf"[^{HANS}A-Za-z0-9,.;:!?()\"'“”…—{SYMBOLS}-]+")


def clean(text: str) -> str:
    """Text in the few characters the rules know: simplified, half-width, no accents, emoji or invisible marks."""
    text = SUPERSCRIPT.sub(lambda m: "^" + m[0], VULGAR_FRACTION.sub(" ", text)).translate(TO_SIMPLIFIED)
    for pattern, simplified in AMBIGUOUS:
        text = pattern.sub(simplified, text)
    text = "".join(c if c == "≠" else unicodedata.normalize("NFKD", c) for c in text).translate(SPELLINGS)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf"))
    text = OHM.sub("ohm", MICRO.sub("u", text))
    text = GREEK_LETTER.sub(lambda m: f" {GREEK[m[0].lower()]} ", text)
    return NOT_SPOKEN.sub(" ", text.replace("...", "… ")).strip()


# === Speakable: numbers, units and symbols become words ===

Speak = Callable[[re.Match[str]], str] | str
HAN_DIGITS = dict(zip("0123456789.", "零一二三四五六七八九点", strict=True))
PHONE_DIGITS = HAN_DIGITS | {"1": "幺", "+": "加"}
SCALES = {"k": "thousand", "m": "million", "mn": "million", "b": "billion", "bn": "billion", "tn": "trillion"}
SCALE_ZEROS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
START = r"(?<![\w.,])"  # a number starts here; also keeps a failed match from being tried again at each digit


def _any(names: Iterable[str]) -> str:
    """A pattern for one of the names, the longest first; one of letters is no part of a longer word."""
    words = (re.escape(name) for name in sorted(names, key=len, reverse=True))
    return "|".join(rf"(?<![A-Za-z]){w}" + r"(?![A-Za-z])" * w[-1].isalpha() if w[0].isalpha() else w for w in words)


CURRENCY = f"(?:{_any(CURRENCIES)})"
UNIT = f"(?:{'|'.join(re.escape(u) for u in sorted(UNITS, key=len, reverse=True))})(?![A-Za-z0-9^])"
SCALE = r"[\s-]?(?:(?:thousand|million|billion|trillion)\b|百万|千万|[千万亿])|(?:[kKmMbB]|[bmt]n)\b"
# £1.5m, US$ 100, 100￥: groups are symbol, amount, scale, symbol; the last only where there is no first
MONEY = rf"(?:({CURRENCY})\s?|{START})({NUMBER})({SCALE})?(?(1)|\s?({CURRENCY})(?!\w))"
# 10-20%, 5kg~10kg, $5-$10, -10~-5°C: up to the mark between, which it takes; no more marks follow, as in 1-2-3
HALF = r"[AaPp](?:[Mm]\b|\.[Mm]\.)"
QUANTITY = rf"-?(?:{CURRENCY}\s?)?{NUMBER}(?:{SCALE}|\s?(?:%|{UNIT}|{HALF})|st|nd|rd|th|[元年月日号点岁个])*"
RANGE = rf"(?<![\w.,^-])({QUANTITY})\s?[-~]\s?(?=-?(?:{CURRENCY}\s?)?(?!0\d)(?>{NUMBER})(?![-/]\d))"
OPERAND = r"(?:\d[\d.]*|[A-Za-z](?![A-Za-z]))"
MINUS = rf"(?:(?<=[\d)])|(?<=\b[A-Za-z]))\s?-\s?(?={OPERAND}(?:\s?[-+×÷*/]\s?{OPERAND}){{0,9}}\s?=)"  # 10-2=8
# $5/month, 3 miles/hour, 5元/kg, 2次/天: groups are what comes before the slash, the name after it, a Han name after it
RATE = (
    rf"({CURRENCY}\s?{NUMBER}(?:{SCALE})?|{START}{NUMBER}\s?(?:%|{UNIT}|{CURRENCY}|[A-Za-z]+|[{HANS}]{{0,3}}))"
    rf"\s?/\s?(?:({_any([*UNITS, *PER])})(?![A-Za-z0-9^])|({PER_HAN}))"
)
PHONE = r"(?<![\w.,-])(?:" + "|".join((
    r"\+\d{1,3}(?:[ -]?\(?\d{2,4}\)?){2,4}",  # +1 (555) 123-4567
    r"(?:1[-. ])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[-. ])\d{3}[-. ]\d{4}",  # 1-800-555-1234, 400 800 1234
    r"\d{3}-\d{4}-\d{3,4}",  # 138-1234-5678
    r"(?:\(0\d{2,3}\) ?|0\d{2,3}[- ])\d{7,8}",  # (010)62345678
    r"0\d{2,4} \d{3,4} \d{3,4}",  # 0800 123 456
    r"0\d{4} \d{6}",  # 07700 900123
    r"1[3-9]\d ?\d{4} ?\d{4}",  # 138 1234 5678
    r"[2-9]\d\d-(?!\d\d00)\d{4}",  # 555-1234, but 500-1000
)) + r")(?![\w-])"
DATE = START + r"(\d{4})([-/.])(0?[1-9]|1[0-2])\2(0?[1-9]|[12]\d|3[01])(?!\d|-(?!\d{4}))"
CLOCK = START + r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?(?![\d:])"
TWELVE_HOURS = START + r"(\d{1,2})(?::([0-5]\d))?(?::[0-5]\d)?\s?([AaPp])(?:\.[Mm]\.|[Mm]\b)"
LINK = (
    r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
    r"|(?:https?://|www\.)[\w./~%?#=&:@+-]*[\w/]"
    r"|(?<![\w.@-])(?:[\w-]+\.)+(?:com|cn|org|net|io|ai|dev|edu|gov)\b(?:/[\w./~%?#=&+-]*[\w/])?"
)


# before these a Mandarin number is read digit by digit, and after those; a quantity's next word shows that it is none
CODES = (
    "拨打?|致电|[呼打]|热线|电话|号码|客服|火警|报警|急救|QQ号?|微信号?|密码|验证码|尾号|[账帐卡学工单]号|订单|邮编|编码|群号"
    "|房间|波音"
)
CODE_ENDS = "[室房]|号(?:房|楼|线)|报警|火警|急救|热线|订票|客服|服务台"
HOTLINES = r"(?:12306|123[1-9]\d|100(?:86|10|01)|955\d\d|96110)"
SCORE = r"\d{1,3}[-:]\d{1,3}"
# what follows a year that has no 年, what follows a quantity, what is counted with 两
YEAR_ENDS = f"[学财]年|赛季|[届款级版]|Q[1-4]|[{HANS}]{{0,4}}(?:世界杯|奥运|欧洲杯|亚运|春[节晚]|峰会)"
COUNTED = r"\s?[个元块人次名斤米公里分秒小时天年万千百亿倍条张台件岁度本套页字篇多笔平发]"
PAIRED = "[个只本张条次位名件台辆家场周天年倍块种瓶杯顿份句遍岁克千万亿点人元斤碗勺秒颗根把座部款项层]"
PAIRED += "|公[斤里]|小时|分钟"
SPELLED = "PIN|OTP|[Zz]ip(?: code)?|[Pp]ostcode|[Pp]ass(?:word|code)|[Cc]ode(?: is)?"
CALLED = "(?:[Cc]all|[Dd]ial)(?:ing|l?ed|s)?"
PERIOD = "(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun|Jan|Feb|Mar|Apr|May|June?|July?|Aug|Sept?|Oct|Nov|Dec)[a-z]*|Q[1-4])"
DAY_NAMES = "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"
ROMAN_AFTER = _any([*ROMAN_CARDINAL, *ROMAN_ORDINAL])
STREETS = {"St": "Street", "Ave": "Avenue", "Blvd": "Boulevard", "Rd": "Road"}
NUMBERED = "[Rr]oom|[Ss]uite|[Ff]light|Boeing|[Rr]oute|[Hh]ighway|[Ee]rror|HTTP|[Pp]ort|Form"
NO_STUTTER = "(?i:days?|tests?|tables?|tails?|shaped?|series|class|clamps?|hour|deficien)"  # D-day, S-shaped
ADJECTIVE_ENDS = r"[ -](?!(?:to|or|and|in|for|of|from|per|on|at|is)\b)[A-Za-z]"
SECONDS_AFTER = r"\b(?:for|in|after|every|within|takes?|took|wait|about|to|than|under|over|only|just) |[:=<>(~] ?|min "


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


def _han_code(match: re.Match[str]) -> str:
    """'拨打110' -> '拨打幺幺零'."""
    return match[1] + _han_digits(match[2], PHONE_DIGITS)


def _han_model(match: re.Match[str]) -> str:
    """A number after a Latin word: three digits or more one by one unless round, as in RTX4090 but A100."""
    number = match[1]
    one_by_one = number.isdigit() and len(number) > 2 and number[-2:] != "00"
    return " " + (_han_digits(number) if one_by_one else _han_number(number))


def _money(match: re.Match[str]) -> tuple[str, str, tuple[str, str, str]]:
    """'£1.5m' -> '1.5', 'million', the names of £; a Han scale stays as it is."""
    before, number, scale, after = match.groups()
    scale = (scale or "").strip(" -")
    return number, SCALES.get(scale.lower(), scale), CURRENCIES[before or after]


def _han_money(match: re.Match[str]) -> str:
    """'$1.2 million' -> '一百二十万美元'."""
    number, scale, (name, _, _) = _money(match)
    amount = f"{Decimal(number.replace(',', '')).scaleb(SCALE_ZEROS.get(scale, 0)):f}"
    han_scale = "" if scale in SCALE_ZEROS else scale
    return _han_number(re.sub(r"(\.\d*?)0+$", r"\1", amount).rstrip(".")) + han_scale + name


def _han_half_day(match: re.Match[str]) -> str:
    """'9am' -> '上午9点'; what the text says itself (晚上9pm) stands."""
    said, hour, minute, half = match.groups()
    minutes = f"{minute}分" if minute not in (None, "00") else ""
    return f"{said or ('上午' if half in 'aA' else '下午')}{hour}点{minutes}"


def _han_slash(match: re.Match[str]) -> str:
    """'1/2' -> '二分之一', but '50/50' and '16/9' are ratios."""
    above, below = int(match[1]), int(match[2])
    if above + below == 100 or above >= below >= 9:
        return f"{_han_number(match[1])}比{_han_number(match[2])}"
    return f"{_han_number(match[2])}分之{_han_number(match[1])}"


def _han_scores(match: re.Match[str]) -> str:
    """'比分25-23, 22:25' -> '比分25比23, 22比25'."""
    return match[1] + re.sub("[-:]", "比", match[2])


def _han_score(match: re.Match[str]) -> str:
    """'3-1' -> '3比1': what falls is no range."""
    return f"{match[1]}比{match[2]}" if int(match[1]) > int(match[2]) else match[0]


def _han_clock(match: re.Match[str]) -> str:
    """'10:30' -> '十点三十分', '08:05:30' -> '八点零五分三十秒'."""
    hour, minute, second = match.groups()
    seconds = f"{_han_number(second)}秒" if second not in (None, "00") else ""
    minutes = f"{_han_number(minute)}分" if minute != "00" or seconds else ""
    return f"{'两' if int(hour) == 2 else _han_number(str(int(hour)))}点{minutes}{seconds}"


def _han_years(match: re.Match[str]) -> str:
    """'2024-25' -> '二零二四到二五'."""
    return f"{_han_digits(match[1])}到{_han_digits(match[2])}"


def _han_roman(match: re.Match[str]) -> str:
    """'路易XIV' -> '路易十四'."""
    values = [{"I": 1, "V": 5, "X": 10}[letter] for letter in match[0]]
    return _han_number(str(sum(v if v >= after else -v for v, after in zip(values, [*values[1:], 0], strict=True))))


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


def _singular(plural: str) -> str:
    """'square meters' -> 'square meter', 'degrees Celsius' -> 'degree Celsius'."""
    return re.sub(r"(?<!s)s(?= |$)", "", plural, count=1)


def _counted(number: str, plural: str) -> str:
    """'1', 'square meters' -> 'one square meter'."""
    return f" {_cardinal(number)} {_singular(plural) if number == '1' else plural}"


def _adjective(match: re.Match[str]) -> bool:
    """True between an article and a noun: a $5 bill, a 5kg bag."""
    before, after = match.string[max(match.start() - 4, 0) : match.start()], match.string[match.end() : match.end() + 8]
    return bool(re.search(r"(?<![A-Za-z])[Aa]n? $", before) and re.match(ADJECTIVE_ENDS, after))


def _english_money(match: re.Match[str]) -> str:
    """'$3.50' -> 'three dollars and fifty cents', '$1.2M' -> 'one point two million dollars'."""
    number, scale, (_, name, hundredth) = _money(match)
    whole, _, cents = number.partition(".")
    if (scale or not cents) and _adjective(match):
        name = _singular(name)
    if scale:
        return f" {_cardinal(number)} {scale} {name}"
    if not hundredth or len(cents) not in (0, 2):
        return _counted(number, name)
    parts = [_counted(n.lstrip("0") or "0", names) for n, names in ((whole, name), (cents, hundredth)) if n.strip("0,")]
    return " and".join(parts or [_counted(whole, name)])


def _english_unit(match: re.Match[str]) -> str:
    """'5kg' -> 'five kilograms', but 'a 5kg bag'."""
    names = UNITS[match[2]][1]
    return _counted(match[1], _singular(names) if _adjective(match) else names)


def _english_slash(match: re.Match[str]) -> str:
    """'85/100' -> '85 out of 100', '120/80' -> '120 over 80', '50/50' as it is; hibari has fractions and dates."""
    above, below = int(match[1]), int(match[2])
    if above < below <= 10 or (1 <= above <= 12 and 1 <= below <= 31):
        return match[0]
    return f"{above} {'' if above + below == 100 or above == below else 'over' if above > below else 'out of'} {below}"


def _english_label(match: re.Match[str]) -> str:
    """'Room 305' -> 'Room three oh-five', 'port 6006' -> 'port six thousand six'."""
    return f"{match[1]} {numbers.year(int(match[2]))}".replace(" and ", " ")


def _period(name: str) -> str:
    """'Mon' -> 'Monday', 'Jan' -> 'January', 'Q1' as it is."""
    return next((whole for whole in (*DAY_NAMES, *MONTH_NAMES) if whole.startswith(name[:3])), name)


def _english_date(match: re.Match[str]) -> str:
    """'2024/3/15' -> 'March fifteenth, 2024'."""
    year, _, month, day = match.groups()
    return f"{MONTH_NAMES[int(month) - 1]} {numbers.ordinal(int(day))}, {year}"


# Each group undoes an ambiguity for those below it: what is no quantity, then marks that join quantities, then names
# that stand by a number, then the numbers, then marks that are left.
RULES = _rules([
    # marks of subtitles: <i>, {\an8}, >> before a speaker, # around a song
    (r"</?(?:[ibups]|em|strong|br|font|span)(?: +\w+ ?=[^<>]*)? ?/?>|\(\\[^()]*\)|^>{2,}|(?<!\S)#(?!\S)", " "),
    # one spelling: 2024-03-15T10:30Z, 1h 30m, 5m 30s, +/-5, H.264, $.50, $-5, $5-10
    (r"(?<=\d{4}-\d\d-\d\d)T(\d\d:\d\d(?::\d\d)?)(?:\.\d+)?", r" \1 "),
    (r"(?<=\d\d:\d\d) Z\b", " UTC"),
    (r"(\d)h ?(\d+)m(?:in)?(?![a-z])", r"\1h \2min "),
    (r"(\d)m ?(?=\d+s\b)", r"\1min "),
    (r"\+/-", "±"),
    (r"\b([A-Z])\.(?=\d)", r"\1 "),
    (rf"(?<![\w{HANS}.…)])\.(?=\d)", "0."),
    (rf"({CURRENCY})-(?=\d)", r"-\1"),
    (rf"({CURRENCY})\s?({NUMBER})\s?([-~])\s?({NUMBER}(?:{SCALE})?)(?![\d-])", r" \2\3\4\1"),
])  # fmt: skip
ZH_RULES = _rules([
    # no quantities: addresses, phones, codes (拨打110, 12306订票, QQ:12345678, 301室), model names (歼-20)
    (LINK, _link("点", "斜杠", "艾特")),
    (PHONE, lambda m: _han_digits(m[0], PHONE_DIGITS)),
    (rf"((?:{CODES})(?:\s?[:是为]\s?|了|过| )?)(\d{{3,}})(?![\d%~-]|[.,]\d|{COUNTED})", _han_code),
    (rf"{START}()({HOTLINES}(?![\w%~-]|[.,]\d|{COUNTED})|\d{{3,}}(?=\s?(?:{CODE_ENDS})))", _han_code),
    ("(?<=[歼轰运直征舟宫娥风])-(?=[0-9])", ""),
    # dates, half days: 2024-03-15, 9am
    (DATE, _han_date),
    (START + r"(0?[1-9]|[12]\d|3[01])/(0?[1-9]|1[0-2])/((?:19|20)\d\d)(?![\d/])", r"\3年\2月\1日"),
    (START + r"(0?[1-9]|1[0-2])/([12]\d|3[01]|0?[1-9])/((?:19|20)\d\d)(?![\d/])", r"\3年\1月\2日"),
    (START + r"(1[0-2]|0?[1-9])/([12]\d|3[01]|0?[1-9])(?=\s?(?:[上下]午|[早中晚]上|凌晨|\d{1,2}:\d\d))", r"\1月\2日"),
    (r"(?<=\d)w(?![A-Za-z]|\s?的?(?:[快闪]?充|灯|功率|[有无]线|电))", "万"),
    (rf"([上下]午|早上|晚上|中午|凌晨)?\s?{TWELVE_HOURS}", _han_half_day),
    # between quantities: 2-1获胜, 10-2=8, 2019-2020年, 10-20%, 周一-周五; then 10:30, -5, -$5
    (rf"((?:比分|局分)[是为:]? ?)({SCORE}(?:, ?{SCORE})*)(?![\d:-])", _han_scores),
    (r"([以了])\s?(\d{1,3})-(?=\d{1,3}(?!\d))", r"\1\2比"),
    (r"(?<![\d-])(\d{1,3})-(?=\d{1,3}(?:获胜|取胜|战胜|击败|战平|领先|落后|大胜|险胜|逆转|不敌))", r"\1比"),
    (MINUS, "减"),
    (r"(?<![\w.,^:/第从栋座楼-])(\d{1,3})-(\d{1,3})(?=$|[,!?;:)\"”… ]|\.(?!\d))", _han_score),
    (rf"{START}(\d{{4}})\s?[-~]\s?(\d{{4}}|\d\d)(?=\s?(?:[学财]?年|赛季))", _han_years),
    (RANGE, r"\1到"),
    ("(?<=[一二三四五六七八九十日月周点分])\\s?[-~]\\s?(?=[上下早晚周星一二三四五六七八九十])", "到"),
    (CLOCK, _han_clock),
    (rf"(?<![\w.,^)-])-(?=(?:{CURRENCY}\s?)?\d)", "负"),
    # rates and money: 5元/kg, $5/月, ¥99, 100￥
    (RATE, lambda m: f"{m[1]}每{m[3] or (UNITS.get(m[2]) or PER[m[2]])[0]}"),
    (MONEY, _han_money),
    # years and decades: 2024年 but 1500年历史, 90后, 1980s
    (r"(?<!\d)(1\d00|2000)\s?(?=年(?:前(?!后)|以前|来|之久|的?历史))", lambda m: _han_number(m[1])),
    (r"(?<!\d)(?!1000)(1\d{3}|20\d{2})\s?(?=年)", lambda m: _han_digits(m[1])),
    (rf"(?<!\d)(?!2000)(19[5-9]\d|20[0-4]\d)\s?(?={YEAR_ENDS})", lambda m: _han_digits(m[1])),
    (r"(?<!\d)(\d\d)(?=年(?:\d{1,2}月|毕业|出生|春晚))", lambda m: _han_digits(m[1])),
    (r"(?<![\d.,])(6{3,}|23{3,})(?!\d|[.,]\d|%|" + COUNTED + ")", lambda m: _han_digits(m[1])),
    (r"(?<![\d.,])(996(?=工作|制)|618(?=大促|购物|活动|期间))", lambda m: _han_digits(m[1])),
    (r"(?<![\d.])(\d{1,2})[. ](\d{1,2})(?=[\"”]?(?:事件|晚会|地震|事变|惨案))", lambda m: _han_digits(m[1] + m[2])),
    (r"(?<!\d)(\d0)(?=后)", lambda m: _han_digits(m[1])),
    (r"(?<!\d)((?:1\d|20)\d0)s\b", lambda m: f"{_han_digits(m[1])}年代"),
    (r"(?<!\d)(\d{3,4})(?=[pP]\b)", lambda m: _han_digits(m[1])),
    (r"(?<!\d)(\d+)(?:st|nd|rd|th)\b", r"第\1"),
    (r"\b[Nn][Oo]\. ?(?=\d)", "第"),
    (rf"(?<=第)[IVX]+(?=[{HANS}])", _han_roman),
    (rf"(?<=[{HANS}])(?!X+(?!\w)|VI(?:设计|系统|手册))[IVX]{{2,5}}(?![A-Za-z\d])", _han_roman),
    # ratios, fractions, percentages: 16:9, 2 1/2, 24/7, 10 / 2, -5°C, 35%
    (rf"{START}({NUMBER})\s?:\s?({NUMBER})", r"\1比\2"),
    (r"(?<!\d)((?:19|20)\d\d)/(?=\d\d(?![\d/]))", lambda m: _han_digits(m[1]) + " "),
    (r"(?<![\d/])(\d{1,3})[ -](?=[1-9]/[2-9](?!\d))", r"\1又"),
    (r"(?<![\w./])24/7(?![\w/])", "24 7"),
    (r"(?<=\d) / (?=\d)", "除以"),
    (rf"(\d/\d{{1,3}})\s?({UNIT})", lambda m: m[1] + UNITS[m[2]][0]),
    (r"(?<![\w./])(\d{1,9})/(\d{1,9})(?![\w/])", _han_slash),
    (rf"负({NUMBER})\s?(?=°C|摄氏度)", r"零下\1"),
    (rf"(?<!\d)({NUMBER})\s?%", r"百分之\1"),
    (rf"(?<!\d)({NUMBER})\s?‰", r"千分之\1"),
    # units, powers, marks before and after a number: 5kg, x^2, 1e6, 5'11", ~5, ≥5, #1, 50+, 3x4
    (rf"{START}({NUMBER})\s?({UNIT})", lambda m: m[1] + UNITS[m[2]][0]),
    (rf"{START}({NUMBER})[eE]([+-]?\d{{1,3}})(?!\w)", r"\1乘10^\2"),
    (r"\^([23])(?!\d)", lambda m: {"2": "平方", "3": "立方"}[m[1]]),
    (r"\^(-?)\+?(\d+)", lambda m: f"的{m[1] and '负'}{_han_number(m[2])}次方"),
    (rf"{START}(\d)'\s?(\d{{1,2}})(?!\d)\"?", r"\1英尺\2英寸"),
    (r"~\s?(?=\d)", "约"),
    (r"([<>≥≤≈±√])(?=\d)", lambda m: OPERATORS[m[1]][0]),
    (r"#(\d+)", r"\1号"),
    (rf"(\d)\+(?=[{HANS}])", r"\1多"),
    (r"(?<=\d)\+(?!\s?\w)", "加"),
    (r"(?<=\d)\s?[xX]\s?(?=\d)", "乘"),
    # numbers: 2个, 1.2.3, iPhone 15, 1,234
    (rf"(?<![\d.第/A-Za-z-])(?<!\d比)2(?=(?:到\d+)?\s?(?:{PAIRED}))(?!点\d(?!\d))", "两"),
    (r"(?<!\d)\d+(?:\.\d+){2,}", lambda m: _han_digits(m[0])),
    (r"(?<=[A-Za-z])[-_]?(\d+(?:\.\d+)?)", _han_model),
    (rf"(?<=[A-Z]) (\d{{4}})(?!\d|{COUNTED})", _han_model),
    (NUMBER, lambda m: _han_number(m[0])),
    # what is left: R&D, 3×4, app.py, A/B, a lone letter
    (r"(?<=[A-Za-z])&(?=[A-Za-z])", " and "),
    *[(rf"(?<=[^\s,.;:!?(])\s?{re.escape(o)}\s?(?=[^\s,.;:!?)])", zh) for o, (zh, _) in OPERATORS.items()],
    (r"(?<=[A-Za-z]{2})\.(?=[a-z]{2})", "点"),
    (rf"(?<=[{HANS}])\s?-\s?|\s?-\s?(?=[{HANS}])|[{SYMBOLS}]+", " "),
    (rf"(?<=[{HANS}])\s?(?=[A-Za-z])|(?<=[A-Za-z'])\s?(?=[{HANS}])", " "),
    (r"(?<![A-Za-z'.])([a-z])(?![A-Za-z'.])", lambda m: m[1].upper()),
    (r"\bAB(?= 型)", "A B"),
])  # fmt: skip
EN_RULES = _rules([  # before hibari, which reads clocks, dates, fractions, ranges, abbreviations and more units
    # no quantities: addresses, phones, zip 90210, call 911, dates
    (LINK, _link("dot", "slash", "at")),
    (PHONE, lambda m: ("plus " if m[0][0] == "+" else "") + _english_digits(m[0])),
    (rf"\b({SPELLED}) (\d{{3,}})(?![\d%~-]|[.,]\d)", lambda m: f"{m[1]} {_english_digits(m[2])}"),
    (rf"\b({CALLED}) ([1-9]11|988|999|112)\b(?!,\d)", lambda m: f"{m[1]} {_english_digits(m[2])}"),
    (r", ([A-Z]{2}) (\d{5})(?!\w|[,.]\d| [a-z])", lambda m: f", {m[1]} {_english_digits(m[2])}"),
    (rf"\b({NUMBERED}) (\d{{3,4}})(?![\w%]|[.,:/-]\d)", _english_label),
    (r"(?<=[a-z] )(St|Ave|Blvd|Rd)(?=$|,|\.?$| [NS][EW]\b| (?:in|at|and|to|on|near)\b)", lambda m: STREETS[m[1]]),
    (r"\bp\. ?(?=\d)", "page "),
    # no abbreviation: Oh, no. The Sun. Then what is no word of its own: 'I know,' W-w-wait
    (r"\b(no|fig|Jan|(?<=[Tt]he )Sun)\.(?! ?\d| of (?!course))", r"\1 ."),
    (r"(?<![\w'])'(?=[A-Za-z])(?!n')((?:[^'\"“”]|(?<=\w)')*?[,.!?…—])'(?!\w)", r"“\1”"),
    (rf"(?<![\w'-])(?:((?i:[b-df-hj-np-tv-z])[b-df-hj-np-tv-z]?)[-—])+(?=(?i:\1)[A-Za-z])(?!{NO_STUTTER})", ""),
    (r" '?[nN]'? (?=[A-Za-z])", lambda m: " and " if "'" in m[0] else m[0]),
    (r"(?:(?<![\w'])|(?<=[QH]\d))'(?=\d\ds?\b)", " "),
    (DATE, _english_date),
    # between quantities: 10-2=8, Mon-Fri, 10-20%, 10:30-11:30; then 9am, 3:2
    (MINUS, " minus "),
    (rf"\b({PERIOD})-({PERIOD})\b", lambda m: f"{_period(m[1])} to {_period(m[2])}"),
    (r"(?<=, \d{4})-(?=[A-Z])", " to "),
    (rf"\b({ROMAN_AFTER}) (?=[IVXLC][a-z])", r"\1_ "),  # hibari takes the C of King Charles for a number
    (RANGE, r"\1 to "),
    (START + r"(\d{1,2})\s?([AaPp])\.?[Mm]\b\.?", lambda m: f"{m[1]} {m[2].upper()}.M."),
    (rf"{START}(\d{{1,2}}):(\d|\d{{3,}})(?![\d:])", r"\1 to \2"),
    (r"\b((?:ratio|odds|scale|score)(?: of| is| was|,|:)? \d{1,2}):(?=\d{1,2}(?![\d:]))", r"\1 to "),
    # powers and negatives: m^3 waits for the units, -5, -$5
    (rf"{START}({NUMBER})[eE]([+-]?\d{{1,3}})(?!\w)", r"\1 times 10^\2"),
    (rf"(?<![\w)^-])-(?=(?:{CURRENCY}\s?)?\d)", "minus "),
    # rates, money, decades, units: $5/month, £1.5m, the 30s but wait 30s, 5kg
    (RATE, lambda m: f"{m[1]} per {_singular((UNITS.get(m[2]) or PER[m[2]])[1])}"),
    (MONEY, _english_money),
    (rf"({SECONDS_AFTER})(\d0)s\b", r"\1\2 seconds"),
    (r"(?<!\d)((?:1\d|20)\d0|\d0)s\b", lambda m: re.sub("y$", "ie", numbers.year(int(m[1]))) + "s"),
    (rf"(\d/\d{{1,3}})\s?({UNIT})", lambda m: f"{m[1]} {_singular(UNITS[m[2]][1])}"),
    (rf"{START}({NUMBER})\s?({UNIT})", _english_unit),
    # slashes: 2 1/2, 24/7, 10 / 2, 85/100
    (r"(?<!\d)((?:19|20)\d\d)/(?=\d\d(?![\d/]))", r"\1 "),
    (r"(?<![\d/])(\d{1,3})[ -](?=[1-9]/[2-9](?!\d))", r"\1 and "),
    (r"(?<![\w./])24/7(?![\w/])", "24 7"),
    (r"(?<=\d) / (?=\d)", " divided by "),
    (r"(?<![\w./])(\d{1,9})/(\d{1,9})(?![\w/]|\.\d)", _english_slash),
    (r"(?:(?<=\d/\d)|(?<=\d/\d\d))(?=\.(?!\d))", " "),  # hibari knows no fraction before a full stop
    # powers and operators: x^2, 5'11", ~5, 3x4, 6 + 1, 50+
    (r"\^([23])(?!\d)", lambda m: {"2": " squared", "3": " cubed"}[m[1]]),
    (r"(?<=\w) ?\^ ?\+?(-?\d+)", r" to the power of \1"),
    (rf"{START}(\d)'\s?(\d{{1,2}})(?!\d)\"?", r"\1 foot \2"),
    (r"~\s?(?=\d)", "about "),
    (r"(?<=\d)\s?[xX]\s?(?=\d)", " times "),
    *[(re.escape(o), f" {en} ") for o, (_, en) in OPERATORS.items() if en and o != "+"],
    (r"(?<=\w)\s?\+\s?(?=\w)|(?<=\d)\+(?!\+)", " plus "),
])  # fmt: skip
EN_NUMBER_RULES = _rules([  # after hibari
    (r"(?<!\d)(\d{1,9})(?:st|nd|rd|th)\b", lambda m: numbers.ordinal(int(m[1]))),
    (r"\s?%(?=[A-Za-z])", " percent "),
    (r"\s?%", " percent"),
    (r"(?<![\w)-])-(?=\d)", "minus "),
    (r"(?<=[A-Za-z])[-_]?(?=\d)|(?<=\d)[-_]?(?=[A-Za-z])", " "),
    # 1.2.3, 2024, RTX 4090, what hibari left of 1-2-3
    (r"\d+(?:\.\d+){2,}", lambda m: " point ".join(map(_english_digits, m[0].split(".")))),
    (r"(?<![\d.,])(1[1-9]\d\d|20\d\d)(?![\d.,]?\d)", lambda m: numbers.year(int(m[1]))),
    (r"(?<=[A-Z] )(\d{4})(?!\d)", lambda m: numbers.year(int(m[1]))),
    (r"(?<=\d)[:/-](?=\d)", " "),
    (NUMBER, lambda m: _cardinal(m[0])),
    # sooo, nooo, yesss; app.py, marks that are left, a lone letter
    (r"(?<=[a-zA-Z])(?:(o)o{2,}(?![dklmnpt])|([aesuyh])\2{2,})", r"\1\2"),
    (r"(?<=[A-Za-z]{2})\.(?=[a-z]{2})", " dot "),
    (rf"(?! ?[&@] ?)[{SYMBOLS}]+", " "),
    (r"(?:^|(?<= ))([b-hj-z])(?= |$)", lambda m: m[1].upper()),
])  # fmt: skip
TIDY_RULES = _rules([
    (r"\s+", " "),
    (r" (?=[,.;:!?…)”])", ""),
    (r"(?<![A-Z])([,.;:!?…])(?: ?[,.;:!?…])+", r"\1"),
    (rf"(?<=[,;:!?…])(?=[\w{HANS}])", " "),
])  # fmt: skip


def speakable(text: str, respell: Callable[[str], str] = str) -> str:
    """The text as words: '3.14%' in a Chinese line becomes '百分之三点一四'; respell is the lexicon's turn."""
    text = _rewrite(respell(clean(text)), RULES)
    if has_han(text):
        text = _rewrite(text, ZH_RULES)
    else:
        text = _rewrite(expand_english(_rewrite(text, EN_RULES)), EN_NUMBER_RULES)
    return _rewrite(text, TIDY_RULES).strip()


# === Mandarin readings ===

NEUTRAL = frozenset(ToneSandhi().must_neural_tone_words)  # words whose last syllable has no tone: 朋友, 东西
# N and a place word without a tone: 早上, 家里; what is said of people: 任先生 has the reading of a surname
PLACE = re.compile("[早晚身脸手地头路床桌世街墙背嘴心]上|[这那哪家心手城嘴屋眼怀夜村房院店肚河梦水田园兜车山]里")
TITLED = "(?=先生|小姐|女士|老师|警官)"
NO_NAME = "前现上时历继连不去要检调审抽巡搜个小地社山校"  # 现任先生, 检查先生, 这个区老师
SURNAMES = {
    "解": "xie4", "仇": "qiu2", "单": "shan4", "区": "ou1", "查": "zha1", "任": "ren2", "曾": "zeng1", "朴": "piao2",
    "葛": "ge3", "肖": "xiao1",
}  # fmt: skip
COUNT = "零一二三四五六七八九十百千万亿两几数每第"
CHIEFS = "行校部市局科院队会船家组班村乡县省店社厂处首州团师司员察区营事厅族旅舰署谋尊计生增灵"  # 厅长; 生长
# Readings of single characters where no phrase decides; the first that fits wins.
POLYPHONES = tuple((re.compile(pattern), reading) for pattern, reading in (
    (f"(?<=[{COUNT}])行(?![人动业走程])", "hang2"),
    ("(?<=[^块片亩在的这那此本当土])地(?=[^方区点址面球位图铁板理带步下上产震域形势道名质])", "de5"),
    ("(?<=[受吃走做治忘免管少离办帮])得(?=了)", "de5"),
    ("(?<=不)得|得(?=了?[奖分病到第冠救胜名])", "de2"),
    ("(?<=[我你您他她它们])得(?![了出以知益罪很]|不[到了])", "dei3"),
    ("(?<=[就还都也总可必非家人])得(?=[去来要把先有在等再想找多跟给看做走吃死问说让])", "dei3"),
    ("(?<=[^获取所赢夺心彼既])得(?=[^到了奖分出])", "de5"),
    (f"(?<=[{COUNT}])只|(?<=[这那哪])只(?![是要有能好会怕可不剩顾想在])", "zhi1"),
    (f"为(?=[{COUNT}])", "wei2"),
    *((rf"(?<=(?<![可所难足加予])以[^前后来往及内外上下便免致至]{'.' * n})为(?![了什何此])", "wei2") for n in range(3)),
    ("(?<=[称成作视变分选评列升降设化约均名译任认誉之])(?<!建设)(?<!系列)为(?!了|什)|为(?=[例准由])", "wei2"),
    ("(?<=不)了|(?<=[受吃走做治忘免管来少离办帮]得)了|(?<=得)了(?=$|[啊吗呢])", "liao3"),
    ("还(?=[了钱给债款清书]|我(?:钱|命|公道|清白|自由|孩子|儿子|女儿))", "huan2"),
    ("(?<=[不得睡])着(?![边痕调实手重想])|着(?=了(?![解结然如不]))", "zhao2"),
    ("(?<=[摔跌晕昏绊推击病累吓醉扑撞跪栽压滑打踢刮吹砍放仆拉])倒(?![是也不还没水茶酒掉进出入给])", "dao3"),
    ("(?<=[树墙房屋楼人])倒(?=了)|(?<![水酒汤茶饭菜油])倒(?=在[地床沙血路雪草门椅泥怀他她我你脚街])", "dao3"),
    ("(?<=[一好个])觉(?![得察悟醒])", "jiao4"),
    ("(?<![这那各某何哪品此每多物变语树工兵菌有配两一二三四五六七八九十几的种])种(?=[了着满上下过棵])", "zhong4"),
    ("转(?=[了着]?[一两几三半]?圈|悠|[个得]不停|一转)|(?<=[在直])转$|(?<=转一)转", "zhuan4"),
    ("(?<=[围绕]着.)转(?!过)|(?<=[围绕]着..)转(?!过)", "zhuan4"),
    ("盛(?=[了着好]?[一两半小几]?[碗勺盘饭汤粥]|[满着])", "cheng2"),
    ("(?<=[一两半几三整])宿(?![舍营主命])", "xiu3"),
    ("(?<![这那扇门窗电吊折风每一两三四五六几])扇(?=[了着]?[我你他她]|[了着][一两几]?[个巴耳下])", "shan1"),
    ("(?<=[们干做懂爱][这那])行(?![不吗吧了得])|(?<=[这那])行(?=字)", "hang2"),
    ("率(?=[军兵众]|部(?!分)|队(?!内))", "shuai4"),
    ("(?<=[子间箱柜袋包盒室馆厅林睛雨雪夜话信戏脑])里(?![面头边外程氏])", "li5"),
    *((f"(?<=姓)(?<!百姓){name}|(?<![{NO_NAME}]){name}{TITLED}", reading) for name, reading in SURNAMES.items()),
    ("吐(?=了(?!一?[口句吐个]|出))|(?<=[想要])吐(?![露槽出痰])", "tu4"),
    ("(?<![次人总岁分])数(?=到[一二三四五六七八九十百]|[一二三]下|钱)", "shu3"),
    ("^啊", "a1"), ("^哇", "wa1"), ("^哦", "o4"), ("掺", "chan1"), ("拽", "zhuai4"), ("佛", "fo2"), ("椎", "zhui1"),
    ("(?<=朝)鲜(?!花)", "xian3"), ("晟", "sheng4"), ("耶(?!$)", "ye1"), ("勒(?![住紧死着了脖得我你他她])", "le4"),
    (f"(?<=[{COUNT}这那])幢", "zhuang4"),
    (f"(?<![{CHIEFS}])长(?![得出成大高胖满着在老]|什么样|[这那]么大|了[一两几三满个])", "chang2"),
    ("重(?=[新来复做写试启])", "chong2"),
    ("谁", "shei2"),
    ("(?<=[晒擦吹晾烘沥风烤榨哭喝流抹拧抽烧很太发唇肤嗓口眼服杯酒肉鱼泪汗墨])干(?![部什嘛啥])", "gan1"),
    ("(?<=[乌赞桑玛])干|(?<=巴尔)干|干(?=[辣草柴粮树枯硬])", "gan1"),
    ("教(?=会?(?:[你我他她它您孩]|大家|学生))", "jiao1"),
    ("(?<=[选猜射考押])中(?![国间央学专]|文(?![本件字]))|中(?=签(?!字)|[枪彩])", "zhong4"),
    ("(?<![^又没他我你都说打砸相])中(?=了)", "zhong4"),
    ("弹(?=[出窗钢吉奏唱起])", "tan2"),
    ("(?<![文学院语史理])系(?=[好上着紧鞋领扣])", "ji4"),
    ("炸(?=[鸡酱薯油糕串丸虾鱼至])", "zha2"),
    ("(?<=[渐慢静默悄轻缓偷狠断])地$", "de5"),
    ("(?<=[电离质粒原男太光中孔因精棋])子", "zi3"),
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
    neutral = word in NEUTRAL or (len(word) == 3 and word[1:] in NEUTRAL) or PLACE.fullmatch(word)
    if neutral or (len(word) > 1 and word[-1] == "儿"):
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
        counting = counting or after in "零一二三四五六七八九月号楼班级季" or before + character + after == "月一日"
        counting = counting or (after == "点" and characters[i + 2 : i + 3] in tuple("零一二三四五六七八九"))
        if character in "不一" and before == after and before not in tuple("零二三四五六七八九点"):
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
    if not word or not reading:
        raise LexiconError(f"{line!r} is no entry; write: word = reading")
    if not re.search(f"[A-Za-z{HANS}]", reading):
        raise LexiconError(f"{reading!r} cannot be spoken; write pinyin with tone digits, letters or characters")
    _check_pinyin(word, reading.split())
    return word, reading


def _check_pinyin(word: str, syllables: list[str]) -> None:
    """Raises LexiconError where a reading is meant as pinyin, in part or without tones, and does not fit the word."""
    toneless = [s for s in syllables if not _is_pinyin(s)]
    bare = toneless == syllables and _all_han(word) and all(_is_pinyin(s + "1") for s in syllables)
    if bare or 0 < len(toneless) < len(syllables):
        wrong = " ".join(toneless)
        raise LexiconError(f"{wrong!r} is no pinyin; write each syllable with its tone digit, as in chong2 qing4")
    if not toneless and _all_han(word) and len(word) != len(syllables):
        raise LexiconError(
            f"{len(syllables)} syllables for {word!r}; write one for each of its {len(word)} characters"
        )


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
LETTER_A = re.compile(
    r"^A$|\bA(?=[ -]+[A-Z]\b)|(?<=\b[A-Z][ -])A\b|(?<=\ban )A\b|(?<=[a-z] )A(?= ?$|[,;:!?)]|\.(?![A-Z])| plus\b)"
    r"|(?<=\b[Oo]ption )A\b|(?<=\b(?:[Pp]lan|[Tt]ype|[Tt]eam) )A\b|(?<=\b(?:[Gg]roup|[Cc]lass|[Gg]rade|[Pp]oint) )A\b"
)
# In a Mandarin voice a bare p is heard as b: the p, t, k that English breathes on are written as Mandarin's.
BREATHED = re.compile("(?<![^ ])[ptk](?=[ˈˌɑɔəɛɜɪʊʌæiuAIOWYQɹlwj])|(?<=[^ s])[ptk](?=ˈ)")
SHOUTED = re.compile(r"(?<![\w&])[A-Z']{2,}(?![\w&])")
STRESSED = re.compile(r"\b(?:HE|HIM|HER|GO)\b")  # in It was HIM
QUOTE = re.compile('["“”…]')
LONG_WORD = re.compile(r"\S{40}(?=\S)")  # hibari's time grows with the cube of a word's length


class G2P:
    """Text to phonemes. Construct once, call from any thread; no file is written."""

    def __init__(self, lexicon_file: Path | None = None):
        """Loads everything, so that the first call is as fast as the next; raises LexiconError."""
        self._english = EnglishG2P()
        self._english("zzyzx")  # loads the network for unknown words, which otherwise waits for the first need
        self._jieba = _load_jieba()
        self._readings: dict[str, list[str]] = {}  # Han word, or a private character, to its syllables
        self._respellings: dict[str, str] = {}
        for word, reading in load_lexicon(ASSETS / "lexicon.txt").items():
            self._learn(word, reading)
            if _all_han(word) and not self._jieba.FREQ.get(word):
                self._jieba.add_word(word)
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

    def _calm(self, word: re.Match[str]) -> str:
        """'GO' -> 'go' in a line of capitals, where hibari takes it for a name and spells it; 'NASA' as it is."""
        known = self._english.lexicon.golds
        return word[0].lower() if word[0].lower() in known and word[0] not in known else word[0]

    def _latin(self, run: str) -> str:
        """Phonemes of Latin words; the marks around them stay as pauses."""
        body = run.strip(PAUSES)
        if not body:
            return run
        head, _, tail = run.partition(body)
        body = (SHOUTED if " " in body and body.isupper() else STRESSED).sub(self._calm, body)
        body = QUOTE.sub(r"[\g<0>](/\g<0>/)", body)  # else hibari reads a quotation mark with its word, and loses …
        body = LETTER_A.sub("[A](/ˈA/)", body)  # hibari's own markup; a client's brackets are gone by now
        return head + self._english(LONG_WORD.sub(r"\g<0> ", body), normalize_text=False) + tail


def _load_jieba() -> jieba.Tokenizer:
    """A segmenter of our own with its dictionary loaded, past jieba's cache: that is no sooner and has no checksum."""
    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter
