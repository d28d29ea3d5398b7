"""Two clients whose machine vanishes: one that is idle, and one that has replies coming.

Runs in a network of its own, whose only link it takes down. Ends with its input."""

import socket
import struct
import subprocess
import sys

PORT = int(sys.argv[1])


def take(sock, length):
    while length > 0:
        length -= len(sock.recv(length))


def entered():
    sock = socket.create_connection(("127.0.0.1", PORT))
    take(sock, 18)
    sock.sendall(struct.pack(">LQLL", 3, 0x49484156454F5054, 1, 0))
    take(sock, 10)
    return sock


idle, busy = entered(), entered()
for cookie in range(64):
    busy.sendall(struct.pack(">LHHQQL", 0x25609513, 0, 0, cookie, 0, 1 << 20))
take(busy, 1)
subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
print("vanished", flush=True)
sys.stdin.read()
