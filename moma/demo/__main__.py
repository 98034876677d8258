"""A page to draw with, in the browser: `python -m moma.demo`, once `pip install -e .[demo]` has been run."""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from moma.app.files import Parser, check_writable, exit_status
from moma.app.options import WEIGHTS
from moma.demo.studio import Studio
from moma.sampling.device import DTYPES, set_precision
from moma.sampling.interface import Runtime
from moma.weights.bundle import Bundle

UPLOAD = "32mb"  # of a file
WAITING = 20  # drawings in the queue


def main(argv: Sequence[str] | None = None) -> None:
    """ValueError for a user's mistake."""
    set_precision()
    parser = Parser("python -m moma.demo", description=__doc__)
    add = parser.add_argument
    add("--weights", type=Path, metavar="DIR", help="bundle (default: weights/moma or weights/mini)")
    add(
        "--out",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help="folder of the images (default: out/demo)",
    )
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: this machine"
        " alone; 0.0.0.0 lets everybody in its network draw)")  # fmt: skip
    add("--port", type=int, default=7860, metavar="N", help="default: 7860")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="of the weights (default: auto)")
    args = parser.parse_args(argv)
    try:
        from moma.demo.page import CSS, EXAMPLES, build, theme
    except ImportError as error:
        raise ValueError(f"the page needs Gradio ({error}): pip install -e .[demo]") from None
    check_address(args.host, args.port)
    folder = args.weights or next((folder for folder in WEIGHTS if folder.is_dir()), WEIGHTS[-1])
    runtime = Runtime.choose(Bundle.open(folder), args.device, args.dtype)
    check_writable("--out", args.out)
    studio = Studio(runtime, args.out)
    for example in sorted(EXAMPLES.glob("*.png")):
        studio.remember(example)
    page = build(studio).queue(max_size=WAITING)
    page.launch(
        server_name=args.host, server_port=args.port, share=False, quiet=True, show_error=True,
        max_file_size=UPLOAD, allowed_paths=[str(args.out), str(EXAMPLES)], css=CSS, theme=theme(),
        prevent_thread_lock=True,
    )  # fmt: skip
    print(f"http://{args.host}:{args.port} draws with {folder}; Ctrl-C ends it", flush=True)
    page.block_thread()


def check_address(host: str, port: int) -> None:
    """ValueError if no server can listen there."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({error})") from None


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("demo", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
