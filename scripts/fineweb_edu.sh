#!/usr/bin/env bash
# Fetches FineWeb-Edu as ready GPT-2 shards (Karpathy's, 100M tokens = 200 MB each, of llm.c's edu_fineweb.sh).
#
#   scripts/fineweb_edu.sh [-o FOLDER] [-n SHARDS] [-u URL]
#     -o FOLDER   where the shards go [fineweb_edu]
#     -n SHARDS   training shards, 1 to 1000; the validation shard comes as well [10]
#     -u URL      the folder with the shards, on another server or file:// [Hugging Face]
#     -h          this help
#
#   ./train_gdn -i 'fineweb_edu/edu_fineweb_train_*.bin' -j 'fineweb_edu/edu_fineweb_val_*.bin'
#
# A shard keeps the name .part until its SHA-256 is right: the one that the server says (X-Linked-ETag, as Hugging Face
# does) or the one in the file SHA256SUMS beside the shards. The same command goes on where it was stopped; shards that
# are there are checked once more, without fetching them. Needs curl and sha256sum.
set -euo pipefail

out=fineweb_edu
count=10
url=https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main

fail() {
  echo "fineweb_edu.sh: $*" >&2
  exit 1
}

help() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }

while getopts ":o:n:u:h" option; do
  case $option in
    o) out=$OPTARG ;;
    n) count=$OPTARG ;;
    u) url=${OPTARG%/} ;;
    h) help; exit 0 ;;
    :) fail "-$OPTARG needs a value (-h lists the options)" ;;
    *) fail "unknown option -$OPTARG (-h lists the options)" ;;
  esac
done
shift $((OPTIND - 1))
[ $# -eq 0 ] || fail "unexpected argument '$1' (-h lists the options)"
[[ $count =~ ^[0-9]+$ ]] && ((10#$count >= 1 && 10#$count <= 1000)) || fail "-n '$count': expected a number from 1 to 1000"
for program in curl sha256sum; do
  command -v "$program" >/dev/null || fail "needs $program"
done
mkdir -p "$out"

checksum() {  # checksum NAME: the SHA-256 that the shard must have
  local said sums
  said=$(curl -fsSIL "$url/$1" 2>/dev/null | tr -d '\r"' | awk 'tolower($1) == "x-linked-etag:" { print $2 }' | head -n 1) || true
  if [[ ! $said =~ ^[0-9a-f]{64}$ ]]; then
    sums=$(curl -fsSL "$url/SHA256SUMS" 2>/dev/null) ||
      fail "$url/$1: the server says no checksum, and there is no SHA256SUMS"
    said=$(awk -v name="$1" '$2 == name || $2 == "*" name { print $1 }' <<<"$sums")
    [[ $said =~ ^[0-9a-f]{64}$ ]] || fail "$url/SHA256SUMS: has no SHA-256 of $1"
  fi
  echo "$said"
}

has_checksum() { [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$2" ]; }

fetch() {  # fetch NAME
  local path="$out/$1" part="$out/$1.part" want
  want=$(checksum "$1")
  if [ -e "$path" ]; then
    has_checksum "$path" "$want" || fail "$path: its SHA-256 is not $want; delete it and run this again"
    echo "$1: there"
    return
  fi
  if ! { [ -e "$part" ] && has_checksum "$part" "$want"; }; then
    curl -fL --retry 5 -C - -o "$part" "$url/$1" || fail "$url/$1: curl ended with code $?; run this again to go on"
    if ! has_checksum "$part" "$want"; then
      rm -f "$part"
      fail "$1: its SHA-256 is not $want; run this again to fetch it anew"
    fi
  fi
  mv "$part" "$path"
  echo "$1: fetched"
}

fetch edu_fineweb_val_000000.bin
for ((i = 1; i <= 10#$count; i++)); do
  fetch "$(printf 'edu_fineweb_train_%06d.bin' "$i")"
done
