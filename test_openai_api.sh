#!/usr/bin/env bash

# In here and not a comment: piped into bash, a script cannot read itself.
usage() {
  cat <<'HELP'
Check a running speech server over HTTP, as OpenAI's clients use it: one TAP line per check, and a summary.

Usage: test_openai_api.sh [options]

  -u, --url URL      the server; default BASE_URL, else http://127.0.0.1:6006
  -k, --key KEY      its API key; default API_KEY of the environment, which no list of processes shows
  -v, --voice NAME   the voice of most checks; default alloy
  -o, --out DIR      where the audio is kept for listening; default: a new folder under /tmp
  -q, --quick        the checks that take long are left out
  -h, --help         show this help

It needs bash, curl, python3 and coreutils. Exit status: 0 all passed; 1 a check failed; 2 usage; 3 no server there.
HELP
}

set -uo pipefail   # no -e: a check that fails must not hide the later ones

BASE_URL=${BASE_URL:-http://127.0.0.1:6006}
KEY=${API_KEY:-}
VOICE=alloy OUT='' QUICK=0
CHECKS=0 FAILURES=0 SKIPPED=0

readonly EXIT_FAILED=1 EXIT_USAGE=2 EXIT_NO_SERVER=3
readonly VOICES=(alloy echo fable onyx nova shimmer ash ballad coral sage verse)
readonly ALIASES=(default marin cedar speaker_1 speaker_5 male_1 female_2 male_young female_mature)
readonly ENGLISH='The harbour was quiet that morning, and the boats lay still.'
readonly CHINESE='今天天气很好,我们去公园散步吧。'
readonly -A CONTENT_TYPES=(
  ["wav"]=audio/wav ["pcm"]=audio/pcm ["mp3"]=audio/mpeg ["opus"]=audio/ogg ["aac"]=audio/aac ["flac"]=audio/flac
)
readonly SPEECH=/v1/audio/speech
readonly TIMEOUT_S=600

die()   { local status=$1; shift; printf 'ERROR: %s\n' "$*" >&2; exit "$status"; }
why()   { printf '# %s\n' "$*"; return 1; }

# check NAME COMMAND... : run the command, count it, print "ok N - NAME" or "not ok".
check() {
  local name=$1 verdict=ok; shift
  "$@" || { verdict='not ok'; FAILURES=$((FAILURES + 1)); }
  CHECKS=$((CHECKS + 1))
  printf '%s %d - %s\n' "$verdict" "$CHECKS" "$name"
}

skip() { CHECKS=$((CHECKS + 1)) SKIPPED=$((SKIPPED + 1)); printf 'ok %d - %s # SKIP %s\n' "$CHECKS" "$1" "$2"; }

# === HTTP ===

# request METHOD PATH [curl options]: the body goes to $BODY, the headers to $BODY.head; print the status.
request() {
  local method=$1 path=$2; shift 2
  curl -sS --noproxy 127.0.0.1,localhost --max-time "$TIMEOUT_S" -o "$BODY" -D "$BODY.head" -w '%{http_code}' \
    -X "$method" -H "@$KEY_FILE" "$@" "$BASE_URL$path"
}

post() { request POST "$1" -H 'Content-Type: application/json' --data-binary "$2"; }

# expect STATUS COMMAND...: a request that prints this status.
expect() {
  local want=$1 got; shift
  got=$("$@") || true
  [[ $got == "$want" ]] || why "${*:1:3}: got $got, want $want: $(begin_of_body)"
}

begin_of_body() { head -c 300 "$BODY" | LC_ALL=C tr -cd '\40-\176'; }

# speech INPUT [FIELDS]: a body for the speech route.
speech() { printf '{"model":"tts-1","voice":"%s","input":"%s"%s}' "$VOICE" "$1" "${2:+,$2}"; }

content_type() {
  local name value
  while IFS=': ' read -r name value; do
    if [[ ${name,,} == content-type ]]; then echo "${value%%[;$'\r']*}"; fi
  done <"$1.head"
}

# === What is in a body ===

# sound FORMAT FILE: print "SECONDS RATE DBFS" (DBFS for wav and pcm); say what is wrong, and fail, where it is none.
sound() {
  python3 - "$@" <<'PYTHON'
import array
import math
import struct
import sys

name, path = sys.argv[1:]
data = open(path, "rb").read()
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
MP3_KBITS = {3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)}
MP3_KBITS[2] = MP3_KBITS[0] = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


def need(condition, what):
    if not condition:
        sys.exit(f"# {name}: {what}; it begins with {data[:12]!r}")


def loudness(samples):
    return 10 * math.log10(sum(x * x for x in samples) / max(1, len(samples)) / 32768**2 + 1e-10)


def wav():
    need(data[:4] == b"RIFF" and data[8:16] == b"WAVEfmt ", "no RIFF file")
    kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", data[20:36])
    need((kind, channels, bits) == (1, 1, 16), f"not mono 16 bit: {kind}, {channels}, {bits}")
    start = data.index(b"data") + 8
    samples = array.array("h", data[start : start + (len(data) - start) // 2 * 2])
    return len(samples) / rate, rate, loudness(samples)


def pcm():
    need(len(data) % 2 == 0, "an odd number of bytes")
    samples = array.array("h", data)
    return len(samples) / 24000, 24000, loudness(samples)


def flac():
    need(data[:4] == b"fLaC", "no FLAC file")
    packed = int.from_bytes(data[18:26], "big")
    return (packed & (1 << 36) - 1) / (packed >> 44), packed >> 44, 0


def opus():
    need(data[:4] == b"OggS" and data[28:36] == b"OpusHead", "no Ogg Opus")
    skipped = struct.unpack("<H", data[38:40])[0]
    last = data.rindex(b"OggS")
    need(data[last + 5] & 4, "the last page has no end mark")
    return (struct.unpack("<q", data[last + 6 : last + 14])[0] - skipped) / 48000, 48000, 0


def aac():
    at = frames = 0
    while at + 7 <= len(data):
        need(data[at] == 0xFF and data[at + 1] & 0xF6 == 0xF0, f"no ADTS frame at {at}")
        rate, frames = AAC_RATES[data[at + 2] >> 2 & 15], frames + 1
        at += (data[at + 3] & 3) << 11 | data[at + 4] << 3 | data[at + 5] >> 5
    need(frames and at == len(data), "the last frame is cut")
    return frames * 1024 / rate, rate, 0


def mp3():
    at = samples = 0
    if data[:3] == b"ID3":
        at = 10 + (data[6] << 21 | data[7] << 14 | data[8] << 7 | data[9])
    while at + 4 <= len(data):
        need(data[at] == 0xFF and data[at + 1] & 0xE6 == 0xE2, f"no MP3 frame at {at}")
        version = data[at + 1] >> 3 & 3
        rate, kbits = MP3_RATES[version][data[at + 2] >> 2 & 3], MP3_KBITS[version][data[at + 2] >> 4]
        at += (144 if version == 3 else 72) * kbits * 1000 // rate + (data[at + 2] >> 1 & 1)
        samples += 1152 if version == 3 else 576
    need(samples and at == len(data), "the last frame is cut")
    return samples / rate, rate, 0


need(len(data) > 100, f"only {len(data)} bytes")
print("%.3f %d %.0f" % {"wav": wav, "pcm": pcm, "flac": flac, "opus": opus, "aac": aac, "mp3": mp3}[name]())
PYTHON
}

# lasts FORMAT FILE LEAST MOST [RATE]: sound of that length in seconds, at that rate in Hz, and not silent.
lasts() {
  local seconds rate dbfs told
  told=$(sound "$1" "$2" 2>&1) || { printf '%s\n' "$told"; return 1; }
  read -r seconds rate dbfs <<<"$told"
  holds "$3 <= $seconds <= $4" || { why "$1 of $seconds s, want $3 to $4"; return 1; }
  [[ ! ${5:-} || $rate == "$5" ]] || { why "$1 at $rate Hz, want $5"; return 1; }
  ((dbfs > -50)) || why "$1 is silent: $dbfs dBFS"
}

# json EXPRESSION: evaluate Python about the body, as `it`; true, or tell the body.
json() {
  python3 -c 'import json, sys
it = json.load(open(sys.argv[1]))
sys.exit(not eval(sys.argv[2]))' "$BODY" "$1" 2>/dev/null || why "not so: $1: $(begin_of_body)"
}

# OpenAI's error body.
envelope() {
  json 'it.keys() == {"error"} and it["error"].keys() == {"message", "type", "param", "code"}' &&
    json 'it["error"]["message"] and "Traceback" not in it["error"]["message"]'
}

# Arithmetic that bash has not: a figure, and whether something is so.
figure() { python3 -c "print(round($1, 3))"; }
holds()  { python3 -c "raise SystemExit(not ($1))"; }
same()   { python3 -c 'import filecmp, sys; sys.exit(not filecmp.cmp(*sys.argv[1:], shallow=False))' "$@"; }

# === Checks ===

health() { expect 200 request GET /health && json 'it["status"] == "healthy"'; }

voices() {
  local want; want=$(printf '"%s",' "${VOICES[@]}")
  expect 200 request GET "$1" && json "[voice['id'] for voice in it['voices']] == [${want}]"
}

# speaks FILE FORMAT LEAST MOST BODY: speech of that format and length, kept under that name.
speaks() {
  local file=$OUT/$1.$2
  BODY=$file expect 200 post "$SPEECH" "$5" || return 1
  [[ $(content_type "$file") == "${CONTENT_TYPES[$2]}" ]] || { why "content type $(content_type "$file")"; return 1; }
  lasts "$2" "$file" "$3" "$4"
}

# How far a format's length may be from the WAV's: an engine that samples says a text differently each time.
measure() {
  BODY=$OUT/again.wav post "$SPEECH" "$(speech "$ENGLISH" '"response_format":"wav"')" >/dev/null
  read -r SECONDS_WAV _ < <(sound wav "$OUT/english_$VOICE.wav" 2>/dev/null || echo 4)
  LEAST=$(figure "$SECONDS_WAV * 0.5") MOST=$(figure "$SECONDS_WAV * 1.5")
  if same "$OUT/again.wav" "$OUT/english_$VOICE.wav" 2>/dev/null; then
    LEAST=$(figure "$SECONDS_WAV - 0.06") MOST=$(figure "$SECONDS_WAV + 0.12")
  fi
  rm -f "$OUT/again.wav" "$OUT/again.wav.head"
}

# faster SPEED LEAST MOST: the length, as a share of that at speed 1.
faster() {
  speaks "speed_$1" wav "$(figure "$LEAST * $2")" "$(figure "$MOST * $3")" "$(speech "$ENGLISH" "\"speed\":$1")"
}

# Four sentences that nobody has asked for before: a server may keep what it has said.
long_text() {
  printf 'The boat with the number %d came home in the evening, with fish for all of us. ' \
    $RANDOM $RANDOM $RANDOM $RANDOM
}

# The first byte is there well before the last.
streams() {
  local times first whole
  times=$(curl -sSN --noproxy 127.0.0.1,localhost --max-time "$TIMEOUT_S" -o "$OUT/streamed.$1" -H "@$KEY_FILE" \
    -H 'Content-Type: application/json' -w '%{http_code} %{time_starttransfer} %{time_total}' \
    --data-binary "$(speech "$(long_text)" "\"response_format\":\"$1\"")" "$BASE_URL$SPEECH")
  [[ $times == 200* ]] || { why "got $times"; return 1; }
  read -r _ first whole <<<"$times"
  holds "$first < 0.8 * $whole" || { why "first byte after $first s of $whole s"; return 1; }
  lasts "$1" "$OUT/streamed.$1" 5 60
}

events() {
  local type body; body=$(speech "$ENGLISH" '"response_format":"mp3","stream_format":"sse"')
  BODY=$OUT/events expect 200 post "$SPEECH" "$body" || return 1
  type=$(content_type "$OUT/events")
  [[ $type == text/event-stream ]] || { why "content type $type"; return 1; }
  python3 - "$OUT/events" "$OUT/events.mp3" <<'PYTHON' || return 1
import base64
import json
import sys

events = [json.loads(line[6:]) for line in open(sys.argv[1]) if line.startswith("data: ")]
if not events or events[-1]["type"] != "speech.audio.done" or "total_tokens" not in events[-1].get("usage", {}):
    sys.exit(f"# the last event is not speech.audio.done: {events[-1:]}")
parts = [base64.b64decode(event["audio"]) for event in events if event["type"] == "speech.audio.delta"]
open(sys.argv[2], "wb").write(b"".join(parts))
PYTHON
  lasts mp3 "$OUT/events.mp3" "$LEAST" "$MOST"
}

# refused STATUS COMMAND...: refused with that status and OpenAI's envelope.
refused() { expect "$@" && envelope; }

native() {
  local body='{"text":"你好,世界。","spk_audio_path":"/anywhere/examples/voice_05.wav"}'
  BODY=$OUT/native.wav expect 200 post "$1" "$body" &&
    lasts wav "$OUT/native.wav" 0.5 10
}

native_refuses() {
  expect 400 post /tts_url '{"text":"","spk_audio_path":"voice_01.wav"}' &&
    json 'it["status"] == "error" and it["error"]'
}

# Five at once, each with a voice of its own.
at_once() {
  local jobs=() number body failed=0
  for number in 0 1 2 3 4; do
    body=$(VOICE=${VOICES[number]} speech "Number $number. $ENGLISH")
    speaks "at_once_$number" wav 1 20 "$body" &
    jobs+=($!)
  done
  for number in "${jobs[@]}"; do wait "$number" || failed=1; done
  return "$failed"
}

# Refused with 401, or with 429 once it was wrong too often.
turned_away() {
  local got; got=$("$@")
  [[ $got == 401 || $got == 429 ]] || why "${*:1:2}: got $got, want 401"
}

# No way to speech without the key: not by another route, another spelling, nor a wrong or an empty key.
no_holes() {
  local path key body keys=("" "Authorization: Bearer" "Authorization: Bearer wrong" "Authorization: Basic $KEY"
    "X-Api-Key: wrong" "X-Api-Key;")
  body=$(speech Hello '"text":"Hello","spk_audio_path":"voice_01.wav"')
  for path in /v1/audio/speech /audio/speech //v1/audio/speech /tts_url //tts_url; do
    for key in "${keys[@]}"; do
      printf '%s\n' "$key" >"$OUT/wrong_key"
      KEY_FILE=$OUT/wrong_key turned_away post "$path" "$body" || { why "with '${key/$KEY/KEY}'"; return 1; }
      [[ $path == *tts_url ]] || envelope || return 1
    done
  done
  rm -f "$OUT/wrong_key"
}

# === The list ===

check_basics() {
  check "health says healthy" health
  if ((FAILURES)); then echo "Bail out! It cannot speak now."; exit "$EXIT_FAILED"; fi
  check "the eleven voices, in their order" voices /v1/audio/voices
  check "$VOICE speaks English" speaks "english_$VOICE" wav 2 10 "$(speech "$ENGLISH" '"response_format":"wav"')"
  check "nova speaks Chinese" speaks chinese_nova wav 1.5 10 "$(VOICE=nova speech "$CHINESE")"
  measure
}

check_formats() {
  local format
  for format in "${!CONTENT_TYPES[@]}"; do
    check "$format: its type, its first bytes, its length" \
      speaks "format" "$format" "$LEAST" "$MOST" "$(speech "$ENGLISH" "\"response_format\":\"$format\"")"
  done
  check "pcm has 24000 samples a second" lasts pcm "$OUT/format.pcm" "$LEAST" "$MOST" 24000
}

