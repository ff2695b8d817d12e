#!/usr/bin/env bash

# In here and not a comment: piped into bash, a script cannot read itself.
usage() {
  cat <<'HELP'
Say what state the speech server on this machine is in. Reads only; changes nothing; prints no secrets.

Usage: remote_check.sh [--json]
       ssh HOST bash -s < remote_check.sh
       ssh HOST PORT=6006 PUBLIC_URL=https://speech.example.com:8443 bash -s -- --json < remote_check.sh

  -j, --json     for programs: {"ok", "checks": [{"level", "name", "value"}]}
  -h, --help     show this help

Settings, from the environment, else from APP_DIR/server.env:

  APP_DIR        where the server lives; default: where the one on PORT runs, else /root/index-tts-vllm
  PORT           6006
  PUBLIC_URL     the address that clients use from outside; default: none is asked
  MIN_DISK_MB    500, below which a disk is called full

Exit status: 0 nothing would stop it from speaking; 1 something would; 2 usage.
HELP
}

set -uo pipefail   # no -e: report everything that is wrong, not just the first thing

readonly EXIT_WRONG=1 EXIT_USAGE=2
readonly SECRETS='^(TTS_API_KEYS|HF_TOKEN|[A-Z0-9_]*(KEY|KEYS|TOKEN|SECRET|PASSWORD))='
readonly ERRORS_SHOWN=5 LOG_LINES=2000

CHECKS=() FAILURES=0 JSON=0

die()  { local status=$1; shift; printf 'ERROR: %s\n' "$*" >&2; exit "$status"; }
pass() { report ok "$@"; }
hint() { report note "$@"; }
fail() { FAILURES=$((FAILURES + 1)); report FAIL "$@"; }

# report LEVEL NAME VALUE: keep a line, and print it for people.
report() {
  local value; value=$(redacted "$3")
  CHECKS+=("{\"level\": $(quoted "$1"), \"name\": $(quoted "$2"), \"value\": $(quoted "$value")}")
  ((JSON)) || printf '  %-5s %-16s %s\n' "$1" "$2" "$value"
}

# Replace what looks like a secret, and the secrets of server.env wherever they turn up; drop bytes that are no UTF-8.
redacted() {
  local text=$1 secret
  for secret in "${SECRET_VALUES[@]}"; do text=${text//"$secret"/***}; done
  sed -E -e 's/((key|token|secret|password)s?["'\'']?[=: ]+["'\'']?)[^ ,"'\'']+/\1***/Ig' -e 's/(Bearer +)[^ ]+/\1***/Ig' \
    -e 's/sk-[A-Za-z0-9_-]{8,}/***/g' -e 's,//[^/@ ]+@,//***@,g' <<<"$text" | iconv -c -f UTF-8 -t UTF-8
}

# A JSON string.
quoted() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"} text=${text//$'\n'/\\n} text=${text//$'\t'/\\t}
  printf '"%s"' "$(tr -d '\000-\037' <<<"$text")"
}

# === Settings ===

load_config() {
  SECRET_VALUES=() PORT_GIVEN=${PORT:-}
  PORT=${PORT:-6006}
  [[ $PORT =~ ^[0-9]+$ ]] || die "$EXIT_USAGE" "PORT must be a number, not $PORT"
  APP_DIR=${APP_DIR:-$(default_app_dir)}
  PORT=${PORT_GIVEN:-$(setting PORT)} PORT=${PORT:-6006}
  MIN_DISK_MB=${MIN_DISK_MB:-500}
  BASE_URL=http://$(address "$(setting HOST)"):$PORT
  LOG=$APP_DIR/logs/server.log
  load_secrets
}

default_app_dir() {
  local pid; pid=$(port_pids | head -n 1)
  if [[ $pid ]]; then readlink "/proc/$pid/cwd"; else echo /root/index-tts-vllm; fi
}

setting() { installed | sed -n "s/^$1=//p" | tail -n 1; }

# The lines of server.env without quotes and backslashes.
installed() {
  LC_ALL=C sed -E -e 's/[ \t\r]*$//' -e "/^[A-Z0-9_]+='/{s/='/=/; s/'\$//; b}" \
    -e '/^[A-Z0-9_]+="/{s/="/=/; s/"$//; s/\\([\\"$`])/\1/g; b}' -e 's/\\(.)/\1/g' "$APP_DIR/server.env" 2>/dev/null
}

address() {
  case $1 in
    ''|0.0.0.0) echo 127.0.0.1 ;;
    ::) echo '[::1]' ;;
    *:*) echo "[$1]" ;;
    *) echo "$1" ;;
  esac
}

