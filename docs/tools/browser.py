"""Renders the built pages in a Chromium of this machine: ``python -m docs.tools.browser build/docs``.

Without a network, on wide and narrow screens. Fails on errors of the console, pictures that do not load and anything
that is wider than the page and cannot be scrolled. Where no Chromium is found it says so, and nothing fails.

python -m docs.tools.browser build/docs --pages index howto/several-gpus --pictures build/pictures    # to look at
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (1440, 1280, 400)
SCHEMES = ("light", "dark")

_WRONG = """
(() => {
  const wrong = [], wide = document.documentElement.clientWidth + 1;
  const name = e => `${e.tagName.toLowerCase()} ${JSON.stringify(e.textContent.trim().slice(0, 40))}`;
  for (const picture of document.images)
    if (!picture.complete || !picture.naturalWidth) wrong.push('a picture that does not load: ' + picture.src);
  if (document.documentElement.scrollWidth > wide) wrong.push('the page is wider than the screen');
  for (const e of document.querySelectorAll('article *')) {
    const box = e.getBoundingClientRect();
    if (!box.width || e.closest('svg') && e.tagName != 'svg' || e.closest('.headerlink')) continue;
    let right = wide, scrolls = false;
    for (let p = e.parentElement; p && p !== document.body; p = p.parentElement) {
      const way = getComputedStyle(p).overflowX;
      if (way == 'auto' || way == 'scroll') { scrolls = true; break; }
      if (way != 'visible') right = Math.min(right, p.getBoundingClientRect().right + 1);
    }
    if (!scrolls && box.right > right) wrong.push('clipped: ' + name(e));
  }
  return wrong.slice(0, 5);
})()
"""
"""Runs in the page; what can be scrolled may be as wide as it likes."""


def found() -> str | None:
    """The path of a Chromium, the environment's ``CHROMIUM`` first."""
    return next(
        (path for name in (os.environ.get("CHROMIUM", ""), *NAMES) if name and (path := shutil.which(name))), None
    )


class Browser:
    """A Chromium without a window and without a network, over the pipes of its DevTools protocol."""

    def __init__(self, program: str, bars: bool = True) -> None:
        self.profile = tempfile.TemporaryDirectory()
        flags = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={self.profile.name}"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"]
        if not bars:
            flags.append("--hide-scrollbars")
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # it has none for root
        # it reads from 3 and writes to 4
        shell = ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null', program, *flags, "about:blank"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(shell, bufsize=0, **pipes)
        assert self.process.stdin
        assert self.process.stdout
        self._out, self._in = self.process.stdin, self.process.stdout
        self._rest = b""
        self._count = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        page = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self._in.read(1 << 16)
            if not more:
                raise RuntimeError("the browser ended")
            self._rest += more
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result; events that come before it are kept."""
        self._count += 1
        command: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        left = json.dumps(command).encode() + b"\0"
        while left:
            left = left[self._out.write(left) :]
        while True:
            message = self._read()
            if message.get("id") == self._count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.events.append(message)

    def show(self, address: str, width: int) -> None:
        """Loads a page, up to its load event."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.send("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def scheme(self, name: str) -> None:
        """Light or dark, as the system would ask for."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def value(self, script: str) -> Any:
        """What JavaScript says about the page."""
        made = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in made:
            raise RuntimeError(made["exceptionDetails"]["exception"]["description"])
        return made["result"].get("value")

    def errors(self) -> list[str]:
        """What the console says in red since the page was asked for."""
        said = []
        for event in self.events:
            what = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                thrown = what["exceptionDetails"]
                said.append(thrown.get("exception", {}).get("description", thrown["text"]))
            elif event["method"] == "Log.entryAdded" and what["entry"]["level"] == "error":
                said.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")
            elif event["method"] == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert"):
                said.append(" ".join(str(part.get("value", part.get("description"))) for part in what["args"]))
        return [f"console: {line}" for line in said]

    def picture(self) -> bytes:
        """The page from top to bottom, as PNG."""
        made = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(made["data"])

    def close(self) -> None:
        """Ends the browser."""
        self._out.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._in.close()
        self.profile.cleanup()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def problems(browser: Browser, page: Path, pictures: Path | None = None) -> list[str]:
    """What is wrong with a page on screens of all widths; writes what they look like to a folder, if there is one."""
    wrong = []
    for width in WIDTHS:
        browser.show(page.resolve().as_uri(), width)
        wrong += [f"{width} pixels: {line}" for line in browser.value(_WRONG) + browser.errors()]
        for scheme in SCHEMES if pictures else ():
            assert pictures
            browser.scheme(scheme)
            (pictures / f"{page.parent.name}-{page.stem}-{width}-{scheme}.png").write_bytes(browser.picture())
    return wrong


def main() -> int:
    """Prints the problems of all pages; 1 if there are any, or no pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the built site")
    parser.add_argument("--pages", nargs="*", help="these alone, without .html")
    parser.add_argument("--pictures", type=Path, help="write pictures of the pages to this folder")
    args = parser.parse_args()
    program = found()
    if program is None:
        print("no Chromium on this machine, nothing was looked at; CHROMIUM=/path/of/one names it")
        return 0
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    if args.pages:
        pages = [args.folder / f"{name}.html" for name in args.pages]
    else:
        pages = sorted(args.folder.rglob("*.html"))
    with Browser(program, bars=not args.pictures) as browser:  # pictures lack the width of bars
        wrong = [
            f"{page.relative_to(args.folder)}: {line}"
            for page in pages
            for line in problems(browser, page, args.pictures)
        ]
    print("\n".join(wrong) or f"{len(pages)} pages look right in {Path(program).name}")
    return 1 if wrong or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
