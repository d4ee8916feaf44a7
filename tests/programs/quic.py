"""A QUIC client that falls back to TCP, as browsers do, and its server, which serves both.

    quic.py serve ADDRESS PORT       prints "ready"
    quic.py ask ADDRESS PORT NAME    prints over what it was answered, and the answer
"""

import asyncio
import datetime
import ssl
import sys
import tempfile

from aioquic.asyncio import connect, serve
from aioquic.quic.configuration import QuicConfiguration
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ALPN = ["test"]
PATIENCE = 60


def certificate():
    """A file with a certificate that is signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "www.example")])
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    file = tempfile.NamedTemporaryFile(suffix=".pem")
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    file.write(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    file.write(builder.sign(key, hashes.SHA256()).public_bytes(encoding))
    file.flush()
    return file


async def answer(reader, writer):
    """Echoes a stream."""
    writer.write(await reader.read())
    writer.write_eof() if writer.can_write_eof() else writer.close()


async def serve_both(address, port):
    with certificate() as file:
        configuration = QuicConfiguration(is_client=False, alpn_protocols=ALPN)
        configuration.load_cert_chain(file.name, file.name)
        on_stream = lambda reader, writer: asyncio.ensure_future(answer(reader, writer))
        await serve(address, port, configuration=configuration, stream_handler=on_stream)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file.name)

        async def one_line(reader, writer):
            writer.write(await reader.readline())
            writer.close()

        await asyncio.start_server(one_line, address, port, ssl=context)
    print("ready", flush=True)
    await asyncio.Event().wait()


async def ask_quic(address, port, name):
    configuration = QuicConfiguration(
        alpn_protocols=ALPN, server_name=name, verify_mode=ssl.CERT_NONE
    )
    async with connect(address, port, configuration=configuration) as client:
        reader, writer = await client.create_stream()
        writer.write(b"hello\n")
        writer.write_eof()
        return await reader.read()


async def ask_tcp(address, port, name):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(
        address, port, ssl=context, server_hostname=name
    )
    writer.write(b"hello\n")
    answer = await reader.read()
    writer.close()
    return answer


async def ask(address, port, name):
    try:
        told, how = await asyncio.wait_for(ask_quic(address, port, name), PATIENCE), "quic"
    except ConnectionError:
        told, how = await asyncio.wait_for(ask_tcp(address, port, name), PATIENCE), "tcp"
    print(how, told.decode().strip())


match sys.argv[1:]:
    case ["serve", address, port]:
        asyncio.run(serve_both(address, int(port)))
    case ["ask", address, port, name]:
        asyncio.run(ask(address, int(port), name))
