"""Text to utterances: where a text may be cut, and where it may not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utterances import (
    CLAUSE,
    FIRST_SYLLABLES,
    FULL_SYLLABLES,
    PARAGRAPH,
    PAUSE_S,
    SENTENCE,
    count_syllables,
    find_breaks,
    split_utterances,
    syllables,
)

LONG_ZH = "今天天气很好，我们一起去公园散步，看看花，听听鸟叫，然后回家吃饭，晚上再看一部电影。" * 3
LONG_EN = (
    "The committee met again on Tuesday, and it heard four reports about the harbour. Nobody spoke against them. " * 4
)


def texts(text):
    """The utterances' texts."""
    return [utterance.text for utterance in split_utterances(text)]


@pytest.mark.parametrize("text", [LONG_ZH, LONG_EN])
def test_utterances_are_as_long_as_is_usual_where_there_are_clauses(text):
    pieces = [utterance.text for utterance in split_utterances(text, usual=20)]
    assert max(map(count_syllables, pieces)) <= 25 < max(map(count_syllables, texts(text)))
    assert all(piece[-1] in ",.，。" for piece in pieces)


def test_a_clause_longer_than_is_usual_is_not_cut():
    sentence = "the committee that had been asked to look after the harbour and the lighthouse met on a Tuesday evening"
    assert [utterance.text for utterance in split_utterances("Yes. " + sentence, first=24, usual=24)][-1] == sentence


@pytest.mark.parametrize("text", [
    "圆周率约等于3.14。", "会议10:30开始。", "Dr. Smith came.", "比分是3:2。", "He paid $1,234.50 today.",
    "See https://example.com/a.b?c=1&d=2 for more.", "Mail me@example.com now.", "The U.S. team, i.e. ours.",
    "He left at 5 p.m. sharp.", "See Fig. 3 and No. 5.", "J. R. R. Tolkien wrote it.", "It costs 1,234 or 5.6 million.",
])  # fmt: skip
def test_a_unit_is_never_cut_inside(text):
    inner = [text[:end] for end, strength in find_breaks(text) if strength >= CLAUSE and end < len(text)]
    assert [cut for cut in inner if not cut.rstrip().endswith(",")] == []


@pytest.mark.parametrize(
    "quoted", ["“你好。我来了！走吧。”", "「好。不好。」", '"Yes. No. Perhaps."', "（见上。见下。）"]
)
def test_a_quote_is_not_cut_at_its_sentences(quoted):
    whole = f"他站起来慢慢地说：{quoted}然后大家就都走了，谁也没有再回头看一眼。"
    assert any(quoted in text for text in texts(whole))


@pytest.mark.parametrize("text", [LONG_ZH, LONG_EN])
def test_the_first_utterance_is_short_and_the_others_grow(text):
    lengths = [sum(map(syllables, utterance)) for utterance in texts(text)]
    assert lengths[0] < FULL_SYLLABLES / 2
    assert max(lengths) <= FULL_SYLLABLES


def test_sentences_end_utterances_before_clauses_do():
    assert (
        texts("Hello there, my friend. How are you doing on this fine day? I am well.")[0] == "Hello there, my friend."
    )


def test_each_line_is_an_utterance_of_its_own():
    assert texts("第一行\n第二行\n\n第三行") == ["第一行", "第二行", "第三行"]


def test_the_pause_follows_the_punctuation():
    pauses = [
        utterance.pause_s for utterance in split_utterances("第一段。\n第二段，" + "好" * 30 + "。然后是" + "长" * 40)
    ]
    assert pauses == [PAUSE_S[PARAGRAPH], PAUSE_S[CLAUSE], PAUSE_S[SENTENCE], PAUSE_S[PARAGRAPH]]


@pytest.mark.parametrize("text", ["好" * 1000, "a" * 3000, "word " * 800, "1234567890" * 100])
def test_text_without_punctuation_is_cut_all_the_same(text):
    assert all(sum(map(syllables, utterance)) <= FULL_SYLLABLES for utterance in texts(text))


@pytest.mark.parametrize(
    "text", ["The quick brown fox " * 20, "a" * 3000, "天" * 300, "word " * 60 + ", then more."]
)
def test_the_first_utterance_is_short_where_no_clause_ends_in_reach(text):
    first, *others = texts(text)
    assert FIRST_SYLLABLES < sum(map(syllables, first)) <= 2 * FIRST_SYLLABLES
    assert "".join("".join([first, *others]).split()) == "".join(text.split())


@pytest.mark.parametrize("text, second", [
    ("The old man walked slowly along the wet shore of the lake and his dog ran ahead of him " * 3, "and his dog"),
    ("Nobody living near the big river could sleep that long night because the wind blew hard " * 3, "because the"),
    ("老师昨日下午讲完课回家路上遇见一位多年不见老同学但是两人谁都说不出话" * 3, "但是两人"),
    ("村子南边山坡上种满桃树春天一到整片山坡开满粉红色的花朵吸引许多游客前来拍照留念" * 3, "花朵吸引"),
    ("他每天早上六点起床跑步回来洗澡吃饭然后坐地铁上班晚上八点下班回家做饭看书睡觉" * 3, "然后坐地铁"),
])  # fmt: skip
def test_text_without_clauses_is_cut_where_the_joint_is_least_heard(text, second):
    assert texts(text)[1].startswith(second)


@pytest.mark.parametrize("text", ["他了解这件事的时候已经过去很多年", "目的地着急过程"])
def test_no_word_is_cut_after_what_looks_like_a_particle(text):
    assert {text[:end][-1] for end, _ in find_breaks(text)} <= {"候"}


def test_a_clause_that_ends_soon_is_awaited_rather_than_cut():
    whole = "他昨天晚上很晚才从北京坐飞机回到上海家里然后马上睡觉去了，第二天又起得很早。"
    assert texts(whole)[0].endswith("，")


def test_words_stay_whole_in_text_without_punctuation():
    assert set(" ".join(texts("wonderful " * 200)).split()) == {"wonderful"}


@given(st.text(max_size=400))
def test_no_character_is_lost(text):
    assert "".join("".join(texts(text)).split()) == "".join(text.split())


@pytest.mark.parametrize("text", ["." * 100_000 + "a", "!?" * 50_000 + "a"])
def test_a_storm_of_punctuation_is_split_without_backtracking(text):
    assert "".join(texts(text)) == text  # in milliseconds; a quadratic pattern would take minutes
