"""Prose to be spoken: Mandarin, English and mixed, of any length; no text twice, but the same clauses often."""

from __future__ import annotations

import random
from collections.abc import Iterator

LANGUAGES = ("zh", "en", "mixed")
SHORT_CHARACTERS = 40  # texts below this length are made of short lines
TRIES = 8  # texts to choose the one of the right length from
ATTEMPTS = 100  # at a text that was not given yet

PARAGRAPH = (
    "The harbour was quiet that morning, and only a few gulls circled above the boats. "
    "An old man in a blue coat untied his rope, looked up at the sky, and shook his head. "
    "By noon the wind had turned, and nobody who knew the coast went out to sea."
)
STORY = PARAGRAPH + (
    " His daughter kept the lamp in the tower, as her mother had done before her. "
    "Every evening she climbed the ninety steps with a can of oil, counting them under her breath. "
    "When the first ships passed the point she wrote their names into a thick grey book. "
    "Most of them carried timber from the north, some carried salt, and one brought letters twice a month. "
    "She liked the letters best, although few of them were meant for her. "
    "In winter the road to the village was closed for weeks, and the two of them read aloud to each other. "
    "They had eleven books, and they knew the endings of all of them by heart. "
    "Still, there was something in the sound of a story that made the long nights shorter."
)  # about a minute of speech

