#!/usr/bin/env bash
# Puts a recent nats-server where this project finds it, without touching the system, and prints its path.
#
#   nats=$(nats/install.sh) && "$nats" -c nats/single.conf
#
# Takes the first of these that is at least $MIN_VERSION:
#   1. $NATS_SERVER
#   2. <cache>/bin/nats-server, put there by an earlier run
#   3. the first such nats-server on PATH (it is not copied)
#   4. release $RELEASE from NATS's own GitHub, checked against the SHA256SUMS of the same release
#   5. on Debian and what is made from it: the package of a newer Debian suite, from the machine's own mirror and
#      checked by apt with the machine's own keys, unpacked and not installed
#
# <cache> is $RUVECTOR_CACHE, or else ruvector-cluster in $XDG_CACHE_HOME or ~/.cache. Nothing is written outside it
# but a temporary folder; apt's sources, lists and caches stay as they are. Only the path goes to stdout.
set -euo pipefail

readonly MIN_VERSION=2.14.7 # earlier 2.14 have known JetStream faults, and the upgrade to 2.15 is supported from here
readonly RELEASE=v2.15.1
readonly RELEASES=https://github.com/nats-io/nats-server/releases/download
readonly SUITES="trixie-backports forky sid" # the most conservative first
readonly CONNECT_SECONDS=5                   # long enough for a slow network, short enough to fall through without one

say() { printf 'install.sh: %s\n' "$*" >&2; }

fail() {
  say "$*"
  exit 1
}

# What `BINARY --version` prints as x.y.z, or nothing if it does not run.
version_of() { "$1" --version 2>/dev/null | sed -n 's/^nats-server: v\([0-9][0-9]*\.[0-9][0-9]*\.[0-9][0-9]*\).*/\1/p' || true; }

# at_least HAVE WANT, both x.y.z
at_least() {
  local a b c x y z
  IFS=. read -r a b c <<<"$1"
  IFS=. read -r x y z <<<"$2"
  ((a != x ? a > x : b != y ? b > y : c >= z))
}

# is_good BINARY: it runs here and is new enough. Sets $version to what it says, or to nothing.
is_good() {
  version=$(version_of "$1")
  [[ -n $version ]] && at_least "$version" "$MIN_VERSION"
}

found() { # found PATH WHERE: done
  say "nats-server $version $2"
  printf '%s\n' "$1"
  exit 0
}

# Moves a binary that is good into the cache. Renaming is atomic, so whoever reads or does the same meanwhile finds either
# the old file or the new one, whole.
keep() { # keep BINARY WHERE
  chmod 755 "$1"
  mv -f "$1" "$installed"
  found "$installed" "$2"
}

# --- what is here already ---

use_env() {
  [[ -n ${NATS_SERVER:-} ]] || return 0
  local path
  if ! path=$(type -P -- "$NATS_SERVER"); then
    say "NATS_SERVER=$NATS_SERVER is not a program, going on"
  elif is_good "$path"; then
    found "$(absolute "$path")" "from NATS_SERVER"
  else
    say "NATS_SERVER=$NATS_SERVER is version ${version:-unknown}, older than $MIN_VERSION, going on"
  fi
}

use_cache() {
  [[ -x $installed ]] || return 0
  ! is_good "$installed" || found "$installed" "already in the cache"
  say "$installed is version ${version:-unknown}, older than $MIN_VERSION, going on"
}

use_path() {
  local path
  while IFS= read -r path; do
    ! is_good "$path" || found "$(absolute "$path")" "on PATH"
    say "$path is version ${version:-unknown}, older than $MIN_VERSION, going on"
  done < <(type -aP nats-server || true)
}

absolute() { printf '%s/%s\n' "$(cd "$(dirname "$1")" && pwd)" "$(basename "$1")"; }

# --- NATS's own release ---

fetch() { # fetch URL FILE SECONDS_IN_ALL
  if command -v curl >/dev/null; then
    curl -fsSL --proto '=https' --connect-timeout "$CONNECT_SECONDS" --max-time "$3" -o "$2" "$1" 2>>"$work/log"
  elif command -v wget >/dev/null; then
    timeout "$3" wget -q --tries=1 --timeout="$CONNECT_SECONDS" -O "$2" "$1" 2>>"$work/log"
  else
    echo "neither curl nor wget is installed" >>"$work/log"
    return 1
  fi
}

sha256_of() {
  if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d' ' -f1
}

