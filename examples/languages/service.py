#!/usr/bin/env python3
"""A redirect service on plain socket options: no library, no privilege beyond its cgroup.

    sudo carnet service run NAME -- python3 service.py
"""
import socket
import struct
import sys
import threading

# docs/abi.md
WFP = 0x57465000  # the level, "WFP\0"
QUERY_REDIRECT_RECORDS = 220
SET_REDIRECT_RECORDS = 222
ORIGINAL_DESTINATION = 225
REGISTER_LISTENER = 227
# Address in network byte order, IPv4 as ::ffff:a.b.c.d; port; family; zero.
ENDPOINT = struct.Struct("<16sHHI")


def relay(source, sink):
    """Copies one direction and passes its end on; an error ends both directions."""
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # It is disconnected already.


def connect_onwards(accepted):
    """The connection to where the accepted one wanted to go, with its record."""
    record = accepted.getsockopt(WFP, QUERY_REDIRECT_RECORDS, 1024)  # never longer than 920 bytes
    original = accepted.getsockopt(WFP, ORIGINAL_DESTINATION, ENDPOINT.size)
    address, port, family, _ = ENDPOINT.unpack(original)
    if family == socket.AF_INET:
        address = address[12:]
    onwards = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Before connect(): that is where the kernel reads it.
        onwards.setsockopt(WFP, SET_REDIRECT_RECORDS, record)
        onwards.connect((socket.inet_ntop(family, address), port))
    except OSError:
        onwards.close()
        raise
    return onwards


def serve(accepted):
    """Serves one connection from its beginning to its end."""
    with accepted:
        try:
            onwards = connect_onwards(accepted)
        except OSError as error:
            print(f"connection ended: {error}", file=sys.stderr)
            return
        with onwards:
            there = threading.Thread(target=relay, args=(accepted, onwards))
            there.start()
            relay(onwards, accepted)
            there.join()


def accept(listener):
    while True:
        accepted, _ = listener.accept()
        threading.Thread(target=serve, args=(accepted,), daemon=True).start()


def main():
    threads = []
    for family, address in (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"):
        listener = socket.create_server((address, 0), family=family, backlog=1024)
        # Tells the kernel that the listener is this service's.
        listener.setsockopt(WFP, REGISTER_LISTENER, b"")
        threads.append(threading.Thread(target=accept, args=(listener,)))
    for thread in threads:
        thread.start()
    print("ready", flush=True)


main()