load_secrets() {
  local line value
  while IFS= read -r line; do
    IFS=, read -r -a values <<<"${line#*=}"
    for value in "${values[@]}"; do if [[ ${#value} -ge 3 ]]; then SECRET_VALUES+=("$value"); fi; done
  done < <({ installed; env; keys_of_file; } | grep -E "$SECRETS")
}

# The keys of TTS_API_KEYS_FILE, one KEY=VALUE a line.
keys_of_file() {
  local file; file=$(setting TTS_API_KEYS_FILE)
  cd "$APP_DIR" 2>/dev/null && [[ $file ]] && sed 's/#.*//; s/^[ \t]*/KEY=/; s/[ \t]*$//' "$file" 2>/dev/null
}

# === Processes ===

listening() {
  local port; printf -v port ':%04X$' "$PORT"
  cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk -v port="$port" '$2 ~ port && $4 == "0A" {print $2, $10}'
}

port_pids() {
  local socket
  while read -r _ socket; do
    find /proc/[0-9]*/fd -lname "socket:\[$socket\]" 2>/dev/null
  done < <(listening) | cut -d/ -f3 | sort -nu
}

command_of() { tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null; }
memory_of()  { awk '/^VmRSS:/ {print int($2 / 1024)}' "/proc/$1/status" 2>/dev/null; }

# How long a process has been running, in seconds.
age_of() {
  local born; born=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20)
  awk -v born="${born:-0}" -v ticks="$(getconf CLK_TCK)" '{print int($1 - born / ticks)}' /proc/uptime
}

# === Checks ===

check_processes() {
  local pid
  PIDS=$(port_pids)
  if [[ ! $PIDS ]]; then
    if [[ $(listening) ]]; then fail port "$PORT is held by a process that this user cannot see"
    else fail port "nobody listens on $PORT: the server is stopped"
    fi
    return
  fi
  for pid in $PIDS; do
    pass process "$pid, $(memory_of "$pid") MB, up $(age_of "$pid") s: $(command_of "$pid")"
    [[ $(readlink "/proc/$pid/cwd") == "$APP_DIR" ]] ||
      fail port "$PORT is held by process $pid, which runs from $(readlink "/proc/$pid/cwd"), not from $APP_DIR"
  done
}

check_address() {
  local where; where=$(listening | head -n 1)
  [[ $where ]] || return 0
  case ${where%%:*} in
    0100007F) hint address "127.0.0.1 only: not to be reached from outside but through a proxy (HOST)" ;;
    *) pass address "listens on ${PORT} for other machines too" ;;
  esac
}

field() { sed -nE "s/.*\"$1\": *\"?([^\",}]*)\"?.*/\1/p" <<<"$2"; }

check_health() {
  local health name
  health=$(curl -sS --noproxy '*' --max-time 10 "$BASE_URL/health" 2>&1)
  if [[ $(field status "$health") == healthy ]]; then pass health healthy
  else fail health "$(field message "$health" | grep . || head -c 300 <<<"$health")"
  fi
  for name in release engine model uptime_s; do
    if [[ $(field "$name" "$health") ]]; then pass "$name" "$(field "$name" "$health")"; fi
  done
  check_running "$(field release "$health")"
}

# Whether what runs is what lies in the folder.
check_running() {
  local lies; lies=$(sha256sum 2>/dev/null <"$APP_DIR/release.sha256" | cut -c1-12)
  [[ ! $1 || ! $lies || $1 == "$lies" ]] ||
    hint running "release $1, and $lies lies in $APP_DIR: deploy_openai_api.sh restart takes that"
} 2>/dev/null

check_voices() {
  local count
  count=$(curl -sS --noproxy '*' --max-time 10 "$BASE_URL/v1/audio/voices" 2>/dev/null | grep -o '"id": *"' | wc -l)
  if ((count >= 11)); then pass voices "$count"; else fail voices "$count, want 11"; fi
}

# Files that were edited since they were deployed, and a deploy that was interrupted.
check_release() {
  local changed
  if [[ -s $APP_DIR/run/unfinished ]]; then
    fail deploy "under way or interrupted: deploy again, or start to put the previous release back"
  fi
  [[ -f $APP_DIR/release.sha256 ]] || { hint files "no release was deployed to $APP_DIR"; return; }
  changed=$(cd "$APP_DIR" && sha256sum --check --quiet release.sha256 2>/dev/null | sed 's/: .*//' | xargs)
  if [[ $changed ]]; then hint files "edited since they were deployed: $changed"
  else pass files "as they were deployed"
  fi
}