use_release() {
  local os arch name want
  case $(uname -s) in Linux) os=linux ;; Darwin) os=darwin ;; *) return 0 ;; esac
  case $(uname -m) in x86_64 | amd64) arch=amd64 ;; aarch64 | arm64) arch=arm64 ;; *) return 0 ;; esac
  name=nats-server-$RELEASE-$os-$arch
  # The sums first: they are small, so without a way to GitHub this ends after the connect time-out.
  if ! fetch "$RELEASES/$RELEASE/SHA256SUMS" "$work/SHA256SUMS" 20; then
    say "GitHub cannot be reached, going on"
    return 0
  fi
  want=$(awk -v f="$name.tar.gz" '$2 == f || $2 == "*" f { print $1 }' "$work/SHA256SUMS")
  if [[ ! $want =~ ^[0-9a-f]{64}$ ]]; then
    say "SHA256SUMS of $RELEASE does not name $name.tar.gz, going on"
  elif ! fetch "$RELEASES/$RELEASE/$name.tar.gz" "$work/release.tar.gz" 300; then
    say "download of $name.tar.gz broke off, going on"
  elif [[ $(sha256_of "$work/release.tar.gz") != "$want" ]]; then
    say "$name.tar.gz does not have the checksum that its release names: not used, going on"
  elif ! tar -xzf "$work/release.tar.gz" -C "$staging" --strip-components=1 "$name/nats-server" || ! is_good "$staging/nats-server"; then
    say "$name.tar.gz holds no nats-server that runs here, going on"
  else
    keep "$staging/nats-server" "downloaded from NATS's GitHub releases"
  fi
}

# --- Debian's package ---

# Debian mirrors among the machine's apt sources, one "URI|SIGNED-BY" a line; SIGNED-BY may be empty (apt's default keys)
# and is one line even if the source holds the key itself (deb822 continuation lines joined by \n).
debian_mirrors() {
  local etc file files=()
  etc=$(apt-config shell d Dir::Etc/d | sed "s/^d='\(.*\)'$/\1/")
  for file in "$etc"sources.list "$etc"sources.list.d/*.list "$etc"sources.list.d/*.sources; do
    [[ ! -r $file ]] || files+=("$file")
  done
  ((${#files[@]})) || return 0
  awk '
    function debian(suites,   n, s, i) {
      n = split(suites, s, /[ \t]+/)
      for (i = 1; i <= n; i++)
        if (s[i] ~ /^(bullseye|bookworm|trixie|forky|sid|oldstable|stable|testing|unstable)$/) return 1
      return 0
    }
    function emit(uris, suites, components, signed,   n, u, i) {
      if (!debian(suites) || components !~ /(^|[ \t])main([ \t]|$)/) return
      n = split(uris, u, /[ \t]+/)
      for (i = 1; i <= n; i++)
        if (u[i] ~ /^(https?|mirror[^:]*|tor[^:]*):/ && !seen[u[i]]++) print u[i] "|" signed
    }
    function stanza() {
      if (f["types"] ~ /(^|[ \t])deb([ \t]|$)/ && f["enabled"] !~ /^(no|false|off|0|without|disable)$/)
        emit(f["uris"], f["suites"], f["components"], f["signed-by"])
      split("", f); key = ""
    }
    FNR == 1 { stanza(); one_line = FILENAME !~ /\.sources$/ }
    { sub(/\r$/, "") }
    one_line {
      sub(/#.*/, "")
      if ($1 != "deb") next
      signed = ""
      if (match($0, /\[[^]]*\]/)) {
        options = substr($0, RSTART + 1, RLENGTH - 2)
        $0 = substr($0, 1, RSTART - 1) substr($0, RSTART + RLENGTH)
        if (match(options, /signed-by=[^ \t]+/)) { signed = substr(options, RSTART + 10, RLENGTH - 10); gsub(/,/, " ", signed) }
      }
      rest = ""; for (i = 4; i <= NF; i++) rest = rest " " $i
      emit($2, $3, rest, signed)
      next
    }
    /^[ \t]*$/ { stanza(); next }
    /^#/ { next }
    /^[ \t]/ { if (key) f[key] = f[key] (key == "signed-by" ? "\\n" : "") $0; next }
    { i = index($0, ":"); key = tolower(substr($0, 1, i - 1)); v = substr($0, i + 1); gsub(/^[ \t]+|[ \t]+$/, "", v); f[key] = v }
    END { stanza() }
  ' "${files[@]}"
}

# apt-get and apt-cache with the machine's settings but a source, lists and a cache of their own.
apt() { "$1" -c "$work/apt/apt.conf" "${@:2}"; }