check_voices() {
  local voice
  for voice in "${VOICES[@]}"; do
    check "voice $voice" speaks "voice_$voice" wav 0.8 8 "$(VOICE=$voice speech "Good morning, everyone.")"
  done
  for voice in "${ALIASES[@]}"; do
    check "alias $voice" speaks "alias_$voice" wav 0.5 8 "$(VOICE=$voice speech "Good morning.")"
  done
}

check_behaviour() {
  check "speed 2 halves the length" faster 2 0.45 0.55
  check "speed 0.5 doubles it" faster 0.5 1.8 2.2
  check "pcm streams" streams pcm
  check "mp3 streams" streams mp3
  check "server-sent events" events
  check "five at once" at_once
}

check_routes() {
  check "/audio/speech is the same" expect 200 post /audio/speech "$(speech Hello.)"
  check "/audio/voices is the same" voices /audio/voices
  check "/v1/models lists models" expect 200 request GET /v1/models
  check "/tts_url speaks" native /tts_url
  check "//tts_url is the same" native //tts_url
  check "/tts_url refuses in its own words" native_refuses
}

check_errors() {
  check "400: no input" refused 400 post "$SPEECH" '{"model":"tts-1"}'
  check "400: empty input" refused 400 post "$SPEECH" "$(speech "  ")"
  check "400: input too long" refused 400 post "$SPEECH" "$(speech "$(printf 'a%.0s' {1..4097})")"
  check "400: no such voice" refused 400 post "$SPEECH" "$(VOICE=nobody speech Hello.)"
  check "400: no such format" refused 400 post "$SPEECH" "$(speech Hello. '"response_format":"ogg3"')"
  check "400: speed out of range" refused 400 post "$SPEECH" "$(speech Hello. '"speed":5')"
  check "400: not JSON" refused 400 post "$SPEECH" '{"input":'
  check "415: no JSON said" refused 415 request POST "$SPEECH" -H 'Content-Type: text/plain' --data hello
  check "404: no such route" refused 404 request GET /v1/nothing
  check "405: no such method" refused 405 request GET "$SPEECH"
}

