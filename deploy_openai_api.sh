#!/usr/bin/env bash

# In here and not a comment: piped into bash, a script cannot read itself.
usage() {
  cat <<'HELP'
Put this release of the speech server into service: back up, install, restart, verify; or go back.

Usage: deploy_openai_api.sh [ACTION] [options]

  deploy                  put the release beside this script into service (the default action)
  rollback [TIMESTAMP]    put a backup back into service, the newest by default; a second rollback undoes the first
  restart, stop, start    the server as it is installed
  status                  what is running
  backups                 list the backups
  pack                    write deploy_openai.sh, everything in one file: ssh HOST bash -s < deploy_openai.sh

  -n, --dry-run           with deploy: the preflight checks only; change nothing
  -s, --source DIR        the folder of the new release
  -o, --output FILE       where pack writes
      --ssh USER@HOST     do it on that machine; settings given here go along, with paths of that machine
  -p, --ssh-port PORT     sshd's port there
  -h, --help              show this help

Settings, from the environment. Those with a * are remembered in APP_DIR/server.env, which the server gets too,
together with TTS_*, CUDA_*, HF_*, VLLM_* and LD_LIBRARY_PATH; give one again, or empty, to change it:

  APP_DIR            where the server lives; default /root/index-tts-vllm if it exists
  PYTHON *           its interpreter; default: the running server's, else APP_DIR/.venv, else python3
  HOST *             0.0.0.0, the address to listen on
  PORT *             6006
  UNIT *             a systemd unit that runs the server; default: none, nohup is used
  HEALTH_TIMEOUT_S   300, for a server to load and to speak
  STOP_TIMEOUT_S     30, for running requests to finish before the server is killed
  KEEP_BACKUPS       5; the very first one is always kept
  REQUIREMENTS       the packages; default: requirements-gpu.txt for an engine on a GPU, else requirements.txt
  SSH_COMMAND        ssh; for instance "ssh -i KEYFILE"

With --ssh go along: all of these, TTS_*, CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER, HF_HOME, HF_ENDPOINT, HF_HUB_* and
VLLM_*. What tells of this machine or is its user's own stays here: LD_LIBRARY_PATH, CUDA_HOME, HF_TOKEN ...

Once begun, it goes on when the connection breaks, so also at Ctrl-C with --ssh; else Ctrl-C puts the previous
release back.

Exit status: 0 done; 1 status: not healthy; 2 usage; 3 nothing was changed; 4 the new release failed, the previous
             one is serving; 5 nothing is serving. APP_DIR/logs/deploy.log keeps what was said.
HELP
}

set -euo pipefail

readonly EXIT_UNHEALTHY=1 EXIT_USAGE=2 EXIT_UNCHANGED=3 EXIT_ROLLED_BACK=4 EXIT_DOWN=5

# The release. Of these, reference audio is installed where it is missing and never overwritten; requirements are
# read where they are, as an index-tts-vllm folder has its own; scripts are installed and not rolled back.
readonly RELEASE_FILES=(
  app.py gunicorn.conf.py voices.json assets
  settings.py errors.py files.py voices.py utterances.py scheduling.py audio.py engines.py
  access.py metrics.py openapi.py reference_audio.py reference_store.py audio_decoder.py
  embedded_voice.py embedded_g2p.py embedded_graph.py embedded_openvino.py quiet_onnxruntime.py
  quiet_openvino.py
  vllm_engine.py vllm_plugin.py speech_server.dist-info
  omni_voice.py omni_model.py indextts_voice.py indextts_stages.py
  examples requirements.txt requirements-gpu.txt requirements-build.txt
  deploy_openai_api.sh test_openai_api.sh remote_check.sh
)
readonly NOT_REPLACED='^(examples/|requirements|[^/]*\.sh$)'

readonly OWN_SETTINGS='APP_DIR|HEALTH_TIMEOUT_S|STOP_TIMEOUT_S|KEEP_BACKUPS|REQUIREMENTS'
readonly ENGINE_SETTINGS='CUDA_[A-Z0-9_]+|HF_[A-Z0-9_]+|VLLM_[A-Z0-9_]+|LD_LIBRARY_PATH'
readonly REMEMBERED="PYTHON|HOST|PORT|UNIT|TTS_[A-Z0-9_]+|$ENGINE_SETTINGS"
readonly ENGINE_SENT='CUDA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|HF_HOME|HF_ENDPOINT|HF_HUB_[A-Z0-9_]+|VLLM_[A-Z0-9_]+'
readonly SENT="PYTHON|HOST|PORT|UNIT|TTS_[A-Z0-9_]+|$ENGINE_SENT|$OWN_SETTINGS"  # with --ssh
readonly -A OLDER_OPTIONS=(
  ["--host"]=HOST ["--model_dir"]=TTS_MODEL_DIR ["--is_fp16"]=TTS_FP16
  ["--gpu_memory_utilization"]=TTS_GPU_MEMORY_UTILIZATION
  ["--qwenemo_gpu_memory_utilization"]=TTS_QWENEMO_GPU_MEMORY_UTILIZATION
)
readonly STARTED=(run/started/cmdline run/started/environ run/started/cwd)  # of a server that is not ours

readonly LOG_BYTES=10000000 KEEP_LOGS=5
readonly PACKAGES_MB=1500      # disk for packages, where some are missing
readonly GPU_TIMEOUT_S=30      # for the GPU's memory to come free after the server has ended
readonly FAILED_STOP_S=5       # patience with a new release that failed
readonly PUT_BACK_TIMEOUT_S=300  # patience with the previous one: there is nothing else to wait for
readonly VERIFY_TIMEOUT_S=10   # for the first words, where HEALTH_TIMEOUT_S is all but over

SWITCHING=''  # the backup to put back, while a release is being exchanged
TOLD=''       # die has said why, and with which status
STOPPED=''    # a server was told to end, and none serves in its place yet
FAILURES=0

# Mind `return` without a number: inside on_exit it gives the status from before the exit, whatever the function did.

# === Words ===

die()   { local status=$1; shift; TOLD=1; note "ERROR: $*" >&2; exit "$status"; }
log()   { note "$(date +%H:%M:%S) $*"; }