use_debian_package() {
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 0
  local suite mirror mirrors uri signed
  mirrors=$(debian_mirrors)
  [[ -n $mirrors ]] || { say "no Debian mirror among this machine's apt sources, going on"; return 0; }
  for suite in $SUITES; do
    while IFS= read -r mirror; do
      uri=${mirror%%|*} signed=${mirror#*|}
      from_suite "$suite" "$uri" "$signed"
    done <<<"$mirrors"
  done
}

from_suite() { # from_suite SUITE URI SIGNED_BY: ends the script if it has a good one
  local dir=$work/apt package
  rm -rf "$dir"
  mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial" "$dir/deb"
  {
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nTargets: Packages\n' "$2" "$1"
    [[ -z $3 ]] || printf 'Signed-By: %b\n' "$3"
  } >"$dir/debian.sources"
  # #clear: the machine's hooks around an update clean up its own caches, which have nothing to do with this.
  # Pins and a default release are for what is installed on the machine; this is not.
  cat >"$dir/apt.conf" <<EOF
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Default-Release "";
Dir::Etc::sourcelist "$dir/debian.sources";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State::lists "$dir/lists";
Dir::Cache "$dir/cache";
Acquire::http::Timeout "$CONNECT_SECONDS";
Acquire::https::Timeout "$CONNECT_SECONDS";
Acquire::Retries "0";
Acquire::AllowInsecureRepositories "false";
APT::Get::AllowUnauthenticated "false";
EOF
  say "asking Debian's $1"
  if ! apt apt-get -q update -o APT::Update::Error-Mode=any >>"$work/log" 2>&1; then
    say "Debian's $1 cannot be fetched or verified, going on"
    return 0
  fi
  package=$(apt apt-cache madison nats-server 2>>"$work/log" | awk -F' *[|] *' 'NR == 1 { print $2 }')
  if ! [[ $package =~ ^([0-9]+:)?([0-9]+\.[0-9]+\.[0-9]+) ]] || ! at_least "${BASH_REMATCH[2]}" "$MIN_VERSION"; then
    say "Debian's $1 has ${package:+only }nats-server ${package:-in no version}, going on"
    return 0
  fi
  if ! (cd "$dir/deb" && apt apt-get -q download "nats-server=$package") >>"$work/log" 2>&1 ||
    ! dpkg-deb -x "$dir"/deb/nats-server_*.deb "$dir/deb/x" 2>>"$work/log" ||
    ! cp "$dir"/deb/x/usr/*bin/nats-server "$staging/nats-server" 2>>"$work/log"; then
    say "download of nats-server $package from Debian's $1 failed, going on"
    return 0
  fi
  # It is linked to the C library, which must not be older here than the one it was built for.
  if ! is_good "$staging/nats-server"; then
    say "nats-server $package of Debian's $1 does not run here: $("$staging/nats-server" --version 2>&1 | head -n 1), going on"
    return 0
  fi
  keep "$staging/nats-server" "unpacked from Debian's $1 (package $package)"
}

# --- main ---

caches=${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}
cache=${RUVECTOR_CACHE:-${caches:+$caches/ruvector-cluster}}
[[ -n $cache ]] || fail "none of HOME, XDG_CACHE_HOME and RUVECTOR_CACHE is set: set RUVECTOR_CACHE to a folder that can be written"
[[ $cache == /* ]] || cache=$PWD/$cache
installed=$cache/bin/nats-server
version=

use_env
use_cache
use_path

say "no nats-server $MIN_VERSION or newer here, fetching $RELEASE"
if ! mkdir -p "$cache/bin" 2>/dev/null || [[ ! -w $cache || ! -w $cache/bin ]]; then
  fail "cannot write to $cache: set RUVECTOR_CACHE to a folder that can be written"
fi
# Whoever starts a second run meanwhile waits for this one and finds its result; without flock both fetch, which is no harm.
if command -v flock >/dev/null; then
  exec 9>"$cache/.lock"
  flock 9
  ! is_good "$installed" || found "$installed" "put into the cache by another run meanwhile"
fi
staging=$(mktemp -d "$cache/.staging.XXXXXX") # in the cache: a rename is atomic only within a file system
work=$(mktemp -d)
trap 'rm -rf "$staging" "$work"' EXIT
chmod 755 "$work" # apt, run by root, fetches as the user _apt

use_release
use_debian_package
grep -E '^(curl:|wget:|neither|E:)' "$work/log" | grep -v 'Some index files failed' | sed 's/^/  /' >&2 || true
fail "no nats-server $MIN_VERSION or newer, and none could be fetched: install one (https://nats.io/download) and put it on PATH, or set NATS_SERVER to its path"
