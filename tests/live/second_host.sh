#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# second_host.sh DIR SSHD TMPDIR NETWORK INTERFACE COMMAND...: another host for tests, in which COMMAND is run:
# an sshd of its own, its files in DIR, at the other end of a pair of network interfaces, and a TMPDIR
# that has nothing of this host's. Run it in a mount and a network namespace (unshare --mount --net),
# with this host's as its parent's. SSHD is where Debian's openssh-server is unpacked. In NETWORK, an
# IPv6 prefix of 64 bits, this host is ::1, by INTERFACE, the other ::2.

set -eu

dir=$1 sshd=$2 tmp=$3 network=$4 interface=$5
shift 5

# Both ends go with the namespace. Nobody else has these addresses, so there is no need to ask.
ip link add name other type veth peer name "$interface" netns "$PPID"
ip address add "$network::2/64" dev other nodad
ip link set other up
ip link set lo up
# shellcheck disable=SC2016  # for that shell
nsenter --target "$PPID" --net sh -euc '
	ip address add "$1::1/64" dev "$2" nodad
	ip link set "$2" up
	echo 1 >"/proc/sys/net/ipv6/conf/$2/keep_addr_on_down"' sh "$network" "$interface"

mount -t tmpfs tmpfs /run
mkdir /run/sshd

mount -t tmpfs tmpfs "$tmp"
# Its root has another home, and may log in by key; sshd wants a user of its own.
sed 's,^root:.*,root:x:0:0:root:'"$dir"'/home:/bin/sh,; /^sshd:/d' /etc/passwd >"$dir/passwd"
echo 'sshd:x:64999:65534::/run/sshd:/usr/sbin/nologin' >>"$dir/passwd"
echo 'root:*:1::::::' >"$dir/shadow"
mount --bind "$dir/passwd" /etc/passwd
mount --bind "$dir/shadow" /etc/shadow
# From OpenSSH 9.8 on, programs that sshd runs are there.
mount --bind "$sshd/usr/lib/openssh" /usr/lib/openssh
LD_LIBRARY_PATH=$sshd/usr/lib/x86_64-linux-gnu:$sshd/lib/x86_64-linux-gnu \
	"$sshd/usr/sbin/sshd" -f "$dir/sshd_config" -E "$dir/sshd.log"
exec "$@"
