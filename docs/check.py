"""What must hold of the built site: `python docs/check.py [build/docs]` names every fault, and fails if there is one.

Links lead somewhere, nothing is fetched from elsewhere, formulas and signatures stand as they are written, nothing
private is shown. Where there is a Chromium, no page says anything on its console.
"""

import contextlib
import functools
import html
import http.server
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from html.parser import HTMLParser

MUST_HOLD = {  # what is easily lost on the way from a docstring to a page
    "index.html": "y_i  =  Σ_h  Σ_{j in N(i)}  A_h(i, j) · V_h x_j\n",
    "api/jaxattn.html": "s_ij = scale·(q_i · k_j) + q_i · r[j-i] + relative_bias[j-i] + bias_ij     then soft cap, "
    "score_mod, mask\ny_i  = sum_j A_ij v_j,   A_i = normalize(s_i)\n",
    "api/jaxattn.normalize.html": 'scores: Float[Array, "*rows slots"],',
    "api/jaxattn.zoo.html": "<code>[*batch, *query_grid, out_features]</code>",
    "api/jaxattn.nn.html": 'inputs_q: Real[ArrayLike, "*batch_and_grid in_features"],',
    "recipes.html": "layer = nn.ShiftedWindowAttention(",
}
FETCHED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}
# Whom a browser asks on its own: updates and the like.
ITS_OWN = re.compile(r"(?:http://)?(?!fonts\.)[\w.-]+\.(?:google|googleapis|gvt1|gvt2)\.com[:/]|/favicon\.ico")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page(HTMLParser):
    """The links, the anchors, and what else a page fetches."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif (tag, name) in FETCHED:
                self.fetched.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)


def faults(root: pathlib.Path) -> Iterator[str]:
    """A sentence for everything that is wrong with the pages in a folder."""
    texts = {path.resolve(): path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.html"))}
    pages = {path: Page(text) for path, text in texts.items()}
    for path, page in pages.items():
        name = path.relative_to(root.resolve()).as_posix()
        if path.name == "404.html":  # it is shown in place of any page, so its links begin at the server's root
            continue
        for link in page.links + page.fetched:
            where = urllib.parse.urlsplit(link)
            if where.scheme or where.netloc:
                if link in page.fetched and where.scheme != "data":
                    yield f"{name} fetches {link}"
                continue
            there = (path.parent / urllib.parse.unquote(where.path)).resolve() if where.path else path
            if not there.exists():
                yield f"{name}: {link} leads nowhere"
            elif there in pages and urllib.parse.unquote(where.fragment or "") not in pages[there].anchors | {""}:
                yield f"{name}: {link} has no such place"
        for words in re.findall(r"<em>(.*?)</em>", texts[path], re.DOTALL):
            if name.startswith(("api/", "layers/")) and not re.fullmatch(r"[\w\s'’,-]+", words):
                yield f"{name}: stars were taken for emphasis: {words}"
        if re.search(r"kernels|lowerings|/_", name):
            yield f"{name} is private"
    for style in root.rglob("*.css"):
        for address in re.findall(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]*)", style.read_text("utf-8")):
            yield f"{style.relative_to(root)} fetches {address}"
    for name, what in MUST_HOLD.items():
        path = (root / name).resolve()
        if path not in texts or what not in shown(texts[path]):
            yield f"{name} lacks {what!r}"


def shown(text: str) -> str:
    """A page without spans and links."""
    return html.unescape(re.sub(r"</?(span|a|autoref)\b[^>]*>", "", text))


def said(root: pathlib.Path, browser: str) -> Iterator[str]:
    """What a page of each kind says on a browser's console, what it asks for in vain, and whom else it asks."""
    asked: list[str] = []
    handler = functools.partial(Server, asked, directory=str(root))
    kinds = {path.parent: path for path in sorted(root.rglob("*.html")) if path.name != "404.html"}
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"localhost:{server.server_port}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
        options += ["--disable-component-update", "--enable-logging=stderr", "--virtual-time-budget=3000"]
        options += [f"--proxy-server={here}", "--proxy-bypass-list=<-loopback>"]  # so that every request comes here
        for path in dict.fromkeys([*root.glob("[a-z]*.html"), *kinds.values()]):
            name = path.relative_to(root).as_posix()
            address = f"http://{here}/{name}"
            run = subprocess.run([browser, *options, address], capture_output=True, text=True, timeout=120)
            if "</html>" not in run.stdout:
                yield f"{name}: {browser} shows nothing: {run.stderr[-300:]}"
            yield from (f"{name}: on the console: {line}" for line in run.stderr.splitlines() if "CONSOLE" in line)
            yield from (f"{name}: asked for {what}" for what in asked if not ITS_OWN.match(what))
            asked.clear()
        server.shutdown()


class Server(http.server.SimpleHTTPRequestHandler):
    """The site, also as a proxy for everything else, which is refused and noted."""

    def __init__(self, asked: list[str], *arguments, **keywords):
        self.asked = asked
        super().__init__(*arguments, **keywords)

    def do_CONNECT(self):
        self.send_error(403)

    def do_GET(self):
        where = urllib.parse.urlsplit(self.path)
        if where.netloc not in ("", f"localhost:{self.server.server_port}"):
            self.send_error(403)
        else:
            self.path = where.path
            super().do_GET()

    def send_error(self, code, *arguments, **keywords):
        self.asked.append(f"{self.path} ({code})")
        with contextlib.suppress(ConnectionError):  # it asks and does not wait
            super().send_error(code, *arguments, **keywords)

    def log_message(self, *arguments):
        pass


def main() -> None:
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs")
    found = list(faults(root))
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser:
        found += said(root, browser)
    else:
        print("there is no Chromium here: the console was not looked at")
    print(*found, sep="\n", end="\n" * bool(found))
    print(f"{len(list(root.rglob('*.html')))} pages, {len(found)} faults")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
