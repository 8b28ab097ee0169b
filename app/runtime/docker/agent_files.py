"""Which files an agent has, and the script by which a helper copies them out of its image."""

from __future__ import annotations

from typing import Final

SHELL: Final = "/bin/sh"
INCOMPLETE_CODE: Final = 3
"""The helper's exit code when the image lacks a file."""
TARGET: Final = "/t"
"""Where the helper has the volume."""
REQUIRED: Final = ("/execd", "/bootstrap.sh")
"""Files or folders of the image."""
WANTED: Final = (
    *REQUIRED,
    "/usr/local/bin/bwrap",
    "/usr/local/libexec/opensandbox-session-gate",
    "/usr/local/libexec/opensandbox-launcher",
)
"""The same with those that are copied if they are there."""
MODE: Final = 0o755
PREPARE: Final = """\
# Sourced by bootstrap.sh. Programs that expect the agent's files where other servers put them find them there. An image
# without ln goes without. In a shell of its own, so that the user's program inherits nothing of it.
(
    command -v ln >/dev/null 2>&1 || exit 0
    for file in /opt/opensandbox/bin/*; do
        name=${file##*/}
        [ "$name" = prepare.sh ] || [ -e "/opt/opensandbox/$name" ] || ln -s "$file" "/opt/opensandbox/$name"
    done
) 2>/dev/null || :
"""
"""`prepare.sh`, a file of ours beside the agent's."""
FILL: Final = f"""set -eu
umask 022
for file in {" ".join(REQUIRED)}; do
    [ -e "$file" ] || {{ echo "the image lacks $file"; exit {INCOMPLETE_CODE}; }}
done
on_disk() {{ sync -f {TARGET} 2>/dev/null || sync; }}
names=
for file in {" ".join(WANTED)}; do
    [ -e "$file" ] || continue
    name=${{file##*/}}
    rm -rf "{TARGET}/.$name.new"
    if [ -d "$file" ]; then cp -R "$file" "{TARGET}/.$name.new"; else cp "$file" "{TARGET}/.$name.new"; fi
    chmod 0755 "{TARGET}/.$name.new"
    names="$names $name"
done
printf '%s' "$PREPARE" > "{TARGET}/.prepare.sh.new"
chmod 0755 "{TARGET}/.prepare.sh.new"
on_disk
mv -f "{TARGET}/.prepare.sh.new" "{TARGET}/prepare.sh"
for name in $names; do
    # A folder cannot be renamed over another one. One that is there is whole, as it was renamed too.
    if [ -d "{TARGET}/$name" ]; then rm -rf "{TARGET}/.$name.new"; else mv -f "{TARGET}/.$name.new" "{TARGET}/$name"; fi
    set -- $(du -sk "{TARGET}/$name")
    echo "$name ${{1:-0}}"
done
on_disk
"""
"""Needs no more than a POSIX shell and the usual tools. Its output is the list of files with their sizes in KiB."""
