"""The encryption engine: no I/O but DRAM, knows nothing of QEMU or libvirt."""
