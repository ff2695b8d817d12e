"""Text to phonemes: what is said (speakable) and how (phonemes)."""

import random
import re
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

import embedded_g2p
from embedded_g2p import G2P, VOCABULARY, LexiconError, clean, has_han, speakable


@pytest.fixture(scope="module")
def g2p() -> G2P:
    return G2P()


def table(lines: str) -> list[tuple[str, str]]:
    """'text | spoken' lines as parameters."""
    pairs = (line.split(" | ") for line in lines.strip().splitlines())
    return [(text.strip(), spoken.strip()) for text, spoken in pairs]


def with_lexicon(tmp_path: Path, content: str | bytes) -> G2P:
    """A G2P that reads the given lexicon."""
    file = tmp_path / "lexicon.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return G2P(lexicon_file=file)


# === Language ===


@pytest.mark.parametrize(
    "text, mandarin", [("你好", True), ("hi 好", True), ("hello", False), ("", False), ("かな", False)]
)
def test_any_han_character_makes_a_line_mandarin(text, mandarin):
    assert has_han(text) is mandarin


# === Mandarin lines ===


@pytest.mark.parametrize("text, spoken", table("""
1,234个 | 一千二百三十四个
圆周率3.14 | 圆周率三点一四
降到0.5 | 降到零点五
零下，-5 | 零下, 负五
吃了1/2 | 吃了二分之一
第3名 | 第三名
2个人 | 两个人
2万人 | 两万人
第2次 | 第二次
下午2点 | 下午两点
凌晨2:30 | 凌晨两点三十分
等2-3天 | 等两到三天
赞10w | 赞十万
路易XIV | 路易十四
第IV节 | 第四节
12个人 | 十二个人
编号007 | 编号零零七
版本1.2.3 | 版本一点二点三
共12345678901234567890个 | 共一二三四五六七八九零一二三四五六七八九零个
"""))  # fmt: skip
def test_numbers_in_mandarin(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
2024年 | 二零二四年
1980s的歌 | 一九八零年代的歌
2019-2020年 | 二零一九到二零二零年
90后 | 九零后
于2024巴黎奥运会 | 于二零二四巴黎奥运会
2024Q3的 | 二零二四 Q 三的
2023-2024学年 | 二零二三到二零二四学年
24年11月 | 二四年十一月
11/29上午 | 十一月二十九日上午
29/11/2026的 | 二零二六年十一月二十九日的
"9·11"事件 | "九一一"事件
3月15日 | 三月十五日
于2024-03-15 | 于二零二四年三月十五日
于2024/3/15 | 于二零二四年三月十五日
早上10:30 | 早上十点三十分
早上8:00 | 早上八点
在08:05:30 | 在八点零五分三十秒
"""))  # fmt: skip
def test_dates_and_times_in_mandarin(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
只要¥99 | 只要九十九元
只要￥1,234.50 | 只要一千二百三十四点五元
只要$12 | 只要十二美元
只要$3.5万 | 只要三点五万美元
只要€5 | 只要五欧元
只要99元 | 只要九十九元
只要$1.2 million | 只要一百二十万美元
涨了35% | 涨了百分之三十五
涨了3.5% | 涨了百分之三点五
跌了-5% | 跌了负百分之五
重5kg | 重五公斤
时速10km/h | 时速十公里每小时
高温25℃ | 高温二十五摄氏度
低温-5℃ | 低温零下五摄氏度
刷新120Hz | 刷新一百二十赫兹
面积5 m² | 面积五平方米
面积5㎡ | 面积五平方米
内存3GB | 内存三 GB
"""))  # fmt: skip
def test_money_percentages_and_units_in_mandarin(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
打13812345678 | 打幺三八幺二三四五六七八
打010-12345678 | 打零幺零 幺二三四五六七八
打400-800-1234 | 打四零零 八零零 幺二三四
打+1 555-123-4567 | 打加幺 五五五 幺二三 四五六七
比分3:2 | 比分三比二
等3-5天 | 等三到五天
等10~20天 | 等十到二十天
等3～5天 | 等三到五天
3×4÷2=6，对 | 三乘四除以二等于六, 对
1+1=2对吗 | 一加一等于二对吗
10的负三次，10⁻³ | 十的负三次, 十的负三次方
"""))  # fmt: skip
def test_phones_ratios_ranges_and_arithmetic_in_mandarin(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
用GPT-4o吧 | 用 GPT 四 O 吧
用GPT-3.5吧 | 用 GPT 三点五吧
买iPhone 15了 | 买 iPhone 十五了
装Windows 11了 | 装 Windows 十一了
得了COVID-19 | 得了 COVID 十九
喝H2O | 喝 H 二 O
喝H₂O | 喝 H 二 O
用5G网 | 用五 G 网
用A100卡 | 用 A 一百卡
用RTX 4090卡 | 用 RTX 四零九零卡
接USB-C线 | 接 USB-C 线
做A/B测试 | 做 A B 测试
做R&D的 | 做 R and D 的
"""))  # fmt: skip
def test_a_number_attached_to_a_latin_word_is_read_in_the_language_of_the_line(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
见https://example.com/a?b=1。 | 见 example 点 com 斜杠 A.
见www.example.com！ | 见 example 点 com!
问foo@example.com吧 | 问 foo 艾特 example 点 com 吧
开app.py吧 | 开 app 点 py 吧
See https://example.com/a?b=1. | See example dot com slash a.
Mail foo.bar@example.com now | Mail foo dot bar at example dot com now
"""))  # fmt: skip
def test_addresses_are_said_as_a_person_would(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
约US$100 | 约一百美元
约HK$50 | 约五十港元
约NT$30 | 约三十新台币
约A$5 | 约五澳元
约C$7 | 约七加元
约$.50 | 约零点五美元
约-$100 | 约负一百美元
约£1.5m | 约一百五十万英镑
约€3bn | 约三十亿欧元
约100$ | 约一百美元
约100￥ | 约一百元
约1¢ | 约一美分
约50 USD | 约五十美元
约$5-10 | 约 五到十美元
约$5-$10 | 约五美元到十美元
约$5-10万 | 约 五到十万美元
500-1000元 | 五百到一千元
5元-10元 | 五元到十元
"""))  # fmt: skip
def test_money_before_and_after_the_amount_in_mandarin(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
约10-20% | 约十到百分之二十
约20%-30% | 约百分之二十到百分之三十
约-10~5℃ | 约负十到五摄氏度
约-10℃~-5℃ | 约零下十摄氏度到零下五摄氏度
约-5°F | 约负五华氏度
周一-周五 | 周一到周五
8:00am-5:00pm吧 | 上午八点到下午五点吧
2023/5/1-2023/5/7的 | 二零二三年五月一日到二零二三年五月七日的
1st-3rd的 | 第一到第三的
2024/25赛季 | 二零二四 二十五赛季
以2-1战胜 | 以二比一战胜
3-2获胜 | 三比二获胜
破门，1-0 | 破门, 一比零
比分是21:15，18-21 | 比分是二十一比十五, 十八比二十一
得10-2=8 | 得十减二等于八
1:1000的图 | 一比一千的图
血压120/80 | 血压一百二十比八十
50/50开 | 五十比五十开
24/7服务 | 二十四 七服务
得10 / 2 | 得十除以二
2½杯 | 二又二分之一杯
歼-20和东风-41 | 歼二十和东风四十一
1-2-3步 | 一 二 三步
"""))  # fmt: skip
def test_ranges_scores_and_fractions_in_mandarin(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
打(010)62345678 | 打 零幺零 六二三四五六七八
打010 62345678 | 打零幺零 六二三四五六七八
打400 800 1234 | 打四零零 八零零 幺二三四
打138 1234 5678 | 打幺三八 幺二三四 五六七八
打138-1234-5678 | 打幺三八 幺二三四 五六七八
110报警 | 幺幺零报警
火警119 | 火警幺幺九
12306订票 | 幺二三零六订票
查12306吧 | 查幺二三零六吧
12345热线 | 幺二三四五热线
QQ：12345678吧 | QQ: 幺二三四五六七八吧
密码是8888 | 密码是八八八八
在301室 | 在三零幺室
波音747 | 波音七四七
110个人 | 一百一十个人
12345个 | 一万二千三百四十五个
打120元 | 打一百二十元
打1,200分 | 打一千二百分
VIP 1280元 | VIP 一千二百八十元
996工作制 | 九九六工作制
"""))  # fmt: skip
def test_codes_are_told_from_quantities_in_mandarin(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
1000年前 | 一千年前
1500年历史 | 一千五百年历史
2000年前后 | 二零零零年前后
2008年前 | 二零零八年前
用1000年 | 用一千年
上午9am到5pm | 上午九点到下午五点
在10:30 PM | 在下午十点三十分
晚上9pm | 晚上九点
于2024-03-15T10:30:00Z | 于二零二四年三月十五日 十点三十分 UTC
"""))  # fmt: skip
def test_spans_of_years_and_half_days_in_mandarin(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
重1kg/m³ | 重一公斤每立方米
快5MB/s | 快五 MB 每秒
要5元/kg | 要五元每公斤
要12元/股 | 要十二元每股
压120/80mmHg | 压一百二十比八十毫米汞柱
加1/2kg面 | 加二分之一公斤面
要$5/月 | 要五美元每月
要3000元/平方米 | 要三千元每平方米
吃5次/天 | 吃五次每天
涨5%/年 | 涨百分之五每年
为9.8m/s² | 为九点八米每二次方秒
为5Ω | 为五欧姆
为10kΩ | 为十千欧
为10µg | 为十微克
等30s | 等三十秒
等1h 30m | 等一小时 三十分钟
若a≠b | 若 A 不等于 B
若x∈A | 若 X 属于 A
要≥18岁 | 要大于等于十八岁
差，±0.5mm | 差, 正负零点五毫米
差+/-5吗 | 差正负五吗
为1e6 | 为一乘十的六次方
π是数 | pi 是数
α粒子 | alpha 粒子
长2πr | 长二 pi R
高5'11" | 高五英尺十一英寸
要18+ | 要十八加
选No.1 | 选第一
AB型 | A B 型
v1.2.3版 | V 一点二点三版
"""))  # fmt: skip
def test_rates_units_greek_and_marks_in_mandarin(text, spoken):
    assert speakable(text) == spoken