# Every line has a name in it, drawn anew each time the story is told.
LINES = {
    "en": (
        "{who} came to the mill in spring, when the river was still high.",
        "Nobody in {place} had asked for a miller, but the old one was tired, and {who} knew how to listen.",
        "On the first {day} the wheel would not turn.",
        "{other} said it was the ice, {who} said it was the bearing, and both of them were right.",
        "They took the wheel apart, carried it across the yard to {other}, and laid the pieces on the grass.",
        "By {day} it ran again, slower than before, but without the grinding that had kept {place} awake.",
        "After that, {who} was asked for advice about everything.",
        "The baker of {place} wanted to know why his bread was heavy; the answer was the flour, of course.",
        "{other} wanted a gate, a ladder, and somebody to talk to on a {day} afternoon.",
        "There was less to do in summer, when the water was low, and {who} learned to swim.",
        "Once a week a cart came over the hill from {place}, loaded with sacks, news and two sleepy children.",
        "Did {who} ever think of leaving?",
        "Sometimes, on a clear night, when the road towards {place} was white in the moonlight.",
        "But in the morning the wheel had to be oiled, and {other} was already knocking at the door.",
        "Years later, people from {place} still told the story of the winter when the mill stood still.",
        "They told it to {who} as well, who smiled, and never said which parts of it were true.",
    ),
    "zh": (
        "{who}是春天来到{place}的，那时候河水还很凉。",
        "渡口只有一条旧船，船主{other}年纪大了，想找一个帮手。",
        "{who}不会划船，却很会听人说话。",
        "每逢{day}，对岸的人过来赶集，带着鸡蛋、竹篮和各种消息。",
        "{other}坐在船头，一边抽烟，一边告诉{who}哪里水深，哪里水浅。",
        "到了夏天，{who}已经能一个人把船撑到{place}的对岸了。",
        "有一天下大雨，河水涨了三尺，{place}的桥被冲走了一半。",
        "学校里还有十二个孩子没有回家，{other}急得在岸上走来走去。",
        "{who}什么也没说，解开绳子，把船推进了水里。",
        "那天晚上，{place}的人都站在岸边，提着灯，一直等到最后一个孩子上岸。",
        "后来有人问{who}怕不怕，回答是：当时只想着绳子够不够长。",
        "秋天，{place}修了一座新桥，过河的人越来越少。",
        "{other}把船拖上岸，刷了一遍桐油，说这条船也该休息了。",
        "{who}没有离开，在桥头开了一家小店，卖茶，也卖伞。",
        "逢着{day}，店里坐满了人，大家还是喜欢说起那一夜的雨。",
        "只有{who}自己不怎么提，倒好茶，看着门外的河水慢慢流过{place}。",
    ),
    "mixed": (
        "{who}在{place}的一家startup上班，每天早上先看email，再喝咖啡。",
        "{day}的meeting改到了下午三点，{other}说要准备一份新的report。",
        "这个bug其实不难，{who}加了一行log，很快就找到了原因。",
        "服务器在{place}，数据库却在另一个region，所以延迟总是降不下来。",
        "{other}建议先把cache打开，再看看CPU的占用率。",
        "到了{day}晚上，整个team都留下来，一起等release的结果。",
        "{who}把手机调成静音，打开一个新的branch，开始写test。",
        "客户从{place}打来电话，说app在旧的Android手机上打不开。",
        "{other}马上开了一个issue，标题只有两个字：紧急。",
        "后来大家才发现，是{place}那边的WiFi断了，跟代码一点关系也没有。",
        "{day}的review上，{who}用十分钟的demo说明了整个过程。",
        "最后{other}说，下次先check网络，再怀疑自己的code。",
    ),
}
SHORT_LINES = {
    "en": (
        "{who}, wait!", "Is {who} up?", "{who}, {other}?", "{day}, {who}.", "{who} or {other}.", "Hi, {who}.",
        "Ask {other}.",
    ),
    "zh": (
        "{who}到{place}去了。", "{who}，我们{day}见。", "{other}在{place}等你。", "{day}请{other}过来。",
        "你好，我找{who}。", "{place}的{other}来了。",
    ),
    "mixed": (
        "{who}在{place}online。", "{other}说{who}OK了。", "{day}{who}有demo。", "{place}的{other}没WiFi。",
        "{day}请{other}看log。",
    ),
}  # fmt: skip
NAMES = {  # between spaces
    "en": {
        "who": "Anna Clara Edith Greta Helen Irene Laura Martha Nora Paula Ruth Sarah Tilda Vera Walter Peter",
        "other": "Oskar Henry Jonas Felix Martin Arthur Conrad Edgar Robert Thomas Victor William",
        "place": "Ashford Briarton Coldwell Dunmore Elmsworth Fairhill Greystone Hartfield Kingsbrook Lowdale",
        "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    },
    "zh": {
        "who": "林小满 陈秋生 周明远 许安然 沈知夏 顾长河 苏晓棠 韩立春 叶青山 方若水 梁思源 白石生",
        "other": "老吴 老陆 老贺 老秦 老宋 老姚 老范 老唐 老孟 老金",
        "place": "白沙镇 柳溪村 青石渡 南桥头 松林湾 云水乡 梅花坞 石门坎 芦花荡 杏树坪",
        "day": "初一 初五 初八 十五 十八 廿三",
    },
    "mixed": {
        "who": "小林 小陈 小周 小许 小沈 小顾 小苏 小韩 小叶 小方 小梁 小白",
        "other": "老吴 老陆 老贺 老秦 老宋 老姚 老范 老唐 老孟 老金",
        "place": "杭州 成都 深圳 南京 西安 厦门 武汉 苏州 青岛 长沙",
        "day": "周一 周二 周三 周四 周五 周六",
    },
}


class Texts:
    """Hands out texts, none of them twice; the same ones in the same order for the same seed."""

    def __init__(self, seed: int = 20):
        self._dice, self._given = random.Random(seed), set()

    def take(self, language: str, characters: int) -> str:
        """Return whole sentences of about that many characters; raise RuntimeError where there are no more."""
        for _ in range(ATTEMPTS):
            told = [tell(sentences(language, characters, self._dice), language, characters) for _ in range(TRIES)]
            for text in sorted(told, key=lambda text: abs(len(text) - characters)):
                if text not in self._given:
                    self._given.add(text)
                    return text
        raise RuntimeError(f"there is no further {language} text of {characters} characters")

    def take_many(self, language: str, characters: int, count: int) -> list[str]:
        """Return several."""
        return [self.take(language, characters) for _ in range(count)]


def sentences(language: str, characters: int, dice: random.Random) -> Iterator[str]:
    """Yield the story's lines from any of them on, over and over, with other names each time."""
    short = characters < SHORT_CHARACTERS
    lines = SHORT_LINES[language] if short else LINES[language]
    start = dice.randrange(len(lines))
    while True:
        cast = {role: dice.choice(names.split()) for role, names in NAMES[language].items()}
        for line in lines[start:]:
            yield line.format(**cast)
        start = 0


def tell(lines: Iterator[str], language: str, characters: int) -> str:
    """Join lines up to the sentence end that is nearest to that many characters; one line at least."""
    between = " " if language == "en" else ""
    text = next(lines)
    while True:
        longer = between.join([text, next(lines)])
        if abs(len(longer) - characters) > abs(len(text) - characters):
            return text
        text = longer