check_settings() {
  local name line=''
  for name in PYTHON HOST PORT UNIT TTS_ENGINE TTS_MODEL TTS_MODEL_DIR TTS_GPU_MEMORY_UTILIZATION; do
    if [[ $(setting "$name") ]]; then line+="$name=$(setting "$name") "; fi
  done
  pass settings "$line$(if [[ $(setting 'TTS_API_KEYS\(_FILE\)\?') ]]; then echo "(asks for keys)"; else echo "(open to all)"; fi)"
}

check_gpu() {
  local gpu line fields=name,memory.used,memory.total,utilization.gpu
  gpu=$(nvidia-smi --query-gpu="$fields" --format=csv,noheader 2>/dev/null) || { hint gpu none; return; }
  while IFS= read -r line; do pass gpu "$line busy"; done <<<"$gpu"
}

check_reference_audio() {
  local number missing=''
  for number in {01..11}; do
    [[ -s $APP_DIR/examples/voice_$number.wav ]] || missing+=" voice_$number.wav"
  done
  if [[ $missing ]]; then fail reference_audio "missing in $APP_DIR/examples:$missing"
  else pass reference_audio "all 11 files"
  fi
}

check_weights() {
  local folder; folder=$(setting TTS_MODEL_DIR)
  folder=${folder:-checkpoints/IndexTTS-2-vLLM}
  [[ $folder == /* ]] || folder=$APP_DIR/$folder
  if [[ -d $folder ]]; then pass weights "$(du -shL "$folder" 2>/dev/null | cut -f1) in $folder"
  elif [[ $(setting TTS_ENGINE) == indextts ]]; then fail weights "there is no $folder (TTS_MODEL_DIR)"
  else hint weights "none in $folder"
  fi
}

check_disk() {
  local free; free=$(df -Pm -- "$APP_DIR" 2>/dev/null | awk 'END {print $4}')
  if ((${free:-0} >= MIN_DISK_MB)); then pass disk "$free MB free"; else fail disk "${free:-?} MB free in $APP_DIR"; fi
}

check_log() {
  local line errors pattern='\b(ERROR|CRITICAL)\b|^[A-Za-z.]*(Error|Exception):'
  [[ -r $LOG ]] || { hint log "there is no $LOG"; return; }
  errors=$(tail -n "$LOG_LINES" "$LOG" | grep -aE "$pattern" | tail -n "$ERRORS_SHOWN")
  [[ $errors ]] || { pass log "no errors in the last $LOG_LINES lines of $LOG"; return; }
  while IFS= read -r line; do hint log "${line:0:300}"; done <<<"$errors"
}

check_backups() {
  local names newest; names=$(cd "$APP_DIR/backups" 2>/dev/null && printf '%s\n' *.backup.* | grep -vF '*')
  newest=$(awk -F. '{print $NF}' <<<"$names" | sort | tail -n 1)
  if [[ $names ]]; then pass backups "$(wc -l <<<"$names"), the newest $newest"; else hint backups none; fi
}

check_proxy() {
  local files
  files=$(grep -rlsE "(127\.0\.0\.1|localhost):$PORT\b" /etc/nginx | xargs)
  if [[ $files ]]; then pass nginx "in front: $files"; else hint nginx "none here passes requests to $PORT"; fi
}

check_outside() {
  local answer
  [[ ${PUBLIC_URL:-} ]] || return 0
  answer=$(curl -sS --max-time 15 "${PUBLIC_URL%/}/health" 2>&1)
  if [[ $(field status "$answer") == healthy ]]; then
    pass public_url "$PUBLIC_URL answers: release $(field release "$answer")"
  else fail public_url "$PUBLIC_URL: $(head -c 300 <<<"$answer" | head -n 1)"
  fi
}

run_checks() {
  check_processes
  check_address
  if [[ $PIDS ]]; then check_health; check_voices; fi
  check_settings
  check_release
  check_gpu
  check_reference_audio
  check_weights
  check_disk
  check_log
  check_backups
  check_proxy
  check_outside
}

print_json() {
  local IFS=,
  printf '{"ok": %s, "checks": [%s]}\n' "$(if ((FAILURES)); then echo false; else echo true; fi)" "${CHECKS[*]}"
}

main() {
  case ${1:-} in
    '') ;;
    -j|--json) JSON=1 ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; die "$EXIT_USAGE" "unknown argument: $1" ;;
  esac
  load_config
  ((JSON)) || printf 'Speech server in %s, port %s\n' "$APP_DIR" "$PORT"
  run_checks
  if ((JSON)); then print_json
  elif ((FAILURES)); then echo "$FAILURES of these stop it from speaking"
  else echo "nothing stops it from speaking"
  fi
  ((FAILURES == 0)) || exit "$EXIT_WRONG"
}

main "$@"