# Say a line, and keep it; where the connection has broken nobody hears it.
note() {
  printf '%s\n' "$*" || true
  if [[ ${LOG:-} && -d ${LOG%/*} ]]; then printf '%s\n' "$*" >>"$LOG" || true; fi
} 2>/dev/null

pass() { note "  ok    $*"; }
hint() { note "  note  $*"; }
fail() { note "  FAIL  $*"; FAILURES=$((FAILURES + 1)); }

# Run a command every tenth of a second until it succeeds, SECONDS at the most.
wait_until() {
  local deadline=$((SECONDS + $1)); shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.1
  done
}

# === Settings ===

default_app_dir() {
  if [[ -f $SOURCE/release.sha256 || (-d $SOURCE/backups && -d $SOURCE/run) ]]; then echo "$SOURCE"
  elif [[ -d /root/index-tts-vllm ]]; then echo /root/index-tts-vllm
  fi
}

load_config() {
  APP_DIR=${APP_DIR:-$(default_app_dir)}
  [[ $APP_DIR ]] || die "$EXIT_USAGE" "APP_DIR: name the folder to deploy to, as /root/index-tts-vllm does not exist"
  APP_DIR=$(realpath -m -- "$APP_DIR")
  PIDFILE=$APP_DIR/run/server.pid UNFINISHED=$APP_DIR/run/unfinished SWITCHED=$APP_DIR/run/switched STAGED=$APP_DIR/run/staged
  SERVER_LOG=$APP_DIR/logs/server.log
  take_installed_settings
  export PORT=${PORT:-6006}
  HEALTH_TIMEOUT_S=${HEALTH_TIMEOUT_S:-300} STOP_TIMEOUT_S=${STOP_TIMEOUT_S:-30} KEEP_BACKUPS=${KEEP_BACKUPS:-5}
  check_numbers PORT HEALTH_TIMEOUT_S STOP_TIMEOUT_S KEEP_BACKUPS
  load_environment
  check_lines
}

check_numbers() {
  local name
  for name in "$@"; do
    [[ ${!name} =~ ^[1-9][0-9]{0,5}$ ]] || die "$EXIT_USAGE" "$name must be a whole number from 1 on, not '${!name}'"
  done
  ((PORT < 65536)) || die "$EXIT_USAGE" "PORT must be below 65536, not $PORT"
}

# server.env has a line for each.
check_lines() {
  local name
  for name in $(compgen -e | grep -xE "$REMEMBERED"); do
    [[ ${!name} != *$'\n'* ]] || die "$EXIT_USAGE" "$name must be one line"
  done
}

# Where to reach a server that listens on HOST.
base_url() {
  case $HOST in
    0.0.0.0) echo "http://127.0.0.1:$PORT" ;;
    ::) echo "http://[::1]:$PORT" ;;
    *:*) echo "http://[$HOST]:$PORT" ;;
    *) echo "http://$HOST:$PORT" ;;
  esac
}

# Export each NAME=VALUE line of stdin whose name matches, unless the environment has that name.
take_settings() {
  local line
  while IFS= read -r line; do
    if [[ $line =~ ^($1)= && ! -v ${line%%=*} ]]; then export "${line?}"; fi
  done
}

take_installed_settings() {
  if [[ -f $APP_DIR/server.env ]]; then take_settings "$REMEMBERED" < <(unquoted <"$APP_DIR/server.env"); fi
}

# A value as bash and systemd read it alike: plain, or in double quotes.
quoted() {
  if [[ $1 =~ ^[A-Za-z0-9_./:,@%+=-]+$ ]]; then printf '%s\n' "$1"; else LC_ALL=C sed 's/[\\"$`]/\\&/g; s/.*/"&"/' <<<"$1"; fi
}

# The lines of a server.env, one NAME=VALUE each, without quotes and backslashes; it may have been edited by hand.
unquoted() {
  LC_ALL=C sed -E -e 's/[ \t\r]*$//' -e "/^[A-Z0-9_]+='/{s/='/=/; s/'\$//; b}" \
    -e '/^[A-Z0-9_]+="/{s/="/=/; s/"$//; s/\\([\\"$`])/\1/g; b}' -e 's/\\(.)/\1/g'
}

# Use what is installed, and nothing else: the settings of a release that failed must not reach the previous one.
use_installed_settings() {
  local name python=$PYTHON
  [[ -f $APP_DIR/server.env ]] || return 0
  for name in $(compgen -e | grep -xE "$REMEMBERED"); do unset "$name"; done
  take_installed_settings
  export PYTHON=${PYTHON:-$python} HOST=${HOST:-0.0.0.0} PORT=${PORT:-6006} UNIT=${UNIT:-}
}

# Take over from the server that runs from here: the interpreter, what the engine needs of the environment, and
# what an older server was told on its command line.
load_environment() {
  local pid
  if pid=$(server_pid); then
    take_settings "$ENGINE_SETTINGS" < <(tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ")
    is_ours "$pid" || take_settings '[A-Z0-9_]+' < <(older_settings "$pid")
  fi
  PYTHON=${PYTHON:-$(default_python "$pid")}
  PYTHON=$(type -P -- "$PYTHON") || die "$EXIT_USAGE" "PYTHON: there is no such interpreter; name it by its path"
  PYTHON=$(realpath -s -- "$PYTHON")  # a venv's interpreter is a link that has to stay one
  export PYTHON HOST=${HOST:-0.0.0.0} UNIT=${UNIT:-}
}

# The options of an older api_server_v2.py as settings, one NAME=VALUE a line.
older_settings() {
  local words index name
  mapfile -d '' -t words <"/proc/$1/cmdline"
  for index in "${!words[@]}"; do
    name=${OLDER_OPTIONS[${words[index]%%=*}]:-}
    case ${words[index]} in
      --is_fp16) echo "$name=true" ;;
      --*=*) [[ ! $name ]] || echo "$name=${words[index]#*=}" ;;
      --*) [[ ! $name ]] || echo "$name=${words[index + 1]:-}" ;;
    esac
  done
}

default_python() {
  local candidate
  for candidate in "$(interpreter_of "$1")" "$APP_DIR/.venv/bin/python"; do
    if [[ -x $candidate ]]; then echo "$candidate"; return 0; fi
  done
  echo python3
}

# The interpreter of a running process, as it was called.
interpreter_of() {
  local command path
  [[ $1 ]] || return 0
  IFS= read -r -d '' command <"/proc/$1/cmdline" || return 0
  [[ ${command##*/} == python* ]] || return 0
  path=$(tr '\0' '\n' <"/proc/$1/environ" | sed -n 's/^PATH=//p')
  (cd "/proc/$1/cwd" && cd -P . && realpath -s -- "$(PATH=$path type -P -- "$command")") || true
}

# Print the settings to remember, one NAME=VALUE a line.
settings() {
  local name
  for name in $(compgen -e | grep -xE "$1" | sort); do
    if [[ ${!name} ]]; then printf '%s=%s\n' "$name" "$(quoted "${!name}")"; fi
  done
}

# === Processes ===

# The sockets that listen on PORT, by inode.
listening_sockets() {
  local port; printf -v port ':%04X$' "$PORT"
  cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk -v port="$port" '$2 ~ port && $4 == "0A" {print $10}'
}

# The processes that listen on PORT, as far as this user may see them.
port_pids() {
  local socket
  for socket in $(listening_sockets); do
    find /proc/[0-9]*/fd -lname "socket:\[$socket\]" 2>/dev/null || true
  done | cut -d/ -f3 | sort -nu
}

status_field() { awk -v name="$2:" '$1 == name {print $2}' "/proc/$1/status" 2>/dev/null || true; }
born()         { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }  # clock ticks since boot
command_of()   { tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null || true; }
shown()        { command_of "$1" | sed -E 's/((key|token|secret|password)[= ])[^ ]+/\1***/Ig'; }
is_ours()      { [[ $(command_of "$1") == *gunicorn*app:create_app* ]]; }
runs_here()    { [[ $(readlink "/proc/$1/cwd") == "$APP_DIR" || $(program_of "$1") == *$'\n'"$APP_DIR/"* ]]; }

# The interpreter and the script of a process, each after a line's end.
program_of() {
  local words word
  mapfile -d '' -t words 2>/dev/null <"/proc/$1/cmdline" || return 0
  for word in "${words[@]:1}"; do
    [[ $word == -* ]] || break
  done
  printf '\n%s' "${words[0]:-}" "${word:-}"
}

# Whether these processes, each "PID BORN", have ended; their numbers may belong to others by now.
all_gone() {
  local process
  for process in "$@"; do
    if is_running "${process% *}" "${process#* }"; then return 1; fi
  done
}

is_running() { [[ $2 && $2 == "$(born "$1")" && $(status_field "$1" State) != [ZX]* ]]; }

# Kill those of these processes, each "PID BORN", that are still there.
kill_left() {
  local process
  for process in "$@"; do
    if is_running "${process% *}" "${process#* }"; then kill -KILL "${process% *}" 2>/dev/null || true; fi
  done
}

# The server of this folder: the process of the pid file, else the one that listens on PORT and runs from here.
server_pid() {
  local pid ticks parent
  if read -r pid ticks 2>/dev/null <"$PIDFILE" && is_running "$pid" "$ticks"; then
    echo "$pid"
    return 0
  fi
  for pid in $(port_pids); do
    runs_here "$pid" || continue
    parent=$(status_field "$pid" PPid)
    if is_ours "$pid" && is_ours "$parent"; then pid=$parent; fi  # gunicorn's worker listens too
    echo "$pid"
    return 0
  done
  return 1
}

# A process, its descendants, and its process group where it leads one, each as "PID BORN".
family() {
  cat /proc/[0-9]*/stat 2>/dev/null | sed 's/ (.*) / - /' | awk -v root="$1" '
    { parent[$1] = $4; group[$1] = $5; born[$1] = $22 }
    END {
      for (pid in parent) {
        for (up = pid; up > 1 && up != root; up = parent[up]);
        if (up == root || group[pid] == root) print pid, born[pid]
      }
    }'
}

# Let running requests finish, then end the server and whatever is left of it: an engine process that outlives
# its server keeps the GPU's memory.
stop_server() {
  local patience=${1:-$STOP_TIMEOUT_S} pid server members
  pid=$(server_pid) || return 0
  server="$pid $(born "$pid")" STOPPED=1
  mapfile -t members < <(family "$pid")
  log "stopping process $pid; running requests have $patience s"
  if unit_is_active; then systemctl stop --no-block "$UNIT"; else kill -TERM "$pid" 2>/dev/null || true; fi
  wait_until "$patience" all_gone "$server" || log "still there after $patience s: killing it"
  kill_left "${members[@]}"
  wait_until 10 all_gone "${members[@]}" || die "$EXIT_DOWN" "process $pid cannot be killed"
  rm -f "$PIDFILE"
}

is_alive()       { if [[ $UNIT ]]; then unit_is_active; else server_pid >/dev/null; fi; }
unit_is_active() { [[ $UNIT ]] && systemctl is-active --quiet "$UNIT"; }

# Start what is installed so that it outlives this session. 9<&-: the server must not hold the lock.
start_server() {
  rotate_logs
  if [[ $UNIT && ! -e $APP_DIR/${STARTED[0]} ]]; then systemctl start "$UNIT" 9<&-; return 0; fi
  if [[ -e $APP_DIR/${STARTED[0]} ]]; then run_as_it_was; else run_gunicorn; fi \
    >>"$SERVER_LOG" 2>&1 </dev/null 9<&- &
  echo "$! $(born $!)" >"$PIDFILE"
  log "started process $!"
}

run_gunicorn() {
  cd "$APP_DIR"
  export PATH=${PYTHON%/*}:$PATH PYTHONUNBUFFERED=1
  in_own_session "$PYTHON" -m gunicorn -c gunicorn.conf.py 'app:create_app()'
}

# Become a command in a session of its own, where a Ctrl-C here does not reach it. Until then the signals that this
# script ignores stay ignored; then they mean again what they do, which neither bash nor setsid can bring about.
in_own_session() {
  exec nohup "$PYTHON" -ISc '
import os, signal, sys
os.setsid()
for name in "SIGINT", "SIGTERM", "SIGQUIT", "SIGPIPE", "SIGXFSZ":
    signal.signal(signal.Signals[name], signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])' "$@"
}

# Start a server that is not ours the way it had been started.
run_as_it_was() {
  local environment command
  mapfile -d '' -t environment <"$APP_DIR/run/started/environ"
  mapfile -d '' -t command <"$APP_DIR/run/started/cmdline"
  cd "$(<"$APP_DIR/run/started/cwd")"
  in_own_session env -i "${environment[@]}" "${command[@]}"
}

# Begin a new log once this one is large; see deploy/logrotate.conf for a server that runs for months.
rotate_logs() {
  local number
  [[ $(stat -c %s "$SERVER_LOG" 2>/dev/null || echo 0) -ge $LOG_BYTES ]] || return 0
  for ((number = KEEP_LOGS - 1; number > 0; number--)); do
    if [[ -e $SERVER_LOG.$number ]]; then mv -f "$SERVER_LOG.$number" "$SERVER_LOG.$((number + 1))"; fi
  done
  mv -f "$SERVER_LOG" "$SERVER_LOG.1"
}

# === GPU ===

has_gpu() { [[ ${TTS_ENGINE:-auto} != embedded ]] && nvidia-smi -L >/dev/null 2>&1; }

# A figure of the GPU that the server will use, in MiB.
gpu() {
  local index=${CUDA_VISIBLE_DEVICES:-0}
  nvidia-smi -i "${index%%,*}" --query-gpu="memory.$1" --format=csv,noheader,nounits | head -n 1
}

# What the settings give to vLLM, in MiB.
gpu_need() {
  awk -v total="$(gpu total)" -v share="${TTS_GPU_MEMORY_UTILIZATION:-0.25}" \
    -v emotion="${TTS_QWENEMO_GPU_MEMORY_UTILIZATION:-0.10}" 'BEGIN {print int(total * (share + emotion))}'
}

gpu_has_room() { (($(gpu free) >= $(gpu_need))); }

await_gpu_memory() {
  has_gpu || return 0
  wait_until "$GPU_TIMEOUT_S" gpu_has_room ||
    die "$EXIT_DOWN" "$(gpu free) MiB of GPU memory are free, $(gpu_need) are needed"
  log "$(gpu free) MiB of GPU memory are free"
}

# === Preflight: changes nothing ===

preflight() {
  local name
  note "Settings:"
  for name in APP_DIR PYTHON HOST PORT UNIT HEALTH_TIMEOUT_S STOP_TIMEOUT_S KEEP_BACKUPS; do
    note "  $name=${!name}"
  done
  note "Preflight:"
  check_release
  check_folder
  check_edits
  check_python
  check_gpu
  check_port
  check_weights
  check_reference_audio
  ((FAILURES == 0)) || die "$EXIT_UNCHANGED" "$FAILURES of these checks failed; nothing was changed"
}

check_release() {
  local file command
  [[ $SOURCE != "${APP_DIR:-}" ]] || fail "$SOURCE is APP_DIR: put the new release into a folder of its own"
  for command in curl flock nohup sha256sum tar realpath; do
    type -P "$command" >/dev/null || fail "the command $command is missing"
  done
  for file in "${RELEASE_FILES[@]}"; do
    [[ -e $SOURCE/$file ]] || fail "the release is not whole: $SOURCE/$file is missing"
  done
  ((FAILURES == 0)) || die "$EXIT_UNCHANGED" "nothing was changed"
  pass "release $(manifest "$SOURCE" | release_id) in $SOURCE"
}

check_folder() {
  local need free place=$APP_DIR
  until [[ -e $place ]]; do place=$(dirname -- "$place"); done
  [[ -d $place ]] || { fail "$place is no folder"; return 0; }
  [[ -w $place ]] || fail "$place cannot be written to"
  need=$(cd "$SOURCE" && du -sk -- "${RELEASE_FILES[@]}" | awk '{sum += $1} END {print int(sum / 1024 * 3) + 5}')
  free=$(df -Pm -- "$place" | awk 'END {print $4}')
  if ((free >= need)); then pass "disk: $free MB free"; else fail "disk: $free MB free in $place, $need are needed"; fi
  [[ ! -e $UNFINISHED ]] || hint "an earlier deploy was interrupted; $(<"$UNFINISHED") will be put back first"
}

check_edits() {
  local edited
  [[ -f $APP_DIR/release.sha256 ]] || return 0
  edited=$(cd "$APP_DIR" && sha256sum --check --quiet release.sha256 2>/dev/null | sed 's/: .*//' | xargs) || true
  [[ ! $edited ]] || hint "edited here since the last deploy, to be replaced and kept in the backup: $edited"
}

check_python() {
  local missing name
  if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    fail "$PYTHON is older than Python 3.11"
    return 0
  fi
  pass "$("$PYTHON" --version) at $PYTHON"
  name=$(basename -- "$(requirements)")
  missing=$(missing_packages "$(requirements)" 2>&1) || { fail "packages: $missing"; return 0; }
  missing=$(grep -c . <<<"$missing" || true)
  if ((missing == 0)); then
    pass "packages: all of $name are there"
    check_import "$SOURCE"
  else
    hint "packages: $missing of $name are to be installed; those that are there stay as they are"
    check_room_for_packages
  fi
}

check_room_for_packages() {
  local folder free
  folder=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  free=$(df -Pm -- "$folder" | awk 'END {print $4}')
  [[ -w $folder ]] || fail "packages: $folder cannot be written to; name an interpreter of your own with PYTHON"
  ((free >= PACKAGES_MB)) || fail "packages: $free MB free in $folder, $PACKAGES_MB are needed"
}

check_import() {
  local told
  if told=$(built_from "$1" 2>&1); then pass "${told##*$'\n'}"
  else fail "app.py cannot be imported: ${told##*$'\n'}"
  fi
}

# Build the app from a folder, without loading an engine: its settings, its voices and the engine it chooses.
# It is built in APP_DIR, where it will serve: settings may name files there.
built_from() {
  cd "$APP_DIR" 2>/dev/null || cd "$1" || return 1
  export TTS_INDEXTTS_DIR=${TTS_INDEXTTS_DIR:-$APP_DIR} PYTHONDONTWRITEBYTECODE=1
  timeout 120 "$PYTHON" -P -c '
import sys
sys.path.insert(0, sys.argv[1])  # PYTHONPATH would part a folder at its colon
import app
speech = app.create_app().extensions["speech"]
print(f"app.py: engine {speech.engine.name}, {len(speech.voices.voices)} voices")' "$1"
}

check_gpu() {
  if ! has_gpu; then hint "GPU: none in use; the embedded voice will speak"; return 0; fi
  local free need; free=$(gpu free) need=$(gpu_need)
  if ((free >= need)); then
    pass "GPU: $free of $(gpu total) MiB are free, $need are needed"
  elif server_pid >/dev/null; then
    hint "GPU: $free MiB are free, $need are needed; the running server will free its share"
  else
    fail "GPU: $free MiB are free, $need are needed: end what uses it, or lower TTS_GPU_MEMORY_UTILIZATION"
  fi
}

check_port() {
  local pid
  pid=$(server_pid) && pass "running from here: process $pid, $(shown "$pid")"
  if [[ ! $(listening_sockets) ]]; then pass "port $PORT is free"
  elif ! listens; then fail "port $PORT is $(port_state)"
  fi
}

port_state() {
  local pids
  [[ $(listening_sockets) ]] || { echo free; return 0; }
  read -r -a pids < <(port_pids | xargs)
  if ((${#pids[@]} == 0)); then echo "taken by a process that this user cannot see"; return 0; fi
  echo "taken by process ${pids[0]}, which does not run from $APP_DIR: $(shown "${pids[0]}")"
}

# The folder and the weights of an engine that is named or that lies here.
check_weights() {
  local weights=${TTS_MODEL_DIR:-checkpoints/IndexTTS-2-vLLM} found=hint
  if [[ ${TTS_ENGINE:-auto} == indextts ]]; then found=fail; elif ! has_gpu; then return 0; fi
  if [[ ${TTS_MODEL:-} == /* && ! -d $TTS_MODEL ]]; then fail "TTS_MODEL: there is no folder $TTS_MODEL"; fi
  [[ ${TTS_ENGINE:-auto} =~ ^(auto|indextts)$ ]] || return 0
  cd "${TTS_INDEXTTS_DIR:-$APP_DIR}" 2>/dev/null || return 0
  if [[ ! -f indextts/infer_vllm_v2.py ]]; then "$found" "engine: $PWD has no indextts/infer_vllm_v2.py"
  elif [[ ! -f $weights/config.yaml ]]; then "$found" "engine: no config.yaml in $weights (TTS_MODEL_DIR)"
  else pass "engine: indextts/infer_vllm_v2.py and $(du -shL "$weights" | cut -f1) of weights in $weights"
  fi
  cd "$OLDPWD"
}

check_reference_audio() {
  local file missing=0
  for file in "$SOURCE"/examples/voice_*.wav; do
    [[ -e $APP_DIR/examples/${file##*/} ]] || missing=$((missing + 1))
  done
  pass "reference audio: $missing of 11 files are to be installed, the others stay as they are"
}

# === Packages ===

requirements() {
  if [[ ${REQUIREMENTS:-} ]]; then echo "$REQUIREMENTS"
  elif has_gpu && has_engine; then echo "$SOURCE/requirements-gpu.txt"
  else echo "$SOURCE/requirements.txt"
  fi
}

# Whether an engine for the GPU is named or lies in the folder.
has_engine() {
  [[ ${TTS_ENGINE:-auto} =~ ^(omni|indextts)$ || ${TTS_MODEL:-} || -d ${TTS_INDEXTTS_DIR:-$APP_DIR}/indextts ]]
}

# Print the entries, hashes included, whose package is not installed at all.
missing_packages() {
  "$PYTHON" - "$1" <<'PYTHON'
import re
import sys
from importlib import metadata

try:
    from pip._vendor.packaging.requirements import Requirement
except ImportError:
    sys.exit(f"{sys.executable} has no pip: run {sys.executable} -m ensurepip")
for entry in open(sys.argv[1], encoding="utf-8").read().replace("\\\n", " ").splitlines():
    if not (spec := re.split(r"\s#|^#|\s--", entry.strip())[0]) or spec.startswith("-"):
        continue
    required = Requirement(spec)
    if required.marker and not required.marker.evaluate():
        continue
    try:
        metadata.version(required.name)
    except metadata.PackageNotFoundError:
        print(entry)
PYTHON
}

installed_packages() {
  "$PYTHON" -c '
from importlib import metadata
print(*sorted({d.metadata["Name"] + "==" + d.version for d in metadata.distributions()}), sep="\n")'
}

# Install what is missing. What is there is held at its version: pip fails, and changes nothing, where that cannot be.
install_packages() {
  local file missing=$APP_DIR/run/missing.txt
  for file in "$SOURCE/requirements-build.txt" "$(requirements)"; do
    missing_packages "$file" >"$missing"
    [[ -s $missing ]] || continue
    log "installing $(wc -l <"$missing") packages of $(basename -- "$file")"
    pip_install "$missing" ||
      die "$EXIT_UNCHANGED" "pip could not install them and leave those alone that are there: see $LOG"
  done
}

# Locked entries come as wheels with these hashes; jieba, pure Python, is the one that has none.
pip_install() {
  local options=()
  installed_packages >"$APP_DIR/run/constraints.txt" || return 1
  if grep -q -- --hash= "$1"; then options=(--only-binary :all: --no-binary jieba --no-build-isolation); fi
  "$PYTHON" -m pip --disable-pip-version-check install "${options[@]}" -c "$APP_DIR/run/constraints.txt" -r "$1" \
    >>"$LOG" 2>&1 </dev/null
}

# === Releases ===

# The release's files, one path a line.
release_paths() {
  (cd "$1" && find "${RELEASE_FILES[@]}" -type f ! -path '*/__pycache__/*' ! -path 'examples/*.py') | LC_ALL=C sort
}

replaced_paths() { release_paths "$1" | grep -Ev "$NOT_REPLACED"; }
manifest()       { (cd "$1" && replaced_paths . | tr '\n' '\0' | xargs -0 sha256sum); }
release_id()     { sha256sum | cut -c1-12; }

# What /health will show as the release of a folder; nothing for a server that is not ours.
release_of() {
  local file
  for file in "$1/release.sha256" "$1/app.py"; do
    if [[ ! -e $1/${STARTED[0]} && -f $file ]]; then release_id <"$file"; return 0; fi
  done
}

# Copy the new release to the disk it will serve from, and check the copy.
stage() {
  local path
  rm -rf -- "$STAGED"
  release_paths "$SOURCE" | while IFS= read -r path; do
    mkdir -p -- "$STAGED/$(dirname -- "$path")" && cp -- "$SOURCE/$path" "$STAGED/$path"
  done || die "$EXIT_UNCHANGED" "$SOURCE cannot be copied to $STAGED; nothing was changed"
  manifest "$SOURCE" >"$STAGED/release.sha256"
  (cd "$STAGED" && sha256sum --check --quiet release.sha256) || die "$EXIT_UNCHANGED" "the copy in $STAGED is not right"
  (umask 077 && settings "$REMEMBERED" >"$STAGED/server.env")
  check_import "$STAGED"
  ((FAILURES == 0)) || die "$EXIT_UNCHANGED" "nothing was changed"
}

# Put the files that no rollback touches in their places.
install_extras() {
  local path
  mkdir -p "$APP_DIR/examples"
  release_paths "$STAGED" | while IFS= read -r path; do
    case $path in
      examples/*) [[ -e $APP_DIR/$path ]] || put "$STAGED/$path" "$APP_DIR/$path" ;;
      *.sh) chmod 755 "$STAGED/$path" && put "$STAGED/$path" "$APP_DIR/$path" ;;
    esac
  done
}

# Copy a file into its place in one step: whoever reads it finds the old or the new one.
put() {
  mkdir -p -- "$(dirname -- "$2")"
  if ! cp -p -- "$1" "$2.new" || ! mv -f -- "$2.new" "$2"; then rm -f -- "$2.new"; return 1; fi
}

# Give each path that is exchanged the file of this folder, or none where it has none.
install_from() {
  local path
  while IFS= read -r path; do
    if [[ -e $1/$path ]]; then put "$1/$path" "$APP_DIR/$path" || return 1; else take_away "$path"; fi
  done <"$2/replaced.txt"
}

# Remove a file of APP_DIR, and the folders that are empty without it.
take_away() {
  [[ -e $APP_DIR/$1 ]] || return 0
  rm -f -- "$APP_DIR/$1"
  if [[ $1 == */* ]]; then (cd "$APP_DIR" && rmdir -p --ignore-fail-on-non-empty -- "${1%/*}"); fi
}

# Keep what DIR will replace, and how the running server was started; set BACKUP to the folder with it.
backup() {
  local pid name staging=$APP_DIR/run/backup
  rm -rf -- "$staging" && mkdir -p "$staging" "$APP_DIR/backups" && chmod 700 "$staging"
  exchanged_paths "$1" >"$staging/replaced.txt"
  keep_files "$staging"
  if pid=$(server_pid) && ! is_ours "$pid"; then keep_start "$pid" "$staging"; fi
  name=$APP_DIR/backups/$(program "$staging").backup
  BACKUP=$name.$(date +%Y%m%dT%H%M%S)
  while [[ -e $BACKUP ]]; do # made within this very second, by a deploy that was killed
    sleep 0.1
    BACKUP=$name.$(date +%Y%m%dT%H%M%S)
  done
  mv -- "$staging" "$BACKUP"
  log "backup: $BACKUP"
}

# All that a switch to DIR puts in or takes away.
exchanged_paths() {
  {
    (cd "$1" && find . -type f ! -name replaced.txt -printf '%P\n' | grep -Ev "$NOT_REPLACED") || true
    sed 's/^[0-9a-f]*  //' "$APP_DIR/release.sha256" 2>/dev/null || true
    printf '%s\n' release.sha256 server.env "${STARTED[@]}"
  } | sort -u
}

keep_files() {
  local path
  while IFS= read -r path; do
    if [[ -e $APP_DIR/$path ]]; then put "$APP_DIR/$path" "$1/$path"; fi
  done <"$1/replaced.txt"
}

# Keep how a server that is not ours was started, and its program. Its environment may hold secrets: owner only.
keep_start() {
  local name
  keep_command "$1" "$2"
  if [[ ! -f $APP_DIR/server.env ]]; then (umask 077 && settings "HOST|PORT" >"$2/server.env"); fi
  name=$(program "$2")
  if [[ -f $APP_DIR/$name ]]; then cp -p -- "$APP_DIR/$name" "$2/$name"; fi
}

keep_command() {
  local name
  mkdir -p "$2/run/started"
  for name in cmdline environ; do (umask 077 && cat "/proc/$1/$name" >"$2/run/started/$name"); done
  readlink "/proc/$1/cwd" >"$2/run/started/cwd"
}

# The file that a backup's server is made of.
program() {
  local words word
  if [[ -e $1/${STARTED[0]} ]]; then
    mapfile -d '' -t words <"$1/${STARTED[0]}"
    for word in "${words[@]##*/}"; do
      if [[ $word == *.py ]]; then echo "$word"; return 0; fi
    done
    echo server
  elif [[ -e $1/app.py ]]; then echo app.py
  else echo nothing
  fi
}

# Exchange what is here for the release or backup in a folder; on_exit puts the backup back if that fails anywhere.
switch_to() {
  backup "$1"
  rm -f "$SWITCHED"
  echo "$BACKUP" >"$UNFINISHED"
  SWITCHING=$BACKUP
  stop_server
  touch "$SWITCHED"  # what runs from now on is the new release
  await_gpu_memory
  install_from "$1" "$BACKUP"
  start_checked "$1" || exit "$EXIT_DOWN"
  trap '' INT TERM  # it serves; what is left is tidying up
  SWITCHING=''
  rm -f "$UNFINISHED" "$SWITCHED"
}

# Start what is installed from DIR, and see that it serves.
start_checked() {
  local release; release=$(release_of "$1")
  use_installed_settings
  DEADLINE=$((SECONDS + HEALTH_TIMEOUT_S))
  start_server
  if [[ $release ]]; then wait_healthy "$release" && verify; else wait_answering; fi || return 1
  STOPPED=''
}

put_back() {
  log "putting back $SWITCHING; this cannot be interrupted"
  rm -rf -- "$STAGED"  # which makes room on a full disk
  stop_server "$FAILED_STOP_S"
  install_from "$SWITCHING" "$SWITCHING" || return 1
  rm -f "$UNFINISHED"
  if [[ $(program "$SWITCHING") == nothing ]]; then log "there was no server before"; return 1; fi
  HEALTH_TIMEOUT_S=$((HEALTH_TIMEOUT_S > PUT_BACK_TIMEOUT_S ? HEALTH_TIMEOUT_S : PUT_BACK_TIMEOUT_S))
  start_checked "$SWITCHING"
}

# Whatever went wrong, and wherever: nothing half done stays.
on_exit() {
  local status=$?
  trap - EXIT
  trap '' INT TERM  # and not a handler, or they would end the commands that this runs
  if [[ $SWITCHING ]]; then
    tail -n 20 "$SERVER_LOG" 2>/dev/null | sed 's/^/  | /' >&2 || true
    if put_back; then status=$EXIT_ROLLED_BACK; note "ERROR: that failed; $SWITCHING is serving again" >&2
    else status=$EXIT_DOWN; note "ERROR: that failed, and nothing is known to serve; see $SERVER_LOG" >&2
    fi
  fi
  if ((status)) && [[ ! $TOLD && ! $SWITCHING ]]; then status=$EXIT_UNCHANGED; fi
  if [[ $STOPPED ]] && ((status == EXIT_UNCHANGED)); then
    status=$EXIT_DOWN; note "ERROR: nothing is known to serve; start it, or see status" >&2
  fi
  exit "$status"
}

# Put back what an interrupted deploy left half done; the action then goes on from there.
recover() {
  local interrupted
  [[ -s $UNFINISHED ]] || return 0
  interrupted=$(<"$UNFINISHED")
  log "an earlier deploy was interrupted; putting the files of $interrupted back"
  if [[ -e $SWITCHED ]]; then stop_server "$FAILED_STOP_S"; fi  # it never came to be verified
  if [[ -f $interrupted/replaced.txt ]]; then install_from "$interrupted" "$interrupted"; fi
  rm -f "$UNFINISHED" "$SWITCHED"
}

prune_backups() {
  local old
  list_backups | head -n "-$KEEP_BACKUPS" | tail -n +2 | while IFS= read -r old; do
    rm -rf -- "${APP_DIR:?}/backups/$old"
  done
}

# The backups' names, oldest first.
list_backups() {
  find "$APP_DIR/backups" -mindepth 1 -maxdepth 1 -name '*.backup.*' -printf '%f\n' 2>/dev/null |
    awk -F '[.]backup[.]' '{print $NF "\t" $0}' | sort | cut -f2- || true
}

# === Health ===

ask() { curl -sS --noproxy '*' --max-time 5 "$@"; }

# Poll /health to DEADLINE until it shows this release as healthy; show its progress.
wait_healthy() {
  local health told='' shown=$SECONDS
  while ((SECONDS < DEADLINE)); do
    health=$(ask "$(base_url)/health" 2>/dev/null) || health=''
    if [[ $health == *'"release":"'"$1"'"'* ]]; then
      if [[ $health == *'"status":"healthy"'* ]]; then log "healthy: release $1"; return 0; fi
      if [[ $health == *'"status":"unhealthy"'* ]]; then log "unhealthy: $(message "$health")"; return 1; fi
    fi
    if ! is_alive; then log "the server has ended"; return 1; fi
    told=$(message "$health")
    if ((SECONDS >= shown + 5)); then
      log "waiting: ${told:-no answer yet} ($((DEADLINE - SECONDS)) s left)"
      shown=$SECONDS
    fi
    sleep 0.2
  done
  log "not healthy after $HEALTH_TIMEOUT_S s: ${told:-no answer}"
  return 1
}

message() { field message "$1"; }
field()   { sed -n 's/.*"'"$1"'": *"\([^"]*\)".*/\1/p' <<<"$2"; }

# A server that is not ours: it answers, whatever it says.
wait_answering() {
  local shown=$SECONDS
  until listens && answering; do
    is_alive || { log "the server has ended"; return 1; }
    ((SECONDS < DEADLINE)) || { log "no answer by the deadline"; return 1; }
    if ((SECONDS >= shown + 5)); then log "waiting: no answer yet ($((DEADLINE - SECONDS)) s left)"; shown=$SECONDS; fi
    sleep 0.1
  done
  log "it answers"
}

# Whether it is the server of this folder that listens on PORT, not a stranger.
listens() {
  local pid
  pid=$(server_pid) && port_pids | grep -xF -f <(family "$pid" | cut -d' ' -f1) >/dev/null
}

answering() { ask -o /dev/null "$(base_url)/" 2>/dev/null; }

# Let it speak, and look at the sound: RIFF, rate, duration, loudness; and at the list of voices.
verify() {
  local told left=$((DEADLINE - SECONDS))
  ((left > VERIFY_TIMEOUT_S)) || left=$VERIFY_TIMEOUT_S
  told=$(KEYS=${TTS_API_KEYS:-} KEYS_FILE=${TTS_API_KEYS_FILE:-} APP_DIR=$APP_DIR "$PYTHON" - "$(base_url)" "$left" 2>&1 <<'PYTHON'
import array
import io
import json
import math
import os
import sys
import urllib.request
import wave

VOICES = "alloy echo fable onyx nova shimmer ash ballad coral sage verse".split()
url, timeout_s = sys.argv[1], int(sys.argv[2])
open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def key():
    keys = os.environ["KEYS"].split(",")
    if file := os.environ["KEYS_FILE"]:
        with open(os.path.join(os.environ["APP_DIR"], file), encoding="utf-8") as lines:
            keys += [line.partition("#")[0] for line in lines]
    return next((key.strip() for key in keys if key.strip()), "")


def ask(path, body=None):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key()}"}
    with open_url(urllib.request.Request(url + path, body, headers), timeout=timeout_s) as answer:
        return answer.read()


def verify():
    listed = [voice["id"] for voice in json.loads(ask("/v1/audio/voices"))["voices"]]
    if missing := set(VOICES) - set(listed):
        raise ValueError(f"the voices {', '.join(sorted(missing))} are missing")
    wav = ask("/v1/audio/speech", b'{"model":"tts-1","voice":"alloy","input":"The server is ready to speak."}')
    if wav[:4] != b"RIFF":
        raise ValueError(f"the speech is no WAV, it begins with {wav[:4]!r}")
    with wave.open(io.BytesIO(wav)) as sound:
        rate, frames, shape = sound.getframerate(), sound.getnframes(), (sound.getnchannels(), sound.getsampwidth())
        samples = array.array("h", sound.readframes(frames))
    loudness = 10 * math.log10(sum(x * x for x in samples) / max(1, len(samples)) / 32768**2 + 1e-10)
    print(f"it speaks: {frames / rate:.2f} s at {rate} Hz, {loudness:.0f} dBFS, {len(listed)} voices")
    if shape != (1, 2) or rate < 16_000 or not 0.5 <= frames / rate <= 20:
        raise ValueError(f"the speech is not 0.5 to 20 s of mono 16 bit at 16 kHz or more: {shape}, {frames} frames")
    if loudness < -50:
        raise ValueError("the speech is silent")


try:
    verify()
except Exception as error:
    sys.exit(f"not verified: {error}")
PYTHON
  ) || { log "${told##*$'\n'}"; return 1; }
  log "$told"
}

# === One file ===

# Print a script that carries these files of SOURCE and runs this one. It is one subshell: half of it runs nothing.
packed() {
  local archive; archive=$(mktemp) || return 1
  (cd "$SOURCE" && tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -c "$@" | gzip -9n) >"$archive" || { rm -f "$archive"; return 1; }
  cat <<END || { rm -f "$archive"; return 1; }
#!/usr/bin/env bash
# The speech server, release $(manifest "$SOURCE" | release_id), and its deploy script in one file, made by
# deploy_openai_api.sh pack.   Run it: bash deploy_openai.sh --help, or ssh HOST bash -s < deploy_openai.sh
(
set -euo pipefail
trap '' HUP PIPE
$(given_settings)
folder=\$(mktemp -d)
trap 'rm -rf "\$folder"' EXIT
base64 -d >"\$folder/release.tar.gz" <<'PAYLOAD' || true
$(base64 "$archive")
PAYLOAD
if ! echo "$(sha256sum <"$archive" | cut -d' ' -f1)  \$folder/release.tar.gz" | sha256sum --check --status; then
  echo "ERROR: this file was damaged on its way; nothing was changed" >&2
  exit $EXIT_UNCHANGED
fi
tar -xzf "\$folder/release.tar.gz" -C "\$folder"
bash "\$folder/deploy_openai_api.sh" --source "\$folder" "\$@" </dev/null
)
END
  rm -f "$archive"
}

# The settings to send along, as export commands; in the file, not on a command line that others can see.
given_settings() {
  local name
  [[ $SSH_HOST ]] || return 0
  for name in $(compgen -e | grep -xE "$SENT"); do
    printf 'export %s=%q\n' "$name" "${!name}"
  done
}

do_pack() {
  local paths
  check_release
  ((FAILURES == 0)) || die "$EXIT_USAGE" "nothing was written"
  mapfile -t paths < <(release_paths "$SOURCE")
  { packed "${paths[@]}" >"$OUTPUT.new" && mv -f -- "$OUTPUT.new" "$OUTPUT"; } 2>/dev/null ||
    { rm -f -- "$OUTPUT.new"; die "$EXIT_UNCHANGED" "$OUTPUT cannot be written"; }
  log "wrote $OUTPUT, $(du -h -- "$OUTPUT" | cut -f1): ssh HOST bash -s < $OUTPUT"
}

# Do the same thing over there; only a deploy has to carry the release.
over_ssh() {
  local paths=(deploy_openai_api.sh) status=0 names
  names=$(compgen -e | grep -xE "$SENT" | xargs) && note "settings that go along: $names"
  names=$(compgen -e | grep -xE "$ENGINE_SETTINGS" | grep -vxE "$SENT" | xargs) && note "settings that stay here: $names"
  if [[ $ACTION == deploy ]]; then mapfile -t paths < <(release_paths "$SOURCE"); fi
  # shellcheck disable=SC2086  # SSH_COMMAND is a command and its options
  packed "${paths[@]}" | ${SSH_COMMAND:-ssh} ${SSH_PORT:+-p "$SSH_PORT"} "$SSH_HOST" \
    "bash -s -- $ACTION $TIMESTAMP $REMOTE_ARGUMENTS" || status=$?
  if ((status == 255)); then
    note "ERROR: no connection. What had begun there goes on: see --ssh $SSH_HOST status" >&2
  fi
  return "$status"
}

# === Actions ===

acquire_lock() {
  local command needed=(curl flock nohup)
  [[ $ACTION != stop ]] || needed=(flock)
  for command in "${needed[@]}"; do
    type -P "$command" >/dev/null || die "$EXIT_UNCHANGED" "the command $command is missing; nothing was changed"
  done
  [[ $ACTION == deploy || -d $APP_DIR ]] || die "$EXIT_UNCHANGED" "there is no folder $APP_DIR; nothing was changed"
  mkdir -p -- "$APP_DIR" 2>/dev/null || die "$EXIT_UNCHANGED" "$APP_DIR cannot be made"
  exec 9<"$APP_DIR"
  flock -n 9 || die "$EXIT_UNCHANGED" "another deploy is at work in $APP_DIR; nothing was changed"
  trap on_exit EXIT
  trap 'die "$EXIT_UNCHANGED" interrupted' INT TERM
}

# Prepare to change things: the folders, the log, and what an earlier run left half done.
begin() {
  local folder
  mkdir -p "$APP_DIR"/{run,logs,backups} 2>/dev/null || die "$EXIT_UNCHANGED" "$APP_DIR cannot be written to"
  for folder in "$APP_DIR"/{run,logs,backups}; do  # without a log nothing starts, not even what is put back
    [[ -w $folder ]] || die "$EXIT_UNCHANGED" "$folder cannot be written to"
  done
  LOG=$APP_DIR/logs/deploy.log
  recover
}

do_deploy() {
  preflight
  if ((DRY_RUN)); then log "dry run: nothing was changed"; return 0; fi
  begin
  install_packages
  stage
  install_extras
  switch_to "$STAGED"
  prune_backups
  rm -rf -- "$STAGED"
  log "deployed release $(release_of "$APP_DIR") on $(base_url); the way back: $APP_DIR/deploy_openai_api.sh rollback"
}

do_rollback() {
  begin
  local name; name=$(list_backups | other_backups | grep -F ".backup.$TIMESTAMP" | tail -n 1) ||
    die "$EXIT_UNCHANGED" "there is no backup ${TIMESTAMP:-yet} in $APP_DIR/backups; nothing was changed"
  check_port
  ((FAILURES == 0)) || die "$EXIT_UNCHANGED" "nothing was changed"
  [[ $name != nothing.* ]] || die "$EXIT_UNCHANGED" "there was no server here before the first deploy"
  log "rolling back to $name"
  switch_to "$APP_DIR/backups/$name"
  prune_backups
  log "$name is serving"
}

do_stop()    { begin; note_start; stop_server; log "stopped"; }
do_restart() { begin; note_start; stop_server; await_gpu_memory; start_installed; }

# Of backup names, those that a rollback would change something with, unless one is asked for by its time: a deploy
# that failed leaves a backup of the very release that serves.
other_backups() {
  local name serving; serving=$(release_of "$APP_DIR")
  while IFS= read -r name; do
    if [[ $TIMESTAMP || ! $serving || $(release_of "$APP_DIR/backups/$name") != "$serving" ]]; then printf '%s\n' "$name"; fi
  done
}

# Before a server that is not ours is stopped: keep how it was started, or nobody could start it again.
note_start() {
  local pid
  pid=$(server_pid) || return 0
  if is_ours "$pid" || [[ -e $APP_DIR/${STARTED[0]} ]]; then return 0; fi
  keep_command "$pid" "$APP_DIR"
}

do_start() {
  begin
  local pid
  if pid=$(server_pid); then log "running already: process $pid"; else start_installed; fi
}

start_installed() {
  (umask 077 && settings "$REMEMBERED" >"$APP_DIR/server.env.new")
  mv -f "$APP_DIR/server.env.new" "$APP_DIR/server.env"
  [[ $(program "$APP_DIR") != nothing ]] || die "$EXIT_DOWN" "there is no server in $APP_DIR"
  [[ ! $(listening_sockets) ]] || die "$EXIT_DOWN" "port $PORT is $(port_state)"
  start_checked "$APP_DIR" || die "$EXIT_DOWN" "it does not serve; see $SERVER_LOG"
}

do_status() {
  local pid health
  if [[ -s $UNFINISHED ]]; then
    log "a deploy is under way or was interrupted; if so, deploy again, or start to put $(<"$UNFINISHED") back"
  fi
  pid=$(server_pid) || { log "stopped; port $PORT is $(port_state)"; return "$EXIT_UNHEALTHY"; }
  log "running: process $pid, $(shown "$pid")"
  health=$(ask -f "$(base_url)/health" 2>&1) || { log "not healthy: $health"; return "$EXIT_UNHEALTHY"; }
  log "healthy: $health"
  check_running "$(field release "$health")" "$(release_of "$APP_DIR")"
}

# Say when what runs is not what lies in the folder: it was copied, and not restarted.
check_running() {
  [[ ! $1 || $1 == "$2" ]] || hint "release $1 is running, and ${2:-none} lies in $APP_DIR: restart takes that"
}

do_backups() {
  local name release
  while IFS= read -r name; do
    release=$(release_of "$APP_DIR/backups/$name")
    printf '%s  %-20s release %s\n' "${name##*.backup.}" "${name%.backup.*}" "${release:-unknown}"
  done < <(list_backups)
}

# === Main ===

parse_arguments() {
  ACTION='' TIMESTAMP='' DRY_RUN=0 OUTPUT=deploy_openai.sh SSH_HOST='' SSH_PORT='' REMOTE_ARGUMENTS=''
  SOURCE=$(cd -- "$(dirname -- "$0")" && pwd -P)
  while (($#)); do
    if [[ $1 =~ ^(-s|--source|-o|--output|--ssh|-p|--ssh-port)$ && ! ${2:-} ]]; then wrong "$1, with no value"; fi
    case $1 in
      deploy|rollback|restart|stop|start|status|backups|pack) [[ ! $ACTION ]] || wrong "$1"; ACTION=$1 ;;
      [0-9]*T[0-9]*) [[ $ACTION == rollback ]] || wrong "$1"; TIMESTAMP=$1 ;;
      -n|--dry-run) DRY_RUN=1 REMOTE_ARGUMENTS=--dry-run ;;
      -s|--source) SOURCE=$(cd -- "$2" 2>/dev/null && pwd -P) || wrong "$1 $2, which is no folder"; shift ;;
      -o|--output) OUTPUT=$2; shift ;;
      --ssh) SSH_HOST=$2; shift ;;
      -p|--ssh-port) SSH_PORT=$2; shift ;;
      -h|--help) usage; exit 0 ;;
      *) wrong "$1" ;;
    esac
    shift
  done
  ACTION=${ACTION:-deploy}
  ((!DRY_RUN)) || [[ $ACTION == deploy ]] || wrong "--dry-run with $ACTION"
}

wrong() { usage >&2; die "$EXIT_USAGE" "not understood: $1"; }

main() {
  parse_arguments "$@"
  trap '' HUP PIPE
  if [[ $SSH_HOST ]]; then over_ssh; return 0; fi
  if [[ $ACTION == pack ]]; then do_pack; return 0; fi
  load_config
  case $ACTION in
    status|backups) ;;
    *) ((DRY_RUN)) || acquire_lock ;;
  esac
  "do_$ACTION"
}

main "$@"