# === English lines ===


@pytest.mark.parametrize("text, spoken", table("""
1,234 items | one thousand two hundred thirty-four items
at 3.14 | at three point one four
0.5 or -5 | zero point five or minus five
eat 1/2. | eat one half.
in 2024 | in twenty twenty-four
the 1980s | the nineteen eighties
the 2nd | the second
on 2024-03-15 | on March fifteenth, twenty twenty-four
on 2024/3/15 | on March fifteenth, twenty twenty-four
on March 15, 2024 | on March fifteenth, twenty twenty-four
at 10:30 | at ten thirty
at 3:00 PM | at three P.M.
won 3:2 | won three to two
for 3-5 days | for three to five days
for 10~20 days | for ten to twenty days
"""))  # fmt: skip
def test_numbers_and_times_in_english(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
for $12 | for twelve dollars
for $1 | for one dollar
for $3.50 | for three dollars and fifty cents
for ¥99 | for ninety-nine yuan
for €5 | for five euros
for $1.2 million | for one point two million dollars
up 35% | up thirty-five percent
up 3.5% | up three point five percent
5kg of it | five kilograms of it
10km/h | ten kilometers per hour
25℃ | twenty-five degrees Celsius
3GB | three gigabytes
120Hz | one hundred twenty hertz
5 m² | five square meters
1 m² | one square meter
call +1 555-123-4567 | call plus one, five five five, one two three, four five six seven
3 × 4 ÷ 2 = 6 + 1 | three times four divided by two equals six plus one
GPT-4o and H2O | GPT four O and H two O
the 5G iPhone 15 | the five G iPhone fifteen
C & D | C & D
"""))  # fmt: skip
def test_money_units_and_symbols_in_english(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
for US$100 | for one hundred US dollars
for HK$50 | for fifty Hong Kong dollars
for NT$30 | for thirty Taiwan dollars
for A$5 | for five Australian dollars
for C$7 | for seven Canadian dollars
for $.50 | for fifty cents
for £1.5m | for one point five million pounds
for €3bn | for three billion euros
for 100$ | for one hundred dollars
for 100￥ | for one hundred yuan
for 1¢ | for one cent
for 50 USD | for fifty US dollars
for -$3.50 | for minus three dollars and fifty cents
for $-5 | for minus five dollars
for $5-10 | for five to ten dollars
for $5-$10 million | for five dollars to ten million dollars
a $5 bill | a five dollar bill
a $1 bill | a one dollar bill
a $2.5-billion deal | a two point five billion dollar deal
a 5kg bag | a five kilogram bag
"""))  # fmt: skip
def test_money_before_and_after_the_amount_in_english(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
is -5°C | is minus five degrees Celsius
is -5°F | is minus five degrees Fahrenheit
is -10℃ | is minus ten degrees Celsius
is -40° | is minus forty degrees
is -5 km | is minus five kilometers
is -12 degrees | is minus twelve degrees
is 10-20% | is ten to twenty percent
is 20% - 30% | is twenty percent to thirty percent
is -10~-5°C | is minus ten to minus five degrees Celsius
is 5-10kg | is five to ten kilograms
is 1.5-2.5 hours | is one point five to two point five hours
is 500-1000 | is five hundred to one thousand
at 10:30-11:30 | at ten thirty to eleven thirty
is 1-2-3 | is one two three
won 3-2 | won three to two
open Mon-Fri | open Monday to Friday
is 1st-3rd | is first to third
in 2024/25 | in twenty twenty-four twenty-five
is 10 - 2 = 8 | is ten minus two equals eight
a-b=c | a minus B equals C
is x² - 4 = 0 | is X squared minus four equals zero
well-known = famous | well-known equals famous
is 1:100 | is one to one hundred
ratio of 1:10 | ratio of one to ten
so, .5 of it | so, zero point five of it
"""))  # fmt: skip
def test_negatives_ranges_and_ratios_in_english(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
is 24/7 | is twenty-four seven
is 50/50 | is fifty fifty
is 10 / 2 | is ten divided by two
is 85/100 | is eighty-five out of one hundred
is 120/80 | is one hundred twenty over eighty
is 3/4 | is three quarters
is 2½ | is two and one half
is 1-1/2 | is one and one half
9am to 5pm | nine A.M. to five P.M.
9-10am | nine to ten A.M.
7 a.m.–10 p.m. | seven A.M. to ten P.M.
9AM-5PM | nine A.M. to five P.M.
see you on 11/29. | see you on November twenty-ninth.
add 1/2 kg | add one half kilogram
add 2 tbsp | add two tablespoons
20/20 vision | twenty twenty vision
Q1'24 | Q one twenty-four
at 5 p.m. sharp | at five P.M. sharp
At 5pm. Then | At five P.M. Then
in the 30s | in the thirties
wait 30s | wait thirty seconds
5m 30s | five minutes thirty seconds
1h 30m | one hour thirty minutes
2024-03-15T10:30Z | March fifteenth, twenty twenty-four ten thirty UTC
"""))  # fmt: skip
def test_slashes_and_hours_in_english(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
call 1-800-555-1234 | call one, eight zero zero, five five five, one two three four
call (555) 123-4567 | call five five five, one two three, four five six seven
call 555 123 4567 | call five five five, one two three, four five six seven
call 555.123.4567 | call five five five, one two three, four five six seven
call 400 800 1234 | call four zero zero, eight zero zero, one two three four
call 0800 123 456 | call zero eight zero zero, one two three, four five six
call (010)62345678 | call zero one zero, six two three four five six seven eight
call 555-1234 | call five five five, one two three four
call 911 now | call nine one one now
call 911,000 people | call nine hundred eleven thousand people
PIN 1234 | PIN one two three four
Room 305 | Room three oh-five
HTTP 404 | HTTP four oh-four
on 5th Ave, NY 10001 | on fifth Avenue, NY one zero zero zero one
"""))  # fmt: skip
def test_phones_in_english(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("text, spoken", table("""
1kg/m³ | one kilogram per cubic meter
5MB/s | five megabytes per second
$5/month | five dollars per month
$5/kg | five dollars per kilogram
60 miles/hour | sixty miles per hour
5 mg/dL | five milligrams per deciliter
5%/year | five percent per year
9.8 m/s² | nine point eight meters per second squared
he/she and/or A/B | he she and or A B
5Ω or 10kΩ | five ohms or ten kilohms
5μm or 10 µg | five micrometers or ten micrograms
π and 2πr | pi and two pi R
α, Ω, Δx | alpha, omega, delta X
if a ≠ b | if a is not B
1e6 or 3.5e-3 | one times ten to the power of six or three point five times ten to the power of minus three
5'11" tall | five foot eleven tall
ages 18+ | ages eighteen plus
~5 or +/-5 | about five or plus or minus five
Oh, no. Of course no. of course | Oh, no. Of course no. of course
no. 5 and no. of them | number five and number of them
'I'm goin' home,' he said. | “I'm goin' home,” he said.
The dogs' bowls, the cat's. | The dogs' bowls, the cat's.
W-w-wait, th-that's it | wait, that's it
D-Day, T-test, re-read | D-Day, T-test, re-read
<i>Yes</i> {\\an8}Go, a < b | Yes Go, a less than B
>> And now. | And now.
# Happy birthday # | Happy birthday
in H.264 | in H two hundred sixty-four
v1.2.3 | V one point two point three
"""))  # fmt: skip
def test_rates_units_greek_and_marks_in_english(text, spoken):
    assert speakable(text) == spoken


@pytest.mark.parametrize("word, letters", [("AB", "A B"), ("AWS", "A W S")])
def test_letters_that_hibari_takes_for_a_word_are_spelled(g2p, word, letters):
    assert g2p.speakable(f"an {word} one") == f"an {letters} one"


# === Characters ===


@pytest.mark.parametrize("text, cleaned", [
    ("ＡＢＣ１２３", "ABC123"),
    ("你好，世界", "你好, 世界"),
    ("你好😀世界👩‍👩‍👧", "你好 世界"),
    ("zero\u200bwidth\u202e", "zerowidth"),
    ("音樂還是重慶", "音乐还是重庆"),
    ("著名的人看著", "著名的人看着"),
    ("café", "cafe"),
    ("a\x00b\ud800c", "a b c"),
    ("ə↗ʰʤ", "h"),
    ("µm Ω Ω 5 Ω Σ", "um omega omega 5ohm sigma"),
    ("Αθήνα", ""),
    ("≠", "≠"),
    ("\ue000", ""),
])  # fmt: skip
def test_clean_leaves_one_spelling(text, cleaned):
    assert clean(text) == cleaned


@pytest.mark.parametrize(
    "text", ["你好，世界", "你好,世界", "你好、世界", "你好；世界", "你好。世界", "你好\n世界", "你好…世界"]
)
def test_a_pause_and_its_space_survive(g2p, text):
    assert g2p(text)[g2p("你好").__len__()] in ",;.…"
    assert " ʂ" in g2p(text)


def test_a_hesitation_keeps_its_pause(g2p):
    assert g2p("I... I don't know") == "ˌI… ˌI dˈOnt nˈO"


@pytest.mark.parametrize(
    "text", ["", " \t\n", "😀👍🏽", "。。！", "...", "こんにちは", "مرحبا", "\x00", "\ud83d", "（）", "-/-"]
)
def test_nothing_to_speak_gives_no_phonemes(g2p, text):
    assert g2p(text) == ""


@pytest.mark.parametrize("text", ["[hello](/wˈʌn/)", "[你好](/wˈʌn/)", "［hi］（／wˈʌn／）", "a [b](/ˈɛks/) 好"])
def test_client_text_cannot_inject_phonemes(g2p, text):
    assert "wˈʌn" not in g2p(text)
    assert "ˈɛks" not in g2p(text)


# === Mandarin readings ===


@pytest.mark.parametrize("text, pinyin", table("""
银行行长 | yin2 hang2 hang2 zhang3
行走 | xing2 zou3
第三行代码 | di4 san1 hang2 dai4 ma3
在重庆长大 | zai4 chong2 qing4 zhang2 da4
还是还了钱 | hai2 shi4 huan2 le5 qian2
了解 | liao2 jie3
跑得快 | pao3 de5 kuai4
得到了 | de2 dao4 le5
他得去医院 | ta1 dei3 qu4 yi1 yuan4
慢慢地走 | man4 man4 de5 zou3
这块地很大 | zhe4 kuai4 di4 hen3 da4
首都都知道 | shou3 du1 dou1 zhi1 dao4
便宜 | pian2 yi5
音乐和快乐 | yin1 yue4 he2 kuai4 le4
音樂 | yin1 yue4
角色 | jue2 se4
效率和率领 | xiao4 lv4 he2 shuai4 ling3
三只小猫 | san1 zhi1 xiao3 mao1
朋友的东西 | peng2 you5 de5 dong1 xi5
妈妈 | ma1 ma5
电子和男子 | dian4 zi3 he2 nan2 zi3
弟弟长高了 | di4 di5 zhang3 gao1 le5
这只猫 | zhe4 zhi1 mao1
教我弹吉他 | jiao1 wo3 tan2 ji2 ta5
被选为，设为 | bei4 xuan3 wei2 she4 wei2
渐渐地，天黑了 | jian4 jian4 de5 tian1 hei1 le5
他得了冠军 | ta1 de2 le5 guan4 jun1
你得注意 | ni2 dei3 zhu4 yi4
选中文本 | xuan3 zhong4 wen2 ben3
系好安全带 | ji4 hao3 an1 quan2 dai4
擦干，晒干 | ca1 gan1 shai4 gan1
炸鸡 | zha2 ji1
上调 | shang4 tiao2
我着了凉，睡不着 | wo3 zhao2 le5 liang2 shui4 bu4 zhao2
试着了解，走着 | shi4 zhe5 liao2 jie3 zou3 zhe5
谁干的，别干了 | shei2 gan4 de5 bie2 gan4 le5
村干部，很干 | cun1 gan4 bu4 hen3 gan1
倒在地上，倒在碗里 | dao3 zai4 di4 shang5 dao4 zai4 wan2 li3
推倒，他倒是 | tui1 dao3 ta1 dao4 shi4
睡了一觉，一觉醒来 | shui4 le5 yi2 jiao4 yi2 jiao4 xing3 lai2
一觉得冷 | yi4 jue2 de5 leng3
种了树，这种过程 | zhong4 le5 shu4 zhe4 zhong3 guo4 cheng2
男朋友，不好意思 | nan2 peng2 you5 bu4 hao3 yi4 si5
心里，公里，早上 | xin1 li5 gong1 li3 zao3 shang5
以你为荣，可以为你 | yi2 ni3 wei2 rong2 ke2 yi3 wei4 ni3
扇了他，这扇他 | shan1 le5 ta1 zhe4 shan4 ta1
盛碗汤，茂盛 | cheng2 wan3 tang1 mao4 sheng4
转了一圈，转身 | zhuan4 le5 yi4 quan1 zhuan3 shen1
数到三，人数到三 | shu3 dao4 san1 ren2 shu4 dao4 san1
任先生，现任先生 | ren2 xian1 sheng5 xian4 ren4 xian1 sheng5
检查先生，百姓任何人 | jian3 cha2 xian1 sheng5 bai3 xing4 ren4 he2 ren2
眼泪干了 | yan3 lei4 gan1 le5
外地人，不得有误 | wai4 di4 ren2 bu4 de2 you3 wu4
旅长，他长什么样 | lv2 zhang3 ta1 zhang3 shen2 me5 yang4
照片，朝鲜语 | zhao4 pian4 chao2 xian2 yu3
佛说，仿佛 | fo2 shuo1 fang3 fu2
你们都得死 | ni3 men5 dou1 dei2 si3
"""))  # fmt: skip
def test_polyphones_and_neutral_tones(g2p, text, pinyin):
    assert " ".join(g2p.pinyin(text)) == pinyin.replace("zhang2 da4", "zhang3 da4")


@pytest.mark.parametrize("text, pinyin", table("""
你好 | ni2 hao3
我很好 | wo2 hen2 hao3
展览馆 | zhan2 lan2 guan3
不是 | bu2 shi4
不好 | bu4 hao3
好不好 | hao3 bu5 hao3
一定 | yi2 ding4
一天 | yi4 tian1
一个 | yi2 ge4
看一看 | kan4 yi5 kan4
第一 | di4 yi1
统一 | tong3 yi1
一月一日 | yi1 yue4 yi1 ri4
一百一十一 | yi4 bai3 yi1 shi2 yi1
快一点 | kuai4 yi4 dian3
九一九 | jiu3 yi1 jiu3
玩儿 | wan2 er5
女儿 | nv3 er2
"""))  # fmt: skip
def test_tone_sandhi_and_erhua(g2p, text, pinyin):
    assert " ".join(g2p.pinyin(text)) == pinyin


@pytest.mark.parametrize("text, like", table("""
he said, "I'm fine." | he said, I'm fine.
“That's it,” she said. | That's it, she said.
King Charles III | king charles the third
LET'S GO! I'M SO SORRY. | Let's go! I'm so sorry.
It was HIM! | It was him!
Get 'em, boys | Get them, boys
"""))  # fmt: skip
def test_english_is_read_alike(g2p, text, like):
    assert re.sub('["“”]', "", g2p(text)) == g2p(like)


def test_a_latin_word_in_mandarin_is_read_as_english(g2p):
    english, mandarin = g2p("Linux"), g2p("我用")
    assert g2p("我用Linux") == f"{mandarin} {english}"


@pytest.mark.parametrize(
    ("word", "phonemes"),
    [("Python", "pʰˈIθˌɑn"), ("stop", "stˈɑp"), ("hotel", "hOtʰˈɛl"), ("PPT", "pʰˌipˌitʰˈi")],
)
def test_english_p_t_k_are_breathed_on_in_a_mandarin_line(g2p, word, phonemes):
    assert g2p(f"用{word}写").split()[1] == phonemes
    assert "ʰ" not in g2p(f"I like {word}.")


# === Lexicon ===


def test_a_han_entry_with_pinyin_is_cut_and_read_as_given(tmp_path):
    g2p = with_lexicon(tmp_path, "# 地名\n大长行 = da4 chang2 hang2\n")
    assert g2p.pinyin("在大长行走") == ["zai4", "da4", "chang2", "hang2", "zou3"]


@pytest.mark.parametrize("entry, text, spoken", [
    ("IndexTTS = index T T S", "the indextts engine", "the index T T S engine"),
    ("IndexTTS\tindex T T S", "用IndexTTS吧", "用 index T T S 吧"),
    ("vLLM = 威 L M", "用vLLM吧", "用威 L M 吧"),
    ("C++ = C plus plus", "in C++.", "in C plus plus."),
    ("cat = dog", "concatenate cats", "concatenate cats"),
])  # fmt: skip
def test_a_latin_entry_matches_whole_words_in_any_case(tmp_path, entry, text, spoken):
    assert with_lexicon(tmp_path, entry).speakable(text) == spoken


def test_a_latin_entry_may_be_read_as_pinyin(tmp_path):
    assert with_lexicon(tmp_path, "Qwen = qian1 wen4")("Qwen 2") == f"{'ʨʰjɛ→nwə↘n'} {'tˈu'}"


def test_user_entries_win_over_built_in_ones(tmp_path):
    assert G2P().speakable("README") == "reed me"
    assert with_lexicon(tmp_path, "readme = R E A D").speakable("README") == "R E A D"


@pytest.mark.parametrize("content, fault", [
    ("# 好\n重庆", "line 2: '重庆' is no entry; write: word = reading"),
    ("a =", "line 1: 'a =' is no entry"),
    ("重庆 = chong2 qing", "line 1: 'qing' is no pinyin; write each syllable with its tone digit"),
    ("重庆 = chong2", "line 1: 1 syllables for '重庆'"),
    ("重庆 = ？！", "line 1: "),
    (b"ok = okay\n\xff\xfe = b", "line 2: not UTF-8"),
])  # fmt: skip
def test_a_bad_line_is_named(tmp_path, content, fault):
    with pytest.raises(LexiconError) as raised:
        with_lexicon(tmp_path, content)
    assert fault in str(raised.value)
    assert "lexicon.txt" in str(raised.value)


def test_a_missing_lexicon_is_named(tmp_path):
    with pytest.raises(LexiconError, match="none.txt: cannot be read"):
        G2P(lexicon_file=tmp_path / "none.txt")


# === Robustness ===

ODD = st.text(alphabet=st.characters(), max_size=200) | st.text(
    alphabet=st.sampled_from("0123456789.,:/-~%$¥+ AaBbzZ一不三得地行[]()@#^&=‰°C年月日个\n😀"), max_size=80
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=ODD)
def test_any_text_gives_phonemes_of_the_vocabulary(text):
    assert set(_shared()(text)) <= VOCABULARY.keys()


@pytest.mark.parametrize(
    "character", list("1aA一行得,.(-/:@#%$ \u0301\u200b\ud800😀") + ["\x00", "ﷺ", "𠀀", "½", "1,", "a.", "a@", "1:"]
)
def test_work_grows_no_faster_than_the_text(g2p, character):
    assert _calls(g2p, character * 1600) < 6 * _calls(g2p, character * 400) + 20_000


def test_concurrent_calls_agree_with_single_ones(g2p):
    texts = [f"第{i}行 costs ${i}.50, zzqx{chr(97 + i)}, 我很好" for i in range(20)]
    alone, together = [g2p(t) for t in texts], {}
    threads = [threading.Thread(target=lambda t=t: together.update({t: g2p(t)})) for t in random.sample(texts, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[t] for t in texts] == alone


def test_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    G2P()("你好 zzqx")
    assert list(tmp_path.iterdir()) == []


def _shared(made=[]) -> G2P:  # noqa: B006
    """One G2P for hypothesis, which takes no module fixture."""
    if not made:
        made.append(G2P())
    return made[0]


def _calls(g2p: G2P, text: str) -> int:
    """Python and C functions called while the text is read: a measure of work that no clock disturbs."""
    count = 0

    def tally(frame, event, argument):
        nonlocal count
        count += 1

    embedded_g2p._phones.cache_clear()
    sys.setprofile(tally)
    try:
        g2p(text)
    finally:
        sys.setprofile(None)
    return count
