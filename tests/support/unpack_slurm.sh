#!/usr/bin/env bash
# Slurm for the tests: Debian's packages, unpacked into a folder and not installed. A second call finds them there.
#
#     tests/support/unpack_slurm.sh target/slurm
#
# Takes the lists of packages and the packages themselves from the configured Debian mirrors, in folders of its own. Needs no root.
set -euo pipefail
folder=$(realpath --canonicalize-missing "$1")
packages=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins)

test ! -e "$folder/root" || exit 0
for program in apt-get dpkg; do
    command -v "$program" >/dev/null || { echo "$program is missing" >&2; exit 1; }
done
# Other runs may unpack at the same time. The one rename makes the result visible.
work=$(mktemp --directory --tmpdir slurm.XXXXXX)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/lists/partial "$work"/cache/archives/partial "$work/root" "$folder"
apt=(apt-get --quiet=2 --option Dir::State::Lists="$work/lists" --option Dir::Cache="$work/cache" --option Debug::NoLocking=1
    --option Acquire::Retries=5 --option APT::Sandbox::User="$(id -un)")
get() {
    # A mirror that does not answer matters only if it has the packages.
    "${apt[@]}" update || true
    "${apt[@]}" install --download-only --reinstall --yes --no-install-recommends "${packages[@]}"
}
for delay in 2 10 20 40 60 60 0; do # seconds: a mirror may answer late
    ! get >&2 || break
    sleep "$delay"
done
test -n "$(find "$work/cache/archives" -name 'slurmctld_*.deb')" || { echo "the packages of Slurm cannot be had" >&2; exit 1; }
for package in "$work"/cache/archives/*.deb; do
    dpkg --extract "$package" "$work/root"
done
cp -r "$work/root" "$folder/root.$$"
mv --no-target-directory "$folder/root.$$" "$folder/root" 2>/dev/null || rm -rf "$folder/root.$$"
