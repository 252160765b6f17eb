"""The demo: matches, masks, points and averages of photos. The page itself is in `macosnet_hf/demo/`.

Run it with `make demo`, or `python app.py --port 7860 --host 127.0.0.1 --model FOLDER_OR_HUB_ID`.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from macosnet_hf import DEFAULT_CHECKPOINT, MaCoSNetError
from macosnet_hf.demo.matcher import Matcher
from macosnet_hf.demo.page import build_demo
from macosnet_hf.demo.server import serve
from macosnet_hf.demo.texts import SUMMARY
from macosnet_hf.demo.visitor_files import folder_of_a_run
from macosnet_hf.io.memory import give_memory_back
from macosnet_hf.io.threads import wait_briefly

__all__ = ["Matcher", "build_demo", "main", "serve"]


def main(arguments: list[str] | None = None) -> int:
    """Serves the page until Ctrl+C or SIGTERM; returns 2 if the port is taken or the checkpoint cannot be loaded."""
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address")
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")), help="port")
    parser.add_argument(
        "--model",
        default=os.environ.get("MACOSNET_MODEL") or DEFAULT_CHECKPOINT,
        help="folder or Hub id of a checkpoint (default: the variable MACOSNET_MODEL, else the embedded one)",
    )
    parser.add_argument(
        "--offer",
        nargs="*",
        metavar="NAME",
        default=os.environ.get("MACOSNET_OFFER", "lite base").split(),
        help="further models that visitors may choose: lite, base, folders, Hub ids; each is loaded when somebody asks "
        "for it first and stays in memory; one of the Hub that cannot be had is left out (default: the variable "
        "MACOSNET_OFFER, else lite and base)",
    )
    parser.add_argument(
        "--allowed-hosts",
        nargs="+",
        metavar="NAME",
        help="names under which browsers may address the server, such as demo.example.org, *.example.org or * for any "
        "(default: those of this machine where --host is one of them, else any)",
    )
    options = parser.parse_args(arguments)
    for name in ("SIGTERM", "SIGHUP"):  # of services and terminals that end; as Ctrl+C
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    give_memory_back()
    wait_briefly()
    with folder_of_a_run() as files:
        return run(options, files)


def run(options: argparse.Namespace, files: Path) -> int:
    """Serves the page; `files` is the base folder of what visitors upload."""
    matcher = Matcher(options.model, options.offer)
    try:
        matcher.check()
        matcher.fetch()
    except MaCoSNetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while files come from the Hub
        return 0
    for sentence in matcher.missing.values():
        print(f"warning: {sentence} It is not offered.", file=sys.stderr)
    demo = build_demo(matcher)
    try:
        address = serve(demo, options.host, options.port, allowed_hosts=options.allowed_hosts, files=files)
    except OSError:
        print(f"error: cannot listen on {options.host}:{options.port}; choose another --port.", file=sys.stderr)
        return 2
    print(f"Open {address} in a browser. Stop with Ctrl+C.", flush=True)
    try:
        matcher.reader.start()
        matcher.load()  # while the visitor looks at the page, so that the first match does not wait for it
        demo.block_thread()
    except MaCoSNetError as error:
        demo.close(verbose=False)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # gradio handles it while blocking; this is Ctrl+C while the model loads
        demo.close(verbose=False)
    finally:
        matcher.reader.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