check_keys() {
  if [[ ! $KEY ]]; then skip "no way around the key" "no key was given"; return; fi
  check "no way around the key" no_holes
  : >"$OUT/no_key"
  KEY_FILE=$OUT/no_key check "health is open" health
  KEY_FILE=$OUT/no_key check "the voice list is open" voices /v1/audio/voices
  rm -f "$OUT/no_key"
}

run_checks() {
  check_basics
  if ((!QUICK)); then check_formats; check_voices; check_behaviour; fi
  check_routes
  check_errors
  check_keys
}

parse_arguments() {
  while (($#)); do
    if [[ $1 =~ ^(-[ukvo]|--(url|key|voice|out))$ && ! ${2:-} ]]; then die "$EXIT_USAGE" "$1 needs a value"; fi
    case $1 in
      -u|--url) BASE_URL=$2; shift ;;
      -k|--key) KEY=$2; shift ;;
      -v|--voice) VOICE=$2; shift ;;
      -o|--out) OUT=$2; shift ;;
      -q|--quick) QUICK=1 ;;
      -h|--help) usage; exit 0 ;;
      *) usage >&2; die "$EXIT_USAGE" "unknown argument: $1" ;;
    esac
    shift
  done
  BASE_URL=${BASE_URL%/}
}

main() {
  parse_arguments "$@"
  OUT=${OUT:-$(mktemp -d /tmp/openai_api.XXXXXX)}
  mkdir -p "$OUT" || die "$EXIT_USAGE" "$OUT cannot be made"
  BODY=$OUT/body KEY_FILE=$(mktemp)
  trap 'rm -f "$KEY_FILE" "$OUT"/*.head "$OUT/body"' EXIT
  if [[ $KEY ]]; then printf 'Authorization: Bearer %s\n' "$KEY" >"$KEY_FILE"; fi
  expect 200 request GET /health >/dev/null 2>&1 || [[ -s $BODY ]] || die "$EXIT_NO_SERVER" "no server at $BASE_URL"
  run_checks
  printf '1..%d\n# %d passed, %d failed, %d skipped; the audio is in %s\n' \
    "$CHECKS" $((CHECKS - FAILURES - SKIPPED)) "$FAILURES" "$SKIPPED" "$OUT"
  ((FAILURES == 0)) || exit "$EXIT_FAILED"
}

main "$@"
