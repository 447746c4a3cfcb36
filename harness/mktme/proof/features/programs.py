# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs for the guest's own Python, each of which prints what it found as its last line."""

from __future__ import annotations

from typing import Final

ECHO: Final = """
import os, socket, sys, threading
host, port, mib = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = os.urandom(mib << 20)
with socket.create_connection((host, port), timeout=60) as echo:
    sender = threading.Thread(target=echo.sendall, args=(data,))
    sender.start()
    back = b""
    while len(back) < len(data):
        more = echo.recv(1 << 16)
        if not more:
            break
        back += more
    sender.join()
print("same" if back == data else "other")
"""
"""Sends MIB to an echo server and compares what comes back."""

CRYPTO: Final = """
import json, socket
key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
iv = bytes(range(16))
plaintext = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
expected = "7649abac8119b246cee98e9b12e9197d"
with socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET) as algorithm:
    algorithm.bind(("skcipher", "virtio_crypto_aes_cbc"))
    algorithm.setsockopt(socket.SOL_ALG, socket.ALG_SET_KEY, key)
    operation, _ = algorithm.accept()
    with operation:
        operation.sendmsg_afalg([plaintext], op=socket.ALG_OP_ENCRYPT, iv=iv)
        ciphertext = operation.recv(16).hex()
print(json.dumps({"right": ciphertext == expected, "ciphertext": ciphertext}))
"""
"""SP 800-38A, F.2.1, the first block, by the driver's own name: no other can answer."""

EDU: Final = """
import ctypes, glob, json, mmap, os, struct, time

(device,) = [
    os.path.dirname(path)
    for path in glob.glob("/sys/bus/pci/devices/*/device")
    if open(path).read().strip() == "0x11e8"
]
with open(device + "/enable", "w") as enable:
    enable.write("1")
with open(device + "/config", "r+b", buffering=0) as config:  # bus mastering
    config.seek(4)
    (command,) = struct.unpack("<H", config.read(2))
    config.seek(4)
    config.write(struct.pack("<H", command | 6))
with open(device + "/resource0", "r+b", buffering=0) as resource:
    registers = mmap.mmap(resource.fileno(), 1 << 20)
assert ctypes.c_uint32.from_buffer(registers, 0).value & 0xff == 0xed  # identification

libc = ctypes.CDLL(None, use_errno=True)
memory = mmap.mmap(-1, 2 * 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
memory[:] = bytes(2 * 4096)
assert libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(2 * 4096)) == 0
with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
    pagemap.seek(address // 4096 * 8)
    first, second = (
        (entry & (1 << 55) - 1) * 4096 for entry in struct.unpack("<QQ", pagemap.read(16))
    )
assert first and second

def copy(source, destination, command):  # docs/specs/edu.rst
    for offset, value in ((0x80, source), (0x88, destination), (0x90, 4096), (0x98, command)):
        ctypes.c_uint64.from_buffer(registers, offset).value = value
    deadline = time.monotonic() + 30
    while ctypes.c_uint64.from_buffer(registers, 0x98).value & 1:
        assert time.monotonic() < deadline, "the device does not finish"

memory[:4096] = os.urandom(4096)
control = memory[:4096] != memory[4096:]
copy(first, 0x40000, 1)
copy(0x40000, second, 3)
print(json.dumps({"same": memory[:4096] == memory[4096:], "control": control}))
"""
"""Has QEMU's edu device copy a page to its buffer, and from there to another page."""
