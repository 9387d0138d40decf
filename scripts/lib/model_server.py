"""A model server: `model_server.py NAME PORT`. Reads every request to its end, and answers with its name."""
import asyncio, sys

name, port = sys.argv[1].encode(), int(sys.argv[2])
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(name), name)


async def serve(reader, writer):
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b"\r\ntransfer-encoding: chunked\r\n" in head:
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    await reader.readexactly(size + 2)
                await reader.readexactly(2)
            elif (at := head.find(b"\r\ncontent-length: ")) >= 0:
                await reader.readexactly(int(head[at + 18 : head.index(b"\r\n", at + 18)]))
            writer.write(ANSWER)
            await writer.drain()
    except (asyncio.IncompleteReadError, OSError):
        writer.close()


async def main():
    await (await asyncio.start_server(serve, "127.0.0.1", port, backlog=1024)).serve_forever()


asyncio.run(main())
