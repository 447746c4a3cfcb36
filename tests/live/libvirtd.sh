#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# libvirtd.sh LIBVIRTD DIR CAPABILITIES: a libvirtd for tests, its socket in DIR and all its state on
# file systems of its own. Run it in a mount namespace (unshare --mount): nothing of it is left when it
# ends, but for what it found out about QEMU, which takes it seconds: that is kept in CAPABILITIES.

set -eu

for state in /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /etc/libvirt /run; do
	mkdir -p "$state"
	mount -t tmpfs tmpfs "$state"
done
# To who is in the namespace, it is qemu:///system.
ln -s "$2" /run/libvirt
mkdir /run/sshd
mkdir -p /var/cache/libvirt/qemu
ln -s "$3" /var/cache/libvirt/qemu/capabilities
cat >/etc/libvirt/qemu.conf <<'END'
stdio_handler = "file"
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = []
namespaces = []
END
cat >/etc/libvirt/libvirtd.conf <<END
unix_sock_dir = "$2"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "$(cat /proc/sys/kernel/random/uuid)"
END
exec "$1" --config /etc/libvirt/libvirtd.conf --pid-file "$2/pid"
